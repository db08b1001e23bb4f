"""Rehearsals: what a stage alone computes, holds and takes is what it computes, holds and takes in the pipeline."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from planner.errors import UsageError
from planner.files.measurement_file import Measurement
from planner.run_flags import add_run_flags, run_arguments
from planner.tracing.loading import load_source, make_batch
from runner import cli
from runner.gathering import build_measurement
from runner.loopback import Boundaries
from runner.options import parse_options
from runner.rehearsing import RehearsedStage, rehearse_step
from runner.stages import build_stages
from tests.running import command, plan_at
from tests.sample_values import MACHINE
from tests.working_clock import WorkingDevice


@pytest.mark.parametrize(
    ("name", "cuts", "schedule"),
    [("skips.py", ["layers.1.widen", "layers.3"], "gpipe"), ("convolutional.py", ["down.1.norm", "up.1"], "1f1b")],
)
def test_a_rehearsal_computes_and_holds_what_a_run_does(models, tmp_path, name, cuts, schedule):
    plan = dataclasses.replace(plan_at(models / name, cuts, 6, 12), schedule=schedule)
    plan.save(tmp_path / "x.plan.json")
    for folder, flags in (("run", []), ("rehearsal", ["--rehearse"])):
        ended = command("x.plan.json", "--steps", 4, "--run-dir", folder, *flags, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
    run, rehearsal = (Measurement.load(tmp_path / folder / "measurement.json") for folder in ("run", "rehearsal"))
    assert [step.loss for step in rehearsal.steps] == [step.loss for step in run.steps]
    assert [step.gradient_norm for step in rehearsal.steps] == [step.gradient_norm for step in run.steps]
    peaks = [[stage.measured.peak_memory_bytes for stage in m.stages] for m in (rehearsal, run)]
    assert peaks[0] == peaks[1] and None not in peaks[0]
    assert rehearsal.rehearsed and rehearsal.step_clock == "simulated" and not run.rehearsed
    assert (
        "rehearsed one after the other" in ended.stdout
        and "rehearsed" in (tmp_path / folder / "report.html").read_text()
    )


@pytest.mark.parametrize(("name", "cuts"), [("skips.py", 4), ("convolutional.py", 2)])
def test_a_rehearsal_trains_as_the_unsplit_model(models, tmp_path, name, cuts):
    plan_at(models / name, cuts).save(tmp_path / "x.plan.json")
    flags = ["--steps", 3, "--check", "--run-dir", "run", "--export-weights", "w.safetensors"]
    ended = command("x.plan.json", "--rehearse", *flags, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    check = Measurement.load(tmp_path / "run" / "measurement.json").check
    assert check is not None and check.steps == 3 and check.max_parameter_difference < 1e-5
    assert (tmp_path / "w.safetensors").exists()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


MODEL = """
import torch
from tests.working_clock import Layer

def build_model():
    return torch.nn.Sequential(Layer(1.0, 3.0), Layer(2.0, 4.0), Layer(4.0, 5.0))

def make_batch(batch_size):
    return torch.randn(batch_size, 3), torch.randn(batch_size, 3)

def loss_fn(output, targets):
    return ((output - targets) ** 2).mean()
"""


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_times_and_the_step_simulated_from_them_are_exact(alone, tmp_path, schedule):
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    plan = dataclasses.replace(plan_at(file, ["1", "2"], 4, 4), schedule=schedule)
    source, device, boundaries = load_source(str(file)), WorkingDevice(), Boundaries()
    built = build_stages(plan, source, range(3), device)
    stages = [RehearsedStage(plan, source, stage, device, boundaries) for stage in built]
    steps = [rehearse_step(stages, n, make_batch(source, plan.seed, n, plan.batch_size)) for n in range(3)]
    measured = build_measurement(
        plan, list(zip(*steps, strict=True)), MACHINE, "thread-cpu", None, None, None, rehearsed=True
    )
    figures = [(s.measured.forward_ms, s.measured.backward_ms, s.measured.backward_first_ms) for s in measured.stages]
    assert figures == [(1.0, 3.0, 3.0), (2.0, 4.0, 4.0), (4.0, 5.0, 5.0)]
    # the last stage starts after 1 + 2, never waits, and what follows its last backward is 4 + 3
    assert measured.step_ms.measured == 3 + 4 * (4 + 5) + 7
    assert measured.stages[0].samples == 4  # step 2 of 4 microbatches; 0 warms up, 1 measures memory


def test_a_stage_leaves_nothing_on_the_device_to_the_next(models, alone):
    plan = plan_at(models / "skips.py", 4)
    source, boundaries = load_source(str(plan.model.file)), Boundaries()
    built = build_stages(plan, source, range(4), WorkingDevice())
    stages = [RehearsedStage(plan, source, stage, WorkingDevice(), boundaries) for stage in built]
    batch = make_batch(source, plan.seed, 0, plan.batch_size)
    for stage in stages[:-1]:
        stage.fill(batch)
    for stage in reversed(stages):
        stage.run(batch, memory=False)
        assert not (stage.targets or stage.sent.held or stage.stage.output_chunks or stage.stage.fwd_cache)
        assert stage.stage.is_last == bool(stage.losses) and not any(loss.requires_grad for loss in stage.losses)


def test_stages_of_one_process_share_nothing(models, alone):
    plan = plan_at(models / "skips.py", 4)
    source = load_source(str(plan.model.file))
    stages = list(build_stages(plan, source, range(4), WorkingDevice()))
    held = [{p.data_ptr() for p in s.stage.submod.parameters()} for s in stages]
    assert plan.tied and sum(map(len, held)) == len(set().union(*held))
    for entry in plan.tied:
        first, *others = (dict(stages[k].stage.submod.named_parameters())[entry.name] for k in entry.stages)
        assert all(torch.equal(first, other) for other in others)


def test_fewer_gpus_than_stages_are_told_of_the_rehearsal(monkeypatch):
    monkeypatch.setattr("planner.profiling.profiler.device_kind", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError) as raised:
        cli.refuse_impossible(parse_options(["x.plan.json"]), 4)
    assert "--rehearse" in raised.value.remedy and "--device cpu" in raised.value.remedy
    cli.refuse_impossible(parse_options(["x.plan.json", "--rehearse"]), 4)


def test_two_cuts_are_not_rehearsed_against_each_other():
    with pytest.raises(UsageError, match="--rehearse with --against"):
        cli.refuse_impossible(parse_options(["x.plan.json", "--rehearse", "--against", "equal"]), 2)


def test_plan_train_hands_the_rehearsal_on():
    parser = argparse.ArgumentParser()
    add_run_flags(parser)
    assert run_arguments(parser.parse_args(["--rehearse", "--check"])) == ["--check", "--rehearse"]
    assert parse_options(["x.plan.json", "--rehearse"]).steps < parse_options(["x.plan.json"]).steps
    assert parse_options(["x.plan.json", "--rehearse", "--steps", "3"]).steps == 3
    assert Path("x.plan.json") == parse_options(["x.plan.json"]).plan
