"""At which depth can a linear probe read a concept from a model's states?

After Jin et al., "Exploring Concept Depth" (arXiv 2404.07066), with what that work lacks: group-aware repeated splits,
a majority, a bag of words, a shuffled-label control, a random-weight null, and intervals. What it does not show: that the
model uses what the probe reads, or that the probe reads the concept and not something that goes with it.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, models, probes, require, statistics
from lab.identity import identity
from lab.interventions import quantizable, quantized
from lab.results import Result, for_executor, keep, run_shards, versions
from lab.states import collect_states
from lab.texts import tokenize

SITES = ("resid", "mlp_in")  # our reading, and the paper's: norm(resid_mid), what the MLP reads
METRICS = ("accuracy", "f1", "auc")


def run(
    model: TransformerBridge,
    data: str | pd.DataFrame,
    *,
    seed: int = 0,
    sites: Sequence[str] = SITES,
    depths: Sequence[int] | None = None,
    repeats: int = 10,
    test_fraction: float = 0.4,
    noise: bool = False,
    bits: int | None = None,
    group_size: int = 64,
    instruction: bool = False,
    null: bool = True,
    control: bool = True,
    solver: str = "batched",
    limit: int | None = None,
    resume: bool = True,
    executor: Executor | None = None,
    progress: bool = True,
) -> Result:
    """Accuracy, F1 and AUC of a linear probe at every depth, with baselines, control and null.

    The state is that of the last token. Probes are L2-regularised logistic regressions (C = 1, features not scaled, as
    published), fitted on `1 - test_fraction` of the groups and tested on the others, `repeats` times.

    Args:
        model: from `lab.load`, or a Bridge of your own, as it is in memory.
        data: a data set's name (`lab.datasets.names()`), or a table with columns example, text, label (0/1) and group.
        seed: of splits, shuffled labels, noise, random weights and bootstraps.
        sites: `resid` is the stream at depths 0..L; `mlp_in` (one value a layer) is the paper's reading.
        depths: depths of the stream to probe, with sites=("resid",); None is all. With a choice, the jump and converging
            point, which need the whole curve, are not computed.
        repeats, test_fraction: number of splits (an interval needs at least 2), and the share of examples tested in each.
        noise: glue the letters "aaa" or "bbb" (probability 1/2 each) in front of each text without a space, as published.
        bits, group_size: round the blocks' weights to 2..8 bits (`lab.interventions.quantized`); None leaves them.
        instruction: put the data set's instruction before or after each text, as its card says; off: the bare text.
        null: also run the same model with random weights.
        control: also fit labels shuffled over the texts (Hewitt and Liang, arXiv 1909.03368).
        solver: "batched" (converged) or "sklearn" (one at a time, at most 100 iterations, as published).
        limit: use only so many examples: whole groups, drawn with `seed`. For a first look.
        resume: keep finished parts and states under the cache folder, and go on from them after an interruption. They
            are found again by a hash of all parameters, the data, the model as it is in memory (`lab.identity`), versions
            and the code that runs. Where a hook of yours, say, is set, nothing is kept or read, and a line says so.
        executor: runs the two parts (trained, random weights) elsewhere (`lab.results.run_shards`).
        progress: print an estimate and show progress bars.

    Returns:
        Result with
        `.table`: model, dataset, weights (trained, random), site, depth, relative_depth, labels (task, shuffled), probe
            (linear, bag_of_words, majority), metric, split, value, seed. For `mlp_in`, depth is layer + 1: the layers
            1..L of the published plots.
        `.summary`: mean over splits with a corrected resampled t interval (`lab.statistics.corrected_interval`).
        `.tables["points"]` (when all depths were probed): jump, converging and readable point as fractions of depth,
            with bootstrap intervals over groups, and the peak, chosen and reported on different groups.
        `.tables["examples"]`: for each statement and depth, the mean decision value (log-odds of label 1) over the splits
            that tested it, and the share of them that were right. `.tables["statements"]`: the statements themselves.

    Raises:
        ValueError: unknown data set, missing column, one class, empty or too long text, a group that spans everything, a
            depth out of range, an absent site: all before the model runs.
    """
    frame, name = _frame(data)
    seed, sites = require.seed(seed), require.some_of("sites", sites, ("resid", *models.SITES))
    noise, instruction = require.flags(noise=noise, instruction=instruction)
    null, control = require.flags(null=null, control=control)
    repeats, test_fraction = require.whole("repeats", repeats, 1), require.fraction("test_fraction", test_fraction)
    solver = require.one_of("solver", solver, probes.SOLVERS)
    if depths is not None:
        depths = require.wholes("depths", depths, 0, model.cfg.n_layers, hint="; None probes all of them")
        if sites != ["resid"]:
            raise ValueError(
                f"depths= chooses depths of the residual stream: give sites=('resid',) with it, not {sites}"
            )
    for site in sites:
        models.require_site(model, site)
    if bits is not None:
        bits, group_size = require.whole("bits", bits, 2, 8), require.whole("group_size", group_size, 1)
        quantizable(model, bits, group_size=group_size)
    if limit is not None:
        limit = require.whole("limit", limit, 1)
        frame = _limited(frame, limit, seed)
    datasets.check_concept_data(frame, name=name)
    labels, groups = frame.label.to_numpy(), frame.group.to_numpy(str)
    probes.group_splits(
        labels, groups, repeats=repeats, test_fraction=test_fraction, seed=seed
    )  # raises if none exists
    texts = _texts(frame, noise=noise, instruction=instruction, seed=seed)
    tokens = int(tokenize(model, texts).lengths.sum())
    own = identity(model)
    sent = for_executor(model, executor)
    parameters = {
        **models.facts(model), "identity": str(own),
        "dataset": name, "data_checksum": _checksum(frame, texts), "n_examples": len(frame),
        "n_groups": len(set(groups)), "seed": seed, "sites": sites, "depths": depths,
        "repeats": repeats, "test_fraction": test_fraction, "noise": noise, "bits": bits,
        "group_size": group_size if bits else None, "instruction": instruction, "control": control, "solver": solver,
        "limit": limit, "null": null, "position": "last token", "versions": versions(),
    }  # fmt: skip
    weights = ("trained", "random") if null else ("trained",)
    kept = keep(_shard, {"model": own}, resume=resume)
    known = {name: value for name, value in parameters.items() if name not in ("limit", "null")}  # the data tell
    shards = [
        {
            "model": sent,
            "frame": frame,
            "texts": texts,
            "weights": kind,
            "parameters": parameters,
            "key": kept.key({**known, "weights": kind}),
            "folder": kept.folder,
            "progress": progress and executor is None,
        }
        for kind in weights
    ]
    missing = [shard for shard in shards if not kept.has(shard["key"])]
    if progress and missing:
        _print_estimate(model, texts, tokens, len(frame), repeats * (1 + control), len(missing), sites, depths)
    parts = run_shards(_shard, shards, folder=kept.folder, executor=executor, describe="parts", progress=progress)
    tables = {
        key: pd.concat([part.tables[key] for part in parts if key in part.tables], ignore_index=True)
        for key in ("points", "examples")
        if any(key in part.tables for part in parts)
    }
    tables["statements"] = frame[["example", "text", "label", "group", "template", "difficulty"]].reset_index(drop=True)
    baselines = _baselines(frame, texts, parameters)
    table = pd.concat([*(part.table for part in parts), baselines], ignore_index=True)
    summary = _summarise(table, parameters)
    return Result("concept_depth", table, summary, parameters, tables)


def compare(a: Result, b: Result, *, site: str = "resid", seed: int = 0) -> pd.DataFrame:
    """Accuracy of run a minus run b at equal fractions of depth, on the same statements, with a paired interval.

    Two models on one data set, or one model under two conditions. See `lab.statistics.paired_difference`.

    Raises:
        ValueError: the two runs did not test the same statements, or one of them probed only some depths.
    """
    if a.parameters["depths"] is not None or b.parameters["depths"] is not None:
        raise ValueError("a run with chosen depths= has no curve to compare; run both with depths=None")
    tables = [_wide(result, site) for result in (a, b)]
    if not tables[0].index.equals(tables[1].index):
        raise ValueError(
            f"the runs tested different statements ({len(tables[0])} of {a.parameters['dataset']}, {len(tables[1])} of "
            f"{b.parameters['dataset']}); run both on one data set with one seed, limit and number of repeats"
        )
    groups = a.tables["examples"].drop_duplicates("example").set_index("example").group.reindex(tables[0].index)
    first = 0 if site == "resid" else 1
    return statistics.paired_difference(
        tables[0].to_numpy(), tables[1].to_numpy(), groups.to_numpy(str), first_depth=first, seed=seed
    )


# --- one shard: one model (trained or random) on one data set under one condition -----------------------------------


def _shard(
    *,
    model: TransformerBridge | dict[str, Any],
    frame: pd.DataFrame,
    texts: list[str],
    weights: str,
    parameters: dict[str, Any],
    key: str,
    folder: Path | None,
    progress: bool,
) -> Result:
    seed, labels, groups = parameters["seed"], frame.label.to_numpy(), frame.group.to_numpy(str)
    if isinstance(model, dict):  # in a worker: the model is loaded there, not sent
        model = models.received(model)
    if weights == "random":
        model = models.random_twin(model, seed=seed)
    condition = (
        quantized(model, parameters["bits"], group_size=parameters["group_size"])
        if parameters["bits"]
        else nullcontext()
    )
    splits = probes.group_splits(
        labels, groups, repeats=parameters["repeats"], test_fraction=parameters["test_fraction"], seed=seed
    )
    rows: list[pd.DataFrame] = []
    points: list[pd.DataFrame] = []
    examples: list[pd.DataFrame] = []
    with _scratch(folder, key) as scratch:
        with condition:
            states = collect_states(
                model, texts, sites=parameters["sites"], index=parameters["depths"], folder=scratch, progress=progress
            )
        for site, collected in states.items():
            scores = probes.probe_depths(
                collected.values, labels, groups, texts=np.array(texts, object), splits=splits,
                solver=parameters["solver"], control=parameters["control"], seed=seed, progress=progress,
            )  # fmt: skip
            depths = np.array(collected.index) + (site != "resid")  # layer l ends at depth l + 1
            place = {"weights": weights, "site": site}
            rows.append(_scores_table(scores, depths, parameters["n_layers"]).assign(**place))
            correct, tested = scores.correct()
            if parameters["depths"] is None:
                points.append(_points(correct, groups[tested], first_depth=int(depths[0]), seed=seed).assign(**place))
            if weights == "trained":
                examples.append(_examples_table(scores, correct, tested, frame, depths).assign(**place))
    about = {"model": parameters["model"], "dataset": parameters["dataset"]}
    table = pd.concat(rows, ignore_index=True).assign(**about, seed=seed)
    tables = {"points": points, "examples": examples}
    tables = {key: pd.concat(frames, ignore_index=True) for key, frames in tables.items() if frames}
    return Result("concept_depth", table, _summarise(table, parameters), {**parameters, "weights": weights}, tables)


def _scores_table(scores: probes.ProbeScores, depths: np.ndarray, n_layers: int) -> pd.DataFrame:
    frames = []
    kinds = [("task", scores)] + ([("shuffled", scores.control)] if scores.control is not None else [])
    for labels, kind in kinds:
        values = {"accuracy": kind.accuracy(), "f1": kind.f1(), "auc": kind.auc()}
        if labels == "shuffled":
            values["train_accuracy"] = kind.accuracy(train=True)
        for metric, value in values.items():
            split, column = np.indices(value.shape)
            frames.append(
                pd.DataFrame({"depth": depths[column.ravel()], "labels": labels, "probe": "linear", "metric": metric,
                              "split": split.ravel(), "value": value.ravel()})
            )  # fmt: skip
    table = pd.concat(frames, ignore_index=True)
    table["relative_depth"] = table.depth / n_layers
    return table


def _points(correct: np.ndarray, groups: np.ndarray, *, first_depth: int, seed: int) -> pd.DataFrame:
    table = statistics.depth_points(correct, groups, first_depth=first_depth, seed=seed).reset_index()
    peak = statistics.crossfit_peak(correct, groups, seed=seed)
    n_groups = len(set(groups))
    extra = [("peak_crossfit", peak.crossfit), ("peak_naive", peak.naive)]
    rows = [{"point": name, "estimate": value, "low": np.nan, "high": np.nan, "n_groups": n_groups, "undefined": 0.0}
            for name, value in extra]  # fmt: skip
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True)


def _examples_table(
    scores: probes.ProbeScores, correct: np.ndarray, tested: np.ndarray, frame: pd.DataFrame, depths: np.ndarray
) -> pd.DataFrame:
    times = scores.test.sum(0)[tested]
    decision = np.where(scores.test[:, :, None], scores.decisions, 0).sum(0)[tested] / times[:, None]
    kept = frame[tested]
    row, column = np.indices(decision.shape)
    row, column = row.ravel(), column.ravel()
    return pd.DataFrame({
        "example": kept.example.to_numpy()[row], "group": kept.group.to_numpy()[row], "depth": depths[column],
        "label": kept.label.to_numpy()[row], "decision": decision.ravel().round(4), "share_right": correct.ravel().round(4),
        "times_tested": times[row],
    })  # fmt: skip


def _baselines(frame: pd.DataFrame, texts: list[str], parameters: dict[str, Any]) -> pd.DataFrame:
    labels, groups = frame.label.to_numpy(), frame.group.to_numpy(str)
    splits = probes.group_splits(
        labels,
        groups,
        repeats=parameters["repeats"],
        test_fraction=parameters["test_fraction"],
        seed=parameters["seed"],
    )
    baselines = {
        "bag_of_words": probes.bag_of_words(np.array(texts, object), labels, splits),
        "majority": probes.majority(labels, splits),
    }
    tables = [_scores_table(scores, np.array([0]), 1).assign(probe=name) for name, scores in baselines.items()]
    return pd.concat(tables, ignore_index=True).assign(
        weights="none", site="text", depth=np.nan, relative_depth=np.nan,
        model=parameters["model"], dataset=parameters["dataset"], seed=parameters["seed"],
    )  # fmt: skip


def _summarise(table: pd.DataFrame, parameters: dict[str, Any]) -> pd.DataFrame:
    keys = ["weights", "site", "depth", "relative_depth", "labels", "probe", "metric"]
    rows = []
    for key, part in table.groupby(keys, dropna=False, sort=False):
        mean, low, high = statistics.corrected_interval(part["value"].to_numpy(), parameters["test_fraction"])
        rows.append((*key, float(mean), float(low), float(high), len(part)))
    summary = pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "n_splits"])
    return summary.assign(n_examples=parameters["n_examples"], n_groups=parameters["n_groups"])


def _wide(result: Result, site: str) -> pd.DataFrame:
    rows = result.tables["examples"]
    rows = rows[rows.site == site]
    if rows.empty:
        raise ValueError(f"this result has no site {site!r}; it has {', '.join(result.parameters['sites'])}")
    return rows.pivot(index="example", columns="depth", values="share_right")


# --- input ----------------------------------------------------------------------------------------------------------


def _frame(data: str | pd.DataFrame) -> tuple[pd.DataFrame, str]:
    if isinstance(data, str):
        return datasets.load(data), data
    if not isinstance(data, pd.DataFrame):
        raise ValueError(f"data is a {type(data).__name__}; give a data set's name or a table (see lab.datasets.read)")
    name = data.attrs.get("card", {}).get("name", "your data")
    datasets.check_concept_data(data, name=name)
    return data, name


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
        before = card["instruction_place"] == "before"
        texts = np.array(
            [f"{card['instruction']} {t}" if before else f"{t} {card['instruction']}" for t in texts], object
        )
    return [str(text) for text in texts]


def _checksum(frame: pd.DataFrame, texts: list[str]) -> str:
    rows = zip(frame.example.astype(str), texts, frame.label.astype(int), frame.group.astype(str), strict=True)
    return hashlib.sha256("\n".join(f"{e}\t{t}\t{y}\t{g}" for e, t, y, g in rows).encode()).hexdigest()


@contextmanager
def _scratch(folder: Path | None, key: str) -> Iterator[Path | None]:
    """A folder for states that outlives an interruption and goes when the shard is finished."""
    if folder is None:
        yield None
        return
    scratch = folder / f"{key}.states"
    yield scratch  # after an exception or an interruption it stays, so that the next call goes on from it
    for path in scratch.glob("*"):
        path.unlink()
    scratch.rmdir()


def _print_estimate(
    model: TransformerBridge,
    texts: list[str],
    tokens: int,
    n: int,
    problems: int,
    parts: int,
    sites: Sequence[str],
    depths: Sequence[int] | None,
) -> None:
    """Time a few texts and one matrix product here, and scale up. Right to a factor of two."""
    few = texts[:: max(1, len(texts) // 24)][:24]
    start = time.perf_counter()
    collect_states(model, few, sites=sites, index=depths, progress=False)
    per_token = (time.perf_counter() - start) / tokenize(model, few).lengths.sum()
    a = np.ones((n, model.cfg.d_model), np.float32)
    b = np.ones((model.cfg.d_model, problems), np.float32)
    start = time.perf_counter()
    for _ in range(4):
        a @ b
    per_product = (time.perf_counter() - start) / 4
    columns = len(depths) if depths else model.cfg.n_layers * len(sites) + 1
    megabytes = n * columns * model.cfg.d_model * 4 / 1e6
    per_operation = per_product / (2 * n * model.cfg.d_model * problems)  # an axis rotation takes some 20 d^3 of them
    fits = parts * columns * (150 * per_product + 40 * min(n, model.cfg.d_model) ** 3 * per_operation)
    states = parts * tokens * per_token
    print(
        f"About {states:.0f} s for the states of {n} texts ({tokens} tokens) and {fits:.0f} s for {columns * problems} "
        f"probes{', each for trained and random weights' if parts == 2 else ''}; {megabytes:.0f} MB of states."
    )
