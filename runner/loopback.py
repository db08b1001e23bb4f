"""Stages of a plan alone in their process: what a stage would receive was kept before, what it would send is kept.

torch's stage asks itself for the messages of every microbatch (`get_fwd_recv_ops` and its three kin). Here each of them
is answered on the spot and an empty list goes back, so that torch's own schedules run one stage without neighbours,
with the receive buffers and saved activations of a real rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch

Slot = tuple[Literal["forward", "backward"], int, int]


class SentMessages:
    """What torch's schedule still holds of what a stage has sent, so that a stage alone peaks where its rank would.

    GPipe holds every message until its step ends. 1F1B holds the latest of each direction, and the last one that its
    warm-up sent off by itself until the first backward without a forward after it. Measured: the peaks are equal.
    """

    def __init__(self, stage: Any, num_microbatches: int, schedule: str) -> None:
        warm_up = min(num_microbatches, stage.num_stages - stage.stage_index)
        self.keeps_all = schedule != "1f1b"
        self.last_of_warm_up, self.first_of_cooldown = warm_up - 2, num_microbatches - warm_up
        self.held: dict[Hashable, list[torch.Tensor]] = {}

    def add(self, slot: Slot, tensors: list[torch.Tensor]) -> None:
        """`tensors` were sent."""
        direction, _, microbatch = slot
        if self.keeps_all:
            self.held[slot] = tensors
            return
        self.held[direction] = tensors
        if direction == "forward" and microbatch == self.last_of_warm_up:
            self.held["warm-up"] = tensors
        if direction == "backward" and microbatch == self.first_of_cooldown:
            self.held.pop("warm-up", None)


class Boundaries:
    """What crossed the cuts in the step that is being rehearsed, on the host.

    A slot is (direction, the stage after the cut, microbatch); its tensors come in the order of torch's messages.
    """

    def __init__(self) -> None:
        self.slots: dict[Slot, list[torch.Tensor]] = {}

    def connect(self, stage: Any, sent: SentMessages) -> None:
        """Answer `stage`'s messages from here; what it sends also stays in `sent`."""
        index = stage.stage_index

        def keep(slot: Slot, operations: Sequence[Any]) -> None:
            self._keep(slot, operations)
            sent.add(slot, [operation.tensor for operation in operations])

        def answer(name: str, work: Callable[[Slot, Sequence[Any]], None], direction: Any, after: int) -> None:
            messages = getattr(stage, name)

            def answered(microbatch: int) -> list[Any]:
                work((direction, after, microbatch), messages(microbatch))
                return []

            setattr(stage, name, answered)

        answer("get_fwd_recv_ops", self._fill, "forward", index)
        answer("get_fwd_send_ops", keep, "forward", index + 1)
        answer("get_bwd_recv_ops", self._fill, "backward", index + 1)
        answer("get_bwd_send_ops", keep, "backward", index)
        stage._get_init_p2p_neighbors_ops = list  # the handshake before the first step: there is nobody to greet

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
