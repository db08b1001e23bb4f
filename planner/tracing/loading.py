"""Model file → ModelSource: the user's functions, checked by name; and the seed rule that every split shares.

The model file is the user's own code and the only code that is executed. Its folder is on `sys.path` while it loads,
so that it may import its neighbours.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from planner.errors import ModelFileError
from planner.tracing.user_functions import (
    checked_batches,
    checked_loss,
    checked_optimizer,
    defined_at,
    described,
    failed,
)

if TYPE_CHECKING:
    import torch

FP16_RULE = "fp16 needs a gradient scaler, which a pipeline does not have; bf16 needs none"
REQUIRED = {
    "build_model": "def build_model():\n    return MyModel()",
    "make_batch": "def make_batch(batch_size):\n    return torch.randn(batch_size, 8), torch.randn(batch_size, 1)",
    "loss_fn": "def loss_fn(output, targets):\n    return torch.nn.functional.mse_loss(output, targets)",
}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The functions of a model file; see the README for what each must do."""

    file: Path
    entry: str
    build_model: Callable[[], torch.nn.Module]
    make_batch: Callable[[int], tuple[Any, Any]]
    loss_fn: Callable[[Any, Any], torch.Tensor]
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    batches: Callable[[int], Iterator[tuple[Any, Any]]] | None
    reference_loss: Callable[[], tuple[float, str]] | None
    batch_size: int | None
    loss_reduction: Literal["mean", "sum"]
    precision: Literal["fp32", "bf16"] | None = None

    @property
    def name(self) -> str:
        """The model's name: the file's, without its ending; of a config.json its folder's."""
        return self.file.parent.name if self.file.name == "config.json" else self.file.stem


def load_source(specification: str) -> ModelSource:
    """Load `model.py` or `model.py:name`, where `name` is the function that builds the model.

    `config.json` or `config.json:hf_N` is a Hugging Face configuration, with sequences of N tokens.

    Raises ModelFileError with the user's own frames where their code fails, and with the lines to add where a piece
    is missing.
    """
    file, entry = _split_specification(specification)
    if file.suffix == ".json":
        from planner.tracing.huggingface import load_huggingface

        return load_huggingface(file, entry)
    module = _import_file(file)
    for required in REQUIRED:
        wanted = entry if required == "build_model" else required
        if not callable(getattr(module, wanted, None)):
            raise _missing(file, wanted, required)
    reduction: Any = getattr(module, "LOSS_REDUCTION", "mean")
    if reduction not in ("mean", "sum"):
        raise ModelFileError(f"{file.name}: LOSS_REDUCTION is {reduction!r}", 'it is "mean" or "sum"', "correct it")
    batches = getattr(module, "batches", None)
    return ModelSource(
        file=file,
        entry=entry,
        build_model=getattr(module, entry),
        make_batch=module.make_batch,
        loss_fn=checked_loss(file, module.loss_fn),
        make_optimizer=checked_optimizer(file, getattr(module, "make_optimizer", default_optimizer)),
        batches=None if batches is None else checked_batches(file, batches),
        reference_loss=getattr(module, "reference_loss", None),
        batch_size=_batch_size(file, module),
        loss_reduction=reduction,
        precision=_precision(file, module),
    )


def _split_specification(specification: str) -> tuple[Path, str]:
    path, separator, entry = specification.rpartition(":")
    if not separator or not entry.isidentifier():
        path, entry = specification, "build_model" if not specification.endswith(".json") else "hf"
    file = Path(path)
    if not file.is_file() and file.suffix == ".json":
        raise ModelFileError(f"{path} is not a file", "a Hugging Face configuration is a local file", "check the path")
    if not file.is_file():
        remedy = "check the path, or start from one: plan --example > model.py"
        raise ModelFileError(f"{path} is not a file", "a model file in Python is needed", remedy)
    return file.resolve(), entry


def _import_file(file: Path) -> ModuleType:
    name = f"evenstage_model_{file.stem}"
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise ModelFileError(f"{file.name} is not Python", "a model file ends in .py", "rename it")
    module = importlib.util.module_from_spec(specification)
    folder = str(file.parent)
    sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise failed(file, "loading the file", error) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return module


def _missing(file: Path, wanted: str, required: str) -> ModelFileError:
    lines = REQUIRED[required].replace("build_model", wanted) if required == "build_model" else REQUIRED[required]
    indented = "\n    ".join(lines.splitlines())
    return ModelFileError(
        f"{file.name} has no function {wanted}",
        f"a model file defines {', '.join(REQUIRED)}",
        f"add, for example:\n    {indented}",
    )


