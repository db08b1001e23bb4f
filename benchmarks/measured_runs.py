"""A plan, run or rehearsed on this machine, as its measurement: what the benchmarks that measure have in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from runner.cli import launch
from runner.options import parse_options

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ZOO = Path(__file__).resolve().parent.parent / "tests" / "zoo"


def run(plan: Plan, folder: Path, *, steps: int, rehearse: bool) -> Measurement:
    """Run `plan` for `steps` steps, or rehearse it; everything that the run writes lies in `folder`.

    Raises what made the run fail.
    """
    arguments = arguments_for(plan, folder, steps=steps, rehearse=rehearse)
    launch(parse_options(arguments), arguments)
    return Measurement.load(folder / "measurement.json")


def arguments_for(plan: Plan, folder: Path, *, steps: int, rehearse: bool) -> list[str]:
    """The command line of such a run of `plan`, which is written to `folder`."""
    assert plan.model.file is not None, "a plan of a layer graph cannot be run"
    file = folder / "plan.json"
    replace(plan, model=replace(plan.model, file=str(Path(plan.model.file).resolve()))).save(file)
    arguments = [str(file), "--steps", str(steps), "--quiet", "--run-dir", str(folder)]
    return [*arguments, "--rehearse"] if rehearse else arguments
