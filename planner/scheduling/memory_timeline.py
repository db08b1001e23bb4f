"""Live bytes of a stage over a step: the tasks of its schedule replayed, each with what it keeps and how far it rises.

    at rest      parameters, gradients (from the first backward on), optimizer state, torch's receive buffers, the batch
    forward      rises, then leaves what its backward needs
    backward     rises, frees that, and leaves the gradient that it sends until the send is waited for
    optimizer    needs its temporaries, when nothing of a microbatch is alive any more

torch makes the receive buffers of all microbatches once, for activations and for their gradients, and keeps them. GPipe
holds on to everything that it sends, in both directions, until the step ends; 1F1B to what it sent last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.files.plan_file import StageMemory
from planner.scheduling.simulation import Kind, task_order


@dataclass(frozen=True, slots=True)
class StageBytes:
    """What a stage needs, in bytes; `…_rise_bytes` are above what is alive of other microbatches.

    `boundary_bytes` stay for the whole step: receive buffers of all microbatches, and the batch on the stages that read
    it. `saved_bytes` lie between a microbatch's forward and its backward; `output_bytes` are those of them that torch
    holds on to while the last stage computes the next forward.
    """

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    optimizer_temporary_bytes: int
    boundary_bytes: int
    saved_bytes: int
    output_bytes: int
    forward_rise_bytes: int
    backward_first_rise_bytes: int
    backward_rise_bytes: int
    sent_gradient_bytes: int
    sent_activation_bytes: int
    reserved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """A task of a stage: the bytes that were alive when it rose highest, by part."""

    kind: Kind
    microbatch: int
    memory: StageMemory

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return total_bytes(self.memory)


def total_bytes(memory: StageMemory) -> int:
    """The sum of the parts.

    >>> total_bytes(StageMemory(1, 2, 3, 4, 5, 6))
    21
    """
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.saved, memory.working, memory.reserved)
    return sum(parts)


def memory_timeline(
    stage: StageBytes, index: int, num_stages: int, num_microbatches: int, schedule: str = "gpipe"
) -> tuple[MemoryPoint, ...]:
    """The tasks of stage `index` in the order in which its rank runs them, the optimizer last."""
    return tuple(_replay(stage, index, num_stages, num_microbatches, schedule))


def peak_memory(
    stage: StageBytes, index: int, num_stages: int, num_microbatches: int, schedule: str = "gpipe"
) -> MemoryPoint:
    """The task of stage `index` that needs most memory.

    >>> stage = StageBytes(10, 10, 20, 1, 0, 5, 0, 6, 7, 7, 0, 0)
    >>> peak_memory(stage, 0, 2, 4).peak_bytes, peak_memory(stage, 0, 2, 4, "1f1b").peak_bytes
    (57, 52)
    """
    return max(_replay(stage, index, num_stages, num_microbatches, schedule), key=lambda point: point.peak_bytes)


def _replay(
    stage: StageBytes, index: int, num_stages: int, num_microbatches: int, schedule: str
) -> Iterator[MemoryPoint]:
    in_flight = done = 0
    for kind, microbatch in task_order(schedule, index, num_stages, num_microbatches):
        kept = done if schedule == "gpipe" else min(done, 1)
        sent = kept * (stage.sent_gradient_bytes + stage.sent_activation_bytes)
        others = (in_flight if kind == "forward" else in_flight - 1) * stage.saved_bytes
        lingering = stage.output_bytes if kind == "forward" and done else 0
        gradients = stage.gradient_bytes if done else 0
        if kind == "forward":
            rise = stage.forward_rise_bytes
            in_flight += 1
        else:
            rise = stage.backward_rise_bytes if done else stage.backward_first_rise_bytes
            in_flight -= 1
            done += 1
        yield _point(stage, kind, microbatch, gradients, others + sent + lingering, rise)
    yield _point(stage, "optimizer", -1, stage.gradient_bytes, 0, stage.optimizer_temporary_bytes)


def _point(stage: StageBytes, kind: Kind, microbatch: int, gradients: int, others: int, rise: int) -> MemoryPoint:
    own = min(rise, stage.saved_bytes) if kind == "backward" else 0
    memory = StageMemory(
        parameters=stage.parameter_bytes,
        gradients=gradients,
        optimizer=stage.optimizer_bytes,
        saved=stage.boundary_bytes + others + own,
        working=rise - own,
        reserved=stage.reserved_bytes,
    )
    return MemoryPoint(kind, microbatch, memory)
