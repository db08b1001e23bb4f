"""HiGHS through pulp: one way to run it, and what it says about the bound."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import pulp

SCALED_OBJECTIVE = 1000.0  # problems are scaled so that the best known value has this size: tolerances are absolute
PROVEN, UNPROVEN, IMPOSSIBLE = 1, 2, -1  # pulp's sol_status; its status says "Optimal" at the time limit too


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """HiGHS that stops at Ctrl-C with what it has."""

    def callSolver(self, lp: Any) -> None:  # noqa: N802
        """Called by pulp to run the solver."""
        lp.solverModel.HandleKeyboardInterrupt = True
        lp.solverModel.solve()


def solve(problem: pulp.LpProblem, time_limit_s: float) -> int:
    """Run HiGHS on `problem`; PROVEN, UNPROVEN, IMPOSSIBLE or another `sol_status` of pulp.

    Always one thread: the first solve of a process fixes the number for all later ones.
    """
    solver = _Highs(msg=False, timeLimit=time_limit_s, gapRel=1e-9, gapAbs=1e-9 * SCALED_OBJECTIVE, threads=1)
    with _stdout_to_nowhere():
        problem.solve(solver)
    return int(problem.sol_status)


@contextlib.contextmanager
def _stdout_to_nowhere() -> Iterator[None]:
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


def dual_bound(problem: pulp.LpProblem) -> float:
    """HiGHS's bound; where no integer variable was left it reports none, and the objective is the bound."""
    info = problem.solverModel.getInfo()
    if problem.sol_status == PROVEN and info.mip_node_count < 0:
        return float(pulp.value(problem.objective) or 0.0)
    bound = float(info.mip_dual_bound) + float(problem.objective.constant)  # pulp keeps the constant to itself
    return bound if abs(bound) < 1e20 else 0.0


def node_count(problem: pulp.LpProblem) -> int:
    """The nodes of HiGHS's search tree; 0 where there was none."""
    return max(0, int(problem.solverModel.getInfo().mip_node_count))
