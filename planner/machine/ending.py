"""Processes that end together: a child ends with its parent, however that ends, and gets its parent's signals."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

PARENT = "EVENSTAGE_PARENT"
PR_SET_PDEATHSIG = 1
PASSED_ON = (signal.SIGINT, signal.SIGTERM)


def end_with_parent(ending: int = signal.SIGKILL) -> None:
    """Ask the kernel (Linux) to send `ending` to this process when its parent ends.

    Where the parent left its process id in the environment and is gone already, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6", use_errno=True).prctl(PR_SET_PDEATHSIG, int(ending))
    parent = os.environ.pop(PARENT, None)
    if parent is not None and parent != str(os.getppid()):
        os._exit(1)


@contextlib.contextmanager
def signals_handled(numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """`handler` for these signals while the block runs, and then what was there; nothing outside the main thread.

    A signal that is ignored stays so (nohup does that to SIGHUP), except SIGINT, which shells ignore for every `&`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [n for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `command` and return its exit code, negative for a signal; SIGINT and SIGTERM are passed on to it.

    The child is told this process's id, so that `end_with_parent` there leaves no orphan.
    """
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        if not children:
            raise KeyboardInterrupt
        children[0].send_signal(number)

    with signals_handled(PASSED_ON, pass_on):
        children.append(subprocess.Popen(command, env={**environment, PARENT: str(os.getpid())}))
        return children[0].wait()
