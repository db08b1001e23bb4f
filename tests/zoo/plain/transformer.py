"""nn.Transformer: an encoder whose result every decoder layer reads, and a causal mask made in forward."""

import torch
from torch import nn

BATCH_SIZE = 4


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        decoded = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(decoded)


def build_model():
    return Translator()


def make_batch(batch_size):
    target = torch.randint(0, 50, (batch_size, 9))
    return (torch.randint(0, 50, (batch_size, 10)), target[:, :-1].contiguous()), target[:, 1:].contiguous()


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())
