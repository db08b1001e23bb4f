"""BalanceReport → the text that `run-plan` ends with: the verdict first, then the figures behind it."""

from __future__ import annotations

from collections.abc import Sequence

from planner.files.measurement_file import CheckResult, SpeedUp, StartTimes
from planner.rendering import (
    DASH,
    TableColumn,
    baseline_label,
    clean,
    counted,
    format_bytes,
    format_column,
    format_ms,
    format_percent,
    table_lines,
    wrap_text,
)
from planner.rendering.side_by_side import change
from runner.comparing import BalanceReport, ComparedTime

DEFAULT_WIDTH = 100
_LABEL_WIDTH = 12
CAPTION = "  ms per microbatch, medians; the error is that of a stage's share of the work"


def render_report(report: BalanceReport, width: int = DEFAULT_WIDTH) -> str:
    """The report as text, at most `width` columns wide where names and commands allow it."""
    verdict = report.verdict
    lines = wrap_text(f"{verdict.finding}; {verdict.advice}{':' if verdict.command else '.'}", width)
    lines += [f"  {verdict.command}"] if verdict.command else []
    lines += [
        "",
        *wrap_text(f"{clean(report.title)} · {setting_words(report)} · {clean(report.device_name)}", width),
        "",
        CAPTION,
        *table_lines(_columns(report), width),
        "",
    ]
    for label, text in figures(report):
        lines += labelled_lines(label, text, width)
    return "\n".join(lines)


def labelled_lines(label: str, text: str, width: int) -> list[str]:
    """A figure under its label, in lines of at most `width`."""
    wrapped = wrap_text(text, width - _LABEL_WIDTH - 2)
    return [f"  {label:<{_LABEL_WIDTH}}{wrapped[0]}", *(" " * (_LABEL_WIDTH + 2) + line for line in wrapped[1:])]


def figures(report: BalanceReport) -> list[tuple[str, str]]:
    """The figures of the whole run as (label, text); what was not measured is left out."""
    step = report.step_ms
    taken = "rehearsed" if report.rehearsed else "measured" if report.step_clock == "wall" else "from measured stages"
    found = [
        (
            "step",
            f"predicted {format_ms(step.predicted)} · {taken} {format_ms(step.measured)}"
            f" ({format_percent(report.step_error, signed=True)}) · ideal {format_ms(step.ideal)}",
        ),
        *(("computing", text) for text in [computing_words(report)] if text),
        ("bubble", _pair(format_percent(report.predicted_bubble), format_percent(report.measured_bubble))),
        (
            "balance",
            f"{_pair(_ratio(report.predicted_balance), _ratio(report.measured_balance))} (largest ÷ mean load)",
        ),
        *(("instead", text) for text in [_alternatives(report)] if text),
        *(("GPU memory", text) for text in [device_memory_words(report)] if text),
        *(("speed-up", speed_up_words(report.speed_up)) for _ in [0] if report.speed_up is not None),
        *(("check", check_words(report.check)) for _ in [0] if report.check is not None),
        *(("loss", text) for text in [loss_words(report)] if text),
        ("scale", scale_words(report)),
        *(("intervals", text) for text in [interval_words(report)] if text),
        ("clock", report.clock_words),
        *(("start", start_words(report.start)) for _ in [0] if report.start is not None),
    ]
    return found


def computing_words(report: BalanceReport) -> str:
    """What of a step by the wall clock its stages account for, and what is left; empty where the step was simulated."""
    if report.step_clock != "wall" or report.rehearsed:
        return ""
    stages, whole = report.measured.step_ms, report.step_ms.measured
    words = f"the measured stages alone make a step of {format_ms(stages)} ({change(report.step_ms.predicted, stages)})"
    if whole <= stages:
        return words
    rest = f"{format_ms(whole - stages)}, {format_percent(1 - stages / whole)} of the step"
    return f"{words}; {rest}, passes outside them: messages, waking up, and whatever else runs here"


def device_memory_words(report: BalanceReport) -> str:
    """What is gone of each stage's GPU at its peak; empty on a CPU."""
    pairs = [(stage.predicted_device_bytes, stage.measured_device_bytes) for stage in report.stages]
    if any(measured is None for _, measured in pairs):
        return ""
    predicted, measured = (" / ".join(map(format_bytes, column)) for column in zip(*pairs, strict=True))
    return f"{_pair(predicted, measured)} (stage by stage; with the context and what the allocator keeps for later)"


def speed_up_words(speed_up: SpeedUp) -> str:
    """The measured speed-up over another cut with its interval, the prediction, and the clock."""
    clock = "by the wall clock" if speed_up.clock == "wall" else "steps simulated from measured stage times"
    return (
        f"{speed_up.measured:.2f} × over {baseline_label(speed_up.against)}, measured in {speed_up.pairs} pairs"
        f" (95 % interval {speed_up.low:.2f} to {speed_up.high:.2f}); predicted {speed_up.predicted:.2f} ×; {clock}"
    )


def check_words(check: CheckResult) -> str:
    """How far the run was from the unsplit model."""
    dropout = "; dropout was the identity on both sides" if check.dropout_disabled else ""
    worst = f" ({clean(check.worst_parameter)})" if check.worst_parameter else ""
    return (
        f"{counted(check.steps, 'step')} beside the unsplit model, largest differences:"
        f" loss {check.max_loss_difference:.1e}, gradient {check.max_gradient_difference:.1e},"
        f" parameter {check.max_parameter_difference:.1e}{worst}{dropout}"
    )


