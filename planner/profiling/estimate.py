"""A model file → Profile without any run: time from FLOPs and bytes at a device's peak, memory under fake tensors.

A layer's forward takes as long as its FLOPs or its bytes do at the peak, whichever is longer, and its backward twice
that. No device reaches its peak and launches cost something too, so this is for a first look and as a baseline; what it
gives is marked `estimated` wherever it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from planner.errors import ProfileError
from planner.files.profile_file import LayerMemory, LayerProfile, Peak, Profile, SizeProfile
from planner.profiling.counting import Work, count_work
from planner.profiling.memory import layer_memory, track_fake_step
from planner.profiling.optimizer_memory import OptimizerMemory, track_optimizer_by_sample
from planner.profiling.peaks import find_peak
from planner.profiling.worker import (
    describe_model,
    microbatches_of,
    optimizer_groups,
    size_memory,
    tensor_profiles,
    tied_profiles,
)
from planner.tracing.deferred_model import build_either
from planner.tracing.exporting import trace_model
from planner.tracing.loading import as_call, load_source, make_batch, rows
from planner.tracing.pieces import build_pieces
from planner.tracing.training_digest import training_digest

if TYPE_CHECKING:
    import torch

    from planner.tracing.exporting import Trace
    from planner.tracing.loading import ModelSource
    from planner.tracing.pieces import Pieces

BACKWARD_OVER_FORWARD = 2.0
GPU_BLOCK_BYTES, CPU_BLOCK_BYTES = 512, 64


def roofline_ms(work: Work, peak: Peak) -> float:
    """The least milliseconds in which a device of this peak computes and moves `work`.

    >>> roofline_ms(Work(flops=2_000_000, num_bytes=1_000), Peak("", flops_per_s=1e9, bytes_per_s=1e9, source=""))
    2.0
    """
    return max(work.flops / peak.flops_per_s, work.num_bytes / peak.bytes_per_s) * 1e3


def estimate_model(
    model: str,
    *,
    batch_size: int,
    microbatch_sizes: tuple[int, ...],
    peak: str | None = None,
    seed: int = 0,
    meta: bool = False,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Profile:
    """Estimate `model` ("file.py" or "file.py:name") at the given sizes on a device of `peak` (see `find_peak`).

    The model is never held in memory. Raises ModelFileError, TraceError, ProfileError where forward or the loss needs
    values, or UsageError for a peak that is none.
    """
    started = time.perf_counter()
    limits, machine = find_peak(peak)
    source = load_source(model)
    block = CPU_BLOCK_BYTES if machine.device == "cpu" else GPU_BLOCK_BYTES
    sizes = []
    for number, size in enumerate(microbatch_sizes):
        progress(number / len(microbatch_sizes), f"microbatches of {size}")
        sizes.append(_estimate_size(source, seed, batch_size, size, limits, block))
    trace, first = sizes[0]
    return Profile(
        model=describe_model(source, seed, meta, first.layers, as_fake=True),
        machine=machine,
        precision="fp32",
        batch_size=batch_size,
        num_rounds=0,
        seconds=time.perf_counter() - started,
        concurrent_copies=0,
        sizes=tuple(size for _, size in sizes),
        why_not_plain=trace.why_not_plain,
        training=training_digest(source, trace.graph_module),
        estimated=limits,
    )


def _estimate_size(
    source: ModelSource, seed: int, batch_size: int, size: int, peak: Peak, block_bytes: int
) -> tuple[Trace, SizeProfile]:
    model, _ = build_either(source, seed, meta=True)
    batch = make_batch(source, seed, 0, batch_size)
    trace = trace_model(model, *as_call(rows(batch[0], 0, size)))
    pieces = build_pieces(trace)
    groups, tied = optimizer_groups(trace, pieces)
    microbatches = microbatches_of(batch, size, batch_size)
    step = track_fake_step(pieces, microbatches, source.loss_fn, block_bytes)
    optimizer, temporaries_add = track_optimizer_by_sample(groups, source.make_optimizer)
    counted = count_work(pieces, microbatches[0], source.loss_fn)
    if counted.loss is None:
        raise ProfileError("the loss was not counted", "an estimate has the loss's time in the last layer")
    updates = [_update_ms(group, own, peak) for group, own in zip(groups, optimizer, strict=True)]
    count = len(trace.layers)
    memory = layer_memory(pieces, step, optimizer[:count], tied)
    forward = [roofline_ms(work, peak) for work in counted.layers]
    forward[-1] += roofline_ms(counted.loss, peak)
    return trace, SizeProfile(
        microbatch_size=size,
        fingerprint=trace.fingerprint,
        layers=_layers(trace, pieces, counted.layers, counted.trained, forward, updates[:count], memory),
        tensors=tensor_profiles(trace),
        tied=tied_profiles(trace, tied, groups[count:], updates[count:], optimizer[count:]),
        drift=0.0,
        memory=size_memory(step, microbatches[0], temporaries_add),
    )


def _update_ms(group: list[torch.nn.Parameter], memory: OptimizerMemory, peak: Peak) -> float:
    """An optimizer's step: parameters and states are read and written, gradients read."""
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in group)
    moved = 3 * num_bytes + 2 * memory.state_bytes if group else 0
    return roofline_ms(Work(0, moved), peak)


def _layers(
    trace: Trace,
    pieces: Pieces,
    works: tuple[Work, ...],
    trained: tuple[bool, ...],
    forward_ms: list[float],
    optimizer_ms: list[float],
    memory: tuple[LayerMemory, ...],
) -> tuple[LayerProfile, ...]:
    rows_ = zip(trace.layers, pieces.pieces, works, trained, forward_ms, optimizer_ms, memory, strict=True)
    layers = []
    for layer, piece, work, has_backward, forward, update, sizes in rows_:
        own = dict(piece.module.named_parameters())
        untied = [own[name] for name in layer.parameters if name not in trace.tied]
        backward = BACKWARD_OVER_FORWARD * forward if has_backward else 0.0
        layers.append(
            LayerProfile(
                id=layer.id,
                name=layer.name,
                type=layer.type,
                position=layer.start,
                forward_ms=forward,
                forward_spread_ms=0.0,
                backward_ms=backward,
                backward_spread_ms=0.0,
                backward_first_ms=backward,
                optimizer_ms=update,
                parameter_bytes=sum(p.numel() * p.element_size() for p in untied),
                parameters=layer.parameters,
                plain_cut=layer.plain_cut,
                flops=work.flops,
                structure=piece.structure,
                memory=sizes,
            )
        )
    return tuple(layers)
