"""Files that are exchanged: round trips, and one clear error for each way to be wrong."""

import dataclasses
import json
import os
from dataclasses import dataclass

import pytest

from planner.errors import FileError
from planner.files.measurement_file import Measurement
from planner.files.profile_file import SizeMemory, TensorProfile, TiedProfile
from planner.files.reading import decode, dump_json, encode, parse_json, write_text
from tests.sample_values import sample_measurement, sample_plan, sample_profile

SCHEMA = "evenstage/test/1"


@dataclass(frozen=True, slots=True)
class Inner:
    name: str
    forward_ms: float


@dataclass(frozen=True, slots=True)
class Outer:
    num_things: int
    inner: tuple[Inner, ...]
    table: dict[str, Inner]
    maybe: float | None = None


VALUE = Outer(2, (Inner("a", 1.5), Inner("b", 0.0)), {"x": Inner("c", 2.0)})


def test_round_trip():
    data = parse_json(dump_json(VALUE, SCHEMA), SCHEMA, "test")
    assert decode(Outer, data, "test") == VALUE


def changed(**changes):
    return {**encode(VALUE), **changes}


@pytest.mark.parametrize(
    ("data", "where", "got"),
    [
        (changed(num_things=-1), "test.num_things", "-1"),
        (changed(num_things=True), "test.num_things", "True"),
        (changed(num_things=1.5), "test.num_things", "1.5"),
        (changed(inner={}), "test.inner", "{}"),
        (changed(inner=[{"name": "a"}]), "test.inner[0]", "forward_ms"),
        (changed(inner=[{"name": "a", "forward_ms": -2.0}]), "test.inner[0].forward_ms", "-2.0"),
        (changed(inner=[{"name": 3, "forward_ms": 2.0}]), "test.inner[0].name", "3"),
        (changed(unknown=1), "test", "unknown"),
        (changed(num_things=10**400), "test.num_things", "1329 bits"),
        (changed(maybe=10**400), "test.maybe", "1329 bits"),
        (changed(maybe=1e308), "test.maybe", "1e+308"),
        (changed(maybe=1e-320), "test.maybe", "e-320"),
        (changed(inner=[{"name": "a\0b", "forward_ms": 2.0}]), "test.inner[0].name", "a"),
        (changed(inner=[{"name": "\ud800", "forward_ms": 2.0}]), "test.inner[0].name", "ud800"),
        (changed(maybe="x"), "test.maybe", "x"),
        ([], "test", "[]"),
    ],
)
def test_wrong_values_are_named_with_their_place(data, where, got):
    with pytest.raises(FileError) as caught:
        decode(Outer, data, "test")
    assert where in caught.value.got and got in caught.value.got and caught.value.rule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"schema": "evenstage/test/1", "x": NaN}', "NaN"),
        ('{"schema": "evenstage/test/1", "x": Infinity}', "Infinity"),
        ('{"schema": "evenstage/test/1", "x": 1, "x": 2}', "twice"),
        ('{"schema": "evenstage/test/1", "x": [1, 2', "not complete JSON"),
        ("", "not complete JSON"),
        ("[]", "holds list"),
        ('{"schema": "evenstage/other/9"}', "evenstage/other/9"),
        ("{}", "no schema"),
        ('{"schema": "evenstage/test/1", "x": ' + "[" * 40 + "]" * 40 + "}", "nested deeper"),
        ('{"schema": "evenstage/test/1", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", ""),
    ],
)
def test_wrong_text_is_one_clear_error(text, expected):
    with pytest.raises(FileError) as caught:
        parse_json(text, SCHEMA, "some.json")
    assert expected in str(caught.value) and "some.json" in str(caught.value)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    write_text(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.json"]


def test_plan_files_never_run_code(tmp_path):
    path = tmp_path / "x.plan.json"
    path.write_bytes(b"\x80\x04cos\nsystem\n.")
    from planner import Plan

    with pytest.raises(FileError):
        Plan.load(path)
    path.write_text(json.dumps({"schema": "evenstage/plan/1", "__class__": "os.system"}))
    with pytest.raises(FileError, match="__class__"):
        Plan.load(path)


def rejected_profile(**changes):
    """What is said of a sample profile with these changes."""
    with pytest.raises(FileError) as caught:
        dataclasses.replace(sample_profile(), **changes)
    assert caught.value.rule and caught.value.remedy
    return caught.value.got


def test_a_profile_that_cannot_be_is_refused():
    assert "0 microbatch sizes" in rejected_profile(sizes=())
    assert "batches of 0" in rejected_profile(batch_size=0)
    assert "batches of 4,000,000,000" in rejected_profile(batch_size=4 * 10**9)
    assert "-1 copies" in rejected_profile(concurrent_copies=-1)
    assert "repeat" in rejected_profile(repeats=(-9.0,))


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        (lambda size: {"microbatch_size": 0}, "microbatches of 0"),
        (lambda size: {"layers": ()}, "without layers"),
        (lambda size: {"layers": (size.layers[0], *size.layers[:-1])}, "two layers of one id"),
        (lambda size: {"drift": -5.0}, "drift"),
        (lambda size: {"periods": (-3.0, 0.0)}, "drift"),
        (lambda size: {"tied": (TiedProfile("w", (0, 99), 4, 0.1),)}, "'w' names a layer"),
        (lambda size: {"tied": (TiedProfile("w", (), 4, 0.1),)}, "'w' names a layer"),
        (lambda size: {"tensors": (TensorProfile("x", 0, (99,), 4, 4),)}, "'x' names a layer"),
        (lambda size: {"dependencies": ((2, 1),)}, "dependency of layer 1 on 2"),
        (
            lambda size: {
                "memory": SizeMemory((), (), 0, 0, False),
                "layers": (dataclasses.replace(size.layers[0], memory=None), *size.layers[1:]),
            },
            "a layer without memory",
        ),
    ],
)
def test_measurements_of_a_size_that_cannot_be_are_refused(changes, got):
    size = sample_profile().sizes[0]
    with pytest.raises(FileError) as caught:
        dataclasses.replace(size, **changes(size))
    assert got in caught.value.got and caught.value.rule and caught.value.remedy


@pytest.mark.parametrize(
    ("edit", "got"),
    [
        (lambda data: data["step_ms"].update(measured=-1.0), "a step of -1.0 ms"),
        (lambda data: data.update(scale=-1.0), "a scale of -1.0"),
        (lambda data: data.update(num_microbatches=0), "0 microbatches"),
        (lambda data: data["stages"][0].update(samples=-3), "samples is -3"),
        (lambda data: data["stages"][0]["measured"].update(bubble_fraction=-1.0), "bubble_fraction is -1.0"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused_and_its_file_named(tmp_path, edit, got):
    file = tmp_path / "m.json"
    sample_measurement(sample_plan()).save(file)
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))
    with pytest.raises(FileError) as caught:
        Measurement.load(file)
    assert got in caught.value.got and str(file) in caught.value.got and caught.value.rule and caught.value.remedy
