"""How far the machine changed from a plan's profile until after its run: the profile is made a second time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import FileError, UsageError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.intervals import profile_drift

if TYPE_CHECKING:
    from runner.options import RunOptions


def first_profile(plan: Plan, path: Path, device: str | None = None) -> Profile:
    """The profile in `path`, at the size that `plan` was made for.

    Raises UsageError where it is not the plan's own, or was made on another machine than that of `device`.
    """
    from planner.machine.device import choose_device, describe_machine

    profile = Profile.load(path)
    remedy = "name the profile that the plan was made from"
    if profile.estimated is not None:
        raise UsageError(f"--drift {path}, which is an estimate", "what was not measured cannot be repeated", remedy)
    size = profile.size(plan.microbatch_size)
    if plan.model.fingerprint != size.fingerprint:
        raise UsageError(f"--drift {path}, which is of another model", "the drift is that since the profile", remedy)
    if not profile.machine.same_as(describe_machine(choose_device(device))):
        rule = "the drift is that of one machine and its software"
        got = f"--drift {path}, which was made on another machine or with other versions"
        raise UsageError(got, rule, "profile the model again here, with plan --fresh")
    return replace(profile, sizes=(size,))


def profile_again(first: Profile, plan: Plan, options: RunOptions) -> Profile:
    """What `first` was, made once more as it was made then: the same size, as many copies at once."""
    from planner.profiling.profiler import profile_model
    from planner.progress import profile_progress
    from runner.worker import model_of

    with profile_progress() as progress:
        return profile_model(
            model_of(options, plan),
            batch_size=first.batch_size,
            microbatch_sizes=(plan.microbatch_size,),
            num_workers=first.concurrent_copies,
            num_stages=plan.num_stages,
            device=options.device,
            seed=plan.seed,
            meta=first.model.meta,
            precision=first.precision,
            granularity=first.granularity,
            schedule=first.schedule or "gpipe",
            progress=progress,
        )


def note_drift(run_dir: Path, before: Profile, after: Profile) -> Measurement:
    """Write into `run_dir`/measurement.json by how much the machine changed between two profiles around the run.

    Raises FileError where the profiles cannot be compared.
    """
    drift = profile_drift(before, after)
    if drift is None:
        raise FileError(
            "two profiles of other models, machines, versions or sizes",
            "the drift is that between profiles of one model on one machine, at the same microbatch size",
            "profile the model of the run again, on the machine that runs it",
        )
    measurement = replace(Measurement.load(run_dir / "measurement.json"), drift=drift)
    measurement.save(run_dir / "measurement.json")
    return measurement


def measure_drift(plan: Plan, first: Profile, options: RunOptions) -> str:
    """Profile again after a run, write the drift into its measurement and report, and say what it was."""
    from planner.rendering import format_percent
    from runner.writing import write_report

    measurement = note_drift(options.run_dir, first, profile_again(first, plan, options))
    write_report(options, plan, measurement)
    assert measurement.drift is not None
    return (
        f"drift of the machine since {options.drift}: {format_percent(measurement.drift, signed=True)},"
        f" now in {options.run_dir / 'report.html'} and measurement.json"
    )
