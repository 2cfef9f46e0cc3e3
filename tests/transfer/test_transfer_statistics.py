"""Transfer statistics: the published paired columns, planted effects, honest intervals, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from lab.transfer import statistics as ts

# Paired columns of the published logs, in points, by n = 1..7; computed once from the authors' logs by other code.
PAIRED = {
    "BnB - own base": [0.35, 0.03, -0.21, -1.85, -2.97, -0.45, 0.00],
    "BnB - AnB": [-0.15, 0.01, 0.14, 0.62, 1.68, 3.90, 8.24],
    "BnB+ - own base": [0.26, 0.64, 1.21, 1.36, 1.10, 0.85, 1.15],
    "AnB+ - own base": [0.32, 0.63, 1.30, 1.03, 1.06, 1.20, 1.24],
}


def table(values: dict[tuple[str, int], float], *, splits: int = 6, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Runs with the given mean for each (treatment, n), a difficulty of their own for each split and target."""
    rng, rows = np.random.default_rng(seed), []
    for split in range(splits):
        for target in "AB":
            hard = rng.normal(0, 0.1)
            for (treatment, n), value in values.items():
                part = "blocks" if n else "none"
                rows.append(("S", "near", split, 0, target, "accuracy", treatment, part, n,
                             value + hard + noise * rng.normal()))  # fmt: skip
    columns = ["task", "distance", "split", "seed", "target", "metric", "treatment", "part", "n", "value"]
    return pd.DataFrame(rows, columns=columns)


def test_published_runs() -> None:
    runs = ts.published()
    assert runs.groupby("treatment").size().to_dict() == {
        "base": 8, "BnB": 28, "AnB": 56, "BnB_plus": 10, "AnB_plus": 10,
    }  # fmt: skip
    means = 100 * runs[runs.part == "blocks"].groupby(["treatment", "n"]).value.mean()
    published = {
        "BnB": [62.67, 62.35, 62.11, 60.48, 59.35, 61.88, 62.33],
        "AnB": [62.82, 62.39, 61.89, 59.98, 57.80, 58.06, 54.25],
        "BnB_plus": [61.77, 62.15, 63.13, 62.87, 63.01, 62.76, 62.66],
        "AnB_plus": [63.73, 63.58, 64.26, 63.99, 64.46, 64.60, 64.65],
    }
    for treatment, values in published.items():
        assert means[treatment].to_numpy() == pytest.approx(values, abs=0.006), treatment


@pytest.mark.parametrize(
    ("column", "curve", "sign"),
    [("BnB - own base", "co_adaptation", -1), ("BnB - AnB", "specificity", 1),
     ("BnB+ - own base", "self_gain", 1), ("AnB+ - own base", "transfer_gain", 1)],
)  # fmt: skip
def test_paired_columns_of_the_published_logs(column: str, curve: str, sign: int) -> None:
    found = ts.curves(ts.published())
    found = found[found.curve == curve]
    assert found.n.tolist() == list(range(1, 8))
    assert sign * 100 * found.estimate.to_numpy() == pytest.approx(PAIRED[column], abs=0.006)


def test_the_published_boost_does_not_survive_pairing() -> None:
    gains = 100 * ts.paired_and_unpaired(ts.published()).set_index("treatment")[["unpaired", "paired"]]
    assert gains.round(2).loc["AnB_plus"].tolist() == [1.67, 0.97]
    assert gains.round(2).loc["BnB_plus"].tolist() == [0.11, 0.94]
    assert "boost" not in set(ts.curves(ts.published()).curve), "no AnB+ and BnB+ run share a target"


def test_published_n_star() -> None:
    star = ts.n_star(ts.curves(ts.published())).iloc[0]
    assert (star.n_star, star.n_star_holm, star.n_max, star.n_clusters) == (4, 5, 7, 4)


def test_planted_effects_are_found() -> None:
    values: dict[tuple[str, int], float] = {("base", 0): 0.8, ("base2", 0): 0.81, ("BnB", 0): 0.8}
    for n in (1, 2, 3, 4):
        values |= {("BnB", n): 0.8 - 0.05 * (n == 2), ("AnB", n): 0.8 - 0.05 * (n == 2) - 0.03 * max(0, n - 2)}
        values |= {("BnB_plus", n): 0.82, ("AnB_plus", n): 0.84, ("random", n): 0.5}
    runs = table(values, noise=0.005)
    found = ts.curves(runs).set_index(["curve", "n"])
    wanted = {"co_adaptation": [0, 0.05, 0, 0], "specificity": [0, 0, 0.03, 0.06], "boost": [0.02] * 4,
              "recovery": [0.02, 0.07, 0.02, 0.02], "random_loss": [0.3] * 4, "transfer_gain_over_base2": [0.03] * 4}  # fmt: skip
    for curve, estimates in wanted.items():
        assert found.estimate[curve].loc[1:].to_numpy() == pytest.approx(estimates, abs=0.006), curve
    assert found.loc[("more_training", 0), "estimate"] == pytest.approx(0.01, abs=0.006)
    assert ts.n_star(ts.curves(runs))[["n_star", "n_star_holm"]].iloc[0].tolist() == [3, 3]
    # the treatments are paired: the spread of difficulty (0.1) is not in the interval
    assert (found.high - found.low).max() < 0.03
    levels = ts.levels(runs)
    assert (levels.high - levels.low).min() > 0.05


