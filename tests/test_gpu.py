"""What only a GPU can show: events as a clock, the allocator as the other instrument, reserves, and the same model."""

from __future__ import annotations

import functools

import pytest
import torch

from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.machine.device import choose_device, describe_machine
from planner.profiling.live_storages import AllocatorMarks, Phase
from tests import running
from tests.running import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20
CYCLES = 2_000_000
SPINNING = f'''
import torch

@torch.library.custom_op("evenstage_gpu_test::spin", mutates_args=())
def spin(x: torch.Tensor, forward: int, backward: int, scratch: int) -> torch.Tensor:
    held = torch.empty(scratch, dtype=torch.uint8, device=x.device)
    torch.cuda._sleep(forward * {CYCLES})
    return x.clone()

@spin.register_fake
def _(x, forward, backward, scratch):
    return torch.empty_like(x)

@torch.library.custom_op("evenstage_gpu_test::spin_back", mutates_args=())
def spin_back(x: torch.Tensor, backward: int) -> torch.Tensor:
    torch.cuda._sleep(backward * {CYCLES})
    return x.clone()

@spin_back.register_fake
def _(x, backward):
    return torch.empty_like(x)

def _keep(ctx, inputs, output):
    ctx.backward = inputs[2]

spin.register_autograd(lambda ctx, g: (spin_back(g, ctx.backward), None, None, None), setup_context=_keep)

class Layer(torch.nn.Module):
    def __init__(self, forward, backward, scratch):
        super().__init__()
        self.costs = forward, backward, scratch
        self.weight = torch.nn.Parameter(torch.ones(1024))

    def forward(self, x):
        return spin(x * self.weight, *self.costs)

def build_model():
    return torch.nn.Sequential(Layer(1, 2, {8 * MIB}), Layer(2, 4, {64 * MIB}), Layer(1, 2, {8 * MIB}), Layer(4, 8, 0))

def make_batch(batch_size):
    return torch.randn(batch_size, 1024), torch.randn(batch_size, 1024)

def loss_fn(output, targets):
    return ((output - targets) ** 2).mean()
'''


command = functools.partial(running.command, timeout=300, gpu=True)


def test_the_parts_of_a_time_add_up():
    device = choose_device("cuda")
    torch.cuda._sleep(CYCLES)
    stamps = [device.stamp()]
    for factor in (1, 2, 4):
        torch.cuda._sleep(factor * CYCLES)
        stamps.append(device.stamp())
    parts, (whole,) = device.elapsed_ms(stamps), device.elapsed_ms([stamps[0], stamps[-1]])
    assert sum(parts) == pytest.approx(whole, rel=1e-3)
    assert parts[1] / parts[0] == pytest.approx(2, rel=0.1) and parts[2] / parts[1] == pytest.approx(2, rel=0.1)


def test_reserves_are_found_and_told_apart():
    device = choose_device("cuda")
    torch.ones(512, 512, device="cuda") @ torch.ones(512, 512, device="cuda")
    machine = describe_machine(device)
    assert machine.workspace_bytes >= MIB
    assert machine.memory_bytes and MIB < machine.reserved_bytes - machine.workspace_bytes < machine.memory_bytes // 2
    assert device.workspace_bytes() == 0, "what was let go is not there any more"


