"""In-situ time of every layer in a real pipeline: each copy runs one part of the graph as a stage of torch's own.

A stage that waits for its neighbours finds its caches cold when it wakes up, and one that never waits does not; torch's
own work on a chunk, which is most of a stage of half a millisecond, is paid where there is a boundary. Both depend on
where a layer runs, so the layers are timed where they will run, or nearly: in as many stages, of about even load,
under the schedule that is planned for. (A forward that follows a backward, as in 1F1B, finds other caches than one that
follows a forward, as in GPipe: on one machine it took 4 % longer.)

Marks between the layers slow what follows them, by some 20 µs each. So steps with marks, which tell the layers apart,
alternate with steps without, which tell what the stage takes; the layers' times are scaled to that. After each the
optimizer steps, as in training: so it is timed where it will run, and the next step finds the caches as it leaves them.
Before that the gradients of tied parameters are summed over the stages. The gradient of an embedding by itself is zero
in most rows, and on a CPU the optimizer can be twice as long with zeros: `torch.sqrt` is nine times as slow on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining._utils import PipeInfo
from torch.distributed.pipelining.stage import build_stage

from planner.files.plan_file import boundaries_of
from planner.files.profile_file import Schedule
from planner.machine.device import Device
from planner.profiling.boundary import BoundaryCost, shared
from planner.profiling.layer_clock import LayerClock
from planner.profiling.marked_graph import MarkedStages, even_starts, marked_stages, set_clock, without_marks
from planner.profiling.pooling import on_first_copy
from planner.profiling.stage_optimizer import StageOptimizer
from planner.profiling.timing import LayerSamples, Microbatch, clear_gradients, load_ms_alone, without_collection
from planner.profiling.torch_schedule import schedule_class
from planner.tracing.older_stages import as_of_later_torch
from planner.tracing.pieces import OutputValue, Pieces
from planner.tracing.split_policy import tied_over_cuts
from planner.tracing.tied_gradients import sum_tied_gradients

WARM_UP_ROUNDS = 3
LEAST_SHARE = 0.1  # of a stage is its layers', whatever its boundaries are charged


def time_in_pipeline(
    pieces: Pieces,
    microbatches: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    device: Device,
    num_rounds: int,
    before_round: Callable[[int], None] = lambda _: None,
    *,
    schedule: Schedule = "gpipe",
) -> PipelineTimes:
    """Samples of every layer over `num_rounds` steps of all copies under `schedule`, boundaries and optimizer besides.

    Collective. Gradients are None at each step's start. `before_round` is called with the round's number before each.
    A copy for which there is no layer left only meets the others. 1F1B needs a microbatch for every copy.
    """
    with without_collection():
        starts = _agreed_starts(pieces, microbatches, loss_fn, device, before_round)
        group, rank = dist.new_group(range(len(starts))), dist.get_rank()
        stage = None
        if rank < len(starts):
            stages = marked_stages(pieces.trace, starts)
            stage = StageOfLayers(pieces, stages, loss_fn, make_optimizer, device, rank, group, schedule=schedule)
        for number in range(-WARM_UP_ROUNDS, num_rounds):
            before_round(number)
            if stage is not None:
                stage.step(microbatches, marked=number % 2 == 0, keep=number >= 0)
    every: list[Any] = [None] * dist.get_world_size()
    own = stage and (StageSamples(stage.forward, stage.backward), stage.optimizer.taken_ms)
    dist.all_gather_object(every, own)
    found = [each for each in every if each is not None]
    layers, boundary = put_together([samples for samples, _ in found])
    return PipelineTimes(layers, boundary, starts, tuple(optimizer_ms for _, optimizer_ms in found))


@dataclass(frozen=True, slots=True)
class PipelineTimes:
    """Samples of every layer, what a boundary costs, and each stage's optimizer takes; stages begin at `starts`."""

    layers: tuple[LayerSamples, ...]
    boundary: BoundaryCost
    starts: tuple[int, ...]
    optimizer_ms: tuple[float, ...]


