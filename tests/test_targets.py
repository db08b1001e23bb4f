"""What is written: through links, with the right mode, and refused before the work where it cannot be written."""

import json
import os
import stat

import pytest
import torch

from planner.cli import main
from planner.errors import FileError, UsageError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.reading import refuse_unwritable, write_text
from runner.cli import main as run_plan
from runner.weights import write_weights
from tests.conftest import MODELS
from tests.running import command, plan_at

GRAPH = {
    "schema": "evenstage/layer-graph/1",
    "nodes": [{"id": name, "forward_ms": 1.0, "backward_ms": 2.0} for name in "abcd"],
    "edges": [{"source": a, "target": b} for a, b in zip("abc", "bcd", strict=True)],
    "graph": {"tensors": []},
    "directed": True,
    "multigraph": False,
}


@pytest.fixture
def graph(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.json").write_text(json.dumps(GRAPH))
    return ["--graph", "g.json", "--gpus", "2", "--microbatches", "4"]


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("there/real.json")
    write_text(link, "one")
    write_text(link, "two")
    assert link.is_symlink() and (tmp_path / "there" / "real.json").read_text() == "two"
    assert os.listdir(tmp_path / "there") == ["real.json"]


@pytest.mark.parametrize(
    "write", [lambda path: write_text(path, "x"), lambda path: write_weights(path, {"w": torch.ones(2)})]
)
def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_keeps_its_own(tmp_path, umask, write):
    write(tmp_path / "new")
    assert mode(tmp_path / "new") == 0o640
    (tmp_path / "old").touch()
    (tmp_path / "old").chmod(0o604)
    write(tmp_path / "old")
    assert mode(tmp_path / "old") == 0o604


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for write in (write_text, write_weights):
        with pytest.raises(FileError, match="not a file"):
            write(tmp_path / "pipe", {} if write is write_weights else "")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_only_a_full_disk_is_told_to_free_space(tmp_path):
    with pytest.raises(FileError) as caught:
        write_text(tmp_path, "x")
    assert "free space" not in str(caught.value) and caught.value.got.endswith("it is not a file")
    (tmp_path / "file").touch()
    with pytest.raises(FileError) as caught:
        write_text(tmp_path / "file" / "x", "x")
    assert "free space" not in str(caught.value)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (".", "-o . is a folder"),
        ("", 'error: -o ""'),
        ("g.json/x.json", "Not a directory"),
        ("/proc/evenstage/x.json", "cannot be written"),
        ("./g.json", "may not overwrite what it is made from"),
        ("link.json", "may not overwrite what it is made from"),
    ],
)
def test_a_bad_output_is_refused(graph, tmp_path, capsys, output, expected):
    (tmp_path / "link.json").symlink_to("g.json")
    assert main([*graph, "-o", output]) == 2
    error = capsys.readouterr().err
    assert expected in error and "remedy: " in error and "free space" not in error
    assert json.loads((tmp_path / "g.json").read_text()) == GRAPH


MODEL = "import pathlib\npathlib.Path(__file__).with_name('worked').touch()\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-o", "model.py"], "may not overwrite"),
        (["-o", "../{name}/model.py"], "may not overwrite"),
        (["-o", "old.py"], "the profile old.profile.json is a folder"),
        (["--train", "--run-dir", "model.py"], "--run-dir model.py is a file"),
        (["--train", "--export-weights", "."], "--export-weights . is a folder"),
        (["--train", "--export-weights", "model.py"], "may not overwrite"),
    ],
)
def test_plan_refuses_bad_targets_before_it_works(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "old.profile.json").mkdir()
    arguments = [argument.replace("{name}", tmp_path.name).replace("old.py", "old") for argument in arguments]
    assert main(["--gpus", "2", "model.py", *arguments]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "worked").exists()
    assert (tmp_path / "model.py").read_text() == MODEL


def test_plan_does_not_overwrite_its_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.profile.json").write_text("{}")
    assert main(["--gpus", "2", "--profile", "x.profile.json", "-o", "x.profile.json"]) == 2
    assert "may not overwrite" in capsys.readouterr().err and (tmp_path / "x.profile.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--run-dir", "x.plan.json"], "--run-dir x.plan.json is a file"),
        (["--run-dir", "/proc/evenstage"], "cannot be written"),
        (["--export-weights", "x.plan.json/w"], "Not a directory"),
        (["--export-weights", "x.plan.json"], "may not overwrite"),
        (["--export-weights", str(MODELS / "plain.py")], "may not overwrite"),
        (["--export-weights", "/dev/null"], "is a device"),
    ],
)
def test_run_plan_refuses_bad_targets_before_it_works(tmp_path, models, monkeypatch, capsys, arguments, expected):
    plan_at(models / "plain.py", ["5"]).save(tmp_path / "x.plan.json")
    monkeypatch.chdir(tmp_path)

    def never(*_):
        raise AssertionError("workers were started")

    monkeypatch.setattr("planner.machine.workers.run_workers", never)
    assert run_plan(["x.plan.json", "--device", "cpu", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert Plan.load("x.plan.json").num_stages == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        refuse_unwritable(tmp_path / "deep" / "x.json", "-o x.json")
    tmp_path.chmod(0o700)


def test_weights_that_cannot_be_written_do_not_cost_the_measurement(tmp_path, models, monkeypatch):
    plan_at(models / "plain.py", ["5"]).save(tmp_path / "x.plan.json")
    monkeypatch.setenv("SABOTAGE", "disk")
    line = ["x.plan.json", "--steps", 2, "--run-dir", "run", "--export-weights", "w.safetensors"]
    ended = command(*line, cwd=tmp_path, module="tests.sabotaged_run")
    assert ended.returncode == 2 and "cannot write w.safetensors: No space left" in ended.stderr
    assert "wrote run/report.html" in ended.stdout
    assert len(Measurement.load(tmp_path / "run" / "measurement.json").steps) == 2


def test_a_missing_profile_of_the_drift_and_one_that_is_not_used_are_seen_before_the_work(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.profile.json").write_text("{}")
    assert main(["--gpus", "2", "--profile", "x.profile.json", "--train", "--drift", "none.json"]) == 2
    assert "none.json, which is no file" in capsys.readouterr().err
    assert main(["--gpus", "2", "--profile", "x.profile.json", "--fresh"]) == 2
    assert "--profile and --fresh" in capsys.readouterr().err
