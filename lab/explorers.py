"""What explorers share. They take tables, draw what they are given and compute nothing.

Pictures are plain images; the few lines of JavaScript that tell where one was clicked stand below, so no network is needed.
What is not there yet is asked for through a callback that the notebook passes in.
"""

import html
import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from traitlets import Bool, Bytes, Unicode

Base: Any = ipw.Image  # without anywidget a picture is a still one, and the controls beside it do the same
with suppress(ImportError):
    from anywidget import AnyWidget as Base

TABLE = "border-collapse:collapse;font-size:calc(1.08 * var(--jp-widgets-font-size));line-height:1.35"
CELL = "padding:3px 10px;border-bottom:1px solid #ddd;text-align:left;color:inherit"


def wide(width: int, words: int) -> dict[str, Any]:
    """Of a control so many pixels wide, `words` of them for its description; it grows with the type."""
    return {"style": {"description_width": grown(words)}, "layout": ipw.Layout(width=grown(width))}


def grown(pixels: int) -> str:
    """So many pixels where type is 13 pixels high, as in JupyterLab, and more where it is larger."""
    return f"calc({pixels / 13:.4g} * var(--jp-widgets-font-size))"


def image(width: int) -> ipw.Image:
    """A place for a picture that is at most so many pixels wide."""
    return ipw.Image(format="png", layout=ipw.Layout(max_width=f"{width}px", width="100%"))


CLICKS = """
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
export default { render({ model, el }) {
  const picture = document.createElement("img");
  const draw = () => {
    URL.revokeObjectURL(picture.src);
    picture.hidden = model.get("value").byteLength === 0;
    picture.src = URL.createObjectURL(new Blob([model.get("value")], {type: "image/png"}));
  };
  Object.assign(picture, {alt: model.get("alt"), title: model.get("hint"), draggable: false});
  Object.assign(picture.style, {width: "100%", cursor: "pointer"});
  if (model.get("arrows")) picture.tabIndex = 0;
  el.dataset.lmSuppressShortcuts = "true";  // an arrow key moves the choice, and not JupyterLab's cells
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    model.send({click: [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]});
  });
  picture.addEventListener("keydown", (event) => {
    if (!ARROWS[event.key] || !model.get("arrows")) return;
    event.preventDefault();
    model.send({step: ARROWS[event.key]});
  });
  model.on("change:value", draw);
  draw();
  el.append(picture);
  return () => { model.off("change:value", draw); URL.revokeObjectURL(picture.src); };
} };
"""


class ClickablePicture(Base):
    """A place for a figure, in which a click chooses, and an arrow key goes one step from what is chosen.

    Args:
        width: pixels that it has at most.
        alt, hint: what it shows, and what a click does, in words.
        choose: called with x and y of a click, in data coordinates of the axes; a click beside them does nothing.
        chosen: gives x and y of what is chosen, from where arrow keys go on; None: there are no arrow keys.
        axes: which of the figure's axes are clicked.
    """

    _esm = CLICKS
    value = Bytes().tag(sync=True)  # the png
    alt, hint = Unicode().tag(sync=True), Unicode().tag(sync=True)
    arrows = Bool().tag(sync=True)

    def __init__(
        self, width: int, alt: str, hint: str, choose: Callable[[float, float], Any],
        chosen: Callable[[], tuple[float, float]] | None = None, axes: int = 0,
    ) -> None:  # fmt: skip
        layout = ipw.Layout(max_width=f"{width}px", width="100%")
        super().__init__(alt=alt, hint=hint, arrows=chosen is not None, layout=layout)
        self.choose, self.chosen, self.axes = choose, chosen, axes
        self.figure: Figure | None = None
        self.on_msg(lambda _, told, __: self._told(**told))

    def _told(self, click: Any = None, step: Any = None) -> None:
        """The front end tells where a click was, or which way an arrow key points."""
        if click is not None:
            self.click(*map(float, click))
        elif self.figure is not None and self.chosen is not None:
            self.choose(*(float(at + by) for at, by in zip(self.chosen(), step, strict=True)))

    def show(self, figure: Figure | None) -> None:
        """Show a figure, which is closed, or nothing."""
        self.figure, self.value = figure, b"" if figure is None else png(figure)

    def click(self, x: float, y: float) -> None:
        """A click at shares of the picture's width and height, from its top left corner."""
        if self.figure is not None:
            ax = self.figure.axes[self.axes]
            pixel = self.figure.transFigure.transform((x, 1 - y))
            if ax.bbox.contains(*pixel):
                self.choose(*map(float, ax.transData.inverted().transform(pixel)))


def beside(picture: ipw.DOMWidget, *parts: ipw.Widget) -> ipw.Box:
    """A picture with parts at its right; where there is no room, over it."""
    picture.layout.flex = "10 1 700px"
    side = ipw.VBox(parts, layout=ipw.Layout(flex=f"1 1 {grown(230)}"))
    return ipw.Box([picture, side], layout=ipw.Layout(flex_flow="row wrap-reverse", align_items="flex-end"))


def nearest(control: Any, x: float, at: Callable[[Any], float] = float) -> None:
    """Set a list or a slider of options to the option nearest to x; `at`: where an option stands."""
    control.value = min(control.options, key=lambda option: abs(at(option) - x))


def button(words: str) -> ipw.Button:
    """What starts something that takes a while."""
    return ipw.Button(description=words, button_style="primary", layout=ipw.Layout(width=grown(180)))


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
