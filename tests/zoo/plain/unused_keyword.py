"""Keywords that every layer takes: one that nothing reads, one that only the last layer reads, one that is None."""

import torch
from torch import nn

BATCH_SIZE = 4


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, unused=None, extra=None):
        return self.outer(torch.relu(self.inner(x))) if extra is None else self.outer(self.inner(x)) + extra


class UnusedKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x, *, unused=None, extra=None, mask=None):
        for layer in self.layers[:-1]:
            x = layer(x, unused=unused)
        return self.layers[-1](x, unused=unused, extra=extra if mask is None else mask)


def build_model():
    return UnusedKeyword()


def make_batch(batch_size):
    unused, extra = torch.ones(batch_size, 5, dtype=torch.long), torch.randn(batch_size, 16)
    inputs = {"x": torch.randn(batch_size, 16), "unused": unused, "extra": extra, "mask": None}
    return inputs, torch.randn(batch_size, 16)


def loss_fn(output, targets):
    return nn.functional.mse_loss(output, targets)
