"""A trace as flat pieces, one per layer, that can be run one after the other: what the profiler times."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from planner.tracing.exporting import Trace
from planner.tracing.fingerprint import describe
from planner.tracing.gradients import attribute
from planner.tracing.rewriting import compute_nodes, tensor_inputs


@dataclass(frozen=True, slots=True)
class Piece:
    """One layer as a flat module: which values it reads and makes (by name), and which it is the last to read."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    released: tuple[str, ...]
    structure: str


@dataclass(frozen=True, slots=True)
class OutputValue:
    """An output leaf that is the value `name` of the graph."""

    name: str


@dataclass(frozen=True, slots=True)
class Pieces:
    """All pieces of a trace, in program order, and how to call them from the model's inputs.

    `outputs` are the leaves of the model's output: an OutputValue for each tensor, constants as they are.
    """

    pieces: tuple[Piece, ...]
    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]
    trace: Trace

    def rebuild_output(self, values: dict[str, Any]) -> Any:
        """What the model would have returned, from the values by name."""
        leaves = [values[leaf.name] if isinstance(leaf, OutputValue) else leaf for leaf in self.outputs]
        return tree_unflatten(leaves, self.trace.out_spec)


def build_pieces(trace: Trace) -> Pieces:
    """Cut the prepared graph at every layer; parameters and buffers are shared with the traced model."""
    graph = trace.graph_module.graph
    nodes = compute_nodes(graph)
    owner = {node: index for index, layer in enumerate(trace.layers) for node in nodes[layer.start : layer.stop]}
    last_reader: dict[fx.Node, int] = {}
    for node in [*tensor_inputs(graph), *nodes]:
        for user in node.users:
            last_reader[node] = max(last_reader.get(node, -1), owner.get(user, len(trace.layers)))
    pieces = []
    for index, layer in enumerate(trace.layers):
        body = nodes[layer.start : layer.stop]
        outputs = [node for node in body if last_reader.get(node, -1) > index]
        released = tuple(
            node.name for node, reader in last_reader.items() if reader == index and owner.get(node) != index
        )
        pieces.append(_piece(trace.graph_module, body, outputs, released))
    leaves = tree_leaves(graph.output_node().args[0], is_leaf=lambda leaf: leaf is None)
    return Pieces(
        pieces=tuple(pieces),
        inputs=tuple(node.name for node in tensor_inputs(graph)),
        outputs=tuple(OutputValue(leaf.name) if isinstance(leaf, fx.Node) else leaf for leaf in leaves),
        trace=trace,
    )


def _piece(gm: fx.GraphModule, body: list[fx.Node], outputs: list[fx.Node], released: tuple[str, ...]) -> Piece:
    inside = set(body)
    graph, values = fx.Graph(), {}
    attributes: dict[str, Any] = {}
    read: dict[fx.Node, None] = {}
    for node in body:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                attributes[str(source.target)] = attribute(gm, str(source.target))
            elif source not in inside:
                read[source] = None
    for source in read:
        values[source] = graph.placeholder(source.name)
    for node in body:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in values:
                values[source] = graph.get_attr(str(source.target))
        values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(tuple(values[node] for node in outputs))
    module = fx.GraphModule(attributes, graph)
    names = tuple(node.name for node in read)
    return Piece(module, names, tuple(node.name for node in outputs), released, structure(gm, body, list(read)))


def structure(gm: fx.GraphModule, body: list[fx.Node], read: list[fx.Node]) -> str:
    """A hash that is equal for pieces with the same operations on the same shapes; names and weights are left out."""
    number: dict[fx.Node, int] = {node: index for index, node in enumerate(read)}
    digest = hashlib.sha256()
    for node in read:
        digest.update(repr(("input", _meta(node.meta.get("val")))).encode())
    for node in body:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in number:
                number[source] = len(number)
                tensor = attribute(gm, str(source.target))
                digest.update(repr(("state", isinstance(tensor, nn.Parameter), _meta(tensor))).encode())
        number[node] = len(number)
        described = (str(node.target), describe(node.args, number), describe(node.kwargs, number))
        digest.update(repr((described, _meta(node.meta.get("val")))).encode())
    return digest.hexdigest()[:12]


def _meta(value: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [(str(t.dtype), tuple(t.shape), t.stride(), t.requires_grad) for t in tensors]
