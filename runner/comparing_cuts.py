"""`--against`: steps of two cuts in turn, in one process group, so that drift of the machine hits both alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from planner.errors import UsageError
from planner.files.measurement_file import SpeedUp
from planner.files.plan_file import Cut, Plan
from planner.scheduling.simulation import simulate
from planner.tracing.loading import make_batch
from runner.gathering import choose_step_clock, stage_times
from runner.measuring import StepSamples
from runner.stages import BuiltStage, build_stage
from runner.training import Trainer

if TYPE_CHECKING:
    from runner.worker import RunContext

MIN_PAIRS, MAX_PAIRS = 5, 15
RESAMPLES = 2000


def _stage(context: RunContext, plan: Plan) -> BuiltStage:
    return build_stage(plan, context.source, context.rank, context.device, meta=context.options.meta)


def other_plan(plan: Plan, against: str) -> Plan:
    """`plan` with the cuts of its baseline `against`, but its own times.

    Raises UsageError where there is no such baseline, or it is the same.
    """
    baseline = plan.baselines.get(against)
    if baseline is None or tuple(cut.before for cut in plan.cuts) == baseline.cuts:
        reason = "has no such baseline" if baseline is None else "has exactly these cuts"
        raise UsageError(f"--against: the plan {reason} ({against})", "two different cuts are compared", "leave it out")
    if plan.order is not None:
        raise UsageError(
            f"--against {against}: the plan cuts its layers in an order of their own",
            "a baseline cuts in program order, and only cuts of one order are compared in turn",
            "leave --against out, or plan with --plain",
        )
    nodes = [node for stage in plan.stages for node in stage.nodes]
    names = [name for stage in plan.stages for name in stage.names]
    if any(cut not in nodes for cut in baseline.cuts) or len(baseline.cuts) != len(plan.cuts):
        got = f"--against {against}: the plan's baseline cuts before {', '.join(baseline.cuts)}"
        raise UsageError(got, "a baseline cuts before layers of the plan, once less than it has stages", "plan again")
    bounds = [0, *sorted(nodes.index(cut) for cut in baseline.cuts), len(nodes)]
    stages = tuple(
        replace(stage, nodes=tuple(nodes[a:b]), names=tuple(names[a:b]))
        for stage, (a, b) in zip(plan.stages, pairwise(bounds), strict=True)
    )
    cuts = tuple(Cut(str(stage.nodes[0]), (), 0) for stage in stages[1:])
    return replace(plan, cuts=cuts, stages=stages, plain_chain=False, why_not="only compared", split_specification=None)


def compare_cuts(context: RunContext) -> SpeedUp | None:
    """Alternate steps of the plan and of a baseline; the measured speed-up on rank 0, None elsewhere."""
    plan, against = context.plan, context.options.against
    assert against is not None
    other = other_plan(plan, against)
    trainers = [Trainer(p, context.source, _stage(context, p), context.device) for p in (plan, other)]
    pairs = max(MIN_PAIRS, min(MAX_PAIRS, context.options.steps))
    own: list[tuple[StepSamples, ...]] = []
    for number in range(pairs + 1):
        batch = make_batch(context.source, plan.seed, number, plan.batch_size)
        steps = tuple(trainer.step(number, batch).samples for trainer in trainers)
        own.append(tuple(sample for sample in steps if sample is not None))
    gathered: list[Any] | None = [None] * dist.get_world_size() if context.rank == 0 else None
    dist.gather_object(own[1:], gathered)
    if gathered is None:
        return None
    clock = choose_step_clock(plan.num_stages, context.device.clock)
    ratios = [_ratio(plan, [rank[pair] for rank in gathered], clock == "wall") for pair in range(pairs)]
    low, high = interval_of_median(ratios)
    return SpeedUp(
        against=against,
        cuts=tuple(cut.before for cut in other.cuts),
        predicted=plan.baselines[against].objective_ms / plan.scheduled_step_ms(),
        measured=median(ratios),
        low=low,
        high=high,
        pairs=pairs,
        clock=clock,
    )


def _ratio(plan: Plan, ranks: Sequence[tuple[StepSamples, ...]], wall: bool) -> float:
    """Step of the other cut ÷ step of the plan, from one pair of steps."""
    steps = []
    for which in (0, 1):
        samples = [rank[which] for rank in ranks]
        if wall:
            steps.append(max(sample.step_wall_ms for sample in samples))
        else:
            times = [stage_times([sample]) for sample in samples]
            steps.append(simulate(times, plan.num_microbatches, plan.schedule or "gpipe").step_ms)
    return steps[1] / steps[0]


def interval_of_median(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the median, with a fixed seed.

    >>> interval_of_median([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    generator = random.Random(0)
    medians = sorted(median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    margin = int((1 - level) / 2 * RESAMPLES)
    return medians[margin], medians[-margin - 1]
