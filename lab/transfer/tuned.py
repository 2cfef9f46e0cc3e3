"""Tune a language model on task A: what are its first n blocks worth, frozen, for task B, against those tuned on B itself?

    result = transfer_tuned.run(lab.load(), "sentiment_words", ["cities"])  # about five minutes on one core
    result.summary                                                          # accuracy by n
    result.tables["differences"]                                            # specificity, paired by text

AnB against BnB (Yosinski et al., arXiv 1411.1792) where there is no baseB from scratch: both bodies are the pretrained
model, tuned. What it does not show: what the pretrained features are good for. All first blocks start from them, and a
short tuning moves them little; that is what "untouched" is for.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from transformer_lens.model_bridge import TransformerBridge

from lab import models, probes, require
from lab.identity import identity
from lab.results import Result, joined, keep, study, versions
from lab.transfer import tails
from lab.transfer.statistics import with_holm
from lab.transfer.tails import Body, Texts, Tuning
from lab.transfer.tasks import seed_of

UNTOUCHED = "untouched"
PRESETS = {  # texts of each task, steps, splits, n as shares of the blocks
    "quick": (120, 25, 1, (0.5, 1.0)),
    "standard": (400, 60, 3, (0.2, 0.4, 0.6, 0.8, 1.0)),
}


COLUMNS = tails.COLUMNS | {
    "source": "what the carried blocks were tuned on: a source's name, the target's, or untouched",
    "treatment": "AnB (a source), BnB (the target itself) or untouched",
    "curve": "specificity: BnB - AnB; over_untouched: AnB - untouched; own_tuning: BnB - untouched",
    "sources.accuracy": "of the tuned model on its own unseen texts, all splits", "sources.low": "exact, 95 %",
    "majority": "accuracy of a constant guess", "sources.p": "against it, one-sided, binomial",
    "learnt": "p below 0.05: the gate",
}  # fmt: skip


def run(
    model: TransformerBridge, target: str | pd.DataFrame, sources: Sequence[str | pd.DataFrame],
    preset: str = "quick", *, seed: int = 0, n: Sequence[int] | None = None, limit: int | None = None,
    steps: int | None = None, repeats: int | None = None, test_fraction: float = 0.4, batch: int = 16,
    rate: float = 1e-4, head_rate: float = 3e-3, resume: bool = True, progress: bool = True,
) -> Result:  # fmt: skip
    """First n blocks tuned on another task, on the target's own, or not at all; frozen under the untouched other blocks.

    For each split the whole model (blocks, final norm, classifier) is tuned on each source and on the target's training
    texts; the first n blocks of each are frozen, and the *untouched* model's others tuned behind them on the target: the same
    fresh weights and batches in all treatments. n = 0 is one net for all; at L a classifier reads the carried states alone.
    Test texts are in no tuning, but their words may stand in a source's texts. Steps differ: untouched blocks had none.

    Args:
        model: rotary positions (Llama, Qwen, Gemma, OLMo, NeoX families).
        target, sources: tasks B and A: names, or tables with columns example, text, label (0/1) and group; each once.
        n, limit, steps, repeats: instead of the preset's: carried blocks 0..L, texts of a task, steps (of both), splits.
        test_fraction: share of the target's (and the sources') texts that is tested.
        batch, rate, head_rate: texts a step; learning rates of the blocks, and of the norm and classifier.
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
    body, own = Body(model, texts[name], "trained", seed, sorted({0, *chosen})), identity(model)
    drawn: dict[str, Any] = {"repeats": repeats, "test_fraction": test_fraction, "seed": seed}
    tests = {task: probes.group_splits(frame.label.to_numpy(), frame.group.to_numpy(str), **drawn)
             for task, frame in frames.items()}  # fmt: skip
    parameters = {
        **models.facts(model), "identity": str(own),
        "dataset": name, "sources": list(frames)[1:], "preset": preset, "n": chosen, "seed": seed,
        "repeats": repeats, "test_fraction": test_fraction, "limit": limit, **asdict(tuning), "versions": versions(),
        "texts": tails.checksum(frames.values()),
    }  # fmt: skip
    body.check(0)
    parts = study(
        work, [{"split": split, "tests": {task: masks[split] for task, masks in tests.items()}} for split in range(repeats)],
        kept=keep(work, {"model": own}, resume=resume),
        known={key: value for key, value in parameters.items() if key not in ("repeats", "preset")},
        shared={"body": body, "texts": texts, "frames": frames, "chosen": chosen, "tuning": tuning, "seed": seed},
        describe="splits", progress=progress,
    )  # fmt: skip
    table, tables = joined(parts)
    table = table.assign(model=parameters["model"], dataset=name)
    tables["sources"] = _gate(tables["sources"])
    failed = tables["sources"][~tables["sources"].learnt]
    for row in failed.itertuples():
        print(f"{row.source} was not learnt ({row.accuracy:.2f} of unseen texts, a constant guess {row.majority:.2f}): its "
              "blocks are left out of the differences.")  # fmt: skip
    learnt = tables["sources"].source[tables["sources"].learnt].tolist()
    summary, tables["differences"] = _summary(tables["items"], learnt, seed)
    return Result("transfer_tuned", table, summary, parameters, tables).described(COLUMNS)


