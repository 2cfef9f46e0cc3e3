"""At which depth can a linear probe read a concept from a model's states?

After Jin et al., "Exploring Concept Depth" (arXiv 2404.07066), with what that work lacks: group-aware repeated splits,
a majority, a bag of words, a shuffled-label control, a random-weight null, and intervals. What it does not show: that the
model uses what the probe reads, or that the probe reads the concept and not something that goes with it.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, models, probes, require, statistics
from lab.identity import identity
from lab.interventions import quantized, require_groups
from lab.results import Result, joined, keep, study, versions
from lab.states import collect_states
from lab.texts import tokenize

SITES = ("resid", "mlp_in")  # our reading, and the paper's: norm(resid_mid), what the MLP reads
METRICS = ("accuracy", "f1", "auc")
COLUMNS = {
    "model": "name of the model",
    "dataset": "name of the data set",
    "weights": "trained, random (the null), or none (a baseline that reads texts)",
    "site": "what was read: resid is the stream, mlp_in what the MLP reads, ...; text for a baseline",
    "depth": "blocks passed, 0 to L; for other sites than resid, layer + 1: the layers 1 to L of the published plots",
    "relative_depth": "depth / L",
    "labels": "what the probe was fitted and tested on: task, or shuffled (the control)",
    "probe": "linear, bag_of_words or majority",
    "metric": "accuracy, f1 (of label 1) or auc on the tested examples; train_accuracy (of the control) on the others",
    "split": "number of the split",
    "value": "score on one split, from 0 to 1",
    "seed": "of splits, shuffled labels, noise, random weights and bootstraps",
    "mean": "mean score over the splits",
    "low": "lower end of the 95 % interval: corrected resampled t (`lab.statistics.corrected_interval`)",
    "high": "upper end of that interval",
    "n_splits": "number of splits",
    "n_examples": "number of examples",
    "n_groups": "number of groups",
    "point": "jump, converging and readable point; onset, from where accuracy stays above the mean upper end of the control's "
    "intervals; peak, its depth chosen on the same groups (naive) or others (crossfit)",
    "estimate": "fraction of depth; of a peak, accuracy",
    "points.low": "lower end of the 95 % interval, bootstrap over groups; none for a peak",
    "points.high": "upper end of that interval",
    "undefined": "share of bootstrap draws in which the point does not exist",
    "example": "name of the statement",
    "group": "its subject: examples of a group are always on the same side of a split",
    "label": "1 or 0",
    "text": "the statement, without noise or instruction",
    "template": "how it was made",
    "difficulty": "of the data set",
    "decision": "log-odds of label 1, mean over the splits that tested the statement",
    "share_right": "share of those splits in which it was predicted rightly",
    "times_tested": "number of those splits",
}


def run(
    model: TransformerBridge, data: str | pd.DataFrame, *, seed: int = 0, sites: Sequence[str] = SITES,
    depths: Sequence[int] | None = None, repeats: int = 10, test_fraction: float = 0.4, noise: bool = False,
    bits: int | None = None, group_size: int = 64, instruction: bool = False, null: bool = True, control: bool = True,
    solver: str = "batched", limit: int | None = None, resume: bool = True, executor: Executor | None = None,
    progress: bool = True,
) -> Result:  # fmt: skip
    """Accuracy, F1 and AUC of linear probes (`lab.probes`) of the last token's state at every depth, beside what they must beat.

    Args:
        data: a data set's name (`lab.datasets.names()`), or a table with columns example, text, label (0/1) and group.
        sites, depths: `resid` is the stream, `mlp_in` the paper's reading; chosen depths of `resid` give no points.
        repeats, test_fraction: number of splits (an interval needs 2), and the share of examples tested in each.
        noise: glue "aaa" or "bbb" in front of each text without a space, as published. instruction: put the card's there.
        bits, group_size: round the blocks' weights to 2..8 bits (`lab.interventions.quantized`); None leaves them.
        null, control: also probe the model with random weights; also fit labels shuffled over the texts.
        solver: "batched" (converged) or "sklearn" (at most 100 iterations, as published).
        limit: only so many examples, in whole groups drawn with `seed`. resume, executor: `keep` and `study` of `lab.results`.

    Raises:
        ValueError: what the data, the model or these numbers do not allow; before the model runs.
    """
    seed, sites = require.seed(seed), require.some_of("sites", sites, ("resid", *models.SITES))
    flags = require.flags(noise=noise, instruction=instruction, null=null, control=control)
    noise, instruction, null, control = flags
    repeats, test_fraction = require.whole("repeats", repeats, 1), require.fraction("test_fraction", test_fraction)
    solver = require.one_of("solver", solver, probes.SOLVERS)
    depths = _depths(model, sites, depths)
    if bits is not None:
        bits, group_size = require.whole("bits", bits, 2, 8), require.whole("group_size", group_size, 1)
        require_groups(model, bits, group_size=group_size)
    limit = None if limit is None else require.whole("limit", limit, 1)
    frame, name = _frame(data, limit, seed)
    labels, groups = frame.label.to_numpy(), frame.group.to_numpy(str)
    splits = probes.group_splits(labels, groups, repeats=repeats, test_fraction=test_fraction, seed=seed)
    texts = _texts(frame, noise=noise, instruction=instruction, seed=seed)
    tokenize(model, texts)  # raises for a text that the model cannot read
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own), "dataset": name, "data_checksum": _checksum(frame, texts),
        "n_examples": len(frame), "n_groups": len(set(groups)), "seed": seed, "sites": sites, "depths": depths,
        "repeats": repeats, "test_fraction": test_fraction, "noise": noise, "bits": bits,
        "group_size": group_size if bits else None, "instruction": instruction, "control": control, "solver": solver,
        "limit": limit, "null": null, "position": "last token", "versions": versions(),
    }  # fmt: skip
    shared = {"frame": frame, "texts": texts, "splits": splits, "parameters": parameters,
              "progress": progress and executor is None}  # fmt: skip
    parts = [{"weights": kind} for kind in (("trained", "random") if null else ("trained",))]
    kept = keep(work, {"model": own}, resume=resume)
    known = {name: value for name, value in parameters.items() if name not in ("limit", "null")}  # the data tell
    found = study(work, parts, kept=kept, known=known, shared=shared, models={"model": model}, executor=executor,
                  progress=progress)  # fmt: skip
    table, tables = joined(found)
    table = pd.concat([table, _baselines(labels, texts, splits, parameters)], ignore_index=True)
    tables["statements"] = frame[["example", "text", "label", "group", "template", "difficulty"]].reset_index(drop=True)
    return Result("concept_depth", table, _summarise(table, parameters), parameters, tables).described(COLUMNS)


def compare(a: Result, b: Result, *, site: str = "resid", seed: int = 0) -> pd.DataFrame:
    """Accuracy of run a minus run b at equal fractions of depth, on the same statements (`lab.statistics.paired_difference`).

    Two models on one data set, or one model under two conditions.

    Raises:
        ValueError: the two runs did not test the same statements, or one of them probed only some depths.
    """
    if a.parameters["depths"] is not None or b.parameters["depths"] is not None:
        raise ValueError("a run with chosen depths= has no curve to compare; run both with depths=None")
    one, other = (_right(result, site) for result in (a, b))
    if not one.index.equals(other.index):
        raise ValueError(
            f"the runs tested different statements ({len(one)} of {a.parameters['dataset']}, {len(other)} of "
            f"{b.parameters['dataset']}); run both on one data set with one seed, limit and number of repeats"
        )
    groups = a.tables["examples"].drop_duplicates("example").set_index("example").group.reindex(one.index)
    first = 0 if site == "resid" else 1
    return statistics.paired_difference(
        one.to_numpy(), other.to_numpy(), groups.to_numpy(str), first_depth=first, seed=seed
    )


def work(
    *, model: TransformerBridge, weights: str, frame: pd.DataFrame, texts: list[str], splits: np.ndarray,
    parameters: dict[str, Any], progress: bool, scratch: Path | None,
) -> Result:  # fmt: skip
    """One model (trained or random) on one data set under one condition."""
    seed, labels, groups = parameters["seed"], frame.label.to_numpy(), frame.group.to_numpy(str)
    if weights == "random":
        model = models.random_twin(model, seed=seed)
    bits, group_size = parameters["bits"], parameters["group_size"]
    with quantized(model, bits, group_size=group_size) if bits else nullcontext():
        states = collect_states(model, texts, sites=parameters["sites"], index=parameters["depths"], folder=scratch,
                                progress=progress)  # fmt: skip
    rows: list[pd.DataFrame] = []
    tables: dict[str, list[pd.DataFrame]] = {"points": [], "examples": []}
    for site, collected in states.items():
        scores = probes.probe_depths(
            collected.values, labels, groups, texts=np.array(texts, object), splits=splits,
            solver=parameters["solver"], control=parameters["control"], seed=seed, progress=progress,
        )  # fmt: skip
        depths = np.array(collected.index) + (site != "resid")  # layer l ends at depth l + 1
        place = {"weights": weights, "site": site}
        rows.append(_scores(scores, depths, parameters["n_layers"]).assign(**place))
        if parameters["depths"] is None:
            points = _points(scores, groups, int(depths[0]), seed, parameters["test_fraction"])
            tables["points"].append(points.assign(**place))
        if weights == "trained":
            tables["examples"].append(_examples(scores, frame, depths).assign(**place))
    about = {"model": parameters["model"], "dataset": parameters["dataset"], "seed": seed}
    table = pd.concat(rows, ignore_index=True).assign(**about)
    found = {key: pd.concat(frames, ignore_index=True) for key, frames in tables.items() if frames}
    return Result("concept_depth", table, pd.DataFrame(), {**parameters, "weights": weights}, found)


# --- tables -----------------------------------------------------------------------------------------------------------


def _scores(scores: probes.ProbeScores, depths: np.ndarray, n_layers: int) -> pd.DataFrame:
    measured = [("task", metric, getattr(scores, metric)()) for metric in METRICS]
    if (null := scores.control) is not None:
        measured += [("shuffled", metric, getattr(null, metric)()) for metric in METRICS]
        measured += [("shuffled", "train_accuracy", null.accuracy(train=True))]
    frames = []
    for labels, metric, value in measured:
        split, column = np.indices(value.shape).reshape(2, -1)
        cells = {"depth": depths[column], "labels": labels, "probe": "linear", "metric": metric, "split": split}
        frames.append(pd.DataFrame({**cells, "value": value.ravel()}))
    table = pd.concat(frames, ignore_index=True)
    return table.assign(relative_depth=table.depth / n_layers)


def _points(
    scores: probes.ProbeScores, groups: np.ndarray, first_depth: int, seed: int, test_fraction: float
) -> pd.DataFrame:
    correct, tested = scores.correct()
    groups, above = groups[tested], None
    if (
        scores.control is not None and len(scores.control.accuracy()) > 1
    ):  # what shuffled labels reach by chance: the upper end of their intervals, mean over depths
        above = float(np.mean(statistics.corrected_interval(scores.control.accuracy(), test_fraction).high))
    points = statistics.depth_points(correct, groups, first_depth=first_depth, above=above, seed=seed).reset_index()
    peak = statistics.crossfit_peak(correct, groups, seed=seed)
    peaks = pd.DataFrame({"point": ["peak_crossfit", "peak_naive"], "estimate": [peak.crossfit, peak.naive],
                          "low": np.nan, "high": np.nan, "n_groups": len(set(groups)), "undefined": 0.0})  # fmt: skip
    return pd.concat([points, peaks], ignore_index=True)


def _examples(scores: probes.ProbeScores, frame: pd.DataFrame, depths: np.ndarray) -> pd.DataFrame:
    correct, tested = scores.correct()
    times = scores.test.sum(0)[tested]
    decision = np.where(scores.test[:, :, None], scores.decisions, 0).sum(0)[tested] / times[:, None]
    row, column = np.indices(decision.shape).reshape(2, -1)
    table = frame.loc[tested, ["example", "group", "label"]].iloc[row].reset_index(drop=True)
    table.insert(2, "depth", depths[column])
    return table.assign(
        decision=decision.ravel().round(4), share_right=correct.ravel().round(4), times_tested=times[row]
    )


def _baselines(labels: np.ndarray, texts: list[str], splits: np.ndarray, about: dict[str, Any]) -> pd.DataFrame:
    bag, most = probes.bag_of_words(np.array(texts, object), labels, splits), probes.majority(labels, splits)
    tables = [_scores(scores, np.array([0]), 1).assign(probe=name)
              for name, scores in (("bag_of_words", bag), ("majority", most))]  # fmt: skip
    return pd.concat(tables, ignore_index=True).assign(
        weights="none", site="text", depth=np.nan, relative_depth=np.nan, model=about["model"],
        dataset=about["dataset"], seed=about["seed"],
    )  # fmt: skip


def _summarise(table: pd.DataFrame, parameters: dict[str, Any]) -> pd.DataFrame:
    keys = ["weights", "site", "depth", "relative_depth", "labels", "probe", "metric"]
    rows = []
    for key, part in table.groupby(keys, dropna=False, sort=False):
        interval = statistics.corrected_interval(part["value"].to_numpy(), parameters["test_fraction"])
        rows.append((*key, *map(float, interval), len(part)))
    summary = pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "n_splits"])
    return summary.assign(n_examples=parameters["n_examples"], n_groups=parameters["n_groups"])


def _right(result: Result, site: str) -> pd.DataFrame:
    """[example depth]: the share of splits in which each was predicted rightly."""
    rows = result.tables["examples"]
    rows = rows[rows.site == site]
    if rows.empty:
        raise ValueError(f"this result has no site {site!r}; it has {', '.join(result.parameters['sites'])}")
    return rows.pivot(index="example", columns="depth", values="share_right")


# --- input ----------------------------------------------------------------------------------------------------------


def _depths(model: TransformerBridge, sites: list[str], depths: Sequence[int] | None) -> list[int] | None:
    for site in sites:
        models.require_site(model, site)
    if depths is None:
        return None
    depths = require.wholes("depths", depths, 0, model.cfg.n_layers, hint="; None probes all of them")
    if sites != ["resid"]:
        raise ValueError(f"depths= chooses depths of the residual stream: give sites=('resid',) with it, not {sites}")
    return depths


def _frame(data: str | pd.DataFrame, limit: int | None, seed: int) -> tuple[pd.DataFrame, str]:
    if not isinstance(data, str | pd.DataFrame):
        raise ValueError(f"data is a {type(data).__name__}; give a data set's name or a table (see lab.datasets.read)")
    if isinstance(data, str):
        frame, name = datasets.load(data), data
    else:
        frame, name = data, data.attrs.get("card", {}).get("name", "your data")
    datasets.check_concept_data(frame, name=name)
    if limit is not None:
        frame = _limited(frame, limit, seed)
        datasets.check_concept_data(frame, name=name)
    return frame, name


def _limited(frame: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """Whole groups in random order until there are at least `limit` examples; rows keep their order."""
    if limit >= len(frame):
        return frame
    groups = frame.group.astype(str)
    order = np.random.default_rng([seed, 2]).permutation(groups.unique().astype(str))
    sizes = groups.value_counts().reindex(order).cumsum()
    chosen = sizes.index[: int((sizes < limit).sum()) + 1]
    return frame[groups.isin(set(chosen))].reset_index(drop=True)


def _texts(frame: pd.DataFrame, *, noise: bool, instruction: bool, seed: int) -> list[str]:
    texts = frame.text.astype(str).to_numpy(object)
    if noise:
        texts = np.random.default_rng([seed, 3]).choice(np.array(["aaa", "bbb"], object), len(texts)) + texts
    if instruction:
        card = frame.attrs.get("card", {})
        if not card.get("instruction"):
            raise ValueError("this data has no card with an instruction; use instruction=False")
        said = card["instruction"]
        texts = [f"{said} {text}" if card["instruction_place"] == "before" else f"{text} {said}" for text in texts]
    return [str(text) for text in texts]


def _checksum(frame: pd.DataFrame, texts: list[str]) -> str:
    rows = zip(frame.example.astype(str), texts, frame.label.astype(int), frame.group.astype(str), strict=True)
    return hashlib.sha256("\n".join(f"{e}\t{t}\t{y}\t{g}" for e, t, y, g in rows).encode()).hexdigest()
