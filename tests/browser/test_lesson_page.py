"""Lesson 0 as a participant does it: JupyterLab in a browser, code typed into cells, an answer chosen, the picture clicked."""

import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from driving import play_with_watch

LESSON = Path(__file__).resolve().parents[2] / "notebooks" / "lessons" / "00_watch_a_model_think.py"
WRONG = "def keep(depth, states):\n    def hook_fn(state, hook):\n        states[depth] = state\n\n    return hook_fn"
RIGHT = WRONG.replace("= state\n", "= state[0]\n")


@pytest.fixture
def lesson(page: Any, served: Callable[..., str], port: int, tmp_path: Path) -> Any:
    """The lesson, built anew, open in JupyterLab; figures wait for predictions."""
    folder, token = tmp_path / "lessons", secrets.token_hex(8)
    folder.mkdir()
    text = LESSON.read_text(encoding="utf-8").replace("class_mode = False", "class_mode = True")
    (folder / LESSON.name).write_text(text, encoding="utf-8")
    own = {
        f"{name}_DIR": str(tmp_path / name)
        for name in ("JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES", "JUPYTER_CONFIG")
    }
    address = served(
        f"http://127.0.0.1:{port}/lab/tree/{LESSON.stem}.ipynb?token={token}", "lab", "open", "--notebooks", str(folder),
        "--no-browser", "--allow-root", f"--ServerApp.port={port}", f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True", **own,
    )  # fmt: skip
    page.goto(address)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.wait_for_function(
        """() => {
          const session = window.jupyterapp.shell.currentWidget.sessionContext, kernel = session.session?.kernel;
          return session.isReady && kernel?.connectionStatus === "connected" && kernel.status === "idle";
        }"""
    )
    return page


def ran(page: Any) -> None:
    """Wait until no cell runs or waits to run."""
    page.wait_for_function(
        """() => {
          const notebook = window.jupyterapp.shell.currentWidget;
          const runs = notebook.content.widgets.some((cell) => cell.model.executionState === "running");
          return !runs && notebook.sessionContext.session.kernel.status === "idle";
        }"""
    )
    time.sleep(0.5)  # outputs are drawn


def cell(page: Any, start: str) -> Any:
    """Go to the cell that begins so, and make it the active one."""
    page.keyboard.press("Escape")
    page.evaluate(
        """async (start) => {
          const notebook = window.jupyterapp.shell.currentWidget.content;
          const at = notebook.widgets.findIndex((cell) => cell.model.sharedModel.source.startsWith(start));
          if (at < 0) throw new Error(`no cell begins with ${start}`);
          notebook.deselectAll();
          notebook.activeCellIndex = at;
          notebook.scrollToItem(at, "start");
        }""",
        start,
    )
    found = page.locator(".jp-Notebook .jp-Cell.jp-mod-active")
    found.wait_for()
    return found


def run(page: Any, start: str, code: str | None = None) -> str:
    """Run the cell that begins so, with other code typed into it; what it says."""
    found = cell(page, start)
    found.locator(".cm-content").click()
    if code is not None:
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")
    ran(page)
    return found.locator(".jp-OutputArea").inner_text()


@pytest.mark.slow
def test_a_participant_in_lesson_0(lesson: Any) -> None:
    page = lesson
    page.evaluate(
        "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
    )  # which is not waited for here
    page.locator(".jp-InputPrompt").filter(has_text=re.compile(r"\[(\*|\d+)\]")).first.wait_for()
    ran(page)
    assert not page.locator("[data-mime-type*=error]").count()

    assert "keep: no answer yet" in run(page, "keep = check.keep")
    run(page, "def keep", WRONG)
    said = " ".join(run(page, "keep = check.keep").split())
    assert "keep: not yet. Your hook keeps the whole batch, [1, position, d_model]." in said
    run(page, "def keep", RIGHT)
    assert "keep: right." in run(page, "keep = check.keep")

    cell(page, "def draw():")
    page.get_by_text("The figure comes when you have chosen an answer above.").wait_for()
    asked = cell(page, "guess = lessons.predict")
    asked.get_by_label("At the end, just like the trained model").check()
    figure = cell(page, "def draw():")
    figure.get_by_text("You said: At the end, just like the trained model").wait_for()
    page.wait_for_function("(one) => one.naturalWidth > 300", arg=figure.locator("img").element_handle())

    play_with_watch(cell(page, "watch.watch(model, text)"))

    table = run(page, "lessons.summary()")
    assert "1 of 4 exercises right" in table and "At the end, just like the trained model" in table
