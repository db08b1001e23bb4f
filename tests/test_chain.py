"""The ILP on chains against brute force over all cuts, its proof, its refusals, and its silence on stdout."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from planner.errors import InfeasibleError
from planner.partitioning import chain as chain_module
from planner.partitioning.baselines import baselines
from planner.partitioning.bounds import incumbent, remainder
from planner.partitioning.chain import best_plain_within, cheapest_move, solve_chain
from planner.partitioning.chain_costs import (
    Chain,
    ChainTensor,
    ChainTied,
    CostTable,
    Cuts,
    crossing,
    is_plain,
    stage_costs,
    step_ms,
)
from planner.scheduling.simulation import StageTimes, simulate

NUM_CHAINS = 150


def make_chain(
    forward: list[float],
    backward: list[float] | None = None,
    tensors: tuple[ChainTensor, ...] = (),
    tied: tuple[ChainTied, ...] = (),
    plain: list[bool] | None = None,
    first: list[float] | None = None,
    optimizer: list[float] | None = None,
) -> Chain:
    """A chain of these costs; backward is twice forward, the first backward equal, the optimizer free."""
    count = len(forward)
    backward = [2 * ms for ms in forward] if backward is None else backward
    names = tuple(f"layers.{index}" for index in range(count))
    nothing = (0.0,) * count
    return Chain(
        ids=names,
        names=names,
        forward_ms=tuple(forward),
        forward_spread_ms=nothing,
        backward_ms=tuple(backward),
        backward_spread_ms=nothing,
        backward_first_ms=tuple(first or backward),
        optimizer_ms=tuple(optimizer or nothing),
        parameter_bytes=tuple(range(count)),
        plain_cut=tuple(plain or [True] * count),
        tensors=tensors,
        tied=tied,
    )


def random_chain(generator: random.Random, num_layers: int, dearer_first: bool = False) -> Chain:
    """Messages, transfers, skips, up to two tied groups; first backward cheaper, with `dearer_first` also dearer."""
    forward = [generator.lognormvariate(0, 0.8) for _ in range(num_layers)]
    backward = [2 * ms * generator.uniform(0.5, 1.5) for ms in forward]
    tensors, tied = [], []
    for index in range(num_layers - 1):
        last = min(num_layers - 1, index + generator.choice((1, 1, 1, 2, 4)))
        ms = [generator.choice((0.0, generator.uniform(0, 0.6))) for _ in range(2)]
        tensors.append(ChainTensor(f"t{index}", index, last, 8, 8, *ms))
    for group in range(generator.randint(0, 2) if num_layers > 1 else 0):
        layers = tuple(sorted(generator.sample(range(num_layers), min(num_layers, generator.choice((2, 2, 3))))))
        tied.append(ChainTied(f"w{group}", layers, 16, generator.uniform(0, 3), generator.choice((0.0, 0.5, 2.0))))
    chain = make_chain(
        forward,
        backward,
        tuple(tensors),
        tuple(tied),
        [generator.random() < 0.8 for _ in range(num_layers)],
        [ms * generator.uniform(0.5, 1.5 if dearer_first else 1.0) for ms in backward],
        [generator.choice((0.0, generator.uniform(0, 4))) for _ in range(num_layers)],
    )
    return replace(chain, message_ms=generator.choice((0.0, 0.3)))


def cases(seed: int, count: int, dearer_first: bool = False) -> Iterator[tuple[Chain, int, int]]:
    generator = random.Random(seed)
    for _ in range(count):
        num_layers = generator.randint(1, 9)
        chain = random_chain(generator, num_layers, dearer_first)
        yield chain, generator.randint(1, min(4, num_layers)), generator.choice((1, 2, 4, 8))


def all_cuts(chain: Chain, num_stages: int) -> list[Cuts]:
    return list(combinations(range(1, len(chain.ids)), num_stages - 1))


@pytest.mark.parametrize("dearer_first", [False, True])
def test_the_solver_finds_what_brute_force_finds_and_proves_it(dearer_first: bool) -> None:
    for chain, num_stages, m in cases(10 + dearer_first, NUM_CHAINS, dearer_first):
        best = min(step_ms(chain, cuts, m) for cuts in all_cuts(chain, num_stages))
        solution = solve_chain(chain, num_stages, m)
        assert solution.step_ms == pytest.approx(best, rel=1e-9)
        assert solution.step_ms == step_ms(chain, solution.cuts, m)
        assert solution.status == "optimal"
        assert solution.lower_bound_ms == pytest.approx(best, rel=1e-8)
        assert solution.lower_bound_ms <= solution.step_ms
        for cuts in baselines(chain, num_stages).values():
            assert solution.step_ms <= step_ms(chain, cuts, m) * (1 + 1e-12)


def test_plain_finds_what_brute_force_over_plain_cuts_finds() -> None:
    feasible = 0
    for chain, num_stages, m in cases(20, NUM_CHAINS):
        steps = [step_ms(chain, cuts, m) for cuts in all_cuts(chain, num_stages) if is_plain(chain, cuts)]
        if not steps:
            with pytest.raises(InfeasibleError, match=f"no plain chain of {num_stages} stages"):
                solve_chain(chain, num_stages, m, plain=True)
            continue
        feasible += 1
        solution = solve_chain(chain, num_stages, m, plain=True)
        assert is_plain(chain, solution.cuts) and solution.status == "optimal"
        assert solution.step_ms == pytest.approx(min(steps), rel=1e-9)
    assert NUM_CHAINS // 4 < feasible < NUM_CHAINS


def test_the_largest_plain_number_of_stages_is_named_and_works() -> None:
    named = 0
    for chain, _, m in cases(30, NUM_CHAINS):
        count = len(chain.ids)
        works = max(k for k in range(1, count + 1) if any(is_plain(chain, cuts) for cuts in all_cuts(chain, k)))
        assert CostTable(chain, m, plain=True).most_stages() == works
        if 1 < works < count:
            named += 1
            with pytest.raises(InfeasibleError) as refused:
                solve_chain(chain, works + 1, m, plain=True)
            assert refused.value.remedy == f"drop --plain, or use --gpus {works} or fewer"
            assert len(solve_chain(chain, works, m, plain=True).cuts) == works - 1
    assert named > NUM_CHAINS // 4


def test_plain_that_cannot_be_is_refused_without_a_search() -> None:
    """Thirty stages from no plain cut: naming the remedy once took a solve for every subset of smaller counts."""
    chain = make_chain([1.0] * 60, plain=[False] * 60)
    with pytest.raises(InfeasibleError) as refused:
        solve_chain(chain, 30, 30, plain=True)
    assert refused.value.remedy == "drop --plain"


def test_the_bounds_hold_and_leave_the_optimum_open() -> None:
    for chain, num_stages, m in cases(40, NUM_CHAINS, dearer_first=True):
        if num_stages == 1:
            continue
        optimum = min(all_cuts(chain, num_stages), key=lambda cuts: step_ms(chain, cuts, m))
        best = step_ms(chain, optimum, m)
        table = CostTable(chain, m)
        some = all_cuts(chain, num_stages)[0]
        for start in (some, incumbent(table, num_stages, (some,))):
            left = remainder(table, num_stages, start)
            assert left.bound_ms <= best * (1 + 1e-9)
            assert all(cut in positions for cut, positions in zip(optimum, left.positions, strict=True))


def test_no_neighbouring_cut_is_better_and_the_cheapest_move_is_the_best_of_them() -> None:
    for chain, num_stages, m in cases(50, 60):
        solution = solve_chain(chain, num_stages, m)
        bounds = (0, *solution.cuts, len(chain.ids))
        deltas = []
        for k in range(1, num_stages):
            for moved in (bounds[k] - 1, bounds[k] + 1):
                if bounds[k - 1] < moved < bounds[k + 1]:
                    other = (*solution.cuts[: k - 1], moved, *solution.cuts[k:])
                    deltas.append(step_ms(chain, other, m) - solution.step_ms)
        assert all(delta >= -1e-9 * solution.step_ms for delta in deltas)
        move = cheapest_move(chain, solution.cuts, m)
        assert (move is None) == (not deltas)
        if move is not None:
            assert move[3] == pytest.approx(min(deltas), abs=1e-9)


def test_the_cheapest_move_names_the_layer_and_where_it_goes() -> None:
    chain = make_chain([1.0, 1.0, 1.0, 1.0, 4.0])
    assert cheapest_move(chain, (4,), 4) == (3, 0, 1, pytest.approx(3 * 3 * 1.0))
    assert cheapest_move(make_chain([1.0, 1.0]), (1,), 4) is None
    assert cheapest_move(chain, (), 4) is None


def test_stage_costs_by_hand() -> None:
    """Two cuts: a skip of layer 0 to 3 is relayed over both, and a parameter of layers 0 and 3 is stepped twice."""
    chain = make_chain(
        [1.0, 2.0, 3.0, 4.0],
        tensors=(ChainTensor("skip", 0, 3, 8, 8, 0.5, 0.25), ChainTensor("next", 1, 2, 8, 8, 0.125, 0.0)),
        tied=(ChainTied("w", (0, 3), 16, 10.0, 7.0),),
        first=[1.0, 2.0, 3.0, 4.0],
        optimizer=[0.1, 0.2, 0.3, 0.4],
    )
    assert [tensor.name for tensor in crossing(chain, 2)] == ["skip", "next"]
    assert [tensor.name for tensor in crossing(chain, 3)] == ["skip"]
    first, second, third = stage_costs(chain, (2, 3))
    assert first == StageTimes(3.625, 6.25, 3.25, pytest.approx(10.3))
    assert second == StageTimes(3 + 0.625 + 0.5, 6 + 0.5, 3 + 0.5, 0.3)
    assert third == StageTimes(4.5, 8.25, 4.25, pytest.approx(10.4))
    assert step_ms(chain, (2, 3), 2) == pytest.approx(simulate((first, second, third), 2).step_ms + 7.0)
    assert not is_plain(chain, (2, 3))


def test_a_table_agrees_with_the_sums() -> None:
    for chain, num_stages, m in cases(60, 60):
        table = CostTable(chain, m)
        for cuts in all_cuts(chain, num_stages):
            assert table.step(cuts) == pytest.approx(step_ms(chain, cuts, m), rel=1e-12)


def test_plain_means_plain_cuts_no_relay_and_no_tied_group_apart() -> None:
    skip = (ChainTensor("skip", 0, 3, 8, 8, 0.0, 0.0),)
    assert is_plain(make_chain([1.0] * 5, tensors=skip), (1,))
    assert not is_plain(make_chain([1.0] * 5, tensors=skip), (1, 3))
    assert is_plain(make_chain([1.0] * 5, tensors=skip), (1, 4))
    assert not is_plain(make_chain([1.0] * 5, plain=[True, True, False, True, True]), (2,))
    assert not is_plain(make_chain([1.0] * 5, tied=(ChainTied("w", (0, 2), 1, 0.0, 0.0),)), (2,))
    assert is_plain(make_chain([1.0] * 5, tied=(ChainTied("w", (0, 2), 1, 0.0, 0.0),)), (3,))


def test_a_dear_sum_keeps_a_tied_group_together() -> None:
    forward = [1.0] * 6
    free = make_chain(forward, tied=(ChainTied("w", (2, 3), 1, 0.0, 0.0),))
    dear = make_chain(forward, tied=(ChainTied("w", (2, 3), 1, 0.0, 100.0),))
    assert solve_chain(free, 2, 4).cuts == (3,)
    assert solve_chain(dear, 2, 4).cuts in ((2,), (4,))


def test_a_plain_chain_is_chosen_among_equals() -> None:
    even = make_chain([1.0, 1.0, 0.0, 1.0, 1.0], plain=[True, True, False, True, True])
    best = solve_chain(even, 2, 4).step_ms
    assert best_plain_within(even, 2, 4, best) == (3,)
    uneven = make_chain([1.0] * 4, plain=[True, True, False, True])
    best = solve_chain(uneven, 2, 4).step_ms
    assert best_plain_within(uneven, 2, 4, best) is None
    assert best_plain_within(make_chain([1.0] * 4, plain=[False] * 4), 2, 4, best) is None


def test_too_many_stages_are_refused_with_the_number_that_works() -> None:
    with pytest.raises(InfeasibleError) as refused:
        solve_chain(make_chain([1.0] * 6), 8, 8)
    assert refused.value.args[:3] == (
        "cannot cut 6 layers into 8 stages",
        "the model has 5 legal cuts",
        "use --gpus 6 or fewer",
    )


def test_one_stage_needs_no_solver() -> None:
    chain = make_chain([1.0, 2.0])
    solution = solve_chain(chain, 1, 4)
    assert (solution.cuts, solution.status, solution.num_nodes) == ((), "optimal", 0)
    assert solution.step_ms == solution.lower_bound_ms == step_ms(chain, (), 4)


def test_as_many_stages_as_layers_and_costs_of_nothing() -> None:
    assert solve_chain(make_chain([1.0, 5.0, 2.0]), 3, 4).cuts == (1, 2)
    nothing = solve_chain(make_chain([0.0] * 5), 3, 4)
    assert (nothing.step_ms, nothing.lower_bound_ms, nothing.status) == (0, 0, "optimal")


def test_an_unproven_end_is_feasible_with_an_honest_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS stopped at its limit: the incumbent stands, and the bound is that of the boxes or HiGHS, not the step."""
    stopped_before_any_solution = 0  # pulp's sol_status
    monkeypatch.setattr(chain_module, "solve", lambda problem, limit: stopped_before_any_solution)
    monkeypatch.setattr(chain_module, "dual_bound", lambda problem: 0.0)
    monkeypatch.setattr(chain_module, "node_count", lambda problem: 3)
    chain = random_chain(random.Random(7), 9)
    solution = solve_chain(chain, 4, 4)
    best = min(step_ms(chain, cuts, 4) for cuts in all_cuts(chain, 4))
    assert (solution.status, solution.num_nodes) == ("feasible", 3)
    assert solution.lower_bound_ms <= best <= solution.step_ms
    assert solution.step_ms == step_ms(chain, solution.cuts, 4)


