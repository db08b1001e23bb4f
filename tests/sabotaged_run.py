"""A run in which one thing is wrong, as $SABOTAGE says: what --check must find."""

import os
import sys

import torch


def sabotage(kind: str) -> None:
    if kind == "weight":
        import runner.training as training

        original = training.Trainer.__init__

        def perturbed(self, *args, **kwargs):
            original(self, *args, **kwargs)
            for name, parameter in self.stage.submod.named_parameters():
                if name == "layers.2.norm.weight":
                    with torch.no_grad():
                        parameter += 1e-3

        training.Trainer.__init__ = perturbed
    if kind == "tied":
        import runner.training as training

        training.sum_tied_gradients = lambda tied, stage: None
    if kind == "inputs":
        import planner.tracing.rewriting as rewriting

        original_alias = rewriting._bind_inputs

        def swapped(graph, anchor, stage):
            aliases = original_alias(graph, anchor, stage)
            aliases[0].prepend(aliases[1])  # torch binds inputs in order of first use
            return aliases

        rewriting._bind_inputs = swapped
    if kind == "disk":
        import runner.weights as weights
        from planner.errors import FileError

        def full(path, _):
            raise FileError(f"cannot write {path}: No space left on device")

        weights.write_weights = full


if __name__ == "__main__":
    if "RANK" in os.environ:
        from planner.machine.workers import as_worker
        from runner.worker import main

        sabotage(os.environ["SABOTAGE"])
        as_worker(main)
    else:
        from planner.command import guarded
        from runner.cli import launch
        from runner.options import parse_options

        options = parse_options(sys.argv[1:])
        sys.exit(guarded("run-plan", lambda: launch(options, sys.argv[1:], "tests.sabotaged_run"), debug=False))
