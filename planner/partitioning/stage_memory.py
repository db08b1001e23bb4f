"""The memory of any stage of a chain, put together from its layers; and which stages fit into a limit.

A stage of layers i to j keeps what its layers make in forward and free in a backward of its own, and what it sends
(torch's stage holds its outputs until their backward is done). What comes from outside lies in receive buffers. So the
bytes alive when a layer computes are sums over layers from i on, by prefix sums over the lifetimes of the profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from planner.files.profile_file import GradientLifetime, Lifetime, SizeMemory
from planner.partitioning.chain_costs import Chain, ChainTensor, crossing, holds
from planner.scheduling.memory_timeline import MemoryPoint, StageBytes, peak_memory

Whole = npt.NDArray[np.int64]


class StageMemoryTable:
    """What stages of `chain` need under a schedule. The chain's memory was measured (`chain.memory`)."""

    def __init__(self, chain: Chain, num_microbatches: int, schedule: str, reserved_bytes: int = 0) -> None:
        assert chain.memory is not None
        self.chain, self.memory = chain, chain.memory
        self.num_microbatches, self.schedule, self.reserved_bytes = num_microbatches, schedule, reserved_bytes
        self.num_layers = len(chain.ids)
        layers = self.memory.layers
        self.parameters = as_prefix(
            [size + m.buffer_bytes for size, m in zip(chain.parameter_bytes, layers, strict=True)]
        )
        self.trainable = as_prefix([m.trainable_bytes for m in layers])
        self.states = as_prefix([m.optimizer_state_bytes for m in layers])
        self.temporaries = np.array([m.optimizer_temporary_bytes for m in layers], np.int64)
        self.forward_peak = np.array([m.forward_peak_bytes for m in layers], np.int64)
        self.backward_peak = np.array([m.backward_peak_bytes for m in layers], np.int64)
        self._stages: dict[tuple[int, int], StageBytes] = {}
        self.backward_first_peak = np.array([m.backward_first_peak_bytes for m in layers], np.int64)

    @cached_property
    def alive_forward(self) -> Whole:
        """[b, p]: bytes that layers before b made and that are alive when layer p computes."""
        count = self.num_layers
        made = np.zeros((count, count + 1), np.int64)
        for life in self.memory.size.lifetimes:
            made[life.made, life.made + 1] += life.num_bytes
            if life.freed_in == "forward":
                made[life.made, life.freed + 1] -= life.num_bytes
        return _accumulate(np.cumsum(made, axis=1))

    @cached_property
    def alive_backward(self) -> Whole:
        """[b, q]: bytes that layers before b made in forward and that a backward of layers up to q frees."""
        kept = [life for life in self.memory.size.lifetimes if life.freed_in == "backward"]
        return _freed_up_to(self.num_layers, kept)

    @cached_property
    def alive_gradients(self) -> Whole:
        """[b, q]: gradients that layers before b made in backward and that layers up to q free."""
        return _freed_up_to(self.num_layers, self.memory.size.gradients)

    @cached_property
    def boundaries(self) -> tuple[Boundary, ...]:
        """The cut before each layer (index 0 and the last: the model's ends, where nothing crosses)."""
        return tuple(_boundary(self.chain, self.memory.size, cut) for cut in range(self.num_layers + 1))

    def stage(self, start: int, stop: int) -> StageBytes:
        """The bytes of a stage of layers `start` to `stop`."""
        if (start, stop) not in self._stages:
            self._stages[start, stop] = self._measure(start, stop)
        return self._stages[start, stop]

    def _measure(self, start: int, stop: int) -> StageBytes:
        end, inside = self.boundaries[stop], slice(start, stop)
        sent = [life for life in end.sent if life.made >= start]
        copied = sum(tensor.num_bytes for tensor in end.crossing if tensor.producer >= start and not tensor.contiguous)
        saved = int(self.alive_backward[stop, stop - 1] - self.alive_backward[start, stop - 1]) + copied
        saved += sum(life.num_bytes for life in sent if life.freed_in == "forward" or life.freed >= stop)
        held = sum(life.num_bytes for life in sent)
        tied = [group for group in self.chain.tied if holds(group, start, stop)]
        trained = sum(group.parameter_bytes for group in tied if group.trainable)
        temporaries = [*self.temporaries[inside], *(group.optimizer_temporary_bytes for group in tied)]
        first, later = self._backward_rise(start, stop, sent)
        return StageBytes(
            parameter_bytes=int(self.parameters[stop] - self.parameters[start]) + sum(t.parameter_bytes for t in tied),
            gradient_bytes=int(self.trainable[stop] - self.trainable[start]) + trained,
            optimizer_bytes=int(self.states[stop] - self.states[start]) + sum(t.optimizer_state_bytes for t in tied),
            optimizer_temporary_bytes=int(sum(temporaries) if self.memory.size.temporaries_add else max(temporaries)),
            boundary_bytes=self.boundary_bytes(start, stop) * self.num_microbatches,
            saved_bytes=saved,
            output_bytes=held if stop == self.num_layers else 0,
            forward_rise_bytes=max(self._forward_rise(start, stop), saved + copied),
            backward_first_rise_bytes=first + copied,
            backward_rise_bytes=later + copied,
            sent_gradient_bytes=self.boundaries[start].gradient_bytes,
            sent_activation_bytes=0 if stop == self.num_layers else copied + held,
            reserved_bytes=self.reserved_bytes,
        )

    def boundary_bytes(self, start: int, stop: int) -> int:
        """Of one microbatch: receive buffers of activations and of gradients, and the batch where it is read."""
        size, num_bytes = self.memory.size, self.boundaries[start].num_bytes + self.boundaries[stop].gradient_bytes
        num_bytes += size.input_bytes if start == 0 else 0
        return num_bytes + (size.target_bytes if stop == self.num_layers else 0)

    def _forward_rise(self, start: int, stop: int) -> int:
        """The most that one microbatch has alive in forward."""
        layers = np.arange(start, stop)
        alive = self.alive_forward[layers, layers] - self.alive_forward[start, layers]
        return int((alive + self.forward_peak[start:stop]).max())

    def _backward_rise(self, start: int, stop: int, sent: Sequence[Lifetime]) -> tuple[int, int]:
        """The most that one microbatch has alive in a step's first backward, and in a later one.

        A layer's own peak was measured where the layer may free what it was given. In a stage, receive buffers and
        sent outputs stay, so their bytes are added where the layer would have freed them. Autograd adds gradients into
        the storage of the one that came first, but not into a receive buffer: what was made behind the stage and lives
        on in it is made again there. The gradient of a tied parameter waits from its last layer for that of its first.
        """
        layers = np.arange(start, stop)
        alive = self.alive_backward[stop, layers] - self.alive_backward[start, layers]
        alive += self.alive_gradients[-1, layers] - self.alive_gradients[layers + 1, layers]
        for life in sent:
            alive[layers <= (life.freed if life.freed_in == "backward" else stop)] += life.num_bytes
        for freed, num_bytes in self.boundaries[start].received:
            alive[layers == freed] += num_bytes
        made = self.trainable[stop] - self.trainable[layers + 1]
        waiting = np.zeros_like(made)
        for group in self.chain.tied:
            users = [layer for layer in group.layers if start <= layer < stop]
            if users and group.trainable:
                made[layers < users[-1]] += group.parameter_bytes
                waiting[(layers >= users[0]) & (layers < users[-1])] += group.parameter_bytes
        first = alive + made + self.backward_first_peak[start:stop]
        return int(first.max()), int((alive + waiting + self.backward_peak[start:stop]).max())

    def peak(self, start: int, stop: int, index: int, num_stages: int) -> MemoryPoint:
        """The task of stage `index`, of layers `start` to `stop`, that needs most memory."""
        return peak_memory(self.stage(start, stop), index, num_stages, self.num_microbatches, self.schedule)

    def peaks(self, cuts: Sequence[int]) -> list[MemoryPoint]:
        """The peak of every stage of `cuts`."""
        bounds = list(pairwise((0, *cuts, self.num_layers)))
        return [self.peak(start, stop, index, len(bounds)) for index, (start, stop) in enumerate(bounds)]


