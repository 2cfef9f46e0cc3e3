"""Figures about how far down a model's layers compute. Tables in, figures out.

Means over prompts are taken here, for the eye; every interval comes with its table.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab import figures as shared
from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY

LINES: dict[str, tuple[str, str, Any, str]] = {  # treatment: words, colour, dash, marker
    "skip": ("layer skipped", BLUE, "-", "o"),
    "random": ("random update of equal norm", ORANGE, (0, (5, 1.5)), "s"),
    "other": ("another prompt's update", PURPLE, (0, (3, 1, 1, 1)), "D"),
    "mean": ("mean update", SKY, (0, (8, 3)), "v"),
    "push": ("layer kept, state pushed at random", RED, (0, (1, 1)), "^"),
}
NULL = ("layer skipped, random weights (null)", GREEN, (0, (2, 2)), "X")
SCOPES = {"all": "all tokens", "future": "later tokens only"}
MEASURES = {"output": "change of next-token distribution", "effect": "change of later contributions"}
QUANTITIES = {
    "attn": ("attention", BLUE, "-", "o"),
    "mlp": ("MLP", ORANGE, (0, (5, 1.5)), "s"),
    "block": ("whole block", BLACK, (0, (3, 1, 1, 1)), "D"),
    "state": ("next state and state", GREEN, (0, (1, 1)), "^"),
}
WEIGHTS = {"trained": (BLUE, "o", "trained"), "random": (GREEN, "X", "random weights (null)")}


def depth_efficiency(
    result: Any, *, measure: str = "output", treatments: Sequence[str] = ("skip", "mean", "random"), share: bool = True
) -> Figure:
    """What a change of each layer does, for all tokens and for later tokens only, beside the null; means over prompts.

    Args:
        measure: "output" (of the next-token distribution) or "effect" (of later layers' contributions).
        treatments: of `LINES`; those that the result has are drawn.
        share: divide each prompt's curve by its sum over layers, so that shapes can be compared (a model with random
            weights hardly has an opinion on the next word, and its raw changes are near 0); False draws the raw values.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: choose one of {', '.join(MEASURES)}")
    rows = result.table[(result.table.kind == "layer") & (result.table["mode"] == "global")]
    if share:
        sums = rows.groupby(["example", "weights", "treatment", "scope"])[measure].transform("sum")
        rows = rows.assign(**{measure: rows[measure] / sums})
    n_layers = result.parameters["n_layers"]
    with _two_panels(5.4) as (figure, axes):
        for ax, (scope, words) in zip(axes, SCOPES.items(), strict=True):
            here = rows[rows.scope == scope]
            for treatment in [name for name in LINES if name in treatments]:
                part = here[(here.treatment == treatment) & (here.weights == "trained")]
                _curve(ax, part.groupby("skipped_layer")[measure], *LINES[treatment])
            null = here[(here.treatment == "skip") & (here.weights == "random")]
            _curve(ax, null.groupby("skipped_layer")[measure], *NULL)
            ax.axvline((n_layers - 1) / 2, color=GREY, lw=1, ls=":")
            ax.set(title=words, xlabel=f"changed layer (0 to {n_layers - 1})\ndotted: the middle")
            ax.set_ylim(bottom=0)
        axes[0].set_ylabel(f"share of the sum over layers:\n{MEASURES[measure]}" if share else MEASURES[measure])
        shared.legend_below(figure, axes[0], 2)
        figure.suptitle(f"{shared.about_of(result)}, {result.parameters['n']} prompts; bands: quartiles of prompts")
    return figure


