"""In-situ time of every layer: the graph in as many parts as there will be stages, each in GPipe order.

Layers timed alone and repeated are off by 10 to 28 % (hot caches, hot allocator); here every layer runs where it will
run: after its predecessor, and after the same layers of the microbatch before. What one microbatch leaves in the caches
for the next is worth 4 to 6 % of a stage, and a whole model in one part leaves less.

This is for one copy on one device; several copies are the stages of a real pipeline (see `pipelined`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from planner.machine.device import Device
from planner.profiling.layer_clock import LayerClock
from planner.profiling.marked_graph import Part, even_starts, marked_parts
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
    num_parts: int = 1,
) -> tuple[LayerSamples, ...]:
    """Samples of every layer over `num_rounds` steps after three of warm-up; gradients are None at each step's start.

    The layers are run in `num_parts` parts of about the same load, all microbatches through one before the next, as
    that many stages would run them. `before_round` is called with the round's number before each.
    """
    count = len(pieces.pieces)
    forward: list[list[float]] = [[] for _ in range(count)]
    later: list[list[float]] = [[] for _ in range(count)]
    first: list[list[float]] = [[] for _ in range(count)]
    with without_collection():
        starts = even_starts(load_ms_alone(pieces, microbatches, loss_fn, device), num_parts)
        step = _Step(pieces, marked_parts(pieces.trace, starts), loss_fn, device)
        for number in range(-1, num_rounds):
            before_round(number)
            clear_gradients(pieces)
            for index, (f, b) in enumerate(_one_round(step, microbatches)):
                if number >= 0:
                    _append(forward, f)
                    _append(first if index == 0 else later, b)
    return tuple(
        LayerSamples(tuple(f), tuple(b or b1), tuple(b1)) for f, b, b1 in zip(forward, later, first, strict=True)
    )


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection, which would be counted to whatever runs then; what there is of it is collected before.

    Inside another such block nothing happens: a collection takes longer than many a layer.
    """
    enabled = gc.isenabled()
    if enabled:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _append(samples: list[list[float]], values: list[float]) -> None:
    for layer, value in zip(samples, values, strict=True):
        layer.append(value)


def clear_gradients(pieces: Pieces) -> None:
    """Let every parameter be without a gradient, as at the start of a step."""
    for piece in pieces.pieces:
        for parameter in piece.module.parameters():
            parameter.grad = None


@dataclass(frozen=True, slots=True)
class _Step:
    """What all microbatches have in common."""

    pieces: Pieces
    parts: tuple[Part, ...]
    loss_fn: Callable[[Any, Any], torch.Tensor]
    device: Device


def _one_round(step: _Step, microbatches: Sequence[Microbatch]) -> list[tuple[list[float], list[float]]]:
    """One GPipe step on one device: (forward, backward) milliseconds of all layers, per microbatch."""
    runs = [_Run(step, microbatch) for microbatch in microbatches]
    for index in range(len(step.parts)):
        for run in runs:
            run.forward(index)
    for index in reversed(range(len(step.parts))):
        for run in runs:
            run.backward(index)
    return [(run.times(_PartRun.forward_ms), run.times(_PartRun.backward_ms)) for run in runs]


def load_ms_alone(
    pieces: Pieces, microbatches: Sequence[Microbatch], loss_fn: Callable[[Any, Any], torch.Tensor], device: Device
) -> list[float]:
    """Milliseconds of every layer, forward and backward, in the second of two steps of the whole model."""
    step = _Step(pieces, marked_parts(pieces.trace, (0,)), loss_fn, device)
    times: list[tuple[list[float], list[float]]] = []
    for _ in range(WARM_UP_ROUNDS):
        clear_gradients(pieces)
        times = _one_round(step, microbatches)
    return list(map(sum, zip(*times[-1], strict=True)))


