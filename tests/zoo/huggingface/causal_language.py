"""Batches and loss of a causal language model: the next token of random text."""

import torch
from torch import nn

BATCH_SIZE = 4
VOCABULARY = 101
LENGTH = 12


def make_batch(batch_size):
    text = torch.randint(4, VOCABULARY, (batch_size, LENGTH + 1))
    return {"input_ids": text[:, :-1].contiguous()}, text[:, 1:].contiguous()


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())
