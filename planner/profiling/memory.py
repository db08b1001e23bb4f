"""Live storages of every layer: what it keeps, how long, and how far it rises above that while it computes.

One step of two microbatches runs under a dispatch mode that sees every storage being made and freed. What outlives the
layer that made it is kept as a *lifetime* (made in layer a, last needed in layer b), so that any stage can be put
together from layers exactly; what rises inside a layer is kept as a peak. The mode does not see what an operation takes
and gives back inside itself (a convolution's buffers, workspaces): a second step is watched at the allocator, and the
larger peak of the two counts.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from planner.errors import ProfileError
from planner.files.profile_file import GradientLifetime, LayerMemory, Lifetime
from planner.machine.device import Device
from planner.machine.memory_events import memory_events, rising_by_mark
from planner.profiling.first_seen import first_seen
from planner.profiling.live_storages import MARK, AllocatorMarks, EventMarks, LiveStorages, Marks, Pass, Phase, Storage
from planner.profiling.optimizer_memory import OptimizerMemory
from planner.profiling.timing import Microbatch, clear_gradients
from planner.tracing.crossing import copies_to_send
from planner.tracing.gradients import attribute
from planner.tracing.pieces import OutputValue, Piece, Pieces


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What one step showed: peaks by layer for the first and for later microbatches, and what outlives its layer."""

    forward_peak_bytes: tuple[int, ...]
    backward_peak_bytes: tuple[int, ...]
    backward_first_peak_bytes: tuple[int, ...]
    lifetimes: tuple[Lifetime, ...]
    gradients: tuple[GradientLifetime, ...]


def track_step(
    pieces: Pieces,
    microbatches: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    device: Device,
) -> StepMemory:
    """Run one GPipe step of two microbatches, the first with gradients None, and follow every storage.

    The layers of a later microbatch are what is reported; only `backward_first_peak_bytes` is the first one's.
    """
    both = [microbatches[0], microbatches[-1]]
    with _untied(pieces):
        live = LiveStorages(device.block_bytes)
        rising = _track(live, pieces, both, loss_fn)
        for phase, seen in _watch_allocator(pieces, both, loss_fn, device).items():
            rising[phase] = max(rising.get(phase, 0), seen)
        return _summary(live.storages, rising, len(pieces.pieces))


def track_fake_step(
    pieces: Pieces,
    microbatches: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    block_bytes: int = 1,
) -> StepMemory:
    """`track_step` of pieces whose weights are fake tensors, without any memory: no allocator has anything to say.

    Raises ProfileError where forward or the loss needs values.
    """
    mode = fake_mode_of(pieces)
    both = [as_fake(mode, microbatches[0]), as_fake(mode, microbatches[-1])]
    live = LiveStorages(block_bytes)
    try:
        with mode, _untied(pieces):
            rising = _track(live, pieces, both, loss_fn)
    except Exception as error:
        raise ProfileError(
            f"the memory of the layers cannot be found without values: {type(error).__name__}: {error}".splitlines()[0],
            "with --meta, forward and loss_fn are run once on tensors without values",
            "take .item(), .tolist() and choices by value out of loss_fn, or plan without --meta",
        ) from error
    return _summary(live.storages, rising, len(pieces.pieces))


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


def _track(
    live: LiveStorages, pieces: Pieces, both: Sequence[Microbatch], loss_fn: Callable[[Any, Any], torch.Tensor]
) -> dict[Phase, int]:
    """Follow a step's storages in `live`; how far the bytes rose, by phase."""
    for piece in pieces.pieces:
        live.know([*piece.module.parameters(), *piece.module.buffers()])
    live.know([leaf for microbatch in both for leaf in tree_leaves((microbatch.inputs, microbatch.targets))])
    with live:
        _run_step(live, pieces, both, loss_fn)
    return dict(live.rising)


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


def _watch_allocator(
    pieces: Pieces, both: Sequence[Microbatch], loss_fn: Callable[[Any, Any], torch.Tensor], device: Device
) -> dict[Phase, int]:
    """By phase, how far the allocator's bytes rose, operations' own buffers included."""
    if device.clock == "cuda-event":
        allocator = AllocatorMarks(device)
        _run_step(allocator, pieces, both, loss_fn)
        allocator.enter(Phase(-1, "forward", -1))
        return allocator.rising
    marks = EventMarks()
    rising = rising_by_mark(memory_events(lambda: _run_step(marks, pieces, both, loss_fn)), MARK)
    return {marks.phases[int(number)]: num_bytes for number, num_bytes in rising.items()}


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
            _announce_backward(marks, Phase(number, "backward", index), made, entered)
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


def _announce_backward(marks: Marks, phase: Phase, made: Sequence[Any], entered: set[int]) -> None:
    """Enter `phase` when backward first reaches something that the layer made."""

    def enter(_: torch.Tensor) -> None:
        if phase.layer not in entered:
            entered.add(phase.layer)
            marks.enter(phase)

    for value in made:
        if first_seen(value, entered) and value.requires_grad:
            value.register_hook(enter)


def _summary(storages: Sequence[Storage], rising: dict[Phase, int], num_layers: int) -> StepMemory:
    def peaks(microbatch: int, direction: Pass) -> tuple[int, ...]:
        return tuple(rising.get(Phase(microbatch, direction, layer), 0) for layer in range(num_layers))

    kept: Counter[tuple[int, int, Pass, int]] = Counter()
    gradients: Counter[tuple[int, int]] = Counter()
    for storage in storages:
        born, freed = storage.born, storage.freed
        if born is None or freed is None or born.microbatch != 1:
            continue
        if freed == born and storage.last_reader <= born.layer:
            continue
        if born.direction == "forward":
            kept[born.layer, storage.last_reader, freed.direction, freed.layer] += storage.num_bytes
        else:
            gradients[born.layer, freed.layer] += storage.num_bytes
    return StepMemory(
        peaks(1, "forward"),
        peaks(1, "backward"),
        peaks(0, "backward"),
        tuple(Lifetime(a, b, direction, d, n) for (a, b, direction, d), n in sorted(kept.items())),
        tuple(GradientLifetime(a, b, n) for (a, b), n in sorted(gradients.items())),
    )


def layer_memory(
    pieces: Pieces, step: StepMemory, optimizer: Sequence[OptimizerMemory], tied: Sequence[str]
) -> tuple[LayerMemory, ...]:
    """The memory of every layer; parameters in `tied` are left to the tied groups."""
    saved = Counter[int]()
    for lifetime in step.lifetimes:
        if lifetime.freed_in == "backward":
            saved[lifetime.made] += lifetime.num_bytes
    layers = []
    for index, piece in enumerate(pieces.pieces):
        own = dict(piece.module.named_parameters())
        trainable = [p for name, p in own.items() if name not in tied and p.requires_grad]
        layers.append(
            LayerMemory(
                forward_peak_bytes=step.forward_peak_bytes[index],
                saved_bytes=saved[index],
                backward_peak_bytes=step.backward_peak_bytes[index],
                backward_first_peak_bytes=step.backward_first_peak_bytes[index],
                trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
                buffer_bytes=_buffer_bytes(piece),
                optimizer_state_bytes=optimizer[index].state_bytes,
                optimizer_temporary_bytes=optimizer[index].temporary_bytes,
            )
        )
    return tuple(layers)


def _buffer_bytes(piece: Piece) -> int:
    """Bytes of what a layer reads and does not train: buffers, and constants that forward names."""
    names = {str(node.target) for node in piece.module.graph.nodes if node.op == "get_attr"}
    values = [attribute(piece.module, name) for name in names]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
