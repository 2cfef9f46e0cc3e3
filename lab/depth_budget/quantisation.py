"""Which blocks may have fewer bits? Scores of blocks as orders of lowering them, beside random orders and plain controls.

After Layer-Wise Quantization (arXiv 2406.17415), which gives the most important blocks more bits and the rest fewer. Added:
every reading of its scores, measured damage, reverses, both depth orders, random orders as a band, bits counted with steps
and zero points, one level and the best allocation at the same average, and whole blocks left out.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from transformer_lens.model_bridge import TransformerBridge

from lab import models, require
from lab.depth_budget import lowering
from lab.depth_budget.changes import Bits
from lab.depth_budget.evaluation import Evaluator, Texts, texts_of
from lab.depth_budget.scores import block_scores
from lab.identity import identity
from lab.interventions import require_groups
from lab.results import Result, joined, keep, study, versions
from lab.statistics import cluster_means, holm

PERMUTATIONS = 10_000
COLUMNS = {
    "example": "the text", "group": "its document", "genre": "its kind",
    "sweep": "pair of bits (higher/lower), or the controls: at 3 bits, prune or quantise",
    "order": "in which blocks are lowered, least important first; in the controls the method",
    "kind": "of order: score, reverse, depth, random; of control: uniform, two levels, programme, random, damage",
    "k": "blocks lowered, or changed at all (prune or quantise)",
    "bits": "bits a weight of the blocks' matrices on average, steps and zero points counted; 16 where nothing is done",
    "bits_model": "the same with all other parameters at 16 bits, the embedding among them",
    "nll": "loss, nats a token", "rise": "loss minus the intact model's, nats a token",
    "kl": "KL(intact || changed), nats a token",
    "n": "texts; agreement: blocks", "low": "lower end of the 95 % interval over texts", "high": "upper end",
    "bands.low": "5 % of random orders lie below", "bands.high": "95 % of random orders lie below",
    "bands.mean": "mean of random orders", "n_orders": "random orders",
    "area": "mean rise over the curve, by the share of weights that are lowered, nats",
    "ratio": "area over the mean area of random orders", "ratio_low": "lower end, texts resampled", "ratio_high": "upper end",
    "below": "share of random orders with a larger area",
    "lowerable": "most blocks, in steps, that are lowered before the rise is above the threshold; 0 also where none may be",
    "lowerable_low": "lower end, texts resampled", "lowerable_high": "upper end",
    "lowerable_more": "the same, for the rise beyond that of all blocks at the higher bits",
    "lowerable_more_low": "lower end, texts resampled", "lowerable_more_high": "upper end",
    "depth_order": "the depth order with the smaller area", "difference": "area minus that of depth_order; controls: rise minus "
    "uniform's; prune: rise where blocks are left out minus where they have 2 bits",
    "difference_low": "lower end, texts resampled in pairs", "difference_high": "upper end",
    "p": "areas: one-sided, less than both depth orders (the larger of two sign-flip p over texts); "
    "agreement: two-sided, blocks permuted",
    "p_holm": "p after Holm, over the scores of a sweep", "beats_depth": "whether p_holm is below 0.05; missing: no score",
    "score": "LIM, ZD, or importance as measured", "reading": "of `scores.LIM`, `scores.ZD`", "layer": "the block",
    "value": "of the score", "importance": "larger is lowered later: the value, its sign turned for ZD; measured ones in nats",
    "end": "whether it is the first or the last block",
    "blocks": "all, or without the first and the last", "target": "measured damage, by loss or by KL",
    "rho": "Spearman correlation of importance with it",
    "place": "place in the order, 0 is lowered first",
    "measure": "of the random orders: area, ratio, lowerable, lowerable_more, or rise at k", "bands.bits": "bits a weight there",
    "method": "how bits are given", "chosen": "the order that did best on the search texts", "plans.bits": "of this block",
    "on_search": "rise on the texts that were searched, nats",
    "predicted": "sum of single blocks' rises on the search texts, nats",
    "change": "what is done to this block alone", "loss": "rise of the loss on the search texts, nats",
    "KL": "KL(intact || changed) on the search texts, nats",
    "left_out": "rise where k blocks are left out", "two_bits": "rise where k blocks have 2 bits",
    "seconds": "of work, without what an earlier run had kept", "passes": "passes done, counted in blocks run",
    "full": "passes if every configuration had run from the first block on",
}  # fmt: skip


def run(
    model: TransformerBridge, data: str | pd.DataFrame = "prose", *,
    pairs: Sequence[Sequence[int]] = ((8, 4), (4, 3), (4, 2), (3, 2)), step: int = 3, group_size: int = 64, n_random: int = 20,
    controls: bool = True, most: int = 10, threshold: float | int = 0.05, sizes: Sequence[int] = (12, 24, 12), n_tokens: int = 32,
    first: int = 8, draws: int = 1000, seed: int = 0, resume: bool = True, executor: Executor | None = None,
    progress: bool = True,
) -> Result:  # fmt: skip
    """Loss as blocks are lowered from the higher to the lower bits of each pair, in every order, on text that ordered nothing.

    Args:
        pairs: (higher, lower). step: blocks between two points of a curve.
        controls: also 4/2 against 3 bits against the programme at one average, and leaving out against 2 bits (at `most` blocks).
        threshold: nats that may be lost. sizes: texts to search and order by, to report on, and to order by once more.
        n_tokens, first: tokens of a text, and the first position whose next token is scored.

    Returns:
        Text by text; in the summary each point of each curve. Tables: areas, bands (of random orders), scores, agreement (with
        measured damage; where damage means that of one block alone lowered, all others at the higher bits), orders, runs;
        with controls: controls, plans, prune, alone. Not shown: neighbouring blocks are alike, so that a permutation of blocks
        takes them for more independent than they are.
    """
    given = [tuple(require.wholes(f"pairs[{i}]", pair, 2, 8, least=2)) for i, pair in enumerate(pairs)]
    if wrong := [pair for pair in given if len(pair) != 2 or pair[0] <= pair[1]]:
        raise ValueError(f"pairs holds {wrong[0]}: give the higher bits, then the lower ones")
    if len(set(given)) < len(given) or not given:
        raise ValueError(f"pairs={given}: give at least one, each once")
    n_layers, sizes = model.cfg.n_layers, require.wholes("sizes", sizes, 2, None, least=3, twice=True)
    if len(sizes) != 3:
        raise ValueError(f"sizes={sizes}: give three, of the texts to search, to report, and to order by once more")
    step, n_random = require.whole("step", step, 1, n_layers), require.whole("n_random", n_random, 2)
    most, draws = require.whole("most", most, 1), require.whole("draws", draws, 1)
    threshold, (controls,) = require.number("threshold", threshold, above=0), require.flags(controls=controls)
    seed, n_tokens = require.seed(seed), require.whole("n_tokens", n_tokens, 3)
    first = require.whole("first", first, 0, n_tokens - 2)
    require_groups(model, 8, group_size=group_size)
    texts, name = (
        texts_of(model, data, sizes=sizes, n_tokens=n_tokens, seed=seed),
        data if isinstance(data, str) else "your texts",
    )
    own = identity(model)
    parameters = {
        "group_size": group_size,
        "step": step,
        "n_random": n_random,
        "most": most,
        "first": first,
        "seed": seed,
    }
    parts = [{"sweep": f"{high}/{low}"} for high, low in given] + ([{"sweep": lowering.CONTROL}] if controls else [])
    kept = keep(lowering.work, {"model": own}, resume=resume)
    known = {**parameters, "texts": [one.ids.cpu().numpy() for one in texts], "scores": "on the first texts"}
    scores = block_scores(model, texts[0].ids)
    missing = [part["sweep"] for part in parts if not kept.has(kept.key({**known, **part}))]
    if progress and missing:
        _estimate(model, texts, missing, parameters)
    shared = {"texts": texts, "scores": scores, "parameters": parameters, "progress": progress}
    done = study(lowering.work, parts, kept=kept, known=known, shared=shared, models={"model": model}, executor=executor,
                 describe="sweeps", progress=progress)  # fmt: skip
    table, tables = joined(done)
    summary = _curves(table, lowering.sizes_of(model), draws, seed)
    pairwise = table[table.sweep.isin([f"{high}/{low}" for high, low in given])]
    tables["areas"], tables["bands"] = _areas(pairwise, summary, threshold, draws, seed)
    tables["scores"] = _scores(scores, tables.pop("measured"), n_layers)
    tables["agreement"] = _agreement(tables["scores"], seed)
    if controls:
        tables["controls"] = _controls(table[table.sweep == lowering.CONTROL], summary, tables["plans"], draws, seed)
        tables["prune"] = _prune(table[table.sweep == lowering.PRUNE], draws, seed)
    about = {**models.facts(model), "identity": str(own), "dataset": name, "pairs": [list(pair) for pair in given],
                   "sizes": sizes, "n": sizes[1], "n_tokens": n_tokens, "threshold": threshold, "draws": draws,
                   "versions": versions()}  # fmt: skip
    return Result("layer_bits", table, summary, {**parameters, **about}, tables).described(COLUMNS)


def _estimate(
    model: TransformerBridge, texts: Sequence[Texts], sweeps: Sequence[str], parameters: dict[str, Any]
) -> None:
    """Says how long it will take, from one pass."""
    evaluate, n, began = Evaluator(model, texts[1].ids, progress=False), model.cfg.n_layers, time.monotonic()
    evaluate([dict.fromkeys(range(n), Bits(8, parameters["group_size"]))])
    one = time.monotonic() - began
    n_orders = 24 + parameters["n_random"]
    points = {sweep: n_orders * (-(-n // parameters["step"]) - 1) + 2 * n for sweep in sweeps}
    if lowering.CONTROL in points:
        points[lowering.CONTROL] = 2 * n_orders + 5 * n
    print(
        f"One pass takes {one:.1f} s: about {0.8 * one * sum(points.values()) / 60:.0f} min for {len(sweeps)} sweeps."
    )


# --- statistics -----------------------------------------------------------------------------------------------------


def _by_text(part: pd.DataFrame, values: str = "rise") -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Configurations (sweep, order, kind, k, bits), values [text configuration], groups [text]."""
    n = (part.groupby(["sweep", "order", "k"], sort=False).size()).iloc[0]
    heads = part.iloc[::n][["sweep", "order", "kind", "k", "bits"]].reset_index(drop=True)
    return heads, part[values].to_numpy().reshape(-1, n).T, part.group.iloc[:n].astype(str).to_numpy()


