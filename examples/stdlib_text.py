"""Real text that every machine with Python has: the source of the standard library, split into words.

Nothing is downloaded. Words are identifiers, numbers, single punctuation marks and line ends; the vocabulary holds the
most frequent ones, and every other word is `<unk>`.
"""

import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

VOCABULARY_SIZE = 10_000
SEQUENCE_LENGTH = 64
MAX_CHARACTERS = 3_000_000  # read in under a second, and enough that a short training does not see a window twice
UNKNOWN = "<unk>"
WORD = re.compile(r"[A-Za-z_]+|[0-9]+|[^\sA-Za-z_0-9]|\n")


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text as token ids, with the words that they stand for."""

    words: tuple[str, ...]
    tokens: torch.Tensor

    def unigram_entropy(self) -> float:
        """The loss in nats of a model that knows how often each word occurs, and nothing else.

        A model whose loss is lower has learned something from the words before.
        """
        counts = torch.bincount(self.tokens).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())

    def draw_windows(self, batch_size: int, length: int = SEQUENCE_LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
        """`batch_size` random windows and, for every token in them, the one that follows: two [batch, length] tensors.

        They come from torch's global generator, so the same seed gives the same batch on every rank.
        """
        starts = torch.randint(0, len(self.tokens) - length, (batch_size, 1))
        windows = self.tokens[starts + torch.arange(length + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def build_corpus(text: str, vocabulary_size: int = VOCABULARY_SIZE) -> Corpus:
    """Split `text` into words and number the most frequent ones; 0 is `<unk>`.

    >>> corpus = build_corpus("a b a c", vocabulary_size=3)
    >>> corpus.words, corpus.tokens.tolist()
    (('<unk>', 'a', 'b'), [1, 2, 1, 0])
    """
    found = WORD.findall(text)
    frequent = sorted(Counter(found).items(), key=lambda item: (-item[1], item[0]))
    words = (UNKNOWN, *(word for word, _ in frequent[: vocabulary_size - 1]))
    number = {word: index for index, word in enumerate(words)}
    return Corpus(words, torch.tensor([number.get(word, 0) for word in found]))


def read_text(files: Sequence[Path], max_characters: int = MAX_CHARACTERS) -> str:
    """The files one after the other, up to `max_characters`."""
    parts: list[str] = []
    missing = max_characters
    for file in files:
        if missing <= 0:
            break
        parts.append(file.read_text(encoding="utf-8", errors="replace")[:missing])
        missing -= len(parts[-1])
    return "".join(parts)


@lru_cache(maxsize=1)
def stdlib_corpus() -> Corpus:
    """The modules at the top of the standard library, in alphabetical order; read once per process."""
    return build_corpus(read_text(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))))
