"""A profile without measuring: what a layer costs is made up from its operations and their results."""

from __future__ import annotations

import math

import torch
from torch.utils._pytree import tree_leaves

from planner.files.profile_file import (
    LayerProfile,
    Machine,
    ModelReference,
    Profile,
    SizeProfile,
    TensorProfile,
    TiedProfile,
)
from planner.tracing.exporting import Trace, TracedLayer
from planner.tracing.gradients import attribute
from planner.tracing.loading import ModelSource
from planner.tracing.ordering import layer_dependencies
from planner.tracing.rewriting import compute_nodes


def made_up_profile(source: ModelSource, trace: Trace, batch_size: int, microbatch_size: int) -> Profile:
    """A profile of `trace`: a layer costs 0.05 ms an operation and 1 ms for 10 000 elements that it computes."""
    dependencies = layer_dependencies(trace)
    layers = tuple(_layer(trace, layer) for layer in trace.layers)
    tensors = tuple(
        TensorProfile(t.name, t.producer, t.consumers, t.num_bytes, t.gradient_bytes) for t in trace.tensors
    )
    tied = tuple(
        TiedProfile(name, indices, _num_bytes(trace, (name,)), 0.0, attribute(trace.graph_module, name).requires_grad)
        for name, indices in trace.tied.items()
    )
    return Profile(
        model=ModelReference(str(source.file), source.name, source.entry),
        machine=Machine("cpu", "made up", 1, {}),
        precision="fp32",
        batch_size=batch_size,
        num_rounds=0,
        seconds=0.0,
        concurrent_copies=1,
        sizes=(SizeProfile(microbatch_size, trace.fingerprint, layers, tensors, tied, 0.0, None, dependencies),),
        why_not_plain=trace.why_not_plain,
    )


def _layer(trace: Trace, layer: TracedLayer) -> LayerProfile:
    nodes = compute_nodes(trace.graph_module.graph)[layer.start : layer.stop]
    computed = sum(
        math.prod(leaf.shape)
        for node in nodes
        for leaf in tree_leaves(node.meta.get("val"))
        if isinstance(leaf, torch.Tensor)
    )
    cost = 0.05 * len(nodes) + computed / 1e4
    own = tuple(name for name in layer.parameters if name not in trace.tied)
    return LayerProfile(
        id=layer.id,
        name=layer.name,
        type=layer.type,
        position=layer.start,
        forward_ms=cost,
        forward_spread_ms=0.0,
        backward_ms=2 * cost,
        backward_spread_ms=0.0,
        backward_first_ms=2 * cost,
        optimizer_ms=0.0,
        parameter_bytes=_num_bytes(trace, own),
        parameters=layer.parameters,
        plain_cut=layer.plain_cut,
    )


def _num_bytes(trace: Trace, names: tuple[str, ...]) -> int:
    tensors = [attribute(trace.graph_module, name) for name in names]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
