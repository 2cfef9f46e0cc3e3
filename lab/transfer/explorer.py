"""Explorer for notebooks: tables in, controls and pictures out."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw

from lab.explorers import CELL, TABLE, png
from lab.figures import BLACK
from lab.transfer import figures, merging_figures


def transfer_explorer(
    result: Any,
    *,
    compare: Callable[[str, str], tuple[Any, Any]],
    flips: Callable[[str, str], Any],
    task_of: Callable[[int, int], Any],
) -> ipw.VBox:
    """Choose two treatments and n: the curve, the paired differences behind one point, and the test items that flip.

    Args:
        result: a finished run of `lab.transfer`.
        compare: `compare(first, second)` gives pairs and curve of first minus second (`transfer_statistics`).
        flips: `flips(run, run)` counts items right in one run and wrong in the other (`transfer_statistics.flips`).
        task_of: `task_of(split, seed)` makes the task again, so that its test items can be shown.

    Returns:
        The explorer; the last expression of a cell shows it.
    """
    runs = [name for name in result.tables["items"] if "@" in name or name in ("base", "base2")]
    if not runs:
        raise ValueError("there is no run to look at: did every base fail its gate? Look at .tables['gate']")
    at: dict[str, list[str]] = {}
    for run in runs:
        at.setdefault(run.split("@")[0], []).append(run.partition("@")[2])
    wide = {"style": {"description_width": "60px"}, "layout": ipw.Layout(width="230px")}
    first = ipw.Dropdown(options=list(at), value="BnB" if "BnB" in at else runs[0], description="first", **wide)
    second = ipw.Dropdown(options=list(at), value="AnB" if "AnB" in at else runs[-1], description="minus", **wide)
    n = ipw.Dropdown(options=[""], description="n", **wide)
    nets = list(
        result.tables["items"][["split", "seed", "target"]].drop_duplicates().itertuples(index=False, name=None)
    )
    named = [
        (f"split {split}, seed {seed}, target {target}", place) for place, (split, seed, target) in enumerate(nets)
    ]
    where = ipw.Dropdown(options=named, description="nets", **{**wide, "layout": ipw.Layout(width="330px")})
    metric = ipw.Dropdown(options=list(figures.UNITS), description="metric", **wide)
    message, table = ipw.HTML(), ipw.HTML()
    picture = ipw.Image(format="png", layout=ipw.Layout(max_width="1150px", width="100%"))
    images = ipw.Image(format="png", layout=ipw.Layout(max_width="1000px", width="100%"))

    def common() -> list[str]:
        one, two = ([f for f in at[name.value] if f] for name in (first, second))
        return [f for f in one if f in two] if one and two else one or two

    def show(_: Any = None) -> None:
        both = common()
        if first.value == second.value or not both:
            message.value = "Choose two different treatments, one of them with blocks copied."
            for part in (picture, images, table):
                part.layout.display = "none"
            return
        if tuple(n.options) != tuple(both):
            n.options = both  # resets the value, which calls `draw`
            n.value = both[-1]
        draw()

    def draw(_: Any = None) -> None:
        if first.value == second.value or n.value not in common():
            return
        names = [name if not at[name][0] else f"{name}@{n.value}" for name in (first.value, second.value)]
        pairs, curve = compare(first.value, second.value)
        chosen = n.value if n.value == "E" else int(n.value)
        words = f"{first.value} - {second.value}".replace("_plus", "+")
        picture.value = png(figures.paired_runs(pairs, curve, n=chosen, words=words, metric=metric.value))
        counts = flips(*names)
        split, seed, target = nets[where.value]
        items = result.tables["items"].query("split == @split and seed == @seed and target == @target")
        wrong = [items[name] != items.label for name in names]
        flipped = items[wrong[0] != wrong[1]]
        row = counts.query("split == @split and seed == @seed and target == @target").iloc[0]
        said = "&lt; 0.001" if row.p < 0.001 else f"= {row.p:.3f}"
        message.value = (
            f"<b>{names[0]}</b> against <b>{names[1]}</b>, these two nets, {row.n} test items: {row.right_to_wrong} right in "
            f"the first only, {row.wrong_to_right} in the second only (sign test, p {said})."
        )
        task = task_of(int(split), int(seed))
        side = task.sides[target]
        images.layout.display = "" if task.patches else "none"
        table.layout.display = "none" if task.patches else ""
        picture.layout.display = ""
        if task.patches:
            images.value = png(figures.flipped_digits(side, flipped, names))
        else:
            table.value = _flipped(side, flipped, names)

    for control in (first, second):
        control.observe(show, "value")
    for control in (n, where, metric):
        control.observe(draw, "value")
    show()
    return ipw.VBox([ipw.HBox([first, second, n]), ipw.HBox([metric, where]), message, picture, images, table])


def probe_transfer_explorer(result: Any) -> ipw.VBox:
    """Choose what a probe was trained and tested on: AUC by depth beside the way back, and every measure at one depth.

    Args:
        result: a finished run of `lab.transfer.probe_transfer`.

    Returns:
        The explorer; the last expression of a cell shows it.
    """
    rows = result.summary[result.summary.probe.isin(result.tables["pairs"].probe) & (result.summary.labels == "task")]
    names, wide = (
        list(dict.fromkeys(rows.trained_on)),
        {"style": {"description_width": "80px"}, "layout": ipw.Layout(width="300px")},
    )
    trained = ipw.Dropdown(options=names, description="trained on", **wide)
    tested = ipw.Dropdown(options=names, value=names[min(1, len(names) - 1)], description="tested on", **wide)
    probe = ipw.Dropdown(options=list(dict.fromkeys(rows.probe)), description="probe", **wide)
    depth = ipw.SelectionSlider(
        options=sorted(int(depth) for depth in set(rows.depth)), description="depth", continuous_update=False,
        layout=ipw.Layout(width="720px"), style={"description_width": "80px"},
    )  # fmt: skip
    picture = ipw.Image(format="png", layout=ipw.Layout(max_width="900px", width="100%"))
    table = ipw.HTML()

    def draw(_: Any = None) -> None:
        a, b = trained.value, tested.value
        both = [(a, b), (b, a)] if a != b else [(a, b)]
        figure = merging_figures.probe_transfer_by_depth(result, pairs=both, probe=probe.value)
        figure.axes[0].axvline(depth.value / result.parameters["n_layers"], color=BLACK, lw=1.5)
        picture.value = png(figure)
        lines = [f"<table style='{TABLE}'><tr>"]
        head = ("measure", f"{a} to {b}", "interval", "above its best control by", "interval")
        lines += [f"<td style='{CELL};opacity:.7'>{html.escape(name)}</td>" for name in head]
        here = rows[
            (rows.trained_on == a) & (rows.tested_on == b) & (rows.probe == probe.value) & (rows.depth == depth.value)
        ]
        for row in here[here.difference.notna()].itertuples():
            values = (row.metric, f"{row.mean:.2f}", f"{row.low:.2f} to {row.high:.2f}", f"{row.difference:+.2f}",
                      f"{row.difference_low:+.2f} to {row.difference_high:+.2f}")  # fmt: skip
            lines.append("</tr><tr>" + "".join(f"<td style='{CELL}'>{value}</td>" for value in values))
        table.value = "".join([*lines, "</tr></table>"])

    for control in (trained, tested, probe, depth):
        control.observe(draw, "value")
    depth.value = depth.options[len(depth.options) // 2]
    draw()
    return ipw.VBox([ipw.HBox([trained, tested, probe]), depth, picture, table])


def _flipped(side: Any, flipped: Any, names: Sequence[str]) -> str:
    """Test sequences on which two nets disagree about being right, as an HTML table of up to 12, at random."""
    lines = [f"<table style='{TABLE}'><tr>"]
    lines += [f"<td style='{CELL};opacity:.7'>{name}</td>" for name in ("sequence", "class", *names)]
    for row in flipped.sample(min(12, len(flipped)), random_state=0).sort_values("item").to_dict("records"):
        tokens = " ".join(map(str, side.test.inputs[row["item"]]))
        cells = (tokens, *(side.classes[int(row[name])] for name in ("label", *names)))
        lines.append("</tr><tr>" + "".join(f"<td style='{CELL}'>{html.escape(cell)}</td>" for cell in cells))
    return "".join([*lines, "</tr></table>"])
