"""Numbers about two-hop questions, on plain arrays and tables: which hops fail, and what a back-patch is worth.

No model, no torch. Axes: `example` counts the questions, `depth` the exits at which an answer was read, `cell` the pairs
(source_layer, target_layer) of a back-patch. `groups` names the bridge entity of each example: questions about one
bridge are not independent, so every interval, permutation and fold here takes whole groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, Shaped

from lab import require, statistics

CELLS = ("IK", "IG", "CM_strict", "RM_strict", "CM_loose", "RM_loose")  # of the taxonomy
PerExample = Shaped[np.ndarray, " example"]
_KEY = ["set", "position", "condition"]
_TIE = 1e-9  # sums of differences that are equal up to rounding are equal


# --- which hop fails -----------------------------------------------------------------------------------------------


def taxonomy(
    first_hop: PerExample,
    second_hop: PerExample,
    composition: PerExample,
    groups: PerExample,
    *,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Shares of questions by which parts are answered: the four cells of We-Math (arXiv 2407.01284), for two hops.

    IK: any hop wrong, composition wrong. IG: both hops right, composition wrong. CM_strict: all three right. RM_strict:
    any hop wrong, composition right. CM_loose: at least one hop right, composition right. RM_loose: both hops wrong,
    composition right. score = share of CM_strict + half the share of IG. RM_expected = p(composition) *
    (1 - p(first) * p(second)): the share of RM_strict if all three were independent (ours).

    Departures: the published code divides RM by CM + RM and the other cells by a fixed N of 525, and a row that it
    cannot match stays in N; here every share is over the examples given.

    Args:
        first_hop, second_hop, composition: bool [example], right or wrong; the second hop is asked with the right
            bridge entity.
        groups: [example], bridge entity.
        draws, seed, confidence: of one bootstrap over groups, shared by all rows.

    Returns:
        Index cell (`CELLS`, score, RM_expected, RM_minus_expected), columns n (examples in the cell; all examples for
        the last three), share, low, high.

    Raises:
        ValueError: not bool, shapes differ, a single group.

    It does not show why: RM_strict holds shortcuts, lucky guesses and hops that failed for their wording only.

    >>> right = np.array([True, True, False, False])
    >>> table = taxonomy(right, right, np.array([True, False, False, True]), np.arange(4), draws=50)
    >>> table["share"].to_dict()["score"], table["n"].to_dict()["RM_strict"]
    (0.375, 1)
    """
    parts = {"first_hop": first_hop, "second_hop": second_hop, "composition": composition}
    first, second, whole = (_booleans(values, name, 1) for name, values in parts.items())
    _same_length(len(first), second_hop=second, composition=whole, groups=groups)
    cells = [
        *(~(first & second) & ~whole, first & second & ~whole, first & second & whole, ~(first & second) & whole),
        *((first | second) & whole, ~first & ~second & whole),
    ]
    columns = np.stack([*cells, first, second, whole], axis=1).astype(float)

    def shares(means: np.ndarray) -> np.ndarray:
        """[..., column] in, [..., row] out."""
        p_first, p_second, p_whole = (means[..., place] for place in (-3, -2, -1))
        expected = p_whole * (1 - p_first * p_second)
        more = [means[..., 2] + means[..., 1] / 2, expected, means[..., 3] - expected]
        return np.concatenate([means[..., :6], np.stack(more, axis=-1)], axis=-1)

    table = _of_means(columns, groups, shares, draws, seed, confidence)
    table.insert(0, "n", [*(int(cell.sum()) for cell in cells), *[len(first)] * 3])
    table.columns = ["n", "share", "low", "high"]
    table.index = pd.Index([*CELLS, "score", "RM_expected", "RM_minus_expected"], name="cell")
    return table


