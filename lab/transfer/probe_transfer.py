"""Does a probe trained on one data set, or at one depth, read the same thing on another?

Two measurements. Between data sets: AUC and accuracy [trained on, tested on, depth]. Between depths: [depth trained, depth
tested] for each data set. After Marks and Tegmark, "The Geometry of Truth" (arXiv 2310.06824), whose probes are a
difference of class means and a logistic regression, with what that work lacks: splits by group over all data sets at once,
controls, intervals, and every depth instead of one.

A probe that transfers need not have found truth. Trained on "Paris is in France" it can read what is plausible: which
words go together. The negated statements tell the two apart, since "Paris is not in France" is plausible and false: on them
a probe for plausibility has an AUC BELOW 0.5, and a probe for truth one above. `.tables["negation"]` says which it is.
"""

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from scipy import stats
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import models, probes, require
from lab import statistics as metrics
from lab.datasets import check_concept_data, load
from lab.identity import identity
from lab.results import Result, keep, run_shards, versions
from lab.states import collect_states
from lab.texts import tokenize

DATASETS = ("cities", "cities_negated", "larger_city", "numbers", "comparisons")
Probe = tuple[str, str]  # its kind, or a control; and its labels, task or shuffled
PROBES = ("mean_difference", "logistic")
TASK = tuple((kind, "task") for kind in PROBES)
CONTROLS = ("shuffled_labels", "random_direction", "bag_of_words", "token_count")
METRICS = ("auc", "accuracy", "accuracy_centred")
COLUMNS = {
    "model": "name of the model",
    "trained_on": "data set that the probe is fitted on",
    "tested_on": "data set that it is tested on, in groups it was not fitted on",
    "depth": "blocks passed, 0 to L; nan for controls without states",
    "relative_depth": "depth / L",
    "probe": "mean_difference or logistic; or a control: random_direction, bag_of_words, token_count",
    "labels": "task, or shuffled: the control shuffled_labels of this probe",
    "metric": "auc, accuracy, or accuracy_centred (transductive), see `run`",
    "split": "number of the split",
    "value": "of the metric on the tested statements of a split, 0 to 1",
    "seed": "of splits, controls and bootstrap",
    "mean": "of the metric over splits, 0 to 1",
    "low": "lower end of the 95 % interval: groups of the tested data set resampled, probes not fitted again; too narrow with "
    "fewer than 20 groups, nan with fewer than 5",
    "high": "upper end of that interval",
    "difference": "to the best of the four controls, chosen anew in every draw (hard on the probe); nan for controls",
    "difference_low": "lower end of its 95 % interval",
    "difference_high": "upper end of that interval",
    "n_examples": "number of statements in the data set tested on",
    "n_groups": "number of their groups",
    "auc": "at one depth, mean over splits; below 0.5: the reverse",
    "p": "of the difference over its bootstrap error: t, n_groups - 1 degrees of freedom, two-sided",
    "p_holm": "p, Holm-corrected over the pairs of a probe",
    "depth_low": "least depth chosen in a split, blocks passed",
    "depth_high": "largest depth chosen in a split",
    "reading": "is true (interval of the AUC above 0.5), is plausible (below) or not decided",
    "dataset": "data set that the probe is fitted and tested on",
    "trained_depth": "depth whose states the probe is fitted on, blocks passed",
    "tested_depth": "depth whose states it is tested on",
    "statistics": "training_depth: states as they are; tested_depth: brought to mean and scale of the trained depth first",
    "dataset_a": "first data set",
    "dataset_b": "second data set",
    "depth_a": "first depth, blocks passed",
    "depth_b": "second depth",
    "cosine": "of the two raw directions, -1 to 1, mean over splits",
    "null": "mean size of the cosine of a's direction and b's for shuffled labels: large where few dimensions are huge",
    "n": "number of groups by the same name in both",
}
_FEWEST = 5  # groups for an interval
_SPARE = 100  # splits drawn beyond those wanted, in case some lack a class in one data set


