"""What can go wrong, as one family: every error says what was got, the rule, and the remedy.

PlannerError                 exit code 1
├── UsageError               2   flags that contradict each other or the plan
├── FileError                2   a plan, profile, graph or measurement that cannot be read or written
├── ModelFileError           2   model.py is missing, broken or incomplete
├── TraceError               2   the model cannot be exported, or cannot be cut as the plan says
├── ProfileError             1   the model exported but did not run on the device at hand
├── InfeasibleError          5   no plan satisfies the constraints
├── SolverError              1   the solver ended without a solution
└── RunError                 1   a run ended before its last step
    ├── ToleranceError       3   the prediction lies outside --tolerance
    └── CheckError           4   --check found a difference from the unsplit model
"""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

DEBUG = "EVENSTAGE_DEBUG"  # the environment variable by which --debug reaches worker processes


class PlannerError(Exception):
    """An error for the person at the terminal: `got`, the `rule` that it breaks, and the `remedy`.

    >>> print(PlannerError("cannot cut 6 layers into 8 stages", "the model has 5 legal cuts", "use --gpus 6 or fewer"))
    cannot cut 6 layers into 8 stages
      rule: the model has 5 legal cuts
      remedy: use --gpus 6 or fewer
    """

    exit_code = 1

    def __init__(self, got: str, rule: str = "", remedy: str = "", frames: tuple[str, ...] = ()) -> None:
        self.got, self.rule, self.remedy, self.frames = got, rule, remedy, frames
        super().__init__(got, rule, remedy, frames)

    def __str__(self) -> str:
        lines = [self.got, *(f"  {frame}" for frame in self.frames)]
        if self.rule:
            lines.append(f"  rule: {self.rule}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


class UsageError(PlannerError):
    """Flags or arguments that contradict each other, the plan, or the machine."""

    exit_code = 2


class FileError(PlannerError):
    """A file that is exchanged cannot be read, understood or written."""

    exit_code = 2


class ModelFileError(PlannerError):
    """The user's model file is missing, broken or incomplete."""

    exit_code = 2


class TraceError(PlannerError):
    """The model cannot be exported as one graph, or cannot be cut where the plan says."""

    exit_code = 2


class ProfileError(PlannerError):
    """The exported model did not run on the device at hand."""


class InfeasibleError(PlannerError):
    """No plan satisfies the constraints; says by how much and what the nearest thing is that works."""

    exit_code = 5


class SolverError(PlannerError):
    """The solver ended without a solution although one exists."""


class RunError(PlannerError):
    """A run ended before its last step."""


class ToleranceError(RunError):
    """The prediction lies outside the tolerance that was asked for."""

    exit_code = 3


class CheckError(RunError):
    """The split model differs from the unsplit one."""

    exit_code = 4


def user_frames(error: BaseException, file: Path, limit: int = 3) -> tuple[str, ...]:
    """The last `limit` frames of `error` that lie in `file`'s folder, as `file:line: source text`.

    Frames of installed packages and of this project are left out, so that what is shown is the user's own code.
    """
    folder = str(file.resolve().parent)
    shown = []
    for frame in traceback.extract_tb(error.__traceback__):
        inside = frame.filename.startswith(folder) and "site-packages" not in frame.filename
        if inside or frame.filename == str(file):
            text = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
            shown.append(f"{Path(frame.filename).name}:{frame.lineno}: {text}")
    if isinstance(error, SyntaxError) and error.filename == str(file):
        shown.append(f"{file.name}:{error.lineno}: {(error.text or '').strip()}")
    return tuple(shown[-limit:])