def taxonomy_by_depth(
    first_hop: Shaped[np.ndarray, "example depth"],
    second_hop: Shaped[np.ndarray, "example depth"],
    composition: Shaped[np.ndarray, "example depth"],
    groups: PerExample,
    *,
    first_depth: int = 0,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """`taxonomy` at every depth at which the three answers were read; column 0 is depth `first_depth`.

    Returns:
        Columns depth, cell, n, share, low, high. All depths share the resampled groups; each interval holds by itself.

    A cell that shrinks with depth need not have moved to another one: only the shares of one depth add up.
    """
    parts = {"first_hop": first_hop, "second_hop": second_hop, "composition": composition}
    first, second, whole = (_booleans(values, name, 2) for name, values in parts.items())
    if not first.shape == second.shape == whole.shape:
        shapes = ", ".join(f"{name} {values.shape}" for name, values in parts.items())
        raise ValueError(f"shapes differ: {shapes}; pass the same examples and depths for all three")
    options: dict[str, Any] = {"draws": draws, "seed": seed, "confidence": confidence}
    tables = {
        first_depth + place: taxonomy(first[:, place], second[:, place], whole[:, place], groups, **options)
        for place in range(first.shape[1])
    }
    return pd.concat(tables, names=["depth"]).reset_index()


def inflation(table: pd.DataFrame) -> pd.DataFrame:
    """How many answers the published substring rule counts that stricter rules do not, by kind of prompt.

    Args:
        table: one generation a row; columns prompt (its kind: first_hop, second_hop, composition, ...) and published,
            word, leading (bool: does the generation hold the answer by each rule of `lab.back_patching.answers`).

    Returns:
        Index prompt (in order of appearance), columns n; published, word, leading (hits) and their *_share of n;
        not_word and not_leading (hits of the published rule that the other misses) and their *_share of the published
        hits (nan without any);
        only_word (whole words that the published rule misses: accents, apostrophes).

    Raises:
        ValueError: missing columns or prompts, not bool, a leading match that is no word match.

    Not every hit that it takes away was wrong: `leading` also misses a right answer after a longer introduction.
    """
    rules = ["published", "word", "leading"]
    _columns(table, ["prompt", *rules])
    if table["prompt"].isna().any():
        raise ValueError(f"{int(table['prompt'].isna().sum())} rows name no prompt: say which kind each one is")
    flags = pd.DataFrame({rule: _booleans(table[rule].to_numpy(), rule, 1) for rule in rules})
    if (flags["leading"] & ~flags["word"]).any():
        number = int((flags["leading"] & ~flags["word"]).sum())
        raise ValueError(
            f"{number} leading matches are no word matches: use the rules of lab.back_patching.answers for both columns"
        )
    flags["not_word"] = flags["published"] & ~flags["word"]
    flags["not_leading"] = flags["published"] & ~flags["leading"]
    flags["only_word"] = flags["word"] & ~flags["published"]
    grouped = flags.groupby(table["prompt"].to_numpy(), sort=False)
    counts = grouped.sum().astype(int)
    counts.insert(0, "n", grouped.size())
    for rule in rules:
        counts[f"{rule}_share"] = counts[rule] / counts["n"]
    for name in ("not_word", "not_leading"):
        counts[f"{name}_share"] = counts[name] / counts["published"]
    return counts.rename_axis("prompt")


# --- the oracle over all pairs, against its controls ---------------------------------------------------------------


def oracle_success(
    table: pd.DataFrame, *, draws: int = 1000, seed: int = 0, permutations: int = 10_000
) -> pd.DataFrame:
    """Share of questions that at least one patch answers, for the own state and for each control, paired by question.

    The published success of back-patching (arXiv 2406.12775) is an oracle over all pairs, so it grows with their
    number; a control with as many tries says how much of it is chance.

    Args:
        table: one row an (example, set, position, condition, draw), with columns group (bridge entity), tries, hits
            (whole numbers) and answer_share (float: how often the answer is the answer of a question). The condition
            "own" is the back-patch, all others are controls, each with one or several draws.

    Returns:
        One row a (set, position, condition): n (examples), n_groups; success (mean over examples of the share of
        draws with hits > 0), low, high (bootstrap over groups; nan for a single one); hit_share (mean of hits /
        tries). For conditions other than "own": difference = success of own - success of the condition on the same
        examples, diff_low, diff_high; p: two-sided, from a sign-flip permutation: in each of `permutations` draws
        every group keeps or flips the sign of the sum of its examples' differences, p = (1 + draws with a sum as
        large in size) / (1 + permutations); p_holm: Holm's correction over the conditions of this set and position.
        nan in the rows of "own", and everywhere if no "own" was measured there.

    Raises:
        ValueError: missing columns, no or doubled rows, hits outside 0..tries, an example with two groups or shares, a
            control whose examples are not those of "own".

    The check uses the right answer, so success is not accuracy. A difference does not show that the bridge entity is
    what the own state carries: other facts about the same question are in it as well.
    """
    return _oracle(_checked(table), draws, seed, permutations)


def by_answer_share(
    table: pd.DataFrame, cut: float | None = None, *, draws: int = 1000, seed: int = 0, permutations: int = 10_000
) -> pd.DataFrame:
    """`oracle_success` for questions with rare and with frequent answers: any disturbance can let a frequent one through.

    Args:
        table: as for `oracle_success`.
        cut: answers with at most this share are rare; None is the median over examples, or the next share below it where
            no answer is more frequent than the median.
        draws, seed, permutations: as for `oracle_success`.

    Returns:
        Its rows with two columns in front: answers ("rare" or "frequent") and cut. Holm's correction is within each.

    Raises:
        ValueError: as there; all answers on one side of the cut, as where all are equally frequent.
    """
    table = _checked(table)
    if cut is None:
        shares = table.drop_duplicates("example")["answer_share"]
        cut = float(min(shares.median(), shares[shares < shares.max()].max()))  # nan where all are equal
    rare = table["answer_share"] <= cut
    if rare.all() or not rare.any():
        low, high = table["answer_share"].min(), table["answer_share"].max()
        raise ValueError(f"cut={cut:g} leaves one side empty: answer_share runs from {low:g} to {high:g}; pass another")
    parts = []
    for name, part in (("rare", table[rare]), ("frequent", table[~rare])):
        part = _oracle(part, draws, seed, permutations)
        part.insert(0, "answers", name)
        part.insert(1, "cut", cut)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    key = ["example", *_KEY, "draw"]
    columns = [*key, "group", "tries", "hits", "answer_share"]
    _columns(table, columns)
    if table.empty or table[columns].isna().any(axis=None):
        missing = int(table[columns].isna().sum().sum())
        raise ValueError(f"table has {len(table)} rows, {missing} values are missing: pass measured rows only")
    if table.duplicated(key).any():
        first = table.loc[table.duplicated(key), key].iloc[0].to_dict()
        raise ValueError(f"{int(table.duplicated(key).sum())} doubled rows, the first is {first}: number the draws")
    bad = (table["tries"] < 1) | (table["hits"] < 0) | (table["hits"] > table["tries"])
    if bad.any():
        raise ValueError(f"{int(bad.sum())} rows do not have 0 <= hits <= tries with at least one try")
    for column in ("group", "answer_share"):
        several = table.groupby("example")[column].nunique() > 1
        if several.any():
            raise ValueError(f"example {several.idxmax()} has more than one {column}: it belongs to the question")
    return table


def _oracle(table: pd.DataFrame, draws: int, seed: int, permutations: int) -> pd.DataFrame:
    seed, permutations = require.seed(seed), require.whole("permutations", permutations, 1)
    single = table.assign(success=table["hits"] > 0, share=table["hits"] / table["tries"])
    means = single.groupby([*_KEY, "example", "group"], sort=True)[["success", "share"]].mean().reset_index("group")
    rows: list[dict[str, Any]] = []
    for (kind, position), part in means.groupby(["set", "position"], sort=False):
        by_condition = {str(name): one.droplevel(_KEY) for name, one in part.groupby("condition")}
        own = by_condition.pop("own", None)
        block = [] if own is None else [{"condition": "own", **_success(own, draws, seed)}]
        block += [{"condition": name, **_success(one, draws, seed)} for name, one in by_condition.items()]
        if own is not None:
            tests = [_against_own(name, one, own, draws, seed, permutations) for name, one in by_condition.items()]
            corrected = statistics.holm(np.array([test["p"] for test in tests]))
            for row, test, p in zip(block[1:], tests, corrected, strict=True):
                row.update(test, p_holm=float(p))
        rows += [{"set": kind, "position": position, **row} for row in block]
    names = [*_KEY, "n", "n_groups", "success", "low", "high", "hit_share"]
    names += ["difference", "diff_low", "diff_high", "p", "p_holm"]
    return pd.DataFrame(rows).reindex(columns=names)


def _success(one: pd.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    success, low, high = _mean(one["success"], one["group"], draws, seed)
    counts = {"n": len(one), "n_groups": one["group"].nunique()}
    return {**counts, "success": success, "low": low, "high": high, "hit_share": float(one["share"].mean())}


def _against_own(
    name: str, one: pd.DataFrame, own: pd.DataFrame, draws: int, seed: int, permutations: int
) -> dict[str, Any]:
    unpaired = len(one.index.symmetric_difference(own.index))
    if unpaired:
        raise ValueError(f"{unpaired} examples are not in both 'own' and {name!r}: measure both conditions on the same")
    difference = own["success"] - one["success"]  # both sorted by example
    estimate, low, high = _mean(difference, own["group"], draws, seed)
    p = _sign_flip(difference.to_numpy(float), own["group"].to_numpy(), permutations, seed)
    return {"difference": estimate, "diff_low": low, "diff_high": high, "p": p}


def _sign_flip(difference: np.ndarray, groups: np.ndarray, permutations: int, seed: int) -> float:
    sums = pd.Series(difference).groupby(groups).sum().to_numpy()
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(permutations, len(sums)))
    as_large = np.abs(signs @ sums) >= abs(sums.sum()) - _TIE
    return float((1 + as_large.sum()) / (1 + permutations))


# --- one pair for all questions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedPair:
    """One back-patch, chosen on other bridge entities.

    Attributes:
        summary: index plain, fixed, gain, naive_gain, selection_bias (= naive_gain - gain), columns estimate, low,
            high.
        examples: one row an example: fold, cell, source_layer, target_layer, plain, fixed (bool).
        folds: one row a fold: n (held out), cell, source_layer, target_layer, train_share, test_share.
        naive_cell: (source_layer, target_layer) of the best cell on all examples.
        right_to_wrong, wrong_to_right: examples that the fixed pair breaks and repairs.
    """

    summary: pd.DataFrame
    examples: pd.DataFrame
    folds: pd.DataFrame
    naive_cell: tuple[int, int]
    right_to_wrong: int
    wrong_to_right: int


def fixed_pair(
    hits: Shaped[np.ndarray, "example cell"],
    plain: PerExample,
    groups: PerExample,
    cells: Sequence[tuple[int, int]],
    *,
    folds: int = 5,
    seed: int = 0,
    draws: int = 1000,
) -> FixedPair:
    """Accuracy with ONE pair of layers for all questions, chosen on the questions of other bridge entities.

    Groups are dealt into folds at random. On the other folds the cell with most right answers is chosen (ties: the
    first), on the held-out fold it is applied. Unlike the oracle it needs no right answer at test time, so it may be
    compared with asking plainly. The naive gain is that of the best cell chosen and read on the same examples.

    Args:
        hits: bool [example cell], right after the patch of this cell.
        plain: bool [example], right without a patch.
        groups: [example], bridge entity; at least `folds` different ones.
        cells: (source_layer, target_layer) of each column.
        folds: at least 2.
        seed: of the folds and the bootstrap.
        draws: of the bootstrap over groups. It does not choose anew in each draw: the intervals hold for
            the cells chosen here, and that of naive_gain ignores the choice altogether.

    Raises:
        ValueError: not bool, shapes differ, fewer groups than folds.
    """
    hits, plain = _grid(hits, groups, cells), _booleans(plain, "plain", 1)
    _same_length(len(hits), plain=plain)
    seed, folds = require.seed(seed), require.whole("folds", folds, 2)
    fold = _group_folds(groups, folds, seed)
    chosen = np.array([hits[fold != number].mean(0).argmax() for number in range(folds)])  # [fold]
    fixed = hits[np.arange(len(hits)), chosen[fold]]
    naive = int(hits.mean(0).argmax())
    columns = np.stack([plain, fixed, hits[:, naive]], axis=1).astype(float)

    def gains(means: np.ndarray) -> np.ndarray:
        without, with_one, best = (means[..., place] for place in range(3))
        return np.stack([without, with_one, with_one - without, best - without, best - with_one], axis=-1)

    summary = _of_means(columns, groups, gains, draws, seed)
    summary.index = pd.Index(["plain", "fixed", "gain", "naive_gain", "selection_bias"], name="measure")
    layers = np.asarray(cells)[chosen]  # [fold layer]
    by_fold = pd.DataFrame(
        {"fold": range(folds), "n": np.bincount(fold, minlength=folds), "cell": chosen}
        | {"source_layer": layers[:, 0], "target_layer": layers[:, 1]}
    )
    per_example = by_fold.drop(columns="n").iloc[fold].reset_index(drop=True).assign(plain=plain, fixed=fixed)
    by_fold["train_share"] = [hits[fold != number, cell].mean() for number, cell in enumerate(chosen)]
    by_fold["test_share"] = [hits[fold == number, cell].mean() for number, cell in enumerate(chosen)]
    flips = int((plain & ~fixed).sum()), int((~plain & fixed).sum())
    return FixedPair(summary, per_example, by_fold, cells[naive], *flips)


# --- in which order to try the pairs -------------------------------------------------------------------------------


def greedy_order(hits: Shaped[np.ndarray, "example cell"]) -> Int[np.ndarray, " cell"]:
    """All cells, by greedy set cover: next is the cell that answers most of the questions not yet answered.

    Ties go to the cell with more hits in all, then to the first; where nothing new is covered, that order remains.

    >>> greedy_order(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], bool)).tolist()
    [0, 3, 1, 2]
    """
    hits = _booleans(hits, "hits", 2)
    total = hits.sum(0)
    left, order = hits.copy(), []
    while left.any():
        new = left.sum(0)
        order.append(int(np.lexsort((-total, -new))[0]))
        left[hits[:, order[-1]]] = False
    return np.array([*order, *(cell for cell in np.argsort(-total, kind="stable") if cell not in order)], int)


def search_cost(
    hits: Shaped[np.ndarray, "example cell"],
    groups: PerExample,
    cells: Sequence[tuple[int, int]],
    *,
    first: Sequence[int] = (1, 3, 10),
    folds: int = 5,
    seed: int = 0,
    shuffles: int = 20,
    draws: int = 1000,
) -> pd.DataFrame:
    """Tries until the first right answer, for several orders of the pairs: fast-slow search with a mined beginning.

    The idea of trying a mined routine first is FaSTA*'s (arXiv 2506.20911); there is no admissible heuristic here, and
    unlike there a failed fast try is counted. On the groups of the training folds `greedy_order` mines an order; the
    questions of the held-out fold pay for it. The check uses the right answer: this saves search, it does not answer.

    Args:
        hits: bool [example cell], right after the patch of this cell.
        groups: [example], bridge entity; at least `folds` different ones.
        cells: (source_layer, target_layer) of each column, in the given order.
        first: how many cells of the mined order are tried before the rest in the given order.
        folds, seed: of the split by groups.
        shuffles: draws of the null order.
        draws: of the bootstrap over groups.

    Returns:
        One row an order: "random" (exact expectation (C + 1) / (h + 1) for h hits among C cells), "given", "nearest"
        (smallest distance of source and target first), "shuffled" (mined after permuting the cells within each
        training question: as many hits, but nowhere in common; mean over `shuffles`), "first_m", "mined" (the whole
        mined order). Columns order; n, tries, low, high: questions with at least one hit; difference = tries - random
        on the same questions (negative: saved), diff_low, diff_high; n_without (questions without a hit, which cost
        all C tries in any order) and all_tries (mean over all questions).

    Raises:
        ValueError: not bool, shapes differ, fewer groups than folds, no hit at all, `first` outside 1..C.
    """
    hits = _grid(hits, groups, cells)
    number = len(cells)
    if not hits.any():
        raise ValueError(f"no hit among {hits.shape[0]} questions and {number} cells: there is nothing to find")
    for length in first:
        if not 1 <= length <= number:
            raise ValueError(f"first has {length}: pass numbers from 1 to {number}, the number of cells")
    seed, folds, shuffles = require.seed(seed), require.whole("folds", folds, 2), require.whole("shuffles", shuffles, 1)
    fold = _group_folds(groups, folds, seed)
    distance = np.abs(np.subtract(*np.asarray(cells).T))
    given = np.arange(number)
    cost = {
        "random": np.where(hits.any(1), (number + 1) / (hits.sum(1) + 1), number),
        "given": _tries(hits, given),
        "nearest": _tries(hits, np.argsort(distance, kind="stable")),
        **{name: np.zeros(len(hits)) for name in ("shuffled", *(f"first_{m}" for m in first), "mined")},
    }
    rng = np.random.default_rng(seed)
    for train, test in ((fold != place, fold == place) for place in range(folds)):
        order = greedy_order(hits[train])
        cost["mined"][test] = _tries(hits[test], order)
        for m in first:
            cost[f"first_{m}"][test] = _tries(hits[test], np.concatenate([order[:m], np.setdiff1d(given, order[:m])]))
        nulls = (greedy_order(rng.permuted(hits[train], axis=1)) for _ in range(shuffles))
        cost["shuffled"][test] = np.mean([_tries(hits[test], null) for null in nulls], axis=0)
    found = hits.any(1)
    some = np.asarray(groups)[found]
    rows = []
    for name, tries in cost.items():
        interval = _mean(tries[found], some, draws, seed)
        difference = _mean((tries - cost["random"])[found], some, draws, seed)
        rows.append((name, int(found.sum()), *interval, *difference, int((~found).sum()), float(tries.mean())))
    names = ["order", "n", "tries", "low", "high", "difference", "diff_low", "diff_high", "n_without", "all_tries"]
    return pd.DataFrame(rows, columns=names)


def _tries(hits: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Tries up to and with the first hit, all of them where there is none: [example]."""
    ordered = hits[:, order]
    return np.where(ordered.any(1), ordered.argmax(1) + 1, len(order)).astype(float)


# --- shared --------------------------------------------------------------------------------------------------------


def _mean(values: Any, groups: Any, draws: int, seed: int) -> tuple[float, float, float]:
    """Mean with its interval over groups; nan where there is one group: a small set must not stop a long table."""
    if pd.Series(groups).nunique() < 2:
        return float(np.mean(values)), np.nan, np.nan
    interval = statistics.cluster_bootstrap(np.asarray(values, float), np.asarray(groups), draws=draws, seed=seed)
    return float(interval.estimate), float(interval.low), float(interval.high)


def _of_means(
    columns: np.ndarray,
    groups: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
    draws: int,
    seed: int,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """A function of the columns' means [..., column] -> [..., row], with intervals from one bootstrap over groups."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: pass a fraction between 0 and 1, ends excluded")
    drawn = function(statistics.cluster_means(columns, groups, draws=draws, seed=seed))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return pd.DataFrame({"estimate": function(columns.mean(0)), "low": low, "high": high})


def _group_folds(groups: np.ndarray, folds: int, seed: int) -> Int[np.ndarray, " example"]:
    """Fold of each example; whole groups, dealt at random, so that folds differ by one group at most."""
    codes, names = pd.factorize(np.asarray(groups))
    if len(names) < folds:
        raise ValueError(f"{len(names)} groups for {folds} folds: pass at most {len(names)} folds")
    return np.random.default_rng(seed).permutation(np.arange(len(names)) % folds)[codes]


def _grid(hits: np.ndarray, groups: np.ndarray, cells: Sequence[tuple[int, int]]) -> Bool[np.ndarray, "example cell"]:
    hits = _booleans(hits, "hits", 2)
    _same_length(len(hits), groups=groups)
    if len(cells) != hits.shape[1] or len(set(cells)) != len(cells):
        raise ValueError(
            f"hits has {hits.shape[1]} cells, cells has {len(cells)} ({len(set(cells))} different): "
            "pass one (source_layer, target_layer) for each column"
        )
    return hits


def _booleans(values: np.ndarray, name: str, axes: int) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype != bool or values.ndim != axes or not values.size:
        wanted = "[example]" if axes == 1 else "[example, column]"
        raise ValueError(f"{name} has dtype {values.dtype} and shape {values.shape}: pass bool {wanted}, not empty")
    return values


def _same_length(length: int, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if len(array) != length:
            raise ValueError(f"{name} has {len(array)} examples instead of {length}: pass the same ones everywhere")


def _columns(table: pd.DataFrame, wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        raise ValueError(f"table has no column {', '.join(missing)}: it needs {', '.join(wanted)}")
