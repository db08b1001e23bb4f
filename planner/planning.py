"""The whole story on one page: profile → layer graph → ILP for every microbatch count → the best one as a Plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.errors import UsageError
from planner.files.links_file import LinkCost, LinkFit, Links
from planner.files.plan_file import (
    Baseline,
    CurvePoint,
    Cut,
    Plan,
    PlannedModel,
    SolverRecord,
    Stage,
    charged,
    tied_over,
)
from planner.files.plan_rules import MAX_SEED
from planner.files.profile_file import Profile, SizeProfile
from planner.scheduling.simulation import too_few_microbatches

if TYPE_CHECKING:
    from planner.partitioning.chain import ChainSolution
    from planner.partitioning.chain_costs import Chain
    from planner.partitioning.memory_limit import MemoryLimit
    from planner.scheduling.memory_timeline import MemoryPoint

Progress = Callable[[float, str], None]
DEFAULT_BATCH_SIZE = 16
WORTH_A_CHANGE = 0.001
EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is wanted for. `microbatches` None means: choose.

    `memory_bytes` is what each stage may need; None means what the profiled device has, and on a CPU no limit. `meta`:
    the whole model may not fit into memory. `precision` None means the model file's, else fp32.
    """

    gpus: int
    batch_size: int | None = None
    microbatches: int | None = None
    device: str | None = None
    bandwidth_bytes_per_s: float | None = None
    plain: bool = False
    seed: int = 0
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    memory_bytes: int | None = None
    meta: bool = False
    links: LinkFit | None = None
    precision: Literal["fp32", "bf16"] | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UsageError(f"--gpus {self.gpus}", "a plan has at least one stage", "give --gpus 1 or more")
        if self.links is not None and self.bandwidth_bytes_per_s is not None:
            raise UsageError("links and a bandwidth", "crossings are charged by one of the two", "leave one out")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(
                f"seed {self.seed}", f"a seed is a whole number from 0 to {MAX_SEED:,}", "give another one"
            )
        if self.schedule == "1f1b" and self.microbatches is not None and self.microbatches < self.gpus:
            raise too_few_microbatches(self.microbatches, self.gpus)

    def link_cost(self) -> LinkCost:
        """What every crossing is charged."""
        return charged(self.links, self.bandwidth_bytes_per_s)


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
    schedule: Literal["gpipe", "1f1b"] = "gpipe",
    memory_bytes: int | None = None,
    meta: bool = False,
    links: Links | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
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
        progress=progress,
    )


def resolve_batch_size(model: str, request: PlanRequest) -> int:
    """The batch size asked for, else the model file's, else 16."""
    if request.batch_size is not None:
        return request.batch_size
    from planner.tracing.loading import load_source

    return load_source(model).batch_size or DEFAULT_BATCH_SIZE


def resolve_precision(model: str, request: PlanRequest) -> Literal["fp32", "bf16"]:
    """The precision asked for, else the model file's, else fp32. Raises UsageError where they contradict each other."""
    from planner.tracing.loading import load_source

    stated = load_source(model).precision
    if request.precision is not None and stated not in (None, request.precision):
        raise UsageError(
            f'--precision {request.precision}, and PRECISION = "{stated}" in the model file',
            "a model is trained in one precision",
            f"leave out --precision, or PRECISION in {Path(model.partition(':')[0]).name}",
        )
    return request.precision or stated or "fp32"


def candidate_counts(batch_size: int, request: PlanRequest) -> tuple[int, ...]:
    """Microbatch counts to consider: the divisors of the batch from the number of stages up, or the one asked for.

    Fewer microbatches than stages leave more than 43 % of the time idle and are left out while there are others.

    >>> candidate_counts(16, PlanRequest(gpus=4))
    (4, 8, 16)
    """
    if request.microbatches is not None:
        if batch_size % request.microbatches:
            raise UsageError(
                f"a batch of {batch_size} in {request.microbatches} microbatches",
                "microbatches are of equal size",
                f"use --microbatches {_nearest_divisor(batch_size, request.microbatches)} or another --batch-size",
            )
        return (request.microbatches,)
    divisors = [count for count in range(1, batch_size + 1) if batch_size % count == 0]
    enough = tuple(count for count in divisors if count >= request.gpus)
    if not enough and request.schedule == "1f1b":
        raise too_few_microbatches(batch_size, request.gpus)
    return enough or (batch_size,)


