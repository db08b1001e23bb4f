"""A transformer in bf16, its embedding tied to its head; what crosses a cut has another dtype at almost each."""

import torch
from torch import nn

BATCH_SIZE = 8
PRECISION = "bf16"
VOCABULARY, LENGTH, WIDTH = 32, 6, 16


class Block(nn.Module):
    """Attention written out, so that a cut may lie behind every linear layer; dtypes differ from value to value."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)  # whose gradient would be nothing but rounding
        self.up, self.activation, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, mask):
        y = self.norm(x)
        scores = self.query(y) @ self.key(y).mT / WIDTH**0.5
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1).to(x.dtype)
        x = x + self.out(weights @ self.value(y))
        return x + self.down(self.activation(self.up(x)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(1))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def build_model():
    return Transformer()


def make_batch(batch_size):
    tokens = torch.randint(0, VOCABULARY, (batch_size, LENGTH + 1))
    return tokens[:, :-1], tokens[:, 1:]


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())
