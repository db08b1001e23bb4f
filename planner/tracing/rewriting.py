"""The exported graph made safe to cut, and the cut itself.

`torch.distributed.pipelining` gets several things silently wrong when an exported graph is cut as it stands (inputs
bound in order of first use, tied parameters under two names, `no_grad` regions, non-contiguous crossings, values that
several later stages read). `prepare` and `apply_cuts` rewrite the graph so that none of these remain: afterwards every
value goes from one stage to the next only, and each stage is a flat list of operations.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.distributed.pipelining._IR import aten_pipe_split_alias
from torch.utils._pytree import tree_map

from planner.errors import TraceError
from planner.tracing.code_frames import operation_frames, operation_module
from planner.tracing.crossing import arrive, call, depart
from planner.tracing.functions import FunctionCall, restore_functions
from planner.tracing.gradients import needs_gradient
from planner.tracing.state import (
    aliases_of_written_state,
    copy_written_inputs,
    name_state_as_torch_will,
    return_state_as_values,
    storages,
    write_state_early,
    writes,
)

ATEN = torch.ops.aten
ROOT_STACK = {"L__self__": ("", nn.Module)}
USER_STACK = "nn_module_stack_before_the_cut"

REGION_REMEDIES = {
    "cond": "compute both sides and choose with torch.where(condition, a, b)",
    "while_loop": "write a loop over a fixed number of rounds in Python",
    "tag_activation_checkpoint": "call the block without torch.utils.checkpoint",
    "wrap_with_autocast": "remove torch.autocast from forward; it belongs around the whole model",
}


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer → the first name of the same tensor, so that tied ones share a name."""
    first: dict[int, str] = {}
    names = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            names[name] = first.setdefault(id(tensor), name)
    return names


def compute_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The operations of `graph` in program order, without inputs, parameters, output and cut marks."""
    skipped = ("placeholder", "get_attr", "output")
    return [node for node in graph.nodes if node.op not in skipped and node.target is not aten_pipe_split_alias]


def tensor_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of `graph` that are tensors, in signature order."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    return [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def prepare(gm: fx.GraphModule, names: dict[str, str]) -> bool:
    """Canonical parameter names, one `get_attr` each, `no_grad` regions inlined, cut marks and dead operations removed.

    Returns True where a `no_grad` region was inlined. Raises TraceError for other higher-order operators.
    """
    _drop_cut_marks(gm.graph)
    inlined = _inline_no_grad(gm)
    restore_functions(gm)
    _refuse_higher_order(gm)
    _drop_whole_views(gm.graph)
    seen: dict[str, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            node.target = names.get(node.target, node.target)
            if node.target in seen:
                node.replace_all_uses_with(seen[node.target])
                gm.graph.erase_node(node)
            else:
                seen[node.target] = node
    copy_written_inputs(gm)
    write_state_early(gm)
    return_state_as_values(gm)
    gm.graph.eliminate_dead_code()
    return inlined


def has_cut_marks(graph: fx.Graph) -> bool:
    """Whether the model's own forward calls `pipe_split()`."""
    return any(node.target is aten_pipe_split_alias for node in graph.nodes)


def _drop_cut_marks(graph: fx.Graph) -> None:
    """Forget each `pipe_split()` that the model's own forward calls: the plan says where to cut."""
    for node in list(graph.nodes):
        if node.target is aten_pipe_split_alias:
            graph.erase_node(node)


def _drop_whole_views(graph: fx.Graph) -> None:
    """Forget views of a whole tensor (`x[:]`, an alias): whether torch records one depends on how it was traced."""
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.args[0] if node.args else None, fx.Node) and _is_whole(node):
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            graph.erase_node(node)


def _is_whole(node: fx.Node) -> bool:
    if node.target is not ATEN.slice.Tensor:
        return node.target is ATEN.alias.default
    given: tuple[Any, ...] = node.args
    defaults: tuple[Any, ...] = (0, None, None, 1)
    value, dimension, start, stop, step = given + defaults[len(given) - 1 :]
    length = value.meta["val"].shape[dimension]
    known = all(isinstance(size, int) for size in (length, stop))
    return not start and step == 1 and (stop is None or (known and int(length) <= int(stop)))


def _inline_no_grad(gm: fx.GraphModule) -> bool:
    """Replace `wrap_with_set_grad_enabled(flag, body, …)` by the body, detached where gradients were off."""
    found = False
    while regions := [node for node in gm.graph.nodes if _operator_name(node) == "wrap_with_set_grad_enabled"]:
        for region in regions:
            _inline_region(gm, region)
        found = True
    return found


def _operator_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _inline_region(gm: fx.GraphModule, region: fx.Node) -> None:
    enabled, body, *arguments = region.args
    assert isinstance(body, fx.Node)
    inner = cast(fx.GraphModule, operator.attrgetter(str(body.target))(gm))
    values: dict[fx.Node, Any] = {}
    remaining = iter(arguments)
    outputs: Any = ()
    with gm.graph.inserting_before(region):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "output":
                outputs = fx.node.map_arg(node.args[0], lambda n: values[n])
            else:
                values[node] = gm.graph.node_copy(node, lambda n: values[n])
                values[node].meta["nn_module_stack"] = region.meta["nn_module_stack"]
        if not enabled:
            outputs = [_detached(gm.graph, value) for value in outputs]
    for user in list(region.users):
        user.replace_all_uses_with(outputs[cast(int, user.args[1])])
        gm.graph.erase_node(user)
    gm.graph.erase_node(region)
    if not body.users:
        gm.graph.erase_node(body)


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not value.meta["val"].is_floating_point():
        return value
    node = graph.call_function(ATEN.detach.default, (value,))
    node.meta = dict(value.meta)
    return node


