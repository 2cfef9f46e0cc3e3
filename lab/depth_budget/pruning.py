"""Which weights may go: the price of pruning each block, the best shares within a budget, and what they cost on other text.

After layer-adaptive pruning (arXiv 2308.10438): curves D_l(r) of the output's distortion when a share r of block l is set to
zero, magnitude by magnitude inside each matrix; then the shares whose curves add up to least, by an exact integer programme. It
is the optimum if damages add (see `additivity`); so what it predicts stands beside what is measured. No retraining here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from scipy import stats
from transformer_lens.model_bridge import TransformerBridge

from lab import models, require, statistics
from lab.depth_budget import allocations
from lab.depth_budget.changes import Pruned
from lab.depth_budget.evaluation import Configuration, Evaluator, Measured, Texts, texts_of
from lab.depth_budget.programme import allocate, exchanged
from lab.identity import identity
from lab.interventions import block_matrices
from lab.results import Result, keep, study, versions

METHODS = {
    "programme": "shares whose curves add up to least, exactly",
    "programme + swaps": "from there, one-swap local search on the measured distortion of the search text",
    "uniform": "the same share in every matrix",
    "global magnitude": "the least weights of all blocks",
    "LAMP": "the least w^2 / sum of the w'^2 of the matrix that are not smaller",
    "ERK": "matrices keep in proportion to (inputs + outputs) / (inputs x outputs)",
    "more of late blocks": "control: shares rise evenly with depth",
    "more of early blocks": "control: shares fall evenly with depth",
    "programme reversed": "control: the programme's shares, the greatest where it has the least",
}
RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_STEPS = (5, 10)  # hundredths of a block that move in a swap
COLUMNS = {
    "budget": "share of the blocks' weights that goes", "method": "of `METHODS`; random: shares drawn at random",
    "example": "the text", "group": "texts that share a source", "genre": "its genre", "layer": "the block",
    "nll": "loss on reporting text, nats", "rise": "loss minus the intact model's on the same text, nats",
    "kl": "KL(intact || pruned) on reporting text, nats", "distortion": "mean square of the centred logits' difference, on "
    "reporting text", "gone": "share of the blocks' weights that is zero",
    "summary.rise": "mean over texts", "low": "lower end of the 95 % interval over texts", "high": "upper end",
    "n": "reporting texts", "predicted": "sum of the blocks' curves at its shares, search text; missing for shares by matrix",
    "measured": "distortion of it all, search text", "than_uniform": "rise minus uniform's, paired by text",
    "than_uniform_low": "lower end", "than_uniform_high": "upper end",
    "worse_than_random": "share of the random allocations that lose less",
    "evaluations": "passes over the search text that it took beyond the curves",
    "rate": "share of the block's weights set to zero", "raw": "distortion on search text, mean over texts: measured, or "
    "interpolated", "monotone": "least raw value at this rate or a higher one", "is_measured": "whether raw is",
    "curves.low": "lower end over texts of raw, where measured", "curves.high": "upper end",
    "curves.rise": "rise of the loss, search text, where measured", "curves.kl": "KL, search text, where measured",
    "share": "of the block's weights set to zero (over its matrices, where they differ)",
    "draw": "number of the random allocation", "random.rise": "mean over reporting texts", "band.n": "random allocations",
    "mean": "mean rise of random allocations, reporting text", "band.low": "their 5th percentile", "band.high": "their 95th",
    "spearman": "rank correlation of predicted and measured distortion over allocations by block",
    "nearest": "median of measured / predicted over these",
}  # fmt: skip


def run(
    model: TransformerBridge, data: str | pd.DataFrame = "prose", *, seed: int = 0, sizes: Sequence[int] = (12, 24),
    n_tokens: int = 32, first: int = 8, rates: Sequence[float] = RATES, budgets: Sequence[float] = (0.1, 0.2, 0.3, 0.5),
    n_random: int = 20, n_swaps: int = 30, resume: bool = True, progress: bool = True,
) -> Result:  # fmt: skip
    """Rate-distortion curves of every block, allocations of some budgets, and their price on text that chose nothing.

    Args:
        sizes: texts on which curves and swaps are measured, and others on which losses are reported.
        rates: where curves are measured; on the hundredths between them they are `interpolated`.
        budgets: shares of all blocks' weights that go, whole hundredths.
        n_random: random allocations of each budget. n_swaps: swaps that the local search may try.

    Tables: `curves`, `allocations`, `random`, `band`; `.table` has every method and reporting text.
    Source: arXiv 2308.10438 (vision models, retrained). Not shown: what retraining would win back; shares by single matrix
    under the programme.
    """
    seed, n = require.seed(seed), model.cfg.n_layers
    rates = sorted(require.numbers("rates", rates, once=True, above=0, high=1))
    if rates[-1] < 1 or any(abs(100 * rate - round(100 * rate)) > 1e-9 for rate in rates):
        raise ValueError(f"rates={rates}: give whole hundredths, the last of them 1")
    budgets = require.numbers("budgets", budgets, once=True, above=0, below=1)
    if any(abs(100 * budget - round(100 * budget)) > 1e-9 for budget in budgets):
        raise ValueError(f"budgets={budgets}: give whole hundredths of all the blocks' weights")
    n_random, n_swaps = require.whole("n_random", n_random, 2), require.whole("n_swaps", n_swaps, 0)
    weights = [sum(w.numel() for w, _ in block_matrices(model, layer)) for layer in range(n)]
    if len(set(weights)) > 1:
        raise ValueError(f"blocks have {min(weights)} to {max(weights)} weights: a budget in shares needs equal blocks")
    sizes = require.wholes("sizes", sizes, 2, None, least=2, twice=True)
    search, report = texts_of(model, data, sizes=sizes[:2], n_tokens=n_tokens, seed=seed)
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own), "dataset": data if isinstance(data, str) else "your texts",
        "n_search": len(search.table), "n_report": len(report.table), "n_tokens": n_tokens,
        "first": require.whole("first", first, 0, n_tokens - 2), "rates": rates, "budgets": budgets, "n_random": n_random,
        "n_swaps": n_swaps, "seed": seed, "block_weights": weights[0], "versions": versions(),
    }  # fmt: skip
    known = {**parameters, "search": search.ids.tolist(), "report": report.ids.tolist()}
    shared = {"search": search, "report": report, "parameters": parameters, "progress": progress}
    (done,) = study(work, [{"which": "pruning"}], kept=keep(work, {"model": own}, resume=resume), known=known, shared=shared,
                    models={"model": model}, progress=progress)  # fmt: skip
    tables = {**done.tables, "band": _band(done.tables["random"], done.summary)}
    summary = _summary(done.table, done.summary, tables["random"], seed)
    return Result("rate_distortion", done.table, summary, parameters, tables).described(COLUMNS)


# --- what is measured -----------------------------------------------------------------------------------------------


def work(
    model: TransformerBridge, *, which: str, search: Texts, report: Texts, parameters: dict[str, Any], progress: bool,
    scratch: Path | None,
) -> Result:  # fmt: skip
    """Curves, then the methods of every budget: measured on both sets of texts."""
    first, seed, n = parameters["first"], parameters["seed"], model.cfg.n_layers
    on_search, on_report = (Evaluator(model, texts.ids, first=first, folder=scratch, progress=progress)
                            for texts in (search, report))  # fmt: skip
    curves = _curves(on_search, parameters["rates"], search, seed)
    raw, monotone = (
        curves.pivot(index="layer", columns="rate", values=name).to_numpy() for name in ("raw", "monotone")
    )
    realised = np.array([realised_rates(row) for row in raw])
    by_matrix = allocations.by_matrix(model, parameters["budgets"])
    rows, texts, shares, random = [], [], [], []
    for number, budget in enumerate(parameters["budgets"]):
        total = round(100 * budget) * n
        by_block, evaluations = _by_block(on_search, monotone, realised, total, parameters)
        drawn = {
            f"random {i}": chosen for i, chosen in enumerate(_random(n, total, parameters["n_random"], [seed, number]))
        }
        plans: dict[str, Configuration] = {
            name: _pruned(chosen / 100) for name, chosen in {**by_block, **drawn}.items()
        }
        plans |= {rule: _pruned(every[number]) for rule, every in by_matrix.items()}
        found, reported = on_search([*plans.values()]), on_report([*plans.values()])
        for i, (method, plan) in enumerate(plans.items()):
            chosen = {**by_block, **drawn}.get(method)
            predicted = np.nan if chosen is None else float(monotone[range(n), chosen].sum())
            values = {"budget": budget, "predicted": predicted, "measured": float(found.distortion[i].mean())}
            rise = reported.nll[i] - on_report.intact
            if method in drawn:
                random.append({**values, "draw": int(method.split()[1]), "rise": float(rise.mean()),
                               "kl": float(reported.kl[i].mean())})  # fmt: skip
                continue
            sizes = [_share(model, layer, plan[layer].share) for layer in range(n)]
            rows.append({**values, "method": method, "gone": float(np.mean(sizes)),
                         "evaluations": evaluations if method == "programme + swaps" else 0})  # fmt: skip
            shares.append(pd.DataFrame({"budget": budget, "method": method, "layer": range(n), "share": sizes}))
            texts.append(pd.DataFrame({"budget": budget, "method": method, **report.table, "nll": reported.nll[i],
                                       "rise": rise, "kl": reported.kl[i], "distortion": reported.distortion[i]}))  # fmt: skip
    tables = {"curves": curves, "allocations": pd.concat(shares, ignore_index=True), "random": pd.DataFrame(random)}
    return Result("rate_distortion", pd.concat(texts, ignore_index=True), pd.DataFrame(rows), {}, tables)


def _curves(evaluate: Evaluator, rates: list[float], texts: Texts, seed: int) -> pd.DataFrame:
    """One row a block and hundredth."""
    measured, grid = [0.0, *rates], np.round(np.arange(101) / 100, 2)
    asked = [(layer, rate) for layer in range(evaluate.n) for rate in measured]
    found: Measured = evaluate([{layer: Pruned(rate)} for layer, rate in asked])
    drawn = statistics.cluster_bootstrap(found.distortion.T, texts.groups, seed=seed)
    rise, frames = (found.nll - evaluate.intact).mean(1), []
    for layer in range(evaluate.n):
        mine = [i for i, (block, _) in enumerate(asked) if block == layer]
        at = np.round(100 * np.array(measured)).astype(int)
        frame = pd.DataFrame({"layer": layer, "rate": grid, "is_measured": False,
                              "raw": interpolated(grid, measured, found.distortion[mine].mean(1))})  # fmt: skip
        frame["monotone"] = monotone_curve(frame.raw.to_numpy())
        frame.loc[at, "is_measured"] = True
        for name, values in {"low": drawn.low, "high": drawn.high, "rise": rise, "kl": found.kl.mean(1)}.items():
            frame.loc[at, name] = np.asarray(values)[mine]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def interpolated(
    grid: Shaped[np.ndarray, " place"], rates: Sequence[float], values: Shaped[np.ndarray, " rate"]
) -> Shaped[np.ndarray, " place"]:
    """Powers of the rate between measured ones (log D is a line in log r), the first power going on down to D(0) = 0.

    Curves are convex at small rates; straight lines would lie far above them and draw the programme to measured rates.
    Next to a zero there is no power: there it is a straight line. `rates` begin with 0.

    >>> interpolated(np.array([0.0, 0.1, 0.2, 0.3, 0.4]), [0.0, 0.2, 0.4], np.array([0.0, 4.0, 16.0])).round(3).tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    found = np.interp(grid, rates, values)
    for left in range(1, len(rates) - 1):
        (a, b), (low, high) = rates[left : left + 2], values[left : left + 2]
        if low > 0 and high > 0 and values[0] == 0:
            power = np.log(high / low) / np.log(b / a)
            inside = (grid > a) & (grid < b)
            found[inside] = low * (grid[inside] / a) ** power
            if left == 1:
                below = (grid > 0) & (grid < a)
                found[below] = low * (grid[below] / a) ** max(power, 1)
    return found


