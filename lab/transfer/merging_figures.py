"""Figures about merging, layer ensembles, probes across data sets, and stitching. Tables in, figures out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab import figures as shared
from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED

METHODS = {
    "own": "own models (no merge)",
    "base": "base body",
    "averaging": "averaging",
    "task_arithmetic": "task arithmetic",
    "task_arithmetic_lines": "... with LiNeS",
    "task_arithmetic_reversed": "... ramp reversed (control)",
    "ties": "TIES",
    "ties_lines": "... with LiNeS",
    "ties_reversed": "... ramp reversed (control)",
    "consensus": "Consensus",
    "consensus_lines": "... with LiNeS",
    "consensus_reversed": "... ramp reversed (control)",
    "concrete": "Concrete",
    "concrete_draw": "... one draw of the mask",
    "concrete_shuffled": "... mask shuffled (control)",
    "by_block": "... one number a block (control)",
    "by_task": "... one number per task (control)",
}
SCALINGS = {
    "untouched": "untouched model",
    "tuned": "tuned, unscaled",
    "lines": "LiNeS",
    "reversed": "ramp reversed (control)",
    "wise_ft": "one constant (WiSE-FT)",
    "same_norm": "constant, update of same length",
    "permuted": "LiNeS' factors in random order",
    "frozen": "first blocks frozen in tuning",
    "ramp_only": "ramp from 0 (alpha 0)",
}
ENSEMBLE = {
    "levi": "ensemble over layers",
    "random_lm": "... on random weights (null)",
    "lm_only": "language model alone",
    "lm_only_wide": "... with as many weights",
    "small_only": "small model alone",
    "small_only_wide": "... with as many weights",
    "last_depth": "last depth only",
    "logit_average": "logits averaged, trained apart",
    "bag_of_words": "bag of words",
    "majority": "majority",
}
STITCHED = {
    "own_states": ("Y's own states (must be 0)", GREY, "*"),
    "mapped": ("X's states, mapped", BLUE, "o"),
    "random_weights": ("random X, mapped (null)", GREEN, "X"),
    "shuffled_pairs": ("map fitted on shuffled pairs", RED, "v"),
    "token_identity": ("Y's embedding, mapped", ORANGE, "s"),
    "mean_state": ("mean state", PURPLE, "D"),
}


def merging(result: Any, *, metric: str = "normalised") -> Figure:
    """What each merger reaches, and the paired differences that say whether scaling by depth or a learnt mask helps."""
    levels = result.tables["levels"].query("part == 'merge' and metric == @metric").set_index("method")
    pairs = result.summary.query("part == 'merge' and metric == @metric and family in ['lines', 'concrete']")
    if levels.empty:
        raise ValueError("no run passed its gate, so there is nothing to draw; look at .tables['gate']")
    names = {name: words for name, words in METHODS.items() if name in levels.index}
    with shared.classroom():
        figure, (above, below) = shared.panels(
            1.8 + 0.26 * (len(names) + len(pairs)), 2, height_ratios=[len(names), len(pairs)]
        )
        dots(above, levels.reindex(list(names)), list(names.values()), BLUE, "o")
        unit = "accuracy / the own model's" if metric == "normalised" else metric
        above.set(xlabel=f"{unit} (test; mean over tasks)", title="level", xlim=(0, 1.15))
        sides = [_against(*both) for both in zip(pairs["first"], pairs["second"], strict=True)]
        dots(below, pairs, sides, ORANGE, "s")
        below.axvline(0, color=BLACK, lw=1)
        below.locator_params(axis="x", nbins=6)
        below.set(xlabel=f"difference of {unit}, paired", title="paired difference")
        about = result.parameters
        figure.suptitle(f"{about['dataset']}: {int(pairs.n_clusters.max())} bases, 95 % t intervals")
    return figure


def mask_profile(result: Any) -> Figure:
    """By block: Concrete's mean mask, and how long the masked update is against the unmasked one; thin lines are splits."""
    rows = result.tables["mask_profile"]
    looks = {
        "concrete": (BLUE, "o", "-", "Concrete"),
        "concrete_shuffled": (ORANGE, "s", (0, (5, 1.5)), "mask shuffled (control)"),
    }
    blocks = list(dict.fromkeys(rows.block))  # the embedding first
    words = {"mean_mask": "mean of the mask", "update_ratio": "update, masked / unmasked"}
    with shared.classroom():
        figure, axes = shared.panels(4.4, 1, 2)
        for ax, (column, label) in zip(axes, words.items(), strict=True):
            for name, (color, marker, dash, legend) in looks.items():
                part = rows[rows["mask"] == name].pivot(index=["split", "seed"], columns="block", values=column)[blocks]
                ax.plot(range(len(blocks)), part.T, color=color, lw=0.8, alpha=0.5)
                ax.plot(range(len(blocks)), part.mean(), color=color, marker=marker, ls=dash, label=legend)
            ax.set(xlabel="block", ylabel=label)
            ax.set_xticks(range(len(blocks)), blocks)
            ax.grid(alpha=0.25)
        shared.legend_below(figure, axes[0], 2)
    return figure


