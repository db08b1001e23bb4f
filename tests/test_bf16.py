"""bf16: the split model trains as the eager one inside autocast, at every cut; bytes are those that travel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from planner.cli import build_parser
from planner.errors import ModelFileError, UsageError
from planner.planning import PlanRequest, plan_profile, resolve_precision
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
