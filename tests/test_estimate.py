"""Plans without a run: FLOPs and bytes of known layers, the roofline, and the mark that an estimate carries."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import planner
from planner.cli import main
from planner.errors import FileError, UsageError
from planner.files.plan_file import Plan
from planner.files.profile_file import Peak, Profile
from planner.measuring import estimate
from planner.partitioning.baselines import baselines
from planner.planning import plan_profile
from planner.profiling.counting import Work, count_work
from planner.profiling.estimate import roofline_ms
from planner.profiling.peaks import find_peak
from planner.profiling.profiler import reusable
from planner.profiling.timing import Microbatch
from planner.rendering import render_plan
from planner.request import PlanRequest, chain_at
from planner.tracing.exporting import trace_model
from planner.tracing.pieces import build_pieces
from runner.cli import main as run_plan

MODEL = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 8))

def make_batch(n):
    return torch.randn(n, 64), torch.randn(n, 8)

def loss_fn(output, target):
    return ((output - target) ** 2).mean()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "mlp.py"
    path.write_text(MODEL, encoding="utf-8")
    return path


def count(module: nn.Module, *inputs: torch.Tensor, loss=None):
    pieces = build_pieces(trace_model(module, inputs, {}))
    return count_work(pieces, Microbatch(inputs, inputs[0]), loss)


def test_the_flops_and_bytes_of_linear_layers_are_known():
    counted = count(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)), torch.ones(4, 16))
    first, second = counted.layers
    assert (first.flops, second.flops) == (2 * 4 * 16 * 32, 2 * 4 * 32 * 8)
    assert first.num_bytes == 4 * (4 * 16 + 16 * 32 + 32 + 4 * 32)
    assert second.num_bytes == 4 * (4 * 32 + 32 * 8 + 8 + 4 * 8)


def test_an_embedding_reads_the_rows_that_it_picks():
    tokens = torch.zeros(2, 3, dtype=torch.long)
    (layer,) = count(nn.Embedding(1000, 16), tokens).layers
    assert layer.num_bytes == 2 * (2 * 3 * 16 * 4)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return functional.scaled_dot_product_attention(x * self.scale, x, x)


def test_attention_on_a_cpu_is_counted_as_on_a_gpu():
    (layer,) = count(Attention(), torch.ones(2, 4, 32, 16)).layers
    assert layer.flops == 2 * (2 * 2 * 4 * 32 * 32 * 16)


def test_views_move_nothing():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).view(2, 2, 8).transpose(0, 1)

    plain, reshaped = count(nn.Linear(8, 8), torch.ones(4, 8)), count(Reshaped(), torch.ones(4, 8))
    assert sum(w.num_bytes for w in reshaped.layers) == sum(w.num_bytes for w in plain.layers)


def test_frozen_layers_that_backward_does_not_reach_have_none():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].requires_grad_(False)
    assert count(module, torch.ones(2, 4)).trained == (False, True)


def test_counting_changes_neither_weights_nor_random_numbers():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pieces = build_pieces(trace_model(module, (torch.ones(8, 4),), {}))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    count_work(pieces, Microbatch((torch.ones(8, 4),), None))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("work", "ms"), [(Work(4000, 1), 4.0), (Work(1, 6000), 3.0), (Work(0, 0), 0.0)])
def test_the_longer_of_computing_and_moving_counts(work: Work, ms: float):
    assert roofline_ms(work, Peak("", 1e6, 2e6, "")) == pytest.approx(ms)


def test_peaks_come_from_the_table_or_as_given():
    peak, machine = find_peak("A100")
    assert (peak.flops_per_s, peak.bytes_per_s) == (19.5e12, 2039e9)
    assert machine.memory_bytes == 80 * 10**9
    assert peak.source
    given, _ = find_peak("1.5e12, 300G/s")
    assert (given.flops_per_s, given.bytes_per_s) == (1.5e12, 3e11)


@pytest.mark.parametrize("text", ["h1000", "", "1T", "1T,0", "1T,x", "1T,2T,3T", "-1,2"])
def test_what_is_no_peak_is_refused(text: str):
    with pytest.raises(UsageError, match="--peak"):
        find_peak(text)


def test_this_cpu_has_a_peak():
    threads = torch.get_num_threads()
    peak, machine = find_peak(None)
    assert peak.flops_per_s > 0 < peak.bytes_per_s
    assert machine.device == "cpu"
    assert torch.get_num_threads() == threads


def test_an_estimate_is_the_roofline_of_every_layer(model: Path):
    profile = estimate(model, gpus=2, peak="1T,1G", batch_size=8, microbatches=4)
    (size,) = profile.sizes
    first, *_ = size.layers
    moved = 4 * (2 * 64 + 64 * 256 + 256 + 2 * 256)
    assert first.forward_ms == pytest.approx(moved / 1e9 * 1e3)
    assert first.backward_ms == pytest.approx(2 * first.forward_ms)
    assert first.flops == 2 * 2 * 64 * 256
    assert first.memory is not None
    assert profile.estimated == Peak("a device of 1T,1G", 1e12, 1e9, "given")
    assert not profile.model.meta


def test_a_plan_from_an_estimate_says_so_everywhere(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "x.plan.json"
    (tmp_path / "x.profile.json").write_text("a measured profile", encoding="utf-8")
    assert (
        main(["--gpus", "2", str(model), "--batch-size", "8", "--estimate", "--peak", "h100", "-o", str(output)]) == 0
    )
    assert (tmp_path / "x.profile.json").read_text(encoding="utf-8") == "a measured profile"
    shown = capsys.readouterr().out
    plan, profile = Plan.load(output), Profile.load(tmp_path / "x.estimate.profile.json")
    assert "estimated, not measured" in shown
    assert "profiled" not in shown
    assert "(estimated)" in shown
    assert plan.estimated == profile.estimated is not None
    assert plan.step_interval_ms is None
    assert plan.stages[0].forward_interval_ms is None
    assert "estimated, not measured" in render_plan(plan, None)


def test_an_estimate_never_stands_for_a_measured_profile(model: Path):
    profile = estimate(model, gpus=1, peak="h100", batch_size=4, microbatches=1)
    assert "estimated" in reusable(profile, str(model), 4, (4,), None, 0)


@pytest.mark.parametrize(
    "flags",
    [["--peak", "h100"], ["--estimate", "--fresh"], ["--estimate", "--device", "cpu"]],
)
def test_flags_that_contradict_an_estimate_are_refused(model: Path, flags: list[str], capsys):
    assert main(["--gpus", "2", str(model), *flags]) == 2
    assert "--estimate" in capsys.readouterr().err


def test_an_estimate_in_bf16_moves_half_the_activations_and_has_another_peak(model: Path):
    wide, narrow = (
        planner.estimate(model, gpus=2, peak="h100", batch_size=8, microbatches=2, precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert (wide.estimated.flops_per_s, narrow.estimated.flops_per_s) == (67e12, 989e12)
    assert narrow.precision == "bf16"
    (before,), (after,) = wide.sizes, narrow.sizes
    assert [layer.flops for layer in before.layers] == [layer.flops for layer in after.layers]
    crossing = [{tensor.name: tensor.num_bytes for tensor in size.tensors}["linear"] for size in (before, after)]
    assert crossing == [4 * 256 * 4, 4 * 256 * 2]


@pytest.mark.parametrize("peak", ["t4", "v100"])
def test_a_device_without_bf16_has_no_estimate_in_it(model: Path, peak: str):
    with pytest.raises(UsageError, match="does not compute in it"):
        planner.estimate(model, gpus=1, peak=peak, batch_size=4, precision="bf16")


def test_an_estimate_knows_what_may_not_be_swapped(model: Path):
    (size,) = planner.estimate(model, gpus=2, peak="h100", batch_size=8, microbatches=2).sizes
    assert size.dependencies is not None and (0, 1) in size.dependencies and (1, 2) in size.dependencies


def test_files_without_estimates_load(model: Path, tmp_path: Path):
    profile = replace(estimate(model, gpus=1, peak="h100", batch_size=4, microbatches=1), estimated=None)
    profile.save(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text(encoding="utf-8").replace(' "estimated": null,\n', "")
    assert '"estimated"' not in text
    (tmp_path / "p.json").write_text(text, encoding="utf-8")
    assert Profile.load(tmp_path / "p.json") == profile
    with pytest.raises(FileError):
        Profile.load(tmp_path / "none.json")


def test_equal_flops_is_a_baseline_where_they_are_known(model: Path):
    request = PlanRequest(2, batch_size=8, microbatches=4)
    profile = estimate(model, gpus=2, peak="1T,1T", batch_size=8, microbatches=4)
    chain = chain_at(profile, 2, request)
    cuts = baselines(chain, 2)["flops"]
    flops = chain.flops
    assert flops is not None
    largest = {cut: max(sum(flops[:cut]), sum(flops[cut:])) for cut in range(1, len(flops))}
    assert largest[cuts[0]] == min(largest.values())
    assert "flops" not in baselines(replace(chain, flops=None), 2)
    assert "flops" in plan_profile(profile, request).baselines


def test_a_plan_from_an_estimate_can_be_run(model: Path, tmp_path: Path):
    plan = plan_profile(estimate(model, gpus=2, peak="h100", batch_size=4, microbatches=2), PlanRequest(2))
    plan.save(tmp_path / "mlp.plan.json")
    folder = str(tmp_path / "run")
    assert run_plan([str(tmp_path / "mlp.plan.json"), "--rehearse", "--steps", "2", "--run-dir", folder]) == 0


def test_a_measured_profile_counts_the_same_flops(model: Path):
    measured = planner.measure(model, gpus=1, batch_size=4, microbatches=1)
    guessed = planner.estimate(model, gpus=1, batch_size=4, microbatches=1, peak="h100")
    (size,), (other,) = measured.sizes, guessed.sizes
    assert [layer.flops for layer in size.layers] == [layer.flops for layer in other.layers]
    assert size.fingerprint == other.fingerprint
    assert measured.estimated is None
    assert measured.training == guessed.training
    assert all(layer.forward_ms > 0 for layer in size.layers)


def test_profiling_again_remembers_what_the_machine_did(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    profile = replace(planner.estimate(model, gpus=2, peak="h100", batch_size=4, microbatches=2), estimated=None)
    (size,) = profile.sizes
    slower = [replace(one, forward_ms=one.forward_ms * 1.1, backward_ms=one.backward_ms * 1.1) for one in size.layers]
    made = [profile, replace(profile, sizes=(replace(size, layers=tuple(slower)),))]
    monkeypatch.setattr("planner.planning.measure", lambda *_: made.pop(0))
    flags = ["--gpus", "2", str(model), "--batch-size", "4", "--microbatches", "2", "--fresh", "--json"]
    for _ in range(2):
        assert main([*flags, "-o", str(tmp_path / "mlp.plan.json")]) == 0
    assert Profile.load(tmp_path / "mlp.profile.json").repeats == pytest.approx((0.1,))
    step = Plan.load(tmp_path / "mlp.plan.json")
    assert step.step_interval_ms is not None
    assert step.step_interval_ms > 0.1 * step.scheduled_step_ms()
