"""Linear maps between depths: against scikit-learn, on planted maps and diagonals, and through the real Bridge."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from lab import maps
from lab.depth_efficiency import diagonal
from lab.depth_efficiency import linear_maps as lm
from lab.results import Result
from lab.states import stream_states
from lab.texts import tokenize

WORDS = "the cat saw a big dog and ran to the old red house where it slept until noon".split()


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(6, 14))) for _ in range(24)]


@pytest.fixture(scope="module")
def fitted(tiny_model, documents):
    every = [(i, j) for i in range(5) for j in range(5)]
    options = {"keep": every, "draws": 50, "progress": False}
    return lm.fit_maps(tiny_model("llama"), tiny_model("gpt2"), documents, **options)


def all_states(model, documents):
    """For each document its states [depth token d_model] at all positions but the first."""
    tokens = tokenize(model, documents)
    positions = [np.arange(1, n) for n in tokens.lengths]
    batches = [np.array([i]) for i in range(len(documents))]
    return [found.astype(float) for _, found in stream_states(model, tokens, positions, batches=batches)]


def split_of(fitted):
    return fitted.result.tables["documents"].split.to_numpy()


def joined(states, which):
    return np.concatenate([states[i] for i in np.flatnonzero(which)], axis=1)


# --- the fit ---


def test_equal_to_scikit_learn_for_every_pair(tiny_model, documents, fitted):
    x, y = (all_states(tiny_model(family), documents) for family in ("llama", "gpt2"))
    split = split_of(fitted)
    train_x, test_x = (joined(x, split == part) for part in ("train", "test"))
    train_y, test_y = (joined(y, split == part) for part in ("train", "test"))
    assert fitted.result.table.n_tokens.iloc[0] == test_x.shape[1]
    for row in fitted.result.table.itertuples():
        i, j = row.source_depth, row.target_depth
        centred = train_x[i] - train_x[i].mean(0)
        assert row.ridge == pytest.approx(row.c * np.square(centred).sum() / 32, rel=1e-9)
        model = Ridge(alpha=row.ridge, solver="svd").fit(train_x[i], train_y[j])
        weight, bias = fitted.map(i, j)
        assert np.abs(weight - model.coef_.T).max() < 1e-8 * np.abs(model.coef_).max()
        assert np.abs(bias - model.intercept_).max() < 1e-8 * np.abs(train_y[j]).max()
        said = model.predict(test_x[i])
        assert row.r2 == pytest.approx(r2_score(test_y[j], said, multioutput="variance_weighted"), abs=1e-8)
        assert row.r2_mean_dimension == pytest.approx(r2_score(test_y[j], said), abs=1e-8)
        rest = np.argsort(train_y[j].var(0))[:-3]
        without = r2_score(test_y[j][:, rest], said[:, rest], multioutput="variance_weighted")
        assert row.r2_without_top3 == pytest.approx(without, abs=1e-8)
        ratio = np.linalg.norm(test_y[j] - said, axis=1) / np.linalg.norm(test_y[j], axis=1)
        assert row.relative_error == pytest.approx(ratio.mean(), rel=1e-8)
        mean = np.broadcast_to(train_y[j].mean(0), test_y[j].shape)
        assert row.mean_only_r2 == pytest.approx(r2_score(test_y[j], mean, multioutput="variance_weighted"), abs=1e-8)
        ratio = np.linalg.norm(test_y[j] - mean, axis=1) / np.linalg.norm(test_y[j], axis=1)
        assert row.mean_only_relative_error == pytest.approx(ratio.mean(), rel=1e-8)


def test_the_ridge_is_the_best_on_validation_documents(tiny_model, documents, fitted):
    x, y = (all_states(tiny_model(family), documents) for family in ("llama", "gpt2"))
    split = split_of(fitted)
    parts = [[joined(states, split == part) for part in ("train", "validation")] for states in (x, y)]
    (train_x, held_x), (train_y, held_y) = parts
    for row in fitted.result.table.iloc[::6].itertuples():
        i, j = row.source_depth, row.target_depth
        scores = [
            r2_score(
                held_y[j],
                Ridge(alpha=row.ridge / row.c * c).fit(train_x[i], train_y[j]).predict(held_x[i]),
                multioutput="variance_weighted",
            )
            for c in maps.RIDGES
        ]
        assert row.c == maps.RIDGES[int(np.argmax(scores))]
        assert row.r2_validation == pytest.approx(max(scores), abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_gives_its_own_depths(family, tiny_model, documents):
    model = tiny_model(family)
    fit = lm.fit_maps(model, model, documents, draws=50, ridges=(1e-9,), keep=[(2, 2)], progress=False)
    r2 = fit.result.table.pivot(index="source_depth", columns="target_depth", values="r2").to_numpy()
    np.testing.assert_allclose(np.diag(r2), 1, atol=1e-6)
    weight, bias = fit.map(2, 2)
    assert np.abs(weight - np.eye(32)).max() < 1e-3 and np.abs(bias).max() < 1e-2
    best = fit.result.tables["best"]
    np.testing.assert_array_equal(best.source_depth, best.target_depth)
    assert fit.result.summary.set_index("statistic").estimate["distance"] == 0


def fit_all(x, y, ends, tested, ridges):
    """Fitted on the first tokens, the ridge chosen on the next, tested on the last; the weights of the first map."""
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    states = x.astype(np.float32), y.astype(np.float32)
    found = lm.fit_all(states, parts, np.array(tested), ridges, keep={(0, 0)})
    return found, *found.weights[0, 0]


def test_a_planted_map_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(6, 4)), 100 * rng.normal(size=4)
    x = rng.normal(size=(1, 3000, 6)).astype(np.float32)
    y = np.stack([x[0] @ weight + bias, rng.normal(size=(3000, 4))])
    found, fitted, offset = fit_all(x, y, [2000, 2400, 3000], [100] * 6, (1e-12, 1.0))
    np.testing.assert_allclose(fitted, weight, atol=1e-5)
    np.testing.assert_allclose(offset, bias, rtol=1e-6)
    assert found.columns["r2"][0, 0] == pytest.approx(1, abs=1e-9)
    assert -0.05 < found.columns["r2"][0, 1] < 0.01 and found.columns["c"].tolist() == [[1e-12, 1.0]]


def test_shifted_sums_keep_their_precision():
    """A mean a million times the spread: the sums are about the training mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 600, 3))
    moved = x.astype(np.float32).astype(float) * 8 + 2.0**23  # exact in float32
    y = np.round(moved - 2.0**23)
    _, weight, _ = fit_all(np.round(moved), y, [300, 400, 600], [100] * 2, (1e-12,))
    np.testing.assert_allclose(weight, np.eye(3), atol=1e-9)


