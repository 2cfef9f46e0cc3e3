"""A depth for each example: the policy finds a planted rule, its controls do not, and where nothing is nothing is found."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lab.depth_budget import depth_policy, trained_figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


OPTIONS = {"seed": 0, "repeats": 2, "test_fraction": 0.4, "folds": 2, "components": 8}


def test_the_policy_finds_a_planted_rule_and_its_controls_do_not():
    table = depth_policy.read(*depth_policy.planted(0, n_groups=60), **OPTIONS)
    mean = table.groupby("reader").accuracy.mean()
    assert mean.policy > 0.95 > 0.85 > mean.fixed > 0.65
    assert mean.policy_mix > 0.95 and mean.policy_others < 0.85 and mean["last"] < 0.65
    assert (mean.oracle >= mean.policy).all() and mean.oracle_shuffled > 0.9
    assert set(table[table.reader == "fixed"].depth) <= {1, 3}


def test_nothing_is_found_where_nothing_is():
    values, labels, groups = depth_policy.planted(1, n_groups=60)
    noise = np.random.default_rng(0).permutation(labels)
    mean = depth_policy.read(values, noise, groups, **OPTIONS).groupby("reader").accuracy.mean()
    assert abs(mean[["fixed", "policy", "policy_mix", "softmax_mix"]] - 0.5).max() < 0.12 and mean.oracle > 0.9


def test_depth_policy_of_a_model(tiny_model):
    result = depth_policy.run(
        tiny_model("llama"), "numbers", limit=64, repeats=2, components=4, folds=2, progress=False, resume=False
    )
    assert result.summary.dataset.unique().tolist() == ["numbers", "planted"]
    assert result.parameters["n_examples"] <= 64 and set(result.table.reader) == set(depth_policy.READERS)
    runs = result.table.query("dataset == 'numbers'").pivot(index="split", columns="reader", values="accuracy")
    row = result.summary.query("dataset == 'numbers' and reader == 'policy'").iloc[0]
    assert row.difference == pytest.approx((runs.policy - runs.fixed).mean())
    figure = trained_figures.depth_policy(result)
    assert len(figure.axes) == 2 and len(figure.axes[0].get_yticklabels()) == len(depth_policy.READERS) - 1
    with pytest.raises(ValueError, match="data='nothing': choose one of"):
        depth_policy.run(tiny_model("llama"), "nothing")
