"""The plan: where to cut, how many microbatches, what every stage will cost, and how good that provably is.

Schema `evenstage/plan/1`. A value whose measurement does not exist yet is null, never invented.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.errors import UsageError
from planner.files.links_file import FREE, LinkCost, LinkFit
from planner.files.plan_rules import refuse_bad_stage, refuse_contradictions
from planner.files.profile_file import Machine, Peak, Schedule
from planner.files.reading import decode_file, dump_json, read_json, write_text

if TYPE_CHECKING:
    import torch.fx
    import torch.nn
    from torch.distributed.pipelining import SplitPoint

SCHEMA = "evenstage/plan/1"
Status = Literal["optimal", "feasible", "scored"]


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The model of a plan. `file` is relative to the plan; `fingerprint` is that of its trace at `microbatch_size`.

    `meta`: each rank makes the weights of its own stage only, because the whole model may not fit. `granularity`:
    whether layers begin with modules only, or with operations inside them too.
    """

    file: str | None
    fingerprint: str
    name: str
    num_parameters: int = 0
    entry: str = "build_model"
    meta: bool = False
    granularity: Literal["module", "operation"] = "module"


@dataclass(frozen=True, slots=True)
class SolverRecord:
    """How the plan was found: the solver, its wall time, and how many branch-and-bound nodes it needed."""

    name: str
    seconds: float
    num_nodes: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A boundary between two stages: the layer that the later stage begins with, and what crosses it forward.

    `transfer_…_ms` is what one microbatch's crossing is charged, to the stage before and to the stage behind.
    """

    before: str
    tensors: tuple[str, ...]
    bytes: int
    transfer_forward_ms: float = 0.0
    transfer_backward_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class StageMemory:
    """The parts of a stage's predicted peak memory."""

    parameters: int
    gradients: int
    optimizer: int
    saved: int
    working: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Stage:
    """The prediction for one stage; times are per microbatch (`optimizer_ms` per step), sends and receives included.

    `load_ms` = forward_ms + backward_ms. `backward_first_ms` is the backward of the first microbatch of a step.
    `…_spread_ms` is the standard error of the profile's samples, `…_interval_ms` half the 90 % interval of the
    prediction (planner/intervals.py), null where it is not known.
    """

    index: int
    rank: int
    nodes: tuple[str | int, ...]
    names: tuple[str, ...]
    forward_ms: float
    forward_spread_ms: float
    backward_ms: float
    backward_spread_ms: float
    backward_first_ms: float
    optimizer_ms: float
    load_ms: float
    wait_ms: float | None
    bubble_fraction: float | None
    parameter_bytes: int
    peak_memory_bytes: int | None = None
    memory: StageMemory | None = None
    forward_interval_ms: float | None = None
    backward_interval_ms: float | None = None
    load_interval_ms: float | None = None

    def __post_init__(self) -> None:
        refuse_bad_stage(self)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Another way to cut, on the same costs and the same microbatch count. `cuts` are ids of layers."""

    step_ms: float | None
    objective_ms: float
    fits: bool | None
    cuts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The best step for one microbatch count."""

    num_microbatches: int
    microbatch_size: int
    step_ms: float
    status: Status


@dataclass(frozen=True, slots=True)
class TiedParameter:
    """A parameter that more than one stage holds; its gradients are summed over `stages` after every step."""

    name: str
    stages: tuple[int, ...]


def boundaries_of(stage: int, num_stages: int) -> int:
    """How many boundaries a stage has.

    >>> [boundaries_of(stage, 3) for stage in range(3)], boundaries_of(0, 1)
    ([1, 2, 1], 0)
    """
    return (stage > 0) + (stage < num_stages - 1)


def tied_over(cuts: Sequence[int], users: Mapping[str, Sequence[int]]) -> tuple[TiedParameter, ...]:
    """The parameters of `users` (name → indices of the layers that use it) that more than one stage holds.

    >>> tied_over([3], {"wte.weight": (0, 5), "other": (4, 5)})
    (TiedParameter(name='wte.weight', stages=(0, 1)),)
    """
    found = []
    for name, layers in users.items():
        stages = tuple(sorted({sum(layer >= cut for cut in cuts) for layer in layers}))
        if len(stages) > 1:
            found.append(TiedParameter(name, stages))
    return tuple(found)


def charged(links: LinkFit | None, bandwidth_bytes_per_s: float | None) -> LinkCost:
    """What crossings cost by measured links, else by a bandwidth, else nothing."""
    if links is not None:
        return links.cost()
    return FREE if bandwidth_bytes_per_s is None else LinkCost.of_bandwidth(bandwidth_bytes_per_s)


