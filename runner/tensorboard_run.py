"""`--tensorboard DIR`: what is written for TensorBoard's profiler plugin (torch-tb-profiler), and where.

    DIR/NAME/profiled/stage_0.pt.trace.json      torch.profiler's trace of the last steps on the rank of stage 0
             profiled/stage_1.pt.trace.json …    (the plugin shows one run with a worker per stage)
             timeline/predicted.pt.trace.json    the step as planned, and the step from the measured stage times
             timeline/measured.pt.trace.json     (the plugin shows a second run with two workers)

NAME is that of the run's directory. A file's name up to `.pt.trace.json` is the plugin's name of the worker.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import UsageError
from runner.worker import MEMORY_STEP

if TYPE_CHECKING:
    from runner.comparing import BalanceReport
    from runner.options import RunOptions

SUFFIX = ".pt.trace.json"
NUM_WARM_UP, NUM_ACTIVE = 1, 3


def profiled_steps(num_steps: int) -> range:
    """The steps of a run that the profiler watches, its warm-up first: the last ones. Their times are not measured.

    >>> profiled_steps(20)
    range(16, 20)
    """
    return range(num_steps - NUM_WARM_UP - NUM_ACTIVE, num_steps)


def refuse_unusable(options: RunOptions) -> None:
    """Raise UsageError where `--tensorboard` cannot be obeyed: a folder that takes no file, or too few steps."""
    if options.tensorboard is None:
        return
    least = MEMORY_STEP + 2 + NUM_WARM_UP + NUM_ACTIVE
    if options.steps < least:
        raise UsageError(
            f"--tensorboard with --steps {options.steps}",
            f"the last {NUM_WARM_UP + NUM_ACTIVE} steps are profiled, the first {MEMORY_STEP + 1} warm up and measure"
            " memory; times are taken from those between",
            f"give --steps {least} or more",
        )
    try:
        options.tensorboard.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.tensorboard):
            pass
    except OSError as error:
        raise UsageError(
            f"--tensorboard {options.tensorboard}: {error.strerror}",
            "the traces are written there",
            "give a folder that can be written",
        ) from None


def run_name(run_dir: Path) -> str:
    """The name of a run in TensorBoard.

    >>> run_name(Path("runs/demo"))
    'demo'
    """
    return run_dir.resolve().name or "run"


def stage_trace(directory: Path, name: str, stage: int, num_stages: int) -> Path:
    """The file of a stage's profile. The numbers sort as text, which is how the plugin sorts workers.

    >>> stage_trace(Path("tb"), "demo", 3, 16).as_posix()
    'tb/demo/profiled/stage_03.pt.trace.json'
    """
    return directory / name / "profiled" / f"stage_{stage:0{len(str(num_stages - 1))}}{SUFFIX}"


def remove_earlier(directory: Path, name: str) -> None:
    """Delete the profiles of an earlier run of the same name: it may have had more stages, which would be mixed in."""
    for file in (directory / name / "profiled").glob(f"stage_*{SUFFIX}"):
        file.unlink(missing_ok=True)


def write_timelines(directory: Path, name: str, report: BalanceReport) -> None:
    """Write the predicted and the measured step. Raises FileError where that is impossible."""
    from planner.files.reading import write_text
    from runner.reporting.chrome_trace import Track, render_step_trace

    for track in (Track("predicted", report.predicted), Track("measured", report.measured)):
        text = render_step_trace(track, report.stages)
        write_text(directory / name / "timeline" / f"{track.name}{SUFFIX}", text)


def describe(directory: Path, name: str, num_steps: int) -> str:
    """The line that says what was profiled and how to look at it.

    >>> print(describe(Path("tb"), "demo", 20))
    profiled steps 17 to 19 after warming up in step 16, and took no times from them; to look at it:
      tensorboard --logdir tb    (tab PYTORCH_PROFILER, runs demo/profiled and demo/timeline)
    """
    steps = profiled_steps(num_steps)
    return (
        f"profiled steps {steps[NUM_WARM_UP]} to {steps[-1]} after warming up in step {steps[0]}, and took no times"
        f" from them; to look at it:\n  tensorboard --logdir {directory}    (tab PYTORCH_PROFILER,"
        f" runs {name}/profiled and {name}/timeline)"
    )