def test_the_allocator_is_asked_phase_by_phase():
    device, phases = choose_device("cuda"), [Phase(0, "forward", layer) for layer in range(2)]
    marks = AllocatorMarks(device)
    marks.enter(phases[0])
    kept = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
    torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
    marks.enter(phases[1])
    torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")
    marks.enter(Phase(-1, "forward", -1))
    assert [marks.rising[phase] // MIB for phase in phases] == [12, 2] and kept.numel()
    assert marks.fragmentation_bytes >= 0


def test_known_times_and_bytes_are_predicted(tmp_path):
    (tmp_path / "model.py").write_text(SPINNING)
    flags = ["--batch-size", 64, "--microbatches", 4, "-o", "x.plan.json"]
    planned = command("--gpus", 2, "model.py", *flags, cwd=tmp_path, module="planner")
    assert planned.returncode == 0, planned.stderr
    plan = Plan.load(tmp_path / "x.plan.json")
    assert [cut.before for cut in plan.cuts] == ["3"], "layers of 1, 2 and 1 against one of 4"
    rehearsed = command("x.plan.json", "--rehearse", "--steps", 5, "--run-dir", "run", cwd=tmp_path)
    assert rehearsed.returncode == 0, rehearsed.stderr
    measurement = Measurement.load(tmp_path / "run" / "measurement.json")
    assert measurement.clock == "cuda-event" and measurement.step_clock == "simulated"
    for stage in measurement.stages:
        assert stage.measured.forward_ms == pytest.approx(stage.predicted.forward_ms, rel=0.05)
        assert stage.measured.backward_ms == pytest.approx(stage.predicted.backward_ms, rel=0.05)
        before, after = stage.predicted.peak_memory_bytes, stage.measured.peak_memory_bytes
        assert before is not None and after is not None and after <= before <= after + 2 * MIB
        taken, promised = stage.measured.device_memory_bytes, stage.predicted.device_memory_bytes
        assert taken is not None and promised is not None and taken > after and promised > before
    peaks = [stage.measured.peak_memory_bytes for stage in measurement.stages]
    assert peaks[0] - peaks[1] > 60 * MIB, "the second layer's scratch is in the first stage"


EXAMPLES = pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("transformer", []),
        ("gpt2", ["--precision", "bf16"]),
        ("resnet", ["--schedule", "1f1b"]),
        ("encoder_decoder", []),
        ("unet", ["--meta"]),
    ],
)


@EXAMPLES
def test_a_planned_and_rehearsed_model_trains_as_the_unsplit_one(tmp_path, model, flags):
    rehearse_example(tmp_path, model, flags, "--check")
    check = Measurement.load(tmp_path / "run" / "measurement.json").check
    assert check is not None and check.steps == 3


@EXAMPLES
def test_no_stage_takes_more_than_was_predicted(tmp_path, model, flags):
    rehearse_example(tmp_path, model, flags)
    for stage in Measurement.load(tmp_path / "run" / "measurement.json").stages:
        before, after = stage.predicted.peak_memory_bytes, stage.measured.peak_memory_bytes
        assert before is not None and after is not None
        assert after <= before <= 1.05 * after + MIB, f"stage {stage.index}: {before} predicted, {after} measured"


def rehearse_example(folder, model, flags, *more):
    """Plan an example for three GPUs and rehearse the plan for three steps."""
    example = ROOT / "examples" / f"{model}.py"
    planned = command("--gpus", 3, example, *flags, "-o", "x.plan.json", cwd=folder, module="planner")
    assert planned.returncode == 0, planned.stderr
    rehearsed = command("x.plan.json", "--rehearse", "--steps", 3, "--run-dir", "run", *more, cwd=folder)
    assert rehearsed.returncode == 0, rehearsed.stderr


def test_one_stage_trains_under_nccl(tmp_path):
    example = ROOT / "examples" / "unet.py"
    flags = ["--gpus", 1, example, "--train", "--steps", 8, "--check", "--tensorboard", "tb", "--run-dir", "run"]
    ended = command(*flags, cwd=tmp_path, module="planner")
    assert ended.returncode == 0, ended.stderr
    measurement = Measurement.load(tmp_path / "run" / "measurement.json")
    assert measurement.step_clock == "wall" and measurement.check is not None
    assert any((tmp_path / "tb").rglob("*.pt.trace.json"))


def test_a_plan_for_more_gpus_than_there_are_says_how_to_rehearse_it(tmp_path):
    count = torch.cuda.device_count() + 1
    example = ROOT / "examples" / "transformer.py"
    planned = command("--gpus", count, example, "-o", "x.plan.json", cwd=tmp_path, module="planner")
    assert planned.returncode == 0, planned.stderr
    assert Profile.load(tmp_path / "x.profile.json").concurrent_copies == 1
    ended = command("x.plan.json", cwd=tmp_path)
    assert ended.returncode == 2 and "--rehearse" in ended.stderr and "Traceback" not in ended.stderr
