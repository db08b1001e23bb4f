"""Intervals of predictions: exact on an exact clock, 90 % where the noise is known, and what is shown of them."""

from dataclasses import replace
from math import hypot
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from planner import intervals
from planner.errors import FileError
from planner.files.plan_file import Plan
from planner.files.profile_file import LayerProfile, Machine, ModelReference, Profile, SizeProfile, TensorProfile
from planner.files.reading import decode, encode
from planner.intervals import (
    Uncertainty,
    machine_uncertainty,
    profile_drift,
    student_quantile,
    uncertainty_of,
    with_intervals,
    with_repeat,
)
from planner.measuring import remember
from planner.planning import plan_profile
from planner.profiling.timing import summarise
from planner.rendering import render_plan
from planner.request import PlanRequest
from planner.scheduling.simulation import StageTimes
from runner.comparing import compare
from runner.drift import note_drift
from runner.reporting.terminal import render_report
from tests.sample_values import make_measurement_value
from tests.test_timing import measure
from tests.working_clock import Layer

MACHINE = Machine("cpu", "a clock", 1, {})
QUANTILE = 1.6448536


def layer(index: int, forward: tuple[float, float], backward: tuple[float, float]) -> LayerProfile:
    return LayerProfile(
        str(index), str(index), "Linear", index, *forward, *backward, backward[0], 0.0, 8, (), plain_cut=True
    )


def profile(layers: list[LayerProfile], drifts: tuple[float, ...] = (0.0,), repeats: tuple[float, ...] = ()) -> Profile:
    sizes = tuple(SizeProfile(2**i, f"trace {i}", tuple(layers), (), (), drift) for i, drift in enumerate(drifts))
    model = ModelReference(None, "model")
    return Profile(model, MACHINE, "fp32", 4, 15, 0.0, 1, sizes, repeats=repeats)


def planned(of: Profile, microbatches: int = 4) -> Plan:
    return plan_profile(of, PlanRequest(2, microbatches=microbatches))


@pytest.fixture
def exact_sums(monkeypatch: pytest.MonkeyPatch):
    """Layers add up to stages without an error of their own."""
    monkeypatch.setattr(intervals, "MODEL_DEVIATION", 0.0)


@pytest.mark.usefixtures("exact_sums")
def test_without_noise_the_interval_is_nothing():
    plan = planned(profile([layer(i, (1.0 + i, 0.0), (2.0, 0.0)) for i in range(4)]))
    assert plan.step_interval_ms == 0.0
    assert {stage.load_interval_ms for stage in plan.stages} == {0.0}


@pytest.mark.parametrize(("profiled", "schedule"), [("gpipe", "1f1b"), ("1f1b", "gpipe")])
def test_under_another_schedule_than_the_profiles_a_prediction_is_less_sure_and_says_so(profiled, schedule):
    of = profile([layer(i, (4.0, 0.0), (6.0, 0.0)) for i in range(3)])

    def under(which):
        known = replace(of, schedule=which)
        plan = plan_profile(known, PlanRequest(2, microbatches=4, schedule=schedule))
        return plan, render_plan(plan, known)

    (same, text), (other, warned), (unknown, plain) = (under(which) for which in (schedule, profiled, None))
    assert unknown.stages == same.stages and "profiled in 0.0 s" in text and "profiled in 0.0 s" in plain
    assert f"profiled under {profiled} in 0.0 s" in warned and f"times under {schedule} may differ" in warned
    factor = hypot(intervals.MODEL_DEVIATION, intervals.OTHER_SCHEDULE_DEVIATION[0]) / intervals.MODEL_DEVIATION
    for before, after in zip(same.stages, other.stages, strict=True):
        assert after.forward_interval_ms == pytest.approx(before.forward_interval_ms * factor)
        assert before.backward_interval_ms < after.backward_interval_ms < before.backward_interval_ms * factor
    assert other.step_interval_ms > same.step_interval_ms


