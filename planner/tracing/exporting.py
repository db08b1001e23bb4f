"""One export of the untouched model → positions, layers in program order, and the values between them.

A *position* is the first operation of a module call, which is exactly where `SplitPoint.BEGINNING` cuts. A *layer* is
the piece of the graph between two neighbouring legal positions, named after the outermost module that it begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec, tree_leaves

from planner.errors import TraceError
from planner.tracing.crossing import copies_to_send, wire_bytes
from planner.tracing.explaining import explain_export, quiet_export
from planner.tracing.functions import function_calls, keep_functions, refuse_module_hooks, refuse_tied_hooks
from planner.tracing.gradients import attribute, needs_gradient
from planner.tracing.precision import AS_TRACED, autocast, describe_inside_autocast
from planner.tracing.refusing import (
    is_static,
    refuse_counters,
    refuse_outputs,
    refuse_shared_inputs,
    refuse_sparse_gradients,
    watch_numbers,
)
from planner.tracing.rewriting import canonical_names, compute_nodes, has_cut_marks, prepare, tensor_inputs
from planner.tracing.state import storages, writes
from planner.tracing.writes import separate_writes


@dataclass(frozen=True, slots=True)
class TracedLayer:
    """Operations `start` to `stop` of the prepared graph; `parameters` are canonical names in order of first use."""

    id: str
    name: str
    type: str
    start: int
    stop: int
    plain_cut: bool
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TracedTensor:
    """A tensor that leaves its layer; indices of layers, bytes of a message. Graph inputs count as made by layer 0."""

    name: str
    producer: int
    consumers: tuple[int, ...]
    num_bytes: int
    gradient_bytes: int
    contiguous: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """A model traced at one microbatch size. `graph_module` is prepared (see rewriting) and not cut.

    `autocast_device` is the type of the device that it computes on inside autocast; empty where it computes in float32.
    """

    graph_module: fx.GraphModule
    layers: tuple[TracedLayer, ...]
    tensors: tuple[TracedTensor, ...]
    aliases: dict[str, tuple[str, ...]]
    fingerprint: str
    out_spec: TreeSpec
    why_not_plain: str
    autocast_device: str = ""

    def computing(self) -> AbstractContextManager[Any]:
        """What forward and the loss of this trace compute inside."""
        return autocast("bf16" if self.autocast_device else "fp32", self.autocast_device)

    @property
    def tied(self) -> dict[str, tuple[int, ...]]:
        """Parameters that several layers use → those layers' indices."""
        users: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            for name in layer.parameters:
                users.setdefault(name, []).append(index)
        return {name: tuple(layers) for name, layers in users.items() if len(layers) > 1}


def export_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The exported graph of `model` as `pipeline()` would get it. Raises TraceError with the line to blame."""
    refuse_module_hooks(model)
    with watch_numbers(model) as changes:
        module = _export(model, args, kwargs)
    if changes:
        refuse_counters(model, module, changes, lambda: _export(model, args, kwargs))
    check_export(module, model, args, kwargs)
    return module


def check_export(module: fx.GraphModule, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TraceError where the exported `module` would be wrong in a pipeline."""
    refuse_outputs(module, model)
    refuse_sparse_gradients(module)
    refuse_shared_inputs(module, args, kwargs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    try:
        with quiet_export(), keep_functions():
            module = torch.export.export(model, args, kwargs).module(check_guards=False)
    except TraceError:
        raise
    except Exception as error:
        raise explain_export(error, model, args, kwargs) from error
    assert isinstance(module, fx.GraphModule)
    return module


def trace_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, autocast_on: torch.device | None = None
) -> Trace:
    """Export `model` on one microbatch and find its layers. Raises TraceError where that is impossible.

    `autocast_on` is the device that it will compute on inside autocast to bfloat16; None means in float32.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> [layer.id for layer in trace_model(model, (torch.ones(2, 4),), {}).layers]
    ['0', '1', '2']
    """
    return read_trace(export_model(model, args, kwargs), model, autocast_on=autocast_on)