def _nearest_divisor(batch_size: int, wanted: int) -> int:
    divisors = [count for count in range(1, batch_size + 1) if batch_size % count == 0]
    return min(divisors, key=lambda count: abs(count - wanted))


@dataclass(frozen=True, slots=True)
class _Candidate:
    num_microbatches: int
    size: SizeProfile
    chain: Chain
    solution: ChainSolution
    program: Chain
    order: tuple[int, ...] | None = None


def plan_profile(profile: Profile, request: PlanRequest, *, keep: tuple[int, ...] | None = None) -> Plan:
    """Solve every microbatch count that was profiled, and assemble the best plan. Needs no hardware.

    Counts at which no cut fits into the memory are left out. Layers change places where that makes the step shorter and
    the profile says which may. The cuts `keep` (indices of layers) stay unless others save at least 0.1 % of the step.
    Raises InfeasibleError where nothing fits.
    """
    from planner.memory_advice import explain_infeasible
    from planner.partitioning.chain import best_plain_within
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
        return _assemble(profile, request, best, best.solution.cuts, candidates)
    return _assemble(profile, request, replace(best, chain=best.program, order=None), in_program_order, candidates)


def _solve(
    size: SizeProfile, request: PlanRequest, count: int, limit: MemoryLimit | None, num_searches: int
) -> _Candidate:
    """The best cut at one microbatch count, of the layers in the best order; one of `num_searches`."""
    from planner.partitioning.chain import solve_chain
    from planner.partitioning.layer_dag import layer_dag
    from planner.partitioning.layer_graph import build_layer_graph, chain_of
    from planner.partitioning.orders import SEARCH_S, Problem, solve_in_any_order

    graph = build_layer_graph(size, request.link_cost())
    if request.plain or size.dependencies is None:
        chain = chain_of(graph)
        solution = solve_chain(chain, request.gpus, count, plain=request.plain, schedule=request.schedule, memory=limit)
        return _Candidate(count, size, chain, solution, chain)
    problem = Problem(layer_dag(graph, size.dependencies), request.gpus, count, request.schedule, limit)
    found = solve_in_any_order(problem, search_s=SEARCH_S / num_searches)
    return _Candidate(count, size, found.chain, found.solution, problem.dag.chain, found.order)


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


def chain_at(profile: Profile, microbatch_size: int, request: PlanRequest) -> Chain:
    """The chain that is solved for one microbatch size."""
    from planner.partitioning.layer_graph import build_layer_graph, chain_of

    return chain_of(build_layer_graph(profile.size(microbatch_size), request.link_cost()))


def memory_limit(profile: Profile, request: PlanRequest) -> MemoryLimit | None:
    """What a stage may need: what was asked for, else what the device has. Raises UsageError without measurements."""
    from planner.partitioning.memory_limit import MemoryLimit

    asked = request.memory_bytes
    limit = profile.machine.memory_bytes if asked is None else asked
    measured = all(size.memory is not None for size in profile.sizes)
    if limit is None or not (measured or asked is not None):
        return None
    if not measured:
        raise UsageError(
            "--memory with a profile that knows no memory",
            "the memory of every layer must have been measured",
            "profile again with --fresh",
        )
    return MemoryLimit(limit, profile.machine.reserved_bytes)


def _as_good(best: _Candidate, cuts: tuple[int, ...], request: PlanRequest) -> bool:
    from planner.partitioning.chain_costs import is_plain, step_ms

    step = step_ms(best.program, cuts, best.num_microbatches, request.schedule)
    allowed = not request.plain or is_plain(best.program, cuts)
    return allowed and step <= best.solution.step_ms * (1 + WORTH_A_CHANGE)


