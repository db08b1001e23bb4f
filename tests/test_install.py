"""tools/install_torch.py: which torch is asked for on which machine. Nothing is installed and no network is used."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

QUIETLY = ("--quiet", "--disable-pip-version-check")
TOOL = Path(__file__).parents[1] / "tools" / "install_torch.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("install_torch", TOOL)
    module = importlib.util.module_from_spec(specification)
    sys.modules["install_torch"] = module
    specification.loader.exec_module(module)
    return module


class FakeMachine:
    """Answers commands as a machine would that has this torch and this GPU, and where these pip requests succeed."""

    def __init__(self, torch: str | None = None, gpu: bool = False, pip_succeeds: tuple[bool, ...] = (True,)) -> None:
        self.torch = torch
        self.gpu = gpu
        self.pip_succeeds = list(pip_succeeds)
        self.asked_for: list[tuple[str, ...]] = []

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 0 if self.gpu else 127, "GPU 0" if self.gpu else "", "")
        if command[1] == "-c":
            return subprocess.CompletedProcess(command, 0 if self.torch else 1, f"{self.torch}\n", "")
        assert command[1:4] == ["-m", "pip", "install"]
        self.asked_for.append(tuple(part for part in command[4:] if part not in QUIETLY))
        if self.pip_succeeds.pop(0):
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, 1, "", "note\nERROR: no wheel")


def install(tool: ModuleType, machine: FakeMachine, system: str = "Linux") -> list[str]:
    said: list[str] = []
    tool.install_torch("python", system, machine.run, said.append)
    return said


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_a_torch_that_serves_stays(tool: ModuleType, version: str) -> None:
    machine = FakeMachine(torch=version, gpu=True)
    assert install(tool, machine) == [f"torch {version} is installed"]
    assert machine.asked_for == []


@pytest.mark.parametrize("version", [None, "2.9.1", "2.10.0+cpu"])
def test_without_a_gpu_only_a_cpu_build_can_answer(tool: ModuleType, version: str | None) -> None:
    machine = FakeMachine(torch=version)
    assert len(install(tool, machine)) == 1
    assert machine.asked_for == [("torch==2.13.0+cpu",)]


def test_pytorchs_own_index_is_asked_when_pips_has_no_cpu_build(tool: ModuleType) -> None:
    machine = FakeMachine(pip_succeeds=(False, True))
    install(tool, machine)
    assert machine.asked_for[1] == ("torch==2.13.0+cpu", "--extra-index-url", "https://download.pytorch.org/whl/cpu")


def test_with_a_gpu_the_plain_build_is_installed(tool: ModuleType) -> None:
    machine = FakeMachine(gpu=True)
    install(tool, machine)
    assert machine.asked_for == [("torch>=2.11",)]


def test_elsewhere_the_plain_build_is_a_cpu_build(tool: ModuleType) -> None:
    machine = FakeMachine()
    install(tool, machine, system="Darwin")
    assert machine.asked_for == [("torch==2.13.0",)]


def test_failure_says_pips_reason_and_the_remedy(tool: ModuleType) -> None:
    machine = FakeMachine(pip_succeeds=(False, False))
    with pytest.raises(SystemExit, match=r"ERROR: no wheel\n.*python -m pip install torch"):
        install(tool, machine)


def test_a_program_that_is_not_there_fails_like_one_that_ran(tool: ModuleType) -> None:
    assert tool.run_command(["no-such-program-of-ours"]).returncode == 127
