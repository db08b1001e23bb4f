"""A stage that waits while another one uses the device: all its tensors move to the host and back.

On a CPU nothing moves: there a stage's memory is counted from its own tensors, not from the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Parking:
    """Moves a module (with its gradients), an optimizer's state and a stage's receive buffers."""

    def __init__(self, device: torch.device, module: nn.Module, optimizer: Any = None, stage: Any = None) -> None:
        self.device, self.module, self.optimizer, self.stage = device, module, optimizer, stage
        self.state_on_device: list[tuple[dict[Any, Any], Any]] = []

    def leave(self) -> None:
        """Off the device."""
        if self.device.type == "cpu":
            return
        self.module.to("cpu")
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        self.state_on_device = [
            (state, key)
            for state in states
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.device.type != "cpu"
        ]
        self._move_rest(torch.device("cpu"))

    def enter(self) -> None:
        """Back onto the device."""
        if self.device.type == "cpu":
            return
        self.module.to(self.device)
        self._move_rest(self.device)

    def _move_rest(self, to: torch.device) -> None:
        for state, key in self.state_on_device:
            state[key] = state[key].to(to)
        if self.stage is None:
            return
        for infos in [*self.stage.args_recv_info.values(), *self.stage.grad_recv_info.values()]:
            for info in infos:
                if getattr(info, "buffer", None) is not None:
                    info.buffer = info.buffer.detach().to(to).requires_grad_(info.buffer.requires_grad)
