"""--drift: a second profile after the run, what is refused before it, and where the drift is said."""

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from planner.errors import FileError, ToleranceError, UsageError
from planner.files.measurement_file import Measurement
from planner.files.profile_file import LayerProfile, ModelReference, Peak, Profile, SizeProfile
from planner.machine.device import CpuDevice, describe_machine
from planner.machine.workers import ERROR_FOLDER
from planner.planning import plan_profile
from planner.request import PlanRequest
from planner.scheduling.simulation import StageTimes
from runner import cli
from runner.options import parse_options
from runner.worker import open_context
from tests.sample_values import make_measurement_value

MODEL = Path(__file__).parent / "models" / "plain.py"
MACHINE = describe_machine(CpuDevice())


def profile(factor: float = 1.0, sizes: tuple[int, ...] = (2, 4)) -> Profile:
    layers = tuple(
        LayerProfile(str(i), str(i), "Linear", i, factor, 0.0, factor, 0.0, factor, 0.0, 8, (), True) for i in range(4)
    )
    found = tuple(SizeProfile(size, f"trace {size}", layers, (), (), 0.01) for size in sizes)
    return Profile(ModelReference(str(MODEL), "trace 2"), MACHINE, "bf16", 16, 5, 0.0, 3, found, schedule="1f1b")


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A plan with its profile, a machine 10 % slower at the second one, and what that was asked for."""
    profile().save(tmp_path / "x.profile.json")
    plan = plan_profile(profile(), PlanRequest(2, microbatches=8))
    plan.save(tmp_path / "x.plan.json")
    asked: list[dict[str, object]] = []

    def again(model: str, **wanted: object) -> Profile:
        asked.append({"model": model, **wanted})
        return profile(1.1, (2,))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("planner.profiling.profiler.profile_model", again)
    return plan, asked


def workers(plan, monkeypatch, error=None):
    """Instead of workers, a run that takes what was planned, and ends with `error`."""

    def run(module, arguments, num_workers, environment):
        times = [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in plan.stages]
        replace(make_measurement_value(plan, times), drift=None).save(Path("run", "measurement.json"))
        if error is not None:
            raise error

    monkeypatch.setattr("planner.machine.workers.run_workers", run)


ARGUMENTS = ["x.plan.json", "--model", str(MODEL), "--drift", "x.profile.json", "--run-dir", "run", "--device", "cpu"]


def test_the_drift_is_measured_after_the_run_and_said(planned, monkeypatch, capsys):
    plan, asked = planned
    workers(plan, monkeypatch)
    assert cli.launch(parse_options(ARGUMENTS), ARGUMENTS) == 0
    (wanted,) = asked
    del wanted["progress"]
    assert wanted == {
        "model": str(MODEL),
        "batch_size": 16,
        "microbatch_sizes": (2,),
        "num_workers": 3,
        "num_stages": 2,
        "device": "cpu",
        "seed": 0,
        "meta": False,
        "precision": "bf16",
        "granularity": "module",
        "schedule": "1f1b",
    }
    assert Measurement.load(Path("run", "measurement.json")).drift == pytest.approx(0.1)
    assert re.search("drift of the machine \\+10\\s%", html.unescape(Path("run", "report.html").read_text()))
    assert capsys.readouterr().out == (
        "drift of the machine since x.profile.json: +10 %, now in run/report.html and measurement.json\n"
    )


def test_a_prediction_outside_the_tolerance_has_its_drift_too(planned, monkeypatch):
    plan, asked = planned
    workers(plan, monkeypatch, ToleranceError("off"))
    with pytest.raises(ToleranceError, match="off"):
        cli.launch(parse_options(ARGUMENTS), ARGUMENTS)
    assert len(asked) == 1 and Measurement.load(Path("run", "measurement.json")).drift == pytest.approx(0.1)


def test_a_run_that_fails_is_not_profiled_again(planned, monkeypatch):
    plan, asked = planned
    workers(plan, monkeypatch, FileError("full"))
    with pytest.raises(FileError, match="full"):
        cli.launch(parse_options(ARGUMENTS), ARGUMENTS)
    assert not asked


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"estimated": Peak("a peak", 1e12, 1e9, "given")}, UsageError, "an estimate"),
        ({"sizes": profile().sizes[1:]}, FileError, "microbatches of 2 were not profiled"),
        ({"sizes": (replace(profile().sizes[0], fingerprint="other"),)}, UsageError, "another model"),
        ({"machine": replace(MACHINE, device_name="other")}, UsageError, "another machine"),
        ({"machine": replace(MACHINE, versions={"torch": "1.0"})}, UsageError, "other versions"),
        ({"sizes": (replace(profile().sizes[0], microbatch_size=8),)}, FileError, "2"),
    ],
)
def test_a_profile_of_something_else_is_refused_before_the_run(planned, monkeypatch, change, error, words):
    plan, asked = planned
    replace(profile(), **change).save("x.profile.json")
    workers(plan, monkeypatch, AssertionError("it ran"))
    with pytest.raises(error, match=words):
        cli.launch(parse_options(ARGUMENTS), ARGUMENTS)
    assert not asked


def test_another_launcher_is_refused(planned, monkeypatch):
    monkeypatch.delenv(ERROR_FOLDER, raising=False)
    with pytest.raises(UsageError, match="another launcher"):
        open_context(parse_options(ARGUMENTS))
