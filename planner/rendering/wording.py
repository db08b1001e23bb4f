"""How every renderer writes a number or a name, and the few figures that all of them show."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

DASH = "–"
_UNIT = re.compile(r"(?<=\d) (?=(?:%|ms|×|s|[KMGT]iB|B)(?:\W|$))")


def format_ms(value: float) -> str:
    """Milliseconds with two or three significant digits, down to a microsecond.

    >>> format_ms(251.4), format_ms(12.34), format_ms(4.2), format_ms(0.0123), format_ms(1234.5)
    ('251 ms', '12.3 ms', '4.20 ms', '0.012 ms', '1,234 ms')
    """
    size = abs(value)
    digits = 0 if size >= 99.95 or size < 5e-4 else 1 if size >= 9.995 else 2 if size >= 0.0995 else 3
    return f"{value:,.{digits}f} ms"


def format_percent(fraction: float | None, *, signed: bool = False) -> str:
    """A fraction as per cent; a dash where it is not known.

    >>> format_percent(0.158), format_percent(0.24, signed=True), format_percent(None)
    ('15.8 %', '+24 %', '–')
    """
    if fraction is None:
        return DASH
    digits = 1 if abs(fraction) < (0.0995 if signed else 0.9995) else 0
    text = f"{fraction * 100:{'+' if signed else ''},.{digits}f} %"
    return "±0.0 %" if signed and text in ("+0.0 %", "-0.0 %") else text.replace("-", "−")


def format_bytes(value: float | None) -> str:
    """Bytes in the binary unit that keeps the number readable.

    >>> format_bytes(3.1 * 2**30), format_bytes(512), format_bytes(None)
    ('3.1 GiB', '512 B', '–')
    """
    if value is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1023.95 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:,.1f} {unit}"


def format_count(value: int) -> str:
    """A count in thousands, millions or billions: "33.9 M"."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return str(value)


def counted(number: int, noun: str, ending: str = "s") -> str:
    """A number with its noun.

    >>> counted(1, "stage"), counted(4, "stage"), counted(2, "microbatch", "es")
    ('1 stage', '4 stages', '2 microbatches')
    """
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def format_column(values: Sequence[float | None]) -> list[str]:
    """Numbers of one column, all with the same number of decimals; a dash for what is not known.

    >>> format_column([4.21, 12.5, None]), format_column([0.0214, 0.5])
    (['4.21', '12.50', '–'], ['0.021', '0.500'])
    """
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    digits = 1 if largest >= 99.95 else 2 if largest >= 0.995 else 3
    return [DASH if value is None else f"{value:,.{digits}f}" for value in values]


def format_bar(share: float, width: int) -> str:
    """A bar of `width` cells for a share of 1, in steps of an eighth of a cell.

    >>> format_bar(0.5, 4), format_bar(0.03125, 4)
    ('██', '▏')
    """
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def clean(text: str) -> str:
    """`text` without control characters: names come from files, and a terminal obeys what it is sent.

    >>> clean("layers.2" + chr(27) + "[31m")
    'layers.2?[31m'
    """
    return "".join("?" if unicodedata.category(character)[0] == "C" else character for character in text)


def shorten(name: str, width: int) -> str:
    """`name` in at most `width` characters: outer modules by their initials, numbers and the end kept.

    >>> shorten("transformer.h.11.mlp.c_fc", 16), shorten("transformer.h.11.mlp.c_fc", 8)
    ('t.h.11.mlp.c_fc', '….m.c_fc')
    """
    parts = clean(name).split(".")
    for index, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > width and not part.isdigit():
            parts[index] = part[:1]
    short = ".".join(parts)
    return short if len(short) <= width else f"…{short[len(short) - width + 1 :]}"


def baseline_label(name: str) -> str:
    """A baseline's key as words: `equal_layers` is "equal layers"."""
    return "equal FLOPs" if name == "flops" else clean(name).replace("_", " ")


def balance(loads: Iterable[float]) -> float | None:
    """Largest ÷ mean load: 1 is even; None where nothing is loaded."""
    found = list(loads)
    mean = sum(found) / len(found)
    return max(found) / mean if mean > 0 else None


def mean_bubble(fractions: Sequence[float | None]) -> float | None:
    """The idle share of the step, over all stages; None where a stage's is not known."""
    known = [fraction for fraction in fractions if fraction is not None]
    return sum(known) / len(known) if known and len(known) == len(fractions) else None


def glue(text: str) -> str:
    """`text` with every space between a number and its unit made one that does not break.

    >>> glue("12 % more")
    '12\\xa0% more'
    """
    return _UNIT.sub("\u00a0", text)


def wrap_text(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width`, never broken between a number and its unit.

    >>> wrap_text("it is 12 % more", 8)
    ['it is', '12 %', 'more']
    """
    lines = textwrap.wrap(glue(text), max(8, width), break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in lines] or [""]


def wrap_parts(parts: Sequence[str], width: int, indent: str = "") -> list[str]:
    """`parts` joined by dots, broken only between parts where a line would be wider than `width`."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]} · {part}" if lines else ""
        if lines and len(longer) <= width:
            lines[-1] = longer
        else:
            start = f"{indent}{'  ' if lines else ''}"
            lines += [start + piece for piece in wrap_text(part, width - len(start))]
    return lines
