from collections.abc import Iterator

import jaxtyping
import numpy as np
import pandas as pd
import pytest

from lab import statistics
from lab.back_patching import statistics as hops

CELLS = [(source, target) for source in range(1, 6) for target in range(source)]  # 15 pairs
KEY = ["set", "position", "condition"]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Calls as a user makes them: the suite's own shape checks would speak before the messages under test."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def smollm() -> tuple[np.ndarray, ...]:
    """The counts measured on SmolLM2-135M over 400 cities: first hop 201, second 254, both 157, composition 20."""
    rows = [(1, 1, 0)] * 142 + [(1, 1, 1)] * 15 + [(1, 0, 1)] * 2 + [(0, 1, 1)] * 2 + [(0, 0, 1)]
    rows += [(1, 0, 0)] * 42 + [(0, 1, 0)] * 95 + [(0, 0, 0)] * 101
    first, second, whole = np.array(rows, bool).T
    return first, second, whole, np.arange(400) % 90


# --- taxonomy ---


def test_taxonomy_of_the_measured_counts(smollm: tuple[np.ndarray, ...]) -> None:
    first, second, whole, _ = smollm
    assert (first.sum(), second.sum(), (first & second).sum(), whole.sum()) == (201, 254, 157, 20)
    table = hops.taxonomy(*smollm)
    assert table["n"].to_dict() == {
        **{"IK": 238, "IG": 142, "CM_strict": 15, "RM_strict": 5, "CM_loose": 19, "RM_loose": 1},
        **{"score": 400, "RM_expected": 400, "RM_minus_expected": 400},
    }
    share = table["share"]
    assert share["score"] == pytest.approx(0.215)
    assert share[["IK", "IG", "CM_strict", "RM_strict"]].sum() == pytest.approx(1)
    expected = 20 / 400 * (1 - 201 / 400 * 254 / 400)
    assert share["RM_expected"] == pytest.approx(expected)
    assert share["RM_minus_expected"] == pytest.approx(5 / 400 - expected)
    assert table.loc["RM_minus_expected", "high"] < 0  # fewer shortcuts than by independence
    assert (table["low"] <= share).all() and (share <= table["high"]).all()
    pd.testing.assert_frame_equal(table, hops.taxonomy(*smollm))


def test_independent_answers_have_the_expected_shortcuts() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        first, second, whole = rng.random((3, 300)) < np.array([[0.6], [0.7], [0.4]])
        row = hops.taxonomy(first, second, whole, np.arange(300), draws=200, seed=trial).loc["RM_minus_expected"]
        covered += row["low"] <= 0 <= row["high"]
    assert 52 <= covered <= 60


def test_taxonomy_by_depth_is_taxonomy_at_each_depth(smollm: tuple[np.ndarray, ...]) -> None:
    first, second, whole, groups = smollm
    never = np.zeros_like(whole)
    table = hops.taxonomy_by_depth(
        *(np.stack([never, values], axis=1) for values in (first, second, whole)), groups, first_depth=3, draws=100
    )
    assert list(table.columns) == ["depth", "cell", "n", "share", "low", "high"]
    assert table["depth"].unique().tolist() == [3, 4]
    single = hops.taxonomy(*smollm, draws=100).reset_index()
    pd.testing.assert_frame_equal(table[table["depth"] == 4].drop(columns="depth").reset_index(drop=True), single)
    assert table.set_index(["depth", "cell"]).loc[(3, "IK"), "share"] == 1


def test_taxonomy_refuses(smollm: tuple[np.ndarray, ...], unchecked: None) -> None:
    first, second, whole, groups = smollm
    with pytest.raises(ValueError, match="first_hop has dtype int64 and shape \\(400,\\): pass bool \\[example\\]"):
        hops.taxonomy(first.astype(int), second, whole, groups)
    with pytest.raises(ValueError, match="composition has 399 examples instead of 400"):
        hops.taxonomy(first, second, whole[1:], groups)
    with pytest.raises(ValueError, match="one group"):
        hops.taxonomy(first, second, whole, np.zeros(400))
    with pytest.raises(ValueError, match="confidence=95"):
        hops.taxonomy(first, second, whole, groups, confidence=95)
    with pytest.raises(ValueError, match="shapes differ: first_hop \\(400, 1\\), second_hop \\(400, 2\\)"):
        hops.taxonomy_by_depth(first[:, None], np.stack([second, second], 1), whole[:, None], groups)


