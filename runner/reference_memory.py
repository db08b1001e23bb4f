"""Whether the unsplit reference of --check fits beside the first stage, where a model is trained because it may not."""

from __future__ import annotations

import torch

from planner.errors import UsageError
from planner.files.plan_file import Plan
from planner.machine.device import Device
from planner.machine.host_memory import free_host_bytes
from planner.tracing.loading import ModelSource

SAMPLE = 4096


def refuse_reference_that_does_not_fit(plan: Plan, source: ModelSource, device: Device) -> None:
    """Raise UsageError where the weights, gradients and optimizer state of the whole model exceed what is free.

    The weights of all stages, gathered for the comparison, come on top.
    """
    parameter_bytes = 4 * plan.model.num_parameters
    needed = int(parameter_bytes * (3 + optimizer_share(source)))
    free = free_host_bytes()
    if device.clock == "cuda-event":
        needed -= parameter_bytes  # what is gathered lies on the host
        free = int(torch.cuda.mem_get_info(device.torch_device)[0])
    if free is not None and needed > free:
        raise UsageError(
            f"--check: the unsplit reference needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
            "the first worker trains the whole model beside its stage, with gradients and optimizer state, and gathers"
            " the weights of the others",
            "check a smaller model of the same kind (fewer layers), or run without --check",
        )


def optimizer_share(source: ModelSource) -> float:
    """Bytes of optimizer state for each byte of parameters, seen on a small one."""
    parameter = torch.nn.Parameter(torch.zeros(SAMPLE))
    parameter.grad = torch.ones(SAMPLE)
    optimizer = source.make_optimizer([parameter])
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    num_bytes = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.numel() >= SAMPLE)
    return num_bytes / parameter.nbytes
