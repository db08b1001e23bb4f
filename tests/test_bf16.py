"""bf16: the split model trains as the eager one inside autocast, at every cut; bytes are those that travel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from planner.cli import build_parser
from planner.errors import ModelFileError, UsageError
from planner.planning import plan_profile
from planner.request import PlanRequest, resolve_precision
from planner.tracing.exporting import Trace, trace_model
from planner.tracing.loading import as_call, build, load_source, make_batch, rows
from planner.tracing.precision import autocast
from planner.tracing.rewriting import compute_nodes
from tests.running import ROOT, command, plan_at
from tests.zoo.made_up_costs import made_up_profile
from tests.zoo.parity import largest_difference

MODELS = ROOT / "tests" / "models"
MIXED = MODELS / "mixed.py"
BF16_ROUNDING = 2.0**-8


def _in_bf16(file: Path, folder: Path) -> Path:
    """A copy of the model file that states bf16."""
    copy = folder / file.name
    copy.write_text(file.read_text() + '\nPRECISION = "bf16"\n')
    return copy


def _traced(file: Path, device: str | None = "cpu") -> Trace:
    source = load_source(str(file))
    inputs, _ = make_batch(source, 0, 0, 8)
    autocast_on = None if device is None else torch.device(device)
    return trace_model(build(source, 0), *as_call(rows(inputs, 0, 2)), autocast_on=autocast_on)


@pytest.mark.parametrize("name", ["mixed", "convolutional", "twice"])
def test_at_every_cut_gradients_are_those_of_eager_autocast(name: str, tmp_path: Path) -> None:
    file = MIXED if name == "mixed" else _in_bf16(MODELS / f"{name}.py", tmp_path)
    source = load_source(str(file))
    cuts = [layer.id for layer in _traced(file).layers[1:]]
    apart = {cut: largest_difference(plan_at(file, [cut]), source, num_steps=1) for cut in cuts}
    assert apart and max(difference for difference, _ in apart.values()) <= BF16_ROUNDING, apart


def test_values_are_described_as_autocast_computes_them() -> None:
    trace = _traced(MIXED)
    source = load_source(str(MIXED))
    inputs, _ = make_batch(source, 0, 0, 2)
    state = {**dict(trace.graph_module.named_parameters()), **dict(trace.graph_module.named_buffers())}
    values = {node: inputs for node in trace.graph_module.graph.nodes if node.op == "placeholder"}
    values |= {n: state[str(n.target)] for n in trace.graph_module.graph.nodes if n.op == "get_attr"}
    dtypes = set()
    with autocast("bf16", "cpu"):
        for node in compute_nodes(trace.graph_module.graph):
            args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
            assert values[node].dtype == node.meta["val"].dtype, node
            dtypes.add(values[node].dtype)
    assert {torch.bfloat16, torch.float32} <= dtypes


def test_messages_are_of_the_bytes_that_travel_and_only_equal_dtypes_are_plain(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "import torch\nfrom torch import nn\nPRECISION = 'bf16'\n"
        "def build_model(): return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))\n"
        "def make_batch(n): return torch.randn(n, 8), torch.randn(n, 4)\n"
        "def loss_fn(output, targets): return nn.functional.mse_loss(output, targets)\n"
    )
    halved, whole = (_traced(tmp_path / "m.py", device) for device in ("cpu", None))
    assert [t.num_bytes for t in halved.tensors[:1]] == [2 * 16 * 2] == [t.num_bytes // 2 for t in whole.tensors[:1]]
    assert [t.gradient_bytes for t in halved.tensors[:1]] == [2 * 16 * 2]
    assert not halved.layers[1].plain_cut and whole.layers[1].plain_cut
    assert halved.fingerprint == whole.fingerprint


def test_a_precision_that_is_wrong_or_contradicts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = MIXED.read_text()
    file = tmp_path / "m.py"
    for wrong, why in (("fp16", "gradient scaler"), ("half", "it is")):
        file.write_text(text.replace('"bf16"\n', f'"{wrong}"\n'))
        with pytest.raises(ModelFileError, match=why):
            load_source(str(file))
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--gpus", "2", "m.py", "--precision", "fp16"])
    assert "gradient scaler" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--precision fp32, and PRECISION"):
        resolve_precision(str(MIXED), PlanRequest(2, precision="fp32"))
    assert resolve_precision(str(MIXED), PlanRequest(2)) == "bf16"
    profile = made_up_profile(load_source(str(MIXED)), _traced(MIXED), 8, 2)
    with pytest.raises(UsageError, match="profile that was made in fp32"):
        plan_profile(profile, PlanRequest(2, 8, 4, precision="bf16"))
    bf16 = replace(profile, precision="bf16")
    assert plan_profile(bf16, PlanRequest(2, 8, 4)).precision == "bf16"


def test_a_real_run_is_eager_autocast_and_needs_the_memory_that_was_predicted(tmp_path: Path) -> None:
    file = _in_bf16(MODELS / "convolutional.py", tmp_path)
    flags = ["--gpus", 3, file, "--microbatches", 4, "-o", "m.plan.json", "--precision", "bf16"]
    flags += ["--train", "--check", "--steps", 3, "--run-dir", "run", "--drift", "m.profile.json"]
    result = command(*flags, cwd=tmp_path, module="planner", timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bf16" in result.stdout and "drift of the machine since m.profile.json" in result.stdout
    measurement = json.loads((tmp_path / "run" / "measurement.json").read_text())
    assert measurement["check"]["max_gradient_difference"] <= BF16_ROUNDING and measurement["drift"] is not None
    for stage in measurement["stages"]:
        predicted, measured = (stage[kind]["peak_memory_bytes"] for kind in ("predicted", "measured"))
        assert 0.99 * measured <= predicted <= 1.1 * measured, stage["index"]
