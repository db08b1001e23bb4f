"""`plan-report FILE…`: show a plan, a profile or a measurement again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
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
        description="Show a plan, or a measurement with its plan, on the terminal, as HTML or as JSON; or draw a plan.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="PLAN, or PLAN with its MEASUREMENT, or with its PROFILE or layer graph (for svg); in any order",
    )
    parser.add_argument("--format", choices=["text", "html", "json", "svg"], default="text", help="default: text")
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
    """The files as text, HTML, JSON or SVG."""
    found = {schema_of(path): path for path in files}
    if kind == "svg":
        return render_drawing(found)
    plan_file, measurement_file = found.get("plan"), found.get("measurement")
    if plan_file is None or len(found) != len(files):
        got = ", ".join(found)
        raise UsageError(
            f"files of kind {got}", "a plan, or a measurement and its plan, can be shown", "name both files"
        )
    from planner.files.plan_file import Plan
    from planner.rendering import render_plan

    plan = Plan.load(plan_file)
    seen = plan.seen_from_here(plan_file.parent)
    if measurement_file is None:
        if kind == "html":
            raise UsageError("a plan alone", "the HTML report holds a measurement against its plan", "name both files")
        return plan.to_json() if kind == "json" else render_plan(seen, None) + "\n"
    return render_comparison(seen, measurement_file, kind)


def render_drawing(found: Mapping[str, Path]) -> str:
    """The layer graph of a plan; the costs of its layers are in the profile or the graph that it was made from."""
    from planner.files.plan_file import Plan
    from planner.files.profile_file import Profile
    from planner.partitioning.layer_graph import build_layer_graph, graph_from_json
    from planner.rendering import render_graph_svg

    if set(found) not in ({"plan", "profile"}, {"plan", "layer-graph"}):
        rule = "a drawing needs the plan, and the profile or layer graph that it was made from"
        raise UsageError(f"--format svg for files of kind {', '.join(found)}", rule, "name both files")
    plan = Plan.load(found["plan"])
    if "profile" in found:
        size = Profile.load(found["profile"]).size(plan.microbatch_size)
        graph = build_layer_graph(size, plan.bandwidth_bytes_per_s)
    else:
        graph = graph_from_json(found["layer-graph"])
    if {str(node) for stage in plan.stages for node in stage.nodes} != set(map(str, graph.nodes)):
        rule = "every layer of the graph is in one stage of the plan"
        raise UsageError("a plan of other layers", rule, "name the profile or graph that the plan was made from")
    return render_graph_svg(graph, plan.seen_from_here(found["plan"].parent))


def render_comparison(plan: Plan, measurement_file: Path, kind: str) -> str:
    """A measurement beside its plan."""
    from planner.files.measurement_file import Measurement
    from planner.files.reading import encode
    from runner.comparing import compare
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
