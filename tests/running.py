"""Runs for tests: a scored plan at given cuts, without profiling, and commands as a user would type them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from planner.files.plan_file import Cut, Plan, PlannedModel, SolverRecord, Stage
from planner.tracing.exporting import trace_model
from planner.tracing.loading import as_call, build, load_source, make_batch, rows
from planner.tracing.split_policy import tied_over_cuts

ROOT = Path(__file__).resolve().parents[1]


def plan_at(
    model: Path,
    cuts: list[str] | int,
    num_microbatches: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    order: Sequence[str] | None = None,
) -> Plan:
    """A plan of `model` with the given cuts (or that many stages, cut evenly), its costs made up.

    It is of the precision that the model file states. `order` are the ids of all layers where they are not cut in
    program order.
    """
    source = load_source(str(model))
    size = batch_size // num_microbatches
    inputs, _ = make_batch(source, seed, 0, batch_size)
    autocast_on = torch.device("cpu") if source.precision == "bf16" else None
    trace = trace_model(build(source, seed), *as_call(rows(inputs, 0, size)), autocast_on=autocast_on)
    ids = [layer.id for layer in trace.layers] if order is None else list(order)
    if isinstance(cuts, int):
        cuts = [ids[len(ids) * k // cuts] for k in range(1, cuts)]
    bounds = [0, *(ids.index(cut) for cut in cuts), len(ids)]
    stages = tuple(
        Stage(k, k, tuple(ids[a:b]), tuple(ids[a:b]), 1.0, 0.1, 2.0, 0.1, 2.0, 0.1, 3.0, 1.0, 0.5, 0)
        for k, (a, b) in enumerate(itertools.pairwise(bounds))
    )
    plain = order is None and not trace.why_not_plain
    plain = plain and all(trace.layers[index].plain_cut for index in bounds[1:-1])
    return Plan(
        model=PlannedModel(str(model), trace.fingerprint, model.stem),
        status="scored",
        objective_ms=1.0,
        lower_bound_ms=1.0,
        solver=SolverRecord("none", 0.0, 0),
        schedule="gpipe",
        num_microbatches=num_microbatches,
        microbatch_size=size,
        precision=source.precision or "fp32",
        seed=seed,
        data_parallel=1,
        step_ms=1.0,
        plain_chain=plain,
        why_not=None if plain else trace.why_not_plain or "not plain",
        split_specification=dict.fromkeys(cuts, "beginning") if plain else None,
        order=None if order is None else tuple(order),
        recompute=(),
        cuts=tuple(Cut(cut, (), 0) for cut in cuts),
        stages=stages,
        baselines={},
        microbatch_curve=(),
        tied=tied_over_cuts(trace, cuts, order),
        bandwidth_bytes_per_s=None,
        machine=None,
    )


def built_on_the_meta_device(text: str) -> str:
    """The text of a model file whose model has no memory when it is built."""
    build = "def build_model():\n    with torch.device('meta'):\n        return ordinary()\n"
    return f"{text}\nordinary = build_model\n{build}"


def command(
    *arguments: object, cwd: Path, module: str = "runner", timeout: float = 180, gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments…` in `cwd`, on the CPU unless it is told to use a `gpu`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    line = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def torchrun(num_workers: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node num_workers arguments…` in `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers)]
    line += [*map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180)
