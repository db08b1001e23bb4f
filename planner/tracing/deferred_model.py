"""A model file → the model in fake tensors, which can be traced without memory, and its weights by name.

What the trace sees are fake tensors that say they are on the CPU, so that its graph, and with it the fingerprint, is
that of the ordinary model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from planner.errors import TraceError, UsageError
from planner.tracing.deferred_init import DeferredInit
from planner.tracing.init_replay import NeedsDrawsError
from planner.tracing.loading import ModelSource, build


@dataclass(frozen=True, slots=True)
class DeferredModel:
    """`model` is all fake; `originals` are its tensors as they were built (deferred or small and real), by every name.

    `record` makes their values, `seed` and `source` are what it was built from.
    """

    model: nn.Module
    originals: dict[str, torch.Tensor]
    record: DeferredInit
    source: ModelSource
    seed: int

    def values(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The real tensors of `names`, bit by bit as an ordinary build with the same seed makes them.

        Raises KeyError for an unknown name, UsageError for one whose values the build itself did not give.
        """
        wanted = list(dict.fromkeys(names))
        if not wanted:
            return {}
        if unknown := [name for name in wanted if isinstance(self.originals[name], FakeTensor)]:
            raise UsageError(
                f"{self.source.entry}() builds {unknown[0]} as a fake tensor of its own, which has no values",
                "a weight that is trained starts from the model's initialisation or from a file",
                "give --weights FILE, or let build_model build an ordinary model and plan with --meta",
            )
        try:
            found = self.record.values([self.originals[name] for name in wanted])
        except NeedsDrawsError:
            again = build_deferred(self.source, self.seed, draws=True, meta_is_real=self.record.meta_is_real)
            return again.values(wanted)
        return dict(zip(wanted, found, strict=True))


def build_deferred(source: ModelSource, seed: int, *, draws: bool, meta_is_real: bool = False) -> DeferredModel:
    """The model of `source` by the seed rule, without memory for its large tensors.

    `draws` says whether values will be asked for. A model that build_model leaves on the meta device gets the values
    that it would have on the CPU (`meta_is_real`). Raises ModelFileError, or TraceError for an initialisation that
    cannot be recorded.
    """
    record = DeferredInit(draws=draws, meta_is_real=meta_is_real)
    try:
        with record:
            model = build(source, seed)
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, NeedsDrawsError) and not draws:
            return build_deferred(source, seed, draws=True, meta_is_real=meta_is_real)
        if isinstance(cause, TraceError):
            raise cause from None
        raise
    tensors = [*model.parameters(), *model.buffers()]
    if not meta_is_real and any(tensor.is_meta and not record.holds(tensor) for tensor in tensors):
        return build_deferred(source, seed, draws=draws, meta_is_real=True)
    return DeferredModel(model, _take_out(model), record, source, seed)


def build_either(
    source: ModelSource, seed: int, *, meta: bool, draws: bool = False
) -> tuple[nn.Module, DeferredModel | None]:
    """The model with its memory, and None; or a deferred one: with `meta`, or where build_model itself takes none."""
    if not meta:
        model = build(source, seed)
        if not builds_without_memory(model):
            return model, None
    deferred = build_deferred(source, seed, draws=draws)
    return deferred.model, deferred


def builds_without_memory(model: nn.Module) -> bool:
    """Whether `build_model` itself gave meta or fake tensors."""
    return any(t.is_meta or isinstance(t, FakeTensor) for t in [*model.parameters(), *model.buffers()])


def _take_out(model: nn.Module) -> dict[str, torch.Tensor]:
    """Replace every tensor of `model` by a fake one, ties kept; what was there, by every name."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = list(model.named_modules(remove_duplicate=False))
    found = [
        (f"{path}.{name}" if path else name, tensor, put)
        for path, module in modules
        for name, tensor, put in _tensors_of(module)
    ]
    fakes: dict[int, torch.Tensor] = {}
    for _, tensor, put in found:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = _fake(mode, tensor)
        put(fakes[id(tensor)])
    return {name: tensor for name, tensor, _ in found}


def _tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor, Callable[[Any], None]]]:
    """(name, tensor, what replaces it) of the parameters, buffers and plain tensor attributes of `module` itself."""
    found: list[tuple[str, torch.Tensor, Callable[[Any], None]]] = []
    for entries in (module._parameters, module._buffers, vars(module)):
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                found.append((name, value, lambda new, name=name: setattr(module, name, new)))  # type: ignore[misc]
    return found


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor on the CPU of the geometry of `tensor`; a parameter stays one, with its own attributes."""
    with torch.no_grad():
        shape = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        fake: torch.Tensor = FakeTensor(mode, shape, torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, tensor.requires_grad)
        fake.__dict__.update({key: value for key, value in vars(tensor).items() if key not in vars(fake)})
    return fake
