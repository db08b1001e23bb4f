"""The verdict on a run: which stage limits it, by how much, and the one command that helps, in that order of causes.

A prediction that was off comes first, because advice from wrong costs is worthless; then idle time, which no cut can
remove; then the cuts themselves.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.files.plan_file import Plan
from planner.rendering import clean, format_ms, format_percent, gap

MISPREDICTED = 0.10
EVEN = 0.02
LEVEL = 0.001
IDLE = 0.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """`finding`: what limits the step; `advice`: what follows; `command`: what to type, None where nothing helps."""

    finding: str
    advice: str
    command: str | None
    limiting_stage: int

    @property
    def sentence(self) -> str:
        """All of it as one sentence.

        >>> Verdict("Stage 1 limits", "nothing to gain", None, 1).sentence
        'Stage 1 limits; nothing to gain.'
        """
        return f"{self.finding}; {self.advice}{f': {self.command}' if self.command else '.'}"


def find_verdict(
    plan: Plan,
    loads_ms: Sequence[float],
    errors: Mapping[tuple[int, str], float | None],
    bubble: float | None,
    measurement: str = "",
) -> Verdict:
    """The verdict from measured loads (ms per microbatch and stage), scaled errors by (stage, direction), and bubble.

    Errors and the bubble are fractions. `measurement` is the run's file, where it has one.
    """
    limiting = max(range(len(loads_ms)), key=lambda stage: loads_ms[stage])
    advice, command = _advice(plan, loads_ms, errors, bubble, measurement)
    return Verdict(_finding(loads_ms, limiting), advice, command, limiting)


def to_plan_from(file: Path, name: str) -> str:
    """The measurement's `file`, where the profile of the model `name` lies at hand to be corrected; else empty."""
    return str(file) if Path(f"{name}.profile.json").exists() else ""


def _finding(loads_ms: Sequence[float], limiting: int) -> str:
    largest = loads_ms[limiting]
    if len(loads_ms) == 1:
        return f"The one stage takes {format_ms(largest)} per microbatch"
    mean = sum(loads_ms) / len(loads_ms)
    following = max(load for stage, load in enumerate(loads_ms) if stage != limiting)
    excess = f" ({format_percent(largest / mean - 1)})" if mean > 0 else ""
    ahead = "level with" if largest - following <= LEVEL * largest else f"{format_ms(largest - following)} above"
    return (
        f"Stage {limiting} limits the step: {format_ms(largest)} per microbatch,"
        f" {format_ms(largest - mean)}{excess} above the mean and {ahead} the next"
    )


def _advice(
    plan: Plan,
    loads_ms: Sequence[float],
    errors: Mapping[tuple[int, str], float | None],
    bubble: float | None,
    measurement: str,
) -> tuple[str, str | None]:
    worst = max(errors, key=lambda key: abs(errors[key] or 0.0))
    worst_error = errors[worst] or 0.0
    if len(loads_ms) == 1:
        return "with one stage there is nothing to balance", None
    if abs(worst_error) > MISPREDICTED:
        direction = "more" if worst_error > 0 else "less"
        missed = f"{format_percent(abs(worst_error))} {direction} of the work than predicted"
        return _plan_from(measurement, plan, f"the {worst[1]} of stage {worst[0]} took {missed}")
    mean = sum(loads_ms) / len(loads_ms)
    unevenness = max(loads_ms) / mean - 1 if mean > 0 else 0.0
    if bubble is not None and bubble > IDLE and bubble > 2 * unevenness:
        return _fill_pipeline(plan, bubble)
    if unevenness <= EVEN:
        return "the stages are even within 2 %, so there is nothing to gain from other cuts", None
    return _even_out(plan, measurement)


def _fill_pipeline(plan: Plan, bubble: float) -> tuple[str, str]:
    """Idle time dominates: another microbatch count where one is known to be better, else a larger batch."""
    idle = f"but {format_percent(bubble)} of the step is idle while the pipeline fills and drains"
    best = min(plan.microbatch_curve, key=lambda point: point.step_ms, default=None)
    if best is not None and best.step_ms < plan.scheduled_step_ms() and best.num_microbatches != plan.num_microbatches:
        changed = "more" if best.num_microbatches > plan.num_microbatches else "fewer"
        return f"{idle}, so use {changed} microbatches", plan_command(plan, f"--microbatches {best.num_microbatches}")
    if len(plan.microbatch_curve) <= 1:
        return f"{idle}, so let the planner choose the microbatches", plan_command(plan, "--microbatches auto")
    return f"{idle}, so use a larger batch", plan_command(plan, batch_size=2 * plan.batch_size)


def _plan_from(measurement: str, plan: Plan, finding: str) -> tuple[str, str]:
    """The costs were wrong: what was just measured says more than another profile would."""
    if not measurement:
        return f"{finding}, so measure again", plan_command(plan, "--fresh")
    return f"{finding}, so plan from what was measured", f"plan --from-measurement {shlex.quote(clean(measurement))}"


def _even_out(plan: Plan, measurement: str) -> tuple[str, str | None]:
    loads = [stage.load_ms for stage in plan.stages]
    if max(loads) * len(loads) <= (1 + EVEN) * sum(loads):
        return _plan_from(measurement, plan, "the plan had expected even stages")
    distance = gap(plan)
    if plan.status == "optimal":
        return "no legal cut is faster on the plan's costs, which is proven", None
    if plan.status == "feasible" and distance is not None:
        return f"other cuts can gain at most {format_percent(distance)} on the plan's costs", None
    return "these cuts were not proven, so let the planner choose", plan_command(plan)


def plan_command(plan: Plan, *flags: str, batch_size: int | None = None) -> str:
    """The command that makes this plan again, with `flags`. The batch is named, as its default depends on the model."""
    file = clean(plan.model.file or "MODEL.py")
    model = shlex.quote(file if plan.model.entry == "build_model" else f"{file}:{clean(plan.model.entry)}")
    if file.endswith(".json"):
        length = clean(plan.model.entry).removeprefix("hf").removeprefix("_")
        model = f"--hf {shlex.quote(file)}{f' --sequence-length {length}' if length else ''}"
    batch = f"--batch-size {plan.batch_size if batch_size is None else batch_size}"
    return " ".join(["plan", "--gpus", str(plan.num_stages), model, batch, *flags])
