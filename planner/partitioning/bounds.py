"""Incumbents, lower bounds, and the windows that they leave to the ILP.

The windows come from one path through the schedule, which no step undercuts: all forwards, then (where the first
backward is the cheaper one) the last stage's first backward, every stage's second, and m−2 times the slowest. Written
out it is a constant, a weight on the slowest forward F and on the slowest backward B, and terms that add up over the
boundaries. For F and B inside a box the cheapest such cut is a shortest path, so boxes are halved, best first, and left
out once their cheapest cut is dearer than the incumbent. What the boxes leave is the ILP's to decide.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt

from planner.partitioning.chain_costs import Array, CostTable, Cuts, Mask

Positions = list[npt.NDArray[np.int64]]
Range = tuple[float, float]
WEIGHTS = (0.0, 0.25, 0.4, 0.5, 0.7, 1.0)
REACH = 6
MAX_BOXES = 400
SMALLEST_BOX = 1e-7
FEW_POSITIONS = 2
MAX_TIED = 3
SLACK = 1e-9


def incumbent(table: CostTable, num_stages: int, known: Sequence[Cuts] = ()) -> Cuts:
    """A good cut: the best of balanced ones and of `known`, improved by moving boundaries.

    There must be a legal cut: `num_stages` is at most `table.most_stages()`.
    """
    return _improved(table, min((*_balanced(table, num_stages), *known), key=table.step))


def _improved(table: CostTable, cuts: Cuts) -> Cuts:
    best, best_step = cuts, table.step(cuts)
    while True:
        better = min(_neighbours(table, best), key=table.step, default=best)
        if not table.step(better) < best_step * (1 - 1e-12):
            return best
        best, best_step = better, table.step(better)


def _balanced(table: CostTable, num_stages: int) -> Iterator[Cuts]:
    """Cuts whose largest load of w·forward + (1−w)·backward is least, for several weights w."""
    for weight in WEIGHTS:
        up = weight * table.forward_up + (1 - weight) * table.backward_up
        down = weight * table.forward_down + (1 - weight) * table.backward_down
        cuts = least_largest(up, down, table.stages(num_stages))
        if cuts is not None:
            yield cuts


def least_largest(up: Array, down: Array, stages: Sequence[Mask]) -> Cuts | None:
    """Cuts into `stages` (masks over i, j) that minimise the largest `up[j] − down[i]`; of equals the leftmost.

    None where there are none.

    >>> weights = np.array([0., 1, 2, 9])
    >>> least_largest(weights, weights, [np.triu(np.ones((4, 4), bool), 1)] * 2)
    (2,)
    """
    loads = up[None, :] - down[:, None]
    return least_largest_of([np.where(mask, loads, np.inf) for mask in stages])


def least_largest_of(loads: Sequence[Array]) -> Cuts | None:
    """Cuts that minimise the largest of their stages' `loads[k][i, j]`; infinite ones may not be. None without any."""
    value = np.full(len(loads[0]), np.inf)
    value[0] = -np.inf
    choices = []
    for load in loads:
        largest = np.maximum(value[:, None], load)
        choices.append(largest.argmin(axis=0))
        value = largest.min(axis=0)
    if not np.isfinite(value[-1]):
        return None
    cuts, stop = [], len(value) - 1
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
                ordered = all(a < b for a, b in pairwise((0, *moved, table.num_layers)))
                if ordered and all(table.allowed[cut] for cut in moved):
                    yield moved


@dataclass(frozen=True, slots=True)
class Remainder:
    """What is left to the ILP: positions by boundary, a bound below every step, and the best cut that was met."""

    positions: list[list[int]]
    bound_ms: float
    best: Cuts


def remainder(table: CostTable, num_stages: int, best: Cuts) -> Remainder:
    """What a step of at most that of `best` leaves open. `num_stages` is at least 2."""
    relaxation = _Relaxation(table, num_stages)
    best_step = table.step(best)
    limit = best_step * (1 + SLACK)
    open_boxes = [box for box in relaxation.roots(limit) if box is not None]
    heapq.heapify(open_boxes)
    finished: list[_Box] = []
    for _ in range(MAX_BOXES):
        if not open_boxes:
            break
        box = heapq.heappop(open_boxes)
        halves = relaxation.halves(box, SMALLEST_BOX * best_step)
        if not halves:
            finished.append(box)
        for half in halves:
            child = relaxation.box(box.positions, *half, box.sums_ms, limit)
            if child is None:
                continue
            if table.step(child.cheapest) < best_step:
                best = _improved(table, child.cheapest)
                best_step = table.step(best)
                limit = best_step * (1 + SLACK)
            heapq.heappush(open_boxes, child)
    left = [box for box in (*open_boxes, *finished) if box.bound_ms <= limit]
    positions = [
        sorted({int(j) for box in left for j in box.positions[k][box.through[k] <= limit]})
        for k in range(num_stages - 1)
    ]
    return Remainder(positions, min((box.bound_ms for box in left), default=best_step), best)


@dataclass(frozen=True, slots=True, order=True)
class _Box:
    """Cuts whose slowest forward and backward lie in two ranges: the least that any of them costs, and that cut.

    `through[k]` is the least for cuts whose boundary k lies at each of `positions[k]`; `sums_ms` is what is added up
    for tied parameters.
    """

    bound_ms: float
    forward: Range
    backward: Range
    sums_ms: float
    cheapest: Cuts
    positions: Positions = field(compare=False)
    through: list[Array] = field(compare=False)


