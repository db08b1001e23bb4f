"""State that forward writes, returns or names awkwardly; what is sent is never what the next microbatch writes to."""

import torch
from torch import nn
from torch.distributed.pipelining import pipeline

from planner.tracing.exporting import trace_model
from planner.tracing.gradients import needs_gradient
from planner.tracing.loading import build, load_source
from planner.tracing.pieces import build_pieces
from planner.tracing.rewriting import apply_cuts
from tests.running import plan_at
from tests.test_tracing import trace_file

ATEN = torch.ops.aten


class Running(nn.Module):
    """A buffer that is assigned early, and returned; cuts are legal behind the last use of its old value."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        x = self.a(x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.c(self.b(x - self.mean)), self.mean


def test_an_assigned_buffer_is_written_behind_its_last_use_so_that_cuts_stay_legal():
    trace = trace_model(Running(), (torch.ones(2, 3),), {})
    assert [layer.id for layer in trace.layers] == ["a", "b", "c"]


class LateReader(Running):
    def forward(self, x):
        old = self.mean * 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.c(self.b(self.a(x)) + old + self.mean)


def test_the_assigned_value_and_the_old_one_are_told_apart():
    model, x = LateReader(), torch.randn(2, 3)
    gm = trace_model(model, (x,), {}).graph_module
    gm.recompile()
    results = [gm(x), gm(x)]
    model.mean = torch.zeros(3)
    assert torch.equal(results[0], model(x)) and torch.equal(results[1], model(x))


def test_what_shares_storage_with_a_written_buffer_is_copied_before_it_is_sent():
    class Counts(Running):
        def forward(self, x):
            self.mean.add_(1)
            seen = self.mean[:2]
            return self.c(self.b(self.a(x))), seen

    trace = trace_model(Counts(), (torch.ones(2, 3),), {})
    apply_cuts(trace.graph_module, [trace.layers[-1].start])
    copies = [node for node in trace.graph_module.graph.nodes if node.target is ATEN.clone.default]
    assert len(copies) == 1 and copies[0].args[0].target is ATEN.slice.Tensor


def test_a_written_input_is_copied_so_that_microbatches_do_not_disturb_each_other():
    class Writes(Running):
        def forward(self, x):
            x.add_(1)
            return self.b(self.a(x))

    batch = torch.zeros(4, 3)
    gm = trace_model(Writes(), (torch.zeros(2, 3),), {}).graph_module
    gm.recompile()
    for output in [gm(batch[:2]), gm(batch[2:])]:
        output.sum().backward()
    assert torch.equal(batch, torch.zeros(4, 3))


def test_constants_state_and_inputs_are_returned_as_the_model_does():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.register_buffer("kept", torch.ones(3))

        def forward(self, x):
            made = {"n": 3, "none": None, "flags": [True, "s", 1.5], "x": x}
            return {"logits": self.b(self.a(x)), "weight": self.a.weight, "kept": self.kept, **made}

    model, x = Returns(), torch.randn(2, 3)
    pieces = build_pieces(trace_model(model, (x,), {}))
    values = dict(zip(pieces.inputs, [x], strict=True))
    for piece in pieces.pieces:
        values.update(zip(piece.outputs, piece.module(*(values[name] for name in piece.inputs)), strict=True))
    found, expected = pieces.rebuild_output(values), model(x)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
    (found["logits"].sum() + found["weight"].sum()).backward()


def test_a_slice_of_every_row_is_sent_contiguous():
    class Slices(Running):
        def forward(self, x):
            narrow = self.a(x)[:, 1:2]
            return self.b(narrow.expand(2, 3) * 2) + narrow

    graph = (trace := trace_model(Slices(), (torch.ones(2, 3),), {})).graph_module.graph
    apply_cuts(trace.graph_module, [next(layer.start for layer in trace.layers if layer.id == "b")])
    nodes = list(graph.nodes)
    cut = next(index for index, node in enumerate(nodes) if "pipe_split" in str(node.target))
    sent = {a for node in nodes[cut:] for a in node.all_input_nodes if a in nodes[:cut] and a.op == "call_function"}
    assert sent and all(node.meta["val"].is_contiguous() for node in sent)


class WritesInput(Running):
    def forward(self, x, late):
        late += 1
        return self.b(self.a(x)) * late


def test_what_forward_writes_to_is_a_copy_of_its_input():
    model, x = WritesInput(), torch.zeros(2, 3)
    gm = trace_model(model, (x, x.clone()), {}).graph_module
    gm.recompile()
    late = torch.zeros(4, 3)
    outputs = [gm(x, late[:2]), gm(x, late[2:])]  # two microbatches of one batch
    sum(output.sum() for output in outputs).backward()
    assert late.abs().max() == 0 and torch.equal(outputs[0], model(x, torch.zeros(2, 3)))


NAMES = """
import torch
from torch import nn
class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.linear, self.alias = (nn.Parameter(torch.randn(*shape)) for shape in [(4,), (4, 4), (4,)])
        self.a, self.b, self.a_b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("add", torch.randn(4))
        self.register_buffer("a_b_weight", torch.randn(4))
    def forward(self, x):
        x = self.a(x * self.x) @ self.linear + self.add
        return self.a_b(self.b(x) @ self.linear + self.add + self.x) * self.a_b_weight + self.alias
