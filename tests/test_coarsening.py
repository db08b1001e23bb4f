"""Merged chains: fewer layers, the same steps; a graph of very many layers is planned in a moment."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from planner.graph_planning import plan_bottleneck, plan_schedule
from planner.partitioning.chain_costs import step_ms
from planner.partitioning.coarsening import coarsen
from tests.test_chain import all_cuts, random_chain


def test_every_cut_of_the_merged_chain_has_the_step_of_the_full_one() -> None:
    source = random.Random(0)
    for _ in range(40):
        chain = random_chain(source, source.randint(4, 12))
        coarse = coarsen(chain, 4)
        assert len(coarse.chain.ids) <= 4
        for cuts in all_cuts(coarse.chain, min(3, len(coarse.chain.ids))):
            for schedule in ("gpipe", "1f1b"):
                expected = step_ms(chain, coarse.full(cuts), 4, schedule)
                assert step_ms(coarse.chain, cuts, 4, schedule) == pytest.approx(expected)


def test_a_small_chain_stays_as_it_is() -> None:
    chain = random_chain(random.Random(1), 6)
    assert coarsen(chain).chain is chain


def test_twenty_thousand_layers_are_planned_and_not_called_optimal_unproven(tmp_path: Path) -> None:
    source, count = random.Random(2), 20_000
    nodes = [{"id": i, "forward_ms": source.random(), "backward_ms": source.random()} for i in range(count)]
    edges = [{"source": i, "target": i + 1} for i in range(count - 1)]
    graph = {"directed": True, "multigraph": False, "graph": {}, "nodes": nodes, "edges": edges}
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"schema": "evenstage/layer-graph/1", **graph}))
    for plan in (plan_schedule(path, 4, 8), plan_bottleneck(path, 4)):
        assert sum(len(stage.nodes) for stage in plan.stages) == count
        assert plan.lower_bound_ms <= plan.objective_ms <= plan.lower_bound_ms * 1.01
        assert plan.status == "feasible" or plan.objective_ms == pytest.approx(plan.lower_bound_ms, rel=1e-9)
