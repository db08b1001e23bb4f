"""What must hold inside a plan, however it came about: each rule is one function and one clear error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from planner.errors import FileError

if TYPE_CHECKING:
    from planner.files.plan_file import Plan, Stage

MAX_SEED = 2**62  # torch takes 64 bits, and step t draws from seed + 1 + t
MOST_MICROBATCHES = 2**14  # of a step; every one of them is simulated
SAME = 1e-6  # relative; solvers prove to 1e-7, and files hold every digit


def refuse_bad_stage(stage: Stage) -> None:
    """A stage holds layers, each with its name, and its times are not negative."""
    where = f"stage {stage.index}"
    if not stage.nodes:
        raise _wrong(f"{where} has no layers", "every stage holds at least one layer")
    if len(stage.names) != len(stage.nodes):
        raise _wrong(f"{where} has {len(stage.nodes)} nodes and {len(stage.names)} names", "every layer has a name")
    for name in ("forward", "backward", "backward_first", "optimizer", "load", "wait", "forward_spread"):
        _refuse_negative(f"{where}: {name}_ms", getattr(stage, f"{name}_ms"))
    _refuse_negative(f"{where}: backward_spread_ms", stage.backward_spread_ms)
    _refuse_negative(f"{where}: parameter_bytes", stage.parameter_bytes)


def refuse_contradictions(plan: Plan) -> None:
    """Raise FileError for the first rule that `plan` breaks."""
    _refuse_bad_numbers(plan)
    _refuse_bad_order(plan)
    _refuse_bad_cuts(plan)
    _refuse_bad_costs(plan)
    _refuse_bad_split_spec(plan)


def _refuse_bad_numbers(plan: Plan) -> None:
    if plan.num_microbatches < 1 or plan.microbatch_size < 1:
        raise _wrong("a plan without microbatches", "at least one microbatch of one sample")
    if plan.num_microbatches > MOST_MICROBATCHES:
        raise _wrong(f"{plan.num_microbatches:,} microbatches", f"a step has at most {MOST_MICROBATCHES:,}")
    if plan.schedule == "1f1b" and plan.num_microbatches < plan.num_stages:
        got = f"1F1B with {plan.num_microbatches} microbatches and {plan.num_stages} stages"
        raise _wrong(got, "1F1B needs a microbatch for every stage")
    if plan.data_parallel != 1:
        raise _wrong(f"data_parallel is {plan.data_parallel}", "this version trains one copy of every stage: 1")
    if not 0 <= plan.seed <= MAX_SEED:
        raise _wrong(f"seed is {plan.seed}", f"a seed is a whole number from 0 to {MAX_SEED:,}")
    rate = plan.bandwidth_bytes_per_s
    if rate is not None and not 0 < rate < math.inf:
        raise _wrong(f"bandwidth_bytes_per_s is {rate}", "a rate is positive")
    if rate is not None and plan.links is not None:
        raise _wrong("the plan has links and bandwidth_bytes_per_s", "crossings are charged by one of the two")


def _refuse_bad_order(plan: Plan) -> None:
    for position, stage in enumerate(plan.stages):
        if (stage.index, stage.rank) != (position, position):
            got = f"stage {position} of the list has index {stage.index} and rank {stage.rank}"
            raise _wrong(got, "stages stand in order, and stage k runs on rank k")
    holder: dict[str | int, int] = {}
    for stage in plan.stages:
        for node in stage.nodes:
            if node in holder:
                got = f"layer {node!r} is in stage {holder[node]} and in stage {stage.index}"
                raise _wrong(got, "every layer lies in exactly one stage")
            holder[node] = stage.index
    for tied in plan.tied:
        if list(tied.stages) != sorted({k for k in tied.stages if 0 <= k < plan.num_stages}):
            got = f"{tied.name} is tied over stages {_list(tied.stages)}"
            raise _wrong(got, f"stages are 0 to {plan.num_stages - 1}, each once and in order")


def _refuse_bad_cuts(plan: Plan) -> None:
    if len(plan.stages) != len(plan.cuts) + 1:
        got = f"the plan has {len(plan.stages)} stages and {len(plan.cuts)} cuts"
        raise _wrong(got, "there is one stage more than there are cuts")
    for cut, stage in zip(plan.cuts, plan.stages[1:], strict=True):
        if cut.before != str(stage.nodes[0]):
            got = f"cut {stage.index - 1} is before {cut.before!r}, but stage {stage.index} begins with"
            raise _wrong(f"{got} {str(stage.nodes[0])!r}", "a stage begins at the cut before it")
        for name in ("bytes", "transfer_forward_ms", "transfer_backward_ms"):
            _refuse_negative(f"cut before {cut.before}: {name}", getattr(cut, name))


def _refuse_bad_costs(plan: Plan) -> None:
    for name in ("objective_ms", "lower_bound_ms", "step_ms"):
        _refuse_negative(name, getattr(plan, name))
    objective, bound = plan.objective_ms, plan.lower_bound_ms
    if bound > objective * (1 + SAME):
        raise _wrong(f"lower_bound_ms {bound:g} is above objective_ms {objective:g}", "nothing is below its own bound")
    if plan.status == "optimal" and bound < objective * (1 - SAME):
        got = f"status is optimal, but lower_bound_ms {bound:g} is below objective_ms {objective:g}"
        raise _wrong(got, "optimal is what its bound proves; otherwise it is feasible")
    if (plan.schedule is None) != (plan.step_ms is None):
        raise _wrong(f"schedule {plan.schedule} with step_ms {plan.step_ms}", "a schedule has a step, and only it")
    if plan.step_ms is not None and not math.isclose(plan.step_ms, objective, rel_tol=SAME):
        raise _wrong(
            f"step_ms {plan.step_ms:g} differs from objective_ms {objective:g}", "the step is what is minimised"
        )
    for stage in plan.stages:
        work = stage.forward_ms + stage.backward_ms
        if plan.step_ms is not None and not math.isclose(stage.load_ms, work, rel_tol=SAME, abs_tol=1e-9):
            got = f"stage {stage.index}: load_ms {stage.load_ms:g} is not forward_ms + backward_ms, {work:g}"
            raise _wrong(got, "the load is the sum of the two")


def _refuse_bad_split_spec(plan: Plan) -> None:
    spec = plan.split_specification
    if plan.plain_chain != (spec is not None):
        raise _wrong(
            f"plain_chain is {plan.plain_chain} {'with' if spec else 'without'} split_spec", "both, or neither"
        )
    if spec is None:
        return
    begins = [stage.names[0] for stage in plan.stages[1:]]
    if list(spec) != begins or set(spec.values()) - {"beginning"}:
        got = f"split_spec has {_list(f'{name}: {point}' for name, point in spec.items()) or 'no entries'}"
        raise _wrong(got, f'it names what the later stages begin with, each "beginning": {_list(begins) or "nothing"}')


def _refuse_negative(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value < math.inf:
        raise _wrong(f"{name} is {value:g}", "times and sizes are finite and not negative")


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _wrong(got: str, rule: str) -> FileError:
    return FileError(got, rule, "make the plan again")
