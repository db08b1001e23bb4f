"""What concurrent copies measured, taken together: one set of samples, and how the machine changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from statistics import mean, median
from typing import Any, TypeVar

import torch.distributed as dist

from planner.profiling.timing import LayerSamples

MOST_PERIODS = 4

Samples = tuple[LayerSamples, ...]
Found = TypeVar("Found")


def on_first_copy(work: Callable[[], Found]) -> Found:
    """What `work` finds on the first copy, for all; collective. The others wait."""
    found: list[Any] = [work() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    first: Found = found[0]
    return first


def gathered(samples: Samples) -> Samples:
    """The samples of all copies, in the order of the rounds; collective."""
    copies: list[Samples] = [()] * dist.get_world_size()
    dist.all_gather_object(copies, samples)
    return pooled(copies)


def pooled(copies: Sequence[Samples]) -> Samples:
    """One set of samples of every layer, in the order of the rounds.

    >>> one, two = (LayerSamples((1.0, 2.0), (3.0,), (4.0,)),), (LayerSamples((5.0, 6.0), (7.0,), (8.0,)),)
    >>> pooled([one, two])[0].forward_ms
    (1.0, 5.0, 2.0, 6.0)
    """
    return tuple(
        LayerSamples(
            _mixed([layer.forward_ms for layer in layers]),
            _mixed([layer.backward_ms for layer in layers]),
            _mixed([layer.backward_first_ms for layer in layers]),
        )
        for layers in zip(*copies, strict=True)
    )


def _mixed(samples: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(chain.from_iterable(zip(*samples, strict=True)))


def periods(samples: Samples, num_rounds: int) -> tuple[float, ...]:
    """How much slower than on average all layers together were, as a fraction, in each stretch of the rounds.

    >>> periods((LayerSamples((1.0, 1.0, 3.0, 3.0), (0.0,) * 4, ()),), 2)
    (-0.5, 0.5)
    """
    count = min(MOST_PERIODS, num_rounds)
    if count < 2:
        return ()
    totals = [
        sum(_median_in(values, index, count) for layer in samples for values in (layer.forward_ms, layer.backward_ms))
        for index in range(count)
    ]
    middle = mean(totals)
    return tuple(total / middle - 1 for total in totals) if middle > 0 else ()


def _median_in(values: Sequence[float], index: int, count: int) -> float:
    start, stop = (len(values) * number // count for number in (index, index + 1))
    return median(values[start:stop] or values)


def drift(samples: Samples) -> float:
    """Relative difference between the first and the second half of the rounds, over all layers."""
    halves = periods(samples, 2)
    return abs(halves[1] - halves[0]) / (1 + halves[0]) if halves else 0.0
