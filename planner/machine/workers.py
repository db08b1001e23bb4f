"""Local workers, started and ended by torch's elastic launcher, that never outlive their parent.

A worker is a module run as a script. It calls `as_worker(main)`: errors of ours travel to the parent as JSON and are
raised there again; everything else is named by rank. A worker asks the kernel to end it with its parent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from planner import errors
from planner.errors import PlannerError, RunError
from planner.machine.ending import PARENT, end_with_parent, signals_handled

ERROR_FOLDER = "EVENSTAGE_ERROR_FOLDER"
SECONDARY = re.compile(
    r"Connection (closed|reset) by peer|Timed out waiting|Application timeout|Pair is not connected|"
    r"Broken pipe|failed to connect|Connection refused"
)
NO_HANDLERS = {"TORCHELASTIC_SIGNALS_TO_HANDLE": ""}
LAUNCHER_LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher")
ENDING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)


def as_worker(main: Callable[[], None]) -> None:
    """Run a worker's `main` and end the process: with 0, or with the error's exit code and the error for its parent.

    The interpreter is not torn down: threads of the process group that are still open would abort it now and then.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        main()
        _leave_together()
    except BaseException as error:
        _leave_error(error)
        if "--debug" in sys.argv or os.environ.get(errors.DEBUG):
            traceback.print_exc()
        _end_process(error.exit_code if isinstance(error, PlannerError) else 1)
    _end_process(0)


def _leave_together() -> None:
    """Wait for the other ranks, so that none loses a neighbour that it still needs."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def _end_process(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_error(error: BaseException) -> None:
    folder = os.environ.get(ERROR_FOLDER)
    if isinstance(error, PlannerError):
        record = {"kind": type(error).__name__, "got": error.got, "rule": error.rule, "remedy": error.remedy}
        record["frames"] = list(error.frames)  # type: ignore[assignment]
    else:
        text = str(error).strip().splitlines()
        record = {"kind": "", "got": f"{type(error).__name__}: {_cause(error) or (text[0] if text else '')}"}
    record["time"] = time.time()  # type: ignore[assignment]
    if folder is None:
        if not SECONDARY.search(record["got"]):
            print(error if record["kind"] else record["got"], file=sys.stderr)
        return
    with contextlib.suppress(OSError):
        Path(folder, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(record), encoding="utf-8")


def _cause(error: BaseException) -> str:
    """The text of the innermost cause: schedules wrap the user's error in their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def run_workers(module: str, arguments: Sequence[str], num_workers: int, environment: dict[str, str]) -> None:
    """Run `python -m module arguments…` on `num_workers` local ranks and wait for all of them.

    Raises the error that caused the end (ours as it was, others as RunError naming the rank), or KeyboardInterrupt
    where a signal ended it. torch's launcher would leave its signal handlers behind, so that none of them is installed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing import api as multiprocessing
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    multiprocessing.PContext.close.__defaults__ = (None, 4)  # torch's own grace for a stopped worker is 30 s
    with (
        tempfile.TemporaryDirectory(prefix="evenstage-") as folder,
        _environment({**environment, ERROR_FOLDER: folder, PARENT: str(os.getpid()), **NO_HANDLERS}),
    ):
        configuration = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_workers,
            run_id="evenstage",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            log_line_prefix_template="",
        )
        try:
            with _quiet_launcher(), signals_handled(ENDING_SIGNALS, _end_launcher):
                elastic_launch(configuration, sys.executable)("-P", "-m", module, *arguments)
        except ChildFailedError as failure:
            raise explain_failure(read_errors(Path(folder)), _exit_codes(failure)) from None
        except SignalException:
            raise KeyboardInterrupt from None


def _end_launcher(number: int, _: FrameType | None) -> None:
    """End the launcher as its own handler would, but only once: what follows is its clearing up."""
    from torch.distributed.elastic.multiprocessing import SignalException

    for each in ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SignalException(f"signal {number}", signal.Signals(number))


def _exit_codes(failure: Any) -> dict[int, int]:
    return {rank: entry.exitcode for rank, entry in failure.failures.items()}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the workers to inherit, and put back what was there."""
    before = {name: os.environ.get(name) for name in [*variables, "PYTHONPATH"]}
    root = str(Path(__file__).resolve().parents[2])
    os.environ.update(variables)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet_launcher() -> Iterator[None]:
    """The launcher logs every end of a worker; we say it in our own words."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith(LAUNCHER_LOGGERS)]
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def read_errors(folder: Path) -> dict[int, dict[str, Any]]:
    """What the workers left, by rank."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            found[int(file.stem)] = json.loads(file.read_text(encoding="utf-8"))
    return found


def explain_failure(left: dict[int, dict[str, Any]], exit_codes: dict[int, int]) -> PlannerError:
    """The cause among everything that failed: our own errors, then the first that is not just a lost neighbour.

    >>> str(explain_failure({0: {"kind": "", "got": "RuntimeError: Connection closed by peer", "time": 1.0}}, {1: -9}))
    'worker 1 was ended by signal 9 (SIGKILL)'
    """
    in_time = sorted(left.items(), key=lambda item: item[1].get("time", 0.0))
    for _, record in in_time:
        if record["kind"]:
            kind = getattr(errors, record["kind"], RunError)
            return kind(record["got"], record["rule"], record["remedy"], tuple(record["frames"]))
    for rank, record in in_time:
        if not SECONDARY.search(record["got"]):
            return RunError(f"worker {rank} failed: {record['got']}", "", "run again with --debug for its traceback")
    for rank, code in sorted(exit_codes.items()):
        if code < 0 and -code != signal.SIGTERM:
            name = signal.Signals(-code).name
            return RunError(f"worker {rank} was ended by signal {-code} ({name})")
    for rank, record in in_time:
        return RunError(f"worker {rank} lost its neighbours: {record['got']}")
    ranks = ", ".join(str(rank) for rank in sorted(exit_codes))
    return RunError(f"workers {ranks} ended with exit codes {sorted(set(exit_codes.values()))}")
