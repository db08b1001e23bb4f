"""The graph form: stages of a branching layer graph whose largest load is least, by bounds and an ILP in pulp.

minimise   the largest load of a stage              (ladder.loads_are_carried, ladder.tensors_are_charged)
subject to what lies in the first k stages lies in the first k+1       (ladder.ladders_climb)
           a node's predecessors lie in its stage or before it         (ladder.stages_are_closed)
           no stage is empty                                           (ladder.no_stage_is_empty)
           a stage's memory fits where there is a limit                (ladder.memory_fits)

Good stages come first, then lower bounds; where the two meet there is nothing left to solve. What remains goes to
HiGHS, with windows that are drawn again whenever better stages are found.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from planner.errors import InfeasibleError, SolverError, UsageError
from planner.partitioning import graph_bounds, ladder
from planner.partitioning.chain_costs import EQUAL
from planner.partitioning.graph_bounds import Bound
from planner.partitioning.graph_costs import GraphCosts, Node, Stages, graph_costs, stage_loads
from planner.partitioning.graph_incumbents import Search
from planner.partitioning.solving import IMPOSSIBLE, PROVEN, UNPROVEN, dual_bound, node_count, solve

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["GraphSolution", "solve_graph", "stage_loads"]

SOLVER_EQUAL = 1e-7  # HiGHS's own tolerances, where it says that it is done
LONG = 2000  # nodes from which on nothing quadratic is tried
LONG_STAGES = 400
LARGE_ILP = 40_000  # variables, and tenths of rows, that are too many to be worth a try
RANDOM_ORDERS = 60
FIRST_SLICE_S = 5.0


@dataclass(frozen=True, slots=True)
class GraphSolution:
    """Stages of node ids in order, their largest load, and the proof: no stages have one below `lower_bound_ms`.

    `solver_name` names the bound or the solver that gave `lower_bound_ms`; `optimal` where the two meet.
    """

    stages: tuple[tuple[Node, ...], ...]
    objective_ms: float
    lower_bound_ms: float
    status: Literal["optimal", "feasible"]
    solver_name: str
    seconds: float
    num_nodes: int


def solve_graph(
    graph: nx.DiGraph, num_stages: int, *, transfers: bool = True, time_limit_s: float = 60.0, seed: int = 0
) -> GraphSolution:
    """Exactly `num_stages` non-empty stages of `graph`, closed under predecessors, whose largest load is least.

    `transfers` charges a tensor's transfer to every stage that holds some of its nodes but not all. Raises
    InfeasibleError where there are fewer nodes than stages or the memory limit cannot be met, SolverError where the
    time was too short to find any stages.

    >>> import networkx as nx
    >>> graph = nx.DiGraph([("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])
    >>> nx.set_node_attributes(graph, {"a": 3.0, "b": 4.0, "c": 2.0, "d": 1.0}, "forward_ms")
    >>> solution = solve_graph(graph, 2)
    >>> solution.stages, solution.objective_ms, solution.status
    ((('a', 'c'), ('b', 'd')), 5.0, 'optimal')
    """
    started = time.perf_counter()
    costs = graph_costs(graph, transfers)
    _refuse_wrong_numbers(costs, num_stages)
    proof = _Proof(costs, num_stages, seed, started + time_limit_s)
    proof.run()
    if proof.search.stages is None:
        raise _nothing_fits(proof)
    objective = proof.search.objective_ms
    return GraphSolution(
        stages=tuple(tuple(costs.ids[v] for v in stage) for stage in proof.search.stages),
        objective_ms=objective,
        lower_bound_ms=min(proof.bound.value_ms, objective),
        status="optimal" if proof.met() else "feasible",
        solver_name=proof.bound.name,
        seconds=time.perf_counter() - started,
        num_nodes=proof.num_nodes,
    )


def _refuse_wrong_numbers(costs: GraphCosts, num_stages: int) -> None:
    if num_stages < 1:
        raise UsageError(f"{num_stages} stages", "a plan has at least one stage")
    if len(costs) < num_stages:
        raise InfeasibleError(
            f"cannot cut {len(costs)} layers into {num_stages} stages",
            "every stage holds a layer",
            f"use --gpus {len(costs)} or fewer",
        )
    if len(costs) > LONG and num_stages > LONG_STAGES:
        raise SolverError(
            f"cannot plan {len(costs)} layers for {num_stages} stages",
            f"a graph of more than {LONG} layers is planned for at most {LONG_STAGES} stages",
            "merge layers that always stay together",
        )


class _Proof:
    """The best stages and the best bound so far, brought together step by step."""

    def __init__(self, costs: GraphCosts, num_stages: int, seed: int, deadline: float) -> None:
        self.costs, self.num_stages, self.deadline = costs, num_stages, deadline
        self.search = Search(costs, num_stages, seed, deadline)
        self.bound = Bound("nothing", 0.0)
        self.num_nodes = 0
        self.impossible = False

    def met(self) -> bool:
        """Whether the best stages reach the bound."""
        return self.search.objective_ms <= self.bound.value_ms * (1 + EQUAL)

    def _raise(self, bound: Bound) -> bool:
        if bound.value_ms > self.bound.value_ms:
            self.bound = bound
        return self.met()

    def run(self) -> None:
        """Good stages, then bounds, then the ILP; stops where they meet or at the deadline."""
        if self.num_stages == 1:
            self._whole()
            return
        if any(map(self._raise, graph_bounds.simple_bounds(self.costs, self.num_stages))) or self._misfit():
            return
        if len(self.costs) > LONG:
            self.search.coarse_to_fine()
            return
        self.search.plain_orders(self._until(0.5))
        self.search.random_orders(self._rounds(), self._until(0.2))
        if self.met() or self._bounds_of_transfers():
            return
        self._solve_in_slices()

    def _whole(self) -> None:
        whole = (self.costs.order,)
        if not self._misfit():
            self.search.take(whole)
            self._raise(Bound("one stage", self.search.objective_ms))

    def _misfit(self) -> bool:
        """Whether the memory limit is below the largest node or the average."""
        limit = self.costs.memory_limit
        if limit is not None:
            largest, total = float(self.costs.memory.max()), float(self.costs.memory.sum())
            self.impossible = max(largest, total / self.num_stages) > limit
        return self.impossible

    def _rounds(self) -> int:
        """How many random orders are worth their time."""
        return min(RANDOM_ORDERS, 2 * len(self.costs))

    def _until(self, share: float) -> Callable[[], bool]:
        """A condition: the proof is complete, or this share of the time that is left is over."""
        now = time.perf_counter()
        end = now + share * (self.deadline - now)
        return lambda: self.met() or time.perf_counter() >= end

    def _bounds_of_transfers(self) -> bool:
        """Bounds that count transfers, in some of the time; the boundaries' cuts also give orders."""
        if not self.costs.tensors:
            return False
        enough = self._until(0.2)
        for bounds in (graph_bounds.node_bounds(self.costs), graph_bounds.convex_bounds(self.costs)):
            for bound in bounds:
                self._raise(bound)
                if enough():
                    break
        enough = self._until(0.2)
        if self.search.stages is not None and not self.met():
            cuts = graph_bounds.boundary_cuts(self.costs, self.num_stages, self.search.objective_ms, enough)
            self._raise(cuts.bound)
            self.search.nested_sets(cuts.labels, self._rounds() // 2, enough)
        return self.met()

    def _solve_in_slices(self) -> None:
        """The ILP, for a longer time from slice to slice; better stages draw the windows anew."""
        slice_s = FIRST_SLICE_S
        while not (self.met() or self.impossible or self.search.late):
            left = self.deadline - time.perf_counter()
            slice_s = slice_s if 3 * slice_s < left else left
            again = self._solve_ilp(max(0.1, slice_s))
            if self.met() or not again:
                return
            if not self.costs.tensors:
                self.search.aim(self.bound.value_ms)
            self.search.random_orders(self._rounds() // 2, self._until(0.1))
            slice_s *= 3

    def _solve_ilp(self, time_limit_s: float) -> bool:
        """Look for stages better than the best; whether another try may help."""
        limit = self._cutoff()
        program = self._build(limit)
        if program is None:
            return False
        outcome = IMPOSSIBLE if program.impossible else solve(program.problem, time_limit_s)
        if not program.impossible:
            self.num_nodes += node_count(program.problem)
        if outcome == IMPOSSIBLE:
            self.impossible = limit is None
            self._raise(Bound("HiGHS", self.search.objective_ms if limit is not None else 0.0))
            return False
        if outcome in (PROVEN, UNPROVEN):
            self.search.take(program.stages())
            proven = dual_bound(program.problem) / program.scale
            close = outcome == PROVEN and self.search.objective_ms <= proven * (1 + SOLVER_EQUAL)
            self._raise(Bound("HiGHS", self.search.objective_ms if close else proven))
        return outcome != PROVEN

    def _cutoff(self) -> float | None:
        """What better stages carry at most: a unit less than the best ones where all loads are multiples of it."""
        best = self.search.objective_ms
        if best == float("inf"):
            return None
        unit = None if self.costs.tensors else graph_bounds.quantum(self.costs.weights)
        return best - unit / 2 if unit else best * (1 - EQUAL / 10)

    def _build(self, limit: float | None) -> ladder.Ladder | None:
        """The ILP, or None where it is too large to be worth trying."""
        allowed = ladder.windows(self.costs, self.num_stages, limit or float("inf"))
        pins = sum(len(tensor.members) for tensor in self.costs.tensors)
        size = allowed.free(self.num_stages) + self.num_stages * (len(self.costs.edges) + pins) // 10
        if size > LARGE_ILP:
            return None
        lower = min(self.bound.value_ms, limit or float("inf"))
        program = ladder.new_ladder(self.costs, self.num_stages, allowed, (lower, limit))
        ladder.ladders_climb(program)
        ladder.stages_are_closed(program)
        ladder.no_stage_is_empty(program)
        ladder.memory_fits(program)
        ladder.loads_are_carried(program, range(self.num_stages))
        return program


def _nothing_fits(proof: _Proof) -> InfeasibleError | SolverError:
    """Says by how many bytes the memory limit is missed and where, or that the time was too short."""
    costs, limit = proof.costs, proof.costs.memory_limit or 0.0
    if not proof.impossible:
        if len(costs) > LONG:
            return SolverError(
                f"the order of the {len(costs)} layers has no {proof.num_stages} stages of {limit:.0f} bytes or less",
                f"a graph of more than {LONG} layers is cut in one order only",
                "use more stages, or merge layers that always stay together",
            )
        return SolverError(f"found no {proof.num_stages} stages in the time allowed", "", "allow more time")
    largest = int(costs.memory.argmax())
    if costs.memory[largest] > limit:
        excess = costs.memory[largest] - limit
        return InfeasibleError(
            f"layer {costs.ids[largest]} needs {excess:.0f} bytes more than a stage has",
            f"a stage has {limit:.0f} bytes",
            "raise the memory limit",
        )
    excess = float(costs.memory.sum()) - limit * proof.num_stages
    if excess > 0:
        return InfeasibleError(
            f"the layers need {excess:.0f} bytes more than {proof.num_stages} stages have",
            f"a stage has {limit:.0f} bytes",
            f"use --gpus {-int(-costs.memory.sum() // limit)} or more" if limit else "raise the memory limit",
        )
    return _smallest_excess(proof)


def _smallest_excess(proof: _Proof) -> InfeasibleError:
    """Names the fullest stage of the stages that spread the memory best."""
    costs = proof.costs
    spread = dataclasses.replace(costs, weights=costs.memory, memory_limit=None, tensors=())
    best = _Proof(spread, proof.num_stages, 0, time.perf_counter() + 10.0)
    best.run()
    stages: Stages = best.search.stages or ()
    k = max(range(len(stages)), key=spread.loads(stages).__getitem__)
    excess = best.search.objective_ms - (costs.memory_limit or 0.0)
    first, last = costs.ids[stages[k][0]], costs.ids[stages[k][-1]]
    return InfeasibleError(
        f"no {proof.num_stages} stages fit: stage {k + 1}, layers {first} to {last}, lacks {excess:.0f} bytes at best",
        f"a stage has {costs.memory_limit or 0.0:.0f} bytes, and a layer's predecessors lie in its stage or before it",
        "use more stages, or raise the memory limit",
    )
