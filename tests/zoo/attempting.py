"""One model of the zoo: traced, planned at 2, 3 and 4 stages with made-up costs, trained beside the eager model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from planner.errors import PlannerError
from planner.files.plan_file import Plan
from planner.files.profile_file import Profile
from planner.planning import plan_profile
from planner.request import PlanRequest
from planner.tracing.exporting import trace_model
from planner.tracing.loading import ModelSource, as_call, build, load_source, make_batch, rows
from tests.zoo.made_up_costs import made_up_profile
from tests.zoo.parity import largest_difference

ZOO = Path(__file__).parent
NOT_MODELS = ("causal_language", "masked_language", "sequence_to_sequence", "image_classes")
STAGES = (2, 3, 4)
BATCH_SIZE, NUM_MICROBATCHES = 4, 2
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of a model. `differences`: stages that were planned and trained → (the largest, of what).

    `refusal` is the first line of what evenstage said where it refused, and `torch_issue` the reason that the model's
    file names for it.
    """

    name: str
    about: str
    num_layers: int
    differences: dict[int, tuple[float, str]]
    refusal: str
    torch_issue: str

    @property
    def is_equal(self) -> bool:
        """Planned at every number of stages, trained, and equal to the eager model."""
        return not self.refusal and bool(self.differences) and self.largest <= TOLERANCE

    @property
    def largest(self) -> float:
        """The largest relative difference at any number of stages."""
        return max(difference for difference, _ in self.differences.values())


def zoo_files(kind: str) -> list[Path]:
    """The model files of `kind` ("huggingface" or "plain"), by name."""
    return sorted(path for path in (ZOO / kind).glob("*.py") if path.stem not in NOT_MODELS)


def attempt(file: Path, stages: tuple[int, ...] = STAGES) -> Attempt:
    """Trace, plan and train the model file. What evenstage refuses is in `refusal`; everything else is raised."""
    source = load_source(str(file))
    said = source.build_model.__globals__
    about = str(said["__doc__"]).splitlines()[0]
    differences: dict[int, tuple[float, str]] = {}
    num_layers, refusal = 0, ""
    try:
        profile = profile_of(source)
        num_layers = len(profile.sizes[0].layers)
        for num_stages in stages:
            differences[num_stages] = largest_difference(plan_of(profile, num_stages), source)
    except PlannerError as error:
        refusal = error.got
    return Attempt(file.stem, about, num_layers, differences, refusal, said.get("TORCH_ISSUE", ""))


def profile_of(source: ModelSource) -> Profile:
    """The model's profile at made-up costs. Raises TraceError where it cannot be exported."""
    size = BATCH_SIZE // NUM_MICROBATCHES
    inputs, _ = make_batch(source, 0, 0, BATCH_SIZE)
    trace = trace_model(build(source, 0), *as_call(rows(inputs, 0, size)))
    return made_up_profile(source, trace, BATCH_SIZE, size)


def plan_of(profile: Profile, num_stages: int) -> Plan:
    """The plan that evenstage makes of `profile`. Raises InfeasibleError where there are too few legal cuts."""
    return plan_profile(profile, PlanRequest(num_stages, BATCH_SIZE, NUM_MICROBATCHES))
