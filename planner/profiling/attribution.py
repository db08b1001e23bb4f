"""Measured stages → corrected layers: which layers were mispredicted, as far as sums over stages can say.

A stage's time is the sum of its layers'. The unknown of a layer is the logarithm of its true ÷ profiled time: one part
for the whole machine, which is the ratio of the totals, and two that are expected to be small: one for all layers of
equal structure, one of its own, as wide as the profile's spread and the place of a layer make it. Among all unknowns
that give the sums that were measured, the likeliest are taken (least squares with that prior; Tarantola, Inverse
Problem Theory, 3.2): sums of the newest run hold exactly, sums of older ones within their spread. Forward, backward,
first backward and optimizer are attributed apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from planner.files.measurement_file import StageFigures
from planner.files.plan_file import boundaries_of
from planner.files.profile_file import LayerProfile, SizeProfile, TiedProfile

Array = npt.NDArray[np.float64]

STRUCTURE_ERROR = 0.2
LEAST_OWN_ERROR = 0.03
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
    rows = [stage_rows(run.cuts, len(layers)) for run in runs]

    def fitted(field: str, measured: Callable[[StageFigures], tuple[float, float]]) -> Array:
        spread = "forward_spread_ms" if field == "forward_ms" else "backward_spread_ms"
        costs = [float(getattr(layer, field)) for layer in layers]
        return _fitted(runs, rows, costs, [float(getattr(layer, spread)) for layer in layers], structures, measured)

    runs = [_without_boundaries(run, size) for run in runs]
    forward = fitted("forward_ms", lambda stage: (stage.forward_ms, stage.forward_spread_ms))
    backward = fitted("backward_ms", lambda stage: (stage.backward_ms, stage.backward_spread_ms))
    first = fitted("backward_first_ms", lambda stage: (stage.backward_first_ms, stage.backward_spread_ms))
    optimizer, tied = _optimizer(size, runs)
    fixed = tuple(
        replace(layer, forward_ms=float(f), backward_ms=float(b), backward_first_ms=float(b1), optimizer_ms=float(o))
        for layer, f, b, b1, o in zip(layers, forward, backward, first, optimizer, strict=True)
    )
    return Attribution(replace(size, layers=fixed, tied=tied), _groups(structures, layers, fixed))


def _without_boundaries(run: MeasuredRun, size: SizeProfile) -> MeasuredRun:
    """The stages without their transfers and without their own work on their boundaries."""
    stages = []
    for index, stage in enumerate(run.stages):
        boundaries = boundaries_of(index, len(run.stages))
        forward_ms = stage.transfer_forward_ms + boundaries * size.boundary_forward_ms
        backward_ms = stage.transfer_backward_ms + boundaries * size.boundary_backward_ms
        stages.append(
            replace(
                stage,
                forward_ms=max(0.0, stage.forward_ms - forward_ms),
                backward_ms=max(0.0, stage.backward_ms - backward_ms),
                backward_first_ms=max(0.0, stage.backward_first_ms - backward_ms),
            )
        )
    return replace(run, stages=tuple(stages))


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
    prior = STRUCTURE_ERROR**2 * equal + np.diag(own**2)
    machine = np.full(len(costs), np.log(sums.sum() / (rows @ costs).sum()))
    unknown = machine
    for iteration in range(MAX_ITERATIONS):
        now = costs * np.exp(unknown)
        slope = rows * now
        covariance = slope @ prior @ slope.T + np.diag(noises**2)
        target = sums - slope.sum(axis=1) + slope @ (unknown - machine)
        better = machine + prior @ slope.T @ np.linalg.solve(covariance, target)
        change = np.clip(better - unknown, -1.0, 1.0) * (1.0 if iteration < MAX_ITERATIONS // 4 else 0.5)
        unknown = unknown + change
        if np.abs(change).max() < 1e-12:
            break
    corrected: Array = costs * np.exp(unknown)
    return corrected


def _fitted(
    runs: Sequence[MeasuredRun],
    rows: Sequence[Array],
    costs: Sequence[float],
    spreads: Sequence[float],
    structures: Sequence[str],
    measured: Callable[[StageFigures], tuple[float, float]],
) -> Array:
    """`corrected_costs` from all runs; `rows` are those of each, `measured` gives a time of a stage and its spread.

    Every run holds all layers, so their ratios of measured ÷ profiled total differ by the machine's drift only: older
    runs are brought to the speed of the newest.
    """
    prior = np.array(costs)
    taken = [np.array([measured(stage) for stage in run.stages]) for run in runs]
    speeds = [_ratio(times[:, 0].sum(), (own @ prior).sum()) for times, own in zip(taken, rows, strict=True)]
    sums, noises = [], []
    for run, times, speed in zip(runs, taken, speeds, strict=True):
        scale = _ratio(speeds[-1], speed)
        sums.append(scale * times[:, 0])
        noises.append(scale * np.maximum(times[:, 1], LEAST_NOISE * times[:, 0]) * (run is not runs[-1]))
    every = np.vstack(rows)
    return corrected_costs(prior, np.array(spreads), structures, every, np.concatenate(sums), np.concatenate(noises))


def _ratio(value: float, to: float) -> float:
    return float(value / to) if value > 0 and to > 0 else 1.0


def _optimizer(size: SizeProfile, runs: Sequence[MeasuredRun]) -> tuple[Array, tuple[TiedProfile, ...]]:
    """Optimizer milliseconds of every layer and of the tied parameters, which count in every stage that holds them."""
    layers, tied = size.layers, size.tied
    rows = []
    for run in runs:
        own = stage_rows(run.cuts, len(layers))
        rows.append(np.column_stack([own, *(own[:, list(entry.layers)].max(axis=1) for entry in tied)]))
    costs = [*(layer.optimizer_ms for layer in layers), *(entry.optimizer_ms for entry in tied)]
    names = [*(layer.structure or layer.id for layer in layers), *(f"tied {entry.name}" for entry in tied)]
    fixed = _fitted(runs, rows, costs, [0.0] * len(costs), names, lambda stage: (stage.optimizer_ms, 0.0))
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
