"""The simulation by hand, and every closed form of a step held to it on random cases."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from planner.errors import UsageError
from planner.scheduling.closed_forms import gpipe_step_ms, ideal_step_ms
from planner.scheduling.simulation import SimulatedStep, StageTimes, critical_path, simulate

NUM_CASES = 1000


def random_stages(generator: random.Random) -> list[StageTimes]:
    """One to eight stages whose first backward is cheaper or dearer than the others, some of them free."""
    stages = []
    for _ in range(generator.randint(1, 8)):
        backward = generator.choice((0.0, generator.uniform(0, 1), generator.lognormvariate(0, 1)))
        stages.append(
            StageTimes(
                generator.choice((0.0, generator.lognormvariate(0, 1))),
                backward,
                backward * generator.uniform(0.5, 1.5) + generator.choice((0.0, generator.uniform(0, 3))),
                generator.choice((0.0, generator.lognormvariate(0, 1))),
            )
        )
    return stages


def shown(step: SimulatedStep, stage: int) -> list[tuple[str, int, float, float]]:
    return [(task.kind[0], task.microbatch, task.start_ms, task.end_ms) for task in step.tasks if task.stage == stage]


def test_gpipe_by_hand() -> None:
    step = simulate([StageTimes(1, 2, 1, 3), StageTimes(2, 3, 2, 4)], 2)
    assert shown(step, 0) == [("f", 0, 0, 1), ("f", 1, 1, 2), ("b", 0, 7, 8), ("b", 1, 10, 12), ("o", -1, 12, 15)]
    assert shown(step, 1) == [("f", 0, 1, 3), ("f", 1, 3, 5), ("b", 0, 5, 7), ("b", 1, 7, 10), ("o", -1, 10, 14)]
    assert step.step_ms == 15
    assert step.wait_ms == (7, 1)
    assert step.bubble_fraction == pytest.approx((1 - 5 / 12, 1 - 9 / 12))


def test_1f1b_by_hand() -> None:
    step = simulate([StageTimes(1, 2, 2, 0)] * 2, 3, "1f1b")
    order = [(kind, microbatch) for kind, microbatch, _, _ in shown(step, 0)]
    assert order == [("f", 0), ("f", 1), ("b", 0), ("f", 2), ("b", 1), ("b", 2), ("o", -1)]
    assert [start for _, _, start, _ in shown(step, 1)] == [1, 2, 4, 5, 7, 8, 10]
    assert step.step_ms == 12


def test_1f1b_holds_at_most_as_many_microbatches_as_stages_follow() -> None:
    num_stages = 4
    step = simulate([StageTimes(1, 2, 2, 0)] * num_stages, 9, "1f1b")
    for stage in range(num_stages):
        alive = peak = 0
        for kind, *_ in shown(step, stage):
            alive += {"f": 1, "b": -1, "o": 0}[kind]
            peak = max(peak, alive)
        assert (alive, peak) == (0, num_stages - stage)


def test_an_unknown_schedule_is_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match="gpipe and 1f1b"):
        simulate([StageTimes(1, 1, 1, 0)], 1, "zigzag")


def test_the_gpipe_closed_form_is_the_simulation() -> None:
    generator = random.Random(1)
    for _ in range(NUM_CASES):
        stages, m = random_stages(generator), generator.randint(1, 16)
        assert gpipe_step_ms(stages, m) == pytest.approx(simulate(stages, m).step_ms, rel=1e-9, abs=1e-12)


def test_the_simplified_form_with_equal_backwards_is_a_special_case() -> None:
    """The published form: Σf + (m−1)·max f + max_k(Σ_{j≥k} b_j + (m−1)·max_{j≥k} b_j + optimizer_k)."""
    generator = random.Random(2)
    for _ in range(100):
        stages = [
            StageTimes(s.forward_ms, s.backward_ms, s.backward_ms, s.optimizer_ms) for s in random_stages(generator)
        ]
        m = generator.randint(1, 16)
        b = [s.backward_ms for s in stages]
        backward = max(sum(b[k:]) + (m - 1) * max(b[k:]) + s.optimizer_ms for k, s in enumerate(stages))
        f = [s.forward_ms for s in stages]
        assert gpipe_step_ms(stages, m) == pytest.approx(sum(f) + (m - 1) * max(f) + backward)


def test_every_step_respects_its_order_its_dependencies_and_the_ideal() -> None:
    generator = random.Random(3)
    for case in range(200):
        stages, m = random_stages(generator), generator.randint(1, 12)
        step = simulate(stages, m, ("gpipe", "1f1b")[case % 2])
        assert len(step.tasks) == len(stages) * (2 * m + 1)
        assert step.step_ms >= ideal_step_ms(stages, m) * (1 - 1e-9)
        ends = {(task.kind, task.stage, task.microbatch): task.end_ms for task in step.tasks}
        for task in step.tasks:
            later_stage = task.stage + 1 < len(stages)
            if task.kind == "forward" and task.stage:
                assert task.start_ms >= ends["forward", task.stage - 1, task.microbatch]
            if task.kind == "backward":
                needed = ("backward", task.stage + 1) if later_stage else ("forward", task.stage)
                assert task.start_ms >= ends[(*needed, task.microbatch)]
        assert all(wait >= -1e-9 for wait in step.wait_ms)
        assert all(-1e-9 <= bubble <= 1 for bubble in step.bubble_fraction)


def test_the_bubble_is_no_less_than_none_where_another_stages_optimizer_decides() -> None:
    """Stage 1 ends last by its optimizer alone; measured against its last backward, stage 0 would be 444 % busy."""
    step = simulate([StageTimes(1, 9, 9, 0), StageTimes(1, 1, 1, 1000)], 4)
    assert (step.step_ms, critical_path(step)[-1].stage) == (1009, 1)
    assert step.bubble_fraction == pytest.approx((1 - 40 / 42, 1 - 8 / 42))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_critical_path_is_gapless_linked_and_as_long_as_the_step(schedule: str) -> None:
    generator = random.Random(4)
    for _ in range(200):
        step = simulate(random_stages(generator), generator.randint(1, 8), schedule)
        path = critical_path(step)
        assert path[0].start_ms == 0 and path[-1].end_ms == step.step_ms
        for before, after in pairwise(path):
            assert before.end_ms == after.start_ms
            same_microbatch = before.microbatch == after.microbatch and before.kind != "optimizer"
            assert before.stage == after.stage or (same_microbatch and before.kind == after.kind)


def test_the_critical_path_passes_through_a_stage_that_costs_nothing() -> None:
    step = simulate([StageTimes(1, 1, 1, 0), StageTimes(0, 0, 0, 0), StageTimes(1, 1, 1, 0)], 2)
    path = critical_path(step)
    assert (path[0].start_ms, path[0].kind) == (0, "forward")
    assert {task.stage for task in path} == {0, 1, 2}


def test_one_optimizer_never_waits_for_another_that_ends_by_chance_as_it_starts() -> None:
    step = simulate([StageTimes(1, 2, 2, 5), StageTimes(1, 2, 2, 2)], 2)
    assert [task.kind for task in critical_path(step)].count("optimizer") == 1


def test_ideal_counts_all_work_once() -> None:
    assert ideal_step_ms([StageTimes(1, 2, 1, 3), StageTimes(2, 3, 2, 4)], 2) == (2 + 3 + 3 + 4 + 5 + 4) / 2
