"""Layers profiled and stages trained in turn, step by step: what a prediction is off when the machine is the same.

python -m benchmarks.paired [--models N] [--stages 2 3 4] [--schedules gpipe 1f1b] [--rounds 24]

A plan is made as always. Then its workers, in the same processes, do one round of the profile, one step of training,
one round, one step …, and the second profile, at the plan's cuts, is held against the training. Between the two there
is no time in which a machine could become slower; `drift` is how much it did from the first half of the rounds to the
second, and hits both. What is left is what the sum of layers does not know about a stage, and the noise of the medians.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.prediction import MODELS, Bench, PlanRuns, figures, printed_runs, summary
from planner.assembly import Candidate, assemble
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile, Schedule
from planner.intervals import with_intervals
from planner.machine.device import worker_environment
from planner.machine.workers import as_worker, run_workers
from planner.partitioning.chain import ChainSolution
from planner.planning import plan_profile, planned_chain
from planner.profiling.profiler import ProfileRequest, device_kind
from planner.request import PlanRequest

FIRST_ROUNDS = 6


def main() -> None:
    """Parse the command line, run, and print the table and its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=len(MODELS), metavar="N", help="the first N models (default all)")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4], metavar="K")
    parser.add_argument("--schedules", nargs="+", choices=["gpipe", "1f1b"], default=["gpipe"])
    parser.add_argument("--rounds", type=int, default=24, metavar="N", help="rounds, and steps (default 24)")
    arguments = parser.parse_args()
    chosen = [*MODELS.items()][: arguments.models]
    benches = [PairedBench(model, size, rehearse=False, num_rounds=FIRST_ROUNDS) for model, size in chosen]
    made = printed_runs(benches, arguments.stages, arguments.schedules, steps=arguments.rounds)
    print("\n".join(summary(made)))


class PairedBench(Bench):
    """Each plan's second profile and its training, in one group of workers. Drift hits both, so none is repeated."""

    repeats_drifted = False

    def _run(self, num_stages: int, schedule: Schedule, steps: int, *, again: bool) -> PlanRuns:
        first = self._latest(num_stages, schedule)
        plan = plan_profile(first, self.request(num_stages, schedule))
        with tempfile.TemporaryDirectory(prefix="evenstage-paired-") as folder:
            file = Path(folder, "plan.json")
            plan.save(file)
            run_workers("benchmarks.paired", [str(file), str(steps)], num_stages, worker_environment(device_kind(None)))
            profile, measurement = Profile.load(f"{file}.profile"), Measurement.load(f"{file}.measurement")
        drift = profile.sizes[0].drift
        return PlanRuns(self.model.stem, num_stages, schedule, drift, again, figures([measurement]))


def at_its_cuts(plan: Plan, profile: Profile) -> Plan:
    """`plan` with the predictions of another profile of its model."""
    size = profile.size(plan.microbatch_size)
    chain = planned_chain(size, plan)
    cuts = tuple(chain.ids.index(cut.before) for cut in plan.cuts)
    solution = ChainSolution(cuts, 0.0, 0.0, "feasible", "none", 0.0, 0)
    candidate = Candidate(plan.num_microbatches, size, chain, solution, chain)
    request = PlanRequest(plan.num_stages, microbatches=plan.num_microbatches, schedule=plan.schedule or "gpipe")
    predicted = with_intervals(assemble(profile, request, candidate, cuts, [candidate]), profile)
    return replace(predicted, order=plan.order)


def worker() -> None:
    """One rank: trains its stage of the plan before every round of the profile; the first one leaves both."""
    import torch
    import torch.distributed as dist

    from planner.machine.device import choose_device, describe_machine
    from planner.profiling.profiler import concurrent_copies
    from planner.profiling.worker import profile_here
    from planner.tracing.loading import load_source
    from runner.gathering import build_measurement
    from runner.stages import build_stage
    from runner.training import StepResult, Trainer, training_batches

    file, num_rounds = Path(sys.argv[1]), int(sys.argv[2])
    plan = Plan.load(file)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    device, rank = choose_device("cpu", 0), dist.get_rank()
    source = load_source(str(plan.model.file))
    trainer = Trainer(plan, source, build_stage(plan, source, rank, device), device)
    batches, results = training_batches(plan, source, print), list[StepResult]()

    def train(number: int) -> None:
        step, batch = next(batches)
        result = trainer.step(step, batch)
        if number >= 0:
            results.append(result)

    copies = concurrent_copies(plan.num_stages, "cpu")
    request = ProfileRequest(
        model=str(plan.model.file),
        seed=plan.seed,
        batch_size=plan.num_microbatches * plan.microbatch_size,
        microbatch_sizes=(plan.microbatch_size,),
        device="cpu",
        num_rounds=num_rounds,
        copies=copies,
        progress="",
        num_stages=plan.num_stages,
        schedule=plan.schedule or "gpipe",
    )
    profile = profile_here(request, source, device, train)
    gathered: list[Any] | None = [None] * plan.num_stages if rank == 0 else None
    dist.gather_object(results, gathered)
    if gathered is not None:
        profile.save(Path(f"{file}.profile"))
        predicted, machine = at_its_cuts(plan, profile), describe_machine(device)
        measurement = build_measurement(predicted, gathered, machine, device.clock, None, None, None)
        measurement.save(Path(f"{file}.measurement"))


if __name__ == "__main__":
    if "RANK" in os.environ:
        as_worker(worker)
    else:
        main()
