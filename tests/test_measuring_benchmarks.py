"""What the benchmarks make of measurements: errors, intervals, drift, and how far a choice is off the best."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_first, microbatches, paired, prediction
from benchmarks.prediction import Bench, Figure, PlanRuns, figures, lines, summary
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import LayerProfile, Machine, ModelReference, Profile, SizeProfile
from planner.planning import plan_profile
from planner.request import PlanRequest
from planner.scheduling.simulation import StageTimes
from planner.tracing.loading import load_source
from tests.sample_values import make_measurement_value

MACHINE = Machine("cpu", "a clock", 1, {})


def profile(factor: float, sizes: tuple[int, ...] = (2,)) -> Profile:
    layers = tuple(
        LayerProfile(str(i), str(i), "Linear", i, factor * (1 + i), 0.0, factor, 0.0, factor, 0.0, 8, (), True)
        for i in range(4)
    )
    found = tuple(SizeProfile(size, f"trace {size}", layers, (), (), 0.01) for size in sizes)
    return Profile(ModelReference("model.py", "model"), MACHINE, "fp32", 16, 5, 0.0, 1, found)


def bench(monkeypatch: pytest.MonkeyPatch, factors: list[float]) -> tuple[Bench, list[float]]:
    """A bench whose machine is slower by each of `factors` in turn, and whose runs take what was planned."""
    made: list[float] = []

    def profiled(model: str, **wanted: object) -> Profile:
        made.append(factors[len(made)])
        return profile(made[-1])

    def runs(plan, folder: Path, *, steps: int, rehearse: bool) -> Measurement:
        times = [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in plan.stages]
        measurement = make_measurement_value(plan, times, peak_memory_bytes=None)
        measurement.save(folder / "measurement.json")
        return measurement

    monkeypatch.setattr(prediction, "profile_model", profiled)
    monkeypatch.setattr(prediction, "run", runs)
    return Bench(Path("model.py"), 2, rehearse=True, num_rounds=5), made


def test_a_run_that_drifted_is_kept_marked_and_made_once_more(monkeypatch: pytest.MonkeyPatch):
    bench_, made = bench(monkeypatch, [1.0, 1.2, 1.2, 1.21])
    runs = list(bench_.runs([2], ["gpipe", "1f1b"], steps=3))
    assert [(run.schedule, run.again, run.drifted) for run in runs] == [
        ("gpipe", False, True),
        ("gpipe", True, False),
        ("1f1b", False, False),
    ]
    assert [run.drift for run in runs] == pytest.approx([0.2, 0.0, 1.21 / 1.2 - 1], abs=1e-9)
    assert made == [1.0, 1.2, 1.2, 1.21]
    assert "(over 5 %)" in lines(runs[0])[0]
    assert "repeated" in lines(runs[1])[0]
    text = "\n".join(summary(runs))
    assert "3 plans, 1 of them with a drift above 5%" in text
    assert "worst 20.0%" in text


def test_it_drifts_twice_and_is_not_made_a_third_time(monkeypatch: pytest.MonkeyPatch):
    bench_, _ = bench(monkeypatch, [1.0, 1.2, 1.5])
    assert [run.drifted for run in bench_.runs([2], ["gpipe"], steps=3)] == [True, True]


def test_what_the_machine_showed_widens_later_intervals(monkeypatch: pytest.MonkeyPatch):
    bench_, _ = bench(monkeypatch, [1.0, 1.04, 1.04])
    list(bench_.runs([2], ["gpipe", "1f1b"], steps=3))
    assert bench_.latest[2, None].repeats == pytest.approx((0.04, 0.0))


def test_workers_are_held_against_a_profile_under_their_own_schedule(monkeypatch: pytest.MonkeyPatch):
    bench_, made = bench(monkeypatch, [1.0, 1.01, 1.02, 1.03])
    bench_.rehearse, asked, profiled = False, [], prediction.profile_model

    def noted(model: str, **wanted: object) -> Profile:
        asked.append(wanted["schedule"])
        return profiled(model, **wanted)

    monkeypatch.setattr(prediction, "profile_model", noted)
    list(bench_.runs([2], ["gpipe", "1f1b"], steps=3))
    assert asked == ["gpipe", "gpipe", "1f1b", "1f1b"] and len(made) == 4
    assert list(bench_.latest) == [(2, "gpipe"), (2, "1f1b")]


def test_figures_have_raw_errors_errors_of_the_share_and_intervals():
    plan = plan_profile(profile(1.0), PlanRequest(2, microbatches=8))
    times = [StageTimes(s.forward_ms * 1.1, s.backward_ms * 1.1, s.backward_first_ms, 0.0) for s in plan.stages]
    measurement = replace(make_measurement_value(plan, times), scale=1.1)
    forward, backward, *_ = figures([measurement])
    assert (forward.what, forward.stage, backward.what) == ("forward", 0, "backward")
    assert forward.error == pytest.approx(0.1)
    assert forward.share_error == pytest.approx(0.0)
    assert forward.inside == ()
    assert [figure.what for figure in figures([measurement])[-2:]] == ["backward", "simulated"]
    by_the_wall = figures([replace(measurement, step_clock="wall")])[-2:]
    assert [figure.what for figure in by_the_wall] == ["step", "simulated"]
    assert by_the_wall[0].measured == measurement.step_ms.measured
    wide, narrow = (Figure("step", None, 100.0, (104.0,), (1.0,), half) for half in (5.0, 3.0))
    assert (wide.inside, narrow.inside, wide.width) == ((True,), (False,), 0.1)


def test_the_summary_counts_what_it_says():
    found = (
        Figure("forward", 0, 10.0, (10.4,), (1.0,), 0.5),
        Figure("backward", 0, 10.0, (9.0,), (1.0,), 0.5),
        Figure("memory", 0, 100.0, (101.0,), (1.0,)),
        Figure("step", None, 10.0, (10.1,), (1.0,), 0.2),
    )
    text = "\n".join(summary([PlanRuns("model", 2, "gpipe", 0.0, False, found)]))
    assert "forward   median 4.0%, worst +4.0%" in text
    assert "backward  median 10.0%, worst -10.0%" in text
    assert "under the measured peak in 1 of 1" in text
    assert "1 of 2 stage times inside (50%), 1 of 1 steps; median width 10.0%" in text
    assert summary([]) == ["\n0 plans, 0 of them with a drift above 5%"]


def test_several_runs_of_a_plan_are_one_figure_and_their_difference_is_said(monkeypatch: pytest.MonkeyPatch):
    taken: list[float] = []

    def runs(plan, folder: Path, *, steps: int, rehearse: bool) -> Measurement:
        taken.append((1.0, 1.3, 1.2)[len(taken)])
        times = [StageTimes(s.forward_ms * taken[-1], s.backward_ms, s.backward_first_ms, 0.0) for s in plan.stages]
        measurement = replace(make_measurement_value(plan, times), scale=taken[-1])
        measurement.save(folder / "measurement.json")
        return measurement

    bench_, made = bench(monkeypatch, [1.0, 1.0])
    monkeypatch.setattr(prediction, "run", runs)
    bench_.num_runs = 3
    (found,) = bench_.runs([2], ["gpipe"], steps=3)
    assert made == [1.0, 1.0] and len(taken) == 3, "all runs stand between one pair of profiles"
    forward, backward = found.figures[0], found.figures[1]
    assert forward.runs == pytest.approx([forward.predicted * factor for factor in taken])
    assert forward.error == pytest.approx(0.2) and forward.share_error == pytest.approx(0.0)
    assert sorted(forward.differences()) == pytest.approx([1.3 / 1.2 - 1, 0.2, 0.3])
    assert max(forward.differences(of_shares=True)) == pytest.approx(0.0)
    assert max(backward.differences(of_shares=True)) == pytest.approx(0.3)
    peak = Figure("memory", 0, 100.0, (99.0, 101.0, 98.0), (1.0, 1.0, 1.0))
    assert peak.measured == 101.0, "one run under the prediction does not make up for another over it"
    text = "\n".join(summary([found]))
    assert "two runs: median 20.0%, worst +30.0%; of the share median 0.0%, worst +0.0%" in text
    bounded = replace(forward, half_width=forward.predicted * 0.25)
    assert bounded.inside == (True, False, True)
    assert "2 of 3" in lines(replace(found, figures=(bounded,)))[0]
    assert "2 of 3 stage times inside (67%)" in "\n".join(summary([replace(found, figures=(bounded,))]))


def test_how_far_the_chosen_count_is_off_the_best():
    measured = profile(1.0, (1, 2, 4))
    chosen, plans = microbatches.plans_by_count(measured, PlanRequest(2))
    assert set(plans) == {4, 8, 16}
    best = next(count for count in plans if count != chosen)
    rehearsed = {count: [12.0, 11.0, 13.0] for count in plans}
    rehearsed[best] = [10.0, 10.0, 10.0]
    text = microbatches.table(plans, rehearsed, chosen)
    assert text[-1] == f"the chosen {chosen} is 20.0% off the best of 3 counts tried"
    assert sum("best" in line and "chosen" not in line for line in text[1:-1]) == 1


def test_counts_take_turns(monkeypatch: pytest.MonkeyPatch):
    _, plans = microbatches.plans_by_count(profile(1.0, (1, 2, 4)), PlanRequest(2))
    order: list[int] = []

    def runs(plan, folder: Path, *, steps: int, rehearse: bool) -> Measurement:
        order.append(plan.num_microbatches)
        times = [StageTimes(1.0, 1.0, 1.0, 0.0) for _ in plan.stages]
        return make_measurement_value(plan, times)

    monkeypatch.setattr(microbatches, "run", runs)
    found = microbatches.steps_ms(plans, 2, 3, rehearse=True)
    assert order == [*plans, *plans]
    assert {len(values) for values in found.values()} == {2}


def test_what_a_device_keeps_for_itself_is_said():
    gpu = replace(profile(1.0), machine=Machine("cuda", "a GPU", 1, {"torch": "2"}, 80 * 2**30, 2**29, 2**25))
    assert gpu_first.machine_lines(gpu) == [
        "\na GPU, torch 2",
        "of 80.0 GiB, 480 MiB are gone before any tensor is made; matrix products keep 32.0 MiB as workspaces",
    ]
    assert "figures of the CPU" in gpu_first.machine_lines(profile(1.0))[-1]
    assert gpu_first.machine_lines(None) == ["nothing was profiled"]


def test_a_plan_has_the_predictions_of_another_profile_at_its_own_cuts():
    uneven = [0.5, 1.0, 3.0, 3.0]
    other = profile(1.0)
    layers = tuple(
        replace(layer, forward_ms=ms, backward_ms=ms, backward_first_ms=ms)
        for layer, ms in zip(other.sizes[0].layers, uneven, strict=True)
    )
    other = replace(other, sizes=(replace(other.sizes[0], layers=layers),))
    plan = plan_profile(profile(1.0), PlanRequest(2, microbatches=8))
    best = plan_profile(other, PlanRequest(2, microbatches=8))
    found = paired.at_its_cuts(plan, other)
    assert [cut.before for cut in found.cuts] == [cut.before for cut in plan.cuts] != [c.before for c in best.cuts]
    cut = len(plan.stages[0].nodes)
    assert [stage.forward_ms for stage in found.stages] == pytest.approx([sum(uneven[:cut]), sum(uneven[cut:])])
    assert found.step_ms > best.step_ms and found.step_interval_ms is not None


def test_a_paired_run_is_not_repeated_where_it_drifted(monkeypatch: pytest.MonkeyPatch):
    """Profile and training are there from the same minutes; a drift is in both."""
    _, made = bench(monkeypatch, [1.0])

    def workers(module: str, arguments: list[str], num_workers: int, environment: dict[str, str]):
        file, rounds = arguments
        assert (module, rounds, num_workers) == ("benchmarks.paired", "3", 2)
        second = replace(profile(1.5), sizes=(replace(profile(1.5).sizes[0], drift=0.2),))
        second.save(Path(f"{file}.profile"))
        plan = paired.at_its_cuts(Plan.load(file), second)
        times = [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in plan.stages]
        make_measurement_value(plan, times).save(Path(f"{file}.measurement"))

    monkeypatch.setattr(paired, "run_workers", workers)
    tried = paired.PairedBench(Path("model.py"), 2, rehearse=False, num_rounds=6)
    (found,) = tried.runs([2], ["gpipe"], steps=3)
    assert found.drift == 0.2 and found.drifted and not found.again and made == [1.0]
    assert {figure.error for figure in found.figures if figure.what in ("forward", "backward")} == {0.0}


def test_a_model_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["gpu_first", "vit", "gtp2"])
    with pytest.raises(SystemExit):
        gpu_first.main()
    assert "got 'gtp2'; it must be one of vit, gpt2" in capsys.readouterr().err


def test_the_models_for_a_gpu_are_all_there_and_draw_batches():
    assert set(gpu_first.MODELS) == {file.stem for file in gpu_first.FOLDER.glob("*.py")} - {"random_batches"}
    for name in gpu_first.MODELS:
        inputs, targets = load_source(str(gpu_first.FOLDER / f"{name}.py")).make_batch(2)
        assert {len(tensor) for tensor in [*inputs.values(), targets]} == {2}
