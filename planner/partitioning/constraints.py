"""The families of the chain ILP, each one small function; only this folder imports pulp.

Variables: x[k, j] = 1 where boundary k lies before layer j, so that stage k+1 begins there; everything else is
continuous. Sums over stages are linear in x through prefix sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pulp

from planner.partitioning.chain_costs import Array, ChainTied, CostTable, Cuts, Mask

Terms = dict[pulp.LpVariable, float]


@dataclass(slots=True)
class Linear:
    """A linear expression: coefficients by variable, and a constant."""

    terms: Terms = field(default_factory=dict)
    constant: float = 0.0

    def plus(self, other: Linear, factor: float = 1.0) -> Linear:
        """self + factor · other, as a new value."""
        terms = dict(self.terms)
        for variable, coefficient in other.terms.items():
            terms[variable] = terms.get(variable, 0.0) + factor * coefficient
        return Linear(terms, self.constant + factor * other.constant)

    def with_variable(self, variable: pulp.LpVariable, coefficient: float) -> Linear:
        """self + coefficient · variable, as a new value."""
        return self.plus(Linear({variable: coefficient}))


def total(expressions: Iterable[Linear]) -> Linear:
    """The sum of `expressions`."""
    result = Linear()
    for expression in expressions:
        result = result.plus(expression)
    return result


@dataclass(slots=True)
class Program:
    """The problem under construction, with the boundary variables by boundary and position."""

    problem: pulp.LpProblem
    table: CostTable
    positions: list[list[int]]
    x: list[dict[int, pulp.LpVariable]]
    scale: float

    @property
    def num_stages(self) -> int:
        """Stages are one more than boundaries."""
        return len(self.x) + 1

    def cuts(self) -> Cuts:
        """The positions of the boundaries in the solution that the solver left."""
        return tuple(next(j for j, v in variables.items() if (v.value() or 0.0) > 0.5) for variables in self.x)

    def at_most(self, left: Linear, right: float, name: str) -> None:
        """Add the row left ≤ right."""
        row = pulp.LpAffineExpression(list(left.terms.items()))
        self.problem.addConstraint(pulp.LpConstraint(row, pulp.LpConstraintLE, rhs=right - left.constant), name)

    def at_least(self, variable: pulp.LpVariable, expression: Linear, name: str) -> None:
        """Add the row variable ≥ expression."""
        self.at_most(expression.with_variable(variable, -1.0), 0.0, name)

    def continuous(self, name: str) -> pulp.LpVariable:
        """A new continuous variable, not negative."""
        return pulp.LpVariable(name, 0)

    def at_boundary(self, k: int, values: Array) -> Linear:
        """`values` at the position of boundary k; boundary −1 is the model's start and boundary K−1 its end."""
        if k < 0:
            return Linear({}, float(values[0]) * self.scale)
        if k == len(self.x):
            return Linear({}, float(values[-1]) * self.scale)
        return Linear({variable: float(values[j]) * self.scale for j, variable in self.x[k].items()})

    def between(self, k: int, up: Array, down: Array) -> Linear:
        """up at the end of stage k minus down at its start."""
        return self.at_boundary(k, up).plus(self.at_boundary(k - 1, down), -1.0)


def new_program(table: CostTable, positions: list[list[int]], scale: float) -> Program:
    """A problem with a binary for every boundary and position; times are multiplied by `scale`."""
    x = [
        {j: pulp.LpVariable(f"x_{k}_{j}", 0, 1, pulp.LpInteger) for j in allowed} for k, allowed in enumerate(positions)
    ]
    return Program(pulp.LpProblem("stages", pulp.LpMinimize), table, positions, x, scale)


def every_boundary_has_one_position(program: Program) -> None:
    """Boundary k lies before exactly one layer."""
    for k, variables in enumerate(program.x):
        row = pulp.LpAffineExpression([(variable, 1.0) for variable in variables.values()])
        program.problem.addConstraint(pulp.LpConstraint(row, pulp.LpConstraintEQ, rhs=1.0), f"one_{k}")


def no_stage_is_empty(program: Program) -> None:
    """Where boundary k+1 lies before layer j or earlier, boundary k lies earlier still."""
    placed: dict[int, dict[int, pulp.LpVariable]] = {}
    for k in range(len(program.x) - 1):
        if max(program.positions[k]) < min(program.positions[k + 1]):
            continue
        for boundary in (k, k + 1):
            if boundary not in placed:
                placed[boundary] = _running_sums(program, boundary)
        for j in program.positions[k + 1]:
            before = [i for i in program.positions[k] if i < j]
            earlier = Linear({placed[k][before[-1]]: 1.0} if before else {})
            program.at_most(Linear({placed[k + 1][j]: 1.0}).plus(earlier, -1.0), 0.0, f"order_{k}_{j}")


def _running_sums(program: Program, k: int) -> dict[int, pulp.LpVariable]:
    """By position: 1 where boundary k lies there or earlier. Variables of their own keep the rows short."""
    sums: dict[int, pulp.LpVariable] = {}
    row = Linear()
    for j, variable in program.x[k].items():
        sums[j] = program.continuous(f"placed_{k}_{j}")
        row = row.with_variable(variable, 1.0).with_variable(sums[j], -1.0)
        equal = pulp.LpConstraint(pulp.LpAffineExpression(list(row.terms.items())), pulp.LpConstraintEQ, rhs=0.0)
        program.problem.addConstraint(equal, f"placed_{k}_{j}")
        row = Linear({sums[j]: 1.0})
    return sums


