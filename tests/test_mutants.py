"""The mutants fit the source that they take something out of."""

from __future__ import annotations

import pytest

from benchmarks.mutants import MUTANTS, Mutant
from tests.running import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_takes_out_stands_once(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