def effect_matrix(result: Any, *, statistic: str = "mean", kind: str = "layer", mode: str = "global") -> Figure:
    """E: effect of skipping layer s (down) on what layer l adds (across), trained above, random weights below."""
    pairs = result.tables["pairs"]
    rows = pairs[(pairs.kind == kind) & (pairs["mode"] == mode) & (pairs.treatment == "skip")]
    kinds = [name for name in WEIGHTS if (rows.weights == name).any()]
    with shared.classroom():
        figure, axes = shared.panels(0.8 + 4.0 * len(kinds), len(kinds), 2, squeeze=False, sharex=True, sharey=True)
        for line, weights in zip(axes, kinds, strict=True):
            for ax, (scope, words) in zip(line, SCOPES.items(), strict=True):
                part = rows[(rows.weights == weights) & (rows.scope == scope)]
                grid = part.groupby(["skipped_layer", "layer"])[statistic].mean().unstack().to_numpy()
                later = np.where(np.triu(np.ones_like(grid), 1) > 0, grid, np.nan)
                ax.set_facecolor("#E4E4E4")
                image = ax.imshow(later, cmap="viridis", vmin=0, vmax=1)
                ax.set(title=f"{WEIGHTS[weights][2]},\n{words}", xlabel="layer measured", ylabel="layer skipped")
                ax.label_outer()
                _whole_numbers(ax.xaxis, ax.yaxis)
        label = "relative change of a layer's contribution (1 or more: yellow)"
        figure.colorbar(image, ax=axes, label=label, shrink=0.8, aspect=40)
    return figure


def contributions(result: Any, *, position_0: bool = False) -> Figure:
    """What layers add relative to the stream, and its cosine with the stream, trained and random; means over prompts."""
    rows = result.tables["contributions"]
    rows = rows[rows.position_0 == position_0]
    with _two_panels(5.2) as (figure, axes):
        words_of = {"norm": "norm of what is added /\nnorm of the stream", "cosine": "cosine with the stream"}
        for ax, (suffix, words) in zip(axes, words_of.items(), strict=True):
            for name, look in QUANTITIES.items():
                part = rows[rows.quantity == f"{name}_{suffix}"]
                _curve(ax, part[part.weights == "trained"].groupby("layer").value, *look)
                faint = part[part.weights == "random"].groupby("layer").value.mean()
                if len(faint):
                    ax.plot(faint.index, faint, color=look[1], lw=1, alpha=0.6, ls=look[2])
            ax.set(xlabel="layer", ylabel=words)
        axes[0].set_yscale("log")
        axes[1].axhline(0, color=GREY, lw=1)
        shared.legend_below(figure, axes[1], 4)
        where = f"with{'' if position_0 else 'out'} position 0"
        figure.suptitle(f"{shared.about_of(result)}, {where}\nthin lines: random weights")
    return figure


def lens_by_depth(result: Any) -> Figure:
    """Distance of the logit lens from the output, and tokens shared with it, by depth; trained and random."""
    rows = result.tables["lens"]
    rows = rows[~rows.position_0]
    n_layers = result.parameters["n_layers"]
    with _two_panels(4.4) as (figure, axes):
        words_of = {"kl": "KL(lens || output), nats", "overlap": "share of the top 5 in common"}
        for ax, (value, words) in zip(axes, words_of.items(), strict=True):
            for weights, (color, marker, name) in WEIGHTS.items():
                dash = "-" if weights == "trained" else (0, (2, 2))
                _curve(ax, rows[rows.weights == weights].groupby("depth")[value], name, color, dash, marker)
            ax.set(xlabel=f"depth (blocks passed, 0 to {n_layers})", ylabel=words)
        axes[0].legend()
        figure.suptitle(f"{shared.about_of(result)}; bands: quartiles of prompts")
    return figure


