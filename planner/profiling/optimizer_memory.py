"""What an optimizer keeps and needs: its state, and the temporaries of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from planner.files.profile_file import temporaries_at_once
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
) -> tuple[list[OptimizerMemory], float]:
    """The optimizer's memory for every group, and how much of one group's temporaries the next one's find alive.

    That is a fraction: 1 where the temporaries of all groups exist at once, less where the optimizer goes from
    parameter to parameter. A plain AdamW on a CPU then still has the denominator of the parameter before, half of its
    temporaries.
    """
    device = next((parameter.device for group in groups for parameter in group), torch.device("cpu"))
    found = [_one_optimizer(list(group), make_optimizer, block_bytes) for group in groups]
    return found, _sampled(make_optimizer, device)[1]


def track_optimizer_by_sample(
    groups: Sequence[Sequence[torch.nn.Parameter]],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    device: torch.device,
) -> tuple[list[OptimizerMemory], float]:
    """`track_optimizer` for parameters without values: in proportion to what a small real one on `device` needs.

    What does not grow with the parameters' bytes (factored states) is over-estimated.
    """
    (state, temporary), kept = _sampled(make_optimizer, device)
    memory = []
    for group in groups:
        sizes = [parameter.numel() * parameter.element_size() for parameter in group]
        temporaries = int(temporary * temporaries_at_once(sizes, kept)) + 1
        memory.append(OptimizerMemory(int(state * sum(sizes)) + 1, temporaries))
    return memory, kept


def _sampled(
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], device: torch.device
) -> tuple[tuple[float, float], float]:
    """State and temporaries, both per byte of a parameter, and the fraction of `track_optimizer`."""
    sample = [torch.nn.Parameter(torch.zeros(SAMPLE, SAMPLE, device=device)) for _ in range(2)]
    one, two = (_one_optimizer(sample[:count], make_optimizer, 1) for count in (1, 2))
    num_bytes = SAMPLE * SAMPLE * 4
    kept = (two.temporary_bytes - one.temporary_bytes) / max(1, one.temporary_bytes)
    return (one.state_bytes / num_bytes, one.temporary_bytes / num_bytes), min(1.0, max(0.0, kept))


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
