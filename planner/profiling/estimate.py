"""A model file → Profile without any run: time from FLOPs and bytes at a device's peak, memory under fake tensors.

A layer's forward takes as long as its FLOPs or its bytes do at the peak, whichever is longer, and its backward twice
that. No device reaches its peak and launches cost something too, so this is for a first look and as a baseline; what it
gives is marked `estimated` wherever it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from planner.errors import ProfileError
from planner.files.profile_file import Peak, Profile, SizeProfile
from planner.profiling.assembling import (
    LayerCosts,
    LayerTimes,
    describe_model,
    microbatches_of,
    optimizer_groups,
    size_profile,
)
from planner.profiling.counting import Work, count_work
from planner.profiling.memory import track_fake_step
from planner.profiling.optimizer_memory import OptimizerMemory, track_optimizer_by_sample
from planner.profiling.peaks import Precision, find_peak
from planner.tracing.deferred_model import build_either
from planner.tracing.exporting import trace_model
from planner.tracing.loading import as_call, load_source, make_batch, rows
from planner.tracing.ordering import layer_dependencies
from planner.tracing.pieces import build_pieces
from planner.tracing.training_digest import training_digest

if TYPE_CHECKING:
    from planner.tracing.exporting import Trace
    from planner.tracing.loading import ModelSource

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
    precision: Precision = "fp32",
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Profile:
    """Estimate `model` ("file.py" or "file.py:name") at the given sizes on a device of `peak` (see `find_peak`).

    The model is never held in memory; in bf16 its dtypes are those of autocast on a CPU. Raises ModelFileError,
    TraceError, ProfileError where forward or the loss needs values, or UsageError for a peak that is none.
    """
    started = time.perf_counter()
    limits, machine = find_peak(peak, precision)
    source = load_source(model)
    block = CPU_BLOCK_BYTES if machine.device == "cpu" else GPU_BLOCK_BYTES
    sizes = []
    for number, size in enumerate(microbatch_sizes):
        progress(number / len(microbatch_sizes), f"microbatches of {size}")
        sizes.append(_estimate_size(source, seed, batch_size, size, limits, block, precision))
    trace = sizes[0][0]
    return Profile(
        model=describe_model(source, build_either(source, seed, meta=True)[0], meta=meta),
        machine=machine,
        precision=precision,
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
    source: ModelSource, seed: int, batch_size: int, size: int, peak: Peak, block_bytes: int, precision: Precision
) -> tuple[Trace, SizeProfile]:
    model, _ = build_either(source, seed, meta=True)
    batch = make_batch(source, seed, 0, batch_size)
    autocast_on = torch.device("cpu") if precision == "bf16" else None
    trace = trace_model(model, *as_call(rows(batch[0], 0, size)), autocast_on=autocast_on)
    pieces = build_pieces(trace)
    groups = optimizer_groups(trace, pieces)
    microbatches = microbatches_of(batch, size, batch_size)
    step = track_fake_step(pieces, microbatches, source.loss_fn, block_bytes)
    order, device = trace.graph_module.parameters(), torch.device("cpu")
    optimizer, temporaries_add = track_optimizer_by_sample(groups, order, source.make_optimizer, device)
    counted = count_work(pieces, microbatches[0], source.loss_fn)
    if counted.loss is None:
        raise ProfileError("the loss was not counted", "an estimate has the loss's time in the last layer")
    updates = [_update_ms(group, own, peak) for group, own in zip(groups, optimizer, strict=True)]
    forward = [roofline_ms(work, peak) for work in counted.layers]
    forward[-1] += roofline_ms(counted.loss, peak)
    times = [_times(ms, trained) for ms, trained in zip(forward, counted.trained, strict=True)]
    costs = LayerCosts(times, updates, optimizer, temporaries_add, step)
    return trace, size_profile(trace, pieces, size, microbatches[0], costs, counted.layers, layer_dependencies(trace))


def _times(forward_ms: float, trained: bool) -> LayerTimes:
    backward_ms = BACKWARD_OVER_FORWARD * forward_ms if trained else 0.0
    return LayerTimes(forward_ms, 0.0, backward_ms, 0.0, backward_ms)


def _update_ms(group: list[torch.nn.Parameter], memory: OptimizerMemory, peak: Peak) -> float:
    """An optimizer's step: parameters and states are read and written, gradients read."""
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in group)
    moved = 3 * num_bytes + 2 * memory.state_bytes if group else 0
    return roofline_ms(Work(0, moved), peak)
