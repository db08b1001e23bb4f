"""What was measured against a profile, attributed to layers → text."""

from __future__ import annotations

from planner.profiling.attribution import AttributedGroup, Attribution
from planner.rendering.table import TableColumn, table_lines
from planner.rendering.wording import DASH, counted, format_column, format_ms, format_percent, wrap_text

CAPTION = "  ms per microbatch and layer; layers of equal structure share one correction"


def render_attribution(attribution: Attribution, width: int = 100) -> str:
    """A table of all groups of equal layers: forward and backward as profiled, as attributed, and the change."""
    groups = attribution.groups
    columns = [
        TableColumn("\nlayers", [_members(group) for group in groups], left=True, name=True),
        TableColumn("\ntype", [group.type for group in groups], left=True, name=True, dropped=1),
        *_columns("forward", [(group.profiled_forward_ms, group.forward_ms) for group in groups]),
        *_columns("backward", [(group.profiled_backward_ms, group.backward_ms) for group in groups]),
    ]
    return "\n".join([CAPTION, *table_lines(columns, width)])


def _members(group: AttributedGroup) -> str:
    others = len(group.ids) - 1
    return group.ids[0] + (f" and {counted(others, 'other')}" if others else "")


def _columns(label: str, times: list[tuple[float, float]]) -> list[TableColumn]:
    cells = format_column([before for before, _ in times] + [after for _, after in times])
    changes = [format_percent(after / before - 1, signed=True) if before > 0 else DASH for before, after in times]
    return [
        TableColumn(f"{label}\nprofile", cells[: len(times)]),
        TableColumn("\nattributed", cells[len(times) :]),
        TableColumn("\nchange", changes),
    ]


def render_outcome(before_ms: float, step_ms: float, kept: int | None, num_runs: int, width: int = 100) -> str:
    """What came of planning again: the step of the newest measured cuts, then of the plan, on corrected costs."""
    newest = f"the cuts measured last take {format_ms(before_ms)} per step on the corrected costs"
    if kept is None:
        change = format_percent(step_ms / before_ms - 1, signed=True)
        what = f"{newest}, the new ones {format_ms(step_ms)} ({change}): run the plan and give its measurement too"
    elif kept == num_runs:
        what = f"{newest}; no others save 0.1 %, so they stay"
    else:
        what = f"{newest}, those of measurement {kept} {format_ms(step_ms)}; no others save 0.1 %, so these stay"
    return "\n".join(wrap_text(f"  {what}", width))