def _refuse_higher_order(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            module = operation_module(node)
            raise TraceError(
                f"{f'module {module}' if module else 'the model'} contains a region of kind {node.target.__name__}",
                "operations inside such a region cannot be told apart by a cut",
                REGION_REMEDIES.get(node.target.__name__, "remove the region from forward"),
                operation_frames(node),
            )


def apply_cuts(gm: fx.GraphModule, positions: Sequence[int]) -> None:
    """Cut the prepared graph before the operations at `positions` (increasing, none 0); in place.

    Every input enters stage 0 in signature order; every value that a later stage needs is handed on stage by stage in
    the form of `crossing`.
    """
    graph = gm.graph
    nodes = compute_nodes(graph)
    stage = {node: sum(index >= position for position in positions) for index, node in enumerate(nodes)}
    starts = [nodes[0], *(nodes[position] for position in positions)]
    ends = [*(nodes[position - 1] for position in positions), nodes[-1]]
    graded, overwritten = needs_gradient(gm), aliases_of_written_state(graph)
    entering = _bind_inputs(graph, nodes[0], stage)
    for value in [*entering, *nodes]:
        _relay(graph, value, stage, starts, ends, graded, value in overwritten)
    for node in graph.nodes:
        node.meta = {**node.meta, USER_STACK: node.meta.get("nn_module_stack"), "nn_module_stack": ROOT_STACK}
    _mark_stages(graph, stage, len(positions) + 1)
    name_state_as_torch_will(graph)
    graph.lint()
    gm.recompile()


def _bind_inputs(graph: fx.Graph, anchor: fx.Node, stage: dict[fx.Node, int]) -> list[fx.Node]:
    """An alias of every tensor input, in signature order, as the first operations of stage 0."""
    aliases = []
    for placeholder in tensor_inputs(graph):
        with graph.inserting_before(anchor):
            alias = call(graph, ATEN.alias.default, placeholder)
        placeholder.replace_all_uses_with(alias)
        alias.args = (placeholder,)
        stage[alias] = 0
        aliases.append(alias)
    return aliases


def _relay(
    graph: fx.Graph,
    value: fx.Node,
    stage: dict[fx.Node, int],
    starts: list[fx.Node],
    ends: list[fx.Node],
    graded: set[fx.Node],
    copied: bool = False,
) -> None:
    """Hand `value` on from its stage to the last one that reads it, one stage at a time."""
    example = value.meta.get("val")
    home, final = stage[value], len(starts) - 1
    users = [(user, final if user.op == "output" else stage[user]) for user in value.users]
    last = max((index for _, index in users), default=home)
    if last == home:
        return
    if not isinstance(example, torch.Tensor):
        raise TraceError(f"{value.name} crosses a cut and is not a tensor", "only tensors can be sent", "cut elsewhere")
    with graph.inserting_before(ends[home].next):  # when every write in place has been done
        integers = example.is_floating_point() and value not in graded
        sent = depart(graph, value, as_integers=integers, copied=copied)
    stage.update(dict.fromkeys(sent, home))
    travelling = sent[-1]
    for index in range(home + 1, last + 1):
        readers = [user for user, reader in users if reader == index]
        if index < last or any(user.op == "output" for user in readers):
            with graph.inserting_before(starts[index]):
                travelling = call(graph, ATEN.alias.default, travelling)
            stage[travelling] = index
        if readers:
            with graph.inserting_before(starts[index]):
                restored = arrive(graph, travelling, example)
            stage.update(dict.fromkeys(restored, index))
            for reader in readers:
                reader.replace_input_with(value, [travelling, *restored][-1])


def set_device(gm: fx.GraphModule, device: torch.device) -> None:
    """Let operations that name the device of the trace (as keyword or by position) name `device`; in place.

    torch's own `build_stage` replaces the keyword `device` only. Constants go there too, which `Module.to` leaves.
    """
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.args = tree_map(lambda a: device if isinstance(a, torch.device) else a, node.args)
            node.kwargs = tree_map(lambda a: device if isinstance(a, torch.device) else a, dict(node.kwargs))
            if isinstance(node.target, FunctionCall):
                node.target = node.target.on(device)
        elif node.op == "get_attr":
            _move_constant(gm, str(node.target), device)
    gm.recompile()


def views_of_any_layout(gm: fx.GraphModule) -> None:
    """Let `view` be `reshape`, which copies where the layout needs it; in place, and not yet written as code.

    Export writes a `reshape` as a `view` where the layout that it saw allows that. It saw a CPU: what attention or a
    convolution makes lies otherwise on a GPU. A view that is written to later, or whose storage is, stays one: a copy
    would miss the writing, silently.
    """
    storage, position = storages(gm.graph), {node: index for index, node in enumerate(gm.graph.nodes)}
    last_write = {owner: position[node] for node, owner in writes(gm.graph, storage)}
    for node in position:
        if node.target is ATEN.view.default and position[node] > last_write.get(storage[node], -1):
            node.target = ATEN.reshape.default


def _move_constant(gm: fx.GraphModule, name: str, device: torch.device) -> None:
    path, _, last = name.rpartition(".")
    owner = gm.get_submodule(path)
    value = vars(owner).get(last)
    if isinstance(value, torch.Tensor) and value.device != device:
        setattr(owner, last, value.to(device))


def _mark_stages(graph: fx.Graph, stage: dict[fx.Node, int], num_stages: int) -> None:
    first: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if node in stage:
            first.setdefault(stage[node], node)
    for index in range(1, num_stages):
        with graph.inserting_before(first[index]):
            mark = graph.call_function(aten_pipe_split_alias, ())
            mark.meta = {"nn_module_stack": ROOT_STACK, "val": None}
