"""Bits spent on blocks: what a model says with fewer of them, and an explorer that spends a budget by a rule."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets
from lab.depth_budget import SKIP, Bits, Evaluator
from lab.depth_budget.programme import allocate
from lab.explorers import ClickablePicture, ask, text_of, wide
from lab.figures import BLACK, BLUE, GREEN, GREY, ORANGE, RED, SKY, YELLOW, classroom
from lab.interventions import block_matrices, reweighted, skip
from lab.lessons.layers import losses
from lab.runs import greedy_ids
from lab.texts import tokenize

PROMPT = "The capital of the country of Spain is"
GROUP = 64
CHOICES = (0, 2, 3, 4, 8)  # bits; 0: the block is left out
PRICES = (0.0, *(bits + 32 / GROUP for bits in CHOICES[1:]))  # bits for each weight, with a group's two 16-bit numbers
RULES = ("all blocks alike", "lower the first blocks", "lower the last blocks", "lower by measured damage", "programme",
         "by hand")  # fmt: skip
LOOKS = {0: ("white", BLACK), 2: (YELLOW, BLACK), 3: (ORANGE, BLACK), 4: (SKY, BLACK), 8: (BLUE, "white")}
MARKS = dict(zip(RULES, zip("o<>sD*", (BLACK, SKY, BLUE, ORANGE, GREEN, RED), strict=True), strict=True))


def matrices(model: TransformerBridge, block: int) -> list[torch.nn.Parameter]:
    """The weight matrices of a block, [output, input] each."""
    return [weight for weight, _ in block_matrices(model, block)]


def names(model: TransformerBridge, block: int) -> list[str]:
    """What they are called: q, k, v, o, gate, up, down."""
    parts = {id(one): name.split(".") for name, one in model.blocks[block].named_parameters()}
    return [
        [part for part in parts[id(one)] if not part.startswith("_")][-2].removesuffix("_proj")
        for one in matrices(model, block)
    ]


def change(bits: int) -> Any:
    """What a block gets, as the engine names it."""
    return Bits(bits, GROUP, offset="least") if bits else SKIP


@contextmanager
def spent(model: TransformerBridge, bits: Sequence[int]) -> Iterator[None]:
    """Inside: each block at its bits; 0 leaves it out."""
    with ExitStack() as stack:
        stack.enter_context(reweighted(model, {i: change(b).weights for i, b in enumerate(bits) if b}))
        for layer in [i for i, b in enumerate(bits) if not b]:
            stack.enter_context(skip(model, layer))
        yield


def goes_on(model: TransformerBridge, prompt: str, n_tokens: int = 10) -> str:
    """The likeliest next tokens, one after the other."""
    ids = tokenize(model, [prompt]).ids
    new = greedy_ids(model, ids, torch.ones_like(ids, dtype=torch.bool), max_new_tokens=n_tokens)
    return model.tokenizer.decode(new[0], skip_special_tokens=True)


def opening(model: TransformerBridge, prompt: str = PROMPT) -> tuple[torch.Tensor, torch.Tensor, str, dict[str, str]]:
    """A group of weights as it is and at 3 bits; what the model says as it comes, and with all blocks at 8, 4, 3, 2 bits."""
    group = matrices(model, model.cfg.n_layers // 2)[-1].data[:1, :GROUP]
    found = {"as it comes": goes_on(model, prompt)}
    for bits in (8, 4, 3, 2):
        with spent(model, [bits] * model.cfg.n_layers):
            found[f"{bits} bits"] = goes_on(model, prompt)
    (low,) = change(3).weights([group])
    return group[0].cpu(), low[0].cpu(), prompt, found


def in_order(order: Sequence[int], budget: float) -> list[int]:
    """Bits of each block: all at 8, then one block after the other a step lower, until the mean price keeps the budget."""
    bits = [8] * len(order)
    for below in (4, 3, 2, 0):
        for block in order:
            if mean_price(bits) <= budget + 1e-9:
                return bits
            bits[block] = below
    return bits


def mean_price(bits: Sequence[int]) -> float:
    """Bits for each weight of the blocks, all told."""
    return float(np.mean([PRICES[CHOICES.index(one)] for one in bits]))


class Spend(ipw.VBox):
    """Drag a budget and choose a rule: which blocks keep their bits, what is predicted, what is measured, what is said."""

    def __init__(self, model: TransformerBridge, ids: Int[torch.Tensor, "text position"] | None = None) -> None:
        if ids is None:
            texts = datasets.load("prose").text.str.slice(0, 150).tolist()[:8]
            ids = tokenize(model, texts).ids[:, :24]
        half, self.model, self.n = len(ids) // 2, model, model.cfg.n_layers
        self.search, self.report = (part.to(model.cfg.device) for part in (ids[:half], ids[half:]))
        self.table: Float[np.ndarray, "block choice"] | None = None  # damage of each block alone, measured when needed
        self.bits = [8] * self.n
        self.tried: dict[Any, tuple[str, float, float]] = {}  # rule, price and rise, the latest last
        self.known: dict[Any, tuple[float, str]] = {}  # loss and words, by prompt and bits
        self.prompt = ipw.Text(PROMPT, description="prompt", continuous_update=False, **wide(480, 60))
        self.budget = ipw.FloatSlider(4.0, min=1.0, max=8.5, step=0.1, description="budget", continuous_update=False,
                                      readout_format=".2f", **wide(380, 60))  # fmt: skip
        self.rule = ipw.Dropdown(options=RULES, description="rule", **wide(300, 40))
        self.block = ipw.Dropdown(options=range(self.n), description="block", **wide(130, 50))
        bits = [("choose", None), ("left out", 0), *((f"{b} bits", b) for b in CHOICES[1:])]
        self.gets = ipw.Dropdown(options=bits, value=None, description="gets", **wide(150, 40))
        self.trouble, self.said = ipw.Output(), ipw.HTML()
        self.picture = ClickablePicture(
            900, "Bits of each block; rise of the loss by the price", "click a block to give it other bits",
            lambda x, _: self.give(int(x)),
        )  # fmt: skip
        for control in (self.prompt, self.budget, self.rule):
            control.observe(lambda _: self.draw(), "value")
        self.gets.observe(lambda told: None if told.new is None else self.give(self.block.value, told.new), "value")
        rows = [ipw.HBox([self.budget, self.rule]), ipw.HBox([self.prompt, self.block, self.gets])]
        super().__init__([*rows, self.trouble, self.said, self.picture])
        self.draw()

    def give(self, block: int, bits: int | None = None) -> None:
        """Other bits for one block, by hand; None: the next fewer."""
        block, self.gets.value = min(block, self.n - 1), None
        self.bits[block] = CHOICES[CHOICES.index(self.bits[block]) - 1] if bits is None else bits
        if self.rule.value == "by hand":
            self.draw()
        else:
            self.rule.value = "by hand"  # which draws

    def draw(self) -> None:
        """Spend the budget by the rule, measure, and show."""
        found, self.said.value = ask(self.trouble, self._spent)
        if found is not None:
            self.said.value = found
            self.picture.show(self._picture())

    def damages(self) -> Float[np.ndarray, "block choice"]:
        """Rise of the loss with one block at each choice, on the texts for choosing; 8 bits are taken to cost nothing."""
        if self.table is None:
            print(f"Measuring each block alone, once, at 0, 2, 3 and 4 bits: {4 * self.n} runs ...")
            evaluate = Evaluator(self.model, self.search, first=0)
            found = evaluate([{block: change(bits)} for block in range(self.n) for bits in CHOICES[:-1]]).nll.mean(1)
            rises = (found - evaluate.intact.mean()).reshape(self.n, -1)
            self.table = np.concatenate([rises, np.zeros((self.n, 1))], 1)
        return self.table

    def _chosen(self, rule: str, budget: float) -> list[int]:
        """Bits of each block by a rule."""
        blocks = range(self.n)
        if rule == "all blocks alike":
            return [max(b for b, price in zip(CHOICES, PRICES, strict=True) if price <= budget)] * self.n
        if rule == "programme":
            halves = np.tile(np.rint(2 * np.array(PRICES)), (self.n, 1))  # whole numbers of half bits
            return [CHOICES[i] for i in allocate(halves, self.damages(), int(2 * budget * self.n + 1e-9))]
        order = np.argsort(self.damages()[:, CHOICES.index(3)]) if "damage" in rule else blocks
        return in_order(blocks[::-1] if "last" in rule else [int(i) for i in order], budget)

    def _spent(self) -> str:
        rule = self.rule.value
        self.budget.disabled = by_hand = rule == "by hand"  # grey: no budget holds then
        if not by_hand:
            self.bits = self._chosen(rule, self.budget.value)
        allowed = "" if by_hand else f" of {self.budget.value:.2f} allowed"
        price, (measured, words) = mean_price(self.bits), self._measured(self.bits)
        measured -= self._measured([8] * self.n)[0]
        self.tried.pop((rule, *self.bits), None)
        self.tried[rule, *self.bits] = (rule, price, measured)
        guess = "not known yet (choose a rule that measures)"
        if self.table is not None:
            guess = f"{sum(self.table[i, CHOICES.index(b)] for i, b in enumerate(self.bits)):+.2f}"
        return (
            f"<b>{price:.2f} bits for each weight</b>{allowed}, low and step counted. Rise of the loss, predicted (single "
            f"damages added up, texts that chose): {guess}; <b>measured (other texts): {measured:+.2f} nats</b>.<br>"
            f"“{text_of(self.prompt.value)}"
            f"<b>{text_of(words)}</b> …”"
        )

    def _measured(self, bits: Sequence[int]) -> tuple[float, str]:
        """Loss of the texts that report, and what the model says."""
        key = (self.prompt.value, *bits)
        if key not in self.known:
            with spent(self.model, bits):
                self.known[key] = float(losses(self.model, self.report).mean()), goes_on(self.model, key[0])
        return self.known[key]

    def _picture(self) -> Figure:
        with classroom():
            figure, (top, ax) = plt.subplots(2, figsize=(9, 4.7), layout="constrained", height_ratios=(0.16, 1))
            for i, bits in enumerate(self.bits):
                face, ink = LOOKS[bits]
                top.add_patch(plt.Rectangle((i, 0), 1, 1, fc=face, ec=GREY, lw=1))
                top.text(i + 0.5, 0.46, str(bits or "out"), ha="center", va="center", fontsize=9.5, color=ink)
            top.set(xlim=(0, self.n), ylim=(0, 1), yticks=[])
            top.set_xticks([i + 0.5 for i in range(0, self.n, 5)], [str(i) for i in range(0, self.n, 5)])
            top.set_title("bits of each block (click one to change it; out: left out)", fontsize=13)
            for rule, (mark, color) in MARKS.items():
                mine = [(price, rise) for name, price, rise in self.tried.values() if name == rule]
                if mine:
                    behind: Any = {"mfc": "none", "mew": 2, "ms": 12} if rule == RULES[0] else {"ms": 8}
                    ax.plot(*zip(*mine, strict=True), mark, color=color, label=rule, **behind)
            ax.plot(*list(self.tried.values())[-1][1:], "o", mfc="none", mec=RED, ms=17, mew=1.8)
            ax.axhline(0, color=BLACK, lw=0.8)
            ax.margins(y=0.15)
            ax.set(xlabel="bits for each weight", ylabel="rise of the loss (nats)", xlim=(0, 9))
            ax.legend(fontsize=12, loc="upper right")
        return figure


def spend(model: TransformerBridge, ids: Int[torch.Tensor, "text position"] | None = None) -> Spend:
    """The explorer, with texts: half of them to measure blocks on, half to report (None: eight texts of `prose`)."""
    return Spend(model, ids)
