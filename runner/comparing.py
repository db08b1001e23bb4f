"""Plan + Measurement → BalanceReport: what was predicted beside what was measured, and what follows from it.

An error has two forms. The raw one is measured ÷ predicted − 1. The scaled one first takes off the one factor by which
all stages together ran slower or faster (`Measurement.scale`), so it is the error of a stage's share of the work: it
tells whether the cuts are right, which is what a plan is for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from planner.errors import FileError
from planner.files.measurement_file import (
    CheckResult,
    Measurement,
    SpeedUp,
    StageFigures,
    StageMeasurement,
    StartTimes,
    StepRecord,
    StepTimes,
)
from planner.files.plan_file import Plan, Stage
from planner.rendering import balance, baseline_label, clean, mean_bubble, model_title, same_cuts
from planner.scheduling.simulation import SimulatedStep, StageTimes, Task, critical_path, simulate
from runner.verdict import Verdict, find_verdict


@dataclass(frozen=True, slots=True)
class ComparedTime:
    """A time per microbatch in ms, predicted and measured; errors are fractions, None where nothing was predicted.

    `interval_ms` is half the prediction's 90 % interval, None where the plan has none.
    """

    predicted_ms: float
    measured_ms: float
    predicted_spread_ms: float
    measured_spread_ms: float
    error: float | None
    raw_error: float | None
    interval_ms: float | None = None

    @property
    def inside(self) -> bool | None:
        """Whether the measured median lies in the prediction's 90 % interval; no scale is taken off."""
        return None if self.interval_ms is None else abs(self.measured_ms - self.predicted_ms) <= self.interval_ms


@dataclass(frozen=True, slots=True)
class ComparedStage:
    """One stage: loads are forward + backward in ms per microbatch, shares are of all stages' load, waits per step."""

    index: int
    begins_at: str
    num_layers: int
    forward: ComparedTime
    backward: ComparedTime
    predicted_load_ms: float
    measured_load_ms: float
    predicted_share: float | None
    measured_share: float | None
    predicted_optimizer_ms: float
    measured_optimizer_ms: float
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None
    predicted_device_bytes: int | None
    measured_device_bytes: int | None
    predicted_wait_ms: float | None
    measured_wait_ms: float | None
    predicted_bubble: float | None
    measured_bubble: float | None
    samples: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """Other cuts on the plan's own predicted costs; `change` is its step ÷ the plan's − 1."""

    label: str
    step_ms: float
    change: float | None
    cuts: tuple[str, ...]
    same_cuts: bool
    fits: bool | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step as tasks, simulated from stage times; `critical` are the tasks that no one may delay."""

    step_ms: float
    tasks: tuple[Task, ...]
    critical: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class BalanceReport:
    """Everything that a report shows, computed once. `step_error` is measured ÷ predicted step − 1."""

    title: str
    verdict: Verdict
    schedule: str
    num_microbatches: int
    microbatch_size: int
    stages: tuple[ComparedStage, ...]
    step_ms: StepTimes
    step_error: float | None
    step_clock: Literal["wall", "simulated"]
    wall_step_ms: float
    predicted_balance: float | None
    measured_balance: float | None
    predicted_bubble: float | None
    measured_bubble: float | None
    alternatives: tuple[Alternative, ...]
    predicted: Timeline
    measured: Timeline
    steps: tuple[StepRecord, ...]
    reference_loss: float | None
    reference_loss_name: str
    check: CheckResult | None
    speed_up: SpeedUp | None
    scale: float
    drift: float | None
    clock_words: str
    device_name: str
    rehearsed: bool = False
    start: StartTimes | None = None

    @property
    def largest_error(self) -> float:
        """The largest absolute scaled error of a stage's forward or backward; 0 where nothing was predicted."""
        times = [time for stage in self.stages for time in (stage.forward, stage.backward)]
        return max((abs(time.error) for time in times if time.error is not None), default=0.0)

    @property
    def inside(self) -> tuple[int, int] | None:
        """How many of the stages' times and the step lie in their 90 % intervals, and of how many; None without any."""
        found = [time.inside for stage in self.stages for time in (stage.forward, stage.backward)]
        if self.step_ms.interval is not None:
            found.append(abs(self.step_ms.measured - self.step_ms.predicted) <= self.step_ms.interval)
        known = [one for one in found if one is not None]
        return (sum(known), len(known)) if known else None

    def within_tolerance(self, tolerance: float) -> bool:
        """Whether every stage's forward and backward, after the one scale factor, was predicted within `tolerance`.

        `tolerance` is a fraction: 0.1 allows a share of the work that is 10 % larger or smaller than predicted. The
        scale itself (a machine that is slower as a whole) and memory are not held against it. A stage that was
        measured to work although nothing was predicted for it is outside every tolerance.
        """
        times = [time for stage in self.stages for time in (stage.forward, stage.backward)]
        unforeseen = any(time.error is None and time.measured_ms > 0 for time in times)
        return not unforeseen and self.largest_error <= tolerance


