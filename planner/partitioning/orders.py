"""The cut of a model whose layers may change places: the best chain among the orders of its layer graph, and the proof.

The program's order comes first. Where others exist, the closed sets of layers are listed; if they are few, the exact
GPipe optimum over all orders is found among them (`closed_stages`). Otherwise, and for 1F1B and memory limits, whose
steps and peaks do not add up that way, candidate orders are cut exactly. `optimal` is said where a bound for all orders
is met.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from planner.errors import InfeasibleError, SolverError
from planner.partitioning.bounds import incumbent
from planner.partitioning.chain import ChainSolution, solve_chain
from planner.partitioning.chain_costs import EQUAL, Chain, CostTable, Cuts, crossing, step_ms
from planner.partitioning.closed_stages import Best, best_closed_stages
from planner.partitioning.ideals import Ideal, closed_sets
from planner.partitioning.layer_dag import LayerDag, Order, order_of
from planner.partitioning.memory_limit import FittingStages, MemoryLimit, TooLittleMemoryError, any_fit

if TYPE_CHECKING:
    import networkx as nx

SEARCH_S = 10.0
RANDOM_ORDERS = 12
CUT_EXACTLY = 3
TRIED_LAYERS = 3000  # that the tried orders have in all


@dataclass(frozen=True, slots=True)
class OrderedSolution:
    """`solution` cuts `chain`, whose layers stand in `order` (None: the program's); its bound is for all orders."""

    chain: Chain
    order: Order | None
    solution: ChainSolution


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be cut, and how a step is made of its stages."""

    dag: LayerDag
    num_stages: int
    num_microbatches: int
    schedule: str = "gpipe"
    memory: MemoryLimit | None = None

    def table(self, chain: Chain) -> CostTable:
        """The costs of `chain` with this problem's schedule and memory."""
        memory, m = self.memory, self.num_microbatches
        fitting = None if memory is None else FittingStages(chain, m, self.schedule, memory)
        return CostTable(chain, m, False, self.schedule, fitting)

    def solve(self, chain: Chain, time_limit_s: float) -> ChainSolution:
        """The exact cut of `chain`."""
        return solve_chain(
            chain,
            self.num_stages,
            self.num_microbatches,
            schedule=self.schedule,
            memory=self.memory,
            time_limit_s=time_limit_s,
        )

    def allows(self, chain: Chain, cuts: Cuts) -> bool:
        """Whether something crosses every cut where something must."""
        return not self.dag.linked or all(crossing(chain, cut) for cut in cuts)


def any_order_bound_ms(chain: Chain, num_stages: int, num_microbatches: int, schedule: str = "gpipe") -> float:
    """A lower bound on the step of any stages of these layers, in any order, without transfers.

    All work once, and m−1 times the largest layer or the average stage: forward and backward apart for GPipe, whose
    phases are. Under 1F1B a stage's first backward follows all forwards of one microbatch and the backwards behind it;
    m−1 backwards of its own and m−K forwards or more are then left to it, and the drain before it.
    """
    count, m, forward = num_stages, num_microbatches, chain.forward_ms
    backward = [min(pair) for pair in zip(chain.backward_ms, chain.backward_first_ms, strict=True)]
    if schedule != "gpipe":
        load = [f + b for f, b in zip(forward, backward, strict=True)]
        left = [(m - 1) * b + max(0, m - count) * f for f, b in zip(forward, chain.backward_ms, strict=True)]
        path = sum(forward) + sum(backward) + max(max(left), sum(left) / count)
        return max(m * max(max(load), sum(load) / count), path)
    slowest = sum(max(max(ms), sum(ms) / num_stages) for ms in (chain.forward_ms, chain.backward_ms))
    return sum(chain.forward_ms) + sum(backward) + (num_microbatches - 1) * slowest


def solve_in_any_order(problem: Problem, time_limit_s: float = 60.0, search_s: float = SEARCH_S) -> OrderedSolution:
    """The shortest step over the orders of the problem's layers: the program's own where no other is better.

    `search_s` is for other orders than the program's; a graph with one order costs nothing. Raises what `solve_chain`
    raises, of the program's order, where none has such a cut.
    """
    dag = problem.dag
    refused: InfeasibleError | None = None
    program: OrderedSolution | None = None
    try:
        program = OrderedSolution(dag.chain, None, problem.solve(dag.chain, time_limit_s))
    except TooLittleMemoryError as error:
        refused = error
    if dag.has_one_order or problem.num_stages == 1:
        return _or_refuse(program, refused)
    search = _Search(problem, program, time.perf_counter() + search_s)
    search.run()
    return _or_refuse(search.result(), refused)


def _or_refuse(found: OrderedSolution | None, refused: InfeasibleError | None) -> OrderedSolution:
    if found is None:
        assert refused is not None
        raise refused
    return found


class _Search:
    """The best order so far, the bound for all of them, and the ways to better both."""

    def __init__(self, problem: Problem, program: OrderedSolution | None, deadline: float) -> None:
        self.problem, self.best, self.deadline = problem, program, deadline
        self.started = time.perf_counter()
        self.bound_ms = any_order_bound_ms(
            problem.dag.chain, problem.num_stages, problem.num_microbatches, problem.schedule
        )
        self.proof = "HiGHS"

    @property
    def step_ms(self) -> float:
        """The shortest step known."""
        return float("inf") if self.best is None else self.best.solution.step_ms

    @property
    def done(self) -> bool:
        """Whether the bound is met, or the time over."""
        return self.step_ms <= self.bound_ms * (1 + EQUAL) or time.perf_counter() > self.deadline

    def run(self) -> None:
        """Closed sets first; candidate orders where these do not decide."""
        if self.done:
            return
        ideals = closed_sets(self.problem.dag, self.started + (self.deadline - self.started) / 3)
        exact = ideals is not None and self._among(ideals)
        if not exact and not self.done:
            self._candidates()

    def _among(self, ideals: Sequence[Ideal]) -> bool:
        """Look among the closed sets; whether that decides."""
        problem = self.problem
        others = problem.schedule != "gpipe"
        limit = self.step_ms
        if others and self.best is not None:
            limit = step_ms(self.best.chain, self.best.solution.cuts, problem.num_microbatches)
        found = best_closed_stages(
            problem.dag, ideals, problem.num_stages, problem.num_microbatches, limit, self._until(0.5)
        )
        if found.stages is not None:
            self._take(found)
        if others or not found.proven:
            return False
        self.bound_ms = max(self.bound_ms, limit if found.stages is None else found.step_ms)
        self.proof = "closed sets"
        return self.done

    def _until(self, share: float) -> float:
        now = time.perf_counter()
        return now + share * max(0.0, self.deadline - now)

    def _take(self, found: Best) -> None:
        """Keep the stages found, as they are for GPipe where they fit, else the best cut of their order."""
        assert found.stages is not None
        problem = self.problem
        order = tuple(order_of(problem.dag, found.stages))
        chain = problem.dag.in_order(order)
        cuts: list[int] = []
        for stage in found.stages[:-1]:
            cuts.append((cuts[-1] if cuts else 0) + stage.bit_count())
        if problem.table(chain).step(tuple(cuts)) < self.step_ms * (1 - EQUAL):
            self._keep(order, chain, tuple(cuts), "closed sets", 0)
        if problem.schedule != "gpipe" or problem.memory is not None:
            self._cut(order)

    def _keep(self, order: Order, chain: Chain, cuts: Cuts, solver: str, num_nodes: int) -> None:
        step = step_ms(chain, cuts, self.problem.num_microbatches, self.problem.schedule)
        if step < self.step_ms * (1 - EQUAL) and self.problem.allows(chain, cuts):
            solution = ChainSolution(cuts, step, 0.0, "feasible", solver, 0.0, num_nodes)
            program = list(order) == sorted(order)
            self.best = OrderedSolution(chain, None if program else order, solution)

    def _cut(self, order: Order) -> None:
        """Cut one order exactly."""
        chain = self.problem.dag.in_order(order)
        try:
            found = self.problem.solve(chain, max(1.0, self.deadline - time.perf_counter()))
        except InfeasibleError:
            return
        self._keep(order, chain, found.cuts, found.solver_name, found.num_nodes)

    def _candidates(self) -> None:
        """Quick cuts of many orders; the best of them once more, exactly."""
        problem = self.problem
        tried: dict[Order, float] = {}
        most = max(3, TRIED_LAYERS // len(problem.dag))
        for order in candidate_orders(problem.dag, problem.num_stages):
            if self.done or len(tried) >= most:
                break
            if order in tried or list(order) == sorted(order):
                continue
            chain = problem.dag.in_order(order)
            table = problem.table(chain)
            if problem.num_stages > table.most_stages() or not any_fit(table, problem.num_stages):
                continue
            cuts = incumbent(table, problem.num_stages)
            tried[order] = table.step(cuts)
            if tried[order] < self.step_ms * (1 - EQUAL):
                self._keep(order, chain, cuts, "candidate orders", 0)
        for order in sorted(tried, key=tried.__getitem__)[:CUT_EXACTLY]:
            if not self.done:
                self._cut(order)

    def result(self) -> OrderedSolution | None:
        """The best order with what was proven of it."""
        if self.best is None:
            return None
        solution, step = self.best.solution, self.best.solution.step_ms
        optimal = step <= self.bound_ms * (1 + EQUAL)
        return replace(
            self.best,
            solution=replace(
                solution,
                lower_bound_ms=min(self.bound_ms, step),
                status="optimal" if optimal else "feasible",
                solver_name=self.proof if optimal and self.proof != "HiGHS" else solution.solver_name,
                seconds=solution.seconds + time.perf_counter() - self.started,
            ),
        )


def candidate_orders(dag: LayerDag, num_stages: int, seed: int = 0) -> Iterator[Order]:
    """Topological orders that are worth cutting: branch by branch, by depth, by the largest load, and at random."""
    from planner.partitioning.graph_costs import graph_costs, ordered_by

    count = len(dag)
    yield _depth_first(dag, list(range(count)))
    yield _depth_first(dag, list(reversed(range(count))))
    graph = _as_graph(dag)
    costs = graph_costs(graph, transfers=True)
    depth, height = [0] * count, [0] * count
    for v in range(count):
        depth[v] = max((depth[u] + 1 for u in dag.predecessors[v]), default=0)
    for v in reversed(range(count)):
        height[v] = min((height[u] - 1 for u in dag.successors[v]), default=0)
    yield ordered_by(costs, depth)
    yield ordered_by(costs, height)
    yield from _by_largest_load(graph, num_stages)
    source = random.Random(seed)
    for _ in range(RANDOM_ORDERS):
        keys = list(range(count))
        source.shuffle(keys)
        yield _depth_first(dag, keys)


def _depth_first(dag: LayerDag, keys: Sequence[int]) -> Order:
    """The order that follows a branch as far as it can; where branches begin, the smallest key goes first."""
    missing = [len(before) for before in dag.predecessors]
    ready = sorted((v for v, number in enumerate(missing) if number == 0), key=lambda v: -keys[v])
    order = []
    while ready:
        v = ready.pop()
        order.append(v)
        opened = []
        for u in dag.successors[v]:
            missing[u] -= 1
            if missing[u] == 0:
                opened.append(u)
        ready += sorted(opened, key=lambda u: -keys[u])
    return tuple(order)


def _as_graph(dag: LayerDag) -> nx.DiGraph:
    """The layers by index, for the graph form."""
    import networkx as nx

    graph = nx.DiGraph(tensors=[], memory_limit_bytes=None)
    for v in range(len(dag)):
        graph.add_node(v, forward_ms=dag.chain.forward_ms[v], backward_ms=dag.chain.backward_ms[v])
    graph.add_edges_from((u, v) for v, before in enumerate(dag.predecessors) for u in before)
    for tensor, readers in zip(dag.chain.tensors, dag.readers, strict=True):
        transfer = tensor.transfer_forward_ms + tensor.transfer_backward_ms
        graph.graph["tensors"].append({"nodes": [tensor.producer, *readers], "transfer_ms": transfer})
    return graph


def _by_largest_load(graph: nx.DiGraph, num_stages: int) -> Iterator[Order]:
    """The order of the stages whose largest load is least (planner/partitioning/branching.py)."""
    from planner.partitioning.branching import solve_graph

    try:
        found = solve_graph(graph, num_stages, time_limit_s=2.0)
    except (SolverError, InfeasibleError):
        return
    yield tuple(v for stage in found.stages for v in stage if isinstance(v, int))
