"""`run-plan PLAN --rehearse`: the stages of a plan one after the other on one device, and the step simulated from them.

A step goes through the stages twice. First forward without autograd, up to the last stage but one, so that every stage
has its inputs; then from the last stage to the first, each running its own schedule (its warm-up, its forwards and
backwards in their order) on the inputs kept and the gradients that the stage after it has just left. So a stage holds
what its rank would hold (its parameters, its receive buffers, its saved activations) and no other stage's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.pipelining import ScheduleGPipe

from planner.files.measurement_file import CheckResult
from planner.files.plan_file import Plan, TiedParameter
from planner.machine.device import Device
from planner.tracing.loading import ModelSource
from runner.checking import Reference
from runner.exact_ties import exact_sum
from runner.loopback import Boundaries, SentMessages
from runner.measuring import PeakMemory, highest
from runner.parking import Parking
from runner.stages import BuiltStage, build_stages
from runner.training import StepResult, Trainer, training_batches
from runner.weights import model_state, stage_gradients, stage_state, write_weights
from runner.worker import MEMORY_STEP, open_weights
from runner.writing import write_run

if TYPE_CHECKING:
    from runner.worker import RunContext


class RehearsedStage(Trainer):
    """One stage, trained without its neighbours. It is on the device only while it works."""

    def __init__(
        self,
        plan: Plan,
        source: ModelSource,
        built: BuiltStage,
        device: Device,
        boundaries: Boundaries,
        *,
        exact_ties: bool = False,
    ) -> None:
        super().__init__(plan, source, built, device, exact_ties=exact_ties)
        self.sent = SentMessages(self.stage, plan.num_microbatches, plan.schedule or "gpipe")
        boundaries.connect(self.stage, self.sent)
        self.filling = ScheduleGPipe(self.stage, plan.num_microbatches, scale_grads=False)
        self.parking = Parking(device.torch_device, self.stage.submod, self.optimizer, self.stage)
        self.parking.leave()
        self.wall_ms = 0.0
        self.peaks: list[PeakMemory] = []

    def fill(self, batch: tuple[Any, Any]) -> None:
        """Forward of all microbatches without autograd: the next stage's inputs are kept, nothing else changes."""
        with self._on_device():
            arguments = self._take_batch(batch)
            buffers = [(buffer, buffer.clone()) for buffer in self.stage.submod.buffers()]
            with torch.no_grad():
                self.filling.step(*arguments, return_outputs=False)
                for buffer, before in buffers:
                    buffer.copy_(before)
            self.stage.clear_runtime_states()
            self.sent.held.clear()
            self.recorder.events.clear()

    def run(self, batch: tuple[Any, Any], *, memory: bool) -> None:
        """All forwards and backwards in the order of the schedule; with `memory`, its peak is measured."""
        with self._on_device():
            self.peaks.clear()
            inputs = self._take_batch(batch)
            wall = time.perf_counter()
            self._watch(memory)(lambda: self._run_schedule(inputs))
            self.wall_ms = (time.perf_counter() - wall) * 1e3
            self._drop_what_the_next_step_would()

    def _drop_what_the_next_step_would(self) -> None:
        """Whatever a rank holds on to until its next step: here the next stage comes first, and has the device."""
        self.sent.held.clear()
        self.targets, self.losses = [], [loss.detach().cpu() for loss in self.losses]
        if self.ties is not None:
            self.ties.leave_device()

    def finish(self, number: int, *, memory: bool) -> StepResult:
        """Let the optimizer step. In a step whose memory is measured nothing is timed."""
        with self._on_device():
            norm = self._squared_norm()
            wall, before = time.perf_counter(), self.device.stamp()
            if self.optimizer is not None:
                self._watch(memory)(self._optimizer_step)
            optimizer = (before, self.device.stamp())
            self.wall_ms += (time.perf_counter() - wall) * 1e3
            result = self._result(number, norm, optimizer, self.wall_ms)
        return replace(result, samples=None, memory=highest(self.peaks)) if memory else result

    def _watch(self, memory: bool) -> Callable[[Callable[[], None]], None]:
        return self._memory_watch(self.peaks) if memory else lambda work: work()

    def _on_device(self) -> _Working:
        return _Working(self)


class _Working:
    """A stage at work: on the device, its random numbers drawn from where every stage of the step begins."""

    def __init__(self, stage: RehearsedStage) -> None:
        self.stage = stage
        device = stage.device.torch_device
        self.randomness = torch.random.fork_rng([device] if device.type != "cpu" else [])

    def __enter__(self) -> None:
        self.stage.parking.enter()
        self.randomness.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.randomness.__exit__(*error)
        self.stage.parking.leave()


