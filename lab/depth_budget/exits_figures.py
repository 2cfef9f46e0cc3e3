"""Figures of early exits and of fixed norms. Tables in, figures out."""

from typing import Any

from matplotlib.figure import Figure

from lab import figures as shared
from lab.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY

WAYS = {
    "prefix": ("the first n blocks", BLUE, "-", "o"),
    "prefix, last": ("the first n - 1 and the last", ORANGE, (0, (5, 1.5)), "s"),
    "prefix, last two": ("the first n - 2 and the last two", GREEN, (0, (3, 1, 1, 1)), "D"),
    "suffix": ("the last n blocks (control)", PURPLE, (0, (1, 1)), "^"),
}
NORMS = {
    "one number": ("one size for all tokens", BLUE, "-", "o"),
    "one number, typical": ("one size, of a typical token", SKY, (0, (5, 1, 1, 1, 1, 1)), "v"),
    "by channel": ("one size a channel", ORANGE, (0, (5, 1.5)), "s"),
    "one number, another block's": ("size of another block (control)", PURPLE, (0, (1, 1)), "^"),
    "one number, first token too": ("one size, first token too", GREEN, (0, (3, 1, 1, 1)), "D"),
}


def prefix_exits(result: Any) -> Figure:
    """Rise of the loss by the number of blocks that are kept, with intervals over texts; random sets as a band."""
    summary, last = result.summary, result.parameters["n_layers"]
    with shared.classroom():
        figure, ax = shared.panels(5)
        band = summary[summary.way == "random"]
        ax.fill_between(
            band.n_blocks, band.low, band.high, color=GREY, alpha=0.3, lw=0, label="random blocks, 5 to 95 %"
        )
        for way, (label, color, dash, marker) in WAYS.items():
            rows = summary[(summary.way == way) & (summary.n_blocks >= 1)]
            shared.curve(ax, rows, color, x="n_blocks", y="rise", ls=dash, marker=marker, ms=5, label=label)
        ax.axhline(0, color=GREY, lw=1)
        ax.axhline(result.parameters["guessing"], color=GREY, lw=1.5, ls="--", label="all words equally likely")
        ax.set(xlabel=f"blocks kept, of {last}", ylabel="rise of the loss (nats per token)", xlim=(1, last + 0.3))
        ax.set_ylim(-1, 4 * result.parameters["guessing"])
        ax.set_title(f"Ending early, no training: {shared.about_of(result)}")
        shared.legend_below(figure, ax, 3)
    return figure


def fixed_norms(result: Any) -> Figure:
    """Rise of the loss by the block whose norms are fixed, with intervals over texts; the sink's token by itself."""
    summary = result.summary
    with shared.classroom():
        figure, axes = shared.panels(5, 1, 2)
        for ax, ways in zip(axes, (list(NORMS)[:4], list(NORMS)[4:]), strict=True):
            for way in ways:
                label, color, dash, marker = NORMS[way]
                rows = summary[summary.way == way]
                shared.curve(ax, rows, color, x="layer", y="rise", ls=dash, marker=marker, ms=5, label=label)
            ax.axhline(0, color=GREY, lw=1)
            ax.set_yscale("symlog", linthresh=0.1)
            ax.set_yticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
            ax.set(xlabel="block whose two norms are fixed", ylim=(-0.03, 15))
        axes[0].set(ylabel="rise of the loss (nats per token)", title="first token keeps its own size")
        axes[1].set_title("first token, too")
        handles = [ax.get_legend_handles_labels() for ax in axes]
        figure.legend(*(one + two for one, two in zip(*handles, strict=True)), loc="outside lower center", ncols=2)
    return figure
