"""The figures of lesson 05: weights on few levels, blocks at few bits, and scores against chance."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from lab.figures import BLACK, BLUE, GREY, ORANGE, categories, classroom
from lab.lessons.layer_figures import SIZE, bars


def fewer(
    row: Float[torch.Tensor, " input"], low: Float[torch.Tensor, " input"], prompt: str, said: Mapping[str, str]
) -> Figure:
    """Above: a group of weights, as it is and at 3 bits. Below: how the model goes on with so many bits."""
    with classroom():
        figure, (top, below) = plt.subplots(2, figsize=(9, 5.2), layout="constrained", height_ratios=(1.3, 1))
        for level in low.unique().tolist():
            top.axhline(level, color=GREY, lw=0.7)
        top.vlines(range(len(row)), row, low, color=GREY, lw=1.2)
        top.plot(row, "o", color=BLACK, ms=5, label="as it comes")
        top.plot(low, "s", color=ORANGE, ms=5, label="3 bits")
        top.set(xlabel="one group: 64 neighbouring inputs of one row", ylabel="weight")
        figure.legend(ncols=2, loc="outside upper right", fontsize=12)
        for place, (bits, words) in enumerate(said.items()):
            words = " ".join(words.replace("\n", " ↵ ").split())
            for x, text, weight in ((0, bits, "bold"), (0.17, f"… {words}"[:74], "normal")):
                below.text(
                    x, -place, text, fontsize=12.5, weight=weight, va="center", parse_math=False, in_layout=False
                )
        below.set(xlim=(0, 1), ylim=(0.6 - len(said), 0.6))
        below.set_title(f"“{prompt} …” goes on, by the bits of all blocks", fontsize=14, loc="left")
        below.axis("off")
    return figure


def where(back: Mapping[str, torch.Tensor], alone: Mapping[str, torch.Tensor], block: int) -> Figure:
    """Left: rise of the loss with an intact state put back at some tokens. Right: with one matrix lowered alone."""
    with classroom():
        figure, (left, right) = plt.subplots(1, 2, **SIZE)
        bars(left, back)
        left.set_title(f"block {block} at 3 bits, intact state put back", fontsize=14)
        bars(right, alone)
        right.set_title(f"one matrix of block {block} at 3 bits", fontsize=14)
    return figure


def against_chance(rises: Mapping[str, float], bands: Mapping[str, Sequence[float]]) -> Figure:
    """Rise of the loss by how the blocks were chosen; random choices as dots, their middle 90 % as a band."""
    with classroom():
        figure, ax = plt.subplots(**SIZE)
        names = [*rises, *bands]
        for place, value in enumerate(rises.values()):
            ax.plot(value, place, "o", color=BLUE, ms=10)
            ax.text(value, place, f"   {value:.2f}", va="center", fontsize=12)
        for place, (values, color) in enumerate(zip(bands.values(), (GREY, ORANGE), strict=False), start=len(rises)):
            low, high = np.quantile(values, (0.05, 0.95))
            ax.barh(place, high - low, 0.7, left=low, color=color, alpha=0.2)
            ax.scatter(values, place + np.linspace(-0.25, 0.25, len(values)), color=color, s=26, lw=0)
        categories(ax, names)
        ax.set(xlabel="rise of the loss (nats); smaller is better; band: the middle 90 %", xlim=(0, None))
    return figure
