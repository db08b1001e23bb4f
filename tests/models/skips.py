"""Values that travel: a float read by several later stages, a no_grad region, tied embedding and head, dropout."""

import torch
from torch import nn

BATCH_SIZE = 8


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, positions):
        return x + self.dropout(self.narrow(torch.relu(self.widen(self.norm(x))))) * positions


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Block(16) for _ in range(5))
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        first = x = self.embedding(tokens)
        with torch.no_grad():
            positions = 1 + torch.arange(tokens.shape[1], dtype=x.dtype)[:, None] / 10 + 0 * x.mean()
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(x + first)


def build_model():
    return Skips()


def make_batch(batch_size):
    tokens = torch.randint(0, 50, (batch_size, 7))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())
