"""What every command does around its work: errors shown as text, exit codes, Ctrl-C."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

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
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    finally:
        os.environ[DEBUG] = before
