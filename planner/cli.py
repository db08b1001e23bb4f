"""`plan --gpus K model.py`: everything that ends in a plan; with --train, everything up to the report."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.command import guarded, stdout_to_stderr
from planner.errors import RunError, UsageError
from planner.files.plan_rules import MAX_SEED
from planner.links_command import add_link_flags, given_links, linked, refuse_link_flags
from planner.run_flags import add_run_flags, run_arguments, whole_number
from planner.version import version

if TYPE_CHECKING:
    import networkx as nx

    from planner.files.plan_file import Plan
    from planner.files.profile_file import Profile
    from planner.request import PlanRequest


ESTIMATE = ".estimate"


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
    parser.add_argument("--draw", metavar="FILE.svg", help="draw the layer graph, coloured by stage, with its cuts")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"evenstage {version()}")
    hugging_face = parser.add_argument_group("a Hugging Face model")
    hugging_face.add_argument(
        "--hf", metavar="CONFIG.json", help="plan the model of this configuration, local files only"
    )
    hugging_face.add_argument(
        "--sequence-length", type=whole_number(1), metavar="N", help="tokens a sample (default: 128, or what fits)"
    )
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
    costs.add_argument("--precision", type=_precision, metavar="fp32|bf16", help="default: the model's, else fp32")
    costs.add_argument(
        "--bandwidth",
        type=_bandwidth,
        metavar="RATE",
        help="of each link: 12GB/s (bytes), 100Gb/s (bits); default: free",
    )
    add_link_flags(costs)
    costs.add_argument(
        "--memory", type=_memory, metavar="SIZE", help="what each stage may need, e.g. 24GiB (default: the GPU's)"
    )
    costs.add_argument("--plain", action="store_true", help="only cuts that stock torch does rightly by split_spec")
    costs.add_argument(
        "--granularity",
        choices=["module", "operation", "auto"],
        help="cut before modules (default), before any operation, or before operations of layers too large to balance",
    )
    costs.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, metavar="S", help="default: 0")
    costs.add_argument(
        "--meta", action="store_true", help="the model exceeds this machine: no process holds more than its part of it"
    )
    profile = parser.add_argument_group("the profile")
    profile.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    profile.add_argument("--profile", metavar="FILE", help="plan from this profile, without hardware")
    profile.add_argument(
        "--estimate",
        action="store_true",
        help="run nothing: time from FLOPs and bytes at the peak of a device, for a first look",
    )
    profile.add_argument(
        "--peak",
        metavar="NAME|FLOPS,BYTES/s",
        help="of that device: h100, a100, … or e.g. 67T,3.35T (default: one thread of this CPU)",
    )
    profile.add_argument("--fresh", action="store_true", help="measure again even where a fitting profile exists")
    profile.add_argument(
        "--from-measurement",
        nargs="+",
        metavar="FILE",
        help="correct a profile (NAME.profile.json, or --profile) by what runs measured, oldest first, and plan again",
    )
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
    _refuse_drawing(flags)
    _refuse_estimate(flags)
    refuse_link_flags(flags)
    _take_configuration(flags)
    if flags.from_measurement is not None:
        return _plan_again(flags)
    if flags.graph is not None:
        return _plan_graph(flags)
    with stdout_to_stderr(flags.json):
        plan, profile, reused, output = _make(flags)
    _show(flags, plan, profile, reused, output)
    with stdout_to_stderr(flags.json):
        return _train(flags, output) if flags.train else 0


def _make(flags: argparse.Namespace) -> tuple[Plan, Profile, bool, Path]:
    """The plan as it was written, its profile, whether that was there already, and the plan's file."""
    request, output = _request(flags), _output(flags)
    _refuse_bad_targets(flags, output)
    profile, reused = _profile(flags, request, output)
    request = linked(flags, request, profile, output)
    from planner.files.reading import relative_to
    from planner.planning import plan_profile

    plan = plan_profile(profile, request)
    plan = replace(plan, model=replace(plan.model, file=relative_to(str(plan.model.file), output.parent)))
    plan.save(output)
    if flags.draw is not None:
        from planner.partitioning.layer_graph import build_layer_graph

        _draw(flags, plan, build_layer_graph(profile.size(plan.microbatch_size), plan.link_cost()))
    return plan, profile, reused, output


