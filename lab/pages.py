"""What `python -m lab run` leaves of a notebook: the notebook, its figures, and a page that needs nothing from elsewhere.

Pages follow the reader's choice of light or dark, can be used with a keyboard and read by a screen reader, and link to each
other: `index` lists them, and the glossary is one of them.
"""

import base64
import copy
import html
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import run_folders

if TYPE_CHECKING:
    from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"
EXPLORER = "<p class='note'>Here is something to play with. It is live in the notebook, not on this page.</p>"


def write(notebook: "NotebookNode", name: str, out: Path, *, home: str = "", there: Collection[str] = ()) -> None:
    """NAME.ipynb, NAME.html and its figures NAME-<code cell>-<n>.png.

    home: the address of the list of pages, as seen from this one. there: names of the pages of the site; a link to a
    script that has none is left as words.
    """
    import nbformat

    run_folders.write(out / f"{name}.ipynb", nbformat.writes(notebook) + "\n")
    shown = copy.deepcopy(notebook)
    for number, cell in enumerate((cell for cell in shown.cells if cell.cell_type == "code"), start=1):
        figures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        for n, output in enumerate(figures, start=1):
            place = f"{name}-{number:02d}-{n}.png"
            run_folders.write(out / place, base64.b64decode(output.data["image/png"]))
            output.metadata["filenames"] = {"image/png": place}
            output.metadata["image/png"] = {"alt": output.data.get("text/plain", "a figure")}
        for output in cell.outputs:
            if WIDGET in (data := output.get("data", {})):  # a prediction brings its question; an explorer is live only
                del data[WIDGET]
                if "children=" in data.get("text/plain", ""):  # else a progress bar: its last state says it in words
                    data.setdefault("text/html", EXPLORER)
    for cell in shown.cells:
        if cell.cell_type == "markdown":
            cell.source = _linked(cell.source, there)
    run_folders.write(out / f"{name}.html", page(shown, title_of(notebook, name), home=home))


def page(notebook: "NotebookNode", title: str, *, home: str = "") -> str:
    """A notebook as a page."""
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    style = re.sub(
        r"^(pre|td|span)\b.*$", "", f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}", flags=re.M
    )
    exporter = HTMLExporter(template_name="basic", raw_template=Path(__file__).with_name("page.html.j2").read_text("utf-8"),
                            exclude_input_prompt=True, exclude_output_prompt=True)  # fmt: skip
    resources = {"title": title, "home": home, "code_style": re.sub(r"background: #[0-9a-f]+;?", "", style)}
    return exporter.from_notebook_node(notebook, resources)[0]


def title_of(notebook: "NotebookNode", name: str) -> str:
    """The first heading, or the name."""
    headings = (re.match(r"# (.+)", cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    return next((found[1] for found in headings if found), name)


def index(out: Path, glossary: Path) -> dict[str, str]:
    """The list of the pages that stand in a folder and in the folders in it, and the glossary: names with their pages."""
    from nbformat.v4 import new_markdown_cell, new_notebook

    items = []
    for place in sorted(path for folder in ("", "*/") for path in out.glob(f"{folder}[0-9]*.html")):
        title = re.search("<title>(.*?)</title>", place.read_text(encoding="utf-8"))
        address = place.relative_to(out).as_posix()
        figure = next(iter(sorted(place.parent.glob(f"{place.stem}-*.png"))), None)
        picture = f"<img src='{figure.relative_to(out).as_posix()}' alt=''>" if figure else ""
        items.append(f"<li><a href='{address}'>{title[1] if title else html.escape(address)}</a>{picture}</li>")
    text = "# How a language model uses its depth\n\n" + (
        f"<ul class='pages'>\n{''.join(items)}\n</ul>\n\n[Glossary](glossary.html)"
    )
    terms = re.sub(r"^## (.+)$", lambda found: f"<h2 id='{anchor(found[1])}'>{found[1]}</h2>\n", glossary.read_text("utf-8"),
                   flags=re.M)  # fmt: skip
    pages: dict[str, Any] = {"index": ("depth-lab", text, ""), "glossary": ("Glossary", terms, "index.html")}
    return {name: page(new_notebook(cells=[new_markdown_cell(source)]), title, home=home)
            for name, (title, source, home) in pages.items()}  # fmt: skip


def anchor(heading: str) -> str:
    """A heading's name in an address, as in the notebooks' links to the glossary."""
    return re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")


def _linked(text: str, there: Collection[str]) -> str:
    """Links to scripts and to the glossary lead to pages; those to a script without a page are left as words."""

    def page_of(found: re.Match[str]) -> str:
        words, path, mark = found[1], found[2], found[3] or ""
        if path.endswith("glossary.md"):
            return f"[{words}]({path[:-3]}.html{mark})" if there else words
        return f"[{words}]({path[:-3]}.html{mark})" if Path(path).stem in there else words

    return re.sub(r"\[([^\]\[]+)\]\((?!https?:)([^)#\s]+\.(?:py|md))(#[^)]*)?\)", page_of, text)
