"""Figures of small nets trained for the depth budget, and of the depth at which a probe reads. Tables in, figures out."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, categories, classroom, legend_below, panels

Line = tuple[str, str, Any, str]  # words, colour, dash, marker
METHODS: dict[str, Line] = {
    "separate": ("a net for each depth", BLUE, "-", "o"),
    "sorted": ("sorted: one net, every prefix trained", ORANGE, (0, (5, 1.5)), "s"),
    "separate_shared": ("a net for each depth, all at the price of one", PURPLE, (0, (3, 1, 1, 1)), "D"),
    "standard": ("standard: one net, cut", RED, (0, (1, 1)), "v"),
}
SUBSETS: dict[tuple[str, str], Line] = {
    ("sorted", "others"): ("sorted, mean of other layers", ORANGE, (0, (5, 1.5)), "s"),
    ("sorted", "best_other"): ("sorted, best of other layers", GREEN, (0, (3, 1, 1, 1)), "D"),
    ("standard", "others"): ("standard, mean of other layers", RED, (0, (1, 1)), "v"),
    ("standard", "best_other"): ("standard, best of other layers", SKY, (0, (8, 3)), "^"),
}
NETS = {"triples 1": (BLUE, "o"), "pairs 3 longer": (RED, "v")}
READERS = {
    "policy": "policy's depth", "policy_sampled": "depth drawn from policy", "policy_mix": "mix, weights of policy",
    "policy_others": "policy, another's states", "softmax_mix": "mix, learned weights", "mean_mix": "mix, equal weights",
    "random": "random depth", "last": "last depth", "majority": "majority", "oracle": "oracle (no method)",
    "oracle_shuffled": "oracle, shuffled labels",
}  # fmt: skip
_CONTROLS = {"policy_others", "random", "last", "majority", "oracle", "oracle_shuffled"}


def nested(result: Any) -> Figure:
    """Loss of each prefix, and what other layers of the same net cost; t intervals over seeds."""
    about = result.parameters
    with classroom():
        figure, axes = panels(6.4, 1, 2)
        for name, line in METHODS.items():
            _line(axes[0], result.summary[result.summary.method == name], line, "mean", "low", "high")
        subsets = result.tables["subsets"]
        for (name, which), line in SUBSETS.items():
            part = subsets[(subsets.method == name) & (subsets.which == which)]
            _line(axes[1], part, line, "difference", "difference_low", "difference_high")
        axes[1].axhline(0, color=GREY, lw=1.2)
        axes[0].set(xlabel="layers that run", ylabel="nats a character", title="the first n layers")
        axes[1].set(
            xlabel="layers that run", ylabel="nats more than the first n layers", title="other layers than the first"
        )
        for ax, count in zip(axes, (about["n_layers"], about["n_layers"] - 1), strict=True):
            ax.set_xticks(range(1, count + 1))
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=11)
        figure.suptitle(f"{about['n_layers']} layers, {about['steps']} steps, prose; {len(about['seeds'])} seeds")
    return figure


def macaron(result: Any) -> Figure:
    """Loss of each variant minus that of the usual layer, paired by seed, with t intervals."""
    rows = result.summary[result.summary.against != ""]
    usual = result.summary[result.summary.against == ""].iloc[0]
    with classroom():
        figure, ax = panels(1.8 + 0.5 * len(rows))
        _differences(ax, rows, {layer: layer for layer in rows.layer}, set())
        ax.set(
            xlabel=f"nats a character more than {usual.layer} ({usual['mean']:.3f})",
            title=f"layers of one size; {len(result.parameters['seeds'])} seeds, paired",
        )
    return figure


def triples(result: Any) -> Figure:
    """Accuracy of each net on both tasks, with t intervals over seeds, and what the majority reaches."""
    about = result.parameters
    with classroom():
        figure, axes = panels(4.2, 1, 2, sharey=True)
        for ax, task in zip(axes, ("match2", "match3"), strict=True):
            rows = result.summary[result.summary.task == task]
            for place, row in enumerate(rows.itertuples()):
                color, marker = NETS.get(row.net, (ORANGE, "s"))
                ax.hlines(place, row.low, row.high, color=color)
                ax.plot(row.mean, place, marker, color=color, ms=8)
            ax.axvline(rows.majority.iloc[0], color=BLACK, ls=":", lw=1.6, label="majority")
            ax.locator_params(axis="x", nbins=4)
            categories(ax, rows.net.tolist())
            ax.set(xlabel="accuracy", title="Match2 (control)" if task == "match2" else "Match3")
        legend_below(figure, axes[0], 1)
        figure.suptitle(f"{about['n']} numbers below {about['modulus']}; {len(about['seeds'])} seeds")
    return figure


def depth_policy(result: Any) -> Figure:
    """Accuracy of each reader minus that of the best fixed depth, paired by split, on the set and on the planted one."""
    with classroom():
        figure, axes = panels(6.2, 1, 2, sharey=True)
        for ax, (name, rows) in zip(axes, result.summary.groupby("dataset", sort=False), strict=True):
            fixed = rows[rows.reader == "fixed"]["mean"].iloc[0]
            rows = rows[rows.reader.isin(READERS)]
            _differences(ax, rows.assign(name=rows.reader), READERS, _CONTROLS)
            ax.set(title=f"{name}: best fixed depth {fixed:.2f}")
            ax.locator_params(axis="x", nbins=4)
        figure.supxlabel("accuracy minus that of the best fixed depth")
        figure.suptitle(f"{result.parameters['model']}; {result.parameters['repeats']} splits, corrected resampled t")
    return figure


def _line(ax: Axes, rows: Any, line: Line, y: str, low: str, high: str) -> None:
    words, color, dash, marker = line
    rows = rows.sort_values("size")
    ax.plot(rows["size"], rows[y], color=color, ls=dash, marker=marker, ms=6, label=words)
    ax.vlines(rows["size"], rows[low], rows[high], color=color, lw=1.6)
    ax.grid(alpha=0.25)


def _differences(ax: Axes, rows: Any, words: Mapping[str, str], controls: set[str]) -> None:
    """One difference a line of the page, hollow and grey where it is a control."""
    for place, row in enumerate(rows.itertuples()):
        color = GREY if row.name in controls else BLUE
        ax.hlines(place, row.difference_low, row.difference_high, color=color)
        ax.plot(row.difference, place, "o", color=color, mfc="white" if row.name in controls else color, mew=1.8, ms=8)
    ax.axvline(0, color=BLACK, lw=1.2)
    categories(ax, [words[name] for name in rows.name])
