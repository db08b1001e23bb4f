"""Other tensors in the places of a module's parameters and buffers, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def replaced_state(
    modules: Iterable[nn.Module], replacement: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[dict[int, Any]]:
    """Put `replacement(path, tensor)` where each parameter and buffer of `modules` is; once for each tensor.

    A parameter's replacement becomes one, and requires a gradient if that does. Yields what stands for the id of each
    tensor; afterwards everything is as it was.

    >>> linear = nn.Linear(2, 1)
    >>> with replaced_state([linear], lambda path, tensor: torch.ones(tensor.shape)):
    ...     linear(torch.ones(1, 2)).tolist()
    [[3.0]]
    """
    places: list[tuple[dict[str, Any], str, torch.Tensor, str]] = [
        (kept, name, tensor, f"{path}.{name}")
        for module in modules
        for path, part in module.named_modules()
        for kept in (part._parameters, part._buffers)
        for name, tensor in kept.items()
        if tensor is not None
    ]
    found: dict[int, Any] = {}
    try:
        for kept, name, tensor, path in places:
            if id(tensor) not in found:
                value = replacement(path, tensor)
                is_parameter = isinstance(tensor, nn.Parameter) and value is not tensor
                found[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
            kept[name] = found[id(tensor)]
        yield found
    finally:
        for kept, name, tensor, _ in places:
            kept[name] = tensor
