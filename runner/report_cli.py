"""`plan-report FILE…`: show a plan, a profile or a measurement again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.command import guarded
from planner.errors import UsageError
from planner.version import version

if TYPE_CHECKING:
    from planner.files.plan_file import Plan
    from planner.files.profile_file import Profile

SHOWN = "plan-report shows files that plan and run-plan wrote"
KINDS = ("plan", "profile", "measurement", "layer-graph")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `plan-report`."""
    parser = argparse.ArgumentParser(
        prog="plan-report",
        description="Show a plan, a profile or a measurement; a measurement held against its plan; or compare two"
        " files of a kind. perfetto: a Chrome trace of the predicted (and measured) step, for ui.perfetto.dev."
        " svg: the layer graph of a plan, with the profile or the layer graph that it was made from.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="one or two files that plan and run-plan wrote")
    formats = ["text", "html", "json", "perfetto", "svg"]
    parser.add_argument("--format", choices=formats, default="text", help="default: text")
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
    from planner.files.reading import refuse_overwriting, write_text

    if flags.output is not None:
        rule = "the report may not overwrite what it is made from"
        refuse_overwriting(Path(flags.output), f"-o {flags.output}", flags.files, rule)
    text = render([Path(name) for name in flags.files], flags.format)
    if flags.output is None:
        sys.stdout.write(text)
    else:
        write_text(Path(flags.output), text)
        print(f"wrote {flags.output}")
    return 0


def render(files: Sequence[Path], kind: str) -> str:
    """The files as text, HTML, JSON or a Chrome trace. Raises UsageError for what cannot be shown, or not so."""
    found = sorted(((schema_of(path), path) for path in files), key=lambda pair: KINDS.index(pair[0]))
    names, paths = [name for name, _ in found], [path for _, path in found]
    if kind == "svg":
        return render_drawing(dict(found))
    if names == ["plan", "measurement"]:
        return render_comparison(_seen_plan(paths[0]), paths[1], kind)
    if kind == "perfetto" and names == ["plan"]:
        from runner.reporting.chrome_trace import render_predicted_trace

        return render_predicted_trace(_seen_plan(paths[0]))
    if names == ["layer-graph"]:
        rule = "a layer graph is drawn with the plan that was made from it"
        raise UsageError(f"{paths[0]} is a layer graph", rule, "name the plan too, and --format svg")
    if len(found) == 1 and kind in ("text", "json"):
        return _render_one(names[0], paths[0], kind)
    if len(found) == 2 and kind == "text":
        return _render_two(names, paths if names[0] != names[1] else list(files))
    if kind == "html":
        rule = "the HTML report holds a measurement against its plan"
        raise UsageError(f"--format html of {' and '.join(names)}", rule, "name both files")
    rule = "one file is shown; two of a kind are compared, and a plan with its profile or measurement, as text"
    raise UsageError(f"--format {kind} of {' and '.join(names)}", rule, "name one file, or two for --format text")


def _render_one(name: str, path: Path, kind: str) -> str:
    """A plan, a profile or a measurement alone."""
    value = _load(name, path)
    if kind == "json":
        return path.read_text(encoding="utf-8")
    if name == "plan":
        from planner.rendering import render_plan

        return render_plan(_seen_plan(path), None) + "\n"
    if name == "profile":
        from planner.rendering.profile_text import render_profile

        return render_profile(value) + "\n"
    from runner.reporting.measurement_text import render_measurement

    return render_measurement(value) + "\n"


def _render_two(names: Sequence[str], paths: Sequence[Path]) -> str:
    """Two of a kind beside each other, or a plan with the profile that it was made from."""
    pair = [_load(name, path) for name, path in zip(names, paths, strict=True)]
    shown = [str(path) for path in paths]
    if names == ["plan", "plan"]:
        from planner.rendering.side_by_side import compare_plans

        return compare_plans(pair, shown) + "\n"
    if names == ["profile", "profile"]:
        from planner.rendering.side_by_side import compare_profiles

        return compare_profiles(pair, shown) + "\n"
    if names == ["measurement", "measurement"]:
        from runner.reporting.measurement_text import compare_measurements

        return compare_measurements(pair, shown) + "\n"
    if names == ["plan", "profile"]:
        return _render_plan_with_profile(_seen_plan(paths[0]), pair[1]) + "\n"
    raise UsageError(f"files of kind {' and '.join(names)}", "they have nothing to be held against", "name one of them")


def _render_plan_with_profile(plan: Plan, profile: Profile) -> str:
    from planner.planning import limit_line
    from planner.rendering import render_plan

    if plan.model.fingerprint not in {size.fingerprint for size in profile.sizes}:
        raise UsageError("the plan was not made from this profile", "the two belong together", "name its own profile")
    return render_plan(plan, profile, limit_line=limit_line(plan, profile))


def _load(name: str, path: Path) -> Any:
    from planner.files.measurement_file import Measurement
    from planner.files.plan_file import Plan
    from planner.files.profile_file import Profile

    return {"plan": Plan.load, "profile": Profile.load, "measurement": Measurement.load}[name](path)


def _seen_plan(path: Path) -> Plan:
    """The plan with its model file named as the current directory sees it."""
    from planner.files.plan_file import Plan

    return Plan.load(path).seen_from_here(path.parent)


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
        graph = build_layer_graph(size, plan.link_cost())
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
    from runner.reporting.chrome_trace import render_chrome_trace
    from runner.reporting.page import render_html
    from runner.reporting.terminal import render_report
    from runner.verdict import to_plan_from

    measurement = Measurement.load(measurement_file)
    if measurement.plan != plan.model.fingerprint:
        raise UsageError(
            f"the measurement is of plan {measurement.plan}, the plan is {plan.model.fingerprint}",
            "the two belong together",
            "name the plan that was run",
        )
    report = compare(plan, measurement, to_plan_from(measurement_file, measurement.name))
    if kind == "html":
        return render_html(report, plan, measurement)
    if kind == "perfetto":
        return render_chrome_trace(report)
    if kind == "json":
        return json.dumps(encode(measurement), indent=1) + "\n"
    return render_report(report) + "\n"


def schema_of(path: Path) -> str:
    """ "plan", "profile" or "measurement", from the file's schema. Raises FileError."""
    from planner.errors import FileError
    from planner.files.reading import WRITE_AGAIN

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}", SHOWN, "check the path") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not complete JSON: {error}", SHOWN, WRITE_AGAIN) from None
    schema = value.get("schema", "") if isinstance(value, dict) else f"of a {type(value).__name__}"
    parts = str(schema).split("/")
    if len(parts) != 3 or parts[0] != "evenstage" or parts[1] not in KINDS:
        raise FileError(
            f"{path} has schema {schema!r}", "it must be a plan, a profile or a measurement", "check the path"
        )
    return parts[1]


if __name__ == "__main__":
    sys.exit(main())
