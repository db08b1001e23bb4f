"""The Chrome trace of a step, held to the simulation that it draws."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from planner.errors import UsageError
from planner.scheduling.simulation import StageTimes, critical_path, simulate
from runner.comparing import compare
from runner.reporting.chrome_trace import Track, render_chrome_trace, render_predicted_trace, render_step_trace
from tests.sample_values import MEASURED, PREDICTED, make_measurement_value, make_plan_value, sample_plan

EIGHTH = 0.125
PLANNED = (StageTimes(1.0101, 2.0203, 1.9, 0.5), StageTimes(1.5, 3.0001, 2.7, 0.2), StageTimes(0.7, 1.1, 1.1, 0.0))
RUN = (StageTimes(1.2, 2.1, 2.0, 0.6), StageTimes(1.3, 3.3333, 3.0, 0.1), StageTimes(0.9, 1.0, 0.9, 0.3))


def traced(schedule: str = "gpipe", num_microbatches: int = 5) -> dict[str, Any]:
    """The trace of a step that was planned as PLANNED and ran as RUN."""
    plan = replace(make_plan_value(PLANNED, num_microbatches, [["a", "b"], ["c"], ["d"]]), schedule=schedule)
    measurement = replace(make_measurement_value(plan, RUN), schedule=schedule)
    return json.loads(render_chrome_trace(compare(plan, measurement)))


def tasks(trace: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Complete events by (process, thread), in order of time."""
    rows = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append(event)
    return {row: sorted(events, key=lambda event: event["ts"]) for row, events in rows.items()}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_every_task_lies_where_the_simulation_has_it(schedule: str) -> None:
    rows = tasks(traced(schedule))
    assert set(rows) == {(stage, thread) for stage in range(3) for thread in (0, 1)}
    for thread, times in ((0, PLANNED), (1, RUN)):
        step = simulate(times, 5, schedule)
        critical = critical_path(step)
        for stage in range(3):
            expected = [task for task in step.tasks if task.stage == stage]
            for event, task in zip(rows[stage, thread], sorted(expected, key=lambda task: task.start_ms), strict=True):
                name = "optimizer" if task.kind == "optimizer" else f"{task.kind} mb {task.microbatch}"
                assert event["name"] == name
                assert event["ts"] == pytest.approx(task.start_ms * 1e3, abs=EIGHTH)
                assert event["dur"] == pytest.approx((task.end_ms - task.start_ms) * 1e3, abs=EIGHTH)
                assert event["args"]["critical_path"] == (task in critical)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_tracks_do_not_overlap_and_add_up_to_the_stages_times(schedule: str) -> None:
    for (stage, thread), events in tasks(traced(schedule)).items():
        for before, after in pairwise(events):
            assert before["ts"] + before["dur"] <= after["ts"]
        times = (PLANNED, RUN)[thread][stage]
        busy = 5 * times.forward_ms + 4 * times.backward_ms + times.backward_first_ms + times.optimizer_ms
        assert sum(event["dur"] for event in events) == pytest.approx(busy * 1e3, abs=len(events) * EIGHTH)


def test_neighbours_do_not_overlap_however_a_viewer_rounds_to_nanoseconds() -> None:
    """Viewers keep whole nanoseconds; times that are no such multiples would overlap now and then."""
    times = [StageTimes(1 / 3, 2 / 3, 0.6180339887, 0.1)] * 4
    plan = make_plan_value(times, 64, [["a"], ["b"], ["c"], ["d"]])
    for events in tasks(json.loads(render_predicted_trace(plan))).values():
        for before, after in pairwise(events):
            assert (before["ts"] + before["dur"]) * 1000 <= int(after["ts"] * 1000)
            assert (after["ts"] * 1000).is_integer() and (after["dur"] * 1000).is_integer()


def test_the_critical_path_is_as_long_as_the_step() -> None:
    trace = traced()
    for thread, length in ((0, "predicted_step_ms"), (1, "measured_step_ms")):
        events = [event for row, found in tasks(trace).items() for event in found if row[1] == thread]
        critical = [event for event in events if event["args"]["critical_path"]]
        assert 0 < len(critical) < len(events)
        assert sum(e["dur"] for e in critical) == pytest.approx(trace["otherData"][length] * 1e3, abs=2)
        assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(trace["otherData"][length] * 1e3, abs=EIGHTH)


def test_stages_and_tracks_are_named_and_in_order() -> None:
    metadata = [event for event in traced()["traceEvents"] if event["ph"] == "M"]
    found = {(event["name"], event["pid"], event["tid"]): next(iter(event["args"].values())) for event in metadata}
    for stage, begins_at in enumerate(("a", "c", "d")):
        assert found["process_name", stage, 0] == f"stage {stage}"
        assert found["process_sort_index", stage, 0] == stage
        assert found["process_labels", stage, 0] == f"begins at {begins_at}"
        assert [found["thread_name", stage, thread] for thread in (0, 1)] == ["predicted", "measured"]


def test_the_trace_of_one_step_has_its_length_as_the_plugins_step() -> None:
    plan = sample_plan()
    report = compare(plan, make_measurement_value(plan, MEASURED))
    trace = json.loads(render_step_trace(Track("measured", report.measured), report.stages))
    steps = [event for event in trace["traceEvents"] if event["name"] == "ProfilerStep#0"]
    assert [event["dur"] for event in steps] == [pytest.approx(simulate(MEASURED, 16).step_ms * 1e3, abs=EIGHTH)]
    assert steps[0]["pid"] not in range(4)
    assert all(event["cat"] == "user_annotation" for event in trace["traceEvents"] if event["ph"] == "X")
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == 1 + 4 * (2 * 16 + 1)


def test_a_plan_alone_shows_what_it_predicts() -> None:
    plan = make_plan_value(PREDICTED, 4, [["a"], ["b"], ["c"], ["d"]])
    trace = json.loads(render_predicted_trace(plan))
    assert {thread for _, thread in tasks(trace)} == {0}
    assert trace["otherData"]["predicted_step_ms"] == pytest.approx(plan.step_ms)
    with pytest.raises(UsageError, match="no schedule"):
        render_predicted_trace(replace(plan, schedule=None, step_ms=None))
