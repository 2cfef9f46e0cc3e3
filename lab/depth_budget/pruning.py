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
from scipy import stats
from transformer_lens.model_bridge import TransformerBridge

from lab import models, require, statistics
from lab.depth_budget import allocations
from lab.depth_budget.changes import Pruned
from lab.depth_budget.evaluation import Configuration, Evaluator, Texts, texts_of
from lab.depth_budget.programme import exchanged
from lab.depth_budget.rate_curves import best_shares, curves, matrix_units, monotone_curve
from lab.identity import identity
from lab.interventions import block_matrices
from lab.results import Result, keep, study, versions

METHODS = {
    "programme": "shares whose curves add up to least, exactly",
    "programme + swaps": "from there, one-swap local search on the measured distortion of the search text",
    "programme, other texts": "the programme, from curves on a second set of texts",
    "programme by matrix": "a share for each matrix, from the curves of single matrices",
    "uniform": "the same share in every matrix",
    "global magnitude": "the least weights of all blocks",
    "LAMP": "the least w^2 / sum of the w'^2 of the matrix that are not smaller",
    "ERK": "matrices keep in proportion to (inputs + outputs) / (inputs x outputs)",
    "more of late blocks": "control: shares rise evenly with depth",
    "more of early blocks": "control: shares fall evenly with depth",
    "programme reversed": "control: the programme's shares, the greatest where it has the least",
}
RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
MATRIX_RATES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_STEPS = (5, 10)  # hundredths of a block that move in a swap
COLUMNS = {
    "budget": "share of the blocks' weights that goes", "method": "of `METHODS`; random: shares drawn at random",
    "example": "the text", "group": "texts that share a source", "genre": "its genre", "layer": "the block",
    "nll": "loss on reporting text, nats", "rise": "loss minus the intact model's on the same text, nats",
    "kl": "KL(intact || pruned) on reporting text, nats", "distortion": "mean square of the centred logits' difference, on "
    "reporting text", "gone": "share of the blocks' weights that is zero",
    "summary.rise": "mean over texts", "low": "lower end of the 95 % interval over texts", "high": "upper end",
    "n": "reporting texts", "summary.kl": "KL(intact || pruned), mean over reporting texts",
    "summary.distortion": "mean over reporting texts", "predicted": "sum of the blocks' monotone curves at its shares "
    "(programme by matrix: of the matrices'), search text; missing for other shares by matrix",
    "random.predicted": "sum of the blocks' monotone curves at its shares, search text",
    "measured": "distortion of it all, mean over search texts", "than_uniform": "rise minus uniform's, paired by text",
    "than_uniform_low": "lower end", "than_uniform_high": "upper end",
    "than_programme": "rise minus the programme's, paired by text", "than_programme_low": "lower end",
    "than_programme_high": "upper end",
    "worse_than_random": "share of the random allocations that lose less",
    "evaluations": "passes over its text that it took beyond the blocks' curves on the search text",
    "rate": "share of the block's weights set to zero", "raw": "distortion on search text, mean over texts: measured, or "
    "interpolated", "monotone": "least raw value at this rate or a higher one", "is_measured": "whether raw is",
    "curves.low": "lower end over texts of raw, where measured", "curves.high": "upper end",
    "curves.rise": "rise of the loss, search text, where measured", "curves.kl": "KL, search text, where measured",
    "share": "of the block's weights set to zero (over its matrices, where they differ)",
    "draw": "number of the random allocation", "random.rise": "mean over reporting texts", "band.n": "random allocations",
    "mean": "mean rise of random allocations, reporting text", "band.low": "their 5th percentile", "band.high": "their 95th",
    "random.kl": "KL(intact || pruned), mean over reporting texts", "allocations.method": "of `METHODS`",
    "matrix": "the matrix of the block", "matrix_shares.share": "of the matrix's weights set to zero",
    "matrix_curves.rate": "share of the matrix's weights set to zero", "matrix_curves.raw": "distortion, mean over search texts",
    "matrix_curves.low": "lower end of raw over texts", "matrix_curves.high": "upper end",
    "matrix_curves.rise": "rise of the loss, mean over search texts", "matrix_curves.kl": "KL, mean over search texts",
    "spearman": "rank correlation of predicted and measured distortion over allocations by block",
    "nearest": "median of measured / predicted over the same allocations",
}  # fmt: skip


