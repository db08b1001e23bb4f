"""`--tensorboard DIR`: what a run writes there, and that TensorBoard's profiler plugin opens all of it."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from planner.errors import UsageError
from planner.files.measurement_file import Measurement
from planner.machine.memory_events import without_profilers_lines
from planner.run_flags import run_arguments
from runner.options import parse_options
from runner.tensorboard_run import refuse_unusable, remove_earlier, run_name, stage_trace
from tests.running import command, plan_at, torchrun

STEPS, MICROBATCHES = 8, 4
PROFILED = (5, 6, 7)
PLUGIN = "/data/plugin/pytorch_profiler"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the plain model on two stages with `--tensorboard`, after an earlier run with more stages."""
    folder = tmp_path_factory.mktemp("tensorboard")
    plan_at(Path(__file__).parent / "models" / "plain.py", ["5"], MICROBATCHES).save(folder / "x.plan.json")
    earlier = stage_trace(folder / "tb", "run", 2, 3)
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"traceEvents": []}')
    ended = command("x.plan.json", "--steps", STEPS, "--tensorboard", "tb", "--run-dir", "run", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-3].startswith("profiled steps 5 to 7 after warming up in step 4")
    assert ended.stdout.splitlines()[-1].endswith("trace.json, tb/run")
    assert ended.stderr == ""
    return folder


def profile_of(folder: Path, stage: int) -> dict[str, Any]:
    """The trace that torch's profiler wrote for a stage."""
    return json.loads((folder / "tb" / "run" / "profiled" / f"stage_{stage}.pt.trace.json").read_text())