def profiled_counts(profile: Profile, batch_size: int, request: PlanRequest) -> tuple[int, ...]:
    """The candidate counts whose microbatch size is in the profile. Raises UsageError where none is."""
    sizes = {size.microbatch_size for size in profile.sizes}
    counts = candidate_counts(batch_size, request)
    found = tuple(count for count in counts if batch_size // count in sizes)
    if not found:
        raise UsageError(
            f"a batch of {batch_size} in {', '.join(map(str, counts))} microbatches",
            f"the profile holds microbatches of {', '.join(map(str, sorted(sizes)))}",
            "profile again with --fresh, or ask for one of these",
        )
    return found


def _assemble(
    profile: Profile, request: PlanRequest, best: _Candidate, cuts: tuple[int, ...], candidates: Sequence[_Candidate]
) -> Plan:
    from planner.partitioning.chain_costs import is_plain, step_ms

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
    )


def _cuts(chain: Chain, cuts: tuple[int, ...]) -> tuple[Cut, ...]:
    from planner.partitioning.chain_costs import crossing, crossing_ms

    forward, backward = crossing_ms(chain)
    found = []
    for cut in cuts:
        tensors = crossing(chain, cut)
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        names = tuple(tensor.name for tensor in tensors)
        found.append(Cut(chain.ids[cut], names, num_bytes, forward[cut], backward[cut]))
    return tuple(found)


def _why_not_plain(profile: Profile, best: _Candidate, cuts: tuple[int, ...]) -> str:
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


def stage_peaks(
    chain: Chain, cuts: Sequence[int], count: int, schedule: str, reserved_bytes: int = 0
) -> Sequence[MemoryPoint | None]:
    """The fullest moment of every stage; None where memory was not measured."""
    from planner.partitioning.stage_memory import StageMemoryTable

    if chain.memory is None:
        return [None] * (len(cuts) + 1)
    return StageMemoryTable(chain, count, schedule, reserved_bytes).peaks(cuts)


def _stages(chain: Chain, cuts: tuple[int, ...], count: int, schedule: str, reserved_bytes: int) -> tuple[Stage, ...]:
    from planner.partitioning.chain_costs import stage_costs
    from planner.scheduling.simulation import simulate

    costs = stage_costs(chain, cuts)
    simulated = simulate(costs, count, schedule)
    bounds = [0, *cuts, len(chain.ids)]
    peaks = stage_peaks(chain, cuts, count, schedule, reserved_bytes)
    stages = []
    for index, (cost, peak) in enumerate(zip(costs, peaks, strict=True)):
        start, stop = bounds[index], bounds[index + 1]
        held = dict(_held_tied(chain, start, stop))
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
                parameter_bytes=sum(chain.parameter_bytes[start:stop]) + sum(held.values()),
                peak_memory_bytes=None if peak is None else peak.peak_bytes,
                memory=None if peak is None else peak.memory,
            )
        )
    return tuple(stages)


def _held_tied(chain: Chain, start: int, stop: int) -> list[tuple[str, int]]:
    return [(t.name, t.parameter_bytes) for t in chain.tied if any(start <= layer < stop for layer in t.layers)]


def _combined(spreads: Sequence[float]) -> float:
    """The standard error of a sum of independent medians."""
    return sqrt(sum(spread * spread for spread in spreads))


def _baselines(chain: Chain, request: PlanRequest, count: int, limit: MemoryLimit | None) -> dict[str, Baseline]:
    from planner.partitioning.baselines import baselines
    from planner.partitioning.chain_costs import step_ms

    found = {}
    for name, cuts in baselines(chain, request.gpus).items():
        step, fits = step_ms(chain, cuts, count, request.schedule), None
        if limit is not None:
            peaks = stage_peaks(chain, cuts, count, request.schedule, limit.reserved_bytes)
            fits = all(peak is None or peak.peak_bytes <= limit.limit_bytes for peak in peaks)
        found[name] = Baseline(step, step, fits, tuple(chain.ids[cut] for cut in cuts))
    return found


def planned_chain(size: SizeProfile, plan: Plan) -> Chain:
    """The layers of `size` as `plan` cuts them, in its order."""
    from planner.partitioning.layer_dag import layer_dag
    from planner.partitioning.layer_graph import build_layer_graph

    dag = layer_dag(build_layer_graph(size, plan.link_cost()), size.dependencies)
    order = dag.chain.ids if plan.order is None else plan.order
    return dag.in_order([dag.chain.ids.index(str(name)) for name in order])


def relative_to(path: str, folder: Path) -> str:
    """`path` as it is written into a file in `folder`."""
    return os.path.relpath(path, folder.resolve())


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
