"""Plan → str: the table that `plan` prints."""

from __future__ import annotations

import json
from math import hypot
from pathlib import PurePath

from planner.files.plan_file import Baseline, Plan, Stage
from planner.files.profile_file import Peak, Profile, Tracing
from planner.rendering.links_text import links_line
from planner.rendering.table import TableColumn, table_lines
from planner.rendering.wording import (
    DASH,
    balance,
    baseline_label,
    clean,
    counted,
    format_bar,
    format_column,
    format_count,
    format_ms,
    format_percent,
    mean_bubble,
    wrap_parts,
)

DEFAULT_WIDTH = 100
BAR_WIDTH, MIN_BAR_WIDTH = 20, 8


def render_plan(plan: Plan, profile: Profile | None, *, limit_line: str = "", width: int = DEFAULT_WIDTH) -> str:
    """The plan as text, `width` columns wide: origin, proof, stages, alternatives, and what to copy.

    `profile` is the one that the plan was made from; what only it knows is left out without it. `limit_line` says
    what limits the step. Only a name in the last lines, which are there to be copied, may be wider than `width`.
    """
    paragraphs = [
        [*wrap_parts(_origin(plan, profile), width), *wrap_parts([*_profiling(plan, profile), proof(plan)], width)],
        _stage_table(plan, width),
        [*wrap_parts(_step_figures(plan), width, "  "), *_links(plan, width), *_alternatives(plan, width)],
        [*_to_copy(plan, width), *wrap_parts([clean(limit_line)] if limit_line else [], width, "  ")],
    ]
    return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)


def model_title(plan: Plan) -> str:
    """The model as a person names it: its file, with the entry where that is not the usual one; else its name."""
    if plan.model.file is None:
        return clean(plan.model.name)
    file, entry = PurePath(plan.model.file), plan.model.entry
    if file.suffix == ".json":
        length = entry.removeprefix("hf").removeprefix("_")
        return clean(f"{plan.model.name} ({file.name}{f', sequences of {length}' if length else ''})")
    return clean(file.name + ("" if entry == "build_model" else f":{entry}"))


def same_cuts(plan: Plan, baseline: Baseline) -> bool:
    """Whether a baseline cuts where the plan does."""
    return baseline.cuts == tuple(cut.before for cut in plan.cuts)


def gap(plan: Plan) -> float | None:
    """How far the plan may be from optimal: objective ÷ proven bound − 1. None without a bound."""
    return plan.objective_ms / plan.lower_bound_ms - 1 if plan.lower_bound_ms > 0 else None


def proof(plan: Plan) -> str:
    """One clause: the solver, its time, and how good the plan provably is."""
    solved = f"solved in {plan.solver.seconds:.2f} s by {clean(plan.solver.name)}"
    distance = gap(plan)
    what = "step" if plan.schedule is not None else "largest load"
    if plan.status == "scored":
        return f"{solved}: these cuts were given, not searched for"
    if distance is None:
        return f"{solved}: {plan.status}, without a bound"
    if plan.status == "optimal":
        return f"{solved}: optimal (bound = {what})"
    return f"{solved}: feasible, at most {format_percent(distance)} from optimal"


def split_specification_code(plan: Plan, width: int = DEFAULT_WIDTH) -> str | None:
    """`split_spec = {…}` as Python, on one line where it fits; None where the plan is no plain chain."""
    if plan.split_specification is None:
        return None
    items = [f"{json.dumps(clean(n), ensure_ascii=False)}: SplitPoint.BEGINNING" for n in plan.split_specification]
    line = f"split_spec = {{{', '.join(items)}}}"
    return line if len(line) <= width else "\n".join(["split_spec = {", *(f"    {item}," for item in items), "}"])


