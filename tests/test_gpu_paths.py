"""What the code does on a GPU and not on a CPU, with a device whose allocator and clock the tests turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

from planner.files.plan_file import StageMemory
from planner.files.profile_file import Machine
from planner.machine.device import ALLOCATOR_VARIABLES, worker_environment
from planner.partitioning.stage_memory import StageMemoryTable
from planner.profiling.live_storages import AllocatorMarks, Phase
from planner.profiling.optimizer_memory import OptimizerMemory
from planner.profiling.step_memory import StepMemory, layer_memory
from planner.profiling.timing import time_optimizer
from planner.scheduling.simulation import StageTimes
from planner.tracing.exporting import trace_model
from planner.tracing.older_stages import as_of_later_torch
from planner.tracing.pieces import build_pieces
from planner.tracing.rewriting import set_device, views_of_any_layout
from runner.checking import compute_exactly
from runner.comparing import compare
from runner.gathering import build_measurement
from runner.measuring import PeakMemory, StepSamples, highest, measure_peak_memory
from runner.reporting.charts import memory_chart
from runner.reporting.terminal import render_report
from runner.training import StepResult
from tests.sample_values import sample_plan
from tests.test_memory_limit import chains


class TurnedGpu:
    """A GPU: its allocator holds what `allocate` says, and time passes by `now_ms`."""

    clock = "cuda-event"
    block_bytes = 512
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.allocated = self.peak = self.segments = self.most_segments = 0
        self.now_ms = 0.0

    def allocate(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)
        self.segments = max(self.segments, -(-self.allocated // 100) * 100)
        self.most_segments = max(self.most_segments, self.segments)

    def stamp(self):
        return self.now_ms

    def elapsed_ms(self, stamps):
        return [later - earlier for earlier, later in zip(stamps, stamps[1:], strict=False)]

    def empty_cache(self):
        self.segments = -(-self.allocated // 100) * 100

    def reset_peak_memory(self):
        self.peak, self.most_segments = self.allocated, self.segments

    def peak_memory_bytes(self):
        return self.peak

    def taken_bytes(self):
        return self.most_segments

    def context_bytes(self):
        return 1000

    def workspace_bytes(self):
        return 7


def test_what_a_phase_takes_and_what_the_allocator_takes_beyond_it():
    gpu, first, second = TurnedGpu(), Phase(0, "forward", 0), Phase(0, "forward", 1)
    gpu.allocate(930)
    gpu.allocate(-900)  # nobody uses it: given back before the step
    marks = AllocatorMarks(gpu)
    marks.enter(first)
    gpu.allocate(250)
    gpu.allocate(-200)
    marks.enter(second)
    gpu.allocate(40)
    marks.enter(Phase(-1, "forward", -1))
    assert marks.rising[first] == 250 and marks.rising[second] == 40
    assert marks.fragmentation_bytes == 300 - 280


def test_a_measured_peak_counts_from_an_empty_cache_and_has_the_context():
    gpu = TurnedGpu()
    gpu.allocate(5000)
    gpu.allocate(-4990)
    peak = measure_peak_memory(gpu, 0, lambda: gpu.allocate(120))
    assert peak == PeakMemory(130, 200 + 1000)
    assert highest([peak, PeakMemory(140, None)]) == PeakMemory(140, 1200)


def test_launches_of_the_optimizer_are_paid_once_a_stage(monkeypatch):
    gpu, launches, each = TurnedGpu(), 2.0, 0.5

    class Launched(torch.optim.SGD):
        def step(self, closure=None):
            gpu.now_ms += launches + each * len(self.param_groups[0]["params"])

    groups = [[torch.nn.Parameter(torch.ones(2)) for _ in range(count)] for count in (1, 3, 0, 2)]
    found = time_optimizer(groups, lambda own: Launched(own, lr=0.1), gpu, 3, 2)
    share = launches * 2 / 3
    assert found == pytest.approx([each + share, 3 * each + share, 0.0, 2 * each + share])
    assert all(parameter.grad is None for group in groups for parameter in group)


def test_the_allocators_setting_is_the_users_where_there_is_one(monkeypatch):
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "expandable" in worker_environment("cuda")[ALLOCATOR_VARIABLES[0]]
    assert not set(ALLOCATOR_VARIABLES) & set(worker_environment("cpu"))
    monkeypatch.setenv(ALLOCATOR_VARIABLES[1], "max_split_size_mb:64")
    assert not set(ALLOCATOR_VARIABLES) & set(worker_environment("cuda"))


def test_fragmentation_of_the_profile_is_among_what_a_stage_needs():
    chain, _, m, schedule = next(chains(3, 1))
    assert chain.memory is not None
    size = replace(chain.memory.size, fragmentation_bytes=77)
    more = replace(chain, memory=replace(chain.memory, size=size))
    count = len(chain.ids)
    before, after = (StageMemoryTable(each, m, schedule, 5).peak(0, count, 0, 1) for each in (chain, more))
    assert after.memory.reserved == before.memory.reserved + 77 == 82


class Attention(torch.nn.Module):
    def forward(self, heads):
        return heads.transpose(1, 2).contiguous().view(2, 3, 8)  # as torch's MultiheadAttention has it


def test_a_graph_that_saw_one_layout_runs_on_another():
    as_on_a_cpu = torch.arange(48.0).reshape(2, 3, 2, 4).transpose(1, 2)
    elsewhere = as_on_a_cpu.contiguous()
    gm = torch.export.export(Attention(), (as_on_a_cpu,)).module(check_guards=False)
    assert any(node.target is torch.ops.aten.view.default for node in gm.graph.nodes)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        fx.Interpreter(gm).run(elsewhere)
    views_of_any_layout(gm)
    gm.recompile()
    assert torch.equal(gm(elsewhere), Attention()(elsewhere))
    assert gm(as_on_a_cpu).data_ptr() == as_on_a_cpu.data_ptr(), "where the layout allows it, nothing is copied"


class Written(torch.nn.Module):
    def forward(self, heads):
        flat = heads.transpose(1, 2).contiguous().view(2, 3, 8)
        first = flat.view(2, 24)
        flat.mul_(2.0)  # first sees it, unless it is a copy
        return first + 1, flat.view(48)


def test_a_view_that_is_written_to_later_stays_a_view():
    given = torch.arange(48.0).reshape(2, 3, 2, 4).transpose(1, 2)
    gm = torch.export.export(Written(), (given.clone(),)).module(check_guards=False)
    views_of_any_layout(gm)
    gm.recompile()
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(torch.ops.aten.view.default) == 2 and targets.count(torch.ops.aten.reshape.default) == 1
    for got, expected in zip(gm(given.clone()), Written()(given.clone()), strict=True):
        assert torch.equal(got, expected)


class WithConstant(torch.nn.Module):
    def forward(self, x):
        return x + torch.tensor([1.0, 2.0])


def test_constants_of_a_graph_move_with_it():
    gm = torch.export.export(WithConstant(), (torch.ones(2),)).module(check_guards=False)
    gm.to("meta")
    set_device(gm, torch.device("meta"))
    held = [getattr(gm, str(node.target)) for node in gm.graph.nodes if node.op == "get_attr"]
    assert held and {tensor.device.type for tensor in held} == {"meta"}


def test_a_comparison_computes_by_float32():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    before_choice = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        compute_exactly()
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before_choice


class Received:
    """What torch knows of one tensor that a stage receives."""

    def __init__(self, buffer: torch.Tensor | None, source: int = 0) -> None:
        self.buffer, self.source = buffer, source


class StageOf211:
    """The methods of torch 2.11's stage that take every tensor for one with a gradient."""

    has_backward = True

    def _create_act_recv_info(self):
        infos = (Received(torch.zeros(2)), Received(torch.zeros(2, dtype=torch.int64)))
        for info in infos:
            if self.has_backward:
                info.buffer.requires_grad_(True)
        return infos

    def _create_grad_recv_info(self, act_send_info):
        return tuple(Received(torch.zeros(2, dtype=dtype)) for dtype in act_send_info)

    def _create_grad_send_info(self, args_recv_info):
        return [info.source for info in args_recv_info]

    def _get_recv_ops(self, infos):
        return [info.buffer.dtype for info in infos]

    def _configure_outputs_meta(self, outputs):
        raise AssertionError("a second time")


