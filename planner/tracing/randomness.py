"""Operations that draw random numbers; dropout made the identity, in a traced graph and in the eager model alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from planner.tracing.functions import FunctionCall
from planner.tracing.rewriting import USER_STACK, compute_nodes

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DROPOUTS = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout")
# Operator → the argument that is its dropout probability, in the graph; an ending underscore works in place.
PROBABILITY = {
    **{name: "p" for dropout in DROPOUTS for name in (dropout, f"{dropout}_")},
    **dict.fromkeys(RECURRENT, "dropout"),
    "scaled_dot_product_attention": "dropout_p",
}
# The functions of Python that end in them → position and keyword of the same argument.
PROBABILITY_IN_PYTHON = {
    **{name: (1, "p") for dropout in DROPOUTS for name in (dropout, f"{dropout}_")},
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d"), (1, "p")),
    "scaled_dot_product_attention": (4, "dropout_p"),
    "multi_head_attention_forward": (10, "dropout_p"),
}


def remove_dropout(gm: fx.GraphModule) -> int:
    """Set every dropout probability in the exported graph to 0; returns how many were above and active."""
    changed = 0
    for node in compute_nodes(gm.graph):
        argument = PROBABILITY.get(_operator(node))
        if argument is None:
            continue
        if _given(node, argument) and _given(node, "train") is not False:
            changed += 1
        _set(node, argument, 0.0)
    return changed


def _operator(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _position(node: fx.Node, argument: str) -> int | None:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    return names.index(argument) if argument in names else None


def _given(node: fx.Node, argument: str) -> Any:
    """The value of an argument of `node`; None where it is left at its default."""
    position = _position(node, argument)
    if position is not None and position < len(node.args):
        return node.args[position]
    return node.kwargs.get(argument)


def _set(node: fx.Node, argument: str, value: float) -> None:
    position = _position(node, argument)
    if position is not None and position < len(node.args):
        node.update_arg(position, value)
    elif argument in node.kwargs:
        node.update_kwarg(argument, value)


class DropoutAsIdentity(TorchFunctionMode):
    """While this is entered, every dropout of an eager model has probability 0, module or function alike.

    >>> with DropoutAsIdentity():
    ...     torch.nn.functional.dropout(torch.ones(3), 0.9, training=True)
    tensor([1., 1., 1.])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = list(args), dict(kwargs or {})
        name = getattr(func, "__name__", "").partition(".")[0]
        position, keyword = PROBABILITY_IN_PYTHON.get(name, (None, ""))
        if name in RECURRENT:  # two overloads: the probability follows the only whole number, the count of layers
            position = next(i for i, argument in enumerate(args) if type(argument) is int) + 1
        if position is not None and position < len(args):
            args[position] = 0.0
        elif position is not None:
            kwargs[keyword] = 0.0
        return func(*args, **kwargs)


def random_operations(gm: fx.GraphModule) -> tuple[str, ...]:
    """Operations other than dropout that draw random numbers, as `module: operator (file:line)`."""
    found = []
    for node in compute_nodes(gm.graph):
        seeded = (
            isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        )
        if isinstance(node.target, FunctionCall) and node.target.random:
            found.append(f"{_place(node)}{', '.join(node.target.random)} in {node.target.where}")
        elif seeded and _operator(node) not in PROBABILITY:
            found.append(f"{_place(node)}{node.target}{_line(node)}")
    return tuple(found)


def _place(node: fx.Node) -> str:
    stack = node.meta.get(USER_STACK) or node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values() if name]
    return f"{names[-1] if names else 'the model'}: "


def _line(node: fx.Node) -> str:
    """The last line of the user's that led to `node`, from the stack that the export recorded."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in frames if "site-packages" not in file]
    return f" ({Path(own[-1][0]).name}:{own[-1][1]})" if own else ""
