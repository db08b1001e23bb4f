"""The flags of `plan`, and the values that their texts stand for."""

from __future__ import annotations

import argparse
import re

from planner.files.plan_rules import MAX_SEED
from planner.files.reading import MOST
from planner.links_command import add_link_flags
from planner.run_flags import add_run_flags, whole_number
from planner.version import version


def build_parser() -> argparse.ArgumentParser:
    """The parser of `plan`."""
    parser = argparse.ArgumentParser(
        prog="plan",
        description="Cut a model into pipeline stages: trace it, profile every layer, and solve for the balanced cut.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 outside --tolerance, 4 --check found a"
        " difference, 5 no plan fits, 130 interrupted",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL.py[:NAME]", help="the model file (see --example)")
    parser.add_argument("--gpus", type=whole_number(1), metavar="K", help="number of stages, exactly")
    parser.add_argument("--example", action="store_true", help="print a model file to start from")
    parser.add_argument("-o", "--output", metavar="FILE", help="the plan file (default NAME.plan.json here)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead of the table")
    parser.add_argument("--draw", metavar="FILE.svg", help="draw the layer graph, coloured by stage, with its cuts")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"evenstage {version()}")
    _add_model_flags(parser.add_argument_group("a Hugging Face model"))
    _add_graph_flags(parser.add_argument_group("a layer graph that came from elsewhere"))
    _add_planning_flags(parser.add_argument_group("what is planned for"))
    _add_profile_flags(parser.add_argument_group("the profile"))
    parser.add_argument("--train", action="store_true", help="then train the plan here and compare")
    add_run_flags(parser)
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hf", metavar="CONFIG.json", help="plan the model of this configuration, local files only")
    group.add_argument(
        "--sequence-length", type=whole_number(1), metavar="N", help="tokens a sample (default: 128, or what fits)"
    )


def _add_graph_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--graph", metavar="FILE", help="plan this node-link JSON instead of a model")
    group.add_argument("--objective", choices=["bottleneck"], help="minimise the largest stage load, not a step")
    group.add_argument("--no-transfers", action="store_true", help="with --objective: tensors cost nothing")
    group.add_argument("--cut-at", metavar="ID,ID…", help="score these cuts instead of searching")


def _add_planning_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size", type=whole_number(1), metavar="N", help="samples per step (default: the model's)"
    )
    group.add_argument("--microbatches", type=_microbatches, default="auto", metavar="N|auto", help="default: auto")
    group.add_argument("--schedule", choices=["gpipe", "1f1b"], help="default: gpipe, or what was measured")
    group.add_argument("--precision", type=_precision, metavar="fp32|bf16", help="default: the model's, else fp32")
    group.add_argument(
        "--bandwidth",
        type=_bandwidth,
        metavar="RATE",
        help="of each link: 12GB/s (bytes), 100Gb/s (bits); default: free",
    )
    add_link_flags(group)
    group.add_argument(
        "--memory", type=_memory, metavar="SIZE", help="what each stage may need, e.g. 24GiB (default: the GPU's)"
    )
    group.add_argument("--plain", action="store_true", help="only cuts that stock torch does rightly by split_spec")
    group.add_argument(
        "--granularity",
        choices=["module", "operation", "auto"],
        help="cut before modules (default), before any operation, or before operations of layers too large to balance",
    )
    group.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, metavar="S", help="default: 0")
    group.add_argument(
        "--meta", action="store_true", help="the model exceeds this machine: no process holds more than its part of it"
    )


def _add_profile_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    group.add_argument("--profile", metavar="FILE", help="plan from this profile, without hardware")
    group.add_argument(
        "--estimate",
        action="store_true",
        help="run nothing: time from FLOPs and bytes at the peak of a device, for a first look",
    )
    group.add_argument(
        "--peak",
        metavar="NAME|FLOPS,BYTES/s",
        help="of that device: h100, a100, … or e.g. 67T,3.35T (default: one thread of this CPU)",
    )
    group.add_argument("--fresh", action="store_true", help="measure again even where a fitting profile exists")
    group.add_argument(
        "--from-measurement",
        nargs="+",
        metavar="FILE",
        help="correct a profile (NAME.profile.json, or --profile) by what runs measured, oldest first, and plan again",
    )


def _microbatches(text: str) -> int | None:
    return None if text == "auto" else whole_number(1)(text)


def _precision(text: str) -> str:
    if text in ("fp32", "bf16"):
        return text
    from planner.tracing.loading import FP16_RULE

    raise argparse.ArgumentTypeError(FP16_RULE if text == "fp16" else f"got {text!r}; it is fp32 or bf16")


def _memory(text: str) -> int:
    """Bytes: a number with a unit, e.g. 24GiB, 80GB, 512MiB, 1000B."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", text.strip())
    size = float(found[1]) * units.get(found[2], 0) if found else 0.0
    value = int(size) if size <= MOST else 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be a size such as 24GiB, 80GB or 512MiB")
    return value


def _bandwidth(text: str) -> float:
    """`parse_bandwidth` for argparse."""
    from planner.bandwidth import parse_bandwidth

    try:
        return parse_bandwidth(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
