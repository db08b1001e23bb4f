"""Dropout as the identity on both sides of a comparison, exactly; other randomness by name and line."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.tracing.exporting import trace_model
from planner.tracing.loading import build, load_source
from planner.tracing.randomness import DropoutAsIdentity, random_operations, remove_dropout
from planner.tracing.rewriting import apply_cuts
from tests.test_tracing import trace_file


class Applied(nn.Module):
    def __init__(self, called):
        super().__init__()
        self.before, self.called = nn.Linear(8, 8), called

    def forward(self, x):
        made = self.called(self.before(x))
        return made[0] if isinstance(made, tuple) else made


KINDS = {
    "module": lambda: nn.Dropout(0.5),
    "in place": lambda: nn.Dropout(0.5, inplace=True),
    "channels": lambda: nn.Dropout1d(0.5),
    "alpha": lambda: nn.AlphaDropout(0.5),
    "feature alpha": lambda: nn.FeatureAlphaDropout(0.5),
    "function": lambda: functional.dropout,
    "torch": lambda: lambda x: torch.dropout(x, p=0.5, train=True),
    "operator": lambda: lambda x: torch.ops.aten.dropout.default(x, 0.5, True),
    "native": lambda: lambda x: torch.native_dropout(x, 0.5, True),
    "lstm": lambda: nn.LSTM(8, 8, 2, dropout=0.5),
    "gru": lambda: nn.GRU(8, 8, 2, dropout=0.5),
    "rnn": lambda: nn.RNN(8, 8, 2, dropout=0.5),
    "attention": lambda: lambda x: functional.scaled_dot_product_attention(x, x, x, None, 0.5),
    "attention by name": lambda: lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_each_kind_is_the_identity_in_graph_and_model(kind):
    model, x = Applied(KINDS[kind]()), torch.randn(3, 4, 8)
    gm = trace_model(model, (x,), {}).graph_module
    assert random_operations(gm) == ()
    assert (remove_dropout(gm), remove_dropout(gm)) == (1, 0)
    gm.recompile()
    assert not torch.equal(model(x), model(x))
    with DropoutAsIdentity():
        expected = model(x)
        assert torch.equal(model(x), expected)
    assert torch.equal(gm(x), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_without_dropout_are_not_random(kind):
    gm = trace_model(Applied(kind(8, 8)), (torch.ones(3, 4, 8),), {}).graph_module
    assert (random_operations(gm), remove_dropout(gm)) == ((), 0)


def test_dropout_in_evaluation_mode_is_not_active():
    model = Applied(nn.Dropout(0.5)).eval()
    assert remove_dropout(trace_model(model, (torch.ones(2, 8),), {}).graph_module) == 0


def test_attributes_that_are_only_called_after_dropout_keep_their_value(models):
    model = build(load_source(str(models / "dropout.py")), 0)
    with DropoutAsIdentity():
        model(torch.randn(2, 5, 8))
    assert (model.functional.drop_scale, model.functional.dropped_by) == (0.25, 1.5)


def test_the_mode_ends_with_its_block():
    with DropoutAsIdentity():
        pass
    assert not torch.equal(functional.dropout(torch.ones(99)), torch.ones(99))


class Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Applied(lambda x: torch.bernoulli(x.sigmoid()))
        self.after = Applied(lambda x: Noise.apply(x))

    def forward(self, x):
        return self.after(self.inner(x))


def test_other_randomness_is_named_with_module_and_line_also_after_the_cut():
    trace = trace_model(Noisy(), (torch.ones(2, 8),), {})
    apply_cuts(trace.graph_module, [trace.layers[1].start])
    first, second = random_operations(trace.graph_module)
    assert first.startswith("inner: aten.bernoulli.default (test_randomness.py:")
    assert second.startswith("after: aten.rand_like.default in test_randomness.py:") and "Noise.apply(x)" in second


def test_a_model_file_with_every_kind_has_none_left(models):
    gm = trace_file(models / "dropout.py").graph_module
    assert random_operations(gm) == () and remove_dropout(gm) == 10