def run(
    model: TransformerBridge,
    datasets: Sequence[str] | Mapping[str, pd.DataFrame] = DATASETS,
    *,
    depths: Sequence[int] | None = None,
    depth_grid: Sequence[int] | None = None,
    repeats: int = 5,
    test_fraction: float = 0.4,
    limit: int | None = None,
    draws: int = 500,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> Result:
    """AUC and accuracy of probes on data sets and at depths that they were not trained on, with controls.

    The state is that of the last token. Probes: `mean_difference` (x . (mean of class 1 - mean of class 0), threshold
    midway) and `logistic` (`lab.probes.fit_batched`: L2, C = 1, on raw states). Both are fitted on the training rows of
    one data set. A group is on one side of a split in ALL data sets: a city that a probe was trained on is not tested, not
    even in its negated statement. Groups are compared by name; that a city stands in one data set and its country in
    another under other names is not noticed.

    Metrics: `auc` needs no threshold. `accuracy`: threshold from the training data set only. `accuracy_centred`: threshold
    at the mean score of the tested statements, as published (states centred per data set, tested ones included). That is
    TRANSDUCTIVE: it uses the tested statements, without labels, and presumes that half of them are true.

    Between depths: the probe of depth a on states of depth b, its threshold kept. `statistics` says how states are
    standardised (mean and scale of each dimension, training rows): "training_depth", as they are; "tested_depth", states
    of b are brought to the mean and scale of a first. What then transfers is a direction, not an offset.

    Controls, trained and tested on the same rows: `shuffled_labels` (the same probe on labels permuted over its training
    rows, tested on the real ones), `random_direction` and `token_count` (sign and threshold from the training rows),
    `bag_of_words` (word counts of the training texts).

    Args:
        model: from `lab.load`, or a Bridge of your own, as it is in memory.
        datasets: names (`lab.datasets.names()`), or a dict of name to table with columns example, text, label, group.
            "x" and "x_negated" together give the table on negation.
        depths: of the stream, None is all. depth_grid: those paired with each other; None takes about nine of `depths`.
        repeats: number of splits, at least 2. test_fraction: expected share of each data set tested.
        limit: about so many statements of each data set, whole groups, the same ones where data sets share them.
        draws: of the bootstrap over groups of the tested data set. seed: of splits, controls and bootstrap.
        resume: keep the finished result under the cache folder and read it when nothing changed; after an interruption go
            on from the states.
        progress: print an estimate and show bars.

    Returns:
        Result of kind "probe_transfer" with a row a split in `.table` and the same cells with intervals as summary.
        `.tables["pairs"]` is the headline: AUC at one depth, chosen for each split by how well the other splits' probes do on
        the TRAINED data set, without the statements whose groups this split tests (those probes may have been fitted on
        them). "negation": its rows between x and x_negated. Beside them "depth_transfer", "cosines" (of data sets),
        "depth_cosines" and "shared_groups".

    Raises:
        ValueError: unknown data set, one class, a depth out of range, fewer than 2 repeats, no split with both classes on
            both sides in each data set: before the model runs.
    """
    frame, names = _frame(datasets)
    last = model.cfg.n_layers
    chosen = require.wholes("depths", range(last + 1) if depths is None else depths, 0, last)
    usual = chosen[:: max(1, round(len(chosen) / 9))]
    grid = require.wholes("depth_grid", usual if depth_grid is None else depth_grid, 0, last)
    if not set(grid) <= set(chosen):
        raise ValueError(f"depth_grid {grid} has depths that are not among depths {chosen}")
    repeats = require.whole("repeats", repeats, 2, hint=" (depths are chosen on the other repeats)")
    seed, draws = require.seed(seed), require.whole("draws", draws, 1)
    test_fraction = require.fraction("test_fraction", test_fraction)
    if limit is not None:
        limit = require.whole("limit", limit, 1)
        frame = _limited(frame, limit, seed)
    about = frame.label.to_numpy(), frame.group.to_numpy(str), frame.dataset.to_numpy(str)
    joint_splits(*about, repeats=repeats, test_fraction=test_fraction, seed=seed)  # raises if none exist
    texts = frame.text.tolist()
    rows = zip(frame.dataset, frame.example, texts, frame.label, frame.group, strict=True)
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own),
        "datasets": names, "depths": chosen, "depth_grid": grid, "repeats": repeats,
        "test_fraction": test_fraction, "limit": limit, "draws": draws, "seed": seed, "position": "last token",
        "n_examples": frame.dataset.value_counts().to_dict(),
        "data_checksum": hashlib.sha256(repr([tuple(map(str, row)) for row in rows]).encode()).hexdigest(),
        "versions": versions(),
    }  # fmt: skip
    kept = keep(_work, {"model": own}, resume=resume)
    key = kept.key(parameters)
    shard = {
        "model": model,
        "frame": frame,
        "parameters": parameters,
        "key": key,
        "folder": kept.folder,
        "progress": progress,
    }
    if progress and not kept.has(key):
        _print_estimate(model, frame, parameters)
    return run_shards(_work, [shard], folder=kept.folder, progress=progress)[0].described(COLUMNS)


