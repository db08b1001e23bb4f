"""The drawing of a plan's layer graph: what is in it, where, escaped; and the flag that writes it."""

import json
import re
import xml.etree.ElementTree as ElementTree

import networkx as nx
import pytest

from planner.cli import main
from planner.files.plan_file import Plan
from planner.graph_planning import plan_schedule
from planner.partitioning.layer_graph import graph_from_json
from planner.rendering import format_bytes, render_graph_svg
from planner.rendering.graph_layout import NODE_HEIGHT, NODE_WIDTH, place_graph
from runner.report_cli import main as report_main
from tests.sample_values import sample_profile

SVG = "{http://www.w3.org/2000/svg}"


def write_chain(path, num_layers=100, skips=()):
    """A layer graph in a row, each tensor of 1 KiB more than the one before, with tensors from → to besides."""
    nodes = [
        {"id": f"blocks.{k}.<b>&{chr(7)}", "forward_ms": 1.0 + k % 3, "backward_ms": 2.0} for k in range(num_layers)
    ]
    ids = [node["id"] for node in nodes]
    tensors = [{"name": f"t{k}", "nodes": [ids[k], ids[k + 1]], "bytes": 1024 * (k + 1)} for k in range(num_layers - 1)]
    tensors += [{"name": "skip", "nodes": [ids[a], ids[b]], "bytes": 7 << 20, "gradient_bytes": 0} for a, b in skips]
    edges = [{"source": tensor["nodes"][0], "target": tensor["nodes"][1]} for tensor in tensors]
    data = {"schema": "evenstage/layer-graph/1", "directed": True, "multigraph": False, "nodes": nodes, "edges": edges}
    path.write_text(json.dumps({**data, "graph": {"tensors": tensors}}))
    return path


@pytest.fixture
def drawn(tmp_path):
    path = write_chain(tmp_path / "graph.json", skips=[(2, 70)])
    plan = plan_schedule(path, 4, 8)
    return plan, graph_from_json(path), render_graph_svg(graph_from_json(path), plan)


def boxes(text):
    """Every layer's tooltip, stage class and corner."""
    found = []
    for group in ElementTree.fromstring(text).iter(f"{SVG}g"):
        box = group.find(f"{SVG}rect[@class='box']")
        if box is not None:
            corner = (float(box.get("x")), float(box.get("y")))
            found.append((group.find(f"{SVG}title").text.splitlines(), group.get("class"), corner))
    return found


def test_every_layer_has_a_box_in_its_stage_with_its_figures(drawn):
    plan, graph, text = drawn
    found = boxes(text)
    stage_of = {str(node).replace(chr(7), "?"): f"s{stage.index}" for stage in plan.stages for node in stage.nodes}
    assert {lines[0]: kind for lines, kind, _ in found} == stage_of
    assert len(found) == len(graph) == 100
    assert all(
        lines[1:3] == [f"forward {1 + k % 3:.2f} ms", "backward 2.00 ms"] for k, (lines, _, _) in enumerate(found)
    )


def test_no_box_covers_another_and_all_lie_on_the_paper(drawn):
    corners = [corner for _, _, corner in boxes(drawn[2])]
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn[2]).groups())
    for index, (x, y) in enumerate(corners):
        assert 0 < x < width - NODE_WIDTH and 0 < y < height - NODE_HEIGHT
        for left, top in corners[:index]:
            assert abs(x - left) >= NODE_WIDTH or abs(y - top) >= NODE_HEIGHT
    assert width < 1500


def test_bytes_stand_on_every_cut_forward_and_gradient(drawn):
    plan, _, text = drawn
    words = [element.text for element in ElementTree.fromstring(text).iter(f"{SVG}text")]
    marks = [word for word in words if re.fullmatch(r"↓ [\d.]+ \w+( · ↑ [\d.]+ \w+)?", word)]
    passed = [word for word in marks if word == "↓ 7.0 MiB"]
    ends = [k for k, stage in enumerate(plan.stages) if any("blocks.70." in node for node in stage.nodes)]
    assert len(passed) == ends[0] > 1  # once in every cut that the skip crosses, without a gradient
    for cut, crossed in zip(plan.cuts, [word for word in marks if word not in passed], strict=True):
        number = int(cut.before.split(".")[1])
        assert crossed == f"↓ {number}.0 KiB · ↑ {number}.0 KiB"
    totals = [word.partition(" · ")[2] for word in words if word.startswith("cut ")]
    first = int(plan.cuts[0].before.split(".")[1])
    down = format_bytes(1024 * first + (7 << 20))
    assert totals[0] == f"2 tensors · ↓ {down} forward · ↑ {first}.0 KiB of gradients"


def test_a_tensor_that_a_stage_only_passes_on_goes_around_it(drawn):
    lines = [path.get("class") for path in ElementTree.fromstring(drawn[2]).iter(f"{SVG}path")]
    plan = drawn[0]
    last = next(k for k, stage in enumerate(plan.stages) if any("blocks.70." in node for node in stage.nodes))
    assert lines.count("cross passing") == last - 1


def test_branches_stand_under_each_other_and_parallel_layers_in_one_column():
    graph = nx.DiGraph([("in", "a0"), ("in", "b0"), ("a0", "a1"), ("b0", "b1"), ("a1", "out"), ("b1", "out")])
    places = place_graph(graph, [list(nx.topological_sort(graph))], 0.0).places
    assert places["a0"].y == places["a1"].y != places["b0"].y == places["b1"].y
    assert places["a0"].x == places["b0"].x < places["a1"].x


def test_the_flag_draws_a_graph_and_the_report_draws_it_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_chain(tmp_path / "graph.json", 12)
    assert main(["--graph", "graph.json", "--gpus", "3", "--microbatches", "4", "--draw", "out/graph.svg"]) == 0
    assert capsys.readouterr().out.endswith("wrote graph.plan.json\ndrew out/graph.svg\n")
    text = (tmp_path / "out" / "graph.svg").read_text()
    assert len(boxes(text)) == 12 and "prefers-color-scheme:dark" in text
    assert report_main(["graph.plan.json", "graph.json", "--format", "svg"]) == 0
    assert capsys.readouterr().out == text


def test_the_flag_draws_a_profiled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = sample_profile()
    profile.save(tmp_path / "model.profile.json")
    assert main(["--profile", "model.profile.json", "--gpus", "2", "--draw", "model.svg"]) == 0
    layers = profile.sizes[0].layers
    assert [lines[0] for lines, _, _ in boxes((tmp_path / "model.svg").read_text())] == [layer.id for layer in layers]


def test_with_json_only_the_plan_is_on_stdout(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_chain(tmp_path / "graph.json", 12)
    assert main(["--graph", "graph.json", "--gpus", "2", "--microbatches", "4", "--json", "--draw", "g.svg"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "graph.plan.json").read_text())


@pytest.mark.parametrize(("name", "message"), [("file/graph.svg", "--draw file/graph.svg"), ("graph.png", "SVG")])
def test_a_place_that_cannot_be_drawn_to_is_refused_before_the_work(tmp_path, capsys, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["--graph", "missing.json", "--gpus", "2", "--microbatches", "4", "--draw", name]) == 2
    assert message in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_a_drawing_from_the_wrong_files_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan_schedule(write_chain(tmp_path / "a.json", 12), 2, 4).save("a.plan.json")
    write_chain(tmp_path / "b.json", 13)
    assert report_main(["a.plan.json", "b.json", "--format", "svg"]) == 2
    assert report_main(["a.plan.json", "--format", "svg"]) == 2
    assert "name both files" in capsys.readouterr().err
    assert Plan.load("a.plan.json").num_stages == 2
