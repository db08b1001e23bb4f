"""Memory as profiled: lifetimes and peaks of a model whose bytes are known by hand; prediction against a real run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from planner.files.profile_file import GradientLifetime, Lifetime
from planner.machine.device import CpuDevice
from planner.profiling.live_storages import LiveStorages
from planner.profiling.memory import track_step, track_storages
from planner.profiling.optimizer_memory import track_optimizer
from planner.profiling.timing import Microbatch
from planner.tracing.exporting import trace_model
from planner.tracing.pieces import build_pieces
from tests.running import ROOT, command

WIDE, NARROW, ROWS = 512, 256, 16
ACTIVATION, OUTPUT = ROWS * WIDE * 4, ROWS * NARROW * 4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


class Turn(nn.Module):
    """A linear layer of the other dimension: the gradient of what it is given comes back transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.mT, self.weight)


class TurnBack(Turn):
    """What it makes lies in one piece, but its gradient is wanted transposed: else it is copied before the product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.mT + super().forward(x)).mT


class Turned(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(NARROW), Turn(ROWS), TurnBack(NARROW), Turn(NARROW))


class Bias(nn.Module):
    """Hands its gradient on as it is. The result lies in memory as the value does, or as the bias."""

    def __init__(self, *, as_the_value: bool) -> None:
        super().__init__()
        self.weight, self.as_the_value = nn.Parameter(torch.ones(NARROW, ROWS)), as_the_value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight if self.as_the_value else self.weight + x


class Biased(nn.Module):
    def __init__(self, *, as_the_value: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(NARROW, NARROW), nn.Linear(ROWS, ROWS)
        self.turned, self.bias = Bias(as_the_value=True), Bias(as_the_value=as_the_value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bias(self.turned(self.first(x).mT)))


def test_lifetimes_and_peaks_of_layers_by_hand() -> None:
    model = nn.Sequential(nn.Linear(NARROW, WIDE), nn.ReLU(), nn.Linear(WIDE, NARROW))
    microbatch = Microbatch((torch.ones(ROWS, NARROW),), torch.zeros(ROWS, NARROW))
    pieces = build_pieces(trace_model(model, microbatch.inputs, {}))
    step = track_step(pieces, [microbatch], lambda output, target: ((output - target) ** 2).mean(), CpuDevice())
    assert Lifetime(0, 1, "forward", 1, ACTIVATION) in step.lifetimes  # relu saves its result, not what it gets
    assert Lifetime(1, 2, "backward", 1, ACTIVATION) in step.lifetimes
    assert Lifetime(2, 3, "forward", 2, OUTPUT) in step.lifetimes  # the model's output, which a stage keeps
    assert step.forward_peak_bytes[0] == ACTIVATION
    assert GradientLifetime(2, 1, ACTIVATION, 0, ((1, ACTIVATION),), ((1, ACTIVATION),)) in step.gradients
    weight = WIDE * NARROW * 4
    assert max(step.backward_first_peaks_bytes[0]) >= weight and max(step.backward_peaks_bytes[0]) >= weight


def test_a_layer_that_returns_what_it_was_given_has_no_peak_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(NARROW, WIDE), nn.ReLU(), nn.Dropout(0.0), nn.Linear(WIDE, NARROW))
    microbatch = Microbatch((torch.ones(ROWS, NARROW),), torch.zeros(ROWS, NARROW))
    pieces = build_pieces(trace_model(model, microbatch.inputs, {}))
    step = track_step(pieces, [microbatch], lambda output, target: ((output - target) ** 2).mean(), CpuDevice())
    assert step.backward_peaks_bytes[2] == (0,) and max(step.backward_peaks_bytes[1]) >= ACTIVATION


def test_a_layer_copies_a_gradient_in_one_piece_only_where_it_makes_more_of_it() -> None:
    microbatch = Microbatch((torch.ones(2, ROWS, NARROW),), torch.zeros(2, ROWS, NARROW))
    pieces = build_pieces(trace_model(Turned(), microbatch.inputs, {}))
    live = LiveStorages()
    track_storages(live, pieces, [microbatch, microbatch], nn.functional.mse_loss)
    layers = {tensor.name: pieces.trace.layers[tensor.producer].id for tensor in pieces.trace.tensors}
    assert {layers[name] for name in live.scattered} == {"0", "1", "2"}
    step = track_step(pieces, [microbatch], nn.functional.mse_loss, CpuDevice())
    assert {layers[name] for name in step.scattered} == {"2"}


@pytest.mark.parametrize(("as_the_value", "views"), [(True, ["first", "turned"]), (False, [])])
def test_a_gradient_is_returned_as_a_view_where_all_layouts_on_its_way_agree(
    as_the_value: bool, views: list[str]
) -> None:
    microbatch = Microbatch((torch.ones(2, ROWS, NARROW),), torch.zeros(2, NARROW, ROWS))
    pieces = build_pieces(trace_model(Biased(as_the_value=as_the_value), microbatch.inputs, {}))
    step = track_step(pieces, [microbatch], nn.functional.mse_loss, CpuDevice())
    made = {tensor.name: pieces.trace.layers[tensor.producer].id for tensor in pieces.trace.tensors}
    assert sorted(made[name] for name in step.views) == views


def test_a_tied_gradient_does_not_wait_for_the_other_layer() -> None:
    microbatch = Microbatch((torch.ones(ROWS, 64),), torch.zeros(ROWS, 64))
    model = Tied()
    pieces = build_pieces(trace_model(model, microbatch.inputs, {}))
    step = track_step(pieces, [microbatch], lambda output, target: ((output - target) ** 2).mean(), CpuDevice())
    weight = 64 * 64 * 4
    assert not any(life.num_bytes >= weight for life in step.gradients)
    assert model.first.weight is model.last.weight and model.first.weight.grad is None
    assert dict(pieces.pieces[0].module.named_parameters())["first.weight"] is model.first.weight


@pytest.mark.parametrize(("stages", "plans"), [(2, 40), (3, 12)])
def test_hard_stages_need_what_was_predicted_wherever_they_are_cut(stages: int, plans: int) -> None:
    """Shared, summed, relayed, scattered and tied gradients; operations' own buffers; outputs that are kept."""
    model = ROOT / "tests" / "models" / "shared_gradients.py"
    flags = ["--stages", stages, "--cuts", plans, "--list"]
    result = command(model, *flags, module="benchmarks.memory", cwd=ROOT, timeout=500)
    assert result.returncode == 0, result.stderr
    *_, least, median, most, under, _over = (word.rstrip("%") for word in result.stdout.splitlines()[-1].split())
    assert under == "0" and float(least) >= 0, result.stdout
    assert float(median) < 0.2 and float(most) < 9, result.stdout  # a view counted as a copy


