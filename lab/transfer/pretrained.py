"""What are a language model's first n blocks worth, frozen, under what is trained on a small task of short texts?

    result = transfer_pretrained.run(lab.load(), "sentiment_words")  # a minute or two on two cores
    result.summary                                                   # accuracy by n, with intervals and baselines

The counterpart of `lab.transfer` where there are no halves: what the model was trained on is not known, so
treatments differ in what is put above the frozen blocks, and the null is the same model with random weights.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, models, probes, require
from lab.identity import identity
from lab.results import Result, keep, run_shards, versions
from lab.transfer.tails import Body, Tuning, as_texts, interval, spread_over_groups, tune, tuning_of, with_holm
from lab.transfer.tasks import seed_of

TREATMENTS = {
    "K": "the other blocks kept and trained",
    "R": "the other blocks re-initialised and trained",
    "S": "two fresh blocks instead of the others: the same number of trained weights at every n",
    "P": "no block behind: final norm and classifier alone",
}
_SHORT = 2  # fresh blocks of S


def run(
    model: TransformerBridge,
    data: str | pd.DataFrame,
    preset: str = "quick",
    *,
    seed: int = 0,
    n: Sequence[int] | None = None,
    treatments: Sequence[str] = tuple(TREATMENTS),
    repeats: int = 1,
    test_fraction: float = 0.4,
    limit: int | None = None,
    steps: int | None = None,
    batch: int = 16,
    rate: float = 1e-4,
    head_rate: float = 3e-3,
    null: bool = True,
    resume: bool = True,
    progress: bool = True,
) -> Result:
    """A language model's first n blocks, frozen, under what is trained on a small task of short texts.

    The label is read at the last token, by a fresh classifier behind a fresh final norm, as everywhere in this module.
    K-n keeps the other blocks and trains them, R-n re-initialises them, S-n puts two fresh blocks in their place, P-n
    none. States after block n are computed once, for all positions; each run starts from them. There is no baseB: what
    the model was trained on is not known, so a difference between treatments is not a specificity.

    Args:
        model: from `lab.load`, or a Bridge of your own; rotary positions (Llama, Qwen, Gemma, OLMo, NeoX families).
        data: a data set's name, or a table with columns example, text, label (0/1) and group.
        preset: quick (four n near the end, 120 texts, 25 steps), standard (eight n, 512 texts, 100 steps) or full (every
            second n, 200 steps).
        seed: of the choice of texts, splits, fresh weights, batches and the random model.
        n: numbers of frozen blocks, 0..L, instead of the preset's. At L, K and R are P, and are left out.
        treatments: of K, R, S, P.
        repeats, test_fraction: number of splits (whole groups), and the share of texts tested in each.
        limit, steps: texts and steps, instead of the preset's.
        batch, rate, head_rate: texts a step; learning rates of the blocks, and of the norm and classifier, which start
            from nothing in every treatment.
        null: the same on the model with random weights.
        resume: keep finished (weights, n, split) under the cache folder.
        progress: print an estimate and show a bar.

    Returns:
        Result with
        `.table`: model, dataset, weights (trained, random, none), treatment (K, R, S, P; majority, bag_of_words), n, split,
            metric (accuracy; nll and train_loss in nats), value, trained_weights (their number), seed.
        `.summary`: weights, treatment, n, accuracy with low, high (bootstrap over groups of texts, nets as they are), nll,
            n_texts, n_groups, trained_weights, train_loss (of the last fifth of steps: did it train at all?).
        `.tables`: "differences": first, second, n, difference, low, high, p, p_holm (over n), paired by text: K - R and
            K - P of the trained model, and trained - random of each treatment; "items": weights, treatment, n, split, example,
            group, label, predicted, log_p (of the right label).

    Raises:
        ValueError: unknown preset or treatment, n out of range, unusable data, a model whose blocks cannot be started in
            the middle (checked: K-n before training must give the whole model's states).

    Only the test texts' noise is in the intervals: another seed of the fresh weights may differ by more.
    """
    n_layers, seed, repeats = model.cfg.n_layers, require.seed(seed), require.whole("repeats", repeats, 1)
    test_fraction, (null,) = require.fraction("test_fraction", test_fraction), require.flags(null=null)
    chosen, tuning, limit = _pretrained_sizes(preset, n_layers, n, limit, steps, batch, (rate, head_rate))
    treatments = require.some_of("treatments", treatments, TREATMENTS)
    frame, name = (datasets.load(data), data) if isinstance(data, str) else (data, "your data")
    datasets.check_concept_data(frame, name=name)
    frame = spread_over_groups(frame, limit, np.random.default_rng(seed_of("texts", seed)))
    labels, groups = frame.label.to_numpy(), frame.group.to_numpy(str)
    tests = probes.group_splits(labels, groups, repeats=repeats, test_fraction=test_fraction, seed=seed)
    texts = as_texts(model, frame)
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own),
        "dataset": name, "preset": preset, "n": chosen, "treatments": treatments, "seed": seed,
        "repeats": repeats, "test_fraction": test_fraction, "n_examples": len(frame), **asdict(tuning), "null": null,
        "texts": hashlib.sha256("\n".join(frame.text.astype(str)).encode()).hexdigest(), "versions": versions(),
    }  # fmt: skip
    bodies = {
        kind: Body(model, texts, kind, seed, chosen) for kind in (("trained", "random") if null else ("trained",))
    }
    known = {name: value for name, value in parameters.items() if name not in ("n", "repeats", "null", "preset")}
    kept = keep(_pretrained_shard, {"model": own}, resume=resume)
    shards = []
    for kind, body in bodies.items():
        for count in chosen:
            for split, test in enumerate(tests):
                shard = {"weights": kind, "n": count, "split": split}
                work = {"body": body, "frame": frame, "test": test, "tuning": tuning, "parameters": parameters}
                shards.append({**shard, **work, "key": kept.key({**known, **shard, "tests": test})})
    missing = [one for one in shards if not kept.has(one["key"])]
    if progress and missing:
        _print_pretrained_estimate(bodies["trained"], missing, treatments, tuning, n_layers)
    parts = run_shards(_pretrained_shard, shards, folder=kept.folder, describe="runs", progress=progress)
    items = pd.concat([part.tables["items"] for part in parts], ignore_index=True)
    table = pd.concat([*(part.table for part in parts), _text_baselines(frame, tests)], ignore_index=True)
    table = table.assign(model=parameters["model"], dataset=name, seed=seed)
    summary, pairs = _pretrained_summary(items, table, seed)
    return Result("transfer_pretrained", table, summary, parameters, {"differences": pairs, "items": items})


def _pretrained_sizes(
    preset: str,
    n_layers: int,
    n: Sequence[int] | None,
    limit: int | None,
    steps: int | None,
    batch: int,
    rates: tuple[float, float],
) -> tuple[list[int], Tuning, int]:
    sizes = {"quick": (120, 25), "standard": (512, 100), "full": (512, 200)}
    size, default_steps = sizes[require.one_of("preset", preset, sizes)]
    own = {
        "quick": [round(n_layers * share) for share in (0.8, 0.9, 0.97, 1)],
        "standard": [round(n_layers * share) for share in (0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 14 / 15, 1)],
        "full": [*range(0, n_layers, 2), n_layers],
    }
    chosen = require.wholes("n", sorted(set(own[preset])) if n is None else n, 0, n_layers, hint=" (frozen blocks)")
    tuning = tuning_of(default_steps if steps is None else steps, batch, *rates, least=0)
    return sorted(chosen), tuning, size if limit is None else require.whole("limit", limit, 2)


def _pretrained_shard(
    *,
    weights: str,
    n: int,
    split: int,
    body: Body,
    frame: pd.DataFrame,
    test: np.ndarray,
    tuning: Tuning,
    parameters: dict[str, Any],
    key: str = "",
) -> Result:
    """All treatments at one n, of one model on one split."""
    n_layers, seed = len(body.plain.layers), parameters["seed"]
    body.check(n)
    rows, items = [], []
    for treatment in parameters["treatments"]:
        if treatment in ("K", "R") and n == n_layers:
            continue  # nothing lies behind: it is P
        blocks = {"K": n_layers - n, "R": n_layers - n, "S": _SHORT, "P": 0}[treatment]
        tail = body.tail(n, blocks, keep=treatment == "K", seed=seed_of("tail", seed, split, n, treatment) % 2**63)
        tuned = tune(tail, body.texts, body.states[n], test, tuning, seed_of("tune", seed, split))
        right = frame.label.to_numpy()[test]
        where = {"weights": weights, "treatment": treatment, "n": n, "split": split}
        of_right, predicted = tuned.log_p[np.arange(len(right)), right], tuned.log_p.argmax(1)
        values = {"accuracy": float((predicted == right).mean()), "nll": float(-of_right.mean())}
        values["train_loss"] = tuned.train_loss
        rows += [
            {**where, "metric": name, "value": value, "trained_weights": tuned.n_weights}
            for name, value in values.items()
        ]
        items.append(
            frame.loc[test, ["example", "group", "label"]].assign(
                **where, predicted=predicted, log_p=of_right.astype(float)
            )
        )
    tables = {"items": pd.concat(items, ignore_index=True)}
    return Result("transfer_pretrained", pd.DataFrame(rows), pd.DataFrame(), {"key": key}, tables)


def _text_baselines(frame: pd.DataFrame, tests: np.ndarray) -> pd.DataFrame:
    labels, texts = frame.label.to_numpy(), frame.text.to_numpy(object)
    found = {"majority": probes.majority(labels, tests), "bag_of_words": probes.bag_of_words(texts, labels, tests)}
    return pd.DataFrame(
        [
            {"weights": "none", "treatment": name, "n": 0, "split": split, "metric": "accuracy", "value": float(value),
             "trained_weights": 0}
            for name, scores in found.items() for split, value in enumerate(scores.accuracy()[:, 0])
        ]
    )  # fmt: skip


def _pretrained_summary(items: pd.DataFrame, table: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy of each treatment, and paired differences, with bootstrap intervals over groups of texts."""
    items = items.assign(right=(items.predicted == items.label).astype(float))
    by = ["weights", "treatment", "n"]
    mean = items.groupby([*by, "example", "group"], sort=False)[["right", "log_p"]].mean().reset_index()
    rows, runs = [], {}
    for at, part in mean.groupby(by, sort=False):
        runs[at] = part.set_index("example")
        estimate, low, high, _ = interval(part.right.to_numpy(), part.group.to_numpy(str), seed)
        rows.append((*at, estimate, low, high, float(-part.log_p.mean()), len(part), part.group.nunique()))
    columns = [*by, "accuracy", "low", "high", "nll", "n_texts", "n_groups"]
    counts = table[table.metric == "accuracy"].groupby(by)["trained_weights"].first().reset_index()
    losses = table[table.metric == "train_loss"].groupby(by)["value"].mean().reset_index(name="train_loss")
    summary = pd.DataFrame(rows, columns=columns).merge(counts, on=by).merge(losses, on=by)
    baselines = table[table.weights == "none"].groupby(by)["value"].mean().reset_index(name="accuracy")
    summary = pd.concat([summary, baselines], ignore_index=True)
    pairs = []
    for (weights, treatment, n), one in runs.items():
        others = [(weights, name, n) for name in ("R", "P") if treatment == "K"] if weights == "trained" else []
        others += [("random", treatment, n)] if weights == "trained" else []
        for other in others:
            if other in runs:
                two = runs[other].right.reindex(one.index)
                first, second = (f"{name} ({kind})" for kind, name, _ in ((weights, treatment, n), other))
                found = interval((one.right - two).to_numpy(), one.group.to_numpy(str), seed)
                pairs.append((first, second, n, *found))
    columns = ["first", "second", "n", "difference", "low", "high", "p"]
    return summary, with_holm(pd.DataFrame(pairs, columns=columns), ["first", "second"])


def _print_pretrained_estimate(
    body: Body, missing: Sequence[dict[str, Any]], treatments: Sequence[str], tuning: Tuning, n_layers: int
) -> None:
    """Time two steps of two fresh blocks here, and scale up by blocks. Right to a factor of two."""
    depth = body.chosen[-1]
    states = body.states[depth]
    last = np.arange(len(states)) == len(states) - 1
    few = replace(tuning, steps=2)
    start = time.perf_counter()
    tune(body.tail(depth, _SHORT, keep=False, seed=0), body.texts, states, last, few, 0)
    passes = 2 * 3 * min(tuning.batch, len(states)) + 1
    per_text = (time.perf_counter() - start) / passes / _SHORT  # a forward pass of one text through one block
    blocks = sum(
        {"K": n_layers - one["n"], "R": n_layers - one["n"], "S": _SHORT, "P": 0}[name]
        for one in missing for name in treatments
    )  # fmt: skip
    seconds = per_text * blocks * (tuning.steps * 3 * tuning.batch + int(missing[0]["test"].sum()))
    print(
        f"About {seconds:.0f} s: {len(missing)} (weights, n, split), {len(states)} texts of up to {states.shape[1]} tokens, "
        f"{tuning.steps} steps of {tuning.batch} texts for each of {', '.join(treatments)}."
    )
