"""What was found of a trace's layers, measured or estimated → the values of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from planner.files.profile_file import (
    LayerMemory,
    LayerProfile,
    ModelReference,
    SizeMemory,
    SizeProfile,
    TensorProfile,
    TiedProfile,
)
from planner.profiling.boundary import NO_COST, BoundaryCost
from planner.profiling.counting import Work
from planner.profiling.optimizer_memory import OptimizerMemory
from planner.profiling.step_memory import StepMemory, group_name, layer_memory
from planner.profiling.timing import LayerSamples, Microbatch, summarise
from planner.tracing.exporting import Trace
from planner.tracing.gradients import attribute
from planner.tracing.loading import ModelSource, as_call, rows
from planner.tracing.pieces import Pieces

MOST_IN_A_PIPELINE, MOST_ALONE = 8, 3


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Milliseconds of one layer and microbatch, as in `LayerProfile`."""

    forward_ms: float
    forward_spread_ms: float
    backward_ms: float
    backward_spread_ms: float
    backward_first_ms: float


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Of every layer its times; of every group of `optimizer_groups` the optimizer's time and memory.

    `drift` is the relative difference between the halves of the rounds, 0 for what was not measured; `periods` are
    those of `SizeProfile`. Gradients and parameters lie in whole blocks of `block_bytes`.
    """

    times: Sequence[LayerTimes]
    optimizer_ms: Sequence[float]
    optimizer: Sequence[OptimizerMemory]
    temporaries_add: bool
    step: StepMemory
    boundary: BoundaryCost = NO_COST
    drift: float = 0.0
    periods: tuple[float, ...] = ()
    block_bytes: int = 1


def measured_times(samples: LayerSamples) -> LayerTimes:
    """The medians of a layer's samples, with their standard errors."""
    return LayerTimes(
        *summarise(samples.forward_ms), *summarise(samples.backward_ms), summarise(samples.backward_first_ms)[0]
    )


def describe_model(source: ModelSource, model: nn.Module, *, meta: bool) -> ModelReference:
    """What a profile says of its model. `meta`: it is profiled and trained without a process that holds all of it."""
    blocks: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2].isdigit():
            blocks[type(module).__name__] = blocks.get(type(module).__name__, 0) + 1
    largest = max(blocks, key=lambda kind: blocks[kind], default="")
    parameters = list(model.parameters())
    return ModelReference(
        file=str(source.file),
        name=source.name,
        entry=source.entry,
        layer_type=largest,
        num_repeated_layers=blocks.get(largest, 0),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        num_parameters=sum(p.numel() for p in parameters),
        meta=meta,
    )


def microbatches_of(batch: tuple[Any, Any], size: int, batch_size: int, *, copies: int = 1) -> list[Microbatch]:
    """The microbatches that one round of the profile runs: the first few of the batch, more in a pipeline of copies."""
    most = MOST_ALONE if copies == 1 else max(MOST_IN_A_PIPELINE, copies)
    count = min(most, batch_size // size)
    found = []
    for start in range(0, count * size, size):
        inputs = tree_leaves(as_call(rows(batch[0], start, start + size)))
        tensors = tuple(leaf for leaf in inputs if isinstance(leaf, torch.Tensor))
        found.append(Microbatch(tensors, rows(batch[1], start, start + size)))
    return found


def optimizer_groups(trace: Trace, pieces: Pieces) -> list[list[nn.Parameter]]:
    """Trainable parameters of every layer without the tied ones, then each of `trace.tied` as a group of its own."""
    tied = trace.tied
    parameters: dict[str, nn.Parameter] = {}
    groups: list[list[nn.Parameter]] = []
    for layer, piece in zip(trace.layers, pieces.pieces, strict=True):
        own = dict(piece.module.named_parameters())
        parameters.update(own)
        groups.append([own[name] for name in layer.parameters if name not in tied and own[name].requires_grad])
    groups.extend([parameters[name]] if parameters[name].requires_grad else [] for name in tied)
    return groups


def size_profile(
    trace: Trace,
    pieces: Pieces,
    size: int,
    microbatch: Microbatch,
    costs: LayerCosts,
    works: Sequence[Work],
    dependencies: tuple[tuple[int, int], ...] | None = None,
) -> SizeProfile:
    """The profile at one microbatch size."""
    step = costs.step
    return SizeProfile(
        microbatch_size=size,
        fingerprint=trace.fingerprint,
        layers=_layer_profiles(trace, pieces, costs, works),
        tensors=tuple(
            TensorProfile(
                name=t.name,
                producer=t.producer,
                consumers=t.consumers,
                num_bytes=t.num_bytes,
                gradient_bytes=t.gradient_bytes,
                contiguous=t.contiguous,
                gradient_scattered=t.name in step.scattered,
                returns_view=t.name in step.views,
            )
            for t in trace.tensors
        ),
        tied=_tied_profiles(trace, costs),
        drift=costs.drift,
        memory=SizeMemory(
            lifetimes=step.lifetimes,
            gradients=step.gradients,
            input_bytes=_tensor_bytes(microbatch.inputs),
            target_bytes=_tensor_bytes(microbatch.targets),
            temporaries_add=costs.temporaries_add,
            fragmentation_bytes=step.fragmentation_bytes,
        ),
        dependencies=dependencies,
        periods=costs.periods,
        boundary_forward_ms=costs.boundary.forward_ms,
        boundary_backward_ms=costs.boundary.backward_ms,
    )


def _layer_profiles(trace: Trace, pieces: Pieces, costs: LayerCosts, works: Sequence[Work]) -> tuple[LayerProfile, ...]:
    count, tied = len(trace.layers), trace.tied
    memory: tuple[LayerMemory, ...] = layer_memory(
        pieces, costs.step, costs.optimizer[:count], list(tied), costs.block_bytes
    )
    found = []
    columns = (trace.layers, pieces.pieces, costs.times, works, costs.optimizer_ms[:count], memory)
    for layer, piece, times, work, optimizer_ms, sizes in zip(*columns, strict=True):
        own = dict(piece.module.named_parameters())
        untied = [own[name] for name in layer.parameters if name not in tied]
        found.append(
            LayerProfile(
                id=layer.id,
                name=layer.name,
                type=layer.type,
                position=layer.start,
                forward_ms=times.forward_ms,
                forward_spread_ms=times.forward_spread_ms,
                backward_ms=times.backward_ms,
                backward_spread_ms=times.backward_spread_ms,
                backward_first_ms=times.backward_first_ms,
                optimizer_ms=optimizer_ms,
                parameter_bytes=sum(p.numel() * p.element_size() for p in untied),
                parameters=layer.parameters,
                plain_cut=layer.plain_cut,
                flops=work.flops,
                structure=piece.structure,
                memory=sizes,
            )
        )
    return tuple(found)


def _tied_profiles(trace: Trace, costs: LayerCosts) -> tuple[TiedProfile, ...]:
    count, found = len(trace.layers), []
    groups = zip(trace.tied.items(), costs.optimizer_ms[count:], costs.optimizer[count:], strict=True)
    for (name, layers), optimizer_ms, own in groups:
        parameter = attribute(trace.graph_module, name)
        size = parameter.numel() * parameter.element_size()
        trained = bool(parameter.requires_grad)
        memory = own.state_bytes, own.temporary_bytes, own.left_bytes, group_name(trace, own.left_by)
        found.append(TiedProfile(name, layers, size, optimizer_ms, trained, *memory))
    return tuple(found)


def _tensor_bytes(tree: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
