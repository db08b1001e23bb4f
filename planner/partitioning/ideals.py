"""What may lie before a boundary: the sets of layers that are closed under predecessors (the order ideals of the DAG).

A chain of n layers has n + 1 of them, two towers of n layers side by side (n + 1)², a block with three projections that
may change places five more than its chain. Where they are few, a plan is a path among them, and can be proven best.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from planner.partitioning.layer_dag import LayerDag

MAX_IDEALS = 20_000


@dataclass(frozen=True, slots=True)
class Ideal:
    """A closed set as bits; sums of its layers' milliseconds without transfers, its largest layers, what leaves it."""

    members: int
    forward_ms: float
    backward_ms: float
    first_ms: float
    least_backward_ms: float
    optimizer_ms: float
    largest_forward_ms: float
    largest_backward_ms: float
    across_forward_ms: float
    across_backward_ms: float
    num_crossing: int
    num_returning: int

    @property
    def load_ms(self) -> float:
        """Forward and backward of a later microbatch."""
        return self.forward_ms + self.backward_ms


EMPTY = Ideal(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0)


def closed_sets(dag: LayerDag, deadline: float) -> list[Ideal] | None:
    """All of them, smaller ones first; None where they are too many to be listed before `deadline`."""
    steps = _Steps(dag)
    found = {0: EMPTY}
    level = {0: steps.sources}
    while level:
        bigger: dict[int, int] = {}
        for members, ready in level.items():
            ideal = found[members]
            for v in _bits(ready):
                grown = members | 1 << v
                if grown not in bigger:
                    found[grown] = steps.add(ideal, v)
                    bigger[grown] = steps.ready(ready, v, grown)
            if len(found) > MAX_IDEALS or time.perf_counter() > deadline:
                return None
        level = bigger
    return list(found.values())


class _Steps:
    """How a closed set changes where a layer joins it."""

    def __init__(self, dag: LayerDag) -> None:
        self.dag, count = dag, len(dag)
        self.before = [sum(1 << u for u in set(each)) for each in dag.predecessors]
        self.sources = sum(1 << v for v in range(count) if not self.before[v])
        self.reading = [sum(1 << v for v in set(readers)) for readers in dag.readers]
        self.made: list[list[int]] = [[] for _ in range(count)]
        self.read: list[list[int]] = [[] for _ in range(count)]
        for t, tensor in enumerate(dag.chain.tensors):
            if self.reading[t] & ~(1 << tensor.producer):
                self.made[tensor.producer].append(t)
                for v in set(dag.readers[t]) - {tensor.producer}:
                    self.read[v].append(t)

    def ready(self, ready: int, v: int, grown: int) -> int:
        """The layers that may join next, after `v`."""
        opened = sum(1 << u for u in self.dag.successors[v] if not self.before[u] & ~grown)
        return ready & ~(1 << v) | opened

    def add(self, ideal: Ideal, v: int) -> Ideal:
        """`ideal` and the layer `v`."""
        chain, members = self.dag.chain, ideal.members | 1 << v
        forward, backward, first = chain.forward_ms[v], chain.backward_ms[v], chain.backward_first_ms[v]
        crossing, returning = ideal.num_crossing, ideal.num_returning
        across_forward = ideal.across_forward_ms - chain.crossing_forward_ms * bool(crossing)
        across_backward = ideal.across_backward_ms - chain.crossing_backward_ms * bool(returning)
        ended = [t for t in self.read[v] if not self.reading[t] & ~members]
        for sign, tensors in ((1, self.made[v]), (-1, ended)):
            for t in tensors:
                across_forward += sign * chain.tensors[t].transfer_forward_ms
                across_backward += sign * chain.tensors[t].transfer_backward_ms
                crossing += sign
                returning += sign * bool(chain.tensors[t].gradient_bytes)
        return Ideal(
            members=members,
            forward_ms=ideal.forward_ms + forward,
            backward_ms=ideal.backward_ms + backward,
            first_ms=ideal.first_ms + first,
            least_backward_ms=ideal.least_backward_ms + min(backward, first),
            optimizer_ms=ideal.optimizer_ms + chain.optimizer_ms[v],
            largest_forward_ms=max(ideal.largest_forward_ms, forward),
            largest_backward_ms=max(ideal.largest_backward_ms, backward),
            across_forward_ms=max(0.0, across_forward) + chain.crossing_forward_ms * bool(crossing),
            across_backward_ms=max(0.0, across_backward) + chain.crossing_backward_ms * bool(returning),
            num_crossing=crossing,
            num_returning=returning,
        )


def _bits(members: int) -> list[int]:
    found = []
    while members:
        lowest = members & -members
        found.append(lowest.bit_length() - 1)
        members ^= lowest
    return found
