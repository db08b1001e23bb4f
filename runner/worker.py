"""A worker: one rank, one stage. Trains, measures, checks; rank 0 writes the measurement and the report."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from planner.errors import FileError, UsageError

if TYPE_CHECKING:
    from planner.files.measurement_file import CheckResult, SpeedUp, StartTimes
    from planner.files.plan_file import Plan
    from planner.machine.device import Device
    from planner.tracing.loading import ModelSource
    from runner.checking import Reference
    from runner.options import RunOptions
    from runner.step_profiler import StepProfiler
    from runner.training import StepResult, Trainer
    from runner.weight_files import WeightFiles

GROUP_TIMEOUT = timedelta(minutes=5)
MEMORY_STEP = 1


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every part of a worker needs."""

    options: RunOptions
    plan: Plan
    source: ModelSource
    device: Device
    rank: int


def main() -> None:
    """Run as the rank that the environment says, with the command line of `run-plan`."""
    from runner.options import parse_options

    context = open_context(parse_options(sys.argv[1:]))
    if context.options.rehearse:
        from runner.rehearsing import rehearse

        rehearse(context)
    else:
        run(context)


def open_context(options: RunOptions) -> RunContext:
    """Read plan and model, choose the device, join the process group. Raises UsageError for a wrong world size."""
    import torch
    import torch.distributed as dist

    from planner.files.plan_file import Plan
    from planner.machine.device import choose_device
    from planner.machine.workers import ERROR_FOLDER
    from planner.tracing.loading import load_source
    from runner.checking import compute_exactly
    from runner.cli import refuse_bad_targets

    if options.drift is not None and ERROR_FOLDER not in os.environ:
        rule = "a second profile needs the devices that the workers hold until their end"
        raise UsageError("--drift under another launcher", rule, "start it with run-plan")
    plan = Plan.load(options.plan)
    world, rank = _whole_from_environment("WORLD_SIZE"), _whole_from_environment("RANK")
    if options.rehearse and world != 1:
        raise UsageError(
            f"{world} workers for a rehearsal", "it runs all stages in one process", "start it with run-plan"
        )
    if not options.rehearse and world != plan.num_stages:
        raise UsageError(
            f"{world} workers for a plan of {plan.num_stages} stages",
            "every stage has a worker of its own",
            f"start {plan.num_stages} processes, or plan again with --gpus {world}",
        )
    source = load_source(model_of(options, plan))
    device = choose_device(options.device, int(os.environ.get("LOCAL_RANK", rank)))
    if device.clock == "thread-cpu":
        torch.set_num_threads(1)
    if options.check:
        compute_exactly()
    if rank == 0:
        refuse_bad_targets(options, model_of(options, plan))
    backend = "gloo" if device.clock == "thread-cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=GROUP_TIMEOUT)
    return RunContext(options, plan, source, device, rank)


