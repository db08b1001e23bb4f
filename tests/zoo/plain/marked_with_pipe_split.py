"""The example of torch's own tests: bare parameters, a skip, a buffer, and pipe_split() already in forward."""

import torch
from torch import nn
from torch.distributed.pipelining import pipe_split

BATCH_SIZE = 4


class Marked(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.second = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.register_buffer("constant", torch.randn(width))
        self.lin0, self.lin1, self.lin2 = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        x = torch.relu(torch.mm(x, self.first))
        skip = x
        x = self.lin0(x)
        pipe_split()
        x = torch.relu(torch.mm(x, self.first)) + self.constant
        x = self.lin1(x)
        pipe_split()
        x = torch.mm(x + skip, self.second)
        return self.lin2(torch.relu(x))


def build_model():
    return Marked()


def make_batch(batch_size):
    return torch.randn(batch_size, 24), torch.randn(batch_size, 24)


def loss_fn(output, targets):
    return nn.functional.mse_loss(output, targets)
