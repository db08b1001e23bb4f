"""Predicted and measured step → a Chrome trace (JSON) for Perfetto, chrome://tracing and TensorBoard's profiler plugin.

A process per stage. In the trace of both steps a stage has two tracks, on one time scale:

    stage 0    predicted   | forward mb 0 | forward mb 1 |        | backward mb 0 | backward mb 1 | optimizer |
               measured    | forward mb 0  | forward mb 1  |        | backward mb 0  | …
    stage 1    predicted

The format is Google's "Trace Event Format"; times are in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.files.plan_file import Plan
from planner.rendering import model_title
from planner.scheduling.simulation import StageTimes, Task, critical_path, simulate
from runner.comparing import BalanceReport, ComparedStage, Timeline

# The plugin reads any other category as an operator of the model; Perfetto shows this one as it stands.
_CATEGORY = "user_annotation"
# Reserved names of chrome://tracing's and the plugin's palette; Perfetto chooses its own colours by the event's name.
_COLOURS = {"forward": "thread_state_running", "backward": "thread_state_runnable", "optimizer": "rail_response"}

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Track:
    """One step as a row per stage."""

    name: str
    timeline: Timeline


def render_chrome_trace(report: BalanceReport) -> str:
    """The predicted and the measured step of `report` as JSON: process = stage, thread 0 predicted, 1 measured.

    Both are simulated from the stages' times by the plan's schedule, so they show what the report's Gantt shows.
    Every task is an event with `args.critical_path`; the steps' lengths are in `otherData`.
    """
    tracks = [Track("predicted", report.predicted), Track("measured", report.measured)]
    about = {
        "title": report.title,
        "schedule": report.schedule,
        "num_microbatches": report.num_microbatches,
        "microbatch_size": report.microbatch_size,
        "predicted_step_ms": report.predicted.step_ms,
        "measured_step_ms": report.measured.step_ms,
        "clock": report.clock_words,
    }
    return _dump(_rows(_begins(report.stages), ["predicted", "measured"]) + _task_events(tracks), about)


def render_predicted_trace(plan: Plan) -> str:
    """The step that `plan` predicts as JSON. Raises UsageError for a plan that has no schedule."""
    timeline = predicted_timeline(plan)
    about = {
        "title": model_title(plan),
        "schedule": plan.schedule,
        "num_microbatches": plan.num_microbatches,
        "microbatch_size": plan.microbatch_size,
        "predicted_step_ms": timeline.step_ms,
    }
    begins = [stage.names[0] if stage.names else "" for stage in plan.stages]
    return _dump(_rows(begins, ["predicted"]) + _task_events([Track("predicted", timeline)]), about)


def render_step_trace(track: Track, stages: Sequence[ComparedStage]) -> str:
    """One step as JSON for TensorBoard's profiler plugin, whose Overview shows the length of the event ProfilerStep#0.

    The plugin shows one file at a time, so predicted and measured are a file each.
    """
    events = _rows(_begins(stages), [track.name]) + _task_events([track])
    events.append(_metadata("process_name", len(stages), {"name": f"{track.name} step"}))
    events.append(_metadata("process_sort_index", len(stages), {"sort_index": -1}))
    events.append(_complete("ProfilerStep#0", len(stages), 0, (0.0, track.timeline.step_ms), {}))
    return _dump(events, {"track": track.name, "step_ms": track.timeline.step_ms}, schemaVersion=1, deviceProperties=[])


def predicted_timeline(plan: Plan) -> Timeline:
    """The step of the plan's schedule, simulated from its stages' times. Raises UsageError where it has none."""
    plan.scheduled_step_ms()
    times = [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in plan.stages]
    step = simulate(times, plan.num_microbatches, plan.schedule or "gpipe")
    return Timeline(step.step_ms, step.tasks, critical_path(step))


def task_name(task: Task) -> str:
    """What a task is called in a trace.

    >>> task_name(Task(1, "forward", 3, 0.0, 1.0)), task_name(Task(1, "optimizer", -1, 5.0, 6.0))
    ('forward mb 3', 'optimizer')
    """
    return "optimizer" if task.kind == "optimizer" else f"{task.kind} mb {task.microbatch}"


def _begins(stages: Sequence[ComparedStage]) -> list[str]:
    return [stage.begins_at for stage in stages]


def _rows(begins: Sequence[str], tracks: Sequence[str]) -> list[Event]:
    """The names and the order of processes (a stage, and where it begins) and of their threads."""
    events = []
    for stage, begins_at in enumerate(begins):
        events.append(_metadata("process_name", stage, {"name": f"stage {stage}"}))
        if begins_at:
            events.append(_metadata("process_labels", stage, {"labels": f"begins at {begins_at}"}))
        events.append(_metadata("process_sort_index", stage, {"sort_index": stage}))
        for thread, name in enumerate(tracks):
            events.append(_metadata("thread_name", stage, {"name": name}, thread))
            events.append(_metadata("thread_sort_index", stage, {"sort_index": thread}, thread))
    return events


def _metadata(kind: str, process: int, values: dict[str, Any], thread: int = 0) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": values}


def _task_events(tracks: Sequence[Track]) -> list[Event]:
    events = []
    for thread, track in enumerate(tracks):
        critical = frozenset(track.timeline.critical)
        for task in track.timeline.tasks:
            arguments: dict[str, Any] = {"critical_path": task in critical, "step": track.name}
            if task.kind != "optimizer":
                arguments["microbatch"] = task.microbatch
            times = (task.start_ms, task.end_ms)
            events.append(_complete(task_name(task), task.stage, thread, times, arguments, _COLOURS[task.kind]))
    return events


def _complete(
    name: str, process: int, thread: int, times_ms: tuple[float, float], arguments: dict[str, Any], colour: str = ""
) -> Event:
    start, end = (_microseconds(ms) for ms in times_ms)
    event = {"ph": "X", "name": name, "cat": _CATEGORY, "pid": process, "tid": thread, "ts": start, "dur": end - start}
    return {**event, **({"cname": colour} if colour else {}), "args": arguments}


def _microseconds(ms: float) -> float:
    """To the next eighth of a microsecond: exact in binary, so that a viewer's rounding lets no neighbours overlap.

    >>> _microseconds(1.0), _microseconds(0.0001)
    (1000.0, 0.125)
    """
    return round(ms * 8e3) / 8


def _dump(events: list[Event], about: dict[str, Any], **more: Any) -> str:
    document = {**more, "displayTimeUnit": "ms", "otherData": about, "traceEvents": events}
    return json.dumps(document, allow_nan=False) + "\n"
