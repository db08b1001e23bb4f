"""`plan --gpus K model.py`: everything that ends in a plan; with --train, everything up to the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.command import guarded
from planner.errors import UsageError
from planner.run_flags import add_run_flags, run_arguments, whole_number
from planner.version import version

if TYPE_CHECKING:
    from planner.files.plan_file import Plan
    from planner.files.profile_file import Profile
    from planner.planning import PlanRequest


def build_parser() -> argparse.ArgumentParser:
    """The parser of `plan`."""
    parser = argparse.ArgumentParser(
        prog="plan",
        description="Cut a model into pipeline stages: trace it, profile every layer, and solve for the balanced cut.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 outside --tolerance, 4 --check found a"
        " difference, 5 no plan fits, 130 interrupted",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL.py[:NAME]", help="the model file (see --example)")
    parser.add_argument("--gpus", type=whole_number(1), metavar="K", help="number of stages, exactly")
    parser.add_argument("--example", action="store_true", help="print a model file to start from")
    parser.add_argument("-o", "--output", metavar="FILE", help="the plan file (default NAME.plan.json here)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead of the table")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"evenstage {version()}")
    graph = parser.add_argument_group("a layer graph that came from elsewhere")
    graph.add_argument("--graph", metavar="FILE", help="plan this node-link JSON instead of a model")
    graph.add_argument("--objective", choices=["bottleneck"], help="minimise the largest stage load, not a step")
    graph.add_argument("--no-transfers", action="store_true", help="with --objective: tensors cost nothing")
    graph.add_argument("--cut-at", metavar="ID,ID…", help="score these cuts instead of searching")
    costs = parser.add_argument_group("what is planned for")
    costs.add_argument(
        "--batch-size", type=whole_number(1), metavar="N", help="samples per step (default: the model's)"
    )
    costs.add_argument("--microbatches", type=_microbatches, default="auto", metavar="N|auto", help="default: auto")
    costs.add_argument("--schedule", choices=["gpipe", "1f1b"], default="gpipe", help="default: gpipe")
    costs.add_argument("--precision", choices=["fp32"], default="fp32", help="default: fp32")
    costs.add_argument("--bandwidth", type=_bandwidth, metavar="RATE", help="of each link, e.g. 12GB/s (default: free)")
    costs.add_argument("--plain", action="store_true", help="only cuts that stock torch does rightly by split_spec")
    costs.add_argument("--seed", type=whole_number(0), default=0, metavar="S", help="default: 0")
    costs.add_argument(
        "--meta", action="store_true", help="the model exceeds this machine: no process holds more than its part of it"
    )
    profile = parser.add_argument_group("the profile")
    profile.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    profile.add_argument("--profile", metavar="FILE", help="plan from this profile, without hardware")
    profile.add_argument("--fresh", action="store_true", help="measure again even where a fitting profile exists")
    parser.add_argument("--train", action="store_true", help="then train the plan here and compare")
    add_run_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `plan`; returns the exit code."""
    flags = build_parser().parse_args(argv)
    return guarded("plan", lambda: run(flags), debug=flags.debug)


def run(flags: argparse.Namespace) -> int:
    """Do what the flags say. Raises the family of PlannerError."""
    if flags.example:
        print(Path(__file__).with_name("example_model.py").read_text(encoding="utf-8"), end="")
        return 0
    if flags.graph is not None:
        return _plan_graph(flags)
    request, output = _request(flags), _output(flags)
    profile, reused = _profile(flags, request, output)
    from planner.planning import plan_profile, relative_to

    plan = plan_profile(profile, request)
    model = replace(plan.model, file=relative_to(str(plan.model.file), output.parent))
    plan = replace(plan, model=model)
    plan.save(output)
    _show(flags, plan, profile, reused, output)
    return _train(flags, output) if flags.train else 0


def _request(flags: argparse.Namespace) -> PlanRequest:
    from planner.planning import PlanRequest

    if flags.gpus is None:
        raise UsageError("no --gpus", "the number of stages is needed", "for example: plan --gpus 4 model.py")
    if (flags.model is None) == (flags.profile is None):
        got = "neither a model file nor --profile" if flags.model is None else "a model file and --profile"
        raise UsageError(got, "a plan comes from one of the two", "for example: plan --gpus 4 model.py")
    if flags.objective is not None or flags.no_transfers or flags.cut_at is not None:
        raise UsageError("--objective, --no-transfers or --cut-at", "they go with --graph FILE", "leave them out")
    if flags.output is not None and flags.output in (flags.profile, (flags.model or "").partition(":")[0]):
        raise UsageError(f"-o {flags.output}", "the plan may not overwrite what it is made from", "name another file")
    if not flags.train and run_arguments(flags):
        raise UsageError(f"{run_arguments(flags)[0]} without --train", "it says how to train", "add --train")
    return PlanRequest(
        gpus=flags.gpus,
        batch_size=flags.batch_size,
        microbatches=flags.microbatches,
        device=flags.device,
        bandwidth_bytes_per_s=flags.bandwidth,
        plain=flags.plain,
        seed=flags.seed,
        schedule=flags.schedule,
        meta=flags.meta,
    )


