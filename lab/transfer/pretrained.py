"""What are a language model's first n blocks worth, frozen, under what is trained on a small task of short texts?

    result = transfer_pretrained.run(lab.load(), "sentiment_words")  # a minute or two on two cores
    result.summary                                                   # accuracy by n, with intervals and baselines

The counterpart of `lab.transfer` where there are no halves: what the model was trained on is not known, so treatments differ
in what is put above the frozen blocks, and the null is the same model with random weights.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lab import models, probes, require
from lab.identity import identity
from lab.results import Result, joined, keep, study, versions
from lab.transfer import tails
from lab.transfer.statistics import with_holm
from lab.transfer.tails import Body, Tuning
from lab.transfer.tasks import seed_of

TREATMENTS = {
    "K": "the other blocks kept and trained",
    "R": "the other blocks re-initialised and trained",
    "S": "two fresh blocks instead of the others: the same number of trained weights at every n",
    "P": "no block behind: final norm and classifier alone",
}
PRESETS = {  # texts, steps, n as shares of the blocks
    "quick": (120, 25, (0.8, 0.9, 0.97, 1)),
    "standard": (512, 100, (0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 14 / 15, 1)),
    "full": (512, 200, None),  # every second n
}
COLUMNS = tails.COLUMNS | {
    "weights": "trained, random (the null), or none (the baselines)",
    "treatment": "what is above the frozen blocks, see TREATMENTS; or majority, bag_of_words",
    "trained_weights": "how many weights were trained", "seed": "of the run",
    "train_loss": "mean loss of the last fifth of steps, nats: did it train at all?",
    "first": "treatment and weights", "second": "what is subtracted",
}  # fmt: skip
_SHORT = 2  # fresh blocks of S


def run(
    model: TransformerBridge, data: str | pd.DataFrame, preset: str = "quick", *, seed: int = 0,
    n: Sequence[int] | None = None, treatments: Sequence[str] = tuple(TREATMENTS), repeats: int = 1,
    test_fraction: float = 0.4, limit: int | None = None, steps: int | None = None, batch: int = 16,
    rate: float = 1e-4, head_rate: float = 3e-3, null: bool = True, resume: bool = True, progress: bool = True,
) -> Result:  # fmt: skip
    """A language model's first n blocks, frozen, under what is trained on a small task of short texts.

    There is no baseB, as what the model was trained on is not known: a difference between treatments is not a specificity.

    Args:
        model: rotary positions (Llama, Qwen, Gemma, OLMo, NeoX families); that K-n before training gives the whole model's
            states is checked.
        data: a data set's name, or a table with columns example, text, label (0/1) and group.
        n: numbers of frozen blocks, 0..L, instead of the preset's. At L, K and R are P, and are left out.
        repeats, test_fraction: number of splits (whole groups), and the share of texts tested in each.
        limit, steps: texts and steps, instead of the preset's.
        batch, rate, head_rate: texts a step; learning rates of the blocks, and of the norm and classifier, which start
            from nothing in every treatment.
        null: the same on the model with random weights.
    """
    n_layers, seed, repeats = model.cfg.n_layers, require.seed(seed), require.whole("repeats", repeats, 1)
    test_fraction, (null,) = require.fraction("test_fraction", test_fraction), require.flags(null=null)
    size, default_steps, shares = PRESETS[require.one_of("preset", preset, PRESETS)]
    usual = {round(n_layers * share) for share in shares} if shares else {*range(0, n_layers, 2), n_layers}
    chosen = sorted(require.wholes("n", sorted(usual) if n is None else n, 0, n_layers, hint=" (frozen blocks)"))
    tuning = tails.tuning_of(default_steps if steps is None else steps, batch, rate, head_rate, least=0)
    limit = size if limit is None else require.whole("limit", limit, 2)
    treatments = require.some_of("treatments", treatments, TREATMENTS)
    frame, name = tails.labelled(data)
    frame = tails.spread_over_groups(frame, limit, np.random.default_rng(seed_of("texts", seed)))
    tests = probes.group_splits(
        frame.label.to_numpy(), frame.group.to_numpy(str), repeats=repeats, test_fraction=test_fraction, seed=seed
    )
    texts, own = tails.as_texts(model, frame), identity(model)
    parameters = {
        **models.facts(model), "identity": str(own),
        "dataset": name, "preset": preset, "n": chosen, "treatments": treatments, "seed": seed,
        "repeats": repeats, "test_fraction": test_fraction, "n_examples": len(frame), **asdict(tuning), "null": null,
        "texts": tails.checksum([frame]), "versions": versions(),
    }  # fmt: skip
    kinds = ("trained", "random") if null else ("trained",)
    bodies = {kind: Body(model, texts, kind, seed, chosen) for kind in kinds}
    parts = study(
        work, [{"weights": kind, "n": count, "split": split, "test": test}
               for kind in kinds for count in chosen for split, test in enumerate(tests)],
        kept=keep(work, {"model": own}, resume=resume),
        known={name: value for name, value in parameters.items() if name not in ("n", "repeats", "null", "preset")},
        shared={"bodies": bodies, "frame": frame, "treatments": treatments, "tuning": tuning, "seed": seed},
        describe="runs", progress=progress,
    )  # fmt: skip
    table, tables = joined(parts)
    table = pd.concat([table, _text_baselines(frame, tests)], ignore_index=True)
    table = table.assign(model=parameters["model"], dataset=name, seed=seed)
    summary, pairs = _summary(tables["items"], table, seed)
    tables = {"differences": pairs, "items": tables["items"]}
    return Result("transfer_pretrained", table, summary, parameters, tables).described(COLUMNS)


def work(
    *, weights: str, n: int, split: int, test: np.ndarray, bodies: dict[str, Body], frame: pd.DataFrame,
    treatments: Sequence[str], tuning: Tuning, seed: int,
) -> Result:  # fmt: skip
    """All treatments at one n, of one model on one split."""
    body = bodies[weights]
    body.check(n)
    left = len(body.plain.layers) - n
    rows, items = [], []
    for treatment in treatments:
        if treatment in ("K", "R") and not left:
            continue  # nothing lies behind: it is P
        blocks = {"K": left, "R": left, "S": _SHORT, "P": 0}[treatment]
        tail = body.tail(n, blocks, keep=treatment == "K", seed=seed_of("tail", seed, split, n, treatment) % 2**63)
        tuned = tails.tune(tail, body.texts, body.states[n], test, tuning, seed_of("tune", seed, split))
        where = {"weights": weights, "treatment": treatment, "n": n, "split": split}
        found, mine = tails.measured(frame, test, tuned.log_p, where, train_loss=tuned.train_loss)
        rows += [{**row, "trained_weights": tuned.n_weights} for row in found]
        items.append(mine)
    tables = {"items": pd.concat(items, ignore_index=True)}
    return Result("transfer_pretrained", pd.DataFrame(rows), pd.DataFrame(), {}, tables)


def _text_baselines(frame: pd.DataFrame, tests: np.ndarray) -> pd.DataFrame:
    labels, texts = frame.label.to_numpy(), frame.text.to_numpy(object)
    found = {"majority": probes.majority(labels, tests), "bag_of_words": probes.bag_of_words(texts, labels, tests)}
    rows = [{"weights": "none", "treatment": name, "n": 0, "split": split, "metric": "accuracy", "value": float(value)}
            for name, scores in found.items() for split, value in enumerate(scores.accuracy()[:, 0])]  # fmt: skip
    return pd.DataFrame(rows).assign(trained_weights=0)


def _summary(items: pd.DataFrame, table: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy of each treatment, and paired differences: K - R, K - P of the trained model, and trained - random."""
    by = ["weights", "treatment", "n"]
    summary, runs = tails.summarised(items, by, seed)
    counts = table[table.metric == "accuracy"].groupby(by)["trained_weights"].first().reset_index()
    losses = table[table.metric == "train_loss"].groupby(by)["value"].mean().reset_index(name="train_loss")
    baselines = table[table.weights == "none"].groupby(by)["value"].mean().reset_index(name="accuracy")
    summary = pd.concat([summary.merge(counts, on=by).merge(losses, on=by), baselines], ignore_index=True)
    pairs = []
    for (weights, treatment, n), one in runs.items():
        others = [("trained", name, n) for name in ("R", "P") if treatment == "K"] + [("random", treatment, n)]
        for other in others if weights == "trained" else ():
            if other in runs:
                first, second = f"{treatment} ({weights})", f"{other[1]} ({other[0]})"
                pairs.append((first, second, n, *tails.paired(one, runs[other], seed)))
    columns = ["first", "second", "n", "difference", "low", "high", "p"]
    return summary, with_holm(pd.DataFrame(pairs, columns=columns), ["first", "second"])
