"""Fill in what the machine's drift was, once a second profile has been made after a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from planner.errors import FileError
from planner.files.measurement_file import Measurement
from planner.files.profile_file import Profile
from planner.intervals import profile_drift


def note_drift(run_dir: Path, before: Profile, after: Profile) -> Measurement:
    """Write into `run_dir`/measurement.json by how much the machine changed between two profiles around the run.

    `plan-report` shows it from then on. Raises FileError where the profiles cannot be compared.
    """
    drift = profile_drift(before, after)
    if drift is None:
        raise FileError(
            "two profiles without a size in common",
            "the drift is that between profiles of one model on one machine, at the same microbatch size",
            "profile the model of the run again",
        )
    measurement = replace(Measurement.load(run_dir / "measurement.json"), drift=drift)
    measurement.save(run_dir / "measurement.json")
    return measurement