def run(
    model: TransformerBridge, data: str | pd.DataFrame = "prose", *, seed: int = 0, sizes: Sequence[int] = (12, 24, 12),
    n_tokens: int = 32, first: int = 8, rates: Sequence[float] = RATES, matrix_rates: Sequence[float] = MATRIX_RATES,
    budgets: Sequence[float] = (0.1, 0.3, 0.5), n_random: int = 20, n_swaps: int = 30, resume: bool = True,
    progress: bool = True,
) -> Result:  # fmt: skip
    """Rate-distortion curves of every block, allocations of some budgets, and their price on text that chose nothing.

    Args:
        sizes: texts on which curves and swaps are measured, others on which losses are reported, and others for curves once
            more.
        rates: where curves of blocks are measured; on the hundredths between them they are `interpolated`. matrix_rates: where
            those of single matrices are, seven times as many in most models; () leaves them out.
        budgets: shares of all blocks' weights that go, whole hundredths.
        n_random: random allocations of each budget. n_swaps: swaps that the local search may try.

    Tables: `curves`, `allocations`, `random`, `band`, `matrix_curves`, `matrix_shares`; `.table` has every method and
    reporting text. Source: arXiv 2308.10438 (vision models, retrained). Not shown: what retraining would win back.
    """
    seed, n = require.seed(seed), model.cfg.n_layers
    rates = _rates("rates", rates)
    matrix_rates = _rates("matrix_rates", matrix_rates) if len(matrix_rates) else []
    budgets = require.numbers("budgets", budgets, once=True, above=0, below=1)
    if any(abs(100 * budget - round(100 * budget)) > 1e-9 for budget in budgets):
        raise ValueError(f"budgets={budgets}: give whole hundredths of all the blocks' weights")
    n_random, n_swaps = require.whole("n_random", n_random, 2), require.whole("n_swaps", n_swaps, 0)
    weights = [sum(w.numel() for w, _ in block_matrices(model, layer)) for layer in range(n)]
    if len(set(weights)) > 1:
        raise ValueError(f"blocks have {min(weights)} to {max(weights)} weights: a budget in shares needs equal blocks")
    names, _ = matrix_units(model) if matrix_rates else ([], [])
    sizes = require.wholes("sizes", sizes, 2, None, least=3, twice=True)
    if len(sizes) != 3:
        raise ValueError(f"sizes={sizes}: give three, of the texts to search, to report, and for curves once more")
    search, report, second = texts_of(model, data, sizes=sizes, n_tokens=n_tokens, seed=seed)
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own), "dataset": data if isinstance(data, str) else "your texts",
        "n_search": sizes[0], "n_report": sizes[1], "n_second": sizes[2], "n_tokens": n_tokens,
        "first": require.whole("first", first, 0, n_tokens - 2), "rates": rates, "matrix_rates": matrix_rates,
        "matrices": names, "budgets": budgets, "n_random": n_random, "n_swaps": n_swaps, "seed": seed,
        "block_weights": weights[0], "versions": versions(),
    }  # fmt: skip
    sets = {"search": search, "report": report, "second": second}
    known = {**parameters, **{name: one.ids.tolist() for name, one in sets.items()}}
    shared = {"sets": sets, "parameters": parameters, "progress": progress}
    (done,) = study(work, [{"which": "pruning"}], kept=keep(work, {"model": own}, resume=resume), known=known, shared=shared,
                    models={"model": model}, progress=progress)  # fmt: skip
    tables = {**done.tables, "band": _band(done.tables["random"], done.summary)}
    summary = _summary(done.table, done.summary, tables["random"], seed)
    return Result("rate_distortion", done.table, summary, parameters, tables).described(COLUMNS)


# --- what is measured -----------------------------------------------------------------------------------------------