def _take_configuration(flags: argparse.Namespace) -> None:
    """Turn --hf and --sequence-length into the model that they name. Raises UsageError where that is none."""
    length = flags.sequence_length
    if flags.hf is None:
        if length is not None:
            raise UsageError("--sequence-length without --hf", "a model file makes its own batches", "leave it out")
        return
    if flags.model is not None:
        rule = "a plan comes from one of the two"
        raise UsageError("a model file and --hf", rule, "for example: plan --gpus 4 --hf config.json")
    if not flags.hf.endswith(".json"):
        rule = "a configuration is a local JSON file"
        raise UsageError(f"--hf {flags.hf}", rule, "give the path of the model's config.json")
    flags.model = flags.hf if length is None else f"{flags.hf}:hf_{length}"


def _request(flags: argparse.Namespace) -> PlanRequest:
    from planner.request import PlanRequest

    if flags.gpus is None:
        raise UsageError("no --gpus", "the number of stages is needed", "for example: plan --gpus 4 model.py")
    if (flags.model is None) == (flags.profile is None):
        got = "neither a model file nor --profile" if flags.model is None else "a model file and --profile"
        raise UsageError(got, "a plan comes from one of the two", "for example: plan --gpus 4 model.py")
    if flags.objective is not None or flags.no_transfers or flags.cut_at is not None:
        raise UsageError("--objective, --no-transfers or --cut-at", "they go with --graph FILE", "leave them out")
    _refuse_untrained(flags)
    return PlanRequest(
        gpus=flags.gpus,
        batch_size=flags.batch_size,
        microbatches=flags.microbatches,
        device=flags.device,
        bandwidth_bytes_per_s=flags.bandwidth,
        plain=flags.plain,
        seed=flags.seed,
        schedule=flags.schedule,
        memory_bytes=flags.memory,
        meta=flags.meta,
        links=given_links(flags),
        precision=flags.precision,
        granularity=flags.granularity or "module",
    )


def _refuse_untrained(flags: argparse.Namespace) -> None:
    if not flags.train and run_arguments(flags):
        raise UsageError(f"{run_arguments(flags)[0]} without --train", "it says how to train", "add --train")


def _plan_again(flags: argparse.Namespace) -> int:
    """Plan again from what runs measured."""
    from planner.files.profile_file import Profile
    from planner.files.reading import relative_to
    from planner.replanning_command import plan_again

    _refuse_untrained(flags)
    again = plan_again(flags, lambda path: with_model_file(Profile.load(path), path))
    plan, output = again.plan, again.output if flags.output is None else Path(flags.output)
    if plan.model.file is not None:
        plan = replace(plan, model=replace(plan.model, file=relative_to(plan.model.file, output.parent)))
    plan.save(output)
    print(plan.to_json() if flags.json else again.text + f"\nwrote {output}", flush=True)
    return _train(flags, output) if flags.train else 0


def _plan_graph(flags: argparse.Namespace) -> int:
    """Plan a layer graph: the largest load with --objective, else the step of the schedule."""
    from planner.graph_planning import plan_bottleneck, plan_schedule
    from planner.rendering import render_plan

    _refuse_for_graph(flags)
    path = Path(flags.graph)
    output = Path(f"{path.stem}.plan.json") if flags.output is None else _output(flags)
    _refuse_bad_targets(flags, output)
    if flags.objective == "bottleneck":
        plan = plan_bottleneck(path, flags.gpus, transfers=not flags.no_transfers, memory_bytes=flags.memory)
    else:
        cut_at = [] if flags.cut_at == "" else flags.cut_at.split(",") if flags.cut_at is not None else None
        plan = plan_schedule(path, flags.gpus, flags.microbatches, cut_at=cut_at, schedule=flags.schedule)
    plan.save(output)
    if flags.json:
        print(plan.to_json(), end="")
    else:
        print(f"{render_plan(plan, None)}\nwrote {output}", flush=True)
    if flags.draw is not None:
        from planner.partitioning.layer_graph import graph_from_json

        _draw(flags, plan, graph_from_json(path))
    return 0


def _refuse_drawing(flags: argparse.Namespace) -> None:
    """Raise UsageError or FileError where the file of --draw cannot be what is wanted."""
    if flags.draw is None:
        return
    from planner.files.reading import refuse_unwritable

    if not flags.draw.endswith(".svg"):
        raise UsageError(f"--draw {flags.draw}", "the drawing is an SVG", "name a file that ends in .svg")
    refuse_unwritable(Path(flags.draw), f"--draw {flags.draw}")


def _draw(flags: argparse.Namespace, plan: Plan, graph: nx.DiGraph) -> None:
    from planner.files.reading import write_text
    from planner.rendering import render_graph_svg

    write_text(Path(flags.draw), render_graph_svg(graph, plan))
    print(f"drew {flags.draw}", file=sys.stderr if flags.json else sys.stdout, flush=True)


