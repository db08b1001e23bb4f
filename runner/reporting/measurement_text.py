"""Measurement → str, without its plan: the measurement holds what was predicted for it. And two of them."""

from __future__ import annotations

from collections.abc import Sequence

from planner.files.measurement_file import Measurement
from planner.rendering import DASH, TableColumn, clean, counted, format_column, format_ms, format_percent, table_lines
from planner.rendering.side_by_side import Row, change, figure_lines, ms_row
from runner.reporting.terminal import check_words, labelled_lines, speed_up_words

DEFAULT_WIDTH = 100


def render_measurement(measurement: Measurement, width: int = DEFAULT_WIDTH) -> str:
    """What was measured, stage by stage, beside what had been predicted."""
    stages, step = measurement.stages, measurement.step_ms
    size, unit = (2**30, "GiB") if max(_peaks(measurement)) >= 2**30 else (2**20, "MiB")
    peaks = [None if peak is None else peak / size for peak in _measured_peaks(measurement)]
    columns = [TableColumn("\nstage", [str(stage.index) for stage in stages], left=True)]
    for what in ("forward", "backward"):
        predicted = [float(getattr(stage.predicted, f"{what}_ms")) for stage in stages]
        measured = [float(getattr(stage.measured, f"{what}_ms")) for stage in stages]
        cells = format_column([*predicted, *measured])
        columns += [
            TableColumn(f"{what}\npredicted", cells[: len(stages)]),
            TableColumn("\nmeasured", cells[len(stages) :]),
        ]
    columns += [
        TableColumn("\nbubble", [format_percent(stage.measured.bubble_fraction) for stage in stages]),
        TableColumn(f"peak {unit}\nmeasured", format_column(peaks)),
    ]
    taken = "measured" if measurement.step_clock == "wall" else "from measured stages"
    figures = [
        (
            "step",
            f"predicted {format_ms(step.predicted)} · {taken} {format_ms(step.measured)}"
            f" ({change(step.predicted, step.measured)}) · ideal {format_ms(step.ideal)}",
        ),
        ("scale", f"measured ÷ predicted {measurement.scale:.3f}"),
        *([("check", check_words(measurement.check))] if measurement.check is not None else []),
        *([("speed-up", speed_up_words(measurement.speed_up))] if measurement.speed_up is not None else []),
        *([("loss", _losses(measurement))] if measurement.steps else []),
    ]
    return "\n".join(
        [
            _title(measurement),
            "",
            "  ms per microbatch, medians",
            *table_lines(columns, width),
            "",
            *(line for label, text in figures for line in labelled_lines(label, text, width)),
        ]
    )


def compare_measurements(pair: Sequence[Measurement], names: Sequence[str], width: int = DEFAULT_WIDTH) -> str:
    """Two runs beside each other: step, stages, losses."""
    first, second = pair
    rows: list[Row] = [
        ("model", clean(first.name), clean(second.name), "" if first.plan == second.plan else "differs"),
        ("stages", str(len(first.stages)), str(len(second.stages)), ""),
        ("microbatches", *(f"{each.num_microbatches} of {each.microbatch_size}" for each in pair), ""),
        ms_row("step measured", first.step_ms.measured, second.step_ms.measured),
        ms_row("step predicted", first.step_ms.predicted, second.step_ms.predicted),
    ]
    for index in range(max(len(first.stages), len(second.stages))):
        for what in ("forward", "backward"):
            times = [
                float(getattr(each.stages[index].measured, f"{what}_ms")) if index < len(each.stages) else None
                for each in pair
            ]
            rows.append(ms_row(f"stage {index} {what}", *times))
    rows.append(("last loss", *(f"{each.steps[-1].loss:.4g}" if each.steps else DASH for each in pair), ""))
    return "\n".join(figure_lines(names, rows, width))


def _title(measurement: Measurement) -> str:
    return (
        f"{clean(measurement.name)} · {counted(len(measurement.stages), 'stage')}, {measurement.schedule},"
        f" {counted(measurement.num_microbatches, 'microbatch', 'es')} of {measurement.microbatch_size}"
        f" · {clean(measurement.machine.device_name)}"
    )


def _losses(measurement: Measurement) -> str:
    first, last = measurement.steps[0], measurement.steps[-1]
    return f"{first.loss:.4g} at step {first.step} → {last.loss:.4g} at step {last.step}"


def _measured_peaks(measurement: Measurement) -> list[int | None]:
    return [stage.measured.peak_memory_bytes for stage in measurement.stages]


def _peaks(measurement: Measurement) -> list[int]:
    return [peak or 0 for peak in _measured_peaks(measurement)] or [0]
