"""BatchNorm whose statistics change, ReLU in place, long skips, SGD with momentum, a sum loss."""

import torch
from torch import nn

BATCH_SIZE = 8
LOSS_REDUCTION = "sum"


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.activation(x + self.norm(self.convolution(x)))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.ModuleList(Block(4) for _ in range(3))
        self.up = nn.ModuleList(Block(4) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x, kept = self.stem(x), []
        for block in self.down:
            x = block(x)
            kept.append(x)
        for block in self.up:
            x = block(x + kept.pop())
        return self.head(x.mean((2, 3)))


def build_model():
    return Convolutional()


def make_batch(batch_size):
    return torch.randn(batch_size, 3, 6, 6), torch.randint(0, 5, (batch_size,))


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output, targets, reduction="sum")


def make_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
