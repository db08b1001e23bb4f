"""A clock that only operators of known cost advance, and a device that reads it: profiles become exact."""

from __future__ import annotations

import itertools

import torch


class WorkingClock:
    """Milliseconds since the start of the test; a forward right after a backward takes `after_backward_ms` longer."""

    def __init__(self) -> None:
        self.now_ms = self.after_backward_ms = 0.0
        self.in_backward = False

    def work(self, ms: float, *, backward: bool) -> None:
        self.now_ms += ms + (self.after_backward_ms if self.in_backward and not backward else 0.0)
        self.in_backward = backward


CLOCK = WorkingClock()


@torch.library.custom_op("evenstage_test::work", mutates_args=())
def work(x: torch.Tensor, forward_ms: float, backward_ms: float) -> torch.Tensor:
    CLOCK.work(forward_ms, backward=False)
    return x.clone()


@work.register_fake
def _(x, forward_ms, backward_ms):
    return torch.empty_like(x)


@torch.library.custom_op("evenstage_test::work_backward", mutates_args=())
def work_backward(gradient: torch.Tensor, backward_ms: float) -> torch.Tensor:
    CLOCK.work(backward_ms, backward=True)
    return gradient.clone()


@work_backward.register_fake
def _(gradient, backward_ms):
    return torch.empty_like(gradient)


def _keep(ctx, inputs, output):
    ctx.backward_ms = inputs[2]


def _backward(ctx, gradient):
    return work_backward(gradient, ctx.backward_ms), None, None


work.register_autograd(_backward, setup_context=_keep)


class Layer(torch.nn.Module):
    """A layer that takes exactly so long."""

    def __init__(self, forward_ms: float, backward_ms: float) -> None:
        super().__init__()
        self.costs = (forward_ms, backward_ms)
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return work(x * self.weight, *self.costs)


class WorkingDevice:
    """A device whose stamps are the clock's."""

    clock = "thread-cpu"
    torch_device = torch.device("cpu")

    def stamp(self):
        return CLOCK.now_ms

    def elapsed_ms(self, stamps):
        return [later - earlier for earlier, later in itertools.pairwise(stamps)]

    def reset_peak_memory(self):
        pass

    def peak_memory_bytes(self):
        return None
