"""A hash of a prepared graph, the same in every process and on every device."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from planner.tracing.precision import AS_TRACED


def fingerprint(gm: fx.GraphModule, names: dict[str, str]) -> str:
    """A hash of the prepared graph: operators, arguments, shapes, dtypes, parameter names; no weights, no device.

    Dtypes are those of the trace, so that the hash is the same on devices whose autocast differs.
    """
    number = {node: index for index, node in enumerate(gm.graph.nodes)}
    digest = hashlib.sha256()
    for node in gm.graph.nodes:
        target = str(node.target) if node.op in ("call_function", "get_attr") else node.op
        described = (node.op, target, describe(node.args, number), describe(node.kwargs, number), _shape(node))
        digest.update(repr(described).encode())
    digest.update(repr(sorted(names.items())).encode())
    return digest.hexdigest()[:16]


def describe(value: Any, number: dict[fx.Node, int]) -> Any:
    """An argument of a node as a value whose `repr` is the same in every process."""
    if isinstance(value, fx.Node):
        return f"%{number.get(value, -1)}"
    if isinstance(value, (tuple, list)):
        return [describe(item, number) for item in value]
    if isinstance(value, dict):
        return {key: describe(item, number) for key, item in value.items()}
    return "device" if isinstance(value, torch.device) else repr(value)


def _shape(node: fx.Node) -> Any:
    examples = tree_leaves(node.meta.get(AS_TRACED, node.meta.get("val")))
    return [(tuple(e.shape), str(e.dtype)) for e in examples if isinstance(e, torch.Tensor)]