def effective_depths(result: Any) -> Figure:
    """One model, many "effective depths": each definition with its interval over prompts, trained and random."""
    rows = result.summary[result.summary.treatment.isin(["skip", "none"]) & (result.summary.kind == "layer")]
    rows = rows[rows["mode"].isin(["global", "none"]) & rows.statistic.str.startswith("ED_")]
    names = {
        (scope, measure, statistic): f"{statistic}, {'output' if measure == 'output' else 'layers'}, {SCOPES[scope]}"
        for scope in SCOPES for measure in ("effect", "output") for statistic in ("ED_50", "ED_90")
    } | {("all", "kl", "ED_KL"): "ED_KL (lens halfway to the output)",
         ("all", "overlap", "ED_ov"): "ED_ov (lens shares 0.3 of top 5)",
         ("all", "cosine", "ED_cos"): "ED_cos (cosine turns positive)"}  # fmt: skip
    with shared.classroom():
        figure, ax = shared.panels(1.8 + 0.45 * len(names))
        for y, (scope, measure, statistic) in enumerate(names):
            for shift, (weights, (color, marker, name)) in zip((-0.15, 0.15), WEIGHTS.items(), strict=True):
                row = rows[(rows.scope == scope) & (rows.measure == measure) & (rows.statistic == statistic)
                           & (rows.weights == weights)]  # fmt: skip
                if len(row):
                    ax.hlines(y + shift, row.low, row.high, color=color, lw=2.2)
                    label = name if y == 0 else None
                    ax.plot(row.estimate, [y + shift], marker, color=color, ms=8, ls="none", label=label)
        shared.categories(ax, list(names.values()))
        ax.set(xlabel="effective depth (fraction of the layers)", xlim=(-0.02, 1.04))
        figure.suptitle(f"{shared.about_of(result)}, n = {result.parameters['n']}; lines: 95 % over prompts")
        shared.legend_below(figure, ax, 2)
    return figure


def depth_scores(result: Any, *, insensitive: Sequence[str] = ()) -> Figure:
    """Depth score by level (hops, steps, terms) with intervals, and the slope that is fitted through the prompts.

    Args:
        insensitive: measures ("effect", "output") that failed their positive control; they are drawn in grey and named so.
    """
    rows, slopes = result.summary, result.tables["slopes"]
    with _two_panels(4.8) as (figure, axes):
        for ax, (measure, color, marker) in zip(axes, (("effect", BLUE, "o"), ("output", ORANGE, "s")), strict=True):
            part = rows[rows.measure == measure].sort_values("level")
            failed = measure in insensitive
            ax.errorbar(
                part.level, part.score, (part.score - part.low, part.high - part.score), color=GREY if failed else color,
                marker=marker, ms=8, capsize=4, lw=2.2,
            )  # fmt: skip
            some = slopes[(slopes.measure == measure) & (slopes.questions == "all") & (slopes.covariate == "none")]
            words = "later layers" if measure == "effect" else "output"
            for row in some.itertuples():
                words += f": {row.slope:+.2f} layers per level\n[{row.low:+.2f}, {row.high:+.2f}]"
            words += "\n(insensitive: no rise in the control)" if failed else ""
            ax.set(xlabel="level (hops, steps, terms)", title=words)
        axes[0].set_ylabel("depth score (mean layer of the effect)")
        figure.suptitle(f"{shared.about_of(result)}; bars: 95 %")
    return figure