def test_the_time_limit_ends_a_large_problem_with_its_gap() -> None:
    chain = random_chain(random.Random(8), 150)
    solution = solve_chain(chain, 8, 2, time_limit_s=0.01)
    assert solution.status == "feasible"
    assert 0 < solution.lower_bound_ms < solution.step_ms
    assert len(solution.cuts) == 7


@pytest.mark.parametrize("plain", [False, True])
def test_120_layers_in_8_stages_are_proven(plain: bool) -> None:
    chain = random_chain(random.Random(9), 120)
    chain = chain if not plain else make_chain(list(chain.forward_ms))
    for m in (8, 32):
        solution = solve_chain(chain, 8, m, plain=plain)
        assert solution.status == "optimal"
        assert solution.lower_bound_ms == pytest.approx(solution.step_ms, rel=1e-8)


def test_the_same_problem_gives_the_same_cuts() -> None:
    chain = random_chain(random.Random(11), 40)
    assert solve_chain(chain, 4, 8).cuts == solve_chain(chain, 4, 8).cuts


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    solve_chain(random_chain(random.Random(12), 30), 4, 8)
    assert capfd.readouterr().out == ""


def test_not_even_the_first_solve_of_a_process_prints() -> None:
    """HiGHS prints its banner once per process, so only a new process shows whether it is kept from stdout."""
    script = (
        "import random; from tests.test_chain import random_chain; from planner.partitioning.chain import solve_chain;"
        "solution = solve_chain(random_chain(random.Random(12), 30), 4, 8); assert solution.solver_name == 'HiGHS'"
    )
    folder = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == ""
