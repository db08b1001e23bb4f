"""Frozen parameters, a whole stage of them: FROZEN names the layers without gradient."""

import torch
from torch import nn

BATCH_SIZE = 8
FROZEN = (0, 1)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6))
        for index in FROZEN:
            self.layers[index].requires_grad_(False)
        self.layers[3][0].bias.requires_grad_(False)

    def forward(self, x):
        first = x
        for layer in self.layers:
            x = layer(x) + first
        return x


def build_model():
    return Frozen()


def make_batch(batch_size):
    return torch.randn(batch_size, 6), torch.randn(batch_size, 6)


def loss_fn(output, targets):
    return nn.functional.mse_loss(output, targets)
