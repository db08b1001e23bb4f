"""Samples of links → the line through them, by non-negative least squares of the relative errors.

Relative, because a message of 4 KiB must be right to the same share as one of 64 MiB; to the geometric mean of what was
measured and what the line says, because errors relative to the measurement alone would follow the lowest samples (one
that is ten times too high would count less than one that is half too low). There are three unknowns, so each weighted
problem is solved exactly: the best feasible one among the ordinary solutions on every subset of them (Lawson and
Hanson, Solving Least Squares Problems, chapter 23: the optimum is the ordinary solution on its own support).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median

import numpy as np
import numpy.typing as npt

from planner.errors import RunError
from planner.files.links_file import LinkFit, LinkSample

NUM_REWEIGHTINGS = 30
Array = npt.NDArray[np.float64]


def fit_links(samples: Sequence[LinkSample]) -> LinkFit:
    """The common line through the samples of all links. Raises RunError without samples that took time.

    Where every message has as many tensors as the others, nothing tells the two latencies apart: all is the message's.

    >>> of = lambda tensors, size: LinkSample(0, 1, tensors, size, 0.0, 0.1 + 0.02 * tensors + 1e-6 * size)
    >>> fit = fit_links([of(1, 1000), of(3, 1000), of(1, 10**6), of(3, 10**6)])
    >>> round(fit.message_ms, 6), round(fit.tensor_ms, 6), round(fit.ms_per_byte * 1e6, 6), round(fit.residual, 6)
    (0.1, 0.02, 1.0, 0.0)
    """
    taken = np.array([sample.crossing_ms for sample in samples])
    if not len(taken) or float(taken.min()) <= 0:
        raise RunError("links without samples that took time", "every message takes some", "measure the links again")
    rows = np.array([[1.0, sample.num_tensors, sample.num_bytes] for sample in samples])
    message, tensor, per_byte = _relative_least_squares(rows, taken)
    predicted = rows @ np.array([message, tensor, per_byte])
    residual = float(np.sqrt(np.mean((predicted - taken) ** 2 / (predicted * taken))))
    slowest, ratio = _slowest(samples, taken / predicted)
    return LinkFit(message, tensor, per_byte, residual, slowest, ratio)


def _slowest(samples: Sequence[LinkSample], ratios: Array) -> tuple[int, float]:
    """The first worker of the slowest pair, and its median of measured ÷ predicted; 1 where there is one pair only."""
    pairs: dict[int, list[float]] = {}
    for sample, ratio in zip(samples, ratios.tolist(), strict=True):
        pairs.setdefault(min(sample.sender, sample.receiver), []).append(ratio)
    slowest = max(pairs, key=lambda pair: median(pairs[pair]))
    return slowest, median(pairs[slowest]) if len(pairs) > 1 else 1.0


def _relative_least_squares(rows: Array, taken: Array) -> tuple[float, float, float]:
    """The non-negative coefficients x of the least Σ (p − t)² / (p · t), p = rows @ x, by reweighting.

    The weight (t + p) / (t · p²) makes each weighted problem's fixed point the one of that sum.
    """
    scale = rows.max(axis=0)
    scaled = rows / scale
    usable = [0, 2] if len(set(rows[:, 1])) == 1 else [0, 1, 2]
    found = _non_negative(scaled, taken, 1 / taken, usable)
    for _ in range(NUM_REWEIGHTINGS):
        predicted = scaled @ found
        found = _non_negative(scaled, taken, np.sqrt((taken + predicted) / taken) / predicted, usable)
    message, tensor, per_byte = (found / scale).tolist()
    return message, tensor, per_byte


def _non_negative(rows: Array, taken: Array, weights: Array, usable: Sequence[int]) -> Array:
    """The x ≥ 0 of the least |weights · (rows @ x − taken)|, zero outside the columns `usable`."""
    best, least = np.zeros(rows.shape[1]), np.inf
    for count in range(1, len(usable) + 1):
        for chosen in map(list, combinations(usable, count)):
            found = np.zeros(rows.shape[1])
            found[chosen] = np.linalg.lstsq(rows[:, chosen] * weights[:, None], taken * weights, rcond=None)[0]
            error = float(np.sum((weights * (rows @ found - taken)) ** 2))
            if found.min() >= 0 and error < least:
                best, least = found, error
    return best
