"""A plan trained in one process, through torch's own stages and schedule, beside the eager model.

All stages are held by one rank and run one after the other: `ScheduleLoopedBFS` hands each value from stage to stage
as the stages of a rank do, microbatch by microbatch. Only messages between processes are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining.schedules import ScheduleLoopedBFS
from torch.utils._pytree import tree_leaves

from planner.files.plan_file import Plan
from planner.machine.device import choose_device
from planner.tracing.loading import ModelSource, as_call, build, make_batch, rows
from planner.tracing.precision import autocast
from planner.tracing.rewriting import canonical_names
from runner.stages import BuiltStage, build_stages

LEARNING_RATE = 0.1
FLOOR = 1e-3


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process only; an existing one is used."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def largest_difference(plan: Plan, source: ModelSource, num_steps: int = 2) -> tuple[float, str]:
    """The largest relative difference between `plan` trained and the eager model, and what differs most.

    Held against each other in `num_steps` steps of SGD are the loss, every gradient, and in the end every weight and
    buffer. A tensor's difference is relative to its largest value, or to a thousandth of the largest of its kind in
    the model where that is more: a gradient that is zero but for rounding is not compared with itself.
    """
    with alone():
        split = _Split(plan, source)
        eager = _Eager(plan, source)
        worst = (0.0, "")
        for step in range(num_steps):
            batch, same = (make_batch(source, plan.seed, step, plan.batch_size) for _ in range(2))
            losses = {"loss": split.backward(batch)}, {"loss": eager.backward(same)}
            worst = max(worst, _worst(*losses), _worst(split.gradients(), eager.gradients()))
            split.descend()
            eager.descend()
        return max(worst, _worst(split.state(), eager.state()))


def _worst(got: dict[str, Any], expected: dict[str, Any]) -> tuple[float, str]:
    """Largest difference of tensors by name. Raises AssertionError where one side lacks a name."""
    assert set(got) == set(expected), sorted(set(got) ^ set(expected))
    floor = FLOOR * max((_size(tensor) for tensor in expected.values()), default=0.0)
    found = [(0.0, "")]
    for name, tensor in expected.items():
        apart = torch.where(got[name] == tensor, 0.0, (got[name].double() - tensor.double()).abs())
        difference = float(apart.max()) if apart.numel() else 0.0
        if difference:
            found.append((difference / max(_size(tensor), floor), name))
    return max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0])


def _size(tensor: torch.Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


class _Split:
    """All stages of a plan in this process."""

    def __init__(self, plan: Plan, source: ModelSource) -> None:
        self.source, self.precision = source, plan.precision
        self.built: tuple[BuiltStage, ...] = tuple(
            build_stages(plan, source, range(plan.num_stages), choose_device("cpu", 0))
        )
        self.stages = [built.stage for built in self.built]
        self.schedule = ScheduleLoopedBFS(
            self.stages, plan.num_microbatches, loss_fn=self._loss, scale_grads=source.loss_reduction == "mean"
        )
        for stage in self.stages:
            stage._get_init_p2p_neighbors_ops = list  # a rank cannot open a connection to itself
            stage.set_local_fwd_input = _Mailbox(stage)
        self.targets: Any = None

    def _loss(self, output: Any, row_numbers: torch.Tensor) -> torch.Tensor:
        start, stop = int(row_numbers[0]), int(row_numbers[-1]) + 1
        with autocast(self.precision, "cpu"):
            return self.source.loss_fn(self.built[-1].rebuild_output(output), rows(self.targets, start, stop))

    def backward(self, batch: tuple[Any, Any]) -> torch.Tensor:
        for stage in self.stages:
            stage.submod.zero_grad()
        inputs, self.targets = batch
        leaves = [leaf for leaf in tree_leaves(as_call(inputs)) if isinstance(leaf, torch.Tensor)]
        losses: list[torch.Tensor] = []
        self.schedule.step(*leaves, target=torch.arange(len(leaves[0])), losses=losses, return_outputs=False)
        self._sum_tied()
        return _batch_loss(self.source, losses)

    def _sum_tied(self) -> None:
        """What `sum_tied_gradients` does between processes."""
        for entry in self.built[0].tied:
            holders = [dict(self.stages[index].submod.named_parameters())[entry.name] for index in entry.stages]
            parts = [parameter.grad for parameter in holders if parameter.grad is not None]
            total = sum(parts[1:], parts[0])
            for parameter in holders:
                parameter.grad = total.clone()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {
            name: parameter.grad
            for stage in self.stages
            for name, parameter in stage.submod.named_parameters()
            if parameter.grad is not None
        }

    def descend(self) -> None:
        for stage in self.stages:
            _descend(stage.submod)

    def state(self) -> dict[str, torch.Tensor]:
        held = dict(self.built[0].untouched_state)
        for stage in self.stages:
            held.update(stage.submod.state_dict())
        names = self.built[0].aliases
        return {name: held[names.get(name, name)] for name in self.built[0].state_names}


class _Mailbox:
    """Hands values to the next stage of this rank as a message would: contiguous, as announced, and copied."""

    def __init__(self, stage: Any) -> None:
        self.stage, self.take = stage, stage.set_local_fwd_input

    def __call__(self, values: Any, microbatch: int) -> None:
        sent = values if isinstance(values, tuple) else (values,)
        for value, expected in zip(sent, self.stage.args_recv_info[microbatch], strict=True):
            got, announced = (value.shape, value.dtype, value.stride()), (expected.buffer.shape, expected.buffer.dtype)
            assert value.is_contiguous() and got[:2] == announced, (got, announced)
        self.take(tuple(value.clone() for value in sent), microbatch)


class _Eager:
    """The unsplit model, one microbatch after the other."""

    def __init__(self, plan: Plan, source: ModelSource) -> None:
        self.plan, self.source = plan, source
        self.model = build(source, plan.seed)
        self.names = canonical_names(self.model)

    def backward(self, batch: tuple[Any, Any]) -> torch.Tensor:
        self.model.zero_grad()
        losses = []
        for start in range(0, self.plan.batch_size, self.plan.microbatch_size):
            stop = start + self.plan.microbatch_size
            args, kwargs = as_call(rows(batch[0], start, stop))
            with autocast(self.plan.precision, "cpu"):
                losses.append(self.source.loss_fn(self.model(*args, **kwargs), rows(batch[1], start, stop)))
            losses[-1].backward()
        if self.source.loss_reduction == "mean":
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= len(losses)
        return _batch_loss(self.source, losses)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def descend(self) -> None:
        _descend(self.model)

    def state(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


def _batch_loss(source: ModelSource, losses: list[torch.Tensor]) -> torch.Tensor:
    values = torch.stack([loss.detach().reshape(()) for loss in losses])
    return values.mean() if source.loss_reduction == "mean" else values.sum()


def _descend(module: nn.Module) -> None:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if parameters:
        torch.optim.SGD(parameters, lr=LEARNING_RATE).step()