def ranges(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The named ranges of a profile by step, in order of time; the steps' own are left out."""
    events = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    found = {}
    for step in (event for event in events if event["name"].startswith("ProfilerStep#")):
        end = step["ts"] + step["dur"]
        inside = [event for event in events if step["ts"] <= event["ts"] < end and event is not step]
        found[step["name"]] = sorted(inside, key=lambda event: event["ts"])
    return found


def test_a_folder_of_json_and_nothing_of_an_earlier_run(folder):
    files = {str(path.relative_to(folder / "tb")) for path in (folder / "tb").rglob("*") if path.is_file()}
    profiles = {f"run/profiled/stage_{stage}.pt.trace.json" for stage in (0, 1)}
    assert files == profiles | {f"run/timeline/{name}.pt.trace.json" for name in ("predicted", "measured")}
    for name in files:
        assert json.loads((folder / "tb" / name).read_text())["traceEvents"]


@pytest.mark.parametrize("stage", [0, 1])
def test_stage_and_microbatch_are_ranges_of_the_last_steps(folder, stage):
    trace = profile_of(folder, stage)
    assert {"rank": stage, "world_size": 2}.items() <= trace["distributedInfo"].items()
    steps = ranges(trace)
    assert sorted(steps) == [f"ProfilerStep#{number}" for number in PROFILED]
    for events in steps.values():
        own = [event for event in events if event["name"].startswith(f"stage {stage} ")]
        names = [event["name"].removeprefix(f"stage {stage} ") for event in own]
        losses = [f"loss mb {i}" for i in range(MICROBATCHES)]
        forward = [f"forward mb {i}" for i in range(MICROBATCHES)]
        if stage == 1:
            forward = [name for pair in zip(forward, losses, strict=True) for name in pair]
        backward = [f"backward mb {i}" for i in range(MICROBATCHES)]
        assert names == [*forward, *backward, "optimizer", "wait for the slowest"]
        for before, after in pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"]


def test_profiled_steps_are_trained_but_not_timed(folder):
    measurement = Measurement.load(folder / "run" / "measurement.json")
    assert [record.step for record in measurement.steps] == list(range(STEPS))
    timed = STEPS - 2 - 4  # the first warms up, the second measures memory, the last four are profiled
    assert [stage.samples for stage in measurement.stages] == [timed * MICROBATCHES] * 2
    plain = command("x.plan.json", "--steps", STEPS, "--run-dir", "plain", cwd=folder)
    assert plain.returncode == 0, plain.stderr
    without = Measurement.load(folder / "plain" / "measurement.json")
    assert [record.loss for record in measurement.steps] == [record.loss for record in without.steps]


def test_the_timeline_has_the_predicted_and_the_measured_step(folder):
    measurement = Measurement.load(folder / "run" / "measurement.json")
    for name in ("predicted", "measured"):
        trace = json.loads((folder / "tb" / "run" / "timeline" / f"{name}.pt.trace.json").read_text())
        length = next(event["dur"] for event in trace["traceEvents"] if event["name"] == "ProfilerStep#0")
        ends = [
            event["ts"] + event["dur"] for event in trace["traceEvents"] if event.get("pid") in (0, 1) and "ts" in event
        ]
        assert length == max(ends) == pytest.approx(trace["otherData"]["step_ms"] * 1e3, abs=0.125)
        figures = [getattr(stage, name) for stage in measurement.stages]
        busy = sum(4 * f.forward_ms + 3 * f.backward_ms + f.backward_first_ms + f.optimizer_ms for f in figures)
        tasks = [event["dur"] for event in trace["traceEvents"] if "microbatch" in event.get("args", {})]
        assert len(tasks) == 2 * 2 * MICROBATCHES
        optimizers = [event["dur"] for event in trace["traceEvents"] if event["name"] == "optimizer"]
        assert sum(tasks) + sum(optimizers) == pytest.approx(busy * 1e3, abs=18 * 0.125)


class Server:
    """TensorBoard on a free port, and the profiler plugin's own routes."""

    def __init__(self, logdir: Path) -> None:
        line = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0"]
        self.log = logdir.with_name("tensorboard.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        self.address = self._until(lambda: re.search(r"at (http://\S+?)/ ", self.log.read_text()))[1]

    def _until(self, ready: Any, seconds: float = 120) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if found := ready():
                return found
            time.sleep(0.5)
        raise AssertionError(self.log.read_text())

    def runs(self) -> list[str]:
        """The names of all runs, once all are loaded."""
        return self._until(lambda: (found := self.get("runs"))["runs"] and not found["loading"] and found)["runs"]

    def get(self, route: str, **query: str) -> Any:
        """The JSON that a route of the plugin answers with."""
        address = f"{self.address}{PLUGIN}/{route}?{urlencode(query)}"
        with urlopen(Request(address, headers={"Accept-Encoding": "gzip"}), timeout=60) as answer:
            data = answer.read()
        return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(folder):
    """TensorBoard over the folder of the run."""
    server = Server(folder / "tb")
    yield server
    server.stop()


def test_the_plugin_shows_one_run_of_the_stages_and_one_of_the_steps(server):
    assert set(server.runs()) == {"run/profiled", "run/timeline"}
    assert {"Overview", "Operator", "Trace", "Distributed", "Memory"} <= views(server, "run/profiled")
    assert server.get("workers", run="run/profiled", view="Overview") == ["stage_0", "stage_1"]
    assert {"Overview", "Trace"} <= views(server, "run/timeline")
    assert server.get("workers", run="run/timeline", view="Trace") == ["measured", "predicted"]


def views(server: Server, run: str) -> set[str]:
    """The views that the plugin offers for a run."""
    return set(server.get("views", run=run))


@pytest.mark.parametrize("stage", [0, 1])
def test_the_plugin_opens_every_view_of_a_stage(server, folder, stage):
    server.runs()
    query = {"run": "run/profiled", "worker": f"stage_{stage}", "span": "default"}
    overview = server.get("overview", **query, view="Overview")
    assert [row[0] for row in overview["steps"]["rows"]] == [str(number) for number in PROFILED]
    operators = server.get("operation/table", **query, view="Operator", group_by="Operation")
    assert any(row["name"] == "aten::addmm" for row in operators["data"])
    trace = server.get("trace", **query, view="Trace")
    assert len(trace["traceEvents"]) >= len(profile_of(folder, stage)["traceEvents"])
    assert server.get("memory", **query, view="Memory")


def test_the_plugin_compares_the_stages(server):
    server.runs()
    query = {"run": "run/profiled", "worker": "All", "span": "default", "view": "Distributed"}
    for route in ("overlap", "waittime"):
        by_step = server.get(f"distributed/{route}", **query)["data"]
        assert set(by_step) == {"all", *map(str, PROFILED)}
        assert all(set(stages) == {"stage_0", "stage_1"} for stages in by_step.values())
    collectives = server.get("distributed/commops", **query)["data"]
    for stage in ("stage_0", "stage_1"):
        assert [row[:2] for row in collectives[stage]["rows"]] == [["gloo:all_reduce", len(PROFILED)]]


@pytest.mark.parametrize("name", ["predicted", "measured"])
def test_the_plugin_opens_the_steps(server, folder, name):
    server.runs()
    query = {"run": "run/timeline", "worker": name, "span": "default"}
    trace = server.get("trace", **query, view="Trace")
    written = json.loads((folder / "tb" / "run" / "timeline" / f"{name}.pt.trace.json").read_text())
    assert [event for event in trace["traceEvents"] if event.get("ph") == "X"] == [
        event for event in written["traceEvents"] if event["ph"] == "X"
    ]
    said = json.dumps(server.get("overview", **query, view="Overview"))
    length = next(event["dur"] for event in written["traceEvents"] if event["name"] == "ProfilerStep#0")
    assert f"Total: {length}us" in said


@pytest.mark.slow
def test_torchrun_profiles_too(folder, tmp_path):
    given = ["--steps", 7, "--tensorboard", tmp_path / "tb", "--run-dir", tmp_path / "run", "--quiet"]
    ended = torchrun(2, "-m", "runner", folder / "x.plan.json", *given, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "tb" / "run" / "profiled").iterdir())) == 2


def test_a_worker_of_torchrun_refuses_what_the_launcher_would(folder, tmp_path):
    given = ["--steps", 6, "--tensorboard", tmp_path / "tb", "--run-dir", tmp_path / "run"]
    refused = torchrun(2, "-m", "runner", folder / "x.plan.json", *given, cwd=tmp_path)
    assert refused.returncode != 0 and "give --steps 7 or more" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_takes_no_file_is_exit_2_before_training(folder, tmp_path):
    (tmp_path / "tb").write_text("")
    ended = command(folder / "x.plan.json", "--tensorboard", "tb/traces", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr.startswith(
        "run-plan: error: --tensorboard tb/traces: Not a directory"
    )
    assert not (tmp_path / "run").exists() and "Traceback" not in ended.stderr


@pytest.mark.parametrize(("steps", "enough"), [(1, False), (6, False), (7, True), (20, True)])
def test_too_few_steps_are_refused_with_the_least_number(tmp_path, steps, enough):
    options = parse_options(["x.plan.json", "--steps", str(steps), "--tensorboard", str(tmp_path / "tb")])
    if enough:
        refuse_unusable(options)
        assert list((tmp_path / "tb").iterdir()) == []
        return
    with pytest.raises(UsageError, match="give --steps 7 or more"):
        refuse_unusable(options)


def test_plan_hands_the_flag_on():
    from planner.plan_flags import build_parser

    flags = build_parser().parse_args(["--gpus", "2", "model.py", "--train", "--tensorboard", "tb"])
    assert run_arguments(flags) == ["--tensorboard", "tb"]


def test_only_profiles_of_the_same_run_are_removed(tmp_path):
    mine, other = stage_trace(tmp_path, "a", 11, 12), stage_trace(tmp_path, "b", 0, 1)
    foreign = mine.with_name("notes.json")
    for file in (mine, other, foreign):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    remove_earlier(tmp_path, "a")
    assert not mine.exists() and other.exists() and foreign.exists()


def test_a_run_in_the_current_directory_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_name(Path()) == tmp_path.name


def test_only_the_profilers_lines_are_dropped(capfd):
    with without_profilers_lines():
        os.write(2, b"USDT:2026-01-01 1:1 SyncActivityProfilerHandler.cpp:52] profiler_start\nmine\n")
        os.write(2, b"[W1 CPUAllocator.cpp:245] Memory block of unknown size was allocated before\nno newline")
        os.write(1, b"out")
    assert capfd.readouterr() == ("out", "mine\nno newline")
