"""What probes read at each depth: the curves of lesson 01, and an explorer for statements of one's own.

The probe here is logistic regression, C = 0.01, on features of mean 0 and spread 1, as a participant writes it. `lab.probes`
fixes C at 1, and features of spread 0.1 make the same probe of that.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, probes
from lab.explorers import ClickablePicture, ask, button, row_of, table_of, text_of, wide
from lab.figures import BLUE, GREEN, GREY, ORANGE, RED, classroom
from lab.states import collect_states
from lab.statistics import corrected_interval

SPREAD = 0.1  # the square root of C
TEST = 0.4  # share of the statements that a probe is tested on
KINDS = {  # data set: what it asks, its highest level of difficulty here, the names of labels 0 and 1, its looks
    "sentiment_words": ("a word's feeling", 2, ("bad", "good"), ORANGE, "^"),
    "cities": ("a fact", 1, ("false", "true"), BLUE, "o"),
    "reviews": ("a review's verdict", 2, ("bad", "good"), GREEN, "s"),
}
MOST = 4  # statements in one picture
STARTS = {
    "sentiment_words": ["The film was wonderful.", "The film was not wonderful.", "The film was not terrible."],
    "cities": ["The city of Lyon is in France.", "The city of Lyon is in Peru."],
    "reviews": [
        "The first act was dull, but the rest of the play was thrilling.",
        "The first act was thrilling, but the rest of the play was dull.",
    ],
}


def easy(name: str, *, n: int = 240) -> pd.DataFrame:
    """At most n statements of a data set's easy levels, in whole groups that are drawn at random, the same ones each time."""
    table = datasets.load(name)
    table = table[table.difficulty <= KINDS[name][1]]
    names = np.random.default_rng(0).permutation(table.group.unique())
    sizes = table.group.value_counts()[names].cumsum().to_numpy()
    return table[table.group.isin(names[sizes <= n])].reset_index(drop=True)


def scaled(
    states: Float[np.ndarray, "example depth d_model"], rows: Bool[np.ndarray, " example"] | None = None
) -> Float[np.ndarray, "example depth d_model"]:
    """Features of mean 0 and of one spread, measured on some rows (None: all), so that no number outweighs the others."""
    known = states if rows is None else states[rows]
    spread = known.std(0)
    return SPREAD * (states - known.mean(0)) / np.where(spread > 0, spread, 1)


def examples() -> HTML:
    """Of each kind of statement two twins, one with either label."""
    rows = [row_of(["kind", "statement", "label"], pale=3)]
    for name, (kind, _, labels, *_) in KINDS.items():
        table = easy(name)
        twins = table[(table.group == table.group[0]) & (table.template == table.template[0])][:2]
        rows += [row_of([kind, text_of(one.text), labels[one.label]]) for one in twins.itertuples()]
    return HTML(table_of(rows))


@dataclass(frozen=True)
class Reading:
    """A data set, the states of its statements, and what probes on six splits by group say of each at each depth."""

    name: str
    table: pd.DataFrame
    states: Float[np.ndarray, "example depth d_model"]
    scores: probes.ProbeScores

    @cached_property
    def odds(self) -> Float[np.ndarray, "example depth"]:
        """Mean log-odds by probes that had not seen the statement; nan where each had."""
        times = self.scores.test.sum(0)[:, None]
        total = (self.scores.decisions * self.scores.test[:, :, None]).sum(0)
        return np.where(times > 0, total / np.maximum(times, 1), np.nan)

    @property
    def half_way(self) -> int:
        """The first depth at which accuracy is half way from its start to its peak."""
        mean = self.scores.accuracy().mean(0)
        return int((mean - mean[0] > (mean.max() - mean[0]) / 2).argmax())


def reading(model: TransformerBridge, name: str, *, splits: int = 6) -> Reading:
    """The easy statements of a data set, read at the last token, probed at every depth."""
    table = easy(name)
    states = collect_states(model, table.text.tolist())["resid"].values
    labels, groups = table.label.to_numpy(), table.group.to_numpy(str)
    tests = probes.group_splits(labels, groups, repeats=splits, test_fraction=TEST)
    scores = probes.probe_depths(scaled(states), labels, groups, splits=tests, control=False)
    return Reading(name, table, states, scores)


def believed(model: TransformerBridge, known: Reading, texts: Sequence[str]) -> Float[np.ndarray, "text depth"]:
    """Log-odds of label 1 for statements, by a probe for each depth that is fitted on the data set's.

    Groups that hold one of the statements, or its city or word, are left out: no probe has seen what it is asked.
    """
    own = collect_states(model, list(texts), progress=False)["resid"].values
    table = known.table
    kept = ~table.group.isin(_met(table, texts)).to_numpy()
    train = np.append(kept, [False] * len(texts))
    labels = np.append(table.label.to_numpy(), [0] * len(texts))  # of the texts: not looked at
    values = scaled(np.concatenate([known.states, own]), train)
    with threadpool_limits(1):  # for small fits one core is faster than two
        fits = [
            probes.fit_reference(values[:, d], labels, train, max_iter=1000, tol=1e-5) for d in range(values.shape[1])
        ]
    return np.stack(fits, 1)[-len(texts) :]


