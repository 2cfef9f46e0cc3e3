"""Layers carried over from one net to another: the lesson's figures, and an explorer for halves of one's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from lab.explorers import ClickablePicture, ask, button, grown, wide
from lab.figures import BLACK, BLUE, GREY, ORANGE, RED, categories, classroom, stack
from lab.lessons import nets
from lab.transfer import statistics, tasks
from lab.transfer.tasks import Task

LOOKS = {  # treatment: words, colour, marker, how far its dots stand aside
    "BnB": ("layers of B's own net (BnB)", BLUE, "o", -0.12),
    "AnB": ("layers of A's net (AnB)", ORANGE, "s", 0.0),
    "random": ("random layers", GREY, "D", 0.12),
}
Found = Mapping[tuple[str, int], Float[np.ndarray, " net"]]


def digits(task: Task) -> Figure:
    """Three training images of each digit, A at the left and B at the right, as the nets see them."""
    with classroom():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
        for ax, (name, side) in zip(axes, task.sides.items(), strict=True):
            shown = [np.flatnonzero(side.train.labels == c)[:3] for c in range(len(side.classes))]
            columns = [np.concatenate([_framed(side.train.inputs[i]) for i in one]) for one in shown]
            ax.imshow(np.concatenate(columns, 1), cmap="gray_r")
            ax.set_xticks([10 * c + 4.5 for c in range(len(columns))], side.classes)
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            ax.set(title=f"task {name}: three images of each digit", xlabel="the digit")
    return figure


def _framed(patches: Float[np.ndarray, "16 4"]) -> Float[np.ndarray, "10 10"]:
    """An image with an empty frame."""
    return np.pad(patches.reshape(4, 4, 2, 2).transpose(0, 2, 1, 3).reshape(8, 8), 1, constant_values=np.nan)


def lines(found: Found, names: Sequence[str] = ("BnB", "AnB")) -> Figure:
    """Share right on B over n: the mean as a line, and each split as a dot."""
    with classroom():
        figure, ax = plt.subplots(figsize=(9, 4.8), layout="constrained")
        ax.axhline(found["base", 0].mean(), color=BLACK, ls=":", lw=1.6, label="nothing copied (base)")
        for name in names:
            words, color, marker, aside = LOOKS[name]
            ns = sorted(n for one, n in found if one == name)
            for n in ns:
                values = found[name, n]
                ax.scatter(np.full(len(values), n + aside), values, s=14, color=color, alpha=0.4, lw=0)
            ax.plot(ns, [found[name, n].mean() for n in ns], marker=marker, color=color, label=words)
        ax.axhline(0.2, color=BLACK, lw=1)
        ax.text(1, 0.21, "chance", fontsize=12)
        ax.set(xlabel=f"n: first layers copied and frozen, of {nets.LAYERS}", ylabel="share of B's test images right")
        ax.set(xticks=range(1, nets.LAYERS), ylim=(0.15, 1), title="a dot: one of the splits; lines: means")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 0.1), fontsize=12)
    return figure


def published(gaps: Sequence[tuple[float, float]]) -> Figure:
    """BnB - AnB in points by the share of layers copied: (mean, reach) of ours for n = 1, 2, ..., and Yosinski et al.'s."""
    theirs = statistics.curves(statistics.published(), {"specificity": ("BnB", "AnB")})
    ours = [(n / nets.LAYERS, mean, reach) for n, (mean, reach) in enumerate(gaps, start=1)]
    with classroom():
        figure, ax = plt.subplots(figsize=(9, 4.4), layout="constrained")
        for rows, look, words in (
            (ours, (BLUE, "o"), f"ours: digits, {nets.LAYERS} layers"),
            ([(r.n / 8, 100 * r.estimate, 100 * (r.high - r.estimate)) for r in theirs.itertuples()],
             (RED, "s"), "Yosinski et al.: ImageNet, 8 layers"),
        ):  # fmt: skip
            x, mean, reach = zip(*rows, strict=True)
            ax.errorbar(x, mean, reach, color=look[0], marker=look[1], capsize=3, label=words)
        _level(ax)
        ax.set(xlabel="share of the layers copied", ylabel="BnB - AnB (points)", title="means and 95 % intervals")
        ax.legend(fontsize=12)
    return figure


def grafts(losses: Mapping[str, Mapping[int, float]], *, clean: float, guess: float) -> Figure:
    """A language model's loss with another stream put in at a depth; `clean`: with its own, `guess`: of a blind guess."""
    looks = zip((BLUE, GREY), "oD", strict=True)
    with classroom():
        figure, ax = plt.subplots(figsize=(9, 4.4), layout="constrained")
        for (words, found), (color, marker) in zip(losses.items(), looks, strict=True):
            ax.plot(list(found), list(found.values()), color=color, marker=marker, label=words)
        ax.axhline(guess, color=BLACK, ls="--", lw=1.6, label="a blind guess")
        ax.axhline(clean, color=BLACK, ls=":", lw=1.6, label="nothing put in")
        ax.set(xlabel="depth at which the donor's stream is put in", ylabel="loss (nats)", ylim=(0, None))
        ax.set_xticks(list(found))
        figure.legend(loc="outside lower center", ncol=2, fontsize=12)
    return figure


