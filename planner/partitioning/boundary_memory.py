"""What crosses a cut, and what stays alive because of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.files.profile_file import GradientLifetime, Lifetime, SizeMemory
from planner.partitioning.chain_costs import Chain, ChainTensor, crossing


@dataclass(frozen=True, slots=True)
class Returned:
    """A gradient that is made behind a cut and freed before it: what it gives to values that cross, each its bytes.

    `viewed_bytes` it gives to values whose gradient is a view of it, `given_bytes` to all others.
    """

    gradient: GradientLifetime
    given_bytes: int
    viewed_bytes: int


@dataclass(frozen=True, slots=True)
class Boundary:
    """A cut: the tensors that cross it, their bytes and their gradients' bytes.

    `sent` are the storages that hold them and the model's outputs, `returned` the gradients that are made behind the
    cut and freed before it.
    """

    crossing: tuple[ChainTensor, ...]
    num_bytes: int
    gradient_bytes: int
    sent: tuple[Lifetime, ...]
    returned: tuple[Returned, ...]

    def relayed(self, start: int) -> tuple[ChainTensor, ...]:
        """What a stage that begins at `start` and ends here hands on."""
        return tuple(tensor for tensor in self.crossing if tensor.producer < start)


def boundary_at(chain: Chain, size: SizeMemory, cut: int) -> Boundary:
    """The cut before layer `cut` of the chain."""
    tensors = crossing(chain, cut)
    return Boundary(
        crossing=tensors,
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        gradient_bytes=sum(tensor.gradient_bytes for tensor in tensors),
        sent=tuple(life for life in size.lifetimes if life.made < cut <= life.last_reader),
        returned=tuple(_returned(life, tensors, cut) for life in size.gradients if life.freed < cut <= life.made),
    )


def _returned(gradient: GradientLifetime, crossing: Sequence[ChainTensor], cut: int) -> Returned:
    """A value's gradient is noted where it is complete; what is added to it before the cut is only known to be read."""
    noted = dict(gradient.gradient_of)
    producers = {tensor.producer for tensor in crossing}
    given = sum(noted.get(layer, 0) for layer in producers)
    copied = {tensor.producer for tensor in crossing if not tensor.returns_view}
    viewed = sum(noted.get(layer, 0) for layer in producers - copied)
    others = [tensor for tensor in crossing if tensor.producer not in noted]
    added = 0
    for layer, num_bytes in gradient.reads:
        if layer < cut and layer not in noted:
            added += min(num_bytes, sum(tensor.gradient_bytes for tensor in others if tensor.producer < layer))
    given += min(added, sum(tensor.gradient_bytes for tensor in others))
    return Returned(gradient, given - viewed, viewed)
