"""Memory in the plan: masks, solver and the nearest limit that works, held to brute force over every cut."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from planner.files.profile_file import GradientLifetime, LayerMemory, SizeMemory
from planner.partitioning.chain import solve_chain
from planner.partitioning.chain_costs import Chain, ChainMemory, ChainTensor, CostTable, Cuts, step_ms
from planner.partitioning.memory_limit import FittingStages, MemoryLimit, TooLittleMemoryError, tightest
from planner.partitioning.stage_memory import StageMemoryTable
from planner.scheduling.memory_timeline import StageBytes, memory_timeline, peak_memory
from tests.random_memory import random_memory
from tests.test_chain import all_cuts, make_chain, random_chain


def chains(seed: int, count: int) -> Iterator[tuple[Chain, int, int, str]]:
    source = random.Random(seed)
    for _ in range(count):
        num_layers = source.randint(2, 8)
        chain = random_chain(source, num_layers)
        tensors = tuple(replace(t, gradient_scattered=source.random() < 0.3) for t in chain.tensors)
        chain = replace(chain, tensors=tensors, memory=random_memory(source, num_layers))
        num_stages, schedule = source.randint(2, min(4, num_layers)), source.choice(["gpipe", "1f1b"])
        yield chain, num_stages, source.choice([4, 6, 9]), schedule


def largest_peaks(chain: Chain, num_stages: int, num_microbatches: int, schedule: str) -> dict[Cuts, int]:
    table = StageMemoryTable(chain, num_microbatches, schedule)
    return {cuts: max(p.peak_bytes for p in table.peaks(cuts)) for cuts in all_cuts(chain, num_stages)}


@pytest.mark.parametrize("seed", range(4))
def test_the_solver_finds_the_best_cut_that_fits_or_says_what_would(seed: int) -> None:
    source, refused = random.Random(seed), 0
    for chain, num_stages, m, schedule in chains(seed, 25):
        peaks = largest_peaks(chain, num_stages, m, schedule)
        limit = source.randint(min(peaks.values()) - 20, max(peaks.values()))
        fitting = [cuts for cuts, peak in peaks.items() if peak <= limit]
        if not fitting:
            with pytest.raises(TooLittleMemoryError) as error:
                solve_chain(chain, num_stages, m, schedule=schedule, memory=MemoryLimit(limit))
            assert error.value.tightest.peak_bytes == min(peaks.values())
            assert f"{min(peaks.values()) - limit} bytes over" in str(error.value)
            refused += 1
            continue
        found = solve_chain(chain, num_stages, m, schedule=schedule, memory=MemoryLimit(limit))
        best = min(step_ms(chain, cuts, m, schedule) for cuts in fitting)
        assert found.cuts in fitting
        assert found.step_ms == pytest.approx(best, rel=1e-7)
        assert found.status == "optimal" and found.lower_bound_ms <= best * (1 + 1e-9)
    assert refused > 0


def test_masks_are_exact() -> None:
    source = random.Random(7)
    for chain, num_stages, m, schedule in chains(7, 30):
        table = StageMemoryTable(chain, m, schedule)
        count = len(chain.ids)
        limit = source.randint(100, 3000)
        masks = FittingStages(chain, m, schedule, MemoryLimit(limit)).masks(num_stages)
        for index, mask in enumerate(masks):
            for start in range(count):
                if schedule == "gpipe" and (start == 0) != (index == 0):
                    continue
                for stop in range(start + 1, count + 1):
                    peak = table.peak(start, stop, index, num_stages).peak_bytes
                    assert mask[start, stop] == (peak <= limit), (start, stop, index)


def test_reserved_bytes_are_taken_off_the_limit() -> None:
    chain, num_stages, m, schedule = next(chains(3, 1))
    need = tightest(_table(chain, m, schedule, MemoryLimit(0)), num_stages).peak_bytes
    solve_chain(chain, num_stages, m, schedule=schedule, memory=MemoryLimit(need))
    with pytest.raises(TooLittleMemoryError, match="1 bytes over"):
        solve_chain(chain, num_stages, m, schedule=schedule, memory=MemoryLimit(need, 1))


def _table(chain: Chain, m: int, schedule: str, limit: MemoryLimit) -> CostTable:
    return CostTable(chain, m, False, schedule, FittingStages(chain, m, schedule, limit))


def test_a_timeline_by_hand() -> None:
    stage = StageBytes(
        parameter_bytes=100,
        gradient_bytes=80,
        optimizer_bytes=160,
        optimizer_temporary_bytes=40,
        boundary_bytes=12,
        saved_bytes=10,
        output_bytes=0,
        forward_rise_bytes=15,
        backward_first_rise_bytes=90,
        backward_rise_bytes=25,
        sent_gradient_bytes=1,
        sent_activation_bytes=3,
    )
    points = memory_timeline(stage, 0, 2, 3)
    assert [(p.kind, p.peak_bytes) for p in points] == [
        ("forward", 272 + 15),
        ("forward", 272 + 10 + 15),
        ("forward", 272 + 20 + 15),
        ("backward", 272 + 20 + 90),
        ("backward", 272 + 80 + 10 + 4 + 25),
        ("backward", 272 + 80 + 8 + 25),
        ("optimizer", 272 + 80 + 40),
    ]
    assert peak_memory(stage, 0, 2, 3).kind == "optimizer"
    kinds = [(p.kind, p.microbatch) for p in memory_timeline(stage, 1, 2, 3, "1f1b")]
    assert kinds[:3] == [("forward", 0), ("backward", 0), ("forward", 1)]


def rises(gradients: tuple[GradientLifetime, ...], tensors: tuple[ChainTensor, ...], peaks: tuple[int, ...]) -> int:
    """How far the middle layer of three, a stage of its own, rises in a later backward."""
    return middle_stage(gradients, tensors, peaks).backward_rise_bytes


def middle_stage(
    gradients: tuple[GradientLifetime, ...], tensors: tuple[ChainTensor, ...], peaks: tuple[int, ...]
) -> StageBytes:
    layers = tuple(LayerMemory(0, 0, peaks, peaks, 0, 0, 0, 0) for _ in range(3))
    memory = ChainMemory(layers, SizeMemory((), gradients, 0, 0, False))
    chain = replace(make_chain([1.0] * 3, [1.0] * 3, tensors), memory=memory)
    return StageMemoryTable(chain, 4, "gpipe").stage(1, 2)


def tensor(name: str, producer: int, last: int, num_bytes: int, *, scattered: bool = False) -> ChainTensor:
    return ChainTensor(name, producer, last, num_bytes, num_bytes, 0.0, 0.0, gradient_scattered=scattered)


def test_what_is_relayed_is_copied_when_all_layers_are_done() -> None:
    """The middle stage makes a gradient of 10 bytes and relays one of 100."""
    gradients = (GradientLifetime(1, 0, 10, 0, ((0, 10),)), GradientLifetime(2, 0, 100, 0, ((0, 100),)))
    tensors = (tensor("x", 0, 1, 10), tensor("skip", 0, 2, 100), tensor("y", 1, 2, 10))
    assert rises(gradients, tensors, (5,)) == 110
    assert rises(gradients, tensors, (200,)) == 200


def test_a_gradient_that_a_sum_hands_on_is_copied_for_each_value_before_the_stage() -> None:
    """What arrives is the gradient of a sum of x and of what the stage computes from y: x gets a copy of it."""
    tensors = (tensor("x", 0, 1, 100), tensor("y", 0, 1, 10), tensor("sum", 1, 2, 100))
    arrived = GradientLifetime(2, 0, 100, 0, ((0, 100), (1, 100)), ((0, 100), (1, 100)))
    assert rises((arrived, GradientLifetime(1, 0, 10)), tensors, (30,)) == 100 + 30
    unread = GradientLifetime(1, 0, 100, 0, ((0, 100),))
    assert rises((unread,), tensors, (130, 100)) == 130  # of the stage's own making: handed over
    read = replace(unread, reads=((1, 100),))
    assert rises((read,), tensors, (130, 100)) == 100 + 130


def test_a_gradient_that_returns_as_a_view_of_its_buffer_takes_nothing() -> None:
    arrived = GradientLifetime(2, 0, 100, 0, ((0, 100), (1, 100)), ((0, 100), (1, 100)))
    x, total = tensor("x", 0, 1, 100), tensor("sum", 1, 2, 100)
    copied = middle_stage((arrived,), (x, total), (30,))
    viewed = middle_stage((arrived,), (replace(x, returns_view=True), total), (30,))
    assert (copied.backward_rise_bytes, copied.sent_gradient_bytes) == (100 + 30, 100)
    assert (viewed.backward_rise_bytes, viewed.sent_gradient_bytes) == (30, 0)
    other = tensor("y", 0, 1, 10)
    both = middle_stage((arrived,), (replace(x, returns_view=True), other, total), (30,))
    assert (both.backward_rise_bytes, both.sent_gradient_bytes) == (100 + 30, 110)  # whose the bytes are is not known


def test_a_gradient_that_lay_in_pieces_may_be_copied_where_it_arrives() -> None:
    assert rises((), (tensor("y", 1, 2, 40, scattered=True),), (30,)) == 70
    assert rises((), (tensor("y", 1, 2, 40),), (30,)) == 30


def test_parts_add_up_to_the_peak() -> None:
    for chain, num_stages, m, schedule in chains(5, 20):
        for cuts in all_cuts(chain, num_stages)[:3]:
            for (start, stop), point in zip(
                pairwise((0, *cuts, len(chain.ids))), StageMemoryTable(chain, m, schedule).peaks(cuts), strict=True
            ):
                memory = point.memory
                parts = (memory.parameters, memory.gradients, memory.optimizer, memory.saved, memory.working)
                assert all(part >= 0 for part in parts) and sum(parts) == point.peak_bytes
                assert memory.parameters >= sum(chain.parameter_bytes[start:stop])
