"""The pages of a run: small, whole without anything from elsewhere, with words for every figure, linked to each other."""

import base64
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lab import figures, pages
from lab.__main__ import glossary, read, scripts

PIXEL = base64.b64encode(b"\x89PNG").decode()


def notebook():
    cells = [
        new_markdown_cell("# Lens\n\nSee [states](../glossary.md#state), [next](01_next.py), [gone](02_gone.py)."),
        new_code_cell("1 < 2", outputs=[
            new_output("display_data", {"image/png": PIXEL, "text/plain": 'Figure. A "map"; x: depth'}),
            new_output("display_data", {pages.WIDGET: {}, "text/plain": "VBox(children=())"}),
            new_output("display_data", {pages.WIDGET: {}, "text/plain": "Loading:  50%"}),
            new_output("execute_result", {"text/html": "<table><tr><td>1</td></tr></table>", "text/plain": "1"}),
        ]),
        new_code_cell("answer = 42"),
    ]  # fmt: skip
    cells[2].metadata["tags"] = ["solution"]
    return new_notebook(cells=cells)


def test_a_page_has_words_for_figures_and_links_to_pages(tmp_path: Path) -> None:
    made = notebook()
    pages.write(made, "00_lens", tmp_path, home="../index.html", there={"00_lens", "01_next"})
    page = (tmp_path / "00_lens.html").read_text(encoding="utf-8")
    assert "<title>Lens</title>" in page and '<html lang="en">' in page and 'href="../index.html"' in page
    assert 'src="00_lens-01-1.png"' in page and """alt='Figure. A "map"; x: depth'""" in page
    assert (tmp_path / "00_lens-01-1.png").read_bytes() == b"\x89PNG"
    assert 'href="../glossary.html#state"' in page and 'href="01_next.html"' in page
    assert "gone" in page and "02_gone" not in page
    assert page.count("It is live in the notebook") == 1 and "Loading:  50%" in page
    assert re.search(r"<details><summary>Solution, in code</summary>.*42.*</details>", page, re.S)
    assert pages.WIDGET in made.cells[1].outputs[1].data, "the notebook itself keeps its widgets"


def test_the_list_of_pages_names_what_stands_there(tmp_path: Path) -> None:
    (tmp_path / "lessons").mkdir()
    pages.write(notebook(), "00_lens", tmp_path / "lessons", home="../index.html")
    site = pages.index(tmp_path, glossary())
    assert (
        '<a href="lessons/00_lens.html">Lens</a>' in site["index"] and 'src="lessons/00_lens-01-1.png"' in site["index"]
    )
    anchors = set(re.findall('<h2 id="([^"]+)"', site["glossary"]))
    links = {link for path in scripts(None) for link in re.findall(r"glossary\.md#([^)]+)\)", path.read_text("utf-8"))}
    assert len(links) > 20 and not links - anchors


@pytest.mark.parametrize("path", scripts(None), ids=lambda path: path.stem)
def test_a_notebook_as_a_page_is_whole(path: Path) -> None:
    page = pages.page(read(path), path.stem)
    assert not re.findall(r"<(?:script|link|iframe)\b|src=[\"']https?:", page)
    assert not re.search(r"\$[^$\n`]+\$", re.sub(r"(?s)<(pre|code).*?</\1>", "", page)), "a page can't set formulas"


def test_a_figure_says_what_it_shows() -> None:
    figure, (left, right) = plt.subplots(1, 2)
    figure.suptitle("Two\nmodels")
    left.plot([1, 2], label="trained")
    left.set(title="Accuracy", xlabel="depth", ylabel="share")
    right.set(xlabel="rank")
    assert figures.described(figure) == "Figure. Two models; Accuracy, x: depth, y: share, trained; x: rank"
    plt.close(figure)