def read_trace(gm: fx.GraphModule, model: nn.Module, *, autocast_on: torch.device | None = None) -> Trace:
    """Prepare the exported `gm` of `model` in place and read its layers; `autocast_on` as in `trace_model`."""
    names = canonical_names(model)
    rewritten = "forward calls pipe_split() itself" if has_cut_marks(gm.graph) else ""
    if prepare(gm, names):
        rewritten = rewritten or "forward has a no_grad region"
    if autocast_on is not None and describe_inside_autocast(gm, autocast_on):
        rewritten = rewritten or "forward converts to a dtype, and export asserts what bf16 does not keep"
    nodes = compute_nodes(gm.graph)
    if not nodes:
        raise TraceError("the model computes nothing", "a stage needs at least one operation", "check forward")
    if separate_writes(nodes, _positions(nodes)):
        rewritten = rewritten or "forward writes in place to a value that several layers read"
        nodes = compute_nodes(gm.graph)
    values = _live_values(gm.graph, nodes)
    illegal = _illegal_positions(gm.graph, nodes, values)
    starts = {0: _name_at(nodes, 0), **_positions(nodes)}
    starts = {index: begin for index, begin in sorted(starts.items()) if index == 0 or index not in illegal}
    late = _not_plain_positions(values, len(nodes))
    why_not = _why_not_plain(gm, nodes) or rewritten
    layers = _layers(nodes, starts, late, bool(why_not))
    aliases: dict[str, tuple[str, ...]] = {}
    for name, canonical in names.items():
        aliases[canonical] = (*aliases.get(canonical, ()), name)
    trace = Trace(
        graph_module=gm,
        layers=layers,
        tensors=_tensors(gm, values, layers),
        aliases=aliases,
        fingerprint=fingerprint(gm, names),
        out_spec=gm.graph._codegen.pytree_info.out_spec,  # type: ignore[attr-defined]
        why_not_plain=why_not,
        autocast_device="" if autocast_on is None else autocast_on.type,
    )
    for name in trace.tied:
        refuse_tied_hooks(name, attribute(gm, name))
    return trace


def open_layers(trace: Trace, ids: Container[str] | None = None) -> Trace:
    """`trace` with a layer for every operation inside the layers `ids` (None: all) before which a cut is legal.

    The operation n after the first of layer `a` begins a layer `a+n`, named after its innermost module and itself.

    >>> trace = trace_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (torch.ones(2, 4),), {})
    >>> [layer.id for layer in open_layers(trace).layers]
    ['0', '1']
    """
    gm = trace.graph_module
    nodes = compute_nodes(gm.graph)
    values = _live_values(gm.graph, nodes)
    illegal = _illegal_positions(gm.graph, nodes, values)
    starts: dict[int, _Begin] = {}
    for layer in trace.layers:
        starts[layer.start] = _Begin(layer.id, layer.name, layer.type, layer.plain_cut)
        if ids is None or layer.id in ids:
            for position in range(layer.start + 1, layer.stop):
                if position not in illegal:
                    starts[position] = _operation(nodes[position], f"{layer.id}+{position - layer.start}")
    layers = _layers(nodes, starts, set(), never_plain=False)
    return replace(trace, layers=layers, tensors=_tensors(gm, values, layers))


@dataclass(frozen=True, slots=True)
class _Begin:
    """What begins at a position: the outermost module call, and whether stock torch can split there."""

    id: str
    name: str
    type: str
    single_call: bool


def _positions(nodes: list[fx.Node]) -> dict[int, _Begin]:
    """First operation of every module call → the outermost call that begins there."""
    seen: set[str] = set()
    repeated = {name for node in nodes for key, (name, _) in _stack(node) if "@" in key}
    found: dict[int, _Begin] = {}
    for index, node in enumerate(nodes):
        for key, (name, kind) in _stack(node):
            if key not in seen and name:
                seen.add(key)
                if index not in found:
                    call = key.partition("@")[2]
                    single = not any(name == r or name.startswith(f"{r}.") for r in repeated)
                    found[index] = _Begin(f"{name}@{call}" if call else name, name, _type_name(kind), single)
    return found


