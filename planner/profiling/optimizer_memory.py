"""What an optimizer keeps and needs: its state, and the temporaries of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from planner.profiling.live_storages import LiveStorages, Phase

SAMPLE = 64


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """Of one group of parameters: the optimizer's state, and what a later step needs besides, in bytes."""

    state_bytes: int
    temporary_bytes: int


def track_optimizer(
    groups: Sequence[Sequence[torch.nn.Parameter]],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    block_bytes: int = 1,
) -> tuple[list[OptimizerMemory], bool]:
    """The optimizer's memory for every group, and whether temporaries of groups add up (else the largest counts)."""
    found = [_one_optimizer(list(group), make_optimizer, block_bytes) for group in groups]
    largest = max((memory.temporary_bytes for memory in found), default=0)
    everything = _one_optimizer([p for group in groups for p in group], make_optimizer, block_bytes)
    return found, everything.temporary_bytes > 1.05 * largest


def track_optimizer_by_sample(
    groups: Sequence[Sequence[torch.nn.Parameter]],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
) -> tuple[list[OptimizerMemory], bool]:
    """`track_optimizer` for parameters without values: in proportion to what two small real ones need.

    What does not grow with the parameters' bytes (factored states) is over-estimated.
    """
    sample = [[torch.nn.Parameter(torch.zeros(SAMPLE, SAMPLE))] for _ in range(2)]
    found, add = track_optimizer(sample, make_optimizer)
    num_bytes = SAMPLE * SAMPLE * 4
    state, temporary = found[0].state_bytes / num_bytes, found[0].temporary_bytes / num_bytes
    memory = []
    for group in groups:
        sizes = [parameter.numel() * parameter.element_size() for parameter in group]
        most = sum(sizes) if add else max(sizes, default=0)
        memory.append(OptimizerMemory(int(state * sum(sizes)) + 1, int(temporary * most) + 1))
    return memory, add


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
    return OptimizerMemory(state, live.rising[Phase(1, "forward", 0)])
