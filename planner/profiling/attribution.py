"""Measured stages → corrected layers: which layers were mispredicted, as far as sums over stages can say.

A stage's time is the sum of its layers'. The unknown of a layer is the logarithm of its true ÷ profiled time, in three
parts that are expected to be small: one for the whole machine, one for all layers of equal structure, one of its own,
as wide as the profile's spread. Among all unknowns that give the sums that were measured, the likeliest are taken
(least squares with that prior; Tarantola, Inverse Problem Theory, 3.2): sums of the newest run hold exactly, sums of
older ones within their spread. Forward, backward, first backward and optimizer are attributed apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from planner.files.measurement_file import StageFigures
from planner.files.profile_file import LayerProfile, SizeProfile, TiedProfile

Array = npt.NDArray[np.float64]

MACHINE_ERROR = 0.5
STRUCTURE_ERROR = 0.2
LEAST_OWN_ERROR = 0.002
LEAST_NOISE = 0.002
EXACT = 1e-7
MAX_ITERATIONS = 100


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """One run: the indices of the layers that stages 1, 2, … begin with, and what every stage took."""

    cuts: tuple[int, ...]
    stages: tuple[StageFigures, ...]


@dataclass(frozen=True, slots=True)
class AttributedGroup:
    """Layers of equal structure: mean milliseconds per microbatch, as profiled and as attributed."""

    ids: tuple[str, ...]
    type: str
    profiled_forward_ms: float
    forward_ms: float
    profiled_backward_ms: float
    backward_ms: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """The corrected profile, and what was corrected, in the order of the layers."""

    size: SizeProfile
    groups: tuple[AttributedGroup, ...]


def attribute(size: SizeProfile, runs: Sequence[MeasuredRun]) -> Attribution:
    """Correct the layers of `size` so that they add up to what the stages of `runs` (oldest first) took.

    Raises ValueError without runs, or for a run whose stages are not one more than its cuts.
    """
    if not runs or any(len(run.stages) != len(run.cuts) + 1 for run in runs):
        raise ValueError("attribution needs runs with one stage more than cuts")
    layers = size.layers
    structures = [layer.structure or layer.id for layer in layers]
    rows = np.vstack([stage_rows(run.cuts, len(layers)) for run in runs])

    def fitted(
        costs: Sequence[float],
        spreads: Sequence[float],
        measured: Callable[[StageFigures], float],
        noise: Callable[[StageFigures], float],
    ) -> Array:
        sums, noises = _sums(runs, measured, noise)
        return corrected_costs(np.array(costs), np.array(spreads), structures, rows, sums, noises)

    forward = fitted(
        [layer.forward_ms for layer in layers],
        [layer.forward_spread_ms for layer in layers],
        lambda stage: stage.forward_ms,
        lambda stage: stage.forward_spread_ms,
    )
    spreads = [layer.backward_spread_ms for layer in layers]
    backward = fitted(
        [layer.backward_ms for layer in layers],
        spreads,
        lambda stage: stage.backward_ms,
        lambda stage: stage.backward_spread_ms,
    )
    first = fitted(
        [layer.backward_first_ms for layer in layers],
        spreads,
        lambda stage: stage.backward_first_ms,
        lambda stage: stage.backward_spread_ms,
    )
    optimizer, tied = _optimizer(size, runs)
    fixed = tuple(
        replace(layer, forward_ms=float(f), backward_ms=float(b), backward_first_ms=float(b1), optimizer_ms=float(o))
        for layer, f, b, b1, o in zip(layers, forward, backward, first, optimizer, strict=True)
    )
    return Attribution(replace(size, layers=fixed, tied=tied), _groups(structures, layers, fixed))


def stage_rows(cuts: Sequence[int], num_layers: int) -> Array:
    """A row per stage, 1 where it holds the layer.

    >>> stage_rows([1], 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    """
    bounds = [0, *cuts, num_layers]
    rows = np.zeros((len(cuts) + 1, num_layers))
    for row, (start, stop) in zip(rows, pairwise(bounds), strict=True):
        row[start:stop] = 1.0
    return rows


def corrected_costs(
    costs: Array, spreads: Array, structures: Sequence[str], rows: Array, sums: Array, noises: Array
) -> Array:
    """The likeliest costs, in milliseconds, whose sums over `rows` are `sums` within `noises` (milliseconds, ≥ 0).

    Costs stay positive where they were. A row of layers that cost nothing is left out: nothing tells whose error it is.

    >>> two = ["a", "a"]
    >>> corrected_costs(np.ones(2), np.zeros(2), two, np.ones((1, 2)), np.array([3.0]), np.zeros(1)).round(6).tolist()
    [1.5, 1.5]
    """
    told = (rows @ costs > 0) & (sums > 0)
    rows, sums, noises = rows[told], sums[told], np.maximum(noises[told], EXACT * sums[told])
    if not len(sums):
        return costs
    own = np.hypot(LEAST_OWN_ERROR, np.divide(spreads, costs, out=np.zeros_like(costs), where=costs > 0))
    equal = np.array(structures)[:, None] == np.array(structures)[None, :]
    prior = MACHINE_ERROR**2 + STRUCTURE_ERROR**2 * equal + np.diag(own**2)
    unknown = np.full(len(costs), np.log(sums.sum() / (rows @ costs).sum()))
    for _ in range(MAX_ITERATIONS):
        now = costs * np.exp(unknown)
        slope = rows * now
        covariance = slope @ prior @ slope.T + np.diag(noises**2)
        target = sums - slope.sum(axis=1) + slope @ unknown
        better = prior @ slope.T @ np.linalg.solve(covariance, target)
        change = np.clip(better - unknown, -1.0, 1.0)
        unknown = unknown + change
        if np.abs(change).max() < 1e-12:
            break
    corrected: Array = costs * np.exp(unknown)
    return corrected


def _sums(
    runs: Sequence[MeasuredRun], measured: Callable[[StageFigures], float], noise: Callable[[StageFigures], float]
) -> tuple[Array, Array]:
    """What every stage of every run took, and how exact that is; older runs brought to the speed of the newest.

    All runs hold all layers, so their totals differ by the machine's drift only.
    """
    total = sum(map(measured, runs[-1].stages))
    sums: list[float] = []
    noises: list[float] = []
    for run in runs:
        own = sum(map(measured, run.stages))
        scale = total / own if own > 0 else 1.0
        sums += [scale * measured(stage) for stage in run.stages]
        newest = run is runs[-1]
        noises += [0.0 if newest else scale * max(noise(s), LEAST_NOISE * measured(s)) for s in run.stages]
    return np.array(sums), np.array(noises)


def _optimizer(size: SizeProfile, runs: Sequence[MeasuredRun]) -> tuple[Array, tuple[TiedProfile, ...]]:
    """Optimizer milliseconds of every layer and of the tied parameters, which count in every stage that holds them."""
    layers, tied = size.layers, size.tied
    rows = []
    for run in runs:
        own = stage_rows(run.cuts, len(layers))
        held = [own[:, list(entry.layers)].max(axis=1) for entry in tied]
        rows.append(np.column_stack([own, *held]))
    costs = np.array([*(layer.optimizer_ms for layer in layers), *(entry.optimizer_ms for entry in tied)])
    names = [*(layer.structure or layer.id for layer in layers), *(f"tied {entry.name}" for entry in tied)]
    sums = np.array([stage.optimizer_ms for run in runs for stage in run.stages])
    noises = np.concatenate([np.full(len(run.stages), 0.0 if run is runs[-1] else 1.0) for run in runs])
    fixed = corrected_costs(costs, np.zeros_like(costs), names, np.vstack(rows), sums, noises * LEAST_NOISE * sums)
    own = fixed[len(layers) :]
    return fixed[: len(layers)], tuple(replace(t, optimizer_ms=float(ms)) for t, ms in zip(tied, own, strict=True))


def _groups(
    structures: Sequence[str], before: Sequence[LayerProfile], after: Sequence[LayerProfile]
) -> tuple[AttributedGroup, ...]:
    groups = []
    for structure in dict.fromkeys(structures):
        members = [index for index, own in enumerate(structures) if own == structure]

        def mean(layers: Sequence[LayerProfile], field: str, members: Sequence[int] = members) -> float:
            return sum(float(getattr(layers[index], field)) for index in members) / len(members)

        groups.append(
            AttributedGroup(
                ids=tuple(before[index].id for index in members),
                type=before[members[0]].type,
                profiled_forward_ms=mean(before, "forward_ms"),
                forward_ms=mean(after, "forward_ms"),
                profiled_backward_ms=mean(before, "backward_ms"),
                backward_ms=mean(after, "backward_ms"),
            )
        )
    return tuple(groups)
