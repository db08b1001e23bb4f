"""A chain of wide layers whose weights exceed what a process may hold: planned with --meta, trained stage by stage.

Nothing is downloaded; the size is set by two environment variables (by default 2.1 GB of weights).

    plan --gpus 4 --meta examples/large.py --train --steps 2
"""

import os
from collections.abc import Iterable

import torch
from torch import nn

BATCH_SIZE = 4
WIDTH = int(os.environ.get("WIDTH", "3072"))
DEPTH = int(os.environ.get("DEPTH", "56"))


class Block(nn.Module):
    """A residual layer: norm, a square matrix, GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape, [batch, width]."""
        return x + nn.functional.gelu(self.linear(self.norm(x)))


class WideNetwork(nn.Module):
    """`DEPTH` blocks of `WIDTH` and a small head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(WIDTH) for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, 10)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.002)
            nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 10]."""
        return self.head(self.blocks(x))


def build_model() -> nn.Module:
    """The model with fresh weights; they are drawn twice, by the layers and by the pass over them."""
    return WideNetwork()


def make_batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and random classes: what counts here is the memory."""
    return torch.randn(batch_size, WIDTH), torch.randint(0, 10, (batch_size,))


def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(output, targets)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain SGD, which keeps no state: a stage needs its weights and as much again for gradients."""
    return torch.optim.SGD(parameters, lr=0.01)
