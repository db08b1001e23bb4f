"""What people do today, on the same costs: equal layers, equal parameters, torchgpipe, Accelerate."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from planner.partitioning.bounds import least_largest
from planner.partitioning.chain_costs import Chain, Cuts

NUMBERED = re.compile(r"(?:(?P<owner>.*)\.)?(?P<number>\d+)")
ACCELERATE_SLACK = 1.1


def baselines(chain: Chain, num_stages: int) -> dict[str, Cuts]:
    """Each baseline's cuts into exactly `num_stages` stages, none empty."""
    parameters = held_parameter_bytes(chain)
    loads = [f + b for f, b in zip(chain.forward_ms, chain.backward_ms, strict=True)]
    return {
        "equal_layers": equal_layers(chain.ids, num_stages),
        "equal_parameters": equal_sums(parameters, num_stages),
        "torchgpipe": block_partition(loads, num_stages),
        "accelerate": greedy_fill(parameters, num_stages),
    }


def held_parameter_bytes(chain: Chain) -> list[float]:
    """Parameter bytes by layer; a tied parameter counts where it is first used."""
    held = [float(size) for size in chain.parameter_bytes]
    for tied in chain.tied:
        held[min(tied.layers)] += tied.parameter_bytes
    return held


def equal_layers(ids: Sequence[str], num_stages: int) -> Cuts:
    """Equally many repeated blocks in each stage, as people cut by hand; what surrounds them goes to the ends.

    >>> equal_layers(["embedding", "layers.0", "layers.0.norm", "layers.1", "layers.2", "layers.3", "head"], 2)
    (4,)
    """
    owners: dict[str, list[int]] = {}
    for index, name in enumerate(ids):
        if match := NUMBERED.fullmatch(name):
            owners.setdefault(match["owner"] or "", []).append(index)
    blocks = max(owners.values(), key=len, default=[])
    if len(blocks) < num_stages:
        return tuple(len(ids) * k // num_stages for k in range(1, num_stages))
    return tuple(blocks[-(-len(blocks) * k // num_stages)] for k in range(1, num_stages))


def equal_sums(weights: Sequence[float], num_stages: int) -> Cuts:
    """Contiguous stages whose largest sum is least; among equal ones the leftmost."""
    prefix = np.concatenate([[0.0], np.cumsum(weights)])
    allowed = np.ones(len(prefix), dtype=np.bool_)
    allowed[[0, -1]] = False
    cuts = least_largest(prefix, prefix, allowed, num_stages)
    assert cuts is not None, "there are at least as many layers as stages"
    return cuts


def block_partition(weights: Sequence[float], num_blocks: int) -> Cuts:
    """Blocks whose sums differ by at most the largest weight, as torchgpipe balances (Bárány and Grinberg, 2015).

    Starts from equal counts; while a block q is lighter than the heaviest block p by more than the largest weight, the
    block next to the nearest such q, on p's side, gives it one element.

    >>> block_partition([1, 2, 3, 4, 5, 6], 2)
    (4,)
    """
    bounds = [len(weights) * k // num_blocks for k in range(num_blocks + 1)]
    largest = max(weights)
    for _ in range(len(weights) * num_blocks * num_blocks):
        sums = [sum(weights[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        heaviest = max(range(num_blocks), key=lambda k: sums[k])
        light = [k for k in range(num_blocks) if sums[k] < sums[heaviest] - largest * (1 + 1e-12)]
        light = [k for k in light if _size(bounds, k + 1 if k < heaviest else k - 1) > 1]
        if not light:
            break
        nearest = min(light, key=lambda k: abs(k - heaviest))
        if nearest < heaviest:
            bounds[nearest + 1] += 1
        else:
            bounds[nearest] -= 1
    return tuple(bounds[1:-1])


def _size(bounds: Sequence[int], block: int) -> int:
    return bounds[block + 1] - bounds[block]


def greedy_fill(weights: Sequence[float], num_stages: int) -> Cuts:
    """Fill stage after stage up to 1.1 times the average, as Accelerate's device map does; none stays empty."""
    limit = ACCELERATE_SLACK * sum(weights) / num_stages
    cuts: list[int] = []
    filled = 0.0
    for index, weight in enumerate(weights):
        missing = num_stages - 1 - len(cuts)
        must = len(weights) - index <= missing
        if index > (cuts[-1] if cuts else 0) and missing and (filled + weight > limit or must):
            cuts.append(index)
            filled = 0.0
        filled += weight
    return tuple(cuts)
