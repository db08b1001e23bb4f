"""What a Hugging Face model is trained on, by its kind: random batches of the right shapes, and the loss.

Tokens are drawn uniformly from the vocabulary, so a loss near that of a uniform guess is all that training can reach:
these batches are for planning, timing and checking, not for learning. Every row of a batch counts the same number of
targets, so that the mean over microbatches is the mean over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Batch = tuple[dict[str, "torch.Tensor"], "torch.Tensor"]
MASKED_SHARE = 0.15
DEFAULT_IMAGE_SIZE = 224
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of model: how its classes end, the Auto class that chooses one by model type, its batches and its loss.

    `make_batch(config, batch_size, length)` gives inputs by keyword and targets; `loss(output, targets)` is a mean.
    `choices(config)` is how many classes a uniform guess chooses from. `length` says whether sequences have one.
    `needs` are attributes of the configuration without which a class of that name is something else.
    """

    name: str
    endings: tuple[str, ...]
    auto_class: str
    make_batch: Callable[[Any, int, int], Batch]
    loss: Callable[[Any, Any], torch.Tensor]
    choices: Callable[[Any], int]
    length: bool = True
    needs: tuple[str, ...] = ()


def vocabulary_size(config: Any) -> int:
    """The number of tokens of the model that reads and writes text."""
    return int(config.get_text_config().vocab_size)


def num_labels(config: Any) -> int:
    """The number of classes that a classifier tells apart."""
    return int(config.num_labels)


def _tokens(config: Any, batch_size: int, length: int) -> torch.Tensor:
    import torch

    return torch.randint(vocabulary_size(config), (batch_size, length))


def _next_tokens(config: Any, batch_size: int, length: int) -> Batch:
    """Sequences, and for every token the one after it."""
    tokens = _tokens(config, batch_size, length + 1)
    return {"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


def _masked_tokens(config: Any, batch_size: int, length: int) -> Batch:
    """Sequences in which the same number of tokens a row is replaced; only those are targets."""
    import torch

    tokens = _tokens(config, batch_size, length)
    count = max(1, round(MASKED_SHARE * length))
    chosen = torch.rand(batch_size, length).argsort(dim=1)[:, :count]
    targets = torch.full_like(tokens, IGNORED).scatter(1, chosen, tokens.gather(1, chosen))
    return {"input_ids": tokens.scatter(1, chosen, _tokens(config, batch_size, count))}, targets


def _shifted_right(config: Any, targets: torch.Tensor) -> torch.Tensor:
    import torch

    start = getattr(config, "decoder_start_token_id", None)
    first = torch.full_like(targets[:, :1], 0 if start is None else start)
    return torch.cat([first, targets[:, :-1]], dim=1)


def _translated_tokens(config: Any, batch_size: int, length: int) -> Batch:
    tokens, targets = _tokens(config, batch_size, length), _tokens(config, batch_size, length)
    return {"input_ids": tokens, "decoder_input_ids": _shifted_right(config, targets)}, targets


def _transcribed_sound(config: Any, batch_size: int, length: int) -> Batch:
    import torch

    targets = _tokens(config, batch_size, length)
    sound = torch.randn(batch_size, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": sound, "decoder_input_ids": _shifted_right(config, targets)}, targets


def _labelled_sequences(config: Any, batch_size: int, length: int) -> Batch:
    import torch

    return {"input_ids": _tokens(config, batch_size, length)}, torch.randint(num_labels(config), (batch_size,))


def _labelled_tokens(config: Any, batch_size: int, length: int) -> Batch:
    import torch

    labels = torch.randint(num_labels(config), (batch_size, length))
    return {"input_ids": _tokens(config, batch_size, length)}, labels


def _labelled_images(config: Any, batch_size: int, length: int) -> Batch:
    import torch

    size = getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    images = torch.randn(batch_size, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": images}, torch.randint(num_labels(config), (batch_size,))


def _token_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats, per token that is a target."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(output.logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _label_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats, per sequence or image."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(output.logits, targets)


KINDS = (
    Kind(
        "speech to text",
        ("ForConditionalGeneration", "ForSpeechSeq2Seq"),
        "AutoModelForSpeechSeq2Seq",
        _transcribed_sound,
        _token_loss,
        vocabulary_size,
        needs=("is_encoder_decoder", "num_mel_bins", "max_source_positions"),
    ),
    Kind(
        "sequence to sequence",
        ("ForConditionalGeneration", "MTModel"),
        "AutoModelForSeq2SeqLM",
        _translated_tokens,
        _token_loss,
        vocabulary_size,
        needs=("is_encoder_decoder", "vocab_size"),
    ),
    Kind(
        "masked language model",
        ("ForMaskedLM", "WithLMHeadModel"),
        "AutoModelForMaskedLM",
        _masked_tokens,
        _token_loss,
        vocabulary_size,
    ),
    Kind(
        "causal language model",
        ("ForCausalLM", "LMHeadModel"),
        "AutoModelForCausalLM",
        _next_tokens,
        _token_loss,
        vocabulary_size,
    ),
    Kind(
        "sequence classification",
        ("ForSequenceClassification",),
        "AutoModelForSequenceClassification",
        _labelled_sequences,
        _label_loss,
        num_labels,
    ),
    Kind(
        "token classification",
        ("ForTokenClassification",),
        "AutoModelForTokenClassification",
        _labelled_tokens,
        _token_loss,
        num_labels,
    ),
    Kind(
        "image classification",
        ("ForImageClassification",),
        "AutoModelForImageClassification",
        _labelled_images,
        _label_loss,
        num_labels,
        length=False,
    ),
)
