"""What a run is asked to do, as one frozen value."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from planner.run_flags import add_run_flags

DEFAULT_STEPS = 20
DEFAULT_REHEARSED_STEPS = 8


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The flags of `run-plan`, resolved. `against` is a name of the plan's baselines."""

    plan: Path
    model: str | None
    device: str | None
    steps: int
    check: bool
    tolerance: float | None
    export_weights: Path | None
    stock: bool
    meta: bool
    weights: Path | None
    against: str | None
    tensorboard: Path | None
    rehearse: bool
    drift: Path | None
    run_dir: Path
    quiet: bool
    debug: bool


def build_parser() -> argparse.ArgumentParser:
    """The parser of `run-plan` and `python -m runner`."""
    from planner.version import version

    parser = argparse.ArgumentParser(
        prog="run-plan",
        description="Train the model of a plan on this machine, one worker per stage, and hold the measurement against"
        " the prediction. Under torchrun (torchrun --nproc-per-node K -m runner PLAN) each process is one worker.",
    )
    parser.add_argument("plan", metavar="PLAN", help="a plan file that `plan` wrote")
    parser.add_argument("--model", metavar="FILE[:NAME]", help="the model file (default: the one that the plan names)")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--meta",
        action="store_true",
        help="no worker builds more than its own stage (what plan --meta writes is run so without the flag)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print no report; the run's files are written all the same"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"evenstage {version()}")
    add_run_flags(parser)
    return parser


def parse_options(arguments: list[str]) -> RunOptions:
    """The options in `arguments`; argparse ends the process with code 2 where they are wrong."""
    import time

    from planner.run_flags import AGAINST

    flags = build_parser().parse_args(arguments)
    plan = Path(flags.plan)
    name = plan.name.removesuffix(".json").removesuffix(".plan")
    run_dir = Path(flags.run_dir) if flags.run_dir else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    default_steps = DEFAULT_REHEARSED_STEPS if flags.rehearse else DEFAULT_STEPS
    return RunOptions(
        plan=plan,
        model=flags.model,
        device=flags.device,
        steps=default_steps if flags.steps is None else flags.steps,
        check=flags.check,
        tolerance=flags.tolerance,
        export_weights=Path(flags.export_weights) if flags.export_weights else None,
        stock=flags.stock,
        meta=flags.meta,
        weights=Path(flags.weights) if flags.weights else None,
        against=AGAINST[flags.against] if flags.against else None,
        tensorboard=Path(flags.tensorboard) if flags.tensorboard is not None else None,
        rehearse=flags.rehearse,
        drift=Path(flags.drift) if flags.drift is not None else None,
        run_dir=run_dir,
        quiet=flags.quiet,
        debug=flags.debug,
    )