def test_n_star_needs_all_larger_n() -> None:
    values = {("BnB", n): 0.8 for n in (1, 2, 3)} | {("AnB", 1): 0.8, ("AnB", 2): 0.7, ("AnB", 3): 0.8}
    assert np.isnan(ts.n_star(ts.curves(table(values, noise=0.001))).n_star.iloc[0])


def test_lower_is_better_for_nll() -> None:
    runs = table({("BnB", 1): 0.5, ("AnB", 1): 0.9}).assign(metric="nll")
    assert ts.curves(runs).estimate.tolist() == pytest.approx([0.4])


def test_one_run_less_drops_its_pair_only() -> None:
    runs = table({("BnB", 1): 0.8, ("AnB", 1): 0.7}, splits=3)
    short = runs.drop(runs[(runs.treatment == "AnB") & (runs.split == 0) & (runs.target == "A")].index)
    found = ts.curves(short).iloc[0]
    assert (found.n_pairs, found.n_clusters, round(found.estimate, 9)) == (5, 3, 0.1)


def test_clusters_by_split() -> None:
    rng = np.random.default_rng(0)
    runs = pd.concat([table({("BnB", 1): 0.8, ("AnB", 1): 0.7}, splits=4).assign(seed=seed) for seed in range(3)],
                     ignore_index=True)  # fmt: skip
    effect = dict(enumerate(rng.normal(0, 0.1, 4)))
    runs.loc[runs.treatment == "BnB", "value"] += runs.split.map(effect)
    both, split = ts.curves(runs).iloc[0], ts.curves(runs, cluster=("split",)).iloc[0]
    assert (both.n_clusters, split.n_clusters) == (12, 4)
    assert split.high - split.low > 2 * (both.high - both.low), "seeds share the effect of their split"


@pytest.mark.parametrize(("clusters", "bootstrap"), [(4, 0.80), (8, 0.89)])
def test_t_covers_and_the_bootstrap_does_not(clusters: int, bootstrap: float) -> None:
    rng = np.random.default_rng(0)
    hits = np.array([
        (found[1] <= 0 <= found[2], found[3] <= 0 <= found[4])
        for found in (ts._intervals(rng.normal(size=clusters), 0.95, 400, i) for i in range(1500))
    ])  # fmt: skip
    assert hits.mean(0) == pytest.approx([0.95, bootstrap], abs=0.025)


def test_holm_over_n_of_blocks_only() -> None:
    runs = table({("base", 0): 0.8, ("BnB", 0): 0.8, ("BnB", 1): 0.79, ("BnB", 2): 0.7}, noise=0.01)
    found = ts.curves(runs).set_index("n")
    assert np.isnan(found.p_holm[0])
    assert found.p_holm[2] == pytest.approx(2 * found.p[2]) and found.p_holm[1] >= found.p[1]


def test_flips() -> None:
    items = pd.DataFrame({"task": "S", "distance": "near", "split": 0, "seed": 0, "target": "B", "item": range(6),
                          "label": [0, 1, 0, 1, 0, 1], "BnB@2": [0, 1, 0, 1, 0, 0], "AnB@2": [0, 1, 1, 0, 1, 1]})  # fmt: skip
    found = ts.flips(items, "BnB@2", "AnB@2").iloc[0]
    assert (found.n, found.right_to_wrong, found.wrong_to_right, found.p) == (6, 3, 1, 0.625)
    with pytest.raises(ValueError, match="no run 'AnB@3' among the items; runs are BnB@2, AnB@2"):
        ts.flips(items, "BnB@2", "AnB@3")


def test_what_is_refused() -> None:
    runs = table({("BnB", 1): 0.8, ("AnB", 1): 0.7})
    with pytest.raises(ValueError, match="no column target"):
        ts.curves(runs.drop(columns="target"))
    with pytest.raises(ValueError, match="1 runs are there twice"):
        ts.curves(pd.concat([runs, runs.head(1)]))
    with pytest.raises(ValueError, match="1 runs have missing values"):
        ts.differences(runs.assign(value=runs.value.where(runs.index > 0)))
    with pytest.raises(ValueError, match="no two runs could be paired: if every base failed its gate"):
        ts.curves(runs[runs.treatment == "BnB"])
    with pytest.raises(ValueError, match="confidence=95"):
        ts.curves(runs, confidence=95.0)
