"""Does the damage of several blocks add up? Pairs and sets of blocks under four kinds of change, at three sizes.

Layer-adaptive pruning (arXiv 2308.10438) takes the distortion D(S) of the output to be the sum of D({l}), l in S: to first
order the difference of the logits is d_i + d_j, so D(ij) / (D(i) + D(j)) = 1 + 2 c sqrt(D_i D_j) / (D_i + D_j) with the cosine
c of d_i and d_j, which would vanish for changes of zero mean that are independent over blocks. Noise is such a change;
pruning shrinks weights, rounding does neither by design, and a block left out is no small change. For the loss and for KL
nothing was claimed.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lab import models, require, statistics
from lab.depth_budget.changes import SKIP, Bits, Change, Noise, Pruned
from lab.depth_budget.evaluation import Evaluator, Texts, texts_of
from lab.identity import identity
from lab.interventions import require_groups
from lab.results import Result, joined, keep, study, versions

KINDS = {
    "pruned": "the least weights of each matrix set to zero",
    "rounded": "round to nearest",
    "noise": "Gaussian noise of the Frobenius norm of that rounding, drawn anew in each block",
    "left out": "the whole block left out",
}
LEVELS = {"small": 0.005, "medium": 0.05, "large": 0.5}  # nats that a change of one block costs
SHARES, BITS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (2, 3, 4, 5, 6)
MEASURES = ("distortion", "kl", "nll")
_TRIED = 6  # blocks, evenly spread, on which levels are chosen
COLUMNS = {
    "kind": "of `KINDS`", "level": "of `LEVELS`: the loss in nats that its changes are nearest to; whole: there is one size",
    "value": "share of the weights set to zero, or bits; 0 for a block left out",
    "target": "nats that were aimed at", "median": "nats that it costs, median over the blocks that were tried",
    "set": "number of the set of blocks", "where": "random pairs, adjacent pairs, sets of so many blocks, all blocks",
    "blocks": "the blocks, with blanks between", "size": "how many blocks are changed together",
    "example": "the text", "group": "texts that share a source", "layer": "the block",
    "distortion": "mean square of the centred logits' difference when all blocks of the set are changed",
    "kl": "KL(intact || changed), nats", "nll": "rise of the loss, nats",
    "distortion_sum": "sum of what the blocks give alone", "kl_sum": "the same for KL", "nll_sum": "the same for the loss",
    "ratio": "distortion of a pair over the sum of its blocks' (rho)",
    "cosine": "c of the two logits' differences", "expected": "rho to first order, from c and the single distortions",
    "measure": "distortion, kl, or nll (rise of the loss)", "n_sets": "sets that were drawn",
    "median_ratio": "joint over sum: median over the sets", "low": "lower end of the 95 % interval over texts, the sets as drawn",
    "high": "upper end", "sets_low": "5th percentile over the sets: a spread, no interval", "sets_high": "95th",
    "median_cosine": "of pairs: median c", "gap": "median |rho - rho to first order|", "without": "median |rho - 1|",
    "slope": "of log joint on log sum, over random pairs and sets: 1 where damage adds", "r2": "share explained by that line",
    "slope_low": "lower end over texts", "slope_high": "upper end", "n_used": "sets whose joint and sum are above zero",
}  # fmt: skip


def run(
    model: TransformerBridge, data: str | pd.DataFrame = "prose", *, seed: int = 0, n_texts: int = 8, n_tokens: int = 32,
    first: int = 8, kinds: Sequence[str] = tuple(KINDS), levels: Sequence[str] = tuple(LEVELS), n_pairs: int = 60,
    sizes: Sequence[int] = (4, 8, 16), n_sets: int = 8, group_size: int = 64, resume: bool = True,
    executor: Executor | None = None, progress: bool = True,
) -> Result:  # fmt: skip
    """Joint damage of pairs and sets of blocks against the sum of what they do alone.

    Args:
        data: prose, or a table with a column `text`; no text of another run's report is needed here, nothing is selected.
        levels: of `LEVELS`; each takes the share, or the bits, whose loss is nearest (on a logarithmic scale, median over
            six blocks). Where two levels would take the same change the first one has it.
        n_pairs: random pairs, beside all adjacent ones. sizes, n_sets: random sets of other sizes; all blocks are added.

    Tables: `pairs` (rho, c), `fits` (log joint on log sum), `levels`; `.table` has every set and text.
    Source: arXiv 2308.10438, which shows additivity for pruned vision models only.
    """
    n, seed = model.cfg.n_layers, require.seed(seed)
    kinds, levels = require.some_of("kinds", kinds, KINDS), require.some_of("levels", levels, LEVELS)
    if "noise" in kinds and "rounded" not in kinds:
        raise ValueError(f"kinds={kinds}: noise takes its norm from what is rounded; name that, too")
    if {"noise", "rounded"} & set(kinds):
        require_groups(model, 2, group_size=group_size)
    n_pairs, n_sets = require.whole("n_pairs", n_pairs, 1), require.whole("n_sets", n_sets, 1)
    sizes = [size for size in require.wholes("sizes", sizes, 3, None, least=0) if size < n]
    (texts,) = texts_of(model, data, sizes=(n_texts,), n_tokens=n_tokens, seed=seed)
    sets = _sets(n, n_pairs, sizes, n_sets, np.random.default_rng(seed))
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own), "dataset": data if isinstance(data, str) else "your texts",
        "n_texts": len(texts.table), "n_tokens": n_tokens, "first": require.whole("first", first, 0, n_tokens - 2),
        "kinds": kinds, "levels": levels, "n_pairs": n_pairs, "sizes": sizes, "n_sets": n_sets, "group_size": group_size,
        "seed": seed, "versions": versions(),
    }  # fmt: skip
    shared = {"texts": texts, "parameters": parameters, "sets": sets, "progress": progress}
    known = {**parameters, "ids": texts.ids.tolist()}
    common: dict[str, Any] = {"shared": shared, "known": known, "models": {"model": model}, "executor": executor,
                              "progress": progress}  # fmt: skip
    tried = study(sizes_of, [{"which": "levels"}], kept=keep(sizes_of, {"model": own}, resume=resume), **common)[
        0
    ].table
    chosen = _chosen(tried, kinds, levels)
    parts = [{key: row[key] for key in ("kind", "level", "value")} for row in chosen.to_dict("records")]
    done = study(work, parts, kept=keep(work, {"model": own}, resume=resume), describe="kinds and levels", **common)
    table, tables = joined(done)
    tables["pairs"] = pd.concat([_pairs(part.table, part.tables["products"]) for part in done], ignore_index=True)
    del tables["products"]
    found = [_measured(part, tables["pairs"], seed) for _, part in table.groupby(["kind", "level"], sort=False)]
    tables["fits"], tables["levels"] = pd.concat([fit for _, fit in found], ignore_index=True), chosen
    summary = pd.concat([rows for rows, _ in found], ignore_index=True)
    return Result("additivity", table, summary, parameters, tables).described(COLUMNS)


# --- what is changed ------------------------------------------------------------------------------------------------


def _change(kind: str, value: float, layer: int, group_size: int, seed: int) -> Change:
    if kind == "left out":
        return SKIP
    if kind == "pruned":
        return Pruned(value)
    bits = Bits(int(value), group_size)
    return bits if kind == "rounded" else Noise(bits, seed=(1000 * seed + layer) % 2**32)  # no two blocks alike


def _sets(n: int, n_pairs: int, sizes: list[int], n_sets: int, rng: np.random.Generator) -> list[tuple[str, list[int]]]:
    """(where, blocks); a random pair may be an adjacent one, too."""
    every = [(i, j) for i in range(n) for j in range(i + 1, n)]
    drawn = sorted(rng.choice(len(every), min(n_pairs, len(every)), replace=False).tolist())
    found = [("random pairs", list(every[k])) for k in drawn]
    found += [("adjacent pairs", [*pair]) for pair in pairwise(range(n))]
    for size in sizes:
        found += [(f"sets of {size}", sorted(rng.choice(n, size, replace=False).tolist())) for _ in range(n_sets)]
    return [*found, ("all blocks", list(range(n)))]


def sizes_of(
    model: TransformerBridge, *, which: str, texts: Texts, parameters: dict[str, Any], sets: Any, progress: bool,
    scratch: Path | None,
) -> Result:  # fmt: skip
    """Loss of every share and number of bits, in a few blocks each."""
    evaluate = Evaluator(model, texts.ids, first=parameters["first"], folder=scratch, progress=progress)
    layers = np.unique(np.linspace(0, model.cfg.n_layers - 1, _TRIED).round().astype(int)).tolist()
    tries = {"pruned": SHARES, "rounded": BITS, "noise": BITS}
    asked = [
        (kind, float(value), layer) for kind in parameters["kinds"] for value in tries.get(kind, ()) for layer in layers
    ]
    made = [{layer: _change(kind, value, layer, parameters["group_size"], parameters["seed"])}
            for kind, value, layer in asked if kind != "noise"]  # fmt: skip
    rises = dict(zip([one for one in asked if one[0] != "noise"],
                     evaluate(made).nll.mean(1) - evaluate.intact.mean() if made else [], strict=True))  # fmt: skip
    rows = [
        (kind, value, layer, rises[kind if kind != "noise" else "rounded", value, layer])
        for kind, value, layer in asked
    ]
    table = pd.DataFrame(rows, columns=["kind", "value", "layer", "nll"])
    return Result("additivity_levels", table, pd.DataFrame(), {})


def _chosen(tried: pd.DataFrame, kinds: list[str], levels: list[str]) -> pd.DataFrame:
    """kind, level, value, target, median: for each level the value whose median is nearest, none twice."""
    rows = []
    for kind in kinds:
        medians = tried[tried.kind == kind].groupby("value").nll.median()
        if not len(medians):
            rows.append((kind, "whole", 0.0, np.nan, np.nan))
            continue
        taken: set[float] = set()
        for level in levels:
            apart = np.abs(np.log(medians.clip(lower=1e-4)) - np.log(LEVELS[level]))
            if (value := float(apart.idxmin())) not in taken:
                taken.add(value)
                rows.append((kind, level, value, LEVELS[level], float(medians[value])))
    return pd.DataFrame(rows, columns=["kind", "level", "value", "target", "median"])


# --- one kind at one level ------------------------------------------------------------------------------------------


def work(
    model: TransformerBridge, *, kind: str, level: str, value: float, texts: Texts, parameters: dict[str, Any],
    sets: list[tuple[str, list[int]]], progress: bool, scratch: Path | None,
) -> Result:  # fmt: skip
    """Every set and text: joint damage and the sum of single ones; inner products of single differences."""
    evaluate = Evaluator(model, texts.ids, first=parameters["first"], folder=scratch, progress=progress)
    change = {
        i: _change(kind, value, i, parameters["group_size"], parameters["seed"]) for i in range(model.cfg.n_layers)
    }
    singles = [{layer: one} for layer, one in change.items()]
    alone, together = evaluate(singles), evaluate([{i: change[i] for i in blocks} for _, blocks in sets])
    intact = evaluate.intact
    alone, together = (one._replace(nll=one.nll - intact) for one in (alone, together))
    label = {"kind": kind, "level": level}
    frames = []
    for number, (where, blocks) in enumerate(sets):
        values = {name: getattr(together, name)[number] for name in MEASURES}
        values |= {f"{name}_sum": getattr(alone, name)[blocks].sum(0) for name in MEASURES}
        named = {"set": number, "where": where, "size": len(blocks), "blocks": " ".join(map(str, blocks))}
        frames.append(pd.DataFrame({**label, **named, **texts.table[["example", "group"]], **values}))
    try:
        products = evaluate.products(singles).mean(0)
    except ValueError:  # logits that are no linear function of the state have no products here
        products = np.diag(np.full(len(singles), np.nan))
    single = pd.concat([pd.DataFrame({**label, "layer": layer, **texts.table[["example", "group"]],
                                      **{name: getattr(alone, name)[layer] for name in MEASURES}})
                        for layer in change], ignore_index=True)  # fmt: skip
    tables = {"singles": single, "products": pd.DataFrame(products, columns=[str(i) for i in change])}
    return Result("additivity_part", pd.concat(frames, ignore_index=True), pd.DataFrame(), label, tables)


def _pairs(table: pd.DataFrame, products: pd.DataFrame) -> pd.DataFrame:
    """rho, c and rho to first order of every pair; means over texts first, then ratios."""
    gram = products.to_numpy()
    rows = []
    for (number, where), part in table[table["size"] == 2].groupby(["set", "where"], sort=False):
        i, j = map(int, part.blocks.iloc[0].split())
        total = float(part.distortion_sum.mean())
        size = np.sqrt(gram[i, i] * gram[j, j])
        cosine = gram[i, j] / size if size > 0 else np.nan
        rows.append({"kind": part.kind.iloc[0], "level": part.level.iloc[0], "set": number, "where": where,
                     "blocks": part.blocks.iloc[0], "ratio": part.distortion.mean() / total if total > 0 else np.nan,
                     "cosine": cosine, "expected": first_order(gram[i, i], gram[j, j], cosine)})  # fmt: skip
    return pd.DataFrame(rows)


def first_order(one: float, two: float, cosine: float) -> float:
    """rho = D(ij) / (D(i) + D(j)) where the differences of the logits add.

    >>> first_order(1.0, 1.0, 0.0), first_order(1.0, 1.0, -1.0), first_order(4.0, 1.0, 0.5)
    (1.0, 0.0, 1.4)
    """
    return float(1 + 2 * cosine * np.sqrt(one * two) / (one + two)) if one + two > 0 else np.nan


# --- statistics -----------------------------------------------------------------------------------------------------


def _measured(table: pd.DataFrame, pairs: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Summary and fits of one kind at one level."""
    label = {"kind": table.kind.iloc[0], "level": table.level.iloc[0]}
    mine = pairs[(pairs.kind == label["kind"]) & (pairs.level == label["level"])].set_index("set")
    one = table[table.set == table.set.iloc[0]]
    groups, where = one.group.astype(str).to_numpy(), table.drop_duplicates("set").set_index("set")["where"]
    summary, fits = [], []
    for measure in MEASURES:
        values = np.stack([table.pivot(index="example", columns="set", values=name).loc[one.example].to_numpy()
                           for name in (measure, f"{measure}_sum")], -1)  # [text set joint/sum]  # fmt: skip
        mean, drawn = values.mean(0), statistics.cluster_means(values, groups, seed=seed)
        ratio, ratios = _ratio(mean), _ratio(drawn)
        for name in dict.fromkeys(where):
            here = (where == name).to_numpy()
            low, high = _percentiles(np.nanmedian(ratios[:, here], 1), 95)
            row = {**label, "measure": measure, "where": name, "n_sets": int(here.sum()),
                   "median_ratio": float(np.nanmedian(ratio[here])), "low": low, "high": high}  # fmt: skip
            row["sets_low"], row["sets_high"] = _percentiles(ratio[here], 90)
            if measure == "distortion" and name.endswith("pairs"):
                some = mine[mine["where"] == name]
                row |= {"median_cosine": some.cosine.median(), "gap": (some.ratio - some.expected).abs().median(),
                        "without": (some.ratio - 1).abs().median()}  # fmt: skip
            summary.append(row)
        use = (where != "adjacent pairs").to_numpy() & (mean > 0).all(1)
        slope, r2 = fitted(mean[use])
        again = [fitted(draw[use & (draw > 0).all(1)])[0] for draw in drawn]
        low, high = _percentiles(np.array(again), 95)
        fits.append({**label, "measure": measure, "slope": slope, "slope_low": low, "slope_high": high, "r2": r2,
                     "n_used": int(use.sum()), "n_sets": int((where != "adjacent pairs").sum())})  # fmt: skip
    return pd.DataFrame(summary), pd.DataFrame(fits)


def _ratio(values: np.ndarray) -> np.ndarray:
    """Joint over sum; nan where the sum is zero."""
    joint, total = values[..., 0], values[..., 1]
    return np.divide(joint, total, out=np.full(joint.shape, np.nan), where=total != 0)


def fitted(values: np.ndarray) -> tuple[float, float]:
    """Slope and R2 of log joint on log sum; [set, joint and sum]. nan where a line has no meaning."""
    if len(values) < 3:
        return np.nan, np.nan
    joint, total = np.log(values).T
    if joint.std() < 1e-12 or total.std() < 1e-12:
        return np.nan, np.nan
    slope = np.cov(total, joint)[0, 1] / total.var(ddof=1)
    return float(slope), float(np.corrcoef(total, joint)[0, 1] ** 2)


def _percentiles(values: np.ndarray, share: float | int) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return np.nan, np.nan
    low, high = np.percentile(known, [(100 - share) / 2, (100 + share) / 2])
    return float(low), float(high)
