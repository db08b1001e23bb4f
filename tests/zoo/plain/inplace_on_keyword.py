"""Each layer adds in place to a keyword of the model, which the next one reads: a sum that travels with the input."""

import torch
from torch import nn

BATCH_SIZE = 4


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x, total):
        x = torch.relu(self.linear(x) + total)
        total += 1.5
        return x


class InplaceOnKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(5))
        self.head = nn.Linear(16, 3)

    def forward(self, x, total):
        for layer in self.layers:
            x = layer(x, total)
        return self.head(x)


def build_model():
    return InplaceOnKeyword()


def make_batch(batch_size):
    return {"x": torch.randn(batch_size, 16), "total": torch.zeros(batch_size, 16)}, torch.randint(0, 3, (batch_size,))


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output, targets)
