"""Stamps of one microbatch in one part of the graph: around every layer's forward, and where its backward begins.

Autograd runs operations in the reverse order of their creation, so the first hook of a layer to fire marks the moment
when the layers after it are done. What a stage has received is different: its gradients are handed over as soon as they
are there, a skip's long before the stage is done. There the last hook counts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from planner.machine.device import Device
from planner.profiling.first_seen import first_seen


class LayerClock:
    """What a marked part (see `marked_graph`) calls while it runs: one microbatch, forward and backward."""

    def __init__(self, device: Device) -> None:
        self.device, self.stamp = device, device.stamp
        self.spans: list[Any] = []
        self.entries: dict[int, int] = {}
        self.marks: list[Any] = []
        self.handles: list[Any] = []
        self.handed_over: tuple[int, Any] | None = None

    @property
    def num_layers(self) -> int:
        """How many layers there were in forward."""
        return len(self.spans) // 2

    def begin(self, given: Iterable[Any] = ()) -> None:
        """The first layer begins; nobody makes what is `given`."""
        for value in given:
            first_seen(value, self)
        self.spans.append(self.stamp())

    def mark(self, made: tuple[Any, ...]) -> None:
        """A layer ends, having `made` what others read, and the next begins; what is done here counts for neither."""
        self.spans.append(self.stamp())
        layer = self.num_layers - 1
        for value in made:
            if not first_seen(value, self) or not value.requires_grad:
                continue
            if value.is_leaf:
                self.handles.append(value.register_hook(self._hand_over))
            else:
                value.register_hook(functools.partial(self.enter, layer))
        self.spans.append(self.stamp())

    def end(self) -> None:
        """The last layer ends."""
        self.spans.append(self.stamp())

    def enter(self, layer: int, _: Any = None) -> None:
        """Backward reaches what `layer` made."""
        if layer not in self.entries:
            self.entries[layer] = len(self.marks)
            self.marks.append(self.stamp())

    def _hand_over(self, _: Any) -> None:
        """The gradient of something received is there: the first layer, in which it was, may be all that is left."""
        self.handed_over = len(self.marks), self.stamp()

    def end_backward(self) -> None:
        """The backward of the first layer ends; a receive buffer is asked no more."""
        if 0 not in self.entries and self.handed_over is not None and self.handed_over[0] == len(self.marks):
            self.entries[0] = len(self.marks)
            self.marks.append(self.handed_over[1])
        self.marks.append(self.stamp())
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def forward_ms(self) -> list[float]:
        """Milliseconds of every layer."""
        return self.device.elapsed_ms(self.spans)[::2]

    def backward_ms(self) -> list[float]:
        """Milliseconds of every layer, from its entry to the next; 0 for layers that backward did not enter."""
        times = [0.0] * self.num_layers
        order = sorted(self.entries, key=lambda layer: self.entries[layer])
        for layer, value in zip(order, self.device.elapsed_ms(self.marks), strict=True):
            times[layer] += value
        return times
