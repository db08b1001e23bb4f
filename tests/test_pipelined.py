"""Layers timed in a real pipeline of processes, held to a clock that only operators of known cost advance."""

import functools

import pytest
import torch

from planner.profiling.boundary import NO_COST
from planner.profiling.pipelined import Direction, StageSamples, put_together
from planner.profiling.stage_optimizer import StageOptimizer, shared_out
from tests.pipelined_copies import MICROBATCHES, Frozen, Skip, Structured, inputs_of, loss_of, make_optimizer, times
from tests.working_clock import CLOCK, WorkingDevice

SKIP = {"first": (1, 10), "middle": (2, 20), "side": (3, 30), "nothing": (0, 0), "last": (4.5, 40.25)}


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """What copies found of a model; each combination is run once."""
    return functools.cache(lambda name, copies, **how: times(name, copies, tmp_path_factory.mktemp("copies"), **how))


def exact(found, which):
    return {name: {round(ms, 9) for ms in samples[which]} for name, samples in found[0]["layers"].items()}


@pytest.mark.parametrize("copies", [2, 3])
def test_every_layer_is_timed_exactly_on_the_copy_that_runs_it(timed, copies):
    found = timed("Skip", copies)
    assert exact(found, "forward_ms") == {name: {forward} for name, (forward, _) in SKIP.items()}
    assert exact(found, "backward_ms") == {name: {backward} for name, (_, backward) in SKIP.items()}
    assert exact(found, "backward_first_ms") == exact(found, "backward_ms")
    assert found[0]["boundary"] == {"forward_ms": 0.0, "backward_ms": 0.0}
    assert all(other["layers"] == found[0]["layers"] for other in found)
    assert len(found[0]["layers"]["first"]["forward_ms"]) == 2 * MICROBATCHES  # two of four rounds are marked
    assert len(found[0]["layers"]["first"]["backward_ms"]) == 2 * (MICROBATCHES - 1)


def test_layers_are_timed_exactly_under_1f1b_too(timed):
    found = timed("Skip", 3, schedule="1f1b")
    assert exact(found, "forward_ms") == {name: {forward} for name, (forward, _) in SKIP.items()}
    assert exact(found, "backward_ms") == {name: {backward} for name, (_, backward) in SKIP.items()}
    assert found[0]["optimizer_ms"] == timed("Skip", 3)[0]["optimizer_ms"]
    assert [each["gradients"] for each in found] == [each["gradients"] for each in timed("Skip", 3)]


@pytest.mark.parametrize(("schedule", "short_ms"), [("gpipe", {1.0, 2.0}), ("1f1b", {2.0})])
def test_a_forward_that_follows_a_backward_is_timed_as_one(timed, schedule, short_ms):
    found = timed("Pair", 2, schedule=schedule, how="colder")
    assert exact(found, "forward_ms")["short"] == short_ms, "the last stage's first layer"
    assert exact(found, "forward_ms")["last"] == {3.5}


def test_a_gradient_that_is_early_at_the_boundary_takes_no_time_from_the_layers(timed):
    found = timed("Added", 2)
    assert exact(found, "backward_ms") == {"first": {10.0}, "middle": {20.0}, "last": {40.25}}
    assert found[0]["boundary"] == {"forward_ms": 0.0, "backward_ms": 0.0}


def test_frozen_layers_have_no_backward_on_a_copy_of_their_own(timed):
    found = timed("Frozen", 2)
    assert exact(found, "backward_ms") == {"frozen": {0.0}, "more": {0.0}, "last": {5.25}}
    assert exact(found, "forward_ms") == {"frozen": {8.0}, "more": {1.0}, "last": {9.5}}


def test_the_loss_is_the_last_layers_and_no_others(timed):
    found = timed("Pair", 2)
    assert exact(found, "forward_ms") == {"long": {50.0}, "short": {1.0}, "last": {3.5}}
    assert exact(found, "backward_ms") == {"long": {50.0}, "short": {2.0}, "last": {4.25}}


def test_a_model_of_fewer_layers_than_copies_is_timed_by_some(timed):
    found = timed("One", 2)
    assert exact(found, "forward_ms") == {"only": {2.5}} and exact(found, "backward_ms") == {"only": {3.25}}


@pytest.mark.parametrize(
    ("name", "copies", "optimizer_ms"),
    [("Skip", 2, [1.25, 0.75]), ("Skip", 3, [1.0, 0.75, 0.75]), ("Frozen", 2, [0.0, 0.75]), ("Structured", 2, None)],
)
def test_every_stages_optimizer_is_timed_after_its_backward(timed, name, copies, optimizer_ms):
    found = timed(name, copies)
    assert len(found[0]["starts"]) == copies and found[0]["starts"][0] == 0
    if optimizer_ms is not None:
        assert found[0]["optimizer_ms"] == pytest.approx(optimizer_ms)
    else:
        assert sum(found[0]["optimizer_ms"]) == pytest.approx(2 * 0.5 + 3 * 0.25), "both holders update the tied weight"


def test_what_marks_cost_is_taken_off(tmp_path):
    found = times("Skip", 2, tmp_path, "slowed")
    forward = sum(max(exact(found, "forward_ms")[name]) for name in SKIP)
    boundary_ms = found[0]["boundary"]["forward_ms"]
    assert forward + 2 * boundary_ms == pytest.approx(10.5)
    assert exact(found, "backward_ms")["last"] == {40.25}


