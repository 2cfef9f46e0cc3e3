"""Explorers for notebooks: tables in, controls and pictures out."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw

from lab.explorers import CELL, TABLE, ClickablePicture, image, nearest, png
from lab.figures import BLACK
from lab.transfer import figures, merging_figures


def transfer_explorer(
    result: Any, *, compare: Callable[[str, str], tuple[Any, Any]], flips: Callable[[str, str], Any],
    task_of: Callable[[int, int], Any],
) -> ipw.VBox:  # fmt: skip
    """Choose two treatments and n: the curve, the paired differences behind one point, and the test items that flip.

    Callbacks of the result: `transfer.compare` of two treatments, `statistics.flips` of two runs, `transfer.task_of` a (split,
    seed), so that its test items can be shown.
    """
    items = result.tables["items"]
    at = _runs(items)
    first = _menu("first", list(at), value="BnB" if "BnB" in at else [*at][0])
    second = _menu("minus", list(at), value="AnB" if "AnB" in at else [*at][-1])
    n, metric = _menu("n", [""]), _menu("metric", list(figures.UNITS))
    nets = list(items[["split", "seed", "target"]].drop_duplicates().itertuples(index=False, name=None))
    named = [("split {}, seed {}, target {}".format(*net), place) for place, net in enumerate(nets)]
    where, message, table = _menu("nets", named, width=330), ipw.HTML(), ipw.HTML()
    picture = ClickablePicture(
        1150, "The difference by n, and each pair at one n", "click an n at the left to see its pairs",
        lambda x, _: nearest(n, x, lambda one: 0.5 if one == "E" else int(one)),
    )  # fmt: skip
    images = image(1000)

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
        pairs, curve = compare(first.value, second.value)
        chosen, words = n.value if n.value == "E" else int(n.value), f"{first.value} - {second.value}"
        figure = figures.paired_runs(pairs, curve, n=chosen, words=words.replace("_plus", "+"), metric=metric.value)
        names = [name if not at[name][0] else f"{name}@{n.value}" for name in (first.value, second.value)]
        split, seed, target = nets[where.value]
        here = "split == @split and seed == @seed and target == @target"
        mine, task = items.query(here), task_of(int(split), int(seed))
        flipped, side = mine[(mine[names[0]] != mine.label) != (mine[names[1]] != mine.label)], task.sides[target]
        message.value = _said(names, flips(*names).query(here).iloc[0])
        picture.show(figure)
        for part, shown in ((picture, True), (images, task.patches), (table, not task.patches)):
            part.layout.display = "" if shown else "none"
        if task.patches:
            images.value = png(figures.flipped_digits(side, flipped, names))
        else:
            table.value = _flipped(side, flipped, names)

    for controls, changed in (((first, second), show), ((n, where, metric), draw)):
        for control in controls:
            control.observe(changed, "value")
    show()
    return ipw.VBox([ipw.HBox([first, second, n]), ipw.HBox([metric, where]), message, picture, images, table])


def probe_transfer_explorer(result: Any) -> ipw.VBox:
    """Choose what a probe was trained and tested on: AUC by depth beside the way back, and every measure at one depth."""
    rows = result.summary[result.summary.probe.isin(result.tables["pairs"].probe) & (result.summary.labels == "task")]
    names = list(dict.fromkeys(rows.trained_on))
    trained = _menu("trained on", names, width=300, label=80)
    tested = _menu("tested on", names, width=300, label=80, value=names[min(1, len(names) - 1)])
    probe = _menu("probe", list(dict.fromkeys(rows.probe)), width=300, label=80)
    depth = ipw.SelectionSlider(
        options=sorted(int(depth) for depth in set(rows.depth)), description="depth", continuous_update=False,
        layout=ipw.Layout(width="720px"), style={"description_width": "80px"},
    )  # fmt: skip
    picture = ClickablePicture(
        900, "AUC by depth, there and back", "click a depth to see every measure there",
        lambda x, _: nearest(depth, x * result.parameters["n_layers"]),
    )  # fmt: skip
    table = ipw.HTML()

    def draw(_: Any = None) -> None:
        a, b = trained.value, tested.value
        both = [(a, b), (b, a)] if a != b else [(a, b)]
        figure = merging_figures.probe_transfer_by_depth(result, pairs=both, probe=probe.value)
        figure.axes[0].axvline(depth.value / result.parameters["n_layers"], color=BLACK, lw=1.5)
        picture.show(figure)
        here = rows[(rows.trained_on == a) & (rows.tested_on == b)]
        here = here[(here.probe == probe.value) & (here.depth == depth.value) & here.difference.notna()]
        cells = [(row.metric, f"{row.mean:.2f}", f"{row.low:.2f} to {row.high:.2f}", f"{row.difference:+.2f}",
                  f"{row.difference_low:+.2f} to {row.difference_high:+.2f}") for row in here.itertuples()]  # fmt: skip
        table.value = _table(("measure", f"{a} to {b}", "interval", "above its best control by", "interval"), cells)

    for control in (trained, tested, probe, depth):
        control.observe(draw, "value")
    depth.value = depth.options[len(depth.options) // 2]
    draw()
    return ipw.VBox([ipw.HBox([trained, tested, probe]), depth, picture, table])


def _runs(items: Any) -> dict[str, list[str]]:
    """Treatments with their n, as in the names of columns."""
    at: dict[str, list[str]] = {}
    for name in [name for name in items if "@" in name or name in ("base", "base2")]:
        at.setdefault(name.split("@")[0], []).append(name.partition("@")[2])
    if not at:
        raise ValueError("there is no run to look at: did every base fail its gate? Look at .tables['gate']")
    return at


def _menu(description: str, options: Sequence[Any], *, width: int = 230, label: int = 60, **more: Any) -> ipw.Dropdown:
    look = {"style": {"description_width": f"{label}px"}, "layout": ipw.Layout(width=f"{width}px")}
    return ipw.Dropdown(options=options, description=description, **look, **more)


def _said(names: Sequence[str], row: Any) -> str:
    """What flipped between two nets."""
    p = "&lt; 0.001" if row.p < 0.001 else f"= {row.p:.3f}"
    return (
        f"<b>{names[0]}</b> against <b>{names[1]}</b>, these two nets, {row.n} test items: {row.right_to_wrong} right in "
        f"the first only, {row.wrong_to_right} in the second only (sign test, p {p})."
    )


def _flipped(side: Any, flipped: Any, names: Sequence[str]) -> str:
    """Test sequences on which two nets disagree about being right, up to 12, at random."""
    rows = flipped.sample(min(12, len(flipped)), random_state=0).sort_values("item").to_dict("records")
    said = [(" ".join(map(str, side.test.inputs[row["item"]])), *(side.classes[int(row[one])] for one in ("label", *names)))
            for row in rows]  # fmt: skip
    return _table(("sequence", "class", *names), said)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"<table style='{TABLE}'><tr>"]
    lines += [f"<td style='{CELL};opacity:.7'>{html.escape(name)}</td>" for name in head]
    for row in rows:
        lines.append("</tr><tr>" + "".join(f"<td style='{CELL}'>{html.escape(cell)}</td>" for cell in row))
    return "".join([*lines, "</tr></table>"])
