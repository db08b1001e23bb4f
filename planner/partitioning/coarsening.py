"""A chain of very many layers as one of fewer: neighbours merged so that every merged layer has about the same load.

Every cut of the merged chain is a cut of the full one with the same step, so what is found is a plan; that it is the
best one is not proven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.partitioning.chain_costs import Chain, Cuts

MOST_LAYERS = 2000


@dataclass(frozen=True, slots=True)
class Coarse:
    """A merged chain; its layer k begins with layer `starts[k]` of the full one."""

    chain: Chain
    starts: tuple[int, ...]

    def full(self, cuts: Cuts) -> Cuts:
        """Cuts of the merged chain as cuts of the full one."""
        return tuple(self.starts[cut] for cut in cuts)


def coarsen(chain: Chain, most: int = MOST_LAYERS) -> Coarse:
    """`chain` with at most `most` layers; unchanged where it has no more.

    Its memory, where it has any, is left out.
    """
    count = len(chain.ids)
    if count <= most:
        return Coarse(chain, tuple(range(count)))
    loads = np.array(chain.forward_ms) + np.array(chain.backward_ms)
    ends = np.cumsum(loads + loads.mean() * 1e-3 + 1e-12)
    group = np.minimum((ends / ends[-1] * most).astype(int), most - 1)
    starts = tuple(int(start) for start in np.flatnonzero(np.diff(group, prepend=-1)))
    owner = np.cumsum(np.diff(group, prepend=-1) > 0) - 1

    def summed(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(float(value) for value in np.add.reduceat(np.array(values, float), starts))

    def at_starts(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(values[start] for start in starts)

    return Coarse(
        Chain(
            ids=at_starts(chain.ids),
            names=at_starts(chain.names),
            forward_ms=summed(chain.forward_ms),
            forward_spread_ms=summed(chain.forward_spread_ms),
            backward_ms=summed(chain.backward_ms),
            backward_spread_ms=summed(chain.backward_spread_ms),
            backward_first_ms=summed(chain.backward_first_ms),
            optimizer_ms=summed(chain.optimizer_ms),
            parameter_bytes=tuple(int(size) for size in summed(chain.parameter_bytes)),
            plain_cut=tuple(chain.plain_cut[start] for start in starts),
            tensors=tuple(
                replace(t, producer=int(owner[t.producer]), last_consumer=int(owner[t.last_consumer]))
                for t in chain.tensors
                if owner[t.producer] < owner[t.last_consumer]
            ),
            tied=tuple(replace(t, layers=tuple(sorted({int(owner[layer]) for layer in t.layers}))) for t in chain.tied),
            message_ms=chain.message_ms,
            boundary_forward_ms=chain.boundary_forward_ms,
            boundary_backward_ms=chain.boundary_backward_ms,
        ),
        starts,
    )
