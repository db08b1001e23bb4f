"""Stages along the graph: the best order of the layers, its proof, and memory in another order."""

import itertools
import random
import time

import networkx as nx
import pytest

from planner.files.profile_file import GradientLifetime, LayerMemory, Lifetime, SizeMemory
from planner.partitioning.chain_costs import ChainMemory, step_ms
from planner.partitioning.closed_stages import best_closed_stages
from planner.partitioning.ideals import closed_sets
from planner.partitioning.layer_dag import layer_dag
from planner.partitioning.layer_graph import chain_of
from planner.partitioning.order_memory import memory_in_order
from planner.partitioning.orders import Problem, any_order_bound_ms, candidate_orders, solve_in_any_order
from tests.random_graphs import partitions


def random_layers(seed):
    """A graph of 4 to 7 layers in program order: times, transfers on its edges, one tied parameter, rarely a chain."""
    source = random.Random(seed)
    count = source.randint(4, 7)
    graph = nx.DiGraph(tensors=[], tied=[], message_ms=source.choice([0.0, 0.7]))
    graph.graph.update(boundary_forward_ms=source.choice([0.0, 0.3]), boundary_backward_ms=source.choice([0.0, 0.9]))
    for v in range(count):
        times = {name: float(source.randint(0, 6)) for name in ("forward_ms", "backward_ms", "optimizer_ms")}
        graph.add_node(v, **times, backward_first_ms=source.choice([0.5, 1.0, 1.5]) * times["backward_ms"])
    for u, v in itertools.combinations(range(count), 2):
        if source.random() < 0.35:
            graph.add_edge(u, v)
    for u in graph.nodes:
        readers = [v for v in graph.succ[u] if source.random() < 0.8]
        cost = {"transfer_forward_ms": source.random(), "transfer_backward_ms": source.random()}
        graph.graph["tensors"].append(
            {"nodes": [u, *readers], "bytes": 4, "gradient_bytes": source.choice([0, 4]), **cost}
        )
    users = sorted(source.sample(range(count), 2))
    graph.graph["tied"].append({"nodes": users, "optimizer_ms": source.random(), "sum_ms": source.random()})
    return graph


def ordered(graph, stage_of):
    """`graph` with its nodes stage by stage, as networkx alone would write it, and where the stages begin."""
    nodes = sorted(graph.nodes, key=lambda v: (stage_of[v], v))
    other = nx.DiGraph(**graph.graph)
    other.add_nodes_from((v, graph.nodes[v]) for v in nodes)
    other.add_edges_from(graph.edges)
    numbers = [stage_of[v] for v in nodes]
    return other, tuple(numbers.index(k) for k in range(1, max(numbers) + 1))


def least_step(graph, num_stages, m, schedule):
    """The shortest step over all stages closed under predecessors, by trying each."""
    steps = []
    for stage_of in partitions(graph, num_stages):
        other, cuts = ordered(graph, stage_of)
        steps.append(step_ms(chain_of(other), cuts, m, schedule))
    return min(steps)


@pytest.mark.parametrize("seed", range(40))
def test_the_gpipe_step_is_the_least_of_all_closed_stages_and_proven(seed):
    graph = random_layers(seed)
    num_stages, m = 2 + seed % 2, 1 + seed % 5
    found = solve_in_any_order(Problem(layer_dag(graph), num_stages, m))
    assert found.solution.step_ms == pytest.approx(least_step(graph, num_stages, m, "gpipe"))
    assert found.solution.status == "optimal"
    assert found.solution.step_ms == step_ms(found.chain, found.solution.cuts, m)


@pytest.mark.parametrize("seed", range(12))
def test_a_1f1b_step_is_no_longer_than_the_programs_and_its_bound_holds(seed):
    graph = random_layers(seed)
    problem = Problem(layer_dag(graph), 3, 4, "1f1b")
    found = solve_in_any_order(problem)
    least = least_step(graph, 3, 4, "1f1b")
    assert found.solution.lower_bound_ms <= least * (1 + 1e-9)
    assert least <= found.solution.step_ms * (1 + 1e-9)
    assert found.solution.step_ms <= problem.solve(problem.dag.chain, 10.0).step_ms
    if found.solution.status == "optimal":
        assert found.solution.step_ms == pytest.approx(least)


def test_every_closed_set_is_listed_once_with_its_sums():
    graph = random_layers(3)
    dag = layer_dag(graph)
    ideals = closed_sets(dag, time.perf_counter() + 60)
    closed = {
        members
        for members in range(1 << len(dag))
        if all(members >> u & 1 for v in range(len(dag)) if members >> v & 1 for u in dag.predecessors[v])
    }
    assert len(ideals) == len(closed) and {i.members for i in ideals} == closed
    for ideal in ideals:
        inside = [v for v in range(len(dag)) if ideal.members >> v & 1]
        assert ideal.load_ms == sum(dag.chain.forward_ms[v] + dag.chain.backward_ms[v] for v in inside)
        out = [
            tensor.transfer_forward_ms
            for tensor, readers in zip(dag.chain.tensors, dag.readers, strict=True)
            if tensor.producer in inside and set(readers) - set(inside)
        ]
        message = (graph.graph["message_ms"] + graph.graph["boundary_forward_ms"]) * bool(out)
        assert ideal.across_forward_ms == pytest.approx(sum(out) + message) and ideal.num_crossing == len(out)


