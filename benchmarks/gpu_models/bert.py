"""BERT-base with its dropouts, learning to fill in words."""

import torch
from random_batches import word_loss, words
from torch import nn
from transformers import BertConfig, BertForMaskedLM

VOCABULARY, LENGTH = 30522, 256
loss_fn = word_loss


def build_model() -> nn.Module:
    """The model with random weights."""
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY))


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random words, and the word behind each."""
    return words(batch_size, LENGTH, VOCABULARY)