def _ends(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return low, high


def _curves(table: pd.DataFrame, sizes: tuple[np.ndarray, int], draws: int, seed: int) -> pd.DataFrame:
    heads, rise, groups = _by_text(table)
    low, high = _ends(cluster_means(rise, groups, draws=draws, seed=seed))
    blocks, rest = sizes[0].sum(), sizes[1]
    whole = (heads.bits * blocks + 16 * rest) / (blocks + rest)
    return heads.assign(
        bits_model=whole, n=len(groups), rise=rise.mean(0), low=low, high=high, kl=_by_text(table, "kl")[1].mean(0)
    )


def _areas(
    table: pd.DataFrame, summary: pd.DataFrame, threshold: float, draws: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each order's area, against random and depth orders; bands of the random ones."""
    areas, bands = [], []
    for sweep, part in table.groupby("sweep", sort=False):
        heads, rise, groups = _by_text(part)
        names = heads.drop_duplicates("order")[["sweep", "order", "kind"]].reset_index(drop=True)
        ks, by_order = np.unique(heads.k), rise.reshape(len(groups), len(names), -1)  # [text order k]
        bits = heads.bits.to_numpy().reshape(len(names), -1)
        share = (bits[:, :1] - bits) / (bits[:, :1] - bits[:, -1:])
        area = np.trapezoid(by_order, share, axis=-1)  # [text order]
        random, score = (names.kind == "random").to_numpy(), (names.kind == "score").to_numpy()
        drawn = cluster_means(by_order, groups, draws=draws, seed=seed)  # [draw order k]
        drawn_area = np.trapezoid(drawn, share, axis=-1)
        mean, mean_area = by_order.mean(0), area.mean(0)
        found = names.assign(area=mean_area, **_between("", drawn_area))
        found["ratio"] = mean_area / mean_area[random].mean()
        found = found.assign(**_between("ratio_", drawn_area / drawn_area[:, random].mean(1, keepdims=True)))
        found["below"] = (mean_area[random][None] > mean_area[:, None]).mean(1)
        for name, shift in (("lowerable", 0), ("lowerable_more", 1)):
            found[name] = _lowerable(mean - shift * mean[:, :1], ks, threshold)
            found = found.assign(**_between(f"{name}_", _lowerable(drawn - shift * drawn[:, :, :1], ks, threshold)))
        depth = [int(np.flatnonzero(names.order == name)[0]) for name in lowering.ENDS]
        better = min(depth, key=lambda i: mean_area[i])
        found["depth_order"], found["difference"] = names.order[better], mean_area - mean_area[better]
        found = found.assign(**_between("difference_", drawn_area - drawn_area[:, [better]]))
        p = np.max([_less(area - area[:, [i]], groups, seed) for i in depth], 0)
        found["p"] = np.where(score, p, np.nan)
        found["p_holm"] = holm(found.p.to_numpy())
        found["beats_depth"] = pd.array(np.where(score, found.p_holm < 0.05, None), "boolean")
        areas.append(found)
        some = found[random]
        rows = [(name, -1, np.nan, some[name]) for name in ("area", "ratio", "lowerable", "lowerable_more")]
        rows += [("rise", k, bits[random, i].mean(), mean[random, i]) for i, k in enumerate(ks)]
        bands += [
            (sweep, name, k, at, values.mean(), *np.quantile(values, [0.05, 0.95]), len(values))
            for name, k, at, values in rows
        ]
    columns = ["sweep", "measure", "k", "bits", "mean", "low", "high", "n_orders"]
    return pd.concat(areas, ignore_index=True), pd.DataFrame(bands, columns=columns)


def _between(prefix: str, drawn: np.ndarray) -> dict[str, np.ndarray]:
    low, high = _ends(drawn)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _lowerable(rise: np.ndarray, ks: np.ndarray, threshold: float) -> np.ndarray:
    """[... k] to [...]: the largest k up to which no rise is above the threshold; 0 where the first one is."""
    fine = np.logical_and.accumulate(rise <= threshold, axis=-1)
    return ks[np.maximum(fine.sum(-1) - 1, 0)]


def _less(differences: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """One-sided p [test] that the mean over texts is below 0: signs of whole documents flipped at random."""
    sums = np.array([differences[groups == group].sum(0) for group in np.unique(groups)])
    signs = np.random.default_rng([seed, 29]).choice([-1.0, 1.0], (PERMUTATIONS, len(sums)))
    return (1 + (signs @ sums <= sums.sum(0) + 1e-12).sum(0)) / (1 + PERMUTATIONS)


def _scores(scores: pd.DataFrame, measured: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    both = pd.concat([scores.assign(sweep="all"), measured.assign(reading="measured", value=np.nan)], ignore_index=True)
    return both.assign(end=both.layer.isin([0, n_layers - 1]))[
        ["sweep", "score", "reading", "layer", "value", "importance", "end"]
    ]


def _agreement(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Spearman of every score with the measured damages of each pair, with and without the first and the last block."""
    rows = []
    for sweep in scores.sweep[scores.sweep != "all"].unique():
        some = scores[scores.sweep.isin([sweep, "all"])]
        for blocks, part in (("all", some), ("without ends", some[~some.end])):
            wide = part.pivot(index="layer", columns=["score", "reading"], values="importance")
            if len(wide) < 3:
                continue
            ranks = wide.apply(stats.rankdata).apply(lambda one: (one - one.mean()) / max(one.std(ddof=0), 1e-12))
            for target in ("damage", "damage, KL"):
                damage = ranks[target, "measured"].to_numpy()
                others = ranks.drop(columns=[(target, "measured")])
                shuffled = np.random.default_rng([seed, 31]).permuted(np.tile(damage, (PERMUTATIONS, 1)), axis=1)
                rho = damage @ others.to_numpy() / len(damage)
                by_chance = np.abs(shuffled @ others.to_numpy() / len(damage)) >= np.abs(rho) - 1e-12
                p = (1 + by_chance.sum(0)) / (1 + PERMUTATIONS)
                rows += [(sweep, blocks, target, *name, *one, len(damage))
                         for name, *one in zip(others, rho, p, holm(p), strict=True)]  # fmt: skip
    return pd.DataFrame(rows, columns=["sweep", "blocks", "target", "score", "reading", "rho", "p", "p_holm", "n"])


def _controls(table: pd.DataFrame, summary: pd.DataFrame, plans: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """Every way to give as many bits on average, against uniform bits."""
    heads, rise, groups = _by_text(table)
    uniform = int(np.flatnonzero(heads.kind == "uniform")[0])
    apart = rise - rise[:, [uniform]]
    found = summary[summary.sweep == lowering.CONTROL].rename(columns={"order": "method"}).reset_index(drop=True)
    found["difference"] = apart.mean(0)
    found = found.assign(**_between("difference_", cluster_means(apart, groups, draws=draws, seed=seed)))
    return found.merge(plans.drop_duplicates("method")[["method", "chosen", "on_search", "predicted"]], on="method")


def _prune(table: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    heads, rise, groups = _by_text(table)
    out, two = (rise[:, (heads.order == name).to_numpy()] for name in ("left out", "2 bits"))
    drawn = cluster_means(out - two, groups, draws=draws, seed=seed)
    return pd.DataFrame({"k": np.unique(heads.k), "left_out": out.mean(0), "two_bits": two.mean(0),
                         "difference": (out - two).mean(0), **_between("difference_", drawn)})  # fmt: skip
