"""The notebooks run from top to bottom, and what is committed of them is small and names nobody's folders."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 600  # per cell; on two cores a whole notebook takes a minute or so
MAX_BYTES = 300_000

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install .[notebooks]")


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_fails(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy, so that neither the notebook nor what it writes changes the project."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install .[notebooks]")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install .[notebooks]")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[notebooks]")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("notebooks", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this checkout, whether or not it is installed
    notebook = nbformat.read(tmp_path / "notebooks" / path.name, as_version=4)
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=resources).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_executed_and_is_small(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert path.stat().st_size < MAX_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_names_no_folder_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [root for root in ("/home/", "/root/", "/Users/", "/tmp/", "site-packages") if root in text]
    assert str(ROOT) not in text