def _refuse_for_graph(flags: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go with --graph."""
    example = "for example: plan --graph g.json --gpus 4 --objective bottleneck"
    if flags.gpus is None:
        raise UsageError("no --gpus", "the number of stages is needed", example)
    given = {"a model file": flags.model, "--profile": flags.profile, "--train": flags.train or None}
    given |= {"--meta": flags.meta or None, "--precision": flags.precision}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"--graph and {wrong[0]}", "a plan comes from one source, and a graph cannot be run", example)
    if flags.objective is not None and (flags.cut_at is not None or flags.microbatches is not None):
        raise UsageError("--objective with --cut-at or --microbatches", "a load has no microbatches", example)
    if flags.objective is None and flags.microbatches is None:
        remedy = "give --microbatches M, or --objective bottleneck"
        raise UsageError("--graph without --microbatches", "a step needs their number; a graph does not say it", remedy)
    if flags.memory is not None and flags.objective is None:
        rule = "a graph's memory adds up per stage, without microbatches"
        raise UsageError("--memory with --graph and a schedule", rule, "add --objective bottleneck")
    if flags.no_transfers and flags.objective is None:
        raise UsageError("--no-transfers without --objective", "a step has its transfers", "add --objective bottleneck")


def _refuse_estimate(flags: argparse.Namespace) -> None:
    """Raise UsageError where --estimate or --peak does not go with what else was asked for."""
    if not flags.estimate:
        if flags.peak is not None:
            raise UsageError("--peak without --estimate", "what is measured needs no peak", "add --estimate")
        return
    sources = {"--graph": flags.graph, "--profile": flags.profile, "--from-measurement": flags.from_measurement}
    sources |= {"--device": flags.device, "--fresh": flags.fresh or None}
    if wrong := [name for name, value in sources.items() if value is not None]:
        rule = "an estimate comes from the model alone, and nothing is run for it"
        raise UsageError(f"--estimate with {wrong[0]}", rule, "leave one of them out")


def _refuse_bad_targets(flags: argparse.Namespace, output: Path) -> None:
    """Raise UsageError where what is to be written could not be, or would overwrite what it is made from."""
    from planner.files.reading import refuse_unwritable

    targets = {f"-o {flags.output}" if flags.output else f"the plan {output}": output}
    if flags.model is not None:
        path = profile_path(output, flags.estimate)
        targets[f"the {'estimate' if flags.estimate else 'profile'} {path}"] = path
    if flags.export_weights is not None:
        targets[f"--export-weights {flags.export_weights}"] = Path(flags.export_weights)
    sources = [flags.profile, flags.graph, (flags.model or "").partition(":")[0]]
    inputs = {Path(name).resolve() for name in sources if name}
    for what, path in targets.items():
        if path.resolve() in inputs:
            raise UsageError(what, "the plan may not overwrite what it is made from", "name another file")
        refuse_unwritable(path, what)
    if flags.run_dir is not None:
        refuse_unwritable(Path(flags.run_dir), f"--run-dir {flags.run_dir}", folder=True)


def _output(flags: argparse.Namespace) -> Path:
    if flags.output == "":
        raise UsageError('-o ""', "it must be a file", "name a file, or leave -o out")
    if flags.output is not None:
        return Path(flags.output)
    path = Path(flags.model.partition(":")[0] if flags.model else flags.profile)
    name = path.resolve().parent.name if flags.hf is not None and path.name == "config.json" else path.name
    stem = name.removesuffix(".py").removesuffix(".json").removesuffix(".profile")
    return Path(f"{stem}{ESTIMATE if flags.estimate else ''}.plan.json")


def profile_path(output: Path, estimated: bool = False) -> Path:
    """Where the profile of a plan lies: beside it. An estimate has a name of its own, so that none is overwritten."""
    stem = output.name.removesuffix(".json").removesuffix(".plan")
    mark = ESTIMATE if estimated and not stem.endswith(ESTIMATE) else ""
    return output.with_name(f"{stem}{mark}.profile.json")


def _profile(flags: argparse.Namespace, request: PlanRequest, output: Path) -> tuple[Profile, bool]:
    """The profile to plan from, and whether it was there already. A new one is written beside the plan."""
    from planner.files.profile_file import Profile
    from planner.files.reading import relative_to
    from planner.measuring import remember
    from planner.planning import measure
    from planner.progress import profile_progress

    if flags.profile is not None:
        path = Path(flags.profile)
        profile = Profile.load(path)
        if flags.granularity not in (None, profile.granularity):
            got, rule = f"--granularity {flags.granularity}", f"{path} was made with {profile.granularity}"
            raise UsageError(got, rule, "leave it out, or profile again with --fresh")
        return with_model_file(profile, path), True
    path = profile_path(output, flags.estimate)
    if not flags.fresh and not flags.estimate:
        found, reason = _reusable_profile(flags.model, request, path)
        if found is not None:
            return with_model_file(found, path), True
        if reason:
            print(f"{path} is not used: {reason}", file=sys.stderr)
    with profile_progress() as progress:
        if flags.estimate:
            profile = _estimate(flags, request, progress)
        else:
            profile = remember(measure(flags.model, request, progress), path)
    model = replace(profile.model, file=relative_to(str(profile.model.file), path.parent))
    replace(profile, model=model).save(path)
    return profile, False


def _estimate(flags: argparse.Namespace, request: PlanRequest, progress: Any) -> Profile:
    from planner.measuring import estimate

    return estimate(
        flags.model,
        request.gpus,
        peak=flags.peak,
        batch_size=request.batch_size,
        microbatches=request.microbatches,
        seed=request.seed,
        meta=request.meta,
        precision=request.precision,
        progress=progress,
    )


def with_model_file(profile: Profile, path: Path) -> Profile:
    """`profile` with its model file as an absolute path; in the file it is relative to `path`."""
    if profile.model.file is None:
        return profile
    file = str((path.resolve().parent / profile.model.file).resolve())
    return replace(profile, model=replace(profile.model, file=file))


def _reusable_profile(model: str, request: PlanRequest, path: Path) -> tuple[Profile | None, str]:
    from planner.profiling.profiler import load_if_fitting
    from planner.request import candidate_counts, resolve_batch_size, resolve_precision

    if not path.exists():
        return None, ""
    batch_size = resolve_batch_size(model, request)
    sizes = tuple(batch_size // count for count in candidate_counts(batch_size, request))
    wanted: dict[str, Any] = {"batch_size": batch_size, "sizes": sizes, "device": request.device, "seed": request.seed}
    wanted |= {"meta": request.meta, "granularity": request.granularity}
    wanted |= {"precision": resolve_precision(model, request)}
    return load_if_fitting(path, model=model, **wanted)


def _show(flags: argparse.Namespace, plan: Plan, profile: Profile, reused: bool, output: Path) -> None:
    from planner.planning import limit_line
    from planner.rendering import render_plan

    if flags.json:
        print(plan.to_json(), end="", flush=True)
        return
    if reused:
        print(f"profile of {profile.machine.device_name} reused (--fresh measures again)", file=sys.stderr)
    print(render_plan(plan, profile, limit_line=limit_line(plan, profile)))
    written = str(output) if reused else f"{output}, {profile_path(output, flags.estimate)}"
    print(f"wrote {written}", flush=True)


def _train(flags: argparse.Namespace, output: Path) -> int:
    """Run `python -m runner PLAN …` as a child and pass its exit code on."""
    import os
    import signal

    from planner.machine.ending import PASSED_ON, run_child

    command = [sys.executable, "-P", "-m", "runner", str(output), *run_arguments(flags)]
    command += ["--device", flags.device] if flags.device else []
    command += ["--debug"] if flags.debug else []
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    inherited = {name: value for name, value in os.environ.items() if name != "RANK"}  # with it, runner is a worker
    code = run_child(command, {**inherited, "PYTHONPATH": path})
    if -code in PASSED_ON:
        raise KeyboardInterrupt
    if code < 0:
        raise RunError(f"the run was ended by signal {-code} ({signal.Signals(-code).name})")
    return code


def _microbatches(text: str) -> int | None:
    return None if text == "auto" else whole_number(1)(text)


def _precision(text: str) -> str:
    if text in ("fp32", "bf16"):
        return text
    from planner.tracing.loading import FP16_RULE

    raise argparse.ArgumentTypeError(FP16_RULE if text == "fp16" else f"got {text!r}; it is fp32 or bf16")


def _memory(text: str) -> int:
    """Bytes: a number with a unit, e.g. 24GiB, 80GB, 512MiB, 1000B."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", text.strip())
    value = int(float(found[1]) * units.get(found[2], 0)) if found else 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be a size such as 24GiB, 80GB or 512MiB")
    return value


def _bandwidth(text: str) -> float:
    """`parse_bandwidth` for argparse."""
    from planner.bandwidth import parse_bandwidth

    try:
        return parse_bandwidth(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
