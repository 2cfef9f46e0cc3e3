"""Explorer for notebooks: tables in, controls and pictures out."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw

from lab.concept_depth import figures
from lab.explorers import CELL, TABLE, ask, png
from lab.figures import BLACK


def concept_explorer(
    results: Sequence[Any],
    *,
    data_sets: Sequence[str] = (),
    models: Sequence[str] = (),
    compute: Callable[[str, str, bool, int | None], Any] | None = None,
) -> ipw.VBox:
    """Choose data set, model, metric, noise and bits; move along the depth and read the statements there.

    Args:
        results: finished runs of `lab.concept_depth` (at least one). Runs that the controls cannot tell apart (two
            own tables, another seed, other weights under one name) are offered as "name, 2".
        data_sets, models: further names to offer; choosing one asks `compute` for it, on a button.
        compute: `compute(dataset, model, noise, bits) -> Result`; None offers only what is in `results`.

    Returns:
        The explorer; the last expression of a cell shows it.
    """
    if not results:
        raise ValueError("concept_explorer needs at least one result; run lab.concept_depth first")
    known: dict[tuple, Any] = {}
    seen: dict[tuple[str, str], list[Any]] = {}

    def named(kind: str, name: str, what: Any) -> str:
        """The name, or "name, 2" for another thing of the same name."""
        same = seen.setdefault((kind, name), [])
        if what not in same:
            same.append(what)
        return f"{name}, {same.index(what) + 1}" if same.index(what) else name

    for result in results:
        about = result.parameters
        which = named("model", about["model"], [about.get(name) for name in ("checksum", "dtype", "start_token")])
        texts = named("data", about["dataset"], [about.get("instruction"), result.tables["statements"].to_csv()])
        at = (which, about["noise"], about["bits"])
        if (texts, *at) in known and known[texts, *at].parameters != about:  # other settings, that have no control here
            texts = named("data", texts, about)
        known[texts, *at] = result
    wide = {"style": {"description_width": "70px"}, "layout": ipw.Layout(width="240px")}
    sets = list(dict.fromkeys([key[0] for key in known] + list(data_sets if compute else ())))
    names = list(dict.fromkeys([key[1] for key in known] + list(models if compute else ())))
    levels = [None, 8, 4, 3, 2] if compute else sorted({key[3] for key in known}, key=lambda b: b or 99)
    data_set = ipw.Dropdown(options=sets, description="data set", **wide)
    model = ipw.Dropdown(options=names, description="model", **wide)
    metric = ipw.Dropdown(options=list(figures.METRICS), description="metric", **wide)
    bits = ipw.Dropdown(
        options=[("as loaded", None), *((f"{b} bits", b) for b in levels if b)], description="weights", **wide
    )
    noise = ipw.Checkbox(description="letters glued in front (noise)", indent=False, layout=ipw.Layout(width="240px"))
    depth = ipw.SelectionSlider(
        options=[0], description="depth", continuous_update=False, layout=ipw.Layout(width="720px"),
        style={"description_width": "70px"},
    )  # fmt: skip
    button = ipw.Button(description="Compute this one", button_style="primary", layout=ipw.Layout(width="180px"))
    message, table = ipw.HTML(), ipw.HTML()
    picture = ipw.Image(format="png", layout=ipw.Layout(max_width="900px", width="100%"))
    log = ipw.Output()

    def key() -> tuple:
        return data_set.value, model.value, noise.value, bits.value

    def show(_: Any = None) -> None:
        result = known.get(key())
        button.layout.display = "none" if result or compute is None else ""
        for part in (picture, table, depth):
            part.layout.display = "" if result else "none"
        if result is None:
            message.value = "Not computed yet. " + (
                "The button runs it (half a minute to a few minutes, with a progress bar)."
                if compute
                else "Choose another."
            )
            return
        message.value = ""
        there_are = sorted(int(d) for d in _examples(result).depth.unique())
        if tuple(depth.options) != tuple(there_are):
            depth.options = there_are  # resets the value, which calls `draw`
        draw()

    def draw(_: Any = None) -> None:
        result = known.get(key())
        if result is None:
            return
        picture.value = _picture(result, metric.value, depth.value)
        table.value = _statements(result, depth.value)

    def run(_: Any) -> None:
        assert compute is not None
        button.disabled = True
        result, wrong = ask(log, compute, *key())
        button.disabled = False
        if wrong:
            message.value = wrong
            return
        known[key()] = result  # under what was asked for: a table of one's own may call itself something else
        show()

    for control in (data_set, model, noise, bits):
        control.observe(show, "value")
    for control in (metric, depth):
        control.observe(draw, "value")
    button.on_click(run)
    first = next(iter(known))
    data_set.value, model.value, noise.value, bits.value = first
    show()
    depth.value = depth.options[len(depth.options) // 2]
    controls = ipw.VBox([ipw.HBox([data_set, model, metric]), ipw.HBox([bits, noise, button]), depth])
    return ipw.VBox([controls, message, log, picture, table])


def _picture(result: Any, metric: str, depth: int) -> bytes:
    figure = figures.concept_depth(result, metric=metric)
    axes = figure.axes[0]
    axes.axvline(depth / result.parameters["n_layers"], color=BLACK, lw=1.5)
    return png(figure)


def _examples(result: Any) -> Any:
    """What the probes say of each statement, at the residual stream, or at the first site that was looked at instead."""
    rows = result.tables["examples"]
    site = "resid" if (rows.site == "resid").any() else rows.site.iloc[0]
    return rows[rows.site == site]


def _statements(result: Any, depth: int) -> str:
    """The statements that the probe at this depth is most and least certain of, as an HTML table."""
    rows = _examples(result)
    rows = rows[rows.depth == depth]
    rows = rows.merge(result.tables["statements"][["example", "text"]], on="example")
    right = (rows.decision > 0) == (rows.label == 1)
    by_certainty = rows.assign(size=rows.decision.abs()).sort_values("size", ascending=False)
    parts = [
        ("Most certain, and right", by_certainty[right.reindex(by_certainty.index)].head(4)),
        ("Most certain, and wrong", by_certainty[~right.reindex(by_certainty.index)].head(4)),
        ("Least certain", by_certainty.tail(4)),
    ]
    share, site = right.mean(), rows.site.iloc[0]
    place = f"Depth {depth}" + ("" if site == "resid" else f", {site}")
    lines = [
        f"<p>{place}: {share:.0%} of {len(rows)} statements are on the right side of 0 when the probes that were not "
        "trained on them are averaged (the curve shows single probes).</p>"
    ]
    lines.append(f"<table style='{TABLE}'>")
    head = ("statement", "label", "log-odds of label 1", "share of splits right")
    for title, part in parts:
        lines.append(f"<tr><th colspan=4 style='{CELL};font-weight:600'>{title}</th></tr>")
        lines.append("<tr>" + "".join(f"<td style='{CELL};opacity:.7'>{name}</td>" for name in head) + "</tr>")
        for row in part.itertuples():
            cells = (html.escape(str(row.text)), row.label, f"{row.decision:+.1f}", f"{row.share_right:.0%}")
            lines.append("<tr>" + "".join(f"<td style='{CELL}'>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])
