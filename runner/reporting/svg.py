"""The pieces of which all drawings are made: escaped SVG elements, one palette for light and dark, round ticks.

A drawing is a string that stands by itself: it carries its own style, so that it can be put into a page, shown in a
notebook, or saved as a file. Colours are Okabe and Ito's, which people with every kind of colour vision tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

STYLE = """
.chart{--ink:#1b1f24;--soft:#59636e;--rule:#d8dee4;--empty:#eef1f4;--paper:#fff;--forward:#0072b2;--backward:#e69f00;
--optimizer:#009e73;--accent:#d55e00;--on:#fff;--a:#0072b2;--b:#56b4e9;--c:#009e73;--d:#e69f00;--e:#cc79a7;--f:#8c959f;
font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
@media (prefers-color-scheme:dark){.chart{--ink:#e6e9ed;--soft:#9aa5b1;--rule:#363d46;--empty:#242a31;--paper:#15191e;
--forward:#4aa3df;--backward:#f0b429;--optimizer:#2fc497;--accent:#ff8a3d;--on:#0b1116;--a:#4aa3df;--b:#8fd0f5;--c:#2fc497;
--d:#f0b429;--e:#e19ac3;--f:#8b97a3}}
.chart text{fill:var(--ink)}.chart .soft{fill:var(--soft)}.chart .end{text-anchor:end}.chart .middle{text-anchor:middle}
.chart .strong{font-weight:600}.chart .rule{stroke:var(--rule);stroke-width:1}.chart .empty{fill:var(--empty)}
.chart .forward{fill:var(--forward)}.chart .backward{fill:var(--backward)}.chart .optimizer{fill:var(--optimizer)}
.chart .pale{opacity:.45}.chart .a{fill:var(--a)}.chart .b{fill:var(--b)}.chart .c{fill:var(--c)}
.chart .d{fill:var(--d)}.chart .e{fill:var(--e)}.chart .f{fill:var(--f)}
.chart .plain{fill:var(--soft)}.chart .chosen{fill:var(--accent)}
.chart .line{fill:none;stroke:var(--forward);stroke-width:2;stroke-linejoin:round}
.chart .mark{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:4 3;fill:none}
.chart .task{stroke:var(--paper);stroke-width:.5}.chart .thin{stroke:none}
.chart .critical{stroke:var(--ink);stroke-width:1.6}.chart .thin.critical{stroke-width:.8}
.chart .tick{stroke:var(--ink);stroke-opacity:.13}.chart .on-forward{fill:var(--on);font-size:9px}
.chart .on-backward{fill:#1b1f24;font-size:9px}.chart text{pointer-events:none}
""".replace("\n", "")


def number(value: float) -> str:
    """A coordinate with at most two decimals.

    >>> number(3.0), number(2.456)
    ('3', '2.46')
    """
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def drawing(width: float, height: float, label: str, elements: Sequence[str]) -> str:
    """A whole SVG of `width` by `height` units; `label` is what a screen reader says."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {number(width)} {number(height)}"'
        f' width="{number(width)}" height="{number(height)}" role="img" aria-label="{escape(label)}">'
        f"<style>{STYLE}</style>{''.join(elements)}</svg>"
    )


def rect(x: float, y: float, width: float, height: float, style: str, title: str = "", radius: float = 0) -> str:
    """A rectangle; `title` is shown on hovering."""
    inner = f"<title>{escape(title)}</title></rect>" if title else ""
    rounded = f' rx="{number(radius)}"' if radius else ""
    box = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0.0))}" height="{number(max(height, 0.0))}"'
    return f'<rect {box}{rounded} class="{style}"{">" if inner else "/>"}{inner}'


def text(x: float, y: float, content: str, style: str = "") -> str:
    """A line of text whose baseline is at `y`."""
    return f'<text x="{number(x)}" y="{number(y)}" class="{style}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str = "rule") -> str:
    """A straight line."""
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line {ends} class="{style}"/>'


def polyline(points: Sequence[tuple[float, float]], style: str = "line") -> str:
    """A line through `points`."""
    joined = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polyline points="{joined}" class="{style}"/>'


def dot(x: float, y: float, style: str, title: str = "", radius: float = 3.5) -> str:
    """A filled circle; `title` is shown on hovering."""
    circle = f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" class="{style}">'
    return f"{circle}<title>{escape(title)}</title></circle>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`; one number where the two are equal.

    >>> ticks(0, 251, 5)
    [0.0, 50.0, 100.0, 150.0, 200.0, 250.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(size * magnitude for size in (1, 2, 2.5, 5, 10) if size * magnitude >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """A tick as text, short.

    >>> tick_label(50.0), tick_label(1500.0), tick_label(0.25)
    ('50', '1,500', '0.25')
    """
    return f"{value:,.0f}" if value == round(value) else f"{value:,.6g}"


def fitted(name: str, width: float, unit: float = 6.6) -> str:
    """`name` cut at its beginning to what fits into `width` units; its end says more."""
    room = max(4, int(width / unit))
    return name if len(name) <= room else f"…{name[-(room - 1) :]}"
