"""GPT-2 with 124 million parameters; its head is tied to its embedding."""

import torch
from random_batches import word_loss, words
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, LENGTH = 50257, 512
loss_fn = word_loss


def build_model() -> nn.Module:
    """The model with random weights."""
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(n_positions=LENGTH, use_cache=False, **dropouts))


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random words, and the word behind each."""
    return words(batch_size, LENGTH, VOCABULARY)
