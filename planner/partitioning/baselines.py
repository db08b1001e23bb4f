"""What people do today, on the same costs: equal layers, equal parameters, equal FLOPs, torchgpipe, Accelerate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.partitioning.bounds import least_largest
from planner.partitioning.chain_costs import Chain, Cuts

ACCELERATE_SLACK = 1.1


def baselines(chain: Chain, num_stages: int) -> dict[str, Cuts]:
    """Each baseline's cuts into exactly `num_stages` stages, none empty; `flops` only where they were counted."""
    parameters = held_parameter_bytes(chain)
    loads = [f + b for f, b in zip(chain.forward_ms, chain.backward_ms, strict=True)]
    counted = chain.flops is not None and any(chain.flops)
    return {
        "equal_layers": equal_layers(chain.ids, num_stages),
        "equal_parameters": equal_sums(parameters, num_stages),
        **({"flops": equal_sums(chain.flops or (), num_stages)} if counted else {}),
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

    The blocks are the numbered ones of the prefix that has the most of them, the outermost among equals. With fewer
    blocks than stages, equal counts of layers.

    >>> equal_layers(["embedding", "layers.0", "layers.0.norm", "layers.1.norm", "layers.2", "layers.3", "head"], 2)
    (4,)
    """
    begins: dict[str, dict[str, int]] = {}
    for index, name in enumerate(ids):
        parts = name.split(".")
        for depth, part in enumerate(parts):
            if part.isdecimal():
                begins.setdefault(".".join(parts[:depth]), {}).setdefault(part, index)
    most = max(begins, key=lambda prefix: (len(set(begins[prefix].values())), -len(prefix)), default="")
    blocks = sorted(set(begins.get(most, {}).values()))
    if len(blocks) < num_stages:
        return tuple(len(ids) * k // num_stages for k in range(1, num_stages))
    return tuple(blocks[-(-len(blocks) * k // num_stages)] for k in range(1, num_stages))


def equal_sums(weights: Sequence[float], num_stages: int) -> Cuts:
    """Contiguous stages whose largest sum is least; among equal ones the leftmost."""
    prefix = np.concatenate([[0.0], np.cumsum(weights)])
    cuts = least_largest(prefix, prefix, [np.triu(np.ones((len(prefix), len(prefix)), np.bool_), 1)] * num_stages)
    assert cuts is not None, "there are at least as many layers as stages"
    return cuts


def block_partition(weights: Sequence[float], num_blocks: int) -> Cuts:
    """Blocks whose sums differ by at most one unit, as torchgpipe balances (Bárány and Grinberg, arXiv 1308.2452).

    Weights count from the smallest, in units of their range. From equal counts: while the lightest block is lighter
    than the heaviest by more than a unit, its neighbour towards the heaviest gives it one element.

    >>> block_partition([1, 2, 3, 4, 5, 6], 2)
    (4,)
    """
    least = min(weights)
    unit = max(weights) - least or 1.0
    units = [(weight - least) / unit for weight in weights]
    bounds = [len(weights) // num_blocks * k for k in range(num_blocks)] + [len(weights)]
    for _ in range(len(weights) * num_blocks * num_blocks):
        sums = [sum(units[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        lightest = sums.index(min(sums))
        heaviest = num_blocks - 1 - sums[::-1].index(max(sums))
        if sums[heaviest] <= sums[lightest] + 1:
            break
        if lightest < heaviest:
            bounds[lightest + 1] += 1
        else:
            bounds[lightest] -= 1
    return _none_empty(bounds)


def _none_empty(bounds: list[int]) -> Cuts:
    """The cuts, moved apart where a block of weightless elements was left without any."""
    for k in range(1, len(bounds) - 1):
        bounds[k] = max(bounds[k], bounds[k - 1] + 1)
    for k in range(len(bounds) - 2, 0, -1):
        bounds[k] = min(bounds[k], bounds[k + 1] - 1)
    return tuple(bounds[1:-1])


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
