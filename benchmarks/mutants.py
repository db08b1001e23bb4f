"""What each rewrite of the traced graph is good for: take one out at a time, and see which test goes red.

    python benchmarks/mutants.py                 all of them (10 to 20 minutes: many tests train on three workers)
    python benchmarks/mutants.py relay "tied sum"    only these
    python benchmarks/mutants.py --list          what there is, without running anything

Each mutant is one replacement in one file. It is made in a copy of the project, the named test runs there in a process
of its own, and the copy is thrown away. The table says `red` where the test failed, as it must, with its first error;
`GREEN` is a rewrite that no test would miss, and makes the exit code 1. Before that every named test is run once
without a mutant, and must pass. A replacement that no longer fits the source is an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("planner", "runner", "tests", "examples", "pyproject.toml")
LEGAL = "tests/test_legal.py::test_three_stages_train_as_the_unsplit_model"
PARITY = "tests/test_parity.py::test_three_stages_train_as_the_unsplit_model"
REWRITING, STATE = "planner/tracing/rewriting.py", "planner/tracing/state.py"


@dataclass(frozen=True, slots=True)
class Mutant:
    """`name` is the rewrite that goes; in `file`, `old` (which stands there once) becomes `new`; `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = (
    Mutant("relay", REWRITING, "    if last == home:\n", "    if True:\n", f"{LEGAL}[values.py-cuts4]"),
    Mutant(
        "inputs in signature order",
        REWRITING,
        "entering = _bind_inputs(graph, nodes[0], stage)",
        "entering: list[fx.Node] = []",
        f"{PARITY}[twice.py-cuts1]",
    ),
    Mutant(
        "contiguous",
        "planner/tracing/crossing.py",
        "made.append(call(graph, ATEN.contiguous.default, made[-1]))",
        "made.append(call(graph, ATEN.alias.default, made[-1]))",
        "tests/test_state.py::test_a_slice_of_every_row_is_sent_contiguous",
    ),
    Mutant("detach in no_grad", REWRITING, "if not enabled:", "if False:", f"{LEGAL}[functions.py-cuts0]"),
    Mutant(
        "no gradient, no backward",
        REWRITING,
        "integers = example.is_floating_point() and value not in graded",
        "integers = False",
        "tests/test_state.py::test_what_carries_no_gradient_crosses_as_whole_numbers",
    ),
    Mutant(
        "canonical name",
        REWRITING,
        "node.target = names.get(node.target, node.target)",
        "pass",
        f"{PARITY}[skips.py-cuts0]",
    ),
    Mutant(
        "aliases hidden from pipeline()",
        "planner/tracing/split_policy.py",
        "    if aliases:\n",
        "    if False:\n",
        "tests/test_state.py::test_tied_parameters_have_one_name_in_every_stage",
    ),
    Mutant(
        "tied sum",
        "runner/training.py",
        "            sum_tied_gradients(self.built.tied, self.stage)\n",
        "            pass\n",
        f"{PARITY}[skips.py-cuts0]",
    ),
    Mutant(
        "no cut before a write in place",
        "planner/tracing/legality.py",
        "illegal.update(range(index.get(storage, -1) + 1, index[node] + 1))",
        "pass",
        "tests/test_tracing.py::test_no_cut_between_a_storage_and_a_write_to_it",
    ),
    Mutant(
        "no cut between uses of a written buffer",
        "planner/tracing/legality.py",
        "illegal.update(range(min(uses) + 1, max(uses) + 1))",
        "pass",
        "tests/test_tracing.py::test_no_cut_between_uses_of_a_buffer_that_changes",
    ),
    Mutant(
        "no cut across complex values",
        "planner/tracing/legality.py",
        "or example.is_complex()",
        "",
        "tests/test_tracing.py::test_no_cut_across_complex_values",
    ),
    Mutant(
        "custom Functions kept",
        "planner/tracing/functions.py",
        "passes = not torch.compiler.is_exporting()",
        "passes = True or not torch.compiler.is_exporting()",
        f"{LEGAL}[functions.py-cuts0]",
    ),
    Mutant(
        "inputs bound by name",
        "planner/tracing/inputs.py",
        "return [given[name] for name, traced in self.leaves.items() if isinstance(traced, torch.Tensor)]",
        "return [leaf for leaf in given.values() if isinstance(leaf, torch.Tensor)]",
        f"{LEGAL}[inputs.py-cuts2]",
    ),
    Mutant(
        "written inputs copied",
        REWRITING,
        "    copy_written_inputs(gm)\n",
        "",
        "tests/test_state.py::test_a_written_input_is_copied_so_that_microbatches_do_not_disturb_each_other",
    ),
    Mutant(
        "buffers written early",
        REWRITING,
        "    write_state_early(gm)\n",
        "",
        "tests/test_state.py::test_an_assigned_buffer_is_written_behind_its_last_use_so_that_cuts_stay_legal",
    ),
    Mutant(
        "written buffers copied",
        REWRITING,
        "value in overwritten",
        "False",
        "tests/test_state.py::test_what_shares_storage_with_a_written_buffer_is_copied_before_it_is_sent",
    ),
    Mutant(
        "returned state is a value",
        REWRITING,
        "    return_state_as_values(gm)\n",
        "",
        "tests/test_state.py::test_constants_state_and_inputs_are_returned_as_the_model_does",
    ),
    Mutant("state's names", REWRITING, "    name_state_as_torch_will(graph)\n", "", f"{LEGAL}[state.py-cuts3]"),
    Mutant(
        "dropout silenced in the reference",
        "runner/checking.py",
        "with DropoutAsIdentity(), autocast(",
        "with autocast(",
        f"{LEGAL}[dropout.py-cuts1]",
    ),
    Mutant(
        "devices by position",
        REWRITING,
        "node.args = tree_map(lambda a: device if isinstance(a, torch.device) else a, node.args)",
        "pass",
        "tests/test_tracing.py::test_the_device_of_the_trace_is_replaced_by_position_too",
    ),
)


def mutated(folder: Path, mutant: Mutant | None) -> None:
    """Copy the project to `folder`, with the mutant's replacement. Raises ValueError where it does not fit once."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    if mutant is not None:
        file = folder / mutant.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}")
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def run_tests(tests: Sequence[str], mutant: Mutant | None) -> tuple[bool, str]:
    """Whether `tests` pass in a copy with `mutant`, and the first line of what went wrong. Raises for no such test."""
    with tempfile.TemporaryDirectory(prefix="evenstage-mutant-") as folder:
        mutated(Path(folder), mutant)
        line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        ended = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode not in (0, 1):  # pytest's codes for passed and failed; others say that it ran no test
        raise ValueError(f"pytest ended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    errors = [text[1:].strip() for text in ended.stdout.splitlines() if text.startswith("E  ")]
    return ended.returncode == 0, errors[0] if errors else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants that are named, or all; 1 where one stays green or a test is red without any."""
    parser = argparse.ArgumentParser(description="take out one rewrite at a time and see which test goes red")
    parser.add_argument("names", nargs="*", help="names of mutants (all)")
    parser.add_argument("--list", action="store_true", help="print the mutants and their tests, and run nothing")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant {', '.join(sorted(unknown))}; --list shows all")
    chosen = [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:42} {mutant.test}")
        return 0
    sound, error = run_tests(sorted({mutant.test for mutant in chosen}), None)
    if not sound:
        print(f"red without any mutant: {error}")
        return 1
    survivors = 0
    print(f"{'without':42} {'':5} test")
    for mutant in chosen:
        passed, error = run_tests([mutant.test], mutant)
        survivors += passed
        print(f"{mutant.name:42} {'GREEN' if passed else 'red':5} {mutant.test}\n{'':48} {error[:150]}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} rewrites are missed by a test")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
