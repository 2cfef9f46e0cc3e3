"""Violations, ratios and greedy choice on functions that are known, and on tiny models."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

import lab
from lab.depth_budget import pair_table, pairs, submodularity
from lab.depth_budget.evaluation import Texts
from lab.interventions import skip
from lab.models import random_twin

TEXTS = Texts(torch.zeros(6, 4, dtype=torch.long), pd.DataFrame({"group": list("abcdef")}))


def measured(function, n=12, noise=0.01, n_chains=20):
    """Chains and ratios of a set function, with noise from text to text."""
    asked = {"sizes": [2, 6, 10], "seed": 0}
    plan = submodularity._plan(n, [2, 6, 10], n_chains, 8, 2, np.random.default_rng(0))
    rng, value = np.random.default_rng(1), {}
    for s, added in [*((s, (e,)) for s, e in plan["chains"]), *plan["ratios"]]:
        for more in ((), added, *((e,) for e in added)):
            one = tuple(sorted((*s, *more)))
            value.setdefault(one, function(one) + noise * rng.normal(size=6))
    return submodularity._chains(plan["chains"], value, TEXTS, asked), *submodularity._ratios(
        plan["ratios"], value, TEXTS, asked
    )


def test_a_coverage_function_is_submodular_and_a_square_is_not():
    table, ratios, gamma = measured(lambda one: float(np.sqrt(len(one))))
    of = gamma.set_index("size")
    assert not table.clear.any() and ratios.counted.all()
    root = np.sqrt([2, 3, 4])  # two blocks to two: twice the next step one by one, two steps together
    assert of.gamma["2"] == pytest.approx(2 * (root[1] - root[0]) / (root[2] - root[0]), abs=0.05)
    table, ratios, gamma = measured(lambda one: len(one) ** 2 / 10)
    property_of = table.groupby("property").clear.mean()
    assert property_of["diminishing returns"] == 1 and property_of["monotone"] == 0
    of = gamma.set_index("size")  # two blocks to s: 2 (2s + 1) one by one, 4 s + 4 together
    assert of.gamma["2"] == pytest.approx(10 / 12, abs=0.1) and of.gamma["10"] == pytest.approx(42 / 44, abs=0.1)
    assert of.guarantee["all"] == pytest.approx(1 - np.exp(-of.gamma["all"])) and of.gamma["all"] == ratios.ratio.min()
    table, _, gamma = measured(lambda one: -float(len(one)))
    assert table[table.property == "monotone"].clear.all() and gamma.gamma.isna().all()  # no denominator is positive


def test_noise_alone_is_clear_about_as_often_as_chance():
    table = measured(lambda one: 0.0, noise=1.0, n_chains=150)[0]
    assert 0.3 < table.violated.mean() < 0.7 and table.clear.mean() < 0.12  # six texts: more often than 2.5 %


def test_chains_are_inside_each_other_and_the_block_is_outside():
    plan = submodularity._plan(12, [2, 6, 10], 9, 4, 2, np.random.default_rng(3))
    for start in range(0, 27, 3):
        (a, e), (b, f), (c, g) = plan["chains"][start : start + 3]
        assert set(a) < set(b) < set(c) and e == f == g not in c and (len(a), len(b), len(c)) == (2, 6, 10)
    assert all(not set(s) & set(added) and len(added) == 2 for s, added in plan["ratios"])


def test_greedy_against_exhaustion_by_hand():
    loss = {(): 0.0, (0,): 1.0, (1,): 2.0, (2,): 3.0, (0, 1): 5.0, (0, 2): 6.0, (1, 2): 4.0}
    found = submodularity._greedy({one: np.full(6, x) for one, x in loss.items()}, 2, "removal", TEXTS.groups, 0)
    assert list(found.greedy) == ["0", "0 1"] and list(found.best) == ["0", "1 2"] and list(found.regret) == [0, 1]


@pytest.fixture(scope="module")
def found(tiny_model):
    frame = lab.datasets.load("prose")
    frame["text"] = frame.text.str[:100]
    model = tiny_model("gemma3")
    table = pair_table(model, frame, sizes=(3, 3), n_tokens=20, permutations=5, resume=False, progress=False)
    options = {"n_chains": 6, "n_sets": 4, "n_added": 2, "resume": False, "progress": False}
    return model, frame, table, submodularity.run(model, table, frame, null=random_twin(model), **options)


def test_gains_are_those_of_models_with_only_these_blocks(found):
    model, frame, table, result = found
    ids = pairs.texts_behind(model, table, frame)["search"].ids

    def value(kept):
        stack = [skip(model, layer) for layer in set(range(4)) - set(kept)]
        for context in stack:
            context.__enter__()
        with torch.no_grad():
            logits = model(ids, use_cache=False)[:, 8:-1].double()
        for context in reversed(stack):
            context.__exit__(None, None, None)
        return float(logits.log_softmax(-1).gather(-1, ids[:, 9:, None]).mean())

    for row in result.tables["ratios"].query("weights == 'trained'").itertuples():
        s, added = (set(map(int, name.split())) for name in (row.kept, row.added))
        assert row.joint == pytest.approx(value(s | added) - value(s), abs=1e-4)
        assert row.gains == pytest.approx(sum(value(s | {e}) - value(s) for e in added), abs=1e-4)
    greedy = result.tables["greedy"].set_index(["direction", "blocks"])
    assert (greedy.regret >= -1e-12).all() and greedy.regret["removal", 1] == greedy.regret["addition", 1] == 0
    best = min(combinations(range(4), 2), key=lambda kept: -value(kept))
    assert greedy.best["addition", 2] == pairs.named(best)


def test_tables_tell_both_models(found):
    _, _, table, result = found
    assert set(result.summary.weights) == {"trained", "random"} and (result.summary.n == 6).all()
    assert list(result.parameters["sizes"]) == [1, 2, 3]
    assert (result.table.violated | ~result.table.clear).all()
    assert list(result.tables["near_full"].text_set) == ["search", "report"]


def test_another_architecture_is_no_null(found, tiny_model, passes):
    model, frame, table, _ = found
    with pytest.raises(ValueError, match="n_added"):
        submodularity.run(model, table, frame, n_added=4)
    assert not passes


def test_figures_are_drawn_from_tables(found):
    _, _, table, result = found
    figure = result.plot()
    assert len(figure.axes) == 3 and {text.get_text() for text in figure.axes[0].get_yticklabels()}
    matrix = table.plot().axes[0].images[0].get_array()
    rows = table.tables["interactions"].query("text_set == 'report'").set_index(["i", "j"]).second_difference
    assert matrix[1, 3] == matrix[3, 1] == rows[1, 3] and np.isnan(np.asarray(matrix.filled(np.nan))[2, 2])
