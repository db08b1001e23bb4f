"""A model file → Profile, measured by concurrent copies in processes of their own.

The copies are the stages of a pipeline, as many as workers will share the host, because ranks slow each other; the
allocator's settings, which must be set before a process starts, are those of the training workers.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from planner.errors import FileError
from planner.files.profile_file import Granularity, Profile, Schedule
from planner.files.reading import dump_json
from planner.machine.device import available_cores, worker_environment
from planner.machine.workers import run_workers

REQUEST_SCHEMA = "evenstage/profile-request/1"


@dataclass(frozen=True, slots=True)
class ProfileRequest:
    """What to profile, in `num_rounds`; `progress` is a file that the first copy keeps writing how far it is.

    `meta`: without memory for the whole model, one layer at a time. `granularity` auto opens layers that `num_stages`
    stages could not balance.
    """

    model: str
    seed: int
    batch_size: int
    microbatch_sizes: tuple[int, ...]
    device: str | None
    num_rounds: int
    copies: int
    progress: str
    meta: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    granularity: Granularity = "module"
    num_stages: int = 1
    schedule: Schedule = "gpipe"


def profile_model(
    model: str,
    *,
    batch_size: int,
    microbatch_sizes: tuple[int, ...],
    num_workers: int,
    num_stages: int | None = None,
    device: str | None = None,
    seed: int = 0,
    num_rounds: int = 12,
    meta: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    granularity: Granularity = "module",
    schedule: Schedule = "gpipe",
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Profile:
    """Profile `model` ("file.py" or "file.py:name") at the given sizes, as `num_workers` workers would run it.

    `num_stages` is the number of parts that it is run in, where that is not the number of workers. 1F1B needs as many
    microbatches as workers.

    Calls `progress(share, what)` now and then. Raises ModelFileError, TraceError or ProfileError.
    """
    kind = device_kind(device)
    copies = concurrent_copies(num_workers, kind)
    environment = worker_environment(kind, scarce_memory=meta)
    with tempfile.TemporaryDirectory(prefix="evenstage-profile-") as folder:
        shown = str(Path(folder, "progress"))
        request = ProfileRequest(
            model,
            seed,
            batch_size,
            microbatch_sizes,
            device,
            num_rounds,
            copies,
            shown,
            meta,
            precision,
            granularity,
            num_stages or num_workers,
            schedule,
        )
        path, result = Path(folder, "request.json"), Path(folder, "profile.json")
        path.write_text(dump_json(request, REQUEST_SCHEMA), encoding="utf-8")
        with _Watch(Path(request.progress), progress):
            run_workers("planner.profiling.worker", [str(path), str(result)], copies, environment)
        return Profile.load(result)


def device_kind(device: str | None) -> str:
    """ "cpu" or "cuda": what `device` names, or what is at hand for None."""
    if device is not None:
        return device.partition(":")[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def concurrent_copies(num_workers: int, kind: str) -> int:
    """Copies to run at once: as many as workers will share this host's cores, two for each at most; 1 on a GPU.

    Where workers take turns on a core, each finds the caches full of the other's data; that is worth up to a fifth.
    More than two for each make it no worse, and every one holds the whole model.
    """
    return 1 if kind == "cuda" else max(1, min(num_workers, 2 * available_cores()))


class _Watch:
    """Reads the progress file in a thread while the workers run."""

    def __init__(self, file: Path, report: Callable[[float, str], None]) -> None:
        self.file, self.report = file, report
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.ended.wait(0.3):
            if self.file.exists():
                share, _, what = self.file.read_text(encoding="utf-8").partition(" ")
                if share:
                    self.report(float(share), what)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def reusable(
    profile: Profile,
    model: str,
    batch_size: int,
    sizes: tuple[int, ...],
    device: str | None,
    seed: int,
    meta: bool = False,
    precision: str = "fp32",
    granularity: Granularity = "module",
) -> str:
    """Why `profile` cannot stand for a new one of `model`; empty where it can. Traces the model once."""
    from planner.machine.device import choose_device, describe_machine
    from planner.tracing.deferred_model import build_either
    from planner.tracing.exporting import trace_model
    from planner.tracing.loading import as_call, load_source, make_batch, rows
    from planner.tracing.training_digest import training_digest

    if profile.estimated is not None:
        return "it was estimated, not measured"
    if not profile.training:
        return "it does not say what was trained and how"

    if meta and not profile.model.meta:
        return "it was made without --meta"
    if profile.precision != precision:
        return f"it was made in {profile.precision}"
    if profile.granularity != granularity:
        return f"it was made with --granularity {profile.granularity}"
    if profile.batch_size != batch_size:
        return f"it was made for batches of {profile.batch_size}"
    missing = set(sizes) - {size.microbatch_size for size in profile.sizes}
    if missing:
        return f"microbatches of {', '.join(map(str, sorted(missing)))} are not in it"
    chosen = choose_device(device)
    if not profile.machine.same_as(describe_machine(chosen)):
        return "it was made on another machine or with other versions"
    source = load_source(model)
    inputs, _ = make_batch(source, seed, 0, batch_size)
    smallest = min(profile.sizes, key=lambda size: size.microbatch_size)
    built, deferred = build_either(source, seed, meta=meta)
    if profile.model.meta and deferred is None:
        return "it was made with --meta, one layer at a time"
    autocast_on = chosen.torch_device if precision == "bf16" else None
    trace = trace_model(built, *as_call(rows(inputs, 0, smallest.microbatch_size)), autocast_on=autocast_on)
    if trace.fingerprint != smallest.fingerprint:
        return "the model has changed since"
    same = profile.training == training_digest(source, trace.graph_module)
    return "" if same else "what is trained, the loss or the optimizer has changed since"


def load_if_fitting(path: Path, **wanted: object) -> tuple[Profile | None, str]:
    """The profile in `path` where it may be reused, and otherwise why not (empty where there is none)."""
    if not path.exists():
        return None, ""
    try:
        profile = Profile.load(path)
    except FileError as error:
        return None, error.got
    reason = reusable(profile, **wanted)  # type: ignore[arg-type]
    return (None, reason) if reason else (profile, "")
