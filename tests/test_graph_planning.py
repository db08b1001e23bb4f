"""`plan --graph`: loads and steps of layer graphs, their proofs, and what is refused."""

import itertools
import json

import networkx as nx
import pytest

from planner.files.plan_file import Plan
from planner.graph_planning import in_program_order, plan_bottleneck, plan_schedule
from planner.partitioning.branching import stage_loads
from planner.partitioning.chain_costs import step_ms
from planner.partitioning.layer_graph import chain_of, graph_from_json, graph_to_json
from planner.partitioning.orders import any_order_bound_ms
from tests.running import command


def diamond(shuffled=False):
    """a → b, c → d → e with a transfer on every edge; `shuffled` lists the nodes out of order."""
    graph = nx.DiGraph(name="diamond", tensors=[], memory_limit_bytes=None)
    costs = {"a": (2, 3), "b": (4, 5), "c": (1, 1), "d": (3, 6), "e": (2, 2)}
    for node in ("d", "b", "a", "e", "c") if shuffled else costs:
        graph.add_node(node, name=node, forward_ms=costs[node][0], backward_ms=costs[node][1])
    graph.add_edges_from(["ab", "ac", "bd", "cd", "de"])
    graph.graph["tensors"] = [{"nodes": list(edge), "bytes": 8, "transfer_ms": 0.5} for edge in graph.edges]
    return graph


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "diamond.json"
    path.write_text(graph_to_json(diamond()))
    return path


def closed_partitions(graph, num_stages):
    """Every way to number the nodes 0 … K−1 along the edges, no stage empty, as lists of nodes."""
    nodes = list(graph.nodes)
    for numbers in itertools.product(range(num_stages), repeat=len(nodes)):
        stage = dict(zip(nodes, numbers, strict=True))
        if set(numbers) == set(range(num_stages)) and all(stage[u] <= stage[v] for u, v in graph.edges):
            yield [[n for n in nodes if stage[n] == k] for k in range(num_stages)]


@pytest.mark.parametrize("transfers", [True, False])
def test_the_largest_load_is_the_least_of_all_closed_partitions(file, transfers):
    graph = graph_from_json(file)
    plan = plan_bottleneck(file, 3, transfers=transfers)
    best = min(max(stage_loads(graph, stages, transfers)) for stages in closed_partitions(graph, 3))
    assert plan.objective_ms == pytest.approx(best) and plan.status == "optimal"
    assert plan.lower_bound_ms <= plan.objective_ms
    assert [stage.load_ms for stage in plan.stages] == list(
        stage_loads(graph, [s.nodes for s in plan.stages], transfers)
    )
    assert plan.step_ms is None and plan.schedule is None


def test_the_step_of_a_chain_is_proven_and_of_a_branching_graph_bounded(tmp_path, file):
    branching = plan_schedule(file, 2, 4)
    assert branching.status in ("optimal", "feasible") and branching.lower_bound_ms <= branching.objective_ms
    chain = nx.DiGraph(name="chain", tensors=[])
    for index in range(6):
        chain.add_node(index, name=str(index), forward_ms=index + 1.0, backward_ms=2.0 * index + 1)
    chain.add_edges_from((index, index + 1) for index in range(5))
    path = tmp_path / "chain.json"
    path.write_text(graph_to_json(chain))
    plan = plan_schedule(path, 3, 4)
    costs = chain_of(chain)
    assert plan.status == "optimal"
    assert plan.step_ms == pytest.approx(
        min(step_ms(costs, cuts, 4) for cuts in itertools.combinations(range(1, 6), 2))
    )
    assert plan.stages[0].nodes[0] == 0  # ids keep their kind


def test_given_cuts_are_scored(file):
    plan = plan_schedule(file, 2, 4, cut_at=["d"])
    assert plan.status == "scored" and plan.stages[1].nodes == ("d", "e")
    assert plan.step_ms == pytest.approx(step_ms(chain_of(diamond()), (3,), 4))


def test_nodes_out_of_order_are_put_in_order(tmp_path):
    ordered = list(in_program_order(diamond(shuffled=True)).nodes)
    assert all(ordered.index(u) < ordered.index(v) for u, v in diamond().edges)
    path = tmp_path / "shuffled.json"
    path.write_text(graph_to_json(diamond(shuffled=True)))
    plan = plan_schedule(path, 2, 4)
    assert plan.order is not None and set(plan.order) == set("abcde")


def test_the_bound_holds_for_every_order_and_cut():
    graph = diamond()
    chain = chain_of(graph)
    for order in nx.all_topological_sorts(graph):
        other = nx.DiGraph(tensors=graph.graph["tensors"])
        other.add_nodes_from((node, graph.nodes[node]) for node in order)
        other.add_edges_from(graph.edges)
        for cuts in itertools.combinations(range(1, 5), 2):
            assert any_order_bound_ms(chain, 3, 4) <= step_ms(chain_of(other), cuts, 4) + 1e-9


def test_the_command_writes_a_plan_that_reads_back(file, tmp_path):
    ended = command("--graph", file, "--gpus", 2, "--objective", "bottleneck", "--json", module="planner", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["step_ms"] is None
    assert Plan.load(tmp_path / "diamond.plan.json").to_json() == ended.stdout
    shown = command("--graph", file, "--gpus", 2, "--microbatches", 4, module="planner", cwd=tmp_path)
    assert shown.returncode == 0 and "step" in shown.stdout and "split_policy" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--gpus", "2"], 2, "--graph without --microbatches"),
        (["--gpus", "2", "--microbatches", "4", "--no-transfers"], 2, "--no-transfers without --objective"),
        (["--gpus", "2", "--objective", "bottleneck", "--cut-at", "d"], 2, "a load has no microbatches"),
        (["--gpus", "2", "--microbatches", "4", "--cut-at", "a"], 2, "no cut before 'a'"),
        (["--gpus", "3", "--microbatches", "4", "--cut-at", "d"], 2, "1 cuts for 3 stages"),
        (["--gpus", "9", "--objective", "bottleneck"], 5, "9 stages"),
        (["--gpus", "9", "--microbatches", "9"], 5, "9 stages"),
        (["model.py", "--gpus", "2", "--objective", "bottleneck"], 2, "a plan comes from one source"),
    ],
)
def test_what_does_not_go_together_is_refused(file, tmp_path, arguments, code, expected):
    ended = command("--graph", file, *arguments, module="planner", cwd=tmp_path)
    assert ended.returncode == code and expected in ended.stderr and "Traceback" not in ended.stderr


def test_published_workloads_through_the_command(workloads, tmp_path):
    known = json.loads((workloads / "optima.json").read_text())["pipedream_vgg16"]
    for name, more in (("comm", []), ("compute", ["--no-transfers"])):
        ended = command(
            "--graph", workloads / "pipedream_vgg16.json", "--gpus", 4, "--objective", "bottleneck", *more, "--json",
            module="planner", cwd=tmp_path,
        )  # fmt: skip
        plan = json.loads(ended.stdout)
        assert plan["status"] == "optimal" and plan["objective_ms"] == pytest.approx(known[name]["4"], rel=1e-6)
