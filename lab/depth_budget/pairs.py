"""The price of leaving out every block and every pair of blocks, and what pairs cost beyond their blocks.

h(R) is the loss without the blocks R minus that of the intact model. The second difference h(ij) - h(i) - h(j) is positive
where two blocks back each other up (the value of kept blocks is submodular on that pair) and negative where neither helps
much without the other. `search` and `submodularity` read the same table, so that no pair is measured twice.

Communities: is the matrix of |second differences| made of groups of blocks that interact within the group? Newman's
modularity of the partition that Louvain's method finds, against matrices whose entries are permuted within each distance
|i - j|: near blocks interact anyway, and would look like communities. The null does not keep that one block interacts with all
others, which makes a matrix less modular than its null (p near 1); so the test is repeated without the strongest blocks.
(Dividing such strengths out of both was tried, too: on matrices without communities it gave p <= 0.1 half of the time.)
"""

import time
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.metrics import adjusted_rand_score
from transformer_lens.model_bridge import TransformerBridge

from lab import models, require, results, statistics
from lab.depth_budget.changes import SKIP, Skip
from lab.depth_budget.evaluation import Evaluator, Texts, texts_of
from lab.identity import identity
from lab.results import Result, versions

Removed = tuple[int, ...]  # blocks that are left out, in their order
SETS = ("search", "report")
COLUMNS = {
    "text_set": "search: texts that choose; report: others, that tell what the choice costs",
    "removed": "blocks that are left out, with blanks between; empty: none", "n_removed": "how many",
    "example": "the text", "group": "texts that share a source", "genre": "of the text",
    "nll": "loss, nats per token", "rise": "loss minus the intact model's on the same text, nats per token",
    "summary.nll": "mean over texts", "summary.rise": "mean over texts",
    "n": "texts", "low": "lower end of the 95 % interval, bootstrap over groups of texts", "high": "upper end",
    "i": "the earlier block", "j": "the later one", "distance": "j - i",
    "second_difference": "h(ij) - h(i) - h(j), nats per token, mean over texts",
    "sign": "1 or -1 where the interval is on one side of 0, else 0",
    "by": "which pairs go together: all, of one distance, of one third of the depth", "part": "which of them",
    "n_pairs": "pairs", "mean": "mean second difference, nats per token", "mean_low": "lower end", "mean_high": "upper end",
    "positive": "share of the pairs with a positive second difference",
    "positive_low": "lower end; the draws add noise, so both ends lean to one half", "positive_high": "upper end",
    "clear_positive": "share whose interval lies above 0 (2.5 % by chance)",
    "clear_negative": "share whose interval lies below 0 (2.5 % by chance)",
    "block": "a block", "community": "number of its community", "strength": "sum of its |second differences|, nats",
    "blocks": "all, or all but the tenth with the largest strengths",
    "modularity": "Newman's, of the partition found", "n_communities": "how many it has",
    "null_mean": "modularity of permuted matrices, mean", "null_95": "their 95th percentile",
    "p": "share of permuted matrices with as high a modularity, the real one among them", "permutations": "how many",
    "agreement": "adjusted Rand index between the partitions of the two text sets (0: chance, 1: the same)",
}  # fmt: skip


