"""`plan --gpus K model.py`: everything that ends in a plan; with --train, everything up to the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.command import guarded, stdout_to_stderr
from planner.errors import RunError, UsageError
from planner.links_command import given_links, linked, refuse_link_flags
from planner.plan_flags import build_parser
from planner.run_flags import run_arguments

if TYPE_CHECKING:
    import networkx as nx

    from planner.files.plan_file import Plan
    from planner.files.profile_file import Profile
    from planner.request import PlanRequest


ESTIMATE = ".estimate"


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
    if flags.profile is not None and flags.fresh:
        raise UsageError("--profile and --fresh", "one is used, or another is measured", "leave one of them out")
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
        schedule=flags.schedule or "gpipe",
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
    plan, output = again.plan, again.output if flags.output is None else _output(flags)
    _refuse_bad_targets(flags, output, again.profile)
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
        plan = plan_schedule(path, flags.gpus, flags.microbatches, cut_at=cut_at, schedule=flags.schedule or "gpipe")
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


def _refuse_bad_targets(flags: argparse.Namespace, output: Path, *also_read: Path) -> None:
    """Raise UsageError where what is to be written could not be, or would overwrite what it is made from."""
    from planner.files.reading import refuse_overwriting, refuse_unwritable

    targets = {f"-o {flags.output}" if flags.output else f"the plan {output}": output}
    if flags.model is not None:
        path = profile_path(output, flags.estimate)
        targets[f"the {'estimate' if flags.estimate else 'profile'} {path}"] = path
    if flags.export_weights is not None:
        targets[f"--export-weights {flags.export_weights}"] = Path(flags.export_weights)
    sources = [flags.profile, flags.graph, (flags.model or "").partition(":")[0], flags.links]
    inputs = [*also_read, *(name for name in [*sources, *(flags.from_measurement or [])] if name)]
    for what, path in targets.items():
        refuse_overwriting(path, what, inputs, "the plan may not overwrite what it is made from")
        refuse_unwritable(path, what)
    own = profile_path(output, flags.estimate).resolve() if flags.model is not None else None
    if flags.drift is not None and not Path(flags.drift).exists() and Path(flags.drift).resolve() != own:
        raise UsageError(f"--drift {flags.drift}, which is no file", "it is the plan's own profile", "check the path")
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