def test_batches_chunks_and_disk_change_nothing(tiny_model, documents, fitted, monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(maps, "_CHUNK", 37)
    again = lm.fit_maps(
        tiny_model("llama"), tiny_model("gpt2"), documents, draws=50, batch_tokens=100, memory_mb=0,
        progress=False,
    )  # fmt: skip
    for ours, theirs in ((again.result.table, fitted.result.table), (again.result.summary, fitted.result.summary)):
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5, atol=1e-5)  # a batch moves float32 states by rounding
    assert list((tmp_path / "cache").iterdir()) == []  # the file is gone


def test_documents_sum_to_the_whole(fitted):
    pivot = fitted.result.table.pivot(index="source_depth", columns="target_depth")
    documents, here = fitted.result.tables["documents"].query("split == 'test'"), fitted.fitted
    np.testing.assert_allclose(1 - here.sse.sum(0) / here.sst.sum(0), pivot["r2"], atol=1e-12)
    np.testing.assert_allclose(here.relative.sum(0) / documents.n_tokens.sum(), pivot["relative_error"], rtol=1e-12)
    assert len(here.sse) == len(documents) and (fitted.result.table.n_tokens == documents.n_tokens.sum()).all()
    assert (pivot["embedding_r2"] == pivot["r2"].loc[0]).all(axis=None)


