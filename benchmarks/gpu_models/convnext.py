"""ConvNeXt-T on pictures of 224 pixels."""

from typing import Any

import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification


def build_model() -> nn.Module:
    """The model with random weights."""
    return ConvNextForImageClassification(ConvNextConfig(num_labels=1000))


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random pictures and classes."""
    return {"pixel_values": torch.randn(batch_size, 3, 224, 224)}, torch.randint(1000, (batch_size,))


def loss_fn(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(output.logits, targets)