def work(
    model: TransformerBridge, *, which: str, sets: dict[str, Texts], parameters: dict[str, Any], progress: bool,
    scratch: Path | None,
) -> Result:  # fmt: skip
    """Curves, then the methods of every budget: measured on both sets of texts."""
    first, seed, n, report = parameters["first"], parameters["seed"], model.cfg.n_layers, sets["report"]
    on_search, on_report, on_second = (Evaluator(model, texts.ids, first=first, folder=scratch, progress=progress)
                                       for texts in sets.values())  # fmt: skip
    found = curves(on_search, parameters["rates"], sets["search"], seed)
    raw, other = (_wide(one) for one in (found, curves(on_second, parameters["rates"], sets["second"], seed)))
    least = np.array([monotone_curve(row) for row in raw])
    by_matrix, matrix_tables = _by_matrix(model, on_search, sets["search"], parameters)
    by_rule = allocations.by_matrix(model, parameters["budgets"])
    spent = {
        "programme, other texts": n * len(parameters["rates"]),
        "programme by matrix": len(matrix_tables.get("matrix_curves", [])),
    }
    rows, texts, shares, random = [], [], [], []
    for number, budget in enumerate(parameters["budgets"]):
        total = round(100 * budget) * n
        by_block, tries = _by_block(on_search, raw, other, total, parameters)
        drawn = _random(n, total, parameters["n_random"], [seed, number])
        whole = {**by_block, **{f"random {i}": chosen for i, chosen in enumerate(drawn)}}
        predicted = {name: float(least[range(n), chosen].sum()) for name, chosen in whole.items()}
        plans: dict[str, Configuration] = {name: _pruned(chosen / 100) for name, chosen in whole.items()}
        plans |= {rule: _pruned(every[number]) for rule, every in by_rule.items()}
        if by_matrix:
            plans["programme by matrix"], predicted["programme by matrix"] = by_matrix[number]
        found_search, found_report = on_search([*plans.values()]), on_report([*plans.values()])
        for i, (method, plan) in enumerate(plans.items()):
            values = {"budget": budget, "predicted": predicted.get(method, np.nan),
                      "measured": float(found_search.distortion[i].mean())}  # fmt: skip
            nll, kl, distortion = (one[i] for one in found_report)
            rise = nll - on_report.intact
            if method.startswith("random"):
                random.append(
                    {**values, "draw": int(method.split()[1]), "rise": float(rise.mean()), "kl": float(kl.mean())}
                )
                continue
            sizes = [_share(model, layer, plan[layer].share) for layer in range(n)]
            rows.append({**values, "method": method, "gone": float(np.mean(sizes)),
                         "evaluations": {**spent, "programme + swaps": tries}.get(method, 0)})  # fmt: skip
            shares.append(pd.DataFrame({"budget": budget, "method": method, "layer": range(n), "share": sizes}))
            texts.append(pd.DataFrame({"budget": budget, "method": method, **report.table, "nll": nll, "rise": rise, "kl": kl,
                                       "distortion": distortion}))  # fmt: skip
    tables = {"curves": found, "allocations": pd.concat(shares, ignore_index=True), "random": pd.DataFrame(random),
              **matrix_tables}  # fmt: skip
    return Result("rate_distortion", pd.concat(texts, ignore_index=True), pd.DataFrame(rows), {}, tables)


def _wide(curves: pd.DataFrame) -> np.ndarray:
    """Raw damages [block rate], or [block and matrix, rate]."""
    return curves.raw.to_numpy().reshape(-1, 101)


def _by_matrix(
    model: TransformerBridge, evaluate: Evaluator, texts: Texts, parameters: dict[str, Any]
) -> tuple[list[tuple[dict[int, Pruned], float]], dict[str, pd.DataFrame]]:
    """Of each budget the programme's shares of single matrices and what it predicts; the curves as measured, the shares."""
    names, rates = parameters["matrices"], parameters["matrix_rates"]
    if not rates:
        return [], {}
    found = curves(evaluate, rates, texts, parameters["seed"], matrices=len(names))
    raw, sizes = _wide(found), matrix_units(model)[1] * evaluate.n
    plans, frames = [], []
    for budget in parameters["budgets"]:
        chosen = best_shares(raw, sizes, round(100 * budget) * sum(sizes))
        shares = (chosen / 100).reshape(evaluate.n, len(names))
        plans.append((_pruned([tuple(map(float, row)) for row in shares]), float(raw[range(len(raw)), chosen].sum())))
        long = (
            pd.DataFrame(shares, columns=names)
            .rename_axis("layer")
            .reset_index()
            .melt("layer", names, "matrix", "share")
        )
        frames.append(long.sort_values("layer", kind="stable").assign(budget=budget))
    measured = found[found.is_measured & (found.rate > 0)].drop(columns=["monotone", "is_measured"])
    measured["matrix"] = measured.matrix.map(dict(enumerate(names)))
    return plans, {
        "matrix_curves": measured.reset_index(drop=True),
        "matrix_shares": pd.concat(frames, ignore_index=True),
    }


