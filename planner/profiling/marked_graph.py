"""Parts of the traced graph as flat functions that mark, while they run, where each layer ends.

A function per layer would cost what no stage pays: calls, look-ups and code that is never in the cache, some 50 µs a
layer, a tenth of a small model's forward.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch import fx
from torch.distributed.pipelining._IR import aten_pipe_split_alias

from planner.profiling.layer_clock import LayerClock
from planner.tracing.exporting import Trace
from planner.tracing.gradients import attribute
from planner.tracing.rewriting import apply_cuts, compute_nodes, tensor_inputs

CLOCK, MARK = "layer_clock", "mark"


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring layers as one function of the values `inputs`, by name, that returns `outputs` as a tuple.

    `released` are the values that no later part reads.
    """

    function: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    released: tuple[str, ...]

    def run(self, clock: LayerClock, *inputs: Any) -> tuple[Any, ...]:
        """Compute the outputs; `clock` is told where every layer but the last ends."""
        set_clock(self.function, clock)
        made: tuple[Any, ...] = self.function(*inputs)
        return made


def without_marks(function: fx.GraphModule) -> fx.GraphModule:
    """A marked function as a stage runs it; parameters are shared."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in function.graph.nodes:
        if node.target not in (CLOCK, MARK):
            values[node] = graph.node_copy(node, lambda n: values[n])
    return fx.GraphModule(function, graph)


def set_clock(function: fx.GraphModule, clock: LayerClock) -> None:
    """Let `clock` be told of the layers that a marked function runs from now on."""
    function.__dict__[CLOCK] = clock


def marked_parts(trace: Trace, starts: Sequence[int]) -> tuple[Part, ...]:
    """The trace cut before the layers `starts` (increasing, the first is 0); the traced model's parameters are shared.

    >>> from torch import nn, ones
    >>> from planner.tracing.exporting import trace_model
    >>> trace = trace_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (ones(2, 4),), {})
    >>> [(part.inputs, part.outputs) for part in marked_parts(trace, (0, 1))]
    [(('input_1',), ('linear',)), (('linear',), ('linear_1',))]
    """
    nodes = compute_nodes(trace.graph_module.graph)
    layer_of = {node: index for index, layer in enumerate(trace.layers) for node in nodes[layer.start : layer.stop]}
    parts: list[Part] = []
    for first, stop in pairwise((*starts, len(trace.layers))):
        function, read, made = _function(trace.graph_module, layer_of, range(first, stop))
        released = [node for node in read if not _is_read_after(node, stop - 1, layer_of)]
        parts.append(Part(function, *(tuple(node.name for node in group) for group in (read, made, released))))
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class MarkedStages:
    """The stages into which the trace is cut by `apply_cuts`, as a plan's are, but marked; `starts` are first layers.

    In every stage the clock counts one layer more at either end: what comes before the stage's own layers (the form in
    which values arrive) and after them (that in which they depart). `pipe_graph` is torch's: a call per stage.
    """

    marked: tuple[fx.GraphModule, ...]
    pipe_graph: fx.Graph
    starts: tuple[int, ...]


def marked_stages(trace: Trace, starts: Sequence[int]) -> MarkedStages:
    """Cut a copy of the trace before the layers `starts` (increasing, the first is 0); its parameters are shared.

    >>> from torch import nn, ones
    >>> from planner.tracing.exporting import trace_model
    >>> trace = trace_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (ones(2, 4),), {})
    >>> [sum(node.target == "mark" for node in stage.graph.nodes) for stage in marked_stages(trace, (0, 1)).marked]
    [2, 3]
    """
    gm, copies = _copied(trace)
    nodes = compute_nodes(trace.graph_module.graph)
    owner = {
        copies[node]: index for index, layer in enumerate(trace.layers) for node in nodes[layer.start : layer.stop]
    }
    apply_cuts(gm, [trace.layers[start].start for start in starts[1:]])
    ends = (*starts[1:], len(trace.layers))
    slot_of = _slots(gm.graph, owner, starts, ends)
    stages, reads, makes = [], [], []
    for first, stop in zip(starts, ends, strict=True):
        slots = [_slot(first) - 1, *map(_slot, range(first, stop)), _slot(stop - 1) + 1]
        stage, read, made = _function(gm, slot_of, slots)
        stages.append(stage)
        reads.append(read)
        makes.append(made)
    return MarkedStages(tuple(stages), _pipe_graph(gm.graph, reads, makes), tuple(starts))


def _copied(trace: Trace) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(trace.graph_module.graph, copies)
    graph.output(output)
    return fx.GraphModule(trace.graph_module, graph), copies


def _slot(layer: int) -> int:
    """Layers are numbered 1, 4, 7 …, so that there is room for what stands before and after them at a cut."""
    return 3 * layer + 1


def _slots(
    graph: fx.Graph, owner: Mapping[fx.Node, int], starts: Sequence[int], ends: Sequence[int]
) -> dict[fx.Node, int]:
    """The slot of every operation of the cut graph. Those that the cut has added stand at an end of their stage."""
    slots: dict[fx.Node, int] = {}
    stage, begun = 0, False
    computing = set(compute_nodes(graph))
    for node in graph.nodes:
        if node.target is aten_pipe_split_alias:
            stage, begun = stage + 1, False
        elif node in computing:
            begun = begun or node in owner
            added = _slot(ends[stage] - 1) + 1 if begun else _slot(starts[stage]) - 1
            slots[node] = _slot(owner[node]) if node in owner else added
    return slots


def _is_read_after(node: fx.Node, slot: int, slot_of: Mapping[fx.Node, int]) -> bool:
    return any(user.op == "output" or slot_of.get(user, -1) > slot for user in node.users)


def _function(
    gm: fx.GraphModule, slot_of: Mapping[fx.Node, int], slots: Sequence[int]
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """The operations in `slots` (increasing) as a function; the values of `gm` that it reads and that it makes."""
    inside = {node for node, slot in slot_of.items() if slots[0] <= slot <= slots[-1]}
    candidates = [*tensor_inputs(gm.graph), *slot_of]
    read = [node for node in candidates if node not in inside and any(user in inside for user in node.users)]
    made = [node for node in slot_of if node in inside and _is_read_after(node, slots[-1], slot_of)]
    graph, attributes = fx.Graph(), {CLOCK: None}
    values: dict[fx.Node, fx.Node] = {}
    for node in read:
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    clock = graph.get_attr(CLOCK)
    position, waiting = 0, list(read) if len(slots) > 1 else []
    for node in gm.graph.nodes:
        if node.op == "get_attr" and any(user in inside for user in node.users):
            values[node] = graph.node_copy(node)
            attributes[str(node.target)] = attribute(gm, str(node.target))
        if node not in inside:
            continue
        while slots[position] < slot_of[node]:
            graph.call_method(MARK, (clock, _values(waiting, values)))
            position, waiting = position + 1, []
        values[node] = graph.node_copy(node, lambda n: values[n])
        if position < len(slots) - 1 and _is_read_after(node, slots[position], slot_of):
            waiting.append(node)
    while position < len(slots) - 1:
        graph.call_method(MARK, (clock, _values(waiting, values)))
        position, waiting = position + 1, []
    graph.output(_values(made, values))
    return fx.GraphModule(attributes, graph), read, made


def _values(nodes: Iterable[fx.Node], values: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(values[node] for node in nodes)


def _pipe_graph(graph: fx.Graph, reads: Sequence[Sequence[fx.Node]], makes: Sequence[Sequence[fx.Node]]) -> fx.Graph:
    """The graph of calls by which torch's stages know who sends them what."""
    pipe, values = fx.Graph(), {}
    for node in tensor_inputs(graph):
        values[node] = pipe.placeholder(node.name)
    for number, (read, made) in enumerate(zip(reads, makes, strict=True)):
        stage = pipe.call_module(f"submod_{number}", tuple(values[node] for node in read))
        for index, node in enumerate(made):
            values[node] = pipe.call_function(operator.getitem, (stage, index))
    pipe.output(tuple(values[node] for node in makes[-1]))
    return pipe


def even_starts(load_ms: Iterable[float], count: int) -> tuple[int, ...]:
    """First layers of `count` parts of about the same load, or of as many as there are layers.

    >>> even_starts([1.0, 1.0, 4.0, 1.0, 1.0], 2), even_starts([9.0, 1.0, 1.0], 3), even_starts([1.0], 2)
    ((0, 2), (0, 1, 2), (0,))
    """
    ends = list(accumulate(load_ms))
    before, starts = [0.0, *ends[:-1]], [0]
    parts = min(count, len(ends))
    for number in range(1, parts):
        share = ends[-1] * number / parts
        possible = range(starts[-1] + 1, len(ends) - (parts - number) + 1)
        starts.append(min(possible, key=lambda index: abs(before[index] - share)))
    return tuple(starts)
