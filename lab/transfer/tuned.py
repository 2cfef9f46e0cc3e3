"""Tune a language model on task A: what are its first n blocks worth, frozen, for task B, against those tuned on B itself?

    result = transfer_tuned.run(lab.load(), "sentiment_words", ["cities"])  # about five minutes on one core
    result.summary                                                          # accuracy by n
    result.tables["differences"]                                            # specificity, paired by text

AnB against BnB (Yosinski et al., arXiv 1411.1792) where there is no baseB from scratch: both bodies are the pretrained
model, tuned. What it does not show: what the pretrained features are good for. All first blocks start from them, and a
short tuning moves them little; that is what "untouched" is for.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from scipy import stats
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, models, probes, require
from lab.identity import identity
from lab.results import Result, keep, run_shards, versions
from lab.transfer import tails
from lab.transfer.tails import Body, Texts, Tuning
from lab.transfer.tasks import seed_of

UNTOUCHED = "untouched"
PRESETS = {  # texts of each task, steps, splits, n as shares of the blocks
    "quick": (120, 25, 1, (0.5, 1.0)),
    "standard": (400, 60, 3, (0.2, 0.4, 0.6, 0.8, 1.0)),
}


def run(
    model: TransformerBridge,
    target: str | pd.DataFrame,
    sources: Sequence[str | pd.DataFrame],
    preset: str = "quick",
    *,
    seed: int = 0,
    n: Sequence[int] | None = None,
    limit: int | None = None,
    steps: int | None = None,
    repeats: int | None = None,
    test_fraction: float = 0.4,
    batch: int = 16,
    rate: float = 1e-4,
    head_rate: float = 3e-3,
    resume: bool = True,
    progress: bool = True,
) -> Result:
    """First n blocks tuned on another task, on the target's own, or not at all; frozen under the untouched other blocks.

    For each split of the target's groups of texts, the whole model (all blocks, final norm, classifier; not the embedding)
    is tuned on each source and on the target's training texts. Of each, the first n blocks are frozen; the blocks behind
    are the *untouched* model's and are tuned on the target's training texts, with a fresh final norm and classifier: the
    same fresh weights and order of batches in all treatments. At n = 0 nothing is carried over, so all are one net; at L a
    classifier reads the carried states alone.

    Test texts of the target are in no tuning; their words may stand in a source's texts, and then help AnB. Steps differ,
    as they must: the first n blocks of BnB and AnB had as many on their own task, untouched ones had none.

    Args:
        model: from `lab.load`, or a Bridge of your own; rotary positions (Llama, Qwen, Gemma, OLMo, NeoX families).
        target: task B: a concept data set's name, or a table with columns example, text, label (0/1) and group.
        sources: tasks A, likewise; each once, none of them the target.
        preset: quick (120 texts of a task, 25 steps, one split, n = L/2 and L) or standard (400, 60, three, five n).
        seed: of the choice of texts, splits, classifiers and batches.
        n, limit, steps, repeats: instead of the preset's: numbers of carried blocks 0..L, texts of a task, steps (of both
            tunings), splits.
        test_fraction: share of the target's (and the sources') texts that is tested.
        batch, rate, head_rate: texts a step; learning rates of the blocks, and of the norm and classifier.
        resume: keep finished splits under the cache folder.
        progress: print an estimate and show a bar.

    Returns:
        Result with
        `.table`: model, dataset (the target), split, source (a source's name, the target's, untouched), treatment (AnB, BnB,
            untouched), n, metric (accuracy, nll in nats), value.
        `.summary`: treatment, source, n, accuracy with low, high (bootstrap over groups of texts, nets as they are), nll,
            n_texts, n_groups.
        `.tables`: "differences": curve (specificity: BnB - AnB; over_untouched: AnB - untouched; own_tuning: BnB -
            untouched), source, n, difference, low, high, p (bootstrap, two-sided), p_holm (over n), paired by text, without
            sources that were not learnt; "sources": source, accuracy of the tuned model on its own unseen texts, low (exact),
            majority, n_texts, p, learnt (better than a constant guess): the gate; "items": split, source, treatment, n,
            example, group, label, predicted, log_p (of the right label).

    Raises:
        ValueError: unknown preset, n out of range, unusable data, a source twice or the target among them, a model whose
            blocks cannot be started in the middle; all before anything is tuned.

    Intervals hold the noise of the test texts alone: another tuning seed may differ by more.
    """
    n_layers, seed = model.cfg.n_layers, require.seed(seed)
    size, default_steps, splits, shares = PRESETS[require.one_of("preset", preset, PRESETS)]
    usual = sorted({round(share * n_layers) for share in shares})
    chosen = sorted(require.wholes("n", usual if n is None else n, 0, n_layers, hint=" (carried blocks)"))
    limit = require.whole("limit", size if limit is None else limit, 2)
    repeats = require.whole("repeats", splits if repeats is None else repeats, 1)
    test_fraction = require.fraction("test_fraction", test_fraction)
    tuning = tails.tuning_of(default_steps if steps is None else steps, batch, rate, head_rate)
    sources = require.listed("sources", sources, "data sets", least=1)
    frames = _frames([target, *sources], limit, seed)
    name = next(iter(frames))
    texts = {task: tails.as_texts(model, frame) for task, frame in frames.items()}
    body = Body(model, texts[name], "trained", seed, sorted({0, *chosen}))
    tests = {
        task: probes.group_splits(
            frame.label.to_numpy(), frame.group.to_numpy(str), repeats=repeats, test_fraction=test_fraction, seed=seed
        )
        for task, frame in frames.items()
    }
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own),
        "dataset": name, "sources": list(frames)[1:], "preset": preset, "n": chosen, "seed": seed,
        "repeats": repeats, "test_fraction": test_fraction, "limit": limit, **asdict(tuning), "versions": versions(),
        "texts": hashlib.sha256("\n".join(text for one in frames.values() for text in one.text.astype(str)).encode()).hexdigest(),
    }  # fmt: skip
    known = {key: value for key, value in parameters.items() if key not in ("repeats", "preset")}
    kept = keep(_shard, {"model": own}, resume=resume)
    shards = []
    for split in range(repeats):
        mine = {task: masks[split] for task, masks in tests.items()}
        key = kept.key({**known, "split": split, "tests": {task: mask.tolist() for task, mask in mine.items()}})
        work = {
            "body": body,
            "texts": texts,
            "frames": frames,
            "tests": mine,
            "chosen": chosen,
            "tuning": tuning,
            "seed": seed,
        }
        shards.append({"split": split, **work, "progress": progress, "splits": repeats, "key": key})
    body.check(0)
    parts = run_shards(_shard, shards, folder=kept.folder, describe="splits", progress=progress)
    table = pd.concat([part.table for part in parts], ignore_index=True).assign(model=parameters["model"], dataset=name)
    tables = {key: pd.concat([part.tables[key] for part in parts], ignore_index=True) for key in ("items", "sources")}
    tables["sources"] = _gate(tables["sources"])
    failed = tables["sources"][~tables["sources"].learnt]
    for row in failed.itertuples():
        print(f"{row.source} was not learnt ({row.accuracy:.2f} of unseen texts, a constant guess {row.majority:.2f}): its "
              "blocks are left out of the differences.")  # fmt: skip
    known_sources = tables["sources"].source[tables["sources"].learnt].tolist()
    summary, tables["differences"] = _summary(tables["items"], known_sources, seed)
    return Result("transfer_tuned", table, summary, parameters, tables)


def _frames(data: Sequence[str | pd.DataFrame], limit: int, seed: int) -> dict[str, pd.DataFrame]:
    """Name to texts, the target first."""
    found: dict[str, pd.DataFrame] = {}
    for place, one in enumerate(data):
        name = one if isinstance(one, str) else f"your data {place}"
        frame = datasets.load(one) if isinstance(one, str) else one
        datasets.check_concept_data(frame, name=name)
        if name in found:
            raise ValueError(f"{name} is there twice: the target and every source are different data sets")
        rng = np.random.default_rng(seed_of("texts", seed))
        found[name] = tails.spread_over_groups(frame, limit, rng)
    return found


# --- one split ------------------------------------------------------------------------------------------------------


def _shard(
    *,
    split: int,
    body: Body,
    texts: dict[str, Texts],
    frames: dict[str, pd.DataFrame],
    tests: dict[str, np.ndarray],
    chosen: Sequence[int],
    tuning: Tuning,
    seed: int,
    splits: int,
    progress: bool,
    key: str = "",
) -> Result:
    """Tune on every task, then carry each one's first blocks over to the target."""
    target = next(iter(frames))
    test, labels = tests[target], frames[target].label.to_numpy()
    n_layers = len(body.plain.layers)
    states = {UNTOUCHED: body.states}
    learnt, rows, items = [], [], []
    for task, own in texts.items():
        began = time.perf_counter()
        tail = body.tail(0, n_layers, keep=True, seed=0)
        embedded = tails.states_after(body.plain, own.mask, [0], input_ids=own.ids)[0]
        log_p = tails.tune(tail, own, embedded, tests[task], tuning, seed_of("source", seed, split, task)).log_p
        right = frames[task].label.to_numpy()[tests[task]]
        most = max(right.mean(), 1 - right.mean())
        learnt.append((split, task, int((log_p.argmax(1) == right).sum()), len(right), float(most)))
        states[task] = tails.states_after(tail, body.texts.mask, chosen, inputs_embeds=body.states[0])
        if progress and split == 0 and task == target:
            each = sum(n_layers - n for n in chosen) / n_layers * (len(texts) + 1)
            seconds = (time.perf_counter() - began) * (len(texts) + each) * splits
            print(
                f"About {seconds:.0f} s: {splits} splits, {len(texts)} tunings of the whole model and {len(chosen)} n each."
            )
    for n in chosen:
        for task, mine in states.items():
            treatment = {UNTOUCHED: UNTOUCHED, target: "BnB"}.get(task, "AnB")
            tail = body.tail(n, n_layers - n, keep=True, seed=seed_of("tail", seed, split, n) % 2**63)
            log_p = tails.tune(tail, body.texts, mine[n], test, tuning, seed_of("tune", seed, split)).log_p
            where = {"split": split, "source": task, "treatment": treatment, "n": n}
            of_right = log_p[np.arange(len(log_p)), labels[test]].astype(float)
            right = log_p.argmax(1) == labels[test]
            rows += [{**where, "metric": "accuracy", "value": float(right.mean())},
                     {**where, "metric": "nll", "value": float(-of_right.mean())}]  # fmt: skip
            about = frames[target].loc[test, ["example", "group", "label"]]
            items.append(about.assign(**where, predicted=log_p.argmax(1), log_p=of_right))
    sources = pd.DataFrame(learnt, columns=["split", "source", "right", "n_texts", "majority"])
    tables = {"items": pd.concat(items, ignore_index=True), "sources": sources}
    return Result("transfer_tuned", pd.DataFrame(rows), pd.DataFrame(), {"key": key}, tables)


