"""U-Net: what every scale of the way down computes is read again on the way up."""

from itertools import pairwise

import torch
from torch import nn

BATCH_SIZE = 4


def double(channels, out):
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, padding=1),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    def __init__(self, widths=(8, 16, 32)):
        super().__init__()
        self.down = nn.ModuleList(double(a, b) for a, b in pairwise((3, *widths)))
        self.pool = nn.MaxPool2d(2)
        self.rise = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(double(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x):
        skips = []
        for block in self.down[:-1]:
            skips.append(block(x))
            x = self.pool(skips[-1])
        x = self.down[-1](x)
        for rise, block in zip(reversed(self.rise), reversed(self.up), strict=True):
            x = block(torch.cat([rise(x), skips.pop()], 1))
        return self.head(x)


def build_model():
    return UNet()


def make_batch(batch_size):
    return torch.randn(batch_size, 3, 16, 16), torch.randint(0, 2, (batch_size, 16, 16))


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output, targets)
