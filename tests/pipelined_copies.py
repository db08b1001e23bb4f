"""One of several copies that time a model in a pipeline, by a clock that only operators of known cost advance.

`times(model, 2)` starts two of them, `python -m tests.pipelined_copies MODEL RANK COPIES FOLDER SCHEDULE HOW`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from planner.errors import DEBUG
from planner.files.profile_file import Schedule
from planner.machine.workers import as_worker
from planner.profiling.layer_clock import LayerClock
from planner.profiling.pipelined import time_in_pipeline
from planner.profiling.timing import Microbatch
from planner.tracing.exporting import trace_model
from planner.tracing.loading import as_call
from planner.tracing.pieces import build_pieces
from tests.working_clock import CLOCK, Layer, WorkingDevice, work

MICROBATCHES = 3
ROOT = Path(__file__).resolve().parent.parent


class Skip(nn.Module):
    """x reaches the last layer past the middle ones, and a layer does nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.side, self.last = Layer(1, 10), Layer(2, 20), Layer(3, 30), Layer(4, 40)
        self.nothing = nn.Dropout(0.0)

    def forward(self, x):
        kept = self.first(x)
        return self.last(self.nothing(self.side(self.middle(kept))) + kept)


class AddTo(Layer):
    """A layer that adds what it has worked on to what it was given besides."""

    def forward(self, x, kept):
        return super().forward(x) + kept


class Added(nn.Module):
    """The last layer is given two values; the gradient of one of them is there before its backward has worked."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = Layer(1, 10), Layer(2, 20), AddTo(4, 40)

    def forward(self, x):
        kept = self.first(x)
        return self.last(self.middle(kept), kept)


class Frozen(nn.Module):
    """The first two layers have no backward."""

    def __init__(self):
        super().__init__()
        self.frozen, self.more, self.last = Layer(8, 100), Layer(1, 100), Layer(9, 5)
        for layer in (self.frozen, self.more):
            layer.weight.requires_grad_(False)

    def forward(self, x):
        return self.last(self.more(self.frozen(x)))


class Structured(nn.Module):
    """Two inputs by keyword, of which the later layers read one; outputs in a dict; a parameter read in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Layer(2, 3), Layer(2, 3), Layer(2, 3)
        self.third.weight = self.first.weight

    def forward(self, x, mask):
        x = self.first(x)
        x = self.second(x) * mask
        return {"hidden": x, "output": self.third(x).t()}


class Pair(nn.Module):
    """The last stage of two has two layers, and the loss belongs to the last of them."""

    def __init__(self):
        super().__init__()
        self.long, self.short, self.last = Layer(50, 50), Layer(1, 2), Layer(3, 4)

    def forward(self, x):
        return self.last(self.short(self.long(x)))


class One(nn.Module):
    """A single layer: there is nothing to divide."""

    def __init__(self):
        super().__init__()
        self.only = Layer(2, 3)

    def forward(self, x):
        return self.only(x)


def inputs_of(model):
    """A microbatch of inputs: positional or by keyword."""
    x = torch.arange(6.0).reshape(2, 3) + 1
    return {"x": x, "mask": torch.tensor([[1.0, 0.0, 1.0]] * 2)} if isinstance(model, Structured) else x


def loss_of(output, targets):
    """A loss that takes 0.5 ms forward and 0.25 ms backward; with three numbers per sample."""
    if isinstance(output, dict):
        output = output["output"].t() + output["hidden"]
    return work((output - targets).square().sum(), 0.5, 0.25)


class Stepping(torch.optim.SGD):
    """An optimizer that takes 0.5 ms, and 0.25 ms for every parameter that has a gradient."""

    def step(self, closure=None):
        super().step(closure)
        with_gradient = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        CLOCK.now_ms += 0.5 + 0.25 * len(with_gradient)


def make_optimizer(parameters):
    """One that would change the weights by all of their gradients."""
    return Stepping(parameters, lr=1.0)


def main() -> None:
    """Time the model and leave what was found."""
    name, rank, copies, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    schedule, how = sys.argv[5:]
    CLOCK.after_backward_ms = 1.0 if how == "colder" else 0.0
    if how == "slowed":
        marked = LayerClock.mark

        def slow(self, made):
            marked(self, made)
            CLOCK.now_ms += 1.0

        LayerClock.mark = slow
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), copies), rank=rank, world_size=copies)
    model = globals()[name]()
    args, kwargs = as_call(inputs_of(model))
    pieces = build_pieces(trace_model(model, args, kwargs))
    tensors = [*args, *kwargs.values()]
    microbatches = [Microbatch(tuple(t * (1 + n) for t in tensors), torch.ones(2, 3) * n) for n in range(MICROBATCHES)]
    timed = time_in_pipeline(
        pieces, microbatches, loss_of, make_optimizer, WorkingDevice(), 4, schedule=cast(Schedule, schedule)
    )
    gradients = {n: p.grad.tolist() for n, p in model.named_parameters() if p.grad is not None}
    found = {
        "layers": {layer.id: asdict(samples) for layer, samples in zip(pieces.trace.layers, timed.layers, strict=True)},
        "boundary": asdict(timed.boundary),
        "starts": timed.starts,
        "optimizer_ms": timed.optimizer_ms,
        "gradients": gradients,
    }
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def times(name: str, copies: int, folder: Path, how: str = "exact", *, schedule: Schedule = "gpipe") -> list[dict]:
    """What every copy found; `how`: marks "slowed" by 1 ms, or forwards after a backward "colder" by as much."""
    arguments = [str(copies), str(folder), schedule, how]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pipelined_copies", name, str(rank), *arguments],
            cwd=ROOT,
            env={**os.environ, DEBUG: "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(copies)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(copies)]


if __name__ == "__main__":
    as_worker(main)
