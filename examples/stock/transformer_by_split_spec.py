"""The two-GPU script of PyTorch's pipelining tutorial, for any number of GPUs: five lines changed, marked `was:`.

plan --gpus 2 --plain examples/transformer.py
torchrun --nproc-per-node 2 examples/stock/transformer_by_split_spec.py transformer.plan.json
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, pipeline

from planner import Plan  # was: from torch.distributed.pipelining import SplitPoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from transformer import build_model, loss_fn, make_batch


def init_distributed() -> tuple[int, int, torch.device]:
    rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(f"cuda:{rank}") if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group()
    return rank, world_size, device


def main(plan_file: str) -> PipelineStage:
    rank, world_size, device = init_distributed()
    plan = Plan.load(plan_file)
    num_microbatches = plan.num_microbatches  # was: 4

    torch.manual_seed(0)
    model = build_model()
    x, y = make_batch(plan.batch_size)  # was: 32
    example_input_microbatch = x.chunk(num_microbatches)[0]

    pipe = pipeline(
        module=model,
        mb_args=(example_input_microbatch,),
        split_spec=plan.split_spec(),  # was: {"layers.4": SplitPoint.BEGINNING}
    )
    stage = pipe.build_stage(rank, device)
    schedule = ScheduleGPipe(stage, n_microbatches=num_microbatches, loss_fn=loss_fn)

    if rank == 0:
        schedule.step(x.to(device))
    elif rank == world_size - 1:  # was: rank == 1
        losses: list[torch.Tensor] = []
        schedule.step(target=y.to(device), losses=losses)
        print(f"losses: {[round(loss.item(), 4) for loss in losses]}")
    else:
        schedule.step()
    return stage


if __name__ == "__main__":
    main(sys.argv[1])
    dist.destroy_process_group()
