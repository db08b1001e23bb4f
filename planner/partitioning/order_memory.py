"""Lifetimes that were profiled in program order, as they may be at most in another order of the layers.

A profile says of a storage who makes it, the last layer that reads it and the one that frees it, not all of its
readers. Those are among the layers that depend on its maker; so where their sequence changes, the storage lives from
the first of them to the last. A layer that freed it in the profile, and no longer does, has it on top of its own peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.files.profile_file import GradientLifetime, LayerMemory, Lifetime
from planner.partitioning.chain_costs import ChainMemory


def memory_in_order(memory: ChainMemory, position: Mapping[int, int], descendants: Sequence[int]) -> ChainMemory:
    """`memory` with layers at `position` (by index in program order). `descendants` are sets of bits, by layer."""
    kept: dict[int, LayerMemory] = dict(enumerate(memory.layers))
    lifetimes = []
    for life in memory.size.lifetimes:
        moved = _lifetime(life, position, _bits(descendants[life.made]))
        lifetimes.append(moved)
        if moved.freed != position[life.freed]:
            kept[life.freed] = _with_more(kept[life.freed], life)
    gradients = tuple(_gradient(life, position, _bits(descendants[life.freed])) for life in memory.size.gradients)
    by_position = sorted(kept, key=position.__getitem__)
    return ChainMemory(
        layers=tuple(kept[v] for v in by_position),
        size=replace(memory.size, lifetimes=tuple(lifetimes), gradients=gradients),
    )


def _lifetime(life: Lifetime, position: Mapping[int, int], dependent: Sequence[int]) -> Lifetime:
    """`dependent` are the maker and all layers that depend on it."""
    last_reader = life.last_reader
    if 0 <= last_reader < len(position):
        readers = {*(v for v in dependent if v <= last_reader), last_reader}
        last_reader = max(position[v] for v in readers)
    if life.freed_in == "forward":
        freed = max(position[v] for v in {*(v for v in dependent if v <= life.freed), life.freed})
    else:
        freed = min(position[v] for v in {*(v for v in dependent if v >= life.freed), life.freed})
    return replace(life, made=position[life.made], last_reader=last_reader, freed=freed)


def _with_more(layer: LayerMemory, life: Lifetime) -> LayerMemory:
    if life.freed_in == "forward":
        return replace(layer, forward_peak_bytes=layer.forward_peak_bytes + life.num_bytes)
    return replace(
        layer,
        backward_peak_bytes=layer.backward_peak_bytes + life.num_bytes,
        backward_first_peak_bytes=layer.backward_first_peak_bytes + life.num_bytes,
    )


def _gradient(life: GradientLifetime, position: Mapping[int, int], dependent: Sequence[int]) -> GradientLifetime:
    """`dependent` are the layer that frees the gradient (made it forward) and all that depend on it."""
    makers = {*(v for v in dependent if v <= life.made), life.made}
    made = max(position[v] for v in makers)
    return replace(life, made=max(made, position[life.freed]), freed=min(made, position[life.freed]))


def _bits(members: int) -> list[int]:
    return [v for v in range(members.bit_length()) if members >> v & 1]
