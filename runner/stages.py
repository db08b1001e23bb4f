"""Plan + model → this rank's stage, through `pipeline()` and `build_stage`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.distributed.pipelining import pipeline
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from planner.errors import TraceError, UsageError, user_frames
from planner.files.measurement_file import StartTimes
from planner.files.plan_file import Plan, TiedParameter
from planner.machine.device import Device
from planner.tracing.deferred_model import build_either
from planner.tracing.explaining import quiet_export
from planner.tracing.inputs import TracedInputs
from planner.tracing.loading import ModelSource, as_call, make_batch, rows
from planner.tracing.older_stages import as_of_later_torch
from planner.tracing.precision import inside_autocast
from planner.tracing.randomness import random_operations, remove_dropout
from planner.tracing.rewriting import canonical_names, set_device
from planner.tracing.split_policy import SplitPolicy, tied_over_cuts
from runner.initial_weights import initial_weights, say_unused
from runner.weight_files import WeightFiles


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """An output leaf that the pipeline returns as its `index`-th tensor; a tensor returned twice comes once."""

    index: int


@dataclass(frozen=True, slots=True)
class BuiltStage:
    """This rank's stage; `stage` is torch's, `rebuild_output` gives the loss what the model would have returned.

    `output_leaves` are the model's output leaves in order: an OutputTensor for each tensor, constants as they are.
    `inputs` says which inputs every batch must have.
    `untouched_state` is what no stage uses, on the first stage only. `start` is how long all of this took.
    """

    stage: Any
    out_spec: TreeSpec | None
    output_leaves: tuple[Any, ...]
    tied: tuple[TiedParameter, ...]
    state_names: tuple[str, ...]
    aliases: dict[str, str]
    untouched_state: dict[str, torch.Tensor]
    num_dropouts_removed: int
    inputs: TracedInputs
    start: StartTimes

    def rebuild_output(self, output: Any) -> Any:
        """The last stage's flat output in the model's own structure (a tensor, dict, tuple or ModelOutput)."""
        if self.out_spec is None:
            return output
        tensors = output if isinstance(output, (tuple, list)) else [output]
        leaves = [tensors[leaf.index] if isinstance(leaf, OutputTensor) else leaf for leaf in self.output_leaves]
        return tree_unflatten(leaves, self.out_spec)


class _Policy:
    """The plan's policy, then, for comparisons, dropout removed; keeps what the runner needs to know."""

    def __init__(self, model: nn.Module, plan: Plan, device: torch.device, without_dropout: bool) -> None:
        self.inner = SplitPolicy(model, plan, device)
        self.device = device
        self.without_dropout = without_dropout
        self.removed = 0
        self.exported_at: float | None = None
        self.leaves: tuple[Any, ...] = ()

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        self.exported_at = time.perf_counter()
        never_written_as_code(gm)
        gm = self.inner(gm)
        output = gm.graph.output_node().args[0]
        leaves = tree_leaves(output, is_leaf=lambda leaf: leaf is None)
        order = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
        self.leaves = tuple(OutputTensor(order.index(x)) if isinstance(x, fx.Node) else x for x in leaves)
        set_device(gm, self.device)
        if self.without_dropout:
            self.removed = prepare_for_comparison(gm)
        return gm


def never_written_as_code(gm: fx.GraphModule) -> None:
    """Let `gm` stay a graph: nobody calls it before it is split, and writing it as Python costs as much as a cut.

    torch writes it twice itself, once of these for a message that is not shown.
    """
    gm.recompile = lambda: None  # type: ignore[method-assign,assignment,return-value]
    gm.print_readable = lambda *_, **__: ""  # type: ignore[method-assign]


def prepare_for_comparison(gm: fx.GraphModule) -> int:
    """Dropout as the identity; refuse other randomness by name. Returns how many dropouts were active."""
    if others := random_operations(gm):
        raise UsageError(
            f"the model draws random numbers: {', '.join(others)}",
            "--check compares two trainings, which other randomness than dropout would set apart",
            "take the randomness out of forward, or run without --check",
        )
    removed = remove_dropout(gm)
    gm.recompile()
    return removed


def build_stage(
    plan: Plan,
    source: ModelSource,
    index: int,
    device: Device,
    *,
    without_dropout: bool = False,
    stock: bool = False,
    meta: bool = False,
    weights: WeightFiles | None = None,
) -> BuiltStage:
    """Stage `index` of `plan` on `device`. Every rank builds the model by the seed rule and keeps its own part.

    With `meta`, or where the plan says so, no more than that part is ever in memory. `weights` replace the model's own
    initialisation. Raises TraceError where the model is no longer the planned one, UsageError where `stock` cannot be,
    FileError where `weights` do not fit.
    """
    stages = build_stages(
        plan, source, [index], device, without_dropout=without_dropout, stock=stock, meta=meta, weights=weights
    )
    return next(stages)


