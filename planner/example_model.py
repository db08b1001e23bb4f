"""A model file for `plan --gpus K model.py`."""

import torch
from torch import nn

BATCH_SIZE = 16


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.narrow(nn.functional.gelu(self.widen(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(64, 256)
        self.layers = nn.ModuleList(Block(256) for _ in range(8))
        self.head = nn.Linear(256, 1000)

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build_model():
    """The model, built anew on every rank."""
    return Model()


def make_batch(batch_size):
    """(inputs, targets), batch first; torch, numpy and random are seeded before each call."""
    return torch.randn(batch_size, 64), torch.randint(0, 1000, (batch_size,))


def loss_fn(output, targets):
    """A scalar: the mean over the batch."""
    return nn.functional.cross_entropy(output, targets)


# optional: def make_optimizer(parameters), def batches(batch_size), LOSS_REDUCTION = "sum"
