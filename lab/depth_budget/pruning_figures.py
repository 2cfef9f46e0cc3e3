"""Figures about pruning: curves of blocks, damages that should add, allocations. Tables in, figures out."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab import figures as shared
from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED

LOOKS: dict[str, tuple[str, str, Any]] = {
    "pruned": (BLUE, "o", "-"),
    "rounded": (ORANGE, "s", (0, (5, 1.5))),
    "noise": (GREEN, "^", (0, (1, 1))),
    "left out": (PURPLE, "D", (0, (3, 1, 1, 1))),
}
SHAPES = {
    "programme": (RED, "*", 15),
    "programme by matrix": (GREEN, "X", 11),
    "programme + swaps": (ORANGE, "P", 10),
    "uniform": (BLACK, "o", 9),
}
UNITS = {"distortion": "distortion", "kl": "KL", "nll": "rise of the loss"}


def rate_distortion(result: Any) -> Figure:
    """D by share pruned: every block as a row of colours, and four blocks as curves with their measured points."""
    curves, n_layers = result.tables["curves"], result.parameters["n_layers"]
    with shared.classroom():
        figure, (a, b) = shared.panels(5.0, 1, 2)
        grid = curves[curves.rate > 0].pivot(index="layer", columns="rate", values="raw")
        with np.errstate(divide="ignore"):
            values = np.log10(grid.to_numpy())
        values = np.where(np.isfinite(values), values, np.nan)
        image = a.imshow(values, aspect="auto", cmap="viridis", extent=(0.5, 100.5, n_layers - 0.5, -0.5))
        a.set(xlabel="% of the block's weights gone", ylabel="block", title="log10 of the distortion")
        figure.colorbar(image, ax=a)
        blocks = np.unique(np.linspace(0, n_layers - 1, 4).round().astype(int))
        for layer, (color, marker, dash) in zip(blocks, LOOKS.values(), strict=False):
            mine = curves[(curves.layer == layer) & (curves.rate > 0)]
            b.plot(100 * mine.rate, mine.monotone, color=color, ls=dash, label=f"block {layer}")
            points = mine[mine.is_measured.astype(bool)]
            b.plot(100 * points.rate, points.raw, marker, color=color, ms=7)
        b.set(xlabel="% of the block's weights gone", ylabel="distortion of the logits", yscale="log")
        b.set_title("points measured,\nlines monotone")
        b.grid(alpha=0.25)
        b.legend()
        figure.suptitle(f"{shared.about_of(result)}, {result.parameters['n_search']} texts")
    return figure


def verdict(result: Any, *, budget: float | None = None) -> Figure:
    """Predicted against measured distortion over all budgets; the loss of every method at one budget.

    Args:
        budget: of the result's; None is the middle one.
    """
    summary, random, band = result.summary, result.tables["random"], result.tables["band"]
    budget = _budget(result, budget)
    with shared.classroom():
        figure, (a, b) = shared.panels(5.8, 1, 2)
        some = summary.dropna(subset="predicted")
        both = np.concatenate([some[["predicted", "measured"]], random[["predicted", "measured"]]])
        ends = both[both > 0].min() * 0.8, both.max() * 1.25
        a.plot(ends, ends, color=GREY, lw=1.2, ls=(0, (1, 1)))
        a.plot(random.predicted, random.measured, "x", color=GREY, ms=5, label="random")
        for method, (color, marker, size) in SHAPES.items():
            mine = some[some.method == method]
            a.plot(mine.predicted, mine.measured, marker, color=color, ms=size, ls="none", label=method)
        a.set(xscale="log", yscale="log", xlabel="predicted: sum of single ones", ylabel="measured")
        a.set_title(f"distortion, {result.parameters['n_search']} texts that chose\n(dotted: damages that add)")
        mine = summary[summary.budget == budget].sort_values("rise").reset_index(drop=True)
        spread = band[band.budget == budget].iloc[0]
        b.axvspan(spread.low, spread.high, color=GREY, alpha=0.25, lw=0)
        for y, row in enumerate(mine.itertuples()):
            color, marker, _ = SHAPES.get(row.method, (BLUE, "o", 8))
            b.hlines(y, row.low, row.high, color=color, lw=2.2)
            b.plot(row.rise, y, marker, color=color, ms=9)
        shared.categories(b, [method.replace(" of ", "\nof ") for method in mine.method])
        b.tick_params(axis="y", labelsize=11)
        shared.logarithmic_beyond(b, 0.1)
        b.set_title(f"{100 * budget:.0f} % gone, {result.parameters['n_report']} other texts\n(bars 95 %, grey random)")
        b.set_xlabel("rise of the loss, nats")
        a.grid(alpha=0.25)
        a.legend()
        figure.suptitle(shared.about_of(result))
    return figure


def shares_by_matrix(result: Any, *, budget: float | None = None) -> Figure:
    """Which share of every single matrix the programme takes at one budget, and which of whole blocks.

    Args:
        budget: of the result's; None is the middle one.
    """
    if "matrix_shares" not in result.tables:
        raise ValueError("no shares of single matrices: this was made with matrix_rates=()")
    blocks, matrices = result.tables["allocations"], result.tables["matrix_shares"]
    budget = _budget(result, budget)
    blocks = blocks[(blocks.budget == budget) & (blocks.method == "programme")].set_index("layer").share
    matrices = matrices[matrices.budget == budget].pivot(index="matrix", columns="layer", values="share")
    matrices = matrices.loc[result.parameters["matrices"]]
    with shared.classroom():
        figure, ax = shared.panels(4.8, 1, 1)
        values = 100 * np.vstack([blocks.to_numpy(), matrices.to_numpy()])
        image = ax.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=100)
        short = [name.split(".")[-1] for name in matrices.index]
        ax.set_yticks(
            range(len(values)), ["one share a block", *(short if len({*short}) == len(short) else matrices.index)]
        )
        ax.axhline(0.5, color="white", lw=4)
        ax.set(xlabel="block", title=f"{100 * budget:.0f} % of all weights gone, by the programme: top, one share\n"
               "a block; below, a share for each matrix")  # fmt: skip
        figure.colorbar(image, ax=ax, label="% of its weights gone")
        figure.suptitle(f"{shared.about_of(result)}, {result.parameters['n_search']} texts")
    return figure


def _budget(result: Any, budget: float | None) -> float:
    there = sorted(result.summary.budget.unique())
    budget = there[len(there) // 2] if budget is None else budget
    if budget not in there:
        raise ValueError(f"budget={budget}: choose one of {', '.join(map(str, there))}")
    return budget


def additivity(result: Any) -> Figure:
    """rho of random and adjacent pairs by kind and level, and the cosines of the logits' differences."""
    summary, pairs = result.summary, result.tables["pairs"]
    with shared.classroom():
        figure, (a, b) = shared.panels(5.8, 1, 2, sharey=True)
        rows = list(dict.fromkeys(zip(summary.kind, summary.level, strict=True)))
        for shift, where, color, marker in ((-0.16, "random pairs", BLUE, "o"), (0.16, "adjacent pairs", ORANGE, "s")):
            here = summary[(summary.measure == "distortion") & (summary["where"] == where)]
            for y, (kind, level) in enumerate(rows):
                row = here[(here.kind == kind) & (here.level == level)].iloc[0]
                a.hlines(y + shift, row.sets_low, row.sets_high, color=color, lw=1.4, alpha=0.7)
                a.hlines(y + shift, row.low, row.high, color=color, lw=4)
                a.plot(row.median_ratio, y + shift, marker, color=color, ms=8, label=where if y == 0 else None)
                mine = pairs[(pairs.kind == kind) & (pairs.level == level) & (pairs["where"] == where)]
                b.plot(mine.cosine, np.full(len(mine), y + shift), "|", color=color, ms=9, alpha=0.6)
        shared.categories(a, [f"{kind}, {level}" if level != "whole" else kind for kind, level in rows])
        a.axvline(1, color=GREY, lw=1)
        b.axvline(0, color=GREY, lw=1)
        a.set(xlabel="joint / sum of distortions")
        a.set_title("rho: thick 95 % over texts,\nthin 5-95 % of the pairs")
        b.set(xlabel="cosine of two logit differences", title="each stroke a pair")
        b.grid(alpha=0.25, axis="x")
        shared.legend_below(figure, a, 2)
        figure.suptitle(f"{shared.about_of(result)}, {result.parameters['n_texts']} texts")
    return figure