def test_profiles_under_different_schedules_say_nothing_of_the_machine():
    of = profile([layer(0, (4.0, 0.0), (6.0, 0.0))])
    gpipe, other, unknown = (replace(of, schedule=schedule) for schedule in ("gpipe", "1f1b", None))
    assert profile_drift(gpipe, other) is None
    assert profile_drift(gpipe, gpipe) == profile_drift(unknown, other) == 0.0


def test_sums_of_layers_and_boundaries_are_not_quite_stages():
    exact = profile([layer(i, (4.0, 0.0), (6.0, 0.0)) for i in range(3)])
    tensors = tuple(TensorProfile(f"t{i}", i, (i + 1,), 8, 8) for i in range(2))
    size = replace(exact.sizes[0], tensors=tensors, boundary_forward_ms=0.2, boundary_backward_ms=0.3)
    plan = plan_profile(replace(exact, sizes=(size,)), PlanRequest(3, microbatches=4))
    model, boundary = intervals.MODEL_DEVIATION, intervals.BOUNDARY_DEVIATION
    for stage, boundaries in zip(plan.stages, (1, 2, 1), strict=True):
        forward = hypot(model * (4 + 0.2 * boundaries), boundary * 0.2 * boundaries)
        assert stage.forward_interval_ms == pytest.approx(QUANTILE * forward)
        backward = hypot(model * (6 + 0.3 * boundaries), boundary * 0.3 * boundaries)
        assert stage.load_interval_ms == pytest.approx(QUANTILE * hypot(forward, backward))


@pytest.mark.usefixtures("exact_sums")
def test_standard_errors_add_up_by_squares_and_drift_in_proportion():
    noisy = profile([layer(0, (4.0, 0.3), (6.0, 0.4)), layer(1, (5.0, 0.0), (5.0, 0.0))], (0.02,))
    plan = planned(noisy)
    assert machine_uncertainty([0.02]) == Uncertainty(pytest.approx(0.02 * 0.75**0.5), 1)
    relative = 6.313752 * 0.02 * 0.75**0.5
    first, second = plan.stages
    assert first.forward_interval_ms == pytest.approx(hypot(relative * 4, QUANTILE * 0.3))
    assert first.backward_interval_ms == pytest.approx(hypot(relative * 6, QUANTILE * 0.4))
    assert first.load_interval_ms == pytest.approx(hypot(relative * 10, QUANTILE * 0.5))
    assert second.load_interval_ms == pytest.approx(relative * 10)


@pytest.mark.usefixtures("exact_sums")
def test_the_steps_own_error_is_that_of_what_it_waits_for():
    exact = [layer(0, (4.0, 0.0), (6.0, 0.0)), layer(1, (1.0, 0.1), (1.0, 0.0))]
    plan = planned(profile(exact))
    assert plan.step_interval_ms == pytest.approx(QUANTILE * 0.1)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 10**6), st.floats(0.002, 0.05), st.floats(0.005, 0.2), st.integers(1, 5), st.sampled_from([3, 12])
)
def test_nine_of_ten_later_measurements_lie_inside(seed, drift, noise, num_sizes, num_layers):
    random, draws, inside = Random(seed), 1200, 0
    truth = [1.0 + index % 3 for index in range(num_layers)]
    error = noise * hypot(*truth) / 15**0.5 * 1.25
    for _ in range(draws):
        halves = [(random.gauss(0, drift), random.gauss(0, drift)) for _ in range(num_sizes)]
        predicted = sum(truth) * (1 + sum(halves[0]) / 2) + random.gauss(0, error)
        now = sum(truth) * (1 + random.gauss(0, drift))
        sure = machine_uncertainty([abs(b - a) for a, b in halves])
        inside += abs(now - predicted) <= sure.half_width_ms(predicted, error)
    assert 0.87 <= inside / draws <= (0.98 if num_sizes == 1 else 0.95)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.2), st.sampled_from([1, 4]))
