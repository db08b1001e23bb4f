"""The seed rule once more, with nothing of evenstage in it: plain torch on the plain module."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_map


def load(file: Path) -> ModuleType:
    """`file` executed as a module of its own."""
    module = ModuleType(f"eager_{file.stem}")
    sys.modules[module.__name__] = module
    exec(compile(file.read_text(), str(file), "exec"), vars(module))
    return module


def train_eagerly(file: Path, steps: int, num_microbatches: int, batch_size: int, seed: int = 0) -> dict[str, Any]:
    """The state_dict after `steps` steps of the unsplit model; the file's own `silence(model)` switches dropout off.

    On one thread, as workers compute: BatchNorm over two rows makes differences of 1e-3 out of another rounding.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(file, steps, num_microbatches, batch_size, seed)
    finally:
        torch.set_num_threads(num_threads)


def _train(file: Path, steps: int, num_microbatches: int, batch_size: int, seed: int) -> dict[str, Any]:
    source = load(file)
    torch.manual_seed(seed), random.seed(seed)
    model = source.build_model()
    getattr(source, "silence", lambda model: None)(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make_optimizer = getattr(source, "make_optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    optimizer = make_optimizer(parameters)
    size = batch_size // num_microbatches
    batches = None
    for step in range(steps):
        if not hasattr(source, "batches") or batches is None:
            torch.manual_seed(seed + 1 + step), random.seed(seed + 1 + step)
        if hasattr(source, "batches"):
            batches = batches or iter(source.batches(batch_size))
            inputs, targets = next(batches)
        else:
            inputs, targets = source.make_batch(batch_size)
        optimizer.zero_grad()
        for start in range(0, batch_size, size):
            cut = lambda t, start=start: t[start : start + size] if isinstance(t, torch.Tensor) else t  # noqa: E731
            given = tree_map(cut, inputs)
            args = given if type(given) is tuple else (given,)
            output = model(**given) if isinstance(given, dict) else model(*args)
            source.loss_fn(output, tree_map(cut, targets)).backward()
        for parameter in parameters:
            if parameter.grad is not None and getattr(source, "LOSS_REDUCTION", "mean") == "mean":
                parameter.grad /= num_microbatches
        optimizer.step()
    return model.state_dict()
