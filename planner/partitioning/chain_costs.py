"""The value that the ILP solves: layers in program order, what crosses between them, and what a cut costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from planner.errors import FileError
from planner.files.profile_file import GradientLifetime, LayerMemory, Lifetime, SizeMemory
from planner.scheduling.closed_forms import gpipe_step_ms
from planner.scheduling.simulation import StageTimes, simulate

if TYPE_CHECKING:
    from planner.partitioning.memory_limit import FittingStages

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Cuts = tuple[int, ...]

EQUAL = 1e-9  # steps that differ by less, relatively, are equal to rounding
BOUNDARY_COSTS = ("message_ms", "boundary_forward_ms", "boundary_backward_ms")


@dataclass(frozen=True, slots=True)
class ChainTensor:
    """A tensor that leaves its layer; indices of layers. Transfers are milliseconds per hop and microbatch."""

    name: str
    producer: int
    last_consumer: int
    num_bytes: int
    gradient_bytes: int
    transfer_forward_ms: float
    transfer_backward_ms: float
    contiguous: bool = True
    gradient_scattered: bool = False
    returns_view: bool = False


@dataclass(frozen=True, slots=True)
class ChainTied:
    """A parameter of several layers: its optimizer time counts once per stage that holds it.

    `sum_ms` is what adding up its gradients costs per step where it lies in more than one stage.
    """

    name: str
    layers: tuple[int, ...]
    parameter_bytes: int
    optimizer_ms: float
    sum_ms: float
    trainable: bool = True
    optimizer_state_bytes: int = 0
    optimizer_temporary_bytes: int = 0
    optimizer_left_bytes: int = 0
    optimizer_left_by: str = ""


@dataclass(frozen=True, slots=True)
class ChainMemory:
    """The memory of a chain's layers at its microbatch size, as profiled."""

    layers: tuple[LayerMemory, ...]
    size: SizeMemory

    @property
    def is_whole(self) -> bool:
        """Whether all that lifetimes and peaks name is there."""
        lives, gradients = self.size.lifetimes, self.size.gradients
        every: list[Lifetime | GradientLifetime] = [*lives, *gradients]
        named = {i for life in every for i in (life.made, life.freed)}
        named.update(layer for life in gradients for layer in dict(life.gradient_of + life.reads))
        if not named <= set(range(len(self.layers))):
            return False
        peaks = [len(layer.backward_peaks_bytes) for layer in self.layers]
        firsts = [len(layer.backward_first_peaks_bytes) for layer in self.layers]
        inside = all(0 <= life.freed_after < peaks[life.freed] for life in every)
        return inside and min(peaks, default=1) > 0 and peaks == firsts


