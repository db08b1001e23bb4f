"""Custom autograd Functions: a gradient reversal (backward is no derivative), two outputs, nested, under no_grad."""

import torch
from torch import nn

BATCH_SIZE = 8


class Reversal(torch.autograd.Function):
    """Identity forward, minus `strength` times the gradient backward: forward alone says nothing about training."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.strength * gradient, None


class SineAndScale(torch.autograd.Function):
    """Two outputs that are trained, one that is not, one that is no tensor; backward is the true derivative."""

    @staticmethod
    def forward(x, scale):
        return torch.sin(x), x * scale, x > 0, None

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, of_sine, of_scaled, of_mask, of_nothing):
        x, scale = ctx.saved_tensors
        return of_sine * torch.cos(x) + of_scaled * scale, (of_scaled * x).sum(0)


class StraightThrough(torch.autograd.Function):
    """Rounds forward, passes the gradient on; calls another Function inside."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(Reversal.apply(x, 3.0))

    @staticmethod
    def backward(ctx, gradient):
        return gradient


reverse = Reversal.apply


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.label = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.domain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        x = self.features(x)
        sine, scaled, mask, nothing = SineAndScale.apply(x, self.scale)
        assert nothing is None
        with torch.no_grad():
            rounded = StraightThrough.apply(x * 4)
        label = self.label(sine + scaled.masked_fill(mask, 0.5) + 0.1 * rounded)
        return label, self.domain(reverse(StraightThrough.apply(x * 4) / 4, 0.5))


def build_model():
    return Functions()


def make_batch(batch_size):
    return torch.randn(batch_size, 6), (torch.randint(0, 3, (batch_size,)), torch.randint(0, 2, (batch_size,)))


def loss_fn(output, targets):
    return sum(nn.functional.cross_entropy(o, t) for o, t in zip(output, targets, strict=True))
