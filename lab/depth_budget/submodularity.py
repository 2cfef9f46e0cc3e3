"""Is the value of kept blocks submodular, so that greedy choice comes with a guarantee?

v(S) = -loss with only the blocks in S; gain(e|S) = v(S + e) - v(S). Submodular: gain(e|S) >= gain(e|T) for S inside T and e
outside T; monotone: no gain is negative. Submodular reinforcement learning (arXiv 2307.13372) takes marginal gains as the
reward of a step. No reinforcement learning is needed here: choosing blocks has no random dynamics, which leaves the problem of
greedy set selection.

Near the full set the pair table tells: a positive second difference is a diminishing return. Elsewhere chains of random sets do.
gamma is the least of gain(e|S) summed over E, over v(S + E) - v(S): greedy choice then reaches 1 - exp(-gamma) of the best for
monotone v with v(empty) = 0. The least over a sample is above the true one, so the guarantee told is at most that good.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lab import models, require, results, statistics
from lab.depth_budget.evaluation import Evaluator, Texts
from lab.depth_budget.pairs import Removed, losses, named, skipping, texts_behind
from lab.identity import identity
from lab.results import Result, versions

CHANCE = 0.025  # share of differences of mean 0 whose 95 % interval lies on one given side of it
COLUMNS = {
    "weights": "trained, or random (the control)", "chain": "number of the chain of sets", "element": "the block e that is added",
    "small": "blocks in S", "large": "blocks in T; equal to `small` where one gain is looked at by itself",
    "property": "diminishing returns: gain(e|T) <= gain(e|S); monotone: gain(e|S) >= 0",
    "gain_small": "gain(e|S), nats per token, mean over texts", "gain_large": "gain(e|T)",
    "excess": "by how much the property is missed: gain(e|T) - gain(e|S), or -gain(e|S); above 0 is a violation",
    "low": "lower end of the 95 % interval over groups of texts (summary: over chains)", "high": "upper end",
    "violated": "whether the excess is above 0", "clear": "whether its whole interval is",
    "violations": "share of chains that violate the property", "clear_violations": "share that do so beyond noise",
    "chance": "share that would by chance where every excess were 0", "mean_excess": "mean over chains, nats per token",
    "n": "chains", "n_texts": "texts",
    "size": "blocks in S, or all", "kept": "the set S", "added": "the set E", "gains": "sum of gain(e|S) over E, nats",
    "joint": "v(S + E) - v(S), nats", "joint_low": "lower end over texts; above 0 the ratio counts", "ratio": "gains / joint",
    "counted": "whether the denominator is clearly positive", "gamma": "least ratio of those that count",
    "guarantee": "1 - exp(-gamma), and 0 where gamma is negative: the share of the best that greedy choice reaches at least",
    "n_counted": "ratios that count", "median": "median ratio of those that count",
    "direction": "removal: blocks taken from the full model; addition: blocks put into an empty one", "blocks": "how many",
    "greedy": "what greedy choice finds", "best": "what exhaustion finds", "greedy_nll": "its loss, nats per token",
    "best_nll": "the loss of the best", "regret": "the first minus the second, same texts that chose both",
    "text_set": "of the pair table", "positive": "share of pairs with diminishing returns: second difference above 0",
    "clear_positive": "share beyond noise", "clear_negative": "share of pairs that clearly violate it", "n_pairs": "pairs",
}  # fmt: skip


def run(
    model: TransformerBridge, pairs: Result, data: str | pd.DataFrame = "prose", *, n_chains: int = 40, n_sets: int = 15,
    n_added: int = 3, largest: int = 2, null: TransformerBridge | None = None, seed: int = 0, resume: bool = True,
    progress: bool = True,
) -> Result:  # fmt: skip
    """Violations of diminishing returns and monotonicity at three sizes, gamma, and greedy choice against exhaustion.

    Args:
        pairs: `pair_table` of this model; its search texts are used. data: what it was measured on.
        n_chains: of sets of a sixth, half and five sixths of the blocks, each inside the next, and a block outside.
        n_sets: sets S of each size for gamma. n_added: blocks in E.
        largest: blocks up to which greedy addition is held against exhaustion; removal: as far as the pair table goes.
        null: `lab.models.random_twin` or other weights; the same chains and sets are measured on it.
    """
    texts = texts_behind(model, pairs, data)["search"]
    n_layers, told = model.cfg.n_layers, pairs.parameters
    n_chains, n_sets = require.whole("n_chains", n_chains, 2), require.whole("n_sets", n_sets, 1)
    sizes = sorted({max(1, round(n_layers * share)) for share in (1 / 6, 1 / 2, 5 / 6)} - {n_layers})
    n_added = require.whole("n_added", n_added, 2, n_layers - sizes[0])
    largest, seed = require.whole("largest", largest, 1, 3), require.seed(seed)
    if null is not None and null.cfg.n_layers != n_layers:
        raise ValueError(
            f"null has {null.cfg.n_layers} blocks, the model {n_layers}: give lab.models.random_twin(model)"
        )
    plan = _plan(n_layers, sizes, n_chains, n_sets, n_added, np.random.default_rng(seed))
    asked = {"first": told["first"], "n_layers": n_layers, "sizes": sizes, "n_chains": n_chains, "n_sets": n_sets,
             "n_added": n_added, "largest": largest, "seed": seed}  # fmt: skip
    parameters = {**models.facts(model), **{name: told[name] for name in ("identity", "dataset", "n_tokens", "blocks")},
                  **asked, "null": None if null is None else models.name_of(null), "versions": versions()}  # fmt: skip
    parts: dict[str, Result] = {}
    for weights, one in (("trained", model), ("random", null)):
        if one is not None:
            kept = results.keep(work, {"model": identity(one)}, resume=resume)
            shared = {"texts": texts, "plan": plan, "asked": asked, "weights": weights, "progress": progress}
            (parts[weights],) = results.study(
                work, [{}], kept=kept, known={**parameters, "weights": weights, "ids": texts.ids.tolist()}, shared=shared,
                models={"model": one}, describe="chains", progress=progress,
            )  # fmt: skip
    table, tables = results.joined(list(parts.values()))
    tables["greedy"] = pd.concat([_removal(pairs, told, texts, seed), tables["greedy"]], ignore_index=True)
    signs = pairs.tables["signs"]
    tables["near_full"] = signs[signs.by == "all"][
        ["text_set", "n_pairs", "positive", "clear_positive", "clear_negative"]
    ]
    tables["near_full"] = tables["near_full"].reset_index(drop=True)
    return Result("submodularity", table, _summary(table, seed), parameters, tables).described(COLUMNS)


def work(
    model: TransformerBridge, *, texts: Texts, plan: dict[str, list[Any]], asked: dict[str, Any], weights: str, progress: bool,
    scratch: Path | None,
) -> Result:  # fmt: skip
    """Chains, gamma and (trained weights only) greedy addition on one model."""
    evaluate, n_layers = (
        Evaluator(model, texts.ids, first=asked["first"], folder=scratch, progress=progress),
        asked["n_layers"],
    )
    additions = [one for size in range(1, asked["largest"] + 1) for one in combinations(range(n_layers), size)]
    additions = additions if weights == "trained" else []
    sets = [{*s, *more} for s, e in plan["chains"] for more in ((), (e,))]
    sets += [{*s, *more} for s, added in plan["ratios"] for more in ((), added, *((e,) for e in added))]
    sets += [set(one) for one in additions] + [set()]
    keep = list(dict.fromkeys(tuple(sorted(one)) for one in sets))
    if progress:
        print(f"{weights} weights: {len(keep)} sets of blocks; those that are left out take no time.")
    found = evaluate([skipping(set(range(n_layers)) - set(one)) for one in keep]).nll
    value = {one: -row for one, row in zip(keep, found, strict=True)}  # of each text
    table = _chains(plan["chains"], value, texts, asked).assign(weights=weights)
    ratios, least = _ratios(plan["ratios"], value, texts, asked)
    tables = {"ratios": ratios.assign(weights=weights), "gamma": least.assign(weights=weights),
              "greedy": _addition(value, texts, asked, additions)}  # fmt: skip
    return Result("submodularity_part", table, pd.DataFrame(), {}, tables)


def _plan(
    n: int, sizes: Sequence[int], n_chains: int, n_sets: int, n_added: int, rng: np.random.Generator
) -> dict[str, list[Any]]:
    """Chains as (set, e) for each size in turn; sets and what is added for the ratios."""
    chains, ratios = [], []
    for _ in range(n_chains):
        order = list(map(int, rng.permutation(n)))
        chains += [(tuple(sorted(order[:size])), order[-1]) for size in sizes]
    for size in [size for size in sizes if size + n_added <= n]:
        for _ in range(n_sets):
            order = list(map(int, rng.permutation(n)))
            ratios.append((tuple(sorted(order[:size])), tuple(sorted(order[size : size + n_added]))))
    return {"chains": chains, "ratios": ratios}


def _chains(
    chains: Sequence[tuple[Removed, int]], value: dict[Removed, np.ndarray], texts: Texts, asked: dict[str, Any]
) -> pd.DataFrame:
    gains = [value[tuple(sorted((*s, e)))] - value[s] for s, e in chains]  # each [text]
    sizes, rows, excess = asked["sizes"], [], []
    for start in range(0, len(chains), len(sizes)):
        at = dict(zip(sizes, range(start, start + len(sizes)), strict=True))
        for small, large in [*((size, size) for size in sizes), *combinations(sizes, 2)]:
            one, other = gains[at[small]], gains[at[large]]
            excess.append(-one if small == large else other - one)
            rows.append((start // len(sizes), chains[start][1], "monotone" if small == large else "diminishing returns", small,
                         large, one.mean(), other.mean()))  # fmt: skip
    table = pd.DataFrame(rows, columns=["chain", "element", "property", "small", "large", "gain_small", "gain_large"])
    mean, low, high = statistics.cluster_bootstrap(np.stack(excess, 1), texts.groups, seed=asked["seed"])
    return table.assign(excess=mean, low=low, high=high, violated=mean > 0, clear=low > 0, n_texts=len(texts.ids))


def _ratios(
    plan: Sequence[tuple[Removed, Removed]], value: dict[Removed, np.ndarray], texts: Texts, asked: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each ratio, and the least of those whose denominator is clearly positive, by size and over all."""
    rows, drawn = [], []
    for s, added in plan:
        gains = np.sum([value[tuple(sorted((*s, e)))] - value[s] for e in added], axis=0)
        both = np.stack([gains, value[tuple(sorted((*s, *added)))] - value[s]], 1)  # [text 2]
        mean, low, _ = map(np.asarray, statistics.cluster_bootstrap(both, texts.groups, seed=asked["seed"]))
        drawn.append(statistics.cluster_means(both, texts.groups, seed=asked["seed"]))
        rows.append(
            (str(len(s)), named(s), named(added), mean[0], mean[1], low[1], mean[0] / mean[1], bool(low[1] > 0))
        )
    columns = ["size", "kept", "added", "gains", "joint", "joint_low", "ratio", "counted"]
    table, least = pd.DataFrame(rows, columns=columns), []
    for size in [*table["size"].unique(), "all"]:
        some = table[table.counted & ((table["size"] == size) | (size == "all"))]
        gamma, ends = np.nan, [np.nan, np.nan]
        if len(some):
            gamma = float(some.ratio.min())
            at = drawn[int(some.ratio.idxmin())]
            with np.errstate(divide="ignore", invalid="ignore"):
                ends = list(map(float, np.nanquantile(at[:, 0] / at[:, 1], [0.025, 0.975])))
        n_of = int(((table["size"] == size) | (size == "all")).sum())
        least.append((size, gamma, *ends, 1 - np.exp(-max(0.0, gamma)) if len(some) else np.nan,
                      float(some.ratio.median()), n_of, len(some)))  # fmt: skip
    columns = ["size", "gamma", "low", "high", "guarantee", "median", "n", "n_counted"]
    return table, pd.DataFrame(least, columns=columns)


