"""What explorers share. They take tables, draw what they are given and compute nothing.

Pictures are plain images, so an explorer needs no JavaScript beyond ipywidgets and no network. What is not there yet is
asked for through a callback that the notebook passes in.
"""

import html
import io
from collections.abc import Callable
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

TABLE = "border-collapse:collapse;font-size:14px;line-height:1.35"


CELL = "padding:3px 10px;border-bottom:1px solid #ddd;text-align:left;color:inherit"


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
