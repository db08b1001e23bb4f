"""What crosses a cut arrives as it was: layouts, repeated dimensions, totals written in place, the user's own marks."""

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import pipe_split

from planner.planning import plan_profile
from planner.request import PlanRequest
from planner.tracing.crossing import wire_bytes, wire_form
from planner.tracing.exporting import trace_model
from planner.tracing.loading import load_source
from tests.zoo.made_up_costs import made_up_profile
from tests.zoo.parity import largest_difference


class Transposed(nn.Module):
    """The second half views the transposed value as flat, which only the layout of the trace allows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(12, 12)
        self.c = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.tanh(self.a(x.view(-1, 2, 6))).mT
        return self.c(self.b(x.mT.view(-1, 12)) + x.mT.view(-1, 12))


class Repeated(nn.Module):
    """A mask and a row of weights, expanded over the batch, that later layers read."""

    def __init__(self):
        super().__init__()
        self.row = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.c = nn.Linear(6, 3)

    def forward(self, x):
        weights = self.row(torch.ones(1, 6)).expand(x.shape[0], 6)
        mask = torch.arange(6)[None].expand(x.shape[0], 6) > 2
        x = x.view(-1, 12)[:, :6]
        for layer in self.layers:
            x = torch.where(mask, layer(x) * weights, x)
        return self.c(x)


class RunningTotal(nn.Module):
    """Every layer adds in place to a total that the next one reads."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.c = nn.Linear(12, 3)

    def forward(self, x):
        total = torch.zeros_like(x)
        for layer in self.layers:
            x = torch.tanh(layer(x) + total)
            total += x.square()
        return self.c(x + total)


class Halves(nn.Module):
    """The input is written in place after `a` has begun; a half of it, taken by chunk before, changes with it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x):
        first, second = x.chunk(2, 1)
        y = self.b(self.a(torch.tanh(x)))
        x.add_(1.0)
        return self.c(first * second * y)


class Marked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.a(x)
        pipe_split()
        return self.c(torch.relu(self.b(x)))


FILE = """
import torch
from tests.test_crossing import {model}
def build_model(): return {model}()
def make_batch(batch_size): return torch.randn(batch_size, 12), torch.randn(batch_size, 3)
def loss_fn(output, targets): return torch.nn.functional.mse_loss(output, targets)
"""


@pytest.mark.parametrize(
    ("model", "num_stages"),
    [(Transposed, 2), (Transposed, 3), (Repeated, 3), (RunningTotal, 3), (Halves, 2), (Marked, 3)],
)
def test_the_split_model_trains_as_the_unsplit_one(tmp_path, model, num_stages):
    (tmp_path / "model.py").write_text(FILE.format(model=model.__name__))
    source = load_source(str(tmp_path / "model.py"))
    trace = trace_model(model(), (torch.zeros(2, 12),), {})
    plan = plan_profile(made_up_profile(source, trace, 4, 2), PlanRequest(num_stages, 4, 2))
    difference, name = largest_difference(plan, source)
    assert difference < 1e-6, name


def test_layouts_are_sent_as_they_lie_and_repeated_dimensions_once():
    strided = torch.zeros(4, 5, 6).permute(2, 0, 1)
    assert strided.permute(wire_form(strided).order).is_contiguous()
    assert strided.permute(wire_form(strided).order).permute(wire_form(strided).inverse).stride() == strided.stride()
    assert wire_bytes(torch.zeros(3, 1, 5).expand(3, 7, 5)) == 3 * 5 * 4
    repeated = {t.num_bytes for t in trace_model(Repeated(), (torch.zeros(2, 12),), {}).tensors if t.name == "expand"}
    assert repeated == {6 * 4}


@pytest.mark.parametrize(("model", "why"), [(Marked, "pipe_split"), (RunningTotal, "in place")])
def test_what_had_to_be_rewritten_is_never_called_plain(model, why):
    assert why in trace_model(model(), (torch.zeros(2, 12),), {}).why_not_plain


def test_a_running_total_leaves_room_for_cuts_and_a_shared_storage_does_not():
    x = torch.zeros(2, 12)
    ids = [layer.id for layer in trace_model(RunningTotal(), (x,), {}).layers]
    assert ids == ["(start)", "layers.0", "layers.1", "layers.2", "layers.3", "c"]
    assert [layer.id for layer in trace_model(Halves(), (x,), {}).layers] == ["(start)", "c"]
