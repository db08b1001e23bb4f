"""A plain chain: what stock torch splits rightly by split_spec."""

import torch
from torch import nn

BATCH_SIZE = 8


def build_model():
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(12, 12), nn.Tanh())), nn.Linear(12, 3))


def make_batch(batch_size):
    return torch.randn(batch_size, 12), torch.randint(0, 3, (batch_size,))


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output, targets)
