"""The whole story on one page: profile → layer graph → ILP for every microbatch count → the best one as a Plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.errors import UsageError
from planner.files.links_file import Links
from planner.files.plan_file import Plan
from planner.files.profile_file import Granularity, Profile, Schedule, SizeProfile
from planner.request import (
    PlanRequest,
    candidate_counts,
    chain_at,
    memory_limit,
    profiled_counts,
    resolve_batch_size,
    resolve_precision,
)

if TYPE_CHECKING:
    from planner.assembly import Candidate
    from planner.partitioning.chain_costs import Chain
    from planner.partitioning.memory_limit import MemoryLimit

Progress = Callable[[float, str], None]
WORTH_A_CHANGE = 0.001


def make_plan(
    source: str | Path | Profile,
    gpus: int,
    *,
    batch_size: int | None = None,
    microbatches: int | None = None,
    device: str | None = None,
    bandwidth_bytes_per_s: float | None = None,
    plain: bool = False,
    seed: int = 0,
    schedule: Schedule = "gpipe",
    memory_bytes: int | None = None,
    meta: bool = False,
    links: Links | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    granularity: Granularity = "module",
    progress: Progress = lambda share, text: None,
) -> Plan:
    """Plan `source` (a model file, or a Profile of one) for `gpus` stages.

    `links` (`Links.load(path)`, or measured by `planner.machine.links`) take the place of a bandwidth.

    Raises ModelFileError, TraceError, ProfileError, InfeasibleError or UsageError; see `planner.errors`.
    """
    request = PlanRequest(
        gpus,
        batch_size,
        microbatches,
        device,
        bandwidth_bytes_per_s,
        plain,
        seed,
        schedule,
        memory_bytes,
        meta,
        None if links is None else links.fit,
        precision,
        granularity,
    )
    profile = source if isinstance(source, Profile) else measure(str(source), request, progress)
    return plan_profile(profile, request)


def measure(model: str, request: PlanRequest, progress: Progress = lambda share, text: None) -> Profile:
    """Profile the model file at every microbatch size that the plan may choose."""
    from planner.profiling.profiler import profile_model

    batch_size = resolve_batch_size(model, request)
    counts = candidate_counts(batch_size, request)
    return profile_model(
        model,
        batch_size=batch_size,
        microbatch_sizes=tuple(batch_size // count for count in counts),
        num_workers=request.gpus,
        device=request.device,
        seed=request.seed,
        meta=request.meta,
        precision=resolve_precision(model, request),
        granularity=request.granularity,
        schedule=request.schedule,
        progress=progress,
    )


def plan_profile(profile: Profile, request: PlanRequest, *, keep: tuple[int, ...] | None = None) -> Plan:
    """Solve every microbatch count that was profiled, and assemble the best plan. Needs no hardware.

    Counts at which no cut fits into the memory are left out. Layers change places where that makes the step shorter and
    the profile says which may. The cuts `keep` (indices of layers) stay unless others save at least 0.1 % of the step.
    Raises InfeasibleError where nothing fits.
    """
    from planner.assembly import assemble
    from planner.intervals import with_intervals
    from planner.memory_advice import explain_infeasible
    from planner.partitioning.chain import TooFewCutsError, best_plain_within
    from planner.partitioning.memory_limit import TooLittleMemoryError

    if request.precision not in (None, profile.precision):
        raise UsageError(
            f"--precision {request.precision} with a profile that was made in {profile.precision}",
            "times and bytes hold for the precision that they were measured in",
            f"leave out --precision, or profile the model again with --precision {request.precision}",
        )
    batch_size = profile.batch_size if request.batch_size is None else request.batch_size
    limit = memory_limit(profile, request)
    candidates, refused = [], []
    counts = profiled_counts(profile, batch_size, request)
    for count in counts:
        try:
            candidates.append(_solve(profile.size(batch_size // count), request, count, limit, len(counts)))
        except TooLittleMemoryError as error:
            refused.append(error)
        except TooFewCutsError as error:
            if profile.granularity == "module" and profile.model.file is not None:
                remedy = f"{error.remedy}, or --granularity operation, which also cuts inside modules"
                raise TooFewCutsError(error.got, error.rule, remedy) from None
            raise
    if not candidates:
        raise explain_infeasible(
            refused,
            lambda **changes: _works(profile, request, changes),
            gpus=request.gpus,
            batch_size=batch_size,
            microbatch_sizes=[size.microbatch_size for size in profile.sizes],
            other_schedule="1f1b" if request.schedule == "gpipe" else None,
        )
    best = min(candidates, key=lambda candidate: candidate.solution.step_ms)
    plain = best_plain_within(
        best.program, request.gpus, best.num_microbatches, best.solution.step_ms, request.schedule, limit
    )
    in_program_order = keep if keep is not None and _as_good(best, keep, request) else plain
    if in_program_order is None:
        plan = assemble(profile, request, best, best.solution.cuts, candidates)
    else:
        kept = replace(best, chain=best.program, order=None)
        plan = assemble(profile, request, kept, in_program_order, candidates)
    return with_intervals(plan, profile)


def _solve(
    size: SizeProfile, request: PlanRequest, count: int, limit: MemoryLimit | None, num_searches: int
) -> Candidate:
    """The best cut at one microbatch count, of the layers in the best order; one of `num_searches`."""
    from planner.assembly import Candidate
    from planner.partitioning.chain import solve_chain
    from planner.partitioning.layer_dag import layer_dag
    from planner.partitioning.layer_graph import build_layer_graph, chain_of
    from planner.partitioning.orders import SEARCH_S, Problem, solve_in_any_order

    graph = build_layer_graph(size, request.link_cost())
    if request.plain or size.dependencies is None:
        chain = chain_of(graph)
        solution = solve_chain(chain, request.gpus, count, plain=request.plain, schedule=request.schedule, memory=limit)
        return Candidate(count, size, chain, solution, chain)
    problem = Problem(layer_dag(graph, size.dependencies), request.gpus, count, request.schedule, limit)
    found = solve_in_any_order(problem, search_s=SEARCH_S / num_searches)
    return Candidate(count, size, found.chain, found.solution, problem.dag.chain, found.order)


def _works(profile: Profile, request: PlanRequest, changes: dict[str, Any]) -> bool:
    """Whether the request with these changes has a microbatch count at which some cut fits."""
    from planner.partitioning.chain_costs import CostTable
    from planner.partitioning.memory_limit import FittingStages, any_fit

    try:
        request = replace(request, **changes)
        batch_size = profile.batch_size if request.batch_size is None else request.batch_size
        counts = profiled_counts(profile, batch_size, request)
    except UsageError:
        return False
    limit = memory_limit(profile, request)
    assert limit is not None
    for count in counts:
        chain = chain_at(profile, batch_size // count, request)
        fitting = FittingStages(chain, count, request.schedule, limit)
        table = CostTable(chain, count, request.plain, request.schedule, fitting)
        if request.gpus <= table.most_stages() and any_fit(table, request.gpus):
            return True
    return False


def _as_good(best: Candidate, cuts: tuple[int, ...], request: PlanRequest) -> bool:
    from planner.partitioning.chain_costs import is_plain, step_ms

    step = step_ms(best.program, cuts, best.num_microbatches, request.schedule)
    allowed = not request.plain or is_plain(best.program, cuts)
    return allowed and step <= best.solution.step_ms * (1 + WORTH_A_CHANGE)


def planned_chain(size: SizeProfile, plan: Plan) -> Chain:
    """The layers of `size` as `plan` cuts them, in its order."""
    from planner.partitioning.layer_dag import layer_dag
    from planner.partitioning.layer_graph import build_layer_graph

    dag = layer_dag(build_layer_graph(size, plan.link_cost()), size.dependencies)
    order = dag.chain.ids if plan.order is None else plan.order
    return dag.in_order([dag.chain.ids.index(str(name)) for name in order])


def limit_line(plan: Plan, profile: Profile) -> str:
    """Which stage limits the step, and what the cheapest other cut would cost."""
    from planner.partitioning.chain import cheapest_move
    from planner.partitioning.memory_limit import MemoryLimit

    chain = planned_chain(profile.size(plan.microbatch_size), plan)
    cuts = tuple(chain.ids.index(cut.before) for cut in plan.cuts)
    limiting = max(plan.stages, key=lambda stage: stage.load_ms)
    line = f"limited by stage {limiting.index}"
    if not cuts:
        return line
    limit = None
    if plan.memory_limit_bytes is not None and chain.memory is not None:
        limit = MemoryLimit(plan.memory_limit_bytes, profile.machine.reserved_bytes)
    move = cheapest_move(chain, cuts, plan.num_microbatches, plan.schedule or "gpipe", limit)
    if move is None:
        return line
    layer, _, target, delta_ms = move
    return f"{line}; moving {chain.ids[layer]} to stage {target} would cost {max(0.0, delta_ms):.2g} ms per step"
