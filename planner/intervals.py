"""How sure a prediction is: 90 % intervals from a profile's own spread and from how the machine drifts.

Two errors are told apart. Each layer's median has a standard error of its own, from the spread of its samples; these
add up by their squares. And the machine as a whole is faster at one time than at another, which moves all layers alike
and does not average out. That is estimated from what was seen of it: the stretches of every size's rounds, and the
profiles of this model that were made before (`Profile.repeats`). Few such observations say little, so they count with
Student's quantile, not the normal one.

And sums of layers are not stages: where a stage's tensors lie in memory, and what its neighbours leave in the caches,
differs from the profile. How much that is was found over the runs of `benchmarks/prediction.py` (docs/accuracy.md).
Under another schedule than the profile's, where forwards and backwards alternate or do not, it is more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot, pi, sqrt, tan
from statistics import NormalDist, variance
from typing import TYPE_CHECKING

from planner.files.plan_file import boundaries_of
from planner.scheduling.simulation import StageTimes, simulate

if TYPE_CHECKING:
    from planner.files.plan_file import Plan, Stage
    from planner.files.profile_file import Profile, SizeProfile

COVERAGE = 0.9
MOST_REPEATS = 16
MODEL_DEVIATION = 0.0125
BOUNDARY_DEVIATION = 0.15
OTHER_SCHEDULE_DEVIATION = 0.04, 0.01  # forward, backward


def student_quantile(degrees: int, probability: float = (1 + COVERAGE) / 2) -> float:
    """The quantile of Student's distribution: exact for 1 and 2 degrees of freedom, within 0.5 % from 3 on.

    >>> [round(student_quantile(degrees), 2) for degrees in (1, 2, 3, 10, 1000)]
    [6.31, 2.92, 2.35, 1.81, 1.65]
    """
    if degrees == 1:
        return tan(pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """The relative standard deviation that all times share (a fraction), and how many observations say so."""

    deviation: float
    observations: int

    def half_width_ms(self, value_ms: float, standard_error_ms: float) -> float:
        """Half the 90 % interval of a predicted time, from its size and the standard error of its own samples.

        The two half-widths are added by their squares. Where both matter and one observation is all there is, that
        is up to 96 % instead of 90; combined degrees of freedom would be down to 82 % there.
        """
        own = NormalDist().inv_cdf((1 + COVERAGE) / 2) * standard_error_ms
        if self.observations == 0:
            return own
        return hypot(student_quantile(self.observations) * self.deviation * value_ms, own)


def machine_uncertainty(
    halves: Sequence[float], repeats: Sequence[float] = (), periods: Sequence[Sequence[float]] = ()
) -> Uncertainty:
    """How far the whole machine may be off, from what a profile saw of it and from differences between profiles.

    A profile saw its `periods` (how much slower each was than the others, for every size) or, by their difference, its
    two `halves`. A new period differs from the mean of n by 1 + 1/n times the variance of one. What profiles made at
    different times showed is the floor: what one profile sees lies close together in time.
    """
    seen = [*((0.0, half) for half in halves), *periods]
    known = [(variance(each) * (1 + 1 / len(each)), len(each) - 1) for each in seen]
    known += [(repeat * repeat, 1) for repeat in repeats]
    if not known:
        return Uncertainty(0.0, 0)
    degrees = sum(count for _, count in known)
    pooled = sum(square * count for square, count in known) / degrees
    floor = sum(repeat * repeat for repeat in repeats) / len(repeats) if repeats else 0.0
    return Uncertainty(sqrt(max(pooled, floor)), degrees)


def uncertainty_of(profile: Profile) -> Uncertainty:
    """What a profile, measured at all its sizes in one go, says of the machine."""
    halves = [size.drift for size in profile.sizes if len(size.periods) < 2]
    periods = [size.periods for size in profile.sizes if len(size.periods) > 1]
    return machine_uncertainty(halves, profile.repeats, periods)


def with_intervals(plan: Plan, profile: Profile) -> Plan:
    """`plan` with the 90 % interval of every stage's times and of the step; of an estimate nothing is known."""
    if profile.estimated is not None:
        return plan
    sure, size = uncertainty_of(profile), profile.size(plan.microbatch_size)
    model = _model_deviations(other_schedule=profile.differs_in_schedule(plan.schedule))
    errors = [_stage_errors_ms(plan, stage, size, model) for stage in plan.stages]
    return replace(
        plan,
        stages=tuple(_stage_with_intervals(stage, sure, each) for stage, each in zip(plan.stages, errors, strict=True)),
        step_interval_ms=sure.half_width_ms(plan.scheduled_step_ms(), _step_error_ms(plan, errors)),
    )


