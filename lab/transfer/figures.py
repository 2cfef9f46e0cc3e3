"""Figures about what a layer's features are worth elsewhere. Tables in, figures out; every interval comes with its table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, categories, classroom, legend_below, panels

FOUR = {  # curve: words, what is subtracted, colour, marker
    "co_adaptation": ("co-adaptation", "base - BnB", BLUE, "o"),
    "specificity": ("specificity", "BnB - AnB", ORANGE, "s"),
    "recovery": ("recovery", "BnB+ - BnB", GREEN, "^"),
    "boost": ("boost", "AnB+ - BnB+", PURPLE, "D"),
}
OVER_N = {  # curve: words, colour, marker
    "specificity": ("own half's blocks - other half's (BnB - AnB)", ORANGE, "s"),
    "over_random": ("other half's blocks - random ones", GREEN, "X"),
    "over_random_matched": ("other half's blocks - random ones of matched size", RED, "v"),
}
LEVELS: dict[str, tuple[str, str, Any, str]] = {  # treatment: words, colour, dash, marker
    "BnB": ("BnB: own half's blocks, frozen", BLUE, "-", "o"),
    "AnB": ("AnB: other half's blocks, frozen", ORANGE, (0, (5, 1.5)), "s"),
    "BnB_plus": ("BnB+: own half's, trained on", SKY, (0, (8, 3)), "^"),
    "AnB_plus": ("AnB+: other half's, trained on", PURPLE, (0, (3, 1, 1, 1)), "D"),
    "random": ("random blocks, frozen", GREEN, (0, (2, 2)), "X"),
    "random_matched": ("random blocks of matched size", RED, (0, (1, 1)), "v"),
}
TAILS: dict[str, tuple[str, str, Any, str]] = {
    "K": ("K: other blocks kept and trained", BLUE, "-", "o"),
    "R": ("R: other blocks fresh, trained", ORANGE, (0, (5, 1.5)), "s"),
    "S": ("S: two fresh blocks instead", GREEN, (0, (3, 1, 1, 1)), "^"),
    "P": ("P: read-out alone", PURPLE, (0, (1, 1)), "D"),
}
SOURCES: list[tuple[str, Any, str]] = [
    (ORANGE, (0, (5, 1.5)), "s"), (PURPLE, (0, (3, 1, 1, 1)), "D"), (GREEN, (0, (2, 2)), "X"), (RED, (0, (1, 1)), "v"),
]  # fmt: skip
UNITS = {"accuracy": ("percentage points", 100.0), "nll": ("nats", 1.0)}


def transfer(result: Any, *, metric: str = "accuracy") -> Figure:
    """The four curves over n, paired, with t intervals over splits and seeds."""
    if result.summary.empty:
        raise ValueError("no split passed its gate, so there is no curve to draw; look at .tables['gate']")
    about = result.parameters
    title = f"task {about['task']}, {about['distance']} halves; {about['model']}; {about['splits']} splits"
    n_star = result.tables["n_star"].query("metric == @metric")
    return transfer_curves(result.summary, metric=metric, title=title, n_star=float(n_star.n_star.iloc[0]))


def transfer_curves(curves: Any, *, metric: str = "accuracy", title: str = "", n_star: float = np.nan) -> Figure:
    """Co-adaptation, specificity, recovery and boost (of `statistics.curves`) over n with intervals; `n_star` is marked."""
    if metric not in UNITS:
        raise ValueError(f"metric={metric!r}: choose one of {', '.join(UNITS)}")
    unit, scale = UNITS[metric]
    rows = curves[curves.metric == metric]
    with classroom():
        figure, axes = panels(7.6, 2, 2, sharey=True)
        for ax, (curve, (words, what, color, marker)) in zip(axes.flat, FOUR.items(), strict=True):
            part = rows[rows.curve == curve]
            if part.empty:
                ax.text(0.5, 0.5, "no two runs\ncan be paired", ha="center", transform=ax.transAxes, color=GREY)
                ax.set_xticks([])
            _over_n(ax, part, color, marker, scale=scale)
            _zero(ax)
            ax.set(title=f"{words}: {what}", xlabel="n: blocks copied")
            if curve == "specificity" and np.isfinite(n_star):
                ax.axvline(n_star, color=color, ls=":", lw=1.6)
                ax.text(n_star, 0.98, f" n* = {n_star:.0f}", transform=ax.get_xaxis_transform(), color=color, va="top")
        of_what = "accuracy" if metric == "accuracy" else "negative log-likelihood, sign turned"
        figure.supylabel(f"paired difference, {of_what} ({unit})")
        figure.suptitle(title)
    return figure


def over_n_by_task(tasks: Mapping[str, Any], curves: Sequence[str]) -> Figure:
    """Some of `statistics.curves` over n, a panel for each task (title: its curves), with their intervals; accuracy."""
    if set(curves) - set(OVER_N):
        raise ValueError(f"curves={list(curves)}: choose some of {', '.join(OVER_N)}")
    with classroom():
        figure, axes = panels(4.2, 1, len(tasks), sharey=True, squeeze=False)
        for ax, (title, rows) in zip(axes[0], tasks.items(), strict=True):
            for curve in curves:
                words, color, marker = OVER_N[curve]
                part = rows[(rows.metric == "accuracy") & (rows.curve == curve)]
                _over_n(ax, part, color, marker, scale=100.0, label=words)
            _zero(ax)
            ax.set(title=title, xlabel="n: blocks copied (E: the embedding)")
        axes[0, 0].set_ylabel("difference of accuracy\n(percentage points)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles[: len(curves)], labels[: len(curves)], loc="outside lower center", ncol=2)
    return figure


def transfer_levels(result: Any, *, metric: str = "accuracy", treatments: Sequence[str] = tuple(LEVELS)) -> Figure:
    """What every treatment reaches at each n, beside the base. Splits differ in difficulty: compare with `transfer`."""
    if set(treatments) - set(LEVELS):
        raise ValueError(f"treatments={list(treatments)}: choose some of {', '.join(LEVELS)}")
    rows = result.tables["levels"].query("metric == @metric")
    about = result.parameters
    with classroom():
        figure, ax = panels(5.8)
        base = rows[rows.treatment == "base"].iloc[0]
        ax.axhline(base.estimate, color=BLACK, lw=1.6, label=f"base: fresh net ({base.estimate:.2f})")
        for name in treatments:
            words, color, dash, marker = LEVELS[name]
            part = rows[(rows.treatment == name) & (rows.part == "blocks")].sort_values("n")
            if len(part):
                ax.plot(part.n, part.estimate, color=color, ls=dash, marker=marker, label=words)
        if metric == "accuracy":
            ax.axhline(1 / about["n_classes"], color=GREY, ls=(0, (1, 3)), label="chance")
        ax.set(
            xlabel=f"n: blocks copied, of {about['n_blocks']}",
            ylabel="accuracy on fresh test examples" if metric == "accuracy" else "negative log-likelihood (nats)",
            title=f"task {about['task']}, {about['distance']} halves; means of {about['splits']} splits",
        )
        ax.set_xticks(sorted(set(rows[rows.part == "blocks"].n)))
        ax.grid(alpha=0.25)
        legend_below(figure, ax, 2)
    return figure


def paired_and_unpaired(table: Any) -> Figure:
    """Gain over the base, against the mean of all bases and against each run's own; percentage points."""
    names = {"AnB_plus": "AnB+\n(other half's features)", "BnB_plus": "BnB+\n(own half's features)"}
    rows = table.set_index("treatment").reindex(list(names))
    with classroom():
        figure, ax = panels(3.4)
        for column, color, marker, words in (
            ("unpaired", ORANGE, "s", "against the mean of all bases (as drawn in the paper)"),
            ("paired", BLUE, "o", "each against its own base"),
        ):
            ax.plot(100 * rows[column], range(len(rows)), marker, color=color, ms=12, label=words)
        ax.axvline(0, color=BLACK, lw=1)
        ax.set(xlabel="gain of accuracy, mean over n (percentage points)", title="Published runs, ImageNet")
        categories(ax, list(names.values()))
        legend_below(figure, ax, 1)
    return figure