def _origin(plan: Plan, profile: Profile | None) -> list[str]:
    parts = [model_title(plan)]
    counts = []
    if profile is not None and profile.model.layer_type and profile.model.num_repeated_layers:
        counts.append(f"{profile.model.num_repeated_layers} layers of {clean(profile.model.layer_type)}")
    if plan.model.num_parameters:
        counts.append(f"{format_count(plan.model.num_parameters)} parameters")
    parts += [", ".join(counts)] if counts else []
    if profile is not None and any(size.microbatch_size == plan.microbatch_size for size in profile.sizes):
        num_cuts = len(profile.size(plan.microbatch_size).layers) - 1
        parts.append(counted(num_cuts, "legal cut"))
    device = [clean(plan.machine.device_name)] if plan.machine is not None else []
    return [*parts, ", ".join([*device, plan.precision])]


def _profiling(plan: Plan, profile: Profile | None) -> list[str]:
    """Seconds, rounds and spread; the spread is the largest standard error of a stage's load, as a share of it."""
    if plan.estimated is not None:
        return [f"estimated, not measured: {peak_words(plan.estimated)}"]
    if profile is None:
        return []
    shares = [hypot(s.forward_spread_ms, s.backward_spread_ms) / s.load_ms for s in plan.stages if s.load_ms > 0]
    spread = f", spread {format_percent(max(shares))}" if shares else ""
    traced = [] if profile.tracing is None else [tracing_text(profile.tracing)]
    how, advice = f" in {profile.seconds:.1f} s ({profile.num_rounds} rounds{spread})", []
    if profile.differs_in_schedule(plan.schedule):
        how = f" under {profile.schedule}{how}"
        advice = [f"times under {plan.schedule} may differ by some percent (--fresh measures them)"]
    return [f"profiled{how}", *advice, *traced]


def peak_words(peak: Peak) -> str:
    """What an estimate takes for granted, in words."""
    flops, moved = peak.flops_per_s / 1e12, peak.bytes_per_s / 1e12
    return f"FLOPs and bytes at {flops:.3g} TFLOP/s and {moved:.3g} TB/s ({clean(peak.source)})"


def _stage_table(plan: Plan, width: int) -> list[str]:
    """A row per stage; a narrow terminal loses ± first, then the bar, then the number of layers.

    ± is half the 90 % interval where the plan has it, else the standard error.
    """
    stages = plan.stages
    largest = max(stage.load_ms for stage in stages) or 1.0
    begins = [_begin(plan, stage) for stage in stages]
    longest = max(len(begin) for begin in begins)
    known = all(stage.forward_interval_ms is not None for stage in stages)
    spread = [(s.forward_interval_ms, s.backward_interval_ms) if known else _standard_errors(s) for s in stages]
    spreads, sign = any(any(pair) for pair in spread), "±90 %" if known else "±"
    bar_width = max(MIN_BAR_WIDTH, min(BAR_WIDTH, width - 68 - longest))
    forward = format_column([*(s.forward_ms for s in stages), *(pair[0] for pair in spread)])
    backward = format_column([*(s.backward_ms for s in stages), *(pair[1] for pair in spread)])
    heading, memory = _memory_column(plan)
    columns = [
        TableColumn("stage", [str(stage.index) for stage in stages], left=True),
        TableColumn("begins at", begins, left=True, name=True),
        TableColumn("layers", [str(len(stage.nodes)) for stage in stages], dropped=1),
        TableColumn("forward ms", forward[: len(stages)]),
        *([TableColumn(sign, forward[len(stages) :], dropped=3)] if spreads else []),
        TableColumn("backward ms", backward[: len(stages)]),
        *([TableColumn(sign, backward[len(stages) :], dropped=3)] if spreads else []),
        TableColumn(heading, memory),
        TableColumn("load", [format_bar(stage.load_ms / largest, bar_width) for stage in stages], left=True, dropped=2),
    ]
    return table_lines(columns, width)


def _standard_errors(stage: Stage) -> tuple[float | None, float | None]:
    return stage.forward_spread_ms, stage.backward_spread_ms


