"""What crossings are charged by → one line: measured links, or a bandwidth that was given."""

from __future__ import annotations

from planner.files.links_file import LinkFit
from planner.files.plan_file import Plan
from planner.rendering.wording import format_ms, format_percent

WORTH_SAYING = 1.2
NOISY = 0.25


def format_rate(bytes_per_s: float) -> str:
    """A rate to three digits with its prefix.

    >>> format_rate(1.9e9), format_rate(12_300.0)
    ('1.9 GB/s', '12.3 kB/s')
    """
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if bytes_per_s >= scale:
            return f"{bytes_per_s / scale:.3g} {prefix}B/s"
    return f"{bytes_per_s:.3g} B/s"


def links_line(plan: Plan) -> str:
    """`0.08 ms + 1.9 GB/s, residual 4.0 %`; empty where crossings are free."""
    if plan.links is not None:
        return describe_links(plan.links)
    rate = plan.bandwidth_bytes_per_s
    return "" if rate is None else f"{format_rate(rate)} (given), without latency"


def describe_links(fit: LinkFit) -> str:
    """The fit in words: latency and rate of a message of one tensor, what each further one adds, the residual.

    >>> describe_links(LinkFit(0.06, 0.02, 1e3 / 1.9e9, 0.04))
    '0.080 ms (0.020 ms per further tensor) + 1.9 GB/s, residual 4.0 %'
    """
    further = f" ({format_ms(fit.tensor_ms)} per further tensor)" if fit.tensor_ms else ""
    rate = f" + {format_rate(1e3 / fit.ms_per_byte)}" if fit.ms_per_byte else ", sizes made no difference"
    text = f"{format_ms(fit.message_ms + fit.tensor_ms)}{further}{rate}, residual {format_percent(fit.residual)}"
    if fit.residual > NOISY:
        text += " (a poor fit: noise, or no straight line)"
    if fit.slowest_ratio > WORTH_SAYING:
        text += f"; slowest {fit.slowest_sender}→{fit.slowest_sender + 1}: {fit.slowest_ratio:.1f} × that"
    return text
