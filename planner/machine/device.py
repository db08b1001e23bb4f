"""The only file that tells a CPU from a CUDA device: clock, stamps, memory, names.

On a CPU times are thread CPU time (of the one thread that computes), because wall time on a shared host swings by
factors; on CUDA they are events on the current stream, resolved after one synchronise at the end.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from planner.errors import UsageError
from planner.files.profile_file import Machine

Clock = Literal["cuda-event", "thread-cpu"]

# glibc otherwise maps and unmaps every large tensor, and page faults distort times by up to 30 %.
ALLOCATOR_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "67108864",
}

# A heap in which large blocks come and go grows by their holes, up to twice what lives. Where a model barely fits,
# blocks from this size on are mapped one by one and given back at once, whatever that costs in page faults.
MAPPED_FROM_BYTES = 4 * 2**20


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class Device(Protocol):
    """A device that can time what runs on it."""

    @property
    def clock(self) -> Clock:
        """How stamps are taken."""

    @property
    def block_bytes(self) -> int:
        """Allocations are rounded up to multiples of this."""

    @property
    def torch_device(self) -> Any:
        """The `torch.device` on which tensors live."""

    def stamp(self) -> Any:
        """A mark at this point of the program's work on the device."""

    def elapsed_ms(self, stamps: Sequence[Any]) -> list[float]:
        """Milliseconds from each stamp to the next; waits until the device has passed them all."""

    def reset_peak_memory(self) -> None:
        """Forget the peak so far."""

    def peak_memory_bytes(self) -> int | None:
        """The allocator's peak since the last reset; None where the device keeps none."""

    def empty_cache(self) -> None:
        """Give back what the allocator keeps for later and nobody uses."""

    def taken_bytes(self) -> int | None:
        """What the allocator has taken from the device at most since the last reset, used or not; None as above."""

    def context_bytes(self) -> int:
        """What is gone of the device beside the allocator's share: context and libraries, and what others use."""

    def workspace_bytes(self) -> int:
        """What matrix products keep for themselves in the allocator, for as long as the process lives."""


class CpuDevice:
    """The host: stamps are thread CPU time, in nanoseconds."""

    clock: Clock = "thread-cpu"
    block_bytes = 64

    @property
    def torch_device(self) -> Any:
        """`torch.device("cpu")`."""
        import torch

        return torch.device("cpu")

    def stamp(self) -> int:
        """Thread CPU time in nanoseconds."""
        return time.thread_time_ns()

    def elapsed_ms(self, stamps: Sequence[int]) -> list[float]:
        """Differences of neighbouring stamps.

        >>> CpuDevice().elapsed_ms([0, 1_000_000, 3_500_000])
        [1.0, 2.5]
        """
        return [(later - earlier) / 1e6 for earlier, later in itertools.pairwise(stamps)]

    def reset_peak_memory(self) -> None:
        """Nothing to reset: a CPU's allocator keeps no peak."""

    def peak_memory_bytes(self) -> None:
        """A CPU's allocator keeps no peak."""
        return None

    def empty_cache(self) -> None:
        """Nothing to give back."""

    def taken_bytes(self) -> None:
        """A CPU's allocator keeps no peak."""
        return None

    def context_bytes(self) -> int:
        """Nothing: a CPU's memory is given out by the byte."""
        return 0

    def workspace_bytes(self) -> int:
        """Nothing: what an operation takes on a CPU it gives back."""
        return 0


class CudaDevice:
    """One CUDA device: stamps are events, resolved after one synchronise."""

    clock: Clock = "cuda-event"
    block_bytes = 512

    def __init__(self, index: int) -> None:
        self.index = index

    @property
    def torch_device(self) -> Any:
        """The `torch.device` of this GPU."""
        import torch

        return torch.device("cuda", self.index)

    def stamp(self) -> Any:
        """An event recorded on the current stream."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, stamps: Sequence[Any]) -> list[float]:
        """Milliseconds between neighbouring events, after one synchronise."""
        if stamps:
            stamps[-1].synchronize()
        return [earlier.elapsed_time(later) for earlier, later in itertools.pairwise(stamps)]

    def reset_peak_memory(self) -> None:
        """Reset the caching allocator's peak."""
        import torch

        torch.cuda.reset_peak_memory_stats(self.index)

    def peak_memory_bytes(self) -> int:
        """`max_memory_allocated` since the last reset."""
        import torch

        return int(torch.cuda.max_memory_allocated(self.index))

    def empty_cache(self) -> None:
        """Give segments that are not in use back to the driver."""
        import torch

        torch.cuda.empty_cache()

    def taken_bytes(self) -> int:
        """`max_memory_reserved` since the last reset."""
        import torch

        return int(torch.cuda.max_memory_reserved(self.index))

    def context_bytes(self) -> int:
        """What the driver counts as used beyond the allocator's segments."""
        import torch

        free, total = torch.cuda.mem_get_info(self.index)
        return max(0, int(total - free - torch.cuda.memory_reserved(self.index)))

    def workspace_bytes(self) -> int:
        """What cuBLAS has taken so far, found by letting it go: every thread that multiplies has a workspace."""
        import torch

        torch.cuda.synchronize(self.index)
        before = torch.cuda.memory_allocated(self.index)
        torch._C._cuda_clearCublasWorkspaces()
        return max(0, int(before - torch.cuda.memory_allocated(self.index)))


def choose_device(name: str | None, rank: int = 0) -> Device:
    """The device called `name` ("cpu", "cuda", "cuda:1"), or the best one at hand for None. Raises UsageError."""
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if available else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return CpuDevice()
    if kind != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"--device {name}", "devices are cpu, cuda and cuda:N", "give one of them")
    number = int(index) if index else rank
    if number >= available:
        found = f"{available} CUDA device{'s' if available != 1 else ''} found"
        raise UsageError(f"--device {name} for worker {rank}", found, "use --device cpu or fewer stages")
    torch.cuda.set_device(number)
    return CudaDevice(number)


def describe_machine(device: Device) -> Machine:
    """The name of the device, how many there are, and the versions that matter for a measurement."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device.clock == "cuda-event":
        properties = torch.cuda.get_device_properties(device.torch_device)
        versions["cuda"] = str(torch.version.cuda)
        context, workspaces = device.context_bytes(), device.workspace_bytes()
        return Machine(
            "cuda",
            properties.name,
            torch.cuda.device_count(),
            versions,
            int(properties.total_memory),
            context + workspaces,
            workspaces,
        )
    return Machine("cpu", _processor_name(), available_cores(), versions)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def worker_environment(device_kind: str, *, scarce_memory: bool = False) -> dict[str, str]:
    """Variables that profiler and training workers share, so that what is profiled is what will run.

    One compute thread on a CPU: workers share its cores, and thread CPU time sees one thread. `scarce_memory`: take no
    more memory than lives, even if that is slower.
    """
    if device_kind == "cpu":
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if not scarce_memory:
            return {**ALLOCATOR_SETTINGS, **threads}
        kept = {name: value for name, value in ALLOCATOR_SETTINGS.items() if name != "MALLOC_MMAP_MAX_"}
        return {**kept, "MALLOC_MMAP_THRESHOLD_": str(MAPPED_FROM_BYTES), **threads}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **_segments_that_grow()}


def _segments_that_grow() -> dict[str, str]:
    """The GPU allocator's setting under which little is lost to fragmentation, unless the user has set another."""
    if any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return {}
    return {ALLOCATOR_VARIABLES[0]: "expandable_segments:True"}
