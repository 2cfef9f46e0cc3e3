"""Figures of concept depth. Tables in, figures out: nothing here runs a model, fits, averages or drops rows."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, axes_of, classroom

METRICS = {"accuracy": "accuracy on unseen groups", "f1": "F1 on unseen groups", "auc": "area under the ROC curve"}


SITES = {"resid": "residual stream", "mlp_in": "what the MLP reads (the paper's reading)"}


POINTS = {
    "jump_point": ("jump point", "^"),
    "converging_point": ("converging point", "s"),
    "readable_depth": ("readable depth", "o"),
}


def concept_depth(result: Any, *, metric: str = "accuracy", ax: Axes | None = None, points: bool = True) -> Figure:
    """Probe score by fraction of depth, with intervals, beside its baselines, its control and the random-weight null."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: choose one of {', '.join(METRICS)}")
    with classroom():
        figure, ax = axes_of(ax, (9.5, 5.6))
        rows = result.summary[result.summary.metric == metric]
        styles = {
            ("trained", "resid", "task"): (BLUE, "-", "residual stream"),
            ("trained", "mlp_in", "task"): (ORANGE, (0, (5, 1.5)), "what the MLP reads (the paper's reading)"),
            ("random", "resid", "task"): (GREEN, (0, (3, 1, 1, 1)), "random weights (null)"),
            ("trained", "resid", "shuffled"): (RED, (0, (1, 1)), "shuffled labels (control)"),
        }
        others = [site for site in dict.fromkeys(rows.site) if site not in (*SITES, "text")]
        for site, color in zip(others, (SKY, GREY, "#A6761D", "#1B3A57", BLUE), strict=False):
            styles["trained", site, "task"] = (color, (0, (4, 1, 1, 1)), site)
        for (weights, site, labels), (color, dash, name) in styles.items():
            line = rows[(rows.weights == weights) & (rows.site == site) & (rows.labels == labels)].sort_values("depth")
            if len(line):
                ax.plot(line.relative_depth, line["mean"], color=color, ls=dash, label=name)
                ax.fill_between(line.relative_depth, line.low, line.high, color=color, alpha=0.15, lw=0)
        for probe, color, dash in (("bag_of_words", PURPLE, (0, (8, 3))), ("majority", BLACK, (0, (1, 3)))):
            for value in rows[rows.probe == probe]["mean"]:
                ax.axhline(value, color=color, ls=dash, lw=1.6, label=f"{probe.replace('_', ' ')} ({value:.2f})")
        if points and metric == "accuracy" and "points" in result.tables:
            _mark_points(ax, result.tables["points"])
        about = result.parameters
        ax.set(
            xlabel=f"fraction of depth (0 = embedding, 1 = after the last of {about['n_layers']} blocks)",
            ylabel=METRICS[metric],
            title=f"{about['dataset']}, {about['model']}{_condition(about)}",
            xlim=(-0.02, 1.02),
            ylim=(0.3, 1.02),
        )
        ax.grid(alpha=0.25)
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncol=2)
    return figure


def _mark_points(ax: Axes, points: Any) -> None:
    """The three points of the residual stream as markers with intervals, along the bottom of the axes."""
    rows = points[(points.weights == "trained") & (points.site == "resid")].set_index("point")
    for height, (name, (label, marker)) in zip((0.37, 0.345, 0.32), POINTS.items(), strict=True):
        if name in rows.index and rows.loc[name, "estimate"] == rows.loc[name, "estimate"]:
            row = rows.loc[name]
            ax.plot([row.low, row.high], [height] * 2, color=BLUE, lw=3, alpha=0.35, solid_capstyle="butt")
            ax.plot(row.estimate, height, marker, color=BLUE, ms=8, label=f"{label} ({row.estimate:.2f})")


_NAMES: dict[tuple[str, Any], str] = {
    ("bits", None): "as loaded",
    ("noise", False): "as it stands",
    ("noise", True): "letters glued in front",
}


