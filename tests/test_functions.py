"""Custom autograd Functions are kept whole in a trace, or refused where a stage could not call them rightly."""

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import pipeline

from planner.errors import TraceError
from planner.tracing.exporting import trace_model
from planner.tracing.functions import APPLY_OWNER, function_calls, keep_functions
from planner.tracing.loading import build, load_source
from planner.tracing.rewriting import set_device
from tests.running import plan_at
from tests.test_tracing import trace_file


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, device=None):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient, None


class Reversing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.b(Reversal.apply(self.a(x), torch.device("cpu")))


def test_the_traced_graph_calls_the_users_backward():
    model, x = Reversing(), torch.randn(2, 3)
    gm = trace_model(model, (x,), {}).graph_module
    gm.recompile()
    gradients = []
    for called in (model, gm):
        model.zero_grad()
        called(x).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert gradients[0][0].abs().max() > 0
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


def test_kept_calls_are_named_alike_in_every_trace_and_never_split_plainly(models):
    first, again = trace_file(models / "functions.py"), trace_file(models / "functions.py")
    assert first.fingerprint == again.fingerprint
    shown = [str(call) for call in function_calls(first.graph_module.graph)]
    assert shown[-1].endswith("evenstage_model_functions.Reversal(0.5)")
    assert "Function SineAndScale" in first.why_not_plain


def test_outside_of_an_export_nothing_is_touched():
    with keep_functions():
        x = torch.ones(2, requires_grad=True)
        Reversal.apply(x).sum().backward()
        assert x.grad is not None and x.grad.tolist() == [-1.0, -1.0]
    assert "apply" not in vars(APPLY_OWNER)


def test_stock_pipeline_with_the_plans_policy_keeps_them_too(models):
    file = models / "functions.py"
    source = load_source(str(file))
    model = build(source, 0)
    pipe = pipeline(model, (torch.randn(2, 6),), split_policy=plan_at(file, ["label", "domain"]).split_policy(model))
    kept = [len(function_calls(pipe.get_stage_module(index).graph)) for index in range(3)]
    assert sum(kept) == 4 and "apply" not in vars(APPLY_OWNER)


def test_a_device_among_the_constants_is_replaced():
    gm = trace_model(Reversing(), (torch.ones(2, 3),), {}).graph_module
    set_device(gm, torch.device("meta"))
    assert [call.constants for call in function_calls(gm.graph)] == [(torch.device("meta"),)]


class Captures(Reversing):
    def forward(self, x):
        outer = self

        class Captured(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x @ outer.a.weight

            @staticmethod
            def backward(ctx, gradient):
                return gradient

        return self.b(Captured.apply(x))


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Writes(Reversing):
    def forward(self, x):
        return self.b(InPlace.apply(self.a(x)))


@pytest.mark.parametrize(
    ("kind", "line", "reason", "remedy"),
    [
        (Captures, "Captured.apply(x)", "not given to apply", "as an argument"),
        (Writes, "InPlace.apply(self.a(x))", "in place", "new tensor"),
    ],
)
def test_what_a_stage_could_not_call_rightly_is_refused_with_the_line(kind, line, reason, remedy):
    with pytest.raises(TraceError) as caught:
        trace_model(kind(), (torch.ones(2, 3),), {})
    assert reason in caught.value.got and remedy in caught.value.remedy
    assert line in caught.value.frames[0] and caught.value.frames[0].startswith("test_functions.py:")


class Mapped(Reversing):
    def forward(self, x):
        return self.b(torch.vmap(Squared.apply)(self.a(x)))


class Squared(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return -2 * gradient * ctx.saved_tensors[0]


def test_under_a_transform_of_torch_func_the_export_itself_refuses():
    with pytest.raises(TraceError, match=r"torch\.export fails on Mapped"):
        trace_model(Mapped(), (torch.ones(2, 3),), {})


class Hooked(Reversing):
    def forward(self, x):
        x = self.a(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: -gradient)
        return self.b(x)


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 4))
    with pytest.raises(TraceError, match="0 makes sparse gradients"):
        trace_model(model, (torch.zeros(2, dtype=torch.long),), {})


def test_sparse_gradients_of_a_function_are_refused_with_its_line():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 4))

        def forward(self, words):
            return nn.functional.embedding(words, self.weight, sparse=True)

    with pytest.raises(TraceError, match="the model makes sparse gradients") as caught:
        trace_model(Functional(), (torch.zeros(2, dtype=torch.long),), {})
    assert "nn.functional.embedding(words" in caught.value.frames[0]


def test_hooks_on_gradients_are_refused_where_they_are_registered():
    with pytest.raises(TraceError) as caught:
        trace_model(Hooked(), (torch.ones(2, 3),), {})
    assert "hook" in caught.value.got and "x.register_hook(lambda" in caught.value.frames[0]
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].register_full_backward_hook(lambda module, before, after: None)
    with pytest.raises(TraceError, match=r"module 1 \(Linear\) has a backward hook"):
        trace_model(model, (torch.ones(2, 3),), {})
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda gradient: 2 * gradient)
    x.sum().backward()
    assert x.grad is not None and x.grad.item() == 2.0


def test_a_hook_on_a_parameter_of_several_layers_is_refused_and_on_others_kept():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.register_hook(lambda gradient: -gradient)
    assert len(trace_model(model, (torch.ones(2, 3),), {}).layers) == 2
    model[1].weight = model[0].weight
    with pytest.raises(TraceError, match=r"parameter 0.weight has a hook"):
        trace_model(model, (torch.ones(2, 3),), {})
