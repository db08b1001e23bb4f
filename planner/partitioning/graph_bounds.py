"""Lower bounds on the largest load of exactly K stages, cheapest first; each is named, because it may end the proof.

The minimum cuts are between nodes and tensors: a tensor is an arc whose capacity is its transfer, paid where its nodes
lie on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from planner.partitioning import ladder as families
from planner.partitioning.chain_costs import Array
from planner.partitioning.graph_costs import GraphCosts
from planner.partitioning.solving import PROVEN, UNPROVEN, dual_bound, solve

if TYPE_CHECKING:
    import networkx as nx

QUANTA = (1.0, 0.001)  # milliseconds, or bytes
MIN_CUT_NODES = 12
CONVEX_NODES = 3
CONVEX_S = 2.0


@dataclass(frozen=True, slots=True)
class Bound:
    """No stages carry less than `value_ms`, says `name`."""

    name: str
    value_ms: float


def quantum(weights: Array) -> float | None:
    """The unit of which all weights are multiples, to a billionth of it, or None.

    >>> quantum(np.array([2.0, 3.0])), quantum(np.array([0.5])), quantum(np.array([1 / 3]))
    (1.0, 0.001, None)
    """
    for unit in QUANTA:
        counts = weights / unit
        exact = np.abs(counts - np.rint(counts)) < 1e-9 * np.maximum(1.0, np.abs(counts))
        if exact.all() and counts.sum() < 1e9:
            return unit
    return None


def simple_bounds(costs: GraphCosts, num_stages: int) -> Iterator[Bound]:
    """The average, rounded up where the weights have a common unit, and the largest node."""
    average = float(costs.weights.sum()) / num_stages
    yield Bound("largest node", float(costs.weights.max()))
    yield Bound("average", average)
    unit = quantum(costs.weights)
    if unit is not None:
        yield Bound("average, rounded up", math.ceil(average / unit - 1e-6) * unit)


def node_bounds(costs: GraphCosts) -> Iterator[Bound]:
    """Around each of the heaviest nodes, the cheapest set of nodes that holds it, with the tensors that leave it.

    The stage that holds the node is such a set.
    """
    for v in _heaviest(costs)[:MIN_CUT_NODES]:
        yield Bound("node min-cut", _cheapest_set(costs, v))


def _heaviest(costs: GraphCosts) -> list[int]:
    """Nodes by weight and the transfers of their tensors, heaviest first."""
    around = costs.weights.copy()
    for tensor in costs.tensors:
        around[list(tensor.members)] += tensor.transfer_ms
    return [int(v) for v in np.argsort(-around, kind="stable")]


def _cheapest_set(costs: GraphCosts, v: int) -> float:
    import networkx as nx

    network = nx.DiGraph()
    network.add_node("outside")
    for u in np.flatnonzero(costs.weights).tolist():
        network.add_edge(u, "outside", capacity=float(costs.weights[u]))
    for t, tensor in enumerate(costs.tensors):
        network.add_edge(("in", t), ("out", t), capacity=tensor.transfer_ms)
        for u in tensor.members:
            network.add_edge(u, ("in", t))
            network.add_edge(("out", t), u)
    return float(nx.minimum_cut_value(network, v, "outside")) if v in network else 0.0


def convex_bounds(costs: GraphCosts) -> Iterator[Bound]:
    """The same with sets that may be a stage: closed between what precedes it and what follows it, by a small ILP."""
    for v in _heaviest(costs)[:CONVEX_NODES]:
        yield Bound("convex set around a node", _cheapest_stage(costs, v))


def _cheapest_stage(costs: GraphCosts, v: int) -> float:
    """Of three stages, the middle one holds v and alone counts; the outer two may be empty."""
    earliest, latest = np.zeros(len(costs)), np.full(len(costs), 2.0)
    earliest[v] = latest[v] = 1.0
    program = families.new_ladder(costs, 3, families.Windows(earliest, latest), (0.0, None))
    families.ladders_climb(program)
    families.stages_are_closed(program)
    families.loads_are_carried(program, [1])
    outcome = solve(program.problem, CONVEX_S)
    return dual_bound(program.problem) / program.scale if outcome in (PROVEN, UNPROVEN) else 0.0


@dataclass(frozen=True, slots=True)
class BoundaryCuts:
    """The bound from the boundaries, and by node how many boundaries' cheapest cuts it lies behind."""

    bound: Bound
    labels: tuple[int, ...]


def boundary_cuts(costs: GraphCosts, num_stages: int, limit_ms: float, enough: Callable[[], bool]) -> BoundaryCuts:
    """What crosses each boundary at least, in stages that carry at most `limit_ms`.

    A tensor that crosses a boundary is charged to two stages or more, and crosses no more boundaries than its nodes'
    windows span. So the loads exceed the weights by twice the most expensive boundary, and by the sum over all
    boundaries of cuts in which a tensor costs twice its transfer over that span. Boundaries that are left out once
    it is `enough` only weaken the bound.
    """
    allowed = families.windows(costs, num_stages, limit_ms)
    span = [
        max(1.0, float(allowed.latest[list(t.members)].max() - allowed.earliest[list(t.members)].min()))
        for t in costs.tensors
    ]
    whole = [2 * tensor.transfer_ms for tensor in costs.tensors]
    shared = [cost / spanned for cost, spanned in zip(whole, span, strict=True)]
    largest, total, labels = 0.0, 0.0, [0] * len(costs)
    for k in range(1, num_stages):
        if enough():
            break
        cost, _ = _cheapest_boundary(costs, k, allowed, shared)
        total += cost
        cost, behind = _cheapest_boundary(costs, k, allowed, whole)
        largest = max(largest, cost)
        for v in behind:
            labels[v] += 1
    value = (float(costs.weights.sum()) + max(largest, total)) / num_stages
    return BoundaryCuts(Bound("boundary min-cut", min(value, limit_ms)), tuple(labels))


def _cheapest_boundary(
    costs: GraphCosts, k: int, allowed: families.Windows, capacities: list[float]
) -> tuple[float, list[int]]:
    """The cheapest boundary after k stages, and the nodes behind it."""
    import networkx as nx

    network: nx.DiGraph = nx.DiGraph([(v, u) for u, v in costs.edges])  # who lies before pulls its predecessors there
    network.add_nodes_from(("before", "behind", *range(len(costs))))
    for v in range(len(costs)):
        if allowed.earliest[v] >= k:
            network.add_edge(v, "behind")
        elif allowed.latest[v] < k:
            network.add_edge("before", v)
    for t, tensor in enumerate(costs.tensors):
        network.add_edge(("in", t), ("out", t), capacity=capacities[t])
        for u in tensor.members:
            network.add_edge(u, ("in", t))
            network.add_edge(("out", t), u)
    try:
        cost, (before, _) = nx.minimum_cut(network, "before", "behind")
    except nx.NetworkXUnbounded:  # no stages are this good: the caller's limit is the bound
        return float("inf"), []
    return float(cost), [v for v in range(len(costs)) if v not in before]
