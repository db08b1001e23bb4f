"""The layers of a trace in another order: which of them must keep their sequence, and the graph rewritten.

A layer stays together. It moves only past layers that neither use what it makes nor share a written storage with it,
and operations that draw random numbers keep their sequence. Inputs enter with the first layer and outputs leave with
the last, so these two stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import fx

from planner.errors import TraceError
from planner.tracing.exporting import Trace
from planner.tracing.functions import FunctionCall
from planner.tracing.rewriting import compute_nodes
from planner.tracing.state import storages, writes


def layer_dependencies(trace: Trace) -> tuple[tuple[int, int], ...]:
    """Pairs (earlier, later) of layers, by index, that no order may swap; what follows from others may be left out.

    >>> from planner.tracing.exporting import trace_model
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    >>> layer_dependencies(trace_model(model, (torch.ones(2, 4),), {}))
    ((0, 1),)
    """
    graph = trace.graph_module.graph
    nodes = compute_nodes(graph)
    owner = {node: index for index, layer in enumerate(trace.layers) for node in nodes[layer.start : layer.stop]}
    found = {(owner[source], owner[node]) for node in nodes for source in node.all_input_nodes if source in owner}
    found.update(pairwise(owner[node] for node in nodes if _is_random(node)))
    for accesses in _accesses_of_written(graph, owner).values():
        found.update(pairwise(accesses))
    last = len(trace.layers) - 1
    found.update((0, index) for index in range(1, last + 1))
    found.update((index, last) for index in range(last))
    return tuple(sorted(pair for pair in found if pair[0] < pair[1]))


def _is_random(node: fx.Node) -> bool:
    if isinstance(node.target, FunctionCall):
        return bool(node.target.random)
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _accesses_of_written(graph: fx.Graph, owner: dict[fx.Node, int]) -> dict[fx.Node, list[int]]:
    """By storage that is written in place: the layers that make, read or write it, in program order."""
    base = storages(graph)
    written = {storage for _, storage in writes(graph, base)}
    found: dict[fx.Node, list[int]] = {storage: [] for storage in written}
    for node, index in owner.items():
        touched = {base.get(other, other) for other in (node, *node.all_input_nodes)}
        for storage in touched & written:
            found[storage].append(index)
    return found


def positions_of(trace: Trace, order: Sequence[str | int] | None) -> dict[str, int]:
    """The place of each layer (by id) in `order`, None for the program's.

    Raises TraceError where `order` does not name each of the trace's layers once.
    """
    ids = [layer.id for layer in trace.layers]
    names = ids if order is None else [str(name) for name in order]
    if sorted(names) != sorted(ids):
        odd = sorted(set(names) ^ set(ids)) or [name for name in names if names.count(name) > 1]
        raise TraceError(
            f"the plan's order and the trace differ in layer {odd[0]!r}",
            "an order names every layer of the trace once",
            "make the plan again",
        )
    return {name: index for index, name in enumerate(names)}


def reorder(trace: Trace, order: Sequence[str | int]) -> None:
    """Put the operations of the trace's graph, in place, into the order of their layers.

    Raises TraceError where `order` swaps two layers that depend on each other.
    """
    position = positions_of(trace, order)
    for before, after in layer_dependencies(trace):
        earlier, later = trace.layers[before].id, trace.layers[after].id
        if position[earlier] > position[later]:
            raise TraceError(
                f"the plan's order has layer {later!r} before {earlier!r}",
                "a layer comes after what it uses, and writes in place and random numbers keep their sequence",
                "make the plan again",
            )
    graph = trace.graph_module.graph
    nodes = compute_nodes(graph)
    for state in [node for node in graph.nodes if node.op == "get_attr"]:
        nodes[0].prepend(state)
    output = graph.output_node()
    for layer in sorted(trace.layers, key=lambda layer: position[layer.id]):
        for node in nodes[layer.start : layer.stop]:
            output.prepend(node)
    graph.lint()
