"""`plan --train` ended by a signal: exit 130 with one line, and none of its processes is left."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from planner.machine.ending import signals_handled
from tests.running import ROOT, command
from tests.test_workers import children_of, gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks Linux for the death signal")
READY = """
import os
from pathlib import Path
_batches = 0
_make_batch = make_batch
def make_batch(batch_size):
    global _batches
    _batches += 1
    if _batches == 20 and "RANK" in os.environ:
        Path(__file__).with_name(f"ready{os.environ['RANK']}").touch()
    return _make_batch(batch_size)
"""
FLAGS = ["--gpus", "2", "model.py", "--microbatches", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that says when it has trained for a while, with its profile."""
    folder = tmp_path_factory.mktemp("ending")
    (folder / "model.py").write_text((ROOT / "tests" / "models" / "plain.py").read_text() + READY)
    ended = command(*FLAGS, module="planner", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def descendants(pid):
    found = children_of(pid)
    return found + [each for child in found for each in descendants(child)]


def wait_until(holds, seconds=90):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert holds()


@pytest.fixture
def training(folder, request):
    """`plan --train` in the midst of its training, after it profiled or with the profile at hand."""
    for file in folder.glob("ready*"):
        file.unlink()
    fresh = ["--fresh"] if getattr(request, "param", "") == "profiled" else []
    line = [sys.executable, "-P", "-m", "planner", *FLAGS, *fresh, "--train", "--steps", "100000", "--run-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        line,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    family: list[int] = []
    try:
        wait_until(lambda: len(list(folder.glob("ready*"))) == 2)
        family = descendants(process.pid)
        yield process, family
    finally:
        for pid in {*family, *descendants(process.pid), process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("training", "ending"), [("profiled", signal.SIGINT), ("reused", signal.SIGTERM)], indirect=["training"]
)
def test_an_interrupted_training_is_exit_130_with_one_line(training, ending):
    process, family = training
    assert len(family) == 3
    if ending == signal.SIGINT:
        os.killpg(process.pid, ending)  # as a terminal does: every process of the command gets it
    else:
        process.send_signal(ending)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "run-plan: interrupted"
    assert "death signal" not in errors and "Traceback" not in errors
    assert gone(family)


@pytest.mark.parametrize("victim", ["plan", "run-plan"])
def test_a_killed_training_leaves_no_orphan(training, victim):
    process, family = training
    launcher = children_of(process.pid)[0]
    os.kill(process.pid if victim == "plan" else launcher, signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    wait_until(lambda: gone(family), 30)
    if victim == "run-plan":
        assert process.returncode == 1 and "the run was ended by signal 9 (SIGKILL)" in errors


def test_a_process_whose_parent_went_before_it_asked_ends_at_once():
    code = "from planner.machine.ending import end_with_parent; end_with_parent(); print('still here')"
    for parent, expected in [("1", (1, "")), (str(os.getpid()), (0, "still here\n")), (None, (0, "still here\n"))]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"EVENSTAGE_PARENT": parent} if parent else {})}
        ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == expected


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_handled((signal.SIGHUP, signal.SIGTERM), print):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == print
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
