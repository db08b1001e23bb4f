"""Where everything stands in the drawing of a layer graph: a panel per stage, one under the other, cuts in between.

Inside a panel the layers stand in rows by their depth in the stage (`networkx.topological_generations`); rows run in
turns to the right and to the left, so that a long chain is read like a meander and no edge crosses the panel.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx as nx

NODE_WIDTH, NODE_HEIGHT = 112.0, 40.0
COLUMN, LANE = NODE_WIDTH + 22.0, NODE_HEIGHT + 12.0
BLOCK_GAP = 28.0
MARGIN, HEADER, PADDING, BYPASS = 20.0, 30.0, 18.0, 12.0
PILL_WIDTH, PILL_HEIGHT, PILL_STEP, PILL_ROW = 142.0, 20.0, 152.0, 28.0
GAP, CUT_LABEL = 26.0, 22.0
MIN_COLUMNS, MAX_COLUMNS, MAX_LANES = 6, 10, 6
MAX_PILLS = 18


@dataclass(frozen=True, slots=True)
class Place:
    """The upper left corner of a layer's box, and its row of boxes in the panel."""

    x: float
    y: float
    row: int


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor that leaves its stage: bytes are None where the graph does not say; `last` is the last reading stage."""

    name: str
    producer: Hashable
    readers: tuple[Hashable, ...]
    first: int
    last: int
    num_bytes: int | None
    gradient_bytes: int | None
    transfer_ms: float | None


@dataclass(frozen=True, slots=True)
class Panel:
    """The area of a stage."""

    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Cut:
    """The space between two stages: what crosses, and the corner of the mark of each tensor that has one."""

    y: float
    crossings: tuple[Crossing, ...]
    pills: dict[int, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Layout:
    """All places; `pills` of a cut are by the index of the crossing in `crossings`. Units are those of the drawing."""

    width: float
    height: float
    panels: tuple[Panel, ...]
    cuts: tuple[Cut, ...]
    places: dict[Hashable, Place]
    crossings: tuple[Crossing, ...]
    stage_of: dict[Hashable, int]


def place_graph(graph: nx.DiGraph, stages: Sequence[Sequence[Hashable]], top: float) -> Layout:
    """Lay `graph` out under `top`, with a panel for each of `stages`, which hold all its nodes.

    >>> import networkx as nx
    >>> layout = place_graph(nx.path_graph(5, nx.DiGraph), [[0, 1], [2, 3, 4]], 0.0)
    >>> len(layout.panels), [crossing.producer for crossing in layout.crossings]
    (2, [1])
    """
    stage_of = {node: index for index, nodes in enumerate(stages) for node in nodes}
    crossings = find_crossings(graph, stage_of)
    largest = max(len(nodes) for nodes in stages)
    num_columns = min(MAX_COLUMNS, max(MIN_COLUMNS, round((1.5 * largest) ** 0.5) + 2))
    bypasses = max((sum(c.first < s < c.last for c in crossings) for s in range(len(stages))), default=0)
    width = num_columns * COLUMN - (COLUMN - NODE_WIDTH) + 2 * (MARGIN + PADDING) + BYPASS * min(bypasses, 8)
    places: dict[Hashable, Place] = {}
    panels, cuts, y = [], [], top
    for index, nodes in enumerate(stages):
        gap = y
        over = {number: c for number, c in enumerate(crossings) if c.first < index <= c.last}
        y += _cut_height(min(len(over), MAX_PILLS), width) if index else 0.0
        found, height = _place_stage(graph.subgraph(nodes), nodes, num_columns, y)
        places.update(found)
        if index:
            cuts.append(_place_cut(over, gap, width, found))
        panels.append(Panel(y, height))
        y += height
    return Layout(width, y + MARGIN, tuple(panels), tuple(cuts), places, crossings, stage_of)


def find_crossings(graph: nx.DiGraph, stage_of: dict[Hashable, int]) -> tuple[Crossing, ...]:
    """The tensors with readers in later stages; an edge over a cut that belongs to no tensor counts as one."""
    found, covered = [], set()
    for tensor in graph.graph.get("tensors", ()):
        producer, *readers = tensor["nodes"]
        covered |= {(producer, reader) for reader in readers}
        found.append(_crossing(str(tensor.get("name", producer)), producer, readers, stage_of, tensor))
    for producer in graph.nodes:
        readers = [reader for reader in graph.successors(producer) if (producer, reader) not in covered]
        if readers:
            found.append(_crossing(str(producer), producer, readers, stage_of, {}))
    return tuple(crossing for crossing in found if crossing.last > crossing.first)


def _crossing(
    name: str, producer: Hashable, readers: Sequence[Hashable], stage_of: dict[Hashable, int], costs: dict[str, Any]
) -> Crossing:
    first = stage_of[producer]
    num_bytes, one_way = costs.get("bytes"), costs.get("transfer_ms")
    return Crossing(
        name=name,
        producer=producer,
        readers=tuple(reader for reader in readers if stage_of[reader] > first),
        first=first,
        last=max((stage_of[reader] for reader in readers), default=first),
        num_bytes=num_bytes,
        gradient_bytes=costs.get("gradient_bytes", num_bytes),
        transfer_ms=one_way,
    )


def _place_stage(
    graph: nx.DiGraph, nodes: Sequence[Hashable], num_columns: int, top: float
) -> tuple[dict[Hashable, Place], float]:
    columns = _columns(graph, nodes)
    places: dict[Hashable, Place] = {}
    y, lane_of = top + HEADER + PADDING / 2, dict[Hashable, int]()
    for row, start in enumerate(range(0, len(columns), num_columns)):
        block = columns[start : start + num_columns]
        for index, column in enumerate(block):
            position = index if row % 2 == 0 else num_columns - 1 - index
            free = 0
            for node in sorted(column, key=lambda node: _mean_lane(graph, node, lane_of)):
                lane = max(free, min(round(_mean_lane(graph, node, lane_of)), MAX_LANES - 1))
                lane_of[node], free = lane, lane + 1
                places[node] = Place(MARGIN + PADDING + position * COLUMN, y + lane * LANE, row)
        lanes = 1 + max(lane_of[node] for column in block for node in column)
        y += lanes * LANE - (LANE - NODE_HEIGHT) + BLOCK_GAP
    return places, y - BLOCK_GAP + PADDING - top


def _columns(graph: nx.DiGraph, nodes: Sequence[Hashable]) -> list[list[Hashable]]:
    """The layers by their depth in the stage, in program order; a generation that is too high becomes several."""
    import networkx as nx

    order = {node: index for index, node in enumerate(nodes)}
    columns: list[list[Hashable]] = []
    for generation in nx.topological_generations(graph):
        ordered = sorted(generation, key=order.__getitem__)
        columns += [ordered[start : start + MAX_LANES] for start in range(0, len(ordered), MAX_LANES)]
    return columns


def _mean_lane(graph: nx.DiGraph, node: Hashable, lane_of: dict[Hashable, int]) -> float:
    lanes = [lane_of[before] for before in graph.predecessors(node) if before in lane_of]
    return sum(lanes) / len(lanes) if lanes else 0.0


def _place_cut(over: dict[int, Crossing], y: float, width: float, entered: dict[Hashable, Place]) -> Cut:
    """Each mark stands above the first layer that reads its tensor in the stage `entered`, or at the right to pass."""

    def wanted(number: int) -> float:
        readers = [entered[reader].x for reader in over[number].readers if reader in entered]
        return min(readers) + NODE_WIDTH / 2 - PILL_WIDTH / 2 if readers else width

    shown = sorted(sorted(over, key=lambda number: -(over[number].num_bytes or 0))[:MAX_PILLS], key=wanted)
    num_rows = max(1, -(-len(shown) // _per_row(width)))
    pills: dict[int, tuple[float, float]] = {}
    for row in range(num_rows):
        numbers, left, right = shown[row::num_rows], MARGIN + 4, width - MARGIN - 4
        corners = []
        for number in numbers:
            corners.append(max(wanted(number), left))
            left = corners[-1] + PILL_STEP
        for index in reversed(range(len(corners))):
            corners[index] = min(corners[index], right - PILL_WIDTH)
            right = corners[index] - (PILL_STEP - PILL_WIDTH)
        height = y + GAP + CUT_LABEL + row * PILL_ROW
        pills.update({number: (corner, height) for number, corner in zip(numbers, corners, strict=True)})
    return Cut(y, tuple(over.values()), pills)


def _per_row(width: float) -> int:
    return max(1, int((width - 2 * MARGIN) // PILL_STEP))


def _cut_height(num_pills: int, width: float) -> float:
    rows = -(-num_pills // _per_row(width))
    return 2 * GAP + CUT_LABEL + max(0, rows - 1) * PILL_ROW + PILL_HEIGHT