@dataclass(frozen=True, slots=True)
class Boundary:
    """A cut: the tensors that cross it, their bytes and their gradients' bytes.

    `sent` are the storages that hold them and the model's outputs. `received` are (layer, bytes): what a backward of
    that layer behind the cut frees of what was made before it.
    """

    crossing: tuple[ChainTensor, ...]
    num_bytes: int
    gradient_bytes: int
    sent: tuple[Lifetime, ...]
    received: tuple[tuple[int, int], ...]


def _boundary(chain: Chain, size: SizeMemory, cut: int) -> Boundary:
    tensors = crossing(chain, cut)
    return Boundary(
        crossing=tensors,
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        gradient_bytes=sum(tensor.gradient_bytes for tensor in tensors),
        sent=tuple(life for life in size.lifetimes if life.made < cut <= life.last_reader),
        received=tuple(
            (life.freed, life.num_bytes)
            for life in size.lifetimes
            if life.made < cut <= life.freed and life.freed_in == "backward"
        ),
    )


def as_prefix(values: Sequence[int] | Whole) -> Whole:
    """Sums of the values before each, and of all."""
    return np.concatenate([[0], np.cumsum(np.asarray(values, np.int64))])


def _freed_up_to(count: int, lives: Sequence[Lifetime | GradientLifetime]) -> Whole:
    """[b, q]: bytes that layers before b made and that the backward of layers up to q frees."""
    made = np.zeros((count, count + 1), np.int64)
    for life in lives:
        made[life.made, life.freed] += life.num_bytes
    return _accumulate(np.cumsum(made, axis=1))


def _accumulate(rows: Whole) -> Whole:
    """Sums over the rows before each."""
    return np.concatenate([np.zeros((1, rows.shape[1]), np.int64), np.cumsum(rows, axis=0)])
