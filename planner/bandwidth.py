"""The rate of a link as a person writes it → bytes per second."""

from __future__ import annotations

import re

from planner.files.reading import MOST

LEAST_RATE = 1.0
PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BINARY = {f"{prefix}i": 2.0 ** (10 * (power + 1)) for power, prefix in enumerate("KMGT")}
RATE = re.compile(r"(?P<number>[\d.]+(?:[eE][+-]?\d+)?)\s*(?:(?P<prefix>[kKMGT]i?)?(?P<unit>B|b|bits?)(?:/s|ps)?)?")


def parse_bandwidth(text: str) -> float:
    """Bytes per second: B is bytes, b (or bit) is bits, a bare number is bytes; Ki, Mi, Gi, Ti are powers of 1024.

    Raises ValueError for what is no rate of a link, and for what leaves open whether bits or bytes are meant.

    >>> parse_bandwidth("12GB/s"), parse_bandwidth("100Gb/s"), parse_bandwidth("1GiB/s"), parse_bandwidth("25Gbps")
    (12000000000.0, 12500000000.0, 1073741824.0, 3125000000.0)
    """
    match = RATE.fullmatch(text.strip())
    rate = 0.0 if match is None else _bytes_per_s(match)
    if not LEAST_RATE <= rate <= MOST:
        raise ValueError(
            f"got {text!r}; it must be a rate in bytes (12GB/s) or in bits (100Gb/s), which the case of B or b tells"
            " apart, of a byte per second or more; the prefixes are k, M, G, T and Ki, Mi, Gi, Ti"
        )
    return rate


def _bytes_per_s(match: re.Match[str]) -> float:
    try:
        value = float(match["number"])
    except ValueError:
        return 0.0
    prefix = match["prefix"] or ""
    scale = BINARY[prefix.capitalize()] if prefix.endswith("i") else PREFIXES[prefix]
    return value * scale / (8 if (match["unit"] or "B").startswith("b") else 1)
