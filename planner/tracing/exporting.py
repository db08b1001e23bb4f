"""One export of the untouched model → positions, layers in program order, and the values between them.

A *position* is the first operation of a module call, which is exactly where `SplitPoint.BEGINNING` cuts. A *layer* is
the piece of the graph between two neighbouring legal positions, named after the outermost module that it begins.
"""

from __future__ import annotations

from collections.abc import Container
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec

from planner.errors import TraceError
from planner.tracing.crossing import copies_to_send, wire_bytes
from planner.tracing.explaining import explain_export, quiet_export
from planner.tracing.fingerprint import fingerprint
from planner.tracing.functions import keep_functions, refuse_module_hooks, refuse_tied_hooks
from planner.tracing.gradients import attribute, needs_gradient
from planner.tracing.legality import Value, illegal_positions, live_values, not_plain_positions, why_not_plain
from planner.tracing.precision import autocast, describe_inside_autocast
from planner.tracing.refusing import (
    refuse_counters,
    refuse_outputs,
    refuse_shared_inputs,
    refuse_sparse_gradients,
    watch_numbers,
)
from planner.tracing.rewriting import canonical_names, compute_nodes, has_cut_marks, prepare
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
    values = live_values(gm.graph, nodes)
    illegal = illegal_positions(gm.graph, nodes, values)
    starts = {0: _name_at(nodes, 0), **_positions(nodes)}
    starts = {index: begin for index, begin in sorted(starts.items()) if index == 0 or index not in illegal}
    late = not_plain_positions(values, len(nodes))
    why_not = why_not_plain(gm, nodes) or rewritten
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
    values = live_values(gm.graph, nodes)
    illegal = illegal_positions(gm.graph, nodes, values)
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


def _tensors(gm: fx.GraphModule, values: list[Value], layers: tuple[TracedLayer, ...]) -> tuple[TracedTensor, ...]:
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
