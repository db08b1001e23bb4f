"""The trained weights of all stages in one place: gathered tensor by tensor, written as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.errors import FileError
from planner.files.reading import replacing
from runner.stages import BuiltStage


def gather_tensors(own: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor] | None:
    """All ranks' tensors by name on rank 0 (on the CPU), None elsewhere; the first rank that holds a name wins.

    `device` is where this rank's process group exchanges tensors.
    """
    listing = [(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in own.items()]
    listings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(listings, listing)
    rank = dist.get_rank()
    if rank != 0:
        for name, _, _ in listing:
            dist.send(own[name].detach().contiguous(), 0)
        return None
    gathered = {name: tensor.detach().cpu() for name, tensor in own.items()}
    for source in range(1, dist.get_world_size()):
        for name, shape, dtype in listings[source]:
            received = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            dist.recv(received, source)
            gathered.setdefault(name, received.cpu())
    return gathered


def gather_gradients(built: BuiltStage) -> dict[str, torch.Tensor] | None:
    """Every stage's gradients by canonical name on rank 0, None elsewhere."""
    return gather_tensors(stage_gradients(built), built.stage.device)


def stage_gradients(built: BuiltStage) -> dict[str, torch.Tensor]:
    """This stage's gradients by canonical name."""
    return {name: p.grad for name, p in built.stage.submod.named_parameters() if p.grad is not None}


def gather_weights(built: BuiltStage) -> dict[str, torch.Tensor] | None:
    """Every key of the model's `state_dict()` on rank 0, None elsewhere.

    Tied names are copies; what no stage uses is as it was built.
    """
    gathered = gather_tensors(stage_state(built), built.stage.device)
    return None if gathered is None else model_state(built, gathered)


def stage_state(built: BuiltStage) -> dict[str, torch.Tensor]:
    """This stage's parameters and buffers by name."""
    own: dict[str, torch.Tensor] = dict(built.stage.submod.named_parameters(remove_duplicate=False))
    own.update(built.stage.submod.named_buffers(remove_duplicate=False))
    return own


def model_state(built: BuiltStage, gathered: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every key of the model's `state_dict()`, from what all stages hold."""
    weights = {}
    for name in built.state_names:
        canonical = built.aliases.get(name, name)
        tensor = gathered[canonical] if canonical in gathered else built.untouched_state[name].detach().cpu()
        weights[name] = tensor.clone()
    return weights


def write_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write `weights` as safetensors, complete or not at all. Raises FileError where the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(temporary))
        except SafetensorError as error:
            rule = "the folder must be writable and the disk not full"
            raise FileError(f"cannot write {path}: {error}", rule, "free space or give another path") from error
