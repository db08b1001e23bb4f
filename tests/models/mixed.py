"""bf16 models: a transformer whose embedding is tied to its head, and a convolutional one that keeps long skips."""

import torch
from torch import nn

BATCH_SIZE = 8
PRECISION = "bf16"
VOCABULARY, LENGTH, WIDTH = 32, 6, 16


class Block(nn.Module):
    """Attention written out, so that a cut may lie behind every linear layer; dtypes differ from value to value."""

    def __init__(self):
        super().__init__()
        self.norm, self.query, self.key, self.value = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.up, self.activation, self.down = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.GELU(),
            nn.Linear(2 * WIDTH, WIDTH),
        )

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
        self.blocks = nn.ModuleList(Block() for _ in range(2))
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
