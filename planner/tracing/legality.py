"""Where the prepared graph may be cut, and where stock torch can cut it too.

A *position* is an operation, by its index; a cut there sends every value that is alive across it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.utils._pytree import tree_leaves

from planner.tracing.functions import function_calls
from planner.tracing.precision import AS_TRACED
from planner.tracing.refusing import is_static
from planner.tracing.rewriting import tensor_inputs
from planner.tracing.state import storages, writes


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph: index of the operation that makes it (-1: an input), those that read it, output or not."""

    node: fx.Node
    producer: int
    readers: tuple[int, ...]
    is_output: bool

    def last(self, num_nodes: int) -> int:
        """The last operation that needs it, of `num_nodes`."""
        return num_nodes - 1 if self.is_output else max(self.readers, default=self.producer)


def live_values(graph: fx.Graph, nodes: list[fx.Node]) -> list[Value]:
    """Tensor inputs and what `nodes` make, where something reads it."""
    index = {node: position for position, node in enumerate(nodes)}
    values = []
    for node in [*tensor_inputs(graph), *nodes]:
        readers = tuple(sorted(index[user] for user in node.users if user in index))
        is_output = any(user.op == "output" for user in node.users)
        if readers or is_output:
            values.append(Value(node, index.get(node, -1), readers, is_output))
    return values


def illegal_positions(graph: fx.Graph, nodes: list[fx.Node], values: list[Value]) -> set[int]:
    """Positions where a cut would be wrong: before a write in place, in a buffer's update, nothing that can be sent."""
    num_nodes = len(nodes)
    illegal = _before_writes(graph, nodes)
    alive = [0] * (num_nodes + 1)
    for value in values:
        start, stop = value.producer + 1, value.last(num_nodes)
        example = value.node.meta.get("val")
        if not is_static(example) or example.is_complex():  # type: ignore[union-attr]  # no gradient of complex values
            illegal.update(range(start, stop + 1))
        elif stop >= start:
            alive[start] += 1
            alive[stop + 1] -= 1
    count = 0
    for position in range(num_nodes):
        count += alive[position]
        if count == 0:
            illegal.add(position)
    return illegal


def _before_writes(graph: fx.Graph, nodes: list[fx.Node]) -> set[int]:
    """Positions between a storage and a later write in place to it; between all uses of a buffer that is written."""
    index = {node: position for position, node in enumerate(nodes)}
    base = storages(graph)
    illegal: set[int] = set()
    written_buffers: set[fx.Node] = set()
    for node, storage in writes(graph, base):
        if storage.op == "get_attr":
            written_buffers.add(storage)
        else:
            illegal.update(range(index.get(storage, -1) + 1, index[node] + 1))
    for buffer in written_buffers:
        aliases = [node for node in [buffer, *base] if base.get(node, node) is buffer]
        uses = [index[user] for alias in aliases for user in alias.users if user in index]
        illegal.update(range(min(uses) + 1, max(uses) + 1))
    return illegal


def not_plain_positions(values: list[Value], num_nodes: int) -> set[int]:
    """Positions across which something lives that stock torch cannot send.

    That is an input, an output, a strided tensor, or one that autocast gives another dtype than the trace.
    """
    late: set[int] = set()
    for value in values:
        example = value.node.meta.get("val")
        strided = is_static(example) and not example.is_contiguous()  # type: ignore[union-attr]
        traced = value.node.meta.get(AS_TRACED, example)
        cast = is_static(example) and example.dtype != traced.dtype  # type: ignore[union-attr]
        if value.producer < 0 or value.is_output or strided or cast:
            late.update(range(value.producer + 1, value.last(num_nodes) + 1))
    return late


def why_not_plain(gm: fx.GraphModule, nodes: list[fx.Node]) -> str:
    """Why stock torch cannot split this model by `split_spec` anywhere; empty where it can."""
    if calls := function_calls(gm.graph):
        return f"forward calls the custom Function {calls[0].function.__name__}, whose backward split_spec would lose"
    output = gm.graph.output_node().args[0]
    if len(tree_leaves(output)) != 1 or not _returns_tensor(gm):
        return "the model returns a structure, which split_spec would hand to the loss as a flat tuple"
    inputs = tensor_inputs(gm.graph)
    used: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "placeholder":
                used[source] = None
    if list(used) != inputs:
        return "inputs are not used in the order of the signature, and split_spec binds them in order of first use"
    return ""


def _returns_tensor(gm: fx.GraphModule) -> bool:
    return bool(gm.graph._codegen.pytree_info.out_spec.is_leaf())  # type: ignore[attr-defined]
