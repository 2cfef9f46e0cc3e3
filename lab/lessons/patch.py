"""Send a later state back to an earlier layer: maps and figures of lesson 02, and an explorer for queries of one's own."""

from collections.abc import Mapping
from typing import Any

import ipywidgets as ipw
import matplotlib.pyplot as plt
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch as Square
from transformer_lens.model_bridge import TransformerBridge

from lab import back_patching, datasets, interventions
from lab.explorers import ClickablePicture, ask, button, row_of, shown, table_of, text_of, wide
from lab.figures import BLUE, GREY, RED, classroom
from lab.runs import clean_run, generate, why_plain
from lab.texts import first_tokens, tokenize

SHOWCASES = ("two_hop-1538", "two_hop-0238", "two_hop-0415", "two_hop-2715")


def rank_map(
    model: TransformerBridge,
    ids: Int[torch.Tensor, " position"],
    position: int,
    vectors: Float[torch.Tensor, "depth d_model"],
    word: int,
    *,
    step: int = 1,
) -> Float[torch.Tensor, "source target"]:
    """Rank of a word as the next one after each pair of layers, by `lab.runs.generate`: 1 = it is said, nan = not tried.

    Args:
        vectors: what is put; that of depth s + 1 stands for the state after layer s.
        word: the token whose rank is noted. step: every how manyth layer is tried.
    """
    run = clean_run(model, ids)
    pairs = [pair for pair in back_patching.cells(run.n_layers) if not any(layer % step for layer in pair)]
    sources, targets = torch.tensor(pairs).T
    found = generate(
        model, run, [position], (targets + 1).tolist(), vectors[sources + 1][:, None], max_new_tokens=1, wanted=[word],
        reuse=not why_plain(model),
    )  # fmt: skip
    ranks = torch.full((run.n_layers, run.n_layers), torch.nan)
    ranks[sources, targets] = torch.as_tensor(found.ranks + 1).float()
    return ranks


def grid(table: pd.DataFrame) -> Float[torch.Tensor, "source target"]:
    """The ranks of `lab.back_patching.sweep` as a map: 1 = it is said, nan = no such pair."""
    n_layers = int(table.source_layer.max()) + 1
    ranks = torch.full((n_layers, n_layers), torch.nan)
    for source, target, rank in zip(table.source_layer, table.target_layer, table["rank"], strict=True):
        ranks[source, target] = rank + 1
    return ranks


def random_vectors(vectors: Float[torch.Tensor, "depth d_model"]) -> Float[torch.Tensor, "depth d_model"]:
    """For each depth a vector of the same length that points anywhere."""
    return torch.nn.functional.normalize(torch.randn_like(vectors), dim=-1) * vectors.norm(dim=-1, keepdim=True)


def hits(ranks: Float[torch.Tensor, "source target"]) -> str:
    """How many of the tried pairs bring the word to the top."""
    return f"{int((ranks == 1).sum())} of {int(ranks.isfinite().sum())} pairs"


# --- figures ---------------------------------------------------------------------------------------------------------


def opening(model: TransformerBridge, query: Any, *, source: int, target: int, top: int = 4) -> Figure:
    """One back-patch at the end of e1: where the state is taken and put, and the likeliest next words without and with it."""
    ids = tokenize(model, [query.text]).ids
    at, run = back_patching.places(model, query.text, query.e1)["t1"], clean_run(model, ids[0])
    with torch.no_grad():
        with interventions.patch(model, "resid_post", layer=target, value=run.states[source + 1, at], position=at):
            patched = model(ids)[0, -1].softmax(-1).cpu()
    plain = run.logits.softmax(-1).cpu()
    words = list(dict.fromkeys([*patched.topk(top).indices.tolist(), *plain.topk(top).indices.tolist()]))
    with classroom():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained", width_ratios=[1.25, 1])
        _arrow(left, [model.tokenizer.decode(i) for i in ids[0].tolist()], run.n_layers, at, source, target)
        for shift, p, color, label in ((-0.2, plain, GREY, "as it is"), (0.2, patched, BLUE, "with the patch")):
            right.barh([i + shift for i in range(len(words))], p[words], 0.38, color=color, label=label)
        right.set_yticks(range(len(words)), [model.tokenizer.decode(i).strip() for i in words])
        right.invert_yaxis()
        right.set(xlabel="probability of the next word", title="what the model says next")
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncol=2, fontsize=12)
    return figure


def _arrow(ax: Axes, tokens: list[str], n_layers: int, at: int, source: int, target: int) -> None:
    """The stack of layers over each token, and the way of one state."""
    ax.pcolormesh(torch.zeros(n_layers, len(tokens)), cmap=ListedColormap(["#EEF3F7"]), edgecolors="w", linewidth=0.5)
    for layer, color in ((source, BLUE), (target, RED)):
        ax.add_patch(plt.Rectangle((at, layer), 1, 1, color=color))
    ax.annotate("", (at + 0.1, target + 0.5), (at + 0.1, source + 0.5),
                arrowprops={"arrowstyle": "-|>", "color": "k", "lw": 2, "connectionstyle": "arc3,rad=0.45"})  # fmt: skip
    ax.text(at - 1.6, source + 1.2, f"taken after layer {source}", ha="right", color=BLUE, fontsize=12)
    ax.text(at - 1.6, target - 1.2, f"put after layer {target}", ha="right", va="center", color=RED, fontsize=12)
    ax.set_xticks([i + 0.5 for i in range(len(tokens))], [one.strip() for one in tokens], rotation=90, fontsize=12)
    ax.set(ylabel="layer", title="one back-patch")


