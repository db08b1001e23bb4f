"""The flags of a run, defined once: `run-plan` takes them, and `plan --train` takes them and hands them on."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

AGAINST = {
    "equal": "equal_layers",
    "parameters": "equal_parameters",
    "torchgpipe": "torchgpipe",
    "accelerate": "accelerate",
}


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a plan is trained and what is compared."""
    group = parser.add_argument_group("training a plan (run-plan, and plan --train)")
    group.add_argument("--steps", type=whole_number(0), metavar="N", help="train N steps (default 20; 8 rehearsed)")
    group.add_argument(
        "--check",
        action="store_true",
        help="train the unsplit model beside it and compare losses, gradients and parameters; exit 4 on a difference",
    )
    group.add_argument(
        "--tolerance",
        type=_fraction,
        metavar="SHARE",
        help="exit 3 where a stage's measured share of the work is off by more, e.g. 0.1 or 10%%",
    )
    group.add_argument("--export-weights", metavar="FILE", help="write the trained weights as safetensors")
    group.add_argument(
        "--weights", metavar="FILE|DIR", help="start from safetensors (a sharded index too) instead of fresh weights"
    )
    group.add_argument("--stock", action="store_true", help="apply a plain chain by split_spec, as stock torch would")
    group.add_argument(
        "--against", choices=sorted(AGAINST), help="alternate steps with another cut and print the measured speed-up"
    )
    group.add_argument(
        "--tensorboard",
        metavar="DIR",
        help="profile the last 4 steps on every rank (no times are taken from them) and write the traces, and the"
        " predicted and measured step, for TensorBoard's profiler plugin",
    )
    group.add_argument(
        "--rehearse",
        action="store_true",
        help="run the stages one after the other on one device, with real activations and gradients, and simulate the"
        " step from their measured times",
    )
    group.add_argument(
        "--drift",
        metavar="PROFILE",
        help="afterwards profile the model again, and say how far the machine drifted since PROFILE, the plan's own",
    )
    group.add_argument("--run-dir", metavar="DIR", help="where the report goes (default runs/NAME-TIME)")


def run_arguments(flags: argparse.Namespace) -> list[str]:
    """The flags of `add_run_flags` that were given, as a command line."""
    arguments: list[str] = []
    for name in ("steps", "tolerance", "export_weights", "weights", "against", "tensorboard", "drift", "run_dir"):
        value = getattr(flags, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    arguments += [f"--{name}" for name in ("check", "stock", "rehearse") if getattr(flags, name)]
    return arguments


def whole_number(least: int, most: int = 10**9 - 1) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`, for argparse.

    >>> whole_number(1)("4")
    4
    """

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,40}", text) or not least <= int(text) <= most:
            above = "" if not re.fullmatch(r"\d+", text) or len(text) < 10 else f" and at most {most:,}"
            raise argparse.ArgumentTypeError(f"got {text!r}; it must be a whole number, at least {least}{above}")
        return int(text)

    return parse


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 10:
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be a share such as 0.1 or 10%")
    return value
