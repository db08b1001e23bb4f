"""The graph form of the ILP against every partition of small graphs, and against published optima."""

import json
import time

import networkx as nx
import numpy as np
import pytest

from planner.errors import FileError, InfeasibleError, SolverError, UsageError
from planner.partitioning import branching, graph_bounds, ladder
from planner.partitioning.branching import solve_graph, stage_loads
from planner.partitioning.graph_costs import graph_costs
from planner.partitioning.graph_incumbents import Search, segment_loads
from planner.partitioning.layer_graph import graph_from_json
from planner.partitioning.solving import PROVEN, solve
from tests.random_graphs import largest_load, optimum, random_graph

pytestmark = pytest.mark.filterwarnings("ignore:Constructing LpVariable:DeprecationWarning")  # pulp's, by the thousand

SEEDS = range(120)
FAR = time.perf_counter() + 1e6


def stage_index(solution):
    return {node: k for k, stage in enumerate(solution.stages) for node in stage}


def assert_sound(graph, solution, num_stages, transfers):
    """A partition into non-empty stages, no edge backwards, the objective recomputed, the bound below it."""
    stage_of = stage_index(solution)
    assert len(solution.stages) == num_stages and all(solution.stages)
    assert sorted(map(str, stage_of)) == sorted(map(str, graph.nodes))
    assert sum(map(len, solution.stages)) == len(graph)
    assert all(stage_of[source] <= stage_of[target] for source, target in graph.edges)
    assert max(stage_loads(graph, solution.stages, transfers)) == solution.objective_ms
    assert largest_load(graph, stage_of, transfers) == pytest.approx(solution.objective_ms, rel=1e-12)
    assert 0 <= solution.lower_bound_ms <= solution.objective_ms
    if solution.status == "optimal":
        assert solution.lower_bound_ms == pytest.approx(solution.objective_ms, rel=1e-8)


def solve_ladder(graph, num_stages, transfers):
    """The ILP alone, without incumbents, bounds or windows."""
    costs = graph_costs(graph, transfers)
    wide = ladder.windows(costs, num_stages, float("inf"))
    program = ladder.new_ladder(costs, num_stages, wide, (0.0, None))
    ladder.ladders_climb(program)
    ladder.stages_are_closed(program)
    ladder.no_stage_is_empty(program)
    ladder.memory_fits(program)
    ladder.loads_are_carried(program, range(num_stages))
    if program.impossible or solve(program.problem, 20.0) != PROVEN:
        return None
    return tuple(tuple(costs.ids[v] for v in stage) for stage in program.stages())


