"""The layer graph: a networkx DiGraph with a node per layer and, in `graph["tensors"]`, what leaves a layer."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import FileError
from planner.files.links_file import FREE, LinkCost
from planner.files.profile_file import LayerMemory, SizeMemory, SizeProfile
from planner.files.reading import decode, read_json
from planner.partitioning.chain_costs import BOUNDARY_COSTS, Chain, ChainMemory, ChainTensor, ChainTied

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
    "flops",
)


def build_layer_graph(size: SizeProfile, link: LinkCost = FREE) -> nx.DiGraph:
    """The layer graph of a profile at one microbatch size; `link` is what every stage boundary is charged."""
    import networkx as nx

    graph = nx.DiGraph(tensors=[], tied=[], memory_limit_bytes=None, memory=size.memory and asdict(size.memory))
    graph.graph["message_ms"] = link.message_ms
    graph.graph["boundary_forward_ms"] = size.boundary_forward_ms
    graph.graph["boundary_backward_ms"] = size.boundary_backward_ms
    ids = [layer.id for layer in size.layers]
    for layer in size.layers:
        memory = layer.memory and asdict(layer.memory)
        graph.add_node(layer.id, **{field: getattr(layer, field) for field in NODE_FIELDS}, memory=memory)
    for tensor in size.tensors:
        graph.add_edges_from((ids[tensor.producer], ids[consumer]) for consumer in tensor.consumers)
        graph.graph["tensors"].append(
            {
                "name": tensor.name,
                "nodes": [ids[tensor.producer], *(ids[consumer] for consumer in tensor.consumers)],
                "bytes": tensor.num_bytes,
                "gradient_bytes": tensor.gradient_bytes,
                "contiguous": tensor.contiguous,
                "gradient_scattered": tensor.gradient_scattered,
                "returns_view": tensor.returns_view,
                "transfer_forward_ms": link.tensor_transfer_ms(tensor.num_bytes),
                "transfer_backward_ms": link.tensor_transfer_ms(tensor.gradient_bytes),
            }
        )
    for tied in size.tied:
        graph.graph["tied"].append(
            {
                "name": tied.name,
                "nodes": [ids[layer] for layer in tied.layers],
                "parameter_bytes": tied.parameter_bytes,
                "optimizer_ms": tied.optimizer_ms,
                "sum_ms": 2 * _whole_message_ms(link, tied.parameter_bytes) if tied.trainable else 0.0,
                "trainable": tied.trainable,
                "optimizer_state_bytes": tied.optimizer_state_bytes,
                "optimizer_temporary_bytes": tied.optimizer_temporary_bytes,
                "optimizer_left_bytes": tied.optimizer_left_bytes,
                "optimizer_left_by": tied.optimizer_left_by,
            }
        )
    return graph


def _whole_message_ms(link: LinkCost, num_bytes: int) -> float:
    return link.message_ms + link.tensor_transfer_ms(num_bytes)


def chain_of(graph: nx.DiGraph) -> Chain:
    """The layers of `graph` in program order, which is the order of its nodes. Raises FileError where it is not."""
    ids = [str(node) for node in graph.nodes]
    order = {node: index for index, node in enumerate(graph.nodes)}
    for source, target in graph.edges:
        if order[source] >= order[target]:
            raise FileError(
                f"the edge {source} → {target} runs backwards", "nodes stand in program order", "sort the nodes"
            )
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
        memory=_chain_memory(graph),
        flops=_chain_flops(nodes),
        **{name: float(graph.graph.get(name) or 0.0) for name in BOUNDARY_COSTS},
    )


def _chain_flops(nodes: list[dict[str, Any]]) -> tuple[int, ...] | None:
    """The FLOPs of the layers, where every one of them has them."""
    flops = [node.get("flops") for node in nodes]
    return None if None in flops else tuple(int(count or 0) for count in flops)


def _chain_memory(graph: nx.DiGraph) -> ChainMemory | None:
    """The memory of the layers, where every one of them has it."""
    size, layers = graph.graph.get("memory"), [node.get("memory") for node in graph.nodes.values()]
    if size is None or None in layers:
        return None
    return ChainMemory(
        layers=tuple(decode(LayerMemory, _as_json(layer), "memory of a node") for layer in layers),
        size=decode(SizeMemory, _as_json(size), "memory of the graph"),
    )


def _as_json(value: Any) -> Any:
    """`value` with lists for tuples, as a file would hold it."""
    return json.loads(json.dumps(value))


def _chain_tensor(tensor: dict[str, Any], order: dict[Any, int]) -> ChainTensor:
    half = (tensor.get("transfer_ms") or 0.0) / 2
    num_bytes = tensor.get("bytes") or 0
    producer, *consumers = (order[node] for node in tensor["nodes"])
    if consumers and min(consumers) < producer:
        raise FileError(
            f"the tensor of {tensor['nodes'][0]} is used before it is made", "nodes stand in program order", "sort them"
        )
    return ChainTensor(
        name=str(tensor.get("name", tensor["nodes"][0])),
        producer=producer,
        last_consumer=max(consumers, default=producer),
        num_bytes=int(num_bytes),
        gradient_bytes=int(tensor.get("gradient_bytes", num_bytes)),
        transfer_forward_ms=float(tensor.get("transfer_forward_ms", half)),
        transfer_backward_ms=float(tensor.get("transfer_backward_ms", half)),
        contiguous=bool(tensor.get("contiguous", True)),
        gradient_scattered=bool(tensor.get("gradient_scattered", False)),
        returns_view=bool(tensor.get("returns_view", False)),
    )


def _chain_tied(tied: dict[str, Any], order: dict[Any, int]) -> ChainTied:
    layers = tuple(sorted(order[node] for node in tied["nodes"]))
    return ChainTied(
        name=str(tied.get("name", tied["nodes"][0])),
        layers=layers,
        parameter_bytes=int(tied.get("parameter_bytes") or 0),
        optimizer_ms=float(tied.get("optimizer_ms") or 0.0),
        sum_ms=float(tied.get("sum_ms") or 0.0),
        trainable=bool(tied.get("trainable", True)),
        optimizer_state_bytes=int(tied.get("optimizer_state_bytes") or 0),
        optimizer_temporary_bytes=int(tied.get("optimizer_temporary_bytes") or 0),
        optimizer_left_bytes=int(tied.get("optimizer_left_bytes") or 0),
        optimizer_left_by=str(tied.get("optimizer_left_by") or ""),
    )


def graph_to_json(graph: nx.DiGraph) -> str:
    """Node-link JSON of `graph`, with the schema's name in it."""
    import networkx as nx

    return json.dumps({"schema": SCHEMA, **nx.node_link_data(graph, edges="edges")}, allow_nan=False) + "\n"


