"""What a followed step showed of its layers' memory: peaks, and what outlives its layer."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from planner.files.profile_file import GradientLifetime, LayerMemory, Lifetime
from planner.machine.phase_bytes import in_blocks
from planner.profiling.live_storages import LiveStorages, Pass, Phase
from planner.profiling.optimizer_memory import OptimizerMemory
from planner.tracing.exporting import Trace
from planner.tracing.gradients import attribute
from planner.tracing.pieces import Piece, Pieces


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What one step showed: peaks by layer for the first and for later microbatches, and what outlives its layer.

    The peaks are those of `LayerMemory`. `scattered` are the values whose gradient did not lie as in a receive buffer
    and whose layer, as far as is known, copies one that does. `views` are those whose gradient is known to go back as a
    view of the buffer in which it came. `fragmentation_bytes` are those of `SizeMemory`.
    """

    forward_peak_bytes: tuple[int, ...]
    backward_peaks_bytes: tuple[tuple[int, ...], ...]
    backward_first_peaks_bytes: tuple[tuple[int, ...], ...]
    lifetimes: tuple[Lifetime, ...]
    gradients: tuple[GradientLifetime, ...]
    scattered: frozenset[str] = frozenset()
    views: frozenset[str] = frozenset()
    fragmentation_bytes: int = 0


def summarise_step(live: LiveStorages, peaks: Mapping[Phase, list[int]], num_layers: int) -> StepMemory:
    """What a step of two microbatches showed; `peaks` are by phase, those of `PhaseBytes`."""
    backwards = [
        _HigherPeaks(*(peaks.get(Phase(microbatch, "backward", layer), [0]) for microbatch in (1, 0)))
        for layer in range(num_layers)
    ]
    kept: Counter[tuple[int, int, Pass, int, int]] = Counter()
    gradients: Counter[GradientLifetime] = Counter()
    for storage in live.storages:
        born, freed = storage.born, storage.freed
        if born is None or freed is None or born.microbatch != 1:
            continue
        if freed == born and storage.last_reader <= born.layer:
            continue
        after = backwards[freed.layer].peak_before(storage.freed_after) if freed.direction == "backward" else 0
        if born.direction == "forward":
            kept[born.layer, storage.last_reader, freed.direction, freed.layer, after] += storage.num_bytes
        else:
            given = tuple(sorted(storage.gradient_of.items()))
            reads = tuple(sorted((layer, sum(n for _, n in parts)) for layer, parts in storage.reads.items()))
            gradients[GradientLifetime(born.layer, freed.layer, 0, after, given, reads)] += storage.num_bytes
    return StepMemory(
        forward_peak_bytes=tuple(max(peaks.get(Phase(1, "forward", layer), [0])) for layer in range(num_layers)),
        backward_peaks_bytes=tuple(tuple(found.later) for found in backwards),
        backward_first_peaks_bytes=tuple(tuple(found.first) for found in backwards),
        lifetimes=tuple(Lifetime(a, b, direction, d, n, t) for (a, b, direction, d, t), n in sorted(kept.items())),
        gradients=tuple(replace(life, num_bytes=n) for life, n in sorted(gradients.items(), key=_made_first)),
        scattered=frozenset(live.scattered),
    )


def _made_first(gradient: tuple[GradientLifetime, int]) -> tuple[int, int, int]:
    life, num_bytes = gradient
    return life.made, life.freed, num_bytes


class _HigherPeaks:
    """Peaks of one backward of a later and of the first microbatch, those left out that no earlier one is below.

    Where the two did not free the same number of storages, each of the first's counts as high as its highest.
    """

    def __init__(self, later: Sequence[int], first: Sequence[int]) -> None:
        if len(first) != len(later):
            first = [max(first)] * len(later)
        self.later, self.first, self.kept = [later[0]], [first[0]], [0]
        for number, pair in enumerate(zip(later, first, strict=True)):
            if pair[0] > max(self.later) or pair[1] > max(self.first):
                self.later.append(pair[0])
                self.first.append(pair[1])
                self.kept.append(number)

    def peak_before(self, freed_after: int) -> int:
        """The number of the last peak that is left, up to the one before a freeing."""
        return bisect_right(self.kept, freed_after) - 1


def layer_memory(
    pieces: Pieces,
    step: StepMemory,
    optimizer: Sequence[OptimizerMemory],
    tied: Sequence[str],
    block_bytes: int = 1,
) -> tuple[LayerMemory, ...]:
    """The memory of every layer; parameters in `tied` are left to the tied groups.

    Gradients and buffers count as the blocks of `block_bytes` that hold them, and so does, among the buffers, what
    parameters leave empty of theirs.
    """
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
                backward_peaks_bytes=step.backward_peaks_bytes[index],
                backward_first_peaks_bytes=step.backward_first_peaks_bytes[index],
                trainable_bytes=sum(in_blocks(p.nbytes, block_bytes) for p in trainable),
                buffer_bytes=_buffer_bytes(piece, block_bytes)
                + sum(in_blocks(p.nbytes, block_bytes) - p.nbytes for name, p in own.items() if name not in tied),
                optimizer_state_bytes=optimizer[index].state_bytes,
                optimizer_temporary_bytes=optimizer[index].temporary_bytes,
                optimizer_left_bytes=optimizer[index].left_bytes,
                optimizer_left_by=group_name(pieces.trace, optimizer[index].left_by),
            )
        )
    return tuple(layers)


def group_name(trace: Trace, number: int) -> str:
    """The layer of a group of parameters: all layers in order, then the tied ones, each its first layer's."""
    firsts = [*range(len(trace.layers)), *(layers[0] for layers in trace.tied.values())]
    return trace.layers[firsts[number]].id if number >= 0 else ""


def _buffer_bytes(piece: Piece, block_bytes: int) -> int:
    """Bytes of what a layer reads and does not train: buffers, and constants that forward names."""
    names = {str(node.target) for node in piece.module.graph.nodes if node.op == "get_attr"}
    values = [attribute(piece.module, name) for name in names]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter)]
    return sum(in_blocks(tensor.untyped_storage().nbytes(), block_bytes) for tensor in tensors)
