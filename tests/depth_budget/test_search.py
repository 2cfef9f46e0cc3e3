"""Searches on a tiny model, whose every set of blocks can be tried, and on losses that are known."""

import importlib.util
import time
from itertools import combinations

import numpy as np
import pytest
import torch

import lab
from lab.depth_budget import block_search, pair_table, search_methods
from lab.depth_budget.search import Losses, block_lim, latency
from lab.depth_budget.search_methods import METHODS, Ledger, Predictor, Space, front, growth, hypervolume, search

PYMOO = importlib.util.find_spec("pymoo") is not None
HERE = [name for name in METHODS if PYMOO or name not in search_methods.NEED_PYMOO]


def loss_of(seed, n, most):
    """A loss of sets of blocks that is neither additive nor monotone, with a price for neighbours."""
    rng = np.random.default_rng(seed)
    alone, both = rng.random(n), rng.normal(size=(n, n)) / 2

    def loss(sets):
        return np.array(
            [3 + sum(alone[b] for b in one) + sum(both[i, j] for i, j in combinations(one, 2)) for one in sets]
        )

    lim = dict(enumerate(rng.random(n)))
    return loss, Space(tuple(range(n)), most, lim, price=0.2, population=8), alone


def exhausted(space):
    return [one for size in range(space.most + 1) for one in combinations(space.blocks, size)]


def found_by(method, loss, space, limit, seed=0):
    ledger = Ledger(loss, limit)
    search(method, ledger, space, seed)
    return ledger.found


@pytest.mark.parametrize("method", HERE)
@pytest.mark.parametrize("seed", range(2))
def test_none_beats_exhaustion_none_asks_too_much_and_all_are_repeatable(method, seed):
    loss, space, _ = loss_of(seed, 8, 4)
    found = found_by(method, loss, space, 40, seed)
    assert 1 < len(found) <= 41 and () in found
    assert all(len(one) <= space.most and list(one) == sorted(set(one)) for one in found)
    np.testing.assert_allclose(list(found.values()), loss(list(found)))
    for size in {len(one) for one in found}:
        least = loss([one for one in exhausted(space) if len(one) == size]).min()
        assert min(value for one, value in found.items() if len(one) == size) >= least
    assert found == found_by(method, loss, space, 40, seed)
    few = found_by(method, loss, space, 13, seed)
    assert list(few) == list(found)[: len(few)] or method == "predictor"  # which shares out what it has


def test_greedy_is_exhaustion_for_one_block_and_not_always_for_two():
    apart = []
    for seed in range(12):
        loss, space, alone = loss_of(seed, 7, 3)
        found = found_by("greedy", loss, space, 1000)
        assert len(found) == 1 + 7 + 6 + 5
        assert min((one for one in found if len(one) == 1), key=found.get) == (int(alone.argmin()),)
        pairs = [one for one in exhausted(space) if len(one) == 2]
        least = min(found[one] for one in found if len(one) == 2)
        apart.append(least - loss(pairs).min())
        swapped = found_by("greedy, swap", loss, space, 1000)
        assert min(swapped[one] for one in swapped if len(one) == 2) <= least
    assert min(apart) == 0 < max(apart)


@pytest.mark.parametrize("seed", range(4))
def test_a_window_as_large_as_the_model_is_exhaustion(seed):
    loss, space, _ = loss_of(seed, 6, 6)
    found = found_by("windows", loss, space, 1000)
    assert set(found) == set(exhausted(space))
    narrow = Space(space.blocks, 6, space.lim, space.price, window=2, shift=1)
    some = found_by("windows", loss, narrow, 1000)
    assert len(some) < len(found)
    cost = {one: value - 0.2 * len(one) for one, value in some.items()}
    assert min(cost.values()) >= min(value - 0.2 * len(one) for one, value in found.items())


def test_one_shot_orders():
    loss, space, alone = loss_of(0, 6, 4)
    order = sorted(space.blocks, key=space.lim.get)
    assert list(found_by("one-shot LIM", loss, space, 99))[1:] == [tuple(sorted(order[:r])) for r in range(1, 5)]
    assert tuple(sorted(np.argsort(alone)[:4])) in found_by("one-shot removal", loss, space, 99)


