"""What is computed → text: the plan's table, the drawing of its graph, and the wording that all renderers share."""

from planner.rendering.graph_svg import render_graph_svg
from planner.rendering.links_text import links_line
from planner.rendering.plan_text import (
    gap,
    model_title,
    proof,
    render_plan,
    same_cuts,
    split_specification_code,
)
from planner.rendering.table import TableColumn, table_lines
from planner.rendering.wording import (
    DASH,
    balance,
    baseline_label,
    clean,
    counted,
    format_bar,
    format_bytes,
    format_column,
    format_count,
    format_ms,
    format_percent,
    glue,
    mean_bubble,
    shorten,
    wrap_parts,
    wrap_text,
)

__all__ = [
    "DASH",
    "TableColumn",
    "balance",
    "baseline_label",
    "clean",
    "counted",
    "format_bar",
    "format_bytes",
    "format_column",
    "format_count",
    "format_ms",
    "format_percent",
    "gap",
    "glue",
    "links_line",
    "mean_bubble",
    "model_title",
    "proof",
    "render_graph_svg",
    "render_plan",
    "same_cuts",
    "shorten",
    "split_specification_code",
    "table_lines",
    "wrap_parts",
    "wrap_text",
]