def joint_splits(
    labels: Shaped[np.ndarray, " example"],
    groups: Shaped[np.ndarray, " example"],
    dataset: Shaped[np.ndarray, " example"],
    *,
    repeats: int,
    test_fraction: float = 0.4,
    seed: int = 0,
) -> Bool[np.ndarray, "repeat example"]:
    """Splits of several data sets at once, True is test: a group is on one side in all of them, each has both classes there.

    The first splits of `lab.probes.group_splits` on all examples together that have both classes on both sides in each
    data set. For one data set they are its own.

    Raises:
        ValueError: as `group_splits`; too few such splits among the first `repeats + 100`.
    """
    repeats = require.whole("repeats", repeats, 1)
    drawn = probes.group_splits(labels, groups, repeats=repeats + _SPARE, test_fraction=test_fraction, seed=seed)
    kept = [
        test
        for test in drawn
        if all(len(set(labels[(dataset == name) & side])) == 2 for name in set(dataset) for side in (test, ~test))
    ]
    if len(kept) < repeats:
        raise ValueError(
            f"of {len(drawn)} splits {len(kept)} had both classes on both sides in each data set, and {repeats} are "
            "wanted: use larger data sets or more groups, or a test_fraction nearer 0.5"
        )
    return np.stack(kept[:repeats])


def weighted_auc(
    scores: Float[np.ndarray, " example"],
    labels: Shaped[np.ndarray, " example"],
    weights: Float[np.ndarray, "draw example"],
) -> Float[np.ndarray, " draw"]:
    """Area under the ROC curve where examples count so many times, ties one half; nan where a class has no weight.

    >>> weighted_auc(np.array([0.1, 0.4, 0.3]), np.array([0, 1, 0]), np.ones((1, 3))).tolist()
    [1.0]
    """
    order = np.argsort(scores, kind="stable")
    scores, ones = scores[order], labels[order] == 1
    weights = weights[:, order]
    zeros = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights * ~ones, 1)], 1)  # weight of 0s before each
    below, upto = np.searchsorted(scores, scores[ones]), np.searchsorted(scores, scores[ones], side="right")
    wins = (weights[:, ones] * (zeros[:, below] + zeros[:, upto])).sum(1) / 2
    pairs = weights[:, ones].sum(1) * zeros[:, -1]
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


