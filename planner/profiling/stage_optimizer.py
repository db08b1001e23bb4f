"""The optimizer's step of a whole stage where training takes it: after backward, when its state has left the caches.

Timed over and over, one layer's parameters after another's, an optimizer finds the caches warm, and pays its calls for
every layer. What a stage's step takes is therefore measured between the rounds; from the layers come only the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import fmean, median

import torch

from planner.machine.device import Device


class StageOptimizer:
    """Steps over the parameters of a stage that got a gradient, at a learning rate of 0: the weights stay."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        device: Device,
    ) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = make_optimizer(trained) if trained else None
        self.device = device
        self.samples: list[float] = []
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["lr"] = 0.0

    def step(self, *, keep: bool) -> None:
        """One step, of which, with `keep`, the time is a sample."""
        if self.optimizer is None:
            return
        self._take_norm()
        before = self.device.stamp()
        self.optimizer.step()
        if keep:
            self.samples += self.device.elapsed_ms([before, self.device.stamp()])

    def _take_norm(self) -> None:
        """Read every gradient, as training does before its optimizer steps: the caches are then as they will be."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    torch.linalg.vector_norm(parameter.grad)

    @property
    def taken_ms(self) -> float:
        """What a step takes; 0 where nothing is trained."""
        return median(self.samples) if self.samples else 0.0


def shared_out(
    alone_ms: Sequence[float], starts: Sequence[int], tied: Sequence[Sequence[int]], taken_ms: Sequence[float]
) -> list[float]:
    """What stages' steps took, shared out among their layers and tied parameters, each by what it takes alone.

    `alone_ms` has a time for every layer, then for every tied parameter, which each stage updates that has one of its
    layers (`tied`). `starts` are the stages' first layers, `taken_ms` their steps.

    >>> shared_out([1.0, 1.0, 2.0], [0, 2], [], [3.0, 1.0])
    [1.5, 1.5, 1.0]
    """
    count = len(alone_ms) - len(tied)
    spans = [range(start, stop) for start, stop in pairwise([*starts, count])]
    holders = [[index for index, span in enumerate(spans) if set(span) & set(layers)] for layers in tied]
    factors = []
    for index, (span, taken) in enumerate(zip(spans, taken_ms, strict=True)):
        own = sum(alone_ms[layer] for layer in span)
        own += sum(ms for ms, stages in zip(alone_ms[count:], holders, strict=True) if index in stages)
        factors.append(taken / own if own > 0 and taken > 0 else 1.0)
    of_layers = [alone_ms[layer] * factors[index] for index, span in enumerate(spans) for layer in span]
    of_tied = zip(alone_ms[count:], holders, strict=True)
    return of_layers + [ms * fmean(factors[index] for index in stages) for ms, stages in of_tied]
