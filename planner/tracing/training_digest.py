"""What a profile depends on beside the graph: which parameters are trained, by which optimizer, on which loss."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from planner.errors import ModelFileError
from planner.tracing.loading import ModelSource


def training_digest(source: ModelSource, traced: fx.GraphModule) -> str:
    """A digest of the trainable parameters' names, the optimizer and its options, and the text of its functions.

    The optimizer is made over a parameter that is thrown away. What a function calls in its turn is not seen.
    """
    trained = sorted(name for name, parameter in traced.named_parameters() if parameter.requires_grad)
    functions = [_text(function) for function in (source.loss_fn, source.make_optimizer)]
    parts = [*trained, _optimizer(source), source.loss_reduction, *functions]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _optimizer(source: ModelSource) -> str:
    try:
        optimizer = source.make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    except ModelFileError as error:  # it needs the real parameters; its text is in the digest all the same
        return error.got
    options = {name: _plain(value) for name, value in optimizer.param_groups[0].items() if name != "params"}
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__} {sorted(options.items())}"


def _plain(value: Any) -> str:
    """The value as text without addresses, which differ from process to process."""
    return (
        repr(value) if isinstance(value, (int, float, str, tuple, type(None), torch.Tensor)) else type(value).__name__
    )


def _text(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""