# --- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """All statements of all data sets, one after the other. weights: [draw example], row 0 is 1: the estimate itself."""

    names: list[str]
    dataset: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    tests: np.ndarray  # [repeat example]
    weights: np.ndarray
    seed: int

    @classmethod
    def of(cls, frame: pd.DataFrame, about: Mapping[str, Any]) -> "_Data":
        names, seed = about["datasets"], about["seed"]
        dataset, groups = frame.dataset.to_numpy(str), frame.group.to_numpy(str)
        labels = frame.label.to_numpy(int)
        options = {"repeats": about["repeats"], "test_fraction": about["test_fraction"], "seed": seed}
        weights = np.ones((about["draws"] + 1, len(frame)), np.float32)
        for place, name in enumerate(names):  # groups are resampled within each tested data set
            rows = np.flatnonzero(dataset == name)
            codes, found = pd.factorize(groups[rows])
            rng = np.random.default_rng([seed, 1, place])
            counts = rng.multinomial(len(found), np.full(len(found), 1 / len(found)), size=about["draws"])
            weights[1:, rows] = counts[:, codes] if len(found) >= _FEWEST else np.nan
        return cls(names, dataset, labels, groups, joint_splits(labels, groups, dataset, **options), weights, seed)

    def train(self, name: str, repeat: int) -> np.ndarray:
        return (self.dataset == name) & ~self.tests[repeat]

    def measure(self, scores: np.ndarray, name: str, repeat: int) -> np.ndarray:
        """[metric draw] of scores [example] on the tested statements of a data set."""
        rows = (self.dataset == name) & self.tests[repeat]
        scores, labels, weights = scores[rows], self.labels[rows], self.weights[:, rows]
        right = np.stack([(scores > 0) == (labels == 1), (scores > scores.mean()) == (labels == 1)], 1)
        total = weights.sum(1, keepdims=True)
        shares = np.divide(weights @ right, total, out=np.full((len(weights), 2), np.nan), where=total > 0)
        return np.concatenate([weighted_auc(scores, labels, weights)[None], shares.T])

    def measure_all(self, scores: np.ndarray) -> np.ndarray:
        """[source target repeat metric draw] of scores [source repeat example]."""
        return np.array(
            [[[self.measure(by[r], name, r) for r in range(len(self.tests))] for name in self.names] for by in scores],
            np.float32,
        )

    def choose(self, scores: np.ndarray) -> np.ndarray:
        """[source repeat]: AUC of the other splits' probes on their data set, without the groups that this split tests."""
        found = np.full(scores.shape[:2], np.nan)
        one = np.ones((1, len(self.labels)))
        for s, name in enumerate(self.names):
            for r, test in enumerate(self.tests):
                free = [(self.dataset == name) & other & ~test for other in self.tests]
                values = [weighted_auc(scores[s, q, rows], self.labels[rows], one[:, rows])[0]
                          for q, rows in enumerate(free) if q != r and len(set(self.labels[rows])) == 2]  # fmt: skip
                found[s, r] = np.mean(values) if values else np.nan
        return found


def fit(
    kind: str,
    states: Float[np.ndarray, "example d_model"],
    labels: Shaped[np.ndarray, "example problem"],
    train: Bool[np.ndarray, "example problem"],
) -> tuple[Float[np.ndarray, "problem d_model"], Float[np.ndarray, " problem"]]:
    """Directions and offsets of probes: x . direction + offset above 0 means label 1.

    For "logistic" they are read back from the decision values of `lab.probes.fit_batched`, which are linear in the states:
    the least squares solution of least norm is the probe's own direction, since that lies in the span of the states.
    """
    if kind == "mean_difference":
        means = [((labels == y) & train).T @ states / ((labels == y) & train).sum(0)[:, None] for y in (0, 1)]
        direction = means[1] - means[0]
        return direction, -(direction * (means[0] + means[1]) / 2).sum(1)
    decisions = probes.fit_batched(states, labels, train)
    mean = states.mean(0)
    direction = np.linalg.lstsq(states - mean, decisions - decisions.mean(0), rcond=None)[0].T
    return direction, decisions.mean(0) - direction @ mean


def _one_depth(states: np.ndarray, data: _Data) -> tuple[dict[Probe, np.ndarray], dict[Probe, tuple]]:
    """Scores [source repeat example], and probes ([source repeat d_model], [source repeat]), of each kind."""
    scores: dict[Probe, np.ndarray] = {}
    fitted: dict[Probe, tuple] = {}
    repeats = len(data.tests)
    for kind in PROBES:
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for s, name in enumerate(data.names):
            rows = data.dataset == name
            train = np.stack([data.train(name, r) for r in range(repeats)], 1)[rows]
            labels = np.repeat(data.labels[rows, None], repeats, 1)
            shuffled, rng = labels.copy(), np.random.default_rng([data.seed, 2, s])
            for r in range(repeats):
                shuffled[train[:, r], r] = rng.permutation(labels[train[:, r], r])
            parts.append(fit(kind, states[rows], np.hstack([labels, shuffled]), np.hstack([train, train])))
        directions, offsets = (np.stack([part[i] for part in parts]) for i in (0, 1))
        for labels_are, half in (("task", slice(0, repeats)), ("shuffled", slice(repeats, None))):
            fitted[kind, labels_are] = (directions[:, half], offsets[:, half])
            scores[kind, labels_are] = directions[:, half] @ states.T + offsets[:, half, None]
    random = np.random.default_rng([data.seed, 3]).normal(size=(repeats, states.shape[1]))
    scores["random_direction", "task"] = _along(random @ states.T, data)
    return scores, fitted


