"""What every rank measures: forward, backward and waiting per microbatch, optimizer and peak memory per step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from planner.machine.device import Device
from planner.machine.memory_events import memory_events, peak_of_events


@dataclass(frozen=True, slots=True)
class StepSamples:
    """One step on one rank: milliseconds per microbatch on the device's clock, and wall times of the step."""

    step: int
    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    optimizer_ms: float
    busy_wall_ms: float
    step_wall_ms: float


@dataclass(slots=True)
class _Event:
    kind: str
    microbatch: int
    start: Any
    end: Any
    wall_ms: float


@dataclass(slots=True)
class StageRecorder:
    """Wraps the methods of torch's stage that compute, without changing torch; the loss counts as forward.

    While `spans` is true, what is recorded is also named for torch's profiler: `stage 1 forward mb 0`.
    """

    stage: Any
    device: Device
    events: list[_Event] = field(default_factory=list)
    current: int = 0
    spans: bool = False

    def attach(self) -> None:
        """Start recording on this stage."""
        self.stage.forward_one_chunk = self._timed("forward", self.stage.forward_one_chunk)
        self.stage.backward_one_chunk = self._timed("backward", self.stage.backward_one_chunk)

    def _timed(self, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            self.current = microbatch
            with self.span(f"{kind} mb {microbatch}"):
                return self._record(kind, microbatch, lambda: method(microbatch, *args, **kwargs))

        return timed

    def timed_loss(self, loss_fn: Callable[[Any, Any], torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
        """`loss_fn`, with its time added to the forward of the microbatch that was computed last."""

        def timed(output: Any, target: Any) -> Any:
            with self.span(f"loss mb {self.current}"):
                return self._record("forward", self.current, lambda: loss_fn(output, target))

        return timed

    def span(self, what: str) -> contextlib.AbstractContextManager[Any]:
        """A range of the profiler's trace that says what this stage does; nothing while nobody profiles."""
        if not self.spans:
            return contextlib.nullcontext()
        return torch.profiler.record_function(f"stage {self.stage.stage_index} {what}")

    def _record(self, kind: str, microbatch: int, work: Callable[[], Any]) -> Any:
        wall, start = time.perf_counter(), self.device.stamp()
        result = work()
        end = self.device.stamp()
        self.events.append(_Event(kind, microbatch, start, end, (time.perf_counter() - wall) * 1e3))
        return result

    def take(self, step: int, optimizer: tuple[Any, Any], step_wall_ms: float) -> StepSamples:
        """The samples since the last call; waits for the device."""
        times: dict[str, dict[int, float]] = {"forward": {}, "backward": {}}
        for event in self.events:
            by_microbatch = times[event.kind]
            elapsed = self.device.elapsed_ms([event.start, event.end])[0]
            by_microbatch[event.microbatch] = by_microbatch.get(event.microbatch, 0.0) + elapsed
        busy = sum(event.wall_ms for event in self.events)
        self.events.clear()
        return StepSamples(
            step,
            tuple(times["forward"][i] for i in sorted(times["forward"])),
            tuple(times["backward"][i] for i in sorted(times["backward"])),
            self.device.elapsed_ms(list(optimizer))[0],
            busy,
            step_wall_ms,
        )


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """What the allocator gave out at most; what was gone of the GPU then, None on a CPU."""

    allocated_bytes: int
    device_bytes: int | None = None


def measure_peak_memory(device: Device, resting_bytes: int, work: Callable[[], None]) -> PeakMemory:
    """Peak bytes while `work` runs. On CUDA the allocator's own; on a CPU the profiler's memory events.

    The events say what was allocated and freed since the start, so the bytes at rest before it are added. On CUDA the
    allocator first gives back what it keeps, so that it has taken no more than this work needs.
    """
    if device.clock == "thread-cpu":
        return PeakMemory(resting_bytes + peak_of_events(memory_events(work)))
    device.empty_cache()
    device.reset_peak_memory()
    work()
    return PeakMemory(device.peak_memory_bytes() or 0, (device.taken_bytes() or 0) + device.context_bytes())


def highest(peaks: Sequence[PeakMemory]) -> PeakMemory:
    """The highest of each.

    >>> highest([PeakMemory(5, 9), PeakMemory(7, 8)])
    PeakMemory(allocated_bytes=7, device_bytes=9)
    """
    taken = [peak.device_bytes for peak in peaks if peak.device_bytes is not None]
    return PeakMemory(max(peak.allocated_bytes for peak in peaks), max(taken, default=None))


def resting_bytes(stage: Any, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of a stage between steps: parameters, buffers, gradients, optimizer state, torch's receive buffers."""
    tensors = [*stage.submod.parameters(), *stage.submod.buffers()]
    tensors += [p.grad for p in stage.submod.parameters() if p.grad is not None]
    if optimizer is not None:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    for infos in [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]:
        tensors += [info.buffer for info in infos if getattr(info, "buffer", None) is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