def _frames(data: Sequence[str | pd.DataFrame], limit: int, seed: int) -> dict[str, pd.DataFrame]:
    """Name to texts, the target first."""
    found: dict[str, pd.DataFrame] = {}
    for place, one in enumerate(data):
        frame, name = tails.labelled(one, f"your data {place}")
        if name in found:
            raise ValueError(f"{name} is there twice: the target and every source are different data sets")
        found[name] = tails.spread_over_groups(frame, limit, np.random.default_rng(seed_of("texts", seed)))
    return found


def work(
    *, split: int, tests: dict[str, np.ndarray], body: Body, texts: dict[str, Texts], frames: dict[str, pd.DataFrame],
    chosen: Sequence[int], tuning: Tuning, seed: int,
) -> Result:  # fmt: skip
    """One split: tune on every task, then carry each one's first blocks over to the target."""
    target, n_layers = next(iter(frames)), len(body.plain.layers)
    states = {UNTOUCHED: body.states}
    learnt, rows, items = [], [], []
    for task, own in texts.items():
        tail, test = body.tail(0, n_layers, keep=True, seed=0), tests[task]
        embedded = tails.states_after(body.plain, own.mask, [0], input_ids=own.ids)[0]
        log_p = tails.tune(tail, own, embedded, test, tuning, seed_of("source", seed, split, task)).log_p
        right = frames[task].label.to_numpy()[test]
        most = float(max(right.mean(), 1 - right.mean()))
        learnt.append((split, task, int((log_p.argmax(1) == right).sum()), len(right), most))
        states[task] = tails.states_after(tail, body.texts.mask, chosen, inputs_embeds=body.states[0])
    for n in chosen:
        for task, mine in states.items():
            treatment = {UNTOUCHED: UNTOUCHED, target: "BnB"}.get(task, "AnB")
            tail = body.tail(n, n_layers - n, keep=True, seed=seed_of("tail", seed, split, n) % 2**63)
            log_p = tails.tune(tail, body.texts, mine[n], tests[target], tuning, seed_of("tune", seed, split)).log_p
            where = {"split": split, "source": task, "treatment": treatment, "n": n}
            values, tested = tails.measured(frames[target], tests[target], log_p.astype(float), where)
            rows += values
            items.append(tested)
    sources = pd.DataFrame(learnt, columns=["split", "source", "right", "n_texts", "majority"])
    tables = {"items": pd.concat(items, ignore_index=True), "sources": sources}
    return Result("transfer_tuned", pd.DataFrame(rows), pd.DataFrame(), {}, tables)


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
    """Accuracy by treatment, source and n, and paired differences of what was learnt."""
    summary, runs = tails.summarised(items, ["treatment", "source", "n"], seed)
    target = next(source for treatment, source, _ in runs if treatment == "BnB")
    pairs = []
    for treatment, source, n in runs:
        here, own, plain = (treatment, source, n), ("BnB", target, n), (UNTOUCHED, UNTOUCHED, n)
        wanted = {
            "AnB": [("specificity", own, here), ("over_untouched", here, plain)], "BnB": [("own_tuning", own, plain)],
        }.get(treatment, [])  # fmt: skip
        for curve, first, second in wanted:
            if source in learnt and (curve != "specificity" or target in learnt):
                pairs.append((curve, source, n, *tails.paired(runs[first], runs[second], seed)))
    differences = pd.DataFrame(pairs, columns=["curve", "source", "n", "difference", "low", "high", "p"])
    return summary, with_holm(differences, ["curve", "source"])
