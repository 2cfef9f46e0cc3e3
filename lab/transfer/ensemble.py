"""A large model's states at several depths and a small model of one's own, read together: does that help on shifted data?

    result = layer_ensemble.run(lab.load(), "sentiment_words", "reviews")   # a minute on one core
    result.summary                                                          # every net on like and on shifted texts

The idea is LEVI's (arXiv 2402.04644): a tuned large model carries what it was pretrained on, a small model trained from
scratch knows the task alone, and an ensemble over layers with one loss may lean on either less. How the original chooses
layers and combines predictions is not known to us, and we found no code: WHAT IS BUILT HERE IS OUR OWN MINIMAL DESIGN, and
its numbers say nothing about theirs. It is: frozen states h of depths L/4, L/2, 3L/4, L at the last token; a small causal
transformer on the same tokens with last state g; for each depth an adapter, linear on [h ; g], ReLU, linear to logits; the
mean of the adapters' logits; one cross-entropy on that mean. Beside it stands every part alone, with as many trained
weights as the whole.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import nn
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, models, probes, require, statistics
from lab.nets import replicas
from lab.nets.replicas import Recipe
from lab.results import Result, versions
from lab.states import collect_states
from lab.texts import last_positions, tokenize
from lab.transfer.scaling import spread_over_groups
from lab.transfer.tasks import seed_of

TREATMENTS = {
    "levi": "adapters on [h ; g] at all depths, logits averaged, one loss",
    "random_lm": "the same on the states of the model with random weights",
    "lm_only": "adapters on h alone",
    "lm_only_wide": "the same, wide enough for as many trained weights as levi",
    "small_only": "the small model alone",
    "small_only_wide": "the same, with an MLP wide enough for as many trained weights",
    "last_depth": "one adapter on [h ; g] at depth L, wide enough for as many trained weights",
    "logit_average": "mean of the logits of lm_only and small_only, trained apart",
}
COLUMNS = {
    "seed": "of the fresh weights and the order of batches",
    "treatment": "see `TREATMENTS`; in the summary also majority and bag_of_words, which need no model",
    "test": "texts tested on: like (those trained on) or shifted",
    "metric": "accuracy, 0 to 1, or nll in nats",
    "value": "of the metric, mean over the tested texts",
    "rate": "learning rate; nan for logit_average, which is not trained itself",
    "trained_weights": "number of weights that are trained",
    "accuracy": "share of the tested texts that are told right, 0 to 1; a text counts by its mean over seeds",
    "low": "lower end of the 95 % interval, bootstrap over groups of tested texts, nets as they are",
    "high": "upper end of that interval",
    "seed_sd": "standard deviation of the accuracy over seeds; nan for one seed and without nets",
    "nll": "mean over tested texts and seeds, nats; nan without nets",
    "n_texts": "number of tested texts",
    "n_groups": "number of their groups",
    "other": "treatment that is subtracted from levi",
    "difference": "accuracy of levi minus that of the other",
    "p": "of the difference: bootstrap, two-sided",
    "p_holm": "p, Holm-corrected over the others of one test",
    "example": "name of the text",
    "group": "its group: texts of one are never both trained on and tested",
    "label": "its class, 0 or 1",
    "log_odds": "of label 1, by this net; nats",
    "choice.rate": "learning rate that was tried",
    "choice.nll": "mean over the validation texts, nats",
    "chosen": "whether this rate was chosen: the least nll",
}
_PADDING, _UNKNOWN = 0, 1
_DECAY = 0.01


@dataclass(frozen=True)
class Preset:
    """Sizes: texts to train on, to choose the learning rate on, to test on (like, and shifted); steps; rates; seeds."""

    train: int
    validation: int
    test: int
    shifted: int
    steps: int
    rates: tuple[float, ...]
    seeds: int
    batch: int = 16


PRESETS = {
    "quick": Preset(96, 24, 40, 56, 80, (1e-3, 3e-3), 2),
    "standard": Preset(400, 80, 200, 300, 400, (3e-4, 1e-3, 3e-3), 5),
}


# --- the nets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """n_depths: adapters, one a depth of the large model (0: none). small: whether g is there. hidden: width of an adapter;
    mlp: of the small model's MLPs; d_small: of its stream."""

    n_depths: int
    small: bool
    d_model: int
    n_tokens: int
    hidden: int = 64
    mlp: int = 128
    d_small: int = 64