@pytest.mark.parametrize(("kind", "copies"), [(Skip, 3), (Frozen, 2), (Structured, 3)])
def test_the_pipeline_that_is_timed_computes_the_gradients_of_the_model(timed, kind, copies):
    found, model = timed(kind.__name__, copies), kind()
    for number in range(MICROBATCHES):
        inputs = inputs_of(model)
        output = model(**{k: v * (1 + number) for k, v in inputs.items()}) if isinstance(inputs, dict) else None
        output = model(inputs * (1 + number)) if output is None else output
        loss_of(output, torch.ones(2, 3) * number).backward()
    for parameter, tensor in model.named_parameters():
        parts = [torch.tensor(copy["gradients"][parameter]) for copy in found if parameter in copy["gradients"]]
        tied = kind is Structured and parameter == "first.weight"
        assert len(parts) == (0 if tensor.grad is None else 1 + tied)
        assert all(torch.allclose(part, tensor.grad) for part in parts), "a tied gradient is the sum on every holder"


def direction(*times, chunk_ms=None):
    made = Direction()
    for _ in range(3):
        made.add(times)
        made.add([2 * ms for ms in times], first=True)
        made.chunks += [] if chunk_ms is None else [chunk_ms]
    return made


def test_layers_and_boundaries_add_up_to_what_each_stage_took_without_marks():
    ends = direction(1.0, 4.0, 2.0, 1.0, chunk_ms=4.0), direction(1.0, 6.0, 1.0, chunk_ms=4.0)
    middle = direction(4.0, 4.0, 4.0, chunk_ms=6.0)
    layers, boundary = put_together([StageSamples(d, d) for d in (ends[0], middle, ends[1])])
    assert boundary.forward_ms == pytest.approx((1.0 + 2 * 4.0 + 1.0) / (1 + 4 + 1))
    assert boundary.backward_ms == boundary.forward_ms
    inside = [(4.0 - boundary.forward_ms) * 4 / 6, (4.0 - boundary.forward_ms) * 2 / 6]
    inside += [6.0 - 2 * boundary.forward_ms, 4.0 - boundary.forward_ms]
    assert [layer.forward_ms for layer in layers] == [pytest.approx([ms] * 3) for ms in inside]
    assert layers[3].backward_first_ms == pytest.approx([2 * max(layers[3].backward_ms)] * 3)


def test_without_whole_chunks_layers_keep_what_was_marked():
    layers, boundary = put_together([StageSamples(direction(0.0, 1.0, 2.0, 0.0), direction(0.0, 3.0, 4.0, 0.0))])
    assert [set(layer.forward_ms) for layer in layers] == [{1.0}, {2.0}]
    assert [set(layer.backward_ms) for layer in layers] == [{3.0}, {4.0}] and boundary == NO_COST


def test_a_stage_keeps_a_share_for_its_layers_however_small_it_is():
    tiny, large = direction(0.0, 0.5, 0.5, chunk_ms=1.0), direction(9.0, 1.0, 9.0, chunk_ms=19.0)
    layers, boundary = put_together([StageSamples(d, d) for d in (tiny, large)])
    assert boundary.forward_ms > 1.0 and layers[0].forward_ms == pytest.approx([0.1] * 3)


def test_a_stages_optimizer_step_is_shared_out_among_its_layers_and_tied_parameters():
    alone = [1.0, 3.0, 0.0, 4.0, 2.0]  # four layers, and a tied parameter of the first and the last
    found = shared_out(alone, [0, 2], [(0, 3)], [12.0, 3.0])
    assert found == pytest.approx([2.0, 6.0, 0.0, 2.0, 2.0 * (2.0 + 0.5) / 2])
    assert shared_out(alone, [0, 2], [(0, 1)], [12.0, 8.0]) == pytest.approx([2.0, 6.0, 0.0, 8.0, 4.0])
    assert shared_out([1.0, 0.0], [0, 1], [], [5.0, 0.0]) == [5.0, 0.0], "a stage without parameters has no step"


def test_gradients_are_read_for_their_norm_before_the_timed_step(monkeypatch):
    trained, idle = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    trained.grad = torch.ones(3)
    read = []

    def slow_norm(gradient):
        read.append(gradient)
        CLOCK.now_ms += 5.0

    monkeypatch.setattr(torch.linalg, "vector_norm", slow_norm)
    optimizer = StageOptimizer([trained, idle], make_optimizer, WorkingDevice())
    optimizer.step(keep=True)
    assert [gradient is trained.grad for gradient in read] == [True] and optimizer.taken_ms == 0.75


def test_a_timed_optimizer_step_leaves_the_weights():
    weight, frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3), requires_grad=False)
    weight.grad = torch.ones(3)
    device = WorkingDevice()
    optimizer = StageOptimizer([weight, frozen], make_optimizer, device)
    for keep in (False, True, True):
        optimizer.step(keep=keep)
    assert optimizer.samples == [0.75, 0.75] and optimizer.taken_ms == 0.75
    assert weight.tolist() == [1.0] * 3
    nothing = StageOptimizer([frozen], make_optimizer, device)
    nothing.step(keep=True)
    assert nothing.taken_ms == 0.0
