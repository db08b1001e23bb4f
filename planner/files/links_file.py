"""Links between neighbouring workers: what was measured, the line through it, and what a crossing is charged.

Schema `evenstage/links/1`. A message of n tensors and b bytes from one stage to the next is modelled as
`message_ms + n · tensor_ms + b · ms_per_byte`: torch posts every tensor of a boundary as an operation of its own within
one batch, so a transport may have a latency per batch, per tensor, or both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from planner.errors import FileError
from planner.files.profile_file import Machine
from planner.files.reading import decode_file, dump_json, read_json, write_text

SCHEMA = "evenstage/links/1"


@dataclass(frozen=True, slots=True)
class LinkCost:
    """What a message across a stage boundary adds to its sender and, again, to its receiver.

    >>> LinkCost.of_bandwidth(1e6).tensor_transfer_ms(500)
    0.5
    """

    message_ms: float = 0.0
    tensor_ms: float = 0.0
    ms_per_byte: float = 0.0

    @staticmethod
    def of_bandwidth(bytes_per_s: float) -> LinkCost:
        """A rate alone: no latency, and the whole time of the transfer charged to each of the two stages."""
        return LinkCost(ms_per_byte=1e3 / bytes_per_s)

    def tensor_transfer_ms(self, num_bytes: int) -> float:
        """One tensor's part of its message. A tensor without bytes is not sent."""
        return self.tensor_ms + num_bytes * self.ms_per_byte if num_bytes else 0.0


FREE = LinkCost()


@dataclass(frozen=True, slots=True)
class LinkFit:
    """The line through the samples of all links; times are of the two ends of a crossing together.

    `residual` is the root mean square of the errors, each relative to the geometric mean of measured and fitted. Of
    several links the slowest is that from `slowest_sender` to the worker after it, and takes `slowest_ratio` times what
    the line says.
    """

    message_ms: float
    tensor_ms: float
    ms_per_byte: float
    residual: float
    slowest_sender: int = 0
    slowest_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("message_ms", "tensor_ms", "ms_per_byte", "residual", "slowest_sender", "slowest_ratio"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                rule = "the coefficients of a link are finite and not negative"
                raise FileError(f"links: {name} is {value}", rule, "measure the links again")

    def crossing_ms(self, num_tensors: int, num_bytes: int) -> float:
        """Sender and receiver together, for a message of `num_bytes` in all.

        >>> LinkFit(0.1, 0.2, 1e-6, 0.0).crossing_ms(2, 500_000)
        1.0
        """
        return self.message_ms + num_tensors * self.tensor_ms + num_bytes * self.ms_per_byte

    def cost(self) -> LinkCost:
        """What each of the two ends is charged: one half.

        A stage between two others sends and receives once per microbatch and direction, so that it, and every path
        through the pipeline, is charged the whole; only the outermost stages get a mean for what they do.
        """
        return LinkCost(self.message_ms / 2, self.tensor_ms / 2, self.ms_per_byte / 2)


@dataclass(frozen=True, slots=True)
class LinkSample:
    """Medians over the rounds for one kind of message between two workers.

    `send_ms` is what posting the send holds up the sender; `receive_ms` is from posting the receive until the data are
    there, the send having been posted before.
    """

    sender: int
    receiver: int
    num_tensors: int
    num_bytes: int
    send_ms: float
    receive_ms: float

    @property
    def crossing_ms(self) -> float:
        """What the crossing takes of the two workers together."""
        return self.send_ms + self.receive_ms


@dataclass(frozen=True, slots=True)
class Links:
    """The links of a topology of `num_workers`, as measured by wall time."""

    machine: Machine
    backend: str
    num_workers: int
    num_rounds: int
    samples: tuple[LinkSample, ...]
    fit: LinkFit

    def save(self, path: Path | str) -> None:
        """Write the links as JSON, atomically."""
        write_text(Path(path), dump_json(self, SCHEMA))

    @staticmethod
    def load(path: Path | str) -> Links:
        """Read links. Raises FileError with what is wrong and where."""
        return decode_file(Links, read_json(Path(path), SCHEMA), "links", path)
