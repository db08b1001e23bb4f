"""What people do today, by hand and on random chains: always exactly K stages, none empty."""

from __future__ import annotations

import json
import random
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from planner.partitioning.baselines import (
    ACCELERATE_SLACK,
    baselines,
    block_partition,
    equal_layers,
    equal_sums,
    greedy_fill,
    held_parameter_bytes,
)
from planner.partitioning.chain_costs import Chain, ChainTied


def make_chain(ids: list[str], forward: list[float], parameters: list[int], tied: tuple[ChainTied, ...] = ()) -> Chain:
    nothing = (0.0,) * len(ids)
    backward = tuple(2 * ms for ms in forward)
    return Chain(
        ids=tuple(ids),
        names=tuple(ids),
        forward_ms=tuple(forward),
        forward_spread_ms=nothing,
        backward_ms=backward,
        backward_spread_ms=nothing,
        backward_first_ms=backward,
        optimizer_ms=nothing,
        parameter_bytes=tuple(parameters),
        plain_cut=(True,) * len(ids),
        tensors=(),
        tied=tied,
    )


def stage_sums(weights: list[float], cuts: tuple[int, ...]) -> list[float]:
    return [sum(weights[a:b]) for a, b in pairwise((0, *cuts, len(weights)))]


def test_every_baseline_has_exactly_as_many_stages_as_asked_and_none_empty() -> None:
    generator = random.Random(1)
    for _ in range(300):
        count = generator.randint(1, 20)
        forward = [generator.choice((0.0, 1.0, generator.lognormvariate(0, 2))) for _ in range(count)]
        parameters = [generator.choice((0, 0, generator.randint(0, 10**6))) for _ in range(count)]
        prefix = generator.choice(("layers.", "", "x"))
        num_stages = generator.randint(1, count)
        chain = make_chain([f"{prefix}{index}" for index in range(count)], forward, parameters)
        found = baselines(chain, num_stages)
        assert list(found) == ["equal_layers", "equal_parameters", "torchgpipe", "accelerate"]
        for name, cuts in found.items():
            assert len(cuts) == num_stages - 1, name
            assert all(a < b for a, b in pairwise((0, *cuts, count))), name


def test_equal_layers_cuts_at_blocks_and_leaves_the_rest_to_the_ends() -> None:
    ids = ["embed", "pos"]
    for block in range(4):
        ids += [f"layers.{block}", f"layers.{block}.ff.0", f"layers.{block}.ff.1"]
    ids += ["norm", "head"]
    assert [ids[cut] for cut in equal_layers(ids, 2)] == ["layers.2"]
    assert [ids[cut] for cut in equal_layers(ids, 4)] == ["layers.1", "layers.2", "layers.3"]


def test_equal_layers_gives_the_first_stages_the_blocks_that_are_left_over() -> None:
    ids = [f"h.{block}" for block in range(6)]
    assert equal_layers(ids, 4) == (2, 3, 5)


def test_equal_layers_sees_a_block_whose_first_layer_is_named_after_a_part_of_it() -> None:
    ids = ["embed", "layers.0.norm1", "layers.0.attn", "layers.1.norm1", "layers.1.attn", "head"]
    assert equal_layers(ids, 2) == (3,)


def test_equal_layers_takes_the_outermost_of_two_prefixes_with_as_many_blocks() -> None:
    ids = ["stack.0", "stack.0.part.0", "stack.0.part.1", "stack.1", "stack.1.part.0", "stack.1.part.1"]
    assert equal_layers(ids, 2) == (3,)


def test_equal_layers_counts_layers_where_there_are_too_few_blocks() -> None:
    assert equal_layers(["a", "b", "c", "d", "e", "f"], 3) == (2, 4)
    assert equal_layers(["a", "layers.0", "layers.1", "b", "c", "d"], 3) == (2, 4)


