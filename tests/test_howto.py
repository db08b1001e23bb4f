"""The how-tos do what they say: their files load and trace, their scripts run, and their commands have these flags."""

import os
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import planner.plan_flags
import runner.options
from planner.tracing.exporting import trace_model
from planner.tracing.loading import build, load_source, make_batch
from tests.running import ROOT, command, torchrun

HOWTO = ROOT / "docs" / "howto"
PAGES = sorted(path.name for path in HOWTO.glob("*.md"))


def blocks(page, language):
    text = (HOWTO / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for kind, body in found if kind == language]


def write_files(page, folder):
    """Each Python block that begins with a comment `# NAME.py` as that file; the other blocks are returned."""
    others = []
    for block in blocks(page, "python"):
        name = re.match(r"# (\w+\.py)\n", block)
        if name:
            (folder / name[1]).write_text(block)
        else:
            others.append(block)
    return others


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_have_these_flags(page):
    parsers = {"plan": planner.plan_flags.build_parser(), "run-plan": runner.options.build_parser()}
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    assert lines
    for line in lines:
        name, *arguments = shlex.split(line)
        if name in parsers:
            parsers[name].parse_args(arguments)
        else:
            assert name == "torchrun", line


def test_the_plain_script_is_planned_checked_and_runs_as_a_pipeline(tmp_path):
    assert not write_files("plain_script.md", tmp_path)
    planned, launched = (shlex.split(block.strip()) for block in blocks("plain_script.md", ""))
    ended = command(*planned[1:], module="planner", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    ended = torchrun(2, *launched[3:], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    losses = [float(value) for value in re.findall(r"step \d: loss (\d\.\d+)", ended.stdout)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = "import torch\nfrom train import *\ntorch.manual_seed(0)\nm = build_model()\n"
    script += "torch.manual_seed(1)\nx, y = make_batch(8)\nprint(loss_fn(m(x), y).item())"
    alone = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert len(losses) == 3 and losses[0] == pytest.approx(float(alone.stdout), abs=1e-3)


def test_the_configuration_of_the_hugging_face_page_is_a_model(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (block,) = write_files("huggingface.md", tmp_path)
    exec(compile(block, "huggingface.md", "exec"), {})
    source = load_source("gpt2/config.json:hf_16")
    inputs, _ = make_batch(source, 0, 0, 2)
    assert len(trace_model(build(source, 0), (), inputs).layers) > 8


@pytest.fixture
def lightning(monkeypatch):
    """Lightning where it is installed, else a stand-in of the two things that the page uses."""
    try:
        import lightning
    except ImportError:
        lightning = types.ModuleType("lightning")
        lightning.LightningModule = type("LightningModule", (nn.Module,), {"log": lambda *_: None})
        monkeypatch.setitem(sys.modules, "lightning", lightning)
    return lightning


def test_the_lightning_module_is_a_model_file(tmp_path, monkeypatch, lightning):
    assert not write_files("lightning.md", tmp_path)
    monkeypatch.delitem(sys.modules, "lit", raising=False)
    source = load_source(str(tmp_path / "model.py"))
    monkeypatch.delitem(sys.modules, "lit", raising=False)
    x, labels = make_batch(source, 0, 0, 4)
    model = build(source, 0)
    assert len(trace_model(model, (x,), {}).layers) > 4
    assert source.loss_fn(model(x), labels).item() > 0
    assert source.batches is not None
    inputs, targets = next(iter(source.batches(4)))
    assert inputs.shape == (4, 32) and targets.shape == (4,)
    assert isinstance(source.make_optimizer(list(model.parameters())), torch.optim.AdamW)
