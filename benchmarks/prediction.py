"""Plans models, runs the plans, and prints what was predicted beside what was measured.

python -m benchmarks.prediction [--models N] [--stages 2 3 4] [--schedules gpipe 1f1b] [--runs N] [--rehearse] [--quick]

Each plan is run between two profiles of its model; their difference is the drift of the machine, which no prediction
can be held against. A plan whose drift exceeds 5 % is marked and run once more; both stand in the table and in the
summary. With --runs N a plan is run N times, the table has the median (of memory the largest), and the summary says how
far two runs of one plan are apart: nearer than that no prediction can be to a run. As many copies profile as workers
then compute at once. Every figure is the machine's at that hour: read the
drift before the errors. `step` is by the wall clock, where every worker has a core or a device of its own; what else
runs on the machine is in it. `simulated` is the step of the measured stage times, which is what was predicted.
`memory` is what the allocator gave out at most, `of GPU` what is then gone of a GPU, with context and fragmentation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median

from benchmarks.measured_runs import EXAMPLES, ZOO, run
from planner.errors import PlannerError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile, Schedule
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
    """One prediction and what each run of the plan measured, in ms or bytes; `stage` None is the whole step.

    `scales` are the factors by which all stages together ran slower, run by run, `half_width` half the 90 % interval.
    """

    what: str
    stage: int | None
    predicted: float
    runs: tuple[float, ...]
    scales: tuple[float, ...]
    half_width: float | None = None

    @property
    def measured(self) -> float:
        """The median of the runs, of bytes the largest."""
        return max(self.runs) if self.what in BYTES else median(self.runs)

    @property
    def error(self) -> float:
        """Measured ÷ predicted − 1."""
        return self.measured / self.predicted - 1

    @property
    def share_error(self) -> float:
        """The error of the share of all stages' work: what is left once the common factor is taken off."""
        return median(self._shares()) / self.predicted - 1

    @property
    def inside(self) -> tuple[bool, ...]:
        """Whether each run lies in the 90 % interval; empty where there is none."""
        return (
            () if self.half_width is None else tuple(abs(run - self.predicted) <= self.half_width for run in self.runs)
        )

    @property
    def width(self) -> float | None:
        """The whole 90 % interval as a fraction of the prediction."""
        return None if self.half_width is None else 2 * self.half_width / self.predicted

    def differences(self, *, of_shares: bool = False) -> list[float]:
        """By which fraction every two runs differ, the smaller being the whole."""
        values = self._shares() if of_shares else self.runs
        return [max(pair) / min(pair) - 1 for pair in combinations(values, 2)]

    def _shares(self) -> tuple[float, ...]:
        return tuple(run / scale for run, scale in zip(self.runs, self.scales, strict=True))


@dataclass(frozen=True, slots=True)
class PlanRuns:
    """All runs of one plan. `again`: they repeat those before, whose drift was too large."""

    model: str
    num_stages: int
    schedule: Schedule
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
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="run every plan so often (default 1)")
    parser.add_argument("--rehearse", action="store_true", help="rehearse on one device instead of running K workers")
    parser.add_argument("--quick", action="store_true", help="2 stages, GPipe, few rounds and steps: does it work?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.stages, arguments.schedules = [2], ["gpipe"]
    rounds, steps = (6, 4) if arguments.quick else (12, 20)
    benches = [
        Bench(model, size, rehearse=arguments.rehearse, num_rounds=rounds, num_runs=arguments.runs)
        for model, size in [*MODELS.items()][: arguments.models]
    ]
    print("\n".join(summary(printed_runs(benches, arguments.stages, arguments.schedules, steps=steps))))


def printed_runs(
    benches: Iterable[Bench], stages: Sequence[int], schedules: Sequence[Schedule], *, steps: int
) -> list[PlanRuns]:
    """The runs of all benches, each printed as lines of the table as soon as it is made."""
    print(COLUMNS.format(*HEADINGS))
    runs: list[PlanRuns] = []
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

    repeats_drifted = True

    def __init__(
        self, model: Path, microbatch_size: int, *, rehearse: bool, num_rounds: int, num_runs: int = 1
    ) -> None:
        self.model, self.size, self.rehearse = model, microbatch_size, rehearse
        self.num_rounds, self.num_runs = num_rounds, num_runs
        self.latest: dict[tuple[int, Schedule | None], Profile] = {}

    def runs(self, stages: Sequence[int], schedules: Sequence[Schedule], *, steps: int) -> Iterator[PlanRuns]:
        """Every number of stages under every schedule; once more where the machine drifted."""
        for num_stages in stages:
            for schedule in schedules:
                first = self._run(num_stages, schedule, steps, again=False)
                yield first
                if first.drifted and self.repeats_drifted:
                    yield self._run(num_stages, schedule, steps, again=True)

    def _run(self, num_stages: int, schedule: Schedule, steps: int, *, again: bool) -> PlanRuns:
        before = self._latest(num_stages, schedule)
        request = self.request(num_stages, schedule)
        with tempfile.TemporaryDirectory(prefix="evenstage-prediction-") as folder:
            plan, folders = plan_profile(before, request), [Path(folder, str(index)) for index in range(self.num_runs)]
            for each in folders:
                each.mkdir()
                self._measure(plan, each, steps)
            after = self._profile(num_stages, schedule)
            measurements = [note_drift(each, before, after) for each in folders]
        self.latest[self._key(num_stages, schedule)] = with_repeat(after, before)
        drift = measurements[0].drift or 0.0
        return PlanRuns(self.model.stem, num_stages, schedule, drift, again, figures(measurements))

    @staticmethod
    def request(num_stages: int, schedule: Schedule) -> PlanRequest:
        """What is planned for."""
        return PlanRequest(num_stages, microbatches=MICROBATCHES, schedule=schedule)

    def _measure(self, plan: Plan, folder: Path, steps: int) -> None:
        """Run the plan; its measurement lies in `folder` afterwards."""
        run(plan, folder, steps=steps, rehearse=self.rehearse)

    def _latest(self, num_stages: int, schedule: Schedule) -> Profile:
        key = self._key(num_stages, schedule)
        if key not in self.latest:
            self.latest[key] = self._profile(num_stages, schedule)
        return self.latest[key]

    def _key(self, num_stages: int, schedule: Schedule) -> tuple[int, Schedule | None]:
        """One profile serves every schedule where a single process runs the stages."""
        return num_stages, None if self.rehearse else schedule

    def _profile(self, num_stages: int, schedule: Schedule) -> Profile:
        return profile_model(
            str(self.model),
            batch_size=MICROBATCHES * self.size,
            microbatch_sizes=(self.size,),
            num_workers=1 if self.rehearse else num_stages,
            num_stages=num_stages,
            num_rounds=self.num_rounds,
            schedule=schedule,
        )


def figures(measurements: Sequence[Measurement]) -> tuple[Figure, ...]:
    """Every prediction of one plan beside what its runs measured; what was not predicted is left out."""
    return tuple(
        replace(alike[0], runs=sum((each.runs for each in alike), ()), scales=sum((each.scales for each in alike), ()))
        for alike in zip(*map(_figures_of_one, measurements), strict=True)
    )


def _figures_of_one(measurement: Measurement) -> list[Figure]:
    found: list[Figure] = []

    def add(what: str, stage: int | None, predicted: float | None, measured: float | None, half: float | None) -> None:
        if predicted and measured is not None:
            found.append(Figure(what, stage, predicted, (measured,), (measurement.scale,), half))

    for stage in measurement.stages:
        index, before, after = stage.index, stage.predicted, stage.measured
        add("forward", index, before.forward_ms, after.forward_ms, before.forward_interval_ms)
        add("backward", index, before.backward_ms, after.backward_ms, before.backward_interval_ms)
        add("optimizer", index, before.optimizer_ms, after.optimizer_ms, None)
        add("memory", index, before.peak_memory_bytes, after.peak_memory_bytes, None)
        add("of GPU", index, before.device_memory_bytes, after.device_memory_bytes, None)
    step = measurement.step_ms
    stages = [each.measured for each in measurement.stages]
    times = [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in stages]
    simulated_ms = simulate(times, measurement.num_microbatches, measurement.schedule).step_ms
    if measurement.step_clock == "wall":
        add("step", None, step.predicted, step.measured, step.interval)
    add("simulated", None, step.predicted, simulated_ms, step.interval)
    return found


def lines(made: PlanRuns) -> list[str]:
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
            _where(figure.inside),
            drift,
        )
        for figure in made.figures
    ]


