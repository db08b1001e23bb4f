"""Rehearses one model at every number of microbatches, and prints how far the one that was chosen is off the best.

python -m benchmarks.microbatches [MODEL.py] [--gpus 4] [--batch-size 16] [--schedule gpipe] [--passes 3] [--wall]

The counts take turns, a pass over all of them after the other, so that the machine's drift hits all alike; a count's
step is the median over the passes. Steps are simulated from rehearsed stage times (see run-plan --rehearse); with
--wall as many workers run as there are stages, and the step is what the clock on the wall says.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.measured_runs import EXAMPLES, run
from planner.errors import InfeasibleError
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.planning import plan_profile
from planner.profiling.profiler import profile_model
from planner.request import PlanRequest, candidate_counts

COLUMNS = "{:>12} {:>6} {:>14} {:>14} {:>9} {:>9}  {}"


def main() -> None:
    """Parse the command line, measure, and print a row per number of microbatches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(EXAMPLES / "transformer.py"))
    parser.add_argument("--gpus", type=int, default=4, metavar="K")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--schedule", choices=["gpipe", "1f1b"], default="gpipe")
    parser.add_argument("--wall", action="store_true", help="run all workers instead of rehearsing, by wall time")
    parser.add_argument("--passes", type=int, default=3, metavar="N")
    parser.add_argument("--quick", action="store_true", help="one pass of few steps: does it work?")
    arguments = parser.parse_args()
    request = PlanRequest(arguments.gpus, arguments.batch_size, schedule=arguments.schedule)
    sizes = tuple(arguments.batch_size // count for count in candidate_counts(arguments.batch_size, request))
    # as many copies profile as processes will run stages at once: one where they are rehearsed
    profile = profile_model(
        arguments.model,
        batch_size=arguments.batch_size,
        microbatch_sizes=sizes,
        num_workers=arguments.gpus if arguments.wall else 1,
        num_stages=arguments.gpus,
    )
    chosen, plans = plans_by_count(profile, request)
    passes, steps = (1, 3) if arguments.quick else (arguments.passes, 8)
    print("\n".join(table(plans, steps_ms(plans, passes, steps, rehearse=not arguments.wall), chosen)))


def plans_by_count(profile: Profile, request: PlanRequest) -> tuple[int, dict[int, Plan]]:
    """The count that the planner chooses, and the best plan at every count that it could have chosen."""
    chosen = plan_profile(profile, request)
    plans = {}
    for point in chosen.microbatch_curve:
        try:
            plans[point.num_microbatches] = plan_profile(profile, replace(request, microbatches=point.num_microbatches))
        except InfeasibleError:
            continue
    return chosen.num_microbatches, plans


def steps_ms(plans: Mapping[int, Plan], num_passes: int, steps: int, *, rehearse: bool) -> dict[int, list[float]]:
    """The step of every plan in each pass: rehearsed and simulated, or run and by wall time."""
    found: dict[int, list[float]] = {count: [] for count in plans}
    for _ in range(num_passes):
        for count, plan in plans.items():
            with tempfile.TemporaryDirectory(prefix="evenstage-microbatches-") as folder:
                measurement = run(plan, Path(folder), steps=steps, rehearse=rehearse)
                found[count].append(measurement.step_ms.measured if rehearse else measurement.wall_step_ms)
    return found


def table(plans: Mapping[int, Plan], measured: Mapping[int, Sequence[float]], chosen: int) -> list[str]:
    """A row per count, and by how much the chosen one is off the best.

    `spread` is (largest − smallest) ÷ median over the passes, where there is more than one.
    """
    medians = {count: median(values) for count, values in measured.items()}
    best = min(medians, key=lambda count: medians[count])
    rows = [COLUMNS.format("microbatches", "of", "predicted", "measured", "error", "spread", "")]
    for count, plan in sorted(plans.items()):
        values, marks = measured[count], []
        marks += ["chosen"] if count == chosen else []
        marks += ["best"] if count == best else []
        rows.append(
            COLUMNS.format(
                count,
                plan.microbatch_size,
                f"{plan.scheduled_step_ms():.1f} ms",
                f"{medians[count]:.1f} ms",
                f"{medians[count] / plan.scheduled_step_ms() - 1:+.1%}",
                f"{(max(values) - min(values)) / medians[count]:.1%}" if len(values) > 1 else "",
                ", ".join(marks),
            )
        )
    off = medians[chosen] / medians[best] - 1
    return [*rows, f"the chosen {chosen} is {off:.1%} off the best of {len(medians)} counts tried"]


if __name__ == "__main__":
    main()
