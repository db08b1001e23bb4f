"""Predicts the steps of published pipelines from their published layer profiles, one link coefficient fitted elsewhere.

python benchmarks/published_pipelines.py [FOLDER]

FOLDER holds sailor_*.json (measured pipelines of others; its README says whose); without it, it is looked for beside
the folder that EVENSTAGE_WORKLOADS names. Stages, microbatches and the time of the gradients' all-reduce are the run's
own; layer times and the bytes at every cut are the profile's; the planner builds the stages' times and simulates 1F1B.
The one unknown is milliseconds per byte of a crossing: what each run would need to be exact, of which the median over
other runs predicts this one. Two tables: other runs are all but this one, and, stricter, all of another family (number
of stages, microbatch size), because runs of a family differ in data parallelism only. Runs with notes, with one
microbatch, or with one stage (they have no link) are left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from planner.files.links_file import LinkCost
from planner.files.profile_file import LayerProfile, SizeProfile, TensorProfile
from planner.partitioning.chain_costs import stage_costs
from planner.partitioning.layer_graph import build_layer_graph, chain_of
from planner.scheduling.simulation import simulate

MOST_MS_PER_BYTE = 1e-3  # 1 MB/s
ROW = "{:>2} {:>4} {:>5} {:>3} {:>11} {:>10} {:>8} {:>10} {:>8} {:>10}"


@dataclass(frozen=True, slots=True)
class Published:
    """A measured run: its layers at its microbatch size, its cuts, and what a step took, in milliseconds."""

    size: SizeProfile
    cuts: tuple[int, ...]
    num_microbatches: int
    data_parallel: int
    all_reduce_ms: float
    measured_ms: float

    @property
    def family(self) -> tuple[int, int]:
        """Stages and microbatch size."""
        return len(self.cuts) + 1, self.size.microbatch_size


def read_runs(path: Path) -> list[Published]:
    """The usable runs of a file with more than one stage."""
    data = json.loads(path.read_text(encoding="utf-8"))
    usable = (r for r in data["runs"] if not r["notes"] and r["num_microbatches"] > 1 and len(r["stages"]) > 1)
    return [_published(run, data["profiles"][run["model"]]) for run in usable]


def _published(run: dict[str, Any], profile: dict[str, Any]) -> Published:
    order = [str(layer) for stage in run["stages"] for layer in stage]
    costs = [profile[name][str(run["microbatch_size"])] for name in order]
    layers = tuple(_layer(name, index, cost) for index, (name, cost) in enumerate(zip(order, costs, strict=True)))
    tensors = tuple(
        TensorProfile(f"out{index}", index, (index + 1,), int(cost["output_bytes"]), int(cost["output_bytes"]))
        for index, cost in enumerate(costs[:-1])
    )
    return Published(
        size=SizeProfile(run["microbatch_size"], run["file"], layers, tensors, (), 0.0),
        cuts=tuple(accumulate(len(stage) for stage in run["stages"][:-1])),
        num_microbatches=run["num_microbatches"],
        data_parallel=run["data_parallel"],
        all_reduce_ms=run["gradient_allreduce_s"] * 1e3,
        measured_ms=run["measured_s"] * 1e3,
    )


def _layer(name: str, index: int, cost: dict[str, Any]) -> LayerProfile:
    forward, backward = cost["forward_s"] * 1e3, cost["backward_s"] * 1e3
    return LayerProfile(
        id=name,
        name=name,
        type="layer",
        position=index,
        forward_ms=forward,
        forward_spread_ms=0.0,
        backward_ms=backward,
        backward_spread_ms=0.0,
        backward_first_ms=backward,
        optimizer_ms=0.0,
        parameter_bytes=int(cost["parameter_bytes"]),
        parameters=(),
        plain_cut=True,
    )


def predicted_ms(run: Published, ms_per_byte: float) -> float:
    """The simulated step of `run` with this link."""
    chain = chain_of(build_layer_graph(run.size, LinkCost(ms_per_byte=ms_per_byte)))
    stages = [replace(stage, optimizer_ms=run.all_reduce_ms) for stage in stage_costs(chain, run.cuts)]
    return simulate(stages, run.num_microbatches, "1f1b").step_ms


def needed_ms_per_byte(run: Published) -> float:
    """The coefficient at which the prediction is the measurement; 0 where it is too high already without links."""
    low, high = 0.0, MOST_MS_PER_BYTE
    if predicted_ms(run, low) >= run.measured_ms:
        return 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if predicted_ms(run, middle) < run.measured_ms else (low, middle)
    return high


def errors(runs: Sequence[Published], apart: Callable[[Published, Published], bool]) -> list[tuple[float, float]]:
    """For each run the coefficient from the runs that are `apart` from it, and the error with it."""
    needed = [needed_ms_per_byte(run) for run in runs]
    found = []
    for run in runs:
        fitted = median(value for value, other in zip(needed, runs, strict=True) if apart(run, other))
        found.append((fitted, predicted_ms(run, fitted) / run.measured_ms - 1))
    return found


def table(runs: Sequence[Published]) -> str:
    """A row per run, then the median and the worst error of each column."""
    without = [predicted_ms(run, 0.0) / run.measured_ms - 1 for run in runs]
    one_out = errors(runs, lambda run, other: run is not other)
    family_out = errors(runs, lambda run, other: run.family != other.family)
    heading = ROW.format("K", "size", "count", "DP", "measured ms", "no links", "1 out", "by GB/s", "family", "by GB/s")
    lines = [heading]
    for run, free, one, family in zip(runs, without, one_out, family_out, strict=True):
        lines.append(
            ROW.format(
                *run.family,
                run.num_microbatches,
                run.data_parallel,
                f"{run.measured_ms:,.1f}",
                *(f"{free:+.1%}", f"{one[1]:+.1%}", _rate(one[0]), f"{family[1]:+.1%}", _rate(family[0])),
            )
        )
    columns = (without, [error for _, error in one_out], [error for _, error in family_out])
    for name, summary in (("median", median), ("worst", max)):
        free, one_error, family_error = (f"{summary([abs(error) for error in column]):.1%}" for column in columns)
        lines.append(ROW.format("", "", "", "", name, free, one_error, "", family_error, ""))
    return "\n".join(lines)


def _rate(ms_per_byte: float) -> str:
    return f"{1e-6 / ms_per_byte:.2f}" if ms_per_byte else "free"


def find_folder(given: Path | None) -> Path | None:
    """The folder named, else the one beside the workloads; None where there is none."""
    workloads = os.environ.get("EVENSTAGE_WORKLOADS")
    folder = given or (Path(workloads).resolve().parent / "measured_pipelines" if workloads else None)
    return folder if folder is not None and folder.is_dir() else None


def main() -> None:
    """Parse the command line and print the table of every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    folder = find_folder(parser.parse_args().folder)
    if folder is None:
        print("skipped: no folder of measured pipelines; name it, or set EVENSTAGE_WORKLOADS to the folder beside it")
        return
    for path in sorted(folder.glob("sailor_*.json")):
        print(f"{path.stem}: errors of the predicted step\n{table(read_runs(path))}", flush=True)


if __name__ == "__main__":
    main()
