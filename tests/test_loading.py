"""Model files: what is missing or broken is said with the user's own lines and a remedy."""

import sys

import pytest
import torch

from planner.errors import ModelFileError
from planner.tracing.loading import build, load_source, make_batch

WHOLE = """
import torch
from torch import nn
def build_model(): return nn.Linear(2, 1)
def make_batch(batch_size): return torch.randn(batch_size, 2), torch.randn(batch_size, 1)
def loss_fn(output, targets): return (output - targets).square().mean()
"""


def write(tmp_path, text, name="model.py"):
    file = tmp_path / name
    file.write_text(text)
    return str(file)


def test_a_whole_file_loads_with_defaults(tmp_path):
    source = load_source(write(tmp_path, WHOLE))
    assert (source.name, source.batch_size, source.loss_reduction, source.batches) == ("model", None, "mean", None)
    optimizer = source.make_optimizer(list(build(source, 0).parameters()))
    assert type(optimizer).__name__ == "AdamW" and optimizer.param_groups[0]["lr"] == 1e-3


def test_another_entry_can_be_named(tmp_path):
    file = write(tmp_path, WHOLE + "def other(): return nn.Linear(2, 1, bias=False)\n")
    assert build(load_source(f"{file}:other"), 0).bias is None


@pytest.mark.parametrize(
    ("text", "got", "remedy"),
    [
        (WHOLE.replace("def make_batch", "def make_bunch"), "no function make_batch", "def make_batch(batch_size)"),
        (WHOLE.replace("def loss_fn", "loss_fn = 3 #"), "no function loss_fn", "def loss_fn(output, targets)"),
        (WHOLE.replace("def build_model", "def construct"), "no function build_model", "def build_model()"),
        ("import torch\nx = 1 +", "SyntaxError", "correct the line"),
        ("import torch\nraise ValueError('no data')\n", "ValueError: no data", "correct the line"),
        ("import nothing_of_that_name\n", "ModuleNotFoundError", "correct the line"),
        (WHOLE + "BATCH_SIZE = 0\n", "BATCH_SIZE is 0", "correct it"),
        (WHOLE + "BATCH_SIZE = True\n", "BATCH_SIZE is True", "correct it"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3", "correct the line"),
        (WHOLE + "LOSS_REDUCTION = 'max'\n", "LOSS_REDUCTION is 'max'", "correct it"),
    ],
)
def test_what_is_missing_or_broken_is_said(tmp_path, text, got, remedy):
    with pytest.raises(ModelFileError) as caught:
        load_source(write(tmp_path, text))
    assert got in caught.value.got and remedy in caught.value.remedy


def test_errors_show_the_users_own_lines_only(tmp_path):
    file = write(tmp_path, WHOLE.replace("return nn.Linear(2, 1)", "return nn.Linear(2, 1, unknown=True)"))
    with pytest.raises(ModelFileError) as caught:
        build(load_source(file), 0)
    assert caught.value.frames == ("model.py:4: def build_model(): return nn.Linear(2, 1, unknown=True)",)


def test_missing_file_names_the_example(tmp_path):
    with pytest.raises(ModelFileError, match="plan --example"):
        load_source(str(tmp_path / "none.py"))


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("return torch.randn(batch_size, 2)", "returned a tensor of shape (4, 2)"),
        ("return torch.randn(3, 2), torch.randn(batch_size, 1)", "shapes (3, 2), (4, 1)"),
        ("return 1, torch.randn(batch_size, 1)", "without a tensor"),
        ("return torch.tensor(1.0), torch.randn(batch_size, 1)", "shapes (), (4, 1)"),
    ],
)
def test_wrong_batches_are_refused(tmp_path, body, got):
    text = WHOLE.replace("return torch.randn(batch_size, 2), torch.randn(batch_size, 1)", body)
    with pytest.raises(ModelFileError) as caught:
        make_batch(load_source(write(tmp_path, text)), 0, 0, 4)
    assert got in caught.value.got


def test_seed_rule_gives_the_same_model_and_batches_again(tmp_path):
    source = load_source(write(tmp_path, WHOLE))
    assert torch.equal(build(source, 5).weight, build(source, 5).weight)
    first, again, later = (make_batch(source, 5, step, 4)[0] for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    torch.manual_seed(5 + 1 + 1)
    assert torch.equal(later, torch.randn(4, 2))


def test_loading_leaves_the_path_as_it_was(tmp_path):
    before = list(sys.path)
    (tmp_path / "neighbour_of_model.py").write_text("value = 3\n")
    load_source(write(tmp_path, "from neighbour_of_model import value\n" + WHOLE))
    assert sys.path == before
