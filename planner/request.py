"""What a plan is wanted for, and what follows from it: batch, precision, microbatch counts, chain and memory limit."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from planner.errors import UsageError
from planner.files.links_file import LinkCost, LinkFit
from planner.files.plan_file import charged
from planner.files.plan_rules import MAX_SEED, MOST_MICROBATCHES
from planner.files.profile_file import Granularity, Profile, Schedule
from planner.scheduling.simulation import too_few_microbatches

if TYPE_CHECKING:
    from planner.partitioning.chain_costs import Chain
    from planner.partitioning.memory_limit import MemoryLimit

DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is wanted for. `microbatches` None means: choose.

    `memory_bytes` is what each stage may need; None means what the profiled device has, and on a CPU no limit. `meta`:
    the whole model may not fit into memory. `precision` None means the model file's, else fp32. `granularity`: cuts
    before modules only, before operations too, or (auto) before operations of layers that would spoil the balance.
    """

    gpus: int
    batch_size: int | None = None
    microbatches: int | None = None
    device: str | None = None
    bandwidth_bytes_per_s: float | None = None
    plain: bool = False
    seed: int = 0
    schedule: Schedule = "gpipe"
    memory_bytes: int | None = None
    meta: bool = False
    links: LinkFit | None = None
    precision: Literal["fp32", "bf16"] | None = None
    granularity: Granularity = "module"

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UsageError(f"--gpus {self.gpus}", "a plan has at least one stage", "give --gpus 1 or more")
        if self.links is not None and self.bandwidth_bytes_per_s is not None:
            raise UsageError("links and a bandwidth", "crossings are charged by one of the two", "leave one out")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(
                f"seed {self.seed}", f"a seed is a whole number from 0 to {MAX_SEED:,}", "give another one"
            )
        if self.schedule == "1f1b" and self.microbatches is not None and self.microbatches < self.gpus:
            raise too_few_microbatches(self.microbatches, self.gpus)

    def link_cost(self) -> LinkCost:
        """What every crossing is charged."""
        return charged(self.links, self.bandwidth_bytes_per_s)


def resolve_batch_size(model: str, request: PlanRequest) -> int:
    """The batch size asked for, else the model file's, else 16."""
    if request.batch_size is not None:
        return request.batch_size
    from planner.tracing.loading import load_source

    return load_source(model).batch_size or DEFAULT_BATCH_SIZE


def resolve_precision(model: str, request: PlanRequest) -> Literal["fp32", "bf16"]:
    """The precision asked for, else the model file's, else fp32. Raises UsageError where they contradict each other."""
    from planner.tracing.loading import load_source

    stated = load_source(model).precision
    if request.precision is not None and stated not in (None, request.precision):
        raise UsageError(
            f'--precision {request.precision}, and PRECISION = "{stated}" in the model file',
            "a model is trained in one precision",
            f"leave out --precision, or PRECISION in {Path(model.partition(':')[0]).name}",
        )
    return request.precision or stated or "fp32"


def candidate_counts(batch_size: int, request: PlanRequest) -> tuple[int, ...]:
    """Microbatch counts to consider: the divisors of the batch from the number of stages up, or the one asked for.

    Fewer microbatches than stages leave more than 43 % of the time idle and are left out while there are others. Raises
    UsageError where none is left.

    >>> candidate_counts(16, PlanRequest(gpus=4))
    (4, 8, 16)
    """
    if request.microbatches is not None:
        if batch_size % request.microbatches:
            raise UsageError(
                f"a batch of {batch_size} in {request.microbatches} microbatches",
                "microbatches are of equal size",
                f"use --microbatches {_nearest_divisor(batch_size, request.microbatches)} or another --batch-size",
            )
        if request.microbatches > MOST_MICROBATCHES:
            raise _too_many_microbatches(batch_size, request.microbatches)
        return (request.microbatches,)
    enough = tuple(count for count in divisors_of(batch_size) if request.gpus <= count <= MOST_MICROBATCHES)
    if not enough and batch_size > MOST_MICROBATCHES:
        raise _too_many_microbatches(batch_size, batch_size)
    if not enough and request.schedule == "1f1b":
        raise too_few_microbatches(batch_size, request.gpus)
    return enough or (batch_size,)


def _too_many_microbatches(batch_size: int, count: int) -> UsageError:
    got = f"a batch of {batch_size:,} in {count:,} microbatches"
    return UsageError(got, f"a step has at most {MOST_MICROBATCHES:,} microbatches", "use another --batch-size")


def divisors_of(number: int) -> list[int]:
    """All divisors of `number`, in order.

    >>> divisors_of(12), divisors_of(9)
    ([1, 2, 3, 4, 6, 12], [1, 3, 9])
    """
    small = [count for count in range(1, isqrt(number) + 1) if number % count == 0]
    return sorted({*small, *(number // count for count in small)})


def _nearest_divisor(batch_size: int, wanted: int) -> int:
    divisors = divisors_of(batch_size)
    return min(divisors, key=lambda count: abs(count - wanted))


def profiled_counts(profile: Profile, batch_size: int, request: PlanRequest) -> tuple[int, ...]:
    """The candidate counts whose microbatch size is in the profile. Raises UsageError where none is."""
    sizes = {size.microbatch_size for size in profile.sizes}
    counts = candidate_counts(batch_size, request)
    found = tuple(count for count in counts if batch_size // count in sizes)
    if not found:
        raise UsageError(
            f"a batch of {batch_size} in {', '.join(map(str, counts))} microbatches",
            f"the profile holds microbatches of {', '.join(map(str, sorted(sizes)))}",
            "profile again with --fresh, or ask for one of these",
        )
    return found


def chain_at(profile: Profile, microbatch_size: int, request: PlanRequest) -> Chain:
    """The chain that is solved for one microbatch size."""
    from planner.partitioning.layer_graph import build_layer_graph, chain_of

    return chain_of(build_layer_graph(profile.size(microbatch_size), request.link_cost()))


def memory_limit(profile: Profile, request: PlanRequest) -> MemoryLimit | None:
    """What a stage may need: what was asked for, else what the device has. Raises UsageError without measurements."""
    from planner.partitioning.memory_limit import MemoryLimit

    asked = request.memory_bytes
    limit = profile.machine.memory_bytes if asked is None else asked
    measured = all(size.memory is not None for size in profile.sizes)
    if limit is None or not (measured or asked is not None):
        return None
    if not measured:
        raise UsageError(
            "--memory with a profile that knows no memory",
            "the memory of every layer must have been measured",
            "profile again with --fresh",
        )
    return MemoryLimit(limit, profile.machine.reserved_bytes)
