"""Progress of a run on stderr, by rank 0 only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class StepReport(Protocol):
    """Tells the person at the terminal how far the run is."""

    def step(self, number: int, loss: float | None) -> None:
        """Step `number` is done."""

    def say(self, text: str) -> None:
        """One line of news."""


class _Silent:
    def step(self, number: int, loss: float | None) -> None:
        pass

    def say(self, text: str) -> None:
        pass


@contextmanager
def step_progress(num_steps: int, rank: int) -> Iterator[StepReport]:
    """A progress bar over `num_steps` on rank 0; nothing on other ranks."""
    if rank != 0 or num_steps == 0:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    # A descriptor of its own, so that the bar goes on where stderr is redirected for a while (see measuring).
    with (
        open(os.dup(2), "w", encoding="utf-8") as stderr,
        Progress(*columns, console=(console := Console(file=stderr)), disable=not stderr.isatty()) as bars,
    ):
        task = bars.add_task("steps", total=num_steps)

        class Bars:
            def step(self, number: int, loss: float | None) -> None:
                bars.update(task, completed=number + 1)

            def say(self, text: str) -> None:
                console.print(text, highlight=False)

        yield Bars()
