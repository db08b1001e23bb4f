"""One of the concurrent copies that profile a model: traces it at every size, times it, and rank 0 writes the result.

Run by `planner.profiling.profiler` as `python -m planner.profiling.worker REQUEST RESULT`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.machine.workers import as_worker

if TYPE_CHECKING:
    import torch

    from planner.files.profile_file import LayerMemory, LayerProfile, SizeProfile, TiedProfile
    from planner.machine.device import Device
    from planner.profiling.optimizer_memory import OptimizerMemory
    from planner.profiling.profiler import ProfileRequest
    from planner.profiling.timing import LayerSamples, Microbatch
    from planner.tracing.exporting import Trace
    from planner.tracing.loading import ModelSource
    from planner.tracing.pieces import Pieces

MICROBATCHES_PER_ROUND = 3
OPTIMIZER_ROUNDS = 5


def main() -> None:
    """Profile as the request file says; copies meet before every round, so that all compute at once."""
    import torch
    import torch.distributed as dist

    from planner.files.reading import decode
    from planner.machine.device import choose_device, describe_machine
    from planner.profiling.profiler import REQUEST_SCHEMA, ProfileRequest
    from planner.tracing.loading import load_source

    started = time.perf_counter()
    data = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    assert data.pop("schema") == REQUEST_SCHEMA
    request = decode(ProfileRequest, data, "request")
    dist.init_process_group("gloo")
    device = choose_device(request.device, 0 if request.device else dist.get_rank())
    if device.clock == "thread-cpu":
        torch.set_num_threads(1)
    source = load_source(request.model)
    sizes = tuple(_profile_size(request, source, device, size) for size in request.microbatch_sizes)
    if dist.get_rank() == 0:
        _write(request, source, sizes, describe_machine(device), time.perf_counter() - started)


def _write(request: ProfileRequest, source: ModelSource, sizes: Any, machine: Any, seconds: float) -> None:
    from planner.files.profile_file import Profile
    from planner.tracing.training_digest import training_digest

    traced, layers = sizes[0][0], sizes[0][1].layers
    Profile(
        model=_describe_model(request, source, layers),
        machine=machine,
        precision=request.precision,
        batch_size=request.batch_size,
        num_rounds=request.num_rounds,
        seconds=seconds,
        concurrent_copies=request.copies,
        sizes=tuple(size for _, size in sizes),
        why_not_plain=traced.why_not_plain,
        training=training_digest(source, traced.graph_module),
    ).save(Path(sys.argv[2]))


def _describe_model(request: ProfileRequest, source: ModelSource, layers: tuple[LayerProfile, ...]) -> Any:
    from planner.files.profile_file import ModelReference
    from planner.tracing.deferred_model import build_either

    model, deferred = build_either(source, request.seed, meta=request.meta)
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
        meta=deferred is not None,
    )


def _profile_size(request: ProfileRequest, source: ModelSource, device: Device, size: int) -> tuple[Trace, SizeProfile]:
    """Trace and time the model at one microbatch size."""
    import torch.distributed as dist

    from planner.errors import PlannerError, ProfileError, user_frames
    from planner.files.profile_file import SizeMemory, SizeProfile
    from planner.profiling.memory import layer_memory, track_fake_step, track_step
    from planner.profiling.optimizer_memory import track_optimizer, track_optimizer_by_sample
    from planner.profiling.piecewise import time_pieces
    from planner.profiling.timing import time_layers, time_optimizer
    from planner.tracing.deferred_model import build_either
    from planner.tracing.exporting import trace_model
    from planner.tracing.loading import as_call, make_batch, rows
    from planner.tracing.ordering import layer_dependencies
    from planner.tracing.pieces import build_pieces
    from planner.tracing.rewriting import set_device
    from planner.tracing.user_functions import written_in_place

    model, deferred = build_either(source, request.seed, meta=request.meta)
    batch = make_batch(source, request.seed, 0, request.batch_size)
    if deferred is None:
        model, batch = model.to(device.torch_device), _to(batch, device)
    autocast_on = device.torch_device if request.precision == "bf16" else None
    trace = trace_model(model, *as_call(rows(batch[0], 0, size)), autocast_on=autocast_on)
    if deferred is not None:
        set_device(trace.graph_module, device.torch_device)
        batch = _to(batch, device)
    pieces = build_pieces(trace)
    groups, tied = _optimizer_groups(trace, pieces)
    microbatches = _microbatches(batch, size, request.batch_size)
    meet = _Meeting(request, size)
    try:
        if deferred is None:
            samples = time_layers(pieces, microbatches, source.loss_fn, device, request.num_rounds, meet)
            optimizer_ms = time_optimizer(groups, source.make_optimizer, device, OPTIMIZER_ROUNDS)
            step = track_step(pieces, microbatches, source.loss_fn, device)
            optimizer, temporaries_add = track_optimizer(groups, source.make_optimizer, device.block_bytes)
        else:
            rounds = (request.num_rounds, OPTIMIZER_ROUNDS)
            samples, optimizer_ms = time_pieces(
                pieces, microbatches, source.loss_fn, groups, source.make_optimizer, device, rounds, meet
            )
            step = track_fake_step(pieces, microbatches, source.loss_fn, device.block_bytes)
            optimizer, temporaries_add = track_optimizer_by_sample(groups, source.make_optimizer)
    except PlannerError:
        raise
    except Exception as error:
        if (explained := written_in_place(source.file, error)) is not None:
            raise explained from error
        raise ProfileError(
            f"{source.name} exported but did not run: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            "forward, loss_fn and backward must run on one microbatch",
            "correct the line shown" if user_frames(error, source.file) else "run again with --debug",
            user_frames(error, source.file),
        ) from error
    dist.barrier()
    count = len(trace.layers)
    memory = layer_memory(pieces, step, optimizer[:count], tied)
    return trace, SizeProfile(
        microbatch_size=size,
        fingerprint=trace.fingerprint,
        layers=_layer_profiles(trace, pieces, samples, optimizer_ms[:count], memory),
        tensors=_tensor_profiles(trace),
        tied=_tied_profiles(trace, tied, groups[count:], optimizer_ms[count:], optimizer[count:]),
        drift=_drift(samples),
        memory=SizeMemory(
            lifetimes=step.lifetimes,
            gradients=step.gradients,
            input_bytes=_tensor_bytes(microbatches[0].inputs),
            target_bytes=_tensor_bytes(microbatches[0].targets),
            temporaries_add=temporaries_add,
        ),
        dependencies=layer_dependencies(trace),
    )


class _Meeting:
    """Called before each round: all copies meet, and rank 0 says how far the profile is."""

    def __init__(self, request: ProfileRequest, size: int) -> None:
        self.request, self.size = request, size

    def __call__(self, number: int) -> None:
        import torch.distributed as dist

        dist.barrier()
        if dist.get_rank() == 0 and self.request.progress:
            done = self.request.microbatch_sizes.index(self.size) + max(number, 0) / self.request.num_rounds
            share = done / len(self.request.microbatch_sizes)
            Path(self.request.progress).write_text(f"{share:.4f} microbatches of {self.size}", encoding="utf-8")


def _to(tree: Any, device: Device) -> Any:
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda t: t.to(device.torch_device) if isinstance(t, torch.Tensor) else t, tree)


def _microbatches(batch: tuple[Any, Any], size: int, batch_size: int) -> list[Microbatch]:
    import torch
    from torch.utils._pytree import tree_leaves

    from planner.profiling.timing import Microbatch
    from planner.tracing.loading import as_call, rows

    count = min(MICROBATCHES_PER_ROUND, batch_size // size)
    found = []
    for start in range(0, count * size, size):
        inputs = tree_leaves(as_call(rows(batch[0], start, start + size)))
        tensors = tuple(leaf for leaf in inputs if isinstance(leaf, torch.Tensor))
        found.append(Microbatch(tensors, rows(batch[1], start, start + size)))
    return found


def _optimizer_groups(trace: Trace, pieces: Pieces) -> tuple[list[list[torch.nn.Parameter]], list[str]]:
    """Trainable parameters of every layer without the tied ones, then each tied parameter as a group of its own."""
    tied = trace.tied
    parameters: dict[str, torch.nn.Parameter] = {}
    groups: list[list[torch.nn.Parameter]] = []
    for layer, piece in zip(trace.layers, pieces.pieces, strict=True):
        own = dict(piece.module.named_parameters())
        parameters.update(own)
        groups.append([own[name] for name in layer.parameters if name not in tied and own[name].requires_grad])
    names = list(tied)
    groups.extend([parameters[name]] if parameters[name].requires_grad else [] for name in names)
    return groups, names


def _layer_profiles(
    trace: Trace,
    pieces: Pieces,
    samples: tuple[LayerSamples, ...],
    optimizer_ms: list[float],
    memory: tuple[LayerMemory, ...],
) -> tuple[LayerProfile, ...]:
    from planner.files.profile_file import LayerProfile
    from planner.profiling.timing import summarise

    tied = trace.tied
    layers = []
    rows = zip(trace.layers, pieces.pieces, samples, optimizer_ms, memory, strict=True)
    for layer, piece, sample, step, sizes in rows:
        forward, forward_spread = summarise(sample.forward_ms)
        backward, backward_spread = summarise(sample.backward_ms)
        own = dict(piece.module.named_parameters())
        untied = [own[name] for name in layer.parameters if name not in tied]
        layers.append(
            LayerProfile(
                id=layer.id,
                name=layer.name,
                type=layer.type,
                position=layer.start,
                forward_ms=forward,
                forward_spread_ms=forward_spread,
                backward_ms=backward,
                backward_spread_ms=backward_spread,
                backward_first_ms=summarise(sample.backward_first_ms)[0],
                optimizer_ms=step,
                parameter_bytes=sum(p.numel() * p.element_size() for p in untied),
                parameters=layer.parameters,
                plain_cut=layer.plain_cut,
                structure=piece.structure,
                memory=sizes,
            )
        )
    return tuple(layers)


def _tensor_profiles(trace: Trace) -> Any:
    from planner.files.profile_file import TensorProfile

    return tuple(
        TensorProfile(t.name, t.producer, t.consumers, t.num_bytes, t.gradient_bytes, t.contiguous)
        for t in trace.tensors
    )


def _tied_profiles(
    trace: Trace,
    names: list[str],
    groups: list[list[torch.nn.Parameter]],
    optimizer_ms: list[float],
    memory: list[OptimizerMemory],
) -> tuple[TiedProfile, ...]:
    from planner.files.profile_file import TiedProfile
    from planner.tracing.gradients import attribute

    found = []
    for name, group, step, own in zip(names, groups, optimizer_ms, memory, strict=True):
        parameter = attribute(trace.graph_module, name)
        size = parameter.numel() * parameter.element_size()
        layers = trace.tied[name]
        found.append(TiedProfile(name, layers, size, step, bool(group), own.state_bytes, own.temporary_bytes))
    return tuple(found)


def _tensor_bytes(tree: Any) -> int:
    import torch
    from torch.utils._pytree import tree_leaves

    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _drift(samples: tuple[LayerSamples, ...]) -> float:
    """Relative difference between the first and the second half of the rounds, over all layers."""
    from statistics import median

    halves = [0.0, 0.0]
    for layer in samples:
        for values in (layer.forward_ms, layer.backward_ms):
            middle = max(1, len(values) // 2)
            halves[0] += median(values[:middle])
            halves[1] += median(values[middle:] or values)
    return abs(halves[1] - halves[0]) / max(halves[0], 1e-9)


if __name__ == "__main__":
    as_worker(main)