def positions_by_depth(table: Any, *, value: str, index: str, title: str = "") -> Figure:
    """A value for each token (down) and each depth or layer (across): residual erasure, or attributions.

    Position 0, often an attention sink whose loss breaks everything, has a strip of its own on top and no say in the scale.

    Args:
        table: position, token, and the columns named by `value` and `index`. Signed values get a scale around 0.
    """
    grid = table.pivot(index="position", columns=index, values=value)
    tokens = table.drop_duplicates("position").set_index("position").token.loc[grid.index]
    later = grid.index > 0
    signed = bool((grid[later] < -1e-9).any(axis=None))
    top = float(np.nanquantile(np.abs(grid[later].to_numpy()), 0.995))
    with shared.classroom():
        figure, axes = shared.panels(
            2.2 + 0.36 * len(grid), 2, sharex=True, height_ratios=[1, int(later.sum())],
        )  # fmt: skip
        for ax, part in zip(axes, (~later, later), strict=True):
            image = ax.imshow(grid[part].to_numpy(), aspect="auto", cmap="PuOr_r" if signed else "viridis",
                              vmin=-top if signed else 0, vmax=top)  # fmt: skip
            ax.set_yticks(range(int(part.sum())), [f"{token!r}" for token in tokens[part]])
        axes[0].set_title(f"{title}\nstrip on top: position 0 (not in the colour scale)")
        at = np.arange(0, grid.shape[1], max(1, grid.shape[1] // 10))
        axes[1].set_xticks(at, [str(depth) for depth in grid.columns[at]])
        axes[1].set_xlabel(f"{index} (0 to {grid.columns[-1]})")
        figure.colorbar(image, ax=axes, label=value, extend="both" if signed else "max")
    return figure


def integrator(result: Any) -> Figure:
    """Error of one step, what other steps do to the loss, and how alike neighbours are, by layer; controls beside."""
    steps, split, near = (result.tables[name] for name in ("steps", "splitting", "neighbours"))
    dashes: Any = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))
    with shared.classroom():
        figure, ((a, b), (c, d)) = shared.panels(10.4, 2, 2)

        def line(ax: Axes, rows: Any, value: str, label: str, weights: str = "trained", **look: Any) -> None:
            part = rows[rows.weights == weights].groupby("layer")[value].mean()
            if weights == "random":
                look, label = {"color": GREEN, "ls": dashes[3], "lw": 1.5}, f"{label}, random weights"
            if len(part) or weights == "trained":
                ax.plot(part.index, part, label=label, **look)

        for n, color, dash in zip((1, 2, 4, 8), (BLUE, ORANGE, GREEN, PURPLE), dashes, strict=True):
            line(a, steps[steps.n == n], "error", f"{n} substep{'s' * (n > 1)}", color=color, ls=dash)
        line(a, steps[steps.n == 1], "error", "1 substep", "random")
        a.set(title="A. distance from\nthe finest division", ylabel="share of the step's length", yscale="log")
        ways = {
            "commutator": "MLP before attention",
            "parallel": "both from the same state",
            "strang": "Strang's half steps",
        }
        for (name, words), color, dash in zip(ways.items(), (RED, ORANGE, BLUE), dashes, strict=False):
            line(b, split, name, words, color=color, ls=dash)
        line(b, split, "commutator", ways["commutator"], "random")
        b.set(title="B. distance from\nattention before MLP", ylabel="share of the step's length")
        b.set_ylim(bottom=0)
        line(c, near[near.neighbours], "cosine", "next layer", color=BLUE, marker="o", ls="-")
        line(c, near[~near.neighbours], "cosine", "a random other layer", color=GREY, marker="X", ls="none")
        line(c, near[near.neighbours], "cosine", "next layer", "random")
        c.axhline(0, color=GREY, lw=1)
        c.set(title="C. update of layer l and of\nanother at the same state", ylabel="cosine")
        means = result.summary[result.summary["where"] == "one layer, mean"].sort_values("rise")
        for y, row in enumerate(means.itertuples()):
            control = row.program in ("dropped", "random", "exchanged far")
            d.hlines(y, row.low, row.high, color=GREY if control else BLUE, lw=2.2)
            d.plot(row.rise, y, "X" if control else "o", color=GREY if control else BLUE, ms=8)
        shared.categories(d, list(means.program))
        d.tick_params(axis="y", labelsize=11)  # up to fourteen programs
        d.axvline(0, color=GREY, lw=1)
        shared.logarithmic_beyond(d, 0.1)
        d.set(
            title="D. rise of the loss,\none layer changed", xlabel="nats per token, mean\nover layers (grey: controls)"
        )
        for ax in (a, b, c):
            _whole_numbers(ax.xaxis)
            ax.grid(alpha=0.25)
            ax.set_xlabel("layer l" if ax is c else "layer")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        figure.suptitle(f"{shared.about_of(result)}, loss {result.parameters['nll']:.2f} nats per token")
    return figure


