"""The figures of lesson 03: layers left out, at all tokens or at some, and in other orders."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures import BLUE, GREY, ORANGE, categories, classroom
from lab.lessons.layers import OneOut

SIZE: Any = {"figsize": (9, 4.8), "layout": "constrained"}
FAINT: Any = {"color": "k", "alpha": 0.35, "s": 14, "linewidth": 0, "zorder": 3}
DOT = "one text (some lie higher)"


def without_each(found: OneOut) -> Figure:
    """Probability of the answer without each layer; where the model says something else, what it says."""
    with classroom():
        figure, ax = plt.subplots(**SIZE)
        right = [found.answer.startswith(word) for word in found.says]
        ax.bar(range(len(right)), found.without, color=[BLUE if ok else ORANGE for ok in right])
        ax.axhline(found.whole, color="k", ls="--", label=f"all layers: {found.whole:.2f}")
        for layer, (p, word, ok) in enumerate(zip(found.without, found.says, right, strict=True)):
            if not ok:
                turned = 90 if len(word) > 2 else 0
                ax.text(layer, p + 0.01, word[:10], rotation=turned, ha="center", va="bottom", fontsize=12)
        ax.bar(0, 0, color=BLUE, label=f"still says “{found.answer}”")
        ax.bar(0, 0, color=ORANGE, label="says the word above the bar")
        ax.set(
            xlabel="the layer that is left out",
            ylabel=f"probability of “{found.answer}”",
            ylim=(0, 1),
            xlim=(-1, len(right)),
        )
        ax.set_title(f"“{found.prompt} …”", fontsize=14)
        ax.legend(loc="upper left", ncols=3, fontsize=12)
    return figure


def rise(
    rises: Float[torch.Tensor, "layer text"],
    *,
    top: float = 3.2,
    low: float = -0.6,
    by: str = "the layer that is left out",
) -> Figure:
    """Rise of the loss without each layer: each text as a dot, the mean as a line, cut off at `top`."""
    with classroom():
        figure, ax = plt.subplots(**SIZE)
        mean = rises.mean(1)
        for layer, one in enumerate(rises):
            ax.scatter(
                [layer] * len(one), one, **FAINT, label=None if layer else DOT if (mean > top).any() else DOT[:8]
            )
        ax.plot(mean.clamp(max=top), "-o", color=BLUE, markersize=5, label="mean of the texts")
        for layer in (mean > top).nonzero().flatten().tolist():
            ax.text(layer + 1.4, top + 0.1, f"layer {layer}: {mean[layer]:.1f}", va="center", fontsize=12)
        ax.axhline(0, color="k", lw=0.8)
        ax.set(xlabel=by, ylabel="rise of the loss (nats)", ylim=(low, 1.125 * top))
        ax.legend(fontsize=12)
    return figure


def who_needs_it(rises: Mapping[str, torch.Tensor], shares: Mapping[str, Mapping[int, float]], layer: int) -> Figure:
    """Left: rise of the loss where a layer is left out at some tokens only. Right: attention to the first token."""
    with classroom():
        figure, (left, right) = plt.subplots(1, 2, **SIZE, width_ratios=(1, 1.1))
        bars(left, rises)
        left.set_title(f"layer {layer} left out at ...", fontsize=14)
        looks = zip((BLUE, ORANGE), ("-o", "--s"), strict=True)
        for (name, share), (color, line) in zip(shares.items(), looks, strict=True):
            right.plot(list(share), list(share.values()), line, color=color, markersize=5, label=name)
        right.axvline(layer, color=GREY, lw=1.2, ls=":")
        right.set(xlabel="layer that attends", ylim=(0, 1), ylabel="share")
        right.set_title("attention that goes to the first token", fontsize=14)
        right.legend(loc="upper left", fontsize=12)
    return figure


def later(changes: Mapping[str, Sequence[float]]) -> Figure:
    """Change of what later layers add at later tokens, by the layer left out, for each model by its name."""
    with classroom():
        figure, ax = plt.subplots(**SIZE)
        looks = zip((BLUE, GREY), ("-o", "--D"), strict=True)
        for (name, found), (color, line) in zip(changes.items(), looks, strict=True):
            ax.plot(found, line, color=color, markersize=5, label=name)
        ax.set(xlabel="the layer that is left out at the early tokens", ylim=(0, None))
        ax.set_ylabel("change of what later layers add\nat the tokens after (1 = as large as it)")
        ax.legend(fontsize=12)
    return figure


def orders(costs: Mapping[str, Float[torch.Tensor, " text"]]) -> Figure:
    """Rise of the loss where the layers run in another order."""
    with classroom():
        figure, ax = plt.subplots(**SIZE)
        bars(ax, costs)
    return figure


def bars(ax: Axes, rises: Mapping[str, torch.Tensor]) -> None:
    """Means as bars with their numbers, each text as a dot."""
    for place, found in enumerate(rises.values()):
        mean = float(found.mean())
        ax.barh(place, mean, color=BLUE, alpha=0.8)
        ax.scatter(found, [place] * len(found), **FAINT)
        ax.text(max(float(found.max()), 0), place, f"  {round(mean, 2) + 0.0:+.2f}", va="center", fontsize=12)
    categories(ax, list(rises))
    ax.axvline(0, color="k", lw=0.8)
    every = torch.cat(list(rises.values()))
    ax.set_xlim(min(-0.3, float(every.min())), 1.25 * float(every.max()))
    ax.set(xlabel="rise of the loss (nats)")
