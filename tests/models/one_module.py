"""A model without children: everything happens in one forward, a write in place and a running buffer included."""

import torch
from torch import nn

WIDTH, ROUNDS = 32, 6


class OneModule(nn.Module):
    """Residual rounds of a matrix each, of which the last is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(ROUNDS))
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of shape (batch, width) → the same shape."""
        skip = x
        for weight in self.weights:
            x = torch.relu_(x @ weight) + x
        self.seen += x.detach().mean(0)
        return x + skip


def build_model() -> nn.Module:
    """The model by the seed."""
    return OneModule()


def make_batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and targets of the model's width."""
    return torch.randn(batch_size, WIDTH), torch.randn(batch_size, WIDTH)


def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean squared error."""
    return nn.functional.mse_loss(output, targets)
