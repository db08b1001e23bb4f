"""The best cuts that were found → Plan: what crosses them, what every stage will cost, and what people do instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from planner.files.plan_file import (
    Baseline,
    CurvePoint,
    Cut,
    Plan,
    PlannedModel,
    SolverRecord,
    Stage,
    tied_over,
)
from planner.files.profile_file import Profile, SizeProfile
from planner.partitioning.baselines import baselines
from planner.partitioning.chain import ChainSolution
from planner.partitioning.chain_costs import EQUAL, Chain, crossing, crossing_ms, holds, is_plain, stage_costs, step_ms
from planner.partitioning.memory_limit import MemoryLimit
from planner.partitioning.stage_memory import StageMemoryTable
from planner.request import PlanRequest, memory_limit
from planner.scheduling.memory_timeline import MemoryPoint
from planner.scheduling.simulation import simulate


@dataclass(frozen=True, slots=True)
class Candidate:
    """The best cut at one microbatch count: `chain` in the order that is cut (None: the program's, as `program`)."""

    num_microbatches: int
    size: SizeProfile
    chain: Chain
    solution: ChainSolution
    program: Chain
    order: tuple[int, ...] | None = None


def assemble(
    profile: Profile, request: PlanRequest, best: Candidate, cuts: tuple[int, ...], candidates: Sequence[Candidate]
) -> Plan:
    """The plan that cuts `best` at `cuts`; `candidates` are the best of every microbatch count."""
    chain, solution, count = best.chain, best.solution, best.num_microbatches
    step = step_ms(chain, cuts, count, request.schedule)
    plain = is_plain(chain, cuts) and not profile.why_not_plain
    return Plan(
        model=PlannedModel(
            file=profile.model.file,
            fingerprint=best.size.fingerprint,
            name=profile.model.name,
            num_parameters=profile.model.num_parameters,
            entry=profile.model.entry,
            meta=profile.model.meta or request.meta,
            granularity="module" if profile.granularity == "module" else "operation",
        ),
        status=solution.status if step <= solution.step_ms * (1 + EQUAL) else "feasible",
        objective_ms=step,
        lower_bound_ms=min(solution.lower_bound_ms, step),
        solver=SolverRecord(
            solution.solver_name,
            sum(c.solution.seconds for c in candidates),
            sum(c.solution.num_nodes for c in candidates),
        ),
        schedule=request.schedule,
        num_microbatches=count,
        microbatch_size=best.size.microbatch_size,
        precision=profile.precision,
        seed=request.seed,
        data_parallel=1,
        step_ms=step,
        plain_chain=plain,
        why_not=None if plain else _why_not_plain(profile, best, cuts),
        split_specification={chain.names[cut]: "beginning" for cut in cuts} if plain else None,
        order=None if best.order is None else chain.ids,
        recompute=(),
        cuts=_cuts(chain, cuts),
        stages=_stages(chain, cuts, count, request.schedule, profile.machine.reserved_bytes),
        baselines=_baselines(best.program, request, count, memory_limit(profile, request)),
        microbatch_curve=tuple(
            CurvePoint(c.num_microbatches, c.size.microbatch_size, c.solution.step_ms, c.solution.status)
            for c in candidates
        ),
        tied=tied_over(cuts, {tied.name: tied.layers for tied in chain.tied if tied.trainable}),
        bandwidth_bytes_per_s=request.bandwidth_bytes_per_s,
        links=request.links,
        machine=profile.machine,
        memory_limit_bytes=profile.machine.memory_bytes if request.memory_bytes is None else request.memory_bytes,
        estimated=profile.estimated,
    )


def _cuts(chain: Chain, cuts: tuple[int, ...]) -> tuple[Cut, ...]:
    forward, backward = crossing_ms(replace(chain, boundary_forward_ms=0.0, boundary_backward_ms=0.0))
    found = []
    for cut in cuts:
        tensors = crossing(chain, cut)
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        names = tuple(tensor.name for tensor in tensors)
        found.append(Cut(chain.ids[cut], names, num_bytes, forward[cut], backward[cut]))
    return tuple(found)


def _why_not_plain(profile: Profile, best: Candidate, cuts: tuple[int, ...]) -> str:
    chain = best.chain
    if best.order is not None:
        return "its layers are cut in an order of their own, and split_spec cuts in program order"
    if profile.why_not_plain:
        return profile.why_not_plain
    for tied in chain.tied:
        if any(tied.layers[0] < cut <= tied.layers[-1] for cut in cuts):
            return f"{tied.name} is used in more than one stage, and stock torch does not sum its gradients"
    for tensor in chain.tensors:
        crossed = [cut for cut in cuts if tensor.producer < cut <= tensor.last_consumer]
        if len(crossed) > 1:
            return f"{tensor.name} passes over the stage that begins at {chain.ids[crossed[1]]}"
    for cut in cuts:
        if not chain.plain_cut[cut]:
            return f"what crosses the cut before {chain.ids[cut]} is not what SplitPoint.BEGINNING would send"
    return "the chain is not plain"


def _stages(chain: Chain, cuts: tuple[int, ...], count: int, schedule: str, reserved_bytes: int) -> tuple[Stage, ...]:
    costs = stage_costs(chain, cuts)
    simulated = simulate(costs, count, schedule)
    bounds = [0, *cuts, len(chain.ids)]
    peaks: list[MemoryPoint | None] = [None] * len(costs)
    if chain.memory is not None:
        peaks = [*StageMemoryTable(chain, count, schedule, reserved_bytes).peaks(cuts)]
    stages = []
    for index, (cost, peak) in enumerate(zip(costs, peaks, strict=True)):
        start, stop = bounds[index], bounds[index + 1]
        held = sum(tied.parameter_bytes for tied in chain.tied if holds(tied, start, stop))
        stages.append(
            Stage(
                index=index,
                rank=index,
                nodes=chain.ids[start:stop],
                names=chain.names[start:stop],
                forward_ms=cost.forward_ms,
                forward_spread_ms=_combined(chain.forward_spread_ms[start:stop]),
                backward_ms=cost.backward_ms,
                backward_spread_ms=_combined(chain.backward_spread_ms[start:stop]),
                backward_first_ms=cost.backward_first_ms,
                optimizer_ms=cost.optimizer_ms,
                load_ms=cost.forward_ms + cost.backward_ms,
                wait_ms=simulated.wait_ms[index],
                bubble_fraction=simulated.bubble_fraction[index],
                parameter_bytes=sum(chain.parameter_bytes[start:stop]) + held,
                peak_memory_bytes=None if peak is None else peak.peak_bytes,
                memory=None if peak is None else peak.memory,
            )
        )
    return tuple(stages)


def _combined(spreads: Sequence[float]) -> float:
    """The standard error of a sum of independent medians."""
    return sqrt(sum(spread * spread for spread in spreads))


def _baselines(chain: Chain, request: PlanRequest, count: int, limit: MemoryLimit | None) -> dict[str, Baseline]:
    table = None if limit is None else StageMemoryTable(chain, count, request.schedule, limit.reserved_bytes)
    found = {}
    for name, cuts in baselines(chain, request.gpus).items():
        step = step_ms(chain, cuts, count, request.schedule)
        fits = None
        if table is not None and limit is not None:
            fits = all(peak.peak_bytes <= limit.limit_bytes for peak in table.peaks(cuts))
        found[name] = Baseline(step, step, fits, tuple(chain.ids[cut] for cut in cuts))
    return found