def transfer_pretrained(result: Any) -> Figure:
    """Accuracy by number of frozen blocks, trained and random weights, beside bag of words and majority."""
    rows, about = result.summary, result.parameters
    with classroom():
        figure, axes = panels(5.4, 1, 2, sharey=True)
        for ax, weights, words in ((axes[0], "trained", "pretrained"), (axes[1], "random", "random weights (null)")):
            for place, (name, (label, color, dash, marker)) in enumerate(TAILS.items()):
                part = rows[(rows.weights == weights) & (rows.treatment == name)].sort_values("n")
                if len(part):
                    x = part.n + 0.25 * (place - 1.5)  # side by side, or the intervals hide each other
                    _bars(ax, x, part, "accuracy", (color, dash, marker), label=label, elinewidth=1.4)
            for name, color, dash in (("bag_of_words", BLACK, (0, (8, 3))), ("majority", GREY, (0, (1, 3)))):
                for value in rows[rows.treatment == name].accuracy:
                    ax.axhline(value, color=color, ls=dash, lw=1.6, label=f"{name.replace('_', ' ')} ({value:.2f})")
            ax.set(title=words, xlabel=f"n: frozen blocks, of {about['n_layers']}")
            ax.grid(alpha=0.25)
        axes[0].set_ylabel("accuracy on unseen groups")
        legend_below(figure, axes[0], 2)
        figure.suptitle(f"{about['model']} on {about['dataset']}")
    return figure