def test_inflation_counts_by_hand() -> None:
    rows = [("composition", 1, 1, 1), ("composition", 1, 0, 0), ("composition", 1, 1, 0), ("composition", 0, 1, 0)]
    table = pd.DataFrame([*rows, ("first_hop", 0, 0, 0)], columns=["prompt", "published", "word", "leading"])
    table = table.astype({"published": bool, "word": bool, "leading": bool})
    counts = hops.inflation(table)
    assert counts.index.tolist() == ["composition", "first_hop"]
    row = counts.loc["composition"]
    assert row[["n", "published", "word", "leading", "not_word", "not_leading", "only_word"]].tolist() == [
        4,
        3,
        3,
        1,
        1,
        2,
        1,
    ]
    assert row[["published_share", "leading_share"]].tolist() == [0.75, 0.25]
    assert row["not_word_share"] == pytest.approx(1 / 3) and row["not_leading_share"] == pytest.approx(2 / 3)
    assert np.isnan(counts.loc["first_hop", "not_word_share"])
    with pytest.raises(ValueError, match="1 rows name no prompt: say which kind"):
        hops.inflation(table.assign(prompt=["composition", None, "first_hop", "first_hop", "first_hop"]))
    with pytest.raises(ValueError, match="1 leading matches are no word matches"):
        hops.inflation(table.assign(leading=[True, True, False, False, False]))
    with pytest.raises(ValueError, match="no column word, leading"):
        hops.inflation(table[["prompt", "published"]])


# --- oracle ---