def compare(plan: Plan, measurement: Measurement, file: str = "") -> BalanceReport:
    """Hold a measurement against the plan that was run. Times in ms, errors and shares as fractions.

    `file` is where the measurement lies, if it can be planned from (`runner.verdict.to_plan_from`).

    Raises FileError where the measurement is of another plan.
    """
    _refuse_other_plan(plan, measurement)
    stages = _stages(plan, measurement)
    predicted_balance = balance(stage.predicted_load_ms for stage in stages)
    measured_balance = balance(stage.measured_load_ms for stage in stages)
    measured_bubble = mean_bubble([stage.measured_bubble for stage in stages])
    errors = {(s.index, k): t.error for s in stages for k, t in (("forward", s.forward), ("backward", s.backward))}
    return BalanceReport(
        title=model_title(plan),
        verdict=find_verdict(plan, [stage.measured_load_ms for stage in stages], errors, measured_bubble, file),
        schedule=measurement.schedule,
        num_microbatches=measurement.num_microbatches,
        microbatch_size=measurement.microbatch_size,
        stages=stages,
        step_ms=measurement.step_ms,
        step_error=_error(measurement.step_ms.measured, measurement.step_ms.predicted),
        step_clock=measurement.step_clock,
        wall_step_ms=measurement.wall_step_ms,
        predicted_balance=predicted_balance,
        measured_balance=measured_balance,
        predicted_bubble=mean_bubble([stage.predicted_bubble for stage in stages]),
        measured_bubble=measured_bubble,
        alternatives=_alternatives(plan),
        predicted=_timeline([stage.predicted for stage in measurement.stages], measurement),
        measured=_timeline([stage.measured for stage in measurement.stages], measurement),
        steps=measurement.steps,
        reference_loss=measurement.reference_loss,
        reference_loss_name=measurement.reference_loss_name,
        check=measurement.check,
        speed_up=measurement.speed_up,
        scale=measurement.scale,
        drift=measurement.drift,
        clock_words=clock_words(measurement),
        device_name=measurement.machine.device_name,
        rehearsed=measurement.rehearsed,
        start=measurement.start,
    )


def _refuse_other_plan(plan: Plan, measurement: Measurement) -> None:
    planned = (plan.model.fingerprint, plan.num_stages, plan.num_microbatches)
    run = (measurement.plan, len(measurement.stages), measurement.num_microbatches)
    if planned != run:
        raise FileError(
            f"a measurement of {clean(measurement.name)} with {run[1]} stages and {run[2]} microbatches",
            f"the plan is of {model_title(plan)} with {planned[1]} stages and {planned[2]} microbatches",
            "give the plan that was run",
        )


