"""A Llama of 12 layers, 1024 wide."""

import torch
from random_batches import word_loss, words
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 32000, 512
loss_fn = word_loss


def build_model() -> nn.Module:
    """The model with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random words, and the word behind each."""
    return words(batch_size, LENGTH, VOCABULARY)
