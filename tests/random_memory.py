"""Random memory for a chain, consistent as a profile's is: every lifetime ends where backward or forward may end it."""

from __future__ import annotations

import random

from planner.files.profile_file import GradientLifetime, LayerMemory, Lifetime, SizeMemory
from planner.partitioning.chain_costs import ChainMemory


def random_memory(source: random.Random, num_layers: int) -> ChainMemory:
    """Layers with whole bytes up to a few hundred; activations that pass one layer or many, outputs at the end."""
    lives, gradients = [], []
    for made in range(num_layers):
        for _ in range(source.randint(0, 3)):
            reader = source.choice([-1, min(made + 1, num_layers), source.randint(made, num_layers)])
            backward = source.random() < 0.7
            last = max(made, min(reader, num_layers - 1))
            freed = source.randint(made, last)
            lives.append(Lifetime(made, reader, "backward" if backward else "forward", freed, source.randint(1, 60)))
        if made and source.random() < 0.7:
            gradients.append(GradientLifetime(made, source.randint(0, made - 1), source.randint(1, 40)))
    layers = tuple(
        LayerMemory(
            *(source.randint(0, 90) for _ in range(2)), *(source.randint(0, 120) for _ in range(2)), *_rest(source)
        )
        for _ in range(num_layers)
    )
    return ChainMemory(
        layers,
        SizeMemory(tuple(lives), tuple(gradients), source.randint(0, 9), source.randint(0, 9), source.random() < 0.5),
    )


def _rest(source: random.Random) -> tuple[int, int, int, int]:
    trainable = source.choice([0, source.randint(1, 200)])
    return trainable, source.randint(0, 10), 2 * trainable, source.randint(0, trainable)
