"""An encoder–decoder that learns to reverse. Hard to cut: every decoder layer reads the encoder's output, so each cut
carries it on and its gradient comes back from every stage; both sides share one embedding, called twice.

    plan --gpus 4 examples/encoder_decoder.py --train
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

BATCH_SIZE = 16
LEARNING_RATE = 1e-3
PADDING, START = 0, 1  # token ids; words are those from FIRST_WORD up
FIRST_WORD = 2
SHORTEST = 8


@dataclass(frozen=True, slots=True)
class ModelArgs:
    """The sizes; one core trains a batch of 16 pairs in well under a second."""

    dim: int = 128
    n_layers: int = 4  # on each side
    n_heads: int = 4
    vocab_size: int = 64
    max_length: int = 24


class EncoderDecoder(nn.Module):
    """Encoder and decoder layers as in `nn.Transformer`, norm first, with learned positions.

    Two masks: padding, which encoder and decoder layers read all the way down, and the causal one of the decoder.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        sizes = {"d_model": args.dim, "nhead": args.n_heads, "dim_feedforward": 4 * args.dim, "dropout": 0.0}
        flags = {"batch_first": True, "norm_first": True}
        self.words = nn.Embedding(args.vocab_size, args.dim)
        self.places = nn.Parameter(torch.randn(args.max_length, args.dim))
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(**sizes, **flags) for _ in range(args.n_layers))
        self.encoder_norm = nn.LayerNorm(args.dim)
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**sizes, **flags) for _ in range(args.n_layers))
        self.decoder_norm = nn.LayerNorm(args.dim)
        self.head = nn.Linear(args.dim, args.vocab_size)
        self.register_buffer("causal", torch.full((args.max_length, args.max_length), -math.inf).triu(1))

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocabulary] of the word after each token of `target`, which follows `source`."""
        padding = torch.zeros_like(source, dtype=torch.float32).masked_fill(source == PADDING, -math.inf)
        memory = self.words(source) + self.places
        for layer in self.encoder:
            memory = layer(memory, src_key_padding_mask=padding)
        memory = self.encoder_norm(memory)
        h = self.words(target) + self.places
        for layer in self.decoder:
            h = layer(h, memory, tgt_mask=self.causal, memory_key_padding_mask=padding)
        return self.head(self.decoder_norm(h))


def build_model() -> nn.Module:
    """The model with fresh weights."""
    return EncoderDecoder(ModelArgs())


def make_batch(batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random sentences of 8 to 24 words, by keyword, and the same sentences backwards: [batch, 24] token ids.

    `target` is what the decoder has said so far: the answer, one place later, behind a start token.
    """
    args = ModelArgs()
    lengths = torch.randint(SHORTEST, args.max_length + 1, (batch_size, 1))
    places = torch.arange(args.max_length)
    words = torch.randint(FIRST_WORD, args.vocab_size, (batch_size, args.max_length))
    source = words.where(places < lengths, PADDING)
    backwards = source.gather(1, (lengths - 1 - places).clamp(min=0)).where(places < lengths, PADDING)
    target = torch.cat([torch.full((batch_size, 1), START), backwards[:, :-1]], dim=1)
    return {"source": source, "target": target}, backwards


def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy per word in nats, the mean per sentence and then over the sentences; padding does not count.

    Per sentence, because sentences differ in length: the mean over all words of a batch is not that of its
    microbatches' means.
    """
    losses = nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten(), reduction="none")
    counted = targets != PADDING
    return ((losses.view_as(targets) * counted).sum(1) / counted.sum(1)).mean()


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; the pipeline calls this once per stage, with the stage's own parameters."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def reference_loss() -> tuple[float, str]:
    """What the loss has to beat: a decoder that has not read the source."""
    return math.log(ModelArgs().vocab_size - FIRST_WORD), "a guess among all words"
