"""The layer graph: from a profile, to a chain, to JSON and back, and every wrong file refused with its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.errors import FileError
from planner.files.links_file import LinkCost
from planner.files.profile_file import LayerProfile, SizeProfile, TensorProfile, TiedProfile
from planner.partitioning.chain_costs import Chain, ChainTensor, ChainTied
from planner.partitioning.layer_graph import SCHEMA, build_layer_graph, chain_of, graph_from_json, graph_to_json

LINK = LinkCost.of_bandwidth(1e6)


def layer(index: int) -> LayerProfile:
    ms = float(index + 1)
    return LayerProfile(
        f"layers.{index}",
        f"model.layers.{index}",
        "Linear",
        index,
        ms,
        0.1,
        2 * ms,
        0.2,
        1.5 * ms,
        0.5,
        40,
        (),
        index > 1,
    )


def size_profile() -> SizeProfile:
    return SizeProfile(
        microbatch_size=2,
        fingerprint="f",
        layers=tuple(layer(index) for index in range(4)),
        tensors=(TensorProfile("x", 0, (1, 3), 1000, 500), TensorProfile("y", 1, (2,), 200, 0)),
        tied=(TiedProfile("w", (0, 3), 4000, 0.25), TiedProfile("frozen", (1, 2), 4000, 0.0, trainable=False)),
        drift=0.0,
    )


def test_a_profile_becomes_nodes_edges_tensors_and_ties() -> None:
    graph = build_layer_graph(size_profile(), LINK)
    assert list(graph.edges) == [("layers.0", "layers.1"), ("layers.0", "layers.3"), ("layers.1", "layers.2")]
    node = graph.nodes["layers.1"]
    assert (node["name"], node["forward_ms"], node["backward_ms"]) == ("model.layers.1", 2.0, 4.0)
    assert (node["backward_first_ms"], node["optimizer_ms"], node["plain_cut"]) == (3.0, 0.5, False)
    x, y = graph.graph["tensors"]
    assert (x["nodes"], x["transfer_forward_ms"], x["transfer_backward_ms"]) == (
        ["layers.0", "layers.1", "layers.3"],
        pytest.approx(1.0),
        pytest.approx(0.5),
    )
    assert y["transfer_backward_ms"] == 0
    assert [tied["sum_ms"] for tied in graph.graph["tied"]] == pytest.approx([8.0, 0.0])


def test_without_a_bandwidth_transfers_and_sums_are_free() -> None:
    chain = chain_of(build_layer_graph(size_profile()))
    assert {tensor.transfer_forward_ms + tensor.transfer_backward_ms for tensor in chain.tensors} == {0.0}
    assert {tied.sum_ms for tied in chain.tied} == {0.0}


def test_the_chain_keeps_program_order_and_every_cost() -> None:
    chain = chain_of(build_layer_graph(size_profile(), LINK))
    assert chain.ids == ("layers.0", "layers.1", "layers.2", "layers.3")
    assert chain.backward_first_ms == (1.5, 3.0, 4.5, 6.0)
    assert chain.plain_cut == (False, False, True, True)
    x = chain.tensors[0]
    assert (x.name, x.producer, x.last_consumer, x.num_bytes, x.gradient_bytes) == ("x", 0, 3, 1000, 500)
    assert (chain.tied[0].layers, chain.tied[0].optimizer_ms) == ((0, 3), 0.25)


def test_json_is_read_back_equal(tmp_path: Path) -> None:
    graph = build_layer_graph(size_profile(), LINK)
    path = tmp_path / "layers.json"
    path.write_text(graph_to_json(graph))
    back = graph_from_json(path)
    assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
    assert (list(back.edges), back.graph) == (list(graph.edges), graph.graph)
    assert chain_of(back) == chain_of(graph)


def minimal() -> dict[str, Any]:
    """A graph of two layers as someone else may write it: costs only, and one transfer for both directions."""
    return {
        "schema": SCHEMA,
        "nodes": [{"id": 1, "forward_ms": 1.0, "backward_ms": 2.0, "memory_bytes": 7}, {"id": 2, "forward_ms": 3.0}],
        "edges": [{"source": 1, "target": 2}],
        "graph": {"tensors": [{"nodes": [1, 2], "bytes": 8, "transfer_ms": 0.5}]},
    }


def read(tmp_path: Path, data: dict[str, Any]) -> Any:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(data))
    return graph_from_json(path)


def test_a_bare_graph_gets_its_transfer_halved_and_its_first_backward_from_the_others(tmp_path: Path) -> None:
    graph = read(tmp_path, minimal())
    chain = chain_of(graph)
    assert graph.nodes[1]["memory_bytes"] == 7
    assert (chain.ids, chain.names, chain.backward_first_ms) == (("1", "2"), ("1", "2"), (2.0, 0.0))
    assert (chain.tensors[0].transfer_forward_ms, chain.tensors[0].transfer_backward_ms) == (0.25, 0.25)
    assert chain.tensors[0].gradient_bytes == 8


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), "evenstage/layer-graph/2", "schema"),
        (("nodes",), [], "no list of nodes"),
        (("nodes",), {"id": 1}, "no list of nodes"),
        (("nodes", 0), {"forward_ms": 1.0}, "no id"),
        (("nodes", 0, "id"), [1], "no id"),
        (("nodes", 1, "id"), 1, "two nodes"),
        (("nodes", 0, "forward_ms"), float("nan"), "NaN"),
        (("nodes", 0, "forward_ms"), -1.0, "node 1: forward_ms is -1.0"),
        (("nodes", 0, "forward_ms"), "1", "node 1: forward_ms is '1'"),
        (("nodes", 0, "forward_ms"), 1e400, "Infinity"),
        (("nodes", 0, "memory_bytes"), -1, "memory_bytes"),
        (("edges", 0), {"source": 1}, "target"),
        (("edges", 0, "target"), 3, "edges to 3"),
        (("edges",), [{"source": 1, "target": 2}, {"source": 2, "target": 1}], "cycle: 1 → 2"),
        (("directed",), False, "directed"),
        (("graph",), [], "graph is not an object"),
        (("graph", "tensors"), {}, "tensors is not a list"),
        (("graph", "tensors", 0), {"bytes": 3}, r"tensors\[0\] names nodes"),
        (("graph", "tensors", 0, "nodes"), [1, 5], r"tensors\[0\] names nodes"),
        (("graph", "tensors", 0, "transfer_ms"), -0.5, r"tensors\[0\]: transfer_ms"),
        (("graph", "tensors", 0, "bytes"), -5, r"tensors\[0\]: bytes"),
        (("graph", "tied"), [{"name": "w", "nodes": [9]}], r"tied\[0\] names nodes"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, path: Any, value: Any, message: str) -> None:
    data = minimal()
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(FileError, match=message) as refused:
        read(tmp_path, data)
    assert refused.value.rule and refused.value.remedy


def test_nodes_out_of_program_order_make_no_chain(tmp_path: Path) -> None:
    data = minimal()
    data["nodes"].reverse()
    with pytest.raises(FileError, match="runs backwards"):
        chain_of(read(tmp_path, data))
    del data["edges"][0]
    with pytest.raises(FileError, match="used before it is made"):
        chain_of(read(tmp_path, data))


def test_a_chain_checks_itself() -> None:
    chain: Chain = chain_of(build_layer_graph(size_profile(), LINK))
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("3 values of names", {"names": chain.names[1:]}),
        ("forward_ms of layers.0 is nan", {"forward_ms": (float("nan"), *chain.forward_ms[1:])}),
        ("optimizer_ms of layers.0 is -1", {"optimizer_ms": (-1.0, *chain.optimizer_ms[1:])}),
        ("'x' lies in layers", {"tensors": (ChainTensor("x", 2, 1, 1, 1, 0.0, 0.0),)}),
        ("'x' lies in layers", {"tensors": (ChainTensor("x", 2, 4, 1, 1, 0.0, 0.0),)}),
        ("transfer_forward_ms of 'x'", {"tensors": (ChainTensor("x", 0, 1, 1, 1, -1.0, 0.0),)}),
        ("'w' lies in layers", {"tied": (ChainTied("w", (), 1, 0.0, 0.0),)}),
        ("sum_ms of 'w'", {"tied": (ChainTied("w", (0, 1), 1, 0.0, float("inf")),)}),
    ]
    for message, change in wrong:
        with pytest.raises(FileError, match=message) as refused:
            replace(chain, **change)
        assert refused.value.rule and refused.value.remedy


def test_the_published_layer_graphs_load(workloads: Path) -> None:
    names = [path for path in sorted(workloads.glob("*.json")) if path.stem not in ("known_small", "optima")]
    assert names
    for path in names:
        graph = graph_from_json(path)
        chain = chain_of(graph)
        assert len(chain.ids) == graph.number_of_nodes()
        assert sum(chain.forward_ms) > 0
