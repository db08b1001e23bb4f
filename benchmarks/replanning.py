"""Falsifies profiles by ±30 % per structure, then measures and plans again until the cuts stay, and prints a table.

python benchmarks/replanning.py [--cases 100] [--noise 0.0] [--unequal]

Every case is a seeded profile, a truth (each structure's forward and backward times a factor from 0.7 to 1.3 that the
planner does not know), a number of stages, of microbatches, and a schedule. A round is what a user does: run the plan
(simulated: what its stages take in truth, with --noise a relative error), then `plan --from-measurement` with all
measurements so far, and keep the faster of the plans that were measured. With --unequal no two layers are equal and
each has errors of its own. No hardware is needed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.files.measurement_file import Measurement, StageFigures, StageMeasurement, StepTimes
from planner.files.plan_file import Plan
from planner.files.profile_file import LayerProfile, Machine, ModelReference, Profile, SizeProfile
from planner.partitioning.chain import solve_chain
from planner.partitioning.chain_costs import Chain, stage_costs, step_ms
from planner.partitioning.layer_graph import build_layer_graph, chain_of
from planner.planning import plan_profile
from planner.replanning import replan
from planner.request import PlanRequest
from planner.scheduling.simulation import StageTimes

MACHINE = Machine("cpu", "simulated", 1, {})
MAX_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Case:
    """A profile that is wrong, the truth, and what is planned."""

    profile: Profile
    truth: Chain
    request: PlanRequest
    num_microbatches: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Steps ÷ the true optimum: of the first plan, then of the best plan measured after each round.

    `settled` says whether the last round kept cuts that had been measured.
    """

    ratios: tuple[float, ...]
    settled: bool

    def after(self, num_rounds: int) -> float:
        """The ratio after `num_rounds` rounds, or after all there were."""
        return self.ratios[min(num_rounds, len(self.ratios) - 1)]


def make_case(seed: int, error: float = 0.3, *, equal: bool = True) -> Case:
    """A model of a stem, one to three trunks of repeated blocks, and a head, whose profile is falsified by `error`.

    Not `equal`: no two layers have one structure.
    """
    source = random.Random(seed)
    structures = [f"stem{i}" for i in range(source.randint(1, 2))]
    for trunk in range(source.randint(1, 3)):
        block = [f"block{trunk}.{source.randint(0, 4)}" for _ in range(source.randint(1, 5))]
        structures += block * source.randint(3, 8)
    structures += [f"head{i}" for i in range(source.randint(1, 2))]
    if not equal:
        structures = [f"{name}.{index}" for index, name in enumerate(structures)]
    base = {name: source.lognormvariate(0, 0.8) * (3 if "block" not in name else 1) for name in structures}
    backward = {name: cost * source.uniform(1.2, 2.8) for name, cost in base.items()}
    layers = tuple(
        _layer(index, name, base[name] * source.gauss(1, 0.005), backward[name] * source.gauss(1, 0.005))
        for index, name in enumerate(structures)
    )
    forward_error = {name: source.uniform(1 - error, 1 + error) for name in base}
    backward_error = {name: source.uniform(1 - error, 1 + error) for name in base}
    true_layers = tuple(
        replace(
            layer,
            forward_ms=layer.forward_ms * forward_error[layer.structure],
            backward_ms=layer.backward_ms * backward_error[layer.structure],
            backward_first_ms=layer.backward_first_ms * backward_error[layer.structure],
        )
        for layer in layers
    )
    gpus = source.randint(2, 6)
    count = source.choice([8, 16, 32])
    size = SizeProfile(1, "simulated", layers, (), (), 0.0)
    profile = Profile(ModelReference(None, "simulated"), MACHINE, "fp32", count, 15, 0.0, 1, (size,))
    truth = chain_of(build_layer_graph(replace(size, layers=true_layers)))
    schedule = "1f1b" if seed % 4 == 3 else "gpipe"
    request = PlanRequest(gpus=gpus, batch_size=count, microbatches=count, schedule=schedule)
    return Case(profile, truth, request, count)


def _layer(index: int, structure: str, forward_ms: float, backward_ms: float) -> LayerProfile:
    return LayerProfile(
        id=f"{index}",
        name=f"{index}",
        type=structure.rstrip(".0123456789"),
        position=index,
        forward_ms=forward_ms,
        forward_spread_ms=0.005 * forward_ms,
        backward_ms=backward_ms,
        backward_spread_ms=0.005 * backward_ms,
        backward_first_ms=0.97 * backward_ms,
        optimizer_ms=0.2 * forward_ms,
        parameter_bytes=0,
        parameters=(),
        plain_cut=True,
        structure=structure,
    )


