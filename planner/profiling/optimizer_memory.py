"""What an optimizer keeps and needs: its state, and the temporaries of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

import torch

from planner.profiling.live_storages import LiveStorages, Phase

SAMPLE = 64
ALL_AT_ONCE = 0.95


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """Of one group of parameters: the optimizer's state, and what a later step needs besides, in bytes.

    Where the group `left_by` is updated just before, another `left_bytes` of temporaries are left.
    """

    state_bytes: int
    temporary_bytes: int
    left_bytes: int = 0
    left_by: int = -1


def track_optimizer(
    groups: Sequence[Sequence[torch.nn.Parameter]],
    order: Iterable[torch.nn.Parameter],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    block_bytes: int = 1,
) -> tuple[list[OptimizerMemory], bool]:
    """The optimizer's memory for every group, and whether temporaries of groups add up (else the largest counts).

    `order` are all parameters as the optimizer goes through them. What it has left of one (a plain AdamW on a CPU: its
    denominator) is still there when it makes the temporaries of the next.
    """
    device = next((parameter.device for group in groups for parameter in group), torch.device("cpu"))
    sample = _Sample.of(make_optimizer, device)
    found = [_one_optimizer(list(group), make_optimizer, block_bytes) for group in groups]
    return sample.in_order(found, groups, order), sample.all_exist


def track_optimizer_by_sample(
    groups: Sequence[Sequence[torch.nn.Parameter]],
    order: Iterable[torch.nn.Parameter],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    device: torch.device,
) -> tuple[list[OptimizerMemory], bool]:
    """`track_optimizer` for parameters without values: in proportion to what small real ones on `device` need.

    What does not grow with the parameters' bytes (factored states) is over-estimated.
    """
    sample, memory = _Sample.of(make_optimizer, device), []
    for group in groups:
        sizes = [parameter.nbytes for parameter in group]
        most = sum(sizes) if sample.all_exist else max(sizes, default=0)
        memory.append(OptimizerMemory(int(sample.state * sum(sizes)) + 1, int(sample.temporary * most) + 1))
    return sample.in_order(memory, groups, order), sample.all_exist


@dataclass(frozen=True, slots=True)
class _Sample:
    """What an optimizer needs per byte of a parameter, and the fraction of its temporaries that the next one finds."""

    state: float
    temporary: float
    kept: float

    @staticmethod
    def of(
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], device: torch.device
    ) -> _Sample:
        sample = [torch.nn.Parameter(torch.zeros(SAMPLE, SAMPLE, device=device)) for _ in range(2)]
        one, two = (_one_optimizer(sample[:count], make_optimizer, 1) for count in (1, 2))
        num_bytes, more = sample[0].nbytes, two.temporary_bytes - one.temporary_bytes
        kept = min(1.0, max(0.0, more / max(1, one.temporary_bytes)))
        return _Sample(one.state_bytes / num_bytes, one.temporary_bytes / num_bytes, kept)

    @property
    def all_exist(self) -> bool:
        """Whether the temporaries of all parameters exist at once."""
        return self.kept > ALL_AT_ONCE

    def in_order(
        self,
        memory: Sequence[OptimizerMemory],
        groups: Sequence[Sequence[torch.nn.Parameter]],
        order: Iterable[torch.nn.Parameter],
    ) -> list[OptimizerMemory]:
        """The memory of all groups, with what the group before leaves to each."""
        found = list(memory)
        owner = {id(parameter): number for number, group in enumerate(groups) for parameter in group}
        for earlier, later in pairwise(parameter for parameter in order if id(parameter) in owner):
            before, number = owner[id(earlier)], owner[id(later)]
            most = self.temporary * (later.nbytes + self.kept * earlier.nbytes)
            left = ceil(most) - found[number].temporary_bytes
            if before != number and left > found[number].left_bytes and not self.all_exist:
                found[number] = replace(found[number], left_bytes=left, left_by=before)
        return found


def _one_optimizer(
    parameters: list[torch.nn.Parameter],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    block_bytes: int,
) -> OptimizerMemory:
    if not parameters:
        return OptimizerMemory(0, 0)
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = make_optimizer(parameters)
    live = LiveStorages(block_bytes)
    live.know([*parameters, *(parameter.grad for parameter in parameters)])
    with live:
        for number in range(2):
            live.enter(Phase(number, "forward", 0))
            optimizer.step()
    state = live.live_bytes
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return OptimizerMemory(state, live.phases[Phase(1, "forward", 0)].rise_bytes)
