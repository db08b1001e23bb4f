"""T5-small: an encoder whose last layer every layer of the decoder reads."""

from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

VOCABULARY, LENGTH = 32128, 256


def build_model() -> nn.Module:
    """The model with random weights."""
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, use_cache=False, decoder_start_token_id=0))


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random words, random answers, and the word behind each of those."""
    tokens, answers = torch.randint(VOCABULARY, (2, batch_size, LENGTH))
    return {"input_ids": tokens, "decoder_input_ids": answers}, answers.roll(-1, 1)


def loss_fn(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