def measure(case: Case, plan: Plan, noise: float, source: random.Random) -> Measurement:
    """What a run of `plan` would measure: its stages' true times, each off by `noise` (relative)."""

    def seen(value: float) -> float:
        return value * max(0.1, source.gauss(1, noise))

    def figures(times: StageTimes) -> StageFigures:
        forward, backward = seen(times.forward_ms), seen(times.backward_ms)
        first, optimizer = seen(times.backward_first_ms), seen(times.optimizer_ms)
        return StageFigures(forward, backward, first, optimizer, None, None, None, noise * forward, noise * backward)

    stages = [figures(times) for times in stage_costs(case.truth, _cuts(case, plan))]
    return Measurement(
        plan=plan.model.fingerprint,
        name=plan.model.name,
        schedule=case.request.schedule,
        num_microbatches=plan.num_microbatches,
        microbatch_size=plan.microbatch_size,
        step_ms=StepTimes(plan.scheduled_step_ms(), true_step_ms(case, plan) * source.gauss(1, noise), 0.0),
        stages=tuple(StageMeasurement(index, own, own, 1) for index, own in enumerate(stages)),
        clock="thread-cpu",
        step_clock="simulated",
        wall_step_ms=0.0,
        drift=None,
        scale=1.0,
        machine=MACHINE,
        steps=(),
        cuts=tuple(cut.before for cut in plan.cuts),
    )


def true_step_ms(case: Case, plan: Plan) -> float:
    """The step that `plan` takes in truth."""
    return step_ms(case.truth, _cuts(case, plan), case.num_microbatches, case.request.schedule)


def _cuts(case: Case, plan: Plan) -> tuple[int, ...]:
    return tuple(case.truth.ids.index(cut.before) for cut in plan.cuts)


def improve(case: Case, noise: float = 0.0, seed: int = 0) -> Outcome:
    """Plan on the wrong profile, then measure and plan again until measured cuts are kept."""
    source = random.Random(seed)
    optimum = solve_chain(case.truth, case.request.gpus, case.num_microbatches, schedule=case.request.schedule).step_ms
    plan = plan_profile(case.profile, case.request)
    measurements = [measure(case, plan, noise, source)]
    steps = [(measurements[0].step_ms.measured, true_step_ms(case, plan))]
    ratios = [steps[0][1] / optimum]
    for _ in range(MAX_ROUNDS):
        again = replan(case.profile, measurements, case.request)
        if again.kept is not None:
            return Outcome(tuple(ratios), True)
        measurements.append(measure(case, again.plan, noise, source))
        steps.append((measurements[-1].step_ms.measured, true_step_ms(case, again.plan)))
        ratios.append(min(steps)[1] / optimum)
    return Outcome(tuple(ratios), False)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per number of rounds: how many end near the optimum, the worst, and how many are worse than at first."""
    lines = ["rounds  within 1 %  median  worst   worse than the first plan"]
    for number in range(MAX_ROUNDS + 1):
        ratios = sorted(outcome.after(number) for outcome in outcomes)
        worse = sum(outcome.after(number) > outcome.ratios[0] * (1 + 1e-9) for outcome in outcomes)
        within = sum(ratio <= 1.01 for ratio in ratios)
        middle, worst = ratios[len(ratios) // 2] - 1, ratios[-1] - 1
        lines.append(f"{number:>6}  {within:>4} of {len(ratios)}  {middle:>5.1%}  {worst:>5.1%}  {worse:>5}")
    settled = sum(outcome.settled for outcome in outcomes)
    rounds = sorted(len(outcome.ratios) - 1 for outcome in outcomes)
    lines.append(f"{settled} of {len(outcomes)} settled; runs after the first: median {rounds[len(rounds) // 2]}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--noise", type=float, default=0.0, metavar="SHARE", help="relative error of what is measured")
    parser.add_argument("--unequal", action="store_true", help="no two layers are equal")
    flags = parser.parse_args()
    cases = (make_case(seed, equal=not flags.unequal) for seed in range(flags.cases))
    print(table([improve(case, flags.noise, seed) for seed, case in enumerate(cases)]))


if __name__ == "__main__":
    main()