def _whole_from_environment(name: str) -> int:
    """A number that torchrun sets. Raises UsageError where it, or the address of the group, is missing."""
    missing = [each for each in (name, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(each)]
    if missing or not os.environ[name].isdecimal():
        got = f"RANK is set, but {missing[0]} is not" if missing else f"{name} is {os.environ[name]!r}"
        rule = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT belong together; torchrun sets them for each worker"
        raise UsageError(got, rule, "start it with torchrun, or unset RANK to start all workers here")
    return int(os.environ[name])


def model_of(options: RunOptions, plan: Plan) -> str:
    """The model file of a run: `--model`, or the plan's own, which is relative to the plan."""
    if options.model is not None:
        return options.model
    if plan.model.file is None:
        raise UsageError(
            "the plan was made from a layer graph and names no model file",
            "training needs the model",
            "give --model FILE",
        )
    return f"{options.plan.resolve().parent / plan.model.file}:{plan.model.entry}"


def run(context: RunContext) -> None:
    """Train and measure; the last line on stdout names what was written."""
    from runner.comparing_cuts import compare_cuts
    from runner.reference_memory import refuse_reference_that_does_not_fit
    from runner.stages import build_stage
    from runner.tensorboard_run import refuse_unusable
    from runner.training import Trainer

    options, plan = context.options, context.plan
    refuse_unusable(options)
    if options.check and context.rank == 0 and (options.meta or plan.model.meta):
        refuse_reference_that_does_not_fit(plan, context.source, context.device)
    built = build_stage(
        plan,
        context.source,
        context.rank,
        context.device,
        without_dropout=options.check,
        stock=options.stock,
        meta=options.meta,
        weights=open_weights(options),
    )
    exact = options.check or options.export_weights is not None
    trainer = Trainer(plan, context.source, built, context.device, exact_ties=exact)
    reference = _reference(context, trainer) if options.check else None
    results = train(context, trainer, reference)
    check, not_exported = _finish_check(context, trainer, reference)
    speed_up = compare_cuts(context) if options.against else None
    try:
        _report(context, results, check, speed_up, built.start)
    finally:
        if not_exported is not None:
            raise not_exported


def open_weights(options: RunOptions) -> WeightFiles | None:
    """What `--weights` names. Raises FileError."""
    from runner.weight_files import WeightFiles

    return None if options.weights is None else WeightFiles.open(options.weights)


def _reference(context: RunContext, trainer: Trainer) -> Reference | None:
    """The unsplit model on rank 0, whose weights the stages must have; collective over all ranks."""
    from runner.checking import Reference
    from runner.weights import gather_weights

    weights = gather_weights(trainer.built)
    if weights is None:
        return None
    reference = Reference(context.plan, context.source, context.device, open_weights(context.options))
    reference.compare_parameters(weights, -1)
    return reference


def train(context: RunContext, trainer: Trainer, reference: Reference | None) -> list[StepResult]:
    """All steps of the run on this rank. With `--check`, rank 0 trains the reference beside them."""
    from runner.progress import step_progress
    from runner.training import refuse_different_batches, training_batches

    options = context.options
    results: list[StepResult] = []
    with step_progress(options.steps, context.rank) as report, _profiling(context, trainer) as profiler:
        batches = training_batches(context.plan, context.source, report.say)
        for _ in range(options.steps):
            number, batch = next(batches)
            if number == 0:
                refuse_different_batches(batch, context.plan.seed)
            compare = _comparison(context, trainer, reference, number, batch)
            take = trainer.measured_step if number == MEMORY_STEP else trainer.step
            if profiler is not None and number in profiler.steps:
                take = profiler.step
            results.append(take(number, batch, compare))
            if profiler is not None:
                profiler.end_step(number)
            report.step(number, results[-1].loss)
    return results


def _profiling(context: RunContext, trainer: Trainer) -> AbstractContextManager[StepProfiler | None]:
    """With `--tensorboard`, what profiles the last steps on this rank; collective over all ranks."""
    directory = context.options.tensorboard
    if directory is None:
        return nullcontext()
    import torch.distributed as dist

    from runner.step_profiler import StepProfiler
    from runner.tensorboard_run import remove_earlier, run_name, stage_trace

    name = [run_name(context.options.run_dir)]
    dist.broadcast_object_list(name)
    if context.rank == 0:
        remove_earlier(directory, name[0])
    file = stage_trace(directory, name[0], context.rank, context.plan.num_stages)
    return StepProfiler(trainer, context.options.steps, file)


def _comparison(
    context: RunContext, trainer: Trainer, reference: Reference | None, number: int, batch: Any
) -> Callable[[], None] | None:
    if not context.options.check:
        return None
    from runner.weights import gather_gradients

    def compare() -> None:
        loss = _loss_of_last_stage(trainer)
        gradients = gather_gradients(trainer.built)
        if reference is not None and gradients is not None:
            reference.compare_gradients(number, loss, reference.backward(batch), gradients)

    return compare


def _loss_of_last_stage(trainer: Trainer) -> float:
    import torch
    import torch.distributed as dist

    value = torch.tensor([trainer.batch_loss() or 0.0], dtype=torch.float64)
    value = value.to(trainer.device.torch_device)
    dist.broadcast(value, dist.get_world_size() - 1)
    return float(value)


def _finish_check(
    context: RunContext, trainer: Trainer, reference: Reference | None
) -> tuple[CheckResult | None, FileError | None]:
    """Compare and export the weights; collective over all ranks. Also returns why they could not be exported."""
    from runner.weights import gather_weights, write_weights

    options = context.options
    if not options.check and options.export_weights is None:
        return None, None
    weights = gather_weights(trainer.built)
    not_exported = None
    if weights is not None and options.export_weights is not None:
        try:
            write_weights(options.export_weights, weights)
        except FileError as error:
            not_exported = error
    if reference is None or weights is None:
        return None, not_exported
    reference.compare_parameters(weights, reference.steps)
    return reference.result(trainer.built.num_dropouts_removed > 0), not_exported


def _report(
    context: RunContext,
    results: list[StepResult],
    check: CheckResult | None,
    speed_up: SpeedUp | None,
    start: StartTimes,
) -> None:
    """Gather what was measured; rank 0 writes and prints."""
    import torch.distributed as dist

    gathered: list[Any] | None = [None] * dist.get_world_size() if context.rank == 0 else None
    dist.gather_object((results, start), gathered)
    if gathered is None:
        return
    from runner.writing import write_run

    slowest = max((one for _, one in gathered), key=lambda one: one.total_s)
    write_run(context, [each for each, _ in gathered], check, speed_up, slowest)