def graph_from_json(path: Path) -> nx.DiGraph:
    """Read node-link JSON. Raises FileError for a cycle, a wrong cost, an unknown node or an unknown schema."""
    import networkx as nx

    data = read_json(path, SCHEMA)
    known = _node_ids(path, data)
    if not data.get("directed", True) or data.get("multigraph", False):
        raise FileError(f"{path} is no simple directed graph", "data flows one way", "set directed and no multigraph")
    if not isinstance(data.get("graph", {}), dict):
        raise FileError(f"{path}: graph is not an object", "it holds tensors and tied", "correct graph")
    try:
        graph = nx.node_link_graph(data, directed=True, multigraph=False, edges="edges")
    except (KeyError, TypeError, ValueError, AttributeError, nx.NetworkXError) as error:
        rule = "nodes have ids, edges have source and target"
        raise FileError(f"{path} is not node-link JSON: {error!r}", rule, "correct the edges") from None
    if set(graph.nodes) != known:
        unknown = ", ".join(map(str, set(graph.nodes) - known))
        raise FileError(f"{path} has edges to {unknown}", "edges join nodes of the graph", "add the nodes")
    if not nx.is_directed_acyclic_graph(graph):
        cycle = " → ".join(str(edge[0]) for edge in nx.find_cycle(graph))
        raise FileError(f"{path} has a cycle: {cycle}", "layers depend on earlier layers only", "remove an edge")
    _check_costs(f"{path}: graph", graph.graph)
    for kind in ("tensors", "tied"):
        _check_members(f"{path}: {kind}", graph.graph.setdefault(kind, []), known)
    return graph


def _node_ids(path: Path, data: dict[str, Any]) -> set[Any]:
    """The ids of the nodes, once their costs have been checked."""
    nodes = data.get("nodes")
    if not isinstance(nodes, list) or not nodes:
        raise FileError(f"{path} has no list of nodes", "a layer graph lists its layers", "add nodes")
    known: set[Any] = set()
    for index, node in enumerate(nodes):
        name = node.get("id") if isinstance(node, dict) else None
        if not isinstance(name, (str, int)):
            raise FileError(f"{path}: nodes[{index}] has no id", "an id is a text or a whole number", "give it an id")
        if name in known:
            raise FileError(f"{path}: two nodes have the id {name!r}", "ids are unique", "rename one")
        known.add(name)
        _check_costs(f"{path}: node {name}", node)
    return known


def _check_members(where: str, members: Any, known: set[Any]) -> None:
    """Tensors and tied parameters name nodes of the graph and have right costs."""
    if not isinstance(members, list):
        raise FileError(f"{where} is not a list", "it lists what joins nodes", "correct it")
    for index, member in enumerate(members):
        nodes = member.get("nodes") if isinstance(member, dict) else None
        if not isinstance(nodes, list) or not nodes or not all(isinstance(n, (str, int)) and n in known for n in nodes):
            rule = "nodes are ids of the graph, the producer first"
            raise FileError(f"{where}[{index}] names nodes that are not there", rule, "correct nodes")
        _check_costs(f"{where}[{index}]", member)


def _check_costs(where: str, values: dict[str, Any]) -> None:
    for field, value in values.items():
        if value is None or not (field.endswith(("_ms", "_bytes")) or field == "bytes"):
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            rule = "costs are finite numbers, not negative"
            raise FileError(f"{where}: {field} is {value!r}", rule, "correct the value")