def early_late(differences: Mapping[str, Float[np.ndarray, " net"]]) -> Figure:
    """Early minus late layers moved, in points, for each kind of new task: each split, the mean and its interval."""
    with classroom():
        figure, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
        for place, values in enumerate(differences.values()):
            mean, reach = _interval(100 * values)
            ax.scatter(100 * values, np.full(len(values), place + 0.22), s=18, color=GREY, alpha=0.6, lw=0)
            ax.errorbar(mean, place, xerr=reach, color=BLUE, marker="o", ms=9, capsize=4)
        ax.axvline(0, color=BLACK, lw=1)
        categories(ax, list(differences))
        ax.set(
            xlabel="late layers better  ←  points  →  early layers better",
            title="grey: each split; blue: the mean and its 95 % interval",
        )
    return figure


def _interval(values: Float[np.ndarray, " net"]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1)) * error


def _level(ax: Axes) -> None:
    ax.axhline(0, color=BLACK, lw=1)
    ax.grid(alpha=0.25)


class Carry(ipw.VBox):
    """Choose which five digits are B, and n: nets are trained while you wait, and B's layers, A's and random ones compared."""

    def __init__(self, nets_each: int = 8) -> None:
        self.nets_each = nets_each
        self.digits = [
            ipw.ToggleButton(d > 4, description=str(d), layout=ipw.Layout(width=grown(44))) for d in range(10)
        ]
        self.n = ipw.IntSlider(3, 1, nets.LAYERS - 1, description="n", continuous_update=False, **wide(300, 20))
        self.go, self.trouble, self.said = button("Train"), ipw.Output(), ipw.HTML()
        self.picture = ClickablePicture(
            900, "Each net's share right on B, by whose layers it has", "click a layer to copy those up to it",
            lambda x, _: setattr(self.n, "value", 1 + int(x)), lambda: (self.n.value - 1, 0),
        )  # fmt: skip
        self.bases: dict[tuple[int, ...], Any] = {}
        self.go.on_click(lambda _: self.train())
        self.n.observe(lambda _: self.train(), "value")
        row = ipw.HBox([ipw.HTML("task B:"), *self.digits])
        super().__init__([row, ipw.HBox([self.n, self.go]), self.trouble, self.said, self.picture])
        self.train()

    def train(self) -> None:
        """Train, and draw what came out."""
        chosen = tuple(d for d, one in enumerate(self.digits) if one.value)
        found, self.said.value = ask(self.trouble, self._compared, chosen, self.n.value)
        if found is None:
            return
        parts = []
        for first, second in (("BnB", "AnB"), ("AnB", "random")):
            mean, reach = _interval(100 * (found[first] - found[second]))
            parts.append(
                f"{first} - {second}: <b>{mean:+.1f}</b> points, 95 % interval {mean - reach:+.1f} to {mean + reach:+.1f}"
            )
        self.said.value = "<br>".join(parts)
        self.picture.show(_dots(found, chosen, self.n.value))

    def _compared(self, chosen: tuple[int, ...], n: int) -> dict[str, Float[np.ndarray, " net"]]:
        if len(chosen) != nets.CLASSES:
            raise ValueError(f"choose five digits for B, the other five are A; you have chosen {len(chosen)}")
        if chosen not in self.bases:
            self.bases[chosen] = self._trained(chosen)
        b, sources = self.bases[chosen]
        top = nets.fresh(3, self.nets_each)
        joined = {name: [*source[:n], *top[n:]] for name, source in sources.items()}
        found = {name: nets.right(nets.train(net, b.x, b.y, n), b) for name, net in joined.items()}
        return found | {"base": nets.right(sources["BnB"], b)}

    def _trained(self, chosen: tuple[int, ...]) -> tuple[nets.Half, dict[str, Any]]:
        rest = [d for d in range(10) if d not in chosen]
        made = [
            tasks.make("D", halves=(rest, chosen), seed=seed, train_per_class=30, noise=0.7)
            for seed in range(self.nets_each)
        ]
        a, b = nets.halves(made)
        bases = [nets.train(nets.fresh(seed, self.nets_each), one.x, one.y) for seed, one in ((1, a), (2, b))]
        return b, {"BnB": bases[1], "AnB": bases[0], "random": nets.fresh(4, self.nets_each)}


def _dots(found: Mapping[str, Float[np.ndarray, " net"]], chosen: Sequence[int], n: int) -> Figure:
    """Each net's share right, by whose layers it has."""
    with classroom():
        figure, (top, ax) = plt.subplots(2, figsize=(9, 4.7), layout="constrained", height_ratios=(0.13, 1))
        said = f"B is {', '.join(map(str, chosen))}; blue: layers copied and frozen (click another)"
        stack(top, [(str(layer), layer < n) for layer in range(nets.LAYERS)], said)
        for place, (name, (_, color, marker, _)) in enumerate(LOOKS.items()):
            values = found[name]
            ax.scatter(values, place + np.linspace(-0.2, 0.2, len(values)), color=color, marker=marker, alpha=0.6)
            ax.plot([values.mean()] * 2, [place - 0.35, place + 0.35], color=color)
        ax.axvline(found["base"].mean(), color=BLACK, ls=":", label="B's own net, uncut")
        categories(ax, [words for words, *_ in LOOKS.values()])
        ax.set(xlim=(0.2, 1), xlabel="share of B's test images right")
        figure.legend(loc="outside lower center", fontsize=12)
    return figure


def carry() -> Carry:
    """The explorer for halves of one's own."""
    return Carry()
