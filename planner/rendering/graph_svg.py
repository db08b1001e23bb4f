"""A plan and its layer graph → an SVG that stands alone: layers coloured by stage, bytes on what crosses the cuts.

Every box has a tooltip with its figures; colours follow the reader's light or dark scheme; names are escaped.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from planner.files.plan_file import Plan
from planner.rendering.graph_layout import (
    BYPASS,
    GAP,
    HEADER,
    MARGIN,
    NODE_HEIGHT,
    NODE_WIDTH,
    PADDING,
    PILL_HEIGHT,
    PILL_WIDTH,
    Crossing,
    Cut,
    Layout,
    Place,
    place_graph,
)
from planner.rendering.plan_text import model_title, proof
from planner.rendering.wording import clean, counted, format_bytes, format_ms, shorten

if TYPE_CHECKING:
    import networkx as nx

LIGHT = ("#2f6fd0", "#c2571a", "#1f8a5b", "#9a3fb5", "#b8860b", "#c23b5e", "#0e8a99", "#6b6f2a")
DARK = ("#7fb0ff", "#ff9d66", "#5fd3a0", "#d79bf0", "#e5bf4f", "#ff8fab", "#5cd0de", "#c3c77a")
LEGEND_ROW, LEGEND_TOP, LEGEND_BAR = 20.0, 74.0, 150.0
GUTTER = 11.0
FONT = "ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif"


def render_graph_svg(graph: nx.DiGraph, plan: Plan) -> str:
    """The layers of `graph` in the stages of `plan`, as the text of an SVG file.

    Nodes have forward_ms and backward_ms; `graph.graph["tensors"]` may have bytes and gradient_bytes, as in
    `planner.partitioning.layer_graph`. Every node is in one of the plan's stages.
    """
    stages = [list(stage.nodes) for stage in plan.stages]
    layout = place_graph(graph, stages, LEGEND_TOP + LEGEND_ROW * len(stages) + 14)
    largest = max(_work_ms(data) for data in graph.nodes.values())
    elements = [
        *_heading(plan, len(graph.nodes)),
        *_legend(plan),
        *(_panel(layout, index) for index in range(len(stages))),
        *_inner_edges(graph, layout),
        *_crossing_lines(layout),
        *(_stage_line(layout, plan, index) for index in range(len(stages))),
        *(_node(graph, node, layout, largest) for node in graph.nodes),
        *(text for index, cut in enumerate(layout.cuts) for text in _cut(index, cut, layout)),
    ]
    label = f"Layer graph of {model_title(plan)} in {counted(len(stages), 'stage')}"
    size = f'viewBox="0 0 {layout.width:g} {layout.height:g}" width="{layout.width:g}" height="{layout.height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{_quoted(label)}">'
    background = '<rect class="paper" width="100%" height="100%"/>'
    return "\n".join([head, _style(len(stages)), background, *elements, "</svg>"]) + "\n"


def _style(num_stages: int) -> str:
    def colours(palette: Sequence[str]) -> str:
        return "".join(f".s{k}{{--c:{palette[k % len(palette)]}}}" for k in range(num_stages))

    return f"""<style>
