"""Batches and loss of an encoder–decoder: a random source with padding, and the next token of a random target."""

import torch
from torch import nn

BATCH_SIZE = 4
VOCABULARY = 101
SOURCE, TARGET = 10, 8


def make_batch(batch_size):
    source = torch.randint(4, VOCABULARY, (batch_size, SOURCE))
    target = torch.randint(4, VOCABULARY, (batch_size, TARGET + 1))
    mask = torch.ones(batch_size, SOURCE, dtype=torch.long)
    mask[::2, -2:] = 0
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target[:, :-1].contiguous()}
    return inputs, target[:, 1:].contiguous()


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
