"""Custom `torch.autograd.Function`s kept whole in a trace, so that training calls the user's own backward; no hooks.

`torch.export` records the operations of a Function's forward and forgets its backward: a gradient reversal trains as
the identity. While a model is exported, `keep_functions` therefore puts one opaque operation in the place of every
`Function.apply`; `restore_functions` then makes each a call of the Function itself. See docs/decisions/0008.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from planner.errors import TraceError

APPLY_OWNER: Any = torch.autograd.function._SingleLevelFunction  # what every Function.apply ends in, bound early or not
REGISTER_HOOK: Any = torch.Tensor.register_hook
OWN_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """One call of `function.apply`: called with its tensors, everything else as it was when the model was traced.

    `random` names the random operations of its forward, `shared` the tensors whose storage is in its outputs too.
    """

    function: Any
    in_spec: TreeSpec
    constants: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    where: str
    random: tuple[str, ...] = ()
    shared: tuple[int, ...] = ()

    @property
    def __name__(self) -> str:  # fx names the node after it
        return f"{self.function.__name__}_apply"

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors among the Function's outputs, in order; its own backward belongs to them."""
        return tuple(leaf for leaf in tree_leaves(self.outputs(tensors)) if isinstance(leaf, torch.Tensor))

    def outputs(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What `apply` returns for `tensors`."""
        given, constants = iter(tensors), iter(self.constants)
        leaves = [next(given) if tensor else next(constants) for tensor in self.is_tensor]
        args, kwargs = tree_unflatten(leaves, self.in_spec)
        return self.function.apply(*args, **kwargs)

    def on(self, device: torch.device) -> FunctionCall:
        """The same call with every device among its constants replaced."""
        constants = tree_map(lambda c: device if isinstance(c, torch.device) else c, self.constants)
        return replace(self, constants=constants)

    def __str__(self) -> str:
        """Equal in every process: constants that have no value of their own are named by their type."""
        plain = (int, float, complex, str, bytes, bool, type(None), torch.dtype)
        shown = [repr(c) if isinstance(c, plain) else type(c).__name__ for c in self.constants]
        return f"{self.function.__module__.rpartition('.')[2]}.{self.function.__qualname__}({', '.join(shown)})"


@dataclass(slots=True)
class _Kept:
    """The calls that traces of this process have met, by the number that the opaque operation carries."""

    calls: list[FunctionCall] = field(default_factory=list)
    made: Any = None
    refusal: TraceError | None = None
    examining: bool = False
    num_holders: int = 0


_KEPT = _Kept()


@contextmanager
def keep_functions() -> Iterator[None]:
    """While this is open, `torch.export` sees every custom Function as one operation; other calls are untouched."""
    start_keeping()
    try:
        yield
    finally:
        stop_keeping()


def start_keeping() -> None:
    """Open what `keep_functions` opens, for a caller that cannot use `with`; each start needs a stop."""
    _opaque()
    _KEPT.num_holders += 1
    APPLY_OWNER.apply = classmethod(_apply)
    torch.Tensor.register_hook = _register_hook  # type: ignore[method-assign]


def stop_keeping() -> None:
    """Close what `start_keeping` opened."""
    _KEPT.num_holders -= 1
    if _KEPT.num_holders == 0:
        del APPLY_OWNER.apply
        torch.Tensor.register_hook = REGISTER_HOOK  # type: ignore[method-assign]


def _register_hook(tensor: torch.Tensor, hook: Any) -> Any:
    """What `Tensor.register_hook` does while functions are kept: an export would lose the hook without a word."""
    if torch.compiler.is_exporting():
        raise TraceError(
            "forward registers a hook on a gradient",
            "an exported model keeps no hooks, so that it would train another gradient",
            "write the hook as the backward of a torch.autograd.Function, which is kept",
            (_where(),),
        )
    return REGISTER_HOOK(tensor, hook)


def refuse_module_hooks(model: torch.nn.Module) -> None:
    """Raise TraceError for a module with a hook on its gradients, which an export would lose without a word."""
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise TraceError(
                f"module {name or 'the model'} ({type(module).__name__}) has a backward hook",
                "an exported model keeps no hooks, so that it would train another gradient",
                "write the hook as the backward of a torch.autograd.Function in forward, which is kept",
            )


def refuse_tied_hooks(name: str, parameter: torch.Tensor) -> None:
    """Raise TraceError for a hook on a parameter that several layers use: a second stage would hold a copy without."""
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise TraceError(
            f"parameter {name} has a hook on its gradient and is used by several layers",
            "stages that share a parameter add their parts, and a hook would see the parts instead of the sum",
            "take the hook off and change the gradient between backward and step, in the optimizer",
        )


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What `Function.apply` does while functions are kept."""
    passes = not torch.compiler.is_exporting() or _KEPT.examining or function.__module__.startswith("torch.")
    leaves, spec = tree_flatten((args, kwargs))
    is_tensor = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
    if passes or not any(is_tensor):
        return super(APPLY_OWNER, function).apply(*args, **kwargs)
    constants = tuple(leaf for leaf, tensor in zip(leaves, is_tensor, strict=True) if not tensor)
    number = len(_KEPT.calls)
    _KEPT.calls.append(FunctionCall(function, spec, constants, is_tensor, _where()))
    made = iter(_opaque()([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], number))
    if _KEPT.refusal is not None:
        raise _KEPT.refusal
    return tree_map(lambda leaf: next(made) if isinstance(leaf, torch.Tensor) else leaf, _KEPT.made)


@cache
def _opaque() -> Callable[[list[torch.Tensor], int], list[torch.Tensor]]:
    """The operation that stands for a call in the exported program."""

    @torch.library.custom_op("evenstage::function", mutates_args=())
    def stand_in(tensors: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
        raise NotImplementedError("stands for a custom Function in a trace and is replaced before anything runs")

    @stand_in.register_fake
    def _(tensors: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
        return _examine(tensors, number)

    return stand_in


def _examine(tensors: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    """Run the call on example tensors: what it makes, and whether it does anything that a cut could not respect."""
    call = _KEPT.calls[number]
    versions = [tensor._version for tensor in tensors]
    watch = _Watch(tensors)
    _KEPT.examining = True
    try:
        with watch:
            _KEPT.made = call.outputs(tensors)
    finally:
        _KEPT.examining = False
    written = versions != [tensor._version for tensor in tensors]
    _KEPT.refusal = _objection(call, watch.foreign, written)
    made = [leaf for leaf in tree_leaves(_KEPT.made) if isinstance(leaf, torch.Tensor)]
    storages = {tensor.untyped_storage()._cdata for tensor in made}
    shared = tuple(i for i, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata in storages)
    _KEPT.calls[number] = replace(call, random=tuple(watch.random), shared=shared)
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in made]


def _objection(call: FunctionCall, foreign: bool, written: bool) -> TraceError | None:
    """Why the call cannot be kept, raised once torch's own machinery has returned."""
    if foreign:
        what = "reads tensors of the model that are not given to apply, whose gradients a stage would lose"
        return _refused(call.function, call.where, what, "give every parameter and buffer to apply as an argument")
    if written:
        return _refused(call.function, call.where, "writes to its input in place", "let forward return a new tensor")
    return None


class _Watch(TorchDispatchMode):
    """Notes random operations and the model's tensors that a Function reads without being given them."""

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {id(tensor): tensor for tensor in given}
        self.foreign = False
        self.random: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in self.known:
                self.foreign |= leaf.requires_grad or isinstance(leaf, torch._subclasses.FakeTensor)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random.append(str(func))
        made = func(*args, **(kwargs or {}))
        self.known.update((id(leaf), leaf) for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))
        return made


def _refused(function: Any, where: str, what: str, remedy: str) -> TraceError:
    return TraceError(
        f"the custom Function {function.__qualname__} {what}",
        "a custom Function takes its tensors as arguments and returns new ones: it is called whole in one stage",
        remedy,
        (where,) if where else (),
    )


def _where() -> str:
    """The user's line that calls apply, as `file:line: text`."""
    torch_root = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((torch_root, str(Path(OWN_ROOT, "planner")))):
            return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
    return ""


def restore_functions(gm: fx.GraphModule) -> None:
    """Make each opaque operation of an exported graph a call of the Function that it stands for; in place."""
    _opaque()
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.evenstage.function.default:
            tensors, number = node.args
            node.target, node.args, node.kwargs = _KEPT.calls[number], tuple(tensors), {}


def function_calls(graph: fx.Graph) -> list[FunctionCall]:
    """The custom Functions that a prepared graph calls."""
    return [node.target for node in graph.nodes if isinstance(node.target, FunctionCall)]