def _agreed_starts(
    pieces: Pieces,
    microbatches: Sequence[Microbatch],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    device: Device,
    before_round: Callable[[int], None],
) -> tuple[int, ...]:
    """First layers of stages of even load, by what the first copy has seen of the whole model."""
    before_round(-WARM_UP_ROUNDS)
    load_ms = load_ms_alone(pieces, microbatches[:2], loss_fn, device)
    return on_first_copy(lambda: even_starts(load_ms, dist.get_world_size()))


@dataclass(slots=True)
class Direction:
    """Milliseconds of a stage in one direction: by layer, then by microbatch, of marked steps; of chunks, of others.

    The first and the last layer are what is not the model's: torch's own work and the form in which values travel. In
    `first` are the layers' times on a step's first microbatch, where those differ.
    """

    layers: list[list[float]] = field(default_factory=list)
    first: list[list[float]] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)

    def add(self, times: Sequence[float], *, first: bool = False) -> None:
        """What the layers of one microbatch took; `first` keeps a step's first microbatch apart."""
        self.layers = self.layers or [[] for _ in times]
        self.first = self.first or [[] for _ in times]
        for samples, value in zip(self.first if first else self.layers, times, strict=True):
            samples.append(value)

    @property
    def medians(self) -> list[float]:
        """Of every layer, in marked steps."""
        return [median(samples or first) for samples, first in zip(self.layers, self.first, strict=True)]

    @property
    def taken_ms(self) -> float:
        """What a chunk takes without marks, or with them where no other was seen."""
        return median(self.chunks) if self.chunks else sum(self.medians)

    @property
    def besides_ms(self) -> float:
        """The share of that which is not the layers'."""
        before, *_, after = medians = self.medians
        return (before + after) * self.taken_ms / sum(medians) if sum(medians) > 0 else 0.0

    def without(self, boundaries_ms: float) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
        """Samples of the layers on later microbatches and on the first, which with `boundaries_ms` make `taken_ms`."""
        of_layers = sum(self.medians[1:-1])
        left = max(self.taken_ms - boundaries_ms, LEAST_SHARE * self.taken_ms)
        factor = left / of_layers if of_layers > 0 else 1.0
        first = [[value * factor for value in layer] for layer in self.first[1:-1]]
        later = [[value * factor for value in layer] for layer in self.layers[1:-1]]
        return [tuple(own or other) for own, other in zip(later, first, strict=True)], [tuple(each) for each in first]


@dataclass(frozen=True, slots=True)
class StageSamples:
    """What one stage took."""

    forward: Direction
    backward: Direction


def put_together(stages: Sequence[StageSamples]) -> tuple[tuple[LayerSamples, ...], BoundaryCost]:
    """The samples of all layers and the cost of a boundary.

    What stages spent besides their layers differs: the ends send or receive only, and more tensors cross one boundary
    than another. A boundary is charged the same wherever it is, so the rest is shared out among the stage's layers:
    a plan with the cuts of the profile is predicted to take what the profile's stages took.
    """
    boundary = shared([(stage.forward.besides_ms, stage.backward.besides_ms) for stage in stages])
    found: list[LayerSamples] = []
    for number, stage in enumerate(stages):
        count = boundaries_of(number, len(stages))
        forward, _ = stage.forward.without(count * boundary.forward_ms)
        backward, first = stage.backward.without(count * boundary.backward_ms)
        found += map(LayerSamples, forward, backward, first)
    return tuple(found), boundary