def test_samples_alone_give_intervals_of_about_ninety_per_cent(seed, noise, num_layers):
    random, draws, inside = Random(seed), 2000, 0
    for _ in range(draws):
        found = [summarise([random.gauss(1.0, noise) for _ in range(45)]) for _ in range(num_layers)]
        predicted = sum(middle for middle, _ in found)
        half = Uncertainty(0.0, 0).half_width_ms(predicted, hypot(*(error for _, error in found)))
        inside += abs(num_layers - predicted) <= half
    assert 0.85 <= inside / draws <= 0.95


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 6.3138), (2, 2.9200), (3, 2.3534), (5, 2.0150), (30, 1.6973)])
def test_students_quantiles(degrees: int, quantile: float):
    assert student_quantile(degrees) == pytest.approx(quantile, rel=5e-3)


def test_more_periods_say_more_than_two_halves():
    assert machine_uncertainty([], [], [(-0.01, 0.01)]) == machine_uncertainty([0.02])
    several = machine_uncertainty([], [], [(-0.01, 0.01, -0.01, 0.01)])
    assert several == Uncertainty(pytest.approx(0.01 * (4 / 3 * 1.25) ** 0.5), 3)
    assert several.half_width_ms(1.0, 0.0) < machine_uncertainty([0.02]).half_width_ms(1.0, 0.0) / 2
    one = profile([layer(0, (4.0, 0.0), (6.0, 0.0))], (0.5,))
    seen = replace(one, sizes=(replace(one.sizes[0], periods=(-0.01, 0.01, -0.01, 0.01)),))
    assert uncertainty_of(seen) == several


def test_what_profiles_showed_at_different_times_is_the_floor():
    assert machine_uncertainty([0.001] * 4).deviation < 0.0011
    assert machine_uncertainty([0.001] * 4, [0.05]) == Uncertainty(pytest.approx(0.05), 5)
    assert machine_uncertainty([]).half_width_ms(5.0, 0.0) == 0.0


def test_a_second_profile_shows_the_drift_and_is_remembered(tmp_path: Path):
    before = profile([layer(0, (4.0, 0.1), (6.0, 0.1))], (0.01, 0.01))
    after = profile([layer(0, (4.4, 0.1), (6.6, 0.1))], (0.01, 0.01))
    assert profile_drift(before, after) == pytest.approx(0.1)
    assert profile_drift(after, before) == pytest.approx(-1 / 11)
    known = with_repeat(after, replace(before, repeats=(0.03,)))
    assert known.repeats == pytest.approx((0.03, 0.1))
    assert uncertainty_of(known).deviation > uncertainty_of(after).deviation
    before.save(tmp_path / "p.json")
    assert remember(after, tmp_path / "p.json").repeats == pytest.approx((0.1,))
    assert remember(after, tmp_path / "none.json") == after
    (tmp_path / "p.json").write_text("{", encoding="utf-8")
    assert remember(after, tmp_path / "p.json") == after


def test_profiles_of_other_machines_or_models_show_no_drift():
    one = profile([layer(0, (4.0, 0.1), (6.0, 0.1))])
    assert profile_drift(one, replace(one, machine=Machine("cpu", "another", 1, {}))) is None
    other = replace(one, sizes=(replace(one.sizes[0], fingerprint="another model"),))
    assert profile_drift(one, other) is None
    assert with_repeat(one, other) == one


def test_plus_minus_is_the_interval():
    noisy = profile([layer(0, (4.0, 0.3), (6.0, 0.4)), layer(1, (5.0, 0.1), (5.0, 0.1))], (0.02,))
    plan = planned(noisy)
    shown = render_plan(plan, noisy)
    assert "±90 %" in shown
    assert f"{plan.stages[0].forward_interval_ms:.2f}" in shown
    assert "(90 %)" in shown
    bare = [replace(s, forward_interval_ms=None, backward_interval_ms=None) for s in plan.stages]
    older = replace(plan, stages=tuple(bare), step_interval_ms=None)
    assert "90 %" not in render_plan(older, noisy)
    assert " ± " in render_plan(older, noisy)


