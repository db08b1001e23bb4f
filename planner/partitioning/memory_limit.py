"""Which stages fit into a memory limit, exactly: by bounds over all stages at once, and the timeline where they differ.

Fitting depends on the stage's place under 1F1B (earlier stages hold more microbatches), so there is a mask per stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from planner.errors import InfeasibleError
from planner.partitioning.bounds import least_largest_of
from planner.partitioning.chain_costs import Chain, CostTable, Cuts, Mask
from planner.partitioning.stage_memory import StageMemoryTable, Whole, as_prefix


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Bytes that a stage may need, and how many of them are not the allocator's to give (context, libraries)."""

    limit_bytes: int
    reserved_bytes: int = 0


class FittingStages:
    """For one number of microbatches and schedule: masks of the stages that fit, and what any stage needs."""

    def __init__(self, chain: Chain, num_microbatches: int, schedule: str, limit: MemoryLimit) -> None:
        self.limit = limit
        self.table = StageMemoryTable(chain, num_microbatches, schedule, limit.reserved_bytes)
        self._masks: dict[int, list[Mask]] = {}

    def fits(self, cuts: Cuts) -> bool:
        """Whether every stage of `cuts` stays within the limit."""
        bounds = list(pairwise((0, *cuts, self.table.num_layers)))
        masks = self.masks(len(bounds))
        return all(mask[start, stop] for mask, (start, stop) in zip(masks, bounds, strict=True))

    def masks(self, num_stages: int, limit_bytes: int | None = None) -> list[Mask]:
        """[i, j] by stage: layers i to j fit there (into another limit where one is given)."""
        if limit_bytes is not None:
            return self._all_masks(num_stages, limit_bytes)
        if num_stages not in self._masks:
            self._masks[num_stages] = self._all_masks(num_stages, self.limit.limit_bytes)
        return self._masks[num_stages]

    def _all_masks(self, num_stages: int, limit_bytes: int) -> list[Mask]:
        """GPipe needs the same memory everywhere; under 1F1B earlier stages hold more microbatches."""
        if self.table.schedule == "gpipe":
            return [self._mask(0, num_stages, limit_bytes)] * num_stages
        return [self._mask(index, num_stages, limit_bytes) for index in range(num_stages)]

    def _mask(self, index: int, num_stages: int, limit_bytes: int) -> Mask:
        at_once = _most_at_once(self.table.schedule, index, num_stages, self.table.num_microbatches)
        least, most = self._bounds
        fits: Mask = least + at_once * self._least_saved <= limit_bytes
        fits &= np.triu(np.ones_like(fits), 1)
        unsure = fits & (most + at_once * (self._least_saved + self._sent) > limit_bytes)
        for start, stop in np.argwhere(unsure):
            peak = self.table.peak(int(start), int(stop), index, num_stages)
            fits[start, stop] = peak.peak_bytes <= limit_bytes
        return fits

    @cached_property
    def _least_saved(self) -> Whole:
        """[i, j]: what one microbatch saves inside the stage alone."""
        table, stops = self.table, np.arange(1, self.table.num_layers + 1)
        begins = table.first_peak[stops] - 1
        inside = table.alive_backward[stops, begins][None, :] - table.alive_backward[:, begins]
        return np.concatenate([np.zeros((len(inside), 1), np.int64), np.maximum(inside, 0)], axis=1)

    @cached_property
    def _sent(self) -> Whole:
        """By cut: all that the cut, or the model's output, may keep alive, copies included."""
        return np.array([sum(life.num_bytes for life in b.sent) + b.num_bytes for b in self.table.boundaries], np.int64)

    @cached_property
    def _bounds(self) -> tuple[Whole, Whole]:
        """[i, j]: bytes that a stage needs at least and at most, apart from what microbatches save."""
        table, m, ends = self.table, self.table.num_microbatches, self.table.boundaries
        returning = np.array([b.gradient_bytes for b in ends], np.int64)
        each = np.array([[table.boundary_bytes(i, j) for j in (1, len(ends) - 1)] for i in range(len(ends))], np.int64)
        across = each[:, :1] + (returning - returning[1])[None, :]
        across[:, -1] = each[:, 1]
        static = _between(table.parameters) + _between(table.states) + m * across + table.reserved_bytes
        trained, temporaries = _between(table.trainable), _between(as_prefix(table.most_temporaries))
        for group in table.chain.tied:
            held = self._holding(group.layers)
            static = static + held * (group.parameter_bytes + group.optimizer_state_bytes)
            trained = trained + held * (group.parameter_bytes if group.trainable else 0)
            temporaries = temporaries + held * (group.optimizer_temporary_bytes + group.optimizer_left_bytes)
        tied = 2 * sum(group.parameter_bytes for group in table.chain.tied if group.trainable)
        returned = (m + 1) * returning
        returned += [sum(gradient.given_bytes for gradient in b.returned) for b in ends]
        rise = self._most_rise + returned[:, None] + (returning + (m + 1) * self._sent)[None, :] + tied
        return static, static + trained + np.maximum(temporaries, rise)

    @cached_property
    def _most_rise(self) -> Whole:
        """[i, j]: the most that a layer of the stage has alive besides what is saved."""
        table = self.table
        passing = np.zeros(table.num_layers + 1, np.int64)
        for life in table.memory.size.lifetimes:
            if life.freed_in == "forward":
                passing[life.made + 1] += life.num_bytes
                passing[life.freed + 1] -= life.num_bytes
        peaks = np.arange(len(table.layer_of_peak))
        gradients = table.alive_gradients[-1] - table.alive_gradients[table.layer_of_peak + 1, peaks]
        own = np.maximum(table.backward_peak, table.backward_first_peak)
        backward = np.maximum.reduceat(gradients + own, table.first_peak[:-1])
        each = np.maximum(np.cumsum(passing)[:-1] + table.forward_peak, backward)
        largest = np.zeros((len(each) + 1, len(each) + 1), np.int64)
        for start in range(len(each)):
            largest[start, start + 1 :] = np.maximum.accumulate(each[start:])
        return largest

    def _holding(self, layers: tuple[int, ...]) -> Whole:
        """[i, j]: 1 where the stage has one of `layers`."""
        count = np.zeros(self.table.num_layers, np.int64)
        count[list(layers)] = 1
        return (_between(as_prefix(count)) > 0).astype(np.int64)