class _Run:
    """One microbatch on its way through the parts, and its gradients on their way back."""

    def __init__(self, step: _Step, microbatch: Microbatch) -> None:
        self.step, self.microbatch = step, microbatch
        self.values: dict[str, Any] = dict(zip(step.pieces.inputs, microbatch.inputs, strict=True))
        self.gradients: dict[str, torch.Tensor] = {}
        self.parts = [_PartRun(step.device) for _ in step.parts]

    def forward(self, index: int) -> None:
        """Compute a part from what the earlier ones made; the loss belongs to the last."""
        part, run, is_last = self.step.parts[index], self.parts[index], index == len(self.parts) - 1
        inputs = [self._entering(name) for name in part.inputs]
        run.inputs = dict(zip(part.inputs, inputs, strict=True))
        loss = self._loss if is_last else None
        with self.step.pieces.trace.computing():
            self.values.update(zip(part.outputs, run.forward(part, inputs, loss), strict=True))
        for name in part.released:
            del self.values[name]
        if is_last:
            self.values.clear()

    def _entering(self, name: str) -> Any:
        value = self.values[name]
        if name in self.step.pieces.inputs or not isinstance(value, torch.Tensor):
            return value
        return value.detach().requires_grad_(value.requires_grad)

    def _loss(self, outputs: tuple[Any, ...]) -> torch.Tensor:
        values = {**self.values, **dict(zip(self.step.parts[-1].outputs, outputs, strict=True))}
        return self.step.loss_fn(self.step.pieces.rebuild_output(values), self.microbatch.targets)

    def backward(self, index: int) -> None:
        """Backward of a part, from the loss or from what the later parts have left."""
        part, run = self.step.parts[index], self.parts[index]
        if index == len(self.parts) - 1:
            run.backward([value for value in (run.loss,) if value is not None and value.requires_grad], [None])
        else:
            known = [name for name in part.outputs if name in self.gradients]
            ends = [run.outputs[part.outputs.index(name)] for name in known]
            run.backward(ends, [self.gradients.pop(name) for name in known])
        for name, value in run.inputs.items():
            if name not in self.step.pieces.inputs and isinstance(value, torch.Tensor) and value.grad is not None:
                before = self.gradients.get(name)
                self.gradients[name] = value.grad if before is None else before + value.grad
        run.inputs = {}

    def times(self, of: Callable[[_PartRun], list[float]]) -> list[float]:
        """Milliseconds of all layers."""
        return [value for part in self.parts for value in of(part)]


class _PartRun(LayerClock):
    """A part on one microbatch. As torch's stages do, it holds its inputs and outputs until its backward."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.inputs: dict[str, Any] = {}
        self.outputs: tuple[Any, ...] = ()
        self.loss: torch.Tensor | None = None

    def forward(
        self, part: Part, inputs: Sequence[Any], loss: Callable[[tuple[Any, ...]], torch.Tensor] | None
    ) -> tuple[Any, ...]:
        """Run and time all layers; what `loss` does counts as the last one's."""
        self.begin(inputs)
        self.outputs = part.run(self, *inputs)
        if loss is not None:
            self.loss = loss(self.outputs)
        self.end()
        return self.outputs

    def backward(self, ends: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> None:
        """Backward from `ends`; nothing where none of them has a gradient."""
        self.enter(self.num_layers - 1)
        if ends:
            torch.autograd.backward(ends, gradients)
        self.end_backward()
        self.loss, self.outputs = None, ()


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
    num_stages: int = 1,
) -> list[float]:
    """Median milliseconds of an optimizer step over each group of parameters (state already created).

    A step costs its launches (on a CPU, its calls), however many parameters it is for. What the groups cost one by one
    is therefore more than what they cost together; each keeps its share of `num_stages` such steps.
    """
    parameters = [parameter for group in groups for parameter in group]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    with without_collection():
        found = _optimizer_ms(groups, make_optimizer, device, num_rounds)
        if sum(map(bool, groups)) > 1:
            (together_ms,) = _optimizer_ms([parameters], make_optimizer, device, num_rounds)
            found = without_launches(found, together_ms, num_stages)
    for parameter in parameters:
        parameter.grad = None
    return found


def _optimizer_ms(
    groups: Sequence[Sequence[torch.nn.Parameter]],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    device: Device,
    num_rounds: int,
) -> list[float]:
    """Median milliseconds of a step over each group, one after the other; 0 for a group without parameters."""
    optimizers = [make_optimizer([*group]) if group else None for group in groups]
    samples: list[list[float]] = [[] for _ in groups]
    for number in range(-1, num_rounds):
        stamps = [device.stamp()]
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.step()
            stamps.append(device.stamp())
        if number >= 0:
            _append(samples, device.elapsed_ms(stamps))
    return [median(values) if values and group else 0.0 for values, group in zip(samples, groups, strict=True)]


def without_launches(alone_ms: Sequence[float], together_ms: float, num_stages: int) -> list[float]:
    """Shares of the groups in `num_stages` steps, from what each takes alone and all take together.

    Alone, every group pays the same launches once more; a stage pays them once.

    >>> without_launches([3.0, 3.0, 5.0, 0.0], 5.0, 1)
    [1.0, 1.0, 3.0, 0.0]
    """
    count = sum(value > 0 for value in alone_ms)
    if count < 2:
        return list(alone_ms)
    launches = min(max(0.0, sum(alone_ms) - together_ms) / (count - 1), min(value for value in alone_ms if value > 0))
    each = launches * (num_stages / count - 1)
    return [value + each if value > 0 else 0.0 for value in alone_ms]
