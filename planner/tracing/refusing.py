"""Models that export and would still be wrong in a pipeline, refused with the line to blame.

torch.export takes no notice of numbers that a module counts up in Python, of two inputs that are one tensor, and of
outputs that are no tensors; a stage that is sent or frozen like this would train another model than the eager one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from planner.errors import TraceError
from planner.tracing.code_frames import forward_frame, operation_frames, operation_module
from planner.tracing.state import storages, writes


@dataclass(frozen=True, slots=True)
class NumberChange:
    """A number that forward assigned to an attribute of a module, with the line that did."""

    module: nn.Module
    attribute: str
    before: float
    after: float
    frame: str


def has_static_shape(value: Any) -> bool:
    """Whether `value` is a tensor every size of which is known before training."""
    return isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)


def is_static(value: Any) -> bool:
    """Whether `value` is a dense tensor whose sizes and strides are known before training, so that it can be sent."""
    strided = has_static_shape(value) and value.layout is torch.strided
    return strided and all(isinstance(stride, int) for stride in value.stride())


def refuse_outputs(gm: fx.GraphModule, model: nn.Module) -> None:
    """Raise TraceError where forward returns no tensor, a number made from one, or a shape that is not static.

    Constants beside the tensors are given to the loss as they were in the trace.
    """
    name, frame = type(model).__name__, forward_frame(model, last_return=True)
    leaves = tree_leaves(gm.graph.output_node().args[0], is_leaf=lambda leaf: leaf is None)
    made = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    if not made:
        raise TraceError(f"forward of {name} returns nothing", "the loss needs an output", "return it", frame)
    for leaf in made:
        value = leaf.meta.get("val")
        if value is not None and not isinstance(value, torch.Tensor):
            raise TraceError(
                f"forward of {name} returns a Python number made from a tensor, which is no tensor",
                "the last stage hands tensors and constants to loss_fn",
                "return tensors (or None) only, in a tuple, dict or dataclass if need be (return_dict=True)",
                frame,
            )
        if value is not None and not has_static_shape(value):
            maker = next(node for node in gm.graph.nodes if _of_unknown_shape(node))
            raise TraceError(
                f"the output of {name} has a shape that depends on the values of a tensor",
                "every microbatch is one of equal shape",
                "keep shapes static: multiply by the mask, or use torch.where(mask, x, 0), instead of selecting rows",
                operation_frames(maker),
            )


def _of_unknown_shape(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not has_static_shape(value)


def refuse_shared_inputs(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TraceError where two inputs share memory and forward writes to one of them in place.

    The graph has an input for each, so that a write to one would not be seen through the other, as it is in the model.
    """
    shared = [t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if len(set(shared)) == len(shared):
        return
    for node, storage in writes(gm.graph, storages(gm.graph)):
        if storage.op == "placeholder":
            raise TraceError(
                f"{storage.name} shares its memory with another input, and forward writes to it in place",
                "every input of the graph is a tensor of its own",
                "return x.clone() from make_batch, or write x = x + 1 instead of x.add_(1)",
                operation_frames(node),
            )


def refuse_sparse_gradients(gm: fx.GraphModule) -> None:
    """Raise TraceError where an operation of `gm` makes gradients that list their rows, as embeddings may."""
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and _argument(node, "sparse"):
            raise TraceError(
                f"{operation_module(node) or 'the model'} makes sparse gradients",
                "gradients are dense: their norm, their sum over stages and their memory are those of tensors",
                "build the embedding with sparse=False",
                operation_frames(node),
            )


def _argument(node: fx.Node, name: str) -> Any:
    """What an operation is given by that name, by position or as keyword; None where it has no such argument."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False), **node.kwargs).get(name)


@contextlib.contextmanager
def watch_numbers(model: nn.Module) -> Iterator[list[NumberChange]]:
    """The changes that forward makes to numbers of its modules while the block runs."""
    modules = {id(module) for module in model.modules()}
    changes: list[NumberChange] = []
    original = nn.Module.__setattr__

    def watched(self: nn.Module, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        if id(self) in modules and _is_number(before) and _is_number(value) and before != value:
            code = sys._getframe(1)
            frame = f"{Path(code.f_code.co_filename).name}:{code.f_lineno}: self.{name} becomes {value}"
            changes.append(NumberChange(self, name, before, value, frame))  # type: ignore[arg-type]
        original(self, name, value)

    nn.Module.__setattr__ = watched  # type: ignore[method-assign]
    try:
        yield changes
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def refuse_counters(
    model: nn.Module, gm: fx.GraphModule, changes: list[NumberChange], export: Callable[[], fx.GraphModule]
) -> None:
    """Raise TraceError where the numbers that forward changes make its next call another graph.

    `gm` is the export with the numbers as they were; `export` is called with them as forward left them. A number that
    is merely cached (the longest sequence so far) does not change again, and one that is only counted changes nothing.
    """
    after = {(change.module, change.attribute): change for change in changes}
    first = {(change.module, change.attribute): change.before for change in reversed(changes)}
    for (module, attribute), change in after.items():
        setattr(module, attribute, change.after)
    try:
        with watch_numbers(model) as again:
            second = export()
    finally:
        for (module, attribute), value in first.items():
            setattr(module, attribute, value)
    if second.code == gm.code:
        return
    for change in again:
        if (change.module, change.attribute) in after:
            raise TraceError(
                f"forward of {type(change.module).__name__} counts in Python: self.{change.attribute} changes with"
                " every call, and the result with it",
                "a graph keeps the numbers of the call that was recorded",
                f'make it a buffer: self.register_buffer("{change.attribute}", torch.zeros(())), and add to it',
                (change.frame,),
            )