def loss_words(report: BalanceReport) -> str:
    """First and last loss, and the reference where the model file gives one; empty without a step."""
    if not report.steps:
        return ""
    first, last = report.steps[0], report.steps[-1]
    text = f"{first.loss:.4g} at step {first.step}"
    if last is not first:
        text += f" → {last.loss:.4g} at step {last.step}"
    if report.reference_loss is not None:
        text += f"; {clean(report.reference_loss_name) or 'reference'} {report.reference_loss:.4g}"
    return text


def scale_words(report: BalanceReport) -> str:
    """The one factor that is taken off before errors are counted, the raw errors it hides, and the drift."""
    raw = [time.raw_error for s in report.stages for time in (s.forward, s.backward) if time.raw_error is not None]
    hidden = ""
    if raw:
        low, high = format_percent(min(raw), signed=True), format_percent(max(raw), signed=True)
        hidden = f" (all stages, taken off the errors above; raw they are {low} to {high})"
    drift = "not measured" if report.drift is None else format_percent(report.drift, signed=True)
    return f"measured ÷ predicted {report.scale:.3f}{hidden}; drift of the machine {drift}"


def interval_words(report: BalanceReport) -> str:
    """How many measured times lie in the 90 % interval of their prediction, and which do not; empty without any."""
    if report.inside is None:
        return ""
    number, all_of_them = report.inside
    outside = [
        f"{name} of stage {stage.index}"
        for stage in report.stages
        for name, time in (("forward", stage.forward), ("backward", stage.backward))
        if time.inside is False
    ]
    interval, step = report.step_ms.interval, report.step_ms
    if interval is not None and abs(step.measured - step.predicted) > interval:
        outside.append("step")
    words = f"{number} of {all_of_them} times, raw, inside the 90 % interval of their prediction"
    return f"{words}; outside: {', '.join(outside)}" if outside else words


def start_words(start: StartTimes) -> str:
    """What the slowest rank did before the first step, and how long.

    >>> start_words(StartTimes(0.5, 2.0, 1.0, 0.25))
    '3.8 s until the last rank was ready: model 0.5 s, torch.export 2.0 s, pipeline() beyond it 1.0 s, stage 0.2 s'
    """
    if start.export_s is None:
        pipeline = f"pipeline() with its export {start.pipeline_s:.1f} s"
    else:
        pipeline = f"torch.export {start.export_s:.1f} s, pipeline() beyond it {start.pipeline_s:.1f} s"
    return (
        f"{start.total_s:.1f} s until the last rank was ready: model {start.model_s:.1f} s, {pipeline},"
        f" stage {start.stage_s:.1f} s"
    )


def setting_words(report: BalanceReport) -> str:
    """What was run: stages, schedule, microbatches."""
    microbatches = counted(report.num_microbatches, "microbatch", "es")
    return (
        f"{counted(len(report.stages), 'stage')}, {clean(report.schedule)}, {microbatches} of {report.microbatch_size}"
    )


def _columns(report: BalanceReport) -> list[TableColumn]:
    stages = report.stages
    unit, size = _memory_unit(report)
    predicted = [None if stage.predicted_peak_bytes is None else stage.predicted_peak_bytes / size for stage in stages]
    measured = [None if stage.measured_peak_bytes is None else stage.measured_peak_bytes / size for stage in stages]
    peaks = format_column([*predicted, *measured])
    return [
        TableColumn("\nstage", [str(stage.index) for stage in stages], left=True),
        TableColumn("\nbegins at", [stage.begins_at or DASH for stage in stages], left=True, name=True),
        *_time_columns("forward", [stage.forward for stage in stages]),
        *_time_columns("backward", [stage.backward for stage in stages]),
        TableColumn(f"{unit}\npredicted", peaks[: len(stages)], dropped=1),
        TableColumn("\nmeasured", peaks[len(stages) :], dropped=1),
    ]


def _time_columns(label: str, times: Sequence[ComparedTime]) -> list[TableColumn]:
    cells = format_column([t.predicted_ms for t in times] + [t.measured_ms for t in times])
    return [
        TableColumn(f"{label}\npredicted", cells[: len(times)]),
        TableColumn("\nmeasured", cells[len(times) :]),
        TableColumn("\nerror", [format_percent(time.error, signed=True) for time in times]),
    ]


def _memory_unit(report: BalanceReport) -> tuple[str, int]:
    peaks = [peak or 0 for s in report.stages for peak in (s.predicted_peak_bytes, s.measured_peak_bytes)]
    return ("peak GiB", 2**30) if max(peaks) >= 2**30 else ("peak MiB", 2**20)


def _alternatives(report: BalanceReport) -> str:
    return " · ".join(
        f"{other.label} the same cuts"
        if other.same_cuts
        else f"{other.label} {format_ms(other.step_ms)} ({format_percent(other.change, signed=True)})"
        for other in report.alternatives
    ) + (" (predicted)" if report.alternatives else "")


def _pair(predicted: str, measured: str) -> str:
    return f"predicted {predicted} · measured {measured}"


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"
