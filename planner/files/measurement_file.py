"""The measurement: what a run of a plan took, stage by stage, beside what the plan had predicted.

Schema `evenstage/measurement/1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from planner.errors import FileError
from planner.files.profile_file import Machine, Schedule
from planner.files.reading import WRITE_AGAIN, decode_file, dump_json, read_json, write_text

SCHEMA = "evenstage/measurement/1"


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The step: as planned, as measured, and with perfect balance and no bubble (total work ÷ stages).

    `interval` is half the 90 % interval of the predicted one, null where the plan has none.
    """

    predicted: float
    measured: float
    ideal: float
    interval: float | None = None

    def __post_init__(self) -> None:
        if min(self.predicted, self.measured, self.ideal, self.interval or 0.0) < 0:
            got = f"a step of {self.measured} ms, predicted {self.predicted} ± {self.interval}, ideal {self.ideal}"
            raise FileError(got, "times are not negative", WRITE_AGAIN)


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage, predicted or measured: medians per microbatch; `wait_ms` per step; `optimizer_ms` per step.

    `…_interval_ms` is half the 90 % interval of a prediction, null where the plan has none and of what was measured.
    `transfer_…_ms` are the sends and receives inside the times; those of a measured stage are what its plan charges.
    `peak_memory_bytes` is what the allocator gave out at most, workspaces included; `device_memory_bytes` what is then
    gone of a GPU, the context and what the allocator keeps for later included (null on a CPU).
    """

    forward_ms: float
    backward_ms: float
    backward_first_ms: float
    optimizer_ms: float
    peak_memory_bytes: int | None
    bubble_fraction: float | None
    wait_ms: float | None
    forward_spread_ms: float = 0.0
    backward_spread_ms: float = 0.0
    forward_interval_ms: float | None = None
    backward_interval_ms: float | None = None
    transfer_forward_ms: float = 0.0
    transfer_backward_ms: float = 0.0
    device_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StageMeasurement:
    """One stage of the run; `samples` counts the microbatches behind the medians (warm-up steps left out)."""

    index: int
    predicted: StageFigures
    measured: StageFigures
    samples: int


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How far the run was from the unsplit model: largest absolute differences over `steps` steps."""

    steps: int
    max_loss_difference: float
    max_gradient_difference: float
    max_parameter_difference: float
    worst_parameter: str
    dropout_disabled: bool = False


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training step, as in metrics.jsonl."""

    step: int
    loss: float
    step_ms: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """`--against`: steps of two cuts in turn. Ratios are other ÷ plan, so above 1 means that the plan is faster."""

    against: str
    cuts: tuple[str, ...]
    predicted: float
    measured: float
    low: float
    high: float
    pairs: int
    clock: Literal["wall", "simulated"]


@dataclass(frozen=True, slots=True)
class StartTimes:
    """Wall seconds from the model file to a stage that can train, on one rank.

    `pipeline_s` is what torch's `pipeline()` takes besides its `torch.export` (`export_s`), the plan's cuts included;
    both together where `export_s` is None, for with `split_spec` torch does not say when it has exported.
    """

    model_s: float
    export_s: float | None
    pipeline_s: float
    stage_s: float

    @property
    def total_s(self) -> float:
        """All of it.

        >>> StartTimes(1.0, 2.0, 3.0, 4.0).total_s
        10.0
        """
        return self.model_s + (self.export_s or 0.0) + self.pipeline_s + self.stage_s


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that a run measured. `clock` says how stage times, `step_clock` how the step was taken.

    `cuts` are the layers that stages 1, 2, … began with, `order` all layers where they were not in program order.
    `rehearsed`: the stages ran one after the other on one device; `wall_step_ms` is then the sum over the stages.
    `start` is that of the rank that took longest.
    """

    plan: str
    name: str
    schedule: Schedule
    num_microbatches: int
    microbatch_size: int
    step_ms: StepTimes
    stages: tuple[StageMeasurement, ...]
    clock: Literal["cuda-event", "thread-cpu"]
    step_clock: Literal["wall", "simulated"]
    wall_step_ms: float
    drift: float | None
    scale: float
    machine: Machine
    steps: tuple[StepRecord, ...]
    check: CheckResult | None = None
    speed_up: SpeedUp | None = None
    reference_loss: float | None = None
    reference_loss_name: str = ""
    rehearsed: bool = False
    cuts: tuple[str, ...] = ()
    order: tuple[str, ...] | None = None
    start: StartTimes | None = None

    def __post_init__(self) -> None:
        if self.num_microbatches < 1 or self.microbatch_size < 1 or not self.stages:
            got = (
                f"{len(self.stages)} stages and {self.num_microbatches} microbatches of {self.microbatch_size} samples"
            )
            raise FileError(got, "a run has at least one of each", WRITE_AGAIN)
        if self.scale < 0:
            raise FileError(f"a scale of {self.scale}", "measured ÷ predicted time is not negative", WRITE_AGAIN)

    def save(self, path: Path) -> None:
        """Write the measurement as JSON, atomically."""
        write_text(path, dump_json(self, SCHEMA))

    @staticmethod
    def load(path: Path | str) -> Measurement:
        """Read a measurement. Raises FileError with what is wrong and where."""
        return decode_file(Measurement, read_json(Path(path), SCHEMA), "measurement", path)
