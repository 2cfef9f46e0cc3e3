"""Explorer for notebooks: tables in, controls and pictures out."""

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as ipw
import pandas as pd

from lab.back_patching import figures
from lab.explorers import CELL, TABLE, ask, png, text_of


def back_patching_explorer(
    queries: Any,
    sweep: Callable[[str, str, list[str], str], Any],
    *,
    generate: Callable[[str, str, str, int, int], str] | None = None,
    lens: Callable[[str, str, list[str], list[str]], Any] | None = None,
    swept: Mapping[tuple[str, str], Any] | None = None,
) -> ipw.VBox:
    """Choose or type a two-hop query; see which back-patches bring out its answer, and what the model says after each.

    Args:
        queries: table of queries to offer: example, text, e1, e2, e3, set; e2_aliases and e3_aliases (lists) and plain
            (what is said without a patch) where they are there.
        sweep: `sweep(prompt, e1, names, position) -> table` (`lab.back_patching.sweep`); asked on the button
            and remembered. `names` are the answer and its aliases, `position` is t1 or t2. What the model says without a
            patch may come in the table's `attrs["plain"]`.
        generate: `generate(prompt, e1, position, source_layer, target_layer) -> str`: the whole text after one patch.
            Asked for each pair that is looked at; without it the text is as far as `sweep` decoded it.
        lens: `lens(prompt, e1, e2_names, e3_names) -> table` for `lab.back_patching.figures.lens_strip`, asked with `sweep`.
        swept: tables that are there already, by (prompt, position) of offered queries; the first of them is shown.

    Returns:
        The explorer; the last expression of a cell shows it.

    Raises:
        ValueError: a column of `queries` is missing.
    """
    absent = [name for name in ("example", "text", "e1", "e2", "e3", "set") if name not in queries]
    if absent:
        raise ValueError(f"queries has no column {', '.join(absent)}: give a table of two-hop queries with their sets")
    rows = queries.to_dict("records")
    tables: dict[tuple, Any] = {}
    strips: dict[tuple, Any] = {}
    texts: dict[tuple, str] = {}
    moving = False  # the explorer itself is moving its sliders
    wide = {"style": {"description_width": "90px"}, "layout": ipw.Layout(width="720px")}
    offered = [(f"{row['set']}: {row['text']} ... {row['e3']}", i) for i, row in enumerate(rows)]
    query = ipw.Dropdown(options=[*offered, ("a query of your own", -1)], description="query", **wide)
    text = ipw.Text(description="your query", placeholder="The capital of the country of Mumbai is", **wide)
    e1 = ipw.Text(description="e1", placeholder="Mumbai", **wide)
    e2 = ipw.Text(description="bridge e2", placeholder="India (only for the lens; may stay empty)", **wide)
    e3 = ipw.Text(description="answer e3", placeholder="New Delhi, Delhi (any of these names counts)", **wide)
    own = ipw.VBox([text, e1, e2, e3] if lens else [text, e1, e3])
    position = ipw.RadioButtons(
        options=[("t1: last token of e1", "t1"), ("t2: last token of the query", "t2")], description="patched at",
        style={"description_width": "90px"},
    )  # fmt: skip
    source = ipw.IntSlider(min=1, max=1, description="source layer", continuous_update=False, **wide)
    target = ipw.IntSlider(min=0, max=0, description="target layer", continuous_update=False, **wide)
    button = ipw.Button(description="Run", button_style="primary", layout=ipw.Layout(width="180px"))
    message, said, log = ipw.HTML(), ipw.HTML(), ipw.Output()
    picture, strip = (
        ipw.Image(format="png", layout=ipw.Layout(max_width=size, width="100%")) for size in ("700px", "900px")
    )
    found = ipw.VBox([source, target, picture, said, strip])

    def chosen() -> tuple[str, str, list[str], list[str], Any]:
        """Prompt, e1, names of bridge and answer, and what is said without a patch (None: not known)."""
        if query.value < 0:
            lists = ([name.strip() for name in field.value.split(",") if name.strip()] for field in (e2, e3))
            return text.value.strip(), e1.value.strip(), *lists, None
        row = rows[query.value]
        names = (list(dict.fromkeys([row[e], *row.get(f"{e}_aliases", ())])) for e in ("e2", "e3"))
        return row["text"], row["e1"], *names, row.get("plain")

    def keys() -> tuple[tuple, tuple]:
        """Under which the table of a sweep and that of a lens are remembered."""
        prompt, subject, bridge, names, _ = chosen()
        return (prompt, subject, tuple(names), position.value), (prompt, subject, tuple(bridge), tuple(names))

    def known() -> tuple[Any, Any]:
        sweep_key, lens_key = keys()
        return tables.get(sweep_key), strips.get(lens_key)

    def place(source_layer: int, target_layer: int, n_layers: int) -> None:
        nonlocal moving
        moving = True
        source.max = n_layers - 1
        source.value = source_layer
        target.max = source_layer - 1
        target.value = target_layer
        moving = False

    def show(_: Any = None) -> None:
        table, lines = known()
        lens_missing = lens is not None and lines is None and bool(chosen()[2])
        own.layout.display = "" if query.value < 0 else "none"
        button.layout.display = "" if table is None or lens_missing else "none"
        source.disabled = target.disabled = table is None
        for part in (picture, said):
            part.layout.display = "none" if table is None else ""
        strip.layout.display = "none" if lines is None else ""
        if table is None:
            message.value = "Not run yet: the button tries all pairs of layers (seconds with a small model)."
            return
        best = table.sort_values(["right", "rank"], ascending=[False, True], kind="stable").iloc[0]
        place(int(best.source_layer), int(best.target_layer), 1 + int(table.source_layer.max()))
        if lines is not None:
            strip.value = png(figures.lens_strip(lines, n_layers=source.max + 1))
        draw()

    def turn(_: Any) -> None:
        if not moving:
            place(source.value, min(target.value, source.value - 1), source.max + 1)
            draw()

    def draw() -> None:
        prompt, subject, _, _, plain = chosen()
        table, pair, at = tables[keys()[0]], (source.value, target.value), position.value
        picture.value = png(figures.success_map(table, n_layers=source.max + 1, chosen=pair))
        row = table[(table.source_layer == pair[0]) & (table.target_layer == pair[1])].iloc[0]
        full, message.value = (*keys()[0], *pair), ""
        if generate is not None and full not in texts:
            new, message.value = ask(log, generate, prompt, subject, at, *pair)
            if new is not None:
                texts[full] = new
        plain = table.attrs.get("plain", plain)
        lines = {
            "without a patch": plain if isinstance(plain, str) else "(not known)",
            f"state after layer {pair[0]} put after layer {pair[1]} at {at}": texts.get(full, f"{row.said} [...]"),
            "rank of the answer's first token there": (
                "not readable: this token says nothing of the answer"
                if pd.isna(row["rank"])
                else f"{row['rank'] + 1:,} (1 = it is said next)"
            ),
            "counts as right": "yes" if row.right else "no",
        }
        cells = (f"<tr><td style='{CELL};opacity:.7'>{name}</td><td style='{CELL}'>{text_of(line)}</td></tr>"
                 for name, line in lines.items())  # fmt: skip
        said.value = f"<p>{text_of(prompt)} ...</p><table style='{TABLE}'>{''.join(cells)}</table>"

    def run(_: Any) -> None:
        prompt, subject, bridge, names, _ = chosen()
        missing = [name for name, there in (("query", prompt), ("e1", subject), ("answer e3", names)) if not there]
        if missing:
            message.value = f"Fill in first: {', '.join(missing)}."
            return
        (sweep_key, lens_key), (table, lines), wrong = keys(), known(), ""
        button.disabled = True
        if table is None:
            table, wrong = ask(log, sweep, prompt, subject, names, position.value)
        if lens is not None and bridge and lines is None and not wrong:
            lines, wrong = ask(log, lens, prompt, subject, bridge, names)
        button.disabled = False
        tables.update({} if table is None else {sweep_key: table})
        strips.update({} if lines is None else {lens_key: lines})
        show()
        message.value = wrong or message.value

    for control in (query, text, e1, e2, e3, position):
        control.observe(show, "value")
    for slider in (source, target):
        slider.observe(turn, "value")
    button.on_click(run)
    for i, row in reversed(list(enumerate(rows))):
        for at in ("t2", "t1"):
            if (row["text"], at) in (swept or {}):
                query.value, position.value = i, at
                tables[keys()[0]] = (swept or {})[row["text"], at]
    show()
    return ipw.VBox([query, own, position, button, message, log, found])
