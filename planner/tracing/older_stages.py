"""Stages of torch 2.11 and 2.12, made to do what those of later releases do.

There a stage that receives integers fails: their receive buffers are told to require gradients, and gradients are
expected for them. What has no gradient crosses as integers (`planner.tracing.crossing`), masks and token ids do anyway.
On 2.11 a stage is also prepared by one schedule only, and its outputs must have the strides of the trace, even in
dimensions of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch


def as_of_later_torch(stage: Any) -> None:
    """Let `stage`, a `PipelineStage` of an older torch, receive integers, be prepared anew, and send any layout."""
    if hasattr(stage, "_get_grad_send_meta"):
        return
    _let_integers_cross(stage)

    def configure_outputs(outputs: Sequence[torch.Tensor]) -> None:
        stage._outputs_meta = tuple(outputs)

    stage._configure_outputs_meta = configure_outputs
    stage._validate_fwd_outputs = lambda outputs: None


def _let_integers_cross(stage: Any) -> None:
    receive, gradients_from, gradients_to, messages = (
        stage._create_act_recv_info,
        stage._create_grad_recv_info,
        stage._create_grad_send_info,
        stage._get_recv_ops,
    )

    def create_act_recv_info() -> Any:
        trains, stage.has_backward = stage.has_backward, False
        infos = receive()
        stage.has_backward = trains
        for info in infos:
            if _carries_gradient(info):
                info.buffer.requires_grad_(trains)
                if hasattr(info, "tensor_meta"):
                    info.tensor_meta = replace(info.tensor_meta, requires_grad=trains)
        return infos

    def create_grad_recv_info(act_send_info: Any) -> Any:
        infos = gradients_from(act_send_info)
        for info in infos:
            if not _carries_gradient(info):
                info.buffer = info.tensor_meta = None
        return infos

    def create_grad_send_info(args_recv_info: Sequence[Any]) -> list[int | None]:
        stages = gradients_to(args_recv_info)
        return [to if _carries_gradient(info) else None for to, info in zip(stages, args_recv_info, strict=True)]

    def get_recv_ops(infos: Sequence[Any]) -> Any:
        return messages(tuple(info for info in infos if getattr(info, "buffer", info) is not None))

    stage._create_act_recv_info, stage._create_grad_recv_info = create_act_recv_info, create_grad_recv_info
    stage._create_grad_send_info, stage._get_recv_ops = create_grad_send_info, get_recv_ops


def _carries_gradient(info: Any) -> bool:
    """Whether what is received by `info` is a tensor of floats; an input of the model is received by nobody."""
    buffer = getattr(info, "buffer", None)
    return isinstance(buffer, torch.Tensor) and buffer.is_floating_point()