def monotone_curve(raw: Shaped[np.ndarray, " rate"]) -> Shaped[np.ndarray, " rate"]:
    """The least value at each rate or a higher one: pruning more and losing less is open to whoever may prune less.

    >>> monotone_curve(np.array([0.0, 3.0, 2.0, 5.0])).tolist()
    [0.0, 2.0, 2.0, 5.0]
    """
    return np.minimum.accumulate(raw[::-1])[::-1]


def realised_rates(raw: Float[np.ndarray, " rate"]) -> Int[np.ndarray, " rate"]:
    """For each place of the curve the first place from there on with the monotone value: what is pruned when it is chosen.

    >>> realised_rates(np.array([0.0, 3.0, 2.0, 2.0, 5.0])).tolist()
    [0, 2, 2, 3, 4]
    """
    return np.array([place + int(raw[place:].argmin()) for place in range(len(raw))])


def _by_block(
    evaluate: Evaluator, monotone: np.ndarray, realised: np.ndarray, total: int, parameters: dict[str, Any]
) -> tuple[dict[str, np.ndarray], int]:
    """Hundredths of each block that go, by method; how often the local search measured."""
    n = evaluate.n
    costs = np.tile(100 - np.arange(101), (n, 1))
    programme = realised[range(n), allocate(costs, monotone, 100 * n - total)]

    def damage(chosen: np.ndarray) -> float:
        return float(evaluate([_pruned(chosen / 100)]).distortion.mean())

    swapped, stood = exchanged(costs, programme, 100 * n - total, damage, tries=parameters["n_swaps"], steps=_STEPS,
                               seed=parameters["seed"])  # fmt: skip
    found = {"programme": programme, "programme + swaps": swapped, "uniform": np.full(n, total // n)}
    return {**found, **allocations.by_depth(n, total),
            "programme reversed": allocations.reversed_shares(programme)}, len(stood)  # fmt: skip


def _random(n: int, total: int, draws: int, seed: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [allocations.filled(rng.random(n), total) for _ in range(draws)]


def _pruned(shares: Sequence[Any] | np.ndarray) -> dict[int, Pruned]:
    return {layer: Pruned(share if isinstance(share, tuple) else float(share)) for layer, share in enumerate(shares)}


def _share(model: TransformerBridge, layer: int, share: float | tuple[float, ...]) -> float:
    """Of a block's weights, as they are counted when they are set to zero."""
    sizes = [w.numel() for w, _ in block_matrices(model, layer)]
    shares = share if isinstance(share, tuple) else (share,) * len(sizes)
    return sum(round(one * size) for one, size in zip(shares, sizes, strict=True)) / sum(sizes)


# --- statistics -----------------------------------------------------------------------------------------------------


def _summary(table: pd.DataFrame, found: pd.DataFrame, random: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for row in found.to_dict("records"):
        here = table[table.budget == row["budget"]]
        mine, uniform = here[here.method == row["method"]], here[here.method == "uniform"]
        rise, groups = mine.rise.to_numpy(), mine.group.astype(str).to_numpy()
        both = np.stack([rise, rise - uniform.rise.to_numpy()], 1)
        estimate, low, high = map(np.asarray, statistics.cluster_bootstrap(both, groups, seed=seed))
        others = random[random.budget == row["budget"]].rise
        rows.append({
            **row, "n": len(mine), "rise": estimate[0], "low": low[0], "high": high[0], "than_uniform": estimate[1],
            "than_uniform_low": low[1], "than_uniform_high": high[1], "kl": mine.kl.mean(),
            "distortion": mine.distortion.mean(), "worse_than_random": float((others < estimate[0]).mean()),
        })  # fmt: skip
    columns = ["budget", "method", "gone", "n", "rise", "low", "high"]
    frame = pd.DataFrame(rows)
    return frame[[*columns, *frame.columns.difference(columns, sort=False)]]


def _band(random: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for budget, part in random.groupby("budget"):
        named = found[(found.budget == budget) & found.predicted.notna()]
        both = pd.concat([part[["predicted", "measured"]], named[["predicted", "measured"]]])
        low, high = part.rise.quantile([0.05, 0.95])
        rows.append({"budget": budget, "n": len(part), "mean": part.rise.mean(), "low": low, "high": high,
                     "spearman": float(stats.spearmanr(both.predicted, both.measured).statistic),
                     "nearest": float((both.measured / both.predicted).median())})  # fmt: skip
    return pd.DataFrame(rows)