def pair_table(
    model: TransformerBridge, data: str | pd.DataFrame = "prose", *, sizes: Sequence[int] = (12, 24), n_tokens: int = 32,
    first: int = 8, blocks: Sequence[int] | None = None, largest: int = 2, permutations: int = 500, seed: int = 0,
    resume: bool = True, progress: bool = True,
) -> Result:  # fmt: skip
    """Loss without every block, every pair, perhaps every triple, on two disjoint sets of texts; second differences.

    Args:
        sizes: texts that choose, texts that report. first: first scored position of each text.
        blocks: the blocks that are left out; None: all. largest: 3 also measures triples (seven times as many block runs).
        permutations: of the null for communities.

    Not shown: what a model would lose that was trained, or trained on, without these blocks.
    """
    n_layers = model.cfg.n_layers
    blocks = sorted(require.wholes("blocks", range(n_layers) if blocks is None else blocks, 0, n_layers - 1, least=3))
    largest, permutations = require.whole("largest", largest, 2, 3), require.whole("permutations", permutations, 1)
    sizes = require.wholes("sizes", sizes, 2, None, least=2, twice=True)
    sets = dict(zip(SETS, texts_of(model, data, sizes=sizes, n_tokens=n_tokens, seed=seed), strict=True))
    own = identity(model)
    parameters = {**models.facts(model), "identity": str(own), "dataset": data if isinstance(data, str) else "own",
                  "sizes": sizes, "n_tokens": n_tokens, "first": first, "blocks": blocks, "largest": largest,
                  "permutations": permutations, "seed": seed, "versions": versions()}  # fmt: skip
    shared = {"sets": sets, "blocks": blocks, "largest": largest, "first": first, "progress": progress}
    known = {**parameters, "ids": [one.ids.tolist() for one in sets.values()]}
    kept = results.keep(work, {"model": own}, resume=resume)
    (done,) = results.study(work, [{}], kept=kept, known=known, shared=shared, models={"model": model},
                            describe="pair tables", progress=progress)  # fmt: skip
    found = {name: interactions(done.table[done.table.text_set == name], blocks, seed=seed) for name in SETS}
    tables = {"texts": pd.concat([one.table.assign(text_set=name) for name, one in sets.items()], ignore_index=True)}
    for table in ("interactions", "signs"):
        tables[table] = pd.concat([one[table].assign(text_set=name) for name, one in found.items()], ignore_index=True)
    tables |= _communities({name: one["interactions"] for name, one in found.items()}, blocks, permutations, seed)
    return Result("pair_table", done.table, _summary(done.table, seed), parameters, tables).described(COLUMNS)


def work(
    model: TransformerBridge, *, sets: dict[str, Texts], blocks: Sequence[int], largest: int, first: int,
    progress: bool, scratch: Path | None,
) -> Result:  # fmt: skip
    """Losses of every text without each single block, each pair, and so on."""
    removed = [(), *(one for size in range(1, largest + 1) for one in combinations(blocks, size))]
    tables = []
    for name, texts in sets.items():
        evaluate = Evaluator(model, texts.ids, first=first, folder=scratch, progress=progress)
        if progress:
            announce(name, evaluate, removed)
        tables.append(_rows(texts, removed, evaluate([skipping(one) for one in removed]).nll).assign(text_set=name))
    return Result("pair_losses", pd.concat(tables, ignore_index=True), pd.DataFrame(), {})


# --- what search and submodularity need of it -----------------------------------------------------------------------


def skipping(removed: Iterable[int]) -> dict[int, Skip]:
    """The configuration that leaves these blocks out."""
    return dict.fromkeys(removed, SKIP)


def named(removed: Iterable[int]) -> str:
    """How a set of blocks stands in tables.

    >>> named((3, 7))
    '3 7'
    """
    return " ".join(map(str, removed))


def block_runs(removed: Sequence[Removed], n_layers: int) -> int:
    """Block runs that an `Evaluator` needs for these sets: each shared beginning once.

    >>> block_runs([(), (0,), (1,), (0, 1)], 2)
    6
    """
    keys = [tuple(layer in one for layer in range(n_layers)) for one in removed]
    return len({key[: depth + 1] for key in keys for depth in range(n_layers)})


def announce(what: str, evaluate: Evaluator, removed: Sequence[Removed]) -> None:
    """Prints how many block runs are ahead, and about how long they take, after trying one that is among them."""
    start, before = time.monotonic(), evaluate.passes
    evaluate([skipping(removed[1])])
    each = (time.monotonic() - start) / max(1, evaluate.passes - before)
    runs, full = block_runs(removed, evaluate.n), len(removed) * evaluate.n
    about = f", about {each * runs / 60:.1f} min" if evaluate.passes > before else ""
    print(f"{what}: {len(removed)} sets of blocks, {runs} block runs ({full} without shared beginnings){about}.")


def losses(table: pd.DataFrame) -> dict[Removed, Float[np.ndarray, " text"]]:
    """Loss of each text by the blocks that were left out; of one set of texts."""
    wide = table.pivot(index="removed", columns="example", values="nll")[table.example.unique()]
    return {tuple(map(int, name.split())): row for name, row in zip(wide.index, wide.to_numpy(float), strict=True)}


