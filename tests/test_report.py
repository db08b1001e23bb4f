"""The report: on the terminal, as drawings, and as a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from planner.files.measurement_file import Measurement
from planner.files.plan_file import Baseline, CurvePoint, Cut, Plan, PlannedModel, StageMemory
from planner.files.profile_file import Machine
from planner.scheduling.simulation import StageTimes, critical_path, simulate
from runner.comparing import compare
from runner.reporting.charts import balance_chart, loss_chart, memory_chart, microbatch_chart, steps_chart
from runner.reporting.gantt import Lane, gantt_chart
from runner.reporting.page import render_html
from runner.reporting.terminal import computing_words, render_report
from tests.sample_values import make_measurement_value, make_plan_value, sample_measurement, sample_plan

GOLDEN = """\
Stage 0 limits the step: 13.9 ms per microbatch, 0.15 ms (1.1 %) above the mean and level with the
next; the stages are even within 2 %, so there is nothing to gain from other cuts.

transformer.py · 4 stages, gpipe, 16 microbatches of 1 · Intel Xeon Platinum 8481C

  ms per microbatch, medians; the error is that of a stage's share of the work
                         forward                     backward                     peak MiB
  stage  begins at     predicted  measured   error  predicted  measured   error  predicted  measured
  0      …_embeddings       4.21      4.62  −0.4 %       8.40      9.31  +0.6 %          –     600.0
  1      layers.2           4.19      4.66  +1.0 %       8.44      9.22  −0.8 %          –     600.0
  2      layers.4           4.22      4.63  −0.4 %       8.41      9.30  +0.4 %          –     600.0
  3      layers.6           4.05      4.41  −1.1 %       8.12      8.97  +0.3 %          –     600.0

  step        predicted 241 ms · from measured stages 266 ms (+10 %) · ideal 222 ms
  bubble      predicted 16.5 % · measured 16.7 %
  balance     predicted 1.01 · measured 1.01 (largest ÷ mean load)
  instead     equal layers 299 ms (+24 %) · equal parameters 340 ms (+41 %) · torchgpipe 248 ms
              (+3.0 %) · accelerate the same cuts (predicted)
  speed-up    1.22 × over equal layers, measured in 15 pairs (95 % interval 1.20 to 1.25); predicted
              1.24 ×; steps simulated from measured stage times
  check       3 steps beside the unsplit model, largest differences: loss 2.4e-07, gradient 3.1e-06,
              parameter 1.2e-06 (layers.3.linear1.weight)
  loss        6.93 at step 0 → 3.93 at step 16; bigram model 4.62
  scale       measured ÷ predicted 1.102 (all stages, taken off the errors above; raw they are
              +8.9 % to +11 %); drift of the machine +1.2 %
  clock       thread CPU time, step simulated from measured stage times because 4 workers share 2
              cores"""

EVIL = "<script>alert(1)</script>"
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Tags(HTMLParser):
    """Keeps the open tags and complains about one that is closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember an opened tag."""
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """The tag that is closed is the one that was opened last."""
        assert self.open.pop() == tag


def page(plan: Plan, measurement: Measurement) -> str:
    """The page, after checks that hold for every page."""
    html = render_html(compare(plan, measurement), plan, measurement)
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert not tags.open
    assert "script" not in tags.seen
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", html.replace('xmlns="http:', ""))
    assert not re.search(r"\b(?:src|href|@import|url\()", html)
    assert "nan" not in re.findall(r'(?:x|y|width|height|points|cx|cy)="([^"]*)"', html)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    return html


def test_the_sample_report_reads_as_designed() -> None:
    plan = sample_plan()
    assert render_report(compare(plan, sample_measurement(plan))) == GOLDEN


def test_terminal_memory_and_wall_clock() -> None:
    plan = sample_plan()
    measurement = replace(sample_measurement(plan), step_clock="wall", drift=None, check=None, speed_up=None)
    text = render_report(compare(plan, measurement), width=120)
    assert "measured 266 ms" in text
    simulated_ms = compare(plan, measurement).measured.step_ms
    assert computing_words(compare(plan, measurement)).startswith(
        f"the measured stages alone make a step of {simulated_ms:.0f} ms ("
    )
    slow = replace(measurement, step_ms=replace(measurement.step_ms, measured=simulated_ms * 1.25))
    assert f"; {simulated_ms / 4:.1f} ms, 20.0 % of the step, passes outside them" in computing_words(
        compare(plan, slow)
    )
    quick = replace(measurement, step_ms=replace(measurement.step_ms, measured=simulated_ms * 0.9))
    assert "outside" not in computing_words(compare(plan, quick))
    assert computing_words(compare(plan, sample_measurement(plan))) == ""
    assert "drift of the machine not measured" in " ".join(text.split())
    assert "check" not in text
    assert "speed-up" not in text
    assert max(len(line) for line in render_report(compare(plan, measurement), width=80).splitlines()) <= 80


def test_the_page_shows_every_section() -> None:
    plan = sample_plan()
    html = page(plan, sample_measurement(plan))
    for heading in ("Stages", "Balance", "One step", "Memory, microbatches, loss", "Cuts", "Proof", "To copy"):
        assert f">{heading}</h2>" in html
    text = html.replace("\xa0", " ")
    for words in ("Stage 0 limits the step", "1.22 ×", "equal parameters", "bigram model 4.62", "5f2c9a77d1e04b38"):
        assert words in text
    assert "&#34;layers.2&#34;: SplitPoint.BEGINNING" in html
    assert "because 4 workers share 2 cores" in text


def test_the_page_of_a_plan_that_is_no_plain_chain() -> None:
    plan = sample_plan(tied=True)
    html = page(plan, sample_measurement(plan))
    assert "split_policy=plan.split_policy(model)" in html
    assert "plan.sum_tied_gradients(stage)" in html
    assert "SplitPoint" not in html


def test_everything_that_comes_from_a_file_is_escaped() -> None:
    plan = sample_plan()
    evil = [f"{EVIL}{stage.index}" for stage in plan.stages]
    stages = tuple(
        replace(s, names=(name, *s.names[1:]), nodes=(name, *s.nodes[1:]))
        for s, name in zip(plan.stages, evil, strict=True)
    )
    plan = replace(
        plan,
        model=PlannedModel(f"{EVIL}.py", EVIL, EVIL, entry=EVIL),
        solver=replace(plan.solver, name=EVIL),
        why_not=EVIL,
        split_specification=dict.fromkeys(evil[1:], "beginning"),
        cuts=tuple(Cut(name, (EVIL,), 8) for name in evil[1:]),
        stages=stages,
        baselines={EVIL: Baseline(300.0, 300.0, False, (EVIL,))},
        machine=Machine("cpu", EVIL, 2, {EVIL: EVIL}),
    )
    measurement = sample_measurement(plan)
    assert measurement.check is not None
    assert measurement.speed_up is not None
    measurement = replace(
        measurement,
        name=EVIL,
        machine=replace(measurement.machine, device_name=EVIL, versions={EVIL: EVIL}),
        check=replace(measurement.check, worst_parameter=EVIL),
        speed_up=replace(measurement.speed_up, against=EVIL),
        reference_loss_name=EVIL,
    )
    for changed in (plan, replace(plan, split_specification=None, plain_chain=False)):
        html = page(changed, measurement)
        assert EVIL not in html
        assert "&lt;script&gt;" in html


def task_boxes(svg: str) -> list[tuple[str, dict[str, str]]]:
    """The rectangles of tasks: what hovering says of stage, task and times, and the attributes."""
    rects = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    tasks = [rect for rect in rects if rect.attrib["class"].startswith("task ")]
    return [(str(rect.findtext(f"{SVG}title")).removesuffix(", on the critical path"), rect.attrib) for rect in tasks]


def test_gantt_has_a_rectangle_per_task_and_one_scale() -> None:
    fast = simulate([StageTimes(1, 2, 2, 0.5)] * 2, 3)
    slow = simulate([StageTimes(1, 2, 2, 0.5), StageTimes(2, 4, 4, 0.5)], 3)
    lanes = [Lane("predicted", fast.tasks, critical_path(fast)), Lane("measured", slow.tasks, critical_path(slow))]
    boxes = task_boxes(gantt_chart(lanes, 2))
    assert len(boxes) == len(fast.tasks) + len(slow.tasks) == 2 * 2 * 7
    critical = [box for _, box in boxes if "critical" in box["class"].split()]
    assert len(critical) == len(critical_path(fast)) + len(critical_path(slow))
    for number in range(3):
        title = f"stage 0, forward of microbatch {number}: {number}.00 to {number + 1}.00 ms (1.00 ms)"
        places = [(box["x"], box["width"]) for said, box in boxes if said == title]
        assert len(places) == 2
        assert places[0] == places[1]
    starts = [float(box["x"]) for said, box in boxes if said.startswith("stage 0, forward")]
    per_ms = starts[1] - starts[0]
    ends = [float(box["x"]) + float(box["width"]) for _, box in boxes]
    assert max(ends) - min(starts) == pytest.approx(slow.step_ms * per_ms, abs=0.5)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 1), (1, 64), (2, 3), (16, 64)])
def test_pages_of_every_size(num_stages: int, num_microbatches: int) -> None:
    times = [StageTimes(1 + k % 3, 2 + k % 2, 2, 0.5) for k in range(num_stages)]
    names = [[f"blocks.{k}.attention.projection"] for k in range(num_stages)]
    plan = make_plan_value(times, num_microbatches, names)
    html = page(plan, make_measurement_value(plan, times, losses=(1.0,)))
    assert html.count('class="task ') == 2 * num_stages * (2 * num_microbatches + 1)
    render_report(compare(plan, make_measurement_value(plan, times)))


def test_a_page_of_nothing() -> None:
    nothing = [StageTimes(0, 0, 0, 0)] * 2
    plan = replace(make_plan_value(nothing, 1, [["a"], ["b"]]), machine=None, microbatch_curve=(), baselines={})
    measurement = make_measurement_value(plan, nothing, losses=(), peak_memory_bytes=None)
    unknown = [replace(s, measured=replace(s.measured, wait_ms=None, bubble_fraction=None)) for s in measurement.stages]
    html = page(plan, replace(measurement, stages=tuple(unknown), drift=None))
    assert "neither predicted nor measured" in html
    assert "<polyline" not in html


def test_charts_without_values_are_left_out() -> None:
    plan = sample_plan()
    report = compare(plan, make_measurement_value(plan, [StageTimes(1, 2, 2, 0)] * 4, peak_memory_bytes=None))
    assert memory_chart(report.stages, plan.stages) is None
    assert loss_chart((), 1.0, "x") is None
    assert loss_chart(tuple(replace(r, loss=float("nan")) for r in report.steps), None, "") is None
    assert microbatch_chart((), 4) is None


def test_charts_say_their_values_to_a_screen_reader() -> None:
    plan = sample_plan()
    memory = StageMemory(2**20, 2**20, 2**21, 2**20, 2**20, 0)
    plan = replace(plan, stages=tuple(replace(s, memory=memory, peak_memory_bytes=6 * 2**20) for s in plan.stages))
    report = compare(plan, sample_measurement(plan))
    charts = {
        "stage 3 13.4 ms": balance_chart(report.stages, report.scale),
        "equal layers 299 ms": steps_chart(report),
        "stage 0 predicted 6.0 MiB, measured 600 MiB": memory_chart(report.stages, plan.stages),
        "16: 241 ms; chosen 16": microbatch_chart(plan.microbatch_curve, 16),
        "Loss from 6.93 at step 0 to 3.93 at step 16": loss_chart(report.steps, None, ""),
    }
    for words, svg in charts.items():
        assert svg is not None
        root = ElementTree.fromstring(svg)
        assert root.attrib["role"] == "img"
        assert words in root.attrib["aria-label"]


def test_curves_mark_the_chosen_count_and_cope_with_one_point() -> None:
    svg = microbatch_chart((CurvePoint(4, 4, 12.0, "optimal"),), 4)
    assert svg is not None
    assert svg.count('class="chosen"') == 1
