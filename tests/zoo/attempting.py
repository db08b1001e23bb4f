"""One model of the zoo: traced, planned at 2, 3 and 4 stages with made-up costs, trained beside the eager model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from planner.errors import PlannerError
from planner.planning import PlanRequest, plan_profile
from planner.tracing.exporting import trace_model
from planner.tracing.loading import as_call, build, load_source, make_batch, rows
from tests.zoo.made_up_costs import made_up_profile
from tests.zoo.parity import largest_difference

ZOO = Path(__file__).parent
NOT_MODELS = ("causal_language", "masked_language", "sequence_to_sequence", "image_classes")
STAGES = (2, 3, 4)
NUM_MICROBATCHES = 2
TOLERANCE = 5e-5


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of a model. `differences` maps the stages that were planned and trained to (largest, of what)."""

    name: str
    about: str
    num_layers: int
    differences: dict[int, tuple[float, str]]
    refusals: dict[int, str]

    @property
    def is_equal(self) -> bool:
        """Planned at every number of stages, trained, and equal to the eager model."""
        return set(self.differences) == set(STAGES) and all(d <= TOLERANCE for d, _ in self.differences.values())


def zoo_files(kind: str) -> list[Path]:
    """The model files of `kind` ("huggingface" or "plain"), by name."""
    return sorted(path for path in (ZOO / kind).glob("*.py") if path.stem not in NOT_MODELS)


def attempt(file: Path, stages: tuple[int, ...] = STAGES) -> Attempt:
    """Trace, plan and train the model file. What evenstage refuses is in `refusals`; everything else is raised."""
    source = load_source(str(file))
    about = (source.build_model.__globals__["__doc__"] or "").strip()
    batch_size = source.batch_size or 4
    size = batch_size // NUM_MICROBATCHES
    inputs, _ = make_batch(source, 0, 0, batch_size)
    try:
        trace = trace_model(build(source, 0), *as_call(rows(inputs, 0, size)))
    except PlannerError as error:
        return Attempt(file.stem, about, 0, {}, {0: str(error)})
    profile = made_up_profile(source, trace, batch_size, size)
    differences, refusals = {}, {}
    for num_stages in stages:
        try:
            plan = plan_profile(profile, PlanRequest(num_stages, batch_size, NUM_MICROBATCHES))
            differences[num_stages] = largest_difference(plan, source)
        except PlannerError as error:
            refusals[num_stages] = str(error)
    return Attempt(file.stem, about, len(trace.layers), differences, refusals)
