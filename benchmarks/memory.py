"""Predicted against measured peak memory at many cuts, good and bad ones, of models that make it hard.

python -m benchmarks.memory [MODEL.py …] [--stages 2 3 4] [--schedules gpipe 1f1b] [--cuts 8] [--seed 0] [--list]

Cuts are drawn from a seed. Every plan is rehearsed in this process, and each stage's peak is measured at the allocator,
which knows nothing of lifetimes. A row sums up all stages of a model, number of stages and schedule; with --list, every
stage that was predicted wrongly by more than 5 %, or under what it took, is named as well.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.prediction import MICROBATCHES, MODELS
from planner.assembly import Candidate, assemble
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.machine.device import choose_device
from planner.partitioning.chain import solve_chain
from planner.profiling.profiler import profile_model
from planner.request import PlanRequest, chain_at
from planner.tracing.loading import load_source, make_batch
from runner.loopback import Boundaries
from runner.rehearsing import RehearsedStage, rehearse_step
from runner.stages import build_stages
from runner.worker import MEMORY_STEP

COLUMNS = "{:18} {:>2} {:6} {:>6} {:>9} {:>9} {:>9} {:>6} {:>9}"
HEADINGS = ("model", "K", "sched.", "stages", "least", "median", "most", "under", "over 5 %")
MOST_OVER = 0.05


@dataclass(frozen=True, slots=True)
class Peak:
    """A stage's peak: bytes predicted and measured."""

    cuts: tuple[str, ...]
    stage: int
    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """Predicted ÷ measured − 1."""
        return self.predicted_bytes / self.measured_bytes - 1


def main() -> None:
    """Parse the command line, rehearse, and print a row per model, number of stages and schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="default: those of benchmarks.prediction")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4], metavar="K")
    parser.add_argument("--schedules", nargs="+", choices=["gpipe", "1f1b"], default=["gpipe", "1f1b"])
    parser.add_argument("--cuts", type=int, default=8, metavar="N", help="plans of each kind (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--list", action="store_true", help="name the stages that were predicted wrongly")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(COLUMNS.format(*HEADINGS))
    seen: list[Peak] = []
    for model in [model.resolve() for model in arguments.models] or MODELS:
        size = MODELS.get(model, 2)
        profile = profile_model(
            str(model), batch_size=MICROBATCHES * size, microbatch_sizes=(size,), num_workers=1, num_rounds=1
        )
        for num_stages in arguments.stages:
            for schedule in arguments.schedules:
                request = PlanRequest(num_stages, microbatches=MICROBATCHES, schedule=schedule)
                peaks = list(peaks_at(profile, request, arguments.cuts, random.Random(arguments.seed)))
                print(row(model.stem, num_stages, schedule, peaks), flush=True)
                print("".join(map(line, peaks)) if arguments.list else "", end="", flush=True)
                seen += peaks
    print(row("all", "", "", seen))
    dist.destroy_process_group()


def peaks_at(profile: Profile, request: PlanRequest, count: int, source: random.Random) -> Iterator[Peak]:
    """The peaks of all stages of `count` plans, cut anywhere; of all plans where there are no more."""
    size = profile.sizes[0]
    chain = chain_at(profile, size.microbatch_size, request)
    solution = solve_chain(chain, request.gpus, MICROBATCHES, schedule=request.schedule)
    best = Candidate(MICROBATCHES, size, chain, solution, chain)
    for cuts in drawn_cuts(len(chain.ids), request.gpus, count, source):
        plan = assemble(profile, request, best, cuts, [best])
        for stage, measured in zip(plan.stages, measured_bytes(plan), strict=True):
            names = tuple(str(chain.ids[cut]) for cut in cuts)
            assert stage.peak_memory_bytes is not None
            yield Peak(names, stage.index, stage.peak_memory_bytes, measured)


def drawn_cuts(num_layers: int, num_stages: int, count: int, source: random.Random) -> Iterator[tuple[int, ...]]:
    """Ways to cut layers into stages: `count` that are drawn, or each way once where there are no more.

    >>> list(drawn_cuts(4, 2, 9, random.Random(0)))
    [(1,), (2,), (3,)]
    """
    positions = range(1, num_layers)
    if comb(len(positions), num_stages - 1) <= count:
        yield from combinations(positions, num_stages - 1)
    else:
        yield from (tuple(sorted(source.sample(positions, num_stages - 1))) for _ in range(count))


def measured_bytes(plan: Plan) -> list[int]:
    """What every stage of the plan takes at most in a rehearsed step."""
    assert plan.model.file is not None
    source, device, boundaries = load_source(plan.model.file), choose_device(plan.machine.device, 0), Boundaries()
    built = build_stages(plan, source, range(plan.num_stages), device)
    stages = [RehearsedStage(plan, source, stage, device, boundaries) for stage in built]
    for step in range(MEMORY_STEP + 1):
        batch = make_batch(source, plan.seed, step, plan.num_microbatches * plan.microbatch_size)
        results = rehearse_step(stages, step, batch)
    return [result.memory.allocated_bytes if result.memory else 0 for result in results]


def row(model: str, num_stages: int | str, schedule: str, peaks: Sequence[Peak]) -> str:
    """One row of the table: the least, median and largest error of the prediction, and how many stages are off.

    >>> row("m", 2, "gpipe", [Peak(("a",), 0, 90, 100), Peak(("a",), 1, 106, 100)]).split()
    ['m', '2', 'gpipe', '2', '-10.000%', '-2.000%', '+6.000%', '1', '1']
    """
    errors = [peak.error for peak in peaks]
    wrong = sum(error < 0 for error in errors), sum(error > MOST_OVER for error in errors)
    shown = (f"{100 * error:+.3f}%" for error in (min(errors), median(errors), max(errors)))
    return COLUMNS.format(model, num_stages, schedule, len(errors), *shown, *wrong)


def line(peak: Peak) -> str:
    """A stage that was predicted under what it took, or far over it; nothing for others."""
    if 0 <= peak.error <= MOST_OVER:
        return ""
    cuts = ", ".join(peak.cuts)
    took = f"{peak.measured_bytes} bytes, predicted {peak.predicted_bytes} ({100 * peak.error:+.4f}%)"
    return f"  cut before {cuts}: stage {peak.stage} takes {took}\n"


if __name__ == "__main__":
    main()
