"""Links between neighbouring workers, measured in the topology that the pipeline will run in.

torchrun --nnodes 2 --nproc-per-node 4 … -m planner.machine.links -o links.json

`plan --measure-links` starts local workers for it. Messages go the way of torch's schedules: one `batch_isend_irecv`
whose operations are the tensors of a boundary. A schedule posts a receive when the stage has nothing else to do, and
waits for it at once; a send is waited for after later work. So a crossing takes two times, both by the wall clock: what
posting the send holds up the sender, and what the receive takes from being posted until the data are there, the send
having been posted before. What the transport does beside the sender's next work is overlapped and not counted. On a
CPU whose workers have no core each, the receive contains the waiting for a core of whoever carries the data.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from planner.errors import UsageError
from planner.files.links_file import Links, LinkSample
from planner.files.profile_file import Profile
from planner.machine.workers import as_worker, run_workers

if TYPE_CHECKING:
    from planner.machine.device import Device

NUM_SIZES = 6
NUM_ROUNDS, WARM_UP_ROUNDS = 25, 3
MOST_TENSORS = 8
DEFAULT_BYTES = (4 * 2**10, 64 * 2**20)
TOKEN_TAG = 1
TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Messages:
    """The messages to send: every number of bytes in every number of tensors."""

    num_bytes: tuple[int, ...]
    num_tensors: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of the number of tensors and the bytes of each of them."""
        return ((tensors, max(1, size // tensors)) for tensors, size in product(self.num_tensors, self.num_bytes))


def spaced_messages(least_bytes: int, most_bytes: int, most_tensors: int = 1) -> Messages:
    """Log-spaced sizes between two, each as one tensor and as several, without which no latency per tensor is seen.

    >>> spaced_messages(1000, 32000)
    Messages(num_bytes=(1000, 2000, 4000, 8000, 16000, 32000), num_tensors=(1, 2))
    """
    ratio = most_bytes / least_bytes
    sizes = {round(least_bytes * ratio ** (step / (NUM_SIZES - 1))) for step in range(NUM_SIZES)}
    return Messages(tuple(sorted(sizes)), (1, max(2, min(most_tensors, MOST_TENSORS))))


def messages_of(profile: Profile) -> Messages:
    """Messages over the range of what crosses the cuts of `profile`, at all its microbatch sizes, either way.

    One size alone would tell no latency from a rate: then from a sixteenth of it on.
    """
    sizes, counts = [], [1]
    for size in profile.sizes:
        for cut in range(1, len(size.layers)):
            across = [t for t in size.tensors if t.consumers and t.producer < cut <= max(t.consumers)]
            sizes += [sum(t.num_bytes for t in across), sum(t.gradient_bytes for t in across)]
            counts.append(len(across))
    sizes = [size for size in sizes if size > 0]
    if not sizes:
        return spaced_messages(*DEFAULT_BYTES)
    return spaced_messages(max(1, min(min(sizes), max(sizes) // 16)), max(sizes), max(counts))


def measure_links(
    num_workers: int, messages: Messages, *, device: str | None = None, rounds: int = NUM_ROUNDS
) -> Links:
    """Measure the links of `num_workers` local workers, pair by pair.

    Raises UsageError for fewer than two workers or too few devices, RunError where a worker fails.
    """
    from planner.machine.device import worker_environment

    if num_workers < 2:
        raise UsageError(f"links of {num_workers} worker", "a link has two ends", "measure with two or more")
    kind = _kind(device)
    with tempfile.TemporaryDirectory(prefix="evenstage-links-") as folder:
        result = Path(folder, "links.json")
        arguments = ["-o", str(result), "--rounds", str(rounds), *(["--device", device] if device else [])]
        arguments += ["--bytes", ",".join(map(str, messages.num_bytes))]
        arguments += ["--tensors", ",".join(map(str, messages.num_tensors))]
        run_workers("planner.machine.links", arguments, num_workers, worker_environment(kind))
        return Links.load(result)


def _kind(device: str | None) -> str:
    if device is not None:
        return device.partition(":")[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_as_worker(output: Path, messages: Messages, device_name: str | None, rounds: int) -> None:
    """What every worker does; the first writes `output`. Raises UsageError where torchrun did not start it."""
    import torch
    import torch.distributed as dist

    from planner.files.reading import refuse_unwritable
    from planner.machine.device import choose_device, describe_machine
    from planner.machine.link_fit import fit_links

    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        remedy = "torchrun --nproc-per-node K -m planner.machine.links -o links.json"
        raise UsageError("links without torchrun", "every stage's place must have its worker", remedy)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world < 2:
        raise UsageError(f"links of {world} worker", "a link has two ends", "start as many workers as stages")
    if rank == 0:
        refuse_unwritable(output, f"-o {output}")
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", rank)))
    if device.clock == "thread-cpu":
        torch.set_num_threads(1)
    backend = "gloo" if device.clock == "thread-cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    dist.all_reduce(torch.zeros(1, device=device.torch_device))  # NCCL wants its first operation from all
    samples = _sample_all(rank, world, messages, device, rounds)
    if rank == 0:
        name = "gloo" if device.clock == "thread-cpu" else "nccl"
        Links(describe_machine(device), name, world, rounds, samples, fit_links(samples)).save(output)


def _sample_all(rank: int, world: int, messages: Messages, device: Device, rounds: int) -> tuple[LinkSample, ...]:
    """Every pair of neighbours by itself, forward and backward; all ranks get all medians."""
    import torch
    import torch.distributed as dist

    kinds = tuple(messages)
    taken = torch.zeros(world - 1, 2, len(kinds), 2, dtype=torch.float64)  # pair, way, kind, (send, receive)
    for pair in range(world - 1):
        dist.barrier()
        if rank in (pair, pair + 1):
            lower = rank == pair
            sent, received = _exchange(lower, pair + lower, kinds, device, rounds)
            taken[pair, 0 if lower else 1, :, 0] = torch.tensor(sent, dtype=torch.float64)
            taken[pair, 1 if lower else 0, :, 1] = torch.tensor(received, dtype=torch.float64)
    dist.all_reduce(taken)
    return tuple(
        LinkSample(pair + way, pair + 1 - way, count, count * each, *taken[pair, way, kind].tolist())
        for pair, way in product(range(world - 1), (0, 1))
        for kind, (count, each) in enumerate(kinds)
    )


def _exchange(
    lower: bool, peer: int, kinds: Sequence[tuple[int, int]], device: Device, rounds: int
) -> tuple[list[float], list[float]]:
    """One end's medians of sending and of receiving, per kind; kinds and ways take turns, so that drift meets all."""
    tensors = [_tensors(count, each, device) for count, each in kinds]
    sent: list[list[float]] = [[] for _ in kinds]
    received: list[list[float]] = [[] for _ in kinds]
    for _ in range(WARM_UP_ROUNDS + rounds):
        for kind, own in enumerate(tensors):
            for sends in (lower, not lower):
                if sends:
                    sent[kind].append(_send(own, peer, device))
                else:
                    received[kind].append(_receive(own, peer, device))
    return _medians(sent), _medians(received)


def _medians(times: Sequence[Sequence[float]]) -> list[float]:
    return [median(own[WARM_UP_ROUNDS:]) for own in times]


def _send(tensors: list[Any], receiver: int, device: Device) -> float:
    """Milliseconds that posting holds up the sender; returns once the receiver has everything."""
    import torch
    import torch.distributed as dist

    token = torch.zeros(1)
    start = time.perf_counter()
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, receiver) for tensor in tensors])
    taken = (time.perf_counter() - start) * 1e3
    dist.send(token, receiver, tag=TOKEN_TAG)
    _wait(works, device)
    dist.recv(token, receiver, tag=TOKEN_TAG)
    return taken


def _receive(tensors: list[Any], sender: int, device: Device) -> float:
    """Milliseconds from posting the receive, after the send was posted, until the data are there."""
    import torch
    import torch.distributed as dist

    token = torch.zeros(1)
    dist.recv(token, sender, tag=TOKEN_TAG)
    start = time.perf_counter()
    works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, tensor, sender) for tensor in tensors])
    _wait(works, device)
    taken = (time.perf_counter() - start) * 1e3
    dist.send(token, sender, tag=TOKEN_TAG)
    return taken


def _tensors(count: int, each: int, device: Device) -> list[Any]:
    import torch

    return [torch.zeros(each, dtype=torch.uint8, device=device.torch_device) for _ in range(count)]


def _wait(works: Sequence[Any], device: Device) -> None:
    for work in works:
        work.wait()
    if device.clock == "cuda-event":
        import torch

        torch.cuda.synchronize(device.torch_device)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be whole numbers, at least 1, with commas between")
    return tuple(map(int, parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun … -m planner.machine.links",
        description="Measure the links between neighbouring workers, one worker per stage, for plan --links FILE.",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the links go")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="send what crosses the cuts of this profile")
    parser.add_argument("--bytes", type=_numbers, metavar="N,N…", help="sizes of messages (default: 4 KiB to 64 MiB)")
    parser.add_argument("--tensors", type=_numbers, default=(1, 2), metavar="N,N…", help="tensors of each (1,2)")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS, metavar="N", help=f"default: {NUM_ROUNDS}")
    return parser


def _main(flags: argparse.Namespace) -> None:
    if flags.profile is not None:
        messages = messages_of(Profile.load(flags.profile))
    else:
        messages = Messages(flags.bytes or spaced_messages(*DEFAULT_BYTES).num_bytes, flags.tensors)
    measure_as_worker(flags.output, messages, flags.device, max(1, flags.rounds))


if __name__ == "__main__":
    arguments = _parser().parse_args()
    as_worker(lambda: _main(arguments))
