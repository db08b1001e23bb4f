"""One export of a model → its graph at every microbatch size, as an export at that size would give it.

The export has a batch dimension of unknown size. Its graph is then run in fake tensors at each size: numbers that
were computed from the batch become the numbers of that size, and every value gets its shape. Where torch noted that
something was decided by the size (`if batch == 1`), the sizes for which it would be decided otherwise are exported by
themselves, and so is every size of a model that such an export cannot describe.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils._pytree import tree_flatten, tree_unflatten

from planner.tracing.explaining import quiet_export
from planner.tracing.exporting import check_export, export_model
from planner.tracing.functions import keep_functions, refuse_module_hooks
from planner.tracing.gradients import attribute
from planner.tracing.refusing import watch_numbers

Call = tuple[tuple[Any, ...], dict[str, Any]]
KEPT_OPERATION = "evenstage.function.default"
NO_GRAD_REGION = "wrap_with_set_grad_enabled"
SIZE_CHECKS = ("_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")


@dataclass(slots=True)
class ExportCount:
    """How many times the model was exported, and the wall time of that and of making other sizes from it."""

    exports: int = 0
    seconds: float = 0.0


class SizeExports:
    """The exported graph of `model` at each of `sizes`. `calls` gives the model's arguments at a size.

    >>> linear = nn.Linear(4, 2)
    >>> sizes = SizeExports(linear, lambda size: ((torch.ones(size, 4),), {}), (8, 4, 2, 1))
    >>> for size in (8, 1):
    ...     _ = sizes.graph(size, linear)
    >>> sizes.count.exports
    1
    """

    def __init__(self, model: nn.Module, calls: Callable[[int], Call], sizes: Sequence[int]) -> None:
        self.calls, self.count = calls, ExportCount()
        self.symbolic: _Symbolic | None = None
        if len(set(sizes)) > 1:
            with _timed(self.count):
                self.symbolic = _export_any_size(model, calls, sorted(set(sizes)))
            self.count.exports += self.symbolic is not None

    def graph(self, size: int, model: nn.Module) -> fx.GraphModule:
        """The graph at `size`, with the parameters and buffers of `model`: the one given at first or an equal one.

        Raises TraceError where the model cannot be exported.
        """
        args, kwargs = self.calls(size)
        with _timed(self.count):
            found = None if self.symbolic is None else self.symbolic.at(size, model, args, kwargs)
            if found is None:
                self.count.exports += 1
                return export_model(model, args, kwargs)
        check_export(found, model, args, kwargs)
        return found


class _timed:  # noqa: N801  # reads as a statement
    """Adds the time that the block takes."""

    def __init__(self, count: ExportCount) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.count.seconds += time.perf_counter() - self.started


@dataclass(frozen=True, slots=True)
class _Symbolic:
    """An export whose batch is any size that keeps the `guards` true; `low` and `high` bound it."""

    gm: fx.GraphModule
    low: int
    high: float
    guards: tuple[Any, ...]

    def holds_at(self, size: int) -> bool:
        """Whether everything that the trace decided by the batch would be decided alike at `size`."""
        inside = self.low <= size <= self.high
        return inside and all(bool(guard.subs(dict.fromkeys(guard.free_symbols, size))) for guard in self.guards)

    def at(self, size: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule | None:
        """The graph at `size`; None where this export does not say what it is."""
        try:
            if not self.holds_at(size):
                return None
            mode = _mode_of(model)
            leaves = _as_spelled(self.gm, args, kwargs)
            with mode, torch.no_grad(), quiet_export():
                return _Specialised(self.gm, mode, _tensors_by_name(model)).run(leaves)
        except Exception:  # whatever it is: an export at this size tells the user more
            return None


def _export_any_size(model: nn.Module, calls: Callable[[int], Call], sizes: list[int]) -> _Symbolic | None:
    """An export at the largest of `sizes` whose batch dimension is symbolic; None where that is not possible."""
    refuse_module_hooks(model)
    args, kwargs = calls(sizes[-1])
    try:
        shapes = _batch_dimensions(model, [calls(size) for size in sizes], sizes)
        with watch_numbers(model) as changes, quiet_export(), keep_functions():
            with symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
            gm = program.module(check_guards=False)
    except Exception:  # an export of each size says what is wrong, if anything is
        return None
    if changes or any(str(node.target) == KEPT_OPERATION for node in gm.graph.nodes):
        return None
    _forget(gm, _tensors_by_name(model))
    return _read_symbols(gm, program.range_constraints.values())


def _forget(gm: fx.GraphModule, names: Iterable[str]) -> None:
    """Let go of the parameters and buffers of the model that was exported: every graph gets those of another."""
    for name in {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}.intersection(names):
        owner, _, last = name.rpartition(".")
        module = gm.get_submodule(owner)
        if hasattr(module, last):  # it may have been let go under another name
            delattr(module, last)


def _batch_dimensions(model: nn.Module, calls: list[Call], sizes: list[int]) -> dict[str, Any]:
    """`dynamic_shapes` by argument: the first dimension of each input is the batch. Raises ValueError if it is not."""
    every = [tree_flatten(call) for call in calls]
    marks = []
    for leaves in zip(*(flat for flat, _ in every), strict=True):
        tensors = all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        batched = tensors and all(leaf.dim() > 0 for leaf in leaves)
        if batched and [leaf.shape[0] for leaf in leaves] != sizes:
            raise ValueError("an input's first dimension is not the batch")
        marks.append({0: torch.export.Dim.AUTO} if batched else None)
    positional, named = tree_unflatten(marks, every[-1][1])
    bound = inspect.signature(model.forward).bind(*positional, **named)
    return dict(bound.arguments)


def _read_symbols(gm: fx.GraphModule, ranges: Any) -> _Symbolic | None:
    inputs = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
    first = [value.shape[0] for value in inputs if isinstance(value, torch.Tensor) and value.dim()]
    if not first or not all(isinstance(size, torch.SymInt) and size.node.expr.is_symbol for size in first):
        return None
    guards = tuple(guard.expr for guard in cast(Any, first[0]).node.shape_env.guards)
    lows, highs = [int(one.lower) for one in ranges], [float(one.upper) for one in ranges]
    return _Symbolic(gm, max([0, *lows]), min([float("inf"), *highs]), guards)


def _mode_of(model: nn.Module) -> FakeTensorMode:
    for tensor in [*model.parameters(), *model.buffers()]:
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _tensors_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _as_spelled(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The leaves of the arguments in the order of the graph's inputs."""
    spec = gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    leaves, given = tree_flatten((args, kwargs))
    if given != spec:
        raise ValueError("the arguments have another structure at this size")
    return iter(leaves)


