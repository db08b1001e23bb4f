"""Live storages of every layer: what it keeps, how long, and how far it rises above that while it computes.

One step of two microbatches runs under a dispatch mode that sees every storage being made and freed. What outlives the
layer that made it is kept as a *lifetime* (made in layer a, last needed in layer b), so that any stage can be put
together from layers exactly; what a layer has alive of its own is kept as peaks, apart from what it is given and frees,
for a stage may have to keep that. The mode does not see what an operation takes and gives back inside itself (a
convolution's buffers, workspaces): a second step is watched at the allocator, and the larger peaks of the two count.

Where gradients did not lie in memory as a receive buffer would have them, both steps are made once more with gradients
that do: a layer that then makes more, or rises further, copies what it gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from planner.errors import ProfileError
from planner.machine.device import Device
from planner.machine.memory_events import bytes_by_mark, memory_events
from planner.machine.phase_bytes import PhaseBytes
from planner.profiling.first_seen import first_seen
from planner.profiling.live_storages import MARK, AllocatorMarks, EventMarks, LiveStorages, Marks, Phase
from planner.profiling.replaced_state import replaced_state
from planner.profiling.step_memory import StepMemory, summarise_step
from planner.profiling.timing import Microbatch, clear_gradients
from planner.tracing.crossing import WireForm, copies_to_send, wire_form
from planner.tracing.pieces import OutputValue, Piece, Pieces

CPU = torch.device("cpu")


def track_step(
    pieces: Pieces,
    microbatches: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    device: Device,
) -> StepMemory:
    """Run one GPipe step of two microbatches, the first with gradients None, and follow every storage.

    The layers of a later microbatch are what is reported; only `backward_first_peaks_bytes` are the first one's.
    """
    both = [microbatches[0], microbatches[-1]]
    with _untied(pieces):
        live = LiveStorages(device.block_bytes)
        track_storages(live, pieces, both, loss_fn)
        if device.clock == "cuda-event":
            marks = _asked_allocator(pieces, both, loss_fn, device)
            peaks = {phase: found.raised_to(marks.rising.get(phase, 0)) for phase, found in live.phases.items()}
            step = summarise_step(live, peaks, len(pieces.pieces))
            return replace(step, fragmentation_bytes=marks.fragmentation_bytes)
        seen = _events(pieces, both, loss_fn, device)
        peaks = {p: found.raised_to_those_of(seen.get(p, PhaseBytes())) for p, found in live.phases.items()}
        step = summarise_step(live, peaks, len(pieces.pieces))
        if not live.scattered:
            return replace(step, views=_views(live, live))
        straight = LiveStorages(device.block_bytes, straight=True)
        track_storages(straight, pieces, both, loss_fn)
        copying = _need_more(live.phases, straight.phases)
        copying |= _need_more(seen, _events(pieces, both, loss_fn, device, straight=True))
        made = frozenset(tensor.name for tensor in pieces.trace.tensors if tensor.producer in copying)
        return replace(step, scattered=made & live.scattered, views=_views(live, straight))


def track_fake_step(
    pieces: Pieces,
    microbatches: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    block_bytes: int = 1,
    device: torch.device = CPU,
) -> StepMemory:
    """`track_step` of pieces whose weights are fake tensors, without any memory: no allocator has anything to say.

    The weights say that they are where they were traced, on the CPU; what is followed is a step on `device`.

    Raises ProfileError where forward or the loss needs values.
    """
    mode = fake_mode_of(pieces)
    both = [as_fake(mode, microbatches[0]), as_fake(mode, microbatches[-1])]
    live = LiveStorages(block_bytes)

    def moved(_: str, tensor: torch.Tensor) -> torch.Tensor:
        elsewhere = isinstance(tensor, FakeTensor) and tensor.device != device
        return tensor.detach().to(device) if elsewhere else tensor

    try:
        with mode, replaced_state([piece.module for piece in pieces.pieces], moved), _untied(pieces):
            track_storages(live, pieces, both, loss_fn)
    except Exception as error:
        raise ProfileError(
            f"the memory of the layers cannot be found without values: {type(error).__name__}: {error}".splitlines()[0],
            "with --meta, forward and loss_fn are run once on tensors without values",
            "take .item(), .tolist() and choices by value out of loss_fn, or plan without --meta",
        ) from error
    peaks = {phase: found.peaks for phase, found in live.phases.items()}
    return summarise_step(live, peaks, len(pieces.pieces))


def fake_mode_of(pieces: Pieces) -> FakeTensorMode:
    """The mode of the pieces' fake weights; where all are real, a new one that takes them for fake."""
    modes = (tensor.fake_mode for piece in pieces.pieces for tensor in _fake_state(piece))
    return next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True)


def _fake_state(piece: Piece) -> list[FakeTensor]:
    state = [*piece.module.parameters(), *piece.module.buffers()]
    return [tensor for tensor in state if isinstance(tensor, FakeTensor)]


def as_fake(mode: FakeTensorMode, microbatch: Microbatch) -> Microbatch:
    """The microbatch without values: its tensors as fake ones of `mode`."""

    def fake(leaf: Any) -> Any:
        return mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return Microbatch(tuple(map(fake, microbatch.inputs)), tree_map(fake, microbatch.targets))


@contextlib.contextmanager
def _untied(pieces: Pieces) -> Iterator[None]:
    """A leaf of its own, with the same values, for every layer that uses a tied parameter, as stages have.

    Autograd would otherwise keep the gradient of one layer until that of the other is there, which stages do not.
    """
    owners = [
        (piece.module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for piece in pieces.pieces
        for name, _ in piece.module.named_parameters()
        if name in pieces.trace.tied
    ]
    kept = [getattr(owner, name) for owner, name in owners]
    try:
        for (owner, name), parameter in zip(owners, kept, strict=True):
            setattr(owner, name, torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))
        yield
    finally:
        for (owner, name), parameter in zip(owners, kept, strict=True):
            setattr(owner, name, parameter)


