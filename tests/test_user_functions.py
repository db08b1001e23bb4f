"""What a model file's functions return or raise is held to the rule, and the error shows the user's line."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from planner.errors import ModelFileError, UsageError
from planner.request import PlanRequest
from planner.tracing.loading import build, checked_batch, load_source
from tests.running import ROOT, command, plan_at

BASE = """import torch
from torch import nn
def build_model(): return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
def make_batch(batch_size): return torch.randn(batch_size, 2), torch.randn(batch_size, 1)
BATCH_SIZE = 4
"""
LOSS = "def loss_fn(output, targets): return (output - targets).square().mean()\n"


def source_of(tmp_path, more):
    (tmp_path / "model.py").write_text(BASE + (more if "def loss_fn" in more else LOSS + more))
    return load_source(str(tmp_path / "model.py"))


def raised(call):
    with pytest.raises(ModelFileError) as caught:
        call()
    assert caught.value.rule and caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("pass", "loss_fn returned None"),
        ("return (output - targets).square()", "loss_fn returned a tensor of shape (3, 1)"),
        ("return 3", "loss_fn returned int"),
        ("return output.argmax()", "loss_fn returned a tensor of int64 of shape ()"),
        ("return output.detach().mean()", "has no gradient"),
        ("return output.no_such_thing", "AttributeError"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(tmp_path, body, got):
    source = source_of(tmp_path, f"def loss_fn(output, targets): {body}\n")
    error = raised(lambda: source.loss_fn(torch.ones(3, 1, requires_grad=True), torch.zeros(3, 1)))
    assert got in error.got and error.frames == (f"model.py:6: def loss_fn(output, targets): {body}",)


def test_a_loss_without_gradient_is_fine_where_none_is_wanted(tmp_path):
    source = source_of(tmp_path, "")
    assert float(source.loss_fn(torch.ones(3, 1), torch.zeros(3, 1))) == 1.0


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("pass", "make_optimizer returned None"),
        ("return torch.optim.LBFGS(parameters)", "returned LBFGS, whose step needs a closure"),
        ("return torch.optim.SGD(parameters, lr=-1)", "ValueError: Invalid learning rate"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_an_optimizer_that_cannot_step_is_refused(tmp_path, body, got):
    source = source_of(tmp_path, f"def make_optimizer(parameters): {body}\n")
    error = raised(lambda: source.make_optimizer([torch.nn.Parameter(torch.ones(2))]))
    assert got in error.got and error.frames[0] == f"model.py:7: def make_optimizer(parameters): {body}"


@pytest.mark.parametrize(
    ("body", "got", "frame"),
    [
        ("return None", "batches(4) returned None", "def batches(n): return None"),
        (
            "yield 1, 2; raise KeyError('gone')",
            "KeyError: 'gone'",
            "def batches(n): yield 1, 2; raise KeyError('gone')",
        ),
        ("raise OSError('no data')", "OSError: no data", "def batches(n): raise OSError('no data')"),
    ],
)
def test_batches_that_fail_show_the_line(tmp_path, body, got, frame):
    source = source_of(tmp_path, f"def batches(n): {body}\n")
    error = raised(lambda: list(source.batches(4)))
    assert got in error.got and error.frames == (f"model.py:7: {frame}",)


def test_a_wrong_batch_of_batches_is_named_so(tmp_path):
    source = source_of(tmp_path, "def batches(n): yield torch.ones(4, 2), torch.ones(3, 1)\n")
    error = raised(lambda: checked_batch(source, next(source.batches(4)), None))
    assert "batches returned tensors of shapes (4, 2), (3, 1)" in error.got and "def batches(n)" in error.frames[0]
    assert isinstance(checked_batch(source, [torch.ones(4, 2), torch.ones(4, 1)], None), tuple)


@pytest.mark.parametrize("exit_code", ["0", "3"])
def test_a_model_that_exits_is_an_error(tmp_path, exit_code):
    text = BASE.replace("def build_model(): return", f"def build_model(): import sys; sys.exit({exit_code}); return")
    (tmp_path / "model.py").write_text(text + LOSS)
    error = raised(lambda: build(load_source(str(tmp_path / "model.py")), 0))
    assert f"SystemExit: {exit_code}" in error.got and "sys.exit" in error.frames[0]


BUFFER = """
class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(2))
        self.linear = nn.Linear(2, 2)
    def forward(self, x):
        self.scale.mul_(1.5)
        return self.linear(x) * self.scale