class _Relaxation:
    """The path of the module's first lines: constant + forward_weight·F + backward_weight·B + sums over boundaries."""

    def __init__(self, table: CostTable, num_stages: int) -> None:
        chain, m = table.chain, table.num_microbatches
        self.table, self.num_stages, self.stages = table, num_stages, table.stages(num_stages)
        self.per_cut = table.forward_up - table.forward_down + table.backward_up - table.backward_down
        self.head = table.optimizer.copy()
        for tied in chain.tied:
            self.head[min(tied.layers) + 1 :] += tied.optimizer_ms
        self.tail = np.zeros(table.num_layers + 1)
        self.forward_weight = self.backward_weight = float(m - 1)
        if m == 1:
            work = float(table.first[-1])
        elif table.first[-1] <= table.backward[-1]:
            work, self.backward_weight = float(table.backward[-1]), float(m - 2)
            self.tail = table.first_up[-1] - table.first_down
        else:
            work = sum(min(pair) for pair in zip(chain.backward_ms, chain.backward_first_ms, strict=True))
        self.constant = float(table.forward[-1]) + work
        self.forward_range = (max(*chain.forward_ms, float(table.forward[-1]) / num_stages), np.inf)
        self.backward_range = (max(*chain.backward_ms, float(table.backward[-1]) / num_stages), np.inf)

    def roots(self, limit: float) -> Iterator[_Box | None]:
        """All cuts: a box for every choice of the dearest tied groups that stay together; the others pay their sum."""
        tied = sorted((t for t in self.table.chain.tied if t.sum_ms > 0), key=lambda t: -t.sum_ms)[:MAX_TIED]
        for together in product((True, False), repeat=len(tied)):
            allowed = self.table.allowed.copy()
            for group, stays in zip(tied, together, strict=True):
                if stays:
                    allowed[min(group.layers) + 1 : max(group.layers) + 1] = False
            sums = sum(group.sum_ms for group, stays in zip(tied, together, strict=True) if not stays)
            everywhere = [np.flatnonzero(allowed)] * (self.num_stages - 1)
            yield self.box(everywhere, self.forward_range, self.backward_range, sums, limit)

    def box(self, positions: Positions, forward: Range, backward: Range, sums_ms: float, limit: float) -> _Box | None:
        """Cuts at `positions` with F and B in these ranges; None where all are dearer than `limit`."""
        if not all(len(nodes) for nodes in positions):
            return None
        fixed = self.constant + sums_ms + self.forward_weight * forward[0] + self.backward_weight * backward[0]
        forward = _capped(forward, self.forward_weight, limit - fixed)
        backward = _capped(backward, self.backward_weight, limit - fixed)
        nodes = [np.array([0]), *positions, np.array([self.table.num_layers])]
        fits = [
            self._fits(mask, a, b, forward[1], backward[1])
            for mask, (a, b) in zip(self.stages, pairwise(nodes), strict=True)
        ]
        costs = self._node_costs(nodes)
        ahead, behind = [np.array([fixed])], [np.array([0.0])]
        for cost, fit in zip(costs[1:], fits, strict=True):
            ahead.append(np.where(fit, ahead[-1][:, None], np.inf).min(axis=0) + cost)
        for cost, fit in zip(reversed(costs[1:]), reversed(fits), strict=True):
            behind.insert(0, np.where(fit, behind[0] + cost, np.inf).min(axis=1))
        bound = float(behind[0][0]) + fixed
        if not bound <= limit:
            return None
        cheapest, at = [], 0
        for k in range(len(positions)):
            at = int(np.where(fits[k][at], behind[k + 1] + costs[k + 1], np.inf).argmin())
            cheapest.append(int(positions[k][at]))
        through = [a + b for a, b in zip(ahead[1:-1], behind[1:-1], strict=True)]
        near = [least <= limit for least in through]
        return _Box(
            bound,
            _capped(forward, self.forward_weight, limit - bound),
            _capped(backward, self.backward_weight, limit - bound),
            sums_ms,
            tuple(cheapest),
            [nodes[keep] for nodes, keep in zip(positions, near, strict=True)],
            [least[keep] for least, keep in zip(through, near, strict=True)],
        )

    def _fits(self, mask: Mask, starts: Array, ends: Array, forward: float, backward: float) -> Mask:
        """Which stages, by start and end, are legal and have loads of at most `forward` and `backward`."""
        table = self.table
        fits: Mask = mask[np.ix_(starts, ends)]
        fits &= table.forward_up[ends] - table.forward_down[starts][:, None] <= forward
        fits &= table.backward_up[ends] - table.backward_down[starts][:, None] <= backward
        return fits

    def _node_costs(self, nodes: Positions) -> list[Array]:
        """What each position adds: transfers, the first stage's optimizer, the last stage's first backward."""
        costs = [self.per_cut[positions] for positions in nodes]
        costs[1] = costs[1] + self.head[nodes[1]]
        costs[-2] = costs[-2] + self.tail[nodes[-2]]
        return costs

    def halves(self, box: _Box, smallest_ms: float) -> list[tuple[Range, Range]]:
        """The box's two halves across the side that matters more to the step; none where the ILP does as well."""
        if sum(map(len, box.positions)) <= FEW_POSITIONS * len(box.positions):
            return []
        width_forward = _width(box.forward, self.forward_weight)
        width_backward = _width(box.backward, self.backward_weight)
        if max(width_forward, width_backward) <= smallest_ms:
            return []
        if width_forward >= width_backward:
            return [(half, box.backward) for half in _halved(box.forward)]
        return [(box.forward, half) for half in _halved(box.backward)]


def _capped(limits: Range, weight: float, spare_ms: float) -> Range:
    low, high = limits
    return (low, min(high, low + max(0.0, spare_ms) / weight)) if weight else limits


def _width(limits: Range, weight: float) -> float:
    return weight * (limits[1] - limits[0]) if weight else 0.0


def _halved(limits: Range) -> tuple[Range, Range]:
    middle = (limits[0] + limits[1]) / 2
    return (limits[0], middle), (middle, limits[1])
