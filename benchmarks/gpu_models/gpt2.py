"""GPT-2 with 124 million parameters; its head is tied to its embedding."""

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, LENGTH = 50257, 512


def build_model() -> nn.Module:
    """The model with random weights."""
    return GPT2LMHeadModel(
        GPT2Config(n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    )


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random words, and the word behind each."""
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens}, tokens.roll(-1, 1)


def loss_fn(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
