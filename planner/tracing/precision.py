"""Mixed precision: what autocast is around, and which dtype every value of a traced graph has inside it.

A model is traced outside autocast (a trace made inside bakes some casts in and others not) and computes inside. Which
values are bfloat16 there is not for the trace to say: a linear layer makes bfloat16, a normalisation float32, a sum the
wider of the two. So the traced graph is run once more inside autocast, on fake tensors, and its values are described as
that run makes them. Everything that reads the description (bytes of a message, receive buffers, integers that stand
for floats without gradient) then agrees with what the stages compute. See docs/decisions/0010.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from planner.errors import TraceError
from planner.tracing.code_frames import operation_frames
from planner.tracing.gradients import attribute

AS_TRACED = "val_outside_autocast"
DTYPE_ASSERTION = torch.ops.aten._assert_tensor_metadata.default


def autocast(precision: str, device_type: str) -> AbstractContextManager[Any]:
    """What forward and the loss compute inside: autocast to bfloat16 for "bf16", nothing for "fp32".

    >>> with autocast("bf16", "cpu"):
    ...     torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    torch.bfloat16
    """
    return torch.autocast(device_type, torch.bfloat16) if precision == "bf16" else nullcontext()


def inside_autocast(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`function`, every call of it inside autocast to bfloat16; what parameters were cast to is freed after each."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with autocast("bf16", device_type):
            return function(*args, **kwargs)

    return call


def describe_inside_autocast(gm: fx.GraphModule, device: torch.device) -> bool:
    """Give the values of the prepared graph the dtypes that they have inside autocast on `device`; in place.

    Shapes and layouts stay those of the trace, and its own description stays under AS_TRACED. Assertions that a value
    has the dtype of the trace are removed; True where there was one. Raises TraceError where an operation needs values.
    """
    asserting = [node for node in gm.graph.nodes if node.target is DTYPE_ASSERTION]
    for node in asserting:
        gm.graph.erase_node(node)
    values: dict[fx.Node, Any] = {}
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad(), autocast("bf16", device.type):
        for node in gm.graph.nodes:
            if node.op != "output":
                values[node] = _value(gm, node, values, device)
    for node, value in values.items():
        if node.op == "call_function" and "val" in node.meta:
            node.meta[AS_TRACED] = node.meta["val"]
            node.meta["val"] = _with_dtypes_of(node.meta["val"], value)
    return bool(asserting)


def _value(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], device: torch.device) -> Any:
    if node.op == "placeholder":
        return tree_map(lambda leaf: _fake(leaf, device), node.meta.get("val"))
    if node.op == "get_attr":
        return _fake(attribute(gm, str(node.target)), device)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: values[source])
    args, kwargs = tree_map(lambda leaf: device if isinstance(leaf, torch.device) else leaf, (args, kwargs))
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise TraceError(
            f"{node.target} does not run inside autocast: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            "bf16 needs the dtype of every value, found by a run on tensors without values",
            "take what depends on values out of forward, or use fp32",
            operation_frames(node),
        ) from error


def _fake(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)


def _with_dtypes_of(traced: Any, computed: Any) -> Any:
    """`traced` with the dtype of `computed` in every tensor."""
    if isinstance(traced, (tuple, list)):
        return type(traced)(_with_dtypes_of(a, b) for a, b in zip(traced, computed, strict=True))
    if not isinstance(traced, torch.Tensor) or traced.dtype == computed.dtype:
        return traced
    return traced.new_empty_strided(traced.shape, traced.stride(), dtype=computed.dtype)
