"""The first thing to run where there is a GPU: times, memory and reserves of stages, rehearsed one after the other.

python -m benchmarks.gpu_first [--stages 4] [--steps 10]

Profiles each model on the device at hand, plans it for several GPUs, runs the plan's stages on the one device, and
prints what was predicted beside what was measured; then what memory is gone before any tensor is made. Takes some
minutes. On a machine without a GPU it does the same on the CPU and says so: the figures are then the CPU's.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.measured_runs import EXAMPLES
from benchmarks.prediction import Bench, printed_runs, summary
from planner.files.profile_file import Profile
from planner.rendering.wording import format_bytes

MODELS = {EXAMPLES / f"{name}.py": 32 for name in ("transformer", "gpt2", "resnet")}
"""Models and their microbatch sizes: large enough for a GPU to be busy."""


def main() -> None:
    """Parse the command line, rehearse, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, metavar="K")
    parser.add_argument("--steps", type=int, default=10, metavar="N")
    parser.add_argument("--models", type=int, default=len(MODELS), metavar="N", help="the first N models (default all)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    chosen = [*MODELS.items()][: arguments.models]
    benches = [Bench(model, size, rehearse=True, num_rounds=12) for model, size in chosen]
    runs = printed_runs(benches, [arguments.stages], ["gpipe", "1f1b"], steps=arguments.steps)
    profiles = [profile for bench in benches for profile in bench.latest.values()]
    machine = machine_lines(profiles[-1] if profiles else None)
    print("\n".join([*summary(runs), *machine, f"took {time.perf_counter() - started:.0f} s"]))


def machine_lines(profile: Profile | None) -> list[str]:
    """The device, and what of its memory nobody can use."""
    if profile is None:
        return ["nothing was profiled"]
    machine = profile.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    found = [f"\n{machine.device_name}, {versions}"]
    if machine.device == "cpu":
        return [*found, "no GPU was found: these are the figures of the CPU"]
    total = "an unknown amount" if machine.memory_bytes is None else format_bytes(machine.memory_bytes)
    return [*found, f"{format_bytes(machine.reserved_bytes)} of {total} are gone before any tensor is made"]


if __name__ == "__main__":
    main()
