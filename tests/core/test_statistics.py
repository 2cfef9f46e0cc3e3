import json
from pathlib import Path

import jaxtyping
import numpy as np
import pandas as pd
import pytest

from lab import statistics

PUBLISHED = json.loads((Path(__file__).parents[2] / "data" / "published_concept_depth.json").read_text())
# examples tested by the published runs; 6,554 is not 40 % of CommonClaim's 6,000, and Gemma-7B saw 100 of Cities' 599
TESTED = {
    "Cities": 599, "Common": 6554, "Counterfact": 1600, "HateEval": 2400, "Sarcasm": 2400, "STSA": 2768, "IMDb": 800,
    "StrategyQA": 916, "Coinflip": 200,
}  # fmt: skip


def items_of(pair):
    return 100 if pair == "Gemma-7B|Cities" else TESTED[pair.split("|")[1]]


@pytest.fixture
def unchecked():
    """Calls as a user makes them: the suite's own shape checks would speak before the messages under test."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def curves():
    """200 examples in 50 groups at depths 0..10: chance up to depth 4, a jump at depth 5, then 0.9."""
    rng = np.random.default_rng(0)
    level = np.where(np.arange(11) < 5, 0.5, 0.9)
    return (rng.random((200, 11)) < level).astype(float), np.repeat(np.arange(50), 4)


# --- published values ---


@pytest.mark.parametrize("pair", PUBLISHED["accuracy"])
def test_published_curve_is_reproduced(pair):
    curve, bar = np.array(PUBLISHED["accuracy"][pair]), PUBLISHED["pairs"][pair]
    assert len(curve) == bar["layers"]
    assert statistics.converging_point(curve) * bar["layers"] == bar["converge_layer"]
    assert curve.max() == bar["peak"]


def test_published_curves_distinguish_the_rule_from_its_neighbours():
    """Another tolerance would not reproduce them: the test above can fail."""
    for tolerance in (0.02, 0.04):
        points = [statistics.converging_point(np.array(curve), tolerance) for curve in PUBLISHED["accuracy"].values()]
        wanted = [PUBLISHED["pairs"][pair] for pair in PUBLISHED["accuracy"]]
        assert any(p * w["layers"] != w["converge_layer"] for p, w in zip(points, wanted, strict=True))


def test_published_pairs_are_consistent():
    pairs = PUBLISHED["pairs"]
    models, sets = {p.split("|")[0] for p in pairs}, {p.split("|")[1] for p in pairs}
    assert len(pairs) == len(models) * len(sets) == 54 and len(PUBLISHED["accuracy"]) == 18
    for model in models:
        assert len({bar["layers"] for pair, bar in pairs.items() if pair.startswith(model + "|")}) == 1
    for bar in pairs.values():
        assert 3 <= bar["converge_layer"] <= bar["layers"]


def test_published_accuracies_are_counts_of_right_answers():
    values = {pair: [bar["peak"], *PUBLISHED["accuracy"].get(pair, [])] for pair, bar in PUBLISHED["pairs"].items()}
    for pair, accuracies in values.items():
        n, accuracy = items_of(pair), np.array(accuracies)
        assert np.abs(np.round(accuracy * n) / n - accuracy).max() < 1e-5, pair  # five digits are printed


# --- the two published points ---


def test_jump_and_converging_point_number_layers_alike():
    step = np.array([0.5, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9])  # layer 4 of 8 is the first at 0.9
    assert statistics.jump_point(step) == 4 / 8
    assert statistics.converging_point(step) == 5 / 8
    assert statistics.jump_point(step[:4]) == statistics.converging_point(step[:4]) == 1.0


def test_converging_point_without_a_change_is_layer_three():
    assert statistics.converging_point(np.full(10, 0.5)) == 3 / 10
    assert statistics.converging_point(np.full(2, 0.5)) == 1.0


def test_one_late_wiggle_moves_the_converging_point_to_the_end():
    flat = np.full(32, 0.8)
    flat[5] = 0.7
    assert statistics.converging_point(flat) == 8 / 32  # the change back is at entry 6
    flat[-1] = 0.77
    assert statistics.converging_point(flat) == 1.0


def test_thresholds_are_reached_exactly_and_zero_is_no_error():
    assert statistics.jump_point(np.array([0.10, 0.11])) == 1.0
    assert np.isnan(statistics.jump_point(np.array([0.10, 0.1099])))
    assert statistics.jump_point(np.array([0.0, 0.0, 0.1, 0.1])) == 3 / 4
    assert np.isnan(statistics.jump_point(np.array([0.9, 0.2, 0.2])))  # a fall is not a jump
    assert np.isnan(statistics.jump_point(np.array([0.5, 0.56]), ratio=1.15))


@pytest.mark.parametrize("point", [statistics.jump_point, statistics.converging_point])
@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        ([0.5], "at least 2 layers"),
        ([[0.5, 0.6]], "one value per layer"),
        ([0.5, np.nan], "missing or infinite"),
        ([50.0, 60.0], "not percent"),
        ([-0.1, 0.5], "in \\[0, 1\\]"),
    ],
)
def test_points_refuse_what_is_no_curve(point, accuracy, message, unchecked):
    with pytest.raises(ValueError, match=message):
        point(np.array(accuracy))


def test_points_refuse_bad_thresholds():
    with pytest.raises(ValueError, match="ratio=1.0: give a number above 1"):
        statistics.jump_point(np.array([0.5, 0.6]), 1.0)
    with pytest.raises(ValueError, match="tolerance=0.0: give a number above 0"):
        statistics.converging_point(np.array([0.5, 0.6]), 0.0)


# --- intervals ---


def test_corrected_interval_is_the_formula_and_wider_than_the_naive_one():
    values = np.random.default_rng(0).normal(0.8, 0.05, (10, 3))
    mean, low, high = statistics.corrected_interval(values, 0.4)
    t = 2.2621571627409915  # 97.5 % of Student's t with 9 degrees of freedom
    half = t * np.sqrt(values.var(0, ddof=1) * (1 / 10 + 0.4 / 0.6))
    np.testing.assert_allclose([low, high], [mean - half, mean + half], rtol=1e-9)
    naive = t * values.std(0, ddof=1) / np.sqrt(10)
    assert np.all(half > 2.5 * naive)
    np.testing.assert_allclose(statistics.corrected_interval(values[:, 1], 0.4), (mean[1], low[1], high[1]))


@pytest.mark.filterwarnings("error")
def test_one_split_has_a_mean_and_no_interval():
    mean, low, high = statistics.corrected_interval(np.array([[0.5, 0.75]]), 0.4)
    assert mean.tolist() == [0.5, 0.75] and np.isnan([low, high]).all() and low.shape == high.shape == (2,)
    assert np.isnan(statistics.corrected_interval(np.array([0.5]), 0.4).low)


def test_corrected_interval_refuses():
    with pytest.raises(ValueError, match="test_fraction=1.0"):
        statistics.corrected_interval(np.array([0.5, 0.6]), 1.0)


def test_fast_path_equals_the_loop_over_draws(curves):
    correct, groups = curves
    uneven = np.minimum(groups, 30)  # one group of many
    fast = statistics.cluster_bootstrap(correct, uneven, draws=50, seed=3)
    slow = statistics.cluster_bootstrap(correct, uneven, lambda x: x.mean(0), draws=50, seed=3)
    np.testing.assert_allclose(fast, slow, rtol=1e-12)
    assert statistics.cluster_means(correct, uneven, draws=50, seed=3).shape == (50, 11)


def test_bootstrap_is_wider_when_groups_agree_and_covers_the_truth():
    """Examples that copy each other carry no more information than one of them."""
    rng = np.random.default_rng(1)
    covered, width_groups, width_examples = 0, 0.0, 0.0
    for trial in range(100):
        values = np.repeat(rng.random(40) < 0.7, 5).astype(float)
        _, low, high = statistics.cluster_bootstrap(values, np.repeat(np.arange(40), 5), draws=400, seed=trial)
        _, low1, high1 = statistics.cluster_bootstrap(values, np.arange(200), draws=400, seed=trial)
        covered += low <= 0.7 <= high
        width_groups, width_examples = width_groups + high - low, width_examples + high1 - low1
    assert 88 <= covered <= 99
    assert width_groups / width_examples == pytest.approx(np.sqrt(5), rel=0.1)


def test_cluster_standard_error_of_single_examples_is_the_textbook_one(curves):
    correct, _ = curves
    single = statistics.cluster_standard_error(correct, np.arange(200))
    np.testing.assert_allclose(single, correct.std(0, ddof=1) / np.sqrt(200), rtol=1e-10)
    copies = statistics.cluster_standard_error(np.repeat(correct, 3, axis=0), np.repeat(np.arange(200), 3))
    np.testing.assert_allclose(copies, single, rtol=1e-10)


def test_bootstrap_refuses(curves, unchecked):
    correct, groups = curves
    with pytest.raises(ValueError, match="one group"):
        statistics.cluster_bootstrap(correct, np.zeros(200), seed=0)
    with pytest.raises(ValueError, match="one group for each example"):
        statistics.cluster_bootstrap(correct, groups[:-1], seed=0)
    with pytest.raises(ValueError, match="have no group"):
        statistics.cluster_bootstrap(correct, np.where(groups == 3, np.nan, groups), seed=0)
    with pytest.raises(ValueError, match="leave out what was not measured"):
        statistics.cluster_bootstrap(np.where(correct == 0, np.nan, correct), groups, seed=0)
    with pytest.raises(ValueError, match="draws=0"):
        statistics.cluster_bootstrap(correct, groups, draws=0, seed=0)


# --- points with intervals ---


def test_depth_points_find_the_planted_depth(curves):
    table = statistics.depth_points(*curves, seed=1)
    assert table.loc["jump_point", "estimate"] == table.loc["readable_depth", "estimate"] == 0.5
    assert table.loc["readable_depth", "low"] >= 0.5  # never before the jump
    assert (table["low"] <= table["estimate"]).all() and (table["estimate"] <= table["high"]).all()
    assert (table["n_groups"] == 50).all() and (table["undefined"] == 0).all()
    pd.testing.assert_frame_equal(table, statistics.depth_points(*curves, seed=1))


def test_depth_points_agree_with_the_published_functions(curves):
    correct, groups = curves
    table = statistics.depth_points(correct, groups)["estimate"]
    assert table["jump_point"] == statistics.jump_point(correct[:, 1:].mean(0))
    assert table["converging_point"] == statistics.converging_point(correct[:, 1:].mean(0))
    layers_only = statistics.depth_points(correct[:, 1:], groups, first_depth=1)["estimate"]
    pd.testing.assert_series_equal(layers_only, table)


def test_readable_depth_stands_still_under_a_late_wiggle():
    correct = np.ones((100, 11))
    correct[:50, :5] = 0
    correct[:10, 3:] = 0  # 0.9 from depth 5 on
    wiggle = correct.copy()
    wiggle[10:14, 10] = 0  # 0.86 at the last depth
    groups = np.arange(100)
    points = [statistics.depth_points(x, groups).estimate for x in (correct, wiggle)]
    assert [found["readable_depth"] for found in points] == [0.5, 0.5]
    assert [found["converging_point"] for found in points] == [0.6, 1.0]


def test_onset_is_where_accuracy_leaves_its_control_for_good(curves):
    assert "onset" not in statistics.depth_points(*curves).index  # without a control there is none
    correct = np.ones((100, 11))
    correct[:50, :3] = 0  # 0.5 up to depth 2
    correct[:35, 3:7] = 0  # 0.65 at depths 3 to 6
    correct[:20, 7:] = 0  # 0.8 from depth 7 on
    groups = np.arange(100)
    at = {
        above: statistics.depth_points(correct, groups, above=above).loc["onset", "estimate"]
        for above in (0.4, 0.6, 0.7)
    }
    assert at == {0.4: 0.0, 0.6: 0.3, 0.7: 0.7}
    correct[:45, 4] = 0  # falls back to 0.55 at depth 4
    table = statistics.depth_points(correct, groups, above=0.6)
    assert table.loc["onset", "estimate"] == 0.5 and table.loc["onset", "low"] >= 0.3
    assert table.loc["readable_depth", "estimate"] == 0.7  # the plateau begins later
    correct[:45, 10] = 0  # and at the end: not for good
    table = statistics.depth_points(correct, groups, above=0.6)
    assert np.isnan(table.loc["onset", "estimate"]) and table.loc["onset", "undefined"] > 0.5


def test_an_undefined_jump_is_reported_not_dropped():
    table = statistics.depth_points(np.ones((30, 5)), np.arange(30), draws=100)
    assert table.loc["jump_point", "undefined"] == 1
    assert table.loc["jump_point", ["estimate", "low", "high"]].isna().all()


def test_depth_points_refuse(curves):
    correct, groups = curves
    with pytest.raises(ValueError, match="first_depth=2"):
        statistics.depth_points(correct, groups, first_depth=2)
    with pytest.raises(ValueError, match="at least 3 depths"):
        statistics.depth_points(correct[:, :2], groups)
    with pytest.raises(ValueError, match="not percent"):
        statistics.depth_points(correct * 100, groups)


def test_crossfit_peak_removes_the_gain_from_choosing():
    rng = np.random.default_rng(2)
    peaks = [
        statistics.crossfit_peak((rng.random((100, 31)) < 0.5).astype(float), np.arange(100), seed=s) for s in range(30)
    ]
    assert np.mean([peak.naive for peak in peaks]) > 0.58  # the maximum of 31 noisy halves
    assert np.mean([peak.crossfit for peak in peaks]) == pytest.approx(0.5, abs=0.02)


def test_crossfit_peak_keeps_a_real_peak(curves):
    peak = statistics.crossfit_peak(*curves, halves=5)
    assert peak.crossfit == pytest.approx(0.9, abs=0.03) and peak.naive >= peak.crossfit
    assert len(peak.depths) == 10 and (peak.depths >= 5).all()


def test_selectivity():
    np.testing.assert_allclose(statistics.selectivity(np.array([0.9, 0.6]), np.array([0.5, 0.6])), [0.4, 0])
    with pytest.raises(ValueError, match="real has shape"):
        statistics.selectivity(np.array([0.9]), np.array([0.5, 0.6]))
    with pytest.raises(ValueError, match="control runs from"):
        statistics.selectivity(np.array([0.9]), np.array([50.0]))


def test_paired_difference_of_a_model_with_itself_is_zero(curves):
    table = statistics.paired_difference(curves[0], curves[0], curves[1])
    assert (table[["difference", "low", "high"]].abs() < 1e-12).all(axis=None)


def test_paired_difference_compares_equal_fractions(curves):
    correct, groups = curves
    longer = np.repeat(correct, 2, axis=1)[:, 1:]  # depths 0..20: every depth d of the first stands at 2d as well
    table = statistics.paired_difference(correct, longer, groups, points=11)
    assert table["fraction"].iloc[[0, -1]].tolist() == [0, 1]
    np.testing.assert_allclose(table["difference"], 0, atol=1e-12)
    worse = statistics.paired_difference(correct, np.where(np.arange(21) < 14, longer, 0.5), groups, points=11)
    assert (worse["low"].iloc[8:] > 0.3).all() and worse["difference"].iloc[6] == pytest.approx(0)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(3)
    easy = rng.random((300, 1)) < 0.7  # what is easy for one is easy for the other
    a, b = (np.repeat(np.where(rng.random((300, 1)) < 0.05, 1 - easy, easy), 3, axis=1) for _ in range(2))
    paired = statistics.paired_difference(a, b, np.arange(300), points=2)
    unpaired = statistics.paired_difference(a, rng.permutation(b), np.arange(300), points=2)
    assert np.all((paired["high"] - paired["low"]) < 0.7 * (unpaired["high"] - unpaired["low"]))


def test_paired_difference_refuses(curves, unchecked):
    with pytest.raises(ValueError, match="same items"):
        statistics.paired_difference(curves[0], curves[0][:-1], curves[1])
    with pytest.raises(ValueError, match="points=1"):
        statistics.paired_difference(curves[0], curves[0], curves[1], points=1)