def _met(table: pd.DataFrame, texts: Sequence[str]) -> set[str]:
    """Groups of a data set that hold one of the texts, or whose name ("Accra|Dakar", "fine|poor") one of them says."""
    names = {group for group in table.group.unique() for name in group.split("|")
             if any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts)}  # fmt: skip
    return names | set(table.group[table.text.isin(texts)])


# --- figures --------------------------------------------------------------------------------------------------------


def curves(
    lines: Mapping[str, Float[np.ndarray, "split depth"]], looks: Sequence[tuple[str, str, str]], title: str,
    *, mark: int | None = None, low: float = 0.35,
) -> Figure:  # fmt: skip
    """Shares of right answers by depth: the mean over splits, and of whole lines its 95 % interval.

    looks: colour, marker and line style for each line. mark: a depth to point at. low: where the y axis begins.
    """
    with classroom():
        figure, ax = plt.subplots(figsize=(9, 5), layout="constrained")
        for (name, values), (color, marker, style) in zip(lines.items(), looks, strict=True):
            mean, lower, upper = corrected_interval(values, TEST)
            if style == "-":
                ax.fill_between(
                    range(values.shape[1]), np.clip(lower, 0, 1), np.clip(upper, 0, 1), color=color, alpha=0.12, lw=0
                )
            ax.plot(mean, style, marker=marker, color=color, label=name, markersize=5)
        ax.axhline(0.5, color="k", lw=1)
        ax.text(1.005, 0.5, "guess", transform=ax.get_yaxis_transform(), va="center", fontsize=12)
        if mark is not None:
            ax.axvline(mark, color="k", lw=1, ls=":")
        ax.set(xlabel="depth: blocks passed", ylabel="share of statements right", ylim=(low, 1.03))
        ax.set_title(title, fontsize=13)
        ax.legend(fontsize=12, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(lines) % 4 or 2)
    return figure


def three(readings: Mapping[str, Reading]) -> Figure:
    """The opening picture: one curve for each kind of statement."""
    lines = {KINDS[name][0]: known.scores.accuracy() for name, known in readings.items()}
    looks = [(KINDS[name][3], KINDS[name][4], "-") for name in readings]
    return curves(lines, looks, "What a probe reads from the last token (band: 95 % interval over six splits)")