def _memory_column(plan: Plan) -> tuple[str, list[str]]:
    """Peak memory in a unit in which it can be read, against the limit where there is one."""
    peaks, limit = [stage.peak_memory_bytes for stage in plan.stages], plan.memory_limit_bytes
    largest = max((peak for peak in peaks if peak is not None), default=0)
    unit, size = ("GiB", 2**30) if max(largest, limit or 0) >= 2**30 or not largest else ("MiB", 2**20)
    of = "" if limit is None else f" / {limit / size:.3g}"
    return f"memory {unit}", [DASH if peak is None else f"{peak / size:.1f}{of}" for peak in peaks]


def _begin(plan: Plan, stage: Stage) -> str:
    """The module that a stage begins with; of a layer graph, whose names need not be short or unique, the id."""
    if plan.model.file is None and stage.nodes:
        return str(stage.nodes[0])
    return stage.names[0] if stage.names else DASH


def _step_figures(plan: Plan) -> list[str]:
    even = balance(stage.load_ms for stage in plan.stages)
    evenness = [f"balance {even:.2f}"] if even is not None else []
    if plan.schedule is None:
        return [f"largest load {format_ms(plan.objective_ms)}", *evenness]
    counts = sorted(point.num_microbatches for point in plan.microbatch_curve)
    chosen = f" (chosen of {', '.join(map(str, counts))})" if len(counts) > 1 else ""
    size = f" of {plan.microbatch_size}" if plan.model.file is not None else ""
    bubble = mean_bubble([stage.bubble_fraction for stage in plan.stages])
    return [
        f"{counted(plan.num_microbatches, 'microbatch', 'es')}{size}{chosen}",
        f"step {format_ms(plan.scheduled_step_ms())}{_step_interval(plan)}",
        *([f"bubble {format_percent(bubble)}"] if bubble is not None else []),
        *evenness,
    ]


def _step_interval(plan: Plan) -> str:
    if plan.estimated is not None:
        return " (estimated)"
    return "" if plan.step_interval_ms is None else f" ± {format_ms(plan.step_interval_ms)} (90 %)"


def _links(plan: Plan, width: int) -> list[str]:
    line = links_line(plan)
    return wrap_parts([f"links: {line}"], width, "  ") if line and plan.num_stages > 1 else []


def _alternatives(plan: Plan, width: int) -> list[str]:
    parts = []
    for name, baseline in plan.baselines.items():
        own, other = plan.objective_ms, baseline.objective_ms
        if same_cuts(plan, baseline):
            parts.append(f"{baseline_label(name)} the same cuts")
            continue
        ratio = f" ({format_percent(other / own - 1, signed=True)})" if own > 0 else ""
        fits = ", does not fit" if baseline.fits is False else ""
        parts.append(f"{baseline_label(name)} {format_ms(other)}{ratio}{fits}")
    if not parts:
        return []
    return wrap_parts([f"instead: {parts[0]}", *parts[1:]], width, "  ")


def _to_copy(plan: Plan, width: int) -> list[str]:
    if plan.num_stages == 1:
        return ["  one stage: nothing to split"]
    if plan.model.file is None:
        return []
    code = split_specification_code(plan, width - 2)
    if code is not None:
        return [f"  {line}" for line in code.splitlines()]
    lines = [f"  no split_spec: {clean(plan.why_not or 'the cuts are not those of a plain chain')}"]
    lines.append("  pipeline(model, …, split_policy=plan.split_policy(model)) runs this plan")
    if plan.tied:
        lines.append("  plan.sum_tied_gradients(stage) after schedule.step(): parameters are tied across stages")
    return lines


def tracing_text(tracing: Tracing) -> str:
    """What tracing took, e.g. "traced in 4.2 s (1 export)"."""
    exports = "1 export" if tracing.num_exports == 1 else f"{tracing.num_exports} exports"
    return f"traced in {tracing.seconds:.1f} s ({exports})"
