"""Scale what tuning changed, less in early blocks than in late ones: is the target kept, and what was forgotten back?

    result = tuned_scaling.run(lab.load(), "sentiment_words")         # two minutes on one free core
    result.summary                                                    # each way to scale, on test texts, with intervals
    result.tables["differences"]                                      # LiNeS minus each control, paired by text

After LiNeS (Wang et al., arXiv 2410.17146), asked of a language model, with what the published work lacks: the same lambdas
reversed and in random order, one constant with the same size of update, intervals, and alpha chosen on other texts.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, models, probes, require
from lab.identity import identity
from lab.nets import replicas
from lab.nets.replicas import Recipe
from lab.results import Result, joined, keep, study, versions
from lab.texts import last_positions, tokenize
from lab.transfer import scales as update_scaling
from lab.transfer.scales import Scales, Weights, block_of, constant, permuted, ramp, same_size, scaled
from lab.transfer.statistics import read
from lab.transfer.tails import checksum, labelled, spread_over_groups
from lab.transfer.tasks import seed_of


@dataclass(frozen=True)
class Preset:
    """Sizes."""

    train: int  # texts of each labelled set to fit its read-out on (and tune)
    validation: int  # ... to choose alpha on
    test: int  # ... to report on
    documents: tuple[int, int]  # of prose: validation, test
    length: int  # of documents, in tokens
    steps: int
    batch: int
    grid: tuple[float, ...]  # values of alpha
    permutations: int  # random orders of the lambdas
    seeds: int  # of tuning
    frozen: tuple[float, ...]  # shares of the blocks that the control "frozen" leaves as they are


_TENTHS = tuple(i / 10 for i in range(10, -1, -1))
PRESETS = {
    "quick": Preset(64, 20, 32, (8, 12), 24, 16, 8, (1.0, 0.75, 0.5, 0.25, 0.0), 3, 1, (0.5,)),
    "standard": Preset(256, 100, 200, (40, 80), 48, 60, 16, _TENTHS, 20, 3, (0.25, 0.5, 0.75)),
}
COLUMNS = {
    "seed": "of tuning", "method": "way to scale, see run", "order": "number of the permutation, else -1",
    "alpha": "of the ramp or the constant; of frozen the share of blocks; else nan", "set": "data set",
    "role": "target or control",
    "n_items": "number of test texts", "metric": "accuracy; nll in nats", "value": "of the metric, on test texts",
    "measure": "score: 2 x target / tuned target + control; target: accuracy; control: mean of accuracy / untouched; nll: <set>",
    "estimate": "of the measure; a text counts by its mean over seeds", "n_texts": "number of test texts",
    "low": "of a 95 % bootstrap over groups of texts (documents), each set by itself, nets as they are", "high": "see low",
    "n_groups": "number of their groups", "other": "method that is subtracted from lines", "difference": "lines minus other",
    "p": "bootstrap, two-sided", "p_holm": "p, Holm-corrected over the methods of a measure", "family": "method with a choice",
    "target": "normalised accuracy, 1 = tuned", "control": "normalised accuracy, 1 = untouched", "score": "2 x target + control",
    "chosen": "whether this value of alpha was, on validation texts", "example": "name of the text", "group": "its group",
    "accuracy": "of the text: 0 or 1; of a document: share of its next tokens", "nll": "mean over its tokens, nats",
    "block": "number of the block, -1: outside", "tau": "size of the update (Euclidean)", "theta_0": "size of the weights",
    "ratio": "tau / theta_0",
}  # fmt: skip
PROSE = "prose"
_READ_OUT_C = 0.01  # inverse strength of its L2 penalty, on standardised states: many more dimensions than texts


def published() -> pd.DataFrame:
    """Numbers of LiNeS as published: accuracy in percent, no intervals. CLIP on pictures: compare signs, not sizes."""
    return pd.DataFrame(**read("published_lines.json"))


# --- the experiment -------------------------------------------------------------------------------------------------


def run(
    model: TransformerBridge, target_data: str | pd.DataFrame, control_data: Sequence[str | pd.DataFrame] = (PROSE,),
    preset: str = "quick", *, seed: int = 0, seeds: int | None = None, steps: int | None = None, rate: float = 5e-4,
    head: str = "random", grid: Sequence[float] | None = None, permutations: int | None = None,
    frozen: Sequence[float] | None = None, sizes: Mapping[str, Any] | None = None, draws: int = 2000, resume: bool = True,
    progress: bool = True,
) -> Result:  # fmt: skip
    """Tune a copy of a language model on a small task, scale the update in several ways, and measure target and controls.

    A labelled set is scored by a linear read-out of the last states, made on the untouched model and then fixed, as CLIP's
    heads are; prose by next tokens. "lines" (theta_0 + lambda_l tau_l, lambda_l = alpha + (1 - alpha) (l - 1) / (L - 1); alpha
    outside the blocks), "reversed" (the ramp upside down), "wise_ft" (one constant) and "frozen" (tuned again with the
    embedding and the first blocks left as they are) are chosen by score on the same validation texts, the first of equals.
    Beside them: "ramp_only" (alpha 0), "same_norm" (a constant, the update as long as that of "lines"), "permuted" (random orders
    of its lambdas, and its alpha, which favours it). It says which keeps more, not that early blocks hold general features.

    Args:
        target_data, control_data: names, or tables with columns example, text, label (0/1) and group; a control may be prose.
        seeds, steps, grid, permutations, frozen, sizes: instead of the preset's (`Preset`); frozen empty: without it.
        head: the target's read-out: "random" (one direction: tuning has something to learn) or "fitted" (as for controls).
    """
    given = {"seeds": seeds, "steps": steps, "grid": grid, "frozen": frozen, "permutations": permutations}
    chosen = _sizes(preset, {**given, **(sizes or {})})
    seed, head = require.seed(seed), require.one_of("head", head, ("random", "fitted"))
    rate, draws = require.number("rate", rate, above=0), require.whole("draws", draws, 1)
    control_data = require.listed("control_data", control_data, "data sets", least=1)  # else nothing can be forgotten
    tasks = [_Task(model, data, chosen, seed, place) for place, data in enumerate((target_data, *control_data))]
    if tasks[0].prose:
        raise ValueError("target_data has no labels: the target is a labelled set, prose can only be a control")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"data sets {names}: each can be there once, the target is no control")
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own),
        "dataset": names[0], "controls": names[1:], "preset": preset, **asdict(chosen), "seed": seed,
        "rate": rate, "head": head, "draws": draws,
        "texts": checksum(frame for task in tasks for frame in task.frames.values()), "versions": versions(),
    }  # fmt: skip
    n_layers = model.cfg.n_layers
    if whole := [share for share in chosen.frozen if round(share * n_layers) in (0, n_layers)]:
        raise ValueError(f"frozen={whole}: of {n_layers} blocks that is none or all; pass other shares")
    net = models.plain_twin(model)
    found = dict(net.base_model.named_parameters())
    scaled(found, found, constant(n_layers, 1.0))  # are all blocks found by name?
    parts = study(
        work, [{"seed": one} for one in range(seed, seed + chosen.seeds)], kept=keep(work, {"model": own}, resume=resume),
        known={name: value for name, value in parameters.items() if name not in ("preset", "seed", "seeds", "draws")},
        shared={"net": net, "tasks": tasks, "sizes": chosen, "rate": rate, "head": head}, describe="tuning seeds",
        progress=progress,
    )  # fmt: skip
    table, tables = update_scaling.by_run(joined(parts)[0]), joined(parts)[1]
    summary, tables["differences"], tables["permutations"] = update_scaling.statistics(
        tables["items"], names, draws, seed
    )
    return Result("tuned_scaling", table, summary, parameters, tables).described(COLUMNS)


def _sizes(preset: str, changes: Mapping[str, Any]) -> Preset:
    known = asdict(PRESETS[require.one_of("preset", preset, PRESETS)])
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"there is no size {', '.join(unknown)}; sizes are {', '.join(known)}")
    chosen = known | {name: value for name, value in changes.items() if value is not None}
    least = {"train": 2, "validation": 2, "test": 2, "length": 2, "steps": 1, "batch": 1, "seeds": 1, "permutations": 0}
    found: dict[str, Any] = {name: require.whole(name, chosen[name], bound) for name, bound in least.items()}
    found["documents"] = tuple(require.wholes("documents", chosen["documents"], 1, None, least=2, twice=True))
    found["grid"] = tuple(require.numbers("grid", chosen["grid"], low=0, high=1, once=True))
    found["frozen"] = tuple(require.numbers("frozen", chosen["frozen"], above=0, below=1, least=0, once=True))
    return Preset(**found)


# --- one data set ---------------------------------------------------------------------------------------------------


class _Task:
    """Texts of one set in three parts that share no group (prose: two), as tokens, and how they are scored."""

    def __init__(
        self, model: TransformerBridge, data: str | pd.DataFrame, sizes: Preset, seed: int, place: int
    ) -> None:
        self.name = data if isinstance(data, str) else f"your data {place}"
        self.prose = data == PROSE if isinstance(data, str) else "label" not in data
        rng = np.random.default_rng(seed_of("texts", seed, self.name))
        if self.prose:
            frame = datasets.load(data) if isinstance(data, str) else datasets.as_prose(data, name=self.name)
            parts = _prose_parts(frame, self.name, sizes, rng)
        else:
            parts = _labelled_parts(labelled(data, self.name)[0], sizes, seed)
        self.frames = {part: spread_over_groups(rows, count, rng) for part, (rows, count) in parts.items()}
        self.ids, self.last = {}, {}
        for part, rows in self.frames.items():
            tokens = tokenize(model, rows.text.tolist())
            self.ids[part], self.last[part] = tokens.ids, torch.as_tensor(last_positions(tokens))
            if self.prose:
                self.ids[part] = tokens.ids[:, : sizes.length]
                for short in np.flatnonzero(tokens.lengths < sizes.length):
                    read = f"{tokens.lengths[short]} tokens, and length={sizes.length} are read of each"
                    remedy = "leave it out or pass a smaller length in sizes"
                    raise ValueError(f"{self.name}: document {rows.example.iloc[short]!r} has {read}: {remedy}")
        self.weight, self.bias = torch.zeros(0), torch.zeros(())

    def states(self, net: Any, part: str, rows: torch.Tensor) -> torch.Tensor:
        """After the final norm, at each text's last token: [text, d_model]."""
        last = self.last[part][rows]
        # padded on the right, and attention looks to the left: no mask is needed, what lies behind is never seen
        out = net.base_model(input_ids=self.ids[part][rows, : int(last.max()) + 1], use_cache=False)
        return out.last_hidden_state[torch.arange(len(rows)), last]

    def make_read_out(self, net: Any, head: str) -> None:
        """From states of the training texts; standardising is folded into weight and bias."""
        with torch.inference_mode():
            parts = [self.states(net, "train", rows) for rows in self._batches("train")]
        states = torch.cat(parts).double().numpy()
        mean, spread = states.mean(0), states.std(0) + 1e-6
        if head == "random":
            direction, start = np.random.default_rng(seed_of("head", self.name)).standard_normal(len(mean)), 0.0
            direction /= ((states - mean) / spread @ direction).std()  # logits of spread 1
        else:
            labels = self.frames["train"].label.to_numpy()[torch.cat(self._batches("train")).numpy()]
            fitted = LogisticRegression(C=_READ_OUT_C, max_iter=1000).fit((states - mean) / spread, labels)
            direction, start = fitted.coef_[0], fitted.intercept_[0]
        weight = direction / spread
        self.weight = torch.tensor(weight, dtype=parts[0].dtype)
        self.bias = torch.tensor(start - mean @ weight, dtype=parts[0].dtype)

    def _batches(self, part: str, size: int = 16) -> list[torch.Tensor]:
        """Texts of like length together: no time is lost on padding."""
        return list(torch.argsort(self.last[part], stable=True).split(size))

    def loss(self, net: Any, rows: torch.Tensor) -> torch.Tensor:
        """Mean logistic loss (nats) of the read-out on training texts."""
        labels = torch.tensor(self.frames["train"].label.to_numpy()[rows.numpy()])
        logits = self.states(net, "train", rows) @ self.weight + self.bias
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def score(self, net: Any, part: str) -> np.ndarray:
        """Accuracy and nll (nats) of each text, [2, text]; of a document: means over its next tokens."""
        found = np.empty((2, len(self.frames[part])))
        with torch.inference_mode():
            for rows in self._batches(part):
                if self.prose:
                    ids = self.ids[part][rows]
                    logits, labels = net(input_ids=ids[:, :-1], use_cache=False).logits, ids[:, 1:]
                else:
                    logit = self.states(net, part, rows) @ self.weight + self.bias
                    logits = torch.stack([torch.zeros_like(logit), logit], -1)[:, None]
                    labels = torch.tensor(self.frames[part].label.to_numpy()[rows.numpy()])[:, None]
                right = (logits.argmax(-1) == labels).double().mean(1)
                nll = -logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1).double().mean(1)
                found[:, rows.numpy()] = torch.stack([right, nll]).numpy()
        return found


