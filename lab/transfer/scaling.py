"""Scale what tuning changed, less in early blocks than in late ones: is the target kept, and what was forgotten back?

    result = tuned_scaling.run(lab.load(), "sentiment_words")         # two minutes on one free core
    result.summary                                                    # each way to scale, on test texts, with intervals
    result.tables["differences"]                                      # LiNeS minus each control, paired by text

After LiNeS (Wang et al., arXiv 2410.17146): a model theta_0 is tuned to theta_1, tau = theta_1 - theta_0, and blocks
l = 1..L get theta_0 + lambda_l tau_l with lambda_l = alpha + (1 - alpha) (l - 1) / (L - 1); what is outside the blocks
(embedding, final norm) gets alpha. Here it is asked of a language model, with what the published work lacks: the same
lambdas reversed and in random order, one constant with the same size of update, intervals, and alpha chosen on texts that
are not reported on. What it does not show: that early blocks hold general features. It says which scaling keeps more of
these control tasks, after this tuning.
"""

import hashlib
import time
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
from lab.results import Result, keep, run_shards, versions
from lab.texts import last_positions, tokenize
from lab.transfer import scales as update_scaling
from lab.transfer.scales import Scales, Weights, block_of, constant, permuted, ramp, same_size, scaled
from lab.transfer.tails import spread_over_groups
from lab.transfer.tasks import seed_of


@dataclass(frozen=True)
class Preset:
    """Sizes. Texts of each labelled set to fit its read-out on (and tune), to choose alpha on, to report on; of prose
    (validation, test), cut to `length` tokens; tuning steps of `batch` texts; values of alpha; random orders of the lambdas;
    tuning seeds; shares of the blocks that the control "frozen" leaves as they are.
    """

    train: int
    validation: int
    test: int
    documents: tuple[int, int]
    length: int
    steps: int
    batch: int
    grid: tuple[float, ...]
    permutations: int
    seeds: int
    frozen: tuple[float, ...]


PRESETS = {
    "quick": Preset(64, 20, 32, (8, 12), 24, 16, 8, (1.0, 0.75, 0.5, 0.25, 0.0), 3, 1, (0.5,)),
    "standard": Preset(
        256, 100, 200, (40, 80), 48, 60, 16, tuple(i / 10 for i in range(10, -1, -1)), 20, 3, (0.25, 0.5, 0.75)
    ),
}
PROSE = "prose"
_READ_OUT_C = 0.01  # inverse strength of its L2 penalty, on standardised states: many more dimensions than texts


def published() -> pd.DataFrame:
    """Numbers of LiNeS as published: task, set, role, pretrained, tuned, lines (accuracy in percent), source.

    CLIP on pictures; no intervals were given. Ours are another model and other tasks: compare signs, not sizes.
    """
    notebook = "notebook of wang-kee/LiNeS at 43a7bdd: ViT-B/32 tuned on EuroSAT, alpha 0.1"
    second_hand = "arXiv 2410.17146 through a summary (second-hand): ViT-B/32, mean of 8 tasks"
    others = {
        "DTD": (44.0, 37.5, 43.8), "SUN397": (63.2, 52.6, 62.0), "MNIST": (48.3, 37.4, 55.5),
        "RESISC45": (60.7, 31.0, 46.5), "GTSRB": (32.6, 25.6, 34.3), "Cars": (59.7, 46.7, 58.0), "SVHN": (31.6, 18.5, 33.9),
    }  # fmt: skip
    rows = [
        ("mean of 8", "target", "target", np.nan, 90.5, 90.3, second_hand),
        ("mean of 8", "control", "control", 48.3, 38.0, 48.0, second_hand),
        ("EuroSAT", "EuroSAT", "target", np.nan, 99.87, 98.70, notebook),
        *(("EuroSAT", name, "control", *values, notebook) for name, values in others.items()),
    ]
    return pd.DataFrame(rows, columns=["task", "set", "role", "pretrained", "tuned", "lines", "source"])


# --- the experiment -------------------------------------------------------------------------------------------------