def test_two_tokenizers_and_a_choice_of_depths(tiny_model, tmp_path, documents, capsys):
    """Gemma has a start token: other positions, so only word ends are compared."""
    result = lm.linear_maps(
        tiny_model("gemma3"), tiny_model("llama"), documents, source_depths=[0, 2, 4], target_depths=[1, 3], draws=20
    )
    assert "(100% of the words end a token in both models)" in capsys.readouterr().out
    assert not result.parameters["same_tokens"] and len(result.table) == 6
    assert result.table.embedding_r2.notna().all() and (result.table.source_depth.unique() == [0, 2, 4]).all()
    loaded = Result.load(result.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(loaded.table, result.table)
    pd.testing.assert_frame_equal(loaded.tables["best"], result.tables["best"])
    assert (loaded.columns().meaning != "").all()


def test_groups_of_documents_stay_together(tiny_model, documents):
    groups = np.repeat(np.arange(8), 3)
    model = tiny_model("llama")
    fit = lm.fit_maps(model, model, documents, groups=groups, source_depths=[1, 2], target_depths=[1, 2], draws=20,
                        progress=False)  # fmt: skip
    assert fit.result.tables["documents"].groupby("group").split.nunique().eq(1).all()
    assert fit.result.summary.n_groups.eq(2).all()


# --- the diagonal ---


def planted(best, n_source, n_documents=30, noise=0.3, seed=0):
    """Errors of documents where target j is given best by source best[j]: [document source target]."""
    rng = np.random.default_rng(seed)
    gap = np.abs(np.arange(n_source)[:, None] - np.asarray(best)[None]) / n_source
    sse = (0.1 + gap) * np.exp(noise * rng.normal(size=(n_documents, n_source, len(best)))) * 100
    return sse, np.full((n_documents, len(best)), 100.0), sse / 100 * 20, np.full(n_documents, 20)


def diagonal_of(best, n_layers, **options):
    sse, sst, relative, n = planted(best, n_layers[0] + 1, **options)
    return diagonal.diagonal_test(
        sse, sst, relative, n, np.arange(len(sse)), source_depths=np.arange(n_layers[0] + 1),
        target_depths=np.arange(n_layers[1] + 1), n_layers=n_layers, draws=200,
    )  # fmt: skip


def test_a_planted_diagonal_is_found():
    summary, best = diagonal_of(np.arange(17) // 2, (8, 16))
    row = summary.set_index("statistic")
    assert row.estimate["slope"] == pytest.approx(1, abs=0.1) and row.low["slope"] > 0.8
    assert row.estimate["spearman"] > 0.95 and row.null_p["spearman"] < 0.01
    assert row.estimate["distance"] < 0.06 and row.null_p["distance"] < 0.01 and row.null_mean["distance"] > 0.2
    assert row.low["gain_over_same_depth"] > 0.2 and row.low["gain_over_saturates"] > 0.1
    assert row.estimate["target_slope"] == pytest.approx(1, abs=0.15) and row.null_p["target_distance"] < 0.01
    assert row.low["error_trend"] < 0.02 and (row.low <= row.estimate).all() and (row.estimate <= row.high).all()
    assert best.target_depth.tolist() == list(range(1, 17))
    assert np.abs(best.source_depth - best.target_depth / 2).max() <= 1


def test_no_diagonal_in_shuffled_targets():
    rng = np.random.default_rng(3)
    ps = []
    for _ in range(20):
        order = np.concatenate([[0], 1 + rng.permutation(16)])
        summary, _ = diagonal_of((np.arange(17) // 2)[order], (8, 16))
        ps.append(summary.set_index("statistic").null_p[["spearman", "distance", "target_distance"]])
    assert (np.array(ps) < 0.05).mean() < 0.25 and np.median(ps) > 0.2


def test_the_rivals_win_where_they_are_planted():
    row = diagonal_of(np.minimum(np.arange(17), 8), (8, 16))[0].set_index("statistic")
    assert row.high["gain_over_saturates"] < 0 and row.estimate["distance_saturates"] < 0.05
    flat = diagonal_of(np.full(17, 3), (8, 16), noise=0.0)[0].set_index("statistic")
    assert flat.estimate["spearman"] == 0 == flat.estimate["slope"]


def test_an_error_that_rises_with_depth_is_seen():
    sse, sst, relative, n = planted(np.arange(9), 9)
    harder = 1 + np.arange(9)
    summary, _ = diagonal.diagonal_test(
        sse * harder / 9, sst, relative * harder, n, np.arange(30), source_depths=np.arange(9),
        target_depths=np.arange(9), n_layers=(8, 8), draws=100,
    )  # fmt: skip
    row = summary.set_index("statistic")
    assert row.low["error_trend"] > 0 and row.high["r2_trend"] < 0
    assert row.estimate["gain_over_saturates"] == 0  # one depth: nothing to tell apart


def test_only_one_depth_above_0_is_refused(unchecked):
    sse, sst, relative, n = planted([0, 1], 2)
    with pytest.raises(ValueError, match="at least two depths above 0 of each"):
        diagonal.diagonal_test(sse, sst, relative, n, np.arange(30), source_depths=np.arange(2),
                           target_depths=np.arange(2), n_layers=(1, 1))  # fmt: skip
    with pytest.raises(ValueError, match=r"pass \[document, source, target\] for 3 source and 2 target"):
        diagonal.diagonal_test(sse, sst, relative, n, np.arange(30), source_depths=np.arange(3),
                           target_depths=np.arange(2), n_layers=(2, 1))  # fmt: skip


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": "one text"}, "documents='one text': give a list of texts"),
        ({"documents": ["a b", "c d", "e f"]}, "3 documents in 3 groups: a split needs 1 group to train on"),
        ({"documents": ["a b", " ", "e f", "g h"]}, "document 1 is empty"),
        ({"documents": ["a b", "c", "ee", "ff"] * 5}, None),
        ({"source_depths": [1, 5]}, r"source_depths=\[1, 5\]: give at least one, each from 0 to 4"),
        ({"target_depths": [0, 1]}, "give at least two depths above 0"),
        ({"target_depths": [1, 1, 2]}, "none twice"),
        ({"ridges": ()}, r"ridges=\[\]: give at least 1 of the numbers"),
        ({"ridges": (0.0, 1.0)}, r"ridges\[0\]=0.0: give a number above 0"),
        ({"keep": [(1, 9)]}, r"keep=\[\[1, 9\]\]: give pairs of 0 to 4 and 0 to 4"),
        ({"test_fraction": 0.9}, "leave something to train on"),
    ],
)
def test_refusals(change, message, tiny_model, documents, unchecked):
    model = tiny_model("llama")
    options = {"documents": documents, "progress": False, "draws": 10, **change}
    texts = options.pop("documents")
    if message is None:  # odd, but allowed: documents of one token are tested with none
        lm.fit_maps(model, model, texts, **options)
        return
    with pytest.raises(ValueError, match=message):
        lm.fit_maps(model, model, texts, **options)


def test_a_map_that_was_not_kept(fitted):
    with pytest.raises(ValueError, match=r"the map \(7, 7\) was not kept .*pass keep=\[\(7, 7\)\] to fit_maps"):
        fitted.map(7, 7)
