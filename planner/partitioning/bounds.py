"""Costs by table, incumbents, and the windows that they leave to the ILP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from planner.partitioning.chain_costs import Chain, Cuts, crossing_ms, holds, is_plain
from planner.scheduling.closed_forms import gpipe_step_ms
from planner.scheduling.simulation import StageTimes

Array = npt.NDArray[np.float64]
WEIGHTS = (0.0, 0.25, 0.4, 0.5, 0.7, 1.0)
REACH = 6


class CostTable:
    """Prefix sums of a chain, so that a stage's times cost a subtraction; agrees with `stage_costs`.

    `up[j] − down[i]` is the load of a stage of layers i to j, the transfers at both its ends included.
    """

    def __init__(self, chain: Chain, num_microbatches: int, plain: bool = False) -> None:
        self.chain, self.num_microbatches, self.plain = chain, num_microbatches, plain
        self.num_layers = len(chain.ids)
        across_forward, across_backward = (np.array(ms) for ms in crossing_ms(chain))
        self.forward = _prefix(chain.forward_ms)
        self.backward = _prefix(chain.backward_ms)
        self.first = _prefix(chain.backward_first_ms)
        self.optimizer = _prefix(chain.optimizer_ms)
        self.forward_up, self.forward_down = self.forward + across_forward, self.forward - across_forward
        self.backward_up, self.backward_down = self.backward + across_backward, self.backward - across_backward
        self.first_up, self.first_down = self.first + across_backward, self.first - across_backward
        self.allowed = np.array([False, *(self._allows(j) for j in range(1, self.num_layers)), False])

    def _allows(self, position: int) -> bool:
        if not self.plain:
            return True
        inside = any(min(t.layers) < position <= max(t.layers) for t in self.chain.tied)
        return self.chain.plain_cut[position] and not inside

    def stage(self, start: int, stop: int) -> StageTimes:
        """The times of a stage of layers `start` to `stop`."""
        tied = sum(group.optimizer_ms for group in self.chain.tied if holds(group, start, stop))
        return StageTimes(
            float(self.forward_up[stop] - self.forward_down[start]),
            float(self.backward_up[stop] - self.backward_down[start]),
            float(self.first_up[stop] - self.first_down[start]),
            float(self.optimizer[stop] - self.optimizer[start]) + tied,
        )

    def step(self, cuts: Cuts) -> float:
        """The GPipe step of `cuts`; infinite where the cuts are not allowed."""
        bounds = [0, *cuts, self.num_layers]
        if self.plain and not is_plain(self.chain, cuts):
            return float("inf")
        stages = [self.stage(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
        sums = sum(t.sum_ms for t in self.chain.tied if any(min(t.layers) < cut <= max(t.layers) for cut in cuts))
        return gpipe_step_ms(stages, self.num_microbatches) + sums


def _prefix(values: Sequence[float]) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)])


def incumbent(table: CostTable, num_stages: int, known: Sequence[Cuts] = ()) -> Cuts | None:
    """A good cut: the best of balanced ones and of `known`, improved by moving boundaries. None where none is legal."""
    candidates = [cuts for cuts in (*_balanced(table, num_stages), *known) if table.step(cuts) < float("inf")]
    best = min(candidates, key=table.step, default=None)
    while best is not None:
        better = min(_neighbours(table, best), key=table.step, default=best)
        if table.step(better) >= table.step(best) * (1 - 1e-12):
            return best
        best = better
    return None


def _balanced(table: CostTable, num_stages: int) -> Iterator[Cuts]:
    """Cuts whose largest load of w·forward + (1−w)·backward is least, for several weights w."""
    for weight in WEIGHTS:
        up = weight * table.forward_up + (1 - weight) * table.backward_up
        down = weight * table.forward_down + (1 - weight) * table.backward_down
        cuts = least_largest(up, down, table.allowed, num_stages)
        if cuts is not None:
            yield cuts


def least_largest(up: Array, down: Array, allowed: npt.NDArray[np.bool_], num_stages: int) -> Cuts | None:
    """Cuts at `allowed` positions that minimise the largest `up[j] − down[i]` over stages; None where none exist.

    >>> least_largest(np.array([0., 1, 2, 9]), np.array([0., 1, 2, 9]), np.array([0, 1, 1, 0], bool), 2)
    (2,)
    """
    last = len(up) - 1
    position = np.arange(last + 1)
    usable = allowed.copy()
    usable[last] = True
    loads = up[None, :] - down[:, None]
    loads[position[:, None] >= position[None, :]] = np.inf
    loads[:, ~usable] = np.inf
    value = np.full(last + 1, np.inf)
    value[0] = -np.inf
    choices = []
    for _ in range(num_stages):
        table = np.maximum(value[:, None], loads)
        choices.append(table.argmin(axis=0))
        value = table.min(axis=0)
    if not np.isfinite(value[last]):
        return None
    cuts, stop = [], last
    for choice in reversed(choices[1:]):
        stop = int(choice[stop])
        cuts.append(stop)
    return tuple(reversed(cuts))


def _neighbours(table: CostTable, cuts: Cuts) -> Iterator[Cuts]:
    """Cuts with one boundary, or two neighbouring ones together, moved by a few layers."""
    for first in range(len(cuts)):
        for width in (1, 2):
            for delta in (d for d in range(-REACH, REACH + 1) if d):
                moved = tuple(c + delta if first <= i < first + width else c for i, c in enumerate(cuts))
                bounds = (0, *moved, table.num_layers)
                ordered = all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
                if ordered and all(table.allowed[cut] for cut in moved):
                    yield moved


def simple_bound(table: CostTable, num_stages: int) -> float:
    """A lower bound on every step: all work once, and m−1 times the largest layer or the average stage."""
    chain = table.chain
    least_first = sum(min(pair) for pair in zip(chain.backward_ms, chain.backward_first_ms, strict=True))
    return float(table.forward[-1]) + least_first + (table.num_microbatches - 1) * sum(_least_loads(table, num_stages))


def _least_loads(table: CostTable, num_stages: int) -> tuple[float, float]:
    chain = table.chain
    forward = max(max(chain.forward_ms), float(table.forward[-1]) / num_stages)
    backward = max(max(chain.backward_ms), float(table.backward[-1]) / num_stages)
    return forward, backward


def windows(table: CostTable, num_stages: int, best_step_ms: float) -> list[list[int]]:
    """For every boundary the positions at which a step of at most `best_step_ms` is still possible.

    A stage with forward f and backward b makes the step at least Σf + Σmin(b, bf) + (m−1)·(f + b), where f and b are
    not below the average stage or the largest layer; stages above that are left out, and positions must be reachable
    from both ends.
    """
    last = table.num_layers
    least_forward, least_backward = _least_loads(table, num_stages)
    forward = np.maximum(table.forward_up[None, :] - table.forward_down[:, None], least_forward)
    backward = np.maximum(table.backward_up[None, :] - table.backward_down[:, None], least_backward)
    fixed = simple_bound(table, num_stages) - (table.num_microbatches - 1) * (least_forward + least_backward)
    limit = best_step_ms * (1 + 1e-9) + 1e-9 * abs(best_step_ms)
    fits = fixed + (table.num_microbatches - 1) * (forward + backward) <= limit
    position = np.arange(last + 1)
    usable = table.allowed.copy()
    usable[[0, last]] = True
    fits &= (position[:, None] < position[None, :]) & usable[None, :] & usable[:, None]
    ahead, behind = [position == 0], [position == last]
    for _ in range(num_stages - 1):
        ahead.append((ahead[-1][:, None] & fits).any(axis=0))
        behind.append((fits & behind[-1][None, :]).any(axis=1))
    return [
        np.nonzero(ahead[k + 1] & behind[num_stages - 1 - k] & table.allowed)[0].tolist() for k in range(num_stages - 1)
    ]
