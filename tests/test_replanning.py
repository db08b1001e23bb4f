"""From measurements to a better plan: sums hold, equal layers stay equal, and no round loses what one had before."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest

from benchmarks.replanning import improve, make_case, measure, true_step_ms
from planner.cli import main
from planner.errors import FileError
from planner.files.measurement_file import StageFigures
from planner.files.plan_file import Plan
from planner.planning import plan_profile
from planner.profiling.attribution import MeasuredRun, attribute, corrected_costs, stage_rows
from planner.replanning import replan


def figures(layers, scale=1.0):
    """What a stage of `layers` takes, all times `scale`."""
    fields = ("forward_ms", "backward_ms", "backward_first_ms", "optimizer_ms")
    times = [scale * sum(getattr(layer, field) for layer in layers) for field in fields]
    return StageFigures(*times, None, None, None)


def run_of(layers, cuts, scale=1.0):
    bounds = [0, *cuts, len(layers)]
    stages = (figures(layers[start:stop], scale) for start, stop in zip(bounds, bounds[1:], strict=False))
    return MeasuredRun(tuple(cuts), tuple(stages))


def falsified(seed, num_stages=4):
    """A profile, the layers in truth, and cuts."""
    case = make_case(seed)
    size = case.profile.sizes[0]
    source = random.Random(seed)
    factors = {layer.structure: source.uniform(0.7, 1.3) for layer in size.layers}
    truth = tuple(
        dataclasses.replace(
            layer,
            forward_ms=layer.forward_ms * factors[layer.structure],
            backward_ms=layer.backward_ms / factors[layer.structure],
        )
        for layer in size.layers
    )
    return size, truth, sorted(source.sample(range(1, len(truth)), num_stages - 1))


@pytest.mark.parametrize("seed", range(20))
def test_the_newest_sums_hold_and_costs_stay_positive(seed):
    size, truth, cuts = falsified(seed)
    older = run_of(truth, [1, 3, 5], scale=1.2)
    found = attribute(size, [older, run_of(truth, cuts)]).size.layers
    rows = stage_rows(cuts, len(truth))
    for field in ("forward_ms", "backward_ms", "backward_first_ms", "optimizer_ms"):
        costs = np.array([getattr(layer, field) for layer in found])
        assert (costs > 0).all()
        assert rows @ costs == pytest.approx(rows @ [getattr(layer, field) for layer in truth], rel=1e-5)


def test_a_right_profile_stays_and_a_slower_machine_slows_every_layer_alike():
    size, _, cuts = falsified(1)
    for scale in (1.0, 1.7):
        found = attribute(size, [run_of(size.layers, cuts, scale)]).size.layers
        for before, after in zip(size.layers, found, strict=True):
            assert after.forward_ms == pytest.approx(scale * before.forward_ms)
            assert after.backward_ms == pytest.approx(scale * before.backward_ms)


def test_what_the_sums_decide_is_found():
    """Three structures, three stages with different shares of them: only one answer."""
    structures = ["a", "a", "b", "a", "b", "b", "c"]
    costs, factors = np.ones(7), {"a": 1.3, "b": 0.7, "c": 1.1}
    truth = np.array([factors[name] for name in structures])
    rows = stage_rows([3, 6], 7)
    found = corrected_costs(costs, np.zeros(7), structures, rows, rows @ truth, np.zeros(3))
    assert found == pytest.approx(truth, rel=0.05)


def test_what_one_layer_shows_holds_for_its_equals():
    structures = ["a", "b", "b", "b"]
    rows = stage_rows([2], 4)
    found = corrected_costs(np.ones(4), np.zeros(4), structures, rows, np.array([2.0, 3.0]), np.zeros(2))
    assert found[1:] == pytest.approx([1.5] * 3, rel=0.08) and found[0] == pytest.approx(0.5, rel=0.2)


def test_the_error_goes_where_the_profile_was_unsure():
    rows, spreads = stage_rows([2], 3), np.array([0.5, 0.0, 0.0])
    found = corrected_costs(np.ones(3), spreads, ["a", "b", "c"], rows, np.array([2.6, 1.0]), np.zeros(2))
    assert found[:2].sum() == pytest.approx(2.6) and found[0] > found[1] + 0.05


def test_drift_between_runs_is_taken_off():
    size, truth, cuts = falsified(3)
    newest = run_of(truth, cuts)
    same, slower = (attribute(size, [run_of(truth, [1, 3, 5], s), newest]).size.layers for s in (1.0, 1.4))
    for one, other in zip(same, slower, strict=True):
        assert one.forward_ms == pytest.approx(other.forward_ms)


def test_an_older_run_tells_what_the_newest_does_not():
    structures = ["a", "b", "c", "d"]
    truth = np.array([1.3, 0.7, 0.8, 1.2])
    newest, older = stage_rows([2], 4), stage_rows([1], 4)
    alone = corrected_costs(np.ones(4), np.zeros(4), structures, newest, newest @ truth, np.zeros(2))
    rows = np.vstack([older, newest])
    both = corrected_costs(np.ones(4), np.zeros(4), structures, rows, rows @ truth, np.array([1e-3, 1e-3, 0, 0]))
    assert abs(both[0] - 1.3) < 0.01 < abs(alone[0] - 1.3)


def test_a_stage_for_which_nothing_was_profiled_is_left_out():
    costs = np.array([1.0, 0.0])
    found = corrected_costs(costs, np.zeros(2), ["a", "b"], stage_rows([1], 2), np.array([2.0, 1.0]), np.zeros(2))
    assert found == pytest.approx([2.0, 0.0])


@pytest.mark.parametrize("equal", [True, False])
def test_two_rounds_end_near_the_optimum_and_never_worse(equal):
    outcomes = [improve(make_case(seed, equal=equal)) for seed in range(15)]
    assert sum(outcome.ratios[0] > 1.01 for outcome in outcomes) >= 4  # else there was nothing to win
    assert sum(outcome.after(2) <= 1.01 for outcome in outcomes) >= 14
    for outcome in outcomes:
        assert all(later <= earlier for earlier, later in zip(outcome.ratios, outcome.ratios[1:], strict=False))


def test_cuts_stay_where_no_others_are_better():
    case = make_case(0, error=0.0)
    plan = plan_profile(case.profile, case.request)
    again = replan(case.profile, [measure(case, plan, 0.0, random.Random(0))], case.request)
    assert again.kept == 1 and again.plan.cuts == plan.cuts
    assert again.before_ms == pytest.approx(true_step_ms(case, plan))


def test_the_best_measured_cuts_are_kept_not_the_newest():
    case = make_case(0, error=0.0)
    best = plan_profile(case.profile, case.request)
    nodes = [node for stage in best.stages for node in stage.nodes]
    bounds = [0, *(nodes.index(cut.before) - 2 for cut in best.cuts), len(nodes)]
    parts = [tuple(nodes[a:b]) for a, b in itertools.pairwise(bounds)]
    worse = dataclasses.replace(
        best,
        cuts=tuple(dataclasses.replace(c, before=str(part[0])) for c, part in zip(best.cuts, parts[1:], strict=True)),
        stages=tuple(
            dataclasses.replace(s, nodes=part, names=part) for s, part in zip(best.stages, parts, strict=True)
        ),
        split_specification=None,
        plain_chain=False,
        why_not="moved by hand",
    )
    runs = [measure(case, plan, 0.0, random.Random(0)) for plan in (best, worse)]
    again = replan(case.profile, runs, case.request)
    assert again.kept == 1 and again.plan.cuts == best.cuts and again.before_ms > again.plan.step_ms


def test_cuts_stay_for_less_than_a_thousandth_and_are_not_called_optimal():
    """Five nearly equal layers in two stages: 2 + 3 and 3 + 2 differ by less than is worth a change, 1 + 4 by more."""
    case = make_case(0)
    size = case.profile.sizes[0]
    costs = {"forward_ms": 1.0, "backward_ms": 2.0, "backward_first_ms": 2.0, "optimizer_ms": 0.0}
    layers = tuple(dataclasses.replace(layer, **costs) for layer in size.layers[:5])
    layers = (dataclasses.replace(layers[0], forward_ms=1.0001), *layers[1:])
    profile = dataclasses.replace(case.profile, sizes=(dataclasses.replace(size, layers=layers),))
    request = dataclasses.replace(case.request, gpus=2)
    best = plan_profile(profile, request)
    (cut,) = (int(cut.before) for cut in best.cuts)
    kept = plan_profile(profile, request, keep=(5 - cut,))
    assert [c.before for c in kept.cuts] == [str(5 - cut)] != [c.before for c in best.cuts]
    assert (best.status, kept.status) == ("optimal", "feasible") and kept.lower_bound_ms == pytest.approx(best.step_ms)
    assert plan_profile(profile, request, keep=(1,)).cuts == best.cuts


def test_measurements_of_something_else_are_refused():
    case = make_case(0)
    run = measure(case, plan_profile(case.profile, case.request), 0.0, random.Random(0))
    for wrong, text in (
        ({"plan": "another"}, "with fingerprint another"),
        ({"cuts": ()}, "does not say where it was cut"),
        ({"cuts": ("nowhere",) * len(run.cuts)}, "does not say where it was cut"),
    ):
        with pytest.raises(FileError, match=text):
            replan(case.profile, [dataclasses.replace(run, **wrong)], case.request)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A profile and a measurement of its plan, as files of the current directory."""
    monkeypatch.chdir(tmp_path)
    case = make_case(1)
    plan = plan_profile(case.profile, case.request)
    case.profile.save(tmp_path / "simulated.profile.json")
    measure(case, plan, 0.0, random.Random(0)).save(tmp_path / "measurement.json")
    return case, plan


