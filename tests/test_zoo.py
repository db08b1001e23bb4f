"""The zoo: models that nobody tuned evenstage to, planned and trained as the eager model or refused with a reason.

The fast slice is part of every test run; `make zoo` attempts all and writes the table in docs/zoo.md.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from planner.files.measurement_file import Measurement
from planner.tracing.loading import load_source
from tests.running import command
from tests.zoo.attempting import STAGES, attempt, plan_of, profile_of, zoo_files

FILES = {file.stem: file for kind in ("huggingface", "plain") for file in zoo_files(kind)}
FAST = [
    "gan_generator",
    "inplace_on_keyword",
    "lstm",
    "mixer",
    "state_in_forward",
    "tied_module",
    "two_outputs_function",
]
FAST += ["llama", "two_towers", "unused_keyword"]
OVER_PROCESSES = ["inplace_on_keyword", "mixer", "marian"]
REFUSED = ["llama_with_cache", "transformer_mask_by_value"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Faster than two on small models and a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAST)
def test_three_stages_in_one_process_train_as_the_eager_model(name: str) -> None:
    came = attempt(FILES[name], stages=(3,))
    assert came.is_equal, (came.refusal, came.differences)


@pytest.mark.parametrize("name", OVER_PROCESSES)
def test_three_processes_train_as_the_eager_model(name: str, tmp_path: Path) -> None:
    plan_of(profile_of(load_source(str(FILES[name]))), 3).save(tmp_path / "x.plan.json")
    ended = command("x.plan.json", "--steps", 2, "--check", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    check = Measurement.load(tmp_path / "run" / "measurement.json").check
    assert check is not None and check.steps == 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_cannot_export_is_refused_and_its_file_names_the_issue(name: str) -> None:
    came = attempt(FILES[name])
    assert "cannot be exported" in came.refusal and came.torch_issue.startswith("https://github.com/pytorch/")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in FILES if name not in REFUSED])
def test_every_model_is_planned_and_trained_as_the_eager_model(name: str) -> None:
    came = attempt(FILES[name])
    assert came.is_equal and tuple(came.differences) == STAGES, (came.refusal, came.differences)


def test_the_zoo_holds_what_it_promises() -> None:
    promised = {"gpt2", "gpt_neo", "llama", "qwen2", "mistral", "gemma", "phi", "opt", "bloom", "falcon", "bert"}
    promised |= {"roberta", "deberta_v2", "xlnet", "t5", "bart", "mbart", "marian", "vit", "clip", "whisper"}
    promised |= {"mixtral", "mamba", "segformer"}
    assert promised <= {file.stem for file in zoo_files("huggingface")}
    assert len(zoo_files("plain")) >= 16