def beliefs(
    odds: Float[np.ndarray, "text depth"], texts: Sequence[str], names: tuple[str, str], *, probability: bool = False,
    mark: int | None = None,
) -> Figure:  # fmt: skip
    """What probes say of statements at each depth, one line for each; names: of labels 0 and 1; mark: a depth."""
    shown, middle = (1 / (1 + np.exp(-odds)), 0.5) if probability else (odds, 0.0)
    with classroom():
        figure, ax = plt.subplots(figsize=(9, 4.4), layout="constrained")
        for line, text, color, marker in zip(shown, texts, (BLUE, ORANGE, GREEN, RED), "o^sD", strict=False):
            ax.plot(line, marker=marker, color=color, label=text if len(text) <= 90 else f"{text[:88]} …", markersize=5)
        ax.axhline(middle, color=GREY, lw=1.5)
        if mark is not None:
            ax.axvline(mark, color="k", lw=1, ls=":")
        low, high = names
        if probability:
            ax.set(ylim=(-0.03, 1.03), ylabel=f"probability that it is {high}")
        else:
            most = max(1.0, 1.1 * float(np.abs(shown).max()))
            ax.set(ylim=(-most, most), ylabel=f"log-odds  (below 0: {low}, above: {high})")
        ax.set(xlabel="depth: blocks passed")
        ax.legend(fontsize=12, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure


# --- the explorer ---------------------------------------------------------------------------------------------------


def surest(known: Reading, depth: int, *, right: bool, k: int = 5) -> pd.DataFrame:
    """Statements that the probe of a depth is right or wrong about, the surest first. Only probes that had not seen them."""
    rows = known.table[["text", "label", "group"]].assign(odds=known.odds[:, depth]).dropna()
    rows = rows[((rows.odds > 0) == (rows.label == 1)) == right]
    return rows.sort_values("odds", key=np.abs, ascending=False, kind="stable").head(k)


class Read(ipw.VBox):
    """Type statements and see at which depth a probe believes what; browse those that it is sure of and wrong."""

    def __init__(self, model: TransformerBridge, readings: Mapping[str, Reading]) -> None:
        self.model, self.readings = model, dict(readings)
        kinds = [(KINDS[name][0], name) for name in readings or KINDS]
        self.kind = ipw.Dropdown(options=kinds, description="probe for", **wide(300, 80))
        if "cities" in readings or not readings:
            self.kind.value = "cities"
        self.measure = ipw.Dropdown(options=["log-odds", "probability"], description="show", **wide(220, 50))
        self.texts = ipw.Textarea(
            "\n".join(STARTS[self.kind.value]), rows=MOST, description="statements", **wide(640, 80)
        )
        self.go, self.trouble = button("Read"), ipw.Output()
        self.picture = ClickablePicture(
            880, "What the probe of each depth says of your statements", "click a depth to read what its probe is sure of",
            lambda x, _: setattr(self.depth, "value", round(x)), lambda: (self.depth.value, 0),
        )  # fmt: skip
        self.said, self.table = ipw.HTML(), ipw.HTML()
        n = model.cfg.n_layers
        self.depth = ipw.IntSlider(2 * (n + 1) // 3, 0, n, description="depth", **wide(420, 50))
        self.side = ipw.Dropdown(options=["sure and wrong", "sure and right"], **wide(180, 0))
        self.pick = ipw.Dropdown(description="look at", **wide(640, 80))
        self.odds: Float[np.ndarray, "text depth"] | None = None
        self.asked: list[str] = []
        self.go.on_click(lambda _: self.read())
        self.measure.observe(lambda _: self.draw(), "value")
        self.kind.observe(lambda _: self.changed(), "value")
        for control in (self.depth, self.side):
            control.observe(lambda _: self.browse(), "value")
        self.depth.observe(lambda _: self.draw(), "value")
        self.pick.observe(lambda _: self.picked(), "value")
        hint = ipw.HTML("One statement on each line, four at most, in the style of the data: with a full stop.")
        rows = [ipw.HBox([self.kind, self.measure, self.go]), self.texts, hint]
        more = [ipw.HBox([self.depth, self.side]), self.table, self.pick]
        super().__init__([*rows, self.trouble, self.said, self.picture, *more])
        self.read()
        self.browse()

    @property
    def known(self) -> Reading:
        """The data set that is chosen, read and probed now if nobody has."""
        name = self.kind.value
        if name not in self.readings:
            self.readings[name] = reading(self.model, name)
        return self.readings[name]

    def read(self) -> None:
        """Run the model on the statements, and ask a probe of each depth."""
        self.asked = [line.strip() for line in self.texts.value.splitlines() if line.strip()]
        self.odds, self.said.value = ask(self.trouble, self._odds, self.asked)
        self.draw()

    def _odds(self, texts: list[str]) -> Float[np.ndarray, "text depth"]:
        if not 1 <= len(texts) <= MOST:
            raise ValueError(f"you gave {len(texts)} statements; the picture holds 1 to {MOST}")
        return believed(self.model, self.known, texts)

    def changed(self) -> None:
        """Another data set: its probes, its statements."""
        found, self.said.value = ask(self.trouble, lambda: self.known)
        if found is None:
            return
        self.texts.value = "\n".join(STARTS[self.kind.value])
        self.browse()
        self.read()

    def draw(self) -> None:
        """The picture of what was read last."""
        if self.odds is None:
            return
        names = KINDS[self.kind.value][2]
        probability = self.measure.value == "probability"
        self.picture.show(beliefs(self.odds, self.asked, names, probability=probability, mark=self.depth.value))

    def browse(self) -> None:
        """The statements of the data that the probe at this depth is surest of."""
        rows = surest(self.known, self.depth.value, right=self.side.value == "sure and right")
        names = KINDS[self.kind.value][2]
        lines = [row_of(["statement", "it is", "log-odds", "so the probe says"], pale=4)]
        for row in rows.itertuples():
            lines.append(
                row_of([text_of(str(row.text)), names[row.label], f"{row.odds:+.1f}", names[int(row.odds > 0)]])
            )
        self.table.value = table_of(lines)
        self.pick.options = [("choose one to draw it with its twins", None), *((text, text) for text in rows.text)]
        self.pick.index = 0

    def picked(self) -> None:
        """A statement of the data with the others of its group, drawn."""
        if self.pick.value is None:
            return
        table = self.known.table
        group = table.group[table.text == self.pick.value].iloc[0]
        twins = [text for text in table.text[table.group == group] if text != self.pick.value]
        self.texts.value = "\n".join([self.pick.value, *twins][:MOST])
        self.read()


def read(model: TransformerBridge, readings: Mapping[str, Reading]) -> Read:
    """The explorer for statements of one's own. Without readings it offers every kind, and reads each when it is chosen."""
    return Read(model, readings)
