"""How much memory this process may still take: of the machine, of its control group, of its own limits."""

from __future__ import annotations

import re
import resource
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def free_host_bytes() -> int | None:
    """The least of what is free; None where the system (other than Linux) does not say."""
    found = [_available(), _below_group_limit(), _below_own_limit()]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def _available() -> int | None:
    return kibibytes(_text(Path("/proc/meminfo")), "MemAvailable")


def kibibytes(text: str, name: str) -> int | None:
    """The bytes that a line `NAME: N kB` of a file in /proc names.

    >>> kibibytes("VmData:  2 kB", "VmData")
    2048
    """
    found = re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _below_own_limit() -> int | None:
    """What is left of `ulimit -d`, which counts private memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    used = kibibytes(_text(Path("/proc/self/status")), "VmData")
    return None if limit == resource.RLIM_INFINITY or used is None else max(0, limit - used)


def _below_group_limit() -> int | None:
    """What is left in the control group (version 2) and those above it."""
    path = _text(Path("/proc/self/cgroup")).partition("0::/")[2].splitlines()
    group = CGROUPS / (path[0] if path else "")
    left = []
    for folder in [group, *group.parents]:
        limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            left.append(max(0, int(limit) - int(used)))
    return min(left, default=None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