def _plan_graph(flags: argparse.Namespace) -> int:
    """Plan a layer graph: the largest load with --objective, else the step of the schedule."""
    from planner.graph_planning import plan_bottleneck, plan_schedule
    from planner.rendering import render_plan

    _refuse_for_graph(flags)
    path = Path(flags.graph)
    if flags.objective == "bottleneck":
        plan = plan_bottleneck(path, flags.gpus, transfers=not flags.no_transfers)
    else:
        cut_at = [] if flags.cut_at == "" else flags.cut_at.split(",") if flags.cut_at is not None else None
        plan = plan_schedule(path, flags.gpus, flags.microbatches, cut_at=cut_at, schedule=flags.schedule)
    output = Path(flags.output) if flags.output is not None else Path(f"{path.stem}.plan.json")
    plan.save(output)
    if flags.json:
        print(plan.to_json(), end="")
    else:
        print(f"{render_plan(plan, None)}\nwrote {output}", flush=True)
    return 0


def _refuse_for_graph(flags: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go with --graph."""
    example = "for example: plan --graph g.json --gpus 4 --objective bottleneck"
    if flags.gpus is None:
        raise UsageError("no --gpus", "the number of stages is needed", example)
    given = {"a model file": flags.model, "--profile": flags.profile, "--train": flags.train or None}
    given["--meta"] = flags.meta or None
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"--graph and {wrong[0]}", "a plan comes from one source, and a graph cannot be run", example)
    if flags.objective is not None and (flags.cut_at is not None or flags.microbatches is not None):
        raise UsageError("--objective with --cut-at or --microbatches", "a load has no microbatches", example)
    if flags.objective is None and flags.microbatches is None:
        remedy = "give --microbatches M, or --objective bottleneck"
        raise UsageError("--graph without --microbatches", "a step needs their number; a graph does not say it", remedy)
    if flags.no_transfers and flags.objective is None:
        raise UsageError("--no-transfers without --objective", "a step has its transfers", "add --objective bottleneck")


def _output(flags: argparse.Namespace) -> Path:
    if flags.output is not None:
        return Path(flags.output)
    name = Path(flags.model.partition(":")[0] if flags.model else flags.profile).name
    return Path(f"{name.removesuffix('.py').removesuffix('.json').removesuffix('.profile')}.plan.json")


def profile_path(output: Path) -> Path:
    """Where the profile of a plan lies: beside it."""
    return output.with_name(output.name.removesuffix(".json").removesuffix(".plan") + ".profile.json")


def _profile(flags: argparse.Namespace, request: PlanRequest, output: Path) -> tuple[Profile, bool]:
    """The profile to plan from, and whether it was there already. A new one is written beside the plan."""
    from planner.files.profile_file import Profile
    from planner.planning import measure, relative_to
    from planner.progress import profile_progress

    if flags.profile is not None:
        path = Path(flags.profile)
        return with_model_file(Profile.load(path), path), True
    path = profile_path(output)
    if not flags.fresh:
        found, reason = _reusable_profile(flags.model, request, path)
        if found is not None:
            return with_model_file(found, path), True
        if reason:
            print(f"{path} is not used: {reason}", file=sys.stderr)
    with profile_progress() as progress:
        profile = measure(flags.model, request, progress)
    model = replace(profile.model, file=relative_to(str(profile.model.file), path.parent))
    replace(profile, model=model).save(path)
    return profile, False


def with_model_file(profile: Profile, path: Path) -> Profile:
    """`profile` with its model file as an absolute path; in the file it is relative to `path`."""
    if profile.model.file is None:
        return profile
    file = str((path.resolve().parent / profile.model.file).resolve())
    return replace(profile, model=replace(profile.model, file=file))


def _reusable_profile(model: str, request: PlanRequest, path: Path) -> tuple[Profile | None, str]:
    from planner.planning import candidate_counts, resolve_batch_size
    from planner.profiling.profiler import load_if_fitting

    if not path.exists():
        return None, ""
    batch_size = resolve_batch_size(model, request)
    sizes = tuple(batch_size // count for count in candidate_counts(batch_size, request))
    wanted: dict[str, Any] = {"batch_size": batch_size, "sizes": sizes, "device": request.device, "seed": request.seed}
    wanted["meta"] = request.meta
    return load_if_fitting(path, model=model, **wanted)


def _show(flags: argparse.Namespace, plan: Plan, profile: Profile, reused: bool, output: Path) -> None:
    from planner.planning import limit_line
    from planner.rendering import render_plan

    if flags.json:
        print(plan.to_json(), end="")
        return
    if reused:
        print(f"profile of {profile.machine.device_name} reused (--fresh measures again)", file=sys.stderr)
    print(render_plan(plan, profile, limit_line=limit_line(plan, profile)))
    written = str(output) if reused else f"{output}, {profile_path(output)}"
    print(f"wrote {written}", flush=True)


def _train(flags: argparse.Namespace, output: Path) -> int:
    """Run `python -m runner PLAN …` as a child and pass its exit code on."""
    import os
    import subprocess

    command = [sys.executable, "-P", "-m", "runner", str(output), *run_arguments(flags)]
    command += ["--device", flags.device] if flags.device else []
    command += ["--debug"] if flags.debug else []
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def _microbatches(text: str) -> int | None:
    return None if text == "auto" else whole_number(1)(text)


def _bandwidth(text: str) -> float:
    """Bytes per second: a number with an optional unit, e.g. 12GB/s, 900MB/s, 50GiB/s."""
    units = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    body = text.removesuffix("/s").strip()
    number = body.rstrip("BKMGTiIkmgtb ")
    unit = body[len(number) :].strip().upper()
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be a positive rate such as 12GB/s")
    return value
