"""Every rank's step results → one Measurement, beside what the plan predicted."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from statistics import median
from typing import Literal

from planner.files.measurement_file import (
    CheckResult,
    Measurement,
    SpeedUp,
    StageFigures,
    StageMeasurement,
    StepRecord,
    StepTimes,
)
from planner.files.plan_file import Plan, Stage
from planner.files.profile_file import Machine
from planner.machine.device import Clock, available_cores
from planner.profiling.timing import summarise
from planner.scheduling.closed_forms import ideal_step_ms
from planner.scheduling.simulation import SimulatedStep, StageTimes, simulate
from runner.measuring import StepSamples, highest
from runner.training import StepResult

StepClock = Literal["wall", "simulated"]


def build_measurement(
    plan: Plan,
    results: Sequence[Sequence[StepResult]],
    machine: Machine,
    clock: Clock,
    check: CheckResult | None,
    speed_up: SpeedUp | None,
    reference: tuple[float, str] | None,
    *,
    rehearsed: bool = False,
) -> Measurement:
    """The measurement of a run from the results of its ranks, in the order of the stages.

    A rehearsed step is always simulated from the stages' times. Raises ValueError where no step was timed.
    """
    samples = [timed_samples(rank) for rank in results]
    times = [_with_transfers(stage_times(stage), *plan.transfers_ms(index)) for index, stage in enumerate(samples)]
    schedule = plan.schedule or "gpipe"
    simulated = simulate(times, plan.num_microbatches, schedule)
    wall_step_ms = median(
        max(walls) for walls in zip(*([s.step_wall_ms for s in rank] for rank in samples), strict=True)
    )
    step_clock: StepClock = "simulated" if rehearsed else choose_step_clock(plan.num_stages, clock)
    predicted_work = sum(stage.load_ms for stage in plan.stages)
    measured_work = sum(t.forward_ms + t.backward_ms for t in times)
    return Measurement(
        plan=plan.model.fingerprint,
        name=plan.model.name,
        schedule=schedule,
        num_microbatches=plan.num_microbatches,
        microbatch_size=plan.microbatch_size,
        step_ms=StepTimes(
            predicted=plan.scheduled_step_ms(),
            measured=wall_step_ms if step_clock == "wall" else simulated.step_ms,
            ideal=ideal_step_ms(times, plan.num_microbatches),
            interval=plan.step_interval_ms,
        ),
        stages=tuple(
            StageMeasurement(
                index=stage.index,
                predicted=_predicted(stage, plan),
                measured=_measured(plan, stage.index, times, samples, results, simulated, step_clock),
                samples=sum(len(s.forward_ms) for s in samples[stage.index]),
            )
            for stage in plan.stages
        ),
        clock=clock,
        step_clock=step_clock,
        wall_step_ms=wall_step_ms,
        drift=None,
        scale=measured_work / predicted_work if predicted_work else 1.0,
        machine=machine,
        steps=_records(results),
        check=check,
        speed_up=speed_up,
        reference_loss=reference[0] if reference else None,
        reference_loss_name=reference[1] if reference else "",
        rehearsed=rehearsed,
        cuts=tuple(cut.before for cut in plan.cuts),
        order=None if plan.order is None else tuple(map(str, plan.order)),
    )


def choose_step_clock(num_stages: int, clock: Clock) -> StepClock:
    """Wall time where every worker has a core or a device of its own; otherwise the step is simulated."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", num_stages))
    return "wall" if clock == "cuda-event" or local <= available_cores() else "simulated"


def timed_samples(results: Sequence[StepResult]) -> list[StepSamples]:
    """The timed steps of a rank without the first, which warms up, where there is another."""
    timed = [result.samples for result in results if result.samples is not None]
    later = [sample for sample in timed if sample.step > 0]
    return later or timed


