"""Time of every layer of a model that does not fit into memory: one layer at a time, with only that layer real.

The layers come from a trace of fake tensors. Each gets weights of its own shape and plausible values, is run on what
the layers before it made, and gives the memory back. Values matter only where they are extreme: denormal numbers slow
some operations a hundredfold, so activations are kept within a few orders of magnitude and gradients are N(0, 1e-3).
Integers come from the user's own batch, since random ones might lie outside a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from planner.machine.device import Device
from planner.profiling.replaced_state import replaced_state
from planner.profiling.timing import WARM_UP_ROUNDS, LayerSamples, Microbatch, time_optimizer, without_collection
from planner.tracing.pieces import Piece, Pieces

WEIGHT_STD = 0.02
GRADIENT_STD = 1e-3
STD_RANGE = (1e-6, 1e6)
NORMAL_BLOCK = 1_048_573  # prime, so that rows of a matrix filled with repeats of the block differ

Values = dict[str, Any]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def time_pieces(
    pieces: Pieces,
    microbatches: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    groups: Sequence[Sequence[nn.Parameter]],
    make_optimizer: MakeOptimizer,
    device: Device,
    rounds: tuple[int, int],
    meet: Callable[[int], None] = lambda _: None,
) -> tuple[tuple[LayerSamples, ...], list[float]]:
    """What `time_layers` and `time_optimizer` find, in as many `rounds` each, where no two layers are real at once.

    `groups` are fake parameters, those of each layer first. `meet` is called before each layer, so that concurrent
    copies can wait for each other, with the share that is done as a number of rounds.
    """
    filler = _Filler(device.torch_device)
    graded = {tensor.name for tensor in pieces.trace.tensors if tensor.gradient_bytes}
    values: list[Values] = [dict(zip(pieces.inputs, m.inputs, strict=True)) for m in microbatches]
    samples: list[LayerSamples] = []
    optimizer_ms: list[float] = []
    with without_collection():
        for index, piece in enumerate(pieces.pieces):
            meet(rounds[0] * index // len(pieces.pieces))
            last = index == len(pieces.pieces) - 1
            run = _PieceRun(pieces, piece, graded, device, filler, loss_fn if last else None)
            with replaced_state([piece.module], filler.weight) as real:
                samples.append(run.time(values, microbatches, rounds[0]))
                run.advance(values, microbatches)
                own = [[real[id(parameter)] for parameter in groups[index]]]
                optimizer_ms += time_optimizer(own, make_optimizer, device, rounds[1])
            del run, real, own  # before the next layer becomes real
    for group in groups[len(pieces.pieces) :]:
        real_group = [nn.Parameter(filler.weight("weight", parameter)) for parameter in group]
        optimizer_ms += time_optimizer([real_group], make_optimizer, device, rounds[1])
    return tuple(samples), optimizer_ms


class _Filler:
    """Plausible values: one block of normal numbers, repeated as often as a tensor needs."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device, self.block = device, torch.randn(NORMAL_BLOCK, generator=generator)

    def normal(self, like: torch.Tensor, std: float) -> torch.Tensor:
        """N(0, std²) in the shape and dtype of `like`, contiguous."""
        repeats = -(-like.numel() // NORMAL_BLOCK)
        flat = torch.empty(like.numel(), dtype=like.dtype, device=self.device)
        for index in range(repeats):
            part = flat[index * NORMAL_BLOCK : (index + 1) * NORMAL_BLOCK]
            part.copy_(self.block[: part.numel()] * std)
        return flat.view(like.shape)

    def weight(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A parameter or buffer by what its name says: scales and variances 1, biases and means 0, else N(0, 0.02²)."""
        kind = name.rpartition(".")[2]
        if not like.is_floating_point() or "bias" in kind or kind == "running_mean":
            value = torch.zeros(like.shape, dtype=like.dtype, device=self.device)
        elif like.dim() <= 1:
            value = torch.ones(like.shape, dtype=like.dtype, device=self.device)
        else:
            value = self.normal(like, WEIGHT_STD)
        strided = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=self.device)
        return value if value.stride() == strided.stride() else strided.copy_(value)


class _PieceRun:
    """One layer, its weights real, run forward and backward on what the layers before it made."""

    def __init__(
        self,
        pieces: Pieces,
        piece: Piece,
        graded: set[str],
        device: Device,
        filler: _Filler,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    ) -> None:
        self.pieces, self.piece, self.graded = pieces, piece, graded
        self.device, self.filler, self.loss_fn = device, filler, loss_fn
        self.gradients: dict[int, torch.Tensor] = {}

    def time(self, values: Sequence[Values], microbatches: Sequence[Microbatch], num_rounds: int) -> LayerSamples:
        """Rounds of all microbatches forward, then all backward, as in a GPipe step; the first two warm up."""
        forward: list[float] = []
        first: list[float] = []
        later: list[float] = []
        for number in range(-WARM_UP_ROUNDS, num_rounds):
            for parameter in self.piece.module.parameters():
                parameter.grad = None
            runs, forward_ms = [], []
            for known, microbatch in zip(values, microbatches, strict=True):
                before = self.device.stamp()
                runs.append(self._forward(known, microbatch))
                forward_ms += self.device.elapsed_ms([before, self.device.stamp()])
            backward_ms = [self._backward(*run) for run in runs]
            if number >= 0:
                forward += forward_ms
                first.append(backward_ms[0])
                later += backward_ms[1:]
        return LayerSamples(tuple(forward), tuple(later or first), tuple(first))

    def _inputs(self, known: Values) -> list[Any]:
        return [_leaf(known[name], name in self.graded) for name in self.piece.inputs]

    def _forward(self, known: Values, microbatch: Microbatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What backward starts from, and the gradients it starts with: the loss's, or small normal numbers."""
        with self.pieces.trace.computing():
            made = self.piece.module(*self._inputs(known))
            if self.loss_fn is None:
                ends = [v for v in tree_leaves(made) if isinstance(v, torch.Tensor) and v.requires_grad]
                return ends, [self._gradient(index, end) for index, end in enumerate(ends)]
            earlier = {name: _leaf(value, name in self.graded) for name, value in known.items()}
            output = self.pieces.rebuild_output({**earlier, **dict(zip(self.piece.outputs, made, strict=True))})
            loss = self.loss_fn(output, microbatch.targets)
        return ([loss], [torch.ones_like(loss)]) if loss.requires_grad else ([], [])

    def _gradient(self, index: int, end: torch.Tensor) -> torch.Tensor:
        if index not in self.gradients:
            self.gradients[index] = self.filler.normal(end, GRADIENT_STD)
        return self.gradients[index]

    def _backward(self, ends: list[torch.Tensor], gradients: list[torch.Tensor]) -> float:
        before = self.device.stamp()
        if ends:
            torch.autograd.backward(ends, gradients)
        elapsed = self.device.elapsed_ms([before, self.device.stamp()])[0]
        return elapsed if ends else 0.0

    @torch.no_grad()
    def advance(self, values: Sequence[Values], microbatches: Sequence[Microbatch]) -> None:
        """Add what this layer makes to the known values, kept within range, and drop what no later layer reads."""
        for known in values:
            with self.pieces.trace.computing():
                made = self.piece.module(*self._inputs(known))
            for name, value in zip(self.piece.outputs, made, strict=True):
                known[name] = self._tamed(value) if name in self.graded else value
            for name in self.piece.released:
                known.pop(name, None)

    def _tamed(self, value: torch.Tensor) -> torch.Tensor:
        """An activation as it is where its spread is ordinary; otherwise scaled to 1, or normal numbers."""
        std = float(value.double().std(correction=0)) if value.numel() > 1 else 1.0
        if STD_RANGE[0] <= std <= STD_RANGE[1]:
            return value
        scaled = value / std if std > 0 else value
        healthy = bool(scaled.isfinite().all()) and float(scaled.std(correction=0)) > STD_RANGE[0]
        return scaled if healthy else self.filler.normal(value, 1.0)


def _leaf(value: Any, graded: bool) -> Any:
    return value.detach().requires_grad_(graded) if isinstance(value, torch.Tensor) else value
