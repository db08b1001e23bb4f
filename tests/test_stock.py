"""Plans on stock torch, with nothing of ours but Plan.load: gradients equal to the eager model's."""

import os
import subprocess
import sys

import pytest
import torch

from planner.errors import TraceError, UsageError
from planner.files.plan_file import Plan
from tests.running import ROOT, plan_at, torchrun

EXAMPLES = ROOT / "examples"
PROBE = """
import sys
sys.path[:0] = [{stock!r}]
import torch, torch.distributed as dist
import {module} as script
stage = script.main({plan!r}{more})
torch.save({{n: p.grad for n, p in stage.submod.named_parameters()}}, {folder!r} + f"/{{dist.get_rank()}}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def gradients_of(tmp_path, module, plan, num_workers, more=""):
    plan.save(tmp_path / "x.plan.json")
    probe = tmp_path / "probe.py"
    values = {"stock": str(EXAMPLES / "stock"), "plan": str(tmp_path / "x.plan.json"), "folder": str(tmp_path)}
    probe.write_text(PROBE.format(module=module, more=more, **values))
    ended = torchrun(num_workers, probe, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(num_workers)]
    return by_rank


def eager_gradients(module, plan, monkeypatch):
    """The example's model, trained on the whole batch by plain torch, microbatch after microbatch."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    example = __import__(module)
    torch.manual_seed(0)
    model = example.build_model()
    if module == "gpt2":
        example.make_batch(plan.microbatch_size)
        torch.manual_seed(1)
    inputs, targets = example.make_batch(plan.batch_size)
    size = plan.microbatch_size
    for start in range(0, plan.batch_size, size):
        rows = slice(start, start + size)
        output = model(**{k: v[rows] for k, v in inputs.items()}) if isinstance(inputs, dict) else model(inputs[rows])
        example.loss_fn(output, targets[rows]).backward()
    return {name: p.grad / plan.num_microbatches for name, p in model.named_parameters()}


def test_the_tutorials_script_by_split_spec(tmp_path, monkeypatch):
    plan = plan_at(EXAMPLES / "transformer.py", ["layers.4"], num_microbatches=2, batch_size=4)
    assert plan.plain_chain
    by_rank = gradients_of(tmp_path, "transformer_by_split_spec", plan, 2)
    expected = eager_gradients("transformer", plan, monkeypatch)
    assert set().union(*by_rank) == set(expected)
    for rank in by_rank:
        for name, gradient in rank.items():
            assert torch.allclose(gradient, expected[name], atol=1e-6), name


def test_tied_gpt2_by_one_argument_and_one_line(tmp_path, monkeypatch):
    plan = plan_at(EXAMPLES / "gpt2.py", ["transformer.h.4"], num_microbatches=2, batch_size=4)
    assert [entry.stages for entry in plan.tied] == [(0, 1)]
    by_rank = gradients_of(tmp_path, "gpt2_by_split_policy", plan, 2, ", num_steps=1")
    expected = eager_gradients("gpt2", plan, monkeypatch)
    tied = plan.tied[0].name
    assert torch.equal(by_rank[0][tied], by_rank[1][tied])
    for rank in by_rank:
        for name, gradient in rank.items():
            assert torch.allclose(gradient, expected[name], atol=1e-6), name


def test_what_stock_torch_would_get_wrong_has_no_split_spec(models):
    plan = plan_at(models / "skips.py", ["layers.1", "layers.3"])
    with pytest.raises(UsageError) as caught:
        plan.split_spec()
    assert "split_policy=plan.split_policy(model)" in caught.value.remedy
    assert "sum_tied_gradients" in caught.value.remedy


def test_the_policy_leaves_the_model_as_it_was_and_can_be_used_again(models):
    from torch.distributed.pipelining import pipeline

    plan = plan_at(models / "skips.py", ["layers.1", "layers.3"])
    from planner.tracing.loading import build, load_source, make_batch

    source = load_source(str(models / "skips.py"))
    model = build(source, 0)
    before = list(model.state_dict())
    x, _ = make_batch(source, 0, 0, plan.microbatch_size)
    for _ in range(2):
        pipe = pipeline(model, (x,), split_policy=plan.split_policy(model))
        assert pipe.num_stages == 3
        assert list(model.state_dict()) == before
        assert not model._state_dict_hooks
    names = [name for k in range(3) for name, _ in pipe.get_stage_module(k).named_parameters()]
    assert names.count("embedding.weight") == 2 and "head.weight" not in names


def test_another_model_or_microbatch_is_refused(models):
    from torch.distributed.pipelining import pipeline

    from planner.tracing.loading import build, load_source

    plan = plan_at(models / "plain.py", ["3"])
    model = build(load_source(str(models / "plain.py")), 0)
    with pytest.raises(TraceError, match="fingerprint"):
        pipeline(model, (torch.randn(5, 12),), split_policy=plan.split_policy(model))


def test_a_plan_needs_no_torch_to_load(models, tmp_path):
    plan_at(models / "plain.py", ["3"]).save(tmp_path / "x.plan.json")
    path = str(tmp_path / "x.plan.json")
    code = f"import sys; from planner import Plan; Plan.load({path!r}); print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "False"
    assert Plan.load(tmp_path / "x.plan.json").num_stages == 2
