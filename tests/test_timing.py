"""In-situ timing, held to a clock that only operators of known cost advance."""

import pytest
import torch
from torch import nn

from planner.profiling import timing
from planner.profiling.marked_graph import even_starts, marked_parts
from planner.profiling.pooling import drift, periods, pooled
from planner.profiling.timing import LayerSamples, Microbatch, summarise, time_layers, time_optimizer
from planner.tracing.exporting import trace_model
from planner.tracing.pieces import build_pieces
from tests.working_clock import CLOCK, Layer, WorkingDevice, work


def measure(model, num_microbatches=3, num_parts=1):
    x = torch.ones(2, 3)
    pieces = build_pieces(trace_model(model, (x,), {}))
    microbatches = [Microbatch((x,), x) for _ in range(num_microbatches)]
    loss = lambda output, targets: work((output - targets).square().mean(), 0.5, 0.25)  # noqa: E731
    samples = time_layers(pieces, microbatches, loss, WorkingDevice(), num_rounds=4, num_parts=num_parts)
    return pieces, samples


def test_every_layer_of_a_chain_is_timed_exactly():
    costs = [(1.0, 2.0), (4.0, 3.0), (2.5, 7.5)]
    pieces, samples = measure(nn.Sequential(*(Layer(*cost) for cost in costs)))
    assert [layer.id for layer in pieces.trace.layers] == ["0", "1", "2"]
    for (forward_ms, backward_ms), sample in zip(costs[:-1], samples[:-1], strict=True):
        assert set(sample.forward_ms) == {forward_ms} and set(sample.backward_ms) == {backward_ms}
    assert set(samples[-1].forward_ms) == {2.5 + 0.5} and set(samples[-1].backward_ms) == {7.5 + 0.25}


def test_samples_are_counted_by_round_and_microbatch():
    _, samples = measure(nn.Sequential(Layer(1, 1), Layer(1, 1)), num_microbatches=3)
    assert len(samples[0].forward_ms) == 4 * 3
    assert (len(samples[0].backward_first_ms), len(samples[0].backward_ms)) == (4, 4 * 2)


class Skip(nn.Module):
    """x reaches the last layer past the middle ones; the backward of each must still go to its own layer."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.side, self.last = Layer(1, 10), Layer(2, 20), Layer(3, 30), Layer(4, 40)

    def forward(self, x):
        kept = self.first(x)
        x = self.middle(kept)
        x = self.side(x)
        return self.last(x + kept)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_skips_do_not_move_backward_time_between_layers(num_parts):
    pieces, samples = measure(Skip(), num_parts=num_parts)
    times = {layer.id: set(sample.backward_ms) for layer, sample in zip(pieces.trace.layers, samples, strict=True)}
    assert times == {"first": {10.0}, "middle": {20.0}, "side": {30.0}, "last": {40.25}}


class Frozen(nn.Module):
    """A layer without any gradient has no backward and gives its neighbours none of theirs."""

    def __init__(self):
        super().__init__()
        self.frozen, self.last = Layer(1, 100), Layer(2, 5)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x):
        return self.last(self.frozen(x))


@pytest.mark.parametrize("num_parts", [1, 2])
def test_frozen_layers_have_no_backward(num_parts):
    _, samples = measure(Frozen(), num_parts=num_parts)
    assert [set(sample.backward_ms) for sample in samples] == [{0.0}, {5.25}]


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_a_layer_that_returns_what_it_was_given_takes_no_time_from_others(num_parts):
    model = nn.Sequential(Layer(1, 10), nn.Dropout(0.0), nn.Dropout(0.0), Layer(2, 20))
    _, samples = measure(model, num_parts=num_parts)
    assert [set(sample.backward_ms) for sample in samples] == [{10.0}, {0.0}, {0.0}, {20.25}]
    assert [set(sample.forward_ms) for sample in samples] == [{1.0}, {0.0}, {0.0}, {2.5}]


def test_all_microbatches_pass_one_part_before_the_next():
    pieces = build_pieces(trace_model(nn.Sequential(*(Layer(1, 1) for _ in range(4))), (torch.ones(2, 3),), {}))
    assert even_starts([1.0] * 4, 2) == (0, 2)
    step = timing._Step(
        pieces, marked_parts(pieces.trace, (0, 2)), lambda output, targets: output.sum(), WorkingDevice()
    )
    order: list[tuple[str, str]] = []
    run_forward, run_backward = timing._Run.forward, timing._Run.backward

    class Noting(timing._Run):
        def forward(self, index):
            order.append(("forward", f"{index}"))
            run_forward(self, index)

        def backward(self, index):
            order.append(("backward", f"{index}"))
            run_backward(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_Run", Noting)
        timing._one_round(step, [timing.Microbatch((torch.ones(2, 3),), None)] * 2)
    assert order == [
        (kind, part) for kind, parts in (("forward", "01"), ("backward", "10")) for part in parts for _ in "ab"
    ]


class LinearSkip(nn.Module):
    """What the first layer makes is read by the second and after the third."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(3, 4), nn.Linear(4, 4)
        self.side, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        kept = self.first(x)
        return self.last(self.side(self.middle(kept)) * kept)


