"""Links: the fit through samples, what crossings are charged, the flags, and one real measurement."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cli import main
from planner.errors import FileError, RunError, UsageError
from planner.files.links_file import LinkFit, Links, LinkSample
from planner.files.measurement_file import StageFigures
from planner.files.plan_file import Plan
from planner.files.profile_file import Machine, ModelReference, Profile, SizeProfile, TensorProfile
from planner.machine.link_fit import fit_links
from planner.machine.links import Messages, measure_links, messages_of, spaced_messages
from planner.partitioning.chain_costs import crossing_ms, stage_costs, step_ms
from planner.partitioning.layer_graph import build_layer_graph, chain_of, graph_from_json, graph_to_json
from planner.planning import make_plan, plan_profile
from planner.profiling.attribution import MeasuredRun, attribute
from planner.rendering import links_line, render_plan
from planner.rendering.links_text import describe_links
from planner.request import PlanRequest
from planner.scheduling.simulation import StageTimes, simulate
from runner.comparing import compare
from runner.gathering import build_measurement
from runner.measuring import StepSamples
from runner.reporting.page import render_html
from runner.training import StepResult
from tests.running import command
from tests.sample_values import make_measurement_value
from tests.test_layer_graph import layer

MACHINE = Machine("cpu", "test", 2, {})
FIT = LinkFit(0.4, 0.2, 1e-3, 0.04)


def samples_of(fit: LinkFit, messages: Sequence[tuple[int, int]], factors: Sequence[float]) -> list[LinkSample]:
    """What links of exactly this fit take for messages (tensors, bytes), each times its factor."""
    return [
        LinkSample(0, 1, tensors, size, 0.25 * (ms := fit.crossing_ms(tensors, size) * factor), 0.75 * ms)
        for (tensors, size), factor in zip(messages, factors, strict=True)
    ]


def profile_of(num_layers: int = 4, tensors: tuple[TensorProfile, ...] | None = None, seed: int = 0) -> Profile:
    """A profile with crossings and without memory."""
    source = random.Random(seed)
    layers = tuple(
        replace(
            layer(index),
            forward_ms=source.uniform(0.1, 3),
            backward_ms=(backward := source.uniform(0.1, 5)),
            backward_first_ms=backward,
        )
        for index in range(num_layers)
    )
    if tensors is None:
        tensors = tuple(
            TensorProfile(f"t{i}", i, (source.randint(i + 1, num_layers - 1),), source.randint(1, 4000), 4 * (i % 3))
            for i in range(num_layers - 1)
        )
    size = SizeProfile(1, "f", layers, tensors, (), 0.0)
    return Profile(ModelReference(None, "test"), MACHINE, "fp32", 8, 15, 1.0, 1, (size,))


coefficients = st.floats(0.001, 10.0)


@settings(max_examples=200, deadline=None)
@given(coefficients, coefficients, st.floats(1e-9, 1e-3), st.integers(1, 10**5), st.integers(2, 8))
def test_the_fit_recovers_latencies_and_rate(
    message: float, tensor: float, per_byte: float, least: int, most_tensors: int
) -> None:
    true = LinkFit(message, tensor, per_byte, 0.0)
    kinds = [(count, count * each) for count, each in spaced_messages(least, least * 10**4, most_tensors)]
    fit = fit_links(samples_of(true, kinds, [1.0] * len(kinds)))
    found = (fit.message_ms, fit.tensor_ms, fit.ms_per_byte)
    assert found == pytest.approx((message, tensor, per_byte), rel=1e-4)
    assert fit.residual < 1e-6


@pytest.mark.parametrize("seed", range(30))
def test_noise_is_the_residual_and_small_messages_count_as_much_as_large_ones(seed: int) -> None:
    source = random.Random(seed)
    true = LinkFit(0.05, 0.02, 1e-6, 0.0)
    kinds = [(count, count * each) for count, each in spaced_messages(1000, 10**8, 4)] * 5
    fit = fit_links(samples_of(true, kinds, [source.uniform(0.9, 1.1) for _ in kinds]))
    assert 0.04 < fit.residual < 0.08  # a uniform error of ±10 % has a root mean square of 5.8 %
    for count, size in kinds:
        assert fit.crossing_ms(count, size) == pytest.approx(true.crossing_ms(count, size), rel=0.12)


def test_no_coefficient_is_negative_and_one_number_of_tensors_leaves_the_latency_to_the_message() -> None:
    falling = [LinkSample(0, 1, 1, size, 0.0, ms) for size, ms in ((10, 3.0), (1000, 2.0), (100000, 1.0))]
    fit = fit_links(falling)
    assert fit.ms_per_byte == 0 and fit.message_ms > 0 and fit.tensor_ms == 0
    rising = [LinkSample(0, 1, 2, size, 0.0, 0.5 + size) for size in (1, 2, 3)]
    assert (fit_links(rising).message_ms, fit_links(rising).tensor_ms) == (pytest.approx(0.5), 0.0)
    with pytest.raises(RunError, match="without samples"):
        fit_links([])


def test_one_sample_that_waited_does_not_pull_the_line_down() -> None:
    messages = [(count, count * each) for count, each in spaced_messages(1000, 10**6)]
    factors = [1.0] * len(messages)
    factors[3] = 10.0
    fit = fit_links(samples_of(FIT, messages, factors))
    others = [m for m, factor in zip(messages, factors, strict=True) if factor == 1.0]
    assert median(fit.crossing_ms(*m) / FIT.crossing_ms(*m) for m in others) >= 1.0
    assert fit.residual > 0.25 and "a poor fit" in describe_links(fit)


def test_the_slowest_link_is_named() -> None:
    messages = [(1, 1000), (1, 100_000), (2, 1000), (2, 100_000)]
    fast = samples_of(FIT, messages, [1.0] * 4)
    slow = [replace(s, sender=2, receiver=1) for s in samples_of(FIT, messages, [3.0] * 4)]
    fit = fit_links([*fast, *slow])
    assert fit.slowest_sender == 1 and fit.slowest_ratio > 1.5
    plan = replace(plan_profile(profile_of(), PlanRequest(2, microbatches=8)), links=fit)
    assert "slowest 1→2" in links_line(plan)


def test_a_boundary_is_one_message_and_every_tensor_counts() -> None:
    tensors = (TensorProfile("x", 0, (1, 3), 1000, 0), TensorProfile("y", 1, (2,), 200, 100))
    chain = chain_of(build_layer_graph(profile_of(4, tensors).sizes[0], FIT.cost()))
    forward, backward = crossing_ms(chain)
    one, two = FIT.crossing_ms(1, 1000) / 2, FIT.crossing_ms(2, 1200) / 2
    assert forward == pytest.approx([0, one, two, one, 0])
    assert backward == pytest.approx([0, 0, FIT.crossing_ms(1, 100) / 2, 0, 0])  # no gradient bytes, no message
    first, second = stage_costs(chain, [2])
    assert first.forward_ms == pytest.approx(sum(chain.forward_ms[:2]) + two)
    assert second.forward_ms == pytest.approx(sum(chain.forward_ms[2:]) + two)


def with_boundary(profile: Profile, forward_ms: float, backward_ms: float) -> Profile:
    """`profile` where a boundary costs each of its stages that."""
    own = {"boundary_forward_ms": forward_ms, "boundary_backward_ms": backward_ms}
    return replace(profile, sizes=tuple(replace(size, **own) for size in profile.sizes))  # type: ignore[arg-type]


def test_a_boundarys_own_work_is_charged_to_both_its_stages_and_is_no_transfer() -> None:
    profile = profile_of(4, tuple(TensorProfile(f"t{i}", i, (i + 1,), 2000, 1000) for i in range(3)))
    plain, charged = make_plan(profile, 3), make_plan(with_boundary(profile, 0.25, 0.5), 3)
    assert [cut.before for cut in plain.cuts] == [cut.before for cut in charged.cuts]
    for boundaries, before, after in zip((1, 2, 1), plain.stages, charged.stages, strict=True):
        assert after.forward_ms == pytest.approx(before.forward_ms + 0.25 * boundaries)
        assert after.backward_ms == pytest.approx(before.backward_ms + 0.5 * boundaries)
        assert charged.transfers_ms(after.index) == plain.transfers_ms(after.index) == (0, 0)
    assert charged.scheduled_step_ms() > plain.scheduled_step_ms()


def test_a_boundarys_own_work_is_not_attributed_to_layers() -> None:
    profile = with_boundary(
        profile_of(4, tuple(TensorProfile(f"t{i}", i, (i + 1,), 9, 9) for i in range(3))), 0.25, 0.5
    )
    chain = chain_of(build_layer_graph(profile.sizes[0]))
    plan = make_plan(profile, 2)
    stages = tuple(
        StageFigures(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms, None, None, None)
        for s in plan.stages
    )
    cuts = (chain.ids.index(plan.cuts[0].before),)
    attributed = attribute(profile.sizes[0], [MeasuredRun(cuts, stages)])
    for before, after in zip(profile.sizes[0].layers, attributed.size.layers, strict=True):
        assert (after.forward_ms, after.backward_ms) == pytest.approx((before.forward_ms, before.backward_ms))


def test_the_message_survives_the_layer_graph_file(tmp_path: Path) -> None:
    graph = build_layer_graph(with_boundary(profile_of(), 0.25, 0.5).sizes[0], FIT.cost())
    (tmp_path / "g.json").write_text(graph_to_json(graph))
    assert chain_of(graph_from_json(tmp_path / "g.json")) == chain_of(graph)
    assert chain_of(graph).boundary_backward_ms == 0.5
    graph.graph["message_ms"] = -1.0
    (tmp_path / "g.json").write_text(graph_to_json(graph))
    with pytest.raises(FileError, match="message_ms"):
        graph_from_json(tmp_path / "g.json")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("seed", range(20))
def test_with_links_bound_and_step_and_simulation_are_one(seed: int, schedule: Any) -> None:
    source = random.Random(seed)
    fit = LinkFit(source.uniform(0, 2), source.uniform(0, 1), source.uniform(0, 1e-3), 0.0)
    profile = with_boundary(profile_of(source.randint(4, 9), seed=seed), source.uniform(0, 1), source.uniform(0, 1))
    gpus = source.randint(2, 4)
    plan = plan_profile(profile, PlanRequest(gpus, batch_size=8, microbatches=8, schedule=schedule, links=fit))
    chain = chain_of(build_layer_graph(profile.sizes[0], plan.link_cost()))
    best = min(step_ms(chain, cuts, 8, schedule) for cuts in combinations(range(1, len(chain.ids)), gpus - 1))
    assert plan.status == "optimal" and plan.scheduled_step_ms() == pytest.approx(best, rel=1e-6)
    times = [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in plan.stages]
    assert simulate(times, 8, schedule).step_ms == pytest.approx(plan.scheduled_step_ms())
    for stage in plan.stages:
        held = [chain.ids.index(str(node)) for node in stage.nodes]
        computed = sum(chain.forward_ms[index] for index in held)
        computed += ((stage.index > 0) + (stage.index < gpus - 1)) * chain.boundary_forward_ms
        assert stage.forward_ms - plan.transfers_ms(stage.index)[0] == pytest.approx(computed)


def test_a_plan_keeps_its_links_and_shows_them(tmp_path: Path) -> None:
    links = Links(MACHINE, "gloo", 2, 20, tuple(samples_of(FIT, [(1, 10), (2, 100)], [1, 1])), FIT)
    links.save(tmp_path / "links.json")
    assert Links.load(tmp_path / "links.json") == links
    profile = profile_of()
    free, charged = make_plan(profile, 2), make_plan(profile, 2, links=links)
    assert charged.scheduled_step_ms() > free.scheduled_step_ms()
    charged.save(tmp_path / "x.plan.json")
    assert Plan.load(tmp_path / "x.plan.json") == charged and charged.links == FIT
    assert "links: 0.60 ms (0.20 ms per further tensor) + 1 MB/s, residual 4.0 %" in render_plan(charged, None)
    assert "links:" not in render_plan(free, None)
    assert "10 GB/s (given)" in render_plan(make_plan(profile, 2, bandwidth_bytes_per_s=1e10), None)
    with pytest.raises(UsageError, match="links and a bandwidth"):
        make_plan(profile, 2, links=links, bandwidth_bytes_per_s=1e9)
    data = json.loads((tmp_path / "x.plan.json").read_text())
    (tmp_path / "x.plan.json").write_text(json.dumps({**data, "bandwidth_bytes_per_s": 1e9}))
    with pytest.raises(FileError, match="links and bandwidth"):
        Plan.load(tmp_path / "x.plan.json")


def test_a_simulated_step_has_the_sends_and_receives_that_the_plan_charges() -> None:
    profile = profile_of(4, tuple(TensorProfile(f"t{i}", i, (i + 1,), 2000, 1000) for i in range(3)))
    plan = make_plan(profile, 2, microbatches=8, links=Links(MACHINE, "gloo", 2, 20, (), FIT))
    chain = chain_of(build_layer_graph(profile.sizes[0]))
    cuts = (chain.ids.index(plan.cuts[0].before),)
    computed = stage_costs(chain, cuts)

    def result(step: int, times: StageTimes) -> StepResult:
        forward, backward = (times.forward_ms,) * 8, (times.backward_ms,) * 8
        return StepResult(
            step, 1.0, 1.0, 0.1, 9.0, StepSamples(step, forward, backward, times.optimizer_ms, 9, 9), None
        )

    results = [[result(step, times) for step in range(2)] for times in computed]
    found = build_measurement(plan, results, MACHINE, "thread-cpu", None, None, None, rehearsed=True)
    assert found.step_ms.measured == pytest.approx(plan.scheduled_step_ms())
    assert found.step_ms.measured > simulate(computed, 8).step_ms
    for stage in found.stages:
        assert stage.measured.forward_ms == pytest.approx(stage.predicted.forward_ms)
        assert stage.measured.transfer_backward_ms == pytest.approx(FIT.crossing_ms(1, 1000) / 2)
    run = MeasuredRun(cuts, tuple(stage.measured for stage in found.stages))
    attributed = attribute(profile.sizes[0], [run])
    for before, after in zip(profile.sizes[0].layers, attributed.size.layers, strict=True):
        assert after.forward_ms == pytest.approx(before.forward_ms)
        assert after.backward_ms == pytest.approx(before.backward_ms)


def test_the_report_has_the_links_in_one_line() -> None:
    plan = make_plan(profile_of(), 2, links=Links(MACHINE, "gloo", 2, 20, (), FIT))
    times = [StageTimes(s.forward_ms, s.backward_ms, s.backward_first_ms, s.optimizer_ms) for s in plan.stages]
    measurement = make_measurement_value(plan, times)
    page = render_html(compare(plan, measurement), plan, measurement).replace("\u00a0", " ")
    assert "0.60 ms (0.20 ms per further tensor) + 1 MB/s, residual 4.0 %" in page


def test_messages_span_what_crosses_the_cuts() -> None:
    tensors = (TensorProfile("x", 0, (1, 3), 64_000, 32_000), TensorProfile("y", 1, (2,), 16_000, 0))
    messages = messages_of(profile_of(4, tensors))
    assert (min(messages.num_bytes), max(messages.num_bytes)) == (5_000, 80_000)
    assert len(messages.num_bytes) == 6 and messages.num_tensors == (1, 2)
    ratios = [b / a for a, b in zip(messages.num_bytes, messages.num_bytes[1:], strict=False)]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--links", "good.json", "--bandwidth", "1GB/s"], "--links and --bandwidth"),
        (["--links", "good.json", "-o", "good.json"], "may not overwrite"),
        (["--measure-links", "--bandwidth", "1GB/s"], "--measure-links and --bandwidth"),
        (["--links", "good.json", "--measure-links"], "--links and --measure-links"),
        (["--links", "none.json"], "none.json does not exist"),
        (["--links", "bad.json"], "ms_per_byte is -1"),
        (["--links", "cut.json"], "not complete JSON"),
        (["--links", "cuda.json"], "links of cuda, and a profile of cpu"),
        (["--measure-links", "--gpus", "1"], "--gpus 1"),
    ],
)
def test_wrong_flags_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    profile_of().save(tmp_path / "x.profile.json")
    links = Links(MACHINE, "gloo", 2, 20, (), FIT)
    links.save(tmp_path / "good.json")
    replace(links, machine=replace(MACHINE, device="cuda")).save(tmp_path / "cuda.json")
    text = (tmp_path / "good.json").read_text()
    (tmp_path / "bad.json").write_text(text.replace("0.001", "-1"))
    (tmp_path / "cut.json").write_text(text[:-30])
    code = main(["--gpus", "2", "--profile", "x.profile.json", "--microbatches", "8", *arguments])
    shown = capsys.readouterr().err
    assert (code, expected in shown) == (2, True), shown
    assert "Traceback" not in shown
    assert not (tmp_path / "x.plan.json").exists()


def test_links_from_a_file_enter_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    profile_of().save(tmp_path / "x.profile.json")
    Links(MACHINE, "gloo", 2, 20, (), FIT).save(tmp_path / "l.json")
    assert main(["--gpus", "2", "--profile", "x.profile.json", "--microbatches", "8", "--links", "l.json"]) == 0
    assert "links: 0.60 ms" in capsys.readouterr().out
    assert Plan.load("x.plan.json").links == FIT


def test_one_worker_has_no_link() -> None:
    with pytest.raises(UsageError, match="links of 1 worker"):
        measure_links(1, spaced_messages(1000, 2000))


def test_real_workers_are_measured_both_ways() -> None:
    links = measure_links(2, Messages((4096, 2**20), (1, 3)), device="cpu", rounds=5)
    assert (links.backend, links.num_workers, links.num_rounds) == ("gloo", 2, 5)
    kinds = {(s.sender, s.receiver, s.num_tensors) for s in links.samples}
    assert kinds == {(0, 1, 1), (0, 1, 3), (1, 0, 1), (1, 0, 3)} and len(links.samples) == 8
    assert all(sample.send_ms > 0 and sample.receive_ms > 0 for sample in links.samples)
    assert links.fit == fit_links(links.samples)


@pytest.mark.slow
def test_plan_measures_the_links_that_it_charges(tmp_path: Path) -> None:
    profile_of().save(tmp_path / "x.profile.json")
    arguments = ["--gpus", 2, "--profile", "x.profile.json", "--microbatches", 8, "--measure-links"]
    ended = command(*arguments, module="planner", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "links: " in ended.stdout and "residual" in ended.stdout
    assert Plan.load(tmp_path / "x.plan.json").links == Links.load(tmp_path / "x.links.json").fit


def test_without_torchrun_the_module_says_how_it_is_started(tmp_path: Path) -> None:
    ended = command("-o", "l.json", module="planner.machine.links", cwd=tmp_path)
    assert ended.returncode == 2 and "torchrun --nproc-per-node" in ended.stderr
    assert "Traceback" not in ended.stderr