def _by_block(
    evaluate: Evaluator, raw: np.ndarray, other: np.ndarray, total: int, parameters: dict[str, Any]
) -> tuple[dict[str, np.ndarray], int]:
    """Hundredths of each block that go, by method; how often the local search measured."""
    n = evaluate.n
    costs = np.tile(100 - np.arange(101), (n, 1))
    programme, second = (best_shares(one, [1] * n, total) for one in (raw, other))

    def damage(chosen: np.ndarray) -> float:
        return float(evaluate([_pruned(chosen / 100)]).distortion.mean())

    swapped, stood = exchanged(costs, programme, 100 * n - total, damage, tries=parameters["n_swaps"], steps=_STEPS,
                               seed=parameters["seed"])  # fmt: skip
    found = {"programme": programme, "programme + swaps": swapped, "programme, other texts": second,
             "uniform": np.full(n, total // n)}  # fmt: skip
    return {**found, **allocations.by_depth(n, total),
            "programme reversed": allocations.reversed_shares(programme)}, len(stood)  # fmt: skip


def _random(n: int, total: int, draws: int, seed: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [allocations.filled(rng.random(n), total) for _ in range(draws)]


def _pruned(shares: Sequence[Any] | np.ndarray) -> dict[int, Pruned]:
    return {layer: Pruned(share if isinstance(share, tuple) else float(share)) for layer, share in enumerate(shares)}


def _rates(name: str, given: Sequence[float]) -> list[float]:
    rates = sorted(require.numbers(name, given, once=True, above=0, high=1))
    if rates[-1] < 1 or any(abs(100 * rate - round(100 * rate)) > 1e-9 for rate in rates):
        raise ValueError(f"{name}={rates}: give whole hundredths, the last of them 1")
    return rates


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
        mine, uniform, programme = (here[here.method == name] for name in (row["method"], "uniform", "programme"))
        rise, groups = mine.rise.to_numpy(), mine.group.astype(str).to_numpy()
        both = np.stack([rise, rise - uniform.rise.to_numpy(), rise - programme.rise.to_numpy()], 1)
        estimate, low, high = map(np.asarray, statistics.cluster_bootstrap(both, groups, seed=seed))
        others = random[random.budget == row["budget"]].rise
        rows.append({
            **row, "n": len(mine), "rise": estimate[0], "low": low[0], "high": high[0], "than_uniform": estimate[1],
            "than_uniform_low": low[1], "than_uniform_high": high[1], "than_programme": estimate[2],
            "than_programme_low": low[2], "than_programme_high": high[2], "kl": mine.kl.mean(),
            "distortion": mine.distortion.mean(), "worse_than_random": float((others < estimate[0]).mean()),
        })  # fmt: skip
    columns = ["budget", "method", "gone", "n", "rise", "low", "high"]
    frame = pd.DataFrame(rows)
    return frame[[*columns, *frame.columns.difference(columns, sort=False)]]


def _band(random: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for budget, part in random.groupby("budget"):
        named = found[(found.budget == budget) & found.predicted.notna() & (found.method != "programme by matrix")]
        both = pd.concat([part[["predicted", "measured"]], named[["predicted", "measured"]]])
        low, high = part.rise.quantile([0.05, 0.95])
        rows.append({"budget": budget, "n": len(part), "mean": part.rise.mean(), "low": low, "high": high,
                     "spearman": float(stats.spearmanr(both.predicted, both.measured).statistic),
                     "nearest": float((both.measured / both.predicted).median())})  # fmt: skip
    return pd.DataFrame(rows)
