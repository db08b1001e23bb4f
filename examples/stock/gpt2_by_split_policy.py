"""GPT-2 with its tied head on stock torch: one argument and one line of ours, marked.

Stock torch would train the two copies of the tied matrix apart, without a word.

    plan --gpus 2 examples/gpt2.py
    torchrun --nproc-per-node 2 examples/stock/gpt2_by_split_policy.py gpt2.plan.json
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, pipeline

from planner import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2 import build_model, make_batch, make_optimizer


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A pipeline of stock torch returns the tensors of the model's output, not its dataclass."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(plan_file: str, num_steps: int = 3) -> PipelineStage:
    rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(f"cuda:{rank}") if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group()
    plan = Plan.load(plan_file)

    torch.manual_seed(0)
    model = build_model()
    inputs, _ = make_batch(plan.microbatch_size)
    pipe = pipeline(model, mb_args=(), mb_kwargs=inputs, split_policy=plan.split_policy(model))  # the argument
    stage = pipe.build_stage(rank, device)
    schedule = ScheduleGPipe(stage, plan.num_microbatches, loss_fn=token_loss)
    optimizer = make_optimizer(stage.submod.parameters())

    for step in range(num_steps):
        torch.manual_seed(1 + step)
        inputs, targets = make_batch(plan.batch_size)
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(**{name: tensor.to(device) for name, tensor in inputs.items()})
        elif rank == world_size - 1:
            schedule.step(target=targets.to(device), losses=losses)
            print(f"step {step}: loss {torch.stack(losses).mean().item():.4f}")
        else:
            schedule.step()
        plan.sum_tied_gradients(stage)  # the line
        optimizer.step()
    return stage


if __name__ == "__main__":
    main(sys.argv[1])
    dist.destroy_process_group()
