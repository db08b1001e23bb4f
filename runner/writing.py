"""What a run leaves behind: measurement, metrics, report and trace as files, and the report on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import ToleranceError, UsageError
from planner.files.measurement_file import CheckResult, Measurement, SpeedUp, StartTimes
from planner.files.reading import encode, write_text
from planner.machine.device import describe_machine
from runner.comparing import BalanceReport, compare
from runner.gathering import build_measurement
from runner.reporting.chrome_trace import render_chrome_trace
from runner.reporting.page import render_html
from runner.reporting.terminal import render_report
from runner.tensorboard_run import describe, run_name, write_timelines
from runner.training import StepResult
from runner.verdict import to_plan_from

if TYPE_CHECKING:
    from planner.files.plan_file import Plan
    from runner.options import RunOptions
    from runner.worker import RunContext


def write_run(
    context: RunContext,
    results: Sequence[Sequence[StepResult]],
    check: CheckResult | None,
    speed_up: SpeedUp | None,
    start: StartTimes,
) -> None:
    """Build the measurement, write the run's files, print the report, and hold it against `--tolerance`."""
    if not results[0]:
        raise UsageError("--steps 0", "a run trains and measures at least one step", "give --steps 1 or more")
    source = context.source
    reference = source.reference_loss() if source.reference_loss is not None else None
    machine, clock = describe_machine(context.device), context.device.clock
    measurement = build_measurement(
        context.plan, results, machine, clock, check, speed_up, reference, rehearsed=context.options.rehearse
    )
    measurement = replace(measurement, start=start)
    folder = context.options.run_dir
    write_measurement(folder, measurement)
    report = write_report(context.options, context.plan, measurement)
    write_text(folder / "trace.json", render_chrome_trace(report))
    written = f"wrote {folder / 'report.html'}, measurement.json, metrics.jsonl, trace.json"
    tensorboard, name = context.options.tensorboard, run_name(folder)
    if tensorboard is not None:
        write_timelines(tensorboard, name, report)
        written = f"{describe(tensorboard, name, context.options.steps)}\n{written}, {tensorboard / name}"
    if not context.options.quiet:
        print(f"{render_report(report)}\n{written}", flush=True)
    tolerance = context.options.tolerance
    if tolerance is not None and not report.within_tolerance(tolerance):
        raise ToleranceError(
            f"the prediction is off by more than {tolerance * 100:.4g} %",
            "with --tolerance every stage's share of forward and of backward must be predicted within it",
            "plan again with --fresh on a quieter machine, or allow more",
        )


def write_report(options: RunOptions, plan: Plan, measurement: Measurement) -> BalanceReport:
    """Hold the measurement against its plan, and write report.html."""
    seen, folder = plan.seen_from_here(options.plan.parent), options.run_dir
    report = compare(seen, measurement, to_plan_from(folder / "measurement.json", measurement.name))
    write_text(folder / "report.html", render_html(report, seen, measurement))
    return report


def write_measurement(folder: Path, measurement: Measurement) -> None:
    """Write measurement.json and metrics.jsonl."""
    measurement.save(folder / "measurement.json")
    lines = [json.dumps(encode(record), allow_nan=False) for record in measurement.steps]
    write_text(folder / "metrics.jsonl", "\n".join(lines) + "\n")
