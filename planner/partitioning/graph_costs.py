"""The value that the graph form solves: nodes by index, their weights and memory, and what a stage carries.

Nothing here assumes that the nodes are a chain. A stage carries its nodes' weights and, for every tensor of which it
holds some nodes but not all, that tensor's transfer once (the literature's rule; the chain form relays instead).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.errors import FileError
from planner.partitioning.chain_costs import Array, Mask

if TYPE_CHECKING:
    import networkx as nx

Node = Hashable
Stages = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """A tensor by the indices of its nodes, the producer first, and its transfer in milliseconds."""

    members: tuple[int, ...]
    transfer_ms: float


@dataclass(frozen=True, eq=False)
class GraphCosts:
    """A graph by index. Weights are milliseconds, memory is bytes; without a limit memory does not count."""

    ids: tuple[Node, ...]
    weights: Array
    memory: Array
    memory_limit: float | None
    tensors: tuple[GraphTensor, ...]
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(source, target) by index."""
        return [(u, v) for u, targets in enumerate(self.successors) for v in targets]

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The topological order that stays closest to the order of the nodes."""
        return ordered_by(self, range(len(self)))

    @cached_property
    def ancestors(self) -> Mask:
        """ancestors[v, u]: u is v or comes before it. Quadratic in memory."""
        reach = np.eye(len(self), dtype=np.bool_)
        for v in self.order:
            for u in self.predecessors[v]:
                reach[v] |= reach[u]
        return reach

    def loads(self, stages: Sequence[Iterable[int]]) -> tuple[float, ...]:
        """What each of `stages`, which share no node, carries, in milliseconds."""
        stage_of = {v: k for k, stage in enumerate(stages) for v in stage}
        loads = [0.0] * len(stages)
        for v, k in stage_of.items():
            loads[k] += float(self.weights[v])
        for tensor in self.tensors:
            touched = {stage_of.get(v, -1) for v in tensor.members}
            if len(touched) > 1:
                for k in touched - {-1}:
                    loads[k] += tensor.transfer_ms
        return tuple(loads)


def graph_costs(graph: nx.DiGraph, transfers: bool) -> GraphCosts:
    """`graph` by index; without `transfers` its tensors cost nothing. Raises FileError for a cycle.

    >>> import networkx as nx
    >>> graph = nx.DiGraph([("a", "b")], tensors=[{"nodes": ["a", "b"], "transfer_ms": 2.0}])
    >>> graph_costs(graph, transfers=True).loads([[0]])
    (2.0,)
    """
    index = {node: i for i, node in enumerate(graph.nodes)}
    values = list(graph.nodes.values())
    limit = graph.graph.get("memory_limit_bytes")
    costs = GraphCosts(
        ids=tuple(graph.nodes),
        weights=np.array([_number(v, "forward_ms") + _number(v, "backward_ms") for v in values]),
        memory=np.array([_number(v, "memory_bytes") for v in values]),
        memory_limit=None if limit is None else float(limit),
        tensors=_tensors(graph, index) if transfers else (),
        predecessors=tuple(tuple(index[u] for u in graph.pred[node]) for node in graph.nodes),
        successors=tuple(tuple(index[u] for u in graph.succ[node]) for node in graph.nodes),
    )
    if len(costs.order) < len(costs):
        raise FileError("the layer graph has a cycle", "layers depend on earlier layers only", "remove an edge")
    return costs


def _number(values: dict[str, Any], field: str) -> float:
    return float(values.get(field) or 0.0)


def _tensors(graph: nx.DiGraph, index: dict[Node, int]) -> tuple[GraphTensor, ...]:
    found = []
    for tensor in graph.graph.get("tensors", ()):
        halves = _number(tensor, "transfer_forward_ms") + _number(tensor, "transfer_backward_ms")
        transfer = float(tensor.get("transfer_ms", halves) or 0.0)
        members = tuple(dict.fromkeys(index[node] for node in tensor["nodes"]))
        if transfer > 0 and len(members) > 1:
            found.append(GraphTensor(members, transfer))
    return tuple(found)


def stage_loads(graph: nx.DiGraph, stages: Sequence[Sequence[Node]], transfers: bool = True) -> tuple[float, ...]:
    """What each of `stages` (node ids) carries, in milliseconds.

    >>> import networkx as nx
    >>> graph = nx.DiGraph([("a", "b")], tensors=[{"nodes": ["a", "b"], "transfer_ms": 2.0}])
    >>> graph.nodes["b"]["forward_ms"] = 1.0
    >>> stage_loads(graph, [["a"], ["b"]]), stage_loads(graph, [["a", "b"]])
    ((2.0, 3.0), (1.0,))
    """
    costs = graph_costs(graph, transfers)
    index = {node: i for i, node in enumerate(costs.ids)}
    return costs.loads([[index[node] for node in stage] for stage in stages])


def ordered_by(costs: GraphCosts, keys: Sequence[Any]) -> tuple[int, ...]:
    """The topological order that always takes the ready node with the smallest key; shorter where there is a cycle."""
    missing = [len(before) for before in costs.predecessors]
    ready = [(keys[v], v) for v, count in enumerate(missing) if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, v = heapq.heappop(ready)
        order.append(v)
        for u in costs.successors[v]:
            missing[u] -= 1
            if missing[u] == 0:
                heapq.heappush(ready, (keys[u], u))
    return tuple(order)
