"""Every notebook, run as a reader runs it: in a fresh kernel, from the first cell to the last.

Lessons as they are handed out; studies with the results that they come with, or with small settings where these are not made yet.
"""

import functools
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest

from lab import shipped
from lab.models import CATALOGUE, prepare

ROOT = Path(__file__).resolve().parents[2]
LESSONS, STUDIES = (
    [f"{group}/{path.stem}" for path in sorted((ROOT / "notebooks" / group).glob("*.py"))]
    for group in ("lessons", "studies")
)
SHIPPED = {f"studies/{name.split('/')[0]}" for name in shipped.names()}
notebooks = pytest.mark.parametrize("name", [*STUDIES, *LESSONS])
PAGE = 884  # pixels: a figure of 9 inches, 96 dots each, and a margin; more where something sticks out of it
Runs = Callable[[str], tuple[subprocess.CompletedProcess, Path]]


@pytest.fixture(scope="module")
def model_in_cache() -> None:
    """The default model downloaded and converted: notebooks promise their times from there on."""
    prepare(CATALOGUE["smollm2-135m"])


@pytest.fixture(scope="module")
def ran(model_in_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The finished process and the folder of a notebook's one run."""

    @functools.cache
    def run(name: str, quick: bool | None = None) -> tuple[subprocess.CompletedProcess, Path]:
        group, stem = name.split("/")
        out = tmp_path_factory.mktemp(f"{group}-{stem}")
        small = name in STUDIES and name not in SHIPPED if quick is None else quick
        command = [sys.executable, "-m", "lab", "run", name, *["--quick"] * small, "--out", str(out)]
        return subprocess.run(command, capture_output=True, text=True), out / group

    return run


def code_cells(out: Path, name: str) -> list[Any]:
    cells = nbformat.read(out / f"{name.split('/')[1]}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


@notebooks
def test_notebook_runs(ran: Runs, name: str) -> None:
    process, out = ran(name)
    assert process.returncode == 0, process.stderr[-5000:]
    stem = name.split("/")[1]
    assert (out / f"{stem}.html").stat().st_size > 0
    widths = {path.name: plt.imread(path).shape[1] for path in out.glob(f"{stem}-*.png")}
    assert widths and max(widths.values()) <= PAGE, widths


@notebooks
def test_every_cell_ran(ran: Runs, name: str) -> None:
    cells = code_cells(ran(name)[1], name)
    assert [cell.source for cell in cells if cell.execution_count is None] == []
    if name in STUDIES:
        assert any("solution" in cell.metadata.get("tags", []) for cell in cells)


@notebooks
def test_first_plot_comes_within_three_cells_and_a_minute(ran: Runs, name: str) -> None:
    cells = [c for c in code_cells(ran(name)[1], name) if "injected-parameters" not in c.metadata.get("tags", [])]
    plots = ["image/png" in output.get("data", {}) for cell in cells[:3] for output in cell.outputs]
    assert any(plots)
    begun = cells[0].metadata["execution"]["iopub.execute_input"]
    drawn = cells[2].metadata["execution"]["shell.execute_reply"]
    assert (datetime.fromisoformat(drawn) - datetime.fromisoformat(begun)).total_seconds() < 60


@pytest.mark.parametrize("name", LESSONS)
def test_an_untouched_lesson_says_so_and_goes_on(ran: Runs, name: str) -> None:
    cells = code_cells(ran(name)[1], name)
    checks = [cell for cell in cells if "check" in cell.metadata.get("tags", [])]
    for cell in checks:
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert "no answer yet. The lesson goes on with the kit's own." in said, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_study_with_small_settings(ran: Runs, name: str) -> None:
    process, out = ran(name, quick=True)
    assert process.returncode == 0, process.stderr[-5000:]
    page = (out / f"{name.split('/')[1]}.html").read_text(encoding="utf-8")
    assert "<th>verdict</th>" not in page and "<th>n_star</th>" not in page  # nothing is judged


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_takes_no_longer_than_a_class_waits(ran: Runs, name: str) -> None:
    cells = code_cells(ran(name)[1], name)
    begun, done = (
        datetime.fromisoformat(cells[at].metadata["execution"][key])
        for at, key in ((0, "iopub.execute_input"), (-1, "shell.execute_reply"))
    )
    assert (done - begun).total_seconds() < 90
