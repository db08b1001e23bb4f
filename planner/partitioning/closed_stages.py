"""The exact GPipe optimum over all stages that are closed under predecessors, by labels on chains of closed sets.

A plan is a chain ∅ = I₀ ⊂ I₁ ⊂ … ⊂ I_K = all layers. It is built from the last stage to the first, which is how the
backward phase runs. Every quantity of the closed form (planner/scheduling/closed_forms.py) that later stages add to
grows with what it was, so of two labels at one set, one that is no better in any quantity is left out; so is one whose
cheapest completion is no better than the best plan known. Where nothing is left, that plan is proven best.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from planner.partitioning.chain_costs import EQUAL, ChainTied
from planner.partitioning.ideals import EMPTY, Ideal
from planner.partitioning.layer_dag import LayerDag

PAIRS_BETWEEN_LOOKS = 4096


@dataclass(frozen=True, slots=True)
class _Label:
    """The last stages, which begin behind a closed set; milliseconds.

    `forward` sums their forwards, and the gradient sums of the tied parameters `charged` (bits); `slowest` is their
    slowest forward. `first_after` sums their first backwards; `path` and `last` are the longest ways through their
    backwards without and with m−2 repetitions of one of them, `ends` with an optimizer at its end.
    """

    forward: float
    slowest: float
    first_after: float
    path: float
    last: float
    ends: float
    charged: int
    begins: Ideal
    later: _Label | None

    def no_worse_than(self, other: _Label) -> bool:
        """Whether no stages before them make the step of `other` shorter than theirs."""
        return (
            self.forward <= other.forward
            and self.slowest <= other.slowest
            and self.first_after <= other.first_after
            and self.path <= other.path
            and self.last <= other.last
            and self.ends <= other.ends
            and not other.charged & ~self.charged
        )


@dataclass(frozen=True, slots=True)
class Best:
    """Stages as sets of bits (None: none is better than the limit), and whether all plans were ruled out or seen."""

    stages: tuple[int, ...] | None
    step_ms: float
    proven: bool


def best_closed_stages(
    dag: LayerDag, ideals: Sequence[Ideal], num_stages: int, num_microbatches: int, limit_ms: float, deadline: float
) -> Best:
    """The stages with the shortest GPipe step below `limit_ms`. Unproven where `deadline` came first."""
    return _Search(dag, ideals, num_stages, num_microbatches, limit_ms, deadline).run()


class _Search:
    def __init__(
        self,
        dag: LayerDag,
        ideals: Sequence[Ideal],
        num_stages: int,
        num_microbatches: int,
        limit_ms: float,
        deadline: float,
    ) -> None:
        self.num_stages, self.m = num_stages, num_microbatches
        self.limit, self.deadline = limit_ms * (1 - EQUAL), deadline
        self.tied = [(sum(1 << v for v in group.layers), group) for group in dag.chain.tied]
        self.whole = ideals[-1]
        self.most_load, self.most_forward, self.most_backward = self._caps()
        self.allowed = [self._window(ideals, k, dag.linked) for k in range(num_stages)]

    def _caps(self) -> tuple[float, float, float]:
        """What a stage takes at most per microbatch in a plan below the limit: in all, forward, and backward."""
        whole, count = self.whole, self.num_stages
        if self.m == 1:
            return (float("inf"),) * 3
        left = self.limit - whole.forward_ms - whole.least_backward_ms
        most = left / (self.m - 1) + EQUAL * abs(self.limit)
        least_forward = max(whole.largest_forward_ms, whole.forward_ms / count)
        least_backward = max(whole.largest_backward_ms, whole.backward_ms / count)
        return most, most - least_backward, most - least_forward

    def _window(self, ideals: Sequence[Ideal], k: int, linked: bool) -> list[Ideal]:
        """The sets that may lie before boundary k, by load."""
        if k == 0:
            return [EMPTY]
        whole, after = self.whole, self.num_stages - k
        return sorted(
            (
                i
                for i in ideals
                if i.num_crossing + (not linked)
                and i.members not in (0, whole.members)
                and whole.load_ms - after * self.most_load <= i.load_ms <= k * self.most_load
                and whole.forward_ms - after * self.most_forward <= i.forward_ms <= k * self.most_forward
                and whole.backward_ms - after * self.most_backward <= i.backward_ms <= k * self.most_backward
            ),
            key=lambda i: i.load_ms,
        )

    def run(self) -> Best:
        labels: dict[int, list[_Label]] = {
            self.whole.members: [_Label(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, self.whole, None)]
        }
        for k in reversed(range(self.num_stages)):
            reached: dict[int, list[_Label]] = {}
            for number, (begins, label) in enumerate(self._pairs(labels, k)):
                if number % PAIRS_BETWEEN_LOOKS == 0 and time.perf_counter() > self.deadline:
                    return Best(None, self.limit, False)
                grown = self._grown(label, begins)
                if self._least(grown, k) < self.limit:
                    _keep(reached.setdefault(begins.members, []), grown)
            labels = reached
        best = min(labels.get(0, ()), key=lambda label: self._least(label, 0), default=None)
        if best is None:
            return Best(None, self.limit, True)
        return Best(tuple(_stages(best)), self._least(best, 0), True)

    def _pairs(self, labels: dict[int, list[_Label]], k: int) -> Iterator[tuple[Ideal, _Label]]:
        """The sets before boundary k that a stage k may begin behind, with the labels of what comes after it."""
        allowed = self.allowed[k]
        loads = [i.load_ms for i in allowed]
        for known in labels.values():
            ends = known[0].begins
            for i in allowed[bisect_left(loads, ends.load_ms - self.most_load) :]:
                if i.load_ms > ends.load_ms * (1 + EQUAL):
                    break
                if i.members != ends.members and not i.members & ~ends.members:
                    yield from ((i, label) for label in known)

    def _grown(self, label: _Label, begins: Ideal) -> _Label:
        """`label` with one more stage before its stages."""
        ends = label.begins
        members = ends.members & ~begins.members
        across_backward = ends.across_backward_ms + begins.across_backward_ms
        forward = ends.forward_ms - begins.forward_ms + ends.across_forward_ms + begins.across_forward_ms
        backward = ends.backward_ms - begins.backward_ms + across_backward
        first_after = label.first_after + ends.first_ms - begins.first_ms + across_backward
        optimizer = ends.optimizer_ms - begins.optimizer_ms
        sums, charged = 0.0, label.charged
        for number, (users, group) in enumerate(self.tied):
            if users & members:
                optimizer += group.optimizer_ms
            if _splits(begins, users, group) and not charged >> number & 1:
                charged |= 1 << number
                sums += group.sum_ms
        path = max(label.path, first_after) + backward
        last = first_after if self.m == 1 else max(label.last + backward, path + (self.m - 2) * backward)
        return _Label(
            forward=label.forward + forward + sums,
            slowest=max(label.slowest, forward),
            first_after=first_after,
            path=path,
            last=last,
            ends=max(label.ends, last + optimizer),
            charged=charged,
            begins=begins,
            later=label,
        )

    def _least(self, label: _Label, k: int) -> float:
        """What the step takes at least where k more stages come before those of `label`; exact for none."""
        rest, m = label.begins, self.m
        if k == 0:
            return label.forward + (m - 1) * label.slowest + label.ends
        forward, backward = rest.forward_ms + rest.across_forward_ms, rest.backward_ms + rest.across_backward_ms
        slowest = max(label.slowest, rest.largest_forward_ms, forward / k)
        ends = label.first_after + rest.first_ms + rest.across_backward_ms
        if m > 1:
            largest = max(rest.largest_backward_ms, backward / k)
            fresh = label.first_after + rest.least_backward_ms + rest.across_backward_ms + (m - 1) * largest
            ends = max(label.last + backward, fresh, label.path + backward + (m - 2) * largest)
        return label.forward + forward + (m - 1) * slowest + max(label.ends, ends)


def _splits(begins: Ideal, users: int, group: ChainTied) -> bool:
    return group.sum_ms > 0 and 0 != begins.members & users != users


def _keep(known: list[_Label], label: _Label) -> None:
    """Add `label` to those at its set, unless one of them is no worse; leave out those that it is no worse than."""
    if not any(other.no_worse_than(label) for other in known):
        known[:] = [other for other in known if not label.no_worse_than(other)]
        known.append(label)


def _stages(label: _Label) -> Iterator[int]:
    begins: list[int] = []
    current: _Label | None = label
    while current is not None:
        begins.append(current.begins.members)
        current = current.later
    return (after & ~before for before, after in pairwise(begins))