def track_storages(
    live: LiveStorages, pieces: Pieces, both: Sequence[Microbatch], loss_fn: Callable[[Any, Any], torch.Tensor]
) -> None:
    """Follow a step's storages in `live`."""
    for piece in pieces.pieces:
        live.know([*piece.module.parameters(), *piece.module.buffers()])
    live.know([leaf for microbatch in both for leaf in tree_leaves((microbatch.inputs, microbatch.targets))])
    with live:
        _run_step(live, pieces, both, loss_fn)


def _run_step(
    marks: Marks, pieces: Pieces, both: Sequence[Microbatch], loss_fn: Callable[[Any, Any], torch.Tensor]
) -> None:
    """Two forwards, two backwards, gradients None before and after."""
    clear_gradients(pieces)
    losses = [_forward(marks, pieces, microbatch, loss_fn, number) for number, microbatch in enumerate(both)]
    for number in range(len(both)):
        marks.enter(Phase(number, "backward", len(pieces.pieces) - 1))
        loss = losses[number]
        losses[number] = None
        assert loss is not None
        loss.backward()
        del loss
    clear_gradients(pieces)


def _asked_allocator(
    pieces: Pieces,
    both: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    device: Device,
) -> AllocatorMarks:
    """What a step takes from a GPU's allocator, operations' own buffers included."""
    marks = AllocatorMarks(device)
    _run_step(marks, pieces, both, loss_fn)
    marks.enter(Phase(-1, "forward", -1))
    return marks


def _events(
    pieces: Pieces,
    both: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    device: Device,
    *,
    straight: bool = False,
) -> dict[Phase, PhaseBytes]:
    """What a step takes from a CPU's allocator by phase, operations' own buffers included."""
    marks = EventMarks(straight=straight)
    events = memory_events(lambda: _run_step(marks, pieces, both, loss_fn))
    return marks.by_phase(bytes_by_mark(events, MARK, device.block_bytes))


def _views(live: LiveStorages, straight: LiveStorages) -> frozenset[str]:
    """Values whose gradient, where it came in a receive buffer and is only handed on, is a view of it.

    Autograd does not copy what no other tensor is, and what travels turned reaches it as a new view; but it copies what
    then does not lie as the value had come. Between the buffer and the value no layer may need another layout.
    """
    held = straight.turned - straight.scattered
    return frozenset(
        name for name in held if straight.handed_on.get(name, frozenset()) >= live.handed_on.get(name, frozenset())
    )


def _need_more(scattered: Mapping[Phase, PhaseBytes], straight: Mapping[Phase, PhaseBytes]) -> set[int]:
    """The layers whose backward makes more, or rises further, where gradients lie in one piece."""
    return {
        phase.layer
        for phase, found in straight.items()
        if phase.direction == "backward" and phase in scattered
        if found.made > scattered[phase].made or max(found.peaks) > max(scattered[phase].peaks)
    }


def _forward(
    marks: Marks,
    pieces: Pieces,
    microbatch: Microbatch,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    number: int,
) -> torch.Tensor | None:
    values: dict[str, Any] = dict(zip(pieces.inputs, microbatch.inputs, strict=True))
    readers = {tensor.name: max(tensor.consumers) for tensor in pieces.trace.tensors}
    entered: set[int] = {len(pieces.pieces) - 1}
    for value in values.values():
        first_seen(value, entered)
    loss: torch.Tensor | None = None
    with pieces.trace.computing():  # its casts of parameters live until it ends, as they do in a stage
        for index, piece in enumerate(pieces.pieces):
            marks.enter(Phase(number, "forward", index))
            made = piece.module(*(values[name] for name in piece.inputs))
            values.update(zip(piece.outputs, made, strict=True))
            _note_readers(marks, piece, made, readers, pieces)
            if index == len(pieces.pieces) - 1:
                loss = loss_fn(pieces.rebuild_output(values), microbatch.targets)
            for name in piece.released:
                del values[name]
            named = zip(piece.outputs, made, strict=True)
            _announce_backward(marks, Phase(number, "backward", index), named, entered)
            del made
    return loss


def _note_readers(marks: Marks, piece: Piece, made: Sequence[Any], readers: dict[str, int], pieces: Pieces) -> None:
    """The last layer that reads a storage by a view that is sent as it is; no layer reads an output of the model."""
    for name, value in zip(piece.outputs, made, strict=True):
        if not isinstance(value, torch.Tensor) or copies_to_send(value):
            continue
        storage = marks.find(value)
        if storage is not None:
            last = len(pieces.pieces) if OutputValue(name) in pieces.outputs else readers.get(name, -1)
            storage.last_reader = max(storage.last_reader, last)


def _announce_backward(marks: Marks, phase: Phase, made: Iterable[tuple[str, Any]], entered: set[int]) -> None:
    """Enter `phase` when backward first reaches something that the layer made, and hand over its gradients."""

    def enter(name: str, form: WireForm, gradient: torch.Tensor) -> torch.Tensor | None:
        handed_over = marks.hand_over(name, phase.layer, gradient, form)
        if phase.layer not in entered:
            entered.add(phase.layer)
            marks.enter(phase)
        return handed_over

    for name, value in made:
        if first_seen(value, entered) and value.requires_grad:
            value.register_hook(partial(enter, name, wire_form(value)))