class StageOfLayers:
    """One stage of the model, run by torch, its layers timed."""

    def __init__(
        self,
        pieces: Pieces,
        stages: MarkedStages,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        device: Device,
        index: int,
        group: Any = None,
        *,
        schedule: Schedule = "gpipe",
    ) -> None:
        self.pieces, self.loss_fn, self.device = pieces, loss_fn, device
        self.schedule_class = schedule_class(schedule)
        self.output_names = list(dict.fromkeys(leaf.name for leaf in pieces.outputs if isinstance(leaf, OutputValue)))
        self.function = stages.marked[index]
        self.plain = without_marks(self.function)
        info = PipeInfo(stages.pipe_graph, len(stages.marked), has_loss_and_backward=False)
        stage: Any = build_stage(self.function, index, info, device.torch_device, group)
        as_of_later_torch(stage)
        self._attach(stage)
        self.stage = stage
        cuts = [pieces.trace.layers[start].id for start in stages.starts[1:]]
        self.tied = tied_over_cuts(pieces.trace, cuts)
        self.optimizer = StageOptimizer(self.function.parameters(), make_optimizer, device)
        self.schedule: Any = None
        self.microbatches: Sequence[Microbatch] = ()
        self.clocks: dict[int, LayerClock] = {}
        self.loss_ms: dict[int, float] = {}
        self.forward, self.backward = Direction(), Direction()

    def step(self, microbatches: Sequence[Microbatch], *, marked: bool, keep: bool) -> None:
        """One step of training, of which, with `keep`, the times are samples."""
        clear_gradients(self.pieces)
        if self.schedule is None:
            self.schedule = self.schedule_class(self.stage, len(microbatches), loss_fn=self._loss, scale_grads=False)
        self.stage.submod = self.function if marked else self.plain
        self.microbatches = microbatches
        inputs: list[torch.Tensor] = []
        if self.stage.is_first:
            inputs = [torch.cat(rows) for rows in zip(*(each.inputs for each in microbatches), strict=True)]
        target = torch.arange(len(microbatches)) if self.stage.is_last else None
        self.schedule.step(*inputs, target=target, return_outputs=False)
        sum_tied_gradients(self.tied, self.stage)
        self.optimizer.step(keep=keep)
        if keep:
            for number in range(len(microbatches)):
                self._keep(number, marked=marked)

    def _attach(self, stage: Any) -> None:
        stage.forward_one_chunk = self._timed_forward(stage.forward_one_chunk)
        stage.backward_one_chunk = self._timed_backward(stage.backward_one_chunk)

    def _timed_forward(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(number: int, *args: Any, **kwargs: Any) -> Any:
            clock = self.clocks[number] = LayerClock(self.device)
            set_clock(self.function, clock)
            clock.begin()
            with self.pieces.trace.computing():
                result = method(number, *args, **kwargs)
            clock.end()
            return result

        return timed

    def _loss(self, output: Any, numbers: torch.Tensor) -> torch.Tensor:
        """The loss of a microbatch; its time is the last layer's."""
        number = int(numbers)
        before = self.device.stamp()
        with self.pieces.trace.computing():
            values = dict(zip(self.output_names, output, strict=True))
            loss = self.loss_fn(self.pieces.rebuild_output(values), self.microbatches[number].targets)
        after = self.device.stamp()
        self.loss_ms[number] = self.device.elapsed_ms([before, after])[0]
        clock = self.clocks[number]
        if loss.requires_grad and clock.num_layers > 1:
            loss.register_hook(lambda gradient: clock.enter(clock.num_layers - 2))
        return loss

    def _timed_backward(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(number: int, *args: Any, **kwargs: Any) -> Any:
            clock = self.clocks[number]
            clock.enter(clock.num_layers - 1)
            result = method(number, *args, **kwargs)
            clock.end_backward()
            return result

        return timed

    def _keep(self, number: int, *, marked: bool) -> None:
        clock = self.clocks[number]
        forward, backward, loss_ms = clock.forward_ms(), clock.backward_ms(), self.loss_ms.get(number, 0.0)
        if marked:
            forward[-2] += loss_ms
            self.forward.add(forward)
            self.backward.add(backward, first=number == 0)
        else:
            self.forward.chunks.append(forward[0] + loss_ms)
            self.backward.chunks += backward if number > 0 or len(self.clocks) == 1 else []
