"""Tasks → the Gantt of a step as SVG: predicted above measured on one time scale, bubbles and critical path visible."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from planner.rendering import format_ms
from planner.scheduling.simulation import Task
from runner.reporting.svg import drawing, line, rect, text, tick_label, ticks

WIDTH, LEFT, RIGHT = 980.0, 62.0, 12.0
LEGEND, HEADING, AXIS, GAP = 24.0, 22.0, 24.0, 14.0
_DIGIT_WIDTH, _OUTLINED_WIDTH = 5.8, 7.0


@dataclass(frozen=True, slots=True)
class Lane:
    """One step to draw: its heading, its tasks, and those of them that are on the critical path."""

    heading: str
    tasks: Sequence[Task]
    critical: Collection[Task] = ()


def gantt_chart(lanes: Sequence[Lane], num_stages: int) -> str:
    """The lanes one above the other, all on the scale of the longest; a row per stage, a rectangle per task.

    What is left empty in a row is the stage's bubble. Width 980 units; the height follows the number of stages.
    """
    end_ms = max((task.end_ms for lane in lanes for task in lane.tasks), default=0.0)
    scale = (WIDTH - LEFT - RIGHT) / end_ms if end_ms > 0 else 0.0
    row = 22.0 if num_stages <= 8 else 15.0
    lane_height = HEADING + num_stages * row + GAP
    tops = [LEGEND + index * lane_height for index in range(len(lanes))]
    height = LEGEND + len(lanes) * lane_height + AXIS
    elements = _legend()
    last = max((task.microbatch for lane in lanes for task in lane.tasks), default=0)
    room = _DIGIT_WIDTH * len(str(last)) + 2
    for lane, top in zip(lanes, tops, strict=True):
        elements += _lane(lane, top, num_stages, row, scale)
        elements += _numbers(lane, top, row, scale, room)
    elements += _axis(end_ms, scale, [(top + HEADING, num_stages * row) for top in tops], height)
    headings = " and ".join(lane.heading for lane in lanes)
    label = f"Timeline of one step over {num_stages} stages: {headings}; the longest ends at {format_ms(end_ms)}"
    return drawing(WIDTH, height, label, elements)


def _legend() -> list[str]:
    elements, x = [], LEFT
    entries = (
        ("forward", "forward"),
        ("backward", "backward"),
        ("optimizer", "optimizer"),
        ("empty", "idle (bubble)"),
        ("empty critical", "critical path"),
    )
    for style, label in entries:
        elements += [rect(x, 3, 12, 12, style), text(x + 18, 13, label, "soft")]
        x += 42 + 6.4 * len(label)
    return elements


def _lane(lane: Lane, top: float, num_stages: int, row: float, scale: float) -> list[str]:
    elements = [text(LEFT, top + 14, lane.heading, "strong")]
    end_ms = max((task.end_ms for task in lane.tasks), default=0.0)
    for stage in range(num_stages):
        y = top + HEADING + stage * row
        elements.append(text(LEFT - 8, y + row / 2 + 4, f"stage {stage}", "soft end"))
        elements.append(rect(LEFT, y + 1, end_ms * scale, row - 2, "empty"))
    critical = frozenset(lane.critical)
    for task in sorted(lane.tasks, key=lambda task: task in critical):
        elements.append(_task(task, top + HEADING + task.stage * row + 1, row - 2, scale, task in critical))
    return elements


def _task(task: Task, y: float, height: float, scale: float, critical: bool) -> str:
    """The rectangle of a task; hovering says what it is and when."""
    which = "optimizer" if task.kind == "optimizer" else f"{task.kind} of microbatch {task.microbatch}"
    times = f"{task.start_ms:,.2f} to {task.end_ms:,.2f} ms ({format_ms(task.end_ms - task.start_ms)})"
    title = f"stage {task.stage}, {which}: {times}{', on the critical path' if critical else ''}"
    x, width = LEFT + task.start_ms * scale, (task.end_ms - task.start_ms) * scale
    thin = " thin" if width < _OUTLINED_WIDTH else ""
    return rect(x, y, width, height, f"task {task.kind}{thin}{' critical' if critical else ''}", title)


def _numbers(lane: Lane, top: float, row: float, scale: float, room: float) -> list[str]:
    """The microbatch on every task that is wide enough for the longest number."""
    return [
        text(
            LEFT + (task.start_ms + task.end_ms) / 2 * scale,
            top + HEADING + task.stage * row + row / 2 + 3.5,
            str(task.microbatch),
            f"on-{task.kind} middle",
        )
        for task in lane.tasks
        if task.kind != "optimizer" and (task.end_ms - task.start_ms) * scale >= room
    ]


def _axis(end_ms: float, scale: float, bands: Sequence[tuple[float, float]], height: float) -> list[str]:
    elements = []
    for tick in ticks(0.0, end_ms, 8):
        x = LEFT + tick * scale
        elements += [line(x, top, x, top + size, "tick") for top, size in bands]
        elements.append(text(x, height - 10, tick_label(tick), "soft middle"))
    elements.append(text(LEFT - 8, height - 10, "ms", "soft end"))
    return elements
