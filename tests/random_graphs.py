"""Small random layer graphs from a seed, and their optima by trying every partition.

The optimum is computed from the JSON-like values alone, without anything of planner.partitioning, so that a test that
compares the two compares independent things.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import networkx as nx


def random_graph(seed: int, memory: bool = False) -> nx.DiGraph:
    """A branching graph of 3 to 7 nodes; its ids are neither in topological order nor numbers only.

    Weights are whole milliseconds, thousandths or arbitrary, some zero. Some tensors have consumers that no edge joins
    to the producer, some are free, some name a single node. With `memory` the limit is tight, now and then impossible.
    """
    source = random.Random(seed)
    names = [f"layer{i}" if source.random() < 0.5 else i for i in range(source.randint(3, 7))]
    source.shuffle(names)
    graph = nx.DiGraph(tensors=[], memory_limit_bytes=None)
    digits = source.choice([0, 3, 12])
    for name in source.sample(names, len(names)):
        graph.add_node(name, forward_ms=_cost(source, digits), backward_ms=_cost(source, digits))
    density = source.choice([0.15, 0.35, 0.6])
    for i, producer in enumerate(names):
        graph.add_edges_from((producer, consumer) for consumer in names[i + 1 :] if source.random() < density)
    scale = source.choice([0.2, 1.0, 4.0])
    for producer in names:
        consumers = [node for node in graph.succ[producer] if source.random() < 0.8]
        consumers += [node for node in names if node != producer and source.random() < 0.05]
        transfer_ms = scale * _cost(source, 6)
        graph.graph["tensors"].append({"nodes": [producer, *consumers], "bytes": 8, "transfer_ms": transfer_ms})
    if memory:
        for name in names:
            graph.nodes[name]["memory_bytes"] = source.randint(0, 50)
        total = sum(graph.nodes[name]["memory_bytes"] for name in names)
        graph.graph["memory_limit_bytes"] = max(1, int(total * source.uniform(0.3, 0.8)))
    return graph


def _cost(source: random.Random, digits: int) -> float:
    return 0.0 if source.random() < 0.15 else round(source.uniform(0.5, 9.0), digits)


def partitions(graph: nx.DiGraph, num_stages: int) -> Iterator[dict[object, int]]:
    """Every way to give each node a stage so that no edge runs backwards and no stage is empty."""
    order = list(nx.topological_sort(graph))

    def extended(stage_of: dict[object, int]) -> Iterator[dict[object, int]]:
        if len(stage_of) == len(order):
            if len(set(stage_of.values())) == num_stages:
                yield dict(stage_of)
            return
        node = order[len(stage_of)]
        for stage in range(max((stage_of[u] for u in graph.pred[node]), default=0), num_stages):
            yield from extended(stage_of | {node: stage})

    return extended({})


def largest_load(graph: nx.DiGraph, stage_of: dict[object, int], transfers: bool) -> float:
    """The largest load in milliseconds; infinite where a stage is over the memory limit."""
    loads, memory = {}, {}
    for node, values in graph.nodes.items():
        stage = stage_of[node]
        loads[stage] = loads.get(stage, 0.0) + values["forward_ms"] + values["backward_ms"]
        memory[stage] = memory.get(stage, 0) + values.get("memory_bytes", 0)
    for tensor in graph.graph["tensors"] if transfers else ():
        touched = {stage_of[node] for node in tensor["nodes"]}
        for stage in touched if len(touched) > 1 else ():
            loads[stage] += tensor["transfer_ms"]
    limit = graph.graph["memory_limit_bytes"]
    over = limit is not None and max(memory.values()) > limit
    return float("inf") if over else max(loads.values())


def optimum(graph: nx.DiGraph, num_stages: int, transfers: bool) -> float:
    """The least largest load over all partitions; infinite where there is none."""
    loads = (largest_load(graph, stage_of, transfers) for stage_of in partitions(graph, num_stages))
    return min(loads, default=float("inf"))
