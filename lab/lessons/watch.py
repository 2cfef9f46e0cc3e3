"""What a model would say at each depth and position: the lens map, and an explorer for sentences of one's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from transformer_lens.model_bridge import TransformerBridge

from lab import lenses
from lab.explorers import ClickablePicture, ask, beside, button, row_of, table_of, text_of, wide
from lab.figures import BLUE, GREY, RED, classroom
from lab.runs import clean_run
from lab.texts import tokenize


@dataclass(frozen=True)
class LensMap:
    """What the lens reads in one text. `probabilities` are those of the whole vocabulary at each place."""

    text: str
    tokens: list[str]
    probabilities: Float[torch.Tensor, "depth position d_vocab"]
    vocabulary: list[str]
    words: torch.Tensor  # which tokens are whole words

    def best(self, *, words: bool = False, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and ids of the k likeliest tokens (or whole words) at each place, the likeliest first."""
        found = (self.probabilities * self.words if words else self.probabilities).topk(k, -1)
        return found.values, found.indices


def lens_map(model: TransformerBridge, text: str) -> LensMap:
    """Read every state of a text with the logit lens, `lab.lenses.readout`."""
    run = clean_run(model, tokenize(model, [text]).ids[0])
    probabilities = lenses.readout(model, run.states, kind="probs").float().cpu()
    vocabulary = _vocabulary(model.tokenizer, probabilities.shape[-1])
    words = torch.tensor([one[:1] == " " and one[1:].isalpha() and len(one) > 4 for one in vocabulary])
    return LensMap(text, [vocabulary[i] for i in run.ids], probabilities, vocabulary, words)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any, n: int) -> list[str]:
    return tokenizer.batch_decode([[i] for i in range(n)])


def _short(token: str) -> str:
    return token.strip().replace("\n", "↵")[:12] or "␣"


def picture(found: LensMap, *, words: bool = False, marked: tuple[int, int] | None = None) -> Figure:
    """The likeliest next word in each cell: blocks upwards, tokens to the right, its probability as colour.

    words: whole words of four letters or more only. marked: (depth, position) to frame.
    """
    best, ids = (one[..., 0] for one in found.best(words=words))
    depths, positions = best.shape
    with classroom():
        figure, ax = plt.subplots(figsize=(9, 8), layout="constrained")
        mesh = ax.pcolormesh(best, cmap="Blues", vmin=0, vmax=1, edgecolors="w", linewidth=0.6)
        size = 9.5 if positions <= 8 else 8 if positions <= 11 else 6.5
        for depth in range(depths):
            for at in range(positions):
                color = "w" if best[depth, at] > 0.55 else "k"
                word = _short(found.vocabulary[ids[depth, at]])
                ax.text(at + 0.5, depth + 0.46, word, ha="center", va="center", fontsize=size, color=color)
        ax.set_xticks([i + 0.5 for i in range(positions)], [_short(one) for one in found.tokens])
        ax.set_yticks([i + 0.5 for i in range(0, depths, 2)], [str(i) for i in range(0, depths, 2)])
        ax.set(xlabel="the model has read up to here", ylabel="depth: blocks passed")
        if marked is not None:
            ax.add_patch(plt.Rectangle((marked[1], marked[0]), 1, 1, fill=False, color=RED, lw=2.5))
        figure.colorbar(mesh, label="probability of the word shown", shrink=0.5, pad=0.01)
    return figure


def late(ranks: Mapping[str, Float[torch.Tensor, "depth position"]]) -> Figure:
    """Rank of the final word by depth, for each model by its name: median over positions, and the middle half."""
    looks = zip((BLUE, GREY, RED), "oDs", strict=True)
    with classroom():
        figure, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
        for (name, found), (color, marker) in zip(ranks.items(), looks, strict=False):
            low, middle, high = found.float().quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1)
            ax.fill_between(range(len(middle)), low, high, color=color, alpha=0.2, lw=0)
            ax.plot(middle, marker=marker, color=color, label=name, markersize=5)
        ax.set(yscale="log", xlabel="depth: blocks passed", ylabel="rank of the final word (1 = on top)")
        ax.set_title("How early is the final word near the top? (median and middle half)", fontsize=13)
        ax.set_yticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
        ax.invert_yaxis()
        ax.legend()
    return figure


class Watch(ipw.VBox):
    """Type a sentence, see its map, click a cell and read the five likeliest words there."""

    def __init__(self, model: TransformerBridge, text: str) -> None:
        self.model = model
        self.text = ipw.Text(text, description="sentence", continuous_update=False, **wide(560, 70))
        self.words = ipw.Checkbox(True, description="whole words only", indent=False)
        self.token = ipw.Dropdown(description="token", **wide(260, 50))
        self.depth = ipw.IntSlider(model.cfg.n_layers, 0, model.cfg.n_layers, description="depth", **wide(420, 50))
        self.go, self.trouble = button("Show"), ipw.Output()
        self.picture = ClickablePicture(
            900, "The likeliest next word at each depth and token", "click a cell to read its five likeliest words",
            self.choose, lambda: (self.token.value, self.depth.value),
        )  # fmt: skip
        self.five, self.said = ipw.HTML(), ipw.HTML()
        self.found: LensMap | None = None
        self.go.on_click(lambda _: self.read())
        self.text.observe(lambda _: self.read(), "value")
        for control in (self.words, self.token, self.depth):
            control.observe(lambda _: self.draw(), "value")
        rows = [ipw.HBox([self.text, self.go, self.words]), ipw.HBox([self.token, self.depth])]
        super().__init__([*rows, self.trouble, self.said, beside(self.picture, self.five)])
        self.read()

    def read(self) -> None:
        """Run the model on the sentence."""
        found, self.said.value = ask(self.trouble, self._map, self.text.value)
        if found is None:
            return
        self.found = None  # the controls change together, and draw once
        self.token.options = [(f"{i}: {_short(one)}", i) for i, one in enumerate(found.tokens)]
        self.token.value = len(found.tokens) - 1
        self.found = found
        self.draw()

    def _map(self, text: str) -> LensMap:
        found = lens_map(self.model, text)
        if len(found.tokens) > 16:
            raise ValueError(f"this sentence has {len(found.tokens)} tokens; the map is legible up to 16. Shorten it.")
        return found

    def choose(self, x: float, y: float) -> None:
        """The cell at a place of the map."""
        if found := self.found:
            self.found = None
            self.token.value, self.depth.value = min(max(int(x), 0), len(found.tokens) - 1), int(y)
            self.found = found
            self.draw()

    def draw(self) -> None:
        """The map with the chosen cell framed, and what it holds."""
        if self.found is None or self.token.value is None:
            return
        at, depth = self.token.value, self.depth.value
        p, ids = (one[depth, at].tolist() for one in self.found.best(words=self.words.value, k=5))
        read = text_of("".join(self.found.tokens[: at + 1]))
        rows = [
            row_of([text_of(self.found.vocabulary[i].strip() or "␣"), f"{q:.3f}" if q >= 0.001 else "below 0.001"])
            for i, q in zip(ids, p, strict=True)
        ]
        self.five.value = f"After “{read}”, {depth} blocks passed, the lens reads:{table_of(rows)}"
        self.picture.show(picture(self.found, words=self.words.value, marked=(depth, at)))


def watch(model: TransformerBridge, text: str = "He poured himself a glass of") -> Watch:
    """The explorer for sentences of one's own."""
    return Watch(model, text)
