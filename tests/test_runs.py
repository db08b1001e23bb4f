"""Runs: what is written, real data, bad data, other cuts, torchrun, the API."""

import dataclasses
import json
from pathlib import Path

import pytest

from planner.files.measurement_file import Measurement
from planner.files.plan_file import Baseline
from tests.running import command, plan_at, torchrun


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the plain model against other cuts, on two stages."""
    folder = tmp_path_factory.mktemp("run")
    plan = plan_at(Path(__file__).parent / "models" / "plain.py", ["5"])
    other = Baseline(step_ms=2.0, objective_ms=2.0, fits=None, cuts=("1",))
    plan = dataclasses.replace(plan, baselines={"equal_layers": other})
    plan.save(folder / "x.plan.json")
    ended = command("x.plan.json", "--steps", 4, "--against", "equal", "--stock", "--run-dir", "run", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder, ended


def test_a_run_leaves_its_files_and_names_them(finished):
    folder, ended = finished
    assert ended.stdout.rstrip().splitlines()[-1].startswith("wrote run/report.html")
    assert {path.name for path in (folder / "run").iterdir()} == {
        "report.html",
        "measurement.json",
        "metrics.jsonl",
        "trace.json",
    }
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert set(records[0]) == {"step", "loss", "step_ms", "learning_rate", "gradient_norm"}
    assert "<script" not in (folder / "run" / "report.html").read_text()


def test_every_stage_is_measured(finished):
    measurement = Measurement.load(finished[0] / "run" / "measurement.json")
    assert len(measurement.stages) == 2
    for stage in measurement.stages:
        assert stage.samples == 2 * 4  # steps 2 and 3 of 4 microbatches; 0 warms up, 1 measures memory
        assert stage.measured.forward_ms > 0 and stage.measured.backward_ms > 0
        assert stage.measured.peak_memory_bytes > 12 * 12 * 4
        assert stage.predicted.forward_ms == 1.0
    assert measurement.clock == "thread-cpu" and measurement.drift is None


def test_the_start_is_told_part_by_part(tmp_path):
    plan_at(Path(__file__).parent / "models" / "plain.py", ["5"]).save(tmp_path / "x.plan.json")
    result = command("x.plan.json", "--steps", 2, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    start = Measurement.load(tmp_path / "run" / "measurement.json").start
    assert start is not None and start.export_s is not None
    assert min(start.model_s, start.export_s, start.pipeline_s, start.stage_s) > 0
    assert start.export_s > 0.01 < start.pipeline_s
    for text in (result.stdout, (tmp_path / "run" / "report.html").read_text()):
        assert "until the last rank was ready" in text and "beyond it" in text


def test_with_split_spec_the_export_is_not_told_apart(finished):
    folder, result = finished
    start = Measurement.load(folder / "run" / "measurement.json").start
    assert start is not None and start.export_s is None
    assert start.pipeline_s > start.model_s > 0 and start.stage_s > 0
    for text in (result.stdout, (folder / "run" / "report.html").read_text()):
        assert "until the last rank was ready" in text and "with its export" in text and "beyond it" not in text


def test_the_speed_up_is_measured_in_pairs_with_an_interval(finished):
    speed_up = Measurement.load(finished[0] / "run" / "measurement.json").speed_up
    assert speed_up is not None and speed_up.cuts == ("1",) and speed_up.predicted == 2.0
    assert speed_up.low <= speed_up.measured <= speed_up.high and speed_up.pairs == 5
    assert "speed-up" in finished[1].stdout


def test_plan_report_shows_a_run_again(finished):
    folder, _ = finished
    files = ["run/measurement.json", "x.plan.json"]
    text = command(*files, module="runner.report_cli", cwd=folder)
    assert text.returncode == 0 and "stage" in text.stdout, text.stderr
    html = command(*files, "--format", "html", "-o", "again.html", module="runner.report_cli", cwd=folder)
    assert html.returncode == 0 and (folder / "again.html").read_text() == (folder / "run" / "report.html").read_text()
    trace = command(*files, "--format", "perfetto", module="runner.report_cli", cwd=folder)
    assert trace.returncode == 0 and trace.stdout == (folder / "run" / "trace.json").read_text()
    wrong = command("run/measurement.json", "--format", "html", module="runner.report_cli", cwd=folder)
    assert wrong.returncode == 2 and "name both files" in wrong.stderr


def test_one_step_is_a_run(finished, tmp_path):
    ended = command(finished[0] / "x.plan.json", "--steps", 1, "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    measurement = Measurement.load(tmp_path / "run" / "measurement.json")
    assert [step.step for step in measurement.steps] == [0]
    assert all(stage.samples == 4 and stage.measured.forward_ms > 0 for stage in measurement.stages)


def test_torchrun_is_another_launcher(finished, tmp_path):
    ended = torchrun(2, "-m", "runner", finished[0] / "x.plan.json", "--steps", 2, "--run-dir", tmp_path, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert Measurement.load(tmp_path / "measurement.json").steps[1].step == 1


def test_a_wrong_world_size_is_exit_2_with_the_remedy(finished, tmp_path):
    ended = torchrun(3, "-m", "runner", finished[0] / "x.plan.json", "--steps", 2, "--run-dir", tmp_path, cwd=tmp_path)
    assert ended.returncode != 0 and "3 workers for a plan of 2 stages" in ended.stderr
    assert "remedy: start 2 processes, or plan again with --gpus 3" in ended.stderr


def test_tolerance_is_exit_3(finished, tmp_path):
    plan = finished[0] / "x.plan.json"
    ended = command(plan, "--steps", 2, "--tolerance", "1%", "--run-dir", tmp_path, cwd=tmp_path)
    assert ended.returncode == 3 and "off by more than 1 %" in ended.stderr
    assert (tmp_path / "measurement.json").exists()


BATCHES = """
import torch
def batches(batch_size):
    for rows in ({sizes}):
        yield torch.randn(rows, 12), torch.randint(0, 3, (rows,))