def _along(values: np.ndarray, data: _Data) -> np.ndarray:
    """Scores [source repeat example] from one number for each example (and repeat), sign and threshold from the source."""
    values = np.broadcast_to(values, data.tests.shape).astype(float)
    scores = np.empty((len(data.names), *values.shape))
    for s, name in enumerate(data.names):
        for r, value in enumerate(values):
            train = data.train(name, r)[:, None]
            direction, offset = fit("mean_difference", value[:, None], data.labels[:, None], train)
            scores[s, r] = value * direction[0, 0] + offset[0]
    return scores


def _work(
    *,
    model: TransformerBridge,
    frame: pd.DataFrame,
    parameters: dict[str, Any],
    key: str,
    folder: Path | None,
    progress: bool,
) -> Result:
    data, depths, grid = _Data.of(frame, parameters), parameters["depths"], parameters["depth_grid"]
    texts = frame.text.tolist()
    scratch = folder / f"{key}.states" if folder else None  # stays after an interruption: the next call goes on from it
    states = collect_states(model, texts, index=depths, folder=scratch, progress=progress)["resid"].values
    bag = []
    for name in data.names:
        others = np.stack([~data.train(name, r) for r in range(len(data.tests))])
        bag.append(probes.bag_of_words(np.array(texts, object), data.labels, others).decisions[:, :, 0])
    found: dict[tuple[str, str, float], np.ndarray] = {
        ("bag_of_words", "task", np.nan): data.measure_all(np.stack(bag)),
        ("token_count", "task", np.nan): data.measure_all(_along(tokenize(model, texts).lengths, data)),
    }
    fitted: dict[int, dict[Probe, tuple]] = {}
    choice: dict[tuple[str, int], np.ndarray] = {}
    for place, depth in enumerate(tqdm(depths, desc="Probing", unit="depth", disable=not progress, leave=False)):
        scores, fitted[depth] = _one_depth(np.asarray(states[:, place], float), data)
        found |= {(*name, depth): data.measure_all(values) for name, values in scores.items()}
        choice |= {(kind, depth): data.choose(scores[kind, "task"]) for kind in PROBES}
    by_depth = {depth: states[:, depths.index(depth)].astype(float) for depth in grid}
    between, across = _cosines(fitted, data, grid)
    tables = {
        "pairs": _pairs(found, choice, data, depths), "depth_transfer": _depth_transfer(by_depth, fitted, data),
        "cosines": between, "depth_cosines": across, "shared_groups": _shared_groups(data),
    }  # fmt: skip
    tables["negation"] = _negation(tables["pairs"])
    if scratch is not None:
        del states
        shutil.rmtree(scratch)
    table, summary = _tables(found, data, parameters)
    return Result("probe_transfer", table, summary, parameters, tables)


# --- tables ---------------------------------------------------------------------------------------------------------


def _mean(values: Any, axis: int) -> np.ndarray:
    """Mean of the finite values; nan where there is none."""
    values = np.asarray(values)
    known = np.isfinite(values)
    total, n = np.where(known, values, 0).sum(axis), known.sum(axis)
    return np.divide(total, n, out=np.full(n.shape, np.nan), where=n > 0)


def _interval(drawn: np.ndarray) -> tuple[float, float, float]:
    """Estimate (draw 0) and percentiles of the others; a draw in which a class is missing does not count."""
    low, high = np.nanquantile(drawn[1:], [0.025, 0.975]) if np.isfinite(drawn[1:]).any() else (np.nan, np.nan)
    return float(drawn[0]), float(low), float(high)


def _controls(found: Mapping, kind: str, depth: int) -> np.ndarray:
    """[source target repeat metric draw] of each control, in a new first axis."""
    same = (kind, "shuffled", depth), ("random_direction", "task", depth)
    return np.stack([*(found[key] for key in same), *(found[key] for key in found if np.isnan(key[-1]))])