def stage_times(samples: Sequence[StepSamples]) -> StageTimes:
    """Medians over steps and microbatches; the first microbatch's backward apart."""
    later = [ms for s in samples for ms in s.backward_ms[1:]] or [ms for s in samples for ms in s.backward_ms]
    return StageTimes(
        forward_ms=median(ms for s in samples for ms in s.forward_ms),
        backward_ms=median(later),
        backward_first_ms=median(s.backward_ms[0] for s in samples),
        optimizer_ms=median(s.optimizer_ms for s in samples),
    )


def _with_transfers(times: StageTimes, forward_ms: float, backward_ms: float) -> StageTimes:
    """What a stage computed, and the sends and receives that its plan charges: no rank times those by themselves."""
    return StageTimes(
        times.forward_ms + forward_ms,
        times.backward_ms + backward_ms,
        times.backward_first_ms + backward_ms,
        times.optimizer_ms,
    )


def _predicted(stage: Stage, plan: Plan) -> StageFigures:
    transfer_forward_ms, transfer_backward_ms = plan.transfers_ms(stage.index)
    allocated, on_gpu = stage.peak_memory_bytes, plan.machine is not None and plan.machine.device == "cuda"
    if allocated is not None and stage.memory is not None and plan.machine is not None:
        allocated += plan.machine.workspace_bytes - stage.memory.reserved
    return StageFigures(
        forward_ms=stage.forward_ms,
        backward_ms=stage.backward_ms,
        backward_first_ms=stage.backward_first_ms,
        optimizer_ms=stage.optimizer_ms,
        peak_memory_bytes=allocated,
        device_memory_bytes=stage.peak_memory_bytes if on_gpu else None,
        bubble_fraction=stage.bubble_fraction,
        wait_ms=stage.wait_ms,
        forward_spread_ms=stage.forward_spread_ms,
        backward_spread_ms=stage.backward_spread_ms,
        forward_interval_ms=stage.forward_interval_ms,
        backward_interval_ms=stage.backward_interval_ms,
        transfer_forward_ms=transfer_forward_ms,
        transfer_backward_ms=transfer_backward_ms,
    )


def _measured(
    plan: Plan,
    index: int,
    times: Sequence[StageTimes],
    samples: Sequence[Sequence[StepSamples]],
    results: Sequence[Sequence[StepResult]],
    simulated: SimulatedStep,
    step_clock: StepClock,
) -> StageFigures:
    own, (transfer_forward_ms, transfer_backward_ms) = samples[index], plan.transfers_ms(index)
    peaks = [result.memory for result in results[index] if result.memory is not None]
    memory = highest(peaks) if peaks else None
    wait = simulated.wait_ms[index]
    bubble = simulated.bubble_fraction[index]
    if step_clock == "wall":
        wait = median(max(0.0, s.step_wall_ms - s.busy_wall_ms - s.optimizer_ms) for s in own)
        bubble = wait / (wait + median(s.busy_wall_ms for s in own))
    return StageFigures(
        forward_ms=times[index].forward_ms,
        backward_ms=times[index].backward_ms,
        backward_first_ms=times[index].backward_first_ms,
        optimizer_ms=times[index].optimizer_ms,
        peak_memory_bytes=None if memory is None else memory.allocated_bytes,
        device_memory_bytes=None if memory is None else memory.device_bytes,
        bubble_fraction=min(1.0, max(0.0, bubble)),
        wait_ms=max(0.0, wait),
        forward_spread_ms=summarise([ms for s in own for ms in s.forward_ms])[1],
        backward_spread_ms=summarise([ms for s in own for ms in s.backward_ms])[1],
        transfer_forward_ms=transfer_forward_ms,
        transfer_backward_ms=transfer_backward_ms,
    )


def _records(results: Sequence[Sequence[StepResult]]) -> tuple[StepRecord, ...]:
    records = []
    for ranks in zip(*results, strict=True):
        loss = next(r.loss for r in reversed(ranks) if r.loss is not None)
        walls = [r.wall_ms for r in ranks]
        norm = math.sqrt(sum(r.squared_norm for r in ranks))
        records.append(StepRecord(ranks[0].step, loss, max(walls), ranks[0].learning_rate, norm))
    return tuple(records)