def test_a_deadline_leaves_nothing_proven():
    dag = layer_dag(random_layers(3))
    assert closed_sets(dag, 0.0) is None
    ideals = closed_sets(dag, time.perf_counter() + 60)
    assert not best_closed_stages(dag, ideals, 2, 4, float("inf"), 0.0).proven


def test_candidates_are_orders_of_the_graph():
    for seed in range(10):
        dag = layer_dag(random_layers(seed))
        assert all(dag.is_order(order) for order in candidate_orders(dag, 2))


def test_a_chain_has_one_order_and_is_left_alone():
    graph = nx.path_graph(5, create_using=nx.DiGraph)
    graph.graph.update(tensors=[], tied=[])
    nx.set_node_attributes(graph, 1.0, "forward_ms")
    assert layer_dag(graph).has_one_order
    found = solve_in_any_order(Problem(layer_dag(graph), 2, 4), search_s=0.0)
    assert found.order is None and found.solution.status == "optimal"


def towers(length=3):
    """Two towers of `length` layers, one after the other in the program, that meet in a last layer."""
    graph = nx.DiGraph(tensors=[], tied=[])
    for name in (*(f"a{i}" for i in range(length)), *(f"b{i}" for i in range(length)), "end"):
        graph.add_node(name, name=name, forward_ms=1.0, backward_ms=2.0, backward_first_ms=2.0)
    for tower in "ab":
        nx.add_path(graph, [*(f"{tower}{i}" for i in range(length)), "end"])
    graph.graph["tensors"] = [{"nodes": list(edge), "bytes": 8, "transfer_ms": 0.2} for edge in graph.edges]
    return graph


def test_candidates_better_the_programs_order_where_closed_sets_are_too_many(monkeypatch):
    monkeypatch.setattr("planner.partitioning.orders.closed_sets", lambda dag, deadline: None)
    graph = towers()
    heavy = {"a1": 6.0, "b0": 5.0, "a2": 4.0}
    for name, forward in heavy.items():
        graph.nodes[name]["forward_ms"] = forward
    problem = Problem(layer_dag(graph), 3, 4)
    found = solve_in_any_order(problem)
    assert found.order is not None and problem.dag.is_order(found.order)
    assert found.solution.step_ms < problem.solve(problem.dag.chain, 10.0).step_ms
    assert found.solution.step_ms >= least_step(graph, 3, 4, "gpipe") - 1e-9


def test_the_bound_for_any_order_holds():
    for seed in range(20):
        graph = random_layers(seed)
        for schedule in ("gpipe", "1f1b"):
            bound = any_order_bound_ms(chain_of(graph), 2, 3, schedule)
            assert bound <= least_step(graph, 2, 3, schedule) * (1 + 1e-9)


def test_very_many_closed_sets_are_not_listed():
    graph = nx.DiGraph(tensors=[], tied=[])
    graph.add_nodes_from(range(300), forward_ms=1.0)
    assert closed_sets(layer_dag(graph), time.perf_counter() + 60) is None


def test_lifetimes_in_another_order_are_no_shorter_than_they_may_be():
    """Layers 0 → (1, 2) → 3: what 0 makes is read by 1 and 2, saved until the backward of 1, the last that frees it."""
    layers = tuple(LayerMemory(10, 0, (20, 25), (30, 30), 0, 0, 0, 0) for _ in range(4))
    lives = (Lifetime(0, 2, "backward", 1, 8), Lifetime(0, 2, "forward", 2, 5), Lifetime(2, 3, "forward", 3, 3))
    size = SizeMemory(lives, (GradientLifetime(2, 0, 7),), 0, 0, False)
    graph = nx.DiGraph([(0, 1), (0, 2), (1, 3), (2, 3)])
    dag = layer_dag(nx.DiGraph(graph, tensors=[], tied=[]))
    moved = memory_in_order(ChainMemory(layers, size), {0: 0, 2: 1, 1: 2, 3: 3}, dag.descendants)
    kept, passing, late = moved.size.lifetimes
    assert (kept.made, kept.last_reader, kept.freed) == (0, 2, 1)  # position 1 is layer 2, which may have saved it too
    assert (passing.made, passing.last_reader, passing.freed) == (0, 2, 2)
    assert (late.made, late.last_reader, late.freed) == (1, 3, 3)
    assert kept.freed_after == 1  # through all of that layer's peaks
    assert moved.size.gradients == (GradientLifetime(2, 0, 7),)
    same = memory_in_order(ChainMemory(layers, size), {v: v for v in range(4)}, dag.descendants)
    assert same == ChainMemory(layers, size)
