"""A Llama of 12 layers, 1024 wide."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 32000, 512
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=12,
    num_attention_heads=16,
    max_position_embeddings=LENGTH,
    use_cache=False,
)


def build_model() -> nn.Module:
    """The model with random weights."""
    return LlamaForCausalLM(CONFIG)


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random words, and the word behind each."""
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens}, tokens.roll(-1, 1)


def loss_fn(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
