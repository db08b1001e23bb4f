"""`plan --from-measurement FILE…`: what the command line says → the plan made again, and what is shown of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import UsageError
from planner.links_command import linked
from planner.rendering import render_plan
from planner.rendering.attribution_text import render_attribution, render_outcome

if TYPE_CHECKING:
    from planner.files.measurement_file import Measurement
    from planner.files.plan_file import Plan
    from planner.files.profile_file import Profile
    from planner.request import PlanRequest


@dataclass(frozen=True, slots=True)
class PlannedAgain:
    """A plan made again, the text that shows it, the file that it goes to by default, and that of its profile."""

    plan: Plan
    text: str
    output: Path
    profile: Path


def plan_again(flags: argparse.Namespace, load_profile: Callable[[Path], Profile]) -> PlannedAgain:
    """Do what `plan --from-measurement` asks. Raises the family of PlannerError."""
    from planner.files.measurement_file import Measurement
    from planner.planning import limit_line
    from planner.replanning import replan

    _refuse_other_sources(flags)
    measurements = [Measurement.load(path) for path in flags.from_measurement]
    newest = measurements[-1]
    name = Path(newest.name).name
    file = Path(f"{name}.profile.json" if flags.profile is None else flags.profile)
    if not file.exists():
        raise UsageError(
            f"no profile in {file}",
            "a measurement corrects the profile that its plan was made from",
            "give it with --profile FILE",
        )
    profile, output = load_profile(file), Path(f"{name}.replanned.plan.json")
    request = linked(flags, _request(flags, newest), profile, output)
    found = replan(profile, measurements, request)
    text = "\n\n".join(
        [
            render_attribution(found.attribution),
            render_outcome(found.before_ms, found.plan.scheduled_step_ms(), found.kept, len(measurements)),
            render_plan(found.plan, found.profile, limit_line=limit_line(found.plan, found.profile)),
        ]
    )
    return PlannedAgain(found.plan, text, output, file)


def _request(flags: argparse.Namespace, newest: Measurement) -> PlanRequest:
    """The stages, microbatches and schedule of the newest measurement where the flags do not say otherwise."""
    from planner.request import PlanRequest

    return PlanRequest(
        gpus=len(newest.stages) if flags.gpus is None else flags.gpus,
        batch_size=newest.num_microbatches * newest.microbatch_size,
        microbatches=newest.num_microbatches,
        bandwidth_bytes_per_s=flags.bandwidth,
        plain=flags.plain,
        seed=flags.seed,
        schedule=flags.schedule or newest.schedule,
        memory_bytes=flags.memory,
    )


def _refuse_other_sources(flags: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go with --from-measurement."""
    given = {
        "a model file": flags.model,
        "--graph": flags.graph,
        "--fresh": flags.fresh or None,
        "--batch-size": flags.batch_size,
        "--microbatches": flags.microbatches,
        "--objective": flags.objective,
        "--cut-at": flags.cut_at,
        "--precision": flags.precision,
        "--granularity": flags.granularity,
        "--draw": flags.draw,
    }
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UsageError(
            f"--from-measurement and {wrong[0]}",
            "the model, its microbatches and its schedule are those that were measured",
            "for example: plan --from-measurement runs/x/measurement.json --profile x.profile.json",
        )
