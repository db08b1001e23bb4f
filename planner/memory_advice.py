"""No plan fits into the memory: by how much, where, and the nearest things that work, found by solving for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from planner.errors import InfeasibleError
from planner.partitioning.memory_limit import TooLittleMemoryError

MOST_GPUS = 64


def explain_infeasible(
    refused: Sequence[TooLittleMemoryError],
    works: Callable[..., bool],
    *,
    gpus: int,
    batch_size: int,
    microbatch_sizes: Sequence[int],
    other_schedule: str | None,
) -> InfeasibleError:
    """The error of the microbatch count that comes nearest, with what would work instead.

    `works(**changes)` says whether a plan exists for the request with these changes.
    """
    nearest = min(refused, key=lambda error: error.tightest.peak_bytes)
    remedies = [f"--memory {nearest.tightest.peak_bytes}B"]
    if other_schedule is not None and works(schedule=other_schedule):
        remedies.append(f"--schedule {other_schedule}")
    remedies += [f"--gpus {count}" for count in _first(works, "gpus", _more_gpus(gpus))]
    sizes = sorted({size * gpus for size in microbatch_sizes if size * gpus < batch_size}, reverse=True)
    remedies += [f"--batch-size {size}" for size in _first(works, "batch_size", sizes, microbatches=None)]
    *others, last = remedies
    return InfeasibleError(nearest.got, nearest.rule, f"use {', '.join(others)}{' or ' if others else ''}{last}")


def _first(
    works: Callable[..., bool], name: str, values: Sequence[int] | Iterator[int], **changes: object
) -> list[int]:
    found = next((value for value in values if works(**{name: value}, **changes)), None)
    return [] if found is None else [found]


def _more_gpus(gpus: int) -> Iterator[int]:
    """The next few numbers one by one, then doubled."""
    yield from range(gpus + 1, min(gpus + 5, MOST_GPUS))
    more = 2 * (gpus + 4)
    while more <= MOST_GPUS:
        yield more
        more *= 2
