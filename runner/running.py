"""`train(plan)`: the run of `run-plan` as a function, for notebooks and scripts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from planner.errors import UsageError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan


def train(
    plan: Plan,
    *,
    model: str | Path | None = None,
    steps: int = 20,
    check: bool = False,
    device: str | None = None,
    weights: Path | str | None = None,
    run_dir: Path | str | None = None,
) -> Measurement:
    """Train `plan` with one worker per stage on this machine and return what was measured.

    `model` overrides the plan's model file, whose path in the plan is taken as it stands. The run's files go to
    `run_dir` where it is given; training starts from the safetensors in `weights` where they are given.
    Raises the family of PlannerError, CheckError where `check` finds a difference.
    """
    from runner.cli import launch
    from runner.options import parse_options

    named = model if model is not None else plan.model.file
    if named is None:
        raise UsageError("the plan names no model file", "training needs the model", "give model=FILE")
    specification = str(named) if model is not None else f"{Path(named).resolve()}:{plan.model.entry}"
    with tempfile.TemporaryDirectory(prefix="evenstage-run-") as folder:
        path = Path(folder, f"{plan.model.name}.plan.json")
        plan.save(path)
        results = Path(run_dir) if run_dir is not None else Path(folder, "run")
        arguments = [str(path), "--model", specification, "--steps", str(steps), "--run-dir", str(results), "--quiet"]
        arguments += ["--check"] if check else []
        arguments += ["--device", device] if device is not None else []
        arguments += ["--weights", str(weights)] if weights is not None else []
        launch(parse_options(arguments), arguments)
        return Measurement.load(results / "measurement.json")
