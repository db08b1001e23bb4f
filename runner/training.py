"""One rank of a training run: schedule, tied gradients, optimizer, data by the seed rule, loss."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from planner.errors import ModelFileError, RunError
from planner.files.plan_file import Plan
from planner.machine.device import Device
from planner.profiling.torch_schedule import schedule_class
from planner.tracing.loading import ModelSource, checked_batch, make_batch, on_device, rows, seed_everything
from planner.tracing.precision import autocast
from planner.tracing.tied_gradients import sum_tied_gradients
from planner.tracing.user_functions import defined_at
from runner.exact_ties import ExactTies
from runner.measuring import PeakMemory, StageRecorder, StepSamples, highest, measure_peak_memory, resting_bytes
from runner.stages import BuiltStage


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step on this rank. `loss` is None except on the last stage's rank; the norm is of this stage's gradients."""

    step: int
    loss: float | None
    squared_norm: float
    learning_rate: float
    wall_ms: float
    samples: StepSamples | None
    memory: PeakMemory | None


class Trainer:
    """Trains one stage of a plan, step by step."""

    def __init__(
        self, plan: Plan, source: ModelSource, built: BuiltStage, device: Device, *, exact_ties: bool = False
    ) -> None:
        mean = source.loss_reduction == "mean"
        self.ties = ExactTies(built, plan.num_microbatches, mean) if exact_ties else None
        self.plan, self.source, self.built, self.device = plan, source, built, device
        self.stage = built.stage
        self.recorder = StageRecorder(self.stage, device)
        self.recorder.attach()
        self.targets: list[Any] = []
        self.batch_bytes = 0
        self.losses: list[torch.Tensor] = []
        self.parameters = [p for p in self.stage.submod.parameters() if p.requires_grad]
        self.optimizer = source.make_optimizer(self.parameters) if self.parameters else None
        self.schedule = schedule_class(plan.schedule)(
            self.stage,
            plan.num_microbatches,
            loss_fn=self.recorder.timed_loss(self._loss),
            scale_grads=mean,
        )

    def _loss(self, output: Any, microbatch: torch.Tensor) -> torch.Tensor:
        """The user's loss on the targets of a microbatch, given by its number."""
        with autocast(self.plan.precision, self.device.torch_device.type):
            return self.source.loss_fn(self.built.rebuild_output(output), self.targets[int(microbatch)])

    def step(
        self,
        number: int,
        batch: tuple[Any, Any],
        after_backward: Callable[[], None] | None = None,
        watch: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> StepResult:
        """One training step on `batch`; `after_backward` is called before the optimizer steps, gradients complete.

        `watch` runs the two parts of the step that it is given, schedule and optimizer.
        """
        inputs = self._take_batch(batch, f"step {number}")
        dist.barrier()
        wall = time.perf_counter()
        watch(lambda: self._run_schedule(inputs))
        self._sum_tied_gradients()
        norm, backward_wall = self._squared_norm(), time.perf_counter() - wall
        if after_backward is not None:
            with self.recorder.span("comparison with the unsplit model"):
                after_backward()
        wall, before = time.perf_counter(), self.device.stamp()
        if self.optimizer is not None:
            watch(self._optimizer_step)
        optimizer = (before, self.device.stamp())
        return self._result(number, norm, optimizer, (backward_wall + time.perf_counter() - wall) * 1e3)

    def _take_batch(self, batch: tuple[Any, Any], where: str = "a rehearsed step") -> list[torch.Tensor]:
        """Make ready for a step on `batch`, without gradients; what the schedule takes of it, on the device."""
        self.losses = []
        inputs = self.built.inputs.tensors(batch[0], where)
        inputs, targets = self._own_share(inputs, batch[1])
        size = self.plan.microbatch_size
        self.targets = [rows(targets, start, start + size) for start in range(0, self.plan.batch_size, size)]
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        return inputs

    def _result(self, number: int, norm: float, optimizer: tuple[Any, Any], wall_ms: float) -> StepResult:
        """What a finished step left behind. Raises RunError where its loss is not finite."""
        samples = self.recorder.take(number, optimizer, wall_ms)
        loss = self.batch_loss()
        if loss is not None and not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {number}",
                "training goes on only with a finite loss",
                "lower the learning rate in make_optimizer, or look at the batch of this step",
            )
        rate = self.optimizer.param_groups[0]["lr"] if self.optimizer is not None else 0.0
        return StepResult(number, loss, norm, float(rate), samples.step_wall_ms, samples, None)

    def _own_share(self, inputs: list[torch.Tensor], targets: Any) -> tuple[list[torch.Tensor], Any]:
        """What this stage reads of a batch, on its device: a copy of the inputs on the first, targets on the last.

        A copy, because with `split_spec` a model may write to its inputs, and the batch is still needed.
        """
        device = self.device.torch_device
        own = [tensor.to(device, copy=True) for tensor in inputs] if self.stage.is_first else []
        read = on_device(targets, device) if self.stage.is_last else None
        tensors = [leaf for leaf in tree_leaves((own, read)) if isinstance(leaf, torch.Tensor)]
        self.batch_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return own, read

    def measured_step(
        self, number: int, batch: tuple[Any, Any], after_backward: Callable[[], None] | None
    ) -> StepResult:
        """A step whose peak memory is measured instead of its times: the instrument would distort them."""
        peaks: list[PeakMemory] = []
        result = self.step(number, batch, after_backward, self._memory_watch(peaks))
        return replace(result, samples=None, memory=highest(peaks))

    def _memory_watch(self, peaks: list[PeakMemory]) -> Callable[[Callable[[], None]], None]:
        """Runs a part of a step and appends its peak memory to `peaks`."""

        def watch(work: Callable[[], None]) -> None:
            resting = resting_bytes(self.stage, self.optimizer) + self.batch_bytes
            peaks.append(measure_peak_memory(self.device, resting, work))

        return watch

    def _sum_tied_gradients(self) -> None:
        if not self.built.tied:
            return
        with self.recorder.span("tied gradients"):
            if self.ties is not None:
                self.ties.restore()
            sum_tied_gradients(self.built.tied, self.stage)
            if self.ties is not None:
                self.ties.replace()

    def _optimizer_step(self) -> None:
        assert self.optimizer is not None
        with self.recorder.span("optimizer"):
            self.optimizer.step()

    def _run_schedule(self, inputs: list[torch.Tensor]) -> None:
        keywords: dict[str, Any] = {}
        if self.stage.is_last:
            keywords = {"target": torch.arange(self.plan.num_microbatches), "losses": self.losses}
        self.schedule.step(*inputs, **keywords, return_outputs=False)

    def _squared_norm(self) -> float:
        """Σ g² of this stage; a tied parameter counts on its first holder only."""
        elsewhere = {t.name for t in self.built.tied if self.stage.stage_index in t.stages[1:]}
        total = 0.0
        for name, parameter in self.stage.submod.named_parameters():
            if parameter.grad is not None and name not in elsewhere:
                total += float(torch.linalg.vector_norm(parameter.grad.detach())) ** 2
        return total

    def batch_loss(self) -> float | None:
        """The loss of the step's batch on the last stage's rank; None elsewhere."""
        if not self.losses:
            return None
        values = torch.stack([loss.detach().reshape(()) for loss in self.losses])
        return float(values.mean() if self.source.loss_reduction == "mean" else values.sum())


