"""A plan's order of layers on the traced graph: what may move, what is refused, and training equal to the model's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from planner.errors import TraceError, UsageError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.partitioning.chain_costs import step_ms
from planner.partitioning.layer_graph import build_layer_graph
from planner.planning import limit_line, planned_chain
from planner.rendering.graph_svg import render_graph_svg
from planner.tracing.exporting import trace_model
from planner.tracing.loading import load_source
from planner.tracing.ordering import layer_dependencies, reorder
from planner.tracing.rewriting import compute_nodes
from planner.tracing.split_policy import cut_positions
from runner.comparing_cuts import other_plan
from tests.running import command, plan_at
from tests.zoo.attempting import plan_of, profile_of
from tests.zoo.parity import largest_difference

TOWERS = Path(__file__).parent / "models" / "unequal_towers.py"


@pytest.fixture(scope="module")
def source():
    return load_source(str(TOWERS))


@pytest.fixture(scope="module")
def profile(source):
    return profile_of(source)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_two_towers_are_cut_along_the_graph_and_train_as_the_eager_model(source, profile, num_stages):
    plan = plan_of(profile, num_stages)
    in_program_order = plan_of(replace(profile, sizes=(replace(profile.sizes[0], dependencies=None),)), num_stages)
    assert plan.status == "optimal" and plan.order is not None and not plan.plain_chain
    assert in_program_order.order is None and plan.step_ms < 0.97 * in_program_order.step_ms
    assert [node for stage in plan.stages for node in stage.nodes] == list(plan.order)
    chain = planned_chain(profile.sizes[0], plan)
    cuts = [chain.ids.index(cut.before) for cut in plan.cuts]
    assert step_ms(chain, cuts, plan.num_microbatches) == plan.step_ms
    assert "limited by stage" in limit_line(plan, profile)
    difference, where = largest_difference(plan, source)
    assert difference <= 1e-5, where


def test_a_plan_with_an_order_trains_on_three_workers(profile, tmp_path):
    plan = plan_of(profile, 3)
    plan.save(tmp_path / "x.plan.json")
    assert Plan.load(tmp_path / "x.plan.json").order == plan.order
    ended = command("x.plan.json", "--steps", 2, "--check", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    measured = Measurement.load(tmp_path / "run" / "measurement.json")
    assert measured.check is not None and measured.order == plan.order


def test_a_plan_with_an_order_is_drawn_with_every_layer(profile):
    plan = plan_of(profile, 3)
    drawn = render_graph_svg(build_layer_graph(profile.sizes[0]), plan)
    assert all(str(node) in drawn for node in plan.order)


def test_an_order_is_not_compared_with_cuts_in_program_order(profile):
    plan = plan_of(profile, 3)
    with pytest.raises(UsageError, match="order of their own"):
        other_plan(plan, next(iter(plan.baselines)))


class Layers(nn.Module):
    """Two branches of the layers that are given; an operation between modules would belong to the layer before it."""

    def __init__(self, left, right):
        super().__init__()
        self.first, self.left, self.right, self.last = nn.Linear(4, 4), left, right, nn.Bilinear(4, 4, 4)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.left(x), self.right(x))


def traced(left, right):
    return trace_model(Layers(left, right), (torch.ones(2, 4),), {})


SWAPPED = ("first", "right", "left", "last")


def test_branches_may_change_places_and_operations_move_with_their_layer():
    trace = traced(nn.Linear(4, 4), nn.Linear(4, 4))
    assert (1, 2) not in layer_dependencies(trace)
    graph = trace.graph_module.graph
    before = {layer.id: compute_nodes(graph)[layer.start : layer.stop] for layer in trace.layers}
    assert cut_positions(trace, ["left"], SWAPPED) == [2]
    expected = trace.graph_module(torch.ones(2, 4))
    reorder(trace, SWAPPED)
    assert compute_nodes(graph) == [node for name in SWAPPED for node in before[name]]
    trace.graph_module.recompile()
    assert torch.equal(trace.graph_module(torch.ones(2, 4)), expected)


def test_operations_that_draw_random_numbers_keep_their_sequence():
    trace = traced(nn.Dropout(0.5), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    ids = [layer.id for layer in trace.layers]
    assert (ids.index("left"), ids.index("right.1")) in layer_dependencies(trace)
    with pytest.raises(TraceError, match=r"'right\.1' before 'left'"):
        reorder(trace, [ids[0], *ids[2:-1], ids[1], ids[-1]])


def test_updates_of_two_buffers_may_change_places():
    norm = nn.BatchNorm1d(4)
    trace = traced(norm, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    ids = [layer.id for layer in trace.layers]
    dependent = layer_dependencies(trace)
    assert (ids.index("left"), ids.index("right.1")) not in dependent


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("first", "last", "left", "right"), "'last' before 'left'"),
        (("left", "first", "right", "last"), "'left' before 'first'"),
    ],
)
def test_an_order_against_the_flow_of_data_is_refused(order, message):
    trace = traced(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(TraceError, match=message):
        reorder(trace, order)


@pytest.mark.parametrize("order", [("first", "left", "last"), ("first", "left", "left", "last"), (*SWAPPED, "other")])
def test_an_order_of_other_layers_is_refused(order):
    trace = traced(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(TraceError, match="differ in layer"):
        cut_positions(trace, ["last"], order)


MODELS = """
import torch
from torch import nn

class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, left, right, scale):
        return self.layer(left + scale * right)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.left = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.right = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.last = Join()
        self.right[2].weight = self.left[0].weight

    def forward(self, x, scale):
        x = self.first(x)
        left = self.left(x)
        return {"left": left, "sum": self.last(left, self.right(x), scale)}

def build_model():
    return Model()

def make_batch(batch_size):
    return (torch.randn(batch_size, 6), torch.rand(batch_size, 1)), torch.randn(batch_size, 6)

def loss_fn(output, target):
    return (output["sum"] - target).square().mean() + output["left"].square().mean()
"""


@pytest.mark.parametrize("cuts", [["right.1", "left.1"], ["left.0", "last"], ["right.2", "left.2"]])
def test_ties_buffers_skips_and_late_inputs_train_in_another_order(tmp_path, cuts):
    file = tmp_path / "model.py"
    file.write_text(MODELS)
    source = load_source(str(file))
    ids = [layer.id for layer in profile_of(source).sizes[0].layers]
    right = [name for name in ids if name.startswith("right")]
    left = [name for name in ids if name.startswith("left")]
    order = ["first", *right, *left, *(name for name in ids if name not in {"first", *right, *left})]
    named = [next(name for name in order if name == cut or f"{name}.0" == cut) for cut in cuts]
    plan = plan_at(file, named, 2, 8, order=order)
    difference, where = largest_difference(plan, source)
    assert difference <= 1e-5, where
