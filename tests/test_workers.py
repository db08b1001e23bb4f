"""Workers end together, with one clear cause, and never outlive their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planner.errors import CheckError, RunError
from planner.machine.workers import explain_failure, run_workers

WORKER = "tests.failing_worker"
ROOT = str(Path(__file__).resolve().parents[1])


def run(*arguments, num_workers=2):
    run_workers(WORKER, list(arguments), num_workers, {"OMP_NUM_THREADS": "1"})


def test_an_error_of_ours_arrives_as_it_was():
    with pytest.raises(CheckError) as caught:
        run("check")
    assert (caught.value.got, caught.value.remedy, caught.value.exit_code) == ("got this", "do that", 4)


def test_another_error_names_the_rank_and_the_cause():
    with pytest.raises(RunError, match="worker 1 failed: ValueError: planned failure"):
        run("raise")


def test_a_killed_worker_is_named():
    with pytest.raises(RunError, match=r"worker 1 was ended by signal 9 \(SIGKILL\)"):
        run("kill")


def test_lost_neighbours_are_not_the_cause():
    left = {
        0: {"kind": "", "got": "RuntimeError: Connection closed by peer [127.0.0.1]", "time": 1.0},
        1: {"kind": "", "got": "ZeroDivisionError: division by zero", "time": 2.0},
    }
    assert "worker 1 failed: ZeroDivisionError" in str(explain_failure(left, {0: 1, 1: 1}))


def test_the_signal_handlers_are_as_they_were_after_a_run():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(CheckError):
        run("check")
    assert [signal.getsignal(number) for number in numbers] == before


def children_of(pid):
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in listing.splitlines()[1:]]
    return [int(child) for child, parent in pairs if int(parent) == pid]


def gone(pids):
    return not any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in pids)


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks Linux for the death signal")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(ending, tmp_path):
    ready = tmp_path / "ready"
    code = (
        f"from planner.machine.workers import run_workers\nrun_workers({WORKER!r}, ['sleep', {str(ready)!r}], 2, {{}})"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = children_of(parent.pid)
    assert len(workers) == 2
    parent.send_signal(ending)
    parent.wait(timeout=30)
    while not gone(workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(workers)
