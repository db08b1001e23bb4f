"""plan-report: a plan, a profile or a measurement alone; two files beside each other; what cannot be shown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from planner.errors import FileError, UsageError
from planner.files.profile_file import LayerProfile, SizeProfile, TensorProfile, TiedProfile
from planner.scheduling.simulation import StageTimes
from runner.report_cli import main, render
from tests.sample_values import (
    MIB,
    layer_names,
    make_plan_value,
    sample_measurement,
    sample_plan,
    sample_profile,
)


def two_sizes():
    """The sample profile with a second size, tensors and a tied parameter."""
    profile = sample_profile()
    small = profile.sizes[0]
    layers = tuple(replace(layer, forward_ms=2 * layer.forward_ms, optimizer_ms=0.25) for layer in small.layers)
    tensors = (TensorProfile("h", 0, (1,), 3 * MIB, 3 * MIB), TensorProfile("skip", 0, (5,), MIB, 0))
    tied = (TiedProfile("head.weight", (0, 40), 2 * MIB, 0.75),)
    return replace(profile, sizes=(replace(small, drift=0.011), SizeProfile(2, "other", layers, tensors, tied, 0.02)))


@pytest.fixture
def files(tmp_path):
    plan = sample_plan()
    slow = StageTimes(8.0, 16.0, 16.0, 1.0)
    fast = StageTimes(4.0, 8.0, 8.0, 1.0)
    names = layer_names()
    other = make_plan_value([slow, fast], 16, [names[0] + names[1], names[2] + names[3]])
    measurement = sample_measurement(plan)
    plan.save(tmp_path / "plan.json")
    other.save(tmp_path / "other.json")
    two_sizes().save(tmp_path / "profile.json")
    replace(two_sizes(), sizes=two_sizes().sizes[1:]).save(tmp_path / "profile2.json")
    measurement.save(tmp_path / "measurement.json")
    replace(measurement, step_ms=replace(measurement.step_ms, measured=133.0)).save(tmp_path / "measurement2.json")
    return tmp_path


def lines(folder, *names):
    return render([folder / name for name in names], "text").splitlines()


def row(shown, start):
    return next(line.split() for line in shown if line.split()[: len(start.split())] == start.split())


def test_a_profile_shows_its_layers_its_sizes_and_its_machine(files):
    shown = lines(files, "profile.json")
    text = "\n".join(shown)
    assert "8 layers of TransformerDecoderLayer" in text and "Intel Xeon Platinum 8481C, fp32" in text
    assert "profiled in 6.1 s (15 rounds, 2 copies at once) for batches of 16" in text and "torch 2.13.0+cpu" in text
    assert row(shown, "1 41") == ["1", "41", "16.81", "32.80", "4.10", "0.2", "%", "1.1", "%"]
    assert row(shown, "2 41") == ["2", "41", "33.62", "32.80", "11.00", "0.1", "%", "2.0", "%"]
    assert "layers at microbatches of 2" in text
    first = "tok_embeddings Linear 0.820 0.010 0.800 0.010 0.250 1.0 MiB 4.0 MiB"
    assert row(shown, "tok_embeddings") == first.split()
    assert sum(" Linear " in line for line in shown) == 41
    assert "tied: head.weight (2.0 MiB) in tok_embeddings, layers.6.part17" in text


def test_a_measurement_is_shown_without_its_plan(files):
    shown = lines(files, "measurement.json")
    assert shown[0] == "transformer · 4 stages, gpipe, 16 microbatches of 1 · Intel Xeon Platinum 8481C"
    assert row(shown, "0 4.21")[:5] == ["0", "4.21", "4.62", "8.40", "9.31"]
    text = "\n".join(shown)
    assert "step        predicted 241 ms · from measured stages 266 ms (+10 %)" in text
    assert "beside the unsplit model" in text and "1.22 × over equal layers" in text and "6.93 at step 0" in text
    assert max(map(len, shown)) <= 100


def test_two_plans_stand_side_by_side(files):
    shown = lines(files, "plan.json", "other.json")
    step, other = sample_plan().step_ms, 16 * 24 + 12 - 8 + 8 + 1
    assert row(shown, "stages")[1:] == ["4", "2", "differs"]
    assert row(shown, "step")[1:5] == [f"{step:.0f}", "ms", "397", "ms"] and other == 397
    assert row(shown, "step")[-2] == f"+{(397 / step - 1) * 100:.0f}"
    assert row(shown, "1 layers.2") == ["1", "layers.2", "12.63", "layers.4", "12.00", "−5.0", "%"]
    assert row(shown, "3 layers.6")[-3:] == ["–", "–", "–"]


def test_two_profiles_and_two_measurements_are_compared(files):
    shown = lines(files, "profile.json", "profile2.json")
    assert row(shown, "forward,") == ["forward,", "microbatches", "of", "2", "33.6", "ms", "33.6", "ms", "±0.0", "%"]
    shown = lines(files, "measurement.json", "measurement2.json")
    assert row(shown, "step measured")[2:] == ["266", "ms", "133", "ms", "−50", "%"]
    assert row(shown, "stage 3 forward")[3] == "4.41"


def test_a_plan_is_shown_with_its_profile(files):
    shown = "\n".join(lines(files, "profile.json", "plan.json"))
    assert "40 legal cuts" in shown and "limited by stage" in shown


def test_json_is_the_file_itself(files):
    for name in ("plan.json", "profile.json", "measurement.json"):
        assert json.loads(render([files / name], "json")) == json.loads((files / name).read_text())


@pytest.mark.parametrize(
    ("names", "kind", "expected"),
    [
        (["plan.json"], "html", "name both files"),
        (["measurement.json"], "html", "name both files"),
        (["plan.json", "other.json"], "json", "name one file"),
        (["plan.json", "other.json", "profile.json"], "text", "name one file"),
        (["profile.json", "measurement.json"], "text", "nothing to be held against"),
    ],
)
def test_what_cannot_be_shown_is_refused(files, names, kind, expected):
    with pytest.raises(UsageError) as caught:
        render([files / name for name in names], kind)
    assert expected in str(caught.value)


def test_a_plan_of_another_profile_is_refused(files):
    profile = two_sizes()
    replace(profile, sizes=tuple(replace(s, fingerprint="x") for s in profile.sizes)).save(files / "profile.json")
    with pytest.raises(UsageError, match="not made from this profile"):
        render([files / "profile.json", files / "plan.json"], "text")


@pytest.mark.parametrize("text", ['{"schema": "evenstage/layer-graph/1"}', "[" * 100_000, "[]", "{}", "\udce4"])
def test_other_files_are_refused(tmp_path, capsys, text):
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main([str(tmp_path / "x.json")]) == 2
    assert "x.json" in capsys.readouterr().err


def test_names_from_files_cannot_write_to_the_terminal(tmp_path):
    evil = "\x1b[31mx"
    profile = sample_profile()
    layer = LayerProfile(evil, evil, evil, 0, 1.0, 0.1, 1.0, 0.1, 1.0, 0.1, 8, (), True)
    size = SizeProfile(1, evil, (layer,), (), (TiedProfile(evil, (0,), 8, 0.1),), 0.0)
    model = replace(profile.model, name=evil, file=f"{evil}.py", layer_type=evil)
    machine = replace(profile.machine, device_name=evil, versions={evil: evil})
    replace(profile, model=model, machine=machine, sizes=(size,)).save(tmp_path / "p.json")
    measurement = sample_measurement(sample_plan())
    replace(measurement, name=evil, machine=machine).save(tmp_path / "m.json")
    for names in (["p.json"], ["m.json"], ["p.json", "p.json"], ["m.json", "m.json"]):
        assert "\x1b" not in render([Path(tmp_path, name) for name in names], "text")


def test_a_missing_file_is_one_error(tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        render([tmp_path / "none.json"], "text")


@pytest.mark.parametrize("text", ["[1]", '{"schema": "evenstage/pl', "[" * 100_000, '"x"'])
def test_what_is_no_file_of_ours_is_one_error_with_a_remedy(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FileError) as caught:
        render([tmp_path / "x.json"], "text")
    assert "x.json" in caught.value.got and caught.value.rule and caught.value.remedy
    assert "object has no attribute" not in caught.value.got


def test_a_report_does_not_overwrite_what_it_is_made_from(tmp_path, capsys):
    file = tmp_path / "x.plan.json"
    sample_plan().save(file)
    before = file.read_text()
    assert main([str(file), "-o", str(tmp_path / "." / "x.plan.json")]) == 2
    assert file.read_text() == before and "may not overwrite" in capsys.readouterr().err
