"""Values that cross cuts: read by several later stages, whole numbers, masks, strided, without gradient, written to.

Inputs are positional, read out of order and late; the output is a dataclass with constants in it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BATCH_SIZE = 8


@dataclass
class Result:
    logits: torch.Tensor
    early: torch.Tensor
    strided: torch.Tensor
    number: int
    nothing: Any
    nested: tuple[torch.Tensor, str, dict[str, float]]


torch.export.register_dataclass(Result)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x, table, mask, positions):
        update = self.activation(self.linear(self.norm(x)))
        update = update.masked_fill(mask[..., None], 0.0) * table[positions]
        return x + update


class Values(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, late, x, positions):
        first = x = self.enter(x)
        mask = positions == 0
        with torch.no_grad():
            table = torch.cos(torch.arange(6)[:, None] * 0.3 + torch.arange(8)) + x.mean() * 0
            chosen = x.argmax(-1)
        swapped = x.transpose(0, 1)
        halves = x.clone()
        left = halves[..., :4]
        left += self.mix(x)[..., 4:]
        for layer in self.layers:
            x = layer(x, table, mask, positions)
        x = x + halves + first + nn.functional.one_hot(chosen, 8) * 0.1
        logits = self.head(self.mix(x) + swapped.transpose(0, 1)).mean(1) * late
        return Result(logits, first, swapped, 3, None, (x.detach(), "x", {"rate": 0.5}))


def build_model():
    return Values()


def make_batch(batch_size):
    inputs = (torch.randn(batch_size, 3), torch.randn(batch_size, 5, 4), torch.randint(0, 6, (batch_size, 5)))
    return inputs, torch.randint(0, 3, (batch_size,))


def loss_fn(output, targets):
    assert isinstance(output, Result) and output.nested[1:] == ("x", {"rate": 0.5})
    assert output.number == 3 and output.nothing is None and not output.nested[0].requires_grad
    loss = nn.functional.cross_entropy(output.logits, targets) + output.early.square().mean()
    return loss + output.strided.abs().mean() + output.nested[0].mean()
