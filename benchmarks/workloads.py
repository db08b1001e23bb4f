"""Solves the published layer graphs and prints what was found beside what is known.

python benchmarks/workloads.py FOLDER [--stages 2 4] [--time-limit 60]

FOLDER holds the graphs as JSON and optima.json: {graph: {"compute" | "comm": {stages: milliseconds}}}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from planner.partitioning.branching import solve_graph
from planner.partitioning.layer_graph import graph_from_json

NOT_GRAPHS = ("optima", "known_small")
COLUMNS = "{:34} {:>2} {:8} {:>12} {:>12} {:>12} {:9} {:>8}  {}"


def main() -> None:
    """Parse the command line and print a row per graph, number of stages and objective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS")
    arguments = parser.parse_args()
    known = json.loads((arguments.folder / "optima.json").read_text())
    print(COLUMNS.format("graph", "K", "objective", "found", "known", "bound", "status", "seconds", "proof"))
    for path in sorted(arguments.folder.glob("*.json")):
        if path.stem not in NOT_GRAPHS:
            for num_stages in arguments.stages:
                for objective in ("compute", "comm"):
                    optimum = known[path.stem][objective].get(str(num_stages))
                    print(row(path, num_stages, objective, optimum, arguments.time_limit), flush=True)


def row(path: Path, num_stages: int, objective: str, optimum: float | None, time_limit_s: float) -> str:
    """One solve as a line of the table; milliseconds."""
    transfers = objective == "comm"
    found = solve_graph(graph_from_json(path), num_stages, transfers=transfers, time_limit_s=time_limit_s)
    return COLUMNS.format(
        path.stem,
        num_stages,
        objective,
        f"{found.objective_ms:.6f}",
        "" if optimum is None else f"{optimum:.6f}",
        f"{found.lower_bound_ms:.6f}",
        found.status,
        f"{found.seconds:.2f}",
        found.solver_name,
    )


if __name__ == "__main__":
    main()