def rehearse(context: RunContext) -> None:
    """Rehearse a plan and report; the last line on stdout names what was written."""
    from runner.progress import step_progress

    options, plan = context.options, context.plan
    stages = _build(context)
    reference = _SelfParkingReference(context, stages) if options.check else None
    results: list[list[StepResult]] = []
    with step_progress(options.steps, context.rank) as report:
        batches = training_batches(plan, context.source, report.say)
        for _ in range(options.steps):
            number, batch = next(batches)
            compare = None if reference is None else reference.comparison(number, batch)
            results.append(rehearse_step(stages, number, batch, compare))
            report.step(number, results[-1][-1].loss)
    if options.export_weights is not None:
        write_weights(options.export_weights, _weights(stages))
    check = None if reference is None else reference.finish()
    start = max((stage.built.start for stage in stages), key=lambda one: one.total_s)
    write_run(context, list(zip(*results, strict=True)), check, None, start)


def _build(context: RunContext) -> list[RehearsedStage]:
    options, plan, boundaries = context.options, context.plan, Boundaries()
    exact = options.check or options.export_weights is not None
    built = build_stages(
        plan,
        context.source,
        range(plan.num_stages),
        context.device,
        without_dropout=options.check,
        stock=options.stock,
        meta=options.meta,
        weights=open_weights(options),
    )
    return [
        RehearsedStage(plan, context.source, stage, context.device, boundaries, exact_ties=exact) for stage in built
    ]


def rehearse_step(
    stages: Sequence[RehearsedStage],
    number: int,
    batch: tuple[Any, Any],
    after_backward: Callable[[], None] | None = None,
) -> list[StepResult]:
    """One step of all stages; the results are in their order. `after_backward` sees complete gradients."""
    memory = number == MEMORY_STEP
    for stage in stages[:-1]:
        stage.fill(batch)
    for stage in reversed(stages):
        stage.run(batch, memory=memory)
    for entry in stages[0].built.tied:
        sum_over_holders(entry, [stages[index] for index in entry.stages])
    if after_backward is not None:
        after_backward()
    results = [stage.finish(number, memory=memory) for stage in stages]
    wall_ms = sum(result.wall_ms for result in results)
    return [
        replace(r, wall_ms=wall_ms, samples=r.samples and replace(r.samples, step_wall_ms=wall_ms)) for r in results
    ]


def sum_over_holders(entry: TiedParameter, holders: Sequence[RehearsedStage]) -> None:
    """Give all stages that hold a tied parameter the sum of their gradients, in the order of the stages.

    Where a comparison follows, the sum is the one of the unsplit model to the last bit (see `runner.exact_ties`).
    """
    parameters = [dict(holder.stage.submod.named_parameters())[entry.name] for holder in holders]
    ties = [holder.ties for holder in holders if holder.ties is not None]
    if ties:
        total = exact_sum([torch.stack(tie.parts[entry.name]) for tie in ties])
        if ties[0].mean:
            total.div_(ties[0].num_microbatches)
        for tie in ties:
            tie.parts[entry.name].clear()
    else:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = gradients[0].clone()
        for gradient in gradients[1:]:
            total += gradient
    for parameter in parameters:
        parameter.grad = total.to(parameter.device, copy=True)


def _weights(stages: Sequence[RehearsedStage]) -> dict[str, torch.Tensor]:
    gathered: dict[str, torch.Tensor] = {}
    for stage in reversed(stages):
        gathered.update({name: tensor.detach().cpu() for name, tensor in stage_state(stage.built).items()})
    return model_state(stages[0].built, gathered)


class _SelfParkingReference:
    """The unsplit model, trained on the same batches, on the device only while it works."""

    def __init__(self, context: RunContext, stages: Sequence[RehearsedStage]) -> None:
        self.stages = stages
        self.reference = Reference(context.plan, context.source, context.device)
        self.parking = Parking(context.device.torch_device, self.reference.model, self.reference.optimizer)
        self.reference.compare_parameters(_weights(stages), -1)
        self.parking.leave()

    def comparison(self, number: int, batch: tuple[Any, Any]) -> Callable[[], None]:
        """What compares the gradients of step `number`, and lets the reference's optimizer step."""

        def compare() -> None:
            self.parking.enter()
            gradients: dict[str, torch.Tensor] = {}
            for stage in reversed(self.stages):
                gradients.update(stage_gradients(stage.built))
            loss = self.stages[-1].batch_loss() or 0.0
            self.reference.compare_gradients(number, loss, self.reference.backward(batch), gradients)
            self.parking.leave()

        return compare

    def finish(self) -> CheckResult:
        """Compare the weights. Raises CheckError where something differed."""
        self.reference.compare_parameters(_weights(self.stages), self.reference.steps)
        return self.reference.result(self.stages[0].built.num_dropouts_removed > 0)