"""


def model_with(tmp_path, more, models):
    file = tmp_path / "model.py"
    file.write_text((models / "plain.py").read_text() + more)
    plan_at(file, ["5"]).save(tmp_path / "x.plan.json")
    return tmp_path / "x.plan.json"


def test_a_batch_that_does_not_divide_is_dropped_and_said(tmp_path, models):
    plan = model_with(tmp_path, BATCHES.format(sizes="8, 8, 3"), models)
    ended = command(plan, "--steps", 3, "--check", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "dropped a batch of 3 samples" in ended.stderr


def test_data_without_a_full_batch_is_refused(tmp_path, models):
    plan = model_with(tmp_path, BATCHES.format(sizes="3,"), models)
    ended = command(plan, "--steps", 1, cwd=tmp_path)
    assert ended.returncode == 2 and "gave no batch of 8 samples" in ended.stderr


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, models):
    more = "\ndef loss_fn(output, targets):\n    return nn.functional.cross_entropy(output, targets) * float('nan')\n"
    ended = command(model_with(tmp_path, more, models), "--steps", 2, cwd=tmp_path)
    assert ended.returncode == 1 and "the loss is nan at step 0" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_error_in_loss_fn_shows_the_users_line(tmp_path, models):
    more = "\ndef loss_fn(output, targets):\n    return output.no_such_thing\n"
    ended = command(model_with(tmp_path, more, models), "--steps", 2, cwd=tmp_path)
    assert ended.returncode == 2
    assert "return output.no_such_thing" in ended.stderr and "Traceback" not in ended.stderr


def test_ranks_that_draw_different_batches_are_found(tmp_path, models):
    more = "\nimport os\ndef make_batch(batch_size):\n    rank = int(os.environ.get('RANK', 0))\n"
    more += "    return torch.randn(batch_size, 12) + rank, torch.randint(0, 3, (batch_size,))\n"
    ended = command(model_with(tmp_path, more, models), "--steps", 1, cwd=tmp_path)
    assert ended.returncode == 2 and "different batches" in ended.stderr


def test_the_api_trains_and_compares(tmp_path, models):
    from runner import compare, train

    plan = plan_at(models / "plain.py", ["5"])
    measurement = train(plan, steps=3, check=True, device="cpu")
    assert measurement.check is not None and measurement.check.max_gradient_difference == 0.0
    assert len(compare(plan, measurement).stages) == 2


def test_advised_commands_name_the_model_from_where_the_run_was_started(tmp_path, models):
    (tmp_path / "plans").mkdir()
    (tmp_path / "model.py").write_text((models / "plain.py").read_text())
    plan = plan_at(tmp_path / "model.py", ["5"])
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, file="../model.py"))
    plan.save(tmp_path / "plans" / "x.plan.json")
    ended = command("plans/x.plan.json", "--steps", 2, "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "plan --gpus 2 model.py" in ended.stdout and "../model.py" not in ended.stdout
