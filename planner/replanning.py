"""Measurements + profile → a better plan: the error of each stage attributed to its layers, then planned again.

Whoever repeats it (measure the new plan, give that measurement too) ends at cuts that were measured and that no other
cuts are expected to beat; among measured cuts the best are kept, so no round can lose what an earlier one had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from planner.errors import FileError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile, SizeProfile
from planner.planning import plan_profile
from planner.profiling.attribution import Attribution, MeasuredRun, attribute
from planner.request import PlanRequest

if TYPE_CHECKING:
    from planner.partitioning.chain_costs import Chain, Cuts


@dataclass(frozen=True, slots=True)
class Replanned:
    """The plan on corrected costs; `before_ms` is the step of the newest measured cuts on these costs.

    `kept` is the number, from 1, of the measurement whose cuts the plan has; None for cuts that no run has had.
    """

    plan: Plan
    profile: Profile
    attribution: Attribution
    before_ms: float
    kept: int | None


def replan(profile: Profile, measurements: Sequence[Measurement], request: PlanRequest) -> Replanned:
    """Plan again from what `measurements` (oldest first) took; only the newest one's microbatch size is planned.

    The plan has the cuts of the best measured run with as many stages as asked for, unless others are expected to take
    0.1 % less. Raises FileError for a measurement of another model or size, or one that does not say its cuts.
    """
    from planner.partitioning.chain_costs import step_ms
    from planner.partitioning.layer_graph import build_layer_graph, chain_of

    newest = measurements[-1]
    size = profile.size(newest.microbatch_size)
    runs = [_run(size, measurement) for measurement in measurements]
    found = attribute(size, runs)
    corrected = replace(profile, sizes=(found.size,))
    chain = chain_of(build_layer_graph(found.size, request.link_cost()))

    def step(cuts: Cuts) -> float:
        return step_ms(chain, cuts, newest.num_microbatches, request.schedule)

    tried = [run.cuts for run in runs if len(run.stages) == request.gpus]
    plan = plan_profile(corrected, request, keep=min(tried, key=step, default=None))
    cuts = _cuts(chain, plan) if plan.order is None else None
    return Replanned(
        plan=plan,
        profile=corrected,
        attribution=found,
        before_ms=step(runs[-1].cuts),
        kept=next((number for number, run in enumerate(runs, 1) if run.cuts == cuts), None),
    )


def _cuts(chain: Chain, plan: Plan) -> Cuts:
    return tuple(chain.ids.index(cut.before) for cut in plan.cuts)


def _run(size: SizeProfile, measurement: Measurement) -> MeasuredRun:
    what = f"a measurement of {measurement.name}"
    if measurement.plan != size.fingerprint or measurement.microbatch_size != size.microbatch_size:
        raise FileError(
            f"{what} with fingerprint {measurement.plan} at microbatches of {measurement.microbatch_size}",
            f"the profile holds {size.fingerprint} at {size.microbatch_size}",
            "give the profile that the plan was made from, and measurements of one size",
        )
    if measurement.order is not None:
        raise FileError(
            f"{what} whose stages are not in program order",
            "only runs of stages in program order correct a profile",
            "profile again, or measure a plan that keeps the program's order (plan --plain)",
        )
    order = {layer.id: index for index, layer in enumerate(size.layers)}
    if len(measurement.cuts) != len(measurement.stages) - 1 or any(cut not in order for cut in measurement.cuts):
        raise FileError(
            f"{what} that does not say where it was cut",
            "its cuts must be layers of the profile",
            "run the plan again with run-plan",
        )
    cuts = tuple(order[cut] for cut in measurement.cuts)
    if any(before >= after for before, after in pairwise((0, *cuts))):
        raise FileError(
            f"{what} cut before {', '.join(measurement.cuts)}",
            "cuts stand in program order, and every stage holds at least one layer",
            "run the plan again with run-plan",
        )
    return MeasuredRun(cuts, tuple(stage.measured for stage in measurement.stages))
