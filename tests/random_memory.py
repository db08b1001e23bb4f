"""Random memory for a chain, consistent as a profile's is: every lifetime ends where backward or forward may end it."""

from __future__ import annotations

import random

from planner.files.profile_file import GradientLifetime, LayerMemory, Lifetime, SizeMemory
from planner.partitioning.chain_costs import ChainMemory


def random_memory(source: random.Random, num_layers: int) -> ChainMemory:
    """Layers with whole bytes up to a few hundred; activations that pass one layer or many, outputs at the end."""
    layers = tuple(_layer(source) for _ in range(num_layers))
    peaks = [len(layer.backward_peaks_bytes) for layer in layers]
    lives, gradients = [], []
    for made in range(num_layers):
        for _ in range(source.randint(0, 3)):
            reader = source.choice([-1, min(made + 1, num_layers), source.randint(made, num_layers)])
            last = max(made, min(reader, num_layers - 1))
            freed, num_bytes = source.randint(made, last), source.randint(1, 60)
            if source.random() < 0.7:
                lives.append(Lifetime(made, reader, "backward", freed, num_bytes, source.randrange(peaks[freed])))
            else:
                lives.append(Lifetime(made, reader, "forward", freed, num_bytes))
        if made and source.random() < 0.7:
            freed = source.randint(0, made - 1)
            given = tuple((v, source.randint(1, 40)) for v in range(freed, made) if source.random() < 0.3)
            reads = tuple((v, source.randint(1, 40)) for v in range(freed, made + 1) if source.random() < 0.3)
            after = source.randrange(peaks[freed])
            gradients.append(GradientLifetime(made, freed, source.randint(1, 40), after, given, reads))
    return ChainMemory(
        layers,
        SizeMemory(tuple(lives), tuple(gradients), source.randint(0, 9), source.randint(0, 9), source.random() < 0.5),
    )


def _layer(source: random.Random) -> LayerMemory:
    count = source.randint(1, 3)
    later, first = (tuple(source.randint(0, 120) for _ in range(count)) for _ in range(2))
    return LayerMemory(source.randint(0, 90), source.randint(0, 90), later, first, *_rest(source))


def _rest(source: random.Random) -> tuple[int, int, int, int, int, str]:
    trainable = source.choice([0, source.randint(1, 200)])
    left = source.randint(0, 90), f"layers.{source.randint(0, 8)}"
    return trainable, source.randint(0, 10), 2 * trainable, source.randint(0, trainable), *left
