"""The table that `plan` prints."""

from __future__ import annotations

import ast
import textwrap
from dataclasses import replace

import pytest

from planner.files.plan_file import Baseline, StageMemory
from planner.rendering import render_plan, shorten
from planner.scheduling.simulation import StageTimes
from tests.sample_values import make_plan_value, sample_plan, sample_profile

GOLDEN = """\
transformer.py · 8 layers of TransformerDecoderLayer, 33.9 M parameters · 40 legal cuts
  Intel Xeon Platinum 8481C, fp32
profiled in 6.1 s (15 rounds, spread 0.5 %) · solved in 0.04 s by HiGHS: optimal (bound = step)

  stage  begins at       layers  forward ms     ±  backward ms     ±  memory GiB  load
  0      tok_embeddings       7        4.21  0.03         8.40  0.05           –  ██████████████████
  1      layers.2             8        4.19  0.03         8.44  0.05           –  ██████████████████
  2      layers.4             8        4.22  0.03         8.41  0.05           –  ██████████████████
  3      layers.6            18        4.05  0.03         8.12  0.05           –  █████████████████▍

  16 microbatches of 1 (chosen of 4, 8, 16) · step 241 ms · bubble 16.5 % · balance 1.01
  instead: equal layers 299 ms (+24 %) · equal parameters 340 ms (+41 %)
    torchgpipe 248 ms (+3.0 %) · accelerate the same cuts

  split_spec = {
      "layers.2": SplitPoint.BEGINNING,
      "layers.4": SplitPoint.BEGINNING,
      "layers.6": SplitPoint.BEGINNING,
  }
  limited by stage 2; moving layers.6.norm1 to stage 2 would cost 1.1 ms per step"""


def test_the_sample_plan_reads_as_designed() -> None:
    line = "limited by stage 2; moving layers.6.norm1 to stage 2 would cost 1.1 ms per step"
    assert render_plan(sample_plan(), sample_profile(), limit_line=line) == GOLDEN


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_line_is_wider_than_asked_for(width: int) -> None:
    text = render_plan(sample_plan(), sample_profile(), width=width)
    copied = text.index("split_spec")
    assert max(len(line) for line in text[:copied].splitlines()) <= width
    assert "4.21" in text
    assert "8.40" in text


@pytest.mark.parametrize("width", [40, 200])
def test_split_spec_can_be_copied_at_every_width(width: int) -> None:
    text = render_plan(sample_plan(), None, width=width)
    copied = textwrap.dedent(text[text.index("split_spec") :])
    statement = ast.parse(copied).body[0]
    assert isinstance(statement, ast.Assign)
    assert isinstance(statement.value, ast.Dict)
    keys = [key.value for key in statement.value.keys if isinstance(key, ast.Constant)]
    assert keys == ["layers.2", "layers.4", "layers.6"]


def test_without_a_profile_nothing_is_said_about_it() -> None:
    text = render_plan(sample_plan(), None)
    assert "profiled" not in text
    assert "legal cuts" not in text
    assert "33.9 M parameters" in text


def test_a_plan_that_is_no_plain_chain_says_why_and_what_to_do() -> None:
    text = render_plan(sample_plan(tied=True), sample_profile())
    assert "no split_spec: tok_embeddings.weight is used in more than one stage" in text
    assert "split_policy=plan.split_policy(model)" in text
    assert "plan.sum_tied_gradients(stage)" in text
    assert "SplitPoint" not in text


def test_the_proof_says_how_far_from_optimal() -> None:
    plan = sample_plan()
    lower = replace(plan, status="feasible", lower_bound_ms=plan.objective_ms / 1.031)
    assert "optimal (bound = step)" in render_plan(plan, None)
    assert "feasible, at most 3.1 % from optimal" in render_plan(lower, None)
    assert "given, not searched for" in render_plan(replace(lower, status="scored"), None)
    assert "feasible, without a bound" in render_plan(replace(plan, status="feasible", lower_bound_ms=0.0), None)


def test_memory_is_shown_where_it_is_known_and_a_dash_where_not() -> None:
    plan = sample_plan()
    memory = StageMemory(2**30, 2**30, 2**30, 0, 0, 0)
    first = replace(plan.stages[0], peak_memory_bytes=3 * 2**30 + 2**27, memory=memory)
    rows = render_plan(replace(plan, stages=(first, *plan.stages[1:])), None).splitlines()[3:8]
    assert "  3.1  " in rows[1]
    assert all("–" in row for row in rows[2:])


def test_the_objective_without_a_schedule_is_the_largest_load() -> None:
    plan = sample_plan()
    slower = Baseline(0.0, plan.objective_ms * 2, False, ("layers.1",))
    text = render_plan(replace(plan, schedule=None, step_ms=None, baselines={"equal_layers": slower}), None)
    assert "optimal (bound = largest load)" in text
    assert "largest load 241 ms" in text
    assert "equal layers 482 ms (+100 %), does not fit" in text
    assert "bubble" not in text


def test_one_stage_without_work() -> None:
    text = render_plan(make_plan_value([StageTimes(0, 0, 0, 0)], 1, [["a"]]), None)
    assert "1 microbatch of 1 · step 0 ms" in text
    assert "one stage: nothing to split" in text


def test_control_characters_never_reach_the_terminal() -> None:
    plan = make_plan_value([StageTimes(1, 1, 1, 0)] * 2, 2, [["a\x1b[2J"], ["b\x07\u202e"]])
    plan = replace(plan, model=replace(plan.model, file=None, name="x\x1b]0;y\x07"), why_not="z\x1bz")
    text = render_plan(plan, None, limit_line="l\x1bl")
    assert not any(character in text for character in "\x1b\x07\u202e")


def test_long_names_keep_their_numbers_and_their_end() -> None:
    assert shorten("model.decoder.layers.11.self_attn.q_proj", 18) == "m.d.l.11.s.q_proj"
    assert shorten("layers.2", 10) == "layers.2"
    assert len(shorten("a" * 50, 10)) == 10