def test_the_command_shows_the_attribution_and_writes_a_plan(measured, tmp_path, capsys):
    case, plan = measured
    assert main(["--from-measurement", "measurement.json"]) == 0
    text = capsys.readouterr().out
    assert "attributed" in text and text.rstrip().endswith("wrote simulated.replanned.plan.json")
    again = Plan.load(tmp_path / "simulated.replanned.plan.json")
    assert again.num_stages == plan.num_stages and again.cuts != plan.cuts
    assert true_step_ms(case, again) < true_step_ms(case, plan)


def test_the_command_says_what_it_lacks(measured, tmp_path, capsys):
    assert main(["model.py", "--from-measurement", "measurement.json"]) == 2
    assert "--from-measurement and a model file" in capsys.readouterr().err
    (tmp_path / "simulated.profile.json").unlink()
    assert main(["--from-measurement", "measurement.json"]) == 2
    assert "no profile in simulated.profile.json" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["measurement.json", "simulated.profile.json", ""])
def test_the_new_plan_overwrites_nothing_that_it_is_made_from(measured, tmp_path, capsys, target):
    kept = {file: (tmp_path / file).read_text() for file in ("measurement.json", "simulated.profile.json")}
    assert main(["--from-measurement", "measurement.json", "-o", target]) == 2
    assert "-o" in capsys.readouterr().err
    assert {file: (tmp_path / file).read_text() for file in kept} == kept