_NAMES |= {("bits", bits): f"{bits}-bit weights" for bits in range(2, 9)}


def concept_curves(
    results: Sequence[Any], *, by: str = "dataset", metric: str = "accuracy", site: str = "resid"
) -> Figure:
    """One curve a result on the same relative depth: data sets of one model, models on one data set, noise, bits.

    `by` is the name of the parameter that tells the results apart.
    """
    with classroom():
        figure, ax = axes_of(None, (9.5, 5.4))
        marks = ["o", "s", "^", "D", "v", "P", "X", "*", "<", ">"]
        colors = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GREY, "#A6761D", "#1B3A57"]
        for i, result in enumerate(results):
            rows = result.summary
            rows = rows[
                (rows.metric == metric) & (rows.site == site) & (rows.labels == "task") & (rows.weights == "trained")
            ]
            rows = rows.sort_values("depth")
            name = _NAMES.get((by, result.parameters[by]), str(result.parameters[by]))
            color, every = colors[i % len(colors)], max(1, len(rows) // 10)
            ax.plot(
                rows.relative_depth,
                rows["mean"],
                color=color,
                marker=marks[i % len(marks)],
                markevery=every,
                label=name,
            )
            ax.fill_between(rows.relative_depth, rows.low, rows.high, color=color, alpha=0.12, lw=0)
        ax.axhline(0.5, color=BLACK, ls=":", lw=1.4)
        lowest = min(float(np.min(line.get_ydata())) for line in ax.get_lines())
        ax.set(
            xlabel="fraction of depth", ylabel=METRICS[metric], xlim=(-0.02, 1.02), ylim=(min(0.3, lowest - 0.05), 1.02)
        )
        ax.set_title(f"{SITES.get(site, site)}; bands: 95 % over splits")
        ax.grid(alpha=0.25)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def difference(table: Any, *, a: str, b: str) -> Figure:
    """A paired difference of two models by fraction of depth (`lab.statistics.paired_difference`), with its interval."""
    with classroom():
        figure, ax = axes_of(None, (9.0, 4.2))
        ax.axhline(0, color=BLACK, lw=1.2)
        ax.fill_between(table.fraction, table.low, table.high, color=BLUE, alpha=0.2, lw=0, label="95 % over groups")
        ax.plot(table.fraction, table.difference, color=BLUE, label=f"{a} minus {b}")
        ax.set(xlabel="fraction of depth", ylabel="difference in accuracy", xlim=(-0.02, 1.02))
        ax.grid(alpha=0.25)
        ax.legend()
    return figure


def published_curves(curves: Any) -> Figure:
    """Published accuracy curves (columns model, dataset, relative_depth, accuracy), one panel a data set."""
    with classroom():
        names = list(dict.fromkeys(curves.dataset))
        figure, axes = plt.subplots(
            2, -(-len(names) // 2), figsize=(12, 6), sharex=True, sharey=True, layout="constrained"
        )
        models = list(dict.fromkeys(curves.model))
        looks = dict(zip(models, ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":")), strict=False))
        for ax, name in zip(axes.flat, names, strict=False):
            for model, rows in curves[curves.dataset == name].groupby("model", sort=False):
                ax.plot(rows.relative_depth, rows.accuracy, color=looks[model][0], ls=looks[model][1], label=model)
            ax.axhline(0.5, color=BLACK, lw=1, ls=":")
            ax.set_title(name)
            ax.grid(alpha=0.25)
        for ax in axes.flat[len(names) :]:
            ax.axis("off")
        figure.supxlabel("fraction of depth")
        figure.supylabel("published accuracy")
        handles = {
            line.get_label(): line
            for ax in axes.flat
            for line in ax.get_lines()
            if not line.get_label().startswith("_")
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncol=len(handles))
    return figure


def _condition(about: dict[str, Any]) -> str:
    parts = [
        "letters glued in front" if about["noise"] else "",
        f"{about['bits']}-bit weights" if about["bits"] else "",
    ]
    return "".join(f", {part}" for part in parts if part)