@dataclass(frozen=True, slots=True)
class Chain:
    """Layers in program order with their costs; times per microbatch in milliseconds, the optimizer's per step.

    `message_ms` is what a stage boundary costs each way besides its tensors' transfers; `boundary_forward_ms` and
    `boundary_backward_ms` are the stages' own work on it.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    forward_ms: tuple[float, ...]
    forward_spread_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    backward_spread_ms: tuple[float, ...]
    backward_first_ms: tuple[float, ...]
    optimizer_ms: tuple[float, ...]
    parameter_bytes: tuple[int, ...]
    plain_cut: tuple[bool, ...]
    tensors: tuple[ChainTensor, ...]
    tied: tuple[ChainTied, ...]
    memory: ChainMemory | None = None
    flops: tuple[int, ...] | None = None
    message_ms: float = 0.0
    boundary_forward_ms: float = 0.0
    boundary_backward_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.ids:
            raise FileError("a chain without layers", "a model has at least one layer", "add layers")
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name == "memory":
                self._check_memory()
            elif field.name == "flops" and values is None:
                continue
            elif field.name in BOUNDARY_COSTS:
                _refuse_wrong_cost(field.name, values)
            elif field.name in ("tensors", "tied"):
                self._check_members(field.name, values)
            elif len(values) != len(self.ids):
                rule = f"there are {len(self.ids)} layers"
                raise FileError(f"{len(values)} values of {field.name}", rule, "give one value per layer")
            elif field.name.endswith(("_ms", "_bytes")):
                for name, value in zip(self.ids, values, strict=True):
                    _refuse_wrong_cost(f"{field.name} of {name}", value)

    @property
    def crossing_forward_ms(self) -> float:
        """What a boundary costs each of its stages forward, whatever crosses it."""
        return self.message_ms + self.boundary_forward_ms

    @property
    def crossing_backward_ms(self) -> float:
        """What a boundary costs each of its stages backward, whatever gradients cross it."""
        return self.message_ms + self.boundary_backward_ms

    def _check_memory(self) -> None:
        if self.memory is None or (len(self.memory.layers) == len(self.ids) and self.memory.is_whole):
            return
        raise FileError(
            "the memory of layers, or peaks, that are not there",
            f"layers are 0 to {len(self.ids) - 1}, each with as many first peaks as later ones",
            "profile the model again",
        )

    def _check_members(self, kind: str, members: Sequence[ChainTensor | ChainTied]) -> None:
        for member in members:
            ordered = (member.producer, member.last_consumer) if isinstance(member, ChainTensor) else member.layers
            if not ordered or min(ordered) < 0 or max(ordered) >= len(self.ids) or sorted(ordered) != list(ordered):
                raise FileError(
                    f"{kind}: {member.name!r} lies in layers {ordered}",
                    f"layers are 0 to {len(self.ids) - 1} in program order, a tensor's producer first",
                    "correct the layers",
                )
            for field in fields(member):
                if field.name.endswith(("_ms", "_bytes")):
                    _refuse_wrong_cost(f"{kind}: {field.name} of {member.name!r}", getattr(member, field.name))


def _refuse_wrong_cost(where: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise FileError(f"{where} is {value}", "costs are finite and not negative", "correct the value")


def crossing(chain: Chain, cut: int) -> tuple[ChainTensor, ...]:
    """The tensors that are alive across a cut before layer `cut`, whether used next door or relayed further."""
    return tuple(tensor for tensor in chain.tensors if tensor.producer < cut <= tensor.last_consumer)


def crossing_ms(chain: Chain) -> tuple[list[float], list[float]]:
    """Forward and backward milliseconds that a cut before each layer costs either of its stages (index 0: no cut).

    All that crosses one way is one message; gradients that have no bytes make none.
    """
    forward, backward = [0.0] * (len(chain.ids) + 1), [0.0] * (len(chain.ids) + 1)
    sent, returned = set[int](), set[int]()
    for tensor in chain.tensors:
        for cut in range(tensor.producer + 1, tensor.last_consumer + 1):
            forward[cut] += tensor.transfer_forward_ms
            backward[cut] += tensor.transfer_backward_ms
            sent.add(cut)
            if tensor.gradient_bytes:
                returned.add(cut)
    for cut in sent:
        forward[cut] += chain.crossing_forward_ms
    for cut in returned:
        backward[cut] += chain.crossing_backward_ms
    return forward, backward


def holds(tied: ChainTied, start: int, stop: int) -> bool:
    """Whether a stage of layers `start` to `stop` holds the tied parameter."""
    return any(start <= layer < stop for layer in tied.layers)


def stage_costs(chain: Chain, cuts: Sequence[int]) -> tuple[StageTimes, ...]:
    """The stages' times where stages 1, 2, … begin at the layers `cuts`.

    Every boundary's transfers are charged to its sender and to its receiver.
    """
    across_forward, across_backward = crossing_ms(chain)
    bounds = [0, *cuts, len(chain.ids)]
    stages = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        forward = across_forward[start] + across_forward[stop]
        backward = across_backward[start] + across_backward[stop]
        tied = sum(group.optimizer_ms for group in chain.tied if holds(group, start, stop))
        stages.append(
            StageTimes(
                forward_ms=sum(chain.forward_ms[start:stop]) + forward,
                backward_ms=sum(chain.backward_ms[start:stop]) + backward,
                backward_first_ms=sum(chain.backward_first_ms[start:stop]) + backward,
                optimizer_ms=sum(chain.optimizer_ms[start:stop]) + tied,
            )
        )
    return tuple(stages)


def split_groups(chain: Chain, cuts: Sequence[int]) -> tuple[ChainTied, ...]:
    """The tied parameters that lie in more than one stage."""
    return tuple(t for t in chain.tied if any(min(t.layers) < cut <= max(t.layers) for cut in cuts))


def step_ms(chain: Chain, cuts: Sequence[int], num_microbatches: int, schedule: str = "gpipe") -> float:
    """The step of a cut, exact: of the stages' times under `schedule`, and the sums of split tied gradients."""
    sums = sum(group.sum_ms for group in split_groups(chain, cuts))
    return scheduled_ms(stage_costs(chain, cuts), num_microbatches, schedule) + sums