def _labelled_parts(frame: pd.DataFrame, sizes: Preset, seed: int) -> dict[str, tuple[pd.DataFrame, int]]:
    """Groups fall into train, validation and test as 4 : 2 : 4; with the number of texts wanted."""
    found, rest = {}, frame
    for part, fraction in (("test", 0.4), ("validation", 1 / 3)):
        (mine,) = probes.group_splits(
            rest.label.to_numpy(), rest.group.to_numpy(str), repeats=1, test_fraction=fraction,
            seed=seed_of("split", part, seed) % 2**32,
        )  # fmt: skip
        found[part], rest = rest[mine], rest[~mine]
    found["train"] = rest
    return {part: (found[part], getattr(sizes, part)) for part in ("train", "validation", "test")}


def _prose_parts(
    frame: pd.DataFrame, name: str, sizes: Preset, rng: np.random.Generator
) -> dict[str, tuple[pd.DataFrame, int]]:
    groups = rng.permutation(frame.group.astype(str).unique())
    if len(groups) < 4:
        few = f"{name} has {len(groups)} groups of documents"
        raise ValueError(f"{few}: at least 4 are needed, to choose and to report on")
    validation = set(groups[: max(2, round(len(groups) * sizes.documents[0] / sum(sizes.documents)))])
    mine = frame.group.astype(str).isin(validation)
    return {"validation": (frame[mine], sizes.documents[0]), "test": (frame[~mine], sizes.documents[1])}


