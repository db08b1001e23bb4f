"""Cuts between the operations of a module: legal ones only, named, trained as the unsplit model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from planner.errors import PlannerError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.planning import plan_profile
from planner.profiling.opening import Opening, too_large
from planner.request import PlanRequest
from planner.tracing.exporting import Trace, open_layers, trace_model
from planner.tracing.loading import as_call, build, load_source, make_batch, rows
from tests.running import command
from tests.zoo.made_up_costs import made_up_profile
from tests.zoo.parity import largest_difference

MODEL = Path(__file__).parent / "models" / "one_module.py"
BATCH_SIZE, SIZE = 8, 2


def trace_of_one_module() -> Trace:
    source = load_source(str(MODEL))
    inputs, _ = make_batch(source, 0, 0, BATCH_SIZE)
    return trace_model(build(source, 0), *as_call(rows(inputs, 0, SIZE)))


def plan_by_operations(num_stages: int) -> Plan:
    profile = made_up_profile(load_source(str(MODEL)), open_layers(trace_of_one_module()), BATCH_SIZE, SIZE)
    request = PlanRequest(num_stages, BATCH_SIZE, BATCH_SIZE // SIZE, granularity="operation")
    return plan_profile(replace(profile, granularity="operation"), request)


def test_a_model_that_is_one_module_has_no_cut_before_a_module() -> None:
    profile = made_up_profile(load_source(str(MODEL)), trace_of_one_module(), BATCH_SIZE, SIZE)
    request = PlanRequest(3, BATCH_SIZE, BATCH_SIZE // SIZE)
    with pytest.raises(PlannerError, match="cannot cut 1 layers") as refused:
        plan_profile(profile, request)
    assert "--granularity operation" in refused.value.remedy
    with pytest.raises(PlannerError, match="cannot cut 1 layers") as refused:
        plan_profile(replace(profile, granularity="operation"), request)
    assert "--granularity" not in refused.value.remedy


def test_between_its_operations_it_is_cut_into_three_stages_that_train_as_the_model() -> None:
    plan = plan_by_operations(3)
    assert plan.num_stages == 3 and all("+" in cut.before for cut in plan.cuts)
    assert plan.model.granularity == "operation"
    assert not plan.plain_chain and plan.split_specification is None
    difference, what = largest_difference(plan, load_source(str(MODEL)))
    assert difference <= 1e-5, what


def test_two_processes_train_it_as_the_model(tmp_path: Path) -> None:
    plan_by_operations(2).save(tmp_path / "x.plan.json")
    ended = command("x.plan.json", "--steps", 2, "--check", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    check = Measurement.load(tmp_path / "run" / "measurement.json").check
    assert check is not None and check.steps == 2


def test_no_layer_begins_with_a_write_in_place_or_within_the_update_of_a_buffer() -> None:
    layers = open_layers(trace_of_one_module()).layers
    assert len(layers) > 6
    kinds = [layer.type for layer in layers]
    assert "relu_" not in kinds and "copy_" not in kinds
    assert "add_" not in kinds[: kinds.index("mean")]  # the buffer's, after the batch's mean: its first use


def test_a_layer_is_named_by_its_place_and_after_its_module_and_operation() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    trace = trace_model(nn.Sequential(nn.Linear(8, 8), block), (torch.ones(2, 3, 8),), {})
    opened = open_layers(trace)
    assert {layer.id for layer in trace.layers} <= {layer.id for layer in opened.layers}
    places = {layer.id: layer.start for layer in trace.layers}
    within = [layer for layer in opened.layers if "+" in layer.id]
    assert within and not any(layer.plain_cut for layer in within)
    for layer in within:
        inside, _, number = layer.id.partition("+")
        assert layer.start == places[inside] + int(number) and layer.name.endswith(f"/{layer.type}")


def test_only_the_layers_asked_for_are_opened() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    trace = trace_model(nn.Sequential(block, nn.Linear(8, 8)), (torch.ones(2, 3, 8),), {})
    first = trace.layers[0].id
    assert {layer.id.partition("+")[0] for layer in open_layers(trace, {first}).layers if "+" in layer.id} <= {first}
    assert open_layers(trace, ()).layers == trace.layers


def test_auto_opens_all_layers_where_there_are_few_cuts_and_none_with_module() -> None:
    trace = trace_of_one_module()
    assert Opening("auto", 2).before_timing(trace).layers == open_layers(trace).layers
    assert Opening("module", 2).before_timing(trace).layers == trace.layers
    assert too_large([1.0] * 9 + [4.0], 4) == [False] * 9 + [True]


@pytest.mark.slow
def test_the_command_plans_by_operations_and_says_how_often_it_exported(tmp_path: Path) -> None:
    ended = command(MODEL, "--gpus", 2, "--granularity", "operation", cwd=tmp_path, module="planner")
    assert ended.returncode == 0, ended.stderr
    assert "(1 export)" in ended.stdout
    profile = Profile.load(tmp_path / "one_module.profile.json")
    assert profile.granularity == "operation" and profile.tracing is not None and profile.tracing.num_exports == 1
