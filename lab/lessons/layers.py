"""Layers left out, swapped or run twice: what a model says then, and an explorer to click layers off."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, require
from lab.explorers import ClickablePicture, ask, button, grown, text_of, wide
from lab.figures import BLUE, GREY, categories, classroom, stack
from lab.interventions import rewritten, skip
from lab.texts import first_tokens, tokenize

PROMPT, ANSWER = "The capital of the country of Spain is", "Madrid"


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
    order = order_of(last + 1, None if swapped is None else require.wholes("swapped", swapped, 0, last, least=2))
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


def order_of(n_layers: int, swapped: Sequence[int] | None) -> list[int]:
    """Which layer stands at each place, two of them swapped or none."""
    order = list(range(n_layers))
    if swapped is not None:
        i, j = swapped
        order[i], order[j] = j, i
    return order


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
        ids = ids.to(model.cfg.device)
        logits = model(ids, use_cache=False).float()
    found = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return found.view(len(ids), -1)


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
        said = model.tokenizer.decode(int(p.argmax()))
        says.append(said.strip() or ("new line" if "\n" in said else "blank"))
    return OneOut(prompt, answer, float(next_word(model, prompt)[wanted]), without, says)


def _first_token(model: TransformerBridge, prompt: str, answer: str) -> int:
    found = first_tokens(model, prompt, [answer])
    if not found:
        raise ValueError(f"the answer {answer!r} has no token of its own behind this prompt; give another word")
    return found[0]


# --- the explorer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A model whole and with its layers changed: the likeliest next words of a prompt, and the loss of some texts."""

    words: list[str]
    whole: list[float]  # probabilities
    now: list[float]
    loss_whole: list[float]  # of each text
    loss_now: list[float]
    places: list[tuple[str, bool]]  # the layers as they stand, and which of them are on


def picture(found: Compared) -> Figure:
    """The layers as they stand; below them, left: the likeliest next words, right: the loss of each text."""
    with classroom():
        figure = plt.figure(figsize=(9, 4.9), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.3, 1), height_ratios=(0.11, 1))
        top, left, right = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
        stack(top, found.places, "click a layer to switch it off or on")
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


class Layers(ipw.VBox):
    """Click layers off, swap two, run one twice; see the next word of a prompt and the loss of some texts."""

    def __init__(self, model: TransformerBridge, ids: Int[torch.Tensor, "text position"] | None = None) -> None:
        if ids is None:
            texts = datasets.load("prose").text.str.slice(0, 150).tolist()[:4]
            ids = tokenize(model, texts).ids[:, :24]
        self.model, self.ids, n = model, ids, model.cfg.n_layers
        self.prompt = ipw.Text(PROMPT, description="prompt", continuous_update=False, **wide(520, 60))
        self.answer = ipw.Text(ANSWER, description="keep", continuous_update=False, **wide(220, 50))
        small = ipw.Layout(width=grown(54))
        self.on = [ipw.ToggleButton(True, description=str(i), tooltip=f"layer {i}", layout=small) for i in range(n)]
        choices = [("none", None), *((str(i), i) for i in range(n))]
        self.swap, self.other, self.twice = (
            ipw.Dropdown(options=choices, description=words, **wide(170, 80)) for words in ("swap", "with", "run twice")
        )
        self.spare = ipw.Checkbox(False, description="spare the first token", indent=False)
        self.reset, self.trouble = button("All layers on"), ipw.Output()
        self.picture = ClickablePicture(
            900, "The layers; the likeliest next words and the loss of each text", "click a layer to switch it off or on",
            lambda x, _: self.switch(int(x)),
        )  # fmt: skip
        self.said, self.moving = ipw.HTML(), False
        self.known: dict[Any, Any] = {}  # what was measured, by prompt and settings
        self.records: dict[tuple[str, str], int] = {}  # most layers off, by prompt and answer
        self.reset.on_click(lambda _: self.all_on())
        for control in (self.prompt, self.answer, *self.on, self.swap, self.other, self.twice, self.spare):
            control.observe(lambda _: self.draw(), "value")
        grid = ipw.Box(self.on, layout=ipw.Layout(flex_flow="row wrap", width=grown(900)))
        rows = [ipw.HBox([self.prompt, self.answer]), grid]
        rows.append(ipw.HBox([self.swap, self.other, self.twice, self.spare, self.reset]))
        super().__init__([*rows, self.trouble, self.said, self.picture])
        self.draw()

    @property
    def off(self) -> tuple[int, ...]:
        """The layers that are clicked off."""
        return tuple(layer for layer, one in enumerate(self.on) if not one.value)

    @property
    def swapped(self) -> tuple[int, int] | None:
        """The two layers that stand in each other's place."""
        pair = (self.swap.value, self.other.value)
        return None if None in pair or pair[0] == pair[1] else pair

    def switch(self, place: int) -> None:
        """The layer that stands at a place off, or on again."""
        order = order_of(len(self.on), self.swapped)
        one = self.on[order[min(place, len(order) - 1)]]
        one.value = not one.value

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
        found, self.said.value = ask(self.trouble, self._compared)
        if found is not None:
            self.said.value = self._verdict(found)
            self.picture.show(picture(found))

    def _measure(self, prompt: str, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        key = (prompt, *settings.values())
        if key not in self.known:
            with changed(self.model, **settings):
                self.known[key] = next_word(self.model, prompt), losses(self.model, self.ids).mean(1)
        return self.known[key]

    def _compared(self) -> Compared:
        twice = self.twice.value
        settings = {"off": self.off, "swapped": self.swapped, "twice": twice, "first": int(self.spare.value)}
        wanted = _first_token(self.model, self.prompt.value, self.answer.value)
        nothing = {"off": (), "swapped": None, "twice": None, "first": 0}
        (whole, loss_whole), (now, loss_now) = (self._measure(self.prompt.value, one) for one in (nothing, settings))
        best = list(dict.fromkeys([wanted, *now.topk(5).indices.tolist()]))[:6]
        words = [self.model.tokenizer.decode(i).strip().replace("\n", "↵")[:12] or "␣" for i in best]
        places = [
            (f"{i}\n×2" if i == twice else str(i), self.on[i].value) for i in order_of(len(self.on), self.swapped)
        ]
        p, loss = (whole[best].tolist(), now[best].tolist()), (loss_whole.tolist(), loss_now.tolist())
        return Compared(words, *p, *loss, places)

    def _verdict(self, found: Compared) -> str:
        kept, about = found.now[0] == max(found.now), (self.prompt.value, self.answer.value)
        if kept:
            self.records[about] = max(self.records.get(about, 0), len(self.off))
        answer, most = text_of(self.answer.value), self.records.get(about, "none")
        return (
            f"<b>{len(self.off)} of {len(self.on)} layers off.</b> “{answer}” has {found.now[0]:.2f} and is "
            f"{'on top' if kept else 'not on top'}. Most layers off with “{answer}” on top so far: {most}."
        )


def layers(model: TransformerBridge, ids: Int[torch.Tensor, "text position"] | None = None) -> Layers:
    """The explorer, with texts whose loss it shows (None: the first 24 tokens of four texts of `prose`)."""
    return Layers(model, ids)
