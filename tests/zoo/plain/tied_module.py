"""One block called four times, as in ALBERT, and another one that is registered under two names."""

import torch
from torch import nn

BATCH_SIZE = 4


class TiedModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(12, 20)
        self.block = nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 20), nn.GELU())
        self.leave = nn.Linear(20, 20)
        self.again = self.leave
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        x = self.enter(x)
        for _ in range(4):
            x = x + self.block(x)
        return self.head(self.again(torch.relu(self.leave(x))))


def build_model():
    return TiedModule()


def make_batch(batch_size):
    return torch.randn(batch_size, 12), torch.randint(0, 3, (batch_size,))


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output, targets)
