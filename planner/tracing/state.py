"""Buffers that forward writes, and state that it returns: where in the graph that happens.

`torch.export` puts every assignment to a buffer at the end of the graph, which would allow no cut between its first
use and the end; and what the model returns of its own state is no value that a stage could send.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from planner.tracing.gradients import aliased_arguments, attribute

ATEN = torch.ops.aten


def storages(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Every node that shares storage with an earlier one → the node that made the storage."""
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source, _ in aliased_arguments(node):
            base[node] = base.get(source, source)
    return base


def writes(graph: fx.Graph, base: dict[fx.Node, fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """(operation, the node that made the storage it writes to) for every write in place; `base` are the `storages`."""
    found = [(node, source) for node in graph.nodes for source, written in aliased_arguments(node) if written]
    return [(node, base.get(source, source)) for node, source in found]


def aliases_of_written_state(graph: fx.Graph) -> set[fx.Node]:
    """Values that share storage with a buffer that forward writes."""
    base = storages(graph)
    written = {storage for _, storage in writes(graph, base)}
    return {node for node, storage in base.items() if storage.op == "get_attr" and storage in written}


def copy_written_inputs(gm: fx.GraphModule) -> None:
    """Let forward write to copies of the inputs: the microbatches of a batch share storage, and are needed again."""
    base = storages(gm.graph)
    written = {storage for _, storage in writes(gm.graph, base)}
    for entry in [node for node in written if node.op == "placeholder"]:
        first = next(node for node in gm.graph.nodes if node.op == "call_function")
        with gm.graph.inserting_before(first):
            copy = gm.graph.call_function(ATEN.clone.default, (entry,))
        copy.meta = {**entry.meta, "nn_module_stack": first.meta["nn_module_stack"]}
        for user in [user for user in entry.users if user is not copy]:
            user.replace_input_with(entry, copy)


def write_state_early(gm: fx.GraphModule) -> None:
    """Move each assignment to a buffer behind the last use of its old value and the last write to its new one."""
    graph = gm.graph
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target is ATEN.copy_.default]:
        state, value = node.args[0], node.args[1]
        if not isinstance(state, fx.Node) or state.op != "get_attr" or not isinstance(value, fx.Node) or node.users:
            continue
        base = storages(graph)
        storage = base.get(value, value)
        if storage is state:  # forward wrote in place, and assigned the buffer to itself
            graph.erase_node(node)
            continue
        uses = {user for alias in [state, *base] if base.get(alias, alias) is state for user in alias.users} - {node}
        writers = {writer for writer, written in writes(graph, base) if written is storage}
        order = {other: index for index, other in enumerate(graph.nodes)}
        earliest = max([value, *uses, *writers], key=lambda other: order[other])
        if earliest.op == "call_function" and order[earliest] < order[node]:
            earliest.append(node)


def return_state_as_values(gm: fx.GraphModule) -> None:
    """A parameter or buffer that the model returns becomes a value, taken after its last use, as every other output.

    A buffer is copied: the next microbatch may write to it before the value is read.
    """
    output = gm.graph.output_node()
    for state in [node for node in output.all_input_nodes if node.op == "get_attr"]:
        base = storages(gm.graph)
        aliases = [alias for alias in [state, *base] if base.get(alias, alias) is state]
        uses = {user for alias in aliases for user in alias.users} - {output}
        last = next((node for node in reversed(gm.graph.nodes) if node in uses), None)
        parameter = isinstance(attribute(gm, str(state.target)), nn.Parameter)
        with gm.graph.inserting_before(output if last is None else last.next):
            value = gm.graph.call_function(ATEN.alias.default if parameter else ATEN.clone.default, (state,))
        value.meta = {**state.meta, "nn_module_stack": (last or output.prev.prev).meta.get("nn_module_stack")}
        output.replace_input_with(state, value)


def name_state_as_torch_will(graph: fx.Graph) -> None:
    """Give each parameter and buffer the name that `pipeline()` will look for; whoever has it gets another.

    torch splits the graph into a new one, in which a buffer `mean` is called `mean` even if an operation was called so
    before it, and then finds by name what it moves into the stages.
    """
    as_split = fx.Graph()
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            as_split.placeholder(str(node.target))
        elif node.op == "get_attr":
            names[node] = as_split.get_attr(str(node.target)).name
    taken = {*names.values()}
    for node in graph.nodes:
        if node not in names and node.name in taken:
            node.name = graph._graph_namespace.create_name(f"{node.name}_value", None)
    for node, name in names.items():
        node.name = name
