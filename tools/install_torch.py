"""Installs PyTorch into the environment of the Python that runs this file. Standard library only.

On Linux PyPI's torch needs gigabytes of CUDA libraries. Without an NVIDIA GPU those are of no use, so the CPU build is
asked for by its local version, `2.13.0+cpu`. PyPI holds no local versions: nothing but a CPU build can answer, whatever
the index, the mirror or the version of pip, and where there is none nothing is downloaded.
"""

import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TESTED = "2.13.0"  # what the tests run on
LEAST = "2.11"  # a torch from here on that is already in the environment stays
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

PRINT_VERSION = "import torch; print(torch.__version__)"
Runner = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True, slots=True)
class Install:
    """One attempt: what is said about it, and what pip is asked for."""

    announcement: str
    arguments: tuple[str, ...]


def choose_installs(system: str, has_nvidia_gpu: bool) -> list[Install]:
    """What to try, in turn, until one succeeds."""
    if has_nvidia_gpu:
        return [Install("NVIDIA GPU found: installing torch with CUDA (gigabytes)", (f"torch>={LEAST}",))]
    if system != "Linux":
        return [Install(f"installing torch {TESTED}", (f"torch=={TESTED}",))]  # elsewhere every build is a CPU build
    wanted = f"torch=={TESTED}+cpu"
    return [
        Install(f"no NVIDIA GPU: installing the CPU build of torch {TESTED}", (wanted,)),
        Install(f"fetching it from {CPU_INDEX}", (wanted, "--extra-index-url", CPU_INDEX)),
    ]


def install_torch(python: str, system: str, run: Runner, say: Callable[[str], None]) -> None:
    """Install torch for `python` unless one that serves is there. Raises SystemExit where every attempt failed."""
    found = run([python, "-c", PRINT_VERSION])
    if found.returncode == 0 and _release(found.stdout) >= _release(LEAST):
        say(f"torch {found.stdout.strip()} is installed")
        return
    failed = None
    for install in choose_installs(system, has_nvidia_gpu=run(["nvidia-smi", "-L"]).returncode == 0):
        say(install.announcement)
        failed = run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *install.arguments])
        if failed.returncode == 0:
            return
    reason = failed.stderr.strip().splitlines()[-1:] if failed else []
    raise SystemExit(
        f"torch could not be installed: {' '.join(reason)}\n"
        f"install torch {LEAST} or newer yourself, then call make again: {python} -m pip install torch"
    )


def run_command(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run `command` and catch what it prints; a program that is not there fails like one that ran."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (2, 13) of "2.13.0+cpu"."""
    return tuple(int(number) for number in version.strip().split(".")[:2])


if __name__ == "__main__":
    install_torch(sys.executable, platform.system(), run_command, print)