def _stack(node: fx.Node) -> list[tuple[str, tuple[str, Any]]]:
    return list((node.meta.get("nn_module_stack") or {}).items())


def _type_name(kind: Any) -> str:
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _name_at(nodes: list[fx.Node], index: int) -> _Begin:
    return _Begin("(start)", "", _type_name(next(iter(_stack(nodes[index])), ("", ("", "Module")))[1][1]), False)


def _operation(node: fx.Node, identity: str) -> _Begin:
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    module = next((path for _, (path, _) in reversed(_stack(node)) if path), "")
    return _Begin(identity, f"{module}/{name}" if module else name, name, False)


def _layers(
    nodes: list[fx.Node], starts: dict[int, _Begin], late: set[int], never_plain: bool
) -> tuple[TracedLayer, ...]:
    positions = list(starts)
    layers = []
    for start, stop in zip(positions, [*positions[1:], len(nodes)], strict=True):
        begin = starts[start]
        plain = start > 0 and begin.single_call and start not in late and not never_plain
        parameters: dict[str, None] = {}
        for node in nodes[start:stop]:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and isinstance(_parameter(source), nn.Parameter):
                    parameters[str(source.target)] = None
        layers.append(TracedLayer(begin.id, begin.name, begin.type, start, stop, plain, tuple(parameters)))
    return tuple(layers)


def _parameter(node: fx.Node) -> Any:
    owner = node.graph.owning_module
    assert owner is not None
    return attribute(owner, str(node.target))


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of the graph: index of the operation that makes it (-1: an input), those that read it, output or not."""

    node: fx.Node
    producer: int
    readers: tuple[int, ...]
    is_output: bool

    def last(self, num_nodes: int) -> int:
        return num_nodes - 1 if self.is_output else max(self.readers, default=self.producer)


def _live_values(graph: fx.Graph, nodes: list[fx.Node]) -> list[_Value]:
    index = {node: position for position, node in enumerate(nodes)}
    values = []
    for node in [*tensor_inputs(graph), *nodes]:
        readers = tuple(sorted(index[user] for user in node.users if user in index))
        is_output = any(user.op == "output" for user in node.users)
        if readers or is_output:
            values.append(_Value(node, index.get(node, -1), readers, is_output))
    return values


def _illegal_positions(graph: fx.Graph, nodes: list[fx.Node], values: list[_Value]) -> set[int]:
    """Positions where a cut would be wrong: before a write in place, in a buffer's update, nothing that can be sent."""
    num_nodes = len(nodes)
    illegal = _before_writes(graph, nodes)
    alive = [0] * (num_nodes + 1)
    for value in values:
        start, stop = value.producer + 1, value.last(num_nodes)
        example = value.node.meta.get("val")
        if not is_static(example) or example.is_complex():  # type: ignore[union-attr]  # no gradient of complex values
            illegal.update(range(start, stop + 1))
        elif stop >= start:
            alive[start] += 1
            alive[stop + 1] -= 1
    count = 0
    for position in range(num_nodes):
        count += alive[position]
        if count == 0:
            illegal.add(position)
    return illegal


def _before_writes(graph: fx.Graph, nodes: list[fx.Node]) -> set[int]:
    """Positions between a storage and a later write in place to it; between all uses of a buffer that is written."""
    index = {node: position for position, node in enumerate(nodes)}
    base = storages(graph)
    illegal: set[int] = set()
    written_buffers: set[fx.Node] = set()
    for node, storage in writes(graph, base):
        if storage.op == "get_attr":
            written_buffers.add(storage)
        else:
            illegal.update(range(index.get(storage, -1) + 1, index[node] + 1))
    for buffer in written_buffers:
        aliases = [node for node in [buffer, *base] if base.get(node, node) is buffer]
        uses = [index[user] for alias in aliases for user in alias.users if user in index]
        illegal.update(range(min(uses) + 1, max(uses) + 1))
    return illegal