svg{{--ink:#1c1e21;--soft:#6a6f76;--paper:#fff;--box:#fff;--line:#9aa0a8;font-family:{FONT}}}{colours(LIGHT)}
@media (prefers-color-scheme:dark){{svg{{--ink:#e9eaec;--soft:#a0a6ae;--paper:#16181b;--box:#22262b;--line:#737a83}}\
{colours(DARK)}}}
text{{fill:var(--ink);font-size:11px}}.title{{font-size:17px;font-weight:600}}.soft{{fill:var(--soft)}}
.small{{font-size:9px}}.middle{{text-anchor:middle}}.name{{font-weight:600;font-size:10.5px}}.halo{{stroke:var(--paper);stroke-width:4;paint-order:stroke;stroke-linejoin:round}}
.stage{{fill:var(--c);font-weight:700}}
.paper{{fill:var(--paper)}}.panel{{fill:var(--c);fill-opacity:.08;stroke:var(--c);stroke-opacity:.45}}
.box{{fill:var(--box);stroke:var(--c);stroke-width:1.2}}.load{{fill:var(--c)}}.rail{{fill:var(--c);fill-opacity:.18}}
.edge{{fill:none;stroke:var(--line);stroke-width:1.1}}.skip{{stroke-opacity:.55}}
.cross{{fill:none;stroke:var(--c);stroke-width:1.7}}.passing{{stroke-dasharray:5 3}}
.pill{{fill:var(--box);stroke:var(--c);stroke-width:1.4}}.tip{{fill:var(--line)}}.crosstip{{fill:var(--c)}}
</style>"""


def _heading(plan: Plan, num_layers: int) -> list[str]:
    figures = [counted(num_layers, "layer"), counted(plan.num_stages, "stage")]
    if plan.step_ms is not None:
        figures += [f"{plan.schedule}, {counted(plan.num_microbatches, 'microbatch', 'es')}"]
        figures += [f"step {format_ms(plan.step_ms)}"]
    else:
        figures += [f"largest load {format_ms(plan.objective_ms)}"]
    return [
        _text(MARGIN, 32, model_title(plan), "title"),
        _text(MARGIN, 52, " · ".join([*figures, proof(plan)]), "soft"),
    ]


def _legend(plan: Plan) -> list[str]:
    """A line per stage: its colour, its load as a bar, and what it holds."""
    largest = max((stage.load_ms for stage in plan.stages), default=0.0) or 1.0
    lines = []
    for stage in plan.stages:
        y = LEGEND_TOP + stage.index * LEGEND_ROW
        load = f"{format_ms(stage.load_ms)} per microbatch" if plan.schedule else format_ms(stage.load_ms)
        parts = [load, counted(len(stage.nodes), "layer")]
        parts += [f"{format_bytes(stage.parameter_bytes)} of parameters"] if stage.parameter_bytes else []
        parts += [f"begins at {shorten(str(stage.nodes[0]), 40)}"] if stage.nodes else []
        length = LEGEND_BAR * stage.load_ms / largest
        lines.append(
            f'<g class="s{stage.index}"><rect class="rail" x="{MARGIN + 58:g}" y="{y:g}" width="{LEGEND_BAR:g}"'
            f' height="12" rx="2"/><rect class="load" x="{MARGIN + 58:g}" y="{y:g}" width="{length:.1f}" height="12"'
            f' rx="2"/>{_text(MARGIN, y + 10, f"stage {stage.index}", "stage")}'
            f"{_text(MARGIN + 68 + LEGEND_BAR, y + 10, ' · '.join(parts), 'soft')}</g>"
        )
    return lines


def _panel(layout: Layout, index: int) -> str:
    panel, width = layout.panels[index], layout.width - 2 * MARGIN
    box = f'x="{MARGIN:g}" y="{panel.y:g}" width="{width:g}" height="{panel.height:g}"'
    return f'<g class="s{index}"><rect class="panel" {box} rx="8"/></g>'


def _stage_line(layout: Layout, plan: Plan, index: int) -> str:
    y, stage = layout.panels[index].y + 20, plan.stages[index]
    figures = f"forward {format_ms(stage.forward_ms)} · backward {format_ms(stage.backward_ms)}"
    name = _text(MARGIN + PADDING, y, f"stage {index}", "stage halo")
    return f'<g class="s{index}">{name}{_text(MARGIN + PADDING + 60, y, figures, "soft halo")}</g>'


def _node(graph: nx.DiGraph, node: Hashable, layout: Layout, largest_ms: float) -> str:
    """A box with the layer's name in two lines, and its work as a bar along the lower edge."""
    data, place = graph.nodes[node], layout.places[node]
    outer, _, inner = shorten_pair(str(node))
    length = (NODE_WIDTH - 12) * _work_ms(data) / (largest_ms or 1.0)
    x, y = place.x, place.y
    return (
        f'<g class="s{layout.stage_of[node]}"><title>{_escaped(_tooltip(node, data))}</title>'
        f'<rect class="box" x="{x:g}" y="{y:g}" width="{NODE_WIDTH:g}" height="{NODE_HEIGHT:g}" rx="5"/>'
        f"{_text(x + 7, y + 12, outer, 'small soft') if outer else ''}"
        f"{_text(x + 7, y + (25 if outer else 21), inner, 'name')}"
        f'<rect class="rail" x="{x + 6:g}" y="{y + 31:g}" width="{NODE_WIDTH - 12:g}" height="4" rx="2"/>'
        f'<rect class="load" x="{x + 6:g}" y="{y + 31:g}" width="{length:.1f}" height="4" rx="2"/></g>'
    )


def _work_ms(data: dict[str, Any]) -> float:
    return float(data.get("forward_ms") or 0.0) + float(data.get("backward_ms") or 0.0)


def shorten_pair(name: str) -> tuple[str, str, str]:
    """A layer's name as its outer modules and its own name, both short enough for a box.

    >>> shorten_pair("transformer.h.11.mlp.c_fc")
    ('transformer.h.11.mlp', '.', 'c_fc')
    """
    outer, dot, inner = clean(name).rpartition(".")
    if inner.isdigit() and dot:
        further, dot, last = outer.rpartition(".")
        outer, inner = further, f"{last}.{inner}"
    return shorten(outer, 20) if outer else "", dot, shorten(inner, 14)


def _tooltip(node: Hashable, data: dict[str, Any]) -> str:
    lines = [str(node)]
    if data.get("name") and str(data["name"]) != str(node):
        lines.append(str(data["name"]))
    lines += [f"{way} {format_ms(float(data.get(f'{way}_ms') or 0.0))}" for way in ("forward", "backward")]
    if data.get("optimizer_ms"):
        lines.append(f"optimizer {format_ms(float(data['optimizer_ms']))} per step")
    for field, what in (("parameter_bytes", "parameters"), ("memory_bytes", "memory")):
        lines += [f"{what} {format_bytes(float(data[field]))}"] if data.get(field) else []
    return "\n".join(lines)


def _inner_edges(graph: nx.DiGraph, layout: Layout) -> list[str]:
    edges = [(a, b) for a, b in graph.edges if layout.stage_of[a] == layout.stage_of[b]]
    return [_edge(layout.places[a], layout.places[b]) for a, b in edges]


def _edge(a: Place, b: Place) -> str:
    """An arrow between two boxes of a stage: side to side for neighbours, else an arc over or between the rows."""
    middle_a, middle_b = a.y + NODE_HEIGHT / 2, b.y + NODE_HEIGHT / 2
    if a.row != b.row:
        x, end = a.x + NODE_WIDTH / 2, b.x + NODE_WIDTH / 2
        near = abs(x - end) < 1
        start, stop = a.y + NODE_HEIGHT, b.y - 5
        bend = (stop - start) / 2
        path = f"M{x:g} {start:g}C{x:g} {start + bend:g} {end:g} {stop - bend:g} {end:g} {stop:g}"
        return f'<path class="edge{"" if near else " skip"}" d="{path}"/>{_tip(end, stop + 5, "down", "tip")}'
    rightward = b.x > a.x
    if abs(abs(b.x - a.x) - NODE_WIDTH) < 60:
        x, end = (a.x + NODE_WIDTH, b.x - 5) if rightward else (a.x, b.x + NODE_WIDTH + 5)
        bend = (end - x) / 2
        path = f"M{x:g} {middle_a:g}C{x + bend:g} {middle_a:g} {end - bend:g} {middle_b:g} {end:g} {middle_b:g}"
        tip = _tip(end + (5 if rightward else -5), middle_b, "right" if rightward else "left", "tip")
        return f'<path class="edge" d="{path}"/>{tip}'
    start, end = a.x + NODE_WIDTH * 0.5, b.x + NODE_WIDTH * (0.4 if rightward else 0.6)
    height = min(20.0, 6 + 2.5 * abs(b.x - a.x) / NODE_WIDTH)
    path = f"M{start:g} {a.y:g}C{start:g} {a.y - height:g} {end:g} {b.y - height - 5:g} {end:g} {b.y - 5:g}"
    return f'<path class="edge skip" d="{path}"/>{_tip(end, b.y, "down", "tip")}'


def _crossing_lines(layout: Layout) -> list[str]:
    """What crosses a cut, from the layer that makes it through its mark in every cut to the layers that read it."""
    lines, passing = [], dict[int, int]()
    for number, crossing in enumerate(layout.crossings):
        if any(number not in layout.cuts[k].pills for k in range(crossing.first, crossing.last)):
            continue
        lines.append(_line(crossing.first, [*_leaving(layout, crossing), _mark(layout, crossing.first, number)]))
        for stage in range(crossing.first + 1, crossing.last + 1):
            x, top = _mark(layout, stage - 1, number)
            start = (x, top + PILL_HEIGHT)
            for reader in crossing.readers:
                if layout.stage_of[reader] == stage:
                    points = _entering(layout, stage, reader)
                    lines.append(_line(crossing.first, [start, *points]))
                    lines.append(f'<g class="s{crossing.first}">{_tip(*points[-1], "down", "crosstip")}</g>')
            if stage < crossing.last:
                lane = passing[stage] = passing.get(stage, -1) + 1
                panel = layout.panels[stage]
                side = layout.width - MARGIN - 6 - BYPASS * (lane % 8)
                around = [(side, panel.y + 6), (side, panel.y + panel.height - 6), _mark(layout, stage, number)]
                lines.append(_line(crossing.first, [start, *around], " passing"))
    return lines


def _mark(layout: Layout, cut: int, number: int) -> tuple[float, float]:
    left, top = layout.cuts[cut].pills[number]
    return left + PILL_WIDTH / 2, top


def _leaving(layout: Layout, crossing: Crossing) -> list[tuple[float, float]]:
    """From a box down to the end of its panel, beside the boxes below it."""
    place, panel = layout.places[crossing.producer], layout.panels[crossing.first]
    x, y, end = place.x + NODE_WIDTH / 2, place.y + NODE_HEIGHT, panel.y + panel.height
    if end - y < NODE_HEIGHT:
        return [(x, y)]
    beside = place.x + NODE_WIDTH + GUTTER
    return [(x, y), (beside, y + 2 * GUTTER), (beside, end)]


def _entering(layout: Layout, stage: int, reader: Hashable) -> list[tuple[float, float]]:
    """From the beginning of a panel down to a box, beside the boxes above it."""
    place, panel = layout.places[reader], layout.panels[stage]
    x, y = place.x + NODE_WIDTH / 2, place.y
    if y - panel.y < NODE_HEIGHT + HEADER:
        return [(x, y)]
    beside = place.x - GUTTER
    return [(beside, panel.y + HEADER), (beside, y - 2 * GUTTER), (x, y)]


def _line(colour: int, points: Sequence[tuple[float, float]], kind: str = "") -> str:
    """A line through `points` that goes down through each of them."""
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for (x, y), (end, stop) in zip(points, points[1:], strict=False):
        bend = min(48.0, max(10.0, (stop - y) * 0.6))
        path += f"C{x:g} {y + bend:g} {end:g} {stop - bend:g} {end:g} {stop:g}" if x != end else f"V{stop:g}"
    return f'<g class="s{colour}"><path class="cross{kind}" d="{path}"/></g>'


def _tip(x: float, y: float, way: str, kind: str) -> str:
    points = {
        "down": f"{x - 3.5:g},{y - 6:g} {x + 3.5:g},{y - 6:g} {x:g},{y:g}",
        "right": f"{x - 6:g},{y - 3.5:g} {x - 6:g},{y + 3.5:g} {x:g},{y:g}",
        "left": f"{x + 6:g},{y - 3.5:g} {x + 6:g},{y + 3.5:g} {x:g},{y:g}",
    }
    return f'<polygon class="{kind}" points="{points[way]}"/>'


def _cut(index: int, cut: Cut, layout: Layout) -> list[str]:
    """What crosses a cut in words, and a mark with bytes both ways for every tensor."""
    count, hidden = len(cut.crossings), len(cut.crossings) - len(cut.pills)
    more = f" ({hidden} smallest without a mark)" if hidden else ""
    words = f"cut {index + 1} · {counted(count, 'tensor')}{more} · {_amounts(cut.crossings)}"
    marks = [_text(MARGIN + PADDING, cut.y + GAP, words, "soft halo")]
    for number, (x, y) in cut.pills.items():
        crossing = layout.crossings[number]
        readers = ", ".join(map(str, crossing.readers))
        tooltip = f"{crossing.name}\nmade by {crossing.producer}\nread by {readers}\n{_amounts([crossing])}"
        marks.append(
            f'<g class="s{crossing.first}"><title>{_escaped(tooltip)}</title>'
            f'<rect class="pill" x="{x:g}" y="{y:g}" width="{PILL_WIDTH:g}" height="{PILL_HEIGHT:g}" rx="10"/>'
            f"{_text(x + PILL_WIDTH / 2, y + 14, _amounts([crossing], short=True), 'middle')}</g>"
        )
    return marks


def _amounts(crossings: Sequence[Crossing], *, short: bool = False) -> str:
    """Bytes forward (down) and of gradients (up); else the transfer time that the graph gives; else a dash."""
    if all(crossing.num_bytes is None for crossing in crossings):
        times = [crossing.transfer_ms for crossing in crossings if crossing.transfer_ms is not None]
        return f"↓↑ {format_ms(sum(times))}" if times else "–"
    down = format_bytes(sum(crossing.num_bytes or 0 for crossing in crossings))
    up = format_bytes(sum(crossing.gradient_bytes or 0 for crossing in crossings))
    if short:
        return f"↓ {down}" if not crossings[0].gradient_bytes else f"↓ {down} · ↑ {up}"
    return f"↓ {down} forward · ↑ {up} of gradients"


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{_escaped(words)}</text>'


def _escaped(words: str) -> str:
    return escape("\n".join(clean(line) for line in words.split("\n")))


def _quoted(words: str) -> str:
    return escape(clean(words), {'"': "&quot;"})
