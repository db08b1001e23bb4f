"""Good stages before any ILP: orders of the nodes, each cut exactly, and random completions that meet a target.

A topological order turns the graph into a chain, whose best cut is a small dynamic program once the load of every
segment is known. Those come from one two-dimensional difference array: a tensor adds its transfer on as many
rectangles of (start, stop) as it has nodes, and takes it back where all of them lie inside.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from planner.partitioning.chain_costs import Array
from planner.partitioning.graph_costs import GraphCosts, Stages, ordered_by

COARSE = 800
REFINEMENTS = 3
AIMS = 4
AIMED_NODES = 500_000  # that a round may draw
TRIES = 500


def segment_loads(costs: GraphCosts, order: Sequence[int], positions: Sequence[int]) -> Array:
    """loads[i, j]: the nodes at positions[i] to positions[j] of `order` as one stage; infinite where none may be.

    `positions` ascend from 0 to the number of nodes. A segment over the memory limit is infinite too.
    """
    bounds = np.asarray(positions)
    nodes = np.asarray(order)
    weight = _prefix(costs.weights[nodes])[bounds]
    loads: Array = weight[None, :] - weight[:, None] + _transfers(costs, nodes, bounds)
    loads[np.tri(len(bounds), dtype=np.bool_)] = np.inf
    if costs.memory_limit is not None:
        memory = _prefix(costs.memory[nodes])[bounds]
        loads[memory[None, :] - memory[:, None] > costs.memory_limit] = np.inf
    return loads


def _prefix(values: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)])


def _transfers(costs: GraphCosts, nodes: Array, bounds: Array) -> Array:
    """The transfers of every segment: a rectangle per block that a tensor is first met in, less the full one."""
    block = np.empty(len(nodes), dtype=int)
    block[nodes] = np.searchsorted(bounds, np.arange(len(nodes)), side="right") - 1
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []

    def rectangle(first: int, last: int, stop: int, value: float) -> None:
        rows.extend((first, last + 1))
        columns.extend((stop, stop))
        values.extend((value, -value))

    for tensor in costs.tensors:
        met = sorted({int(block[v]) for v in tensor.members})
        for before, at in zip([-1, *met], met, strict=False):
            rectangle(before + 1, at, at + 1, tensor.transfer_ms)
        rectangle(0, met[0], met[-1] + 1, -tensor.transfer_ms)
    changes = np.zeros((len(bounds) + 1, len(bounds) + 1))
    np.add.at(changes, (rows, columns), values)
    result: Array = changes.cumsum(axis=0).cumsum(axis=1)[: len(bounds), : len(bounds)]
    return result


def chain_cuts(loads: Array, num_stages: int) -> list[int] | None:
    """The boundaries (both ends included) of exactly `num_stages` segments whose largest load is least, or None.

    >>> weights = np.array([0.0, 1.0, 3.0, 12.0])
    >>> chain_cuts(np.where(np.tri(4, dtype=bool), np.inf, weights[None, :] - weights[:, None]), 2)
    [0, 2, 3]
    """
    last = len(loads) - 1
    slack = last - num_stages  # a boundary lies between k and k + slack: every stage keeps a block
    if slack < 0:
        return None
    value = np.full(slack + 1, np.inf)
    value[0] = 0.0
    choices = []
    for k in range(num_stages):
        largest = np.maximum(value[:, None], loads[k : k + slack + 1, k + 1 : k + slack + 2])
        choices.append(largest.argmin(axis=0))
        value = largest.min(axis=0)
    if not np.isfinite(value[slack]):
        return None
    at, cuts = slack, [last]
    for k in reversed(range(num_stages)):
        at = int(choices[k][at])
        cuts.append(k + at)
    return cuts[::-1]


class Search:
    """The best stages so far; every offer is cut exactly and kept where it is better."""

    def __init__(self, costs: GraphCosts, num_stages: int, seed: int, deadline: float) -> None:
        self.costs, self.num_stages, self.deadline = costs, num_stages, deadline
        self.random = random.Random(seed)
        self.stages: Stages | None = None
        self.objective_ms = float("inf")

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() > self.deadline

    def take(self, stages: Stages) -> bool:
        """Keep `stages` where they are better than what is known."""
        objective = max(self.costs.loads(stages))
        if objective < self.objective_ms * (1 - 1e-12):
            self.stages, self.objective_ms = stages, objective
            return True
        return False

    def offer(self, order: Sequence[int], positions: Sequence[int] | None = None) -> list[int] | None:
        """Cut `order` at the best of `positions` (all where None are given); the positions of its cut."""
        allowed = range(len(order) + 1) if positions is None else positions
        found = chain_cuts(segment_loads(self.costs, order, allowed), self.num_stages)
        if found is None:
            return None
        cuts = [allowed[i] for i in found]
        self.take(tuple(tuple(order[i:j]) for i, j in zip(cuts, cuts[1:], strict=False)))
        return cuts

    def plain_orders(self, enough: Callable[[], bool]) -> None:
        """Cut the program's order, by depth from the front, by depth from the back, and depth first."""
        for order in _plain_orders(self.costs):
            self.offer(order)
            if enough():
                return

    def random_orders(self, rounds: int, enough: Callable[[], bool]) -> None:
        """Cut random depth-first orders; every second one keeps the best stages' sequence and reorders inside them."""
        for index in range(rounds):
            if enough():
                return
            self.offer(self._reordered(self._stage_of() if index % 2 else [0] * len(self.costs)))

    def nested_sets(self, labels: Sequence[int], rounds: int, enough: Callable[[], bool]) -> None:
        """Cut random orders in which a node with a smaller label comes first, as far as the edges allow it."""
        for _ in range(rounds):
            if enough():
                return
            self.offer(self._reordered(labels))

    def _stage_of(self) -> list[int]:
        """By node its stage among the best ones."""
        stage_of = [0] * len(self.costs)
        for k, stage in enumerate(self.stages or ()):
            for v in stage:
                stage_of[v] = k
        return stage_of

    def _reordered(self, labels: Sequence[int]) -> tuple[int, ...]:
        """A random depth-first order, sorted by `labels`."""
        position = {v: i for i, v in enumerate(_random_completion(self.costs, self.random, depth_first=True))}
        return ordered_by(self.costs, [(label, position[v]) for v, label in enumerate(labels)])

    def aim(self, target_ms: float) -> None:
        """Random completions, boundary by boundary, whose weights lie where all stages can meet `target_ms`.

        Transfers are ignored on the way and counted in the end.
        """
        tries = min(TRIES, max(3, AIMED_NODES // (len(self.costs) * self.num_stages)))
        for _ in range(AIMS):
            stages = self._completions(target_ms, tries)
            if stages is None or self.late or (self._fits(stages) and self.take(stages)):
                return

    def _completions(self, target_ms: float, tries: int) -> Stages | None:
        weights, total = self.costs.weights, float(self.costs.weights.sum())
        slack = 1e-9 * total
        done: list[int] = []
        stages: list[tuple[int, ...]] = []
        used = 0.0
        for k in range(1, self.num_stages):
            low = total - (self.num_stages - k) * target_ms - slack
            for _ in range(tries):
                stage: list[int] = []
                reached = used
                for v in _random_completion(self.costs, self.random, self.random.random() < 0.5, done):
                    if reached >= low and stage:
                        break
                    stage.append(v)
                    reached += float(weights[v])
                if low <= reached <= used + target_ms + slack:
                    break
                if self.late:
                    return None
            else:
                return None
            stages.append(tuple(stage))
            done += stage
            used = reached
        rest = set(done)
        stages.append(tuple(v for v in self.costs.order if v not in rest))
        return tuple(stages) if all(stages) else None

    def _fits(self, stages: Stages) -> bool:
        limit = self.costs.memory_limit
        return limit is None or all(self.costs.memory[list(stage)].sum() <= limit for stage in stages)

    def coarse_to_fine(self) -> None:
        """One order of a long graph: cut at some hundred positions spread evenly over its costs, then around the cuts.

        The number of positions bounds the work; the graph's length does not.
        """
        costs, order = self.costs, self.costs.order
        shares = [np.ones(len(costs)), costs.weights, costs.memory]
        spread = _prefix(np.sum([share / max(share.sum(), 1e-300) for share in shares], axis=0)[list(order)])
        wanted = np.linspace(0.0, spread[-1], max(COARSE, 2 * self.num_stages))
        even = np.searchsorted(spread, wanted).clip(0, len(order)).tolist()
        positions = sorted({0, len(order), *even, *self._fullest_stages()})
        reach = len(order) // len(positions) + 1
        for _ in range(REFINEMENTS):
            cuts = self.offer(order, positions)
            if cuts is None or self.late:
                return
            around = max(1, COARSE // (2 * self.num_stages))
            offsets = np.unique(np.linspace(-reach, reach, 2 * around + 1).astype(int))
            near = (np.array(cuts)[:, None] + offsets[None, :]).clip(0, len(order))
            positions = sorted({0, len(order), *cuts, *near.ravel().tolist()})
            reach = max(1, reach // around)

    def _fullest_stages(self) -> list[int]:
        """Where the stages of the program's order end if each takes all the memory that it may."""
        costs = self.costs
        memory, limit = _prefix(costs.memory[list(costs.order)]), costs.memory_limit
        ends = [0]
        for k in range(self.num_stages if limit is not None else 0):
            full = int(np.searchsorted(memory, memory[ends[-1]] + limit, side="right")) - 1
            ends.append(min(full, len(costs) - (self.num_stages - 1 - k)))
        return ends


def _plain_orders(costs: GraphCosts) -> Iterator[tuple[int, ...]]:
    yield costs.order
    depth, height = [0] * len(costs), [0] * len(costs)
    for v in costs.order:
        depth[v] = max((depth[u] + 1 for u in costs.predecessors[v]), default=0)
    yield ordered_by(costs, depth)
    for v in reversed(costs.order):
        height[v] = min((height[u] - 1 for u in costs.successors[v]), default=0)
    yield ordered_by(costs, height)
    yield tuple(_random_completion(costs, random.Random(0), depth_first=True))


def _random_completion(
    costs: GraphCosts, source: random.Random, depth_first: bool, done: Sequence[int] = ()
) -> Iterator[int]:
    """The nodes after `done` (closed under predecessors) in a random topological order."""
    missing = [len(before) for before in costs.predecessors]
    for v in done:
        missing[v] = -1
        for u in costs.successors[v]:
            missing[u] -= 1
    ready = [v for v, count in enumerate(missing) if count == 0]
    source.shuffle(ready)
    while ready:
        if not depth_first:
            i = source.randrange(len(ready))
            ready[i], ready[-1] = ready[-1], ready[i]
        v = ready.pop()
        yield v
        opened = []
        for u in costs.successors[v]:
            missing[u] -= 1
            if missing[u] == 0:
                opened.append(u)
        source.shuffle(opened)
        ready += opened