class SmallModel(nn.Module):
    """Two causal pre-norm blocks (torch's encoder layer); gives the normed state at the last token, [text, d_small].

    No positions: a longer text would meet untrained ones. Causal attention alone lets order through.
    """

    def __init__(self, n_tokens: int, d_small: int, mlp: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d_small)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d_small, 2, mlp, dropout=0.0, norm_first=True, batch_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(d_small)

    def forward(
        self, ids: Int[torch.Tensor, "text position"], last: Int[torch.Tensor, " text"]
    ) -> Float[torch.Tensor, "text d_small"]:
        """ids are padded on the right; what lies behind `last` is never seen."""
        stream = self.embedding(ids)
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        for block in self.blocks:
            stream = block(stream, src_mask=later)
        return self.norm(stream[torch.arange(len(ids)), last])


class Ensemble(nn.Module):
    """Adapters over depths and the small model, or one of the two; logits are the mean over adapters."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        if not design.n_depths and not design.small:
            raise ValueError("a net needs depths or the small model: pass n_depths of 1 or more, or small=True")
        self.design = design
        self.small = SmallModel(design.n_tokens, design.d_small, design.mlp) if design.small else None
        width = design.d_model + design.d_small * design.small
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(width, design.hidden), nn.ReLU(), nn.Linear(design.hidden, 2))
            for _ in range(design.n_depths)
        )
        self.head = None if design.n_depths else nn.Linear(design.d_small, 2)

    def forward(
        self,
        states: Float[torch.Tensor, "text depth d_model"],
        ids: Int[torch.Tensor, "text position"],
        last: Int[torch.Tensor, " text"],
    ) -> Float[torch.Tensor, "text 2"]:
        """Logits. Where there are fewer adapters than depths in `states`, they read the last ones."""
        g = self.small(ids, last) if self.small is not None else None
        if self.head is not None:
            return self.head(g)
        read = states[:, states.shape[1] - len(self.adapters) :].unbind(1)
        inputs = [h if g is None else torch.cat([h, g], -1) for h in read]
        return torch.stack([adapter(x) for adapter, x in zip(self.adapters, inputs, strict=True)]).mean(0)


def n_weights(design: Design) -> int:
    """How many weights of a net are trained: all of them; the large model is frozen and not among them."""
    return sum(parameter.numel() for parameter in Ensemble(design).parameters())


def designs(n_depths: int, d_model: int, n_tokens: int) -> dict[str, Design]:
    """What is trained in each treatment; those of equal size have as many weights as "levi", to 1 %.

    >>> found = designs(4, 96, 50)
    >>> [round(n_weights(found[name]) / n_weights(found["levi"]), 2) for name in ("lm_only_wide", "last_depth")]
    [1.0, 1.0]
    """
    levi = Design(n_depths, True, d_model, n_tokens)
    wanted = n_weights(levi)
    lm, small = replace(levi, small=False), replace(levi, n_depths=0)
    return {
        "levi": levi,
        "random_lm": levi,
        "lm_only": lm,
        "lm_only_wide": _widened(lm, "hidden", wanted),
        "small_only": small,
        "small_only_wide": _widened(small, "mlp", wanted),
        "last_depth": _widened(replace(levi, n_depths=1), "hidden", wanted),
    }


def _widened(design: Design, width: str, wanted: int) -> Design:
    """The design with the width (hidden, mlp) at which it has as many weights as wanted: their number is linear in it."""

    def at(value: int) -> Design:
        return replace(design, hidden=value) if width == "hidden" else replace(design, mlp=value)

    one, two = n_weights(at(1)), n_weights(at(2))
    return at(max(1, 1 + round((wanted - one) / (two - one))))


# --- the experiment -------------------------------------------------------------------------------------------------


def run(
    model: TransformerBridge,
    train_data: str | pd.DataFrame,
    test_data: str | pd.DataFrame,
    preset: str = "quick",
    *,
    seed: int = 0,
    seeds: int | None = None,
    steps: int | None = None,
    rates: Sequence[float] | None = None,
    draws: int = 2000,
    progress: bool = True,
) -> Result:
    """Train LEVI's minimal version and its controls on one set, and test them on texts like it and on shifted ones.

    Groups of `train_data` fall into training, validation and test. All nets see the same batches in the same order, and
    begin with the same small model where they have one of the same width. The learning rate is chosen by validation loss
    (texts like those trained on), for each treatment and seed among the same rates. States are standardised by the training
    texts' mean and spread. The small model knows the tokens that stand in two or more training texts; all others are one
    "unknown", whose embedding is thereby trained.

    Args:
        model: from `lab.load`, or a Bridge of your own; frozen, not changed.
        train_data: a concept data set's name, or a table with columns example, text, label (0/1) and group.
        test_data: the like, with the same meaning of labels and another topic, template or length. Groups that were
            trained on or chosen with are left out (`parameters["left_out"]` texts).
        preset: quick or standard, sizes in `PRESETS`.
        seed: of the choice of texts and of the random model; first of the training seeds.
        seeds, steps, rates: instead of the preset's.
        draws: of the bootstrap.
        progress: show bars.

    Returns:
        Result with the scores of each net, and all treatments and text baselines as summary. `.tables`: "differences" (levi
        against the others), "items" (each text and net) and "choice" (of the learning rate).

    Raises:
        ValueError: unknown preset, unusable data, a model of fewer than 4 blocks, nothing left of the shifted texts.

    Intervals resample groups of test texts; a text counts by its mean over seeds of the fresh weights, so they do not cover
    another seed (`seed_sd` shows how much that matters), another training set, or another shift.
    """
    chosen = _sizes(preset, seeds, steps, rates)
    seed, draws = require.seed(seed), require.whole("draws", draws, 1)
    n_layers = model.cfg.n_layers
    if n_layers < 4:
        raise ValueError(f"this model has {n_layers} blocks: depths L/4, L/2, 3L/4 and L need at least 4")
    depths = [round(n_layers * share) for share in (0.25, 0.5, 0.75, 1)]
    frames, left_out, names = _frames(train_data, test_data, chosen, seed)
    frame = pd.concat([part.assign(part=name) for name, part in frames.items()], ignore_index=True)
    texts = _Texts(model, frame, depths, seed, progress)
    plan = designs(len(depths), model.cfg.d_model, texts.n_tokens)
    fitted: dict[tuple[int, str], tuple[np.ndarray, float]] = {}
    choice = []
    with tqdm(total=chosen.seeds * len(plan), desc="Training", disable=not progress, leave=False) as bar:
        for one in range(seed, seed + chosen.seeds):
            for name, design in plan.items():
                tries = [_train(design, texts, name == "random_lm", chosen, rate, one) for rate in chosen.rates]
                losses = [_nll(logits, texts, "validation") for logits in tries]
                best = int(np.argmin(losses))
                fitted[one, name] = tries[best], chosen.rates[best]
                choice += [(one, name, rate, losses[i], i == best) for i, rate in enumerate(chosen.rates)]
                bar.update()
            both = [fitted[one, name][0] for name in ("lm_only", "small_only")]
            fitted[one, "logit_average"] = (both[0] + both[1]) / 2, np.nan
    counts = {name: n_weights(design) for name, design in plan.items()}
    counts["logit_average"] = counts["lm_only"] + counts["small_only"]
    items = _items(frame, fitted)
    table = _by_run(items, {key: rate for key, (_, rate) in fitted.items()}, counts)
    summary, differences = _statistics(items, frame, counts, draws, seed)
    parameters = {
        **models.facts(model), "dataset": names[0], "shifted": names[1], "preset": preset, **asdict(chosen), "depths": depths,
        "seed": seed, "draws": draws, "n_tokens": texts.n_tokens, "unknown": texts.unknown(), "left_out": left_out,
        "texts": hashlib.sha256("\n".join(frame.part + frame.text.astype(str)).encode()).hexdigest(),
        "versions": versions(),
    }  # fmt: skip
    choice_table = pd.DataFrame(choice, columns=["seed", "treatment", "rate", "nll", "chosen"])
    tables = {"differences": differences, "items": items, "choice": choice_table}
    return Result("layer_ensemble", table, summary, parameters, tables).described(COLUMNS)


def _sizes(preset: str, seeds: int | None, steps: int | None, rates: Sequence[float] | None) -> Preset:
    chosen = PRESETS[require.one_of("preset", preset, PRESETS)]
    return replace(
        chosen,
        seeds=require.whole("seeds", chosen.seeds if seeds is None else seeds, 1),
        steps=require.whole("steps", chosen.steps if steps is None else steps, 1),
        rates=tuple(require.numbers("rates", chosen.rates if rates is None else rates, above=0)),
    )


def _frames(
    train_data: str | pd.DataFrame, test_data: str | pd.DataFrame, sizes: Preset, seed: int
) -> tuple[dict[str, pd.DataFrame], int, list[str]]:
    """Texts of each part, number of shifted texts left out, names of the two sets."""
    loaded, names = [], []
    for data, what in ((train_data, "your train_data"), (test_data, "your test_data")):
        frame, name = (datasets.load(data), data) if isinstance(data, str) else (data, what)
        datasets.check_concept_data(frame, name=name)
        loaded.append(frame.assign(group=frame.group.astype(str)))
        names.append(name)
    rest, shifted = loaded
    found, rng = {}, np.random.default_rng(seed_of("texts", seed))
    for part, fraction in (("like", 0.3), ("validation", 1 / 7)):  # 6 : 1 : 3
        test = probes.group_splits(
            rest.label.to_numpy(), rest.group.to_numpy(str), repeats=1, test_fraction=fraction,
            seed=seed_of("split", part, seed) % 2**32,
        )[0]  # fmt: skip
        found[part], rest = rest[test], rest[~test]
    found["train"] = rest
    used = set(rest.group) | set(found["validation"].group)
    found["shifted"] = shifted[~shifted.group.isin(used)]
    if found["shifted"].label.nunique() < 2 or found["shifted"].group.nunique() < 2:
        raise ValueError(
            f"{names[1]}: {len(found['shifted'])} of {len(shifted)} texts are in groups that were not trained on, and they need "
            "two groups and both labels: pass more groups, or another set"
        )
    counts = {"train": sizes.train, "validation": sizes.validation, "like": sizes.test, "shifted": sizes.shifted}
    parts = {part: spread_over_groups(found[part], count, rng) for part, count in counts.items()}
    return parts, len(shifted) - len(found["shifted"]), names


class _Texts:
    """All texts of all parts: standardised states of both models, tokens in the small vocabulary, labels."""

    def __init__(
        self, model: TransformerBridge, frame: pd.DataFrame, depths: Sequence[int], seed: int, progress: bool
    ) -> None:
        self.parts = frame.part.to_numpy(str)
        self.labels = torch.tensor(frame.label.to_numpy(int))
        tokens = tokenize(model, frame.text.tolist())
        self.last = torch.as_tensor(last_positions(tokens))
        train = np.flatnonzero(self.parts == "train")
        stands_in = Counter(token for row in train for token in set(tokens.ids[row][tokens.mask[row]].tolist()))
        known = sorted(token for token, texts in stands_in.items() if texts > 1)
        table = torch.full((int(tokens.ids.max()) + 1,), _UNKNOWN)
        table[torch.tensor(known, dtype=torch.long)] = torch.arange(2, 2 + len(known))
        self.ids = torch.where(tokens.mask, table[tokens.ids], _PADDING)
        self.n_tokens = 2 + len(known)
        self.states = []
        for one in (model, models.random_twin(model, seed=seed)):
            values = collect_states(one, frame.text.tolist(), index=depths, progress=progress)["resid"].values
            mean, spread = values[train].mean(0), values[train].std(0) + 1e-6
            self.states.append(torch.as_tensor((values - mean) / spread))

    def rows(self, part: str) -> np.ndarray:
        return np.flatnonzero(self.parts == part)

    def unknown(self) -> dict[str, float]:
        """Share of tokens that the small model does not know, by part."""
        shares = {}
        for part in ("train", "like", "shifted"):
            ids = self.ids[self.rows(part)]
            shares[part] = round(float((ids == _UNKNOWN).sum() / (ids != _PADDING).sum()), 4)
        return shares


def _train(design: Design, texts: _Texts, random: bool, sizes: Preset, rate: float, seed: int) -> np.ndarray:
    """Logits [text, 2] of all texts after training on those of the part "train"."""
    states = texts.states[int(random)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(
            seed_of("fresh", seed) % 2**63
        )  # the small model is drawn first: the same one in all treatments
        net = Ensemble(design)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=_DECAY)
    train = texts.rows("train")
    recipe = Recipe(steps=sizes.steps, batch=min(sizes.batch, len(train)), rate=rate)
    for step, rows in enumerate(replicas.orders([train], [seed_of("order", seed)], recipe)[0]):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        longest = int(texts.last[rows].max()) + 1
        logits = net(states[rows], texts.ids[rows, :longest], texts.last[rows])
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, texts.labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return net(states, texts.ids, texts.last).double().numpy()


def _nll(logits: np.ndarray, texts: _Texts, part: str) -> float:
    rows = texts.rows(part)
    return float(nn.functional.cross_entropy(torch.as_tensor(logits[rows]), texts.labels[rows]))


# --- tables ---------------------------------------------------------------------------------------------------------


def _items(frame: pd.DataFrame, fitted: dict[tuple[int, str], tuple[np.ndarray, float]]) -> pd.DataFrame:
    tested = frame.part.isin(["like", "shifted"])
    about = frame.loc[tested, ["part", "example", "group", "label"]].rename(columns={"part": "test"})
    return pd.concat(
        [
            about.assign(seed=seed, treatment=name, log_odds=(logits[:, 1] - logits[:, 0])[tested.to_numpy()])
            for (seed, name), (logits, _) in fitted.items()
        ],
        ignore_index=True,
    )


def _scored(items: pd.DataFrame) -> pd.DataFrame:
    signed = items.log_odds * (2 * items.label - 1)
    return items.assign(accuracy=(items.log_odds > 0).eq(items.label == 1).astype(float), nll=np.logaddexp(0, -signed))


def _by_run(items: pd.DataFrame, rates: dict[tuple[int, str], float], counts: dict[str, int]) -> pd.DataFrame:
    by = ["seed", "treatment", "test"]
    means = _scored(items).groupby(by, sort=False)[["accuracy", "nll"]].mean().reset_index()
    table = means.melt(by, ["accuracy", "nll"], "metric")
    keys = list(zip(table.seed, table.treatment, strict=True))
    return table.assign(rate=[rates[key] for key in keys], trained_weights=table.treatment.map(counts))


def _text_baselines(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Right or wrong for each text (index: row of `frame`), of what needs no model."""
    kept = frame[frame.part != "validation"]
    tests, labels = (kept.part != "train").to_numpy()[None], kept.label.to_numpy()
    found = {
        "majority": probes.majority(labels, tests),
        "bag_of_words": probes.bag_of_words(kept.text.to_numpy(object), labels, tests),
    }
    return {
        name: pd.Series((scores.decisions[0, :, 0] > 0) == (labels == 1), index=kept.index, dtype=float)
        for name, scores in found.items()
    }