def clock_words(measurement: Measurement) -> str:
    """How times were taken, in words."""
    clock = {"thread-cpu": "thread CPU time", "cuda-event": "CUDA events"}[measurement.clock]
    if measurement.step_clock == "wall":
        return f"{clock}, step by the wall clock"
    if measurement.rehearsed:
        device = "core" if measurement.machine.device == "cpu" else "device"
        return f"{clock}, stages rehearsed one after the other on one {device}, step simulated from their times"
    workers, devices = len(measurement.stages), measurement.machine.num_devices
    simulated = f"{clock}, step simulated from measured stage times"
    if workers <= devices:
        return simulated
    what = ("core" if measurement.machine.device == "cpu" else "device") + ("" if devices == 1 else "s")
    return f"{simulated} because {workers} workers share {devices} {what}"


def _stages(plan: Plan, measurement: Measurement) -> tuple[ComparedStage, ...]:
    predicted_total = sum(_load(stage.predicted) for stage in measurement.stages)
    measured_total = sum(_load(stage.measured) for stage in measurement.stages)
    return tuple(
        _stage(planned, run, predicted_total, measured_total, measurement.scale)
        for planned, run in zip(plan.stages, measurement.stages, strict=True)
    )


def _stage(
    planned: Stage, run: StageMeasurement, predicted_total: float, measured_total: float, scale: float
) -> ComparedStage:
    before, after = run.predicted, run.measured
    return ComparedStage(
        index=run.index,
        begins_at=planned.names[0] if planned.names else "",
        num_layers=len(planned.nodes),
        forward=replace(
            _time(before.forward_ms, after.forward_ms, before.forward_spread_ms, after.forward_spread_ms, scale),
            interval_ms=before.forward_interval_ms,
        ),
        backward=replace(
            _time(before.backward_ms, after.backward_ms, before.backward_spread_ms, after.backward_spread_ms, scale),
            interval_ms=before.backward_interval_ms,
        ),
        predicted_load_ms=_load(before),
        measured_load_ms=_load(after),
        predicted_share=_load(before) / predicted_total if predicted_total > 0 else None,
        measured_share=_load(after) / measured_total if measured_total > 0 else None,
        predicted_optimizer_ms=before.optimizer_ms,
        measured_optimizer_ms=after.optimizer_ms,
        predicted_peak_bytes=before.peak_memory_bytes,
        measured_peak_bytes=after.peak_memory_bytes,
        predicted_device_bytes=before.device_memory_bytes,
        measured_device_bytes=after.device_memory_bytes,
        predicted_wait_ms=before.wait_ms,
        measured_wait_ms=after.wait_ms,
        predicted_bubble=before.bubble_fraction,
        measured_bubble=after.bubble_fraction,
        samples=run.samples,
    )


def _time(
    predicted_ms: float, measured_ms: float, predicted_spread_ms: float, measured_spread_ms: float, scale: float
) -> ComparedTime:
    return ComparedTime(
        predicted_ms=predicted_ms,
        measured_ms=measured_ms,
        predicted_spread_ms=predicted_spread_ms,
        measured_spread_ms=measured_spread_ms,
        error=_error(measured_ms, predicted_ms * scale),
        raw_error=_error(measured_ms, predicted_ms),
    )


def _load(figures: StageFigures) -> float:
    return figures.forward_ms + figures.backward_ms


def _error(measured: float, predicted: float) -> float | None:
    return measured / predicted - 1 if predicted > 0 else None


def _alternatives(plan: Plan) -> tuple[Alternative, ...]:
    return tuple(
        Alternative(
            label=baseline_label(name),
            step_ms=other.objective_ms,
            change=_error(other.objective_ms, plan.scheduled_step_ms()),
            cuts=other.cuts,
            same_cuts=same_cuts(plan, other),
            fits=other.fits,
        )
        for name, other in plan.baselines.items()
    )


def _timeline(figures: list[StageFigures], measurement: Measurement) -> Timeline:
    times = [StageTimes(f.forward_ms, f.backward_ms, f.backward_first_ms, f.optimizer_ms) for f in figures]
    step: SimulatedStep = simulate(times, measurement.num_microbatches, measurement.schedule)
    return Timeline(step.step_ms, step.tasks, critical_path(step))
