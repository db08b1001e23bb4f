"""A realistic plan of four stages and the measurement of a run of it, for tests of everything that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.files.measurement_file import (
    CheckResult,
    Measurement,
    SpeedUp,
    StageFigures,
    StageMeasurement,
    StepRecord,
    StepTimes,
)
from planner.files.plan_file import (
    Baseline,
    CurvePoint,
    Cut,
    Plan,
    PlannedModel,
    SolverRecord,
    Stage,
    TiedParameter,
)
from planner.files.profile_file import LayerProfile, Machine, ModelReference, Profile, SizeProfile
from planner.scheduling.closed_forms import ideal_step_ms
from planner.scheduling.simulation import StageTimes, simulate

MACHINE = Machine("cpu", "Intel Xeon Platinum 8481C", 2, {"python": "3.11.2", "torch": "2.13.0+cpu"})
PREDICTED = (
    StageTimes(4.21, 8.40, 8.31, 1.10),
    StageTimes(4.19, 8.44, 8.36, 0.95),
    StageTimes(4.22, 8.41, 8.30, 0.95),
    StageTimes(4.05, 8.12, 8.02, 1.32),
)
MEASURED = (
    StageTimes(4.62, 9.31, 9.20, 1.20),
    StageTimes(4.66, 9.22, 9.13, 1.01),
    StageTimes(4.63, 9.30, 9.22, 1.02),
    StageTimes(4.41, 8.97, 8.90, 1.41),
)
LAYERS_PER_STAGE = (7, 8, 8, 18)
BEGINS_AT = ("tok_embeddings", "layers.2", "layers.4", "layers.6")
MIB = 2**20


def layer_names() -> tuple[tuple[str, ...], ...]:
    """The names of the layers of each stage."""
    return tuple(
        (first, *(f"{first}.part{index}" for index in range(1, count)))
        for first, count in zip(BEGINS_AT, LAYERS_PER_STAGE, strict=True)
    )


def make_plan_value(
    times: Sequence[StageTimes],
    num_microbatches: int,
    names: Sequence[Sequence[str]],
    *,
    tied: bool = False,
    baselines: dict[str, Baseline] | None = None,
    curve: tuple[CurvePoint, ...] = (),
    model: PlannedModel | None = None,
    microbatch_size: int = 1,
) -> Plan:
    """A proven GPipe plan whose stages take `times` and hold the layers `names`."""
    step = simulate(times, num_microbatches)
    starts = [stage[0] for stage in names[1:]]
    return Plan(
        model=model or PlannedModel("transformer.py", "5f2c9a77d1e04b38", "transformer", 33_900_000),
        status="optimal",
        objective_ms=step.step_ms,
        lower_bound_ms=step.step_ms,
        solver=SolverRecord("HiGHS", 0.04, 1),
        schedule="gpipe",
        num_microbatches=num_microbatches,
        microbatch_size=microbatch_size,
        precision="fp32",
        seed=0,
        data_parallel=1,
        step_ms=step.step_ms,
        plain_chain=not tied,
        why_not="tok_embeddings.weight is used in more than one stage" if tied else None,
        split_specification=None if tied else dict.fromkeys(starts, "beginning"),
        order=None,
        recompute=(),
        cuts=tuple(Cut(name, ("hidden",), 512 * 1024) for name in starts),
        stages=tuple(
            Stage(
                index=index,
                rank=index,
                nodes=tuple(names[index]),
                names=tuple(names[index]),
                forward_ms=stage.forward_ms,
                forward_spread_ms=0.03,
                backward_ms=stage.backward_ms,
                backward_spread_ms=0.05,
                backward_first_ms=stage.backward_first_ms,
                optimizer_ms=stage.optimizer_ms,
                load_ms=stage.forward_ms + stage.backward_ms,
                wait_ms=step.wait_ms[index],
                bubble_fraction=step.bubble_fraction[index],
                parameter_bytes=8 * MIB,
            )
            for index, stage in enumerate(times)
        ),
        baselines=baselines or {},
        microbatch_curve=curve or (CurvePoint(num_microbatches, microbatch_size, step.step_ms, "optimal"),),
        tied=(TiedParameter("tok_embeddings.weight", (0, len(times) - 1)),) if tied else (),
        bandwidth_bytes_per_s=None,
        machine=MACHINE,
    )


def make_measurement_value(
    plan: Plan,
    times: Sequence[StageTimes],
    *,
    losses: Sequence[float] = (6.9, 5.2, 4.4),
    peak_memory_bytes: int | None = 600 * MIB,
) -> Measurement:
    """The measurement of a run of `plan` whose stages took `times`, on a clock that simulates the step."""
    predicted, measured = simulate(_times(plan), plan.num_microbatches), simulate(times, plan.num_microbatches)
    work = sum(stage.load_ms for stage in plan.stages)
    return Measurement(
        plan=plan.model.fingerprint,
        name=plan.model.name,
        schedule="gpipe",
        num_microbatches=plan.num_microbatches,
        microbatch_size=plan.microbatch_size,
        step_ms=StepTimes(predicted.step_ms, measured.step_ms, ideal_step_ms(times, plan.num_microbatches)),
        stages=tuple(
            StageMeasurement(
                index=index,
                predicted=_figures(
                    planned,
                    plan.stages[index].peak_memory_bytes,
                    predicted.bubble_fraction[index],
                    predicted.wait_ms[index],
                ),
                measured=_figures(run, peak_memory_bytes, measured.bubble_fraction[index], measured.wait_ms[index]),
                samples=304,
            )
            for index, (planned, run) in enumerate(zip(_times(plan), times, strict=True))
        ),
        clock="thread-cpu",
        step_clock="simulated",
        wall_step_ms=2 * measured.step_ms,
        drift=0.012,
        scale=sum(t.forward_ms + t.backward_ms for t in times) / work if work else 1.0,
        machine=MACHINE,
        steps=tuple(StepRecord(step, loss, measured.step_ms, 1e-3, 1.5) for step, loss in enumerate(losses)),
    )


def _times(plan: Plan) -> list[StageTimes]:
    return [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in plan.stages]


def _figures(times: StageTimes, peak: int | None, bubble: float, wait_ms: float) -> StageFigures:
    return StageFigures(
        forward_ms=times.forward_ms,
        backward_ms=times.backward_ms,
        backward_first_ms=times.backward_first_ms,
        optimizer_ms=times.optimizer_ms,
        peak_memory_bytes=peak,
        bubble_fraction=bubble,
        wait_ms=wait_ms,
        forward_spread_ms=0.03,
        backward_spread_ms=0.05,
    )


def sample_plan(*, tied: bool = False) -> Plan:
    """Four even stages of a transformer, 16 microbatches of 1; `tied` makes it a plan that is no plain chain."""
    plan = make_plan_value(PREDICTED, 16, layer_names(), tied=tied)
    own = tuple(cut.before for cut in plan.cuts)
    step = plan.step_ms
    baselines = {
        "equal_layers": Baseline(step * 1.24, step * 1.24, None, ("layers.1", "layers.3", "layers.5")),
        "equal_parameters": Baseline(step * 1.41, step * 1.41, None, ("layers.3", "layers.5", "layers.7")),
        "torchgpipe": Baseline(step * 1.03, step * 1.03, None, ("layers.2", "layers.4", "layers.6.norm1")),
        "accelerate": Baseline(step, step, None, own),
    }
    curve = (
        CurvePoint(4, 4, step * 1.21, "optimal"),
        CurvePoint(8, 2, step * 1.06, "optimal"),
        CurvePoint(16, 1, step, "optimal"),
    )
    return make_plan_value(PREDICTED, 16, layer_names(), tied=tied, baselines=baselines, curve=curve)


def sample_measurement(plan: Plan) -> Measurement:
    """A run of `sample_plan()` on two shared cores, about 10 % slower than profiled, with check and speed-up."""
    losses = [6.93, 6.41, 5.83, 5.31, 4.97, 4.71, 4.52, 4.38, 4.27, 4.19, 4.13, 4.08, 4.03, 4.0, 3.97, 3.95, 3.93]
    return replace(
        make_measurement_value(plan, MEASURED, losses=losses),
        check=CheckResult(3, 2.4e-7, 3.1e-6, 1.2e-6, "layers.3.linear1.weight"),
        speed_up=SpeedUp("equal_layers", ("layers.1", "layers.3", "layers.5"), 1.24, 1.22, 1.20, 1.25, 15, "simulated"),
        reference_loss=4.62,
        reference_loss_name="bigram model",
    )


def sample_profile() -> Profile:
    """The profile of `sample_plan()`: as many layers as its stages hold."""
    names = [name for stage in layer_names() for name in stage]
    layers = tuple(
        LayerProfile(name, name, "Linear", index, 0.41, 0.01, 0.8, 0.01, 0.8, 0.1, MIB, (), True)
        for index, name in enumerate(names)
    )
    return Profile(
        model=ModelReference("transformer.py", "transformer", "build_model", "TransformerDecoderLayer", 8),
        machine=MACHINE,
        precision="fp32",
        batch_size=16,
        num_rounds=15,
        seconds=6.1,
        concurrent_copies=2,
        sizes=(SizeProfile(1, "5f2c9a77d1e04b38", layers, (), (), 0.004),),
    )
