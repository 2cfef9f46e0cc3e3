"""Explorers for notebooks: tables in, controls and pictures out. They draw what they are given and compute nothing.

Pictures are plain images, so an explorer needs no JavaScript beyond ipywidgets and no network. What is not there yet is
asked for through a callback that the notebook passes in.
"""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lab import depth_plots, merging_plots, plots, transfer_plots

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
        results: finished runs of `lab.experiments.concept_depth` (at least one). Runs that the controls cannot tell apart (two
            own tables, another seed, other weights under one name) are offered as "name, 2".
        data_sets, models: further names to offer; choosing one asks `compute` for it, on a button.
        compute: `compute(dataset, model, noise, bits) -> Result`; None offers only what is in `results`.

    Returns:
        The explorer; the last expression of a cell shows it.
    """
    if not results:
        raise ValueError("concept_explorer needs at least one result; run lab.experiments.concept_depth first")
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
        result, wrong = _ask(log, compute, *key())
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
        sweep: `sweep(prompt, e1, names, position) -> table` (`lab.experiments.back_patching.sweep`); asked on the button
            and remembered. `names` are the answer and its aliases, `position` is t1 or t2. What the model says without a
            patch may come in the table's `attrs["plain"]`.
        generate: `generate(prompt, e1, position, source_layer, target_layer) -> str`: the whole text after one patch.
            Asked for each pair that is looked at; without it the text is as far as `sweep` decoded it.
        lens: `lens(prompt, e1, e2_names, e3_names) -> table` for `lab.plots.lens_strip`, asked with `sweep`.
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
            strip.value = _png(plots.lens_strip(lines, n_layers=source.max + 1))
        draw()

    def turn(_: Any) -> None:
        if not moving:
            place(source.value, min(target.value, source.value - 1), source.max + 1)
            draw()

    def draw() -> None:
        prompt, subject, _, _, plain = chosen()
        table, pair, at = tables[keys()[0]], (source.value, target.value), position.value
        picture.value = _png(plots.success_map(table, n_layers=source.max + 1, chosen=pair))
        row = table[(table.source_layer == pair[0]) & (table.target_layer == pair[1])].iloc[0]
        full, message.value = (*keys()[0], *pair), ""
        if generate is not None and full not in texts:
            new, message.value = _ask(log, generate, prompt, subject, at, *pair)
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
        cells = (f"<tr><td style='{_CELL};opacity:.7'>{name}</td><td style='{_CELL}'>{_text(line)}</td></tr>"
                 for name, line in lines.items())  # fmt: skip
        said.value = f"<p>{_text(prompt)} ...</p><table style='{_TABLE}'>{''.join(cells)}</table>"

    def run(_: Any) -> None:
        prompt, subject, bridge, names, _ = chosen()
        missing = [name for name, there in (("query", prompt), ("e1", subject), ("answer e3", names)) if not there]
        if missing:
            message.value = f"Fill in first: {', '.join(missing)}."
            return
        (sweep_key, lens_key), (table, lines), wrong = keys(), known(), ""
        button.disabled = True
        if table is None:
            table, wrong = _ask(log, sweep, prompt, subject, names, position.value)
        if lens is not None and bridge and lines is None and not wrong:
            lines, wrong = _ask(log, lens, prompt, subject, bridge, names)
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


def depth_explorer(
    compute: Callable[[str, list[int]], Any],
    *,
    n_layers: int,
    texts: Sequence[str],
    off: Sequence[int] = (),
) -> ipw.VBox:
    """Click layers off, several at once, and watch the next token, the loss of each token and the layers after them.

    Args:
        compute: `compute(text, layers) -> tables` (`lab.experiments.depth_efficiency.without`), asked at each change.
        n_layers: of the model.
        texts: to offer; the reader may type another.
        off: layers that are off at the beginning.

    Returns:
        The explorer; the last expression of a cell shows it.

    Raises:
        ValueError: no texts, or a layer that the model does not have.
    """
    if not texts:
        raise ValueError("depth_explorer needs at least one text to offer")
    wrong = [layer for layer in off if not 0 <= layer < n_layers]
    if wrong:
        raise ValueError(f"off={list(off)}: give layers from 0 to {n_layers - 1}")
    wide = {"style": {"description_width": "60px"}, "layout": ipw.Layout(width="900px")}
    text = ipw.Combobox(value=texts[0], options=list(texts), description="text", continuous_update=False, **wide)
    buttons = [
        ipw.ToggleButton(value=layer not in off, description=str(layer), tooltip=f"layer {layer}: on or off",
                         layout=ipw.Layout(width="52px"))
        for layer in range(n_layers)
    ]  # fmt: skip
    preset = ipw.Dropdown(
        options=["choose ...", "all on", "first half off", "second half off", "every second layer off", "last quarter off"],
        description="or", style={"description_width": "30px"}, layout=ipw.Layout(width="260px"),
    )  # fmt: skip
    message, log = ipw.HTML(), ipw.Output()
    picture = ipw.Image(format="png", layout=ipw.Layout(max_width="1250px", width="100%"))
    known: dict[tuple[str, tuple[int, ...]], Any] = {}
    moving = False  # the explorer itself is switching layers

    def draw(_: Any = None) -> None:
        if moving:
            return
        layers = tuple(layer for layer, button in enumerate(buttons) if not button.value)
        for button in buttons:
            button.button_style = "info" if button.value else ""
        key = (text.value, layers)
        if key not in known:
            found, wrong = _ask(log, compute, text.value, list(layers))
            if wrong:
                message.value = wrong
                return
            known[key] = found
        loss = known[key]["loss"]
        message.value = (
            f"off: {', '.join(map(str, layers)) or 'none'} ({len(layers)} of {n_layers}). Mean loss "
            f"{loss.whole.mean():.2f} nats with all layers, {loss['without'].mean():.2f} without these."
        )
        picture.value = _png(depth_plots.layers_off(known[key]))

    def choose(_: Any) -> None:
        nonlocal moving
        half = n_layers // 2
        on = {
            "all on": lambda layer: True,
            "first half off": lambda layer: layer >= half,
            "second half off": lambda layer: layer < half,
            "every second layer off": lambda layer: layer % 2 == 0,
            "last quarter off": lambda layer: layer < n_layers - n_layers // 4,
        }.get(preset.value)
        if on is None:
            return
        moving = True
        for layer, button in enumerate(buttons):
            button.value = on(layer)
        moving = False
        draw()

    for control in (text, *buttons):
        control.observe(draw, "value")
    preset.observe(choose, "value")
    draw()
    row = ipw.Layout(flex_flow="row wrap", width="940px")
    return ipw.VBox([text, ipw.Box(buttons, layout=row), preset, message, log, picture])


def transfer_explorer(
    result: Any,
    *,
    compare: Callable[[str, str], tuple[Any, Any]],
    flips: Callable[[str, str], Any],
    task_of: Callable[[int, int], Any],
) -> ipw.VBox:
    """Choose two treatments and n: the curve, the paired differences behind one point, and the test items that flip.

    Args:
        result: a finished run of `lab.experiments.transfer`.
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
    metric = ipw.Dropdown(options=list(transfer_plots.UNITS), description="metric", **wide)
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
        picture.value = _png(transfer_plots.paired_runs(pairs, curve, n=chosen, words=words, metric=metric.value))
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
            images.value = _png(transfer_plots.flipped_digits(side, flipped, names))
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
        result: a finished run of `lab.experiments.probe_transfer`.

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
        figure = merging_plots.probe_transfer_by_depth(result, pairs=both, probe=probe.value)
        figure.axes[0].axvline(depth.value / result.parameters["n_layers"], color=plots.BLACK, lw=1.5)
        picture.value = _png(figure)
        lines = [f"<table style='{_TABLE}'><tr>"]
        head = ("measure", f"{a} to {b}", "interval", "above its best control by", "interval")
        lines += [f"<td style='{_CELL};opacity:.7'>{html.escape(name)}</td>" for name in head]
        here = rows[
            (rows.trained_on == a) & (rows.tested_on == b) & (rows.probe == probe.value) & (rows.depth == depth.value)
        ]
        for row in here[here.difference.notna()].itertuples():
            values = (row.metric, f"{row.mean:.2f}", f"{row.low:.2f} to {row.high:.2f}", f"{row.difference:+.2f}",
                      f"{row.difference_low:+.2f} to {row.difference_high:+.2f}")  # fmt: skip
            lines.append("</tr><tr>" + "".join(f"<td style='{_CELL}'>{value}</td>" for value in values))
        table.value = "".join([*lines, "</tr></table>"])

    for control in (trained, tested, probe, depth):
        control.observe(draw, "value")
    depth.value = depth.options[len(depth.options) // 2]
    draw()
    return ipw.VBox([ipw.HBox([trained, tested, probe]), depth, picture, table])


def _flipped(side: Any, flipped: Any, names: Sequence[str]) -> str:
    """Test sequences on which two nets disagree about being right, as an HTML table of up to 12, at random."""
    lines = [f"<table style='{_TABLE}'><tr>"]
    lines += [f"<td style='{_CELL};opacity:.7'>{name}</td>" for name in ("sequence", "class", *names)]
    for row in flipped.sample(min(12, len(flipped)), random_state=0).sort_values("item").to_dict("records"):
        tokens = " ".join(map(str, side.test.inputs[row["item"]]))
        cells = (tokens, *(side.classes[int(row[name])] for name in ("label", *names)))
        lines.append("</tr><tr>" + "".join(f"<td style='{_CELL}'>{html.escape(cell)}</td>" for cell in cells))
    return "".join([*lines, "</tr></table>"])


def _picture(result: Any, metric: str, depth: int) -> bytes:
    figure = plots.concept_depth(result, metric=metric)
    axes = figure.axes[0]
    axes.axvline(depth / result.parameters["n_layers"], color=plots.BLACK, lw=1.5)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def _ask(log: ipw.Output, callback: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a callback returns, and what went wrong, as text for the place where the reader looks ("" = nothing)."""
    log.clear_output()
    with log:  # shows progress; an exception that left this block would be swallowed, so it is taken out by hand
        try:
            answer = callback(*arguments)
        except Exception as error:
            return None, f"<b>{type(error).__name__}</b>: {html.escape(str(error))}"
    log.clear_output()
    return answer, ""


def _text(said: str) -> str:
    return html.escape(said).replace("\n", " ↵ ")


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
    lines.append(f"<table style='{_TABLE}'>")
    head = ("statement", "label", "log-odds of label 1", "share of splits right")
    for title, part in parts:
        lines.append(f"<tr><th colspan=4 style='{_CELL};font-weight:600'>{title}</th></tr>")
        lines.append("<tr>" + "".join(f"<td style='{_CELL};opacity:.7'>{name}</td>" for name in head) + "</tr>")
        for row in part.itertuples():
            cells = (html.escape(str(row.text)), row.label, f"{row.decision:+.1f}", f"{row.share_right:.0%}")
            lines.append("<tr>" + "".join(f"<td style='{_CELL}'>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])
