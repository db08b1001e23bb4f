"""The value that the ILP solves: layers in program order, what crosses between them, and what a cut costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from planner.errors import FileError
from planner.scheduling.closed_forms import gpipe_step_ms
from planner.scheduling.simulation import StageTimes

Cuts = tuple[int, ...]


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


@dataclass(frozen=True, slots=True)
class Chain:
    """Layers in program order with their costs; times per microbatch in milliseconds, the optimizer's per step."""

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

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name not in ("tensors", "tied") and len(values) != len(self.ids):
                raise FileError(f"{len(values)} values of {field.name}", f"there are {len(self.ids)} layers")
            if field.name.endswith("_ms") and not all(math.isfinite(v) and v >= 0 for v in values):
                raise FileError(f"{field.name} has a negative or infinite value", "costs are finite and not negative")


def crossing(chain: Chain, cut: int) -> tuple[ChainTensor, ...]:
    """The tensors that are alive across a cut before layer `cut`, whether used next door or relayed further."""
    return tuple(tensor for tensor in chain.tensors if tensor.producer < cut <= tensor.last_consumer)


def crossing_ms(chain: Chain) -> tuple[list[float], list[float]]:
    """Forward and backward transfer milliseconds of a cut before each layer (index 0: no cut)."""
    forward, backward = [0.0] * (len(chain.ids) + 1), [0.0] * (len(chain.ids) + 1)
    for tensor in chain.tensors:
        for cut in range(tensor.producer + 1, tensor.last_consumer + 1):
            forward[cut] += tensor.transfer_forward_ms
            backward[cut] += tensor.transfer_backward_ms
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


def step_ms(chain: Chain, cuts: Sequence[int], num_microbatches: int) -> float:
    """The GPipe step of a cut, exact: the closed form on the stages' times, and the sums of split tied gradients."""
    sums = sum(group.sum_ms for group in split_groups(chain, cuts))
    return gpipe_step_ms(stage_costs(chain, cuts), num_microbatches) + sums


def is_plain(chain: Chain, cuts: Sequence[int]) -> bool:
    """Whether stock torch does this cut rightly by `split_spec`: plain cuts, no relays, no tied group apart."""
    relayed = any(sum(t.producer < cut <= t.last_consumer for cut in cuts) > 1 for t in chain.tensors)
    return all(chain.plain_cut[cut] for cut in cuts) and not relayed and not split_groups(chain, cuts)
