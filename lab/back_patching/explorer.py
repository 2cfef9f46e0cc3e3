"""Explorer for notebooks: tables in, controls and pictures out."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ipywidgets as ipw
import pandas as pd

from lab.back_patching import figures
from lab.explorers import ClickablePicture, ask, button, image, png, row_of, shown, table_of, text_of, wide


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
        sweep: `sweep(prompt, e1, names, position) -> table` (`lab.back_patching.sweep`); asked on the button and
            remembered. `names` are the answer and its aliases, `position` is t1 or t2. What the model says without a
            patch may come in the table's `attrs["plain"]`.
        generate: `generate(prompt, e1, position, source_layer, target_layer) -> str`: the whole text after one patch.
            Asked for each pair that is looked at; without it the text is as far as `sweep` decoded it.
        lens: `lens(prompt, e1, e2_names, e3_names) -> table` for `figures.lens_strip`, asked with `sweep`.
        swept: tables that are there already, by (prompt, position) of offered queries; the first of them is shown.
    """
    absent = [name for name in ("example", "text", "e1", "e2", "e3", "set") if name not in queries]
    if absent:
        raise ValueError(f"queries has no column {', '.join(absent)}: give a table of two-hop queries with their sets")
    explorer = _Explorer(queries.to_dict("records"), sweep, generate, lens)
    explorer.open(swept or {})
    return explorer.box


class _Query(NamedTuple):
    """What is asked; `plain` is said without a patch (None: not known)."""

    prompt: str
    e1: str
    bridge: list[str]
    names: list[str]
    plain: Any


