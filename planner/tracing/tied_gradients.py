"""Gradients of tied parameters, summed over the stages that hold a copy."""

from __future__ import annotations

from typing import Any

from planner.files.plan_file import TiedParameter


def sum_tied_gradients(tied: tuple[TiedParameter, ...], stage: Any) -> None:
    """Add up, in place, the gradient of every tied parameter over its holders, with point-to-point messages only.

    The first holder collects in the order of the stages and sends the sum back, so that every holder ends with the
    same bits. Raises KeyError where the stage lacks a parameter that the plan says it holds.
    """
    if not tied:
        return
    parameters = dict(stage.submod.named_parameters())
    for entry in tied:
        if stage.stage_index in entry.stages:
            _sum_one(entry, parameters[entry.name], stage)


def _sum_one(entry: TiedParameter, parameter: Any, stage: Any) -> None:
    import torch
    import torch.distributed as dist

    group = stage.group
    ranks = holder_ranks(entry, stage)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = parameter.grad.contiguous()
    own = _global_rank(stage, stage.stage_index)
    if own == ranks[0]:
        for rank in ranks[1:]:
            received = torch.empty_like(gradient)
            dist.recv(received, rank, group=group)
            gradient += received
        for rank in ranks[1:]:
            dist.send(gradient, rank, group=group)
    else:
        dist.send(gradient, ranks[0], group=group)
        dist.recv(gradient, ranks[0], group=group)
    parameter.grad.copy_(gradient)


def holder_ranks(entry: TiedParameter, stage: Any) -> list[int]:
    """The global ranks of the stages that hold the parameter, in the order of the stages."""
    return [_global_rank(stage, index) for index in entry.stages]


def _global_rank(stage: Any, index: int) -> int:
    import torch.distributed as dist

    rank = stage.stage_index_to_group_rank.get(index, index)
    return dist.get_global_rank(stage.group, rank) if stage.group is not None else int(rank)
