"""--weights: what a stage starts with comes from safetensors, by name; --meta: no rank holds more than its stage."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from planner.errors import FileError
from planner.tracing.loading import build, load_source
from runner.weight_files import WeightFiles
from tests.running import built_on_the_meta_device, command, plan_at


def state_of(model, seed=7):
    """The weights that `model` starts with under another seed than the plan's, and no tensor twice."""
    state = build(load_source(str(model)), seed).state_dict()
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def save_sharded(folder, state):
    """Two files and an index, as Hugging Face writes them."""
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    folder.mkdir()
    for file, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("meta", [False, True])
def test_a_run_starts_from_a_sharded_checkpoint(tmp_path, models, meta):
    """--check builds the reference from the same files, and --steps 1 with a rate of 0 leaves them as they were."""
    model = tmp_path / "model.py"
    more = "\ndef make_optimizer(parameters):\n    return torch.optim.SGD(parameters, lr=0.0)\n"
    model.write_text((models / "twice.py").read_text() + more)
    state = state_of(model)
    folder = save_sharded(tmp_path / "checkpoint", state)
    plan_at(model, 2).save(tmp_path / "x.plan.json")
    flags = ["--meta"] if meta else []
    ended = command(
        *("x.plan.json", "--steps", 1, "--check", "--weights", folder, "--export-weights", "out.safetensors"),
        *("--run-dir", "run", *flags),
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == state.keys() and all(torch.equal(out[name], state[name]) for name in state)
    fresh = state_of(model, seed=0)
    assert any(not torch.equal(out[name], fresh[name]) for name in state)


def test_meta_trains_as_the_unsplit_model_from_the_same_seed(tmp_path, models):
    """Batch norm, buffers, a skip: the reference of --check is an ordinary build, which knows nothing of the record."""
    plan_at(models / "convolutional.py", 3).save(tmp_path / "x.plan.json")
    ended = command("x.plan.json", "--steps", 2, "--check", "--meta", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "largest differences: loss 0.0e+00, gradient 0.0e+00" in ended.stdout


def test_a_model_built_on_the_meta_device_trains_without_a_flag(tmp_path, models):
    model = tmp_path / "model.py"
    model.write_text(built_on_the_meta_device((models / "plain.py").read_text()))
    plan_at(models / "plain.py", ["5"]).save(tmp_path / "x.plan.json")
    arguments = ("x.plan.json", "--steps", 1, "--model", model, "--export-weights", "a.safetensors", "--run-dir", "run")
    ended = command(*arguments, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    command("x.plan.json", "--steps", 1, "--export-weights", "b.safetensors", "--run-dir", "run", cwd=tmp_path)
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_wrong_checkpoint_is_exit_2_and_names_the_key(tmp_path, models):
    state = state_of(models / "plain.py")
    missing = sorted(state)[0]
    save_file({name: tensor for name, tensor in state.items() if name != missing}, tmp_path / "w.safetensors")
    plan_at(models / "plain.py", ["5"]).save(tmp_path / "x.plan.json")
    ended = command("x.plan.json", "--steps", 1, "--weights", "w.safetensors", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 2 and f"has no {missing}" in ended.stderr and "Traceback" not in ended.stderr
    ended = command("x.plan.json", "--steps", 1, "--weights", "nowhere", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 2 and "nowhere is neither a file nor a folder" in ended.stderr


def test_keys_are_found_under_any_name_of_a_tied_tensor(tmp_path):
    save_file({"head.weight": torch.ones(2, 3)}, tmp_path / "w.safetensors")
    files = WeightFiles.open(tmp_path / "w.safetensors")
    names = {"embedding.weight": "embedding.weight", "head.weight": "embedding.weight"}
    assert files.keys_for({"embedding.weight": (2, 3)}, names) == {"embedding.weight": "head.weight"}
    assert torch.equal(files.read("head.weight"), torch.ones(2, 3))


def test_what_does_not_fit_is_named(tmp_path):
    save_file({"wte.weight": torch.ones(2, 3), "more": torch.ones(1)}, tmp_path / "model.safetensors")
    files = WeightFiles.open(tmp_path)
    with pytest.raises(FileError, match=r"wte\.weight is \[2, 3\] .* and \[3, 3\] in the model"):
        files.keys_for({"wte.weight": (3, 3)}, {})
    with pytest.raises(FileError, match=r"has no transformer\.wte\.weight; it has wte\.weight"):
        files.keys_for({"transformer.wte.weight": (2, 3)}, {})
    assert files.not_in(["wte.weight"]) == ("more",)


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(FileError, match="is not safetensors"):
        WeightFiles.open(tmp_path / "w.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weights": []}')
    with pytest.raises(FileError, match="is not an index"):
        WeightFiles.open(tmp_path / "model.safetensors.index.json")
    folder = save_sharded(tmp_path / "sharded", {"a": torch.ones(1), "b": torch.ones(1)})
    save_file({"c": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(FileError, match="has no b"):
        WeightFiles.open(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"holds no \.safetensors"):
        WeightFiles.open(tmp_path / "empty")
