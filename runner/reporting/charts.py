"""The small charts of the report as SVG: balance, steps of other cuts, memory, the microbatch curve, the loss.

Each is 460 units wide, so that it stays readable in one column on a phone. Values stand beside the marks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.files.measurement_file import StepRecord
from planner.files.plan_file import CurvePoint, Stage, StageMemory
from planner.rendering import format_bytes, format_ms, format_percent
from runner.comparing import BalanceReport, ComparedStage
from runner.reporting.svg import dot, drawing, fitted, line, polyline, rect, text, tick_label, ticks

WIDTH = 460.0
_TOP, _BOTTOM = 30.0, 34.0
_MEMORY_PARTS = (
    ("parameters", "a"),
    ("gradients", "b"),
    ("optimizer", "c"),
    ("saved", "d"),
    ("working", "e"),
    ("reserved", "f"),
)


def balance_chart(stages: Sequence[ComparedStage], scale: float) -> str:
    """Per stage two bars, forward and backward stacked: predicted (pale, times `scale`) and measured; dashed the mean.

    Predicted loads are drawn after the one scale factor, so that what differs is the balance.
    """
    left, right = 64.0, 66.0
    predicted = [(s.forward.predicted_ms * scale, s.backward.predicted_ms * scale) for s in stages]
    measured = [(s.forward.measured_ms, s.backward.measured_ms) for s in stages]
    largest = max((f + b for f, b in (*predicted, *measured)), default=0.0)
    unit = (WIDTH - left - right) / largest if largest > 0 else 0.0
    elements = _legend([("forward", "forward"), ("backward", "backward"), ("plain pale", "pale: predicted × scale")])
    row = 36.0
    for stage, before, after in zip(stages, predicted, measured, strict=True):
        y = _TOP + stage.index * row
        elements.append(text(left - 8, y + 19, f"stage {stage.index}", "soft end"))
        for offset, height, (forward, backward), pale, what in (
            (2.0, 9.0, before, " pale", "predicted × scale"),
            (12.0, 14.0, after, "", "measured"),
        ):
            title = f"stage {stage.index} {what}: forward {format_ms(forward)}, backward {format_ms(backward)}"
            elements.append(rect(left, y + offset, forward * unit, height, f"forward{pale}", title))
            elements.append(rect(left + forward * unit, y + offset, backward * unit, height, f"backward{pale}", title))
        elements.append(text(WIDTH, y + 23, format_ms(sum(after)), "end"))
    bottom = _TOP + len(stages) * row
    mean = sum(f + b for f, b in measured) / max(1, len(measured))
    elements.append(line(left + mean * unit, _TOP - 2, left + mean * unit, bottom, "mark"))
    elements.append(text(max(left + mean * unit, 110.0), bottom + 14, f"mean {format_ms(mean)}", "soft end"))
    label = "Load per microbatch of each stage, predicted and measured; measured: " + ", ".join(
        f"stage {stage.index} {format_ms(sum(after))}" for stage, after in zip(stages, measured, strict=True)
    )
    return drawing(WIDTH, bottom + 22, label, elements)


def steps_chart(report: BalanceReport) -> str:
    """Before and after: the step of every other cut on predicted costs, and of this plan, predicted and measured."""
    bars = [(other.label, other.step_ms, "plain pale", other.same_cuts) for other in report.alternatives]
    bars.sort(key=lambda bar: -bar[1])
    step = report.step_ms
    bars.append(("this plan", step.predicted, "forward pale", False))
    bars += [("measured", step.measured, "forward", False), ("ideal", step.ideal, "optimizer", False)]
    left, right, row = 126.0, 112.0, 27.0
    largest = max(value for _, value, _, _ in bars)
    unit = (WIDTH - left - right) / largest if largest > 0 else 0.0
    entries = [
        ("plain pale", "other cuts, predicted"),
        ("forward pale", "this plan, predicted"),
        ("forward", "measured"),
    ]
    elements = _legend(entries)
    for index, (name, value, style, same) in enumerate(bars):
        y = _TOP + index * row
        against = value / step.predicted - 1 if step.predicted > 0 else None
        change = "same cuts" if same else "" if name in ("this plan", "ideal") else format_percent(against, signed=True)
        elements.append(text(left - 8, y + 16, fitted(name, left - 16), "end strong" if name == "this plan" else "end"))
        elements.append(rect(left, y + 3, value * unit, 18, style, f"{name}: {format_ms(value)}"))
        elements.append(text(left + value * unit + 6, y + 16, format_ms(value)))
        elements.append(text(WIDTH, y + 16, change, "soft end"))
    label = "Step times: " + ", ".join(f"{name} {format_ms(value)}" for name, value, _, _ in bars)
    return drawing(WIDTH, _TOP + len(bars) * row + 6, label, elements)


def memory_chart(stages: Sequence[ComparedStage], planned: Sequence[Stage]) -> str | None:
    """Peak memory per stage: predicted, stacked by part where the plan knows parts, and measured. None without any.

    On a GPU it is what is gone of the device: the parts contain what is reserved there.
    """
    stages = [_with_reserves(stage) for stage in stages]
    peaks = [peak for s in stages for peak in (s.predicted_peak_bytes, s.measured_peak_bytes) if peak is not None]
    if not peaks:
        return None
    left, right, row = 64.0, 76.0, 36.0
    totals = [sum(_parts(stage.memory).values()) for stage in planned if stage.memory is not None]
    unit = (WIDTH - left - right) / max(1, *peaks, *totals)
    entries = [(style, name) for name, style in _MEMORY_PARTS] if totals else []
    if not totals and any(stage.predicted_peak_bytes is not None for stage in stages):
        entries.append(("plain pale", "predicted"))
    entries.append(("plain", "measured"))
    elements, top = _legend(entries), _TOP + (18 if len(entries) > 4 else 0)
    for stage, plan in zip(stages, planned, strict=True):
        y = top + stage.index * row
        elements.append(text(left - 8, y + 19, f"stage {stage.index}", "soft end"))
        end = left
        for name, style, size in _memory_bars(stage, plan):
            title = f"stage {stage.index} predicted, {name}: {format_bytes(size)}"
            elements.append(rect(end, y + 2, size * unit, 12, style, title))
            end += size * unit
        if stage.measured_peak_bytes is not None:
            size, title = stage.measured_peak_bytes, f"stage {stage.index} measured: "
            below = y + (16 if end > left else 9)
            elements.append(rect(left, below, size * unit, 12, "plain", title + format_bytes(size)))
            elements.append(text(WIDTH, below + 11, format_bytes(size), "end"))
        if stage.predicted_peak_bytes is not None:
            elements.append(text(WIDTH, y + 12, format_bytes(stage.predicted_peak_bytes), "soft end"))
    pairs = [(format_bytes(s.predicted_peak_bytes), format_bytes(s.measured_peak_bytes)) for s in stages]
    label = "Peak memory: " + ", ".join(f"stage {i} predicted {p}, measured {m}" for i, (p, m) in enumerate(pairs))
    return drawing(WIDTH, top + len(stages) * row + 4, label, elements)


def _with_reserves(stage: ComparedStage) -> ComparedStage:
    if stage.measured_device_bytes is None:
        return stage
    return replace(
        stage, predicted_peak_bytes=stage.predicted_device_bytes, measured_peak_bytes=stage.measured_device_bytes
    )


def _parts(memory: StageMemory) -> dict[str, int]:
    return {name: int(getattr(memory, name)) for name, _ in _MEMORY_PARTS}


def _memory_bars(stage: ComparedStage, planned: Stage) -> list[tuple[str, str, int]]:
    if planned.memory is not None:
        sizes = _parts(planned.memory)
        return [(name, style, sizes[name]) for name, style in _MEMORY_PARTS]
    if stage.predicted_peak_bytes is not None:
        return [("all", "plain pale", stage.predicted_peak_bytes)]
    return []


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where data points lie on a chart with two axes."""

    left: float
    top: float
    right: float
    bottom: float
    low: tuple[float, float]
    high: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a data point; the middle where an axis has no extent."""
        return (
            self.left + _share(x, self.low[0], self.high[0]) * (self.right - self.left),
            self.bottom - _share(y, self.low[1], self.high[1]) * (self.bottom - self.top),
        )


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def microbatch_chart(points: Sequence[CurvePoint], chosen: int) -> str | None:
    """The best step for every microbatch count, from 0 ms up; `chosen` is marked. None without points."""
    shown = sorted(points, key=lambda point: point.num_microbatches)
    if not shown:
        return None
    height = 220.0
    top = max(ticks(0.0, max(point.step_ms for point in shown) * 1.25, 4))
    frame = _Frame(52, 22, WIDTH - 4, height - _BOTTOM - 6, (-0.4, 0.0), (len(shown) - 0.6, top))
    elements = _horizontal_axis(frame, "step ms")
    places = [frame.at(index, point.step_ms) for index, point in enumerate(shown)]
    elements.append(polyline(places))
    for (x, y), point in zip(places, shown, strict=True):
        own = point.num_microbatches == chosen
        style = "middle strong" if own else "middle soft"
        title = f"{point.num_microbatches} microbatches of {point.microbatch_size}: {format_ms(point.step_ms)}"
        elements.append(dot(x, y, "chosen" if own else "forward", f"{title}, {point.status}", 5 if own else 3.5))
        if len(shown) <= 6 or own:
            elements.append(text(x, y - 10, format_ms(point.step_ms), style))
        if len(shown) <= 12 or own:
            elements.append(text(x, height - 24, str(point.num_microbatches), style))
    elements.append(text((frame.left + frame.right) / 2, height - 6, "microbatches per step", "soft middle"))
    label = "Step by microbatch count: " + ", ".join(f"{p.num_microbatches}: {format_ms(p.step_ms)}" for p in shown)
    return drawing(WIDTH, height, f"{label}; chosen {chosen}", elements)


def loss_chart(records: Sequence[StepRecord], reference: float | None, reference_name: str) -> str | None:
    """The loss of every step, and a dashed line at `reference`. None where no step has a finite loss."""
    shown = [record for record in records if math.isfinite(record.loss)]
    if not shown:
        return None
    height = 220.0
    levels = [record.loss for record in shown] + ([reference] if reference is not None else [])
    margin = (max(levels) - min(levels)) * 0.08 or abs(levels[0]) * 0.05 or 1.0
    low, high = (float(shown[0].step), min(levels) - margin), (float(shown[-1].step), max(levels) + margin)
    frame = _Frame(52, 22, WIDTH - 16, height - _BOTTOM - 6, low, high)
    elements = _horizontal_axis(frame, "loss")
    if reference is not None:
        y = frame.at(low[0], reference)[1]
        elements.append(line(frame.left, y, frame.right, y, "mark"))
        name = fitted(f"{reference_name or 'reference'} {reference:.4g}", frame.right - frame.left)
        elements.append(text(frame.right, y - 5, name, "soft end"))
    places = [frame.at(record.step, record.loss) for record in shown]
    elements.append(polyline(places))
    for (x, y), record in zip(places, shown, strict=True):
        title = f"step {record.step}: loss {record.loss:.4g}, gradient norm {record.gradient_norm:.3g}"
        elements.append(dot(x, y, "forward", title, 2.6 if len(shown) <= 60 else 1.2))
    for tick in ticks(low[0], high[0], 6):
        if tick == round(tick):
            elements.append(text(frame.at(tick, low[1])[0], height - 24, tick_label(tick), "soft middle"))
    elements.append(text((frame.left + frame.right) / 2, height - 6, "step", "soft middle"))
    label = f"Loss from {shown[0].loss:.4g} at step {shown[0].step} to {shown[-1].loss:.4g} at step {shown[-1].step}"
    return drawing(WIDTH, height, label, elements)


def _horizontal_axis(frame: _Frame, name: str) -> list[str]:
    """Horizontal rules at round values, labelled, and the name of the axis above them."""
    elements = [text(0, frame.top - 10, name, "soft")]
    for tick in ticks(frame.low[1], frame.high[1], 4):
        y = frame.at(frame.low[0], tick)[1]
        elements += [line(frame.left, y, frame.right, y), text(frame.left - 8, y + 4, tick_label(tick), "soft end")]
    return elements


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Swatches with their names, in as many lines as they need."""
    elements, x, y = [], 0.0, 0.0
    for style, name in entries:
        width = 30 + 6.4 * len(name)
        if x + width > WIDTH:
            x, y = 0.0, y + 18
        elements += [rect(x, y + 2, 11, 11, style), text(x + 16, y + 12, name, "soft")]
        x += width
    return elements