def transfer_tuned(result: Any) -> Figure:
    """Left: accuracy on the target by whose first n blocks it reads. Right: own minus other tasks' blocks, paired by text."""
    rows, gaps, about = result.summary, result.tables["differences"], result.parameters
    learnt = result.tables["sources"].set_index("source").learnt
    lines = [
        ("BnB", about["dataset"], "tuned on the target itself (BnB)", BLUE, "-", "o"),
        ("untouched", "untouched", "not tuned", BLACK, (0, (8, 3)), "^"),
        *(("AnB", name, f"tuned on {name} (AnB){'' if learnt[name] else ', not learnt'}", *look)
          for name, look in zip(about["sources"], SOURCES, strict=False)),
    ]  # fmt: skip
    with classroom():
        figure, (left, right) = panels(5.4, 1, 2, sharex=True)
        for place, (treatment, source, words, *look) in enumerate(lines):
            shift = 0.3 * (place - (len(lines) - 1) / 2)  # side by side, or the intervals hide each other
            part = rows[(rows.treatment == treatment) & (rows.source == source)].sort_values("n")
            _bars(left, part.n + shift, part, "accuracy", look, label=words, elinewidth=1.4)
            part = gaps[(gaps.curve == "specificity") & (gaps.source == source)].sort_values("n")
            if len(part):
                _bars(right, part.n + shift, part, "difference", look, scale=100.0, capsize=3)
        right.axhline(0, color=BLACK, lw=1)
        if not (gaps.curve == "specificity").any():
            nothing = "no two tasks were learnt:\nnothing to compare"
            right.text(0.5, 0.5, nothing, ha="center", transform=right.transAxes)
        left.set(ylabel="accuracy on unseen groups", title=f"{about['dataset'].replace('_', ' ')}")
        right.set(ylabel="BnB - AnB (percentage points)", title="specificity, paired by text")
        for ax in (left, right):
            ax.set_xlabel(f"n: blocks carried over\nand frozen, of {about['n_layers']}")
            ax.set_xticks(sorted(set(rows.n)))
            ax.grid(alpha=0.25)
        legend_below(figure, left, 2)
        figure.suptitle(f"{about['model']}: first n blocks after tuning on another task")
    return figure