def _not_plain_positions(values: list[_Value], num_nodes: int) -> set[int]:
    """Positions across which something lives that stock torch cannot send.

    That is an input, an output, a strided tensor, or one that autocast gives another dtype than the trace.
    """
    late: set[int] = set()
    for value in values:
        example = value.node.meta.get("val")
        strided = is_static(example) and not example.is_contiguous()  # type: ignore[union-attr]
        traced = value.node.meta.get(AS_TRACED, example)
        cast = is_static(example) and example.dtype != traced.dtype  # type: ignore[union-attr]
        if value.producer < 0 or value.is_output or strided or cast:
            late.update(range(value.producer + 1, value.last(num_nodes) + 1))
    return late


def _why_not_plain(gm: fx.GraphModule, nodes: list[fx.Node]) -> str:
    """Why stock torch cannot split this model by `split_spec` anywhere; empty where it can."""
    if calls := function_calls(gm.graph):
        return f"forward calls the custom Function {calls[0].function.__name__}, whose backward split_spec would lose"
    output = gm.graph.output_node().args[0]
    if len(tree_leaves(output)) != 1 or not _returns_tensor(gm):
        return "the model returns a structure, which split_spec would hand to the loss as a flat tuple"
    inputs = tensor_inputs(gm.graph)
    used: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "placeholder":
                used[source] = None
    if list(used) != inputs:
        return "inputs are not used in the order of the signature, and split_spec binds them in order of first use"
    return ""


def _returns_tensor(gm: fx.GraphModule) -> bool:
    return bool(gm.graph._codegen.pytree_info.out_spec.is_leaf())  # type: ignore[attr-defined]


def _tensors(gm: fx.GraphModule, values: list[_Value], layers: tuple[TracedLayer, ...]) -> tuple[TracedTensor, ...]:
    graded = needs_gradient(gm)
    owner = [index for index, layer in enumerate(layers) for _ in range(layer.start, layer.stop)]
    found = []
    for value in values:
        producer = owner[max(value.producer, 0)]
        consumers = {owner[reader] for reader in value.readers} | ({len(layers) - 1} if value.is_output else set())
        consumers.discard(producer)
        example = value.node.meta.get("val")
        if consumers and isinstance(example, torch.Tensor):
            num_bytes = wire_bytes(example)
            carries = example.is_floating_point() and value.node in graded
            gradient_bytes = num_bytes if carries else 0
            readers = tuple(sorted(consumers))
            found.append(
                TracedTensor(value.node.name, producer, readers, num_bytes, gradient_bytes, not copies_to_send(example))
            )
    return tuple(found)


def fingerprint(gm: fx.GraphModule, names: dict[str, str]) -> str:
    """A hash of the prepared graph: operators, arguments, shapes, dtypes, parameter names; no weights, no device.

    Dtypes are those of the trace, so that the hash is the same on devices whose autocast differs.
    """
    number = {node: index for index, node in enumerate(gm.graph.nodes)}
    digest = hashlib.sha256()
    for node in gm.graph.nodes:
        target = str(node.target) if node.op in ("call_function", "get_attr") else node.op
        described = (node.op, target, describe(node.args, number), describe(node.kwargs, number), _shape(node))
        digest.update(repr(described).encode())
    digest.update(repr(sorted(names.items())).encode())
    return digest.hexdigest()[:16]


def describe(value: Any, number: dict[fx.Node, int]) -> Any:
    """An argument of a node as a value whose `repr` is the same in every process."""
    if isinstance(value, fx.Node):
        return f"%{number.get(value, -1)}"
    if isinstance(value, (tuple, list)):
        return [describe(item, number) for item in value]
    if isinstance(value, dict):
        return {key: describe(item, number) for key, item in value.items()}
    return "device" if isinstance(value, torch.device) else repr(value)


def _shape(node: fx.Node) -> Any:
    examples = tree_leaves(node.meta.get(AS_TRACED, node.meta.get("val")))
    return [(tuple(e.shape), str(e.dtype)) for e in examples if isinstance(e, torch.Tensor)]