# --- one tuning seed ------------------------------------------------------------------------------------------------

_Score = Callable[[Scales | float, str], list[np.ndarray]]


def work(*, seed: int, net: Any, tasks: list[_Task], sizes: Preset, rate: float, head: str) -> Result:
    """Tune, choose alpha of each family on validation, score everything on test. The net is put back as it was."""
    body = net.base_model
    base = {name: value.detach().clone() for name, value in body.named_parameters()}
    n_layers = len({block_of(name) for name in base} - {None})
    try:
        for place, task in enumerate(tasks):
            if not task.prose:
                task.make_read_out(net, "fitted" if place else head)
        tuned = {}  # share of frozen blocks, to what its own tuning gave
        for share in (0.0, *sizes.frozen):
            tuned[share] = _tune(net, tasks[0], sizes, rate, seed, frozen=round(share * n_layers))
            _write(body, base)

        @functools.cache
        def score(scales: Scales | float, part: str) -> list[np.ndarray]:
            """[accuracy or nll, text] of each set, with scaled updates or with so large a share of the blocks frozen."""
            _write(body, scaled(base, tuned[0.0], scales) if isinstance(scales, Scales) else tuned[scales])
            return [task.score(net, part) for task in tasks]

        ways, grid = _ways(score, n_layers, sizes, tasks)
        lines, rng = ways["lines"][0], np.random.default_rng(seed_of("orders", seed))
        ways["same_norm"] = constant(n_layers, same_size(base, tuned[0.0], lines)), np.nan
        ways |= {f"permuted {order}": (permuted(lines, rng), np.nan) for order in range(sizes.permutations)}
        items = []
        for name, (scales, alpha) in ways.items():
            method, _, order = name.partition(" ")
            about = {"seed": seed, "method": method, "order": int(order or -1), "alpha": alpha}
            for place, (task, (accuracy, nll)) in enumerate(zip(tasks, score(scales, "test"), strict=True)):
                role, texts = "control" if place else "target", task.frames["test"][["example", "group"]]
                items.append(texts.assign(**about, set=task.name, role=role, accuracy=accuracy, nll=nll))
    finally:
        _write(body, base)
    tables = {
        "items": pd.concat(items, ignore_index=True), "grid": grid.assign(seed=seed)[["seed", *grid]],
        "update": update_scaling.update_sizes(base, tuned[0.0]).assign(seed=seed),
    }  # fmt: skip
    return Result("tuned_scaling", tables["items"], pd.DataFrame(), {}, tables)


