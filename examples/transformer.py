"""The transformer of PyTorch's pipelining tutorial, trained to predict the next word of the standard library's source.

Split it over four GPUs (or four processes on this machine) and train it:

    plan --gpus 4 examples/transformer.py --train
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from stdlib_text import SEQUENCE_LENGTH, VOCABULARY_SIZE, stdlib_corpus
from torch import nn

BATCH_SIZE = 16
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class ModelArgs:
    """The sizes; one core trains a batch of 16 sequences in about a second."""

    dim: int = 256
    n_layers: int = 8
    n_heads: int = 4
    vocab_size: int = VOCABULARY_SIZE
    sequence_length: int = SEQUENCE_LENGTH
    dropout: float = 0.0


class Transformer(nn.Module):
    """Embedding, decoder layers, norm and head: a plain chain, so it may be cut before any of them.

    The head is as heavy as two layers and a half, so stages with equally many layers are not equally long.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                args.dim, args.n_heads, 4 * args.dim, args.dropout, batch_first=True, norm_first=True
            )
            for _ in range(args.n_layers)
        )
        self.norm = nn.LayerNorm(args.dim)
        self.output = nn.Linear(args.dim, args.vocab_size)
        # No word may look at those after it. A buffer: every layer reads it where it runs, and nothing is sent along.
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(args.sequence_length))
        self._start_from_the_words()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, sequence, vocabulary] of the word after each token."""
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, h, tgt_mask=self.mask, memory_mask=self.mask)
        return self.output(self.norm(h))

    @torch.no_grad()
    def _start_from_the_words(self) -> None:
        """Initialise so that the norm at first sees the word itself: the layers add little until they know better.

        As in GPT-2: what every sublayer adds is scaled by one over the square root of their number.
        """
        nn.init.normal_(self.output.weight, std=0.02)
        for layer in self.layers:
            for last in (layer.self_attn.out_proj, layer.multihead_attn.out_proj, layer.linear2):
                last.weight /= math.sqrt(3 * len(self.layers))


def build_model() -> nn.Module:
    """The model with fresh weights."""
    return Transformer(ModelArgs())


def make_batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of text and, for every word in them, the next word: two [batch, 64] tensors of token ids."""
    return stdlib_corpus().draw_windows(batch_size)


def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy per word, in nats."""
    return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; the pipeline calls this once per stage, with the stage's own parameters."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def reference_loss() -> tuple[float, str]:
    """What the loss has to beat: knowing only how frequent each word is."""
    return stdlib_corpus().unigram_entropy(), "unigram entropy of the same tokens"
