"""Figures of two-hop queries and back-patching. Tables in, figures out; a box or a band may show quartiles."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lab import figures as shared
from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, YELLOW

RULES = {
    "word": ("whole word anywhere", BLUE, "o"),
    "leading": ("first thing said", GREEN, "^"),
    "published": ("substring anywhere (published)", ORANGE, "s"),
}
CELLS = {  # of the taxonomy, strict: words, colour, dash, marker
    "IK": ("IK", "hop\nunknown", RED, "-", "o"),
    "IG": ("IG", "hops known,\nquery wrong", ORANGE, (0, (5, 1.5)), "s"),
    "CM_strict": ("CM", "all right", BLUE, (0, (3, 1, 1, 1)), "^"),
    "RM_strict": ("RM", "query right,\nhop unknown", PURPLE, (0, (1, 1)), "D"),
}
CONDITIONS = {
    "own": "own later state",
    "random": "random vector",
    "other": "other query's state",
    "same_relation": "same two relations' state",
    "forward": "own state, forward",
    "identity": "state itself (identity)",
}
PLACES = {"t1": ("t1, end of e1", BLUE, "o"), "t2": ("t2, end of prompt", ORANGE, "s")}
SETS = {"correct": (BLUE, "o"), "incorrect": (ORANGE, "s")}
STAGES = {
    "bridge at t1": "first hop resolved:\nt1 describes bridge",
    "bridge at t2": "t2 describes bridge",
    "moved": "t2 needs to see e1:\nnext word (ours)",
    "moved_published": "t2 needs to see t1:\nten tokens (published)",
    "answer at t2": "second hop resolved:\nt2 describes answer",
    "prediction": "next word is written",
}
WAYS = {
    "latent": "latent\n(query as it stands)",
    "explicit": "explicit\n(own bridge put in)",
    "oracle": "oracle\n(right bridge put in)",
    "other": "other\n(wrong bridge, control)",
}


def two_hop(result: Any) -> Figure:
    """Share right of each kind of prompt under three rules, and the taxonomy beside what independence would give."""
    rows, cells = result.summary, result.tables["taxonomy"].set_index("cell")
    kinds, names = list(dict.fromkeys(rows.prompt)), []
    with shared.classroom():
        figure, (ax, bars) = shared.panels(9.2, 2, height_ratios=[1.2, 1])
        for kind in kinds:
            few = "asked of few: " * kind.endswith("shortcut")  # only where it decides about the set
            names.append(f"{kind.replace('_', ' ')}\n({few}n = {rows[rows.prompt == kind].n.iloc[0]})")
        for shift, (rule, (label, color, marker)) in zip((-0.22, 0, 0.22), RULES.items(), strict=True):
            some = rows[rows.rule == rule]
            shared.dots(ax, some, [kinds.index(kind) + shift for kind in some.prompt], color, marker, label=label)
        shared.categories(ax, names)
        ax.set(xlabel="share right", xlim=(-0.02, 1.02), title="one prompt at a time, by rule of success")
        ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.15), ncols=3, columnspacing=1, handletextpad=0.3)
        for x, cell in enumerate(CELLS):
            row = cells.loc[cell]
            bars.bar(x, row.share, 0.6, color=CELLS[cell][2], alpha=0.8)
            bars.vlines(x, row.low, row.high, color=BLACK)
            bars.annotate(f"{row.share:.0%}", (x, max(row.share, row.high)), (0, 5), ha="center",
                          textcoords="offset points")  # fmt: skip
        row, beside = cells.loc["RM_expected"], len(CELLS) - 0.6  # the last bar is RM
        bars.vlines(beside, row.low, row.high, color=BLACK)
        bars.plot(beside, row.share, "D", color="white", mec=BLACK, mew=1.8, ms=7, label="RM if all were independent")
        bars.set_xticks(range(len(CELLS)), [f"{name}\n{words}" for name, words, *_ in CELLS.values()])
        bars.set(ylabel="share of queries", title=f"hops and query: {RULES[result.parameters['rule']][0]}")
        bars.set_ylim(0, 1.12 * max(0.1, cells.loc[list(CELLS)].high.max(), cells.loc["RM_expected"].high))
        bars.grid(alpha=0.25, axis="y")
        bars.legend(loc="upper right")
        figure.suptitle(
            f"{shared.about_of(result)}, n = {result.parameters['n_queries']}; lines: 95 % over bridge entities"
        )
    return figure


def back_patching(result: Any, *, set: str = "incorrect") -> Figure:
    """Which pairs of layers bring out the answer at each position, and the oracle over all pairs beside its controls.

    `set` is "incorrect" (the queries that a back-patch should repair) or "correct" (those that it may break).
    """
    about, queries = result.parameters, result.tables["queries"]
    examples = queries[queries.set == set].example
    if not len(examples):
        there = ", ".join(sorted(dict.fromkeys(queries.set)))
        raise ValueError(f"set={set!r} has no queries in this result: there are {there}")
    if "own" not in about["conditions"]:
        raise ValueError(f"the condition own was not tried, only {', '.join(about['conditions'])}: nothing to map")
    hits = result.tables["hits"]
    hits = hits[(hits.condition == "own") & hits.example.isin(examples)]
    maps = {at: _pairs(hits[hits.position == at], about["n_layers"], None) / len(examples) for at in about["positions"]}
    top = max(float(np.nanmax(shares)) for shares in maps.values()) or 1 / len(examples)
    with shared.classroom():
        figure: Any = shared.page(8.8)
        above, below = figure.subfigures(2, 1)  # each with margins of its own
        axes, ax = above.subplots(1, len(maps), sharey=True, squeeze=False)[0], below.subplots()
        for panel, (at, shares) in zip(axes, maps.items(), strict=True):
            image = _heat(panel, shares, "viridis", top)
            panel.set_title(f"patched at {PLACES[at][0]}")
            panel.label_outer()
        above.colorbar(image, ax=axes, label="share of queries it answers", shrink=0.9)
        rows = result.summary[result.summary.set == set]
        conditions = [name for name in CONDITIONS if name in rows.condition.to_numpy()]
        for shift, at in zip(np.linspace(-0.16, 0.16, len(maps)) if len(maps) > 1 else [0], maps, strict=True):
            label, color, marker = PLACES[at]
            some = rows[rows.position == at].rename(columns={"success": "share"})
            own = some.condition == "own"
            for part, hollow, name in ((some[own], False, label), (some[~own], True, None)):
                places = [conditions.index(condition) + shift for condition in part.condition]
                shared.dots(ax, part, places, color, marker, label=name, hollow=hollow)
        shared.categories(ax, [CONDITIONS[name] for name in conditions])
        if "own" in conditions:
            place = conditions.index("own")
            ax.axhspan(place - 0.42, place + 0.42, color=YELLOW, alpha=0.25, lw=0)
            ax.get_yticklabels()[place].set_fontweight("bold")
        ax.set(xlabel="share of queries that at least one pair answers (oracle)", xlim=(-0.02, 1.02))
        ax.set_title("oracle over all pairs (lines: 95 %)")
        shared.legend_below(below, ax, 2)
        figure.suptitle(f"Back-patching, {shared.about_of(result)}: set {set}, n = {len(examples)}")
    return figure


def hop_stages(result: Any) -> Figure:
    """Layers at which each stage is first reached (boxes: quartiles, whiskers: all), and the share that reaches it."""
    rows, summary, n_layers = result.table, result.summary, result.parameters["n_layers"]
    sets = list(dict.fromkeys([*summary.get("set", []), *rows.set]))
    stages = list(dict.fromkeys([*summary.get("stage", []), *rows.stage]))
    rows = rows.groupby(["set", "stage", "example"]).layer.min().reset_index()  # `moved...` have a row for each window
    with shared.classroom():
        figure, ax = shared.panels(1.8 + 0.85 * len(stages))
        for i, kind in enumerate(sets):
            color, marker = SETS.get(kind, (GREY, "D"))
            shift = (i - (len(sets) - 1) / 2) * 0.36
            for y, stage in enumerate(stages):
                layers = rows[(rows.set == kind) & (rows.stage == stage)].layer.to_numpy()
                if len(layers):
                    ax.boxplot(
                        layers, positions=[y + shift], widths=0.26, orientation="horizontal", whis=(0, 100),
                        patch_artist=True, manage_ticks=False, medianprops={"color": BLACK, "lw": 2.5},
                        boxprops={"facecolor": color, "alpha": 0.75}, whiskerprops={"color": color},
                        capprops={"color": color},
                    )  # fmt: skip
                    ax.plot(np.median(layers), y + shift, marker, color=color, mec=BLACK, ms=8, zorder=5)
                row = summary[(summary.set == kind) & (summary.stage == stage)] if len(summary) else summary
                for share, low, high in row[["share", "low", "high"]].to_numpy() if len(row) else ():
                    _at_right(ax, y + shift, f"{share:4.0%}  [{low:.0%}, {high:.0%}]", 11)
            n = summary[summary.set == kind].n.max() if len(summary) else rows[rows.set == kind].example.nunique()
            ax.plot([], [], marker, color=color, mec=BLACK, ms=9, label=f"{kind} ({n:.0f} queries)")
        shared.categories(ax, [STAGES.get(stage, stage) for stage in stages])
        ax.set(xlabel=f"first layer (0 to {n_layers - 1})", xlim=(-0.7, n_layers - 0.3))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(f"Stages, {shared.about_of(result)}\nat the right: share of queries that reach one, 95 %")
        shared.legend_below(figure, ax, len(sets))
    return figure


def lens_strip(table: Any, *, n_layers: int) -> Figure:
    """Rank of bridge and answer as the next word by depth, at each position: the top of the axis is what is said.

    Args:
        table: position, depth, what (e2, e3), rank (0 = top). With several queries: their median, the band quartiles, of
            those whose rank is not missing.
    """
    table = table.assign(rank=table["rank"].astype(float))
    places = list(dict.fromkeys(table.position))
    looks = {"e2": ("bridge (e2)", BLUE, "-", "o"), "e3": ("answer (e3)", ORANGE, (0, (5, 1.5)), "s")}
    with shared.classroom():
        figure, axes = shared.panels(4.4, 1, len(places), sharey=True, squeeze=False)
        for ax, at in zip(axes.flat, places, strict=True):
            for what, (name, color, dash, marker) in looks.items():
                ranks = table[(table.position == at) & (table.what == what)].groupby("depth")["rank"]
                low, middle, high = (1 + ranks.quantile(q) for q in (0.25, 0.5, 0.75))
                if len(middle):
                    seen = name if middle.notna().any() else f"{name}: its first token says nothing"
                    ax.plot(middle.index, middle, color=color, ls=dash, marker=marker, ms=5, label=seen)
                    ax.fill_between(middle.index, low, high, color=color, alpha=0.15, lw=0)
            ax.set(xlabel=f"depth (blocks passed, 0 to {n_layers})", yscale="log", xlim=(-0.5, n_layers + 0.5))
            ax.set_title(PLACES[at][0] if at in PLACES else at)
            ax.grid(alpha=0.25)
        axes[0, 0].set_ylabel("rank as next word (1 = said)")
        axes[0, 0].yaxis.set_major_formatter("{x:,.0f}")
        axes[0, 0].set_ylim(max(12, 1.6 * (1 + table["rank"].max())), 0.8)
        shared.legend_below(figure, axes[0, 0], 2)
    return figure


def taxonomy_by_depth(table: Any) -> Figure:
    """The four strict cells of the taxonomy if the model stopped at each depth, with intervals."""
    with shared.classroom():
        figure, ax = shared.panels(5.4)
        for cell, (name, words, color, dash, marker) in CELLS.items():
            line = table[table.cell == cell].sort_values("depth")
            label = f"{name}: {words.replace(chr(10), ' ')}"
            shared.curve(ax, line, color, y="share", ls=dash, marker=marker, ms=6, markevery=max(1, len(line) // 10),
                         label=label)  # fmt: skip
        line = table[table.cell == "RM_expected"].sort_values("depth")
        if len(line):
            ax.plot(line.relative_depth, line.share, color=BLACK, lw=1.4, ls=":", label="RM if independent")
        ax.set(xlabel="fraction of depth", ylabel="share of queries", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        ax.set_title("answers read at each depth; bands: 95 % over bridge entities")
        ax.grid(alpha=0.25)
        shared.legend_below(figure, ax, 2)
    return figure


def methods(table: Any) -> Figure:
    """Share right of each way from query to answer, and what it costs (columns method, share, low, high, tokens, n)."""
    with shared.classroom():
        figure, ax = shared.panels(1.4 + 0.7 * len(table))
        marks = list(zip((BLUE, GREEN, ORANGE, RED, PURPLE, SKY, BLACK, GREY), "o^sDvPX*", strict=True))
        for y, row in enumerate(table.itertuples()):
            color, marker = marks[y % len(marks)]
            shared.dots(ax, table.iloc[[y]], [y], color, marker)
            _at_right(ax, y, f"{row.share:.0%}   {row.tokens:.0f} tokens, n = {row.n}", 12)
        shared.categories(ax, [WAYS.get(method, str(method)) for method in table.method])
        ax.set(xlabel="share right", xlim=(-0.02, 1.02), title="lines: 95 %; right: mean tokens read and written")
    return figure


def success_map(table: Any, *, n_layers: int, value: str = "rank", chosen: tuple[int, int] | None = None) -> Figure:
    """All back-patches of one query: the rank of the answer's first token after each, dots where the answer is given.

    Args:
        table: of `back_patching.sweep`: source_layer, target_layer, right, rank (0 = said).
        value: "rank" (dark: near the top) or "right" (bright: the answer is given); where no rank is known, "right".
        chosen: (source_layer, target_layer) of the pair that gets a frame.
    """
    if value not in ("rank", "right"):
        raise ValueError(f"value={value!r}: choose rank or right")
    ranks = table["rank"].astype(float)
    if ranks.isna().all():  # the answer's first token says nothing of it
        value = "right"
    with shared.classroom():
        figure, ax = shared.panels(6.6)
        if value == "rank":
            grid = _pairs(table, n_layers, np.log10(ranks + 1))
            powers = np.arange(max(2, 1 + int(np.ceil(np.nanmax(grid)))))
            image = _heat(ax, grid, "viridis", powers[-1])
            bar = figure.colorbar(image, ax=ax, label="rank of the answer's first token (1 = said next)")
            bar.set_ticks(powers.tolist(), labels=[f"{10 ** int(power):,}" for power in powers])
        else:
            _heat(ax, _pairs(table, n_layers, table.right.astype(float)), "cividis", 1)
        right = table[table.right]
        ax.plot(right.target_layer, right.source_layer, "o", color="white", mec=BLACK, ms=max(3.5, 110 / n_layers),
                mew=1.2, ls="none")  # fmt: skip
        if chosen is not None:
            source, target = chosen
            for color, width in (("white", 5), (RED, 2.5)):  # seen on dark and on bright cells
                ax.add_patch(Rectangle((target - 0.5, source - 0.5), 1, 1, fill=False, ec=color, lw=width, zorder=4))
        ax.set_title(f"dots: the answer is given (pairs that give it: {len(right)})")
    return figure


def _at_right(ax: Axes, y: int | float, words: str, size: int) -> None:
    """Words at a height, at the right of the axes."""
    ax.annotate(words, (1, y), (10, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                fontsize=size)  # fmt: skip


def _pairs(rows: Any, n_layers: int, values: Any) -> np.ndarray:
    """[source target]: values of the rows, or their number (None); nan where the source is not after the target."""
    places = rows.source_layer.to_numpy(int), rows.target_layer.to_numpy(int)
    if values is None:
        grid = np.where(np.tri(n_layers, k=-1, dtype=bool), 0.0, np.nan)
        np.add.at(grid, places, 1)
    else:
        grid = np.full((n_layers, n_layers), np.nan)
        grid[places] = values
    return grid


def _heat(ax: Axes, grid: np.ndarray, colors: str, top: Any) -> Any:
    ax.set_facecolor("#E4E4E4")  # pairs that do not exist
    image = ax.imshow(grid, origin="lower", cmap=colors, vmin=0, vmax=top)
    ax.set(xlabel="target layer (state is put after it)", ylabel="source layer (state is taken after it)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return image