def tuned_scaling(result: Any) -> Figure:
    """What each scaling of the update keeps of the target and of the controls, on test texts."""
    rows = result.summary
    with shared.classroom():
        figure = shared.page(7.4)
        axes = figure.subplot_mosaic([["target", "control"], ["score", "score"]])
        words = {
            "target": "target accuracy",
            "control": "control accuracy\n/ untouched model's",
            "score": "score: 2 x target / tuned model's + control",
        }
        for measure, name in words.items():
            part = rows[rows.measure == measure].set_index("method")
            names = {method: label for method, label in SCALINGS.items() if method in part.index}
            dots(axes[measure], part.reindex(list(names)), list(names.values()), BLUE, "o")
            axes[measure].set_xlabel(name)
        axes["control"].tick_params(labelleft=False)  # the names stand at the left
        figure.suptitle(f"{result.parameters['model']} tuned on {result.parameters['dataset']}; test texts")
    return figure


def layer_ensemble(result: Any) -> Figure:
    """Accuracy of the ensemble and of its parts, on texts like those trained on and on shifted ones."""
    titles = {"like": "texts like those trained on", "shifted": "shifted texts"}
    with shared.classroom():
        figure, axes = shared.panels(4.8, 1, 2, sharey=True)
        for ax, (test, words) in zip(axes, titles.items(), strict=True):
            part = result.summary[result.summary.test == test].set_index("treatment")
            names = {name: label for name, label in ENSEMBLE.items() if name in part.index}
            rows = part.reindex(list(names)).rename(columns={"accuracy": "estimate"})
            dots(ax, rows, list(names.values()), BLUE, "o")
            ax.set(xlabel="accuracy", title=words)
        figure.suptitle(f"{result.parameters['model']}: {result.parameters['dataset']}")
    return figure


