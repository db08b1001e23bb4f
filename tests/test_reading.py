"""Files that are exchanged: round trips, and one clear error for each way to be wrong."""

import json
import os
from dataclasses import dataclass

import pytest

from planner.errors import FileError
from planner.files.reading import decode, dump_json, encode, parse_json, write_text

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
