"""The pages that a run leaves, opened as files: nothing is asked of another machine, and axe finds no serious fault."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from nbformat.v4 import new_output

from lab import pages
from lab.__main__ import glossary, read, scripts

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # one pixel


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lesson and a study as pages, each with a figure, a table and printed words as outputs; and the list of pages."""
    out = tmp_path_factory.mktemp("site")
    chosen = [path for path in scripts(None) if path.stem.startswith("02")]
    for script in chosen:
        notebook = read(script)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        code[0].outputs = [
            new_output("display_data", {"image/png": PIXEL, "text/plain": "Figure. Pairs that work; x: layer"}),
            new_output("execute_result", {"text/html": "<table><tr><th>depth</th></tr><tr><td>1</td></tr></table>"}),
            new_output("stream", text="words"),
        ]
        folder = out / script.parent.name
        folder.mkdir(exist_ok=True)
        pages.write(notebook, script.stem, folder, home="../index.html", there={path.stem for path in chosen})
    for name, page in pages.index(out, glossary()).items():
        (out / f"{name}.html").write_text(page, encoding="utf-8")
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_whole_and_fit_for_all(browser: Any, site: Path, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 950, "height": 800})
    asked: list[str] = []
    context.on("request", lambda one: asked.append(one.url))
    for place in sorted(site.rglob("*.html")):
        page = context.new_page()
        page.goto(place.as_uri())
        assert place.stat().st_size < 1_500_000
        faults = [
            fault for fault in Axe().run(page).response["violations"] if fault["impact"] in ("serious", "critical")
        ]
        assert not faults, (place.name, [(fault["id"], fault["nodes"][0]["html"]) for fault in faults])
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the window"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the text"
        page.close()
    context.close()
    assert len(asked) >= 4 and not [url for url in asked if not url.startswith(("file:", "data:"))]
