"""Lifetimes that were profiled in program order, as they may be at most in another order of the layers.

A profile says of a storage who makes it, the last layer that reads it and the one that frees it, not all of its
readers. Those are among the layers that depend on its maker; so where their sequence changes, the storage lives from
the first of them to the last, and through all of that one's peaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.files.profile_file import GradientLifetime, LayerMemory, Lifetime
from planner.partitioning.chain_costs import ChainMemory


def memory_in_order(memory: ChainMemory, position: Mapping[int, int], descendants: Sequence[int]) -> ChainMemory:
    """`memory` with layers at `position` (by index in program order). `descendants` are sets of bits, by layer."""
    order = sorted(range(len(memory.layers)), key=position.__getitem__)
    layers = tuple(memory.layers[v] for v in order)
    lifetimes = (_lifetime(life, position, _bits(descendants[life.made]), layers) for life in memory.size.lifetimes)
    gradients = (_gradient(life, position, _bits(descendants[life.freed]), layers) for life in memory.size.gradients)
    return ChainMemory(layers, replace(memory.size, lifetimes=tuple(lifetimes), gradients=tuple(gradients)))


def _lifetime(
    life: Lifetime, position: Mapping[int, int], dependent: Sequence[int], layers: Sequence[LayerMemory]
) -> Lifetime:
    """`dependent` are the maker and all layers that depend on it; `layers` are in the new order."""
    last_reader = life.last_reader
    if 0 <= last_reader < len(position):
        readers = {*(v for v in dependent if v <= last_reader), last_reader}
        last_reader = max(position[v] for v in readers)
    moved = replace(life, made=position[life.made], last_reader=last_reader)
    if life.freed_in == "forward":
        return replace(moved, freed=max(position[v] for v in {*(v for v in dependent if v <= life.freed), life.freed}))
    freed = min(position[v] for v in {*(v for v in dependent if v >= life.freed), life.freed})
    after = life.freed_after if freed == position[life.freed] else _last_peak(layers[freed])
    return replace(moved, freed=freed, freed_after=after)


def _gradient(
    life: GradientLifetime, position: Mapping[int, int], dependent: Sequence[int], layers: Sequence[LayerMemory]
) -> GradientLifetime:
    """`dependent` are the layer that frees the gradient (made it forward) and all that depend on it."""
    makers = {*(v for v in dependent if v <= life.made), life.made}
    made, freed = max(position[v] for v in makers), position[life.freed]
    first, last = sorted((made, freed))
    after = life.freed_after if first == freed else _last_peak(layers[first])
    given, reads = (tuple(sorted((position[v], n) for v, n in found)) for found in (life.gradient_of, life.reads))
    return GradientLifetime(last, first, life.num_bytes, after, given, reads)


def _last_peak(layer: LayerMemory) -> int:
    return len(layer.backward_peaks_bytes) - 1


def _bits(members: int) -> list[int]:
    return [v for v in range(members.bit_length()) if members >> v & 1]
