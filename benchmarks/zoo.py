"""Attempts every model of the zoo and writes the table in docs/zoo.md.

python -m benchmarks.zoo [NAME…] [--output docs/zoo.md] [--workers N]

With names, only those are attempted and their rows printed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tests.zoo.attempting import STAGES, TOLERANCE, Attempt, attempt, zoo_files

KINDS = {"huggingface": "transformers, from small configs with random weights", "plain": "Plain torch"}
COLUMNS = "| model | exports | layers | legal cuts | 2 | 3 | 4 | largest difference | |"
ALIGNMENT = "|---|---|--:|--:|---|---|---|--:|---|"
PREFACE = """# The zoo

Written by `make zoo` (`python -m benchmarks.zoo`) with torch {torch} and transformers {transformers}. The models are in
[tests/zoo](../tests/zoo), a file each.

Each is traced, and planned at 2, 3 and 4 stages by the integer program at made-up costs. Each plan is then trained for
two steps of SGD on two microbatches of two samples and held against the eager model: losses, the gradients of every
parameter (tied ones summed), and in the end all weights and buffers. The figure is the largest difference at any number
of stages, relative to the largest value of that tensor (or to a thousandth of the largest in the model, where a tensor
is smaller than that). 0 is equal to the last bit; sums that float32 rounds in another order are some 1e-7 apart. A
model counts as equal up to {tolerance:g}. Dropout is set to 0 in every model.

The stages are torch's own. One process holds them all and runs them by `ScheduleLoopedBFS`; what goes from stage to
stage is copied as a message would be. `make test` trains three of the models over three processes.

**{equal} of {all} models are planned and trained equal at 2, 3 and 4 stages.**
"""
NOTES = """
## Where few cuts are legal

A cut lies where a module begins, so a module that is one operation to torch cannot be cut: an `nn.LSTM` of several
layers is one `aten.lstm`; stack modules of one layer each, as the model here does. What is computed from bare
parameters, outside of any child module, belongs to the layer before it. No cut lies in the life of a complex value,
between the uses of a buffer that forward changes, or between a value and a write to it in place, unless nothing else
shares its storage: then the write becomes a result of its own.
"""


def main() -> None:
    """Parse the command line, attempt the models, and write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("docs/zoo.md"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    arguments = parser.parse_args()
    tables: dict[str, list[Attempt]] = {kind: [] for kind in KINDS}
    files = [(kind, file) for kind in KINDS for file in zoo_files(kind)]
    chosen = [(kind, file) for kind, file in files if not arguments.names or file.stem in arguments.names]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, initializer=start_worker) as pool:
        for (kind, _), came in zip(chosen, pool.map(attempt, [file for _, file in chosen]), strict=True):
            print(row(came), flush=True)
            tables[kind].append(came)
    if not arguments.names:
        arguments.output.write_text(page(tables), encoding="utf-8")
        print(f"wrote {arguments.output}")


def start_worker() -> None:
    """One thread, and no word of what torch logs: a refusal is part of the table."""
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)


def page(tables: dict[str, list[Attempt]]) -> str:
    """The whole page in Markdown."""
    import transformers

    attempts = [came for rows in tables.values() for came in rows]
    versions = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    counts = {"equal": sum(came.is_equal for came in attempts), "all": len(attempts)}
    parts = [PREFACE.format(**versions, **counts, tolerance=TOLERANCE)]
    parts += [f"\n## {KINDS[kind]}\n\n{table(rows)}\n" for kind, rows in tables.items()]
    return "".join([*parts, NOTES])


def table(attempts: Iterable[Attempt]) -> str:
    """The models of one kind as a table in Markdown."""
    return "\n".join([COLUMNS, ALIGNMENT, *(row(came) for came in attempts)])


def row(came: Attempt) -> str:
    """One model as a row of the table."""
    if came.num_layers == 0:
        issue = f" ([torch issue]({came.torch_issue}))" if came.torch_issue else ""
        refusal = came.refusal.partition(". ")[0] + issue
        return f"| {came.name} | no | – | – | – | – | – | – | {came.about} Refused: {refusal} |"
    planned = " | ".join("yes" if count in came.differences else "no" for count in STAGES)
    figure = f"{came.largest:.1e}" if came.differences and came.largest else "0" if came.differences else "–"
    note = "" if came.is_equal else f" **{came.refusal or 'differs'}**"
    figures = f"{came.num_layers} | {came.num_layers - 1} | {planned} | {figure}"
    return f"| {came.name} | yes | {figures} | {came.about}{note} |"


if __name__ == "__main__":
    main()