def _ways(
    score: _Score, n_layers: int, sizes: Preset, tasks: Sequence[_Task]
) -> tuple[dict[str, tuple[Any, float]], pd.DataFrame]:
    """Ways to scale and their alpha, chosen on validation texts; and what each value scored there."""
    untouched, whole = constant(n_layers, 0.0), constant(n_layers, 1.0)
    families: dict[str, Callable[[float], Scales | float]] = {
        "lines": lambda x: ramp(n_layers, x),
        "reversed": lambda x: replace(ramp(n_layers, x), blocks=ramp(n_layers, x).blocks[::-1]),
        "wise_ft": lambda x: constant(n_layers, x),
        "frozen": lambda x: x,
    }
    at_best = [score(whole, "validation")[0], *score(untouched, "validation")[1:]]
    ways: dict[str, tuple[Any, float]] = {"untouched": (untouched, np.nan), "tuned": (whole, np.nan)}
    grid = []
    for family, make in families.items():
        values = sizes.frozen if family == "frozen" else sizes.grid
        rows = [(x, *_totals(score(make(x), "validation"), at_best, tasks)) for x in values]
        if rows:
            best = int(np.argmax([row[-1] for row in rows]))
            ways[family] = make(rows[best][0]), rows[best][0]
            grid += [(family, *row, place == best) for place, row in enumerate(rows)]
    columns = ["family", "alpha", "target", "control", "score", "chosen"]
    return {**ways, "ramp_only": (ramp(n_layers, 0.0), 0.0)}, pd.DataFrame(grid, columns=columns)