def _batch_size(file: Path, module: ModuleType) -> int | None:
    size = getattr(module, "BATCH_SIZE", None)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ModelFileError(f"{file.name}: BATCH_SIZE is {size!r}", "it is a whole number, at least 1", "correct it")
    return size


def _precision(file: Path, module: ModuleType) -> Literal["fp32", "bf16"] | None:
    precision: Any = getattr(module, "PRECISION", None)
    if precision not in (None, "fp32", "bf16"):
        rule = FP16_RULE if precision == "fp16" else 'it is "fp32" or "bf16"'
        raise ModelFileError(
            f"{file.name}: PRECISION is {precision!r}", rule, 'write PRECISION = "bf16", or leave it out'
        )
    return precision  # type: ignore[no-any-return]


def default_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with learning rate 1e-3, which is what a model file without `make_optimizer` trains with."""
    import torch

    return torch.optim.AdamW(parameters, lr=1e-3)


def seed_everything(seed: int) -> None:
    """Give torch, numpy (where it is loaded) and random the same seed."""
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def build(source: ModelSource, seed: int) -> torch.nn.Module:
    """The model, built after all generators got `seed`. Raises ModelFileError where the user's code fails."""
    import torch

    seed_everything(seed)
    try:
        model = source.build_model()
    except (Exception, SystemExit) as error:
        raise failed(source.file, f"{source.entry}()", error) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelFileError(
            f"{source.file.name}: {source.entry}() returned {described(model)}",
            "it returns a torch.nn.Module",
            f"return the model from {source.entry}()",
            defined_at(source.build_model, source.file),
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelFileError(
            f"{source.file.name}: {source.entry}() returned a model without trainable parameters",
            "a step trains at least one parameter",
            "leave requires_grad on for the parameters that are to be trained",
        )
    return model


def make_batch(source: ModelSource, seed: int, step: int, batch_size: int) -> tuple[Any, Any]:
    """The batch of `step` (from 0) by the seed rule: all generators get seed + 1 + step first.

    Returns (inputs, targets); inputs are a tensor, a tuple or a dict. Raises ModelFileError where the user's code
    fails or the first dimension is not the batch.
    """
    seed_everything(seed + 1 + step)
    try:
        batch = source.make_batch(batch_size)
    except (Exception, SystemExit) as error:
        raise failed(source.file, f"make_batch({batch_size})", error) from error
    return checked_batch(source, batch, batch_size)


def checked_batch(source: ModelSource, batch: Any, batch_size: int | None) -> tuple[Any, Any]:
    """`batch` as (inputs, targets) with the batch in the first dimension of every tensor (`batch_size` rows)."""
    import torch
    from torch.utils._pytree import tree_leaves

    function: Callable[..., Any] = source.make_batch
    made = f"{source.file.name}: make_batch({batch_size})"
    if batch_size is None and source.batches is not None:
        function, made = source.batches, f"{source.file.name}: batches"
        batch = tuple(batch) if isinstance(batch, list) else batch  # a DataLoader collates pairs into lists
    where = defined_at(function, source.file)
    if not isinstance(batch, tuple) or len(batch) != 2:
        got = f"a tuple of {len(batch)}" if isinstance(batch, tuple) else described(batch)
        raise ModelFileError(
            f"{made} returned {got}", "a batch is the pair (inputs, targets)", "return inputs, targets", where
        )
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(batch[0])):
        rule = "a pipeline needs a tensor to send"
        raise ModelFileError(f"{made} returned inputs without a tensor", rule, "return tensors as inputs", where)
    rows = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
    if len(rows) != 1 or (batch_size is not None and rows != {batch_size}):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise ModelFileError(
            f"{made} returned tensors of shapes {shapes}",
            "the first dimension of every tensor is the batch",
            f"return {batch_size or 'as many'} rows in each",
            where,
        )
    return batch


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` of a batch as the positional and keyword arguments of the model.

    >>> as_call((1, 2)), as_call({"x": 1}), as_call(3)
    (((1, 2), {}), ((), {'x': 1}), ((3,), {}))
    """
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def on_device(tree: Any, device: torch.device) -> Any:
    """Every tensor of `tree` on `device`; other leaves as they are."""
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def rows(tree: Any, start: int, stop: int) -> Any:
    """Rows `start` to `stop` of every tensor in `tree`."""
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf[start:stop] if isinstance(leaf, torch.Tensor) else leaf, tree)
