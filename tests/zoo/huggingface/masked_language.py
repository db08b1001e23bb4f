"""Batches and loss of a masked language model: random text of two lengths, its padding masked."""

import torch
from torch import nn

BATCH_SIZE = 4
VOCABULARY = 101
LENGTH = 12


def make_batch(batch_size):
    text = torch.randint(4, VOCABULARY, (batch_size, LENGTH))
    mask = torch.ones(batch_size, LENGTH, dtype=torch.long)
    mask[::2, -3:] = 0
    return {"input_ids": text, "attention_mask": mask}, torch.randint(4, VOCABULARY, (batch_size, LENGTH))


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
