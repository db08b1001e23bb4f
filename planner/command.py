"""What every command does around its work: errors shown as text, exit codes, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from planner.errors import DEBUG, PlannerError

INTERRUPTED = 130


def guarded(program: str, work: Callable[[], int], *, debug: bool) -> int:
    """Run `work`; show an error of ours as its text, without a traceback unless `debug`. Returns the exit code."""
    before = os.environ.get(DEBUG, "")
    os.environ[DEBUG] = "1" if debug else before
    try:
        return work()
    except PlannerError as error:
        if debug:
            raise
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    finally:
        os.environ[DEBUG] = before


@contextlib.contextmanager
def stdout_to_stderr(active: bool) -> Iterator[None]:
    """While `active`, what this process and its children write to stdout goes to stderr."""
    if not active:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