def build_model(): return nn.Sequential(Scaled(), nn.Linear(2, 1))
"""


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("def make_optimizer(p): return torch.optim.LBFGS(p)\n", "whose step needs a closure"),
        ("def loss_fn(output, targets): return None\n", "loss_fn returned None"),
        (BUFFER, "writes in place to a value that the backward of another microbatch still needs"),
    ],
)
def test_plan_shows_got_rule_and_remedy(tmp_path, more, expected):
    (tmp_path / "model.py").write_text(BASE + LOSS + more)
    ended = command("--gpus", 2, "model.py", "--microbatches", 4, "--device", "cpu", module="planner", cwd=tmp_path)
    assert ended.returncode == 2 and expected in ended.stderr, ended.stderr
    assert "rule: " in ended.stderr and "remedy: " in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "model.plan.json").exists()


@pytest.mark.parametrize(
    ("seed", "expected"), [(str(2**70), "at most"), ("9" * 5000, "whole number"), ("-1", "whole number")]
)
def test_a_seed_out_of_range_is_refused(tmp_path, seed, expected):
    ended = command("--gpus", 2, "model.py", f"--seed={seed}", module="planner", cwd=tmp_path)
    assert ended.returncode == 2 and expected in ended.stderr and "Traceback" not in ended.stderr
    with pytest.raises(UsageError, match="seed"):
        PlanRequest(gpus=2, seed=2**70)


def test_a_seed_of_many_digits_plans_and_trains(tmp_path, models):
    plan_at(models / "plain.py", ["5"], seed=2**62).save(tmp_path / "x.plan.json")
    ended = command("x.plan.json", "--steps", 1, "--tolerance", "0.001%", "--check", cwd=tmp_path)
    assert ended.returncode == 3, ended.stderr
    assert "off by more than 0.001 %" in ended.stderr and "check" in ended.stdout
    line = [sys.executable, "-m", "planner", "--gpus", "2", "none.py", "--seed", "12345678901"]
    assert "none.py is not a file" in subprocess.run(line, capture_output=True, text=True, cwd=ROOT).stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "3 workers for a plan of 2 stages"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(tmp_path, models, monkeypatch, variables, expected):
    plan_at(models / "plain.py", ["5"]).save(tmp_path / "x.plan.json")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ended = command("x.plan.json", "--steps", 1, cwd=tmp_path)
    assert ended.returncode == 2 and expected in ended.stderr, ended.stderr
    assert "rule: " in ended.stderr and "remedy: " in ended.stderr and "Traceback" not in ended.stderr


NOISY = """
import os
print("noise at import")
class Noisy(nn.Linear):
    def forward(self, x):
        print("noise in forward")
        os.write(1, b"noise below python\\n")
        return super().forward(x)
def build_model():
    print("noise in build_model")
    os.system("echo noise of a child")
    return nn.Sequential(Noisy(2, 2), nn.Linear(2, 1))
"""


def test_json_is_pure_on_stdout(tmp_path):
    (tmp_path / "model.py").write_text(BASE + LOSS + NOISY)
    ended = command(
        "--gpus", 2, "model.py", "--microbatches", 4, "--device", "cpu", "--json", "--train", "--steps", 2,
        "--run-dir", "run", module="planner", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == json.loads((tmp_path / "model.plan.json").read_text())
    for what in ("at import", "in build_model", "of a child"):
        assert f"noise {what}" in ended.stderr
    assert "wrote run/report.html" in ended.stderr


def test_plan_trains_though_a_rank_is_set_around_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "model.py").write_text(BASE + LOSS)
    flags = ["--microbatches", 4, "--device", "cpu", "--train", "--steps", 1, "--run-dir", "run"]
    ended = command("--gpus", 2, "model.py", *flags, module="planner", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^wrote run/report.html", ended.stdout, re.MULTILINE) and os.environ["RANK"] == "0"
