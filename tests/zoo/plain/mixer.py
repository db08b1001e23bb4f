"""MLP-Mixer: transposed views that cross from layer to layer."""

import torch
from torch import nn

BATCH_SIZE = 4


def mlp(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.tokens, self.channels = nn.ModuleList(mlp(16) for _ in range(3)), nn.ModuleList(mlp(24) for _ in range(3))
        self.head = nn.Linear(24, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2)
        for tokens, channels in zip(self.tokens, self.channels, strict=True):
            x = x + tokens(x)
            x = (x.mT + channels(x.mT)).mT
        return self.head(x.mean(2))


def build_model():
    return Mixer()


def make_batch(batch_size):
    return torch.randn(batch_size, 3, 16, 16), torch.randint(0, 10, (batch_size,))


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output, targets)
