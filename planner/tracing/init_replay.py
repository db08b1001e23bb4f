"""The operations of a recorded build, and the repetition of those that make some of its weights.

Tensors go by storage: an operation says which storages it reads and writes, so that a weight is everything that was
ever written to its storage, in order, through whatever view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from planner.errors import TraceError


class NeedsDrawsError(Exception):
    """A random value is asked for, but the build was recorded without drawing any."""


@dataclass(frozen=True, slots=True)
class StoredView:
    """A tensor as sizes and strides over a storage, which goes by a number."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A real tensor that an operation read, and the hash of its values then; None for a copy that nobody changes."""

    tensor: torch.Tensor
    digest: bytes | None


@dataclass(frozen=True, slots=True)
class Draw:
    """Where a random operation starts; `state` is None where the build was recorded without drawing."""

    generator: torch.Generator
    state: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Operation:
    """A call that made or wrote deferred storages: its tensors as StoredView or Constant, the storages by number."""

    function: Any
    args: Any
    kwargs: Any
    outputs: tuple[StoredView | None, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    draw: Draw | None


def replay(operations: Sequence[Operation], wanted: Iterable[int]) -> dict[int, torch.UntypedStorage]:
    """Run the operations on which the storages `wanted` depend; each storage lives until its last use."""
    chosen, last = _needed(operations, wanted)
    generators = {op.draw.generator: op.draw.generator.get_state() for op in chosen if op.draw is not None}
    storages: dict[int, torch.UntypedStorage] = {}
    try:
        for index, operation in enumerate(chosen):
            _run(operation, storages)
            for key in operation.reads | operation.writes:
                if last.get(key) == index:
                    storages.pop(key, None)
    finally:
        for generator, state in generators.items():
            generator.set_state(state)
    return storages


def _needed(operations: Sequence[Operation], wanted: Iterable[int]) -> tuple[list[Operation], dict[int, int]]:
    """The operations that write the storages `wanted`, or what those read; where each other storage is used last."""
    wanted = set(wanted)
    needed = set(wanted)
    chosen: list[Operation] = []
    for operation in reversed(operations):
        if operation.writes & needed:
            chosen.append(operation)
            needed |= operation.reads
    chosen.reverse()
    last = {key: index for index, operation in enumerate(chosen) for key in operation.reads | operation.writes}
    return chosen, {key: index for key, index in last.items() if key not in wanted}


def _run(operation: Operation, storages: dict[int, torch.UntypedStorage]) -> None:
    if operation.draw is not None:
        if operation.draw.state is None:
            raise NeedsDrawsError
        operation.draw.generator.set_state(operation.draw.state)
    args, kwargs = tree_map(
        lambda leaf: _value(leaf, storages, operation.function),
        (operation.args, operation.kwargs),
        is_leaf=lambda leaf: isinstance(leaf, (StoredView, Constant)),
    )
    made = tree_leaves(operation.function(*args, **kwargs))
    for view, tensor in zip(operation.outputs, made, strict=True):
        if view is not None and view.storage not in storages:
            if (tensor.stride(), tensor.storage_offset()) != (view.stride, view.offset):
                storage = torch.empty(reach_bytes(view), dtype=torch.uint8).untyped_storage()
                tensor = over(storage, view).copy_(tensor)
            storages[view.storage] = tensor.untyped_storage()


def _value(leaf: Any, storages: dict[int, torch.UntypedStorage], function: Any) -> Any:
    if isinstance(leaf, StoredView):
        return over(storages[leaf.storage], leaf)
    if isinstance(leaf, Constant):
        if leaf.digest is not None and digest(leaf.tensor) != leaf.digest:
            raise TraceError(
                f"build_model changed a tensor of shape {tuple(leaf.tensor.shape)} after {function} had read it",
                "with --meta large tensors that come from outside (numpy, files) stay as they are while they are read",
                "copy the tensor before it is changed, or plan without --meta",
            )
        return leaf.tensor
    return leaf


def digest(tensor: torch.Tensor) -> bytes:
    """A hash of the values of a real tensor."""
    numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(numbers.data, digest_size=16).digest()


def over(storage: torch.UntypedStorage, view: StoredView) -> torch.Tensor:
    """`view` of the real `storage`."""
    return torch.empty(0, dtype=view.dtype).set_(storage, view.offset, view.size, view.stride)


def reach_bytes(view: StoredView) -> int:
    """The bytes of a storage up to the last element of `view`."""
    last = sum(max(0, n - 1) * s for n, s in zip(view.size, view.stride, strict=True))
    return (view.offset + last + 1) * view.dtype.itemsize
