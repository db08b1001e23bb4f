"""What a stage starts training with: the unsplit model's own initialisation, or weights from safetensors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from planner.errors import TraceError
from planner.tracing.deferred_model import DeferredModel
from runner.weight_files import WeightFiles


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Where the values of a model's tensors come from: `keys` of `files` by canonical name, `deferred`, or the model.

    `names` maps every name of a tensor to its canonical one.
    """

    names: Mapping[str, str]
    deferred: DeferredModel | None
    files: WeightFiles | None
    keys: Mapping[str, str]

    def give(self, module: nn.Module) -> None:
        """Give every parameter and buffer of `module` (a stage, or the model) its first value."""
        entries = list(_entries(module))
        self._load(entries)
        missing = [entry for entry in entries if isinstance(entry.tensor, FakeTensor)]
        if self.deferred is None or not missing:
            return
        real = self._values({self._canonical(entry.name): entry.tensor for entry in missing})
        made: dict[str, torch.Tensor] = {}
        for entry in missing:
            canonical = self._canonical(entry.name)
            if canonical not in made:
                made[canonical] = self._like(canonical, entry.tensor, real.pop(canonical))
            entry.put(made[canonical])

    def _like(self, canonical: str, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """`real` as a parameter where `fake` is one, with the attributes that the user's code put on it."""
        if not isinstance(fake, nn.Parameter):
            return real
        assert self.deferred is not None
        parameter = nn.Parameter(real, fake.requires_grad)
        original = self.deferred.originals.get(canonical)
        if original is not None and not isinstance(original, FakeTensor):
            vars(parameter).update(vars(original))
        return parameter

    def value(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The first value of a tensor that no stage uses."""
        canonical = self._canonical(name)
        if canonical in self.keys or isinstance(tensor, FakeTensor):
            return self._values({canonical: tensor})[canonical]
        return tensor

    def _canonical(self, name: str) -> str:
        return self.names.get(name, name)

    def _values(self, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Real tensors by canonical name, from the files where they have them, else from the initialisation."""
        found = {n: self._read(n).to(t.dtype, copy=True) for n, t in wanted.items() if n in self.keys}
        rest = [name for name in wanted if name not in found]
        if rest:
            assert self.deferred is not None
            if unknown := [name for name in rest if name not in self.deferred.originals]:
                raise TraceError(
                    f"the trace holds {unknown[0]}, a tensor that is neither parameter, buffer nor attribute",
                    "with --meta the values of every tensor of the model are known by name",
                    "register it as a buffer: self.register_buffer(name, tensor)",
                )
            found.update(self.deferred.values(rest))
        return found

    def _read(self, canonical: str) -> torch.Tensor:
        assert self.files is not None
        return self.files.read(self.keys[canonical])

    @torch.no_grad()
    def _load(self, entries: list[_Entry]) -> None:
        """Overwrite real tensors, in place, with what the files have."""
        for entry in entries:
            if not isinstance(entry.tensor, FakeTensor) and self._canonical(entry.name) in self.keys:
                entry.tensor.copy_(self._read(self._canonical(entry.name)))


def initial_weights(
    model: nn.Module, names: Mapping[str, str], deferred: DeferredModel | None, files: WeightFiles | None
) -> InitialWeights:
    """For `model`, every key of whose state_dict() must be in `files`. Raises FileError, naming the key, if not."""
    keys = {} if files is None else files.keys_for(_wanted(model, names), names)
    return InitialWeights(names, deferred, files, keys)


def say_unused(files: WeightFiles, model: nn.Module) -> None:
    """Say on stderr which keys of the files the model does not have."""
    if unused := files.not_in(model.state_dict()):
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        print(f"{files.path}: {unused[0]}{more} not in the model, left out", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    tensor: torch.Tensor
    put: Callable[[torch.Tensor], None]


def _entries(module: nn.Module) -> Iterator[_Entry]:
    """Every parameter, buffer and plain tensor attribute, under each of its names."""
    for path, part in module.named_modules(remove_duplicate=False):
        for kept in (part._parameters, part._buffers, vars(part)):
            for name, tensor in list(kept.items()):
                if isinstance(tensor, torch.Tensor):
                    full = f"{path}.{name}" if path else name
                    yield _Entry(full, tensor, functools.partial(setattr, part, name))


def _wanted(model: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    state: dict[str, torch.Tensor] = model.state_dict()
    return {names.get(name, name): tuple(tensor.shape) for name, tensor in state.items()}
