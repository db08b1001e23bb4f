"""Plans that were edited by hand: every contradiction is refused with one clear error."""

import json

import pytest

from planner.errors import FileError
from planner.files.plan_file import Plan
from tests.running import command, plan_at
from tests.sample_values import sample_plan


def stage(data, index):
    return data["stages"][index]


EDITS = {
    "data_parallel is 2": lambda data: data.update(data_parallel=2),
    "lower_bound_ms 1e+18 is above objective_ms": lambda data: data.update(lower_bound_ms=1e18),
    "lower_bound_ms is 1e+308": lambda data: data.update(lower_bound_ms=1e308),
    "1F1B with 1 microbatches and": lambda data: data.update(schedule="1f1b", num_microbatches=1),
    "100,000 microbatches": lambda data: data.update(num_microbatches=100_000),
    "stage 3 of the list has index 2 and rank 3": lambda data: stage(data, 3).update(index=2),
    "stage 1 of the list has index 1 and rank 7": lambda data: stage(data, 1).update(rank=7),
    "stage 2 has no layers": lambda data: stage(data, 2).update(nodes=[], names=[]),
    "stage 2 has 8 nodes and 7 names": lambda data: stage(data, 2)["names"].pop(),
    "layer 'layers.2' is in stage 1 and in stage 3": lambda data: stage(data, 3).update(
        nodes=[*stage(data, 3)["nodes"], "layers.2"], names=[*stage(data, 3)["names"], "layers.2"]
    ),
    "cut 1 is before 'layers.5', but stage 2 begins with 'layers.4'": lambda data: data["cuts"][1].update(
        before="layers.5"
    ),
    "forward_ms is -1.0": lambda data: stage(data, 0).update(forward_ms=-1.0),
    "objective_ms is -1.0": lambda data: data.update(objective_ms=-1.0),
    "status is optimal, but lower_bound_ms 1 is below": lambda data: data.update(lower_bound_ms=1.0),
    "step_ms 1 differs from objective_ms": lambda data: data.update(step_ms=1.0),
    "schedule None with step_ms": lambda data: data.update(schedule=None),
    "load_ms 1 is not forward_ms + backward_ms, 12.61": lambda data: stage(data, 0).update(load_ms=1.0),
    "seed is -1": lambda data: data.update(seed=-1),
    "bandwidth_bytes_per_s is 0": lambda data: data.update(bandwidth_bytes_per_s=0.0),
    "split_spec has layers.2: beginning, layers.9: beginning": lambda data: data.update(
        split_spec=dict.fromkeys(["layers.2", "layers.9", "layers.6"], "beginning")
    ),
    "layers.2: end": lambda data: data["split_spec"].update({"layers.2": "end"}),
    "plain_chain is False with split_spec": lambda data: data.update(plain_chain=False),
    "w is tied over stages 0, 9": lambda data: data.update(tied=[{"name": "w", "stages": [0, 9]}]),
    "4 stages and 2 cuts": lambda data: data["cuts"].pop(),
}


@pytest.mark.parametrize("expected", EDITS)
def test_an_edited_plan_is_refused(tmp_path, expected):
    path = tmp_path / "x.plan.json"
    sample_plan().save(path)
    data = json.loads(path.read_text())
    EDITS[expected](data)
    path.write_text(json.dumps(data))
    with pytest.raises(FileError) as caught:
        Plan.load(path)
    assert expected in caught.value.got and str(path) in caught.value.got
    assert caught.value.rule and caught.value.remedy


def test_a_cut_that_the_model_does_not_have_is_refused_with_stock_too(tmp_path, models):
    path = tmp_path / "x.plan.json"
    plan_at(models / "plain.py", ["5"]).save(path)
    data = json.loads(path.read_text())
    data["cuts"][0]["before"] = data["stages"][1]["nodes"][0] = data["stages"][1]["names"][0] = "nothing.there"
    data["split_spec"] = {"nothing.there": "beginning"}
    path.write_text(json.dumps(data))
    for more in (["--stock"], []):
        ended = command(path, "--steps", 1, "--device", "cpu", *more, cwd=tmp_path)
        assert ended.returncode == 2 and "nothing.there" in ended.stderr, ended.stderr
        assert "rule: " in ended.stderr and "AttributeError" not in ended.stderr and "KeyError" not in ended.stderr