@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_optimum_of_a_small_graph(seed, transfers):
    graph = random_graph(seed)
    num_stages = 2 + seed % min(3, len(graph) - 1)
    solution = solve_graph(graph, num_stages, transfers=transfers)
    assert_sound(graph, solution, num_stages, transfers)
    assert solution.status == "optimal"
    assert solution.objective_ms == pytest.approx(optimum(graph, num_stages, transfers), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_optimum_under_a_memory_limit(seed, transfers):
    graph = random_graph(seed, memory=True)
    num_stages = 2 + seed % min(3, len(graph) - 1)
    best = optimum(graph, num_stages, transfers)
    if best == float("inf"):
        with pytest.raises(InfeasibleError, match=r"bytes"):
            solve_graph(graph, num_stages, transfers=transfers)
        return
    solution = solve_graph(graph, num_stages, transfers=transfers)
    assert_sound(graph, solution, num_stages, transfers)
    assert solution.status == "optimal"
    assert solution.objective_ms == pytest.approx(best, rel=1e-7, abs=1e-9)


def test_the_generator_makes_possible_and_impossible_limits():
    impossible = [optimum(random_graph(seed, memory=True), 2, transfers=True) == float("inf") for seed in SEEDS]
    assert 5 < sum(impossible) < len(SEEDS) - 50


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_ilp_alone_finds_the_optimum(seed, memory):
    """Its rows are the whole statement of the problem: without incumbents no missing row can hide."""
    graph = random_graph(seed, memory)
    num_stages = 2 + seed % min(3, len(graph) - 1)
    best = optimum(graph, num_stages, transfers=True)
    stages = solve_ladder(graph, num_stages, transfers=True)
    if best == float("inf"):
        assert stages is None
    else:
        stage_of = {node: k for k, stage in enumerate(stages) for node in stage}
        assert all(stage_of[source] <= stage_of[target] for source, target in graph.edges)
        assert len(stages) == num_stages and all(stages)
        assert largest_load(graph, stage_of, transfers=True) == pytest.approx(best, rel=1e-6, abs=1e-6)


def the_ilp_alone_on_every_seed(memory):
    for seed in SEEDS:
        test_the_ilp_alone_finds_the_optimum(seed, memory)


@pytest.mark.parametrize("family", ["stages_are_closed", "no_stage_is_empty", "memory_fits", "ladders_climb"])
def test_a_missing_family_of_rows_is_noticed(family, monkeypatch):
    monkeypatch.setattr(ladder, family, lambda program: None)
    with pytest.raises((AssertionError, IndexError)):
        the_ilp_alone_on_every_seed(memory=True)


def test_missing_transfer_rows_are_noticed(monkeypatch):
    monkeypatch.setattr(ladder, "tensors_are_charged", lambda program, k: [])
    with pytest.raises(AssertionError):
        the_ilp_alone_on_every_seed(memory=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_bound_is_below_the_optimum(seed):
    graph = random_graph(seed)
    num_stages = 2 + seed % min(4, len(graph) - 1)
    costs = graph_costs(graph, transfers=True)
    best = optimum(graph, num_stages, transfers=True)
    bounds = [
        *graph_bounds.simple_bounds(costs, num_stages),
        *graph_bounds.node_bounds(costs),
        *graph_bounds.convex_bounds(costs),
        graph_bounds.boundary_cuts(costs, num_stages, best, lambda: False).bound,
        graph_bounds.boundary_cuts(costs, num_stages, best * 1.3, lambda: False).bound,
    ]
    assert {bound.name: bound.value_ms for bound in bounds if bound.value_ms > best * (1 + 1e-9) + 1e-9} == {}


def test_a_tensor_that_passes_over_a_stage_counts_twice_however_many_boundaries_it_crosses():
    graph = nx.DiGraph([("a", "b"), ("b", "c"), ("a", "c")], tensors=[{"nodes": ["a", "c"], "transfer_ms": 0.1}])
    nx.set_node_attributes(graph, 1.0, "forward_ms")
    cuts = graph_bounds.boundary_cuts(graph_costs(graph, transfers=True), 3, 1.1, lambda: False)
    assert cuts.bound.value_ms == pytest.approx(3.2 / 3)
    assert solve_graph(graph, 3).objective_ms == pytest.approx(1.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_windows_keep_every_optimum(seed):
    graph = random_graph(seed)
    num_stages = 2 + seed % min(3, len(graph) - 1)
    solution = solve_graph(graph, num_stages)
    costs = graph_costs(graph, transfers=True)
    allowed = ladder.windows(costs, num_stages, solution.objective_ms)
    stage_of = stage_index(solution)
    stages = np.array([stage_of[node] for node in costs.ids])
    assert (allowed.earliest <= stages).all() and (stages <= allowed.latest).all()


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_segment_loads_are_the_loads_of_segments(seed, memory):
    costs = graph_costs(random_graph(seed, memory), transfers=True)
    positions = [0, *range(1 + seed % 2, len(costs)), len(costs)]
    loads = segment_loads(costs, costs.order, positions)
    for i, start in enumerate(positions):
        for j, stop in enumerate(positions):
            segment = list(costs.order[start:stop])
            full = memory and costs.memory[segment].sum() > costs.memory_limit
            expected = float("inf") if start >= stop or full else costs.loads([segment])[0]
            assert loads[i, j] == pytest.approx(expected, abs=1e-9)


def diamond(**attributes):
    graph = nx.DiGraph([("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")], tensors=[], **attributes)
    nx.set_node_attributes(graph, {"a": 1.0, "b": 4.0, "c": 2.0, "d": 1.0}, "forward_ms")
    nx.set_node_attributes(graph, 10, "memory_bytes")
    return graph


def test_a_tensor_is_charged_once_to_each_stage_that_shares_it():
    graph = diamond()
    graph.graph["tensors"] = [{"nodes": ["a", "b", "c"], "transfer_ms": 0.5}]
    assert stage_loads(graph, [["a"], ["b", "c"], ["d"]]) == (1.5, 6.5, 1.0)
    assert stage_loads(graph, [["a"], ["b", "c"], ["d"]], transfers=False) == (1.0, 6.0, 1.0)
    assert stage_loads(graph, [["a", "b", "c"], ["d"]]) == (7.0, 1.0)


def test_halves_of_a_transfer_add_up():
    graph = diamond()
    graph.graph["tensors"] = [{"nodes": ["a", "b"], "transfer_forward_ms": 0.5, "transfer_backward_ms": 0.25}]
    assert stage_loads(graph, [["a"], ["b", "c", "d"]]) == (1.75, 7.75)


@pytest.mark.parametrize(("num_stages", "load", "name"), [(1, 8.0, "one stage"), (4, 4.0, "largest node")])
def test_the_fewest_and_the_most_stages(num_stages, load, name):
    solution = solve_graph(diamond(), num_stages)
    assert (solution.objective_ms, solution.status, solution.solver_name) == (load, "optimal", name)


def test_layers_that_cost_nothing():
    graph = nx.DiGraph([(0, 1), (1, 2)])
    solution = solve_graph(graph, 2)
    assert (solution.objective_ms, solution.lower_bound_ms, solution.status) == (0.0, 0.0, "optimal")


def test_the_same_seed_gives_the_same_stages():
    graphs = [random_graph(seed) for seed in range(20)]
    first, second = ([solve_graph(graph, 3, seed=7).stages for graph in graphs] for _ in range(2))
    assert first == second


def test_more_stages_than_layers():
    with pytest.raises(InfeasibleError, match="cannot cut 4 layers into 5 stages"):
        solve_graph(diamond(), 5)


def test_no_stages():
    with pytest.raises(UsageError, match="0 stages"):
        solve_graph(diamond(), 0)


def test_a_cycle():
    with pytest.raises(FileError, match="cycle"):
        solve_graph(nx.DiGraph([(0, 1), (1, 0)]), 2)


def test_a_memory_limit_that_is_too_low():
    with pytest.raises(InfeasibleError, match="layer a needs 1 bytes more than a stage has"):
        solve_graph(diamond(memory_limit_bytes=9), 2)
    with pytest.raises(InfeasibleError, match="the layers need 2 bytes more than 2 stages have"):
        solve_graph(diamond(memory_limit_bytes=19), 2)


def test_a_memory_limit_that_only_the_edges_forbid():
    graph = diamond(memory_limit_bytes=45)
    nx.set_node_attributes(graph, {"a": 30, "b": 5, "c": 5, "d": 40}, "memory_bytes")
    graph.add_node("e", forward_ms=1.0, memory_bytes=10)
    graph.add_edge("d", "e")
    with pytest.raises(InfeasibleError) as caught:
        solve_graph(graph, 2)
    assert caught.value.got == "no 2 stages fit: stage 2, layers d to e, lacks 5 bytes at best"


def test_the_time_limit_leaves_stages_and_a_bound():
    graph = random_graph(3)
    solution = solve_graph(graph, 2, time_limit_s=0.0)
    assert_sound(graph, solution, 2, transfers=True)


def long_chain(num_nodes):
    graph = nx.DiGraph(tensors=[])
    for v in range(num_nodes):
        graph.add_node(v, forward_ms=1.0 + v % 7, backward_ms=0.123456789, memory_bytes=v % 5)
    graph.add_edges_from((v, v + 1) for v in range(num_nodes - 1))
    graph.graph["tensors"] = [{"nodes": [v, v + 1], "transfer_ms": 0.1} for v in range(num_nodes - 1)]
    return graph


def test_a_hundred_thousand_nodes_take_seconds():
    started = time.perf_counter()
    graph = long_chain(100_000)
    graph.graph["memory_limit_bytes"] = 100_000
    solution = solve_graph(graph, 8)
    assert time.perf_counter() - started < 30
    assert_sound(graph, solution, 8, transfers=True)
    assert solution.objective_ms < solution.lower_bound_ms * 1.001


def test_a_long_graph_for_too_many_stages():
    with pytest.raises(SolverError, match="at most 400 stages"):
        solve_graph(long_chain(branching.LONG + 1), 401)


def test_aimed_completions_meet_the_average():
    """Twelve equal branches: any order of them does, and the target says where to stop."""
    graph = nx.DiGraph([("start", v) for v in range(12)] + [(v, "end") for v in range(12)])
    nx.set_node_attributes(graph, dict.fromkeys(range(12), 1.0), "forward_ms")
    search = Search(graph_costs(graph, transfers=False), 3, 0, FAR)
    search.aim(4.0)
    assert search.objective_ms == 4.0


def test_published_graphs_reach_their_optima(workloads):
    known = json.loads((workloads / "optima.json").read_text())
    wrong = {}
    for name, objectives in known.items():
        graph = graph_from_json(workloads / f"{name}.json")
        for objective, optima in objectives.items():
            for num_stages in (2, 4):
                solution = solve_graph(graph, num_stages, transfers=objective == "comm")
                assert_sound(graph, solution, num_stages, objective == "comm")
                above = solution.objective_ms > optima[str(num_stages)] * (1 + 1e-6)
                if above or solution.status != "optimal":
                    wrong[name, objective, num_stages] = solution
    assert wrong == {}
