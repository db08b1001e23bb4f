"""The functions of a model file, held to what they must return: the error shows the user's own line."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import ModelFileError, user_frames

if TYPE_CHECKING:
    import torch

WRITTEN_IN_PLACE = re.compile(r"modified by an inplace operation")


def failed(file: Path, doing: str, error: BaseException) -> ModelFileError:
    """What the user's code raised while `doing`, with the last lines of theirs that led there."""
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    frames = user_frames(error, file)
    remedy = "correct the line shown" if frames else "run again with --debug"
    return ModelFileError(f"{file.name}: {doing} failed with {reason}", "it runs without errors", remedy, frames)


def defined_at(function: Callable[..., Any], file: Path) -> tuple[str, ...]:
    """The line that defines `function`, as `file:line: source text`; nothing where there is no source."""
    try:
        lines, number = inspect.getsourcelines(inspect.unwrap(function))
    except (OSError, TypeError):
        return ()
    return (f"{file.name}:{number}: {lines[0].strip()}",)


def checked_loss(file: Path, loss_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], torch.Tensor]:
    """`loss_fn`, which raises ModelFileError where it fails or returns no differentiable scalar."""
    import torch
    from torch.utils._pytree import tree_leaves

    @functools.wraps(loss_fn)
    def call(output: Any, targets: Any) -> torch.Tensor:
        try:
            loss = loss_fn(output, targets)
        except (Exception, SystemExit) as error:
            raise failed(file, "loss_fn(output, targets)", error) from error
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            got = f"{file.name}: loss_fn returned {described(loss)}"
            remedy = "return one number, such as loss.mean()"
            raise ModelFileError(got, "it returns a scalar tensor of floats", remedy, defined_at(loss_fn, file))
        graded = any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(output))
        if graded and not loss.requires_grad and torch.is_grad_enabled():
            got = f"{file.name}: the loss that loss_fn returned has no gradient"
            remedy = "take .detach(), .item(), .data and torch.no_grad() out of loss_fn"
            rule = "it is computed from the model's output by differentiable operations"
            raise ModelFileError(got, rule, remedy, defined_at(loss_fn, file))
        return loss

    return call


def checked_optimizer(
    file: Path, make_optimizer: Callable[[list[torch.nn.Parameter]], Any]
) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """`make_optimizer`, which raises ModelFileError where it fails or returns what cannot step by itself."""
    import torch

    @functools.wraps(make_optimizer)
    def call(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        try:
            optimizer = make_optimizer(parameters)
        except (Exception, SystemExit) as error:
            raise failed(file, "make_optimizer(parameters)", error) from error
        where = defined_at(make_optimizer, file)
        if not isinstance(optimizer, torch.optim.Optimizer):
            got = f"{file.name}: make_optimizer returned {described(optimizer)}"
            raise ModelFileError(got, "it returns a torch.optim.Optimizer", "return the optimizer", where)
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            got = f"{file.name}: make_optimizer returned {type(optimizer).__name__}, whose step needs a closure"
            rule = "a pipeline computes the gradients once per step and cannot be called again by the optimizer"
            raise ModelFileError(got, rule, "use an optimizer such as AdamW or SGD", where)
        return optimizer

    return call


def checked_batches(file: Path, batches: Callable[[int], Any]) -> Callable[[int], Iterator[Any]]:
    """`batches`, which raises ModelFileError where it or its iterator fails."""

    @functools.wraps(batches)
    def call(batch_size: int) -> Iterator[Any]:
        try:
            found = batches(batch_size)
            if isinstance(found, Iterable):
                yield from found
        except (Exception, SystemExit) as error:
            raise failed(file, f"batches({batch_size})", error) from error
        if not isinstance(found, Iterable):
            got = f"{file.name}: batches({batch_size}) returned {described(found)}"
            raise ModelFileError(got, "it gives (inputs, targets) one by one", "yield them", defined_at(batches, file))

    return call


def written_in_place(file: Path, error: BaseException) -> ModelFileError | None:
    """What autograd says of a value that was overwritten before backward needed it, in words that help."""
    if not isinstance(error, RuntimeError) or not WRITTEN_IN_PLACE.search(str(error)):
        return None
    return ModelFileError(
        f"{file.name}: forward writes in place to a value that the backward of another microbatch still needs",
        "the forward of several microbatches runs before the first backward, so that what one of them computes with"
        " (a buffer, for example) may not be overwritten by the next",
        "compute with a copy, self.buffer.clone(), and write to the buffer itself",
        user_frames(error, file),
    )


def described(value: Any) -> str:
    """A value as an error names it: a tensor by type and shape, everything else by type."""
    import torch

    if isinstance(value, torch.Tensor):
        kind = "" if value.is_floating_point() else f" of {str(value.dtype).removeprefix('torch.')}"
        return f"a tensor{kind} of shape {tuple(value.shape)}"
    return "None" if value is None else type(value).__name__
