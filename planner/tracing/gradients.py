"""Which values of an exported graph carry a gradient: those that depend on a trainable parameter."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from planner.tracing.functions import FunctionCall


def needs_gradient(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes of `gm` whose value requires a gradient in training.

    A value does where it is floating point and is computed, not through `detach`, from a trainable parameter. A write
    in place makes every alias of the written storage need it too.
    """
    graded: set[fx.Node] = set()
    base: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(gm, str(node.target))
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                graded.add(node)
        elif node.op == "call_function":
            _follow(node, graded, base)
    return graded


def attribute(gm: torch.nn.Module, name: str) -> Any:
    """The attribute `name` (dotted) of `gm`."""
    return operator.attrgetter(name)(gm)


def _follow(node: fx.Node, graded: set[fx.Node], base: dict[fx.Node, fx.Node]) -> None:
    depends = any(source in graded for source in node.all_input_nodes)
    for source, written in aliased_arguments(node):
        base[node] = base.get(source, source)
        if written and depends and node.target is not torch.ops.aten.detach.default:
            storage = base[node]
            graded.update(alias for alias in [storage, *base] if base.get(alias, alias) is storage and _is_float(alias))
    if depends and node.target is not torch.ops.aten.detach.default and _is_float(node):
        graded.add(node)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()


def aliased_arguments(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """The arguments that the result of `node` shares storage with, each with whether it is written in place.

    An item of a list of views (`chunk`, `unbind`) shares storage with the list.
    """
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return [(node.args[0], False)] if aliased_arguments(node.args[0]) else []
    if isinstance(node.target, FunctionCall):
        return [(node.all_input_nodes[index], False) for index in node.target.shared]
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    found = []
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and isinstance(given, fx.Node):
            found.append((given, bool(argument.alias_info.is_write)))
    return found