def paired_runs(pairs: Any, curve: Any, *, n: Any, words: str, metric: str = "accuracy") -> Figure:
    """For the explorer: one curve over n with the chosen n ("E": the embedding) marked, and the pairs behind that one point."""
    unit, scale = UNITS[metric]
    with classroom():
        figure, (left, right) = panels(4.4, 1, 2, sharey=True, width_ratios=[3, 2])
        _over_n(left, curve[curve.metric == metric], BLUE, "o", scale=scale)
        left.axvline(0.5 if n == "E" else n, color=ORANGE, lw=10, alpha=0.25)
        at_n = pairs.part == "embedding" if n == "E" else (pairs.part != "embedding") & (pairs.n == n)
        here = pairs[(pairs.metric == metric) & at_n]
        for target, color, marker in (("A", GREEN, "^"), ("B", ORANGE, "s")):
            part = here[here.target == target]
            if len(part):
                right.plot(part.split, scale * part.difference, marker, color=color, ms=10, label=f"target {target}")
        for ax in (left, right):
            _zero(ax)
        left.set(xlabel="n: blocks copied", ylabel=f"{words}\n({unit})", title="mean of splits, with interval")
        right.set(xlabel="split", title=f"each pair at n = {n}")
        right.set_xticks(sorted(set(here.split)))
        right.legend()
    return figure


def flipped_digits(side: Any, flipped: Any, names: Sequence[str]) -> Figure:
    """Up to 16 test images of a half (`tasks.Side`) that one of two nets (columns of items) gets right and the other wrong."""
    shown = flipped.sample(min(16, len(flipped)), random_state=0).sort_values("item").to_dict("records")
    with classroom():
        figure, axes = panels(3.6, 2, 8)
        for ax in axes.flat:
            ax.axis("off")
        for ax, row in zip(axes.flat, shown, strict=False):
            patches = side.test.inputs[row["item"]].reshape(4, 4, 2, 2)
            ax.imshow(patches.transpose(0, 2, 1, 3).reshape(8, 8), cmap="gray_r")
            label, first, second = (side.classes[int(row[name])] for name in ("label", *names))
            ax.set_title(f"is {label}\n{first} | {second}", color=BLUE if first == label else RED, fontsize=12)
        count = f"{len(shown)} of {len(flipped)}" if len(shown) else "none"
        said = f"what {names[0]} | {names[1]} say; blue: the first is right"
        figure.suptitle(f"Items that flip ({count}): {said}", fontsize=12)
    return figure


def _zero(ax: Axes) -> None:
    ax.axhline(0, color=BLACK, lw=1)
    ax.grid(alpha=0.25)


def _bars(ax: Axes, x: Any, rows: Any, column: str, look: Sequence[Any], *, scale: float = 1.0, **options: Any) -> None:
    """A line with the intervals of its rows; look: colour, dash, marker."""
    y, low, high = (scale * rows[name] for name in (column, "low", "high"))
    color, dash, marker = look
    ax.errorbar(x, y, np.nan_to_num([y - low, high - y]), color=color, ls=dash, marker=marker, **options)


def _over_n(ax: Axes, part: Any, color: str, marker: str, *, scale: float = 1.0, label: str = "") -> None:
    """One curve with error bars; the embedding alone stands between 0 and 1 as E, not joined to the line."""
    blocks, lone = part[part.part != "embedding"].sort_values("n"), part[part.part == "embedding"]
    for rows, x, dash in ((blocks, blocks.n.to_numpy(float), "-"), (lone, np.full(len(lone), 0.5), "none")):
        if len(rows):
            words = label if rows is blocks else ""
            _bars(ax, x, rows, "estimate", (color, dash, marker), scale=scale, ms=8, capsize=3, label=words)
    ticks: Mapping[float, str] = {float(n): str(n) for n in sorted(set(blocks.n))} | ({0.5: "E"} if len(lone) else {})
    if ticks:
        ax.set_xticks(list(ticks), list(ticks.values()))
