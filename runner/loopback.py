"""Stages of a plan alone in their process: what a stage would receive was kept before, what it would send is kept.

torch's stage asks itself for the messages of every microbatch (`get_fwd_recv_ops` and its three kin). Here each of them
is answered on the spot and an empty list goes back, so that torch's own schedules run one stage without neighbours,
with the receive buffers and saved activations of a real rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

Slot = tuple[Literal["forward", "backward"], int, int]


class Boundaries:
    """What crossed the cuts in the step that is being rehearsed, on the host.

    A slot is (direction, the stage after the cut, microbatch); its tensors come in the order of torch's messages.
    """

    def __init__(self) -> None:
        self.slots: dict[Slot, list[torch.Tensor]] = {}

    def connect(self, stage: Any, num_sends_held: int | None) -> Callable[[], None]:
        """Answer `stage`'s messages from here. Returns what to call at the end of each of its steps.

        Gradients that were sent stay alive as in a running pipeline: the latest `num_sends_held` microbatches, or all
        of a step for None.
        """
        index = stage.stage_index
        sent: deque[list[torch.Tensor]] = deque(maxlen=num_sends_held)

        def keep_gradients(slot: Slot, operations: Sequence[Any]) -> None:
            self._keep(slot, operations)
            sent.append([operation.tensor for operation in operations])

        def answer(name: str, work: Callable[[Slot, Sequence[Any]], None], direction: Any, after: int) -> None:
            messages = getattr(stage, name)

            def answered(microbatch: int) -> list[Any]:
                work((direction, after, microbatch), messages(microbatch))
                return []

            setattr(stage, name, answered)

        answer("get_fwd_recv_ops", self._fill, "forward", index)
        answer("get_fwd_send_ops", self._keep, "forward", index + 1)
        answer("get_bwd_recv_ops", self._fill, "backward", index + 1)
        answer("get_bwd_send_ops", keep_gradients, "backward", index)
        stage._get_init_p2p_neighbors_ops = list  # the handshake before the first step: there is nobody to greet
        return sent.clear

    def _keep(self, slot: Slot, operations: Sequence[Any]) -> None:
        if not operations:  # a pass without backward
            return
        tensors = [operation.tensor.detach() for operation in operations]
        if slot not in self.slots:
            self.slots[slot] = [_host_copy(tensor) for tensor in tensors]
        for kept, tensor in zip(self.slots[slot], tensors, strict=True):
            kept.copy_(tensor, non_blocking=True)

    def _fill(self, slot: Slot, operations: Sequence[Any]) -> None:
        if operations:
            for kept, operation in zip(self.slots[slot], operations, strict=True):
                operation.tensor.detach().copy_(kept, non_blocking=True)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Room on the host for `tensor`; pinned where it comes from a GPU, so that copies do not stop the stage."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
