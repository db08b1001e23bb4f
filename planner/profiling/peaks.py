"""What a device can do at most, for estimates: from datasheets, as given, or of this CPU by a short trial."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from planner.errors import UsageError
from planner.files.profile_file import Machine, Peak
from planner.files.reading import MOST

Precision = Literal["fp32", "bf16"]
TABLE = Path(__file__).with_name("peaks.json")
TRIAL_SIDE, TRIAL_ELEMENTS, TRIALS = 1024, 2**24, 5
_RATE = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)([GTP]?)")


def find_peak(text: str | None, precision: Precision = "fp32") -> tuple[Peak, Machine]:
    """The peak that `--peak` names, and the machine that it stands for; None measures this CPU.

    `text` is a name of the table or "FLOPS,BYTES/s". Raises UsageError for anything else, and for a device of the table
    that does not compute in `precision`.

    >>> find_peak("67T,3.35T")[0].bytes_per_s
    3350000000000.0
    """
    if text is None:
        return measured_peak(precision)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if (entry := table.get(text.lower())) is not None:
        if (flops_per_s := entry[f"{precision}_flops_per_s"]) is None:
            raise UsageError(f"--peak {text} in {precision}", f"{entry['name']} does not compute in it", "use fp32")
        peak = Peak(entry["name"], flops_per_s, entry["bytes_per_s"], entry["source"])
        return peak, Machine("cuda", entry["name"], 1, _versions(), memory_bytes=entry["memory_bytes"])
    rates = [_rate(part) for part in text.split(",")]
    if len(rates) != 2 or not all(rate is not None and 1 <= rate <= MOST for rate in rates):
        raise UsageError(
            f"--peak {text}",
            f"a peak is one of {', '.join(table)}, or FLOPs per second and bytes per second",
            "for example: --peak h100, or --peak 67T,3.35T",
        )
    name = f"a device of {text}"
    return Peak(name, rates[0] or 0.0, rates[1] or 0.0, "given"), Machine("other", name, 1, _versions())


def _rate(text: str) -> float | None:
    found = _RATE.fullmatch(text.strip().removesuffix("/s"))
    return float(found[1]) * {"": 1.0, "G": 1e9, "T": 1e12, "P": 1e15}[found[2]] if found else None


def _versions() -> dict[str, str]:
    import torch

    return {"torch": torch.__version__}


def measured_peak(precision: Precision = "fp32") -> tuple[Peak, Machine]:
    """The peak of one thread of this CPU: the best of a few products of matrices, and of a few copies.

    The caller's number of threads is left as it was.
    """
    import torch

    from planner.machine.device import CpuDevice, describe_machine

    machine, threads = describe_machine(CpuDevice()), torch.get_num_threads()
    a, b = torch.ones(2, TRIAL_SIDE, TRIAL_SIDE, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    source, target = torch.ones(2, TRIAL_ELEMENTS)
    torch.set_num_threads(1)
    try:
        product_s = _fastest(lambda: torch.mm(a, b))
        copy_s = _fastest(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(threads)
    moved = 2 * source.numel() * source.element_size()
    flops, how = 2 * TRIAL_SIDE**3, "one thread, by a matrix product and a copy"
    return Peak(machine.device_name, flops / product_s, moved / copy_s, how), machine


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of thread CPU time of the fastest of a few trials after one of warm-up."""
    seconds = []
    for _ in range(TRIALS + 1):
        before = time.thread_time()
        work()
        seconds.append(time.thread_time() - before)
    return min(seconds[1:])