def probe_transfer(result: Any, *, probe: str = "mean_difference") -> Figure:
    """AUC of a probe trained on one data set (rows) and tested on another (columns), at a depth chosen on the first."""
    rows = result.tables["pairs"]
    rows = rows[rows.probe == probe]
    if rows.empty:
        raise ValueError(f"probe={probe!r}: choose one of {', '.join(sorted(set(result.tables['pairs'].probe)))}")
    names = list(dict.fromkeys(rows.trained_on))
    grid = rows.pivot(index="trained_on", columns="tested_on", values="auc").reindex(index=names, columns=names)
    rows = rows.assign(sure=(rows.p_holm < 0.05) & (rows.difference > 0))
    best = rows.pivot(index="trained_on", columns="tested_on", values="sure").reindex(index=names, columns=names)
    with shared.classroom():
        figure, ax = shared.panels(1.8 + 1.0 * len(names))
        image = ax.imshow(grid, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(grid.to_numpy()):
            sign = " *" if best.iloc[i, j] else ""
            ax.text(
                j, i, f"{value:.2f}{sign}", ha="center", va="center", color=BLACK if 0.15 < value < 0.85 else "white"
            )
        labels = [name.replace("_", "\n") for name in names]
        ax.set_xticks(range(len(names)), labels)
        ax.set_yticks(range(len(names)), labels)
        ax.set(
            xlabel="tested on",
            ylabel="trained on",
            title=f"{probe.replace('_', ' ')}; *: above its best control (Holm)",
        )
        figure.colorbar(image, ax=ax, label="AUC (0.5: nothing; below: upside down)")
    return figure


def probe_transfer_by_depth(result: Any, *, pairs: Sequence[tuple[str, str]], probe: str = "mean_difference") -> Figure:
    """AUC by depth for some (trained on, tested on), with intervals, and the bag of words as a dashed line each."""
    looks = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D")]
    rows = result.summary[(result.summary.metric == "auc") & (result.summary.labels == "task")]
    with shared.classroom():
        figure, ax = shared.panels(5.2)
        for (a, b), (color, marker) in zip(pairs, looks, strict=False):
            part = rows[(rows.trained_on == a) & (rows.tested_on == b)]
            line = part[part.probe == probe].sort_values("depth")
            label = f"{a.replace('_', ' ')} to {b.replace('_', ' ')}"
            ax.plot(line.relative_depth, line["mean"], color=color, marker=marker, ms=5, label=label)
            ax.fill_between(line.relative_depth, line.low, line.high, color=color, alpha=0.15, lw=0)
            words = part[part.probe == "bag_of_words"]["mean"]
            if len(words):
                ax.axhline(words.iloc[0], color=color, lw=1.4, ls=(0, (5, 2)))
        ax.axhline(0.5, color=BLACK, lw=1)
        ax.set(
            xlabel="fraction of depth", ylabel="AUC on the other data set", ylim=(-0.02, 1.02),
            title=f"{probe.replace('_', ' ')}; dashed: bag of words",
        )  # fmt: skip
        ax.grid(alpha=0.25)
        shared.legend_below(figure, ax, 2)
    return figure


def depth_transfer(
    result: Any, *, dataset: str, probe: str = "mean_difference", statistics: str = "tested_depth"
) -> Figure:
    """AUC of a probe trained at one depth (rows) and tested at another (columns), and the cosine of their directions."""
    rows = result.tables["depth_transfer"]
    rows = rows[
        (rows.dataset == dataset) & (rows.probe == probe) & (rows.statistics == statistics) & (rows.metric == "auc")
    ]
    if rows.empty:
        raise ValueError(f"nothing for dataset={dataset!r}, probe={probe!r}, statistics={statistics!r} in this result")
    grid = rows.pivot(index="trained_depth", columns="tested_depth", values="mean")
    cosines = result.tables["depth_cosines"]
    cosines = cosines[(cosines.dataset == dataset) & (cosines.probe == probe)]
    turned = cosines.pivot(index="depth_a", columns="depth_b", values="cosine")
    with shared.classroom():
        figure, axes = shared.panels(5.2, 1, 2)
        for ax, values, colors, low, words in (
            (axes[0], grid, "PuOr", 0.0, "AUC"),
            (axes[1], turned, "PuOr", -1.0, "cosine of directions"),
        ):
            image = ax.imshow(values, cmap=colors, vmin=low, vmax=1, origin="lower")
            ax.set_xticks(range(len(values.columns)), values.columns)
            ax.set_yticks(range(len(values.index)), values.index)
            ax.set(xlabel="tested at depth", ylabel="trained at depth")
            figure.colorbar(image, ax=ax, label=words, location="bottom", ticks=np.linspace(low, 1, 5))
        axes[1].set(xlabel="depth", ylabel="depth")
        figure.suptitle(f"{dataset.replace('_', ' ')}, {probe.replace('_', ' ')}")
    return figure


def stitching(result: Any) -> Figure:
    """KL to the clean model for each pair of depths and each control, and R2 of the map beside it."""
    rows = result.summary[result.summary.metric == "kl"]
    pairs = list(dict.fromkeys(zip(rows.source_depth, rows.target_depth, strict=True)))
    names = [f"{int(i)} to {int(j)}" for i, j in pairs]
    with shared.classroom():
        figure, (left, right) = shared.panels(2.2 + 1.15 * len(pairs), 1, 2, sharey=True, width_ratios=[2, 1])
        for place, (condition, (words, color, marker)) in enumerate(STITCHED.items()):
            for line, (i, j) in enumerate(pairs):
                part = rows[(rows.source_depth == i) & (rows.target_depth == j) & (rows.condition == condition)]
                if part.empty:
                    continue
                y = line + 0.11 * (place - 2.5)
                left.hlines(y, part.low, part.high, color=color, lw=2)
                left.plot(part["mean"], [y], marker, color=color, ms=9, label=words if line == 0 else None)
                if condition in ("mapped", "token_identity", "random_weights"):
                    right.plot(part.r2, [y], marker, color=color, ms=9)
        wide = shared.logarithmic_beyond(left, 0.1)  # small nets differ by less
        left.set(
            xlabel=f"KL to the clean model (nats{'; near 0 linear' if wide else ''})", ylabel="depth of X to depth of Y"
        )
        right.set(xlabel="R2 of the states put in", xlim=(min(0.0, right.get_xlim()[0]), 1.02))
        for ax in (left, right):
            shared.categories(ax, names)
        shared.legend_below(figure, left, 3)
        x, y = (result.parameters[name]["model"] for name in ("model_x", "model_y"))
        figure.suptitle(f"X = {x}, Y = {y}; intervals over {int(rows.n_documents.max())} test documents")
    return figure


def _against(first: str, second: str) -> str:
    """Both sides of a paired difference; where they are of one merger, its name stands once, in front."""
    variants = {
        "_lines": "LiNeS",
        "_reversed": "ramp reversed",
        "_same_norm": "same length",
        "_permuted": "random order",
    }
    for ending, words in variants.items():
        if first.endswith("_lines") and second.endswith(ending):
            return f"{METHODS[first.removesuffix('_lines')]}: LiNeS - {words}"
    if first.endswith("_lines"):
        return f"{METHODS[second]}: LiNeS - unscaled"
    return " - ".join(METHODS[name].replace("... ", "") for name in (first, second))


def dots(ax: Axes, rows: Any, names: Sequence[str], color: str, marker: str) -> None:
    """Estimates with intervals, one a line, the first at the top."""
    places = np.arange(len(rows))
    ax.hlines(places, rows.low, rows.high, color=color, lw=2.2)
    ax.plot(rows.estimate, places, marker, color=color, ms=8)
    shared.categories(ax, list(names))
    ax.tick_params(axis="y", labelsize=12)


def published_forgetting(table: Any) -> Figure:
    """Published accuracy on control sets before tuning, after it, and with LiNeS (percent; one run, no intervals)."""
    rows = table[(table.task == "EuroSAT") & (table.role == "control")]
    looks = {"pretrained": (BLACK, "D", "before tuning"), "tuned": (ORANGE, "s", "tuned on EuroSAT"),
             "lines": (BLUE, "o", "tuned, scaled by LiNeS")}  # fmt: skip
    with shared.classroom():
        figure, ax = shared.panels(4.6)
        places = np.arange(len(rows))
        ax.hlines(places, rows.tuned, rows.lines, color=GREY, lw=1.5)
        for column, (color, marker, words) in looks.items():
            ax.plot(rows[column], places, marker, color=color, ms=10, label=words)
        ax.set(xlabel="accuracy (percent)", title="CLIP ViT-B/32 on tasks that it was not tuned on (published)")
        shared.categories(ax, list(rows.set))
        shared.legend_below(figure, ax, 3)
    return figure
