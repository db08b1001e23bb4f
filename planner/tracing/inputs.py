"""How a batch reaches the traced model: by the names of the traced inputs, never by the order of a dict.

A trace holds every input that is not a tensor as a constant. Each batch is therefore held against the traced one: the
same keys, the same constants, tensors of the same type and of the same shape behind the batch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from planner.errors import ModelFileError
from planner.tracing.loading import as_call


@dataclass(frozen=True, slots=True)
class TracedInputs:
    """The leaves of the inputs that a model was traced with, by name, in the order of the trace.

    >>> traced = TracedInputs.of({"x": torch.ones(2, 3), "scale": 2})
    >>> traced.tensors({"scale": 2, "x": torch.zeros(4, 3)}, "step 1")[0].shape
    torch.Size([4, 3])
    """

    leaves: dict[str, Any]

    @staticmethod
    def of(inputs: Any) -> TracedInputs:
        """The inputs of a batch: a tensor, a tuple or a dict, nested at will; of tensors, shape and type."""
        return TracedInputs({name: _template(leaf) for name, leaf in _named_leaves(inputs).items()})

    def tensors(self, inputs: Any, where: str) -> list[torch.Tensor]:
        """The tensors of `inputs` in the order of the trace. Raises ModelFileError where they are not as traced.

        `where` says which batch it is.
        """
        given = _named_leaves(inputs)
        missing, unknown = [n for n in self.leaves if n not in given], [n for n in given if n not in self.leaves]
        if missing or unknown:
            what = [f"lacks {', '.join(missing)}"] if missing else []
            what += [f"has {', '.join(unknown)}, which the traced one had not"] if unknown else []
            raise ModelFileError(
                f"the batch of {where} {' and '.join(what)}",
                "every batch has the inputs that the model was traced with",
                "give the same inputs in every batch, or make the plan again with those of this batch",
            )
        for name, traced in self.leaves.items():
            if difference := _difference(traced, given[name]):
                raise ModelFileError(
                    f"input {name} of {where} is {difference[0]}, and was {difference[1]} when the model was traced",
                    difference[2],
                    difference[3],
                )
        return [given[name] for name, traced in self.leaves.items() if isinstance(traced, torch.Tensor)]


def _named_leaves(inputs: Any) -> dict[str, Any]:
    args, kwargs = as_call(inputs)
    tree: Any = kwargs if kwargs else args[0] if len(args) == 1 else args
    return {keystr(path) or "(the only one)": leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def _template(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf


def _difference(traced: Any, given: Any) -> tuple[str, str, str, str] | None:
    """(got, expected, rule, remedy) where `given` would not do what `traced` does in the trace."""
    if isinstance(traced, torch.Tensor) and isinstance(given, torch.Tensor):
        if traced.dtype == given.dtype and traced.shape[1:] == given.shape[1:]:
            return None
        rule = "a trace holds for one shape behind the batch dimension and one type of each input"
        return _shown(given), _shown(traced), rule, "pad or convert the batch to what make_batch returns"
    if type(traced) is type(given) and (traced is given or traced == given):
        return None
    rule = "an input that is not a tensor is a constant of the trace"
    return _shown(given), _shown(traced), rule, "pass it as a tensor with the batch in its first dimension"


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} and shape (batch{''.join(f', {size}' for size in value.shape[1:])})"
    return repr(value)