def run(
    model: TransformerBridge,
    target_data: str | pd.DataFrame,
    control_data: Sequence[str | pd.DataFrame] = (PROSE,),
    preset: str = "quick",
    *,
    seed: int = 0,
    seeds: int | None = None,
    steps: int | None = None,
    rate: float = 5e-4,
    head: str = "random",
    grid: Sequence[float] | None = None,
    permutations: int | None = None,
    frozen: Sequence[float] | None = None,
    sizes: Mapping[str, Any] | None = None,
    draws: int = 2000,
    resume: bool = True,
    progress: bool = True,
) -> Result:
    """Tune a whole language model on a small task, scale the update in several ways, and measure target and controls.

    A labelled set is scored by a linear read-out of the model's last states (after the final norm, at the last token) that
    is made once, on the untouched model, and fixed from then on, as CLIP's heads are. For a control it is a logistic
    regression. For the target `head` says what it is, and tuning trains the body for it: all blocks, embedding and final
    norm (AdamW, rate rising and falling, no decay: it would move the embedding of tokens that were never seen). Prose is
    scored by next tokens. Nothing is tuned on a control set.

    Each of "lines", "reversed" (the ramp upside down) and "wise_ft" (one constant) has its alpha chosen on the same
    validation texts with the same number of evaluations, by 2 x target / tuned target + mean over control sets of control /
    untouched control (accuracies); the first of equals in the order of `grid`. They are reported on test texts, beside
    "untouched", "tuned", "ramp_only" (alpha 0), "same_norm" (a constant; the update as long as that of "lines") and
    "permuted" (the lambdas of "lines" in random order over blocks, mean over the orders; alpha is that of "lines", which
    favours "lines" a little) and "frozen" (tuned once more from the start, with the embedding and the first blocks left as
    they are: forgetting prevented, not undone; how many is chosen on validation like alpha, among fewer values, as each takes a
    tuning, and in "quick" there is one).

    Args:
        model: from `lab.load`, or a Bridge of your own. It is not changed: a copy of it, as it is in memory, is tuned.
        target_data: a concept data set's name, or a table with columns example, text, label (0/1) and group.
        control_data: names or tables as above, or "prose" or a table with `text` and without labels: next tokens.
        preset: quick or standard, sizes in `PRESETS`.
        seed: of the choice of texts; the first of the tuning seeds (order of the batches).
        seeds, steps, grid, permutations, frozen: instead of the preset's. grid: values of alpha in [0, 1], each once.
            frozen: shares of the blocks, between 0 and 1; empty: without this control.
        rate: of AdamW, at its highest.
        head: the target's read-out. "random": one random direction, so that tuning has something to learn, as with a
            fresh classifier; the untouched model is at chance up to the luck of that direction (its row in `.table`).
            "fitted": a logistic regression, as for controls; where that is near the ceiling, tuning cannot help and the
            best alpha may be to leave the model alone.
        sizes: other fields of `Preset`, by name.
        draws: of the bootstrap.
        resume: keep finished tuning seeds under the cache folder.
        progress: print an estimate and show a bar.

    Returns:
        Result with
        `.table`: seed, method, alpha (nan where there is none; of "frozen" the share), order (number of the permutation, else
            -1), set, role (target, control), n_items, metric (accuracy; nll in nats), value: on test texts.
        `.summary`: method, measure ("score", "target", "control", and "nll: <set>"), estimate, low, high, n_texts, n_groups.
            score as above, with test accuracies; control: mean of the normalised ones (1 = untouched).
        `.tables`: "differences": lines minus each other method, by measure, with low, high, p (bootstrap, two-sided) and
            p_holm (over the methods of one measure); "grid": seed, family, alpha (of "frozen": the share), target,
            control, score on validation, chosen; "items": seed, method, order, set, example, group, accuracy, nll; "update":
            seed, block (-1: outside), size of tau and of theta_0 (Euclidean), their ratio; "permutations": seed, order,
            score, target, control of test, and of "lines".

    Raises:
        ValueError: unknown preset or size, a grid outside [0, 1], data that cannot be split, too short documents, a model
            whose blocks are not found by name; all before anything is tuned.

    Intervals resample groups of test texts (of a prose set: documents), independently for each set, with the tuned nets as
    they are: with several seeds, a text counts by its mean over seeds, and another tuning seed may differ by more.
    A control that the untouched model does not do above chance says nothing: look at its row "untouched" in `.table`.
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
        "texts": hashlib.sha256("\n".join(t.all_texts for t in tasks).encode()).hexdigest(), "versions": versions(),
    }  # fmt: skip
    known = {name: value for name, value in parameters.items() if name not in ("preset", "seeds", "draws")}
    kept = keep(_shard, {"model": own}, resume=resume)
    whole = [share for share in chosen.frozen if round(share * model.cfg.n_layers) in (0, model.cfg.n_layers)]
    if whole:
        raise ValueError(f"frozen={whole}: of {model.cfg.n_layers} blocks that is none or all; pass other shares")
    net = models.plain_twin(model)
    found = dict(net.base_model.named_parameters())
    scaled(found, found, constant(model.cfg.n_layers, 1.0))  # are all blocks found by name?
    shards = [
        {"net": net, "tasks": tasks, "sizes": chosen, "rate": rate, "head": head, "seed": one, "progress": progress,
         "key": kept.key({**known, "tuning_seed": one})}
        for one in range(seed, seed + chosen.seeds)
    ]  # fmt: skip
    parts = run_shards(_shard, shards, folder=kept.folder, describe="tuning seeds", progress=progress)
    tables = {
        name: pd.concat([part.tables[name] for part in parts], ignore_index=True)
        for name in ("items", "grid", "update")
    }
    table = update_scaling.by_run(tables["items"])
    summary, tables["differences"], tables["permutations"] = update_scaling.statistics(
        tables["items"], names, draws, seed
    )
    return Result("tuned_scaling", table, summary, parameters, tables)


def _sizes(preset: str, changes: Mapping[str, Any]) -> Preset:
    known = asdict(PRESETS[require.one_of("preset", preset, PRESETS)])
    unknown = sorted(set(changes) - set(known))
    if unknown:
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
        named = isinstance(data, str)
        self.name = data if isinstance(data, str) else f"your data {place}"
        self.prose = data == PROSE if isinstance(data, str) else "label" not in data
        frame = datasets.load(data) if isinstance(data, str) else data
        if self.prose:
            frame = frame if named else datasets.as_prose(frame, name=self.name)
        else:
            datasets.check_concept_data(frame, name=self.name)
        rng = np.random.default_rng(seed_of("texts", seed, self.name))
        self.frames = (
            self._prose_parts(frame, sizes, rng) if self.prose else self._labelled_parts(frame, sizes, rng, seed)
        )
        self.ids, self.last = {}, {}
        for part, rows in self.frames.items():
            tokens = tokenize(model, rows.text.tolist())
            self.ids[part], self.last[part] = tokens.ids, torch.as_tensor(last_positions(tokens))
            if self.prose:
                short = np.flatnonzero(tokens.lengths < sizes.length)
                if len(short):
                    example = rows.example.iloc[short[0]]
                    raise ValueError(
                        f"{self.name}: document {example!r} has {tokens.lengths[short[0]]} tokens, and length={sizes.length} are "
                        "read of each: leave it out or pass a smaller length in sizes"
                    )
                self.ids[part] = tokens.ids[:, : sizes.length]
        self.weight, self.bias = torch.zeros(0), torch.zeros(())

    @property
    def all_texts(self) -> str:
        return "\n".join(f"{part}: {text}" for part, frame in self.frames.items() for text in frame.text)

    def _labelled_parts(
        self, frame: pd.DataFrame, sizes: Preset, rng: np.random.Generator, seed: int
    ) -> dict[str, pd.DataFrame]:
        """Groups fall into train, validation and test as 4 : 2 : 4."""
        found, rest = {}, frame
        for part, fraction in (("test", 0.4), ("validation", 1 / 3)):
            splits = probes.group_splits(
                rest.label.to_numpy(), rest.group.to_numpy(str), repeats=1, test_fraction=fraction,
                seed=seed_of("split", part, seed) % 2**32,
            )  # fmt: skip
            found[part], rest = rest[splits[0]], rest[~splits[0]]
        found["train"] = rest
        wanted = {"train": sizes.train, "validation": sizes.validation, "test": sizes.test}
        return {part: spread_over_groups(found[part], count, rng) for part, count in wanted.items()}

    def _prose_parts(self, frame: pd.DataFrame, sizes: Preset, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
        groups = rng.permutation(frame.group.astype(str).unique())
        if len(groups) < 4:
            raise ValueError(
                f"{self.name} has {len(groups)} groups of documents: at least 4 are needed, to choose and to report on"
            )
        validation = set(groups[: max(2, round(len(groups) * sizes.documents[0] / sum(sizes.documents)))])
        mine = frame.group.astype(str).isin(validation)
        parts = {"validation": frame[mine], "test": frame[~mine]}
        return {
            part: spread_over_groups(rows, count, rng)
            for (part, rows), count in zip(parts.items(), sizes.documents, strict=True)
        }

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


# --- one tuning seed ------------------------------------------------------------------------------------------------


def _shard(
    *, net: Any, tasks: list[_Task], sizes: Preset, rate: float, head: str, seed: int, progress: bool, key: str = ""
) -> Result:
    """Tune, choose alpha of each family on validation, score everything on test. The net is put back as it was."""
    body = net.base_model
    base = {name: value.detach().clone() for name, value in body.named_parameters()}
    n_layers = len({block_of(name) for name in base} - {None})
    known: dict[tuple[Scales | float, str], list[np.ndarray]] = {}
    apart: dict[float, Weights] = {}  # share of frozen blocks, to what its own tuning gave

    def score(scales: Scales | float, part: str) -> list[np.ndarray]:
        """[accuracy or nll, text] of each set, with scaled updates or with so large a share of the blocks frozen."""
        if (scales, part) not in known:
            _write(body, scaled(base, tuned, scales) if isinstance(scales, Scales) else apart[scales])
            known[scales, part] = [task.score(net, part) for task in tasks]
        return known[scales, part]

    try:
        for place, task in enumerate(tasks):
            if not task.prose:
                task.make_read_out(net, "fitted" if place else head)
        tuned = _tune(net, tasks[0], sizes, rate, seed, progress)
        for share in sizes.frozen:
            _write(body, base)
            apart[share] = _tune(net, tasks[0], sizes, rate, seed, progress, frozen=round(share * n_layers))
        families: dict[str, Callable[[float], Scales | float]] = {
            "lines": lambda x: ramp(n_layers, x),
            "reversed": lambda x: replace(ramp(n_layers, x), blocks=ramp(n_layers, x).blocks[::-1]),
            "wise_ft": lambda x: constant(n_layers, x),
            "frozen": lambda x: x,
        }
        untouched, whole = constant(n_layers, 0.0), constant(n_layers, 1.0)
        at_best = [score(whole, "validation")[0], *score(untouched, "validation")[1:]]
        scale_of: dict[str, Scales | float] = {"untouched": untouched, "tuned": whole}
        alpha_of, grid = {}, []
        for family, make in families.items():
            values = sizes.frozen if family == "frozen" else sizes.grid
            if not values:
                continue
            rows = [(x, *_totals(score(make(x), "validation"), at_best, tasks)) for x in values]
            best = int(np.argmax([row[-1] for row in rows]))
            scale_of[family], alpha_of[family] = make(rows[best][0]), rows[best][0]
            grid += [(seed, family, *row, place == best) for place, row in enumerate(rows)]
        scale_of["ramp_only"], alpha_of["ramp_only"] = ramp(n_layers, 0.0), 0.0
        lines = ramp(n_layers, alpha_of["lines"])
        scale_of["same_norm"] = constant(n_layers, same_size(base, tuned, lines))
        order_of = {name: -1 for name in scale_of}
        rng = np.random.default_rng(seed_of("orders", seed))
        for order in range(sizes.permutations):
            scale_of[f"permuted {order}"], order_of[f"permuted {order}"] = permuted(lines, rng), order
        items = []
        for name, scales in scale_of.items():
            for place, (task, (accuracy, nll)) in enumerate(zip(tasks, score(scales, "test"), strict=True)):
                items.append(
                    task.frames["test"][["example", "group"]].assign(
                        seed=seed, method=name.split()[0], order=order_of[name], alpha=alpha_of.get(name, np.nan),
                        set=task.name, role="control" if place else "target", accuracy=accuracy, nll=nll,
                    )
                )  # fmt: skip
    finally:
        _write(body, base)
    columns = ["seed", "family", "alpha", "target", "control", "score", "chosen"]
    tables = {
        "items": pd.concat(items, ignore_index=True), "grid": pd.DataFrame(grid, columns=columns),
        "update": update_scaling.update_sizes(base, tuned).assign(seed=seed),
    }  # fmt: skip
    return Result("tuned_scaling", tables["items"], pd.DataFrame(), {"key": key}, tables)


def _tune(net: Any, task: _Task, sizes: Preset, rate: float, seed: int, progress: bool, *, frozen: int = 0) -> Weights:
    """The body's weights after tuning on the target's training texts; its read-out stays as it is.

    frozen: so many of the first blocks keep their weights, and the embedding does.
    """
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
    began = time.perf_counter()
    for step, rows in enumerate(replicas.orders([np.arange(count)], [seed_of("tune", seed)], recipe)[0]):
        gradients = torch.autograd.grad(task.loss(net, rows), trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        optimizer.step()
        if step == min(2, sizes.steps - 1) and progress:
            took = (time.perf_counter() - began) / (step + 1)
            print(f"Seed {seed}: {took * sizes.steps:.0f} s of tuning, {sizes.steps} steps; then scores, longer.")
    for parameter in trained:
        parameter.grad = None
    return {name: value.detach().clone() for name, value in parameters.items()}


def _write(body: Any, weights: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            parameter.copy_(weights[name])


def _totals(
    scores: Sequence[np.ndarray], at_best: Sequence[np.ndarray], tasks: Sequence[_Task]
) -> tuple[float, float, float]:
    """Normalised target, mean of normalised controls, and 2 x the first + the second: what alpha is chosen by."""
    for task, best in zip(tasks, at_best, strict=True):
        if best[0].mean() == 0:
            raise ValueError(
                f"{task.name}: accuracy 0 before anything is scaled, so it cannot serve as a unit: take another set"
            )
    target, *controls = (found[0].mean() / best[0].mean() for found, best in zip(scores, at_best, strict=True))
    return float(target), float(np.mean(controls)), float(2 * target + np.mean(controls))