def test_plans_without_intervals_load():
    plan = planned(profile([layer(0, (4.0, 0.3), (6.0, 0.4)), layer(1, (5.0, 0.1), (5.0, 0.1))]))
    data = encode(plan)
    for name in ("step_interval_ms", "estimated"):
        del data[name]
    for stage in data["stages"]:
        for name in ("forward_interval_ms", "backward_interval_ms", "load_interval_ms"):
            del stage[name]
    old = decode(Plan, data, "plan")
    assert old.step_interval_ms is None
    assert old.stages[0].load_interval_ms is None
    assert with_intervals(old, profile([layer(0, (4.0, 0.3), (6.0, 0.4))])) == plan


def measured(plan: Plan, factor: float):
    times = [StageTimes(s.forward_ms * factor, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in plan.stages]
    made = make_measurement_value(plan, times)
    stages = [
        replace(
            one,
            predicted=replace(
                one.predicted,
                forward_interval_ms=stage.forward_interval_ms,
                backward_interval_ms=stage.backward_interval_ms,
            ),
        )
        for one, stage in zip(made.stages, plan.stages, strict=True)
    ]
    return replace(made, stages=tuple(stages), step_ms=replace(made.step_ms, interval=plan.step_interval_ms))


def test_the_report_says_what_lies_inside():
    plan = planned(profile([layer(0, (4.0, 0.1), (6.0, 0.1)), layer(1, (5.0, 0.1), (5.0, 0.1))]))
    report = compare(plan, measured(plan, 1.0))
    assert report.inside == (5, 5)
    assert "5 of 5 times, raw, inside the 90 % interval" in " ".join(render_report(report).split())
    slow = compare(plan, measured(plan, 1.5))
    assert slow.inside == (2, 5)
    assert "outside: forward of stage 0, forward of stage 1, step" in " ".join(render_report(slow).split())
    bare = replace(plan, step_interval_ms=None)
    assert compare(bare, make_measurement_value(plan, [StageTimes(1, 1, 1, 0)] * 2)).inside is None


def test_a_drift_found_later_is_written_into_the_measurement(tmp_path: Path):
    before = profile([layer(0, (4.0, 0.1), (6.0, 0.1)), layer(1, (5.0, 0.1), (5.0, 0.1))])
    after = profile([layer(0, (4.4, 0.1), (6.6, 0.1)), layer(1, (5.5, 0.1), (5.5, 0.1))])
    plan = planned(before)
    measured(plan, 1.0).save(tmp_path / "measurement.json")
    assert note_drift(tmp_path, before, after).drift == pytest.approx(0.1)
    report = compare(plan, type(measured(plan, 1.0)).load(tmp_path / "measurement.json"))
    assert "drift of the machine +10 %" in " ".join(render_report(report).split())
    with pytest.raises(FileError, match="other models, machines, versions or sizes"):
        note_drift(tmp_path, before, replace(after, sizes=(replace(after.sizes[0], fingerprint="x"),)))


@pytest.mark.usefixtures("exact_sums")
def test_on_an_exact_clock_the_prediction_is_exact_and_so_is_its_interval():
    costs = [(1.0, 2.0), (4.0, 3.0), (2.5, 7.5), (3.0, 1.0)]
    pieces, samples = measure(nn.Sequential(*(Layer(*cost) for cost in costs)))
    layers = [
        layer(index, summarise(sample.forward_ms), summarise(sample.backward_ms))
        for index, sample in enumerate(samples)
    ]
    plan = planned(profile(layers))
    assert len(pieces.pieces) == len(costs)
    loss = (0.5, 0.25)
    for stage in plan.stages:
        last = loss if "3" in stage.nodes else (0.0, 0.0)
        assert stage.forward_ms == sum(costs[int(node)][0] for node in stage.nodes) + last[0]
        assert stage.backward_ms == sum(costs[int(node)][1] for node in stage.nodes) + last[1]
        assert (stage.forward_interval_ms, stage.backward_interval_ms, stage.load_interval_ms) == (0.0, 0.0, 0.0)
