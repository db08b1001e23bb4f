"""The layers of a model as a partial order: which may change places, and the chain that an order makes of them.

K stages that are closed under predecessors are a chain of K stages in some topological order of the layers, and cost
what that chain costs. Times are those of the program's order; lifetimes of memory are re-indexed so that they are
never shorter than they may become.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from planner.partitioning.chain_costs import Chain, ChainMemory, ChainTensor
from planner.partitioning.layer_graph import chain_of
from planner.partitioning.order_memory import memory_in_order

if TYPE_CHECKING:
    import networkx as nx

Order = tuple[int, ...]
PER_LAYER = (
    "ids",
    "names",
    "forward_ms",
    "forward_spread_ms",
    "backward_ms",
    "backward_spread_ms",
    "backward_first_ms",
    "optimizer_ms",
    "parameter_bytes",
)


@dataclass(frozen=True)
class LayerDag:
    """`chain` in program order, `readers` by tensor of the chain, and by layer its direct predecessors; indices.

    `linked`: a value must cross every cut, because a stage has to receive something.
    """

    chain: Chain
    readers: tuple[tuple[int, ...], ...]
    predecessors: tuple[tuple[int, ...], ...]
    linked: bool

    def __len__(self) -> int:
        return len(self.chain.ids)

    @property
    def has_one_order(self) -> bool:
        """Whether every layer depends on the one before it, so that nothing can change places."""
        return all(u in self.predecessors[v] for u, v in pairwise(range(len(self))))

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """By layer those that depend on it directly."""
        found: list[list[int]] = [[] for _ in range(len(self))]
        for v, before in enumerate(self.predecessors):
            for u in before:
                found[u].append(v)
        return tuple(tuple(after) for after in found)

    @cached_property
    def descendants(self) -> tuple[int, ...]:
        """By layer a set of bits: itself and what depends on it, at whatever distance."""
        reach = [1 << v for v in range(len(self))]
        for v in reversed(range(len(self))):
            for u in self.successors[v]:
                reach[v] |= reach[u]
        return tuple(reach)

    def is_order(self, order: Sequence[int]) -> bool:
        """Whether `order` names every layer once, each behind its predecessors."""
        position = {v: index for index, v in enumerate(order)}
        complete = sorted(order) == list(range(len(self)))
        return complete and all(position[u] < position[v] for v in order for u in self.predecessors[v])

    def in_order(self, order: Sequence[int]) -> Chain:
        """The chain of the layers in `order`, a topological one."""
        if list(order) == list(range(len(self))):
            return self.chain
        chain, position = self.chain, {v: index for index, v in enumerate(order)}
        permuted: dict[str, Any] = {name: tuple(getattr(chain, name)[v] for v in order) for name in PER_LAYER}
        return replace(
            chain,
            **permuted,
            plain_cut=(False,) * len(self),  # split_spec cuts in program order
            tensors=tuple(self._moved(t, r, position) for t, r in zip(chain.tensors, self.readers, strict=True)),
            tied=tuple(replace(t, layers=tuple(sorted(position[v] for v in t.layers))) for t in chain.tied),
            memory=None if chain.memory is None else self._memory(chain.memory, position),
        )

    def _moved(self, tensor: ChainTensor, readers: Sequence[int], position: dict[int, int]) -> ChainTensor:
        producer = position[tensor.producer]
        return replace(tensor, producer=producer, last_consumer=max((position[v] for v in readers), default=producer))

    def _memory(self, memory: ChainMemory, position: dict[int, int]) -> ChainMemory:
        return memory_in_order(memory, position, self.descendants)


def layer_dag(graph: nx.DiGraph, dependencies: Sequence[tuple[int, int]] | None = None) -> LayerDag:
    """The partial order of `graph`, whose nodes stand in a topological order.

    A tensor's readers come behind its producer, and so does each node that an edge says. `dependencies` are more pairs
    of nodes, by index, that keep their sequence: those of a traced model, where something must cross every cut.
    """
    chain = chain_of(graph)
    index = {node: i for i, node in enumerate(graph.nodes)}
    tensors = [[index[node] for node in tensor["nodes"]] for tensor in graph.graph.get("tensors", ())]
    before: list[set[int]] = [{index[u] for u in graph.pred[node]} for node in graph.nodes]
    for producer, *readers in tensors:
        for reader in readers:
            before[reader].add(producer)
    for earlier, later in dependencies or ():
        before[later].add(earlier)
    return LayerDag(
        chain=chain,
        readers=tuple(tuple(readers) for _, *readers in tensors),
        predecessors=tuple(tuple(sorted(each - {v})) for v, each in enumerate(before)),
        linked=dependencies is not None,
    )


def order_of(dag: LayerDag, stages: Sequence[int]) -> Iterator[int]:
    """The layers of `stages` (sets of bits, in order), inside a stage in program order."""
    for stage in stages:
        yield from (v for v in range(len(dag)) if stage >> v & 1)