# --- greedy choice against exhaustion -------------------------------------------------------------------------------


def _greedy(
    loss: dict[Removed, np.ndarray], largest: int, direction: str, groups: np.ndarray, seed: int
) -> pd.DataFrame:
    """Greedy sets and the best ones up to a size, of losses of all sets up to it."""
    now: Removed = ()
    rows = []
    for size in range(1, largest + 1):
        every = {one: its for one, its in loss.items() if len(one) == size}
        now = min((one for one in every if set(now) <= set(one)), key=lambda one: every[one].mean())
        best = min(every, key=lambda one: every[one].mean())
        apart = statistics.cluster_bootstrap(every[now] - every[best], groups, seed=seed)
        rows.append(
            (direction, size, named(now), named(best), every[now].mean(), every[best].mean(), *map(float, apart))
        )
    columns = ["direction", "blocks", "greedy", "best", "greedy_nll", "best_nll", "regret", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _removal(pairs: Result, told: dict[str, Any], texts: Texts, seed: int) -> pd.DataFrame:
    loss = losses(pairs.table[pairs.table.text_set == "search"])
    return _greedy(loss, told["largest"], "removal", texts.groups, seed)


def _addition(
    value: dict[Removed, np.ndarray], texts: Texts, asked: dict[str, Any], additions: Sequence[Removed]
) -> pd.DataFrame:
    loss = {one: -value[one] for one in additions}
    return _greedy(loss, asked["largest"] if additions else 0, "addition", texts.groups, asked["seed"])


def _summary(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Shares of violations with intervals over chains."""
    rows = []
    for key, part in table.groupby(["weights", "property", "small", "large"], sort=False):
        mean, low, high = statistics.cluster_bootstrap(part.violated.to_numpy(float), part.chain.to_numpy(), seed=seed)
        rows.append((*key, mean, low, high, part.clear.mean(), CHANCE, part.excess.mean(), len(part)))
    columns = ["weights", "property", "small", "large", "violations", "low", "high", "clear_violations", "chance",
               "mean_excess", "n"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)