def _tune(net: Any, task: _Task, sizes: Preset, rate: float, seed: int, *, frozen: int = 0) -> Weights:
    """The body's weights after tuning on the target's training texts (AdamW, no decay: it would move the embedding of tokens
    that were never seen). Of `frozen` first blocks and the embedding the weights then stay as they are."""
    parameters = dict(net.base_model.named_parameters())
    embeddings = [module for module in net.base_model.modules() if isinstance(module, torch.nn.Embedding)]
    still = {id(value) for module in embeddings for value in module.parameters()} if frozen else set()
    trained = [
        value for name, value in parameters.items()
        if id(value) not in still and ((block := block_of(name)) is None or block >= frozen)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    count = len(task.frames["train"])
    recipe = Recipe(steps=sizes.steps, batch=min(sizes.batch, count), rate=rate)
    for step, rows in enumerate(replicas.orders([np.arange(count)], [seed_of("tune", seed)], recipe)[0]):
        replicas.descend(optimizer, trained, task.loss(net, rows), recipe.rate_at(step))
    return {name: value.detach().clone() for name, value in parameters.items()}


def _write(body: Any, weights: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            parameter.copy_(weights[name])


def _totals(
    scores: Sequence[np.ndarray], at_best: Sequence[np.ndarray], tasks: Sequence[_Task]
) -> tuple[float, float, float]:
    """Normalised target, mean of normalised controls, and 2 x the first + the second: what alpha is chosen by."""
    for name in [task.name for task, best in zip(tasks, at_best, strict=True) if best[0].mean() == 0]:
        raise ValueError(f"{name}: accuracy 0 before anything is scaled, so it is no unit: take another set")
    target, *controls = (found[0].mean() / best[0].mean() for found, best in zip(scores, at_best, strict=True))
    return float(target), float(np.mean(controls)), float(2 * target + np.mean(controls))
