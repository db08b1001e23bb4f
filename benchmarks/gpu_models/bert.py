"""BERT-base with its dropouts, learning to fill in words."""

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

VOCABULARY, LENGTH = 30522, 256


def build_model() -> nn.Module:
    """The model with random weights."""
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY))


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random words, and the word behind each."""
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens}, tokens.roll(-1, 1)


def loss_fn(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
