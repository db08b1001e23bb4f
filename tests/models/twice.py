"""A module called twice, inputs out of order and late, an output made early and one returned twice, dicts."""

import torch
from torch import nn

BATCH_SIZE = 8


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.shared = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.middle = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, late, early, mask):
        early_output = self.first(early)
        x = self.shared(early_output - early)
        x = self.middle(x.masked_fill(mask, 0.0))
        x = self.shared(x).t().contiguous().t()
        logits = self.last(x * late)
        return {"logits": logits, "early": early_output, "nothing": None, "again": logits}


def build_model():
    return Twice()


def make_batch(batch_size):
    inputs = {
        "early": torch.randn(batch_size, 6),
        "late": torch.randn(batch_size, 6),
        "mask": torch.rand(batch_size, 6) > 0.7,
    }
    return inputs, {"classes": torch.randint(0, 3, (batch_size,)), "early": torch.randn(batch_size, 6)}


def loss_fn(output, targets):
    assert output["nothing"] is None and output["again"] is output["logits"]
    first = nn.functional.cross_entropy(output["logits"], targets["classes"])
    return first + nn.functional.mse_loss(output["early"], targets["early"])