@dataclass(frozen=True, slots=True)
class Plan:
    """A complete plan; see the module for its file form.

    `step_interval_ms` is half the 90 % interval of the predicted step. `estimated` is the peak that the times were
    computed from where nothing was measured, else null.

    `split_spec()` is the plan for stock torch where it is a plain chain; `split_policy(model)` works for every model.
    """

    model: PlannedModel
    status: Status
    objective_ms: float
    lower_bound_ms: float
    solver: SolverRecord
    schedule: Schedule | None
    num_microbatches: int
    microbatch_size: int
    precision: Literal["fp32", "bf16"]
    seed: int
    data_parallel: int
    step_ms: float | None
    plain_chain: bool
    why_not: str | None
    split_specification: dict[str, str] | None
    order: tuple[str | int, ...] | None
    recompute: tuple[str, ...]
    cuts: tuple[Cut, ...]
    stages: tuple[Stage, ...]
    baselines: dict[str, Baseline]
    microbatch_curve: tuple[CurvePoint, ...]
    tied: tuple[TiedParameter, ...]
    bandwidth_bytes_per_s: float | None
    machine: Machine | None
    memory_limit_bytes: int | None = None
    step_interval_ms: float | None = None
    estimated: Peak | None = None
    links: LinkFit | None = None

    def __post_init__(self) -> None:
        refuse_contradictions(self)

    def seen_from_here(self, folder: Path) -> Plan:
        """This plan, which lies in `folder`, with its model file named as the current directory sees it."""
        if self.model.file is None:
            return self
        file = (folder / self.model.file).resolve()
        near = os.path.relpath(file)
        return replace(self, model=replace(self.model, file=str(file) if near.startswith("../..") else near))

    @property
    def num_stages(self) -> int:
        """The number of stages, which is the number of ranks that the plan needs."""
        return len(self.stages)

    @property
    def batch_size(self) -> int:
        """Samples per step: microbatches times their size."""
        return self.num_microbatches * self.microbatch_size

    def link_cost(self) -> LinkCost:
        """What crossings are charged: by measured links, else by the bandwidth that was given, else nothing."""
        return charged(self.links, self.bandwidth_bytes_per_s)

    def transfers_ms(self, stage: int) -> tuple[float, float]:
        """The sends and receives in `forward_ms` and in `backward_ms` of a stage."""
        around = [self.cuts[cut] for cut in (stage - 1, stage) if 0 <= cut < len(self.cuts)]
        return sum(cut.transfer_forward_ms for cut in around), sum(cut.transfer_backward_ms for cut in around)

    def scheduled_step_ms(self) -> float:
        """The step of the plan's schedule. Raises UsageError for a plan that minimises the largest load instead."""
        if self.step_ms is None:
            raise UsageError(
                "the plan has no schedule, so it has no step",
                "--objective bottleneck minimises the largest stage load only",
                "plan with --schedule",
            )
        return self.step_ms

    def to_json(self) -> str:
        """The text of the plan file."""
        return dump_json(self, SCHEMA).replace('"split_specification":', '"split_spec":', 1)

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, atomically."""
        write_text(Path(path), self.to_json())

    @staticmethod
    def load(path: Path | str) -> Plan:
        """Read a plan. Raises FileError with what is wrong and where."""
        data = read_json(Path(path), SCHEMA)
        if "split_spec" in data:
            data["split_specification"] = data.pop("split_spec")
        return decode_file(Plan, data, "plan", path)

    def split_spec(self) -> dict[str, SplitPoint]:
        """The plan as `split_spec` for `torch.distributed.pipelining.pipeline`.

        Raises UsageError where stock torch would get this plan wrong, and names the remedy.
        """
        if self.split_specification is None:
            raise UsageError(
                f"this plan has no split_spec: {self.why_not}",
                "stock torch does only plain chains rightly by split_spec",
                "pass split_policy=plan.split_policy(model) to pipeline() instead, and call"
                " plan.sum_tied_gradients(stage) after schedule.step(); or plan again with --plain",
            )
        from torch.distributed.pipelining import SplitPoint

        return dict.fromkeys(self.split_specification, SplitPoint.BEGINNING)

    def split_policy(
        self, model: torch.nn.Module, device: torch.device | None = None
    ) -> Callable[[torch.fx.GraphModule], torch.fx.GraphModule]:
        """The plan as `split_policy` for `pipeline(model, mb_args, mb_kwargs, split_policy=…)`, for every model.

        `model` is the one that `pipeline` gets. `device` is where the stages of a bf16 plan will compute, inside
        `torch.autocast(device.type, torch.bfloat16)`; None means where the model is. Raises TraceError (inside
        `pipeline`) where the traced model is not the planned one.
        """
        from planner.tracing.split_policy import SplitPolicy

        return SplitPolicy(model, self, device)

    def sum_tied_gradients(self, stage: Any) -> None:
        """Add up the gradients of tied parameters over the stages that hold them; collective over the stage's group.

        Call it on every rank after `schedule.step()` and before clipping and `optimizer.step()`. Without tied
        parameters across stages it does nothing.
        """
        from planner.tracing.tied_gradients import sum_tied_gradients

        sum_tied_gradients(self.tied, stage)