@pytest.mark.parametrize("flags", [["--draw", "x.svg"], ["--granularity", "operation"]])
def test_flags_that_would_do_nothing_are_refused(measured, capsys, flags):
    assert main(["--from-measurement", "measurement.json", *flags]) == 2
    assert f"--from-measurement and {flags[0]}" in capsys.readouterr().err


def test_the_memory_limit_holds_for_the_new_plan_too(measured, capsys):
    """The profile of a simulated case knows no memory, which --memory needs."""
    assert main(["--from-measurement", "measurement.json", "--memory", "1B"]) == 2
    assert "--memory with a profile that knows no memory" in capsys.readouterr().err


def edited(folder, **changes):
    data = json.loads((folder / "measurement.json").read_text())
    (folder / "measurement.json").write_text(json.dumps({**data, **changes}))
    return data


def test_cuts_that_no_run_can_have_had_are_refused(measured, tmp_path, capsys):
    data = edited(tmp_path)
    first = json.loads((tmp_path / "simulated.profile.json").read_text())["sizes"][0]["layers"][0]["id"]
    for cuts in ([*reversed(data["cuts"])], [data["cuts"][0]] * len(data["cuts"]), [first, *data["cuts"][1:]]):
        edited(tmp_path, cuts=cuts)
        assert main(["--from-measurement", "measurement.json"]) == 2
        assert "cuts stand in program order" in capsys.readouterr().err


def test_a_name_from_a_file_does_not_lead_to_another_folder(measured, tmp_path, capsys):
    edited(tmp_path, name="../../simulated")
    assert main(["--from-measurement", "measurement.json"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("wrote simulated.replanned.plan.json")


@pytest.mark.parametrize(("flags", "schedule"), [([], "1f1b"), (["--schedule", "gpipe"], "gpipe")])
def test_the_schedule_is_the_measured_one_where_none_is_asked_for(measured, tmp_path, flags, schedule):
    edited(tmp_path, schedule="1f1b")
    assert main(["--from-measurement", "measurement.json", *flags]) == 0
    assert Plan.load(tmp_path / "simulated.replanned.plan.json").schedule == schedule