def _where(inside: Sequence[bool]) -> str:
    """`inside`, `outside`, or how many of several runs were inside."""
    if len(inside) > 1:
        return f"{sum(inside)} of {len(inside)}"
    return {(True,): "inside", (False,): "outside"}.get(tuple(inside), "")


def _amount(figure: Figure, value: float) -> str:
    return f"{value / 2**20:.2f} MiB" if figure.what in BYTES else f"{value:.3f} ms"


def summary(runs: Sequence[PlanRuns]) -> list[str]:
    """Median and worst error of each quantity, over all runs and over those that did not drift, and the intervals."""
    steady = [made for made in runs if not made.drifted]
    found = [f"\n{len(runs)} plans, {len(runs) - len(steady)} of them with a drift above {MOST_DRIFT:.0%}"]
    if runs:
        drifts = [abs(made.drift) for made in runs]
        found.append(f"drift of the machine: median {median(drifts):.1%}, worst {max(drifts):.1%}")
    for words, chosen in (("all plans", runs), ("plans without such a drift", steady)):
        if chosen:
            found += [f"\n{words}", *_errors(chosen), *_intervals(chosen)]
    return found


def _errors(runs: Sequence[PlanRuns]) -> list[str]:
    found = []
    for what in QUANTITIES:
        chosen = [figure for made in runs for figure in made.figures if figure.what == what]
        if not chosen:
            continue
        text = f"  {what:9} {_median_and_worst(figure.error for figure in chosen)}"
        if what in BYTES:
            under = sum(figure.measured > figure.predicted for figure in chosen)
            found.append(f"{text}; predicted under the measured peak in {under} of {len(chosen)}")
            continue
        found.append(f"{text}; of the share {_median_and_worst(figure.share_error for figure in chosen)}")
        if apart := [each for figure in chosen for each in figure.differences()]:
            of_shares = [each for figure in chosen for each in figure.differences(of_shares=True)]
            found.append(f"{'':12}two runs: {_median_and_worst(apart)}; of the share {_median_and_worst(of_shares)}")
    return found


def _median_and_worst(errors: Iterable[float]) -> str:
    values = list(errors)
    return f"median {median(map(abs, values)):.1%}, worst {max(values, key=abs):+.1%}"


def _intervals(runs: Sequence[PlanRuns]) -> list[str]:
    chosen = [figure for made in runs for figure in made.figures if figure.half_width is not None]
    stages = [inside for figure in chosen if figure.stage is not None for inside in figure.inside]
    steps = [inside for figure in chosen if figure.stage is None for inside in figure.inside]
    if not stages:
        return []
    width = median(figure.width or 0.0 for figure in chosen if figure.stage is not None)
    return [
        f"  90 % intervals: {sum(stages)} of {len(stages)} stage times inside ({sum(stages) / len(stages):.0%}),"
        f" {sum(steps)} of {len(steps)} steps; median width {width:.1%} of the prediction"
    ]


if __name__ == "__main__":
    main()