def training_batches(
    plan: Plan, source: ModelSource, say: Callable[[str], None]
) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """Endless (step, batch): the user's `batches` where there are any, else `make_batch` by the seed rule.

    A batch that does not have the plan's size is dropped, and that is said once per epoch.
    """
    step = 0
    if source.batches is None:
        while True:
            yield step, make_batch(source, plan.seed, step, plan.batch_size)
            step += 1
    while True:
        seed_everything(plan.seed + 1 + step)
        before = step
        for batch in source.batches(plan.batch_size):
            checked = checked_batch(source, batch, None)
            found = next(leaf.shape[0] for leaf in tree_leaves(checked) if isinstance(leaf, torch.Tensor))
            if found != plan.batch_size:
                say(f"dropped a batch of {found} samples: the plan divides {plan.batch_size} into microbatches")
                continue
            yield step, checked
            step += 1
        if step == before:
            raise ModelFileError(
                f"{source.file.name}: batches({plan.batch_size}) gave no batch of {plan.batch_size} samples",
                "every epoch has at least one full batch, and batches starts a new epoch every time it is called",
                "give more data or plan with a smaller --batch-size",
                defined_at(source.batches, source.file),
            )


def refuse_different_batches(batch: tuple[Any, Any], seed: int) -> None:
    """All ranks must draw the same batch. Raises ModelFileError on every rank where one differs."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(batch):
        data = (
            leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if _sized(leaf)
            else repr(leaf).encode()
        )
        digest.update(data)
    own = digest.hexdigest()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if len(set(found)) > 1:
        raise ModelFileError(
            f"ranks drew different batches for the same seed {seed}",
            "make_batch draws only from torch, numpy and random, which are seeded alike on every rank",
            "take time, file order and other sources of chance out of make_batch",
        )


def _sized(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.numel() > 0 and leaf.dim() > 0
