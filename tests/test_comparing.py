"""Plan + Measurement → BalanceReport, by hand for two stages, and the verdict for every cause."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planner.errors import FileError
from planner.files.plan_file import CurvePoint, Plan, PlannedModel
from planner.scheduling.simulation import StageTimes
from runner.comparing import BalanceReport, compare
from runner.verdict import to_plan_from
from tests.sample_values import make_measurement_value, make_plan_value, sample_measurement, sample_plan

EVEN = (StageTimes(1, 2, 2, 0), StageTimes(1, 2, 2, 0))
UNEVEN = (StageTimes(1, 2, 2, 0), StageTimes(2, 4, 4, 0))
NAMES = (("a", "b"), ("c",))


def two_stages(measured: tuple[StageTimes, ...] = UNEVEN, num_microbatches: int = 3) -> tuple[Plan, BalanceReport]:
    """A plan that expected two even stages, and the report on a run of it."""
    plan = make_plan_value(EVEN, num_microbatches, NAMES)
    return plan, compare(plan, make_measurement_value(plan, measured))


def test_times_and_errors_of_two_stages() -> None:
    _, report = two_stages()
    first, second = report.stages
    assert report.scale == pytest.approx(9 / 6)
    assert first.forward.error == pytest.approx(1 / 1.5 - 1)
    assert first.forward.raw_error == pytest.approx(0.0)
    assert second.backward.error == pytest.approx(4 / 3 - 1)
    assert second.backward.raw_error == pytest.approx(1.0)
    assert (first.predicted_share, first.measured_share) == pytest.approx((1 / 2, 1 / 3))
    assert (first.begins_at, first.num_layers, second.begins_at) == ("a", 2, "c")


def test_step_bubble_and_balance_of_two_stages() -> None:
    _, report = two_stages()
    # predicted: 1+1 + 2·1 + 2+2 + 2·2;  measured: 1+2 + 2·2 + 2+4 + 2·4
    assert (report.step_ms.predicted, report.step_ms.measured) == (12, 21)
    assert report.step_error == pytest.approx(21 / 12 - 1)
    assert report.step_ms.ideal == pytest.approx((9 + 18) / 2)
    assert (report.predicted_balance, report.measured_balance) == pytest.approx((1.0, 6 / 4.5))
    assert report.measured_bubble == pytest.approx(((1 - 9 / 21) + (1 - 18 / 21)) / 2)
    assert report.stages[1].measured_wait_ms == pytest.approx(1.0)


def test_timelines_hold_every_task_and_a_critical_path_that_ends_with_the_step() -> None:
    _, report = two_stages()
    for timeline, step_ms in ((report.predicted, 12), (report.measured, 21)):
        assert len(timeline.tasks) == 2 * (3 + 3 + 1)
        assert timeline.step_ms == step_ms
        assert timeline.critical[-1].end_ms == step_ms
        assert set(timeline.critical) <= set(timeline.tasks)


def test_tolerance_is_of_shares_and_not_of_speed() -> None:
    slower = tuple(StageTimes(3 * t.forward_ms, 3 * t.backward_ms, 6, 0) for t in EVEN)
    assert two_stages(slower)[1].within_tolerance(1e-9)
    report = two_stages()[1]
    assert report.largest_error == pytest.approx(1 / 3)
    assert report.within_tolerance(0.34)
    assert not report.within_tolerance(0.33)


def test_work_that_was_not_predicted_is_outside_every_tolerance() -> None:
    plan = make_plan_value((StageTimes(0, 2, 2, 0), StageTimes(1, 2, 2, 0)), 3, NAMES)
    report = compare(plan, make_measurement_value(plan, EVEN))
    assert report.stages[0].forward.error is None
    assert not report.within_tolerance(9.0)


def test_nothing_measured_divides_by_nothing() -> None:
    zero = (StageTimes(0, 0, 0, 0), StageTimes(0, 0, 0, 0))
    plan = make_plan_value(zero, 2, NAMES)
    report = compare(plan, make_measurement_value(plan, zero))
    assert report.measured_balance is None
    assert report.step_error is None
    assert report.within_tolerance(0.01)


def test_a_measurement_of_another_plan_is_refused() -> None:
    plan, _ = two_stages()
    other = replace(plan, model=replace(plan.model, fingerprint="other"))
    with pytest.raises(FileError, match="give the plan that was run"):
        compare(other, make_measurement_value(plan, EVEN))


def test_verdict_names_the_limiting_stage_and_asks_to_measure_again_after_a_wrong_prediction() -> None:
    verdict = two_stages()[1].verdict
    assert verdict.limiting_stage == 1
    assert verdict.finding == (
        "Stage 1 limits the step: 6.00 ms per microbatch, 1.50 ms (33.3 %) above the mean and 3.00 ms above the next"
    )
    assert verdict.command == "plan --gpus 2 transformer.py --batch-size 3 --fresh"
    assert verdict.sentence.endswith(verdict.command)


def test_verdict_on_even_stages_is_that_nothing_is_to_gain() -> None:
    verdict = two_stages(EVEN, num_microbatches=32)[1].verdict
    assert verdict.command is None
    assert "nothing to gain" in verdict.advice
    assert "level with the next" in verdict.finding


def with_curve(*points: tuple[int, float]) -> Plan:
    """An even plan with 2 microbatches of a batch of 2, whose curve has these (count, step) points."""
    curve = tuple(CurvePoint(count, 1, step_ms, "optimal") for count, step_ms in points)
    return make_plan_value(EVEN, 2, NAMES, curve=curve)


@pytest.mark.parametrize(
    ("points", "advice", "flags"),
    [
        (((2, 9.0), (4, 7.0)), "more microbatches", "--batch-size 2 --microbatches 4"),
        (((1, 7.0), (2, 9.0)), "fewer microbatches", "--batch-size 2 --microbatches 1"),
        (((2, 9.0), (4, 9.5)), "a larger batch", "--batch-size 4"),
        (((2, 9.0),), "let the planner choose", "--batch-size 2 --microbatches auto"),
    ],
)
def test_verdict_when_the_bubble_dominates(points: tuple[tuple[int, float], ...], advice: str, flags: str) -> None:
    plan = with_curve(*points)
    verdict = compare(plan, make_measurement_value(plan, EVEN)).verdict
    assert advice in verdict.advice
    assert "33.3 %" in verdict.advice
    assert verdict.command == f"plan --gpus 2 transformer.py {flags}"


def test_verdict_on_uneven_stages_tells_what_is_proven() -> None:
    plan = make_plan_value(UNEVEN, 32, NAMES)
    for changed, words in (
        (plan, "which is proven"),
        (replace(plan, status="feasible", lower_bound_ms=plan.objective_ms / 1.03), "at most 3.0 %"),
        (replace(plan, status="scored"), "let the planner choose"),
    ):
        assert words in compare(changed, make_measurement_value(changed, UNEVEN)).verdict.advice


def test_commands_quote_what_a_shell_would_read() -> None:
    model = PlannedModel("my model;rm.py", "f", "m", entry="build_large")
    plan = make_plan_value(EVEN, 3, NAMES, model=model)
    command = compare(plan, make_measurement_value(plan, UNEVEN)).verdict.command
    assert command == "plan --gpus 2 'my model;rm.py:build_large' --batch-size 3 --fresh"


def test_wrong_costs_are_corrected_from_the_run_that_showed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan, file = make_plan_value(EVEN, 3, NAMES), Path("my runs/measurement.json")
    assert to_plan_from(file, "model") == ""
    Path("model.profile.json").touch()
    verdict = compare(plan, make_measurement_value(plan, UNEVEN), to_plan_from(file, "model")).verdict
    assert verdict.command == "plan --from-measurement 'my runs/measurement.json'"
    assert "so plan from what was measured" in verdict.advice


def test_clocks_are_told_in_words() -> None:
    plan = sample_plan()
    measurement = sample_measurement(plan)
    simulated = "thread CPU time, step simulated from measured stage times"
    assert compare(plan, measurement).clock_words == f"{simulated} because 4 workers share 2 cores"
    enough = replace(measurement, machine=replace(measurement.machine, num_devices=8))
    assert compare(plan, enough).clock_words == simulated
    wall = replace(measurement, clock="cuda-event", step_clock="wall")
    assert compare(plan, wall).clock_words == "CUDA events, step by the wall clock"


def test_alternatives_are_compared_with_the_plan() -> None:
    plan = sample_plan()
    alternatives = {other.label: other for other in compare(plan, sample_measurement(plan)).alternatives}
    assert alternatives["equal layers"].change == pytest.approx(0.24)
    assert alternatives["accelerate"].same_cuts
    assert not alternatives["torchgpipe"].same_cuts