def maps(
    ranks: Mapping[str, Float[torch.Tensor, "source target"]],
    word: str,
    title: str = "",
    *,
    chosen: tuple[int, int] | None = None,
) -> Figure:
    """Maps of ranks side by side, each under its name: red where the word is said next, grey where nothing was tried.

    chosen: (source, target) to frame.
    """
    with classroom():
        figure, axes = plt.subplots(
            1,
            len(ranks),
            figsize=(9, 4.2) if len(ranks) > 1 else (7.6, 6.4),
            layout="constrained",
            sharey=True,
            squeeze=False,
        )
        for ax, (name, found) in zip(axes.flat, ranks.items(), strict=True):
            mesh = _map(ax, found)
            ax.set_title(f"{name}\n{hits(found)}", fontsize=12)
            if chosen is not None:
                ax.add_patch(plt.Rectangle(chosen[::-1], 1, 1, fill=False, lw=2.5))
        axes[0, 0].set_ylabel("taken after layer")
        bar = figure.colorbar(mesh, ax=axes, label=f"rank of “{word}”", shrink=0.8, pad=0.01)
        bar.set_ticks([2, 10, 100, 1000], labels=["2", "10", "100", "1,000 +"])
        said = [Square(color=RED, label=f"“{word}” is the next word")]
        figure.legend(handles=said, loc="outside lower center", fontsize=12)
        figure.suptitle(title, fontsize=13)
    return figure


def _map(ax: Axes, ranks: Float[torch.Tensor, "source target"]) -> Any:
    """One map; where only some layers were tried, their cells are as large as the steps between them."""
    tried = ranks.isfinite()
    layers = (tried.any(0) | tried.any(1)).nonzero()[:, 0]
    edges, cells = [*layers.tolist(), len(ranks)], ranks[layers][:, layers]
    ax.set_facecolor("#DDDDDD")
    mesh = ax.pcolormesh(edges, edges, cells, cmap="Blues_r", norm=LogNorm(2, 1000, clip=True))
    ax.pcolormesh(edges, edges, torch.where(cells == 1, 1.0, torch.nan), cmap=ListedColormap([RED]))
    ticks = range(0, len(ranks), 5 if len(ranks) > 9 else 1)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([i + 0.5 for i in ticks], [str(i) for i in ticks])
    ax.set(xlabel="put after layer", aspect="equal", xlim=(0, len(ranks)), ylim=(0, len(ranks)))
    return mesh


# --- play ------------------------------------------------------------------------------------------------------------

ITSELF = "this query itself"
PLACES = [("t1: where the name ends", "t1"), ("t2: the last word", "t2")]


