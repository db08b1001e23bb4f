"""A language model of three LSTMs whose states go from one to the next."""

import torch
from torch import nn

BATCH_SIZE = 4


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.first, self.second, self.third = (nn.LSTM(24, 24, batch_first=True) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 50)

    def forward(self, tokens):
        x, state = self.first(self.embedding(tokens))
        x, state = self.second(x, state)
        x, _ = self.third(x, state)
        return self.head(self.norm(x))


def build_model():
    return Recurrent()


def make_batch(batch_size):
    tokens = torch.randint(0, 50, (batch_size, 9))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())
