"""The pair table against plain passes, and communities that are there and that are not."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

import lab
from lab.depth_budget import pair_table, pairs
from lab.interventions import skip


@pytest.fixture(scope="module")
def prose():
    frame = lab.datasets.load("prose")
    return frame.assign(text=frame.text.str[:100])  # the tiny models' context


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def measured(request, tiny_model, prose):
    model = tiny_model(request.param)
    options = {"sizes": (3, 4), "n_tokens": 20, "largest": 3, "permutations": 20, "resume": False, "progress": False}
    return model, pair_table(model, prose, **options)


def test_losses_are_those_of_models_without_the_blocks(measured, prose):
    model, result = measured
    texts = pairs.texts_behind(model, result, prose)
    for name, one in texts.items():
        part = result.table[result.table.text_set == name]
        assert part.removed.nunique() == 1 + 4 + 6 + 4
        for removed, loss in pairs.losses(part).items():
            stack = [skip(model, layer) for layer in removed]
            for context in stack:
                context.__enter__()
            with torch.no_grad():
                logits = model(one.ids, use_cache=False)[:, 8:-1].double()
            for context in reversed(stack):
                context.__exit__(None, None, None)
            wanted = -logits.log_softmax(-1).gather(-1, one.ids[:, 9:, None])[..., 0].mean(1)
            np.testing.assert_allclose(loss, wanted.numpy(), rtol=2e-4)


def test_second_differences_by_hand(measured):
    _, result = measured
    rises = result.summary.set_index(["text_set", "removed"])["rise"]
    for row in result.tables["interactions"].itertuples():
        alone = rises[row.text_set, str(row.i)] + rises[row.text_set, str(row.j)]
        assert row.second_difference == pytest.approx(rises[row.text_set, f"{row.i} {row.j}"] - alone, abs=1e-9)
        assert row.low <= row.second_difference <= row.high and row.sign == np.sign(row.low) * (row.low * row.high > 0)
    signs = result.tables["signs"].query("by == 'all' and text_set == 'report'").iloc[0]
    report = result.tables["interactions"].query("text_set == 'report'")
    assert signs.positive == (report.second_difference > 0).mean() and signs.n_pairs == 6


def table_of(loss, n_texts=6):
    """A table of losses as `pair_table` makes it: `loss(removed, text)`."""
    sets = [(), *(one for size in (1, 2) for one in combinations(range(6), size))]
    rows = [(pairs.named(one), f"t{text}", f"g{text}", loss(one, text)) for one in sets for text in range(n_texts)]
    return pd.DataFrame(rows, columns=["removed", "example", "group", "nll"])


def test_a_modular_function_has_no_second_differences():
    price = np.random.default_rng(0).random((6, 6))
    found = pairs.interactions(table_of(lambda one, text: 3 + sum(price[text, b] for b in one)), range(6), seed=0)
    assert found["interactions"].second_difference.abs().max() < 1e-12
    assert found["signs"]["mean"].abs().max() < 1e-12


def test_a_planted_pair_is_found_with_its_sign():
    def loss(one, text):
        return 3 + 0.1 * len(one) + 0.5 * ({1, 4} <= set(one)) - 0.2 * ({0, 1} <= set(one)) + 0.001 * text * len(one)

    found = pairs.interactions(table_of(loss), range(6), seed=0)["interactions"].set_index(["i", "j"])
    assert found.second_difference[1, 4] == pytest.approx(0.5) and found.sign[1, 4] == 1
    assert found.second_difference[0, 1] == pytest.approx(-0.2) and found.sign[0, 1] == -1
    assert (found.second_difference.drop([(1, 4), (0, 1)]).abs() < 1e-12).all()


def near(n, rng):
    """|interactions| that fall with the distance, and are random otherwise."""
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    noise = np.triu(rng.exponential(size=(n, n)), 1)
    return (noise + noise.T) * np.exp(-distance / 2) * (distance > 0)


def p_of(weights, seed=0, permutations=39):
    return pairs.community_test(weights, permutations=permutations, seed=seed)[1]["p"]


def test_planted_communities_are_found_and_near_blocks_alone_are_none():
    rng, planted = np.random.default_rng(0), np.array([0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1])
    weights = near(14, rng) + 0.5 * (planted[:, None] == planted) * (1 - np.eye(14))
    community, test = pairs.community_test(weights, permutations=99, seed=0)
    assert len(set(zip(community, planted, strict=True))) == 2 and test["p"] == 0.01
    p = np.array([p_of(near(14, rng), seed) for seed in range(12)])
    assert p.mean() > 0.25 and min(p) > 0.01 and np.mean(p <= 0.1) <= 0.35
    assert p_of(np.zeros((5, 5)), permutations=3) == 1


def test_a_block_that_interacts_with_all_hides_communities_until_it_is_left_out():
    rng, planted = np.random.default_rng(0), np.array([0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1])
    weights = near(14, rng) + 1.0 * (planted[:, None] == planted) * (1 - np.eye(14))
    weights[5] *= 20
    weights[:, 5] = weights[5]
    others = np.delete(np.arange(14), 5)
    assert p_of(weights) > 0.5 and p_of(weights[np.ix_(others, others)]) <= 0.05


def test_the_null_keeps_every_distance():
    weights = near(9, np.random.default_rng(1))
    other = pairs.permuted(weights, np.random.default_rng(2))
    assert (other == other.T).all() and not (other == weights).all()
    for distance in range(9):
        assert sorted(np.diag(other, distance)) == sorted(np.diag(weights, distance))


def test_shared_beginnings_of_thirty_blocks():
    removed = [(), *(one for size in (1, 2) for one in combinations(range(30), size))]
    assert 4_000 < pairs.block_runs(removed, 30) < 5_000 < 13_980 == 30 * len(removed)


def test_what_cannot_be_measured_is_said_before_anything_runs(tiny_model, prose, measured, passes):
    model, result = measured
    with pytest.raises(ValueError, match="blocks"):
        pair_table(model, prose, blocks=[0, 1, 9])
    with pytest.raises(ValueError, match="largest"):
        pair_table(model, prose, largest=4)
    with pytest.raises(ValueError, match="other weights|measured on"):
        pairs.texts_behind(tiny_model("gpt2"), result, prose)
    with pytest.raises(ValueError, match="does not give the texts"):
        pairs.texts_behind(model, result, prose[::-1].assign(example=[f"x{i}" for i in range(len(prose))]))
    assert not passes
