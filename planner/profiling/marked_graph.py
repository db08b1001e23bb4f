"""Parts of the traced graph as flat functions that mark, while they run, where each layer ends.

A function per layer would cost what no stage pays: calls, look-ups and code that is never in the cache, some 50 µs a
layer, a tenth of a small model's forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import fx

from planner.tracing.exporting import Trace
from planner.tracing.rewriting import compute_nodes, tensor_inputs

MARK = "mark"


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring layers as one function of (marker, *inputs) that returns its outputs as a tuple.

    It calls `marker.mark(values)` at the end of every layer but its last, with what later layers read of that layer.
    `inputs` and `outputs` are names of values; `released` are the values that no later part reads.
    """

    function: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    released: tuple[str, ...]


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
        inside = {node for node, layer in layer_of.items() if first <= layer < stop}
        candidates = [*tensor_inputs(trace.graph_module.graph), *nodes]
        read = [node for node in candidates if node not in inside and any(user in inside for user in node.users)]
        made = [node for node in nodes if node in inside and _is_read_after(node, stop - 1, layer_of)]
        released = [node for node in read if not _is_read_after(node, stop - 1, layer_of)]
        function = _function(trace, inside, read, made, layer_of)
        names = (tuple(node.name for node in group) for group in (read, made, released))
        parts.append(Part(function, *names))
    return tuple(parts)


def _is_read_after(node: fx.Node, layer: int, layer_of: dict[fx.Node, int]) -> bool:
    return any(user.op == "output" or layer_of.get(user, -1) > layer for user in node.users)


def _function(
    trace: Trace, inside: set[fx.Node], read: list[fx.Node], made: list[fx.Node], layer_of: dict[fx.Node, int]
) -> fx.GraphModule:
    last = max(layer_of[node] for node in inside)
    waiting: list[fx.Node] = []
    graph, values = fx.Graph(), {}
    marker = graph.placeholder("marker")
    for node in read:
        values[node] = graph.placeholder(node.name)
    current = min(layer_of[node] for node in inside)
    for node in trace.graph_module.graph.nodes:
        if node.op == "get_attr" and any(user in inside for user in node.users):
            values[node] = graph.node_copy(node)
        if node not in inside:
            continue
        if layer_of[node] > current:
            graph.call_method(MARK, (marker, tuple(values[each] for each in waiting)))
            waiting, current = [], layer_of[node]
        values[node] = graph.node_copy(node, lambda n: values[n])
        if current < last and _is_read_after(node, current, layer_of):
            waiting.append(node)
    graph.output(tuple(values[node] for node in made))
    return fx.GraphModule(trace.graph_module, graph)


def even_starts(load_ms: Iterable[float], count: int) -> tuple[int, ...]:
    """First layers of at most `count` parts of about the same load.

    >>> even_starts([1.0, 1.0, 4.0, 1.0, 1.0], 2)
    (0, 2)
    """
    ends = list(accumulate(load_ms))
    before = [0.0, *ends[:-1]]
    shares = [ends[-1] * number / count for number in range(1, count)]
    nearest = {min(range(len(before)), key=lambda index: abs(before[index] - share)) for share in shares}
    return tuple(sorted({0, *nearest}))
