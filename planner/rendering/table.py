"""Columns → the lines of a table that fits its width: rich lays it out, what to shorten or drop is decided here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from planner.rendering.wording import clean, shorten

GAP, INDENT, MIN_NAME = 2, 2, 10


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A heading, which may have two lines, and a cell per row; numbers stand right, `left` otherwise.

    Where the table is too wide, `name` columns are shortened; if that is not enough, columns with the largest
    `dropped` are left out, those with 0 never.
    """

    heading: str
    cells: Sequence[str]
    left: bool = False
    name: bool = False
    dropped: int = 0

    @property
    def width(self) -> int:
        """Characters that the column takes, or the fewest to which a name may be shortened."""
        heading = max(len(line) for line in self.heading.splitlines())
        cells = max((len(cell) for cell in self.cells), default=0)
        return max(heading, min(cells, MIN_NAME) if self.name else cells)


def table_lines(columns: Sequence[TableColumn], width: int) -> list[str]:
    """The lines of a table without rules, indented by two."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = _fitted(columns, width - INDENT)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_edge=False, header_style="")
    for column in shown:
        table.add_column(Text(column.heading), justify="left" if column.left else "right", no_wrap=True)
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*(Text(cell) for cell in cells))
    text = io.StringIO()
    console = Console(file=text, width=1000, force_terminal=False, force_jupyter=False, color_system=None)
    console.print(table)
    return [f"{' ' * INDENT}{line}".rstrip() for line in text.getvalue().splitlines()]


def _fitted(columns: Sequence[TableColumn], room: int) -> list[TableColumn]:
    """The columns that are shown, with names short enough for them all to fit into `room` characters."""
    shown = list(columns)
    while (excess := _total(shown) - room) > 0 and any(column.dropped for column in shown):
        last = max(column.dropped for column in shown)
        shown = [column for column in shown if column.dropped != last]
    num_names = sum(column.name for column in shown) or 1
    return [
        _shortened(column, column.width + max(0, -excess) // num_names) if column.name else column for column in shown
    ]


def _total(columns: Sequence[TableColumn]) -> int:
    return sum(column.width for column in columns) + GAP * (len(columns) - 1)


def _shortened(column: TableColumn, width: int) -> TableColumn:
    cells = [shorten(clean(cell), width) for cell in column.cells]
    return TableColumn(column.heading, cells, column.left, column.name, column.dropped)
