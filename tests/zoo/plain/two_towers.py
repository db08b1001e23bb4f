"""Two towers that meet only in the end, and a dict of three outputs, one of them from the middle."""

import torch
from torch import nn

BATCH_SIZE = 4


def tower(features):
    return nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = tower(10), tower(14)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, user, item):
        user = nn.functional.normalize(self.user(user), dim=-1)
        item = nn.functional.normalize(self.item(item), dim=-1)
        return {"user": user, "scores": self.scale * user @ item.T, "item": item}


def build_model():
    return TwoTowers()


def make_batch(batch_size):
    return {"user": torch.randn(batch_size, 10), "item": torch.randn(batch_size, 14)}, torch.zeros(batch_size)


def loss_fn(output, targets):
    scores = output["scores"]
    spread = output["user"].var(0).mean() + output["item"].var(0).mean()
    return nn.functional.cross_entropy(scores, torch.arange(len(scores))) - 0.1 * spread
