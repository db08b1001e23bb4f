"""How much tracing, cutting and building the stages of a deep Llama add to the bare export.

python benchmarks/tracing.py [--layers 96] [--stages 4] [--profile]

Prints a line per part, in seconds of this process's CPU time, and the ratio of "traced, cut and ready" to the export:
what `pipeline()` takes with a plan's policy in it (its own export included) and the building of one stage.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.pipelining import pipeline
from transformers import LlamaConfig, LlamaForCausalLM

from planner.tracing.explaining import quiet_export
from planner.tracing.exporting import read_trace
from planner.tracing.rewriting import apply_cuts
from planner.tracing.split_policy import show_first_names_to_pipeline
from runner.stages import never_written_as_code

SAMPLES, TOKENS, VOCABULARY = 2, 16, 97


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="show where the time goes in what is not the export")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, seconds in measure(arguments.layers, arguments.stages, show_profile=arguments.profile).items():
        print(f"{name:32} {seconds:8.2f}")


def measure(num_layers: int, num_stages: int, *, show_profile: bool = False) -> dict[str, float]:
    """CPU seconds of every part, and at the end the ratio of the whole to the bare export."""
    _export(_llama(1))  # what torch imports at the first export
    seconds: dict[str, float] = {}
    _timed(seconds, "torch.export.export", lambda: _export(_llama(num_layers)))
    policy = _TimedPolicy(_llama(num_layers), num_stages, seconds)
    profile = cProfile.Profile()
    if show_profile:
        profile.enable()
    pipe = _timed(seconds, "pipeline() with the policy in it", policy.run)
    _timed(seconds, "build_stage", lambda: pipe.build_stage(1, torch.device("cpu"), _group()))
    if show_profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
    whole = seconds["pipeline() with the policy in it"] + seconds["build_stage"]
    seconds["traced, cut and ready ÷ export"] = whole / seconds["torch.export.export"]
    return seconds


def _timed(seconds: dict[str, float], name: str, call: Callable[[], Any]) -> Any:
    started = time.process_time()
    result = call()
    seconds[name] = time.process_time() - started
    return result


def _llama(num_layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=num_layers,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (SAMPLES, TOKENS))}


def _export(model: torch.nn.Module) -> Any:
    with quiet_export():
        return torch.export.export(model, (), _inputs())


def _group() -> Any:
    import torch.distributed as dist

    dist.init_process_group("fake", rank=1, world_size=4, store=dist.HashStore())
    return dist.group.WORLD


class _TimedPolicy:
    """Cuts between equal numbers of layers, and notes what reading and cutting take."""

    def __init__(self, model: LlamaForCausalLM, num_stages: int, seconds: dict[str, float]) -> None:
        self.model, self.num_stages, self.seconds = model, num_stages, seconds

    def run(self) -> Any:
        """What `pipeline()` makes of the model."""
        with quiet_export():
            return pipeline(self.model, (), _inputs(), split_policy=self)

    def __call__(self, gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """The policy that `pipeline()` calls."""
        never_written_as_code(gm)
        show_first_names_to_pipeline(self.model)
        trace = _timed(self.seconds, "  of it reading the layers", lambda: read_trace(gm, self.model))
        count = len(trace.layers)
        starts = [trace.layers[count * k // self.num_stages].start for k in range(1, self.num_stages)]
        _timed(self.seconds, "  of it cutting", lambda: apply_cuts(gm, starts))
        return gm


if __name__ == "__main__":
    main()