def test_optimizer_states_and_temporaries() -> None:
    layers = [nn.Linear(256, 256, bias=False), nn.Linear(256, 128, bias=False)]
    groups = [[layer.weight] for layer in layers]
    before = [layer.weight.detach().clone() for layer in layers]
    order = [groups[1][0], groups[0][0]]
    memory, add = track_optimizer(groups, order, lambda p: torch.optim.AdamW(p), 1)
    large, small = 256 * 256 * 4, 256 * 128 * 4
    assert [m.state_bytes - 4 for m in memory] == [2 * large, 2 * small] and not add
    assert [m.temporary_bytes for m in memory] == pytest.approx([2 * large, 2 * small], rel=1e-3)
    assert memory[0].left_bytes == pytest.approx(small, rel=1e-2)  # the denominator of the one before
    assert [m.left_by for m in memory] == [1, -1]
    plain, add = track_optimizer(groups, order, lambda p: torch.optim.SGD(p, lr=0.1), 1)
    assert plain[0].state_bytes == 0 and not add
    assert track_optimizer(groups, order, lambda p: torch.optim.AdamW(p, foreach=True), 1)[1]
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(layers, before, strict=True))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    model = ROOT / "tests" / "models" / "convolutional.py"
    result = command(
        "--gpus", 3, model, "--microbatches", 4, "-o", "m.plan.json", cwd=folder, module="planner", timeout=400
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_a_real_run_needs_what_was_predicted(planned: Path) -> None:
    result = command("m.plan.json", "--steps", 3, "--run-dir", "run", cwd=planned, timeout=400)
    assert result.returncode == 0, result.stderr
    for stage in json.loads((planned / "run" / "measurement.json").read_text())["stages"]:
        predicted, measured = (stage[kind]["peak_memory_bytes"] for kind in ("predicted", "measured"))
        assert 0.999 * measured <= predicted <= 1.1 * measured, stage["index"]


def test_a_limit_is_honoured_and_what_cannot_be_is_explained(planned: Path) -> None:
    plan = json.loads((planned / "m.plan.json").read_text())
    peaks = [stage["peak_memory_bytes"] for stage in plan["stages"]]
    for stage in plan["stages"]:
        assert sum(stage["memory"].values()) == stage["peak_memory_bytes"]
    result = _replan(planned, max(peaks) - 1)
    if result.returncode == 0:
        tighter = json.loads((planned / "n.plan.json").read_text())
        assert max(stage["peak_memory_bytes"] for stage in tighter["stages"]) < max(peaks)
        assert tighter["step_ms"] >= plan["step_ms"]
    impossible = _replan(planned, 1000)
    assert impossible.returncode == 5
    assert "bytes over it, in stage" in impossible.stderr
    needed = int(impossible.stderr.partition("--memory ")[2].partition("B")[0])
    assert _replan(planned, needed).returncode == 0
    assert _replan(planned, needed - 1).returncode == 5


def _replan(folder: Path, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    flags = ["--gpus", 3, "--profile", "m.profile.json", "--memory", f"{limit_bytes}B", "-o", "n.plan.json"]
    return command(*flags, cwd=folder, module="planner", timeout=300)
