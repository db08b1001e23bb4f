"""Random words and pictures, and their losses: what the models of this folder have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CLASSES, PIXELS = 1000, 224


def words(batch_size: int, length: int, vocabulary: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random words, [batch, length], and the word behind each."""
    tokens = torch.randint(vocabulary, (batch_size, length))
    return {"input_ids": tokens}, tokens.roll(-1, 1)


def word_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy per word."""
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())


def pictures(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random pictures, [batch, 3, 224, 224], and classes."""
    return {"pixel_values": torch.randn(batch_size, 3, PIXELS, PIXELS)}, torch.randint(CLASSES, (batch_size,))


def class_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy per picture."""
    return nn.functional.cross_entropy(output.logits, targets)
