"""One of the concurrent copies that profile a model: traces it at every size, times it, and rank 0 writes the result.

Run by `planner.profiling.profiler` as `python -m planner.profiling.worker REQUEST RESULT`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from planner.machine.workers import as_worker

if TYPE_CHECKING:
    from planner.errors import PlannerError
    from planner.files.profile_file import Machine, ModelReference, Profile, SizeProfile
    from planner.machine.device import Device
    from planner.profiling.assembling import LayerCosts
    from planner.profiling.boundary import BoundaryCost
    from planner.profiling.opening import Opening
    from planner.profiling.optimizer_memory import OptimizerMemory
    from planner.profiling.profiler import ProfileRequest
    from planner.profiling.step_memory import StepMemory
    from planner.profiling.timing import LayerSamples, Microbatch
    from planner.tracing.exporting import Trace
    from planner.tracing.loading import ModelSource
    from planner.tracing.pieces import Pieces
    from planner.tracing.sizes import ExportCount, SizeExports

OPTIMIZER_ROUNDS = 5
STAGE_FAILED = "failed to run forward"  # torch's stage says so around the error of its module


def main() -> None:
    """Profile as the request file says; copies meet before every round, so that all compute at once."""
    import torch
    import torch.distributed as dist

    from planner.files.reading import decode
    from planner.machine.device import choose_device
    from planner.profiling.profiler import REQUEST_SCHEMA, ProfileRequest
    from planner.tracing.loading import load_source

    data = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    assert data.pop("schema") == REQUEST_SCHEMA
    request = decode(ProfileRequest, data, "request")
    dist.init_process_group("gloo")
    device = choose_device(request.device, 0 if request.device else dist.get_rank())
    if device.clock == "thread-cpu":
        torch.set_num_threads(1)
    profile = profile_here(request, load_source(request.model), device)
    if dist.get_rank() == 0:
        profile.save(Path(sys.argv[2]))


def profile_here(
    request: ProfileRequest, source: ModelSource, device: Device, before_round: Callable[[int], None] = lambda _: None
) -> Profile:
    """The profile as this process sees it, together with the other copies of its group; the first one's counts.

    `before_round` is called with the round's number before each, once all copies have met.
    """
    from planner.machine.device import describe_machine
    from planner.profiling.opening import Opening

    started = time.perf_counter()
    (exports, described), opening = _prepare(request, source), Opening(request.granularity, request.num_stages)
    sizes = tuple(
        _profile_size(request, source, device, exports, opening, _Meeting(request, size, before_round))
        for size in request.microbatch_sizes
    )
    seconds = time.perf_counter() - started
    return _profile(request, source, sizes, described, describe_machine(device), seconds, exports.count)


def _prepare(request: ProfileRequest, source: ModelSource) -> tuple[SizeExports, ModelReference]:
    """The model's graphs at every size, from one export where that is possible, and what is said of the model.

    Whatever the device, it is exported on the CPU, as by the ranks that will run it: an export on a GPU can differ.
    """
    from planner.profiling.assembling import describe_model
    from planner.tracing.deferred_model import build_either
    from planner.tracing.loading import as_call, make_batch, rows
    from planner.tracing.sizes import SizeExports

    model, deferred = build_either(source, request.seed, meta=request.meta)
    described = describe_model(source, model, meta=deferred is not None)
    inputs = make_batch(source, request.seed, 0, request.batch_size)[0]
    return SizeExports(model, lambda size: as_call(rows(inputs, 0, size)), request.microbatch_sizes), described


def _profile(
    request: ProfileRequest,
    source: ModelSource,
    sizes: tuple[tuple[Trace, SizeProfile], ...],
    described: ModelReference,
    machine: Machine,
    seconds: float,
    count: ExportCount,
) -> Profile:
    from planner.files.profile_file import Profile, Tracing
    from planner.tracing.training_digest import training_digest

    traced = sizes[0][0]
    return Profile(
        model=described,
        machine=machine,
        precision=request.precision,
        batch_size=request.batch_size,
        num_rounds=request.num_rounds,
        seconds=seconds,
        concurrent_copies=request.copies,
        sizes=tuple(size for _, size in sizes),
        why_not_plain=traced.why_not_plain,
        training=training_digest(source, traced.graph_module),
        tracing=Tracing(count.exports, count.seconds),
        granularity=request.granularity,
        schedule=request.schedule if _pipelined_copies(request, meta=described.meta) > 1 else None,
    )


def _profile_size(
    request: ProfileRequest,
    source: ModelSource,
    device: Device,
    exports: SizeExports,
    opening: Opening,
    meeting: _Meeting,
) -> tuple[Trace, SizeProfile]:
    """Trace and time the model at the microbatch size of the meeting."""
    from planner.tracing.deferred_model import build_either
    from planner.tracing.exporting import read_trace

    model, deferred = build_either(source, request.seed, meta=request.meta)
    autocast_on = device.torch_device if request.precision == "bf16" else None
    trace = opening.before_timing(read_trace(exports.graph(meeting.size, model), model, autocast_on=autocast_on))
    profile = _time_trace(request, source, device, trace, meeting, meta=deferred is not None)
    opened = opening.after_timing(trace, [layer.forward_ms + layer.backward_ms for layer in profile.layers])
    if opened is not None:
        trace, profile = opened, _time_trace(request, source, device, opened, meeting, meta=deferred is not None)
    return trace, profile


def _pipelined_copies(request: ProfileRequest, *, meta: bool) -> int:
    """How many copies run as one pipeline; 1 where each runs the model by itself, with `meta` layer by layer."""
    return 1 if meta else request.copies


def _time_trace(
    request: ProfileRequest, source: ModelSource, device: Device, trace: Trace, meeting: _Meeting, *, meta: bool
) -> SizeProfile:
    """Time the layers of a trace; `meta`: one at a time, for the model does not fit."""
    import torch.distributed as dist

    from planner.errors import PlannerError
    from planner.profiling.assembling import microbatches_of, size_profile
    from planner.profiling.counting import count_work
    from planner.tracing.loading import make_batch, on_device
    from planner.tracing.ordering import layer_dependencies
    from planner.tracing.pieces import build_pieces
    from planner.tracing.rewriting import set_device, views_of_any_layout

    size, batch = meeting.size, on_device(make_batch(source, request.seed, 0, request.batch_size), device.torch_device)
    views_of_any_layout(trace.graph_module)
    set_device(trace.graph_module, device.torch_device)
    if not meta:
        trace.graph_module.to(device.torch_device)
    pieces = build_pieces(trace)
    microbatches = microbatches_of(batch, size, request.batch_size, copies=_pipelined_copies(request, meta=meta))
    measure = _measure_piecewise if meta else _measure_in_place
    try:
        costs = measure(pieces, microbatches, source, device, request, meeting)
    except PlannerError:
        raise
    except Exception as error:
        raise _explained(error, source) from error
    works = count_work(pieces, microbatches[0]).layers
    dist.barrier()
    return size_profile(trace, pieces, size, microbatches[0], costs, works, layer_dependencies(trace))


def _measure_in_place(
    pieces: Pieces,
    microbatches: list[Microbatch],
    source: ModelSource,
    device: Device,
    request: ProfileRequest,
    meet: Callable[[int], None],
) -> LayerCosts:
    """What all layers cost where they run."""
    from planner.profiling.assembling import optimizer_groups
    from planner.profiling.boundary import NO_COST
    from planner.profiling.memory import track_step
    from planner.profiling.optimizer_memory import track_optimizer
    from planner.profiling.pipelined import time_in_pipeline
    from planner.profiling.pooling import on_first_copy
    from planner.profiling.stage_optimizer import shared_out
    from planner.profiling.timing import time_layers, time_optimizer

    groups, rounds = optimizer_groups(pieces.trace, pieces), request.num_rounds
    parameters = pieces.trace.graph_module.parameters
    make_optimizer, tied = source.make_optimizer, [*pieces.trace.tied.values()]
    if request.copies > 1:
        found = time_in_pipeline(
            pieces, microbatches, source.loss_fn, make_optimizer, device, rounds, meet, schedule=request.schedule
        )
        samples, boundary = found.layers, found.boundary
        alone_ms = time_optimizer(groups, make_optimizer, device, OPTIMIZER_ROUNDS, request.num_stages)
        optimizer_ms = shared_out(alone_ms, found.starts, tied, found.optimizer_ms)
    else:
        samples = time_layers(pieces, microbatches, source.loss_fn, device, rounds, meet, num_parts=request.num_stages)
        boundary = NO_COST
        optimizer_ms = time_optimizer(groups, make_optimizer, device, OPTIMIZER_ROUNDS, request.num_stages)
    step, memory = on_first_copy(
        lambda: (
            track_step(pieces, microbatches, source.loss_fn, device),
            track_optimizer(groups, parameters(), make_optimizer, device.block_bytes),
        )
    )
    return _costs(samples, boundary, optimizer_ms, step, memory, rounds, device)


def _measure_piecewise(
    pieces: Pieces,
    microbatches: list[Microbatch],
    source: ModelSource,
    device: Device,
    request: ProfileRequest,
    meet: Callable[[int], None],
) -> LayerCosts:
    """`_measure_in_place` with one layer in memory at a time."""
    from planner.profiling.assembling import optimizer_groups
    from planner.profiling.boundary import measure_boundary
    from planner.profiling.memory import track_fake_step
    from planner.profiling.optimizer_memory import track_optimizer_by_sample
    from planner.profiling.piecewise import time_pieces
    from planner.profiling.pooling import gathered, on_first_copy

    groups, rounds = optimizer_groups(pieces.trace, pieces), (request.num_rounds, OPTIMIZER_ROUNDS)
    parameters = pieces.trace.graph_module.parameters
    samples, optimizer_ms = time_pieces(
        pieces, microbatches, source.loss_fn, groups, source.make_optimizer, device, rounds, meet
    )
    step, memory = on_first_copy(
        lambda: (
            track_fake_step(pieces, microbatches, source.loss_fn, device.block_bytes, device.torch_device),
            track_optimizer_by_sample(groups, parameters(), source.make_optimizer, device.torch_device),
        )
    )
    boundary = measure_boundary(device)  # type: ignore[arg-type]  # mypy does not take a Protocol for hashable
    return _costs(gathered(samples), boundary, optimizer_ms, step, memory, request.num_rounds, device)


def _costs(
    samples: tuple[LayerSamples, ...],
    boundary: BoundaryCost,
    optimizer_ms: list[float],
    step: StepMemory,
    optimizer: tuple[list[OptimizerMemory], bool],
    num_rounds: int,
    device: Device,
) -> LayerCosts:
    from planner.profiling.assembling import LayerCosts, measured_times
    from planner.profiling.pooling import drift, periods

    times, changes = [measured_times(layer) for layer in samples], periods(samples, num_rounds)
    block = device.block_bytes if device.clock == "cuda-event" else 1  # a CPU's events are of what was asked for
    return LayerCosts(times, optimizer_ms, *optimizer, step, boundary, drift(samples), changes, block)


def _explained(error: Exception, source: ModelSource) -> PlannerError:
    """What went wrong while the layers ran, with the user's line where there is one."""
    from planner.errors import ProfileError, user_frames
    from planner.tracing.user_functions import written_in_place

    if STAGE_FAILED in str(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if (explained := written_in_place(source.file, error)) is not None:
        return explained
    frames = user_frames(error, source.file)
    return ProfileError(
        f"{source.name} exported but did not run: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        "forward, loss_fn and backward must run on one microbatch",
        "correct the line shown" if frames else "run again with --debug",
        frames,
    )


class _Meeting:
    """Called before each round at a size: all copies meet, and rank 0 says how far the profile is."""

    def __init__(self, request: ProfileRequest, size: int, before_round: Callable[[int], None]) -> None:
        self.request, self.size, self.before_round = request, size, before_round

    def __call__(self, number: int) -> None:
        import torch.distributed as dist

        dist.barrier()
        if dist.get_rank() == 0 and self.request.progress:
            done = self.request.microbatch_sizes.index(self.size) + max(number, 0) / self.request.num_rounds
            share = done / len(self.request.microbatch_sizes)
            Path(self.request.progress).write_text(f"{share:.4f} microbatches of {self.size}", encoding="utf-8")
        self.before_round(number)


if __name__ == "__main__":
    as_worker(main)
