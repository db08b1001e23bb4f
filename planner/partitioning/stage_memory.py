"""The memory of any stage of a chain, put together from its layers; and which stages fit into a limit.

A stage of layers i to j keeps what its layers make in forward and free in a backward of its own, and what it sends
(torch's stage holds its outputs until their backward is done). What comes from outside lies in receive buffers. So the
bytes alive when a layer computes are sums over layers from i on, by prefix sums over the lifetimes of the profile.

A layer's backward has a peak before and after what it frees (`LayerMemory`), so backward is followed peak by peak. All
peaks are numbered like the layers, against the time of backward: those of layer 0 first, and of each its last first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from planner.files.profile_file import GradientLifetime, LayerMemory, Lifetime
from planner.partitioning.boundary_memory import Boundary, boundary_at
from planner.partitioning.chain_costs import Chain, ChainTied, holds
from planner.scheduling.memory_timeline import MemoryPoint, StageBytes, peak_memory

Whole = npt.NDArray[np.int64]


class StageMemoryTable:
    """What stages of `chain` need under a schedule. The chain's memory was measured (`chain.memory`)."""

    def __init__(self, chain: Chain, num_microbatches: int, schedule: str, reserved_bytes: int = 0) -> None:
        assert chain.memory is not None
        self.chain, self.memory = chain, chain.memory
        self.num_microbatches, self.schedule = num_microbatches, schedule
        self.reserved_bytes = reserved_bytes + chain.memory.size.fragmentation_bytes
        self.num_layers = len(chain.ids)
        layers = self.memory.layers
        self.parameters = as_prefix(
            [size + m.buffer_bytes for size, m in zip(chain.parameter_bytes, layers, strict=True)]
        )
        self.trainable = as_prefix([m.trainable_bytes for m in layers])
        self.states = as_prefix([m.optimizer_state_bytes for m in layers])
        self.most_temporaries = np.array(
            [m.optimizer_temporary_bytes + m.optimizer_left_bytes for m in layers], np.int64
        )
        self.forward_peak = np.array([m.forward_peak_bytes for m in layers], np.int64)
        self.backward_peak = _last_first([m.backward_peaks_bytes for m in layers])
        self.backward_first_peak = _last_first([m.backward_first_peaks_bytes for m in layers])
        self.first_peak = as_prefix([len(m.backward_peaks_bytes) for m in layers])
        self.layer_of_peak = np.repeat(np.arange(self.num_layers), np.diff(self.first_peak))
        self._stages: dict[tuple[int, int], StageBytes] = {}

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
        """[b, peak]: bytes that layers before b made in forward and that backward has not freed at that peak."""
        return self._alive_at_peaks([life for life in self.memory.size.lifetimes if life.freed_in == "backward"])

    @cached_property
    def alive_gradients(self) -> Whole:
        """[b, peak]: gradients that layers before b made in backward and that are not freed at that peak."""
        return self._alive_at_peaks(self.memory.size.gradients)

    def _alive_at_peaks(self, lives: Sequence[Lifetime | GradientLifetime]) -> Whole:
        made = np.zeros((self.num_layers, len(self.layer_of_peak)), np.int64)
        for life in lives:
            made[life.made, self.last_peak(life)] += life.num_bytes
        return _accumulate(np.cumsum(made, axis=1))

    def last_peak(self, life: Lifetime | GradientLifetime) -> int:
        """The last peak of backward at which the bytes are alive: the lowest number."""
        return int(self.first_peak[life.freed + 1]) - 1 - life.freed_after

    @cached_property
    def boundaries(self) -> tuple[Boundary, ...]:
        """The cut before each layer (index 0 and the last: the model's ends, where nothing crosses)."""
        return tuple(boundary_at(self.chain, self.memory.size, cut) for cut in range(self.num_layers + 1))

    def stage(self, start: int, stop: int) -> StageBytes:
        """The bytes of a stage of layers `start` to `stop`."""
        if (start, stop) not in self._stages:
            self._stages[start, stop] = self._measure(start, stop)
        return self._stages[start, stop]

    def _measure(self, start: int, stop: int) -> StageBytes:
        end, begin = self.boundaries[stop], self.first_peak[stop] - 1
        sent = [life for life in end.sent if life.made >= start]
        copied = sum(tensor.num_bytes for tensor in end.crossing if tensor.producer >= start and not tensor.contiguous)
        saved = int(self.alive_backward[stop, begin] - self.alive_backward[start, begin]) + copied
        saved += sum(life.num_bytes for life in sent if life.freed_in == "forward" or life.freed >= stop)
        held = sum(life.num_bytes for life in sent)
        tied = self._tied(start, stop)
        first, later = self._backward_rise(start, stop, sent)
        return StageBytes(
            parameter_bytes=int(self.parameters[stop] - self.parameters[start]) + sum(t.parameter_bytes for t in tied),
            gradient_bytes=self._trained_bytes(start, stop),
            optimizer_bytes=int(self.states[stop] - self.states[start]) + sum(t.optimizer_state_bytes for t in tied),
            optimizer_temporary_bytes=self._optimizer_temporaries(start, stop),
            boundary_bytes=self.boundary_bytes(start, stop) * self.num_microbatches,
            saved_bytes=saved,
            output_bytes=held if stop == self.num_layers else 0,
            forward_rise_bytes=max(self._forward_rise(start, stop), saved + copied),
            backward_first_rise_bytes=first + copied,
            backward_rise_bytes=later + copied,
            sent_gradient_bytes=self.boundaries[start].gradient_bytes - self._returned_views(start, stop),
            sent_activation_bytes=0 if stop == self.num_layers else copied + held,
            reserved_bytes=self.reserved_bytes,
        )

    def _optimizer_temporaries(self, start: int, stop: int) -> int:
        ids = set(self.chain.ids[start:stop])
        owners: list[LayerMemory | ChainTied] = [*self.memory.layers[start:stop], *self._tied(start, stop)]
        temporaries = [
            own.optimizer_temporary_bytes + own.optimizer_left_bytes * (own.optimizer_left_by in ids) for own in owners
        ]
        return sum(temporaries) if self.memory.size.temporaries_add else max(temporaries)

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

        What is sent stays where a layer would have freed it. What is relayed is copied last of all. The gradient of a
        tied parameter waits from its last layer for that of its first, and their sum is made anew: autograd does not
        add in place into a view, and a linear layer's gradient is one.
        """
        peaks = np.arange(self.first_peak[start], self.first_peak[stop])
        layers = self.layer_of_peak[peaks]
        alive = self.alive_backward[stop, peaks] - self.alive_backward[start, peaks]
        alive += self.alive_gradients[stop, peaks] - self.alive_gradients[layers + 1, peaks]
        alive += self._copied_gradients(start, stop, layers)
        for tensor in self.boundaries[stop].crossing:
            alive[layers == tensor.producer] += tensor.gradient_bytes * tensor.gradient_scattered
        for life in sent:
            freed = life.freed_in == "backward" and life.freed < stop
            alive[peaks < self.last_peak(life) if freed else slice(None)] += life.num_bytes
        made, waiting = self._parameter_gradients(start, stop, layers)
        first, later = alive + made + self.backward_first_peak[peaks], alive + waiting + self.backward_peak[peaks]
        last = self._after_backward(start, stop) + sum(life.num_bytes for life in sent)
        return max(int(first.max()), last + self._trained_bytes(start, stop)), max(int(later.max()), last)

    def _parameter_gradients(self, start: int, stop: int, layers: Whole) -> tuple[Whole, Whole]:
        """At the peaks of `layers`: gradients made by layers behind, in the first backward and in a later one."""
        made = self.trainable[stop] - self.trainable[layers + 1]
        waiting = np.zeros_like(made)
        for group in self.chain.tied:
            users = [layer for layer in group.layers if start <= layer < stop]
            if users and group.trainable:
                made[layers < users[-1]] += group.parameter_bytes
                waiting[(layers >= users[0]) & (layers < users[-1])] += group.parameter_bytes
                for summed in (made, waiting):
                    summed[np.isin(layers, users[:-1])] += group.parameter_bytes
        return made, waiting

    def _trained_bytes(self, start: int, stop: int) -> int:
        tied = (group.parameter_bytes for group in self._tied(start, stop) if group.trainable)
        return int(self.trainable[stop] - self.trainable[start]) + sum(tied)

    def _tied(self, start: int, stop: int) -> list[ChainTied]:
        return [group for group in self.chain.tied if holds(group, start, stop)]

    def _after_backward(self, start: int, stop: int) -> int:
        """Gradients that go to the stage before, of what is relayed too, when all layers are done."""
        if start == 0:
            return 0
        end, relayed = self.first_peak[start] - 1, self.boundaries[stop].relayed(start)
        returned = self.alive_gradients[stop, end] - self.alive_gradients[start, end]
        return int(returned) + sum(tensor.gradient_bytes for tensor in relayed)

    def _copied_gradients(self, start: int, stop: int, layers: Whole) -> Whole:
        """What gradients that go to the stage before are at the peaks of `layers`, besides being alive as profiled.

        Autograd hands over a gradient that nothing else holds. One that its layers read for other gradients too, or
        that lies in a receive buffer, it copies, once for every value before the stage, while the readers hold it. What
        it returns as a view is no copy, and what is viewed stays.
        """
        copies = np.zeros_like(layers)
        for returned in self.boundaries[start].returned:
            life, given = returned.gradient, returned.given_bytes
            received, readers = life.made >= stop, _readers(life, start, stop)
            if not readers and received:
                continue  # only relayed
            counted = 0 if received or returned.viewed_bytes else life.num_bytes
            copies[layers <= max(readers, default=life.made)] += max(0, given - counted)
            if readers:
                copies[(layers >= min(readers)) & (layers <= max(readers))] += min(given, counted)
        return copies

    def _returned_views(self, start: int, stop: int) -> int:
        """Of the gradients that go to the stage before, those that lie in the receive buffers of this one."""
        returned = self.boundaries[start].returned
        return sum(
            each.viewed_bytes
            for each in returned
            if each.viewed_bytes and each.gradient.made >= stop and _readers(each.gradient, start, stop)
        )

    def peak(self, start: int, stop: int, index: int, num_stages: int) -> MemoryPoint:
        """The task of stage `index`, of layers `start` to `stop`, that needs most memory."""
        return peak_memory(self.stage(start, stop), index, num_stages, self.num_microbatches, self.schedule)

    def peaks(self, cuts: Sequence[int]) -> list[MemoryPoint]:
        """The peak of every stage of `cuts`."""
        bounds = list(pairwise((0, *cuts, self.num_layers)))
        return [self.peak(start, stop, index, len(bounds)) for index, (start, stop) in enumerate(bounds)]


def _readers(gradient: GradientLifetime, start: int, stop: int) -> list[int]:
    """The layers of a stage that read a gradient, or hand on one that they were given from behind the stage."""
    known = gradient.reads + gradient.gradient_of * (gradient.made >= stop)
    return [layer for layer, _ in known if start <= layer < stop]


def as_prefix(values: Sequence[int] | Whole) -> Whole:
    """Sums of the values before each, and of all."""
    return np.concatenate([[0], np.cumsum(np.asarray(values, np.int64))])


def _last_first(peaks: Sequence[Sequence[int]]) -> Whole:
    return np.array([peak for layer in peaks for peak in reversed(layer)], np.int64)


def _accumulate(rows: Whole) -> Whole:
    """Sums over the rows before each."""
    return np.concatenate([np.zeros((1, rows.shape[1]), np.int64), np.cumsum(rows, axis=0)])