def texts_behind(model: TransformerBridge, pairs: Result, data: str | pd.DataFrame) -> dict[str, Texts]:
    """The texts of a pair table, drawn again.

    Raises:
        ValueError: a table of another kind, of another model, or of other texts.
    """
    if pairs.kind != "pair_table":
        raise ValueError(f"pairs is a result of kind {pairs.kind!r}: give what lab.depth_budget.pair_table returned")
    told = pairs.parameters
    if told["identity"] != str(identity(model)):
        raise ValueError(
            f"pairs was measured on {told['model']}, or on other weights of it: measure this model's pairs"
        )
    found = texts_of(model, data, sizes=told["sizes"], n_tokens=told["n_tokens"], seed=told["seed"])
    drawn = [list(one.table.example) for one in found]
    table = pairs.tables["texts"]
    if drawn != [list(table[table.text_set == name].example) for name in SETS]:
        raise ValueError("data does not give the texts of the pair table: pass the data that it was measured on")
    return dict(zip(SETS, found, strict=True))


def second_differences(
    table: pd.DataFrame, blocks: Sequence[int]
) -> tuple[list[tuple[int, int]], Float[np.ndarray, "text pair"]]:
    """Pairs, and h(ij) - h(i) - h(j) of each text; intact losses cancel but for one."""
    loss, pairs = losses(table), list(combinations(blocks, 2))
    values = [loss[pair] - loss[pair[:1]] - loss[pair[1:]] + loss[()] for pair in pairs]
    return pairs, np.stack(values, axis=1)


def interactions(table: pd.DataFrame, blocks: Sequence[int], *, seed: int) -> dict[str, pd.DataFrame]:
    """Second differences pair by pair, and how many are positive, for all, by distance and by third of the depth."""
    pairs, values = second_differences(table, blocks)
    groups = table.drop_duplicates("example").group.astype(str).to_numpy()
    mean, low, high = (np.asarray(one) for one in statistics.cluster_bootstrap(values, groups, seed=seed))
    i, j = np.array(pairs).T
    sign = np.where(low > 0, 1, np.where(high < 0, -1, 0))
    each = pd.DataFrame({"i": i, "j": j, "distance": j - i, "second_difference": mean, "low": low, "high": high,
                         "sign": sign})  # fmt: skip
    thirds = {block: name for name, part in zip(("first", "middle", "last"), np.array_split(np.array(blocks), 3), strict=True)
              for block in part}  # fmt: skip
    within = np.array([thirds[a] if thirds[a] == thirds[b] else "across" for a, b in pairs])
    parts = [("all", "all", np.ones(len(pairs), bool))]
    parts += [("distance", str(d), j - i == d) for d in np.unique(j - i)]
    parts += [("third", name, within == name) for name in ("first", "middle", "last", "across")]
    drawn, rows = statistics.cluster_means(values, groups, seed=seed), []
    for by, name, chosen in parts:
        if chosen.any():
            ends = [
                np.quantile(one, [0.025, 0.975]) for one in (drawn[:, chosen].mean(1), (drawn[:, chosen] > 0).mean(1))
            ]
            rows.append((by, name, int(chosen.sum()), mean[chosen].mean(), *ends[0], (mean[chosen] > 0).mean(), *ends[1],
                         (sign[chosen] == 1).mean(), (sign[chosen] == -1).mean()))  # fmt: skip
    columns = ["by", "part", "n_pairs", "mean", "mean_low", "mean_high", "positive", "positive_low", "positive_high",
               "clear_positive", "clear_negative"]  # fmt: skip
    return {"interactions": each, "signs": pd.DataFrame(rows, columns=columns)}


# --- communities ----------------------------------------------------------------------------------------------------


