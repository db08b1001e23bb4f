"""Weights that come from safetensors: one file, a folder, or the index of a sharded checkpoint.

Only headers are read until a tensor is asked for, so that each rank reads its own stage and nothing else.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from planner.errors import FileError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Which file holds which key, with the shape of each tensor."""

    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def open(path: Path) -> WeightFiles:
        """The keys of a `.safetensors` file, of a folder of them, or of a sharded index. Raises FileError."""
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file, expected in _shards(path).items():
            found = _header(file)
            if missing := [key for key in expected or () if key not in found]:
                raise FileError(
                    f"{file.name} has no {missing[0]}", f"{path} says that it is there", "get the file again"
                )
            files.update(dict.fromkeys(found, file))
            shapes.update(found)
        return WeightFiles(path, files, shapes)

    def read(self, key: str) -> torch.Tensor:
        """The tensor under `key`, in the file's own dtype. Raises FileError where the file is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.files[key]), framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(key)
                return tensor
        except (OSError, SafetensorError) as error:
            raise FileError(f"cannot read {key} from {self.files[key]}: {error}", "", "get the file again") from error

    def keys_for(self, wanted: Mapping[str, Sequence[int]], names: Mapping[str, str]) -> dict[str, str]:
        """For every canonical name of `wanted` (name → shape) the key that holds it, under any of its `names`.

        `names` maps every name of a tensor to its canonical one. Raises FileError, naming the key, where one is
        missing or has another shape.
        """
        under: dict[str, list[str]] = {}
        for name, canonical in names.items():
            under.setdefault(canonical, []).append(name)
        found = {}
        for canonical, shape in wanted.items():
            key = next((name for name in [canonical, *under.get(canonical, ())] if name in self.shapes), None)
            if key is None:
                raise self._missing(canonical)
            if tuple(self.shapes[key]) != tuple(shape):
                raise FileError(
                    f"{key} is {list(self.shapes[key])} in {self.path}, and {list(shape)} in the model",
                    "every tensor has the shape that the model gives it",
                    "give the weights of this model, or build the model that they belong to",
                )
            found[canonical] = key
        return found

    def not_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """The keys that the model does not know."""
        return tuple(sorted(set(self.shapes) - set(names)))

    def _missing(self, name: str) -> FileError:
        ending = [key for key in self.shapes if name.endswith(f".{key}") or key.endswith(f".{name}")]
        near = ending or difflib.get_close_matches(name, self.shapes, n=1)
        there = f"; it has {near[0]}" if near else f"; it has {len(self.shapes)} others"
        return FileError(
            f"{self.path} has no {name}{there}",
            "every parameter and buffer in the model's state_dict() is found under its own name",
            "save the weights from the whole model (state_dict()), or rename the keys",
        )


def _shards(path: Path) -> dict[Path, list[str] | None]:
    """The files to open, each with the keys that an index promises (None without an index)."""
    if path.is_dir() and (path / INDEX).is_file():
        path = path / INDEX
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise FileError(f"{path} holds no .safetensors file", "weights are safetensors", "name the file")
        return dict.fromkeys(found)
    if not path.is_file():
        raise FileError(f"{path} is neither a file nor a folder", "--weights names safetensors", "check the path")
    if path.suffix != ".json":
        return {path: None}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[Path, list[str] | None] = {}
        for key, file in index.items():
            by_file[path.parent / file] = [*(by_file.get(path.parent / file) or ()), key]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = 'an index holds "weight_map", from key to file'
        raise FileError(f"{path} is not an index of safetensors: {error}", rule, "get the file again") from error
    return by_file


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(f"{file} is not safetensors: {error}", "weights are safetensors", "convert the file") from error
