"""Operations of a trace that draw random numbers; dropout made the identity, for comparisons."""

from __future__ import annotations

import torch
from torch import fx, nn

from planner.tracing.rewriting import compute_nodes

ATEN = torch.ops.aten
DROPOUTS = (ATEN.dropout.default, ATEN.alpha_dropout.default, ATEN.feature_dropout.default)
ATTENTION = ATEN.scaled_dot_product_attention.default
ATTENTION_DROPOUT = 4


def remove_dropout(gm: fx.GraphModule) -> int:
    """Set every dropout probability in the exported graph to 0; returns how many were above."""
    changed = 0
    for node in compute_nodes(gm.graph):
        if node.target in DROPOUTS and node.args[1] != 0.0:
            node.update_arg(1, 0.0)
            changed += 1
        elif node.target is ATTENTION and _attention_dropout(node) != 0.0:
            if len(node.args) > ATTENTION_DROPOUT:
                node.update_arg(ATTENTION_DROPOUT, 0.0)
            else:
                node.update_kwarg("dropout_p", 0.0)
            changed += 1
    return changed


def _attention_dropout(node: fx.Node) -> object:
    return node.args[ATTENTION_DROPOUT] if len(node.args) > ATTENTION_DROPOUT else node.kwargs.get("dropout_p", 0.0)


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the eager `model` to 0, under whatever name its modules keep it."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def random_operations(gm: fx.GraphModule) -> tuple[str, ...]:
    """Operations other than dropout that draw random numbers, as `module: operator`."""
    found = []
    for node in compute_nodes(gm.graph):
        seeded = (
            isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        )
        if seeded and node.target not in DROPOUTS and node.target is not ATTENTION:
            stack = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values() if name]
            found.append(f"{stack[-1] if stack else 'the model'}: {node.target}")
    return tuple(found)
