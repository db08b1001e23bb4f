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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from planner.errors import TraceError
from planner.tracing.init_replay import (
    Constant,
    Draw,
    NeedsDrawsError,
    Operation,
    StoredView,
    digest,
    over,
    reach_bytes,
    replay,
)

ATEN = torch.ops.aten
SMALL_BYTES = 16 * 1024
DRAWS_IN_PLACE = ("normal_", "uniform_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_")


DRAWS_NEW = {ATEN.rand.default: ATEN.rand.out, ATEN.randn.default: ATEN.randn.out}
META, CPU = torch.device("meta"), torch.device("cpu")
PLACES: dict[Any, Any] = {
    torch.Tensor.device.__get__: CPU,
    torch.Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}
MOVES = (torch.Tensor.to, torch.Tensor.cpu)
READS = (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__)


class _LooksReal(TorchFunctionMode):
    """Deferred tensors say that they are on the CPU: initialisers do nothing on the meta device."""

    def __init__(self, record: DeferredInit) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what asks for the device of a deferred tensor, and move none from the CPU to the CPU."""
        kwargs = kwargs or {}
        if func not in PLACES and func not in MOVES and func not in READS:
            with self.record.asked_for_meta("device" in kwargs and _is_meta(kwargs["device"])):
                return func(*args, **kwargs)
        if not self.record.holds(args[0]):
            return func(*args, **kwargs)
        if func in PLACES:
            return PLACES[func]
        if func in READS:
            return func(*self.record.values([args[0]]), *args[1:], **kwargs)
        return self._moved(func, args[0], args[1:], kwargs)

    def _moved(self, func: Any, tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """`tensor.to(…)`, of a deferred tensor, which says that it is on the CPU and does not move there."""
        if func is torch.Tensor.cpu:
            return tensor
        copy = bool(kwargs.get("copy", False))
        parsed = {key: value for key, value in kwargs.items() if key != "copy"}
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **parsed)
        if device is not None and device.type == "meta" and not self.record.meta_is_real:
            with self.record.asked_for_meta(True):
                return torch.empty_like(tensor, dtype=dtype, device=META)
        if device is not None and device.type not in ("cpu", "meta"):
            return tensor.to(*args, **kwargs)
        wanted = {} if memory_format is None else {"memory_format": memory_format}
        return tensor.to(tensor.dtype if dtype is None else dtype, non_blocking=non_blocking, copy=copy, **wanted)


class DeferredInit(TorchDispatchMode):
    """Record what makes large tensors; see the module. `draws` False leaves the generators alone and is quicker.

    What the user's code itself puts on the meta device is no tensor of ours and has no values, as in an ordinary
    build, unless `meta_is_real`: then the meta device is taken for the CPU.

    >>> with DeferredInit(small_bytes=0) as record:
    ...     weight = torch.empty(2, 3).fill_(7)
    >>> weight.device, record.values([weight])[0].tolist()
    (device(type='meta'), [[7.0, 7.0, 7.0], [7.0, 7.0, 7.0]])
    """

    def __init__(self, *, draws: bool = True, meta_is_real: bool = False, small_bytes: int = SMALL_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws, self.meta_is_real, self.small_bytes = draws, meta_is_real, small_bytes
        self.operations: list[Operation] = []
        self.storages: dict[int, Any] = {}
        self.looks_real = _LooksReal(self)
        self.users_meta = False
        self.scratch: torch.UntypedStorage | None = None

    def __enter__(self) -> DeferredInit:
        """Record from here on."""
        self.looks_real.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Back to ordinary tensors."""
        self.scratch = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.looks_real.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on real tensors, or record it where a deferred one takes part."""
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, dict(kwargs or {}))

    def _dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        _refuse_device(func, args, kwargs)
        if kwargs.get("device") == META:
            if self.users_meta:
                return func(*_to_meta(args), **_on_meta(kwargs))
            kwargs["device"] = CPU
        tensors = _tensors((args, kwargs))
        if not any(self.holds(tensor) for tensor in tensors):
            return self._without_deferred(func, args, kwargs, tensors)
        if any(tensor.is_meta and not self.holds(tensor) for tensor in tensors):
            raise TraceError(
                f"build_model runs {func} on tensors of which some are on the meta device",
                "values are not there to be read",
                "build the model on one device",
            )
        written = _written(func, args, kwargs)
        if func is ATEN._local_scalar_dense.default or any(not tensor.is_meta for tensor in written):
            return self._on_values(func, args, kwargs)
        return self._record(func, args, kwargs, written)

    @contextmanager
    def asked_for_meta(self, asked: bool) -> Iterator[None]:
        """Whether the user's code names the meta device. Torch itself does, too: as that of a deferred tensor."""
        before, self.users_meta = self.users_meta, asked and not self.meta_is_real
        try:
            yield
        finally:
            self.users_meta = before

    def holds(self, tensor: Any) -> bool:
        """Whether `tensor` is deferred: it has no memory, and its values are known from the record."""
        with torch._C.DisableTorchFunction():
            if not isinstance(tensor, torch.Tensor) or not tensor.is_meta or isinstance(tensor, FakeTensor):
                return False
            return tensor.untyped_storage()._cdata in self.storages

    def _without_deferred(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        """Real tensors stay real; a new tensor is deferred where it is large."""
        if _makes_new(func, kwargs) and all(tensor.is_meta for tensor in tensors):
            shaped = func(*args, **_on_meta(kwargs))
            if any(tensor.untyped_storage().nbytes() > self.small_bytes for tensor in _tensors(shaped)):
                return self._record(func, args, kwargs, [])
        return func(*args, **kwargs)

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], written: list[torch.Tensor]) -> Any:
        reads = frozenset(self._key(tensor) for tensor in _tensors((args, kwargs)) if self.holds(tensor))
        writes = {self._key(tensor) for tensor in written}
        try:
            made = func(*_to_meta(args), **_on_meta(_to_meta(kwargs)))
        except RuntimeError as error:
            if written and not isinstance(error, NotImplementedError):
                raise
            return self._on_values(func, args, kwargs)
        outputs = _tensors(made)
        new = {self._key(tensor) for tensor in outputs} - reads - writes
        if not new and not writes:
            return made
        real_args, real_kwargs = tree_map(self._described, (args, kwargs))
        views = tuple(self._view(t) if isinstance(t, torch.Tensor) else None for t in tree_leaves(made))
        draw = self._draw(func, args, kwargs, made)
        self.operations.append(Operation(func, real_args, real_kwargs, views, reads, frozenset(new | writes), draw))
        return made

    def _draw(self, func: Any, args: Any, kwargs: dict[str, Any], made: Any) -> Draw | None:
        """Advance the generator as the operation will, on a temporary; where it started."""
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return None
        generator = kwargs.get("generator") or torch.default_generator
        if not self.draws:
            return Draw(generator, None)
        state = generator.get_state()
        name = func._schema.name.removeprefix("aten::")
        if func in DRAWS_NEW:
            DRAWS_NEW[func](*args, out=self._scratch(made))
        elif name in DRAWS_IN_PLACE:
            func(*tree_map(self._scratch, args), **kwargs)
        else:
            args, kwargs = self._real((args, kwargs))
            func(*args, **kwargs)
        return Draw(generator, state)

    def _scratch(self, leaf: Any) -> Any:
        """A real tensor like the deferred one `leaf`, over memory that all draws share: a heap of holes would grow."""
        if not self.holds(leaf):
            return leaf
        view = self._view(leaf)
        if self.scratch is None or self.scratch.nbytes() < reach_bytes(view):
            self.scratch = None
            self.scratch = torch.empty(reach_bytes(view), dtype=torch.uint8).untyped_storage()
        return over(self.scratch, view)

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
        return func(*args, **kwargs)

    def _real(self, tree: Any) -> Any:
        deferred = [tensor for tensor in _tensors(tree) if self.holds(tensor)]
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
        if self.holds(leaf):
            return self._view(leaf)
        if leaf.is_meta:
            return Constant(leaf, None)
        small = leaf.untyped_storage().nbytes() <= max(self.small_bytes, SMALL_BYTES)
        return Constant(leaf.detach().clone(), None) if small else Constant(leaf, digest(leaf))

    def values(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The real tensors that an ordinary build would have made for `tensors`; aliases among them stay aliases.

        Real tensors come back as they are. Raises NeedsDrawsError where a random one was not drawn.
        """
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            views = [self._view(tensor) if self.holds(tensor) else None for tensor in tensors]
            storages = replay(self.operations, {view.storage for view in views if view is not None})
            return [
                tensor.detach() if view is None else over(storages[view.storage], view)
                for tensor, view in zip(tensors, views, strict=True)
            ]


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _to_meta(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, tree)


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` for the meta device, which knows no generators."""
    on_meta = {"device": META, "generator": None}
    return {key: on_meta.get(key, value) for key, value in kwargs.items()}


def _makes_new(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `func` makes a tensor of its own: from sizes, or as large as one on the meta device, but on the CPU."""
    name = func._schema.name
    like = name.endswith("_like") or name.startswith("aten::new_")
    reads = any("Tensor" in str(argument.type) for argument in func._schema.arguments)
    device = any(argument.name == "device" for argument in func._schema.arguments)
    return device and (not reads or (like and kwargs.get("device") == CPU))


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
