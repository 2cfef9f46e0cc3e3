"""What explorers share. They take tables, draw what they are given and compute nothing.

Pictures are plain images, so an explorer needs no JavaScript beyond ipywidgets and no network. What is not there yet is
asked for through a callback that the notebook passes in.
"""

import html
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

TABLE = "border-collapse:collapse;font-size:14px;line-height:1.35"
CELL = "padding:3px 10px;border-bottom:1px solid #ddd;text-align:left;color:inherit"


def wide(width: int, words: int) -> dict[str, Any]:
    """Of a control so many pixels wide, `words` of them for its description."""
    return {"style": {"description_width": f"{words}px"}, "layout": ipw.Layout(width=f"{width}px")}


def image(width: int) -> ipw.Image:
    """A place for a picture that is at most so many pixels wide."""
    return ipw.Image(format="png", layout=ipw.Layout(max_width=f"{width}px", width="100%"))


def button(words: str) -> ipw.Button:
    """What starts something that takes a while."""
    return ipw.Button(description=words, button_style="primary", layout=ipw.Layout(width="180px"))


def shown(there: bool, *parts: ipw.Widget) -> None:
    """Shows parts, or hides them."""
    for part in parts:
        part.layout.display = "" if there else "none"


def row_of(cells: Sequence[object], *, pale: int = 0) -> str:
    """A row of `table_of`, its first cells pale."""
    looks = [CELL + (";opacity:.7" if place < pale else "") for place in range(len(cells))]
    return "<tr>" + "".join(f"<td style='{a}'>{b}</td>" for a, b in zip(looks, cells, strict=True)) + "</tr>"


def table_of(rows: Iterable[str]) -> str:
    """An HTML table."""
    return f"<table style='{TABLE}'>{''.join(rows)}</table>"


def png(figure: Figure) -> bytes:
    """The figure as a picture; it is closed."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def ask(log: ipw.Output, callback: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a callback returns, and what went wrong, as text for the place where the reader looks ("" = nothing)."""
    log.clear_output()
    with log:  # shows progress; an exception that left this block would be swallowed, so it is taken out by hand
        try:
            answer = callback(*arguments)
        except Exception as error:
            return None, f"<b>{type(error).__name__}</b>: {html.escape(str(error))}"
    log.clear_output()
    return answer, ""


def text_of(said: str) -> str:
    """What a model said, as HTML on one line."""
    return html.escape(said).replace("\n", " ↵ ")