class _Explorer:
    """Controls, what they show, and what was asked so far."""

    def __init__(self, rows: list[dict], sweep: Any, generate: Any, lens: Any) -> None:
        self.rows, self.sweep, self.generate, self.lens = rows, sweep, generate, lens
        self.tables: dict[tuple, Any] = {}  # of `sweep`
        self.strips: dict[tuple, Any] = {}  # of `lens`
        self.texts: dict[tuple, str] = {}  # of `generate`
        self.moving = False  # the explorer itself is moving its sliders
        look = wide(720, 90)
        offered = [(f"{row['set']}: {row['text']} ... {row['e3']}", i) for i, row in enumerate(rows)]
        self.query = ipw.Dropdown(options=[*offered, ("a query of your own", -1)], description="query", **look)
        hints = {"your query": "The capital of the country of Mumbai is", "e1": "Mumbai",
                 "bridge e2": "India (only for the lens; may stay empty)",
                 "answer e3": "New Delhi, Delhi (any of these names counts)"}  # fmt: skip
        self.fields = {name: ipw.Text(description=name, placeholder=hint, **look) for name, hint in hints.items()}
        self.own = ipw.VBox([field for name, field in self.fields.items() if lens or name != "bridge e2"])
        places = [("t1: last token of e1", "t1"), ("t2: last token of the query", "t2")]
        self.position = ipw.RadioButtons(options=places, description="patched at", style=look["style"])
        self.source = ipw.IntSlider(min=1, max=1, description="source layer", continuous_update=False, **look)
        self.target = ipw.IntSlider(min=0, max=0, description="target layer", continuous_update=False, **look)
        self.button, self.strip = button("Run"), image(900)
        self.picture = ClickablePicture(
            700, "The answer's rank after each pair of layers", "click a pair to read what the model says after it",
            self.choose, lambda: (self.target.value, self.source.value),
        )  # fmt: skip
        self.message, self.said, self.log = ipw.HTML(), ipw.HTML(), ipw.Output()
        for control in (self.query, *self.fields.values(), self.position):
            control.observe(self.show, "value")
        for slider in (self.source, self.target):
            slider.observe(self.turn, "value")
        self.button.on_click(self.run)
        found = ipw.VBox([self.source, self.target, self.picture, self.said, self.strip])
        self.box = ipw.VBox([self.query, self.own, self.position, self.button, self.message, self.log, found])

    def open(self, swept: Mapping[tuple[str, str], Any]) -> None:
        """Shows the first query, or the first of those that were swept already."""
        for i, row in reversed(list(enumerate(self.rows))):
            for at in ("t2", "t1"):
                if (row["text"], at) in swept:
                    self.query.value, self.position.value = i, at
                    self.tables[self.keys()[0]] = swept[row["text"], at]
        self.show()

    def chosen(self) -> _Query:
        if self.query.value < 0:
            prompt, e1, *lists = (field.value.strip() for field in self.fields.values())
            bridge, names = ([name.strip() for name in text.split(",") if name.strip()] for text in lists)
            return _Query(prompt, e1, bridge, names, None)
        row = self.rows[self.query.value]
        bridge, names = (list(dict.fromkeys([row[e], *row.get(f"{e}_aliases", ())])) for e in ("e2", "e3"))
        return _Query(row["text"], row["e1"], bridge, names, row.get("plain"))

    def keys(self) -> tuple[tuple, tuple]:
        """Under which the table of a sweep and that of a lens are remembered."""
        prompt, e1, bridge, names, _ = self.chosen()
        return (prompt, e1, tuple(names), self.position.value), (prompt, e1, tuple(bridge), tuple(names))

    def known(self) -> tuple[Any, Any]:
        sweep_key, lens_key = self.keys()
        return self.tables.get(sweep_key), self.strips.get(lens_key)

    def place(self, source_layer: int, target_layer: int, n_layers: int) -> None:
        self.moving = True
        self.source.max, self.source.value = n_layers - 1, source_layer
        self.target.max, self.target.value = source_layer - 1, target_layer
        self.moving = False

    def show(self, _: Any = None) -> None:
        table, lines = self.known()
        shown(self.query.value < 0, self.own)
        shown(table is None or (self.lens is not None and lines is None and bool(self.chosen().bridge)), self.button)
        shown(table is not None, self.picture, self.said)
        shown(lines is not None, self.strip)
        self.source.disabled = self.target.disabled = table is None
        if table is None:
            self.message.value = "Not run yet: the button tries all pairs of layers (seconds with a small model)."
            return
        best = table.sort_values(["right", "rank"], ascending=[False, True], kind="stable").iloc[0]
        self.place(int(best.source_layer), int(best.target_layer), 1 + int(table.source_layer.max()))
        if lines is not None:
            self.strip.value = png(figures.lens_strip(lines, n_layers=self.source.max + 1))
        self.draw()

    def turn(self, _: Any) -> None:
        if not self.moving:
            source = self.source.value
            self.place(source, min(self.target.value, source - 1), self.source.max + 1)
            self.draw()

    def choose(self, x: float, y: float) -> None:
        source = min(max(round(y), 1), self.source.max)
        self.place(source, min(max(round(x), 0), source - 1), self.source.max + 1)
        self.draw()

    def draw(self) -> None:
        asked, key, at = self.chosen(), self.keys()[0], self.position.value
        table, pair = self.tables[key], (self.source.value, self.target.value)
        self.picture.show(figures.success_map(table, n_layers=self.source.max + 1, chosen=pair))
        row = table[(table.source_layer == pair[0]) & (table.target_layer == pair[1])].iloc[0]
        self.message.value = ""
        if self.generate is not None and (*key, *pair) not in self.texts:
            new, self.message.value = ask(self.log, self.generate, asked.prompt, asked.e1, at, *pair)
            if new is not None:
                self.texts[*key, *pair] = new
        plain = table.attrs.get("plain", asked.plain)
        unread = pd.isna(row["rank"])
        lines = {
            "without a patch": plain if isinstance(plain, str) else "(not known)",
            f"state after layer {pair[0]} put after layer {pair[1]} at {at}":
                self.texts.get((*key, *pair), f"{row.said} [...]"),
            "rank of the answer's first token there": "not readable: this token says nothing of the answer" if unread
                else f"{row['rank'] + 1:,} (1 = it is said next)",
            "counts as right": "yes" if row.right else "no",
        }  # fmt: skip
        found = table_of(row_of([name, text_of(line)], pale=1) for name, line in lines.items())
        self.said.value = f"<p>{text_of(asked.prompt)} ...</p>{found}"

    def run(self, _: Any) -> None:
        prompt, e1, bridge, names, _ = self.chosen()
        if missing := [name for name, it in (("query", prompt), ("e1", e1), ("answer e3", names)) if not it]:
            self.message.value = f"Fill in first: {', '.join(missing)}."
            return
        (sweep_key, lens_key), (table, lines), wrong = self.keys(), self.known(), ""
        self.button.disabled = True
        if table is None:
            table, wrong = ask(self.log, self.sweep, prompt, e1, names, self.position.value)
        if self.lens is not None and bridge and lines is None and not wrong:
            lines, wrong = ask(self.log, self.lens, prompt, e1, bridge, names)
        self.button.disabled = False
        self.tables.update({} if table is None else {sweep_key: table})
        self.strips.update({} if lines is None else {lens_key: lines})
        self.show()
        self.message.value = wrong or self.message.value
