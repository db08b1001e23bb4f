"""Closed forms of a step, exact and held to the simulation by tests."""

from __future__ import annotations

from collections.abc import Sequence

from planner.scheduling.simulation import StageTimes


def gpipe_step_ms(stages: Sequence[StageTimes], num_microbatches: int) -> float:
    """The GPipe step in milliseconds, exact, with a cheaper (or dearer) first backward and the optimizer at the end.

    Forward fills and drains: Σ f + (m−1)·max f. Backward is a flow shop from the last stage to the first whose first
    job takes bf and the others b: up to stage k it takes, for the worst p ≥ q ≥ k,
    Σ_{j≥p} bf_j + Σ_{k≤j≤p} b_j + (m−2)·b_q (job 0 alone until stage p); for m = 1 it takes Σ_{j≥k} bf_j.

    >>> gpipe_step_ms([StageTimes(1, 2, 2, 0)] * 2, 3)
    12.0
    """
    m, last = num_microbatches, len(stages) - 1
    forward = sum(s.forward_ms for s in stages) + (m - 1) * max(s.forward_ms for s in stages)
    first_after = [0.0] * (len(stages) + 1)
    for j in range(last, -1, -1):
        first_after[j] = first_after[j + 1] + stages[j].backward_first_ms
    if m == 1:
        return forward + max(first_after[k] + stages[k].optimizer_ms for k in range(last + 1))
    longest = 0.0
    for k in range(last + 1):
        total = largest = 0.0
        for p in range(k, last + 1):
            total += stages[p].backward_ms
            largest = max(largest, stages[p].backward_ms)
            longest = max(longest, first_after[p] + total + (m - 2) * largest + stages[k].optimizer_ms)
    return forward + longest


def ideal_step_ms(stages: Sequence[StageTimes], num_microbatches: int) -> float:
    """The step with perfect balance and no bubble: all work, the optimizer included, divided by the stages."""
    m = num_microbatches
    work = sum(m * s.forward_ms + s.backward_first_ms + (m - 1) * s.backward_ms + s.optimizer_ms for s in stages)
    return work / len(stages)
