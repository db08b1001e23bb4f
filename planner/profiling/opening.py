"""Which layers are opened, so that cuts may lie between their operations: as asked for, or where balance needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.files.profile_file import Granularity
from planner.profiling.pooling import on_first_copy
from planner.tracing.exporting import Trace, open_layers

CUTS_PER_STAGE = 4


@dataclass(slots=True)
class Opening:
    """Opens the layers of one trace after the other; what `auto` opens at the first size stays open at the others."""

    granularity: Granularity
    num_stages: int
    opened: list[frozenset[str]] = field(default_factory=list)

    def before_timing(self, trace: Trace) -> Trace:
        """`trace` with the layers open that are known to need it."""
        if self.granularity == "operation" or (self.granularity == "auto" and self._few_cuts(trace)):
            return open_layers(trace)
        for ids in self.opened:
            trace = open_layers(trace, ids)
        return trace

    def after_timing(self, trace: Trace, load_ms: Sequence[float]) -> Trace | None:
        """`trace` with the layers open whose load spoils the balance; None where no (further) layer does.

        Collective: all copies open what the first one measured.
        """
        if self.granularity != "auto" or self.opened or self._few_cuts(trace) or self.num_stages == 1:
            return None
        chosen = on_first_copy(lambda: too_large(load_ms, self.num_stages))
        self.opened.append(frozenset(layer.id for layer, large in zip(trace.layers, chosen, strict=True) if large))
        opened = open_layers(trace, self.opened[0])
        return opened if len(opened.layers) > len(trace.layers) else None

    def _few_cuts(self, trace: Trace) -> bool:
        return len(trace.layers) - 1 < CUTS_PER_STAGE * self.num_stages


def too_large(load_ms: Sequence[float], num_stages: int) -> list[bool]:
    """Which layers alone exceed the mean load of a stage.

    >>> too_large([1.0, 5.0, 1.0, 1.0], 2)
    [False, True, False, False]
    """
    mean = sum(load_ms) / num_stages
    return [load > mean for load in load_ms]
