"""Figures about bits by block. Tables in, figures out: no average, no fit."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab import figures as shared
from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE

LOOKS = ((BLUE, "-", "o"), (ORANGE, (0, (5, 1.5)), "s"), (GREEN, (0, (1, 1)), "^"), (PURPLE, (0, (3, 1, 1, 1)), "D"))
USUAL = (
    "damage",
    "LIM, flattened",
    "ZD, above, matrix",
    "first to last",
)  # what is drawn where nothing else is asked for


def layer_bits(result: Any, *, pair: str | None = None, orders: Sequence[str] = USUAL, model: bool = False) -> Figure:
    """Loss against average bits as one block after the other is lowered, beside the band of random orders.

    Args:
        pair: "4/2"; None is the first one. orders: at most four of the result's. model: bits of the whole model, with what
            stays at 16 bits; else of the blocks alone.
    """
    rows, bands = result.summary, result.tables["bands"]
    there = list(dict.fromkeys(bands.sweep))
    pair = there[0] if pair is None else pair
    if pair not in there:
        raise ValueError(f"pair={pair!r}: choose one of {', '.join(there)}")
    rows, band = rows[rows.sweep == pair], bands[(bands.sweep == pair) & (bands.measure == "rise")]
    if unknown := [name for name in orders if name not in set(rows.order)]:
        raise ValueError(f"orders holds {unknown[0]!r}: choose of {', '.join(dict.fromkeys(rows.order))}")
    if len(orders) > len(LOOKS):
        raise ValueError(f"{len(orders)} orders: {len(LOOKS)} at most can be told apart")
    x = "bits_model" if model else "bits"
    if model:
        whole = rows.drop_duplicates("bits").set_index("bits").bits_model
        band = band.assign(bits_model=whole.reindex(band.bits, method="nearest").to_numpy())
    with shared.classroom():
        figure, ax = shared.panels(5.2)
        ax.fill_between(
            band[x], band.low, band.high, color=GREY, alpha=0.3, lw=0, label="5-95 % of random orders"
        )  # of their means
        for name, (color, dash, marker) in zip(orders, LOOKS, strict=False):
            part = rows[rows.order == name]
            ax.plot(part[x], part.rise, color=color, ls=dash, marker=marker, ms=5, label=name)
            ax.vlines(part[x], part.low, part.high, color=color, lw=1.2)
        _nats(ax, max(rows.high.max(), band.high.max()))
        ax.invert_xaxis()
        of = "model, all else at 16" if model else "blocks' weights"
        ax.set(xlabel=f"bits a weight on average ({of}; steps counted)", ylabel="rise of the loss, nats a token")
        shared.legend_below(figure, ax, 2)
        figure.suptitle(
            f"Blocks lowered from {pair.replace('/', ' to ')} bits, least important first\n{_about(result)}"
        )
    return figure


def bits_control(result: Any) -> Figure:
    """The same average bits in several ways: one level, two levels in an order, any level by the programme."""
    rows, random = (result.tables["controls"].query(f"kind {sign} 'random'") for sign in ("!=", "=="))
    with shared.classroom():
        figure, ax = shared.panels(2.7 + 0.55 * len(rows))
        names = [f"{row.method}\n({row.bits:.3f} bits)" for row in rows.itertuples()]
        ax.plot(random.rise, [len(rows)] * len(random), "|", color=GREY, ms=14, mew=2, label="random, report texts")
        ax.hlines(range(len(rows)), rows.low, rows.high, color=BLUE, lw=2.2)
        ax.plot(rows.rise, range(len(rows)), "o", color=BLUE, ms=8, label="measured, report texts")
        above = [place + 0.25 for place in range(len(rows))]
        ax.plot(rows.predicted, above, "x", color=BLACK, ms=8, mew=2, label="sum of single blocks, search texts")
        ax.plot(rows.on_search, above, "o", mfc="none", mec=BLACK, ms=8, mew=1.6, label="measured, search texts")
        shared.categories(ax, [*names, f"two levels,\n{len(random)} random orders"])
        logarithmic = shared.logarithmic_beyond(ax, 0.5)
        if logarithmic:
            ax.set_xlim(left=0)
            ax.set_xticks(
                ticks := [tick for tick in (0, 0.5, 1, 2, 5, 10, 20) if tick < ax.get_xlim()[1]], map(str, ticks)
            )
        ax.set_xlabel("rise of the loss, nats a token" + logarithmic * " (logarithmic beyond 0.5)")
        shared.legend_below(figure, ax, 2)
        figure.suptitle(f"One budget of bits, spent in different ways\n{_about(result)}")
    return figure


def prune_or_quantise(result: Any) -> Figure:
    """Blocks left out against blocks at 2 bits, each in the order of its own measured damage."""
    rows = result.summary[result.summary.sweep == "prune or quantise"]
    with shared.classroom():
        figure, ax = shared.panels(4.4)
        for name, words, (color, dash, marker) in zip(
            ("2 bits", "left out"), ("at 2 bits", "left out"), LOOKS, strict=False
        ):
            part = rows[rows.order == name]
            where = part.k + (0.08 if name == "left out" else -0.08)  # beside one another
            ax.plot(where, part.rise, color=color, ls=dash, marker=marker, ms=6, label=words)
            ax.vlines(where, part.low, part.high, color=color, lw=1.6)
        _nats(ax, rows.high.max())
        ax.set(xlabel="blocks changed, by measured damage, the others intact", ylabel="rise of the loss, nats a token")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(loc="upper left")
        figure.suptitle(f"Blocks left out, or kept at 2 bits\n{_about(result)}")
    return figure


def _nats(ax: Axes, largest: float) -> None:
    """From 0 on a linear scale to 0.1 and a logarithmic one beyond, where that is needed."""
    if largest > 1:
        ax.set_yscale("symlog", linthresh=0.1, linscale=0.5)
        ticks = [tick for tick in (0, 0.05, 0.1, 0.3, 1, 3, 10, 30) if tick < 1.5 * largest]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_yticks([], minor=True)
    ax.grid(alpha=0.25, axis="y")


def _about(result: Any) -> str:
    return f"{shared.about_of(result)}, {result.parameters['n']} texts; bars: 95 % over texts"
