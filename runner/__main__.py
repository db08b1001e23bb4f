"""`python -m runner PLAN`: a worker where RANK is set (torchrun sets it), else the launcher."""

import os
import signal
import sys

from planner.machine.ending import PARENT, end_with_parent
from runner.cli import main

if __name__ == "__main__":
    if "RANK" in os.environ:
        from planner.machine.workers import as_worker
        from runner.worker import main as worker_main

        as_worker(worker_main)
    else:
        if PARENT in os.environ:
            end_with_parent(signal.SIGTERM)
        sys.exit(main())
