"""Models that are hard to split, trained on three workers equal to the unsplit model; what is hard is their docs."""

import pytest
import torch
from safetensors.torch import load_file

from planner.files.measurement_file import Measurement
from tests.eager import train_eagerly
from tests.running import command, plan_at

MODELS_AND_CUTS = [
    ("functions.py", ["label", "domain"]),
    ("dropout.py", ["layers.2.1", "functional"]),
    ("inputs.py", ["layers.2", "layers.4"]),
    ("state.py", ["norms.1", "norms.2"]),
    ("values.py", ["layers.1", "layers.3"]),
]


@pytest.mark.parametrize(("name", "cuts"), MODELS_AND_CUTS)
def test_three_stages_train_as_the_unsplit_model(models, tmp_path, name, cuts):
    check = train_and_check(models / name, cuts, tmp_path)
    assert max(check.max_loss_difference, check.max_gradient_difference, check.max_parameter_difference) == 0.0
    expected = train_eagerly(models / name, steps=3, num_microbatches=4, batch_size=8)
    exported = load_file(tmp_path / "w.safetensors")
    assert set(exported) == set(expected)
    for key, value in expected.items():
        assert torch.allclose(exported[key].double(), value.double(), rtol=0, atol=1e-5), key


def train_and_check(file, cuts, folder):
    """The result of `--check` over three steps of `file` cut before the layers `cuts`."""
    plan_at(file, cuts).save(folder / "x.plan.json")
    ended = command(
        "x.plan.json", "--steps", 3, "--check", "--run-dir", "run", "--export-weights", "w.safetensors", cwd=folder
    )
    assert ended.returncode == 0, ended.stderr
    check = Measurement.load(folder / "run" / "measurement.json").check
    assert check is not None and check.steps == 3
    return check


@pytest.mark.parametrize("frozen", ["0, 1", "2, 3", "4, 5", "0, 1, 2, 3, 4"])
def test_stages_that_are_frozen_whole(models, tmp_path, frozen):
    file = tmp_path / "frozen.py"
    file.write_text((models / "frozen.py").read_text().replace("FROZEN = (0, 1)", f"FROZEN = ({frozen})"))
    check = train_and_check(file, ["layers.2", "layers.4"], tmp_path)
    assert max(check.max_loss_difference, check.max_gradient_difference, check.max_parameter_difference) == 0.0
