"""T5-small: an encoder whose last layer every layer of the decoder reads."""

import torch
from random_batches import word_loss, words
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

VOCABULARY, LENGTH = 32128, 256
loss_fn = word_loss


def build_model() -> nn.Module:
    """The model with random weights."""
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, use_cache=False, decoder_start_token_id=0))


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random words, random answers to them, and the word behind each of the answers."""
    answers, targets = words(batch_size, LENGTH, VOCABULARY)
    question, _ = words(batch_size, LENGTH, VOCABULARY)
    return {**question, "decoder_input_ids": answers["input_ids"]}, targets