def layers_off(tables: Any) -> Figure:
    """Three views of a text with some layers left out: the next token, later layers, and the loss of each token."""
    words, loss, later = (tables[name] for name in ("next_token", "loss", "later"))
    with shared.classroom():
        figure = shared.page(8.4)
        a, b, c = figure.subplot_mosaic([["next", "later"], ["loss", "loss"]]).values()
        y = np.arange(min(10, len(words)))
        some = words.head(len(y))
        a.barh(y - 0.2, some.whole, 0.38, color=BLUE)
        a.barh(y + 0.2, some["without"], 0.38, color=ORANGE, hatch="//")
        a.set_yticks(y, [repr(token) for token in some.token])
        a.invert_yaxis()
        a.set(xlabel="probability", title="next token", xlim=(0, 1))
        on = later[~later.off]
        b.plot(on.layer, on.change, "o", color=BLUE, label="change of a layer that is on")
        off = later[later.off]
        b.plot(off.layer, np.zeros(len(off)), "X", color=RED, ms=9, label="off", clip_on=False)
        b.set(xlabel="layer", title="relative change of what layers add")
        b.set_ylim(0, max(1.05, 1.1 * float(on.change.max()) if len(on) else 1))
        _whole_numbers(b.xaxis)
        b.legend()
        c.plot(loss.position, loss.whole, "-o", color=BLUE, ms=5, label="whole model")
        c.plot(loss.position, loss["without"], ls=(0, (5, 1.5)), marker="s", color=ORANGE, ms=5, label="layers off")
        stride = max(1, len(loss) // 16)
        c.set_xticks(loss.position[::stride], [repr(t) for t in loss.token[::stride]], rotation=60, ha="right")
        c.set(ylabel="loss (nats)", title="loss of each token")
        c.set_ylim(bottom=0)
        shared.legend_below(figure, c, 2)
        for ax in (b, c):
            ax.grid(alpha=0.25)
    return figure


def linear_maps(result: Any) -> Figure:
    """R2 of a linear map from each depth of one model to each depth of the other, and the best source for each target."""
    rows = result.table
    grid = rows.pivot(index="source_depth", columns="target_depth", values="r2")
    best = grid.idxmax()
    with shared.classroom():
        figure, axes = shared.panels(4.8, 1, 2)
        image = axes[0].imshow(grid.to_numpy(), origin="lower", cmap="viridis", vmin=0, vmax=1, aspect="auto")
        rows_of_best = [list(grid.index).index(depth) for depth in best]
        axes[0].plot(np.arange(len(best)), rows_of_best, "o", color="white", mec=BLACK, ms=6, ls="none")
        for ticks, depths in ((axes[0].set_xticks, grid.columns), (axes[0].set_yticks, grid.index)):
            stride = -(-len(depths) // 8)  # at most eight names
            ticks(np.arange(len(depths))[::stride], depths[::stride])
        axes[0].set(xlabel="depth of the target", ylabel="depth of the source", title="R2; dots: best source")
        figure.colorbar(image, ax=axes[0], label="R2 on unseen documents")
        top = grid.max()
        axes[1].plot(top.index, top, "-o", color=BLUE, ms=5, label="best source depth")
        words = "source's embedding only"
        axes[1].plot(grid.columns, grid.iloc[0], ls=(0, (5, 1.5)), marker="s", ms=5, color=ORANGE, label=words)
        axes[1].set(xlabel="depth of the target", ylabel="R2", ylim=(min(0.0, float(grid.iloc[0].min())) - 0.02, 1.02))
        axes[1].grid(alpha=0.25)
        _whole_numbers(axes[1].xaxis)
        shared.legend_below(figure, axes[1], 2)
    return figure


@contextmanager
def _two_panels(height: int | float) -> Iterator[tuple[Figure, Any]]:
    with shared.classroom():
        figure, axes = shared.panels(height, 1, 2)
        yield figure, axes
        for ax in axes:
            ax.grid(alpha=0.25)
            _whole_numbers(ax.xaxis)


def _whole_numbers(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def _curve(ax: Axes, groups: Any, label: str, color: str, dash: Any, marker: str) -> None:
    """Mean over prompts with a band from quartile to quartile."""
    middle, low, high = groups.mean(), groups.quantile(0.25), groups.quantile(0.75)
    if len(middle):
        every = max(1, len(middle) // 10)
        ax.plot(middle.index, middle, color=color, ls=dash, marker=marker, ms=6, markevery=every, label=label)
        ax.fill_between(middle.index, low, high, color=color, alpha=0.13, lw=0)