def build_model(): return Names()
def make_batch(batch_size): return torch.randn(batch_size, 4), torch.randn(batch_size, 4)
def loss_fn(output, targets): return (output - targets).square().mean()
"""


def test_state_may_be_called_as_operations_and_inputs_are(tmp_path):
    (tmp_path / "names.py").write_text(NAMES)
    model, x = build(load_source(str(tmp_path / "names.py")), 0), torch.randn(2, 4)
    expected = model(x)
    pipe = pipeline(model, (x,), split_policy=plan_at(tmp_path / "names.py", ["b", "a_b"]).split_policy(model))
    assert torch.equal(pipe(x)[0], expected)
    assert {name for name, _ in pipe.get_stage_module(1).named_parameters()} == {"b.weight", "b.bias", "linear", "x"}


def test_the_model_file_of_state_can_be_cut_at_every_module(models):
    assert [layer.id for layer in trace_file(models / "state.py").layers][1::5] == [
        "norms.0",
        "norms.1",
        "norms.2",
        "head",
    ]


def test_what_carries_no_gradient_crosses_as_whole_numbers(models):
    trace = trace_file(models / "values.py")
    start = next(layer.start for layer in trace.layers if layer.id == "layers.2")
    apply_cuts(trace.graph_module, [start])
    nodes = list(trace.graph_module.graph.nodes)
    cut = next(index for index, node in enumerate(nodes) if "pipe_split" in str(node.target))
    crossing = {a for node in nodes[cut:] for a in node.all_input_nodes if a in nodes[:cut] and a.op != "get_attr"}
    graded = needs_gradient(trace.graph_module)
    floats = {node for node in crossing if node.meta["val"].is_floating_point()}
    assert floats and floats <= graded and len(crossing) > len(floats)


def test_tied_parameters_have_one_name_in_every_stage(tmp_path):
    (tmp_path / "tied.py").write_text(TIED)
    for _ in range(4):  # torch takes any name out of a set
        model = build(load_source(str(tmp_path / "tied.py")), 0)
        policy = plan_at(tmp_path / "tied.py", ["b", "d"]).split_policy(model)
        pipe = pipeline(model, (torch.randn(2, 4),), split_policy=policy)
        names = [{name for name, _ in pipe.get_stage_module(index).named_parameters()} for index in range(3)]
        assert names == [{"a.weight", "a.bias"}, {"a.weight", "b.bias", "c.bias"}, {"a.weight", "d.bias"}]


TIED = """
import torch
from torch import nn
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.b.weight = self.c.weight = self.d.weight = self.a.weight
    def forward(self, x): return self.d(self.c(self.b(self.a(x))))
def build_model(): return Tied()
def make_batch(batch_size): return torch.randn(batch_size, 4), torch.randn(batch_size, 4)
def loss_fn(output, targets): return (output - targets).square().mean()
"""