class Patch(ipw.VBox):
    """Choose a query and a place; see the map of all pairs of layers, click one, and read what the model then says."""

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self.rows = datasets.load("two_hop").set_index("example").loc[list(SHOWCASES)]
        look = wide(640, 130)
        offered = [(f"{row.text} ... {row.e3}", example) for example, row in self.rows.iterrows()]
        self.query = ipw.Dropdown(options=[*offered, ("a query of your own", "")], description="query", **look)
        hints = {"text": "The capital of the country of Mumbai is", "t1 ends": "Mumbai", "answer": "New Delhi"}
        self.fields = {name: ipw.Text(description=name, placeholder=hint, **look) for name, hint in hints.items()}
        self.own, self.go = ipw.VBox(list(self.fields.values())), button("Show")
        self.place = ipw.RadioButtons(options=PLACES, description="patched at", style=look["style"])
        self.donor = ipw.Dropdown(options=[ITSELF, *self.rows.e1], description="state of", **look)
        top = model.cfg.n_layers - 1
        self.source = ipw.IntSlider(2 * top // 3, 1, top, description="taken after layer", **look)
        self.target = ipw.IntSlider(top // 5, 0, top - 1, description="put after layer", **look)
        self.noise = button("Try a random vector")
        self.said, self.tally, self.trouble = ipw.HTML(), ipw.HTML(), ipw.Output()
        self.picture = ClickablePicture(
            700, "The answer's rank after each pair of layers", "click a pair to read what the model says after it",
            self.choose, lambda: (self.target.value, self.source.value),
        )  # fmt: skip
        self.maps: dict[tuple, torch.Tensor] = {}
        self.moving = False  # both sliders change, and it is drawn once
        self.noises: dict[tuple, list[str]] = {}
        for control in (self.query, self.place, self.donor):
            control.observe(lambda _: self.read(), "value")
        for slider in (self.source, self.target):
            slider.continuous_update = False
            slider.observe(lambda _: self.draw(), "value")
        self.go.on_click(lambda _: self.read())
        self.noise.on_click(lambda _: self.draw_random())
        choose = [self.query, self.own, self.place, self.donor, self.go, self.trouble]
        super().__init__([*choose, self.source, self.target, self.said, self.picture, self.noise, self.tally])
        self.read()

    @property
    def asked(self) -> tuple[str, str, str]:
        """Text, the words where t1 ends, and the answer."""
        if self.query.value:
            row = self.rows.loc[self.query.value]
            return row.text, row.e1, row.e3
        text, e1, answer = (field.value.strip() for field in self.fields.values())
        return text, e1, answer

    @property
    def key(self) -> tuple:
        """Under which a map is kept."""
        return (*self.asked, self.place.value, self.donor.value)

    def read(self) -> None:
        """The map of what is chosen, from the model or from before."""
        shown(not self.query.value, self.own, self.go)
        self.picture.show(None)
        self.tally.value = ""
        if not all(self.asked):
            self.said.value = "Type a text, the words in it where t1 ends, and the answer. Then press Show."
            return
        if self.key not in self.maps:
            found, self.said.value = ask(self.trouble, self._map)
            if found is None:
                return
            self.maps[self.key] = found
        self.draw()

    def _at(self, text: str, e1: str) -> int:
        return back_patching.places(self.model, text, e1)[self.place.value]

    def _lender(self) -> Any:
        return None if self.donor.value == ITSELF else self.rows[self.rows.e1 == self.donor.value].iloc[0]

    def _map(self) -> torch.Tensor:
        text, e1, answer = self.asked
        if len(text) > 160:
            raise ValueError(f"this text has {len(text)} characters; the map takes long beyond 160. Shorten it.")
        word, lender = self._word(), self._lender()
        if lender is None:
            table = back_patching.sweep(self.model, text, [answer], positions=[self._at(text, e1)], max_new_tokens=1)
            return grid(table)
        run = clean_run(self.model, tokenize(self.model, [lender.text]).ids[0])
        return self._ranks(run.states[:, self._at(lender.text, lender.e1)], word)

    def _word(self) -> int:
        text, _, answer = self.asked
        words = first_tokens(self.model, text, [answer])
        if not words:
            raise ValueError(f"the first token of {answer!r} says nothing of it in this model: try another answer")
        return words[0]

    def _ranks(self, vectors: torch.Tensor, word: int) -> torch.Tensor:
        text, e1, _ = self.asked
        return rank_map(self.model, tokenize(self.model, [text]).ids[0], self._at(text, e1), vectors, word)

    def draw_random(self) -> None:
        """Count the hits of one more draw of random vectors."""

        def count() -> str:
            text, e1, _ = self.asked
            run = clean_run(self.model, tokenize(self.model, [text]).ids[0])
            return hits(self._ranks(random_vectors(run.states[:, self._at(text, e1)].clone()), self._word()))

        found, wrong = ask(self.trouble, count)
        if wrong:
            self.said.value = wrong
            return
        self.noises.setdefault(self.key[:4], []).append(found.split()[0])
        self.draw()

    def choose(self, x: float, y: float) -> None:
        """The pair at a place of the map."""
        self.moving = True
        self.target.value, self.source.value = int(x), int(y)
        self.moving = False
        self.draw()

    def draw(self) -> None:
        """The map with the chosen pair framed, what the model says after it, and what was counted so far."""
        if self.moving or self.key not in self.maps:
            return
        text, e1, answer = self.asked
        source, target, ranks = self.source.value, self.target.value, self.maps[self.key]
        self.picture.show(maps({f"{e1} at {self.place.value}": ranks}, answer, chosen=(source, target)))
        rows = []
        for (*query, place, donor), found in self.maps.items():
            drawn = ", ".join(self.noises.get((*query, place), [])) or "not tried"
            rows.append(row_of([text_of(query[1]), place, text_of(donor), hits(found), drawn]))
        head = row_of(["<b>query</b>", "<b>at</b>", "<b>state of</b>", "<b>hits</b>", "<b>random vectors</b>"])
        self.tally.value = table_of([head, *rows])
        if target >= source:
            self.said.value = (
                f"Layer {target} is not before layer {source}: a back-patch goes back. Choose another pair."
            )
            return
        lender, at = self._lender(), self._at(text, e1)
        donor = {} if lender is None else {"donor": lender.text, "donor_position": self._at(lender.text, lender.e1)}
        says, wrong = ask(self.trouble, lambda: back_patching.patch_once(
            self.model, text, position=at, source_layer=source, target_layer=target, max_new_tokens=6, **donor))  # fmt: skip
        rank = f"“{text_of(answer)}” has rank {ranks[source, target]:,.0f} as the next word (1 = it is said)."
        self.said.value = wrong or f"{text_of(text)} <b>{text_of(says)}</b><br>{rank}"


def patch(model: TransformerBridge) -> Patch:
    """The explorer, with the queries of the lesson and a place for one's own."""
    return Patch(model)
