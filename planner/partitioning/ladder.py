"""The families of the graph form's ILP, each one small function.

Variables: before[k][v] = 1 where node v lies in the first k stages, so that for a node they climb from before[0] = 0 to
before[K] = 1 (a ladder) and v lies in stage k where before[k+1] − before[k] = 1. A value that a window fixes is a
constant. charged[t, k] ≥ 1 where stage k holds some nodes of tensor t but not all; the objective is the largest load.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pulp

from planner.partitioning.chain_costs import Array
from planner.partitioning.constraints import Linear
from planner.partitioning.graph_costs import GraphCosts, Stages

ZERO, ONE = Linear(), Linear({}, 1.0)
SLACK = 1e-9


@dataclass(slots=True)
class Ladder:
    """The problem under construction; `impossible` once a row of constants alone is violated."""

    problem: pulp.LpProblem
    costs: GraphCosts
    before: list[list[Linear]]
    objective: pulp.LpVariable
    scale: float
    impossible: bool = False
    rows: int = field(default=0)

    @property
    def num_stages(self) -> int:
        """Stages lie between the rungs."""
        return len(self.before) - 1

    def inside(self, k: int, v: int) -> Linear:
        """1 where node v lies in stage k."""
        return self.before[k + 1][v].plus(self.before[k][v], -1.0)

    def at_most(self, left: Linear, right: float) -> None:
        """Add the row left ≤ right, unless no values of variables between 0 and 1 can violate it."""
        highest = left.constant + sum(c for c in left.terms.values() if c > 0)
        lowest = left.constant + sum(c for c in left.terms.values() if c < 0)
        if self.objective not in left.terms:
            if highest <= right + SLACK * abs(right):
                return
            if lowest > right + SLACK * max(1.0, abs(right)):
                self.impossible = True
                return
        row = pulp.LpAffineExpression([(v, c) for v, c in left.terms.items() if c])
        constraint = pulp.LpConstraint(row, pulp.LpConstraintLE, rhs=right - left.constant)
        self.problem.addConstraint(constraint, f"row_{self.rows}")
        self.rows += 1

    def weighted(self, k: int, values: Array) -> Linear:
        """The sum of `values` over the nodes of stage k."""
        result = Linear()
        for v in np.flatnonzero(values).tolist():
            for rung, sign in ((self.before[k + 1][v], 1.0), (self.before[k][v], -1.0)):
                for variable, coefficient in rung.terms.items():
                    result.terms[variable] = result.terms.get(variable, 0.0) + sign * coefficient * float(values[v])
                result.constant += sign * rung.constant * float(values[v])
        return result

    def stages(self) -> Stages:
        """The stages of the solver's values, nodes in topological order."""
        found: list[list[int]] = [[] for _ in range(self.num_stages)]
        for v in self.costs.order:
            rungs = [_value(self.before[k][v]) for k in range(1, self.num_stages)]
            found[self.num_stages - 1 - sum(rungs)].append(v)
        return tuple(tuple(stage) for stage in found)


def _value(rung: Linear) -> int:
    return round(rung.constant + sum(c * (v.value() or 0.0) for v, c in rung.terms.items()))


@dataclass(frozen=True, eq=False)
class Windows:
    """earliest[v] and latest[v]: the stages between which node v must lie."""

    earliest: Array
    latest: Array

    def free(self, num_stages: int) -> int:
        """How many ladder variables these windows leave."""
        return int((self.latest - self.earliest).clip(0, num_stages - 1).sum())


def windows(costs: GraphCosts, num_stages: int, limit_ms: float) -> Windows:
    """Where each node may lie in stages that carry at most `limit_ms`.

    A node and its ancestors fill its stage and those before it, a node and its descendants its stage and those after.
    """
    earliest = np.zeros(len(costs))
    latest = np.full(len(costs), num_stages - 1.0)
    for values, limit in ((costs.weights, limit_ms), (costs.memory, costs.memory_limit)):
        if limit is not None and 0 < limit < float("inf"):
            above, below = costs.ancestors @ values, costs.ancestors.T @ values
            earliest = np.maximum(earliest, np.ceil(above / limit * (1 - SLACK) - SLACK) - 1)
            latest = np.minimum(latest, num_stages - np.ceil(below / limit * (1 - SLACK) - SLACK))
    return Windows(earliest, latest)


