"""Figures of the pair table, the block searches and the test of submodularity. Tables in, figures out."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab import figures as shared
from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY

_DASHES: Any = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))
LOOKS = {  # method: colour, dash, marker
    "greedy": (BLUE, _DASHES[0], "o"),
    "greedy, swap": (SKY, _DASHES[1], "s"),
    "one-shot removal": (ORANGE, _DASHES[2], "D"),
    "one-shot LIM": (RED, _DASHES[3], "^"),
    "first to last": (PURPLE, _DASHES[1], "<"),
    "last to first": (GREEN, _DASHES[3], ">"),
    "NSGA-II": (PURPLE, _DASHES[0], "v"),
    "predictor": (GREEN, _DASHES[1], "P"),
    "windows": (BLACK, _DASHES[2], "X"),
    "random": (GREY, _DASHES[3], "<"),
}
PANELS = (
    ("greedy", "greedy, swap", "one-shot removal", "one-shot LIM", "first to last", "last to first"),
    ("NSGA-II", "predictor", "windows", "random"),
)
TITLES = ("one step at a time", "sets at once")


def pair_table(result: Any, *, text_set: str = "report", clip: float = 0.98) -> Figure:
    """Second differences of all pairs of blocks as a matrix, and by the distance of the two blocks.

    Args:
        clip: the colours end at this quantile of the sizes, so that one strong pair does not make all others white.
    """
    names = ("interactions", "signs", "community_test")
    rows, signs, test = (table[table.text_set == text_set] for table in map(result.tables.__getitem__, names))
    blocks = result.parameters["blocks"]
    grid = np.full((len(blocks), len(blocks)), np.nan)
    at = {block: place for place, block in enumerate(blocks)}
    places = rows.i.map(at), rows.j.map(at)
    grid[places] = grid[places[1], places[0]] = rows.second_difference
    end = max(1e-6, float(np.quantile(rows.second_difference.abs(), clip)))
    by = signs[(signs.by == "distance") & (signs.n_pairs >= 5)].assign(distance=lambda part: part["part"].astype(int))
    with shared.classroom():
        figure = shared.page(10.4)
        places_of: Any = [["matrix", "matrix"], ["means", "shares"]]
        matrix, means, shares = figure.subplot_mosaic(places_of, height_ratios=[1.6, 1]).values()
        matrix.set_facecolor("#E4E4E4")
        image = matrix.imshow(grid, cmap="PuOr_r", vmin=-end, vmax=end)
        stride = -(-len(blocks) // 10)
        for ticks in (matrix.set_xticks, matrix.set_yticks):
            ticks(np.arange(len(blocks))[::stride], blocks[::stride])
        words = ", ".join(f"{row.p:.2g} ({row.blocks})" for row in test.itertuples())
        matrix.set(xlabel="block", ylabel="block", title=f"second difference of each pair\ncommunities: p = {words}")
        label = f"nats per token; colours end at {end:.2g}\n(the largest: {rows.second_difference.abs().max():.2g})"
        figure.colorbar(image, ax=matrix, label=label, extend="both", shrink=0.9)
        means.plot(by.distance, by["mean"], "-o", color=BLUE, ms=5)
        means.fill_between(by.distance, by.mean_low, by.mean_high, color=BLUE, alpha=0.15, lw=0)
        means.set(ylabel="mean, nats per token", title="by distance (five pairs at least): mean, 95 %")
        means.axhline(0, color=GREY, lw=1)
        for column, color, dash, marker, name in (
            ("clear_positive", BLUE, _DASHES[0], "o", "above 0: blocks back each other up"),
            ("clear_negative", ORANGE, _DASHES[1], "s", "below 0: they need each other"),
        ):
            shares.plot(by.distance, by[column], color=color, ls=dash, marker=marker, ms=5, label=name)
        shares.axhline(0.025, color=GREY, lw=1.5, ls=":", label="either, by chance")
        shares.set(ylabel="share of pairs", title="whole interval on one side", ylim=(-0.03, 1.03))
        shared.legend_below(figure, shares, 1)
        for ax in (means, shares):
            ax.set_xlabel("distance of the two blocks")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(alpha=0.25)
        figure.suptitle(f"{shared.about_of(result)}, {text_set} texts")
    return figure


def block_search(result: Any) -> Figure:
    """Rise of the loss by blocks left out, on texts that chose and on others, and hypervolume by evaluations."""
    fronts, curves = result.tables["fronts"], result.tables["curves"]
    evaluations = result.parameters["evaluations"]
    with shared.classroom():
        figure, axes = shared.panels(12.6, 3, 2, sharex="row", sharey="row")
        for column, (methods, title) in enumerate(zip(PANELS, TITLES, strict=True)):
            for method in methods:
                color, dash, marker = LOOKS[method]
                part, curve = fronts[fronts.method == method], curves[curves.method == method]
                look: Any = {"color": color, "ls": dash}
                for ax, value, ends in (
                    (axes[0, column], "search_rise", ("search_low", "search_high")),
                    (axes[1, column], "report_rise", ("low", "high")),
                ):
                    ax.plot(part.n_removed, part[value], marker=marker, ms=6, label=method, **look)
                    ax.fill_between(part.n_removed, part[ends[0]], part[ends[1]], color=color, alpha=0.15, lw=0)
                shared.curve(axes[2, column], curve, color, x="evaluation", y="hypervolume", ls=dash)
            axes[0, column].set_title(f"{title}\nsearch texts (these chose)")
            axes[1, column].set_title("report texts")
            axes[2, column].set_title("hypervolume, search texts")
            axes[2, column].axvline(evaluations, color=GREY, lw=1.5, ls=":")
            axes[2, column].set_xlabel("evaluations (dotted: where\nmethods are compared)")
            axes[1, column].set_xlabel("blocks left out")
            axes[2, column].legend(*axes[1, column].get_legend_handles_labels(), loc="upper center",
                                   bbox_to_anchor=(0.5, -0.3), ncols=2, columnspacing=1)  # fmt: skip
        for ax in axes[:2].flat:
            ax.axhline(0, color=GREY, lw=1)
            ax.set_ylabel("rise of the loss, nats per token" if ax.get_subplotspec().is_first_col() else "")
        axes[2, 0].set_ylabel("blocks x nats")
        for ax in axes.flat:
            ax.grid(alpha=0.25)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(f"{shared.about_of(result)}; lines: median over seeds, bands: all seeds")
    return figure


def submodularity(result: Any) -> Figure:
    """Shares of violations by the sizes of the sets, trained and control; and the ratios behind gamma."""
    rows, ratios = result.summary, result.tables["ratios"]
    looks = {"trained": (BLUE, "o", "trained"), "random": (GREEN, "X", "control")}
    with shared.classroom():
        figure, (a, b, c) = shared.panels(11, 3, height_ratios=[1, 1, 1])
        for ax, name, words in ((a, "diminishing returns", "gain grows from {small} to {large} blocks"),
                                (b, "monotone", "loss rises when a block is added to {small}")):  # fmt: skip
            _violations(ax, rows[rows.property == name], words, looks)
        a.set_title("share of chains that violate diminishing returns")
        b.set_title("share of chains that violate monotonicity")
        sizes = list(dict.fromkeys(ratios["size"]))
        for shift, (weights, (color, marker, name)) in zip((-0.15, 0.15), looks.items(), strict=True):
            part = ratios[(ratios.weights == weights) & ratios.counted]
            if (ratios.weights == weights).any():
                places = [sizes.index(size) + shift for size in part["size"]]
                c.plot(
                    part.ratio,
                    places,
                    marker,
                    color=color,
                    ms=7,
                    alpha=0.7,
                    ls="none",
                    label=f"{name}, n = {len(part)}",
                )
        c.axvline(1, color=GREY, lw=1.5, ls=":")
        shared.categories(c, [f"to {size} blocks" for size in sizes])
        c.set(title="gains one by one / gain together\n(left of the dotted line: not submodular)", xlabel="ratio")
        c.legend(loc="best")
        figure.suptitle(
            f"{shared.about_of(result)}; lines: 95 % over chains\nhollow: beyond noise (chance: {0.025:.1%})"
        )
    return figure


def _violations(ax: Axes, rows: Any, words: str, looks: dict[str, tuple[str, str, str]]) -> None:
    pairs = list(dict.fromkeys(zip(rows.small, rows.large, strict=True)))
    for shift, (weights, (color, marker, name)) in zip((-0.15, 0.15), looks.items(), strict=True):
        part = rows[rows.weights == weights]
        if len(part):
            places = [pairs.index(pair) + shift for pair in zip(part.small, part.large, strict=True)]
            shared.dots(ax, part.rename(columns={"violations": "share"}), places, color, marker, label=name)
            ax.plot(part.clear_violations, places, marker, color="white", mec=color, mew=1.8, ms=8)
    shared.categories(ax, [words.format(small=small, large=large) for small, large in pairs])
    ax.set_xlim(-0.03, 1.03)
    ax.legend(loc="best")
