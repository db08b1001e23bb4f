"""The exact GPipe cut of a chain in program order, as an integer program in pulp solved by HiGHS.

minimise   forward phase + backward phase and optimizer + sums of split tied gradients
subject to every boundary has one position          (constraints.every_boundary_has_one_position)
           no stage is empty                        (constraints.no_stage_is_empty)
           the slowest forward, the running maxima of backward, the holders of tied parameters
           with --plain: nothing is relayed         (constraints.nothing_is_relayed)
           with a limit: every stage's memory fits  (constraints.stages_fit)

The objective is the step itself, so that `optimal` is said of what is reported. Incumbents and bounds (see `bounds`)
leave each boundary a small window; the ILP closes the rest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import pulp

from planner.errors import InfeasibleError
from planner.partitioning import constraints
from planner.partitioning.baselines import baselines
from planner.partitioning.bounds import Remainder, incumbent, remainder
from planner.partitioning.chain_costs import EQUAL, Chain, CostTable, Cuts, step_ms
from planner.partitioning.memory_limit import FittingStages, MemoryLimit, refuse_what_does_not_fit
from planner.partitioning.solving import PROVEN, SCALED_OBJECTIVE, UNPROVEN, dual_bound, node_count, solve


@dataclass(frozen=True, slots=True)
class ChainSolution:
    """Cuts, their step, and the proof: no cut has a step below `lower_bound_ms`; `optimal` where the two meet."""

    cuts: Cuts
    step_ms: float
    lower_bound_ms: float
    status: Literal["optimal", "feasible"]
    solver_name: str
    seconds: float
    num_nodes: int


def solve_chain(
    chain: Chain,
    num_stages: int,
    num_microbatches: int,
    *,
    plain: bool = False,
    time_limit_s: float = 60.0,
    schedule: str = "gpipe",
    memory: MemoryLimit | None = None,
) -> ChainSolution:
    """The cut into `num_stages` non-empty stages with the shortest step of `schedule` ("gpipe" or "1f1b").

    `plain` allows only what stock torch does rightly by `split_spec`; `memory` only stages that fit. Raises
    InfeasibleError where there are fewer legal cuts than boundaries, or no cut fits.
    """
    started = time.perf_counter()
    fitting = None if memory is None else FittingStages(chain, num_microbatches, schedule, memory)
    table = CostTable(chain, num_microbatches, plain, schedule, fitting)
    _refuse_too_many_stages(table, num_stages)
    refuse_what_does_not_fit(table, num_stages)
    if schedule == "1f1b" and num_stages > 1:
        from planner.partitioning.one_f_one_b import solve_one_f_one_b

        return solve_one_f_one_b(table, num_stages, time_limit_s)
    if num_stages == 1:
        whole = step_ms(chain, (), num_microbatches, schedule)
        return ChainSolution((), whole, whole, "optimal", "one stage", time.perf_counter() - started, 0)
    good = incumbent(table, num_stages, tuple(baselines(chain, num_stages).values()))
    left = remainder(table, num_stages, good)
    program = _build(table, left, plain)
    outcome = solve(program.problem, time_limit_s)
    found = program.cuts() if outcome in (PROVEN, UNPROVEN) else left.best
    cuts = min((left.best, found), key=table.step)
    step = step_ms(chain, cuts, num_microbatches)
    proven = outcome == PROVEN
    bound = max(dual_bound(program.problem) / program.scale, left.bound_ms)
    return ChainSolution(
        cuts=cuts,
        step_ms=step,
        lower_bound_ms=min(bound, step),
        status="optimal" if proven else "feasible",
        solver_name="HiGHS",
        seconds=time.perf_counter() - started,
        num_nodes=node_count(program.problem),
    )


class TooFewCutsError(InfeasibleError):
    """There are fewer legal cuts than boundaries between the stages."""


def _refuse_too_many_stages(table: CostTable, num_stages: int) -> None:
    most = table.most_stages()
    if num_stages <= most:
        return
    if table.plain:
        raise InfeasibleError(
            f"no plain chain of {num_stages} stages",
            "with --plain no tensor may pass over a stage and no tied parameter lie in two",
            f"drop --plain, or use --gpus {most} or fewer" if most > 1 else "drop --plain",
        )
    raise TooFewCutsError(
        f"cannot cut {table.num_layers} layers into {num_stages} stages",
        f"the model has {most - 1} legal cuts",
        f"use --gpus {most} or fewer",
    )


def _build(table: CostTable, left: Remainder, plain: bool) -> constraints.Program:
    best_step = table.step(left.best)
    program = constraints.new_program(table, left.positions, SCALED_OBJECTIVE / best_step if best_step > 0 else 1.0)
    constraints.every_boundary_has_one_position(program)
    constraints.no_stage_is_empty(program)
    if plain:
        constraints.nothing_is_relayed(program)
    if table.fitting is not None:
        constraints.stages_fit(program, table.fitting.masks(program.num_stages))
    optimizers = constraints.optimizer_takes(program)
    parts = [constraints.forward_takes(program), constraints.backward_takes(program, optimizers)]
    objective = constraints.total([*parts, constraints.tied_sums_take(program)])
    program.problem.setObjective(pulp.LpAffineExpression(list(objective.terms.items()), objective.constant))
    return program


def best_plain_within(
    chain: Chain,
    num_stages: int,
    num_microbatches: int,
    limit_ms: float,
    schedule: str = "gpipe",
    memory: MemoryLimit | None = None,
) -> Cuts | None:
    """A plain chain whose step is not above `limit_ms` (to 1e-9), or None."""
    try:
        solution = solve_chain(chain, num_stages, num_microbatches, plain=True, schedule=schedule, memory=memory)
    except InfeasibleError:
        return None
    return solution.cuts if solution.step_ms <= limit_ms * (1 + EQUAL) else None


def cheapest_move(
    chain: Chain, cuts: Cuts, num_microbatches: int, schedule: str = "gpipe", memory: MemoryLimit | None = None
) -> tuple[int, int, int, float] | None:
    """The boundary layer that costs least to move: (layer, from stage, to stage, step difference in milliseconds).

    None where no boundary can move, or no such cut fits into the memory.
    """
    fitting = None if memory is None else FittingStages(chain, num_microbatches, schedule, memory)
    base = step_ms(chain, cuts, num_microbatches, schedule)
    bounds = [0, *cuts, len(chain.ids)]
    moves = []
    for k, cut in enumerate(cuts):
        for moved, layer, source, target in ((cut - 1, cut - 1, k, k + 1), (cut + 1, cut, k + 1, k)):
            if bounds[k] < moved < bounds[k + 2]:
                changed = (*cuts[:k], moved, *cuts[k + 1 :])
                if fitting is not None and not fitting.fits(changed):
                    continue
                moves.append((step_ms(chain, changed, num_microbatches, schedule) - base, layer, source, target))
    if not moves:
        return None
    delta, layer, source, target = min(moves)
    return layer, source, target, delta
