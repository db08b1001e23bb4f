"""A small GPT-2 of Hugging Face transformers, built from its configuration: random weights, nothing is downloaded.

Its head is tied: the first and the last stage hold the same matrix, and the plan pays for that.

    plan --gpus 4 examples/gpt2.py --train
"""

from collections.abc import Iterable

import torch
from stdlib_text import SEQUENCE_LENGTH, VOCABULARY_SIZE, stdlib_corpus
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

BATCH_SIZE = 16
LEARNING_RATE = 1e-3


def build_model() -> nn.Module:
    """The model with fresh weights; dropout is off, and so is the cache of keys, which training has no use for."""
    config = GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_positions=SEQUENCE_LENGTH,
        n_embd=256,
        n_layer=8,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.06,  # with GPT-2's own 0.02 a model this small stays at the unigram entropy for long
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Windows of text, by keyword, and for every word in them the next word: [batch, 64] token ids."""
    tokens, targets = stdlib_corpus().draw_windows(batch_size)
    return {"input_ids": tokens}, targets


def loss_fn(output: CausalLMOutputWithCrossAttentions, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy per word, in nats. The targets are already the next words, so nothing is shifted here."""
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; the pipeline calls this once per stage, with the stage's own parameters."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def reference_loss() -> tuple[float, str]:
    """What the loss has to beat: knowing only how frequent each word is."""
    return stdlib_corpus().unigram_entropy(), "unigram entropy of the same tokens"