def test_a_ledger_counts_no_set_twice():
    asked = []
    ledger = Ledger(lambda sets: asked.extend(sets) or np.array([float(sum(one)) for one in sets]), 3)
    assert ledger([(1,), (2,), (1,), ()]) == [1, 2, 1, 0] and ledger.spent == 2
    with pytest.raises(search_methods.Spent):
        ledger([(1,), (5,), (6,)])
    assert asked == [(), (1,), (2,), (5,)] and ledger.found[(5,)] == 5


def test_hypervolume_by_hand():
    assert hypervolume({3: 1.0}, (4, 5.0)) == 4
    assert hypervolume({3: 1.0, 2: 2.0, 1: 2.5}, (4, 5.0)) == 4 + 3 + 2.5
    assert hypervolume({3: 1.0, 2: 0.5}, (4, 5.0)) == 9  # dominated
    assert hypervolume({3: 6.0, 4: 1.0}, (4, 5.0)) == 0  # beyond the reference
    assert front({3: 1.0, 2: 2.0, 1: 1.5}) == [1, 3] and front({3: 1.0, 2: 0.5}) == [2]
    np.testing.assert_allclose(growth({(): 1.0, (0,): 3.0, (1,): 2.0}, 3, (4, 5.0)), [4, 6, 7])


@pytest.mark.skipif(not PYMOO, reason="pymoo is not installed")
def test_hypervolume_is_pymoos():
    from pymoo.indicators.hv import HV

    rng = np.random.default_rng(0)
    for _ in range(20):
        best = {int(kept): float(rng.uniform(0, 6)) for kept in rng.choice(12, 6, replace=False)}
        wanted = HV(ref_point=np.array([9.0, 5.0]))(np.array(list(best.items())))
        assert hypervolume(best, (9, 5.0)) == pytest.approx(wanted)


@pytest.mark.skipif(not PYMOO, reason="pymoo is not installed")
def test_genetic_search_starts_at_the_full_model_and_gets_better_than_chance():
    worse = []
    for seed in range(3):
        loss, space, _ = loss_of(seed, 14, 6)
        areas = [
            growth(found_by(method, loss, space, 150, seed), 14, (15, 8.0))[-1] for method in ("NSGA-II", "random")
        ]
        worse.append(areas[0] < areas[1])
    assert np.mean(worse) < 0.5


def test_the_predictor_knows_neighbours():
    n = 6
    space = Space(tuple(range(n)), n, {}, 0.1)
    sets = exhausted(space)

    def loss(one):
        return (
            3 + 0.3 * len(one) + sum(0.5 for a in one if a + 1 in one)
        )  # linear in the mask and its adjacent products

    model = Predictor({one: loss(one) for one in sets[::2]}, space)
    np.testing.assert_allclose(model(sets[1::2]), [loss(one) for one in sets[1::2]], atol=0.02)


# --- on a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gemma3"])
def searched(request, tiny_model):
    frame = lab.datasets.load("prose")
    frame["text"] = frame.text.str[:100]
    model = tiny_model(request.param)
    pairs = pair_table(model, frame, sizes=(3, 4), n_tokens=20, permutations=5, resume=False, progress=False)
    options = {
        "evaluations": 9,
        "seeds": 2,
        "most": 3,
        "window": 4,
        "population": 4,
        "resume": False,
        "progress": False,
    }
    return model, frame, pairs, block_search(model, pairs, frame, methods=HERE, **options)


def test_fronts_are_measured_on_both_sets_of_texts(searched):
    model, frame, pairs, result = searched
    table, rises = result.table, pairs.summary.set_index(["text_set", "removed"])["rise"]
    for row in table[table.n_removed.between(1, 2)].itertuples():
        assert row.search_rise == pytest.approx(rises["search", row.removed], abs=1e-9)
        assert row.report_rise == pytest.approx(rises["report", row.removed], abs=1e-9)
    assert set(table.method) == set(HERE) and set(table[table.method == "random"].seed) == {0, 1}
    assert (result.tables["regret"].search_regret >= 0).all() and (result.tables["regret"].report_regret >= 0).all()
    exhaustion = result.tables["regret"].query("method == 'exhaustion'")
    assert (exhaustion.search_regret == 0).all() and list(exhaustion.n_removed) == [1, 2]
    greedy = result.tables["regret"].query("method == 'greedy' and n_removed == 1")
    assert (greedy.search_regret == 0).all()
    best = result.summary.hypervolume_high.max()
    assert (result.summary.at_end >= result.summary.hypervolume - 1e-12).all()
    assert ((result.summary.reached_99 > 0) | (result.summary.hypervolume_high < 0.99 * best)).all()


