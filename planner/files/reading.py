"""JSON in and out for everything that is exchanged: size, depth, NaN, duplicate keys, schema; atomic writing.

Values are frozen dataclasses. `decode` builds them from JSON by their type hints and says where a value is wrong;
`encode` is its inverse. Nothing that is read is ever executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import secrets
import stat
import tempfile
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from planner.errors import FileError, UsageError

MAX_FILE_BYTES = 256 * 2**20
MAX_DEPTH = 32
MOST = 2**62
LARGEST, LEAST = 1e100, 1e-200  # of numbers with a fraction: squares and quotients of any two do not overflow
WRITE_AGAIN = "write the file again with the command that made it"
WRITE_ANEW = f"{WRITE_AGAIN}, using this version"
T = TypeVar("T")


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """The JSON object in `path`, which must carry `"schema": schema`.

    Raises FileError when the file is missing, too large, truncated, too deeply nested, has a NaN, an infinity or a
    duplicate key, or carries another schema.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FileError(f"{path} has {size:,} bytes", f"at most {MAX_FILE_BYTES:,} are read", "give another file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"{path} does not exist", f"a file of schema {schema} is needed", "check the path") from None
    except UnicodeDecodeError:
        raise FileError(f"{path} is not UTF-8 text", f"a file of schema {schema} is JSON", "check the path") from None
    except OSError as error:
        raise FileError(
            f"cannot read {path}: {error.strerror}", "the file must be readable", "check the path"
        ) from None
    return parse_json(text, schema, str(path))


def parse_json(text: str, schema: str, where: str) -> dict[str, Any]:
    """Like `read_json`, for text that is already at hand; `where` names it in errors."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
    except FileError as error:
        raise FileError(f"{where}: {error.got}", error.rule, error.remedy) from None
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{where} is not complete JSON: {error}", f"a file of schema {schema} is JSON", WRITE_AGAIN
        ) from None
    if not isinstance(value, dict):
        raise FileError(f"{where} holds {type(value).__name__}", f"schema {schema} is a JSON object", WRITE_AGAIN)
    if value.get("schema") != schema:
        got = value.get("schema", "no schema")
        rule = f"this version reads {schema}"
        raise FileError(f"{where} has schema {got!r}", rule, WRITE_ANEW)
    _refuse_deep_nesting(value, where)
    return value


def _refuse_deep_nesting(value: Any, where: str) -> None:
    level, depth = [value], 0
    while level := [item for parent in level for item in _children(parent)]:
        depth += 1
        if depth > MAX_DEPTH:
            got = f"{where} is nested deeper than {MAX_DEPTH} levels"
            raise FileError(got, "no schema here is that deep", WRITE_AGAIN)


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _refuse_constant(name: str) -> float:
    raise FileError(f"the number {name}", "numbers must be finite", "correct the value")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        name = next(n for n in names if names.count(n) > 1)
        raise FileError(f"the key {name!r} stands twice in one object", "keys are unique", "remove one of the two")
    return result


def decode(cls: type[T], data: Any, where: str) -> T:
    """Build the dataclass `cls` from JSON `data`; unknown keys are refused, missing ones take their defaults.

    Whole numbers must be at most 2⁶² in size, others 0 or from 1e-200 to 1e100; fields named as times, sizes and counts
    (`…_ms`, `…_s`, `…_bytes`, `num_…`, `samples`) must not be negative. Texts are UTF-8 without NUL.
    """
    return typing.cast(T, _decode(cls, data, where))


def decode_file(cls: type[T], data: Any, where: str, path: Path | str) -> T:
    """`decode` of what is in the file `path`, which errors name."""
    try:
        return decode(cls, data, where)
    except FileError as error:
        raise FileError(f"{path}: {error.got}", error.rule, error.remedy) from None


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        if data is None and len(options) < len(typing.get_args(kind)):
            return None
        fitting = [option for option in options if isinstance(option, type) and type(data) is option]
        return _decode(fitting[0] if fitting else options[0], data, where)
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), data, where)
    if origin in (dict, Mapping):
        _expect(isinstance(data, dict), data, "an object", where)
        return {str(key): _decode(typing.get_args(kind)[1], value, f"{where}.{key}") for key, value in data.items()}
    if origin is typing.Literal:
        _expect(data in typing.get_args(kind), data, f"one of {', '.join(typing.get_args(kind))}", where)
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), data, where)
    return _decode_scalar(kind, data, where)


def _decode_tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, list), data, "a list", where)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_decode(kinds[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    _expect(len(data) == len(kinds), data, f"a list of {len(kinds)}", where)
    return tuple(
        _decode(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, data, strict=True))
    )


def _decode_dataclass(cls: type, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), data, "an object", where)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields) - {"schema"})
    _expect(not unknown, unknown and unknown[0], f"one of the keys {', '.join(sorted(fields))}", where)
    values = {}
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name in data:
            values[name] = _decode(_hints(cls)[name], data[name], f"{where}.{name}")
            _refuse_negative(name, values[name], f"{where}.{name}")
        elif not optional:
            raise FileError(f"{where} has no {name!r}", f"{cls.__name__} needs it", WRITE_ANEW)
    return cls(**values)


def _refuse_negative(name: str, value: Any, where: str) -> None:
    if name.endswith(("_ms", "_s", "_bytes", "_fraction")) or name.startswith("num_") or name == "samples":
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, (int, float)) and number < 0:
                raise FileError(f"{where} is {number}", "times, sizes and counts are not negative", "correct the value")


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float:
        _expect(isinstance(data, (int, float)) and not isinstance(data, bool), data, "a number", where)
        _expect(isinstance(data, int) or math.isfinite(data), data, "a finite number", where)
        _expect(data == 0 or LEAST <= abs(data) <= LARGEST, data, f"0, or from {LEAST:g} to {LARGEST:g} in size", where)
        return float(data)
    if kind is int:
        _expect(isinstance(data, int) and not isinstance(data, bool), data, "a whole number", where)
        _expect(abs(data) <= MOST, data, f"at most {MOST:,} in size", where)
        return data
    _expect(isinstance(data, kind), data, {str: "a text", bool: "true or false"}.get(kind, str(kind)), where)
    if kind is str:
        _expect("\0" not in data and data.encode(errors="ignore").decode() == data, data, "a text in UTF-8", where)
    return data


def _expect(holds: bool, got: Any, rule: str, where: str) -> None:
    if not holds:
        shown = f"a number of {got.bit_length()} bits" if isinstance(got, int) and abs(got) > MOST else repr(got)
        remedy = f"correct the value, or {WRITE_ANEW}"
        raise FileError(f"{where} is {shown[:80]}", f"it must be {rule}", remedy)


def encode(value: Any) -> Any:
    """JSON-ready form of a dataclass: `decode(type(x), encode(x), …) == x`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def dump_json(value: Any, schema: str) -> str:
    """The text of a file of `schema` that holds the dataclass `value`."""
    return json.dumps({"schema": schema, **encode(value)}, indent=1, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never half of either."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file to write, which takes the place of `path` when the block ends well, and vanishes otherwise.

    Links are followed, and the mode of the old file is kept; a new one gets that of the umask. Raises FileError where
    the disk refuses, or where `path` is a folder or a device.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise FileError(f"cannot write {path}: it is not a file", "a file is written", "give the path of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(6)}.tmp")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            mode = (target if target.exists() else temporary).stat().st_mode
            yield temporary
            os.chmod(temporary, stat.S_IMODE(mode))
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        rule = "the disk must not be full" if full else "it must be a file in a folder that can be written"
        remedy = "free space or give another path" if full else "give another path"
        raise FileError(f"cannot write {path}: {error.strerror}", rule, remedy) from None


def refuse_unwritable(path: Path, what: str, *, folder: bool = False) -> None:
    """Raise UsageError where a later write to the file (or into the `folder`) `path` is bound to fail.

    `what` names it as the person did, e.g. "-o x.json". Nothing is created but a nameless file, for a moment.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_dir() if folder else target.is_file()):
        got = "is a folder" if target.is_dir() else "is a file" if target.is_file() else "is a device"
        raise UsageError(f"{what} {got}", f"it must be a {'folder' if folder else 'file'}", "give another path")
    if target.exists() and not os.access(target, os.W_OK):
        raise UsageError(f"{what} is write-protected", "it must be possible to write it", "give another path")
    existing = target if target.is_dir() else next(parent for parent in target.parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        rule = f"files must be able to be written in {existing}"
        raise UsageError(f"{what} cannot be written: {error.strerror}", rule, "give another path") from None


def refuse_overwriting(path: Path, what: str, sources: Iterable[Path | str], rule: str) -> None:
    """Raise UsageError where `path`, which `what` names as the person did, is one of the files that were read."""
    if path.resolve() in {Path(source).resolve() for source in sources}:
        raise UsageError(what, rule, "name another file")


def relative_to(path: str, folder: Path) -> str:
    """`path` as it is written into a file in `folder`."""
    return os.path.relpath(path, folder.resolve())
