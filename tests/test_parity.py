"""The split model is the unsplit one: models of every awkward kind, an independent reference, and sabotage."""

import random

import pytest
import torch
from safetensors.torch import load_file

from planner.files.measurement_file import Measurement
from tests.running import command, plan_at

MODELS_AND_CUTS = [
    ("skips.py", ["layers.1.widen", "layers.3"]),
    ("twice.py", ["shared.1", "shared@1"]),
    ("convolutional.py", ["down.1.norm", "up.1"]),
    ("plain.py", ["3", "6"]),
]


@pytest.mark.parametrize(("name", "cuts"), MODELS_AND_CUTS)
def test_three_stages_train_as_the_unsplit_model(models, tmp_path, name, cuts):
    plan_at(models / name, cuts).save(tmp_path / "x.plan.json")
    ended = command(
        "x.plan.json", "--steps", 3, "--check", "--run-dir", "run", "--export-weights", "w.safetensors", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    check = Measurement.load(tmp_path / "run" / "measurement.json").check
    assert check is not None and check.steps == 3
    assert max(check.max_loss_difference, check.max_gradient_difference, check.max_parameter_difference) < 1e-5
    expected = train_eagerly(models / name, steps=3, microbatches=4, batch_size=8)
    exported = load_file(tmp_path / "w.safetensors")
    assert set(exported) == set(expected)
    for key, value in expected.items():
        assert torch.allclose(exported[key].double(), value.double(), rtol=0, atol=1e-5), key


def train_eagerly(file, steps, microbatches, batch_size, seed=0):
    """The seed rule once more, with nothing of ours: plain torch on the plain module."""
    names: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    torch.manual_seed(seed), random.seed(seed)
    model = names["build_model"]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    make_optimizer = names.get("make_optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    optimizer = make_optimizer(list(model.parameters()))
    size = batch_size // microbatches
    for step in range(steps):
        torch.manual_seed(seed + 1 + step), random.seed(seed + 1 + step)
        inputs, targets = names["make_batch"](batch_size)
        optimizer.zero_grad()
        for part in range(microbatches):
            cut = lambda t, part=part: t[part * size : (part + 1) * size]  # noqa: E731
            own_targets = {k: cut(v) for k, v in targets.items()} if isinstance(targets, dict) else cut(targets)
            output = model(**{k: cut(v) for k, v in inputs.items()}) if isinstance(inputs, dict) else model(cut(inputs))
            names["loss_fn"](output, own_targets).backward()
        for parameter in model.parameters():
            if names.get("LOSS_REDUCTION") != "sum":
                parameter.grad /= microbatches
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(
    ("sabotage", "model", "cuts", "named"),
    [
        ("weight", "skips.py", ["layers.1.widen", "layers.3"], "layers.2.norm.weight"),
        ("tied", "skips.py", ["layers.1.widen", "layers.3"], "embedding.weight"),
        ("inputs", "twice.py", ["shared.1", "shared@1"], "first."),
    ],
)
def test_sabotage_is_found_and_the_parameter_named(models, tmp_path, monkeypatch, sabotage, model, cuts, named):
    monkeypatch.setenv("SABOTAGE", sabotage)
    plan_at(models / model, cuts).save(tmp_path / "x.plan.json")
    ended = command(
        "x.plan.json", "--steps", 2, "--check", "--run-dir", "run", module="tests.sabotaged_run", cwd=tmp_path
    )
    assert ended.returncode == 4, ended.stderr
    assert named in ended.stderr and "not the unsplit one" in ended.stderr


def test_nothing_to_compare_is_a_failed_check(models, tmp_path):
    plan_at(models / "plain.py", ["3"]).save(tmp_path / "x.plan.json")
    ended = command("x.plan.json", "--steps", 0, "--check", cwd=tmp_path)
    assert ended.returncode == 2 and "at least one step" in ended.stderr


NOISY = """
import torch
from torch import nn
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)
    def forward(self, x): return self.b(torch.tanh(self.a(x)) + torch.rand(x.shape))
def build_model(): return Noisy()
def make_batch(batch_size): return torch.randn(batch_size, 3), torch.randn(batch_size, 1)
def loss_fn(output, targets): return (output - targets).square().mean()
"""


def test_other_randomness_than_dropout_is_refused_by_name(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    plan_at(tmp_path / "noisy.py", ["b"]).save(tmp_path / "x.plan.json")
    ended = command("x.plan.json", "--steps", 1, "--check", cwd=tmp_path)
    assert ended.returncode == 2 and "remedy: take the randomness" in ended.stderr
    assert "the model: aten.rand.default (noisy.py:8)" in ended.stderr and "Traceback" not in ended.stderr