class _Specialised:
    """A symbolic graph run at one size in fake tensors, and recorded without its symbols."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode, tensors: dict[str, torch.Tensor]) -> None:
        self.gm, self.mode, self.tensors = gm, mode, tensors
        self.attributes: dict[str, Any] = {}
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}  # of the symbolic graph → what the operations take
        self.made: dict[fx.Node, Any] = {}  # of the symbolic graph → a node, or a number

    def run(self, inputs: Iterator[Any]) -> fx.GraphModule:
        """The recorded graph, for `inputs` in the order of the placeholders."""
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self._keep(node, self._fake(next(inputs)))
            elif node.op == "get_attr":
                self._keep(node, self._attribute(str(node.target)), with_value="val" in node.meta)
            elif node.op == "call_function":
                self._call(node)
            else:
                self._keep(node, fx.node.map_arg(node.args, lambda n: self.values[n]))
        self.graph.set_codegen(self.gm.graph._codegen)
        return fx.GraphModule(self.attributes, self.graph)

    def _fake(self, value: Any) -> Any:
        if isinstance(value, FakeTensor) or not isinstance(value, torch.Tensor):
            return value
        return self.mode.from_tensor(value, static_shapes=True)

    def _attribute(self, name: str) -> Any:
        found = self.tensors[name] if name in self.tensors else attribute(self.gm, name)
        self.attributes[name] = found
        return self._fake(found)

    def _call(self, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        args: tuple[Any, ...] = fx.node.map_arg(node.args, lambda n: self.values[n])
        kwargs: dict[str, Any] = fx.node.map_arg(node.kwargs, lambda n: self.values[n])
        if name in SIZE_CHECKS:
            return
        if name == NO_GRAD_REGION:
            _, body, *rest = args
            target = str(cast(fx.Node, node.args[1]).target)
            inner = _Specialised(body, self.mode, {})
            self.attributes[target] = inner.run(iter(rest))
            output = inner.values[body.graph.output_node()]
            self._keep(node, output[0])
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ValueError(f"a region of kind {name}")
        self._keep(node, cast(Callable[..., Any], node.target)(*args, **kwargs))

    def _keep(self, node: fx.Node, value: Any, with_value: bool = True) -> None:
        self.values[node] = value
        if isinstance(value, (int, float)) and node.op == "call_function":
            self.made[node] = value  # a number of this size, written where it is used
            return
        copy = self.graph.node_copy(node, lambda n: self.made[n])
        copy.meta = dict(node.meta)
        if with_value and node.op != "output":
            copy.meta["val"] = value
        self.made[node] = copy
