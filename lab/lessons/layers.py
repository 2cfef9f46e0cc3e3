"""Layers left out, swapped or run twice: the figures of lesson 03, and an explorer to click layers off."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformer_lens.model_bridge import TransformerBridge

from lab import require
from lab.explorers import ask, button, image, png, text_of, wide
from lab.figures import BLUE, GREEN, GREY, ORANGE, categories, classroom
from lab.interventions import rewritten, skip
from lab.texts import first_tokens, tokenize

PROMPT, ANSWER = "The capital of the country of Spain is", "Madrid"
SIZE: Any = {"figsize": (9, 4.8), "layout": "constrained"}
FAINT: Any = {"color": "k", "alpha": 0.35, "s": 14, "linewidth": 0, "zorder": 3}


# --- a model with its layers changed --------------------------------------------------------------------------------


@contextmanager
def changed(
    model: TransformerBridge,
    *,
    off: Sequence[int] = (),
    swapped: tuple[int, int] | None = None,
    twice: int | None = None,
    first: int = 0,
) -> Iterator[None]:
    """Inside: some layers off, two in each other's place, one run twice. A layer that is off is off wherever it stands.

    first: the token from which on layers are off; 1 spares the first token.
    """
    last = model.cfg.n_layers - 1
    off = require.wholes("off", off, 0, last, least=0)
    order = list(range(last + 1))
    if swapped is not None:
        i, j = require.wholes("swapped", swapped, 0, last, least=2)
        order[i], order[j] = j, i
    times = [1 + (layer == twice and layer not in off) for layer in order]
    programs = {
        place: partial(_run, own=layer, times=n)
        for place, (layer, n) in enumerate(zip(order, times, strict=True))
        if layer != place or n > 1
    }
    with ExitStack() as stack:
        if programs:
            stack.enter_context(rewritten(model, programs))
        for layer in off:
            stack.enter_context(skip(model, order.index(layer), first=first))
        yield


def _run(x: torch.Tensor, step: Any, *, own: int, times: int) -> torch.Tensor:
    for _ in range(times):
        x = step(x, layer=own)
    return x


def next_word(model: TransformerBridge, prompt: str) -> Float[torch.Tensor, " d_vocab"]:
    """Probabilities of what comes after a prompt."""
    with torch.no_grad():
        ids = tokenize(model, [prompt]).ids.to(model.cfg.device)
        return model(ids, use_cache=False, logits_to_keep=1)[0, -1].softmax(-1).float().cpu()


def losses(model: TransformerBridge, ids: Int[torch.Tensor, "text position"]) -> Float[torch.Tensor, "text position-1"]:
    """How surprised the model is by each token but the first, in nats."""
    with torch.no_grad():
        logits = model(ids.to(model.cfg.device), use_cache=False).float().cpu()
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@dataclass(frozen=True)
class OneOut:
    """The next word of a prompt, with all layers and without each in turn."""

    prompt: str
    answer: str
    whole: float  # probability of the answer with all layers
    without: list[float]  # without layer 0, 1, ...
    says: list[str]  # the likeliest next token then


def one_out(model: TransformerBridge, prompt: str = PROMPT, answer: str = ANSWER) -> OneOut:
    """Leave out one layer at a time, at every token, with `lab.interventions.skip`."""
    wanted = _first_token(model, prompt, answer)
    without, says = [], []
    for layer in range(model.cfg.n_layers):
        with skip(model, layer):
            p = next_word(model, prompt)
        without.append(float(p[wanted]))
        says.append(model.tokenizer.decode(int(p.argmax())).strip().replace("\n", "↵") or "␣")
    return OneOut(prompt, answer, float(next_word(model, prompt)[wanted]), without, says)


def _first_token(model: TransformerBridge, prompt: str, answer: str) -> int:
    found = first_tokens(model, prompt, [answer])
    if not found:
        raise ValueError(f"the answer {answer!r} has no token of its own behind this prompt; give another word")
    return found[0]


# --- figures --------------------------------------------------------------------------------------------------------


def without_each(found: OneOut) -> Figure:
    """Probability of the answer without each layer; where the model says something else, what it says."""
    with classroom():
        figure, ax = plt.subplots(**SIZE)
        right = [found.answer.startswith(word) for word in found.says]
        ax.bar(range(len(right)), found.without, color=[BLUE if ok else ORANGE for ok in right])
        ax.axhline(found.whole, color="k", ls="--", label=f"all layers: {found.whole:.2f}")
        for layer, (p, word, ok) in enumerate(zip(found.without, found.says, right, strict=True)):
            if not ok:
                ax.text(layer, p + 0.01, word[:10], rotation=90, ha="center", va="bottom", fontsize=12)
        ax.bar(0, 0, color=BLUE, label=f"still says “{found.answer}”")
        ax.bar(0, 0, color=ORANGE, label="says the word above the bar")
        ax.set(xlabel="the layer that is left out", ylabel=f"probability of “{found.answer}”", ylim=(0, 1))
        ax.set_title(f"“{found.prompt} …”", fontsize=14)
        ax.legend(loc="upper left", ncols=3, fontsize=12)
    return figure


def rise(rises: Float[torch.Tensor, "layer text"], *, top: float = 3.2) -> Figure:
    """Rise of the loss without each layer: each text as a dot, the mean as a line, cut off at `top`."""
    with classroom():
        figure, ax = plt.subplots(**SIZE)
        mean = rises.mean(1)
        for layer, one in enumerate(rises):
            ax.scatter([layer] * len(one), one, **FAINT, label=None if layer else "one text")
        ax.plot(mean.clamp(max=top), "-o", color=BLUE, markersize=5, label="mean of the texts")
        for layer in (mean > top).nonzero().flatten().tolist():
            ax.text(layer + 0.4, top, f"layer {layer}: {mean[layer]:.1f}", va="center", fontsize=12)
        ax.axhline(0, color="k", lw=0.8)
        ax.set(xlabel="the layer that is left out", ylabel="rise of the loss (nats)", ylim=(-0.6, top + 0.15))
        ax.legend(fontsize=12)
    return figure


def who_needs_it(rises: Mapping[str, torch.Tensor], shares: Mapping[str, Mapping[int, float]], layer: int) -> Figure:
    """Left: rise of the loss where a layer is left out at some tokens only. Right: attention to the first token."""
    with classroom():
        figure, (left, right) = plt.subplots(1, 2, **SIZE, width_ratios=(1, 1.1))
        _bars(left, rises)
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
        looks = zip((BLUE, GREY, GREEN), ("-o", "--D", ":s"), strict=True)
        for (name, found), (color, line) in zip(changes.items(), looks, strict=False):
            ax.plot(found, line, color=color, markersize=5, label=name)
        ax.set(xlabel="the layer that is left out at the early tokens", ylim=(0, None))
        ax.set_ylabel("change of what later layers add\nat the tokens after (1 = as large as it)")
        ax.legend(fontsize=12)
    return figure


def orders(costs: Mapping[str, Float[torch.Tensor, " text"]]) -> Figure:
    """Rise of the loss where the layers run in another order."""
    with classroom():
        figure, ax = plt.subplots(**SIZE)
        _bars(ax, costs)
    return figure


def _bars(ax: Axes, rises: Mapping[str, torch.Tensor]) -> None:
    """Means as bars with their numbers, each text as a dot."""
    for place, found in enumerate(rises.values()):
        mean = float(found.mean())
        ax.barh(place, mean, color=BLUE, alpha=0.8)
        ax.scatter(found, [place] * len(found), **FAINT)
        ax.text(max(float(found.max()), 0), place, f"  {mean:+.2f}", va="center", fontsize=12)
    categories(ax, list(rises))
    ax.axvline(0, color="k", lw=0.8)
    ax.set_xlim(
        min(-0.3, *(float(one.min()) for one in rises.values())), 1.2 * max(float(one.max()) for one in rises.values())
    )
    ax.set(xlabel="rise of the loss (nats)")


@dataclass(frozen=True)
class Compared:
    """A model whole and with its layers changed: the likeliest next words of a prompt, and the loss of some texts."""

    words: list[str]
    whole: list[float]  # probabilities
    now: list[float]
    loss_whole: list[float]  # of each text
    loss_now: list[float]


def picture(found: Compared) -> Figure:
    """Left: the likeliest next words. Right: the loss of each text."""
    with classroom():
        figure, (left, right) = plt.subplots(1, 2, **SIZE, width_ratios=(1.3, 1))
        both = ((found.whole, found.loss_whole, GREY, "all layers"), (found.now, found.loss_now, BLUE, "as you set it"))
        for side, (p, loss, color, name) in enumerate(both):
            left.barh([i + 0.4 * side - 0.2 for i in range(len(p))], p, 0.4, color=color, label=name)
            places = [i + 0.4 * side - 0.2 for i in range(len(loss))]
            right.bar(places, loss, 0.4, color=color)
        categories(left, found.words)
        left.set(xlabel="probability of the next word", xlim=(0, 1))
        left.legend(loc="lower right", fontsize=12)
        right.set_xticks(range(len(found.loss_now)), [str(i + 1) for i in range(len(found.loss_now))])
        right.set(xlabel="text", ylabel="loss (nats for each token)")
    return figure


# --- the explorer ---------------------------------------------------------------------------------------------------


class Layers(ipw.VBox):
    """Click layers off, swap two, run one twice; see the next word of a prompt and the loss of some texts."""

    def __init__(self, model: TransformerBridge, ids: Int[torch.Tensor, "text position"]) -> None:
        self.model, self.ids, n = model, ids, model.cfg.n_layers
        self.prompt = ipw.Text(PROMPT, description="prompt", continuous_update=False, **wide(520, 60))
        self.answer = ipw.Text(ANSWER, description="keep", continuous_update=False, **wide(220, 50))
        small = ipw.Layout(width="54px")
        self.on = [ipw.ToggleButton(True, description=str(i), tooltip=f"layer {i}", layout=small) for i in range(n)]
        choices = [("none", None), *((str(i), i) for i in range(n))]
        self.swap, self.other, self.twice = (
            ipw.Dropdown(options=choices, description=words, **wide(170, 80)) for words in ("swap", "with", "run twice")
        )
        self.spare = ipw.Checkbox(False, description="spare the first token", indent=False)
        self.reset, self.trouble, self.picture, self.said = (
            button("All layers on"),
            ipw.Output(),
            image(900),
            ipw.HTML(),
        )
        self.record, self.moving = 0, False
        self.known: dict[Any, Any] = {}
        self.reset.on_click(lambda _: self.all_on())
        for control in (self.prompt, self.answer, *self.on, self.swap, self.other, self.twice, self.spare):
            control.observe(lambda _: self.draw(), "value")
        grid = ipw.Box(self.on, layout=ipw.Layout(flex_flow="row wrap", width="900px"))
        rows = [ipw.HBox([self.prompt, self.answer]), grid]
        rows.append(ipw.HBox([self.swap, self.other, self.twice, self.spare, self.reset]))
        super().__init__([*rows, self.trouble, self.said, self.picture])
        self.draw()

    @property
    def off(self) -> tuple[int, ...]:
        """The layers that are clicked off."""
        return tuple(layer for layer, one in enumerate(self.on) if not one.value)

    def all_on(self) -> None:
        """Everything as the model came."""
        self.moving = True
        for one in self.on:
            one.value = True
        self.swap.value = self.other.value = self.twice.value = None
        self.moving = False
        self.draw()

    def draw(self) -> None:
        """Run the model as it is set, and show what it says."""
        if self.moving:
            return
        for one in self.on:
            one.button_style = "info" if one.value else ""
        found, self.said.value = ask(self.trouble, self._compare)
        if found is not None:
            self.said.value = self._verdict(found)
            self.picture.value = png(picture(found))

    def _measure(self, prompt: str, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        key = (prompt, *settings.values())
        if key not in self.known:
            with changed(self.model, **settings):
                self.known[key] = next_word(self.model, prompt), losses(self.model, self.ids).mean(1)
        return self.known[key]

    def _compare(self) -> Compared:
        pair = (self.swap.value, self.other.value)
        swapped = None if None in pair or pair[0] == pair[1] else pair
        settings = {"off": self.off, "swapped": swapped, "twice": self.twice.value, "first": int(self.spare.value)}
        wanted = _first_token(self.model, self.prompt.value, self.answer.value)
        nothing = {"off": (), "swapped": None, "twice": None, "first": 0}
        (whole, loss_whole), (now, loss_now) = (self._measure(self.prompt.value, one) for one in (nothing, settings))
        best = list(dict.fromkeys([wanted, *now.topk(5).indices.tolist()]))[:6]
        words = [self.model.tokenizer.decode(i).strip().replace("\n", "↵")[:12] or "␣" for i in best]
        return Compared(words, whole[best].tolist(), now[best].tolist(), loss_whole.tolist(), loss_now.tolist())

    def _verdict(self, found: Compared) -> str:
        kept, answer = found.now[0] == max(found.now), text_of(self.answer.value)
        if kept:
            self.record = max(self.record, len(self.off))
        return (
            f"<b>{len(self.off)} of {len(self.on)} layers off.</b> “{answer}” has {found.now[0]:.2f} "
            f"and is {'still' if kept else 'no longer'} on top. Most layers off with “{answer}” on top: {self.record}."
        )


def layers(model: TransformerBridge, ids: Int[torch.Tensor, "text position"]) -> Layers:
    """The explorer, with texts whose loss it shows."""
    return Layers(model, ids)