def _statistics(
    items: pd.DataFrame, frame: pd.DataFrame, counts: dict[str, int], draws: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means over seeds first, then groups of texts are resampled, the same for all treatments."""
    scored, baselines = _scored(items), _text_baselines(frame)
    rows, pairs = [], []
    for place, (test, part) in enumerate(scored.groupby("test", sort=False)):
        about = frame[frame.part == test]
        right, nll = (
            part.pivot_table(column, "example", "treatment")[list(TREATMENTS)] for column in ("accuracy", "nll")
        )
        right, nll = right.reindex(about.example), nll.reindex(about.example)
        for name, values in baselines.items():
            right[name] = values[about.index].to_numpy()
        groups, methods = about.group.to_numpy(str), list(right)
        drawn = statistics.cluster_means(right.to_numpy(), groups, draws=draws, seed=seed_of(seed, place) % 2**32)
        spread = part.groupby(["treatment", "seed"]).accuracy.mean().groupby("treatment").std()
        for column, name in enumerate(methods):
            low, high = np.quantile(drawn[:, column], [0.025, 0.975])
            loss = nll[name].mean() if name in nll else np.nan
            rows.append(
                (test, name, right[name].mean(), low, high, spread.get(name, np.nan), loss, len(about),
                 len(set(groups)), counts.get(name, 0))
            )  # fmt: skip
            if name != "levi":
                gap = drawn[:, methods.index("levi")] - drawn[:, column]
                p = min(1.0, 2 * (1 + min((gap <= 0).sum(), (gap >= 0).sum())) / (1 + draws))
                difference = right["levi"].mean() - right[name].mean()
                pairs.append((test, name, difference, *np.quantile(gap, [0.025, 0.975]), p))
    columns = [
        "test",
        "treatment",
        "accuracy",
        "low",
        "high",
        "seed_sd",
        "nll",
        "n_texts",
        "n_groups",
        "trained_weights",
    ]
    differences = pd.DataFrame(pairs, columns=["test", "other", "difference", "low", "high", "p"]).assign(p_holm=np.nan)
    for _, part in differences.groupby("test"):
        differences.loc[part.index, "p_holm"] = statistics.holm(part.p.to_numpy())
    return pd.DataFrame(rows, columns=columns), differences
