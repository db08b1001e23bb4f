"""The commands as a user types them: plan, run-plan, plan-report; help, bad input, exit codes."""

import argparse
import json
import subprocess
import sys
import time

import pytest

from planner.cli import main
from planner.errors import UsageError
from planner.files.plan_file import Plan
from planner.files.plan_rules import MOST_MICROBATCHES
from planner.files.profile_file import Profile
from planner.machine.device import available_cores
from planner.plan_flags import _bandwidth, build_parser
from planner.request import PlanRequest, candidate_counts
from tests.running import ROOT, command


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A small model, profiled and planned for three stages once."""
    folder = tmp_path_factory.mktemp("planned")
    text = (ROOT / "tests" / "models" / "plain.py").read_text()
    (folder / "model.py").write_text(text.replace("BATCH_SIZE = 8", "BATCH_SIZE = 12"))
    ended = command("--gpus", 3, "model.py", "--microbatches", 4, module="planner", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder, ended


def test_plan_writes_plan_and_profile_and_shows_the_proof(planned):
    folder, ended = planned
    plan = Plan.load(folder / "model.plan.json")
    assert (plan.num_stages, plan.num_microbatches, plan.microbatch_size) == (3, 4, 3)
    assert plan.model.file == "model.py"
    assert "optimal" in ended.stdout and ended.stdout.rstrip().endswith("wrote model.plan.json, model.profile.json")
    profile = Profile.load(folder / "model.profile.json")
    assert profile.model.file == "model.py" and profile.concurrent_copies == min(3, 2 * available_cores())
    for size in profile.sizes:
        assert size.boundary_forward_ms > 0 and size.boundary_backward_ms > 0
        assert len(size.periods) == 4 and abs(sum(size.periods)) < 1e-9


def test_bound_step_and_baselines_are_in_order(planned):
    plan = Plan.load(planned[0] / "model.plan.json")
    assert plan.status == "optimal"
    assert plan.lower_bound_ms <= plan.objective_ms == plan.step_ms
    assert {"equal_layers", "equal_parameters", "torchgpipe"} <= set(plan.baselines)
    for baseline in plan.baselines.values():
        assert plan.step_ms <= baseline.step_ms * (1 + 1e-9)
        assert len(baseline.cuts) == 2


def test_plan_file_round_trips_and_has_the_documented_keys(planned):
    path = planned[0] / "model.plan.json"
    plan, data = Plan.load(path), json.loads(path.read_text())
    assert plan.to_json() == path.read_text()
    documented = "schema model status objective_ms lower_bound_ms solver schedule num_microbatches microbatch_size"
    documented += " precision seed data_parallel step_ms plain_chain split_spec order recompute cuts stages baselines"
    assert set(f"{documented} microbatch_curve".split()) <= set(data)
    stage = "index rank nodes names forward_ms backward_ms load_ms peak_memory_bytes memory"
    assert set(stage.split()) <= set(data["stages"][0])
    assert sum(data["stages"][0]["memory"].values()) == data["stages"][0]["peak_memory_bytes"] > 0
    assert list(data["split_spec"].values()) == ["beginning", "beginning"]


def test_a_fitting_profile_is_reused_and_plans_other_counts_without_hardware(planned):
    folder, _ = planned
    again = command("--gpus", 3, "model.py", "--microbatches", 4, module="planner", cwd=folder)
    assert again.returncode == 0 and "reused" in again.stderr
    assert again.stdout.rstrip().endswith("wrote model.plan.json")
    other = command(
        "--gpus", 2, "--profile", "model.profile.json", "--microbatches", 4, "-o", "two.plan.json", "--json",
        module="planner", cwd=folder,
    )  # fmt: skip
    assert other.returncode == 0, other.stderr
    assert len(json.loads(other.stdout)["stages"]) == 2
    assert Plan.load(folder / "two.plan.json").num_stages == 2


def test_a_profile_under_gpipe_is_used_for_1f1b_and_the_plan_says_so(planned, tmp_path):
    profile = planned[0] / "model.profile.json"
    assert json.loads(profile.read_text())["schedule"] == "gpipe"
    ended = command(
        "--gpus", 3, "--profile", profile, "--microbatches", 4, "--schedule", "1f1b", "-o", tmp_path / "x.json",
        module="planner", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "profiled under gpipe in" in ended.stdout and "times under 1f1b may differ by some percent" in ended.stdout


def test_a_changed_model_is_profiled_again(planned, tmp_path):
    folder, _ = planned
    for name in ("model.py", "model.profile.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "model.py").write_text((folder / "model.py").read_text().replace("range(4)", "range(3)"))
    ended = command("--gpus", 3, "model.py", "--microbatches", 4, module="planner", cwd=tmp_path)
    assert ended.returncode == 0 and "not used: the model has changed since" in ended.stderr


def test_more_gpus_than_legal_cuts_is_exit_5(planned):
    ended = command(
        "--gpus", 12, "--profile", "model.profile.json", "--microbatches", 4, module="planner", cwd=planned[0]
    )
    assert ended.returncode == 5
    assert "cannot cut 9 layers into 12 stages" in ended.stderr and "--gpus 9" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_bandwidth_makes_crossings_cost(planned, tmp_path):
    arguments = ["--gpus", 3, "--profile", planned[0] / "model.profile.json", "--microbatches", 4, "--json"]
    free, slow = (
        json.loads(command(*arguments, *more, "-o", tmp_path / "x.json", module="planner", cwd=tmp_path).stdout)
        for more in ([], ["--bandwidth", "1MB/s"])
    )
    assert slow["step_ms"] > free["step_ms"] and slow["bandwidth_bytes_per_s"] == 1e6


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--gpus", "2", "nothing.py"], 2, "nothing.py is not a file"),
        (["--gpus", "2"], 2, "neither a model file nor --profile"),
        (["model.py"], 2, "no --gpus"),
        (["--gpus", "0", "model.py"], 2, "at least 1"),
        (["--gpus", "two", "model.py"], 2, "whole number"),
        (["--gpus", "2", "model.py", "--profile", "x.json"], 2, "one of the two"),
        (["--gpus", "2", "model.py", "--steps", "3"], 2, "--steps without --train"),
        (["--gpus", "2", "model.py", "--microbatches", "5"], 2, "use --microbatches 4"),
        (["--gpus", "2", "model.py", "--bandwidth", "fast"], 2, "12GB/s"),
        (["--gpus", "2", "model.py", "--device", "tpu"], 2, "cpu, cuda"),
        (["--gpus", "2", "--profile", "none.json"], 2, "does not exist"),
        (["--gpus", "2", "--profile", "truncated.json"], 2, "not complete JSON"),
        (["--gpus", "2", "--profile", "negative.json", "--microbatches", "4"], 2, "forward_ms"),
        (["--gpus", "2", "--profile", "other.json"], 2, "evenstage/other/1"),
        (["--gpus", "2", "broken.py"], 2, "broken.py:1"),
        (
            ["--gpus", "2", "branching.py", "--microbatches", "2"],
            2,
            "branching.py:6: x = self.a(x); return x if x.sum() > 0 else -x",
        ),
    ],
)
def test_bad_input_is_one_clear_error(planned, tmp_path, arguments, code, expected):
    folder, _ = planned
    profile = json.loads((folder / "model.profile.json").read_text())
    (tmp_path / "model.py").write_text((folder / "model.py").read_text())
    (tmp_path / "truncated.json").write_text(json.dumps(profile)[:-40])
    profile["sizes"][0]["layers"][2]["forward_ms"] = -1.0
    (tmp_path / "negative.json").write_text(json.dumps(profile))
    (tmp_path / "other.json").write_text('{"schema": "evenstage/other/1"}')
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken on purpose')\n")
    branching = (
        "import torch\nclass B(torch.nn.Module):\n    def __init__(self):\n        super().__init__()"
        "; self.a = torch.nn.Linear(2, 2)\n    def forward(self, x):\n"
        "        x = self.a(x); return x if x.sum() > 0 else -x\n"
    )
    branching += "def build_model(): return B()\ndef make_batch(n): return torch.ones(n, 2), torch.ones(n)\n"
    (tmp_path / "branching.py").write_text(branching + "def loss_fn(o, t): return o.sum()\nBATCH_SIZE = 4\n")
    before = {path.name for path in tmp_path.iterdir()}
    ended = command(*arguments, module="planner", cwd=tmp_path)
    assert ended.returncode == code, ended.stderr
    assert expected in ended.stderr and "Traceback" not in ended.stderr
    assert {path.name for path in tmp_path.iterdir() if path.name != "__pycache__"} == before


def test_run_plan_refuses_what_cannot_run(planned, tmp_path):
    folder, _ = planned
    plan = folder / "model.plan.json"
    for arguments, expected in [
        ([tmp_path / "none.json"], "does not exist"),
        ([plan, "--against", "torchgpipe"], None),
        ([plan, "--model", tmp_path / "gone.py", "--steps", 1], "gone.py is not a file"),
        ([plan, "--device", "cuda"], "CUDA device"),
    ]:
        if expected is None:
            continue
        ended = command(*arguments, cwd=tmp_path)
        assert ended.returncode == 2 and expected in ended.stderr and "Traceback" not in ended.stderr


def test_help_is_light():
    """No heavy import, and quick: at most 8 times a bare interpreter."""
    code = (
        "import sys\nfrom planner.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'networkx', 'pulp', 'numpy', 'rich', 'runner') if m in sys.modules]\n"
        "print('heavy:', heavy)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "heavy: []" in ended.stdout and "--gpus" in ended.stdout

    def fastest(*arguments):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest("-m", "planner", "--help") < 8 * fastest("-c", "pass")


def test_example_is_a_model_file_that_plans(tmp_path, capsys):
    assert main(["--example"]) == 0
    (tmp_path / "model.py").write_text(capsys.readouterr().out)
    ended = command("--gpus", 2, "model.py", "--microbatches", 4, module="planner", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_every_flag_of_a_run_is_explained_by_plan_too():
    from runner.options import build_parser as build_run_parser

    own = {option for action in build_parser()._actions for option in action.option_strings}
    runs = {option for action in build_run_parser()._actions for option in action.option_strings}
    assert runs - own <= {"--model", "--quiet"}


def test_candidates_are_the_divisors_from_the_number_of_stages_up():
    assert candidate_counts(24, PlanRequest(gpus=4)) == (4, 6, 8, 12, 24)
    assert candidate_counts(2, PlanRequest(gpus=4)) == (2,)


def test_a_step_has_a_limited_number_of_microbatches():
    assert candidate_counts(2**20, PlanRequest(gpus=4))[-1] == MOST_MICROBATCHES == 2**14
    for batch_size, microbatches in ((1_000_003, None), (2**20, 2**15)):
        with pytest.raises(UsageError, match="at most 16,384"):
            candidate_counts(batch_size, PlanRequest(gpus=4, microbatches=microbatches))
    with pytest.raises(UsageError, match="at most 16,384"):
        candidate_counts(1_000_003, PlanRequest(gpus=4, schedule="1f1b"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12GB/s", 12e9),
        ("900MB/s", 9e8),
        ("1GiB/s", 2**30),
        ("5e9", 5e9),
        ("100Gb/s", 12.5e9),
        ("100 Gbit/s", 12.5e9),
        ("25Gbps", 3.125e9),
        ("8Mib/s", 2**20),
        ("10GBps", 1e10),
        ("64kB/s", 64e3),
    ],
)
def test_bandwidths_are_read_with_their_units(text, value):
    assert _bandwidth(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "100gb/s",
        "100G",
        "100G/s",
        "12mB/s",
        "0GB/s",
        "-1GB/s",
        "1e999",
        "1e308TB/s",
        "1e-320B/s",
        "1.2.3GB/s",
        "GB/s",
        "",
    ],
)
def test_bandwidths_that_leave_bits_or_bytes_open_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"12GB/s.*100Gb/s"):
        _bandwidth(text)
