"""Writes in place over a distance, turned into results of their own, so that a cut may lie in between.

A running total that every layer adds to (`total += loss`) forbids each cut between its first value and its last write,
for a stage cannot write into what an earlier one holds. Where nothing else shares the storage, `add` in place of
`add_` computes the same. Writes without a module in between (`relu_` after a convolution) stay: no cut is lost.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from planner.tracing.gradients import aliased_arguments
from planner.tracing.state import storages, writes

ATEN = torch.ops.aten


def separate_writes(nodes: list[fx.Node], begins: Container[int]) -> bool:
    """Replace such writes among the operations `nodes` of a graph; True where there was one.

    `begins` are the positions at which modules begin. A tensor of the caller that forward writes to keeps its values.
    """
    index = {node: position for position, node in enumerate(nodes)}
    far = _writes_that_forbid_cuts(nodes, begins, index)
    storage: dict[fx.Node, fx.Node] = {}
    found = False
    for position, node in enumerate(nodes):
        value = node.args[0] if node in far else None
        if isinstance(value, fx.Node) and value not in storage:
            separate = _separate_operation(node)
            shared = (alias for alias, owner in storage.items() if owner is value)
            if separate is not None and not any(_is_read_after(alias, position, index) for alias in shared):
                index[_replace(node, value, separate, index)] = position
                found = True
                continue
        for source, _ in aliased_arguments(node):
            storage[node] = storage.get(source, source)
    return found


def _writes_that_forbid_cuts(nodes: list[fx.Node], begins: Container[int], index: dict[fx.Node, int]) -> set[fx.Node]:
    """The writes to storages (not of parameters or buffers) that live while another module begins."""
    graph = nodes[0].graph
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node, owner in writes(graph, storages(graph)):
        if owner.op != "get_attr":
            writers.setdefault(owner, []).append(node)
    found: set[fx.Node] = set()
    for owner, nodes_of in writers.items():
        own = {index[node] for node in nodes_of}
        between = range(max(index.get(owner, -1) + 1, 1), max(own))
        if any(position in begins and position not in own for position in between):
            found.update(nodes_of)
    return found


def _is_read_after(value: fx.Node, position: int, index: dict[fx.Node, int]) -> bool:
    return any(index.get(user, len(index)) > position for user in value.users)


def _separate_operation(node: fx.Node) -> Any:
    """The operator that computes what the write `node` does, as a new tensor of the same kind; None without one."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    written = [source for source, is_write in aliased_arguments(node) if is_write]
    packet = getattr(ATEN, node.target._schema.name.partition("::")[2].removesuffix("_"), None)
    operator = getattr(packet, node.target._overloadname, None)
    if written != [node.args[0]] or operator is None or operator is node.target:
        return None
    if any(argument.alias_info is not None for argument in operator._schema.arguments):
        return None
    examples = tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (node.args, dict(node.kwargs)))
    before, after = examples[0][0], operator(*examples[0], **examples[1])
    same = (after.shape, after.dtype, after.stride()) == (before.shape, before.dtype, before.stride())
    return operator if same else None


def _replace(node: fx.Node, value: fx.Node, operator: Any, index: dict[fx.Node, int]) -> fx.Node:
    """Let `operator` make a new tensor, and everything after `node` read that one instead of `value`."""
    graph, position = node.graph, index[node]
    with graph.inserting_before(node):
        made = graph.call_function(operator, node.args, node.kwargs)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    for user in list(value.users):
        if user is not node and user is not made and index.get(user, len(index)) > position:
            user.replace_input_with(value, made)
    graph.erase_node(node)
    return made
