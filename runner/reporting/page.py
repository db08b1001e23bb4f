"""BalanceReport → one HTML page that stands by itself: no network, no script, light and dark, also on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from planner.files.measurement_file import Measurement
from planner.files.plan_file import Plan
from planner.files.profile_file import Machine
from planner.rendering import (
    DASH,
    baseline_label,
    clean,
    counted,
    format_bytes,
    format_column,
    format_count,
    format_ms,
    format_percent,
    gap,
    glue,
    links_line,
    proof,
    shorten,
    split_specification_code,
)
from runner.comparing import BalanceReport, ComparedTime
from runner.reporting.charts import balance_chart, loss_chart, memory_chart, microbatch_chart, steps_chart
from runner.reporting.gantt import Lane, gantt_chart
from runner.reporting.terminal import (
    check_words,
    computing_words,
    interval_words,
    loss_words,
    scale_words,
    setting_words,
    speed_up_words,
    start_words,
)
from runner.verdict import plan_command

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = "report.html.j2"
_CODE_WIDTH = 72


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that the page shows large, with what it means below it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class TimeCells:
    """The cells of one direction of one stage, as text."""

    predicted: str
    predicted_spread: str
    measured: str
    measured_spread: str
    error: str
    raw_error: str


def render_html(report: BalanceReport, plan: Plan, measurement: Measurement) -> str:
    """The report as a complete HTML document."""
    from markupsafe import Markup

    charts = {name: None if svg is None else Markup(svg) for name, svg in _charts(report, plan).items()}
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            report=report,
            plan=plan,
            measurement=measurement,
            charts=charts,
            key_figures=key_figures(report),
            forward=_time_cells([stage.forward for stage in report.stages]),
            backward=_time_cells([stage.backward for stage in report.stages]),
            proof=_proof_rows(plan),
            provenance=_provenance_rows(report, plan, measurement),
            python_code=_python_code(plan),
            commands=_commands(plan),
            check_words=check_words(report.check) if report.check else "",
            loss_words=loss_words(report),
            setting_words=setting_words(report),
            scale_words=scale_words(report),
            speed_up_words=speed_up_words(report.speed_up) if report.speed_up else "",
        )
    )


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        ms=_or_dash(format_ms), percent=format_percent, short=shorten, size=format_bytes, clean=clean, glue=glue
    )
    return environment


def _or_dash(form: Any) -> Any:
    return lambda value: DASH if value is None else form(value)


def _charts(report: BalanceReport, plan: Plan) -> dict[str, str | None]:
    lanes = [
        Lane(f"predicted, {format_ms(report.predicted.step_ms)}", report.predicted.tasks, report.predicted.critical),
        Lane(f"measured, {format_ms(report.measured.step_ms)}", report.measured.tasks, report.measured.critical),
    ]
    return {
        "balance": balance_chart(report.stages, report.scale),
        "steps": steps_chart(report),
        "gantt": gantt_chart(lanes, len(report.stages)),
        "memory": memory_chart(report.stages, plan.stages),
        "microbatches": microbatch_chart(plan.microbatch_curve, plan.num_microbatches),
        "loss": loss_chart(report.steps, report.reference_loss, report.reference_loss_name),
    }


def key_figures(report: BalanceReport) -> list[Figure]:
    """The handful of numbers that say whether the plan was good and the prediction right."""
    step, planned = report.step_ms, report.predicted_bubble
    taken = "rehearsed" if report.rehearsed else "measured" if report.step_clock == "wall" else "from measured stages"
    name = f"Step, {taken}"
    change = format_percent(report.step_error, signed=True)
    balance, expected = _ratio(report.measured_balance), _ratio(report.predicted_balance)
    miss = format_percent(report.largest_error)
    efficiency = format_percent(step.ideal / step.measured if step.measured > 0 else None)
    found = [
        Figure(name, format_ms(step.measured), f"predicted {format_ms(step.predicted)} ({change})"),
        Figure("Balance", balance, f"largest ÷ mean load, planned {expected}"),
        Figure("Bubble", format_percent(report.measured_bubble), f"idle share, planned {format_percent(planned)}"),
        Figure("Largest miss", miss, f"of a stage, after one scale of {report.scale:.3f}"),
        Figure("Efficiency", efficiency, f"{format_ms(step.ideal)} would be ideal"),
        *_comparison_figures(report),
    ]
    if report.check is not None:
        found.append(
            Figure("Check", f"{report.check.max_loss_difference:.1e}", "loss difference from the unsplit model")
        )
    return found


def _comparison_figures(report: BalanceReport) -> list[Figure]:
    """The speed-up where it was measured, else what equal layers would take."""
    if report.speed_up is not None:
        speed_up = report.speed_up
        note = f"over {baseline_label(speed_up.against)}, 95 % in {speed_up.low:.2f} to {speed_up.high:.2f}"
        return [Figure("Speed-up", f"{speed_up.measured:.2f} ×", note)]
    equal = [other for other in report.alternatives if other.label == "equal layers"]
    changes = ["same cuts" if other.same_cuts else format_percent(other.change, signed=True) for other in equal]
    return [Figure("Equal layers", change, "their step on predicted costs") for change in changes]


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _time_cells(times: Sequence[ComparedTime]) -> list[TimeCells]:
    """All cells of a direction with the same number of decimals."""
    columns = [
        [time.predicted_ms for time in times],
        [time.predicted_spread_ms for time in times],
        [time.measured_ms for time in times],
        [time.measured_spread_ms for time in times],
    ]
    cells = format_column([value for column in columns for value in column])
    count = len(times)
    return [
        TimeCells(
            predicted=cells[index],
            predicted_spread=cells[index + count],
            measured=cells[index + 2 * count],
            measured_spread=cells[index + 3 * count],
            error=format_percent(time.error, signed=True),
            raw_error=format_percent(time.raw_error, signed=True),
        )
        for index, time in enumerate(times)
    ]


def _proof_rows(plan: Plan) -> list[tuple[str, str]]:
    what = "step" if plan.schedule is not None else "largest load"
    distance = gap(plan)
    return [
        ("Result", proof(plan)),
        ("Objective", f"{what} {plan.objective_ms:,.3f} ms"),
        ("Proven lower bound", f"{plan.lower_bound_ms:,.3f} ms"),
        ("Gap", "no bound" if distance is None else f"{distance * 100:.3f} %"),
        ("Branch and bound", counted(plan.solver.num_nodes, "node")),
        ("Covers", f"{counted(len(plan.microbatch_curve), 'microbatch count')}, each solved by itself"),
    ]


def _provenance_rows(report: BalanceReport, plan: Plan, measurement: Measurement) -> list[tuple[str, str]]:
    planned_on = _machine(plan.machine) if plan.machine is not None else DASH
    run_on = _machine(measurement.machine)
    machines = [("Machine", run_on)] if planned_on == run_on else [("Profiled on", planned_on), ("Run on", run_on)]
    samples = ", ".join(str(stage.samples) for stage in report.stages)
    parameters = f"{format_count(plan.model.num_parameters)} parameters, " if plan.model.num_parameters else ""
    return [
        ("Model", f"{clean(plan.model.name)}, {parameters}{plan.precision}"),
        ("Fingerprint", clean(plan.model.fingerprint)),
        *machines,
        ("Schedule", setting_words(report)),
        *([("Links", f"{line}; in the stages' times")] if (line := links_line(plan)) else []),
        ("Seed", str(plan.seed)),
        ("Clock", report.clock_words),
        ("Wall clock", f"{format_ms(report.wall_step_ms)} per step here"),
        *(("Computing", text) for text in [computing_words(report)] if text),
        ("Scale and drift", scale_words(report)),
        *(("Intervals", text) for text in [interval_words(report)] if text),
        *(("Start", start_words(report.start)) for _ in [0] if report.start is not None),
        ("Samples", f"{samples} microbatches behind the medians, per stage"),
    ]


def _machine(machine: Machine) -> str:
    count = counted(machine.num_devices, "core" if machine.device == "cpu" else "device")
    versions = ", ".join(f"{clean(name)} {clean(version)}" for name, version in sorted(machine.versions.items()))
    return f"{clean(machine.device_name)}, {count}; {versions}"


def _plan_file(plan: Plan) -> str:
    """The name that `plan` gives the file by default."""
    return f"{PurePath(clean(plan.model.file or plan.model.name)).name.removesuffix('.py')}.plan.json"


def _python_code(plan: Plan) -> str:
    """What to write in a training script of one's own; nothing for one stage."""
    if plan.num_stages == 1:
        return ""
    load = f"from planner import Plan\n\nplan = Plan.load({_plan_file(plan)!r})\n"
    specification = split_specification_code(plan, _CODE_WIDTH)
    if specification is not None:
        return (
            f"from torch.distributed.pipelining import SplitPoint, pipeline\n\n{specification}\n"
            "pipe = pipeline(model, mb_args=(x_microbatch,), split_spec=split_spec)"
        )
    code = load + "pipe = pipeline(model, mb_args=(x_microbatch,), split_policy=plan.split_policy(model))"
    if plan.tied:
        code += "\n\n# after schedule.step(), before clipping and optimizer.step():\nplan.sum_tied_gradients(stage)"
    return code


def _commands(plan: Plan) -> str:
    return "\n".join([plan_command(plan), plan_command(plan, "--train"), f"run-plan {_plan_file(plan)}"])