def oracle_table(own: float, other: float, *, examples: int = 120, draws: int = 3, seed: int = 0) -> pd.DataFrame:
    """Success rates of the own state (one draw) and of another's (several), in groups of three."""
    rng = np.random.default_rng(seed)
    rows = []
    for example in range(examples):
        for condition, rate, number in (("own", own, 1), ("other", other, draws), ("noise", 0.0, 1)):
            for draw in range(number):
                hits = int(rng.random() < rate) * int(rng.integers(1, 10))
                rows.append((example, example // 3, "incorrect", "t1", condition, draw, 15, hits, example / examples))
    return pd.DataFrame(rows, columns=["example", "group", *KEY, "draw", "tries", "hits", "answer_share"])


def test_oracle_by_hand() -> None:
    table = oracle_table(0.5, 0.5, examples=4).query("condition != 'noise'").copy()
    table["group"] = table["example"]
    table["hits"] = [15, 0, 3, 0, 0, 0, 0, 0, 5, 5, 5, 5, 0, 0, 0, 1]  # own and three draws of other, four times
    own, other = (row for _, row in hops.oracle_success(table, permutations=2000).iterrows())
    assert (own["condition"], own["n"], own["n_groups"], own["success"]) == ("own", 4, 4, 0.5)
    assert own["hit_share"] == pytest.approx((1 + 5 / 15) / 4) and np.isnan(own["p"])
    assert other["success"] == pytest.approx((1 / 3 + 0 + 1 + 1 / 3) / 4)
    assert other["hit_share"] == pytest.approx((3 / 15 + 5 / 15 * 3 + 1 / 15) / 3 / 4)
    assert other["difference"] == pytest.approx(0.5 - other["success"])
    # differences 2/3, 0, 0, -1/3: the sum 1/3 is reached in size by all sign patterns
    assert other["p"] == 1 and other["p_holm"] == 1


def test_oracle_finds_a_planted_difference_and_corrects_over_conditions() -> None:
    table = hops.oracle_success(oracle_table(0.7, 0.3), permutations=2000).set_index("condition")
    assert table.index.tolist() == ["own", "noise", "other"]
    assert table.loc["other", "diff_low"] > 0.15 and table.loc["other", "p"] == pytest.approx(1 / 2001)
    assert table.loc["noise", "p_holm"] == pytest.approx(2 / 2001)
    assert table.loc["noise", ["success", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc["own", ["difference", "p", "p_holm"]].isna().all()
    single = hops.oracle_success(oracle_table(0.7, 0.3).query("condition == 'noise'"))
    assert single["success"].tolist() == [0] and single["difference"].isna().all()  # nothing to compare with


def test_oracle_of_equal_rates_covers_zero() -> None:
    covered = small = 0
    for trial in range(60):
        table = oracle_table(0.4, 0.4, draws=2, seed=trial)
        row = hops.oracle_success(table, draws=200, permutations=500).set_index("condition").loc["other"]
        covered, small = covered + (row["diff_low"] <= 0 <= row["diff_high"]), small + (row["p"] < 0.05)
    assert 51 <= covered <= 60 and small <= 9


def test_sign_flips_take_whole_groups() -> None:
    """Copies of one example are no evidence: with three groups no p below 1/4 is possible."""
    p = hops._sign_flip(np.ones(300), np.repeat(np.arange(3), 100), 4000, seed=0)
    assert p == pytest.approx(0.25, abs=0.03)
    assert hops._sign_flip(np.ones(300), np.arange(300), 4000, seed=0) == pytest.approx(1 / 4001)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(statistics.holm(np.array([0.01, 0.04, 0.03, 0.5])), [0.04, 0.09, 0.09, 0.5])
    np.testing.assert_allclose(statistics.holm(np.array([0.6, 0.7])), [1, 1])


def test_oracle_does_not_depend_on_the_order_of_rows() -> None:
    table = oracle_table(0.6, 0.4)
    shuffled = table.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(hops.oracle_success(table), hops.oracle_success(shuffled))


def test_a_set_of_one_group_has_no_interval_but_stays_in_the_table() -> None:
    table = pd.concat([oracle_table(0.5, 0.5), oracle_table(1.0, 0.0, examples=3).assign(set="correct")])
    table["answer_share"] = 0.1
    success = hops.oracle_success(table).set_index(["set", "condition"])
    row = success.loc[("correct", "other")]
    assert row["success"] == 0 and row["difference"] == 1 and row["p"] == 1  # one group's sign: no evidence
    assert row[["low", "high", "diff_low", "diff_high"]].isna().all()
    assert success.loc[("incorrect", "other"), ["low", "high", "diff_low"]].notna().all()


def test_frequent_answers_are_told_apart() -> None:
    """Own and other succeed on frequent answers, only own on rare ones."""
    rare, frequent = oracle_table(0.8, 0.1, seed=1), oracle_table(0.8, 0.8, seed=2)
    frequent["example"] += 1000
    frequent["group"] += 1000
    table = pd.concat([rare.assign(answer_share=0.01), frequent.assign(answer_share=0.2)])
    split = hops.by_answer_share(table, 0.05, permutations=1000).set_index(["answers", "condition"])
    assert split.loc[("rare", "other"), "diff_low"] > 0.5
    assert split.loc[("rare", "other"), "p_holm"] < 0.01 < split.loc[("frequent", "other"), "p_holm"]
    assert abs(split.loc[("frequent", "other"), "difference"]) < 0.2  # equal rates, 120 examples
    median = hops.by_answer_share(oracle_table(0.5, 0.5))
    assert median["n"].tolist() == [60] * 6 and median["cut"].unique().tolist() == [pytest.approx(59.5 / 120)]
    mostly = rare.assign(answer_share=np.where(rare.example.isin([0, 3]), 0.01, 0.2))
    assert mostly.answer_share.median() == mostly.answer_share.max()  # nothing above the median: the cut is below it
    split = hops.by_answer_share(mostly)
    assert split["cut"].unique().tolist() == [0.01] and sorted(split["n"].unique()) == [2, 118]
    with pytest.raises(ValueError, match="leaves one side empty: answer_share runs from 0.2 to 0.2"):
        hops.by_answer_share(rare.assign(answer_share=0.2))
    with pytest.raises(ValueError, match="cut=0.5 leaves one side empty: answer_share runs from 0.01 to 0.2"):
        hops.by_answer_share(table, 0.5)


def test_oracle_refuses() -> None:
    table = oracle_table(0.5, 0.5)
    with pytest.raises(ValueError, match="no column hits: it needs example, set"):
        hops.oracle_success(table.drop(columns="hits"))
    with pytest.raises(ValueError, match="1 doubled rows, the first is .*number the draws"):
        hops.oracle_success(pd.concat([table, table.iloc[:1]]))
    with pytest.raises(ValueError, match="600 rows do not have 0 <= hits <= tries"):
        hops.oracle_success(table.assign(tries=0))
    with pytest.raises(ValueError, match="example 0 has more than one group"):
        hops.oracle_success(table.assign(group=np.arange(len(table))))
    with pytest.raises(ValueError, match="600 values are missing"):
        hops.oracle_success(table.assign(answer_share=np.nan))
    with pytest.raises(ValueError, match="1 examples are not in both 'own' and 'other': measure both"):
        hops.oracle_success(table.query("example != 5 or condition != 'other'"))
    with pytest.raises(ValueError, match="permutations=0: give a whole number, at least 1"):
        hops.oracle_success(table, permutations=0)


# --- one pair for all ---


def test_fixed_pair_finds_the_planted_cell() -> None:
    rng = np.random.default_rng(0)
    hits = rng.random((150, 15)) < 0.1
    hits[:, 7] |= rng.random(150) < 0.6
    plain = rng.random(150) < 0.2
    groups = np.arange(150) // 3
    pair = hops.fixed_pair(hits, plain, groups, CELLS)
    assert pair.naive_cell == CELLS[7] and (pair.folds["cell"] == 7).all() and (pair.examples["cell"] == 7).all()
    assert pair.summary.loc["selection_bias", ["estimate", "low", "high"]].tolist() == [0, 0, 0]
    assert pair.summary.loc["gain", "low"] > 0.2
    gain = pair.summary.loc["gain", "estimate"]
    assert gain == pytest.approx((pair.wrong_to_right - pair.right_to_wrong) / 150)
    assert gain == pytest.approx(hits[:, 7].mean() - plain.mean())
    assert pair.examples.groupby("fold").size().tolist() == pair.folds["n"].tolist()
    assert (pair.examples[["source_layer", "target_layer"]].to_numpy() == CELLS[7]).all()
    assert pair.examples["fold"].groupby(groups).nunique().max() == 1  # a bridge entity is in one fold


def test_fixed_pair_removes_the_gain_from_choosing() -> None:
    rng = np.random.default_rng(1)
    naive, honest = [], []
    for trial in range(40):
        hits, plain = rng.random((60, 400)) < 0.3, rng.random(60) < 0.3
        cells = [(source, target) for source in range(20) for target in range(20)]
        summary = hops.fixed_pair(hits, plain, np.arange(60), cells, seed=trial, draws=50).summary["estimate"]
        naive, honest = [*naive, summary["naive_gain"]], [*honest, summary["gain"]]
        assert summary["selection_bias"] == pytest.approx(summary["naive_gain"] - summary["gain"])
    assert np.mean(naive) > 0.12 and abs(np.mean(honest)) < 0.04


def test_fixed_pair_takes_the_first_of_equal_cells_and_refuses(unchecked: None) -> None:
    hits = np.ones((20, 3), bool)
    pair = hops.fixed_pair(hits, ~hits[:, 0], np.arange(20), CELLS[:3], folds=4)
    assert pair.naive_cell == CELLS[0] and pair.wrong_to_right == 20 and (pair.folds["cell"] == 0).all()
    with pytest.raises(ValueError, match="3 groups for 5 folds: pass at most 3 folds"):
        hops.fixed_pair(hits, hits[:, 0], np.arange(20) % 3, CELLS[:3])
    with pytest.raises(ValueError, match="folds=1: give a whole number, at least 2"):
        hops.fixed_pair(hits, hits[:, 0], np.arange(20), CELLS[:3], folds=1)
    with pytest.raises(ValueError, match="hits has 3 cells, cells has 2"):
        hops.fixed_pair(hits, hits[:, 0], np.arange(20), CELLS[:2])
    with pytest.raises(ValueError, match="plain has 19 examples instead of 20"):
        hops.fixed_pair(hits, hits[1:, 0], np.arange(20), CELLS[:3])


# --- search ---


def test_greedy_order_covers_queries_not_hits() -> None:
    hits = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], bool)
    assert hops.greedy_order(hits).tolist() == [0, 3, 1, 2]  # the second cell has more hits, but nothing new
    assert hops.greedy_order(np.zeros((2, 3), bool)).tolist() == [0, 1, 2]


def test_tries_and_random_expectation_by_hand() -> None:
    hits = np.array([[0, 0, 1], [1, 0, 1], [0, 0, 0], [0, 0, 1]], bool)
    assert hops._tries(hits, np.array([0, 1, 2])).tolist() == [3, 1, 3, 3]
    cells = [(5, 0), (4, 1), (2, 1)]
    table = hops.search_cost(hits, np.arange(4), cells, first=[1], folds=2, draws=50).set_index("order")
    assert table["n"].unique().tolist() == [3] and table["n_without"].unique().tolist() == [1]
    assert table.loc["random", ["tries", "all_tries"]].tolist() == pytest.approx([16 / 9, (16 / 3 + 3) / 4])
    assert table.loc["given", "tries"] == pytest.approx(7 / 3)
    assert table.loc["nearest", ["tries", "all_tries"]].tolist() == pytest.approx([1, 6 / 4])
    assert table.loc["nearest", "difference"] == pytest.approx(1 - 16 / 9)


def test_random_expectation_is_that_of_random_orders() -> None:
    rng = np.random.default_rng(0)
    hits = np.zeros((1, 20), bool)
    hits[0, [3, 4, 11]] = True
    tries = [hops._tries(hits, rng.permutation(20))[0] for _ in range(4000)]
    assert np.mean(tries) == pytest.approx(21 / 4, abs=0.2)


def test_mined_orders_save_where_hits_are_shared_and_only_there() -> None:
    rng = np.random.default_rng(2)
    groups = np.arange(120) // 2
    shared = rng.random((120, 15)) < 0.03
    shared[np.arange(120), np.where(rng.random(120) < 0.8, 12, 5)] = True
    table = hops.search_cost(shared, groups, CELLS, draws=200).set_index("order")
    assert table.index.tolist() == ["random", "given", "nearest", "shuffled", "first_1", "first_3", "first_10", "mined"]
    assert table.loc["mined", "tries"] < 1.6 and table.loc["first_1", "diff_high"] < -3
    assert table.loc["shuffled", "diff_low"] > table.loc["mined", "diff_high"] + 3
    assert table.loc["random", ["difference", "diff_low", "diff_high"]].tolist() == [0, 0, 0]
    assert (table["n"] == 120).all() and np.allclose(table["all_tries"], table["tries"])
    scattered = rng.permuted(shared, axis=1)  # each question keeps its number of hits, at cells of its own
    null = hops.search_cost(scattered, groups, CELLS, draws=200).set_index("order")
    assert (null["diff_low"] <= 0).all() and (null["diff_high"] >= 0).all()
    assert abs(null.loc["shuffled", "difference"]) < 0.5


def test_a_failed_fast_try_is_paid_for() -> None:
    """The mined cell never works for the last groups: they pay one try more than in the given order."""
    hits = np.zeros((40, 15), bool)
    hits[:, 14] = True
    hits[::4] = False
    hits[::4, 0] = True
    table = hops.search_cost(hits, np.arange(40), CELLS, first=[1, 15], draws=50).set_index("order")
    assert table.loc["first_1", "tries"] == pytest.approx(0.75 * 1 + 0.25 * 2)
    assert table.loc["given", "tries"] == pytest.approx(0.75 * 15 + 0.25 * 1)
    assert table.loc["first_15", "tries"] == table.loc["mined", "tries"]


def test_search_cost_refuses() -> None:
    hits = np.ones((20, 3), bool)
    with pytest.raises(ValueError, match="no hit among 20 questions and 3 cells"):
        hops.search_cost(~hits, np.arange(20), CELLS[:3], first=[1])
    with pytest.raises(ValueError, match="first has 10: pass numbers from 1 to 3"):
        hops.search_cost(hits, np.arange(20), CELLS[:3])
    with pytest.raises(ValueError, match="shuffles=0"):
        hops.search_cost(hits, np.arange(20), CELLS[:3], first=[1], shuffles=0)
    with pytest.raises(ValueError, match="cells has 3 \\(1 different\\)"):
        hops.search_cost(hits, np.arange(20), CELLS[:1] * 3, first=[1])
