"""`run-plan PLAN`: start one worker per stage on this machine, and end them all together."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from planner.command import guarded
from planner.errors import ToleranceError, UsageError
from runner.options import RunOptions, parse_options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `run-plan`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(arguments)
    return guarded("run-plan", lambda: launch(options, arguments), debug=options.debug)


def launch(options: RunOptions, arguments: Sequence[str], module: str = "runner") -> int:
    """Run the workers of a plan, each with the same command line. Raises what made them fail."""
    from planner.files.plan_file import Plan
    from planner.machine.device import worker_environment
    from planner.machine.workers import run_workers
    from planner.profiling.profiler import device_kind
    from runner.drift import first_profile, measure_drift
    from runner.worker import model_of, open_weights

    plan = Plan.load(options.plan)
    refuse_bad_targets(options, model_of(options, plan))
    refuse_impossible(options, plan.num_stages)
    if options.against is not None:
        from runner.comparing_cuts import other_plan

        other_plan(plan, options.against)
    if options.stock:
        plan.split_spec()
    open_weights(options)
    first = None if options.drift is None else first_profile(plan, options.drift, options.device)
    kind = device_kind(options.device)
    resolved = [*arguments, "--run-dir", str(options.run_dir)]
    num_workers = 1 if options.rehearse else plan.num_stages
    environment = worker_environment(kind, scarce_memory=options.meta or plan.model.meta)
    outside = None
    try:
        run_workers(module, resolved, num_workers, environment)
    except ToleranceError as error:
        outside = error
    if first is not None:
        found = measure_drift(plan, first, options)
        if not options.quiet:
            print(found, flush=True)
    if outside is not None:
        raise outside
    return 0


def refuse_impossible(options: RunOptions, num_stages: int) -> None:
    """Raise UsageError for a run that cannot start on this machine."""
    from planner.profiling.profiler import device_kind
    from runner.tensorboard_run import refuse_unusable

    if options.steps == 0:
        raise UsageError("--steps 0", "a run trains and measures at least one step", "give --steps 1 or more")
    refuse_unusable(options)
    if options.rehearse and options.against is not None:
        raise UsageError(
            "--rehearse with --against", "two cuts are compared in one running pipeline", "leave one of them out"
        )
    if device_kind(options.device) == "cuda":
        import torch

        found, needed = torch.cuda.device_count(), 1 if options.rehearse else num_stages
        if found < needed:
            raise UsageError(
                f"{found} CUDA device{'s' if found != 1 else ''} for {num_stages} stages",
                "every stage needs a device of its own",
                f"use {'--rehearse (the stages one after the other), ' if found else ''}--device cpu,"
                f" or plan again with --gpus {max(found, 1)}",
            )


def refuse_bad_targets(options: RunOptions, model: str) -> None:
    """Raise UsageError where what a run of `model` writes could not be written, or would overwrite its sources."""
    from planner.files.reading import refuse_overwriting, refuse_unwritable

    refuse_unwritable(options.run_dir, f"--run-dir {options.run_dir}", folder=True)
    weights = options.export_weights
    if weights is not None:
        refuse_unwritable(weights, f"--export-weights {weights}")
        rule = "the weights may not overwrite what they are trained from"
        refuse_overwriting(weights, f"--export-weights {weights}", (options.plan, model.partition(":")[0]), rule)
