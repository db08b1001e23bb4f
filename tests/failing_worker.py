"""A worker that fails as it is told; rank 1 is the one at fault."""

import os
import signal
import sys
import time
from pathlib import Path

from planner.errors import CheckError
from planner.machine.workers import as_worker


def main():
    rank, how = int(os.environ["RANK"]), sys.argv[1]
    if how == "sleep":
        Path(f"{sys.argv[2]}{rank}").touch()
        time.sleep(120)
    if rank == 0:
        time.sleep(30)
    if how == "check":
        raise CheckError("got this", "rule", "do that")
    if how == "raise":
        raise ValueError("planned failure")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    as_worker(main)
