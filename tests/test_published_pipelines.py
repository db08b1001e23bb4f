"""The benchmark on published pipelines: its fit on made-up runs of a known link, and its figures on the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.published_pipelines import (
    errors,
    find_folder,
    needed_ms_per_byte,
    predicted_ms,
    read_runs,
    table,
)

MS_PER_BYTE = 2e-7


def made_up(folder: Path) -> Path:
    """A file of three runs that a link of 5 GB/s explains exactly, and of three that are not usable."""
    cost = {"forward_s": 0.002, "backward_s": 0.004, "parameter_bytes": 8, "output_bytes": 8_000_000.0}
    kinds = [([[0, 1], [2, 3]], 8), ([[0], [1], [2, 3]], 8), ([[0, 1], [2, 3]], 4)]
    runs: list[dict[str, Any]] = [
        {
            "file": f"run{number}",
            "model": "toy",
            "stages": stages,
            "microbatch_size": 1,
            "num_microbatches": count,
            "data_parallel": 1,
            "gradient_allreduce_s": 0.001,
            "measured_s": 1.0,
            "notes": [],
        }
        for number, (stages, count) in enumerate(kinds)
    ]
    left_out = [{**runs[0], "notes": ["wrong"]}, {**runs[0], "num_microbatches": 1}, {**runs[0], "stages": [[0, 1]]}]
    data = {"profiles": {"toy": {str(layer): {"1": cost} for layer in range(4)}}, "runs": runs + left_out}
    path = folder / "sailor_toy.json"
    path.write_text(json.dumps(data))
    for run, read in zip(runs, read_runs(path), strict=False):
        run["measured_s"] = predicted_ms(read, MS_PER_BYTE) / 1e3
    path.write_text(json.dumps(data))
    return path


def test_a_known_link_is_found_and_predicts_the_other_runs(tmp_path: Path) -> None:
    runs = read_runs(made_up(tmp_path))
    assert [run.family for run in runs] == [(2, 1), (3, 1), (2, 1)]
    assert [needed_ms_per_byte(run) for run in runs] == pytest.approx([MS_PER_BYTE] * 3, rel=1e-4)
    assert all(predicted_ms(run, 0.0) < 0.95 * run.measured_ms for run in runs)
    for fitted, error in errors(runs, lambda run, other: run.family != other.family):
        assert fitted == pytest.approx(MS_PER_BYTE, rel=1e-4) and abs(error) < 1e-4
    assert len(table(runs).splitlines()) == 1 + 3 + 2


def test_a_run_never_predicts_itself(tmp_path: Path) -> None:
    path = made_up(tmp_path)
    data = json.loads(path.read_text())
    data["runs"][1]["measured_s"] *= 2
    path.write_text(json.dumps(data))
    off = errors(read_runs(path), lambda run, other: run is not other)[1]
    assert off == (pytest.approx(MS_PER_BYTE, rel=1e-4), pytest.approx(-0.5, rel=1e-3))


def test_the_published_pipelines_are_predicted_within_two_percent_at_the_median(workloads: Path) -> None:
    folder = find_folder(None)
    if folder is None:
        pytest.skip("no measured pipelines beside EVENSTAGE_WORKLOADS")
    runs = read_runs(folder / "sailor_opt350.json")
    assert len(runs) >= 9 and workloads.exists()
    by_family = errors(runs, lambda run, other: run.family != other.family)
    assert median(abs(error) for _, error in by_family) <= 0.02
    assert median(abs(predicted_ms(run, 0.0) / run.measured_ms - 1) for run in runs) > 0.04  # the link explains it
