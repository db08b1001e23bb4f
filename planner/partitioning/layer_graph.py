"""The layer graph: a networkx DiGraph with a node per layer and, in `graph["tensors"]`, what leaves a layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import FileError
from planner.files.profile_file import SizeProfile
from planner.files.reading import read_json
from planner.partitioning.chain_costs import Chain, ChainTensor, ChainTied

if TYPE_CHECKING:
    import networkx as nx

SCHEMA = "evenstage/layer-graph/1"
NODE_FIELDS = (
    "name",
    "forward_ms",
    "forward_spread_ms",
    "backward_ms",
    "backward_spread_ms",
    "backward_first_ms",
    "optimizer_ms",
    "parameter_bytes",
    "plain_cut",
)


def build_layer_graph(size: SizeProfile, bandwidth_bytes_per_s: float | None = None) -> nx.DiGraph:
    """The layer graph of a profile at one microbatch size. Without a bandwidth, transfers cost nothing."""
    import networkx as nx

    def transfer_ms(num_bytes: int) -> float:
        return 0.0 if bandwidth_bytes_per_s is None else num_bytes / bandwidth_bytes_per_s * 1e3

    graph = nx.DiGraph(tensors=[], tied=[], memory_limit_bytes=None)
    ids = [layer.id for layer in size.layers]
    for layer in size.layers:
        graph.add_node(layer.id, **{field: getattr(layer, field) for field in NODE_FIELDS})
    for tensor in size.tensors:
        graph.add_edges_from((ids[tensor.producer], ids[consumer]) for consumer in tensor.consumers)
        graph.graph["tensors"].append(
            {
                "name": tensor.name,
                "nodes": [ids[tensor.producer], *(ids[consumer] for consumer in tensor.consumers)],
                "bytes": tensor.num_bytes,
                "gradient_bytes": tensor.gradient_bytes,
                "transfer_forward_ms": transfer_ms(tensor.num_bytes),
                "transfer_backward_ms": transfer_ms(tensor.gradient_bytes),
            }
        )
    for tied in size.tied:
        graph.graph["tied"].append(
            {
                "name": tied.name,
                "nodes": [ids[layer] for layer in tied.layers],
                "parameter_bytes": tied.parameter_bytes,
                "optimizer_ms": tied.optimizer_ms,
                "sum_ms": 2 * transfer_ms(tied.parameter_bytes) if tied.trainable else 0.0,
            }
        )
    return graph


def chain_of(graph: nx.DiGraph) -> Chain:
    """The layers of `graph` in program order, which is the order of its nodes. Raises FileError where it is not."""
    ids = [str(node) for node in graph.nodes]
    order = {node: index for index, node in enumerate(graph.nodes)}
    for source, target in graph.edges:
        if order[source] >= order[target]:
            raise FileError(f"the edge {source} → {target} runs backwards", "nodes stand in program order")
    nodes = list(graph.nodes.values())

    def floats(field: str, default: str = "") -> tuple[float, ...]:
        return tuple(float(node.get(field, node.get(default, 0.0)) or 0.0) for node in nodes)

    return Chain(
        ids=tuple(ids),
        names=tuple(str(node.get("name", name)) for name, node in zip(ids, nodes, strict=True)),
        forward_ms=floats("forward_ms"),
        forward_spread_ms=floats("forward_spread_ms"),
        backward_ms=floats("backward_ms"),
        backward_spread_ms=floats("backward_spread_ms"),
        backward_first_ms=floats("backward_first_ms", "backward_ms"),
        optimizer_ms=floats("optimizer_ms"),
        parameter_bytes=tuple(int(node.get("parameter_bytes", 0) or 0) for node in nodes),
        plain_cut=tuple(bool(node.get("plain_cut", False)) for node in nodes),
        tensors=tuple(_chain_tensor(tensor, order) for tensor in graph.graph.get("tensors", ())),
        tied=tuple(_chain_tied(tied, order) for tied in graph.graph.get("tied", ())),
    )


def _chain_tensor(tensor: dict[str, Any], order: dict[Any, int]) -> ChainTensor:
    half = tensor.get("transfer_ms", 0.0) / 2
    return ChainTensor(
        name=str(tensor.get("name", tensor["nodes"][0])),
        producer=order[tensor["nodes"][0]],
        last_consumer=max(order[node] for node in tensor["nodes"]),
        num_bytes=int(tensor.get("bytes", 0)),
        gradient_bytes=int(tensor.get("gradient_bytes", tensor.get("bytes", 0))),
        transfer_forward_ms=float(tensor.get("transfer_forward_ms", half)),
        transfer_backward_ms=float(tensor.get("transfer_backward_ms", half)),
    )


def _chain_tied(tied: dict[str, Any], order: dict[Any, int]) -> ChainTied:
    layers = tuple(sorted(order[node] for node in tied["nodes"]))
    return ChainTied(tied["name"], layers, tied["parameter_bytes"], tied["optimizer_ms"], tied["sum_ms"])


def graph_to_json(graph: nx.DiGraph) -> str:
    """Node-link JSON of `graph`, with the schema's name in it."""
    import networkx as nx

    return json.dumps({"schema": SCHEMA, **nx.node_link_data(graph, edges="edges")}, allow_nan=False) + "\n"


def graph_from_json(path: Path) -> nx.DiGraph:
    """Read node-link JSON. Raises FileError for a cycle, a wrong cost, an unknown node or an unknown schema."""
    import networkx as nx

    data = read_json(path, SCHEMA)
    nodes = data.get("nodes")
    if not isinstance(nodes, list) or not all(isinstance(n, dict) and "id" in n for n in nodes) or not nodes:
        raise FileError(f"{path} has no list of nodes with ids", "a layer graph lists its layers", "add nodes")
    for node in nodes:
        for field, value in node.items():
            if field.endswith(("_ms", "_bytes")):
                _refuse_wrong_cost(f"{path}: node {node['id']}: {field}", value)
    try:
        graph = nx.node_link_graph(data, directed=True, multigraph=False, edges="edges")
    except (KeyError, TypeError, nx.NetworkXError) as error:
        raise FileError(f"{path} is not node-link JSON: {error!r}", "edges have source and target") from None
    known = {node["id"] for node in nodes}
    if len(known) != len(nodes) or set(graph.nodes) != known:
        raise FileError(f"{path} has edges to unknown nodes or an id twice", "every id stands once among the nodes")
    if not nx.is_directed_acyclic_graph(graph):
        cycle = " → ".join(str(edge[0]) for edge in nx.find_cycle(graph))
        raise FileError(f"{path} has a cycle: {cycle}", "layers depend on earlier layers only", "remove an edge")
    _check_tensors(path, graph, known)
    return graph


def _check_tensors(path: Path, graph: nx.DiGraph, known: set[Any]) -> None:
    for index, tensor in enumerate(graph.graph.setdefault("tensors", [])):
        where = f"{path}: tensors[{index}]"
        members = tensor.get("nodes") if isinstance(tensor, dict) else None
        if not isinstance(members, list) or not members or not set(members) <= known:
            raise FileError(f"{where} names nodes that are not there", "nodes are ids, the producer first")
        for field, value in tensor.items():
            if field.endswith("_ms") or field in ("bytes", "gradient_bytes"):
                _refuse_wrong_cost(f"{where}: {field}", value)


def _refuse_wrong_cost(where: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise FileError(f"{where} is {value!r}", "costs are finite numbers, not negative", "correct the value")
