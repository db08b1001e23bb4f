"""What a stage boundary costs its two stages besides the layers: torch's own bookkeeping, and waking up from a wait.

Measured where it arises: a small pipeline of as many stages as copies, run by torch's own schedule. Each stage's layers
are one chain of products, long enough to leave the caches full of other things, as a real stage does; what a chunk
takes besides them is the boundary's. On a GPU that work is done by the host while the device computes, so it is nought.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from planner.files.plan_file import boundaries_of
from planner.machine.device import Device

WIDTH, DEPTH, ROWS = 512, 4, 64
MICROBATCHES, STEPS, WARM_UP_STEPS = 8, 10, 3


@dataclass(frozen=True, slots=True)
class BoundaryCost:
    """Milliseconds of thread time per microbatch that a boundary costs each of its two stages."""

    forward_ms: float = 0.0
    backward_ms: float = 0.0


NO_COST = BoundaryCost()


@functools.cache
def measure_boundary(device: Device) -> BoundaryCost:
    """The cost of a boundary between the concurrent copies; collective, and measured once. Nought for a single copy."""
    copies = dist.get_world_size()
    if copies == 1 or device.clock != "thread-cpu":
        return NO_COST
    torch.manual_seed(0)
    chain = _Chain(device)
    stage = PipelineStage(chain, dist.get_rank(), copies, device.torch_device, input_args=(torch.ones(ROWS, WIDTH),))
    watch = _Watch(stage, chain, device)
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=lambda output, _: output.square().mean())
    batch = torch.ones(MICROBATCHES * ROWS, WIDTH)
    own: list[tuple[float, float]] = []
    for number in range(-WARM_UP_STEPS, STEPS):
        chain.zero_grad()
        arguments = (batch,) if stage.is_first else ()
        schedule.step(*arguments, target=batch if stage.is_last else None)
        forward, backward = watch.take()
        if number >= 0:
            own += list(zip(forward, backward, strict=True))
    everyone: list[Any] = [None] * copies
    dist.all_gather_object(everyone, own)
    return shared([tuple(median(column) for column in zip(*stage, strict=True)) for stage in everyone])


def shared(stages: Sequence[tuple[float, float]]) -> BoundaryCost:
    """What fits best to what the stages spent, (forward, backward), where the outer ones have one boundary, not two.

    >>> shared([(0.25, 0.5), (0.5, 1.0), (0.25, 0.5)])
    BoundaryCost(forward_ms=0.25, backward_ms=0.5)
    """
    count = len(stages)
    sides = [boundaries_of(number, count) for number in range(count)]
    weight = sum(side * side for side in sides)
    if not weight:
        return NO_COST
    forward, backward = (
        max(0.0, sum(side * spent for side, spent in zip(sides, column, strict=True)) / weight)
        for column in zip(*stages, strict=True)
    )
    return BoundaryCost(forward, backward)


class _Chain(nn.Module):
    """Products with square matrices, and a stamp where they begin and end, forward and backward."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(DEPTH))
        self.stamps: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _Stamped.apply(x, self._stamp)  # type: ignore[no-untyped-call]
        for weight in self.weights:
            x = x @ weight
        stamped: torch.Tensor = _Stamped.apply(x, self._stamp)  # type: ignore[no-untyped-call]
        return stamped

    def _stamp(self) -> None:
        self.stamps.append(self.device.stamp())


class _Stamped(torch.autograd.Function):
    """The identity, which stamps."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stamp: Callable[[], None]) -> torch.Tensor:
        ctx.stamp = stamp
        stamp()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.stamp()
        return gradient, None


@dataclass(slots=True)
class _Watch:
    """Times the chunks of a stage, without what its chain takes."""

    stage: Any
    chain: _Chain
    device: Device
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stage.forward_one_chunk = self._timed(self.stage.forward_one_chunk, self.forward)
        self.stage.backward_one_chunk = self._timed(self.stage.backward_one_chunk, self.backward)

    def _timed(self, method: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.chain.stamps.clear()
            start = self.device.stamp()
            result = method(*args, **kwargs)
            stamps = [start, *self.chain.stamps, self.device.stamp()]
            elapsed = self.device.elapsed_ms(stamps)
            into.append(elapsed[0] + (elapsed[-1] if len(elapsed) == 3 else 0.0))
            return result

        return timed

    def take(self) -> tuple[list[float], list[float]]:
        """What the last step took; forgets it."""
        taken = list(self.forward), list(self.backward)
        self.forward.clear()
        self.backward.clear()
        return taken
