"""Every storage that torch makes while something runs, by the phase in which it was made and freed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.machine.device import Device

Pass = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Phase:
    """Which layer of which microbatch computes, in which direction."""

    microbatch: int
    direction: Pass
    layer: int


@dataclass(slots=True)
class Storage:
    num_bytes: int
    born: Phase | None
    freed: Phase | None = None
    last_reader: int = -1


@dataclass(slots=True, eq=False)
class LiveStorages(TorchDispatchMode):
    """Every storage that is made while the mode is on: its bytes, the phase it was made in and the one it died in.

    `rising` is, by phase, the largest number of live bytes above what was alive when the phase began.
    """

    block_bytes: int = 1
    phase: Phase | None = None
    live_bytes: int = 0
    storages: list[Storage] = field(default_factory=list)
    rising: dict[Phase, int] = field(default_factory=dict)
    _by_key: dict[int, Storage] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)
    _at_start: int = 0

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def know(self, tensors: Sequence[Any]) -> None:
        """Storages that exist already: a view of one of them is nothing new."""
        self._known.update(_key(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))

    def enter(self, phase: Phase) -> None:
        """What follows belongs to `phase`."""
        self.phase, self._at_start = phase, self.live_bytes
        self.rising.setdefault(phase, 0)

    def find(self, tensor: torch.Tensor) -> Storage | None:
        """The storage of `tensor` where it was made under the mode and is alive."""
        return self._by_key.get(_key(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._track(value)
        return result

    def _track(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._by_key or key in self._known:
            return
        record = Storage(-(-storage.nbytes() // self.block_bytes) * self.block_bytes, self.phase)
        self._by_key[key] = record
        self.storages.append(record)
        self.live_bytes += record.num_bytes
        if self.phase is not None:
            self.rising[self.phase] = max(self.rising[self.phase], self.live_bytes - self._at_start)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        record = self._by_key.pop(key)
        record.freed = self.phase
        self.live_bytes -= record.num_bytes


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Marks(Protocol):
    """What is told which layer computes, and follows the storages that it wants to."""

    def enter(self, phase: Phase) -> None:
        """What follows belongs to `phase`."""

    def find(self, tensor: torch.Tensor) -> Storage | None:
        """The record of a tensor's storage, where there is one."""


MARK = "evenstage layer "


class EventMarks:
    """Names every phase in the profile of a CPU."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []

    def enter(self, phase: Phase) -> None:
        """What follows belongs to `phase`."""
        with torch.profiler.record_function(f"{MARK}{len(self.phases)}"):
            self.phases.append(phase)

    def find(self, _: torch.Tensor) -> None:
        return None


class AllocatorMarks:
    """Asks a GPU's allocator for its peak whenever a phase ends."""

    def __init__(self, device: Device) -> None:
        self.device, self.phase, self.start = device, Phase(-1, "forward", -1), 0
        self.rising: dict[Phase, int] = {}

    def enter(self, phase: Phase) -> None:
        peak = (self.device.peak_memory_bytes() or 0) - self.start
        self.rising[self.phase] = max(self.rising.get(self.phase, 0), peak)
        self.device.reset_peak_memory()
        self.phase, self.start = phase, self.device.peak_memory_bytes() or 0

    def find(self, _: torch.Tensor) -> None:
        return None
