"""How a value travels from one stage to the next, and how it is put back into the layout that the trace saw.

A message is contiguous. A value that is not is sent with its dimensions in the order of its strides, and a dimension
that only repeats (stride 0, from `expand`) is sent once. Both are views; on arrival the inverse views give the later
operations the layout of the trace, for which a `view` among them was valid. Floats without gradient travel as
integers of the same width, so that nothing is sent back for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

ATEN = torch.ops.aten
SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class WireForm:
    """Dimensions that repeat one slice, and all dimensions from the largest stride to the smallest."""

    repeated: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def inverse(self) -> tuple[int, ...]:
        """The permutation that undoes `order`."""
        return tuple(sorted(range(len(self.order)), key=lambda dimension: self.order[dimension]))

    @property
    def turned(self) -> bool:
        """Whether the dimensions travel in another order than they have."""
        return self.order != tuple(range(len(self.order)))

    def holds(self, value: torch.Tensor) -> bool:
        """Whether `value` lies in memory as it travels, in one piece.

        >>> form = wire_form(torch.zeros(2, 3).T)
        >>> form.holds(torch.zeros(3, 2)), form.holds(torch.zeros(2, 3).T)
        (False, True)
        """
        return value.permute(self.order).is_contiguous()

    def laid_out(self, value: torch.Tensor) -> torch.Tensor:
        """`value`, copied where it does not lie in memory as it travels."""
        return value.permute(self.order).contiguous().permute(self.inverse)


def wire_form(example: torch.Tensor) -> WireForm:
    """How a tensor with the layout of `example` travels.

    >>> wire_form(torch.zeros(2, 3).T)
    WireForm(repeated=(), order=(1, 0))
    >>> wire_form(torch.zeros(1, 3).expand(4, 3))
    WireForm(repeated=(0,), order=(0, 1))
    """
    sizes, strides = example.shape, example.stride()
    repeated = tuple(d for d in range(example.dim()) if strides[d] == 0 and sizes[d] > 1)
    order = tuple(range(example.dim()))
    if not example.is_contiguous():
        moving = iter(sorted((d for d in order if sizes[d] > 1 and strides[d] > 0), key=lambda d: -strides[d]))
        order = tuple(next(moving) if sizes[d] > 1 and strides[d] > 0 else d for d in order)
    return WireForm(repeated, order)


def wire_bytes(example: torch.Tensor) -> int:
    """Bytes of a message that carries `example`.

    >>> wire_bytes(torch.zeros(1, 3).expand(4, 3))
    12
    """
    copies = 1
    for dimension in wire_form(example).repeated:
        copies *= example.shape[dimension]
    return example.numel() // copies * example.element_size()


def copies_to_send(example: torch.Tensor) -> bool:
    """Whether `contiguous` makes a copy of what is sent.

    >>> copies_to_send(torch.zeros(2, 3).T), copies_to_send(torch.zeros(4, 6)[:, ::2])
    (False, True)
    """
    if example.is_contiguous():
        return False
    form = wire_form(example)
    sent = example
    for dimension in form.repeated:
        sent = sent.narrow(dimension, 0, 1)
    return not sent.permute(form.order).is_contiguous()


def call(graph: fx.Graph, target: Any, value: fx.Node, *arguments: Any) -> fx.Node:
    """A call on `value` with example metadata computed by the operator itself."""
    node = graph.call_function(target, (value, *arguments))
    node.meta = {**value.meta, "val": target(value.meta["val"], *arguments)}
    return node


def depart(graph: fx.Graph, value: fx.Node, *, as_integers: bool, copied: bool = False) -> list[fx.Node]:
    """Operations, at the graph's insertion point, that make of `value` what is sent; the last one is what is sent.

    It is `copied` where the next microbatch may write to it while it is being sent.
    `contiguous` is always among them: where dropout is off, say, a value can have another layout than in the trace.
    """
    form = wire_form(value.meta["val"])
    made = [value, call(graph, ATEN.clone.default, value)] if copied else [value]
    for dimension in form.repeated:
        made.append(call(graph, ATEN.slice.Tensor, made[-1], dimension, 0, 1))
    if form.turned:
        made.append(call(graph, ATEN.permute.default, made[-1], list(form.order)))
    made.append(call(graph, ATEN.contiguous.default, made[-1]))
    if as_integers:
        integer = SAME_SIZE_INTEGER[value.meta["val"].element_size()]
        made.append(call(graph, ATEN.view.dtype, made[-1], integer))
    return made[1:]


def arrive(graph: fx.Graph, received: fx.Node, example: torch.Tensor) -> list[fx.Node]:
    """Operations, at the graph's insertion point, that give `received` the dtype, shape and layout of `example`."""
    form = wire_form(example)
    made = [received]
    if received.meta["val"].dtype != example.dtype:
        made.append(call(graph, ATEN.view.dtype, made[-1], example.dtype))
    if form.turned:
        made.append(call(graph, ATEN.permute.default, made[-1], list(form.inverse)))
    if form.repeated:
        made.append(call(graph, ATEN.expand.default, made[-1], list(example.shape)))
    return made[1:]
