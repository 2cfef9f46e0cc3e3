"""Every notebook, run as a reader runs it: in a fresh kernel, from the first cell to the last, with quick settings."""

import functools
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lab.models import CATALOGUE, prepare

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.py"))
notebooks = pytest.mark.parametrize("name", [path.stem for path in SCRIPTS])
Runs = Callable[[str], tuple[subprocess.CompletedProcess, Path]]


@pytest.fixture(scope="module")
def model_in_cache() -> None:
    """The default model downloaded and converted: notebooks promise their times from there on."""
    prepare(CATALOGUE["smollm2-135m"])


@pytest.fixture(scope="module")
def ran(model_in_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The finished process and the folder of a notebook's one run."""

    @functools.cache
    def run(name: str) -> tuple[subprocess.CompletedProcess, Path]:
        out = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-m", "lab", "run", name, "--quick", "--out", str(out)]
        return subprocess.run(command, capture_output=True, text=True), out

    return run


def code_cells(out: Path, name: str) -> list[Any]:
    cells = nbformat.read(out / f"{name}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


@notebooks
def test_notebook_runs(ran: Runs, name: str) -> None:
    process, out = ran(name)
    assert process.returncode == 0, process.stderr[-5000:]
    assert (out / f"{name}.html").stat().st_size > 0
    assert list(out.glob(f"{name}-*.png"))


@notebooks
def test_every_cell_ran_solutions_among_them(ran: Runs, name: str) -> None:
    cells = code_cells(ran(name)[1], name)
    assert any("solution" in cell.metadata.get("tags", []) for cell in cells)
    assert [cell.source for cell in cells if cell.execution_count is None] == []


@notebooks
def test_first_plot_comes_within_three_cells_and_a_minute(ran: Runs, name: str) -> None:
    cells = [c for c in code_cells(ran(name)[1], name) if "injected-parameters" not in c.metadata.get("tags", [])]
    plots = ["image/png" in output.get("data", {}) for cell in cells[:3] for output in cell.outputs]
    assert any(plots)
    begun = cells[0].metadata["execution"]["iopub.execute_input"]
    drawn = cells[2].metadata["execution"]["shell.execute_reply"]
    assert (datetime.fromisoformat(drawn) - datetime.fromisoformat(begun)).total_seconds() < 60
