"""For --check and --export-weights: gradients of tied parameters summed in the very order of the unsplit model.

Autograd adds, microbatch by microbatch, the parts of all uses of a parameter and then the sum to its gradient; a
pipeline adds each holder's microbatches first. The two differ by rounding (1e-8), which Adam blows up wherever the true
gradient is zero (the bias of a key projection, say). So that a comparison is not blurred, holders keep the part of
every microbatch, and the first holder adds them in the unsplit order. The pipeline's own sum is held against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from planner.errors import CheckError
from planner.files.plan_file import TiedParameter
from planner.tracing.tied_gradients import holder_ranks
from runner.stages import BuiltStage

TOLERANCE = 1e-5


class ExactTies:
    """Keeps this stage's parts of tied gradients and replaces the pipeline's sum by the exact one."""

    def __init__(self, built: BuiltStage, num_microbatches: int, mean: bool) -> None:
        self.stage, self.num_microbatches, self.mean = built.stage, num_microbatches, mean
        self.held = [entry for entry in built.tied if self.stage.stage_index in entry.stages]
        self.parameters = dict(self.stage.submod.named_parameters())
        self.parts: dict[str, list[torch.Tensor]] = {entry.name: [] for entry in self.held}
        for entry in self.held:
            self.parameters[entry.name].register_post_accumulate_grad_hook(self._keeper(entry.name))

    def _keeper(self, name: str) -> Callable[[torch.Tensor], None]:
        def keep(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            self.parts[name].append(parameter.grad)
            parameter.grad = None

        return keep

    def leave_device(self) -> None:
        """Keep the parts on the host: in a rehearsal the next stage has the device to itself."""
        for parts in self.parts.values():
            parts[:] = [part.cpu() for part in parts]

    def restore(self) -> None:
        """After the schedule: put the gradient there as the pipeline alone would have left it."""
        for entry in self.held:
            parts = self.parts[entry.name]
            if parts:
                total = parts[0].clone()
                for part in parts[1:]:
                    total += part
                self.parameters[entry.name].grad = total.div_(self.num_microbatches) if self.mean else total

    def replace(self) -> None:
        """After the pipeline's own sum: compare it with the exact one, and go on with that. Raises CheckError."""
        for entry in self.held:
            self._replace_one(entry)
            self.parts[entry.name].clear()

    def _replace_one(self, entry: TiedParameter) -> None:
        ranks = holder_ranks(entry, self.stage)
        parameter = self.parameters[entry.name]
        own = torch.stack(self.parts[entry.name] or [torch.zeros_like(parameter)] * self.num_microbatches)
        assert parameter.grad is not None
        if self.stage.stage_index != entry.stages[0]:
            dist.send(own, ranks[0], group=self.stage.group)
            dist.recv(parameter.grad, ranks[0], group=self.stage.group)
            return
        by_holder: list[Any] = [own]
        for rank in ranks[1:]:
            by_holder.append(torch.empty_like(own))
            dist.recv(by_holder[-1], rank, group=self.stage.group)
        exact = exact_sum(by_holder)
        if self.mean:
            exact.div_(self.num_microbatches)
        difference = float((parameter.grad - exact).abs().max())
        for rank in ranks[1:]:
            dist.send(exact, rank, group=self.stage.group)
        if difference > TOLERANCE * max(1.0, float(exact.abs().max())):
            raise CheckError(
                f"the split model is not the unsplit one: the summed gradient of {entry.name} differs by"
                f" {difference:.3g} from the sum over stages {', '.join(map(str, entry.stages))}",
                f"differences stay within {TOLERANCE:g} (relative above 1) in float32",
                "do not trust this run; report the model",
            )
        parameter.grad.copy_(exact)


def exact_sum(by_holder: list[torch.Tensor]) -> torch.Tensor:
    """Parts [microbatch, …] of every holder, first stage first → the gradient in autograd's own order.

    Backward reaches the last holder first.

    >>> exact_sum([torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
    tensor(33.)
    """
    total = None
    for microbatch in range(by_holder[0].shape[0]):
        part = by_holder[-1][microbatch].clone()
        for holder in reversed(by_holder[:-1]):
            part += holder[microbatch]
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