def forward_takes(program: Program) -> Linear:
    """The forward phase takes the sum of all stages and m−1 times the slowest."""
    table = program.table
    stages = [program.between(k, table.forward_up, table.forward_down) for k in range(program.num_stages)]
    if table.num_microbatches == 1:
        return total(stages)
    slowest = program.continuous("slowest_forward")
    for k, stage in enumerate(stages):
        program.at_least(slowest, stage, f"forward_{k}")
    return total(stages).with_variable(slowest, table.num_microbatches - 1)


def backward_takes(program: Program, optimizers: list[Linear]) -> Linear:
    """The backward phase and the optimizer end when the last stage of all has ended (see closed_forms)."""
    table, m, num_stages = program.table, program.table.num_microbatches, program.num_stages
    later = [program.between(k, table.backward_up, table.backward_down) for k in range(num_stages)]
    first = [program.between(k, table.first_up, table.first_down) for k in range(num_stages)]
    ends = program.continuous("backward_ends")
    first_after = [total(first[p:]) for p in range(num_stages)]
    largest = _running_maxima(program, later) if m > 2 else {}
    for k in range(num_stages):
        if m == 1:
            program.at_least(ends, first_after[k].plus(optimizers[k]), f"end_{k}")
            continue
        until = Linear()
        for p in range(k, num_stages):
            until = until.plus(later[p])
            row = first_after[p].plus(until).plus(optimizers[k])
            if m > 2:
                row = row.with_variable(largest[k, p], m - 2)
            program.at_least(ends, row, f"end_{k}_{p}")
    return Linear({ends: 1.0})


def _running_maxima(program: Program, stages: list[Linear]) -> dict[tuple[int, int], pulp.LpVariable]:
    """largest[k, p] is at least every stage from k to p."""
    largest = {}
    for width in range(len(stages)):
        for k in range(len(stages) - width):
            p = k + width
            largest[k, p] = program.continuous(f"largest_{k}_{p}")
            if width == 0:
                program.at_least(largest[k, p], stages[k], f"load_{k}")
            else:
                program.at_least(largest[k, p], Linear({largest[k, p - 1]: 1.0}), f"left_{k}_{p}")
                program.at_least(largest[k, p], Linear({largest[k + 1, p]: 1.0}), f"right_{k}_{p}")
    return largest


def optimizer_takes(program: Program) -> list[Linear]:
    """A stage's optimizer steps over its own parameters, and over a tied one where it holds one of its layers."""
    table = program.table
    stages = [program.between(k, table.optimizer, table.optimizer) for k in range(program.num_stages)]
    for g, tied in enumerate(table.chain.tied):
        if tied.optimizer_ms > 0:
            for k in range(program.num_stages):
                holder = program.continuous(f"holds_{g}_{k}")
                for layer in tied.layers:
                    program.at_least(holder, _lies_in(program, layer, k), f"holds_{g}_{k}_{layer}")
                stages[k] = stages[k].with_variable(holder, tied.optimizer_ms * program.scale)
    return stages


def _lies_in(program: Program, layer: int, k: int) -> Linear:
    """1 where `layer` lies in stage k: boundary k−1 is at or before it, boundary k is not."""
    before = Linear({}, 1.0) if k == 0 else Linear({v: 1.0 for j, v in program.x[k - 1].items() if j <= layer})
    if k < len(program.x):
        before = before.plus(Linear({v: 1.0 for j, v in program.x[k].items() if j <= layer}), -1.0)
    return before


def tied_sums_take(program: Program) -> Linear:
    """A tied parameter costs its sum once per step where a boundary lies between its layers."""
    cost = Linear()
    for g, tied in enumerate(program.table.chain.tied):
        if tied.sum_ms > 0:
            split = program.continuous(f"split_{g}")
            for k in range(len(program.x)):
                program.at_least(split, _inside(program, k, tied), f"split_{g}_{k}")
            cost = cost.with_variable(split, tied.sum_ms * program.scale)
    return cost


def _inside(program: Program, k: int, tied: ChainTied) -> Linear:
    first, last = min(tied.layers), max(tied.layers)
    return Linear({v: 1.0 for j, v in program.x[k].items() if first < j <= last})


def stages_fit(program: Program, masks: Sequence[Mask]) -> None:
    """A stage that begins before layer i does not end before a layer j with which it would not fit into memory."""
    for k, mask in enumerate(masks):
        begins: dict[int, pulp.LpVariable | None] = {0: None} if k == 0 else dict(program.x[k - 1])
        for i, begin in begins.items():
            if k == len(program.x):
                excluded = Linear({}, 0.0 if mask[i, -1] else 1.0)
            else:
                excluded = Linear({v: 1.0 for j, v in program.x[k].items() if i < j and not mask[i, j]})
            if not excluded.terms and not excluded.constant:
                continue
            if begin is None:
                program.at_most(excluded, 0.0, f"fits_{k}_{i}")
            else:
                program.at_most(excluded.with_variable(begin, 1.0), 1.0, f"fits_{k}_{i}")


def nothing_is_relayed(program: Program) -> None:
    """Plain chains: at most one boundary lies between a tensor's producer and its last consumer."""
    for t, tensor in enumerate(program.table.chain.tensors):
        if tensor.last_consumer - tensor.producer > 1:
            inside = {v: 1.0 for k in program.x for j, v in k.items() if tensor.producer < j <= tensor.last_consumer}
            if len(inside) > 1:
                program.at_most(Linear(inside), 1.0, f"relay_{t}")
