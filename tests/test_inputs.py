"""Batches are bound to the traced inputs by name, and refused where the trace does not hold for them."""

import pytest
import torch

from planner.errors import ModelFileError
from planner.tracing.inputs import TracedInputs
from tests.running import command, plan_at

TRACED = {
    "x": torch.zeros(2, 3),
    "pair": {"a": torch.zeros(2), "b": torch.zeros(2)},
    "n": 1,
    "flag": True,
    "none": None,
}


def test_tensors_come_in_the_order_of_the_trace_whatever_the_order_of_the_keys():
    x, a, b = torch.ones(4, 3), torch.ones(4), torch.zeros(4)
    given = {"none": None, "flag": True, "n": 1, "pair": {"b": b, "a": a}, "x": x}
    found = TracedInputs.of(TRACED).tensors(given, "step 1")
    assert [id(tensor) for tensor in found] == [id(x), id(a), id(b)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 2}, "input ['n'] of step 7 is 2, and was 1 when the model was traced"),
        ({"n": True}, "is True, and was 1"),
        ({"flag": False}, "is False, and was True"),
        ({"none": torch.zeros(4)}, "is a tensor of torch.float32 and shape (batch), and was None"),
        ({"x": None}, "is None, and was a tensor"),
        ({"x": torch.zeros(4, 5)}, "shape (batch, 5), and was a tensor of torch.float32 and shape (batch, 3)"),
        ({"x": torch.zeros(4, 3, dtype=torch.float64)}, "is a tensor of torch.float64"),
        ({"more": torch.zeros(4)}, "has ['more'], which the traced one had not"),
        ({"pair": {"a": torch.zeros(4)}}, "the batch of step 7 lacks ['pair']['b']"),
    ],
)
def test_a_batch_for_which_the_trace_does_not_hold_is_refused(change, said):
    with pytest.raises(ModelFileError) as caught:
        TracedInputs.of(TRACED).tensors({**TRACED, **change}, "step 7")
    assert said in caught.value.got and caught.value.rule and caught.value.remedy


CHANGING = """
def batches(batch_size):
    for power in (2, 2, 3):
        inputs, targets = make_batch(batch_size)
        yield {**inputs, "power": power}, targets
"""


def test_a_constant_that_changes_during_a_run_ends_it_by_name(models, tmp_path):
    file = tmp_path / "changing.py"
    file.write_text((models / "inputs.py").read_text() + CHANGING)
    plan_at(file, ["layers.3"]).save(tmp_path / "x.plan.json")
    ended = command("x.plan.json", "--steps", 3, cwd=tmp_path)
    assert ended.returncode == 2 and "['power'] of step 2 is 3, and was 2" in ended.stderr
    assert "Traceback" not in ended.stderr and "pass it as a tensor" in ended.stderr