def test_parts_leave_the_gradients_of_the_whole():
    torch.manual_seed(0)
    model = LinearSkip()
    x = torch.randn(2, 3)
    pieces = build_pieces(trace_model(model, (x,), {}))
    loss = lambda output, targets: (output - targets).square().mean()  # noqa: E731
    found = []
    for starts in ((0,), (0, 1, 2)):
        timing.clear_gradients(pieces)
        step = timing._Step(pieces, marked_parts(pieces.trace, starts), loss, WorkingDevice())
        timing._one_round(step, [timing.Microbatch((x,), x)] * 2)
        found.append([p.grad.clone() for piece in pieces.pieces for p in piece.module.parameters()])
    assert len(found[0]) == 8 and all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


def test_pieces_chained_equal_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    pieces = build_pieces(trace_model(model, (x,), {}))
    values = dict(zip(pieces.inputs, (x,), strict=True))
    for piece in pieces.pieces:
        values.update(zip(piece.outputs, piece.module(*(values[n] for n in piece.inputs)), strict=True))
    assert torch.equal(pieces.rebuild_output(values), model(x))


def test_equal_layers_have_one_structure_and_others_differ():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8))
    structures = [piece.structure for piece in build_pieces(trace_model(model, (torch.ones(2, 4),), {})).pieces]
    assert structures[1] != structures[2]
    assert len(set(structures)) == 2


def test_spread_shrinks_with_samples():
    few, many = [1.0, 2.0, 3.0], [1.0, 2.0, 3.0] * 12
    assert summarise(many)[0] == 2.0
    assert summarise(many)[1] < summarise(few)[1]


class SlowOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        CLOCK.now_ms += sum(p.numel() for group in self.param_groups for p in group["params"])


def test_optimizer_is_timed_by_group_and_leaves_no_gradients():
    groups = [[nn.Parameter(torch.ones(5))], [], [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4))]]
    assert time_optimizer(groups, lambda p: SlowOptimizer(p, lr=0.1), WorkingDevice(), 3) == [5.0, 0.0, 6.0]
    assert all(parameter.grad is None for group in groups for parameter in group)


def test_samples_of_all_copies_are_pooled_round_by_round():
    slow, fast = (
        (LayerSamples((4.0, 4.0, 2.0, 2.0), (2.0, 1.0), (1.0, 1.0)),),
        (LayerSamples((2.0, 2.0, 1.0, 1.0), (4.0, 2.0), (1.0, 1.0)),),
    )
    both = pooled([slow, fast])
    assert both[0].forward_ms == (4.0, 2.0, 4.0, 2.0, 2.0, 1.0, 2.0, 1.0)
    assert periods(both, 2) == pytest.approx((1 / 3, -1 / 3))
    assert drift(both) == pytest.approx(0.5)
    assert periods(both, 1) == () and len(periods(both, 15)) == 4


def test_nothing_is_collected_while_something_is_timed(monkeypatch):
    collected = []
    monkeypatch.setattr(timing.gc, "collect", lambda: collected.append(timing.gc.isenabled()))
    with timing.without_collection():
        with timing.without_collection():
            assert not timing.gc.isenabled()
        assert not timing.gc.isenabled()
    assert collected == [True] and timing.gc.isenabled()
