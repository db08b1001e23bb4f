"""Every storage that torch makes while something runs, by the phase in which it was made and freed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.machine.device import Device
from planner.machine.phase_bytes import PhaseBytes, in_blocks
from planner.tracing.crossing import WireForm

Pass = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Phase:
    """Which layer of which microbatch computes, in which direction."""

    microbatch: int
    direction: Pass
    layer: int


@dataclass(slots=True)
class Storage:
    """Bytes with the phase that made them and the one that freed them, there after `freed_after` other freeings.

    `gradient_of` are the values whose gradient lies in them: bytes by maker. `reads` are the parts of them from
    which a layer's backward computes something else: begin and bytes, by layer.
    """

    num_bytes: int
    born: Phase | None
    freed: Phase | None = None
    last_reader: int = -1
    freed_after: int = 0
    gradient_of: dict[int, int] = field(default_factory=dict)
    reads: dict[int, set[tuple[int, int]]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class LiveStorages(TorchDispatchMode):
    """Every storage that is made while the mode is on, with the phases it was made and freed in; bytes by phase.

    `scattered` are the names of values whose gradient did not lie in memory as a receive buffer would have it; with
    `straight` their layers get a copy that does, and which counts for nothing. `turned` are the values that travel with
    their dimensions in another order. By name, `handed_on` are the layers that had the gradient's storage until then.
    Where autograd would add a gradient into the storage of another, it makes a new one under the mode, which sees both.
    """

    block_bytes: int = 1
    straight: bool = False
    phase: Phase | None = None
    storages: list[Storage] = field(default_factory=list)
    phases: dict[Phase, PhaseBytes] = field(default_factory=dict)
    scattered: set[str] = field(default_factory=set)
    turned: set[str] = field(default_factory=set)
    handed_on: dict[str, frozenset[int]] = field(default_factory=dict)
    _by_key: dict[int, Storage] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)
    _now: PhaseBytes = field(default_factory=PhaseBytes)
    _counts: bool = True

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def know(self, tensors: Sequence[Any]) -> None:
        """Storages that exist already: a view of one of them is nothing new."""
        self._known.update(_key(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))

    def enter(self, phase: Phase) -> None:
        """What follows belongs to `phase`."""
        self.phase, self._now = phase, self.phases.setdefault(phase, PhaseBytes())

    def find(self, tensor: torch.Tensor) -> Storage | None:
        """The storage of `tensor` where it was made under the mode and is alive."""
        return self._by_key.get(_key(tensor))

    @property
    def live_bytes(self) -> int:
        """What was made and is alive."""
        return sum(storage.num_bytes for storage in self._by_key.values())

    def hand_over(self, name: str, layer: int, gradient: torch.Tensor, form: WireForm) -> torch.Tensor | None:
        """The gradient of the value `name`, which `layer` made, is complete; what the layer gets instead of it."""
        if form.turned:
            self.turned.add(name)
        self._note_gradient(name, layer, gradient)
        if form.holds(gradient):
            return None
        self.scattered.add(name)
        if not self.straight:
            return None
        self._counts = False
        try:
            copy = form.laid_out(gradient)
        finally:
            self._counts = True
        self._note_gradient(name, layer, copy)
        return copy

    def _note_gradient(self, name: str, layer: int, gradient: torch.Tensor) -> None:
        storage = self.find(gradient)
        if storage is not None:
            storage.gradient_of[layer] = gradient.nbytes
            self.handed_on[name] = frozenset(storage.gradient_of)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation."""
        result = func(*args, **(kwargs or {}))
        made = _tensors(result)
        for value in made:
            self._track(value)
        if self.phase is not None and self.phase.direction == "backward":
            self._note_reading([*args, *(kwargs or {}).values()], {_key(value) for value in made}, self.phase.layer)
        return result

    def _note_reading(self, arguments: Sequence[Any], made: set[int], layer: int) -> None:
        """What the operation reads and does not hand on as a view."""
        for value in _tensors(arguments):
            storage = self.find(value)
            if storage is not None and _key(value) not in made:
                storage.reads.setdefault(layer, set()).add((int(value.storage_offset()), value.nbytes))

    def _track(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._by_key or key in self._known:
            return
        record = Storage(in_blocks(storage.nbytes(), self.block_bytes) if self._counts else 0, self.phase)
        self._by_key[key] = record
        self.storages.append(record)
        self._now.make(record.num_bytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        record = self._by_key.pop(key)
        record.freed = self.phase
        if record.born == self.phase:
            self._now.free_own(record.num_bytes)
        elif record.num_bytes:
            record.freed_after = self._now.free_other(record.num_bytes)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Marks(Protocol):
    """What is told which layer computes, and follows the storages that it wants to: none, unless it says otherwise."""

    def enter(self, phase: Phase) -> None:
        """What follows belongs to `phase`."""

    def find(self, tensor: torch.Tensor) -> Storage | None:
        """The record of a tensor's storage, where there is one."""
        return None

    def hand_over(self, name: str, layer: int, gradient: torch.Tensor, form: WireForm) -> torch.Tensor | None:
        """The gradient of a value is complete; what its layer gets instead, if not the gradient as it is."""
        return None


MARK, ASIDE = "evenstage layer ", "aside"


class EventMarks(Marks):
    """Names every phase in the profile of a CPU; what is done to have a gradient `straight` belongs to none."""

    def __init__(self, *, straight: bool = False) -> None:
        self.phases, self.straight = list[Phase](), straight

    def enter(self, phase: Phase) -> None:
        """What follows belongs to `phase`."""
        self.phases.append(phase)
        self._mark_last()

    def hand_over(self, name: str, layer: int, gradient: torch.Tensor, form: WireForm) -> torch.Tensor | None:
        """What the layer gets instead of the gradient."""
        if not self.straight or form.holds(gradient):
            return None
        with torch.profiler.record_function(f"{MARK}{ASIDE}"):
            copy = form.laid_out(gradient)
        self._mark_last()
        return copy

    def _mark_last(self) -> None:
        with torch.profiler.record_function(f"{MARK}{len(self.phases) - 1}"):
            pass

    def by_phase(self, by_mark: Mapping[str, PhaseBytes]) -> dict[Phase, PhaseBytes]:
        """What was found between the marks, by phase."""
        return {self.phases[int(mark)]: found for mark, found in by_mark.items() if mark != ASIDE}


class AllocatorMarks(Marks):
    """Asks a GPU's allocator for its peak whenever a phase ends, from when it has given back what nobody uses.

    `fragmentation_bytes`: what it took from the GPU until the last phase ended, beyond what was in use at most.
    """

    def __init__(self, device: Device) -> None:
        self.device, self.rising = device, dict[Phase, int]()
        self.peak_bytes = self.fragmentation_bytes = 0
        device.empty_cache()
        self._begin(Phase(-1, "forward", -1))

    def enter(self, phase: Phase) -> None:
        """What follows belongs to `phase`."""
        peak, taken = self.device.peak_memory_bytes() or 0, self.device.taken_bytes() or 0
        self.rising[self.phase] = max(self.rising.get(self.phase, 0), peak - self.start)
        self.peak_bytes = max(self.peak_bytes, peak)
        self.fragmentation_bytes = max(0, taken - self.peak_bytes)
        self._begin(phase)

    def _begin(self, phase: Phase) -> None:
        self.device.reset_peak_memory()
        self.phase, self.start = phase, self.device.peak_memory_bytes() or 0
