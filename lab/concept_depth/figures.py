"""Figures of concept depth. Tables in, figures out: nothing here runs a model, fits, averages or drops rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, classroom, curve, legend_below, panels

METRICS = {"accuracy": "accuracy on unseen groups", "f1": "F1 on unseen groups", "auc": "area under the ROC curve"}
SITES = {"resid": "residual stream", "mlp_in": "what the MLP reads (the paper's reading)"}
POINTS = {
    "onset": ("onset", "D"),
    "jump_point": ("jump point", "^"),
    "converging_point": ("converging point", "s"),
    "readable_depth": ("readable depth", "o"),
}
BROWN, NAVY = "#A6761D", "#1B3A57"  # where Okabe and Ito's do not suffice
_NOISE = {False: "as it stands", True: "letters glued in front"}


def concept_depth(result: Any, *, metric: str = "accuracy", points: bool = True) -> Figure:
    """Probe score by fraction of depth, with intervals, beside its baselines, its control and the random-weight null."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: choose one of {', '.join(METRICS)}")
    about, rows = result.parameters, result.summary[result.summary.metric == metric]
    looks: dict[tuple[str, str, str], tuple[str, Any, str]] = {
        ("trained", "resid", "task"): (BLUE, "-", SITES["resid"]),
        ("trained", "mlp_in", "task"): (ORANGE, (0, (5, 1.5)), SITES["mlp_in"]),
        ("random", "resid", "task"): (GREEN, (0, (3, 1, 1, 1)), "random weights (null)"),
        ("trained", "resid", "shuffled"): (RED, (0, (1, 1)), "shuffled labels (control)"),
    }
    others = [site for site in dict.fromkeys(rows.site) if site not in (*SITES, "text")]
    for site, color in zip(others, (SKY, GREY, BROWN, NAVY, BLUE), strict=False):
        looks["trained", site, "task"] = (color, (0, (4, 1, 1, 1)), site)
    with classroom():
        figure, ax = panels(5.6)
        for (weights, site, labels), (color, dash, name) in looks.items():
            line = rows[(rows.weights == weights) & (rows.site == site) & (rows.labels == labels)].sort_values("depth")
            if len(line):
                curve(ax, line, color, ls=dash, label=name)
        for probe, color, dash in (("bag_of_words", PURPLE, (0, (8, 3))), ("majority", BLACK, (0, (1, 3)))):
            for value in rows[rows.probe == probe]["mean"]:
                ax.axhline(value, color=color, ls=dash, lw=1.6, label=f"{probe.replace('_', ' ')} ({value:.2f})")
        if points and metric == "accuracy" and "points" in result.tables:
            _mark_points(ax, result.tables["points"])
        conditions = [_NOISE[True]] * bool(about["noise"]) + [f"{about['bits']}-bit weights"] * bool(about["bits"])
        ax.set(xlabel=f"fraction of depth (0 = embedding, 1 = after the last of {about['n_layers']} blocks)",
               ylabel=METRICS[metric], title=", ".join([about["dataset"], about["model"], *conditions]),
               xlim=(-0.02, 1.02), ylim=(0.3, 1.02))  # fmt: skip
        ax.grid(alpha=0.25)
        legend_below(figure, ax, 2)
    return figure


def _mark_points(ax: Axes, points: Any) -> None:
    """The points of the residual stream as markers with intervals, along the bottom of the axes."""
    rows = points[(points.weights == "trained") & (points.site == "resid")].set_index("point")
    for height, (name, (label, marker)) in zip((0.395, 0.37, 0.345, 0.32), POINTS.items(), strict=True):
        if name in rows.index and np.isfinite(rows.loc[name, "estimate"]):
            row = rows.loc[name]
            ax.plot([row.low, row.high], [height] * 2, color=BLUE, lw=3, alpha=0.35, solid_capstyle="butt")
            ax.plot(row.estimate, height, marker, color=BLUE, ms=8, label=f"{label} ({row.estimate:.2f})")


def concept_curves(
    results: Sequence[Any], *, by: str = "dataset", metric: str = "accuracy", site: str = "resid"
) -> Figure:
    """One curve a result on the same relative depth: data sets of one model, models on one data set, noise, bits.

    `by` is the name of the parameter that tells the results apart.
    """
    words: dict[str, dict[Any, str]] = {"noise": _NOISE, "bits": {None: "as loaded"}}
    words["bits"] |= {bits: f"{bits}-bit weights" for bits in range(2, 9)}
    colors, marks = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GREY, BROWN, NAVY], "os^DvPX*<>"
    with classroom():
        figure, ax = panels(5.6)
        for i, result in enumerate(results):
            rows, value = result.summary, result.parameters[by]
            rows = rows[(rows.metric == metric) & (rows.site == site) & (rows.labels == "task")]
            rows = rows[rows.weights == "trained"].sort_values("depth")
            curve(ax, rows, colors[i % len(colors)], alpha=0.12, marker=marks[i % len(marks)],
                  markevery=max(1, len(rows) // 10), label=words.get(by, {}).get(value, str(value)))  # fmt: skip
        ax.axhline(0.5, color=BLACK, ls=":", lw=1.4)
        lowest = min(float(np.min(line.get_ydata())) for line in ax.get_lines())
        ax.set(xlabel="fraction of depth", ylabel=METRICS[metric], xlim=(-0.02, 1.02),
               ylim=(min(0.3, lowest - 0.05), 1.02), title=f"{SITES.get(site, site)}; bands: 95 % over splits")  # fmt: skip
        ax.grid(alpha=0.25)
        legend_below(figure, ax, 4)
    return figure


def difference(table: Any, *, a: str, b: str) -> Figure:
    """A paired difference of two models by fraction of depth (`lab.statistics.paired_difference`), with its interval."""
    with classroom():
        figure, ax = panels(4.2)
        ax.axhline(0, color=BLACK, lw=1.2)
        ax.fill_between(table.fraction, table.low, table.high, color=BLUE, alpha=0.2, lw=0, label="95 % over groups")
        ax.plot(table.fraction, table.difference, color=BLUE, label=f"{a} minus {b}")
        ax.set(xlabel="fraction of depth", ylabel="difference in accuracy", xlim=(-0.02, 1.02))
        ax.grid(alpha=0.25)
        ax.legend()
    return figure


def published_curves(curves: Any) -> Figure:
    """Published accuracy curves (columns model, dataset, relative_depth, accuracy), one panel a data set."""
    names, models = list(dict.fromkeys(curves.dataset)), list(dict.fromkeys(curves.model))
    looks = dict(zip(models, ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":")), strict=False))
    rows = -(-len(names) // 2)
    with classroom():
        figure, axes = panels(1 + 1.9 * rows, rows, 2, sharex=True, sharey=True)
        for ax, name in zip(axes.flat, names, strict=False):
            for model, line in curves[curves.dataset == name].groupby("model", sort=False):
                ax.plot(line.relative_depth, line.accuracy, color=looks[model][0], ls=looks[model][1], label=model)
            ax.axhline(0.5, color=BLACK, lw=1, ls=":")
            ax.set_title(name)
            ax.grid(alpha=0.25)
        for ax in axes.flat[len(names) :]:
            ax.axis("off")
        figure.supxlabel("fraction of depth")
        figure.supylabel("published accuracy")
        lines = {name: line for ax in axes.flat for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines))
    return figure
