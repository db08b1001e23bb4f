"""1F1B: the linear bound never above the simulation, the cut against brute force, and a run equal to the model."""

import itertools
import random

import pytest

from planner.errors import UsageError
from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.partitioning.chain import solve_chain
from planner.partitioning.chain_costs import Chain, is_plain, stage_costs, step_ms
from planner.partitioning.one_f_one_b import lower_bound_ms
from planner.request import PlanRequest, candidate_counts
from planner.scheduling.simulation import StageTimes, simulate
from tests.running import ROOT, command
from tests.test_chain import random_chain


def random_stages(generator, num_stages, spread):
    stages = []
    for _ in range(num_stages):
        forward = generator.uniform(1, spread)
        backward = forward * generator.uniform(1, 3)
        first = backward * generator.uniform(0.85, 1.05)
        stages.append(StageTimes(forward, backward, first, generator.choice([0.0, generator.uniform(0, 10)])))
    return stages


def test_the_bound_is_never_above_the_simulation_and_mostly_equal():
    generator, exact = random.Random(5), 0
    for _ in range(1000):
        num_stages = generator.randint(1, 8)
        count = num_stages + generator.choice([0, 1, 4, 16])
        stages = random_stages(generator, num_stages, generator.choice([1.2, 2, 6]))
        step, bound = simulate(stages, count, "1f1b").step_ms, lower_bound_ms(stages, count)
        assert bound <= step * (1 + 1e-9)
        exact += bound >= step * (1 - 1e-9)
    assert exact > 400


@pytest.mark.parametrize("plain", [False, True])
def test_the_cut_is_the_best_of_all(plain):
    generator = random.Random(11)
    solved = 0
    for _ in range(60):
        num_layers = generator.randint(3, 8)
        num_stages = generator.randint(2, min(4, num_layers))
        count = num_stages + generator.choice([0, 1, 4])
        chain = random_chain(generator, num_layers)
        cuts = itertools.combinations(range(1, num_layers), num_stages - 1)
        steps = [step_ms(chain, c, count, "1f1b") for c in cuts if not plain or is_plain(chain, c)]
        if not steps:
            continue
        solution = solve_chain(chain, num_stages, count, plain=plain, schedule="1f1b")
        assert solution.step_ms == pytest.approx(min(steps), rel=1e-9)
        assert solution.status == "optimal" and solution.lower_bound_ms <= solution.step_ms
        solved += 1
    assert solved > 20


def chain_of_times(forward, factor=2.0):
    n = len(forward)
    ids, zeros, backward = tuple(f"l.{i}" for i in range(n)), (0.0,) * n, tuple(factor * f for f in forward)
    return Chain(ids, ids, tuple(forward), zeros, backward, zeros, backward, zeros, (0,) * n, (True,) * n, (), ())


def test_the_vector_on_which_the_least_largest_load_is_not_the_best_step():
    """A published heuristic reaches 573 here; the cut with the least largest load gives 600."""
    chain = chain_of_times([8.0, 11, 2, 1, 18, 5, 4, 11])
    solution = solve_chain(chain, 4, 8, schedule="1f1b")
    every = [step_ms(chain, c, 8, "1f1b") for c in itertools.combinations(range(1, 8), 3)]
    least_largest = min(
        itertools.combinations(range(1, 8), 3),
        key=lambda c: max(s.forward_ms + s.backward_ms for s in stage_costs(chain, c)),
    )
    assert solution.step_ms == min(every) <= 573 < step_ms(chain, least_largest, 8, "1f1b")


def test_too_few_microbatches_are_refused():
    for action in (
        lambda: solve_chain(chain_of_times([1.0, 2, 3]), 3, 2, schedule="1f1b"),
        lambda: PlanRequest(gpus=4, microbatches=2, schedule="1f1b"),
        lambda: candidate_counts(3, PlanRequest(gpus=4, schedule="1f1b")),
    ):
        with pytest.raises(UsageError, match="at least as many microbatches as stages"):
            action()


def test_a_1f1b_plan_trains_as_the_unsplit_model(tmp_path):
    (tmp_path / "model.py").write_text((ROOT / "tests" / "models" / "skips.py").read_text())
    ended = command(
        "--gpus", 3, "model.py", "--microbatches", 4, "--schedule", "1f1b", "--train", "--steps", 2, "--check",
        "--run-dir", "run", module="planner", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert Plan.load(tmp_path / "model.plan.json").schedule == "1f1b"
    assert Profile.load(tmp_path / "model.profile.json").schedule == "1f1b"
    assert "profiled in" in ended.stdout
    measurement = Measurement.load(tmp_path / "run" / "measurement.json")
    assert measurement.schedule == "1f1b" and measurement.check is not None
    assert measurement.check.max_gradient_difference < 1e-5
