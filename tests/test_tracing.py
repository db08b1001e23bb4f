"""Layers, positions, legality and fingerprints of traces."""

import pytest
import torch
from torch import nn

from planner.errors import TraceError
from planner.tracing.exporting import trace_model
from planner.tracing.gradients import needs_gradient
from planner.tracing.loading import as_call, build, load_source, make_batch, rows
from planner.tracing.randomness import random_operations, remove_dropout
from planner.tracing.rewriting import apply_cuts, canonical_names, compute_nodes, set_device


def trace_file(path, size=2):
    source = load_source(str(path))
    inputs, _ = make_batch(source, 0, 0, 8)
    return trace_model(build(source, 0), *as_call(rows(inputs, 0, size)))


def test_positions_are_where_split_point_beginning_cuts(models):
    """Held against torch: a plain chain split by split_spec before a layer starts with the parameters that we say."""
    from torch.distributed.pipelining import SplitPoint, pipeline

    source = load_source(str(models / "plain.py"))
    x = torch.randn(2, 12)
    layers = trace_model(build(source, 0), (x,), {}).layers
    assert all(layer.plain_cut for layer in layers[1:])
    for index, layer in enumerate(layers[1:], start=1):
        pipe = pipeline(build(source, 0), (x,), split_spec={layer.name: SplitPoint.BEGINNING})
        later = {name for name, _ in pipe.get_stage_module(1).named_parameters()}
        assert later == {name for after in layers[index:] for name in after.parameters}


def test_tied_and_repeated_parameters_are_found(models):
    assert trace_file(models / "skips.py").tied == {"embedding.weight": (0, 21)}
    twice = trace_file(models / "twice.py")
    assert [layer.id for layer in twice.layers] == [
        "first",
        "shared",
        "shared.1",
        "middle",
        "shared@1",
        "shared.1@1",
        "last",
    ]
    assert twice.tied["shared.0.weight"] == (1, 4)


def test_values_that_pass_over_layers_are_listed_with_their_gradient_bytes(models):
    tensors = {tensor.name: tensor for tensor in trace_file(models / "skips.py").tensors}
    first = tensors["embedding"]
    assert first.consumers[-1] == 20 and first.gradient_bytes == first.num_bytes == 2 * 6 * 16 * 4
    without = [tensor for tensor in tensors.values() if tensor.gradient_bytes == 0]
    assert [tensor.consumers for tensor in without] == [(4, 8, 12, 16, 20)]


def test_no_cut_between_a_storage_and_a_write_to_it(models):
    ids = [layer.id for layer in trace_file(models / "convolutional.py").layers]
    assert "down.0.norm" in ids and "down.0.activation" not in ids


class SharedCounter(nn.Module):
    """A buffer that is written early and read late: both must be in one stage."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count.add_(1)
        return self.c(self.b(self.a(x)) * self.count)


class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        self.filter = nn.Identity()
        self.gain = nn.Linear(3, 3)

    def forward(self, x):
        spectrum = torch.fft.rfft(self.before(x))
        weights = self.gain(torch.ones(3))
        return self.after(torch.fft.irfft(spectrum * weights, n=4))


def test_no_cut_across_complex_values():
    ids = [layer.id for layer in trace_model(Fourier(), (torch.ones(2, 4),), {}).layers]
    assert "gain" not in ids and "after" in ids


def test_no_cut_between_uses_of_a_buffer_that_changes():
    ids = [layer.id for layer in trace_model(SharedCounter(), (torch.ones(2, 3),), {}).layers]
    assert "b" not in ids and "c" in ids


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, y):
        return self.b(self.a(y) - x)


def test_what_stock_torch_would_bind_wrongly_is_never_plain():
    trace = trace_model(Backwards(), (torch.ones(2, 3), torch.ones(2, 3)), {})
    assert "order" in trace.why_not_plain
    assert not any(layer.plain_cut for layer in trace.layers)


def test_fingerprint_sees_structure_not_weights():
    x = torch.ones(2, 4)
    first, again = (trace_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (x,), {}) for _ in range(2))
    other = trace_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)), (x,), {})
    larger = trace_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.ones(3, 4),), {})
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, larger.fingerprint}) == 3


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_does_not_export_says_why():
    with pytest.raises(TraceError) as caught:
        trace_model(Branching(), (torch.ones(2),), {})
    assert "cannot be exported" in str(caught.value) and "torch.where" in caught.value.remedy


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


def test_other_regions_are_refused_by_name():
    with pytest.raises(TraceError, match="region of kind") as caught:
        trace_model(nn.Sequential(nn.Linear(3, 3), Autocast()), (torch.ones(2, 3),), {})
    assert "module 1" in caught.value.got


@pytest.mark.parametrize("name", ["skips.py", "twice.py", "convolutional.py", "plain.py"])
def test_after_the_cut_every_value_goes_to_the_next_stage_only(models, name):
    trace = trace_file(models / name)
    positions = [layer.start for layer in trace.layers][1::2]
    nodes = set(compute_nodes(trace.graph_module.graph))
    apply_cuts(trace.graph_module, positions)
    stage, index = {}, 0
    for node in trace.graph_module.graph.nodes:
        if "pipe_split" in str(node.target):
            index += 1
        elif node.op == "call_function":
            stage[node] = index
    assert index == len(positions) and nodes <= set(stage)
    for node, home in stage.items():
        readers = {stage.get(user, index) for user in node.users if user.op != "placeholder"}
        assert readers <= {home, home + 1}
        if home + 1 in readers:
            assert node.meta["val"].is_contiguous()


def test_only_values_of_trainable_parameters_need_gradients(models):
    trace = trace_file(models / "skips.py")
    graded = {node.name for node in needs_gradient(trace.graph_module)}
    assert "embedding" in graded and not any("detach" in name for name in graded)


def test_dropout_is_removed_and_other_randomness_named(models):
    trace = trace_file(models / "skips.py")
    assert random_operations(trace.graph_module) == ()
    assert (remove_dropout(trace.graph_module), remove_dropout(trace.graph_module)) == (5, 0)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x + torch.rand_like(x))

    noisy = trace_model(Noisy(), (torch.ones(2, 2),), {})
    assert len(random_operations(noisy.graph_module)) == 1 and "rand_like" in random_operations(noisy.graph_module)[0]


def test_canonical_names_are_the_first_of_each_tensor():
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 2), nn.Linear(2, 2)
    model.b.weight = model.a.weight
    assert canonical_names(model)["b.weight"] == "a.weight"


def test_the_device_of_the_trace_is_replaced_by_position_too():
    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x + torch.zeros(2, device="cpu").to("cpu", torch.float32))

    trace = trace_model(Moves(), (torch.ones(2, 2),), {})
    set_device(trace.graph_module, torch.device("meta"))
    named = [a for node in trace.graph_module.graph.nodes for a in [*node.args, *node.kwargs.values()]]
    assert {a.type for a in named if isinstance(a, torch.device)} == {"meta"}
