"""A profile is measured again where something changed that the graph alone does not show."""

import dataclasses

import pytest

from planner.files.profile_file import Profile
from planner.profiling.profiler import load_if_fitting
from tests.running import ROOT, command

PLAIN = (ROOT / "tests" / "models" / "plain.py").read_text()
OPTIMIZER = "\ndef make_optimizer(parameters): return torch.optim.{}\n"
FROZEN = """
_build_model = build_model
def build_model():
    model = _build_model()
    next(model.parameters()).requires_grad_(False)
    return model
"""


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A small model and its profile at microbatches of 2, with an optimizer of its own."""
    folder = tmp_path_factory.mktemp("profiled")
    (folder / "model.py").write_text(PLAIN + OPTIMIZER.format("SGD(parameters, lr=0.1)"))
    ended = command("--gpus", 2, "model.py", "--microbatches", 4, "--device", "cpu", module="planner", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def why_not(folder, text, profile=None):
    (folder / "model.py").write_text(text)
    path = folder / "model.profile.json"
    if profile is not None:
        path = folder / "other.profile.json"
        profile.save(path)
    wanted = {"batch_size": 8, "sizes": (2,), "device": "cpu", "seed": 0}
    found, reason = load_if_fitting(path, model=str(folder / "model.py"), **wanted)
    assert (found is None) == bool(reason)
    return reason


def test_what_changed_nothing_is_reused(profiled):
    same = PLAIN + OPTIMIZER.format("SGD(parameters, lr=0.1)")
    assert why_not(profiled, same) == ""
    assert why_not(profiled, f"{same}\ndef other(): return 1\n") == ""


@pytest.mark.parametrize(
    "more",
    [
        OPTIMIZER.format("Adam(parameters, lr=0.1)"),
        OPTIMIZER.format("SGD(parameters, lr=0.1, momentum=0.9)"),
        OPTIMIZER.format("SGD(parameters, lr=0.1)") + FROZEN,
        OPTIMIZER.format("SGD(parameters, lr=0.1)") + "def loss_fn(output, targets): return output.square().sum()\n",
        OPTIMIZER.format("SGD(parameters, lr=0.1)") + 'LOSS_REDUCTION = "sum"\n',
        "",
        "\nMOMENTUM = 0.9" + OPTIMIZER.format("SGD(parameters, lr=0.1, momentum=MOMENTUM)"),
    ],
)
def test_what_is_trained_otherwise_is_measured_again(profiled, more):
    assert "what is trained, the loss or the optimizer has changed" in why_not(profiled, PLAIN + more)


def test_options_that_the_text_does_not_show_are_seen(profiled):
    text = PLAIN + "\nRATE = 0.1" + OPTIMIZER.format("SGD(parameters, lr=RATE)")
    before = dataclasses.replace(Profile.load(profiled / "model.profile.json"), training=digest_of(profiled, text))
    assert why_not(profiled, text, before) == ""
    assert "has changed" in why_not(profiled, text.replace("RATE = 0.1", "RATE = 0.2"), before)


def digest_of(folder, text):
    from planner.tracing.exporting import trace_model
    from planner.tracing.loading import as_call, build, load_source, make_batch, rows
    from planner.tracing.training_digest import training_digest

    (folder / "model.py").write_text(text)
    source = load_source(str(folder / "model.py"))
    inputs = rows(make_batch(source, 0, 0, 8)[0], 0, 2)
    return training_digest(source, trace_model(build(source, 0), *as_call(inputs)).graph_module)


def test_an_older_profile_is_measured_again(profiled):
    older = dataclasses.replace(Profile.load(profiled / "model.profile.json"), training="")
    text = PLAIN + OPTIMIZER.format("SGD(parameters, lr=0.1)")
    assert "does not say what was trained" in why_not(profiled, text, older)
