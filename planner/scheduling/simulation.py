"""The one oracle: event simulation of a pipeline schedule from the stages' times.

GPipe, 3 stages, 2 microbatches (F0 = forward of microbatch 0, B0 = its backward, O = optimizer):

    stage 0   F0 F1             B0 B1 O
    stage 1      F0 F1       B0 B1 O
    stage 2         F0 F1 B0 B1 O

Every closed form and every objective of the planner is held to `simulate` by tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from planner.errors import UsageError

Kind = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True, slots=True)
class StageTimes:
    """One stage: forward and backward per microbatch (sends and receives included), optimizer per step.

    `backward_first_ms` is the backward of a step's first microbatch, which has no gradient to add to.
    """

    forward_ms: float
    backward_ms: float
    backward_first_ms: float
    optimizer_ms: float


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work of one stage; the optimizer's microbatch is -1."""

    stage: int
    kind: Kind
    microbatch: int
    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """A step: `wait_ms` is each stage's idle time until its last backward ends.

    `bubble_fraction` is 1 − busy ÷ (time at which the last backward of all stages ends), without the optimizer. That is
    stage 0's last backward; another stage's may come sooner, even where its optimizer decides the step.
    """

    step_ms: float
    tasks: tuple[Task, ...]
    wait_ms: tuple[float, ...]
    bubble_fraction: tuple[float, ...]


def simulate(stages: Sequence[StageTimes], num_microbatches: int, schedule: str = "gpipe") -> SimulatedStep:
    """Run one step of `schedule` ("gpipe" or "1f1b") over `stages`; times in milliseconds.

    >>> simulate([StageTimes(1, 2, 2, 0)] * 2, 3).step_ms
    12.0
    """
    orders = [task_order(schedule, stage, len(stages), num_microbatches) for stage in range(len(stages))]
    ends: dict[tuple[str, int, int], float] = {}
    free = [0.0] * len(stages)
    tasks: list[Task] = []
    next_task = [0] * len(stages)
    while any(next_task[k] < len(orders[k]) for k in range(len(stages))):
        for k, order in enumerate(orders):
            while next_task[k] < len(order):
                kind, microbatch = order[next_task[k]]
                needed = _dependency(kind, k, microbatch, len(stages))
                if needed is not None and needed not in ends:
                    break
                start = max(free[k], ends[needed] if needed is not None else 0.0)
                free[k] = ends[kind, k, microbatch] = start + _duration(stages[k], kind, microbatch)
                tasks.append(Task(k, kind, microbatch, start, free[k]))
                next_task[k] += 1
    for k, stage in enumerate(stages):
        tasks.append(Task(k, "optimizer", -1, free[k], free[k] + stage.optimizer_ms))
    return _summary(tasks, len(stages))


def task_order(schedule: str, stage: int, num_stages: int, num_microbatches: int) -> list[tuple[Kind, int]]:
    """The tasks of one rank in the order in which it runs them."""
    everything = range(num_microbatches)
    if schedule == "gpipe":
        return [("forward", i) for i in everything] + [("backward", i) for i in everything]
    if schedule != "1f1b":
        raise UsageError(f"schedule {schedule!r}", "gpipe and 1f1b are simulated", "choose one of them")
    warm_up = min(num_microbatches, num_stages - stage)
    order: list[tuple[Kind, int]] = [("forward", i) for i in range(warm_up)]
    for i in everything:
        order.append(("backward", i))
        if warm_up + i < num_microbatches:
            order.append(("forward", warm_up + i))
    return order


def _dependency(kind: Kind, stage: int, microbatch: int, num_stages: int) -> tuple[str, int, int] | None:
    if kind == "forward":
        return ("forward", stage - 1, microbatch) if stage else None
    return ("backward", stage + 1, microbatch) if stage < num_stages - 1 else ("forward", stage, microbatch)


def _duration(stage: StageTimes, kind: Kind, microbatch: int) -> float:
    if kind == "forward":
        return stage.forward_ms
    return stage.backward_first_ms if microbatch == 0 else stage.backward_ms


def _summary(tasks: list[Task], num_stages: int) -> SimulatedStep:
    busy = [0.0] * num_stages
    last = [0.0] * num_stages
    for task in tasks:
        if task.kind != "optimizer":
            busy[task.stage] += task.end_ms - task.start_ms
            last[task.stage] = max(last[task.stage], task.end_ms)
    span = max(last)
    return SimulatedStep(
        step_ms=max(task.end_ms for task in tasks),
        tasks=tuple(tasks),
        wait_ms=tuple(end - work for end, work in zip(last, busy, strict=True)),
        bubble_fraction=tuple(1 - work / span if span else 0.0 for work in busy),
    )


def critical_path(step: SimulatedStep) -> tuple[Task, ...]:
    """The tasks that decide the step, first to last: each starts when the one before it ends, and waited for it.

    >>> step = simulate([StageTimes(1, 2, 2, 0)] * 2, 2)
    >>> [f"{task.kind} {task.microbatch} on {task.stage}" for task in critical_path(step)][:3]
    ['forward 0 on 0', 'forward 0 on 1', 'forward 1 on 1']
    """
    tasks = {(str(task.kind), task.stage, task.microbatch): task for task in step.tasks}
    on_stage: dict[int, list[Task]] = {}
    waits_for: dict[Task, list[Task]] = {}
    for task in step.tasks:
        before = on_stage.setdefault(task.stage, [])
        waits_for[task] = before[-1:]
        before.append(task)
    for task, others in waits_for.items():
        if task.kind != "optimizer":
            needed = _dependency(task.kind, task.stage, task.microbatch, len(on_stage))
            others.extend([tasks[needed]] if needed is not None else [])
    path = [max(step.tasks, key=lambda task: task.end_ms)]
    while waits_for[path[-1]]:
        path.append(max(waits_for[path[-1]], key=lambda other: other.end_ms))
    return tuple(reversed(path))


def too_few_microbatches(num_microbatches: int, num_stages: int) -> UsageError:
    """The error for 1F1B with fewer microbatches than stages."""
    return UsageError(
        f"{num_microbatches} microbatches for {num_stages} stages",
        "1F1B needs at least as many microbatches as stages",
        f"use {num_stages} microbatches or more (--microbatches, --batch-size), or --schedule gpipe",
    )