def _gate(learnt: pd.DataFrame) -> pd.DataFrame:
    """Was a task learnt at all? Its unseen texts of all splits together against a constant guess, one-sided, 5 %."""
    rows = []
    for source, part in learnt.groupby("source", sort=False):
        right, n, guess = int(part.right.sum()), int(part.n_texts.sum()), float(part.majority.max())
        found = stats.binomtest(right, n, guess, alternative="greater")
        exact = found.proportion_ci(method="exact")
        rows.append((source, right / n, float(exact.low), guess, n, float(found.pvalue), bool(found.pvalue < 0.05)))
    return pd.DataFrame(rows, columns=["source", "accuracy", "low", "majority", "n_texts", "p", "learnt"])


def _summary(items: pd.DataFrame, learnt: Sequence[str], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy by treatment, source and n, and paired differences; a text counts by its mean over splits."""
    items = items.assign(right=(items.predicted == items.label).astype(float))
    mean = items.groupby(["treatment", "source", "n", "example", "group"], sort=False)[["right", "log_p"]].mean()
    runs = {at: part.reset_index() for at, part in mean.groupby(["treatment", "source", "n"], sort=False)}
    rows, pairs = [], []
    for at, part in runs.items():
        found = tails.interval(part.right.to_numpy(), part.group.to_numpy(str), seed)[:3]
        rows.append((*at, *found, float(-part.log_p.mean()), len(part), part.group.nunique()))
    target = next(source for treatment, source, _ in runs if treatment == "BnB")
    for treatment, source, n in runs:
        here, own, plain = (treatment, source, n), ("BnB", target, n), (UNTOUCHED, UNTOUCHED, n)
        wanted = {
            "AnB": [("specificity", own, here), ("over_untouched", here, plain)], "BnB": [("own_tuning", own, plain)],
        }.get(treatment, [])  # fmt: skip
        for curve, first, second in wanted:
            if source not in learnt or (curve == "specificity" and target not in learnt):
                continue
            one, two = (runs[at].set_index("example") for at in (first, second))
            gap = (one.right - two.right.reindex(one.index)).to_numpy()
            pairs.append((curve, source, n, *tails.interval(gap, one.group.to_numpy(str), seed)))
    columns = ["treatment", "source", "n", "accuracy", "low", "high", "nll", "n_texts", "n_groups"]
    differences = pd.DataFrame(pairs, columns=["curve", "source", "n", "difference", "low", "high", "p"])
    return pd.DataFrame(rows, columns=columns), tails.with_holm(differences, ["curve", "source"])
