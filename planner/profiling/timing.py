"""In-situ time of every layer: the whole cut graph at once, in GPipe order, stamped at the boundaries.

Layers timed alone and repeated are off by 10 to 28 % (hot caches, hot allocator); here every layer runs where it will
run: forward after its predecessor, m microbatches forward, then m backward through one connected autograd graph.
Backward is stamped by hooks on what each piece makes: autograd runs operations in reverse order of their creation, so
the first hook of a piece to fire marks the moment when the pieces after it are done.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from planner.machine.device import Device
from planner.tracing.pieces import Pieces

WARM_UP_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Microbatch:
    """The tensors of one microbatch's inputs, in signature order, and its targets."""

    inputs: tuple[torch.Tensor, ...]
    targets: Any


@dataclass(frozen=True, slots=True)
class LayerSamples:
    """Milliseconds of one layer: forward of every microbatch, backward of the first and of the later ones."""

    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    backward_first_ms: tuple[float, ...]


def time_layers(
    pieces: Pieces,
    microbatches: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    device: Device,
    num_rounds: int,
    before_round: Callable[[int], None] = lambda _: None,
) -> tuple[LayerSamples, ...]:
    """Samples of every layer over `num_rounds` steps after two of warm-up; gradients are None at each step's start.

    `before_round` is called with the round's number before each, so that concurrent copies can meet there.
    """
    count = len(pieces.pieces)
    forward: list[list[float]] = [[] for _ in range(count)]
    later: list[list[float]] = [[] for _ in range(count)]
    first: list[list[float]] = [[] for _ in range(count)]
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(-WARM_UP_ROUNDS, num_rounds):
            before_round(number)
            clear_gradients(pieces)
            for index, (f, b) in enumerate(_one_round(pieces, microbatches, loss_fn, device)):
                if number >= 0:
                    _append(forward, f)
                    _append(first if index == 0 else later, b)
    finally:
        if enabled:
            gc.enable()
    return tuple(
        LayerSamples(tuple(f), tuple(b or b1), tuple(b1)) for f, b, b1 in zip(forward, later, first, strict=True)
    )


def _append(samples: list[list[float]], values: list[float]) -> None:
    for layer, value in zip(samples, values, strict=True):
        layer.append(value)


def clear_gradients(pieces: Pieces) -> None:
    """Let every parameter be without a gradient, as at the start of a step."""
    for piece in pieces.pieces:
        for parameter in piece.module.parameters():
            parameter.grad = None


def _one_round(
    pieces: Pieces, microbatches: Sequence[Microbatch], loss_fn: Callable[[Any, Any], torch.Tensor], device: Device
) -> list[tuple[list[float], list[float]]]:
    """One GPipe step on one device: (forward, backward) milliseconds of all layers, per microbatch."""
    runs = [_forward(pieces, microbatch, loss_fn, device) for microbatch in microbatches]
    backwards = [_backward(run, device) for run in runs]
    results = []
    for run, (entries, stamps) in zip(runs, backwards, strict=True):
        forward = device.elapsed_ms(run.stamps)
        results.append((forward, _between(entries, device.elapsed_ms(stamps), len(forward))))
    return results


@dataclass(slots=True)
class _Run:
    loss: torch.Tensor | None
    stamps: list[Any]
    entries: dict[int, int]
    marks: list[Any]


def _forward(
    pieces: Pieces, microbatch: Microbatch, loss_fn: Callable[[Any, Any], torch.Tensor], device: Device
) -> _Run:
    values: dict[str, Any] = dict(zip(pieces.inputs, microbatch.inputs, strict=True))
    run = _Run(None, [device.stamp()], {}, [])
    with pieces.trace.computing():
        for index, piece in enumerate(pieces.pieces):
            made = piece.module(*(values[name] for name in piece.inputs))
            values.update(zip(piece.outputs, made, strict=True))
            for name in piece.released:
                del values[name]
            if index == len(pieces.pieces) - 1:
                run.loss = loss_fn(pieces.rebuild_output(values), microbatch.targets)
            run.stamps.append(device.stamp())
            _hook(run, index, made, device)
    return run


def _hook(run: _Run, index: int, made: Any, device: Device) -> None:
    """Stamp when backward first reaches something that piece `index` made."""

    def enter(_: torch.Tensor) -> None:
        if index not in run.entries:
            run.entries[index] = len(run.marks)
            run.marks.append(device.stamp())

    for value in tree_leaves(made):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value.register_hook(enter)


def _backward(run: _Run, device: Device) -> tuple[list[int], list[Any]]:
    """Run backward; the layers in the order in which they were entered, and the stamps of entries and end."""
    assert run.loss is not None
    last = len(run.stamps) - 2
    run.entries[last] = 0
    run.marks.append(device.stamp())
    run.loss.backward()
    end = device.stamp()
    run.loss = None
    order = sorted(run.entries, key=lambda layer: run.entries[layer])
    return order, [*run.marks, end]


def _between(order: list[int], elapsed: list[float], num_layers: int) -> list[float]:
    """Backward milliseconds by layer: from the layer's entry to the next entry; 0 for layers that were not entered."""
    times = [0.0] * num_layers
    for layer, value in zip(order, elapsed, strict=True):
        times[layer] += value
    return times


def summarise(samples: Sequence[float]) -> tuple[float, float]:
    """Median and its standard error, 1.25 · MAD · 1.4826 / √n.

    >>> summarise([1.0, 2.0, 3.0])[0]
    2.0
    """
    middle = median(samples)
    deviation = median(abs(sample - middle) for sample in samples)
    return middle, 1.25 * 1.4826 * deviation / len(samples) ** 0.5


def time_optimizer(
    groups: Sequence[Sequence[torch.nn.Parameter]],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    device: Device,
    num_rounds: int,
) -> list[float]:
    """Median milliseconds of an optimizer step over each group of parameters (state already created)."""
    optimizers = [make_optimizer([*group]) if group else None for group in groups]
    samples: list[list[float]] = [[] for _ in groups]
    for group in groups:
        for parameter in group:
            parameter.grad = torch.full_like(parameter, 1e-3)
    for number in range(-1, num_rounds):
        stamps = [device.stamp()]
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.step()
            stamps.append(device.stamp())
        if number >= 0:
            _append(samples, device.elapsed_ms(stamps))
    for group in groups:
        for parameter in group:
            parameter.grad = None
    return [median(values) if values and group else 0.0 for values, group in zip(samples, groups, strict=True)]
