"""Plans models, runs the plans, and prints what was predicted beside what was measured.

python -m benchmarks.prediction [--models N] [--stages 2 3 4] [--schedules gpipe 1f1b] [--rehearse] [--quick]

Each run stands between two profiles of its model; their difference is the drift of the machine, which no prediction
can be held against. A run whose drift exceeds 5 % is marked and made once more; both stand in the table and in the
summary. As many copies profile as workers then compute at once. Every figure is the machine's at that hour: read the
drift before the errors. `step` is by the wall clock, where every worker has a core or a device of its own; what else
runs on the machine is in it. `simulated` is the step of the measured stage times, which is what was predicted.
`memory` is what the allocator gave out at most, `of GPU` what is then gone of a GPU, with context and fragmentation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.measured_runs import EXAMPLES, ZOO, run
from planner.errors import PlannerError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.intervals import with_repeat
from planner.planning import plan_profile
from planner.profiling.profiler import profile_model
from planner.request import PlanRequest
from planner.scheduling.simulation import StageTimes, simulate
from runner.drift import note_drift

MODELS = {
    **{EXAMPLES / f"{name}.py": 2 for name in ("transformer", "resnet", "gpt2")},
    **{EXAMPLES / f"{name}.py": 4 for name in ("unet", "encoder_decoder")},
    **{ZOO / "plain" / f"{name}.py": 16 for name in ("mixer", "densenet", "mobilenet")},
}
"""Models and their microbatch sizes: large enough for stages of some milliseconds, which a pipeline is for."""
MOST_DRIFT = 0.05
MICROBATCHES = 8
COLUMNS = "{:18} {:>2} {:6} {:>5}  {:9} {:>12} {:>12} {:>9} {:>9}  {:8} {}"
HEADINGS = ("model", "K", "sched.", "stage", "what", "predicted", "measured", "error", "of share", "in 90 %", "drift")
QUANTITIES = ("forward", "backward", "optimizer", "step", "simulated", "memory", "of GPU")
BYTES = ("memory", "of GPU")


@dataclass(frozen=True, slots=True)
class Figure:
    """One prediction and its measurement, in ms or bytes; `stage` None is the whole step.

    `scale` is the factor by which all stages together ran slower, `half_width` half the 90 % interval.
    """

    what: str
    stage: int | None
    predicted: float
    measured: float
    scale: float = 1.0
    half_width: float | None = None

    @property
    def error(self) -> float:
        """Measured ÷ predicted − 1."""
        return self.measured / self.predicted - 1

    @property
    def share_error(self) -> float:
        """The error of the share of all stages' work: what is left once the common factor is taken off."""
        return self.measured / (self.predicted * self.scale) - 1

    @property
    def inside(self) -> bool | None:
        """Whether the measurement lies in the 90 % interval; None where there is none."""
        return None if self.half_width is None else abs(self.measured - self.predicted) <= self.half_width

    @property
    def width(self) -> float | None:
        """The whole 90 % interval as a fraction of the prediction."""
        return None if self.half_width is None else 2 * self.half_width / self.predicted


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one plan. `again`: it repeats the run before it, whose drift was too large."""

    model: str
    num_stages: int
    schedule: str
    drift: float
    again: bool
    figures: tuple[Figure, ...]

    @property
    def drifted(self) -> bool:
        """Whether the machine changed by more than 5 % around the run."""
        return abs(self.drift) > MOST_DRIFT


def main() -> None:
    """Parse the command line, run, and print the table and its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=len(MODELS), metavar="N", help="the first N models (default all)")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4], metavar="K")
    parser.add_argument("--schedules", nargs="+", choices=["gpipe", "1f1b"], default=["gpipe", "1f1b"])
    parser.add_argument("--rehearse", action="store_true", help="rehearse on one device instead of running K workers")
    parser.add_argument("--quick", action="store_true", help="2 stages, GPipe, few rounds and steps: does it work?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.stages, arguments.schedules = [2], ["gpipe"]
    rounds, steps = (6, 4) if arguments.quick else (12, 20)
    benches = [
        Bench(model, size, rehearse=arguments.rehearse, num_rounds=rounds)
        for model, size in [*MODELS.items()][: arguments.models]
    ]
    print("\n".join(summary(printed_runs(benches, arguments.stages, arguments.schedules, steps=steps))))


def printed_runs(benches: Iterable[Bench], stages: Sequence[int], schedules: Sequence[str], *, steps: int) -> list[Run]:
    """The runs of all benches, each printed as lines of the table as soon as it is made."""
    print(COLUMNS.format(*HEADINGS))
    runs: list[Run] = []
    for bench in benches:
        try:
            for made in bench.runs(stages, schedules, steps=steps):
                print("\n".join(lines(made)), flush=True)
                runs.append(made)
        except PlannerError as error:
            print(f"{bench.model.stem}: {error.got}", flush=True)
    return runs


class Bench:
    """One model, with the profile that was made of it last: that before the next run."""

    def __init__(self, model: Path, microbatch_size: int, *, rehearse: bool, num_rounds: int) -> None:
        self.model, self.size, self.rehearse, self.num_rounds = model, microbatch_size, rehearse, num_rounds
        self.latest: dict[int, Profile] = {}

    def runs(self, stages: Sequence[int], schedules: Sequence[str], *, steps: int) -> Iterator[Run]:
        """Every number of stages under every schedule; once more where the machine drifted."""
        for num_stages in stages:
            for schedule in schedules:
                first = self._run(num_stages, schedule, steps, again=False)
                yield first
                if first.drifted:
                    yield self._run(num_stages, schedule, steps, again=True)

    def _run(self, num_stages: int, schedule: str, steps: int, *, again: bool) -> Run:
        before = self.latest.get(num_stages) or self._profile(num_stages)
        request = PlanRequest(num_stages, microbatches=MICROBATCHES, schedule="1f1b" if schedule == "1f1b" else "gpipe")
        with tempfile.TemporaryDirectory(prefix="evenstage-prediction-") as folder:
            self._measure(plan_profile(before, request), Path(folder), steps)
            after = self._profile(num_stages)
            measurement = note_drift(Path(folder), before, after)
        self.latest[num_stages] = with_repeat(after, before)
        return Run(self.model.stem, num_stages, schedule, measurement.drift or 0.0, again, figures(measurement))

    def _measure(self, plan: Plan, folder: Path, steps: int) -> None:
        """Run the plan; its measurement lies in `folder` afterwards."""
        run(plan, folder, steps=steps, rehearse=self.rehearse)

    def _profile(self, num_stages: int) -> Profile:
        return profile_model(
            str(self.model),
            batch_size=MICROBATCHES * self.size,
            microbatch_sizes=(self.size,),
            num_workers=1 if self.rehearse else num_stages,
            num_stages=num_stages,
            num_rounds=self.num_rounds,
        )


def figures(measurement: Measurement) -> tuple[Figure, ...]:
    """Every prediction of a measurement beside what was measured; what was not predicted is left out."""
    found = []
    for stage in measurement.stages:
        before, after, scale = stage.predicted, stage.measured, measurement.scale
        found += [
            Figure("forward", stage.index, before.forward_ms, after.forward_ms, scale, before.forward_interval_ms),
            Figure("backward", stage.index, before.backward_ms, after.backward_ms, scale, before.backward_interval_ms),
        ]
        found.append(Figure("optimizer", stage.index, before.optimizer_ms, after.optimizer_ms, scale))
        if before.peak_memory_bytes is not None and after.peak_memory_bytes is not None:
            found.append(Figure("memory", stage.index, before.peak_memory_bytes, after.peak_memory_bytes))
        if before.device_memory_bytes is not None and after.device_memory_bytes is not None:
            found.append(Figure("of GPU", stage.index, before.device_memory_bytes, after.device_memory_bytes))
    step = measurement.step_ms
    stages = [each.measured for each in measurement.stages]
    times = [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in stages]
    simulated_ms = simulate(times, measurement.num_microbatches, measurement.schedule).step_ms
    if measurement.step_clock == "wall":
        found.append(Figure("step", None, step.predicted, step.measured, measurement.scale, step.interval))
    found.append(Figure("simulated", None, step.predicted, simulated_ms, measurement.scale, step.interval))
    return tuple(figure for figure in found if figure.predicted > 0)


def lines(made: Run) -> list[str]:
    """A run as lines of the table."""
    drift = f"{made.drift:+.1%}" + (" (over 5 %)" if made.drifted else "") + (", repeated" if made.again else "")
    return [
        COLUMNS.format(
            made.model,
            made.num_stages,
            made.schedule,
            "all" if figure.stage is None else figure.stage,
            figure.what,
            *(_amount(figure, value) for value in (figure.predicted, figure.measured)),
            f"{figure.error:+.1%}",
            "" if figure.what in BYTES else f"{figure.share_error:+.1%}",
            {True: "inside", False: "outside", None: ""}[figure.inside],
            drift,
        )
        for figure in made.figures
    ]


def _amount(figure: Figure, value: float) -> str:
    return f"{value / 2**20:.2f} MiB" if figure.what in BYTES else f"{value:.3f} ms"


def summary(runs: Sequence[Run]) -> list[str]:
    """Median and worst error of each quantity, over all runs and over those that did not drift, and the intervals."""
    steady = [made for made in runs if not made.drifted]
    found = [f"\n{len(runs)} runs, {len(runs) - len(steady)} of them with a drift above {MOST_DRIFT:.0%}"]
    if runs:
        drifts = [abs(made.drift) for made in runs]
        found.append(f"drift of the machine: median {median(drifts):.1%}, worst {max(drifts):.1%}")
    for words, chosen in (("all runs", runs), ("runs without such a drift", steady)):
        if chosen:
            found += [f"\n{words}", *_errors(chosen), *_intervals(chosen)]
    return found


def _errors(runs: Sequence[Run]) -> list[str]:
    found = []
    for what in QUANTITIES:
        chosen = [figure for made in runs for figure in made.figures if figure.what == what]
        if not chosen:
            continue
        text = f"  {what:9} {_median_and_worst(figure.error for figure in chosen)}"
        if what in BYTES:
            under = sum(figure.measured > figure.predicted for figure in chosen)
            text += f"; predicted under the measured peak in {under} of {len(chosen)}"
        else:
            text += f"; of the share {_median_and_worst(figure.share_error for figure in chosen)}"
        found.append(text)
    return found


def _median_and_worst(errors: Iterable[float]) -> str:
    values = list(errors)
    return f"median {median(map(abs, values)):.1%}, worst {max(values, key=abs):+.1%}"


def _intervals(runs: Sequence[Run]) -> list[str]:
    chosen = [f for made in runs for f in made.figures if f.inside is not None]
    stages = [figure for figure in chosen if figure.stage is not None]
    if not stages:
        return []
    inside, steps = sum(bool(f.inside) for f in stages), [f for f in chosen if f.stage is None]
    width = median(figure.width or 0.0 for figure in stages)
    return [
        f"  90 % intervals: {inside} of {len(stages)} stage times inside ({inside / len(stages):.0%}),"
        f" {sum(bool(f.inside) for f in steps)} of {len(steps)} steps; median width {width:.1%} of the prediction"
    ]


if __name__ == "__main__":
    main()
