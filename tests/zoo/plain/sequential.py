"""nn.Sequential of linear layers: the plain chain."""

import torch
from torch import nn

BATCH_SIZE = 4


def build_model():
    return nn.Sequential(
        nn.Linear(16, 32), *(m for _ in range(5) for m in (nn.Linear(32, 32), nn.GELU())), nn.Linear(32, 3)
    )


def make_batch(batch_size):
    return torch.randn(batch_size, 16), torch.randint(0, 3, (batch_size,))


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output, targets)