def scheduled_ms(stages: Sequence[StageTimes], num_microbatches: int, schedule: str) -> float:
    """The step of stages: GPipe by its closed form, which equals the simulation; other schedules by simulation."""
    if schedule == "gpipe":
        return gpipe_step_ms(stages, num_microbatches)
    return simulate(stages, num_microbatches, schedule).step_ms


def is_plain(chain: Chain, cuts: Sequence[int]) -> bool:
    """Whether stock torch does this cut rightly by `split_spec`: plain cuts, no relays, no tied group apart."""
    relayed = any(sum(t.producer < cut <= t.last_consumer for cut in cuts) > 1 for t in chain.tensors)
    return all(chain.plain_cut[cut] for cut in cuts) and not relayed and not split_groups(chain, cuts)


class CostTable:
    """Prefix sums of a chain, so that a stage's times cost a subtraction; agrees with `stage_costs`.

    `up[j] − down[i]` is the load of a stage of layers i to j, the transfers at both its ends included. A stage that
    begins at layer i ends after `beyond[i]`: with `plain`, nothing may pass over it.
    """

    def __init__(
        self,
        chain: Chain,
        num_microbatches: int,
        plain: bool = False,
        schedule: str = "gpipe",
        fitting: FittingStages | None = None,
    ) -> None:
        self.chain, self.num_microbatches, self.plain, self.schedule = chain, num_microbatches, plain, schedule
        self.fitting = fitting
        self.num_layers = len(chain.ids)
        across_forward, across_backward = (np.array(ms) for ms in crossing_ms(chain))
        self.forward = _prefix(chain.forward_ms)
        self.backward = _prefix(chain.backward_ms)
        self.first = _prefix(chain.backward_first_ms)
        self.optimizer = _prefix(chain.optimizer_ms)
        self.forward_up, self.forward_down = self.forward + across_forward, self.forward - across_forward
        self.backward_up, self.backward_down = self.backward + across_backward, self.backward - across_backward
        self.first_up, self.first_down = self.first + across_backward, self.first - across_backward
        self.allowed = np.array([False, *(self._allows(j) for j in range(1, self.num_layers)), False])
        self.beyond = np.arange(self.num_layers + 1)
        for tensor in chain.tensors if plain else ():
            inside = slice(tensor.producer + 1, tensor.last_consumer + 1)
            self.beyond[inside] = np.maximum(self.beyond[inside], tensor.last_consumer)

    def _allows(self, position: int) -> bool:
        return not self.plain or (self.chain.plain_cut[position] and not split_groups(self.chain, (position,)))

    def stage(self, start: int, stop: int) -> StageTimes:
        """The times of a stage of layers `start` to `stop`."""
        tied = sum(group.optimizer_ms for group in self.chain.tied if holds(group, start, stop))
        return StageTimes(
            float(self.forward_up[stop] - self.forward_down[start]),
            float(self.backward_up[stop] - self.backward_down[start]),
            float(self.first_up[stop] - self.first_down[start]),
            float(self.optimizer[stop] - self.optimizer[start]) + tied,
        )

    def step(self, cuts: Cuts) -> float:
        """The step of `cuts` under the table's schedule; infinite where the cuts are not allowed."""
        if self.plain and not is_plain(self.chain, cuts):
            return float("inf")
        if self.fitting is not None and not self.fitting.fits(cuts):
            return float("inf")
        stages = [self.stage(start, stop) for start, stop in pairwise((0, *cuts, self.num_layers))]
        sums = sum(tied.sum_ms for tied in split_groups(self.chain, cuts))
        return scheduled_ms(stages, self.num_microbatches, self.schedule) + sums

    @cached_property
    def segments(self) -> Mask:
        """segments[i, j]: layers i to j may be a stage."""
        usable = self.allowed.copy()
        usable[[0, -1]] = True
        position = np.arange(self.num_layers + 1)
        longer: Mask = self.beyond[:, None] < position[None, :]
        legal: Mask = longer & usable[None, :] & usable[:, None]
        return legal

    def stages(self, num_stages: int) -> list[Mask]:
        """[i, j] by stage: layers i to j may be that stage, and fit into its memory where there is a limit."""
        if self.fitting is None:
            return [self.segments] * num_stages
        return [self.segments & mask for mask in self.fitting.masks(num_stages)]

    def most_stages(self) -> int:
        """The largest number of stages that the legal cuts allow: every stage ends as early as it may."""
        stages, start = 1, 0
        for position in range(1, self.num_layers):
            if self.allowed[position] and position > self.beyond[start]:
                stages, start = stages + 1, position
        return stages


def _prefix(values: Sequence[float]) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)])
