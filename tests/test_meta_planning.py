"""plan --meta: one layer at a time is real; what is planned and run is what the flag says."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from planner.errors import UsageError
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.machine import host_memory
from planner.machine.device import CpuDevice
from planner.profiling import piecewise
from planner.profiling.assembling import microbatches_of, optimizer_groups
from planner.tracing.deferred_model import build_deferred
from planner.tracing.exporting import trace_model
from planner.tracing.loading import as_call, load_source, make_batch, rows
from planner.tracing.pieces import build_pieces
from runner.reference_memory import optimizer_share, refuse_reference_that_does_not_fit
from tests.running import ROOT, built_on_the_meta_device, command, plan_at


def pieces_of(model, size=2):
    source = load_source(str(model))
    batch = make_batch(source, 0, 0, 3 * size)
    trace = trace_model(build_deferred(source, 0, draws=False).model, *as_call(rows(batch[0], 0, size)))
    return source, build_pieces(trace), microbatches_of(batch, size, 3 * size)


def all_tensors(pieces):
    return [t for piece in pieces.pieces for t in [*piece.module.parameters(), *piece.module.buffers()]]


@pytest.mark.parametrize("name", ["tests/models/skips.py", "tests/models/twice.py", "examples/gpt2.py"])
def test_every_layer_is_timed_and_only_one_is_real(name, monkeypatch):
    source, pieces, microbatches = pieces_of(ROOT / name)
    groups = optimizer_groups(pieces.trace, pieces)
    fake = torch._subclasses.FakeTensor
    real_layers, seen, alive = [], [], []

    def make_optimizer(parameters):
        seen.append([tuple(p.shape) for p in parameters])
        alive[:] = [weakref.ref(p) for p in parameters]
        real_layers.append(
            [i for i, p in enumerate(pieces.pieces) if any(not isinstance(t, fake) for t in p.module.parameters())]
        )
        return torch.optim.AdamW(parameters, lr=0.1)

    @contextlib.contextmanager
    def watched(modules, replacement):
        left = [reference for reference in alive if reference() is not None]
        assert not left, "a layer is still real when the next one becomes so"
        with real(modules, replacement) as parameters:
            yield parameters

    real = piecewise.replaced_state
    monkeypatch.setattr(piecewise, "replaced_state", watched)
    samples, optimizer_ms = piecewise.time_pieces(
        pieces, microbatches, source.loss_fn, groups, make_optimizer, CpuDevice(), (2, 1)
    )
    assert len(samples) == len(pieces.pieces) and len(optimizer_ms) == len(groups)
    assert all(len(s.forward_ms) == 2 * len(microbatches) and len(s.backward_first_ms) == 2 for s in samples)
    assert all(len(layers) <= 1 for layers in real_layers)
    assert sorted(shapes for shapes in seen) == sorted([tuple(p.shape) for p in group] for group in groups if group)
    assert all(isinstance(tensor, fake) for tensor in all_tensors(pieces))
    trained = [any(p.requires_grad for p in piece.module.parameters()) for piece in pieces.pieces]
    assert all(min(s.backward_ms) > 0 for s, t in zip(samples, trained, strict=True) if t)


def test_activations_are_ordinary_numbers_and_integers_are_the_users(monkeypatch):
    """No denormals, nothing infinite, whatever the layers do to synthetic weights."""
    source, pieces, microbatches = pieces_of(ROOT / "examples/gpt2.py")
    seen = []
    advance = piecewise._PieceRun.advance

    def watched(self, values, microbatches):
        advance(self, values, microbatches)
        seen.extend(v for v in values[0].values() if isinstance(v, torch.Tensor) and v.is_floating_point())

    monkeypatch.setattr(piecewise._PieceRun, "advance", watched)
    groups = optimizer_groups(pieces.trace, pieces)
    piecewise.time_pieces(pieces, microbatches, source.loss_fn, groups, source.make_optimizer, CpuDevice(), (1, 1))
    spreads = [float(value.detach().std()) for value in seen if value.numel() > 1 and value.isfinite().all()]
    assert len(spreads) > 20 and all(1e-6 <= spread <= 1e6 for spread in spreads)


@pytest.mark.parametrize("factor", [1e-30, 1e20, 0.0, float("nan")])
def test_extreme_activations_are_brought_back(factor):
    filler = piecewise._Filler(torch.device("cpu"))
    run = object.__new__(piecewise._PieceRun)
    run.filler = filler
    tamed = run._tamed(torch.randn(100) * factor)
    assert tamed.isfinite().all() and 0.1 < float(tamed.std()) < 10
    ordinary = torch.randn(100)
    assert run._tamed(ordinary) is ordinary


def test_weights_are_plausible():
    filler = piecewise._Filler(torch.device("cpu"))
    matrix = filler.weight("linear.weight", torch.empty(3000, 500, device="meta"))
    assert abs(float(matrix.std()) - 0.02) < 0.001 and not torch.equal(matrix[0], matrix[1])
    assert filler.weight("norm.weight", torch.empty(5, device="meta")).eq(1).all()
    assert filler.weight("bn.running_var", torch.empty(5, device="meta")).eq(1).all()
    assert filler.weight("linear.bias", torch.empty(5, device="meta")).eq(0).all()
    assert filler.weight("t", torch.empty(4, 3, device="meta").t()).stride() == (1, 3)


def test_a_plan_with_meta_says_so_and_its_profile_is_not_taken_for_another(tmp_path, models):
    arguments = ("--gpus", 2, models / "plain.py", "--batch-size", 4, "--microbatches", 2)
    planned = command(*arguments, "--meta", module="planner", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert Plan.load(tmp_path / "plain.plan.json").model.meta
    again = command(*arguments, "--meta", module="planner", cwd=tmp_path)
    assert "reused" in again.stderr
    other = command(*arguments, module="planner", cwd=tmp_path)
    assert "it was made with --meta" in other.stderr and not Plan.load(tmp_path / "plain.plan.json").model.meta


def test_a_model_built_on_the_meta_device_is_timed_under_no_schedule(tmp_path, models):
    (tmp_path / "model.py").write_text(built_on_the_meta_device((models / "plain.py").read_text()))
    arguments = ("--gpus", 2, "model.py", "--batch-size", 4, "--microbatches", 2, "--schedule", "1f1b")
    planned = command(*arguments, module="planner", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    profile = Profile.load(tmp_path / "model.profile.json")
    assert profile.model.meta and profile.schedule is None and "may differ" not in planned.stdout


def test_a_reference_that_does_not_fit_is_refused(monkeypatch, tmp_path, models):
    plan = plan_at(models / "plain.py", ["5"])
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, meta=True, num_parameters=2**28))
    source = load_source(str(models / "plain.py"))
    monkeypatch.setattr("runner.reference_memory.free_host_bytes", lambda: 2**32)
    with pytest.raises(UsageError, match=r"needs [345]\.\d\d GiB, 4\.00 GiB are free"):
        refuse_reference_that_does_not_fit(plan, source, CpuDevice())
    monkeypatch.setattr("runner.reference_memory.free_host_bytes", lambda: 2**34)
    refuse_reference_that_does_not_fit(plan, source, CpuDevice())


def test_optimizer_state_is_seen_not_assumed():
    source = load_source(str(ROOT / "examples/transformer.py"))
    assert optimizer_share(source) == 2.0
    assert optimizer_share(load_source(str(ROOT / "examples/large.py"))) == 0.0


def test_free_memory_is_the_least_of_the_limits(monkeypatch):
    monkeypatch.setattr(host_memory, "_available", lambda: 30)
    monkeypatch.setattr(host_memory, "_below_group_limit", lambda: 20)
    monkeypatch.setattr(host_memory, "_below_own_limit", lambda: None)
    assert host_memory.free_host_bytes() == 20


LIMITED = """
import resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
sys.exit(subprocess.call([sys.executable, "-P", "-m", *sys.argv[1:]]))
"""


def limited(limit_bytes, *arguments, cwd):
    """`python -m arguments…`, where no process may have more private memory than `limit_bytes` (ulimit -d)."""
    import os

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-c", LIMITED.format(limit=limit_bytes), *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3600)


@pytest.mark.exhaustive
def test_a_model_that_exceeds_an_enforced_limit_is_planned_and_trained(tmp_path):
    """2.1 GB of weights where no process may have 1.9 GB: an ordinary build fails, --meta plans and trains it."""
    model, limit = ROOT / "examples/large.py", 1_900_000_000
    arguments = ("planner", "--gpus", 4, model, "--microbatches", 4)
    ordinary = limited(limit, *arguments, cwd=tmp_path)
    assert ordinary.returncode != 0 and "allocate memory" in ordinary.stderr
    planned = limited(limit, *arguments, "--meta", "--train", "--steps", 2, "--run-dir", "run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    plan = Plan.load(tmp_path / "large.plan.json")
    assert plan.num_stages == 4 and 4 * plan.model.num_parameters > limit
    steps = [json.loads(line) for line in Path(tmp_path, "run", "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
