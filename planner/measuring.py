"""A model file → Profile, for callers from Python: measured, or estimated without a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from planner.errors import FileError
from planner.files.profile_file import Granularity, Profile, Schedule
from planner.intervals import with_repeat
from planner.planning import measure as measure_request
from planner.request import PlanRequest, candidate_counts, resolve_batch_size, resolve_precision


def remember(profile: Profile, path: Path) -> Profile:
    """`profile` with what an older one in `path`, of the same model on this machine, shows of the machine's drift."""
    if not path.exists():
        return profile
    try:
        return with_repeat(profile, Profile.load(path))
    except FileError:
        return profile


def measure(
    model: str | Path,
    gpus: int,
    *,
    batch_size: int | None = None,
    microbatches: int | None = None,
    device: str | None = None,
    seed: int = 0,
    meta: bool = False,
    precision: Literal["fp32", "bf16"] | None = None,
    schedule: Schedule = "gpipe",
    granularity: Granularity = "module",
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Profile:
    """Measure every layer of `model` ("file.py" or "file.py:name") as `gpus` workers on this machine would run it.

    Under `schedule`; layers begin as `granularity` says. Times are milliseconds per microbatch, sizes bytes, at every
    microbatch size that a plan for `gpus` stages may choose (one with `microbatches`). `make_plan` takes the result in
    place of the file, and needs no hardware then. Raises ModelFileError, TraceError, ProfileError or UsageError; see
    `planner.errors`.

        profile = planner.measure("model.py", gpus=4)
        profile.save(Path("model.profile.json"))
        plan = planner.make_plan(profile, gpus=4)
    """
    request = PlanRequest(
        gpus,
        batch_size,
        microbatches,
        device,
        seed=seed,
        schedule=schedule,
        meta=meta,
        precision=precision,
        granularity=granularity,
    )
    return measure_request(str(model), request, progress)


def estimate(
    model: str | Path,
    gpus: int,
    *,
    peak: str | None = None,
    batch_size: int | None = None,
    microbatches: int | None = None,
    seed: int = 0,
    meta: bool = False,
    precision: Literal["fp32", "bf16"] | None = None,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Profile:
    """`measure` without a run: FLOPs and bytes of every layer at a device's `peak`, marked `estimated`.

    `peak` is a name such as "h100", or "FLOPS,BYTES/s"; None is one thread of this CPU. Raises as `measure` does.

        plan = planner.make_plan(planner.estimate("model.py", gpus=4, peak="h100"), gpus=4)
    """
    from planner.profiling.estimate import estimate_model

    request = PlanRequest(gpus, batch_size, microbatches, seed=seed, meta=meta, precision=precision)
    total = resolve_batch_size(str(model), request)
    return estimate_model(
        str(model),
        batch_size=total,
        microbatch_sizes=tuple(total // count for count in candidate_counts(total, request)),
        peak=peak,
        seed=seed,
        meta=meta,
        precision=resolve_precision(str(model), request),
        progress=progress,
    )
