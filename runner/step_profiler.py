"""Torch's profiler over the last steps of a run, on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from planner.errors import RunError
from planner.machine.memory_events import without_profilers_lines
from runner.tensorboard_run import NUM_ACTIVE, NUM_WARM_UP, profiled_steps
from runner.training import StepResult, Trainer


class StepProfiler:
    """Profiles the last steps that a trainer takes, and writes one trace: a context over all steps of the run.

    `end_step` is to be called after every step, so that the steps of the trace bear the numbers of the training's.
    """

    def __init__(self, trainer: Trainer, num_steps: int, file: Path) -> None:
        self.steps = profiled_steps(num_steps)
        self._trainer, self._file = trainer, file
        self._partial = file.with_name(f".{file.name}.partial")
        self._quiet = contextlib.ExitStack()
        activities = [ProfilerActivity.CPU]
        if trainer.device.clock == "cuda-event":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=self.steps[0], warmup=NUM_WARM_UP, active=NUM_ACTIVE, repeat=1),
            on_trace_ready=self._export,
            record_shapes=True,
            profile_memory=True,
        )

    def __enter__(self) -> StepProfiler:
        self._profile.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._quiet.close()
        if kind is None:
            self._profile.stop()
            self._publish()

    def step(self, number: int, batch: tuple[Any, Any], after_backward: Callable[[], None] | None) -> StepResult:
        """A step with its parts named in the trace. Its times are dropped: the profiler lengthens them.

        The ranks meet at its end in a sum of one number. The plugin compares workers by their collectives, of which a
        pipeline has none; the wait in this one is how long a stage is done before the slowest.
        """
        recorder = self._trainer.recorder
        recorder.spans = True
        result = self._trainer.step(number, batch, after_backward)
        with recorder.span("wait for the slowest"):
            dist.all_reduce(torch.zeros(1, device=self._trainer.device.torch_device))
        recorder.spans = False
        return replace(result, samples=None)

    def end_step(self, number: int) -> None:
        """Step `number` is over. The end of the one before the first profiled step starts the profiler's warm-up."""
        if number + 1 == self.steps[0]:
            self._quiet.enter_context(without_profilers_lines())
        self._profile.step()

    def _export(self, finished: profile) -> None:
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._partial))

    def _publish(self) -> None:
        """Name the traces, on all ranks at once: the plugin reads a folder one time, as soon as it sees a trace."""
        dist.barrier()
        try:
            self._partial.replace(self._file)
        except OSError as error:
            raise RunError(
                f"the profiler's trace is not there as {self._file}: {error.strerror}",
                "the folder must stay writable and the disk must not be full",
                "free space or give another folder to --tensorboard",
            ) from None
