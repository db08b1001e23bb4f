"""`plan --links FILE` and `plan --measure-links`: what the command line says → what crossings are charged by."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import UsageError

if TYPE_CHECKING:
    from planner.files.links_file import LinkFit, Links
    from planner.files.profile_file import Profile
    from planner.request import PlanRequest


def add_link_flags(parser: argparse._ArgumentGroup) -> None:
    """Add the two flags."""
    parser.add_argument(
        "--links", metavar="FILE", help="charge crossings as measured by torchrun … -m planner.machine.links -o FILE"
    )
    parser.add_argument(
        "--measure-links", action="store_true", help="measure the links between K local workers, and charge by them"
    )


def refuse_link_flags(flags: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go together."""
    rule = "crossings are charged by one of the three"
    given = {"--links": flags.links, "--measure-links": flags.measure_links or None, "--bandwidth": flags.bandwidth}
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise UsageError(" and ".join(names), rule, f"leave {names[-1]} out")
    if flags.graph is not None and names and names[0] != "--bandwidth":
        raise UsageError(f"--graph and {names[0]}", "a graph has the transfers of its tensors", f"leave {names[0]} out")
    if flags.measure_links and flags.gpus == 1:
        raise UsageError("--measure-links with --gpus 1", "a link has two ends", "leave --measure-links out")


def given_links(flags: argparse.Namespace) -> LinkFit | None:
    """What `--links` names, read before anything is measured. Raises FileError."""
    from planner.files.links_file import Links

    return None if flags.links is None else Links.load(flags.links).fit


def linked(flags: argparse.Namespace, request: PlanRequest, profile: Profile, output: Path) -> PlanRequest:
    """`request` with measured links where they are wanted; those measured here are written beside the plan.

    Raises UsageError for links of another kind of device than the profile's.
    """
    from dataclasses import replace

    from planner.files.links_file import Links

    if flags.links is not None:
        links, what = Links.load(flags.links), f"--links {flags.links}"
    elif flags.measure_links:
        links, what = _measured(flags, request, profile), "--measure-links"
    else:
        return request
    if links.machine.device != profile.machine.device:
        raise UsageError(
            f"{what}: links of {links.machine.device}, and a profile of {profile.machine.device}",
            "both are measured where the pipeline will run",
            "measure the links there and give them with --links",
        )
    if flags.measure_links:
        path = output.with_name(output.name.removesuffix(".json").removesuffix(".plan") + ".links.json")
        links.save(path)
        print(f"wrote {path}", file=sys.stderr)
    return replace(request, links=links.fit)


def _measured(flags: argparse.Namespace, request: PlanRequest, profile: Profile) -> Links:
    from planner.machine.links import measure_links, messages_of

    print(f"measuring the links of {request.gpus} workers", file=sys.stderr, flush=True)
    kind = (flags.device or profile.machine.device).partition(":")[0]
    return measure_links(request.gpus, messages_of(profile), device=kind)