def _between(prefix: Whole) -> Whole:
    """[i, j]: the sum over layers i to j."""
    return prefix[None, :] - prefix[:, None]


def _most_at_once(schedule: str, index: int, num_stages: int, num_microbatches: int) -> int:
    """Microbatches between their forward and their backward at once."""
    return num_microbatches if schedule == "gpipe" else min(num_microbatches, num_stages - index)


@dataclass(frozen=True, slots=True)
class Tightest:
    """The cut that gets by with the smallest limit, whatever its step: its fullest stage, and what that needs."""

    cuts: Cuts
    stage: int
    peak_bytes: int


def tightest(table: CostTable, num_stages: int) -> Tightest:
    """The cut of `table` into `num_stages` stages that needs the smallest limit; there must be a legal cut.

    Found by halving the range of limits, each decided exactly.
    """
    assert table.fitting is not None
    low, best = 0, _tightest_of(table, _any_cuts(table, num_stages, None))
    while best.peak_bytes - low > 1:
        middle = (low + best.peak_bytes) // 2
        cuts = _any_cuts(table, num_stages, middle)
        if cuts is None:
            low = middle
        else:
            best = _tightest_of(table, cuts)
    return best


def _any_cuts(table: CostTable, num_stages: int, limit_bytes: int | None) -> Cuts | None:
    """Some cut whose stages fit into `limit_bytes`."""
    assert table.fitting is not None
    masks = [table.segments] * num_stages
    if limit_bytes is not None:
        masks = [mask & table.segments for mask in table.fitting.masks(num_stages, limit_bytes)]
    return least_largest_of([np.where(mask, 0.0, np.inf) for mask in masks])


def _tightest_of(table: CostTable, cuts: Cuts | None) -> Tightest:
    assert table.fitting is not None and cuts is not None
    peaks = [point.peak_bytes for point in table.fitting.table.peaks(cuts)]
    return Tightest(cuts, peaks.index(max(peaks)), max(peaks))


class TooLittleMemoryError(InfeasibleError):
    """No cut fits: `tightest` is the one that comes nearest."""

    def __init__(self, tightest: Tightest, limit_bytes: int, num_stages: int, begins_at: str) -> None:
        self.tightest = tightest
        super().__init__(
            f"no cut into {num_stages} stages fits into {limit_bytes} bytes per stage: the cut that needs least is"
            f" {tightest.peak_bytes - limit_bytes} bytes over it, in stage {tightest.stage}, which begins at"
            f" {begins_at}",
            f"that stage needs {tightest.peak_bytes} bytes ({tightest.peak_bytes / 2**30:.3g} GiB)",
            f"use --memory {tightest.peak_bytes}B",
        )


def any_fit(table: CostTable, num_stages: int) -> bool:
    """Whether some legal cut stays within the limit of `table`, or there is none."""
    fitting = table.fitting
    return fitting is None or _any_cuts(table, num_stages, fitting.limit.limit_bytes) is not None


def refuse_what_does_not_fit(table: CostTable, num_stages: int) -> None:
    """Raise TooLittleMemoryError where no legal cut fits."""
    if table.fitting is None or any_fit(table, num_stages):
        return
    nearest = tightest(table, num_stages)
    begins_at = table.chain.ids[(0, *nearest.cuts)[nearest.stage]]
    raise TooLittleMemoryError(nearest, table.fitting.limit.limit_bytes, num_stages, begins_at)