def additivity_by_size(
    result: Any, *, level: str = "medium", measures: tuple[str, str] = ("distortion", "nll")
) -> Figure:
    """Joint over sum by how many blocks are changed, for each kind: of the distortion, and of a measure not claimed to add."""
    summary, n_layers = result.summary, result.parameters["n_layers"]
    with shared.classroom():
        figure, axes = shared.panels(4.8, 1, 2)
        for ax, measure in zip(axes, measures, strict=True):
            for kind, (color, marker, dash) in LOOKS.items():
                mine = summary[
                    (summary.kind == kind) & summary.level.isin([level, "whole"]) & (summary.measure == measure)
                ]
                mine = mine[mine["where"] != "adjacent pairs"]
                if len(mine):
                    sizes = [_size(where, n_layers) for where in mine["where"]]
                    _line(ax, mine.assign(size=sizes).sort_values("size"), color, marker, dash, kind)
            ax.axhline(1, color=GREY, lw=1)
            ax.set(xscale="log", xlabel="blocks changed together", title=UNITS[measure])
            ticks = [size for size in (2, 4, 8, 16) if size < n_layers] + [n_layers]
            ax.set_xticks(ticks, [str(tick) for tick in ticks])
            ax.minorticks_off()
            ax.grid(alpha=0.25)
        axes[0].set_ylabel("joint / sum, median")
        shared.legend_below(figure, axes[0], 4)
        figure.suptitle(f"{shared.about_of(result)}, {level} changes; bands: 95 % over texts")
    return figure


def _line(ax: Axes, rows: Any, color: str, marker: str, dash: Any, label: str) -> None:
    ax.plot(rows["size"], rows.median_ratio, color=color, marker=marker, ls=dash, ms=7, label=label)
    ax.fill_between(rows["size"], rows.low, rows.high, color=color, alpha=0.13, lw=0)


def _size(where: str, n_layers: int) -> int:
    return n_layers if where == "all blocks" else 2 if where.endswith("pairs") else int(where.split()[-1])