def test_what_the_pair_table_holds_is_not_measured_again(searched, passes):
    model, frame, pairs, _ = searched
    from lab.depth_budget.pairs import texts_behind

    texts = texts_behind(model, pairs, frame)["search"]
    loss = Losses(model, texts, pairs.table[pairs.table.text_set == "search"], 8, None)
    before = len(passes)
    loss([(), (0,), (1, 3)])
    assert len(passes) == before
    loss([(0, 1, 2)])
    assert len(passes) == before + 1


def test_lim_is_minus_the_cosine(searched):
    model, frame, pairs, result = searched
    from lab.depth_budget.pairs import texts_behind
    from lab.states import collect_states

    texts = texts_behind(model, pairs, frame)["search"]
    lim = block_lim(model, texts)
    assert list(lim) == [0, 1, 2, 3] and all(-1 <= value <= 1 for value in lim.values())
    words = [model.tokenizer.decode(row, skip_special_tokens=True) for row in texts.ids]
    found = []
    for position in range(texts.ids.shape[1]):
        at = np.full(len(words), position)
        states = collect_states(model, words, positions=at, progress=False)["resid"].values.astype(float)
        one, two = states[:, :-1], states[:, 1:]
        found.append((one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1))
    np.testing.assert_allclose(list(lim.values()), -np.mean(found, (0, 1)), rtol=1e-4)


def test_a_search_goes_on_where_it_was_interrupted(tiny_model, tmp_path, monkeypatch, passes):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    frame = lab.datasets.load("prose")
    frame["text"] = frame.text.str[:100]
    model = tiny_model("llama")
    options = {"methods": ["greedy", "random"], "evaluations": 12, "seeds": 1, "most": 4, "progress": False}
    pairs = pair_table(model, frame, sizes=(3, 3), n_tokens=20, permutations=5, progress=False)
    wanted = block_search(model, pairs, frame, **options, resume=False)
    whole, before = len(passes), search_methods._SEARCHES["random"]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(search_methods._SEARCHES, "random", stop)
    with pytest.raises(KeyboardInterrupt):
        block_search(model, pairs, frame, **options)
    monkeypatch.setitem(search_methods._SEARCHES, "random", before)
    again = block_search(model, pairs, frame, **options)
    assert again.table.equals(wanted.table) and len(passes) > whole
    done = len(passes)
    assert block_search(model, pairs, frame, **options).table.equals(wanted.table) and len(passes) == done


def test_without_pymoo_the_line_that_installs_it_is_told(searched, monkeypatch, passes):
    model, frame, pairs, _ = searched
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'depth-lab\[search\]'"):
        block_search(model, pairs, frame)
    with pytest.raises(ValueError, match="most"):
        block_search(model, pairs, frame, methods=["greedy"], most=1)
    assert not passes


def test_the_figure_draws_every_method(searched):
    figure = searched[3].plot()
    drawn = {text.get_text() for ax in figure.axes if ax.get_legend() for text in ax.get_legend().get_texts()}
    assert drawn == set(METHODS)
    front = searched[3].tables["fronts"].query("method == 'greedy'")
    line = next(line for line in figure.axes[2].lines if line.get_label() == "greedy")
    np.testing.assert_array_equal(line.get_ydata(), front.report_rise)


def test_time_is_that_of_the_blocks_that_run(tiny_model):
    model = tiny_model("llama")
    ids = torch.arange(1, 9)[None]
    slow = model.blocks[2].mlp.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        found = latency(model, ids, [(2,), (1,), (0, 1)], repeats=3)
    finally:
        slow.remove()
    assert found.removed.tolist() == ["2", "1", "0 1"] and found.blocks.tolist() == [0.75, 0.75, 0.5]
    assert found.time[0] < 0.7 < found.time[1]  # the slow block is nearly all of the time
    assert (found.low <= found.time).all() and (found.time <= found.high).all()
    with pytest.raises(ValueError, match="sets"):
        latency(model, ids, [(4,)])
    with pytest.raises(ValueError, match="repeats"):
        latency(model, ids, [(1,)], repeats=1)
