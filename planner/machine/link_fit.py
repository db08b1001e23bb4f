"""Samples of links → the line through them, by non-negative least squares of the relative errors.

Relative, because a message of 4 KiB must be right to the same share as one of 64 MiB. There are three unknowns, so
the exact solution is the best feasible one among the ordinary least squares of every subset of them (Lawson and
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
    residual = float(np.sqrt(np.mean((predicted / taken - 1) ** 2)))
    ratios: dict[int, list[float]] = {}
    for sample, ratio in zip(samples, taken / predicted, strict=True):
        ratios.setdefault(min(sample.sender, sample.receiver), []).append(float(ratio))
    slowest = max(ratios, key=lambda pair: median(ratios[pair]))
    return LinkFit(message, tensor, per_byte, residual, slowest, median(ratios[slowest]))


def _relative_least_squares(rows: Array, taken: Array) -> tuple[float, float, float]:
    scale = rows.max(axis=0)
    weighted = rows / scale / taken[:, None]
    usable = [0, 2] if len(set(rows[:, 1])) == 1 else [0, 1, 2]
    best, least = np.zeros(3), np.inf
    for count in range(1, len(usable) + 1):
        for chosen in combinations(usable, count):
            found = np.zeros(3)
            found[list(chosen)] = np.linalg.lstsq(weighted[:, list(chosen)], np.ones(len(taken)), rcond=None)[0]
            error = float(np.sum((weighted @ found - 1) ** 2))
            if found.min() >= 0 and error < least:
                best, least = found, error
    message, tensor, per_byte = (best / scale).tolist()
    return message, tensor, per_byte
