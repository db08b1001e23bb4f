"""Two plans or two profiles → str: the figures of both beside each other, with the change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.rendering.plan_text import gap, model_title
from planner.rendering.table import TableColumn, table_lines
from planner.rendering.wording import DASH, balance, clean, format_column, format_ms, format_percent, mean_bubble

DEFAULT_WIDTH = 100
Row = tuple[str, ...]


def figure_lines(names: Sequence[str], rows: Sequence[Row], width: int = DEFAULT_WIDTH) -> list[str]:
    """A table of (figure, first, second, change) under the `names` of the two files."""
    columns = [
        TableColumn("figure", [row[0] for row in rows], left=True),
        TableColumn(clean(names[0]), [row[1] for row in rows]),
        TableColumn(clean(names[1]), [row[2] for row in rows]),
        TableColumn("change", [row[3] for row in rows]),
    ]
    return table_lines(columns, width)


def ms_row(label: str, first: float | None, second: float | None) -> Row:
    """A row of milliseconds.

    >>> ms_row("step", 200.0, 150.0)
    ('step', '200 ms', '150 ms', '−25 %')
    """
    shown = [DASH if value is None else format_ms(value) for value in (first, second)]
    return label, shown[0], shown[1], change(first, second)


def change(first: float | None, second: float | None) -> str:
    """`second` against `first` as signed per cent; a dash where it cannot be told."""
    return DASH if not first or second is None else format_percent(second / first - 1, signed=True)


def compare_plans(plans: Sequence[Plan], names: Sequence[str], width: int = DEFAULT_WIDTH) -> str:
    """Two plans beside each other: step, bound, bubble, balance, and the stages of both."""
    first, second = plans
    return "\n".join(
        [
            *figure_lines(names, _plan_rows(first, second), width),
            "",
            "  stages; load in ms per microbatch",
            *table_lines(_stage_columns(first, second), width),
        ]
    )


def _plan_rows(first: Plan, second: Plan) -> list[Row]:
    def plain(label: str, values: Sequence[str]) -> Row:
        return label, clean(values[0]), clean(values[1]), "" if values[0] == values[1] else "differs"

    both = (first, second)
    even = [balance(stage.load_ms for stage in plan.stages) for plan in both]
    bubbles = [mean_bubble([stage.bubble_fraction for stage in plan.stages]) for plan in both]
    same_model = [plan.model.fingerprint or plan.model.name for plan in both]
    return [
        ("model", *(model_title(plan) for plan in both), "" if same_model[0] == same_model[1] else "differs"),
        plain("machine", [plan.machine.device_name if plan.machine is not None else DASH for plan in both]),
        plain("stages", [str(plan.num_stages) for plan in both]),
        plain("schedule", [plan.schedule or "largest load" for plan in both]),
        plain("microbatches", [f"{plan.num_microbatches} of {plan.microbatch_size}" for plan in both]),
        ms_row("step" if first.schedule and second.schedule else "objective", first.objective_ms, second.objective_ms),
        ms_row("lower bound", first.lower_bound_ms, second.lower_bound_ms),
        ("status", *(f"{plan.status}, {_gap(plan)}" for plan in both), ""),
        ("bubble", *(format_percent(bubble) for bubble in bubbles), ""),
        ("balance", *(DASH if ratio is None else f"{ratio:.2f}" for ratio in even), ""),
    ]


def _gap(plan: Plan) -> str:
    return f"gap {format_percent(gap(plan))}"


def _stage_columns(first: Plan, second: Plan) -> list[TableColumn]:
    pairs = list(zip_longest(first.stages, second.stages))
    loads = [[stage.load_ms if stage is not None else None for stage in side] for side in zip(*pairs, strict=True)]
    cells = format_column([*loads[0], *loads[1]])
    begins = [[str(s.nodes[0]) if s is not None else DASH for s in side] for side in zip(*pairs, strict=True)]
    return [
        TableColumn("stage", [str(index) for index in range(len(pairs))], left=True),
        TableColumn("first\nbegins at", begins[0], left=True, name=True),
        TableColumn("\nload", cells[: len(pairs)]),
        TableColumn("second\nbegins at", begins[1], left=True, name=True),
        TableColumn("\nload", cells[len(pairs) :]),
        TableColumn("\nchange", [change(a, b) for a, b in zip(*loads, strict=True)]),
    ]


def compare_profiles(profiles: Sequence[Profile], names: Sequence[str], width: int = DEFAULT_WIDTH) -> str:
    """Two profiles beside each other: all layers' forward and backward at every size that both hold."""
    first, second = ({size.microbatch_size: size for size in profile.sizes} for profile in profiles)
    machines = [clean(profile.machine.device_name) for profile in profiles]
    rows: list[Row] = [("machine", *machines, "" if machines[0] == machines[1] else "differs")]
    for number in sorted(first.keys() & second.keys()):
        for what in ("forward", "backward"):
            totals = [sum(getattr(layer, f"{what}_ms") for layer in side[number].layers) for side in (first, second)]
            rows.append(ms_row(f"{what}, microbatches of {number}", *totals))
    return "\n".join(figure_lines(names, rows, width))