def _tables(found: Mapping, data: _Data, about: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows, means = [], []
    groups = {name: len(set(data.groups[data.dataset == name])) for name in data.names}
    for (probe, labels, depth), values in found.items():
        over = _mean(values, 2)  # [source target metric draw]
        against = over - _mean(_controls(found, probe, depth), 3).max(0) if (probe, labels) in TASK else over * np.nan
        for s, t, m in np.ndindex(*over.shape[:3]):
            place = {
                "trained_on": data.names[s], "tested_on": data.names[t], "depth": depth,
                "relative_depth": depth / about["n_layers"], "probe": probe, "labels": labels, "metric": METRICS[m],
            }  # fmt: skip
            rows += [{**place, "split": r, "value": float(values[s, t, r, m, 0])} for r in range(values.shape[2])]
            mean, low, high = _interval(over[s, t, m])
            difference, d_low, d_high = _interval(against[s, t, m])
            means.append({**place, "mean": mean, "low": low, "high": high, "difference": difference,
                          "difference_low": d_low, "difference_high": d_high,
                          "n_examples": about["n_examples"][data.names[t]], "n_groups": groups[data.names[t]]})  # fmt: skip
    return pd.DataFrame(rows).assign(model=about["model"], seed=about["seed"]), pd.DataFrame(means)


def _pairs(found: Mapping, choice: Mapping, data: _Data, depths: Sequence[int]) -> pd.DataFrame:
    rows = []
    for kind in PROBES:
        chosen = np.nan_to_num(np.stack([choice[kind, depth] for depth in depths]), nan=-1).argmax(0)  # [source repeat]
        for s, t in np.ndindex(len(data.names), len(data.names)):
            at = [depths[place] for place in chosen[s]]
            own = _mean([found[kind, "task", d][s, t, r, 0] for r, d in enumerate(at)], 0)
            controls = _mean([_controls(found, kind, d)[:, s, t, r, 0] for r, d in enumerate(at)], 0)
            auc, low, high = _interval(own)
            drawn = own - controls.max(0)
            difference, d_low, d_high = _interval(drawn)
            n_groups = len(set(data.groups[data.dataset == data.names[t]]))
            spread = drawn[1:][np.isfinite(drawn[1:])]
            error = spread.std() if len(spread) > 1 else np.nan
            p = 2 * stats.t.sf(abs(difference) / error, n_groups - 1) if error > 0 else float(difference == 0) or np.nan
            rows.append({
                "trained_on": data.names[s], "tested_on": data.names[t], "probe": kind, "auc": auc, "low": low,
                "high": high, "difference": difference, "difference_low": d_low, "difference_high": d_high,
                "p": p, "p_holm": np.nan, "depth_low": min(at),
                "depth_high": max(at), "n_groups": n_groups,
            })  # fmt: skip
    table = pd.DataFrame(rows)
    for _, part in table.groupby("probe"):
        table.loc[part.index, "p_holm"] = metrics.holm(part.p.to_numpy())
    return table


def _negation(pairs: pd.DataFrame) -> pd.DataFrame:
    negated = (pairs.tested_on == pairs.trained_on + "_negated") | (pairs.trained_on == pairs.tested_on + "_negated")
    table = pairs.loc[negated, ["trained_on", "tested_on", "probe", "auc", "low", "high", "n_groups"]]
    reading = np.select([table.low > 0.5, table.high < 0.5], ["is true", "is plausible"], "not decided")
    return table.assign(reading=reading).reset_index(drop=True)


def _depth_transfer(states: Mapping[int, np.ndarray], fitted: Mapping, data: _Data) -> pd.DataFrame:
    rows = []
    for s, name in enumerate(data.names):
        values: dict[tuple, list[np.ndarray]] = {}
        for r in range(len(data.tests)):
            train = data.train(name, r)
            scale = {depth: (x[train].mean(0), x[train].std(0)) for depth, x in states.items()}
            for a, b in ((a, b) for a in states for b in states):
                factor = np.divide(scale[a][1], scale[b][1], out=np.zeros_like(scale[b][1]), where=scale[b][1] > 0)
                moved = states[b] if a == b else (states[b] - scale[b][0]) * factor + scale[a][0]
                for kind in PROBES:
                    direction, offset = (part[s, r] for part in fitted[a][kind, "task"])
                    for statistics, x in (("training_depth", states[b]), ("tested_depth", moved)):
                        measured = data.measure(x @ direction + offset, name, r)[:2]
                        values.setdefault((kind, a, b, statistics), []).append(measured)
        for (kind, a, b, statistics), by_split in values.items():
            for metric, drawn in zip(METRICS, _mean(by_split, 0), strict=False):
                rows.append((name, kind, a, b, statistics, metric, *_interval(drawn)))
    columns = ["dataset", "probe", "trained_depth", "tested_depth", "statistics", "metric", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _cosines(fitted: Mapping, data: _Data, grid: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cosines of directions: between data sets at each depth, and between depths for each data set."""
    between, depths = [], []

    def unit(depth: int, kind: str, labels: str = "task") -> np.ndarray:  # [source repeat d_model]
        directions = fitted[depth][kind, labels][0]
        return directions / np.maximum(np.linalg.norm(directions, axis=-1, keepdims=True), 1e-30)

    for kind in PROBES:
        for depth in fitted:
            own, null = unit(depth, kind), unit(depth, kind, "shuffled")
            same = np.einsum("ard,brd->ab", own, own) / len(data.tests)
            chance = np.abs(np.einsum("ard,brd->abr", own, null)).mean(-1)
            for a, b in np.ndindex(*same.shape):
                between.append((depth, kind, data.names[a], data.names[b], same[a, b], chance[a, b]))
        for a, b in ((a, b) for a in grid for b in grid):
            both = (unit(a, kind) * unit(b, kind)).sum(-1).mean(-1)
            depths += [(name, kind, a, b, float(cosine)) for name, cosine in zip(data.names, both, strict=True)]
    return (
        pd.DataFrame(between, columns=["depth", "probe", "dataset_a", "dataset_b", "cosine", "null"]),
        pd.DataFrame(depths, columns=["dataset", "probe", "depth_a", "depth_b", "cosine"]),
    )


def _shared_groups(data: _Data) -> pd.DataFrame:
    groups = {name: set(data.groups[data.dataset == name]) for name in data.names}
    rows = [(a, b, len(groups[a] & groups[b])) for a in data.names for b in data.names]
    return pd.DataFrame(rows, columns=["dataset_a", "dataset_b", "n"])


# --- input ----------------------------------------------------------------------------------------------------------


def _frame(datasets: Sequence[str] | Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, list[str]]:
    """All statements with their data set's name, and the names in order."""
    given = require.listed("datasets", datasets, "names")
    if not given or len(set(map(str, given))) < len(given):
        raise ValueError(f"datasets={given}: give at least one, and none twice")
    frames = dict(datasets) if isinstance(datasets, Mapping) else {name: load(name) for name in given}
    columns = ["example", "text", "label", "group"]
    parts = []
    for name, frame in frames.items():
        check_concept_data(frame, name=name)
        parts.append(frame[columns].astype({"text": str, "group": str}).assign(dataset=name))
    return pd.concat(parts, ignore_index=True), list(frames)


def _limited(frame: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """Whole groups of each data set, in one random order for all, until it has at least `limit` statements."""
    order = np.random.default_rng([seed, 4]).permutation(np.array(sorted(set(frame.group)), object))
    kept = []
    for _, part in frame.groupby("dataset", sort=False):
        sizes = part.group.value_counts()
        sizes = sizes.reindex([group for group in order if group in sizes.index]).cumsum()
        kept.append(part[part.group.isin(sizes.index[: int((sizes < limit).sum()) + 1])])
    return pd.concat(kept, ignore_index=True)


def _print_estimate(model: TransformerBridge, frame: pd.DataFrame, about: Mapping[str, Any]) -> None:
    """Time a few texts and the work of one depth on random states, and scale up. Right to a factor of two."""
    texts, depths = frame.text.tolist(), about["depths"]
    few = texts[:: max(1, len(texts) // 24)][:24]
    start = time.perf_counter()
    collect_states(model, few, index=depths, progress=False)
    tokens = int(tokenize(model, texts).lengths.sum())
    states = (time.perf_counter() - start) / int(tokenize(model, few).lengths.sum()) * tokens
    data = _Data.of(frame, about)
    noise = np.random.default_rng(0).normal(size=(len(frame), model.cfg.d_model))
    start = time.perf_counter()
    scores, _ = _one_depth(noise, data)
    for values in scores.values():
        data.measure_all(values)
    fits = (time.perf_counter() - start) * len(depths)
    print(f"About {states:.0f} s for the states of {len(texts)} texts ({tokens} tokens) and {fits:.0f} s for probes with "
          f"their controls and intervals at {len(depths)} depths.")  # fmt: skip