def build_stages(
    plan: Plan,
    source: ModelSource,
    indices: Sequence[int],
    device: Device,
    *,
    without_dropout: bool = False,
    stock: bool = False,
    meta: bool = False,
    weights: WeightFiles | None = None,
) -> Iterator[BuiltStage]:
    """The stages `indices` of `plan`, cut from one model, each put on `device` when it is asked for.

    torch gives every stage copies of the tied parameters that it holds, as ranks have them. Raises what `build_stage`
    raises.
    """
    began = time.perf_counter()
    model, deferred = build_either(source, plan.seed, meta=meta or plan.model.meta, draws=weights is None)
    inputs, _ = make_batch(source, plan.seed, 0, plan.batch_size)
    args, kwargs = as_call(rows(inputs, 0, plan.microbatch_size))
    names = canonical_names(model)
    state = model.state_dict()
    first = initial_weights(model, names, deferred, weights)
    policy = _Policy(model, plan, device.torch_device, without_dropout)
    model_built = time.perf_counter()
    pipe = _stock_pipe(plan, model, args, kwargs) if stock else _policy_pipe(source, policy, model, args, kwargs)
    piped = time.perf_counter()
    export_s = None if policy.exported_at is None else policy.exported_at - model_built
    if pipe.num_stages != plan.num_stages:
        raise TraceError(f"torch made {pipe.num_stages} stages", f"the plan has {plan.num_stages}", "plan again")
    used = {name for k in range(plan.num_stages) for name, _ in _state_of(pipe.get_stage_module(k))}
    trace = policy.inner.trace
    for index in indices:
        stage_began = time.perf_counter()
        first.give(pipe.get_stage_module(index))
        untouched = {n: t for n, t in state.items() if names.get(n, n) not in used} if index == 0 else {}
        if index == 0 and weights is not None:
            say_unused(weights, model)
        stage = pipe.build_stage(index, device.torch_device)
        as_of_later_torch(stage)
        _take_flat_inputs(stage.submod)
        if plan.precision == "bf16":
            stage.submod.forward = inside_autocast(stage.submod.forward, device.torch_device.type)
        yield BuiltStage(
            stage=stage,
            out_spec=None if stock or trace is None else trace.out_spec,
            output_leaves=policy.leaves,
            tied=() if trace is None else tied_over_cuts(trace, [cut.before for cut in plan.cuts], plan.order),
            state_names=tuple(state),
            aliases=names,
            untouched_state={name: first.value(name, tensor) for name, tensor in untouched.items()},
            num_dropouts_removed=policy.removed,
            inputs=TracedInputs.of(inputs),
            start=StartTimes(
                model_s=model_built - began,
                export_s=export_s,
                pipeline_s=piped - model_built - (export_s or 0.0),
                stage_s=time.perf_counter() - stage_began,
            ),
        )


def _policy_pipe(
    source: ModelSource, policy: Callable[[Any], Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    try:
        with quiet_export():
            return pipeline(model, args, kwargs, split_policy=policy)
    except RuntimeError as error:
        cause = error.__cause__ or error
        lines = str(cause).strip().splitlines()
        raise TraceError(
            f"pipeline() failed: {type(cause).__name__}: {lines[0] if lines else ''}",
            "the model must still export as it did when the plan was made",
            "make the plan again",
            user_frames(cause, source.file),
        ) from error


def _stock_pipe(plan: Plan, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    spec = plan.split_spec()
    from torch.distributed.pipelining import SplitPoint

    assert all(point is SplitPoint.BEGINNING for point in spec.values())
    modules = dict(model.named_modules())
    if unknown := [name for name in spec if name not in modules]:
        rule = "split_spec names modules of the model that was planned"
        raise TraceError(f"the model has no module {unknown[0]!r}", rule, "make the plan again")
    with quiet_export():
        return pipeline(model, args, kwargs, split_spec=spec)


def _state_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _take_flat_inputs(submodule: Any) -> None:
    """Let the first stage take tensors in signature order, whatever structure the model's own inputs have."""
    if isinstance(submodule, fx.GraphModule):
        submodule.graph.set_codegen(fx.graph.CodeGen())
        submodule.recompile()
