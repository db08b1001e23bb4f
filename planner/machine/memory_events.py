"""What the CPU's allocator did while something ran: the memory events of torch's profiler, in order."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from planner.machine.phase_bytes import PhaseBytes, in_blocks

PROFILERS_LINE = re.compile(rb"ActivityProfilerHandler\.cpp|Memory block of unknown size")


def memory_events(work: Callable[[], None]) -> list[dict[str, Any]]:
    """The events of torch's profiler while `work` runs, by time: allocations (`[memory]`) and named ranges."""
    import torch

    with without_profilers_lines():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        with tempfile.TemporaryDirectory(prefix="evenstage-memory-") as folder:
            file = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(file))
            events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return sorted((event for event in events if "ts" in event), key=lambda event: float(event["ts"]))


def peak_of_events(events: list[dict[str, Any]]) -> int:
    """The largest running sum of the `[memory]` events of `memory_events`.

    >>> peak_of_events([{"name": "[memory]", "ts": t, "args": {"Bytes": b}} for t, b in [(1, 8), (2, -8), (3, 4)]])
    8
    """
    live = peak = 0
    for event in events:
        if event.get("name") == "[memory]":
            live += int(event["args"]["Bytes"])
            peak = max(peak, live)
    return peak


def bytes_by_mark(events: list[dict[str, Any]], prefix: str, block_bytes: int = 1) -> dict[str, PhaseBytes]:
    """By the rest of the name of each range that begins with `prefix`: what was made and freed until the next such.

    In whole blocks of `block_bytes`.

    >>> memory = lambda t, addr, b: {"name": "[memory]", "ts": t, "args": {"Addr": addr, "Bytes": b}}
    >>> mark = lambda t, name: {"name": name, "ts": t}
    >>> events = [mark(1, "at 0"), memory(2, 7, 8), mark(4, "at 1"), memory(5, 9, 3), memory(6, 7, -8)]
    >>> {name: (phase.peaks, phase.freed) for name, phase in bytes_by_mark(events, "at ").items()}
    {'0': ([8], []), '1': ([3, 3], [8])}
    """
    phases: dict[str, PhaseBytes] = {}
    makers: dict[int, PhaseBytes] = {}  # by address, the phase that made what is alive there
    now = PhaseBytes()
    for event in events:
        if event.get("name") == "[memory]":
            num_bytes, address = int(event["args"]["Bytes"]), int(event["args"]["Addr"])
            blocks = in_blocks(abs(num_bytes), block_bytes)
            if num_bytes > 0:
                makers[address] = now
                now.make(blocks)
            elif makers.pop(address, None) is now:
                now.free_own(blocks)
            else:
                now.free_other(blocks)
        elif str(event.get("name", "")).startswith(prefix):
            now = phases.setdefault(str(event["name"]).removeprefix(prefix), PhaseBytes())
    return phases


@contextlib.contextmanager
def without_profilers_lines() -> Iterator[None]:
    """Drop the lines that torch's profiler writes to the process's stderr. All others come through, at the end."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            os.write(2, b"".join(line for line in written if not PROFILERS_LINE.search(line)))