def test_integers_cross_between_stages_of_torch_2_11():
    stage = StageOf211()
    with pytest.raises(RuntimeError, match="floating point"):
        stage._create_act_recv_info()
    as_of_later_torch(stage)
    received = stage._create_act_recv_info()
    assert [info.buffer.requires_grad for info in received] == [True, False] and stage.has_backward
    assert stage._create_grad_send_info(received) == [0, None]
    expected = stage._create_grad_recv_info([torch.float32, torch.int64])
    assert stage._get_recv_ops(expected) == [torch.float32]
    stage._configure_outputs_meta([torch.ones(1)])


def test_what_is_gone_of_a_gpu_is_told_from_what_tensors_take():
    plan, memory = sample_plan(), StageMemory(1, 2, 3, 4, 5, 750)
    gpu = Machine("cuda", "a GPU", 4, {}, 80 * 2**30, reserved_bytes=700, workspace_bytes=200)
    stages = tuple(replace(stage, memory=memory, peak_memory_bytes=15 + 750) for stage in plan.stages)
    plan = replace(plan, machine=gpu, stages=stages)

    def result(stage, step, memory):
        times = StageTimes(stage.forward_ms, stage.backward_ms, stage.backward_first_ms, stage.optimizer_ms)
        m = plan.num_microbatches
        samples = StepSamples(step, (times.forward_ms,) * m, (times.backward_ms,) * m, times.optimizer_ms, 9, 9)
        return StepResult(step, 1.0, 1.0, 0.1, 9.0, samples, memory)

    results = [[result(s, 0, PeakMemory(10_000, 12_000)), result(s, 1, None)] for s in plan.stages]
    found = build_measurement(plan, results, gpu, "cuda-event", None, None, None, rehearsed=True)
    for stage in found.stages:
        assert (stage.predicted.peak_memory_bytes, stage.predicted.device_memory_bytes) == (15 + 200, 15 + 750)
        assert (stage.measured.peak_memory_bytes, stage.measured.device_memory_bytes) == (10_000, 12_000)
    report = compare(plan, found)
    assert "GPU memory" in render_report(report)
    assert "11.7 KiB" in str(memory_chart(report.stages, plan.stages))
    on_cpu = build_measurement(
        replace(plan, machine=replace(gpu, device="cpu")),
        [[replace(r, memory=PeakMemory(10_000)) for r in own] for own in results],
        replace(gpu, device="cpu"),
        "thread-cpu",
        None,
        None,
        None,
        rehearsed=True,
    )
    assert "GPU memory" not in render_report(compare(plan, on_cpu))


def test_gradients_and_parameters_lie_in_whole_blocks():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    trace = trace_model(model, (torch.ones(2, 4),), {})
    peaks = ((0,), (0,))
    step, state = StepMemory((0, 0), peaks, peaks, (), ()), [OptimizerMemory(0, 0)] * 2
    exact, in_whole = (layer_memory(build_pieces(trace), step, state, [], block) for block in (1, 512))
    assert [layer.trainable_bytes for layer in exact] == [60, 24]
    assert [layer.trainable_bytes for layer in in_whole] == [1024, 1024]
    # weight and bias are 60 of 1024 bytes; running mean, variance and number of batches have a block each
    assert [layer.buffer_bytes for layer in exact] == [0, 32]
    assert [layer.buffer_bytes for layer in in_whole] == [1024 - 60, 1024 - 24 + 3 * 512]