def partition(weights: Float[np.ndarray, "block block"]) -> tuple[Float[np.ndarray, " block"], float]:
    """Number of each block's community (Louvain), and Newman's modularity; all in one, and 0, where nothing interacts."""
    community = np.zeros(len(weights))
    if not weights.any():
        return community, 0.0
    graph = nx.from_numpy_array(weights)
    found = nx.community.louvain_communities(graph, seed=0)
    for number, members in enumerate(sorted(found, key=min)):
        community[list(members)] = number
    return community, float(nx.community.modularity(graph, found))


def permuted(weights: Float[np.ndarray, "block block"], rng: np.random.Generator) -> Float[np.ndarray, "block block"]:
    """The same matrix with its entries permuted within each distance from the diagonal."""
    found = np.zeros_like(weights)
    for distance in range(1, len(weights)):
        found += np.diag(rng.permutation(np.diag(weights, distance)), distance)
    return found + found.T


def community_test(
    weights: Float[np.ndarray, "block block"], *, permutations: int, seed: int
) -> tuple[Float[np.ndarray, " block"], dict[str, float]]:
    """Communities of a symmetric matrix without negative entries, and their modularity against permuted matrices."""
    community, modularity = partition(weights)
    rng = np.random.default_rng(require.seed(seed))
    null = np.array([partition(permuted(weights, rng))[1] for _ in range(permutations)])
    p = float((1 + (null >= modularity - 1e-12).sum()) / (1 + permutations))
    return community, {"modularity": modularity, "n_communities": int(community.max()) + 1, "null_mean": float(null.mean()),
                       "null_95": float(np.quantile(null, 0.95)), "p": p, "permutations": permutations}  # fmt: skip


def _communities(
    found: dict[str, pd.DataFrame], blocks: Sequence[int], permutations: int, seed: int
) -> dict[str, pd.DataFrame]:
    members, tests, at = [], [], {block: place for place, block in enumerate(blocks)}
    for name, rows in found.items():
        weights = np.zeros((len(blocks), len(blocks)))
        weights[rows.i.map(at), rows.j.map(at)] = rows.second_difference.abs()
        weights += weights.T
        community, test = community_test(weights, permutations=permutations, seed=seed)
        members.append(pd.DataFrame({"text_set": name, "block": blocks, "community": community.astype(int),
                                     "strength": weights.sum(1)}))  # fmt: skip
        weak = np.sort(np.argsort(weights.sum(1))[: -max(1, round(len(blocks) / 10))])
        fewer = community_test(weights[np.ix_(weak, weak)], permutations=permutations, seed=seed)[1]
        tests += [{"text_set": name, "blocks": "all", **test},
                  {"text_set": name, "blocks": "without the strongest", **fewer}]  # fmt: skip
    agreement = float(adjusted_rand_score(*(one.community for one in members)))
    return {"communities": pd.concat(members, ignore_index=True),
            "community_test": pd.DataFrame(tests).assign(agreement=agreement)}  # fmt: skip


# --- tables ---------------------------------------------------------------------------------------------------------


def _rows(texts: Texts, removed: Sequence[Removed], nll: Float[np.ndarray, "set text"]) -> pd.DataFrame:
    table = pd.concat([texts.table[["example", "group"]]] * len(removed), ignore_index=True)
    table.insert(0, "removed", np.repeat([named(one) for one in removed], len(texts.ids)))
    table.insert(1, "n_removed", np.repeat([len(one) for one in removed], len(texts.ids)))
    return table.assign(nll=nll.ravel(), rise=(nll - nll[0]).ravel())


def _summary(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    frames = []
    for name, part in table.groupby("text_set", sort=False):
        wide = part.pivot(index="example", columns="removed", values="rise")
        wide = wide.loc[part.example.unique(), part.removed.unique()]
        groups = part.drop_duplicates("example").group.astype(str).to_numpy()
        mean, low, high = statistics.cluster_bootstrap(wide.to_numpy(float), groups, seed=seed)
        nll = part.groupby("removed", sort=False).nll.mean().loc[wide.columns].to_numpy()
        frames.append(pd.DataFrame({"text_set": name, "removed": wide.columns, "n_removed": wide.columns.str.split().str.len(),
                                    "n": len(wide), "nll": nll, "rise": mean, "low": low, "high": high}))  # fmt: skip
    return pd.concat(frames, ignore_index=True)
