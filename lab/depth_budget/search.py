"""This measures how robust one fixed model is to losing blocks; it is no search of a trained super-network.

After the super-network search of arXiv 2202.12954 (NSGA-II on two objectives, with cheap predictors) and the window search
that UDC's cut and re-cut suggests. There the sub-networks were trained together; here nothing was trained for what is tried,
so a front says which blocks this model can spare. Random masks with p = 1/2 would destroy it: all searches start at few removals.

Every method gets the same number of evaluations on the search texts (`search_methods`); what it chose is measured once more on
the report texts, since the least of many noisy numbers is too low (the winner's curse). Two objectives: loss and blocks kept.
Bits a block as a second space of search are left to the exact programme of `programme`.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import kendalltau
from transformer_lens.model_bridge import TransformerBridge

from lab import models, require, results, statistics
from lab.depth_budget.evaluation import Evaluator, Texts
from lab.depth_budget.pairs import SETS, Removed, losses, named, skipping, texts_behind
from lab.depth_budget.scores import lim
from lab.depth_budget.search_methods import (
    METHODS,
    RANDOM,
    Ledger,
    Predictor,
    Space,
    front,
    growth,
    hypervolume,
    require_pymoo,
    search,
)
from lab.identity import identity
from lab.interventions import rewritten
from lab.results import Result, versions
from lab.runs import clean_run

COLUMNS = {
    "method": "of `search_methods.METHODS`; exhaustion: all sets of that size", "seed": "of a random method, else 0",
    "n_removed": "blocks left out", "removed": "which: the best of this size that the method met on the search texts",
    "on_front": "whether no larger removal does as well on the search texts",
    "search_nll": "loss on the search texts, nats per token", "report_nll": "on the report texts",
    "search_rise": "loss minus the intact model's on the search texts, nats per token",
    "report_rise": "the same on the report texts, which no method saw",
    "low": "lower end of the 95 % interval over groups of report texts", "high": "upper end",
    "n": "report texts", "n_seeds": "runs",
    "evaluations": "sets of blocks measured, without repetitions, at most those that are compared",
    "hypervolume": "front and reference (blocks + 1, ln vocabulary), blocks x nats, search texts; median over seeds",
    "hypervolume_low": "least over seeds", "hypervolume_high": "largest over seeds",
    "report_hypervolume": "the same of what was chosen, on the report texts; median over seeds",
    "report_low": "least over seeds", "report_high": "largest over seeds",
    "at_end": "hypervolume when the method ended, which a method without chance may do later; median over seeds",
    "to_99": "evaluations until 99 % of the best hypervolume of all methods at the equal number; median over all seeds",
    "to_99_low": "least over seeds", "to_99_high": "largest over seeds (inf: a seed did not reach it)",
    "reached_99": "share of seeds that did",
    "optimism": "report rise minus search rise, mean over the sizes chosen, median over seeds: the winner's curse and the texts",
    "evaluation": "evaluations so far", "curves.hypervolume": "search texts, median over seeds", "curves.low": "least",
    "curves.high": "largest",
    "search_regret": "loss above that of exhaustion on the search texts, nats per token",
    "report_regret": "loss on the report texts above the least that exhaustion finds there, nats per token",
    "report_best": "the set that exhaustion finds there",
    "fronts.search_rise": "median over seeds", "search_low": "least over seeds", "search_high": "largest over seeds",
    "fronts.report_rise": "median over seeds", "fronts.low": "least over seeds, report texts", "fronts.high": "largest",
    "tau": "Kendall's tau of guess and loss, on sets that the predictor never saw (those of the random method)",
    "tau_within": "the same among sets of one size, mean over sizes: the size itself is easily guessed",
    "n_fitted": "sets it was fitted to", "n_held_out": "sets it was held against",
    "block": "a block", "lim": "-cosine(input, output), mean over tokens and search texts; larger: more important",
}  # fmt: skip


def block_search(
    model: TransformerBridge, pairs: Result, data: str | pd.DataFrame = "prose", *, methods: Sequence[str] | None = None,
    evaluations: int = 120, seeds: int = 5, most: int | None = None, window: int = 6, shift: int = 3, population: int = 20,
    resume: bool = True, progress: bool = True,
) -> Result:  # fmt: skip
    """Fronts of loss and blocks kept by several methods at an equal number of evaluations, and their regret to exhaustion.

    Args:
        pairs: `pair_table` of this model; texts, blocks and exhaustion are its own. data: what it was measured on.
        methods: of `search_methods.METHODS`; None: all. Two of them need pymoo.
        evaluations: that are compared; a method without chance may go on to `most` times the number of blocks.
        seeds: runs of each random method. most: blocks that may be left out at once; None: a third of them.

    Not shown: what a super-network would do whose parts were trained together.
    """
    methods = require.some_of("methods", list(METHODS) if methods is None else methods, METHODS)
    require_pymoo(methods)
    sets = texts_behind(model, pairs, data)
    told, n_layers = pairs.parameters, model.cfg.n_layers
    blocks = told["blocks"]
    evaluations, seeds = require.whole("evaluations", evaluations, 1), require.whole("seeds", seeds, 1)
    most = require.whole("most", max(2, len(blocks) // 3) if most is None else most, 2, len(blocks))
    window, shift = require.whole("window", window, 1), require.whole("shift", shift, 1)
    population = require.whole("population", population, 4)
    own = {"methods": methods, "evaluations": evaluations, "seeds": seeds, "most": most, "window": window, "shift": shift,
           "population": population}  # fmt: skip
    parameters = {**models.facts(model), **{name: told[name] for name in ("identity", "dataset", "sizes", "n_tokens", "first",
                  "blocks", "largest", "seed")}, **own, "versions": versions()}  # fmt: skip
    if progress:
        runs = sum(seeds if name in RANDOM else 1 for name in methods)
        print(f"{runs} searches, {evaluations} evaluations each, at most {1.3 * runs * evaluations:.0f} or so in all.")
    kept = results.keep(work, {"model": identity(model)}, resume=resume)
    shared = {"sets": sets, "table": pairs.table, "parameters": parameters, "n_layers": n_layers, "progress": progress}
    known = {**parameters, "ids": [one.ids.tolist() for one in sets.values()]}
    (done,) = results.study(work, [{}], kept=kept, known=known, shared=shared, models={"model": model}, describe="searches",
                            progress=progress)  # fmt: skip
    return Result("block_search", done.table, done.summary, parameters, done.tables).described(COLUMNS)


def work(
    model: TransformerBridge, *, sets: dict[str, Texts], table: pd.DataFrame, parameters: dict[str, Any], n_layers: int,
    progress: bool, scratch: Path | None,
) -> Result:  # fmt: skip
    """All searches, one after the other, on losses that they share; a search that is begun again finds them measured."""
    told = parameters
    loss = {name: Losses(model, sets[name], table[table.text_set == name], told["first"], scratch) for name in SETS}
    importance = block_lim(model, sets["search"])
    reference = (n_layers + 1, float(np.log(told["d_vocab"])))
    blocks = tuple(told["blocks"])
    price = (reference[1] - float(loss["search"]([()])[0])) / n_layers  # what all blocks are worth, shared equally
    space = Space(blocks, told["most"], importance, price, told["window"], told["shift"], told["population"])
    ledgers: dict[tuple[str, int], Ledger] = {}
    for method in told["methods"]:
        chance = method in RANDOM
        limit = told["evaluations"] if chance else max(told["evaluations"], told["most"] * len(blocks))
        for seed in range(told["seeds"] if chance else 1):
            ledgers[method, seed] = Ledger(loss["search"], limit)
            search(method, ledgers[method, seed], space, seed)
            if progress:
                print(f"{method}, seed {seed}: {ledgers[method, seed].spent} evaluations")
    equal = {run: dict(list(one.found.items())[: told["evaluations"] + 1]) for run, one in ledgers.items()}
    chosen = _chosen(equal, loss, sets["report"], told["seed"], n_layers)
    curves = {run: growth(one.found, n_layers, reference) for run, one in ledgers.items()}
    tables = {
        "fronts": _fronts(chosen),
        "curves": _curves(curves),
        "regret": _regret(chosen, loss, sets["report"], told),
        "predictor": _predictor(equal, space),
        "lim": pd.DataFrame({"block": list(importance), "lim": list(importance.values())}),
    }
    summary = _summary(chosen, curves, told["evaluations"], n_layers, reference)
    return Result("block_search", chosen, summary, {}, tables)


class Losses:
    """Mean loss of sets of removed blocks on some texts; those of the pair table are not measured again."""

    def __init__(
        self, model: TransformerBridge, texts: Texts, table: pd.DataFrame, first: int, folder: Path | None
    ) -> None:
        self.known = losses(table)
        self.evaluate = Evaluator(model, texts.ids, first=first, folder=folder, progress=False)

    def texts(self, sets: Sequence[Removed]) -> Float[np.ndarray, "set text"]:
        """Loss of each text."""
        todo = [one for one in dict.fromkeys(sets) if one not in self.known]
        if todo:
            self.known |= dict(zip(todo, self.evaluate([skipping(one) for one in todo]).nll, strict=True))
        return np.array([self.known[one] for one in sets])

    def __call__(self, sets: Sequence[Removed]) -> Float[np.ndarray, " set"]:
        return self.texts(sets).mean(1)


def block_lim(model: TransformerBridge, texts: Texts) -> dict[int, float]:
    """LIM of each block, read over tokens (`scores.lim`), mean over texts."""
    found = [lim(clean_run(model, row).states)["tokens"] for row in texts.ids]
    return dict(enumerate(map(float, np.mean(found, 0))))


# --- tables ---------------------------------------------------------------------------------------------------------


def _best_by_size(found: Mapping[Removed, float]) -> dict[int, Removed]:
    best: dict[int, Removed] = {}
    for one, loss in found.items():
        if len(one) not in best or loss < found[best[len(one)]]:
            best[len(one)] = one
    return dict(sorted(best.items()))


def _chosen(
    equal: Mapping[tuple[str, int], dict[Removed, float]],
    loss: Mapping[str, Losses],
    report: Texts,
    seed: int,
    n_layers: int,
) -> pd.DataFrame:
    """For each run and size the best set that it met, on both sets of texts."""
    best = {run: _best_by_size(found) for run, found in equal.items()}
    wanted = list(dict.fromkeys(one for some in best.values() for one in some.values()))
    rises = loss["report"].texts(wanted) - loss["report"].texts([()])  # [set text]
    mean, low, high = map(np.atleast_1d, statistics.cluster_bootstrap(rises.T, report.groups, seed=seed))
    of = {one: place for place, one in enumerate(wanted)}
    base, intact = float(loss["search"]([()])[0]), float(loss["report"]([()])[0])
    rows = []
    for (method, run), some in best.items():
        found = equal[method, run]
        on = front({n_layers - size: found[one] for size, one in some.items()})
        for size, one in some.items():
            at = of[one]
            rows.append((method, run, size, named(one), n_layers - size in on, found[one], intact + mean[at],
                         found[one] - base, mean[at], low[at], high[at], len(report.ids)))  # fmt: skip
    columns = ["method", "seed", "n_removed", "removed", "on_front", "search_nll", "report_nll", "search_rise",
               "report_rise", "low", "high", "n"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _fronts(chosen: pd.DataFrame) -> pd.DataFrame:
    some = chosen.groupby(["method", "n_removed"], sort=False)
    return some.agg(search_rise=("search_rise", "median"), search_low=("search_rise", "min"),
                    search_high=("search_rise", "max"), report_rise=("report_rise", "median"), low=("report_rise", "min"),
                    high=("report_rise", "max"), n_seeds=("seed", "nunique")).reset_index()  # fmt: skip


def _curves(curves: Mapping[tuple[str, int], np.ndarray]) -> pd.DataFrame:
    frames = []
    for method in dict.fromkeys(name for name, _ in curves):
        some = [curve for (name, _), curve in curves.items() if name == method]
        length = max(map(len, some))
        grid = np.array([np.pad(one, (0, length - len(one)), mode="edge") for one in some])
        frames.append(pd.DataFrame({"method": method, "evaluation": np.arange(length), "hypervolume": np.median(grid, 0),
                                    "low": grid.min(0), "high": grid.max(0), "n_seeds": len(some)}))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _summary(
    chosen: pd.DataFrame, curves: Mapping[tuple[str, int], np.ndarray], evaluations: int, n_layers: int,
    reference: tuple[int | float, float],
) -> pd.DataFrame:  # fmt: skip
    """A row a method, the largest hypervolume on report texts first."""
    goal = 0.99 * max(curve[: evaluations + 1].max() for curve in curves.values())
    rows = []
    for method in chosen.method.unique():
        runs = {seed: curve for (name, seed), curve in curves.items() if name == method}
        some = [chosen[(chosen.method == method) & (chosen.seed == seed)] for seed in runs]
        reported = [hypervolume(dict(zip(n_layers - one.n_removed[one.on_front], one.report_nll[one.on_front], strict=True)),
                                reference) for one in some]  # fmt: skip
        equal = [float(curve[: evaluations + 1][-1]) for curve in runs.values()]
        to_99 = [float(np.argmax(curve >= goal)) if curve.max() >= goal else np.inf for curve in runs.values()]
        optimism = [float((one.report_rise - one.search_rise)[one.n_removed > 0].mean()) for one in some]
        spent = [min(len(curve) - 1, evaluations) for curve in runs.values()]
        rows.append((method, len(runs), int(np.median(spent)), np.median(equal), min(equal), max(equal), np.median(reported),
                     min(reported), max(reported), np.median([curve[-1] for curve in runs.values()]), _median(to_99),
                     min(to_99), max(to_99), np.mean(np.isfinite(to_99)), np.median(optimism)))  # fmt: skip
    columns = ["method", "n_seeds", "evaluations", "hypervolume", "hypervolume_low", "hypervolume_high", "report_hypervolume",
               "report_low", "report_high", "at_end", "to_99", "to_99_low", "to_99_high", "reached_99", "optimism"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).sort_values("report_hypervolume", ascending=False, ignore_index=True)


def _median(values: Sequence[float]) -> float:
    """The upper median: no mean of a number and infinity."""
    return sorted(values)[len(values) // 2]


def _regret(chosen: pd.DataFrame, loss: Mapping[str, Losses], report: Texts, told: Mapping[str, Any]) -> pd.DataFrame:
    """Loss above that of the best set of the same size, for the sizes that the pair table exhausts."""
    rows = []
    for size in range(1, told["largest"] + 1):
        every = list(combinations(told["blocks"], size))
        search, there = loss["search"](every), loss["report"].texts(every)
        best, goal = every[int(search.argmin())], int(there.mean(1).argmin())
        some = chosen[chosen.n_removed == size]
        runs = [("exhaustion", 0, named(best)), *zip(some.method, some.seed, some.removed, strict=True)]
        for method, seed, removed in runs:
            at = every.index(tuple(map(int, removed.split())))
            apart = statistics.cluster_bootstrap(there[at] - there[goal], report.groups, seed=told["seed"])
            rows.append(
                (method, seed, size, removed, search[at] - search.min(), *map(float, apart), named(every[goal]))
            )
    columns = ["method", "seed", "n_removed", "removed", "search_regret", "report_regret", "low", "high", "report_best"]
    return pd.DataFrame(rows, columns=columns)


def _predictor(equal: Mapping[tuple[str, int], dict[Removed, float]], space: Space) -> pd.DataFrame:
    rows = []
    for (method, seed), found in equal.items():
        held = {one: its for (name, _), some in equal.items() if name == "random" for one, its in some.items()
                if one not in found}  # fmt: skip
        if method == "predictor" and held:
            sets, truth = list(held), np.array(list(held.values()))
            guess, size = Predictor(found, space)(sets), np.array([len(one) for one in sets])
            within = [
                kendalltau(guess[size == r], truth[size == r]).statistic
                for r in np.unique(size)
                if (size == r).sum() > 2
            ]
            tau = float(kendalltau(guess, truth).statistic) if len(sets) > 2 else np.nan
            rows.append((seed, tau, float(np.mean(within)) if within else np.nan, len(found), len(sets)))
    return pd.DataFrame(rows, columns=["seed", "tau", "tau_within", "n_fitted", "n_held_out"])


# --- time -----------------------------------------------------------------------------------------------------------


def latency(
    model: TransformerBridge, ids: Int[torch.Tensor, "text position"], sets: Sequence[Removed], *, repeats: int = 20
) -> pd.DataFrame:
    """Time of a pass without some blocks, as a share of the intact model's: measured, since not all of a pass is blocks.

    Each repeat times the intact model and every set once, in turn, so that what else the machine does hits all alike.
    Columns: `removed`; `blocks`, the share of blocks that are left; `time`, median over repeats of the ratio to the intact
    pass of the same repeat; `low`, `high`, its quartiles.
    """
    n, repeats = model.cfg.n_layers, require.whole("repeats", repeats, 2)
    sets = [tuple(require.wholes("sets", one, 0, n - 1)) for one in sets]
    seconds = np.empty((repeats, 1 + len(sets)))
    device = torch.device(model.cfg.device).type
    wait = (lambda: None) if device == "cpu" else getattr(torch, device).synchronize  # passes are only queued there
    with torch.inference_mode():
        for repeat in range(-1, repeats):  # the first one warms up
            for place, one in enumerate([(), *sets]):
                with rewritten(model, dict.fromkeys(one, lambda x, step: x), whole=True):
                    wait()
                    begun = time.perf_counter()
                    model(ids, use_cache=False)
                    wait()
                    seconds[repeat, place] = time.perf_counter() - begun
    low, middle, high = np.quantile(seconds[:, 1:] / seconds[:, :1], [0.25, 0.5, 0.75], 0)
    left = [1 - len(one) / n for one in sets]
    return pd.DataFrame({"removed": list(map(named, sets)), "blocks": left, "time": middle, "low": low, "high": high})
