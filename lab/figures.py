"""What all figures share: width, colours, style, dots with intervals, names down an axis.

Colours are Okabe and Ito's, told apart by readers with any colour vision; every line also has its own dash or marker.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#7F7F7F",
)  # fmt: skip
WIDTH = 9.0  # inches of a figure: what a column of a notebook and a projector show; at most two panels side by side
CLASSROOM: Any = {  # legible from the last row
    "font.size": 13,
    "axes.titlesize": 14,
    "figure.titlesize": 14,
    "figure.labelsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2.2,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "figure.dpi": 96,
}


@contextmanager
def classroom() -> Iterator[None]:
    """Draw inside this block in the kit's style; no setting outlives it.

    >>> with classroom():
    ...     figure, ax = panels(4.5)
    """
    # The first use of pyplot in a notebook chooses a backend and turns interactive mode on. Inside an rc_context that
    # would be undone at its end, and no later figure would be shown; so it is made to happen before.
    plt.draw_if_interactive()
    if (
        shell := get_ipython()
    ) is not None:  # in a notebook a figure's plain text is its description; also after that choice
        shell.display_formatter.formatters["text/plain"].for_type(
            Figure, lambda figure, printer, cycle: printer.text(described(figure))
        )
    with plt.rc_context(CLASSROOM):
        yield


def described(figure: Figure) -> str:
    """What a figure shows, in words, for those who cannot see it: titles, axes and the names of its lines."""
    said = [figure.get_suptitle()]
    for ax in figure.axes:
        axes = [f"{name}: {label}" for name, label in (("x", ax.get_xlabel()), ("y", ax.get_ylabel())) if label]
        lines = ax.get_legend_handles_labels()[1]
        said += [", ".join([part for part in (ax.get_title(), *axes, *dict.fromkeys(lines)) if part])]
    return "Figure. " + "; ".join(" ".join(part.split()) for part in said if part)


def dots(
    ax: Axes, rows: Any, places: Sequence[Any], color: str, marker: str, *, label: str | None = None,
    hollow: bool = False,
) -> None:  # fmt: skip
    """Shares as markers with their intervals, one a line of the page."""
    ax.hlines(places, rows.low, rows.high, color=color, lw=2.2)
    ax.plot(rows.share, places, marker, color="white" if hollow else color, mec=color, mew=1.8, ms=8, label=label)


def curve(
    ax: Axes, rows: Any, color: str, *, x: str = "relative_depth", y: str = "mean", alpha: float = 0.15, **line: Any
) -> None:  # fmt: skip
    """A column by another as a line, with its interval as a band of the same colour."""
    ax.plot(rows[x], rows[y], color=color, **line)
    ax.fill_between(rows[x], rows.low, rows.high, color=color, alpha=alpha, lw=0)


def categories(ax: Axes, names: Sequence[str]) -> None:
    """Names down the y axis, the first at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(alpha=0.25, axis="x")


def logarithmic_beyond(ax: Axes, threshold: float) -> bool:
    """Makes x logarithmic on either side of 0, linear up to the threshold, with plain ticks; tells whether it did.

    Where nothing drawn lies far beyond it the axis stays linear: a logarithmic one could have its own ends as ticks.
    """
    if max(map(abs, ax.get_xlim())) <= 5 * threshold:
        return False
    ax.set_xscale("symlog", linthresh=threshold)
    ax.autoscale_view(scaley=False)  # the margins were those of a linear axis
    low, high = ax.get_xlim()
    steps = (1, 2, 5) if -threshold < low and high < 100 * threshold else (1,)  # more than fit stand on one another
    sizes = [step * threshold * 10**power for power in range(6) for step in steps]
    ticks = [tick for tick in (*(-size for size in reversed(sizes)), 0, *sizes) if low <= tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    return True


def legend_below(figure: FigureBase, ax: Axes, columns: int) -> None:
    """The legend of these axes in columns below the whole figure."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def stack(ax: Axes, layers: Sequence[tuple[str, bool]], title: str) -> None:
    """Layers as a row of cells, the first at the left, cell i from x = i to i + 1; (words, whether it is filled) for each."""
    for i, (words, filled) in enumerate(layers):
        ax.add_patch(plt.Rectangle((i, 0), 1, 1, fc=BLUE if filled else "#EEEEEE", ec="white", lw=2))
        color, size = "white" if filled else "#595959", 13 if len(layers) < 12 else 9.5
        ax.text(i + 0.5, 0.46, words, ha="center", va="center", fontsize=size, color=color, linespacing=0.9)
    ax.set(xlim=(0, len(layers)), ylim=(0, 1), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=13)


def about_of(result: Any) -> str:
    """Model and data set, for a title."""
    return f"{result.parameters['model']} on {result.parameters['dataset']}"


def page(height: int | float) -> Figure:
    """An empty figure so many inches high, and as wide as figures are."""
    return plt.figure(figsize=(WIDTH, height), layout="constrained")


def panels(height: int | float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure so many inches high, and its axes: one, or an array as `plt.subplots` gives it."""
    figure = page(height)
    return figure, figure.subplots(rows, columns, **options)
