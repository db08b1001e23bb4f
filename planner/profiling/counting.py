"""FLOPs and bytes of every layer's forward, counted under fake tensors: nothing is computed.

FLOPs are torch's own, by the formulas of `FlopCounterMode`. Bytes are what every operation reads and writes: its
tensors, once each; views move none, and what picks rows of a table reads as much as it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from planner.profiling.memory import as_fake, fake_mode_of
from planner.profiling.timing import Microbatch
from planner.tracing.pieces import Piece, Pieces

PICKING = ("aten::embedding", "aten::index", "aten::index_select", "aten::gather")


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Attention as torch counts it on a GPU; its CPU operation has no formula there."""
    return int(sdpa_flop_count(query, key, value))


MORE_FORMULAS: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True, slots=True)
class Work:
    """What is computed and moved: floating-point operations (a multiplication and an addition are two) and bytes."""

    flops: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CountedWork:
    """The forward of every layer for one microbatch, and the loss; None where the loss was not counted.

    `trained` says of every layer whether backward passes it: whether something that it makes requires a gradient.
    """

    layers: tuple[Work, ...]
    trained: tuple[bool, ...]
    loss: Work | None


def count_work(
    pieces: Pieces, microbatch: Microbatch, loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
) -> CountedWork:
    """Run the layers' forward once on tensors without values and count; with `loss_fn`, the loss too.

    Weights may be real or fake; they are not changed. Raises what forward or the loss raises without values.
    """
    mode = fake_mode_of(pieces)
    fake = as_fake(mode, microbatch)
    values: dict[str, Any] = dict(zip(pieces.inputs, fake.inputs, strict=True))
    layers, trained, loss = [], [], None
    device = next((value.device for value in fake.inputs), torch.device("cpu"))
    with mode, torch.random.fork_rng(devices=[]), pieces.trace.computing():
        for piece in pieces.pieces:
            state = _fake_state(mode, piece, device)
            with _Counter() as counter:
                made = functional_call(piece.module, state, tuple(values[name] for name in piece.inputs))
            values.update(zip(piece.outputs, made, strict=True))
            layers.append(counter.work)
            trained.append(any(isinstance(value, torch.Tensor) and value.requires_grad for value in made))
        if loss_fn is not None:
            with _Counter() as counter:
                loss_fn(pieces.rebuild_output(values), fake.targets)
            loss = counter.work
    return CountedWork(tuple(layers), tuple(trained), loss)


def _fake_state(mode: FakeTensorMode, piece: Piece, device: torch.device) -> dict[str, torch.Tensor]:
    """Stand-ins for the weights and buffers of a piece, so that a layer that writes a buffer does not write ours."""
    state = [*piece.module.named_parameters(), *piece.module.named_buffers()]
    return {name: mode.from_tensor(tensor).to(device) for name, tensor in state}


class _Counter:
    """Both counters at once."""

    def __init__(self) -> None:
        self.flops, self.moved = FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS), _MovedBytes()

    def __enter__(self) -> _Counter:
        self.flops.__enter__()
        self.moved.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.moved.__exit__(*error)  # type: ignore[no-untyped-call]
        self.flops.__exit__(*error)

    @property
    def work(self) -> Work:
        return Work(int(self.flops.get_total_flops()), self.moved.num_bytes)


class _MovedBytes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        written = _bytes_of(made)
        if written and not _is_view(func):
            name = func._schema.name
            read = written if name in PICKING else _bytes_of((args, kwargs))
            self.num_bytes += read + written
        return made


def _is_view(func: Any) -> bool:
    """Whether what an operation returns lies in the memory of what it was given, unchanged."""
    returns = func._schema.returns
    return any(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def _bytes_of(tree: Any) -> int:
    """Bytes of the tensors of `tree`, once each; one that is expanded has those that are there."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
    return sum(_stored_bytes(tensor) for tensor in tensors.values())


def _stored_bytes(tensor: torch.Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * tensor.element_size()
