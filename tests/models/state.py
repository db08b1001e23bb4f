"""State: written, shared, frozen, not saved, returned; modules called twice; constants; train told from eval."""

import torch
from torch import nn

BATCH_SIZE = 8


class Norms(nn.Module):
    """BatchNorm that learns, BatchNorm in evaluation mode whose statistics stay, GroupNorm beside them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.live, self.frozen = nn.BatchNorm1d(6), nn.BatchNorm1d(6).eval()
        self.frozen.running_mean.uniform_(), self.frozen.running_var.uniform_(0.5, 2.0)
        self.group = nn.GroupNorm(2, 6)

    def forward(self, x):
        return x + self.group(self.frozen(self.live(self.linear(x))))


class State(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.norms = nn.ModuleList(Norms() for _ in range(3))
        self.shared = nn.Linear(6, 6)
        self.recurrent_weight = nn.Parameter(torch.randn(6, 6) / 4)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("table", torch.randn(6), persistent=False)
        self.register_buffer("scale", torch.full((6,), 0.5))
        self.register_buffer("mean", torch.zeros(6))
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens):
        x = self.embedding(tokens)
        offset = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        x = x + self.steps / 10 - self.mean
        for norm in self.norms:
            x = self.shared(norm(x)) * self.scale + self.table + offset
            x = x @ self.recurrent_weight
            x = x * 2 if self.training else x * 0
        return {"logits": self.head(x), "steps": self.steps, "scale": self.scale, "penalised": self.recurrent_weight}


def build_model():
    return State()


def make_batch(batch_size):
    return torch.randint(0, 20, (batch_size,)), torch.randint(0, 20, (batch_size,))


def loss_fn(output, targets):
    assert output["steps"].item() >= 1 and output["scale"].tolist() == [0.5] * 6
    return nn.functional.cross_entropy(output["logits"], targets) + 0.1 * output["penalised"].square().sum()