def test_equal_parameters_is_the_least_largest_sum() -> None:
    generator = random.Random(2)
    for _ in range(100):
        weights = [float(generator.randint(0, 6)) for _ in range(generator.randint(1, 9))]
        num_stages = generator.randint(1, min(4, len(weights)))
        best = min(max(stage_sums(weights, cuts)) for cuts in combinations(range(1, len(weights)), num_stages - 1))
        assert max(stage_sums(weights, equal_sums(weights, num_stages))) == best


def test_equal_parameters_is_leftmost_among_equals() -> None:
    assert equal_sums([0.0, 3.0, 0.0, 0.0, 3.0], 2) == (2,)


def test_a_tied_parameter_counts_where_it_is_first_used() -> None:
    chain = make_chain(["a", "b", "c"], [1.0] * 3, [1, 2, 3], (ChainTied("w", (1, 2), 100, 0.0, 0.0),))
    assert held_parameter_bytes(chain) == [1, 102, 3]


@pytest.mark.parametrize(
    ("weights", "num_blocks", "blocks"),
    [
        ([1, 2, 3, 4, 5, 6], 2, [[1, 2, 3, 4], [5, 6]]),
        ([0, 0], 2, [[0], [0]]),
        ([5, 5, 5, 5], 2, [[5, 5], [5, 5]]),
        ([3], 1, [[3]]),
    ],
)
def test_torchgpipes_blocks(weights: list[float], num_blocks: int, blocks: list[list[float]]) -> None:
    cuts = block_partition(weights, num_blocks)
    assert [weights[a:b] for a, b in pairwise((0, *cuts, len(weights)))] == blocks


def test_torchgpipes_blocks_differ_by_one_unit_at_most() -> None:
    """Bárány and Grinberg's promise, in the unit that torchgpipe takes: the range of the weights."""
    generator = random.Random(3)
    for _ in range(300):
        weights = [generator.uniform(0.1, 5) for _ in range(generator.randint(2, 25))]
        num_blocks = generator.randint(1, len(weights) // 2)
        least, most = min(weights), max(weights)
        units = [(weight - least) / (most - least) for weight in weights]
        sums = stage_sums(units, block_partition(weights, num_blocks))
        assert max(sums) - min(sums) <= 1 + 1e-9


def test_greedy_fill_stops_a_stage_before_it_exceeds_the_limit() -> None:
    assert greedy_fill([1.0] * 8, 4) == (2, 4, 6)
    assert greedy_fill([4.0, 1.0, 1.0, 1.0, 1.0], 2) == (1,)
    assert greedy_fill([1.0, 1.0, 1.0, 9.0], 2) == (3,)


def test_greedy_fill_keeps_a_layer_for_every_stage() -> None:
    assert greedy_fill([0.0] * 4, 3) == (2, 3)
    assert greedy_fill([9.0, 0.0, 0.0], 3) == (1, 2)


def test_greedy_fill_fills_no_stage_but_the_last_over_its_limit_unless_one_layer_does() -> None:
    generator = random.Random(4)
    for _ in range(200):
        weights = [generator.lognormvariate(0, 1) for _ in range(generator.randint(4, 20))]
        num_stages = generator.randint(2, 4)
        limit = ACCELERATE_SLACK * sum(weights) / num_stages
        cuts = greedy_fill(weights, num_stages)
        for start, stop in list(pairwise((0, *cuts, len(weights))))[:-1]:
            assert stop - start == 1 or sum(weights[start:stop]) <= limit


def test_the_known_cases_of_others(workloads: Path) -> None:
    known = json.loads((workloads / "known_small.json").read_text())["cases"]
    checked = 0
    for case in known:
        weights = case.get("weights")
        if case["source"].startswith("torchgpipe"):
            cuts = block_partition(weights, case["K"])
            assert [weights[a:b] for a, b in pairwise((0, *cuts, len(weights)))] == case["expected_blocks"]
            checked += 1
        if weights and "bottleneck" in case:
            sums = stage_sums(weights, equal_sums(weights, case["K"]))
            assert max(sums) == pytest.approx(case["bottleneck"])
    assert checked == 2