def new_ladder(costs: GraphCosts, num_stages: int, allowed: Windows, bounds: tuple[float, float | None]) -> Ladder:
    """A ladder with a binary where `allowed` leaves a choice; the objective lies between `bounds`, in milliseconds."""
    reference = bounds[1] if bounds[1] else max(float(costs.weights.sum()), 1e-300)
    scale = 1000.0 / reference
    upper = None if bounds[1] is None else bounds[1] * scale
    objective = pulp.LpVariable("largest_load", bounds[0] * scale, upper)
    ladder = Ladder(pulp.LpProblem("stages", pulp.LpMinimize), costs, [], objective, scale)
    for k in range(num_stages + 1):
        ladder.before.append([_rung(k, v, allowed) for v in range(len(costs))])
    ladder.impossible = bool((allowed.earliest > allowed.latest).any())
    ladder.problem.setObjective(pulp.LpAffineExpression([(objective, 1.0)]))
    return ladder


def _rung(k: int, v: int, allowed: Windows) -> Linear:
    if k <= allowed.earliest[v]:
        return ZERO
    if k > allowed.latest[v]:
        return ONE
    return Linear({pulp.LpVariable(f"before_{k}_{v}", 0, 1, pulp.LpInteger): 1.0})


def ladders_climb(ladder: Ladder) -> None:
    """What lies in the first k stages lies in the first k+1."""
    for low, high in zip(ladder.before, ladder.before[1:], strict=False):
        for below, above in zip(low, high, strict=True):
            ladder.at_most(below.plus(above, -1.0), 0.0)


def stages_are_closed(ladder: Ladder) -> None:
    """Where a node lies in the first k stages, so does every predecessor."""
    for rungs in ladder.before:
        for source, target in ladder.costs.edges:
            ladder.at_most(rungs[target].plus(rungs[source], -1.0), 0.0)


def no_stage_is_empty(ladder: Ladder) -> None:
    """Every stage holds a node."""
    for k in range(ladder.num_stages):
        ladder.at_most(Linear().plus(ladder.weighted(k, np.ones(len(ladder.costs))), -1.0), -1.0)


def memory_fits(ladder: Ladder) -> None:
    """The memory of a stage's nodes adds up to the limit at most."""
    limit = ladder.costs.memory_limit
    if limit is not None:
        unit = max(limit, 1.0)
        for k in range(ladder.num_stages):
            ladder.at_most(ladder.weighted(k, ladder.costs.memory / unit), limit / unit)


def loads_are_carried(ladder: Ladder, stages: Iterable[int]) -> None:
    """The objective is at least the weights of a stage's nodes and the transfers charged to it."""
    for k in stages:
        load = ladder.weighted(k, ladder.costs.weights * ladder.scale)
        for tensor, variable in tensors_are_charged(ladder, k):
            load.terms[variable] = ladder.costs.tensors[tensor].transfer_ms * ladder.scale
        ladder.at_most(load.with_variable(ladder.objective, -1.0), 0.0)


def tensors_are_charged(ladder: Ladder, k: int) -> list[tuple[int, pulp.LpVariable]]:
    """A tensor is charged to stage k where its producer lies there and a consumer does not, or the other way round."""
    charged = []
    for t, tensor in enumerate(ladder.costs.tensors):
        variable = pulp.LpVariable(f"charged_{t}_{k}", 0, 1)
        rows, producer = ladder.rows, ladder.inside(k, tensor.members[0])
        for member in tensor.members[1:]:
            consumer = ladder.inside(k, member)
            for one, other in ((consumer, producer), (producer, consumer)):
                row = one.plus(other, -1.0)
                if row.constant + sum(c for c in row.terms.values() if c > 0) > SLACK:
                    ladder.at_most(row.with_variable(variable, -1.0), 0.0)
        if ladder.rows > rows:
            charged.append((t, variable))
    return charged
