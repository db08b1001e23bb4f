"""Inputs of every awkward kind, in another order in every batch.

A nested dict, a dataclass, constants (None, bool, int, str), an unused keyword, one that is only read at the end, one
that is added in place in every stage, and one that the model itself writes to.
"""

from dataclasses import dataclass

import torch
from torch import nn

BATCH_SIZE = 8


@dataclass
class Sides:
    left: torch.Tensor
    right: torch.Tensor


torch.export.register_dataclass(Sides)


class Inputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x, late, added, pair, sides, unused=None, power=1, mode="sum", scaled=False):
        late += 1
        for layer in self.layers:
            x = layer(torch.tanh(x))
            x += added
        x = x**power - pair["subtracted"] + 2 * pair["doubled"] if mode == "sum" else x
        x = x + sides.left - 3 * sides.right
        return self.head(x * late if scaled else x)


def build_model():
    return Inputs()


def make_inputs(batch_size):
    draw = lambda: torch.randn(batch_size, 6)  # noqa: E731
    return {
        "x": draw(),
        "late": draw(),
        "added": draw(),
        "pair": {"doubled": draw(), "subtracted": draw()},
        "sides": Sides(draw(), draw()),
        "unused": draw(),
        "power": 2,
        "mode": "sum",
        "scaled": True,
    }


def make_batch(batch_size):
    return make_inputs(batch_size), torch.randint(0, 3, (batch_size,))


def batches(batch_size):
    for number in range(4):
        inputs, targets = make_batch(batch_size)
        if number % 2:
            inputs = dict(reversed(inputs.items()))
            inputs["pair"] = dict(reversed(inputs["pair"].items()))
        yield inputs, targets


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output, targets)
