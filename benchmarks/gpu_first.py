"""The first thing to run where there is a GPU: times, memory and reserves of stages, rehearsed one after the other.

python -m benchmarks.gpu_first [MODEL …] [--stages 4] [--schedules gpipe 1f1b] [--steps 5] [--minutes 7] [--check]

Profiles each model of benchmarks/gpu_models on the device at hand, plans it for several GPUs, runs the plan's stages on
the one device, and prints what was predicted beside what was measured; with --check also whether the stages train as
the unsplit model does; last what memory is gone before any tensor is made. All of it one after the other in this
process, whose start is paid once: no other process computes beside what is measured. What there was no time for is
named. Without a GPU the same is done on the CPU, and said: the figures are then the CPU's.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from benchmarks.measured_runs import arguments_for
from benchmarks.prediction import MICROBATCHES, Bench, printed_runs, summary
from planner.errors import PlannerError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile, Schedule
from planner.machine.device import choose_device, worker_environment
from planner.planning import plan_profile
from planner.profiling.profiler import ProfileRequest, device_kind
from planner.profiling.worker import profile_here
from planner.rendering.wording import format_bytes
from planner.request import PlanRequest
from planner.tracing.loading import load_source
from runner.checking import compute_exactly
from runner.options import parse_options
from runner.rehearsing import rehearse
from runner.worker import RunContext

FOLDER = Path(__file__).resolve().parent / "gpu_models"
MODELS = {"vit": 32, "gpt2": 8, "resnet": 64, "llama": 8, "bert": 16, "convnext": 64, "t5": 32}
"""Models and their microbatch sizes: large enough for a GPU to be busy."""
CHECKED_STEPS = 2


def main() -> None:
    """Parse the command line, rehearse, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", type=_known, metavar="MODEL", help=f"of {FOLDER.name} (default: {' '.join(MODELS)})"
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[4], metavar="K")
    parser.add_argument("--schedules", nargs="+", choices=["gpipe", "1f1b"], default=["gpipe", "1f1b"])
    parser.add_argument("--steps", type=int, default=5, metavar="N")
    parser.add_argument("--rounds", type=int, default=12, metavar="N")
    parser.add_argument("--minutes", type=float, default=7.0, metavar="N", help="begin no model after these")
    parser.add_argument("--check", action="store_true", help="at the end, train each beside the unsplit model")
    arguments = parser.parse_args()
    os.environ.update(worker_environment(device_kind(None)))  # before the device is first used
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    started, benches = time.perf_counter(), list[BenchHere]()
    not_begun = list(arguments.models or MODELS)

    def in_time() -> Iterator[BenchHere]:
        while not_begun and time.perf_counter() - started < 60 * arguments.minutes:
            name = not_begun.pop(0)
            benches.append(BenchHere(FOLDER / f"{name}.py", MODELS[name], rehearse=True, num_rounds=arguments.rounds))
            yield benches[-1]

    runs = printed_runs(in_time(), arguments.stages, arguments.schedules, steps=arguments.steps)
    profiles = [profile for bench in benches for profile in bench.latest.values()]
    print("\n".join([*summary(runs), *machine_lines(profiles[-1] if profiles else None)]))
    if arguments.check:
        print("\n".join(map(checked, benches)))
    left = [f"no time for {', '.join(not_begun)}"] if not_begun else []
    print("\n".join([*left, f"took {time.perf_counter() - started:.0f} s"]))
    dist.destroy_process_group()


def _known(name: str) -> str:
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"got {name!r}; it must be one of {', '.join(MODELS)}")
    return name


class BenchHere(Bench):
    """Profiles and rehearses in this process, which saves the start of two for every run."""

    def rehearsed(self, plan: Plan, folder: Path, steps: int, flags: Sequence[str] = ()) -> Measurement:
        """Rehearse `plan` with further `flags` of run-plan."""
        gc.collect()  # the profiled model is still there otherwise, and would count as the stage's
        options = parse_options([*arguments_for(plan, folder, steps=steps, rehearse=True), *flags])
        rehearse(RunContext(options, plan, load_source(str(self.model)), choose_device(None), 0))
        return Measurement.load(folder / "measurement.json")

    def _measure(self, plan: Plan, folder: Path, steps: int) -> None:
        self.rehearsed(plan, folder, steps)

    def _profile(self, num_stages: int, schedule: Schedule) -> Profile:
        request = ProfileRequest(
            model=str(self.model),
            seed=0,
            batch_size=MICROBATCHES * self.size,
            microbatch_sizes=(self.size,),
            device=None,
            num_rounds=self.num_rounds,
            copies=1,
            progress="",
            num_stages=num_stages,
            schedule=schedule,
        )
        return profile_here(request, load_source(request.model), choose_device(None))


def checked(bench: BenchHere) -> str:
    """Whether the stages of a plan train as the unsplit model does. From then on this process computes exactly."""
    compute_exactly()
    try:
        (num_stages, _), profile = next(iter(bench.latest.items()))
        plan = plan_profile(profile, PlanRequest(num_stages, microbatches=MICROBATCHES))
        with tempfile.TemporaryDirectory(prefix="evenstage-check-") as folder:
            found = bench.rehearsed(plan, Path(folder), CHECKED_STEPS, ["--check"]).check
    except (PlannerError, StopIteration) as error:
        return f"{bench.model.stem}: {error or 'nothing was profiled'}"
    assert found is not None
    return (
        f"{bench.model.stem}: {num_stages} stages train as the unsplit model; over {found.steps} steps a gradient"
        f" differs by at most {found.max_gradient_difference:.2g}, a weight by {found.max_parameter_difference:.2g}"
    )


def machine_lines(profile: Profile | None) -> list[str]:
    """The device, and what of its memory nobody can use."""
    if profile is None:
        return ["nothing was profiled"]
    machine = profile.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    found = [f"\n{machine.device_name}, {versions}"]
    if machine.device == "cpu":
        return [*found, "no GPU was found: these are the figures of the CPU"]
    total = "an unknown amount" if machine.memory_bytes is None else format_bytes(machine.memory_bytes)
    context = format_bytes(machine.reserved_bytes - machine.workspace_bytes)
    return [
        *found,
        f"of {total}, {context} are gone before any tensor is made; matrix products keep"
        f" {format_bytes(machine.workspace_bytes)} as workspaces",
    ]


if __name__ == "__main__":
    main()
