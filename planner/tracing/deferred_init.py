"""A model built without memory for its weights, and later the exact weights of any part of it.

`build_model` runs as it is, but under a dispatch mode: large tensors are made on the meta device, every operation that
makes or writes one is recorded, and random operations are drawn for real on a temporary of the same shape and strides
and thrown away, so that every generator is always where it would be in an ordinary build. The generator's state before
each draw is kept. A weight is then made by repeating, in order, the operations that its storage depends on, each
random one from its kept state: bit by bit what the ordinary build computes, in the memory of what is asked for.
Small tensors (biases, tables of a few numbers) are real from the start, so that code that reads values just works;
reading a value of a large tensor makes that tensor for a moment.

The idea of recording is that of torchdistx's `deferred_init`; this one follows storages instead of tensors (so that
views, `.data = …` and tied tensors need no care) and keeps the generators exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from planner.errors import TraceError
from planner.tracing.init_replay import Constant, Draw, NeedsDrawsError, Operation, StoredView, over, replay

ATEN = torch.ops.aten
SMALL_BYTES = 16 * 1024
DRAWS_IN_PLACE = ("normal_", "uniform_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_")


class _LooksReal(TorchFunctionMode):
    """Deferred tensors say that they are on the CPU: initialisers do nothing on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what asks for the device of a deferred tensor, and move none from the CPU to the CPU."""
        kwargs = kwargs or {}
        if func in PLACES and func(*args, **kwargs) == PLACES[func][0]:
            return PLACES[func][1]
        if func in (torch.Tensor.to, torch.Tensor.cpu) and isinstance(args[0], torch.Tensor):
            return _moved(func, args[0], args[1:], kwargs)
        return func(*args, **kwargs)


META, CPU = torch.device("meta"), torch.device("cpu")
PLACES: dict[Any, tuple[Any, Any]] = {
    torch.Tensor.device.__get__: (META, CPU),
    torch.Tensor.is_meta.__get__: (True, False),  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: (False, True),  # type: ignore[attr-defined]
}


def _moved(func: Any, tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """`tensor.to(…)`, where the CPU and the meta device are the same place."""
    if func is torch.Tensor.cpu:
        return tensor if tensor.device in (META, CPU) else tensor.cpu(*args, **kwargs)
    copy = bool(kwargs.get("copy", False))
    parsed = {key: value for key, value in kwargs.items() if key != "copy"}
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **parsed)
    if device is not None and device.type not in ("cpu", "meta"):
        return tensor.to(*args, **kwargs)
    wanted = {} if memory_format is None else {"memory_format": memory_format}
    return tensor.to(tensor.dtype if dtype is None else dtype, non_blocking=non_blocking, copy=copy, **wanted)


class DeferredInit(TorchDispatchMode):
    """Record what makes large tensors; see the module. `draws` False leaves the generators alone and is quicker.

    >>> with DeferredInit(small_bytes=0) as record:
    ...     weight = torch.empty(2, 3).fill_(7)
    >>> weight.device, record.values([weight])[0].tolist()
    (device(type='meta'), [[7.0, 7.0, 7.0], [7.0, 7.0, 7.0]])
    """

    def __init__(self, *, draws: bool = True, small_bytes: int = SMALL_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws, self.small_bytes = draws, small_bytes
        self.operations: list[Operation] = []
        self.storages: dict[int, Any] = {}
        self.looks_real = _LooksReal()

    def __enter__(self) -> DeferredInit:
        """Record from here on."""
        self.looks_real.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Back to ordinary tensors."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.looks_real.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on real tensors, or record it where a deferred one takes part."""
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, dict(kwargs or {}))

    def _dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        _refuse_device(func, args, kwargs)
        tensors = _tensors((args, kwargs))
        deferred = [tensor for tensor in tensors if tensor.is_meta]
        if not deferred:
            return self._without_deferred(func, args, kwargs, bool(tensors))
        written = _written(func, args, kwargs)
        if func is ATEN._local_scalar_dense.default or any(not tensor.is_meta for tensor in written):
            return self._on_values(func, args, kwargs)
        return self._record(func, args, kwargs, written)

    def _without_deferred(self, func: Any, args: Any, kwargs: dict[str, Any], has_tensors: bool) -> Any:
        """Real tensors stay real; a new tensor is deferred where it is large."""
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        if not has_tensors and _makes_new(func):
            shaped = func(*args, **_on_meta(kwargs))
            if any(tensor.untyped_storage().nbytes() > self.small_bytes for tensor in _tensors(shaped)):
                return self._record(func, args, kwargs, [])
        return func(*args, **kwargs)

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], written: list[torch.Tensor]) -> Any:
        reads = frozenset(self._key(tensor) for tensor in _tensors((args, kwargs)) if tensor.is_meta)
        writes = {self._key(tensor) for tensor in written}
        try:
            made = func(*_to_meta(args), **_on_meta(_to_meta(kwargs)))
        except (NotImplementedError, RuntimeError) as error:
            if written or isinstance(error, torch.OutOfMemoryError):
                raise
            return self._on_values(func, args, kwargs)
        outputs = _tensors(made)
        new = {self._key(tensor) for tensor in outputs} - reads - writes
        if not new and not writes:
            return made
        real_args, real_kwargs = tree_map(self._described, (args, kwargs))
        real_kwargs = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in real_kwargs.items()}
        views = tuple(self._view(t) if isinstance(t, torch.Tensor) else None for t in tree_leaves(made))
        draw = self._draw(func, args, kwargs)
        self.operations.append(Operation(func, real_args, real_kwargs, views, reads, frozenset(new | writes), draw))
        return made

    def _draw(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Draw | None:
        """Advance the generator as the operation will, on temporaries; where it started."""
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return None
        generator = kwargs.get("generator") or torch.default_generator
        if not self.draws:
            return Draw(generator, None)
        state = generator.get_state()
        name = func._schema.name.removeprefix("aten::")
        if name in DRAWS_IN_PLACE or name.endswith("_like"):
            args, kwargs = tree_map(_temporary, (args, kwargs))
        else:
            args, kwargs = self._real((args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        func(*args, **kwargs)
        return Draw(generator, state)

    def _on_values(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run what depends on values on the values themselves; what comes out is real."""
        if any(tensor.is_meta for tensor in _written(func, args, kwargs)):
            raise TraceError(
                f"build_model runs {func}, which has no rule for its shapes",
                "with --meta a weight is written only by operations whose shapes follow from those of their arguments",
                "initialise the weight by another operation, or plan without --meta",
            )
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) and not self.draws:
            raise NeedsDrawsError
        args, kwargs = self._real((args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)

    def _real(self, tree: Any) -> Any:
        deferred = [tensor for tensor in _tensors(tree) if tensor.is_meta]
        found = dict(zip(map(id, deferred), self.values(deferred), strict=True))
        return tree_map(lambda leaf: found.get(id(leaf), leaf), tree)

    def _key(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage._cdata, storage)  # held, so that its number is not given to another
        return int(storage._cdata)

    def _view(self, tensor: torch.Tensor) -> StoredView:
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            raise TraceError(
                f"build_model makes a {tensor.layout} tensor of shape {tuple(tensor.shape)}, maybe conjugated",
                "with --meta weights are plain strided tensors",
                "plan without --meta",
            )
        key = self._key(tensor)
        return StoredView(key, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def _described(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_meta:
            return self._view(leaf)
        small = leaf.untyped_storage().nbytes() <= max(self.small_bytes, SMALL_BYTES)
        return Constant(leaf.detach().clone(), None) if small else Constant(leaf.detach(), leaf._version)

    def values(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The real tensors that an ordinary build would have made for `tensors`; aliases among them stay aliases.

        Real tensors come back as they are. Raises NeedsDrawsError where a random one was not drawn.
        """
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            views = [self._view(tensor) if tensor.is_meta else None for tensor in tensors]
            storages = replay(self.operations, {view.storage for view in views if view is not None})
            return [
                tensor.detach() if view is None else over(storages[view.storage], view)
                for tensor, view in zip(tensors, views, strict=True)
            ]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _temporary(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.is_meta:
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype)
    return leaf


def _to_meta(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, tree)


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` for the meta device, which knows no generators."""
    moved = {key: torch.device("meta") if key == "device" else value for key, value in kwargs.items()}
    return {key: value for key, value in moved.items() if key != "generator"}


def _makes_new(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[index] if index < len(args) else kwargs.get(argument.name))
    return found


def _refuse_device(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    for leaf in tree_leaves((args, kwargs)):
        device = leaf.device if isinstance(leaf, torch.Tensor) else leaf
        if isinstance(device, torch.device) and device.type not in ("cpu", "meta"):
            raise TraceError(
                f"build_model runs {func} on {device}",
                "with --meta a model is built on the CPU or the meta device; the runner moves each stage to its own",
                "leave the device out of build_model",
            )
