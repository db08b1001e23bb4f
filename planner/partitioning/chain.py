"""The exact GPipe cut of a chain in program order, as an integer program in pulp solved by HiGHS.

minimise   forward phase + backward phase and optimizer + sums of split tied gradients
subject to every boundary has one position          (constraints.every_boundary_has_one_position)
           no stage is empty                        (constraints.no_stage_is_empty)
           the slowest forward, the running maxima of backward, the holders of tied parameters
           with --plain: nothing is relayed         (constraints.nothing_is_relayed)

The objective is the step itself, so that `optimal` is said of what is reported. An incumbent by dynamic programming
and local search leaves each boundary a small window; the ILP closes the rest.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pulp

from planner.errors import InfeasibleError, SolverError
from planner.partitioning import constraints
from planner.partitioning.baselines import baselines
from planner.partitioning.bounds import CostTable, incumbent, simple_bound, windows
from planner.partitioning.chain_costs import Chain, Cuts, step_ms

SCALED_STEP = 1000.0
PROVEN = 1
EQUAL = 1e-9


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
    chain: Chain, num_stages: int, num_microbatches: int, *, plain: bool = False, time_limit_s: float = 60.0
) -> ChainSolution:
    """The cut into `num_stages` non-empty stages with the shortest GPipe step.

    `plain` allows only what stock torch does rightly by `split_spec`. Raises InfeasibleError where there are fewer
    legal cuts than boundaries.
    """
    started = time.perf_counter()
    table = CostTable(chain, num_microbatches, plain)
    _refuse_too_many_stages(table, num_stages)
    known = tuple(baselines(chain, num_stages).values())
    best = incumbent(table, num_stages, known)
    if num_stages == 1:
        whole = step_ms(chain, (), num_microbatches)
        return ChainSolution((), whole, whole, "optimal", "one stage", time.perf_counter() - started, 0)
    best_step = table.step(best) if best is not None else float("inf")
    reachable = windows(table, num_stages, best_step)
    program = _build(table, reachable, best_step, plain)
    problem = _solve(program, time_limit_s)
    found = _cuts(program) if problem.sol_status in (1, 2) else None
    if found is None and best is None:
        raise _no_plain_plan(chain, num_stages) if problem.sol_status == -1 else _gave_up(time_limit_s)
    cuts = min((c for c in (found, best) if c is not None), key=table.step)
    step = step_ms(chain, cuts, num_microbatches)
    proven = problem.sol_status == PROVEN
    bound = max(_dual_bound(problem, proven) / program.scale, simple_bound(table, num_stages))
    return ChainSolution(
        cuts=cuts,
        step_ms=step,
        lower_bound_ms=min(bound, step),
        status="optimal" if proven else "feasible",
        solver_name="HiGHS",
        seconds=time.perf_counter() - started,
        num_nodes=max(0, int(problem.solverModel.getInfo().mip_node_count)),
    )


def _refuse_too_many_stages(table: CostTable, num_stages: int) -> None:
    legal = int(table.allowed.sum())
    if legal + 1 >= num_stages:
        return
    if table.plain:
        raise _no_plain_plan(table.chain, num_stages)
    raise InfeasibleError(
        f"cannot cut {table.num_layers} layers into {num_stages} stages",
        f"the model has {legal} legal cuts",
        f"use --gpus {legal + 1} or fewer",
    )


def _no_plain_plan(chain: Chain, num_stages: int) -> InfeasibleError:
    """Names the largest number of stages that plain cuts allow, found by solving for it."""
    works = 1
    for fewer in range(num_stages - 1, 1, -1):
        with contextlib.suppress(InfeasibleError, SolverError):
            solve_chain(chain, fewer, fewer, plain=True, time_limit_s=5.0)
            works = fewer
            break
    return InfeasibleError(
        f"no plain chain of {num_stages} stages",
        "with --plain no tensor may pass over a stage and no tied parameter lie in two",
        f"drop --plain, or use --gpus {works}" if works > 1 else "drop --plain",
    )


def _gave_up(time_limit_s: float) -> SolverError:
    return SolverError(f"HiGHS found no cut in {time_limit_s:g} s", "", "allow more time")


def _build(table: CostTable, reachable: list[list[int]], best_step: float, plain: bool) -> constraints.Program:
    reference = best_step if best_step < float("inf") else simple_bound(table, len(reachable) + 1)
    program = constraints.new_program(table, reachable, SCALED_STEP / reference if reference > 0 else 1.0)
    constraints.every_boundary_has_one_position(program)
    constraints.no_stage_is_empty(program)
    if plain:
        constraints.nothing_is_relayed(program)
    optimizers = constraints.optimizer_takes(program)
    parts = [constraints.forward_takes(program), constraints.backward_takes(program, optimizers)]
    objective = constraints.total([*parts, constraints.tied_sums_take(program)])
    program.problem.setObjective(pulp.LpAffineExpression(list(objective.terms.items()), objective.constant))
    return program


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """HiGHS that stops at Ctrl-C with what it has."""

    def callSolver(self, lp: Any) -> None:  # noqa: N802
        """Called by pulp to run the solver."""
        lp.solverModel.HandleKeyboardInterrupt = True
        lp.solverModel.solve()


def _solve(program: constraints.Program, time_limit_s: float) -> Any:
    solver = _Highs(msg=False, timeLimit=time_limit_s, gapRel=1e-9, gapAbs=1e-9 * SCALED_STEP, threads=1)
    with _stdout_to_stderr():
        program.problem.solve(solver)
    return program.problem


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS prints a banner on descriptor 1 whatever it is told; stdout belongs to results."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _cuts(program: constraints.Program) -> Cuts:
    return tuple(next(j for j, v in variables.items() if (v.value() or 0.0) > 0.5) for variables in program.x)


def _dual_bound(problem: Any, proven: bool) -> float:
    """HiGHS's bound; where no integer variable was left it reports none, and the objective is the bound."""
    info = problem.solverModel.getInfo()
    objective = float(pulp.value(problem.objective) or 0.0)
    if proven and info.mip_node_count < 0:
        return objective
    bound = float(info.mip_dual_bound) + float(problem.objective.constant)  # pulp keeps the constant to itself
    return bound if abs(bound) < 1e20 else 0.0


def best_plain_within(chain: Chain, num_stages: int, num_microbatches: int, limit_ms: float) -> Cuts | None:
    """A plain chain whose step is not above `limit_ms` (to 1e-9), or None."""
    try:
        solution = solve_chain(chain, num_stages, num_microbatches, plain=True)
    except (InfeasibleError, SolverError):
        return None
    return solution.cuts if solution.step_ms <= limit_ms * (1 + EQUAL) else None


def cheapest_move(chain: Chain, cuts: Cuts, num_microbatches: int) -> tuple[int, int, int, float] | None:
    """The boundary layer that costs least to move: (layer, from stage, to stage, step difference in milliseconds).

    None where no boundary can move.
    """
    base = step_ms(chain, cuts, num_microbatches)
    bounds = [0, *cuts, len(chain.ids)]
    moves = []
    for k, cut in enumerate(cuts):
        for moved, layer, source, target in ((cut - 1, cut - 1, k, k + 1), (cut + 1, cut, k + 1, k)):
            if bounds[k] < moved < bounds[k + 2]:
                changed = (*cuts[:k], moved, *cuts[k + 1 :])
                moves.append((step_ms(chain, changed, num_microbatches) - base, layer, source, target))
    if not moves:
        return None
    delta, layer, source, target = min(moves)
    return layer, source, target, delta