def _model_deviations(*, other_schedule: bool) -> tuple[float, float]:
    """What a sum of layers may be off as a stage, forward and backward; fractions."""
    forward, backward = OTHER_SCHEDULE_DEVIATION if other_schedule else (0.0, 0.0)
    return hypot(MODEL_DEVIATION, forward), hypot(MODEL_DEVIATION, backward)


def _stage_errors_ms(plan: Plan, stage: Stage, size: SizeProfile, model: tuple[float, float]) -> tuple[float, float]:
    """Standard errors of a stage's forward and backward, whatever the machine does: samples, boundaries, `model`."""
    boundaries = boundaries_of(stage.index, plan.num_stages)

    def error(spread_ms: float, value_ms: float, boundary_ms: float, deviation: float) -> float:
        return hypot(spread_ms, deviation * value_ms, BOUNDARY_DEVIATION * boundaries * boundary_ms)

    return (
        error(stage.forward_spread_ms, stage.forward_ms, size.boundary_forward_ms, model[0]),
        error(stage.backward_spread_ms, stage.backward_ms, size.boundary_backward_ms, model[1]),
    )


def _stage_with_intervals(stage: Stage, sure: Uncertainty, errors_ms: tuple[float, float]) -> Stage:
    forward, backward = errors_ms
    return replace(
        stage,
        forward_interval_ms=sure.half_width_ms(stage.forward_ms, forward),
        backward_interval_ms=sure.half_width_ms(stage.backward_ms, backward),
        load_interval_ms=sure.half_width_ms(stage.load_ms, hypot(forward, backward)),
    )


def _step_error_ms(plan: Plan, errors_ms: Sequence[tuple[float, float]]) -> float:
    """The step's standard error: by how much it moves where one stage's time moves by its own, over all stages."""
    times = [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in plan.stages]

    def step(changed: StageTimes, index: int) -> float:
        return simulate([*times[:index], changed, *times[index + 1 :]], plan.num_microbatches, _schedule(plan)).step_ms

    base = step(times[0], 0)
    moves = []
    for index, (own, (forward, backward)) in enumerate(zip(times, errors_ms, strict=True)):
        moves.append(step(replace(own, forward_ms=own.forward_ms + forward), index) - base)
        slower = replace(
            own, backward_ms=own.backward_ms + backward, backward_first_ms=own.backward_first_ms + backward
        )
        moves.append(step(slower, index) - base)
    return hypot(*moves)


def _schedule(plan: Plan) -> str:
    return plan.schedule or "gpipe"


def profile_drift(before: Profile, after: Profile) -> float | None:
    """How much slower (or, negative, faster) the machine was at the second of two profiles of one model; a fraction.

    None where they have no size of the same model in common, or are of other devices or schedules.
    """
    if before.estimated is not None or after.estimated is not None:
        return None
    if not before.machine.same_as(after.machine) or before.differs_in_schedule(after.schedule):
        return None
    older = {(size.fingerprint, size.microbatch_size): size for size in before.sizes}
    pairs = [(older[key], size) for size in after.sizes if (key := (size.fingerprint, size.microbatch_size)) in older]
    first, second = sum(_total_ms(size) for size, _ in pairs), sum(_total_ms(size) for _, size in pairs)
    return second / first - 1 if first > 0 else None


def _total_ms(size: SizeProfile) -> float:
    return sum(layer.forward_ms + layer.backward_ms for layer in size.layers)


def with_repeat(profile: Profile, older: Profile) -> Profile:
    """`profile` with what an older one of the same model on the same machine showed of its drift."""
    drift = profile_drift(older, profile)
    if drift is None:
        return profile
    return replace(profile, repeats=(*profile.repeats, *older.repeats, drift)[-MOST_REPEATS:])
