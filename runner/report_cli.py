"""`plan-report FILE…`: show a plan, a profile or a measurement again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from planner.command import guarded
from planner.errors import UsageError
from planner.version import version

if TYPE_CHECKING:
    from planner.files.plan_file import Plan


def build_parser() -> argparse.ArgumentParser:
    """The parser of `plan-report`."""
    parser = argparse.ArgumentParser(
        prog="plan-report",
        description="Show a plan, or a measurement with its plan, on the terminal, as HTML, as JSON,"
        " or as a Chrome trace of the predicted and the measured step (perfetto: open it in ui.perfetto.dev).",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="PLAN, or MEASUREMENT and PLAN in any order")
    parser.add_argument("--format", choices=["text", "html", "json", "perfetto"], default="text", help="default: text")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there instead of the terminal")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"evenstage {version()}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `plan-report`; returns the exit code."""
    flags = build_parser().parse_args(argv)
    return guarded("plan-report", lambda: run(flags), debug=flags.debug)


def run(flags: argparse.Namespace) -> int:
    """Render the files as asked. Raises UsageError for a combination that cannot be shown."""
    from planner.files.reading import write_text

    text = render([Path(name) for name in flags.files], flags.format)
    if flags.output is None:
        sys.stdout.write(text)
    else:
        write_text(Path(flags.output), text)
        print(f"wrote {flags.output}")
    return 0


def render(files: Sequence[Path], kind: str) -> str:
    """The files as text, HTML, JSON or a Chrome trace."""
    found = {schema_of(path): path for path in files}
    plan_file, measurement_file = found.get("plan"), found.get("measurement")
    if plan_file is None or len(found) != len(files):
        got = ", ".join(found)
        raise UsageError(
            f"files of kind {got}", "a plan, or a measurement and its plan, can be shown", "name both files"
        )
    from planner.files.plan_file import Plan
    from planner.rendering import render_plan
    from runner.reporting.chrome_trace import render_predicted_trace

    plan = Plan.load(plan_file)
    seen = plan.seen_from_here(plan_file.parent)
    if measurement_file is None:
        if kind == "html":
            raise UsageError("a plan alone", "the HTML report holds a measurement against its plan", "name both files")
        if kind == "perfetto":
            return render_predicted_trace(plan)
        return plan.to_json() if kind == "json" else render_plan(seen, None) + "\n"
    return render_comparison(seen, measurement_file, kind)


def render_comparison(plan: Plan, measurement_file: Path, kind: str) -> str:
    """A measurement beside its plan."""
    from planner.files.measurement_file import Measurement
    from planner.files.reading import encode
    from runner.comparing import compare
    from runner.reporting.chrome_trace import render_chrome_trace
    from runner.reporting.page import render_html
    from runner.reporting.terminal import render_report

    measurement = Measurement.load(measurement_file)
    if measurement.plan != plan.model.fingerprint:
        raise UsageError(
            f"the measurement is of plan {measurement.plan}, the plan is {plan.model.fingerprint}",
            "the two belong together",
            "name the plan that was run",
        )
    report = compare(plan, measurement)
    if kind == "html":
        return render_html(report, plan, measurement)
    if kind == "perfetto":
        return render_chrome_trace(report)
    if kind == "json":
        return json.dumps(encode(measurement), indent=1) + "\n"
    return render_report(report) + "\n"


def schema_of(path: Path) -> str:
    """ "plan", "profile", "measurement" or "layer-graph", from the file's schema. Raises FileError."""
    from planner.errors import FileError

    try:
        schema = json.loads(path.read_text(encoding="utf-8")).get("schema", "")
    except (OSError, ValueError, AttributeError) as error:
        raise FileError(
            f"cannot read {path}: {error}", "plan-report shows files that plan and run-plan wrote"
        ) from None
    parts = str(schema).split("/")
    if len(parts) != 3 or parts[0] != "evenstage":
        raise FileError(
            f"{path} has schema {schema!r}", "it must be a file that plan or run-plan wrote", "check the path"
        )
    return parts[1]


if __name__ == "__main__":
    sys.exit(main())
