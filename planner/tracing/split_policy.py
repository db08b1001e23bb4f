"""Plan + model → the policy that `pipeline(model, …, split_policy=…)` calls with the exported graph."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from planner.errors import TraceError
from planner.tracing.exporting import Trace, open_layers, read_trace
from planner.tracing.functions import refuse_module_hooks, start_keeping, stop_keeping
from planner.tracing.gradients import attribute
from planner.tracing.ordering import positions_of, reorder
from planner.tracing.rewriting import apply_cuts, canonical_names, views_of_any_layout

if TYPE_CHECKING:
    from planner.files.plan_file import Plan, TiedParameter


class SplitPolicy:
    """Cuts the exported graph of `model` as `plan` says. After the call, `trace` holds what was seen.

    `device` is where the stages will compute, which a bf16 plan depends on; None means where the model is.

    While `pipeline()` runs, the model's `state_dict()` shows each tied tensor under its first name only: torch looks
    names up there and takes any of several.
    """

    def __init__(self, model: nn.Module, plan: Plan, device: torch.device | None = None) -> None:
        self.model, self.plan, self.device = model, plan, device
        self.trace: Trace | None = None
        refuse_module_hooks(model)
        self.keeping = True  # pipeline() exports the model before it calls the policy
        start_keeping()

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Check the trace's fingerprint, rewrite it and cut it; `gm` is changed in place and returned."""
        if self.keeping:
            self.keeping = False
            stop_keeping()
        show_first_names_to_pipeline(self.model)
        self.trace = read_trace(gm, self.model, autocast_on=self._autocast_on())
        if self.plan.model.granularity == "operation":
            self.trace = open_layers(self.trace)
        expected, got = self.plan.model.fingerprint, self.trace.fingerprint
        if got != expected:
            raise TraceError(
                f"the model's trace has fingerprint {got}, the plan was made for {expected}",
                f"a plan holds for one model at microbatches of {self.plan.microbatch_size} samples",
                "make the plan again, or give pipeline() one microbatch of that size, model and tensors on the CPU",
            )
        positions = cut_positions(self.trace, [cut.before for cut in self.plan.cuts], self.plan.order)
        if self.plan.order is not None:
            reorder(self.trace, self.plan.order)
        views_of_any_layout(gm)
        apply_cuts(gm, positions)
        return gm

    def _autocast_on(self) -> torch.device | None:
        """Where stages compute inside autocast: `device`, else where the model is; None where they do not."""
        if self.plan.precision == "fp32":
            return None
        return self.device or next((p.device for p in self.model.parameters()), torch.device("cpu"))


def cut_positions(trace: Trace, layer_ids: Sequence[str], order: Sequence[str | int] | None = None) -> list[int]:
    """The operations before which the cuts at `layer_ids` lie, in the program's order or that of the layers `order`.

    Raises TraceError for an unknown or first layer, and for an order of other layers than the trace's.
    """
    position = positions_of(trace, order)
    starts, count = {}, 0
    for layer in sorted(trace.layers, key=lambda layer: position[layer.id]):
        starts[layer.id] = count
        count += layer.stop - layer.start
    for name in layer_ids:
        if not starts.get(name):
            raise TraceError(f"no legal cut before {name!r}", "a cut lies before a layer of the trace, not the first")
    positions = [starts[name] for name in layer_ids]
    if positions != sorted(set(positions)):
        raise TraceError("the plan's cuts are not in its order", "stages follow the order of the layers")
    return positions


def show_first_names_to_pipeline(model: nn.Module) -> None:
    """Hide second names of tied tensors from `state_dict()` while torch's `_from_traced` is what asks."""
    names = canonical_names(model)
    aliases = {name for name, first in names.items() if name != first}
    if aliases:
        handle = model.register_state_dict_post_hook(_HideAliases(aliases))
        hook = model._state_dict_hooks[handle.id]
        hook.remove = handle.remove  # type: ignore[attr-defined]


class _HideAliases:
    """A state_dict hook that removes aliases for `pipeline()`, and itself at the first call by anybody else."""

    def __init__(self, aliases: set[str]) -> None:
        self.aliases = aliases
        self.remove: Any = None

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        if not _called_by_pipeline():
            if self.remove is not None:
                self.remove()
            return
        for name in self.aliases:
            state_dict.pop(prefix + name, None)


def _called_by_pipeline(depth: int = 8) -> bool:
    frame = sys._getframe(1)
    for _ in range(depth):
        if frame.f_code.co_name == "_from_traced":
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def tied_over_cuts(
    trace: Trace, cuts: Sequence[str], order: Sequence[str | int] | None = None
) -> tuple[TiedParameter, ...]:
    """The trainable parameters that more than one stage holds, where cuts lie before the layers named `cuts`.

    `order` are the ids of all layers as they are cut, None in program order.
    """
    from planner.files.plan_file import tied_over

    position = positions_of(trace, order)
    firsts = [position[name] for name in cuts]
    users = {
        name: tuple(sorted(position[trace.layers[index].id] for index in layers))
        for name, layers in trace.tied.items()
        if attribute(trace.graph_module, name).requires_grad
    }
    return tied_over(firsts, users)
