"""Explorer for notebooks: tables in, controls and pictures out."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw

from lab.concept_depth import figures
from lab.explorers import CELL, ClickablePicture, ask, button, nearest, row_of, shown, table_of, wide
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
    """
    if not results:
        raise ValueError("concept_explorer needs at least one result; run lab.concept_depth first")
    return _Explorer(_told_apart(results), data_sets, models, compute).box


def _told_apart(results: Sequence[Any]) -> dict[tuple, Any]:
    """Results by what the controls say of them: data set, model, noise, bits."""
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
    return known


class _Explorer:
    """Controls, what they show, and the results that are known so far."""

    def __init__(self, known: dict[tuple, Any], data_sets: Sequence[str], models: Sequence[str], compute: Any) -> None:
        self.known, self.compute = known, compute
        sets, names = ([*dict.fromkeys([key[place] for key in known] + list(more if compute else ()))]
                       for place, more in enumerate((data_sets, models)))  # fmt: skip
        levels = [None, 8, 4, 3, 2] if compute else sorted({key[3] for key in known}, key=lambda b: b or 99)
        bits = [("as loaded", None), *((f"{level} bits", level) for level in levels if level)]
        look = wide(240, 70)
        data_set = ipw.Dropdown(options=sets, description="data set", **look)
        model = ipw.Dropdown(options=names, description="model", **look)
        glued = ipw.Checkbox(
            description="letters glued in front (noise)", indent=False, layout=ipw.Layout(width="240px")
        )
        weights = ipw.Dropdown(options=bits, description="weights", **look)
        self.choices = (data_set, model, glued, weights)
        self.metric = ipw.Dropdown(options=list(figures.METRICS), description="metric", **look)
        self.depth = ipw.SelectionSlider(options=[0], description="depth", continuous_update=False, **wide(720, 70))
        self.button = button("Compute this one")
        self.picture = ClickablePicture(
            900, "Probe scores by depth", "click a depth to read its statements",
            lambda x, _: nearest(self.depth, x * self.known[self.key()].parameters["n_layers"]),
        )  # fmt: skip
        self.message, self.table, self.log = ipw.HTML(), ipw.HTML(), ipw.Output()
        for control in self.choices:
            control.observe(self.show, "value")
        for control in (self.metric, self.depth):
            control.observe(self.draw, "value")
        self.button.on_click(self.run)
        for control, value in zip(self.choices, next(iter(known)), strict=True):
            control.value = value
        self.show()
        self.depth.value = self.depth.options[len(self.depth.options) // 2]
        lines = [ipw.HBox([data_set, model, self.metric]), ipw.HBox([weights, glued, self.button]), self.depth]
        self.box = ipw.VBox([ipw.VBox(lines), self.message, self.log, self.picture, self.table])

    def key(self) -> tuple:
        return tuple(control.value for control in self.choices)

    def show(self, _: Any = None) -> None:
        result = self.known.get(self.key())
        shown(result is None and self.compute is not None, self.button)
        shown(result is not None, self.picture, self.table, self.depth)
        if result is None:
            how = "The button runs it (half a minute to a few minutes, with a progress bar)."
            self.message.value = f"Not computed yet. {how if self.compute else 'Choose another.'}"
            return
        self.message.value = ""
        depths = sorted(int(depth) for depth in _examples(result).depth.unique())
        if tuple(self.depth.options) != tuple(depths):
            self.depth.options = depths  # resets the value, which calls `draw`
        self.draw()

    def draw(self, _: Any = None) -> None:
        if result := self.known.get(self.key()):
            figure = figures.concept_depth(result, metric=self.metric.value)
            figure.axes[0].axvline(self.depth.value / result.parameters["n_layers"], color=BLACK, lw=1.5)
            self.picture.show(figure)
            self.table.value = _statements(result, self.depth.value)

    def run(self, _: Any) -> None:
        self.button.disabled = True
        result, wrong = ask(self.log, self.compute, *self.key())
        self.button.disabled = False
        if wrong:
            self.message.value = wrong
            return
        self.known[self.key()] = result  # under what was asked for: a table of one's own may call itself something else
        self.show()


def _examples(result: Any) -> Any:
    """What the probes say of each statement, at the residual stream, or at the first site that was looked at instead."""
    rows = result.tables["examples"]
    site = "resid" if (rows.site == "resid").any() else rows.site.iloc[0]
    return rows[rows.site == site]


def _statements(result: Any, depth: int) -> str:
    """The statements that the probe at this depth is most and least certain of, as an HTML table."""
    rows = _examples(result)
    rows = rows[rows.depth == depth].merge(result.tables["statements"][["example", "text"]], on="example")
    rows = rows.assign(size=rows.decision.abs(), right=(rows.decision > 0) == (rows.label == 1))
    sure = rows.sort_values("size", ascending=False)
    parts = {"Most certain, and right": sure[sure.right].head(4), "Most certain, and wrong": sure[~sure.right].head(4),
             "Least certain": sure.tail(4)}  # fmt: skip
    site = "" if (site := rows.site.iloc[0]) == "resid" else f", {site}"
    said = (
        f"<p>Depth {depth}{site}: {rows.right.mean():.0%} of {len(rows)} statements are on the right side of 0 when the "
        "probes that were not trained on them are averaged (the curve shows single probes).</p>"
    )
    lines = []
    for title, part in parts.items():
        lines.append(f"<tr><th colspan=4 style='{CELL};font-weight:600'>{title}</th></tr>")
        lines.append(row_of(["statement", "label", "log-odds of label 1", "share of splits right"], pale=4))
        for row in part.itertuples():
            text, share = html.escape(str(row.text)), f"{row.share_right:.0%}"
            lines.append(row_of([text, row.label, f"{row.decision:+.1f}", share]))
    return said + table_of(lines)
