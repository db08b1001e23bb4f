"""Plan + model → the policy that `pipeline(model, …, split_policy=…)` calls with the exported graph."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from planner.errors import TraceError
from planner.tracing.exporting import Trace, read_trace
from planner.tracing.functions import refuse_module_hooks, start_keeping, stop_keeping
from planner.tracing.gradients import attribute
from planner.tracing.rewriting import apply_cuts, canonical_names

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
        expected, got = self.plan.model.fingerprint, self.trace.fingerprint
        if got != expected:
            raise TraceError(
                f"the model's trace has fingerprint {got}, the plan was made for {expected}",
                f"a plan holds for one model at microbatches of {self.plan.microbatch_size} samples",
                "make the plan again, or give pipeline() one microbatch of that size",
            )
        apply_cuts(gm, cut_positions(self.trace, [cut.before for cut in self.plan.cuts]))
        return gm

    def _autocast_on(self) -> torch.device | None:
        """Where stages compute inside autocast: `device`, else where the model is; None where they do not."""
        if self.plan.precision == "fp32":
            return None
        return self.device or next((p.device for p in self.model.parameters()), torch.device("cpu"))


def cut_positions(trace: Trace, layer_ids: Sequence[str]) -> list[int]:
    """The operations before which the cuts at `layer_ids` lie. Raises TraceError for an unknown or first layer."""
    starts = {layer.id: layer.start for layer in trace.layers}
    for name in layer_ids:
        if not starts.get(name):
            raise TraceError(f"no legal cut before {name!r}", "a cut lies before a layer of the trace, not the first")
    positions = [starts[name] for name in layer_ids]
    if positions != sorted(set(positions)):
        raise TraceError("the plan's cuts are not in program order", "stages follow the order of the layers")
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


def tied_over_cuts(trace: Trace, cuts: Sequence[str]) -> tuple[TiedParameter, ...]:
    """The trainable parameters that more than one stage holds, where cuts lie before the layers named `cuts`."""
    from planner.files.plan_file import tied_over

    firsts = [index for index, layer in enumerate(trace.layers) if layer.id in cuts]
    trainable = {n: layers for n, layers in trace.tied.items() if attribute(trace.graph_module, n).requires_grad}
    return tied_over(firsts, trainable)
