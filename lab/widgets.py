"""Explorers for notebooks: tables in, controls and pictures out. They draw what they are given and compute nothing.

Pictures are plain images, so an explorer needs no JavaScript beyond ipywidgets and no network. What is not there yet is
asked for through a callback that the notebook passes in.
"""

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt

from lab import plots

_TABLE = "border-collapse:collapse;font-size:14px;line-height:1.35"
_CELL = "padding:3px 10px;border-bottom:1px solid #ddd;text-align:left;color:inherit"


def concept_explorer(
    results: Sequence[Any],
    *,
    data_sets: Sequence[str] = (),
    models: Sequence[str] = (),
    compute: Callable[[str, str, bool, int | None], Any] | None = None,
) -> ipw.VBox:
    """Choose data set, model, metric, noise and bits; move along the depth and read the statements there.

    Args:
        results: finished runs of `lab.experiments.concept_depth` (at least one).
        data_sets, models: further names to offer; choosing one asks `compute` for it, on a button.
        compute: `compute(dataset, model, noise, bits) -> Result`; None offers only what is in `results`.

    Returns:
        The explorer; the last expression of a cell shows it.
    """
    if not results:
        raise ValueError("concept_explorer needs at least one result; run lab.experiments.concept_depth first")
    known: dict[tuple, Any] = {}

    def remember(result: Any) -> None:
        about = result.parameters
        known[about["dataset"], about["model"], about["noise"], about["bits"]] = result

    for result in results:
        remember(result)
    wide = {"style": {"description_width": "70px"}, "layout": ipw.Layout(width="240px")}
    sets = list(dict.fromkeys([key[0] for key in known] + list(data_sets if compute else ())))
    names = list(dict.fromkeys([key[1] for key in known] + list(models if compute else ())))
    levels = [None, 8, 4, 3, 2] if compute else sorted({key[3] for key in known}, key=lambda b: b or 99)
    data_set = ipw.Dropdown(options=sets, description="data set", **wide)
    model = ipw.Dropdown(options=names, description="model", **wide)
    metric = ipw.Dropdown(options=list(plots.METRICS), description="metric", **wide)
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
        there_are = sorted(int(d) for d in result.tables["examples"].query("site == 'resid'").depth.unique())
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
        log.clear_output()
        failed = None
        with log:  # shows progress; an exception that left this block would be swallowed, so it is taken out by hand
            try:
                remember(compute(*key()))
            except Exception as error:  # anything that goes wrong is told where the reader looks
                failed = error
        button.disabled = False
        if failed is not None:
            message.value = f"<b>{type(failed).__name__}</b>: {html.escape(str(failed))}"
            return
        log.clear_output()
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
    figure = plots.concept_depth(result, metric=metric)
    axes = figure.axes[0]
    axes.axvline(depth / result.parameters["n_layers"], color=plots.BLACK, lw=1.5)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def _statements(result: Any, depth: int) -> str:
    """The statements that the probe at this depth is most and least certain of, as an HTML table."""
    rows = result.tables["examples"]
    rows = rows[(rows.site == "resid") & (rows.depth == depth)]
    rows = rows.merge(result.tables["statements"][["example", "text"]], on="example")
    right = (rows.decision > 0) == (rows.label == 1)
    by_certainty = rows.assign(size=rows.decision.abs()).sort_values("size", ascending=False)
    parts = [
        ("Most certain, and right", by_certainty[right.reindex(by_certainty.index)].head(4)),
        ("Most certain, and wrong", by_certainty[~right.reindex(by_certainty.index)].head(4)),
        ("Least certain", by_certainty.tail(4)),
    ]
    share = right.mean()
    lines = [
        f"<p>Depth {depth}: {share:.0%} of {len(rows)} statements are on the right side of 0 when the probes that were not "
        "trained on them are averaged (the curve shows single probes).</p>"
    ]
    lines.append(f"<table style='{_TABLE}'>")
    head = ("statement", "label", "log-odds of label 1", "share of splits right")
    for title, part in parts:
        lines.append(f"<tr><th colspan=4 style='{_CELL};font-weight:600'>{title}</th></tr>")
        lines.append("<tr>" + "".join(f"<td style='{_CELL};opacity:.7'>{name}</td>" for name in head) + "</tr>")
        for row in part.itertuples():
            cells = (html.escape(str(row.text)), row.label, f"{row.decision:+.1f}", f"{row.share_right:.0%}")
            lines.append("<tr>" + "".join(f"<td style='{_CELL}'>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])
