"""A layer graph that came from elsewhere → Plan: the largest stage load, or the step of a schedule."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import UsageError
from planner.files.plan_file import Baseline, Cut, Plan, PlannedModel, SolverRecord, Stage, Status
from planner.files.profile_file import Schedule
from planner.scheduling.simulation import simulate, too_few_microbatches

if TYPE_CHECKING:
    import networkx as nx

    from planner.partitioning.chain_costs import Chain


@dataclass(frozen=True, slots=True)
class _Solved:
    """Stages of node ids in order, with the objective, its bound and how it was found."""

    stages: tuple[tuple[Any, ...], ...]
    objective_ms: float
    lower_bound_ms: float
    status: Status
    solver: SolverRecord


def plan_bottleneck(
    path: Path,
    num_stages: int,
    *,
    transfers: bool = True,
    time_limit_s: float = 60.0,
    memory_bytes: int | None = None,
) -> Plan:
    """Minimise the largest stage load of the graph in `path`, over stages that are closed under predecessors.

    `transfers` charges a tensor once to every stage that holds some of its nodes while others are elsewhere.
    `memory_bytes` limits the sum of a stage's `memory_bytes`, in place of the graph's own limit. Raises FileError for a
    graph that is none, InfeasibleError where no stages exist.
    """
    from planner.partitioning.baselines import baselines
    from planner.partitioning.branching import solve_graph, stage_loads
    from planner.partitioning.coarsening import coarsen
    from planner.partitioning.layer_graph import chain_of, graph_from_json

    graph = graph_from_json(path)
    if memory_bytes is not None:
        graph.graph["memory_limit_bytes"] = memory_bytes
    found = solve_graph(graph, num_stages, transfers=transfers, time_limit_s=time_limit_s)
    loads = stage_loads(graph, found.stages, transfers)
    record = SolverRecord(found.solver_name, found.seconds, found.num_nodes)
    solved = _Solved(found.stages, found.objective_ms, found.lower_bound_ms, found.status, record)
    ordered = in_program_order(graph)
    others, coarse = {}, coarsen(chain_of(ordered))
    for name, found_cuts in baselines(coarse.chain, num_stages).items():
        cuts = coarse.full(found_cuts)
        largest = max(stage_loads(graph, _pieces(list(ordered.nodes), cuts), transfers))
        others[name] = Baseline(None, largest, None, tuple(str(list(ordered.nodes)[cut]) for cut in cuts))
    return _assemble(path, graph, solved, _load_stages(graph, found.stages, loads), others)


def plan_schedule(
    path: Path,
    num_stages: int,
    num_microbatches: int,
    *,
    cut_at: Sequence[str] | None = None,
    schedule: Schedule = "gpipe",
) -> Plan:
    """Minimise the step of `schedule` over stages of the graph in `path` that are closed under predecessors.

    `cut_at` scores given cuts of the program's order. `optimal` is said where the bound for all orders of the layers is
    met, else the plan is `feasible`. Without a better order the nodes stay in the program's. So they do with more than
    2,000 layers, which are merged first.
    """
    from planner.partitioning.baselines import baselines
    from planner.partitioning.chain import solve_chain
    from planner.partitioning.chain_costs import step_ms
    from planner.partitioning.coarsening import coarsen
    from planner.partitioning.layer_dag import layer_dag
    from planner.partitioning.layer_graph import graph_from_json
    from planner.partitioning.orders import Problem, any_order_bound_ms, solve_in_any_order

    if schedule == "1f1b" and num_microbatches < num_stages:
        raise too_few_microbatches(num_microbatches, num_stages)
    started = time.perf_counter()
    status: Status
    graph = graph_from_json(path)
    ordered = in_program_order(graph)
    dag, nodes = layer_dag(ordered), list(ordered.nodes)
    chain = program = dag.chain
    program_nodes, coarse = nodes, coarsen(program)
    bound = any_order_bound_ms(program, num_stages, num_microbatches, schedule)
    if cut_at is not None:
        cuts, status = _given_cuts(nodes, cut_at, num_stages), "scored"
        record = SolverRecord("given", time.perf_counter() - started, 0)
    elif coarse.chain is not program:
        found = solve_chain(coarse.chain, num_stages, num_microbatches, schedule=schedule)
        cuts = coarse.full(found.cuts)
        status = "optimal" if bound >= found.step_ms * (1 - 1e-9) else "feasible"
        record = SolverRecord(found.solver_name, found.seconds, found.num_nodes)
    else:
        best = solve_in_any_order(Problem(dag, num_stages, num_microbatches, schedule))
        chain, found = best.chain, best.solution
        nodes = nodes if best.order is None else [nodes[v] for v in best.order]
        cuts, bound, status = found.cuts, found.lower_bound_ms, found.status
        record = SolverRecord(found.solver_name, found.seconds, found.num_nodes)
    step = step_ms(chain, cuts, num_microbatches, schedule)
    stages = _pieces(nodes, cuts)
    solved = _Solved(stages, step, min(bound, step), status, record)
    others = {}
    for name, found_other in baselines(coarse.chain, num_stages).items():
        other = coarse.full(found_other)
        other_step = step_ms(program, other, num_microbatches, schedule)
        others[name] = Baseline(other_step, other_step, None, tuple(str(program_nodes[cut]) for cut in other))
    drawn = _step_stages(chain, nodes, cuts, num_microbatches, schedule)
    return _assemble(path, graph, solved, drawn, others, num_microbatches, schedule)


def in_program_order(graph: nx.DiGraph) -> nx.DiGraph:
    """`graph` with its nodes in a topological order: their own where it is one, else the nearest to it."""
    import networkx as nx

    position = {node: index for index, node in enumerate(graph.nodes)}
    if all(position[source] < position[target] for source, target in graph.edges):
        return graph
    ordered = nx.DiGraph(**graph.graph)
    for node in nx.lexicographical_topological_sort(graph, key=position.__getitem__):
        ordered.add_node(node, **graph.nodes[node])
    ordered.add_edges_from(graph.edges)
    return ordered


def _given_cuts(nodes: Sequence[Any], cut_at: Sequence[str], num_stages: int) -> tuple[int, ...]:
    position = {str(node): index for index, node in enumerate(nodes)}
    unknown = [name for name in cut_at if not position.get(name)]
    cuts = tuple(position.get(name, 0) for name in cut_at)
    if unknown or list(cuts) != sorted(set(cuts)) or len(cuts) != num_stages - 1:
        got = f"no cut before {unknown[0]!r}" if unknown else f"{len(cuts)} cuts for {num_stages} stages"
        raise UsageError(
            f"--cut-at {','.join(cut_at)}: {got}",
            "K−1 ids of layers in program order, none of them the first, begin stages 1, 2, …",
            "name the layer with which each later stage begins",
        )
    return cuts


def _pieces(nodes: Sequence[Any], cuts: Sequence[int]) -> tuple[tuple[Any, ...], ...]:
    bounds = [0, *cuts, len(nodes)]
    return tuple(tuple(nodes[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))


def _stage(index: int, graph: nx.DiGraph, nodes: Sequence[Any], **costs: Any) -> Stage:
    return Stage(
        index=index,
        rank=index,
        nodes=tuple(node if isinstance(node, (str, int)) else str(node) for node in nodes),
        names=tuple(str(graph.nodes[node].get("name", node)) for node in nodes),
        parameter_bytes=sum(int(graph.nodes[node].get("parameter_bytes") or 0) for node in nodes),
        forward_spread_ms=0.0,
        backward_spread_ms=0.0,
        **costs,
    )


def _load_stages(graph: nx.DiGraph, stages: Sequence[Sequence[Any]], loads: Sequence[float]) -> tuple[Stage, ...]:
    result = []
    for index, (nodes, load) in enumerate(zip(stages, loads, strict=True)):
        forward, backward = (
            sum(float(graph.nodes[node].get(field) or 0.0) for node in nodes) for field in ("forward_ms", "backward_ms")
        )
        costs: dict[str, Any] = {"forward_ms": forward, "backward_ms": backward, "backward_first_ms": backward}
        result.append(
            _stage(index, graph, nodes, **costs, optimizer_ms=0.0, load_ms=load, wait_ms=None, bubble_fraction=None)
        )
    return tuple(result)


def _step_stages(
    chain: Chain, nodes: Sequence[Any], cuts: Sequence[int], num_microbatches: int, schedule: str
) -> tuple[Stage, ...]:
    import networkx as nx

    from planner.partitioning.chain_costs import stage_costs

    costs = stage_costs(chain, cuts)
    simulated = simulate(costs, num_microbatches, schedule)
    named = nx.DiGraph()
    for node, name, size in zip(nodes, chain.names, chain.parameter_bytes, strict=True):
        named.add_node(node, name=name, parameter_bytes=size)
    return tuple(
        _stage(
            index,
            named,
            piece,
            forward_ms=cost.forward_ms,
            backward_ms=cost.backward_ms,
            backward_first_ms=cost.backward_first_ms,
            optimizer_ms=cost.optimizer_ms,
            load_ms=cost.forward_ms + cost.backward_ms,
            wait_ms=simulated.wait_ms[index],
            bubble_fraction=simulated.bubble_fraction[index],
        )
        for index, (cost, piece) in enumerate(zip(costs, _pieces(nodes, cuts), strict=True))
    )


def _cuts(graph: nx.DiGraph, stages: Sequence[Sequence[Any]]) -> tuple[Cut, ...]:
    """What crosses each boundary: tensors with a node before it and one behind it."""
    stage_of = {node: index for index, nodes in enumerate(stages) for node in nodes}
    cuts = []
    for boundary in range(1, len(stages)):
        crossing = [
            tensor
            for tensor in graph.graph.get("tensors", ())
            if min(stage_of[n] for n in tensor["nodes"]) < boundary <= max(stage_of[n] for n in tensor["nodes"])
        ]
        names = tuple(str(tensor.get("name", tensor["nodes"][0])) for tensor in crossing)
        cuts.append(Cut(str(stages[boundary][0]), names, sum(int(t.get("bytes") or 0) for t in crossing)))
    return tuple(cuts)


def _assemble(
    path: Path,
    graph: nx.DiGraph,
    solved: _Solved,
    stages: tuple[Stage, ...],
    others: dict[str, Baseline],
    num_microbatches: int | None = None,
    schedule: Schedule = "gpipe",
) -> Plan:
    flat = [node for nodes in solved.stages for node in nodes]
    return Plan(
        model=PlannedModel(None, "", str(graph.graph.get("name", path.stem))),
        status=solved.status,
        objective_ms=solved.objective_ms,
        lower_bound_ms=solved.lower_bound_ms,
        solver=solved.solver,
        schedule=None if num_microbatches is None else schedule,
        num_microbatches=num_microbatches or 1,
        microbatch_size=1,
        precision="fp32",
        seed=0,
        data_parallel=1,
        step_ms=None if num_microbatches is None else solved.objective_ms,
        plain_chain=False,
        why_not="it was made from a layer graph, which names no modules",
        split_specification=None,
        order=None if flat == list(graph.nodes) else tuple(n if isinstance(n, (str, int)) else str(n) for n in flat),
        recompute=(),
        cuts=_cuts(graph, solved.stages),
        stages=stages,
        baselines=others,
        microbatch_curve=(),
        tied=(),
        bandwidth_bytes_per_s=None,
        machine=None,
    )
