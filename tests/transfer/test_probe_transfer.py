"""Probe transfer on real Bridge models: cells against plain scikit-learn, no group on both sides, and how it refuses."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lab import models, probes
from lab.results import Result
from lab.states import collect_states
from lab.transfer import probe_transfer

WORDS = ("lamp", "tree", "boat", "wolf", "ring")
OPTIONS = {"depths": (0, 2, 4), "depth_grid": (2, 4), "repeats": 3, "draws": 60, "resume": False, "progress": False}


def letters(n: int = 48, *, ends: str = "xq", seed: int = 0) -> pd.DataFrame:
    """Texts whose label is the letter of the last word."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    middle = [" ".join(words) for words in rng.permutation(list(product(WORDS, repeat=3)))[:n]]
    return pd.DataFrame(
        {
            "example": [f"letters-{i:03}" for i in range(n)],
            "text": [f"{words} {4 * ends[label]}." for label, words in zip(labels, middle, strict=True)],
            "label": labels,
            "group": [f"g{i // 4}" for i in range(n)],
            "template": "letters",
            "difficulty": 1,
        }
    )


@pytest.fixture(scope="module")
def tables():
    """Letters; the same groups with the labels turned round; and other letters in groups of their own."""
    plain = letters()
    turned = plain.assign(text="no " + plain.text, label=1 - plain.label, example="no-" + plain.example)
    other = letters(40, ends="zk", seed=1)
    return {"letters": plain, "letters_negated": turned, "other": other.assign(group="h" + other.group)}


@pytest.fixture(scope="module")
def result(tiny_model, tables):
    return probe_transfer.run(tiny_model("llama"), tables, **OPTIONS)


@pytest.fixture(scope="module")
def parts(tiny_model, tables):
    """Data set, labels and groups of all examples, states [example depth d_model] at the depths above, splits."""
    frame = pd.concat([frame.assign(dataset=name) for name, frame in tables.items()], ignore_index=True)
    states = collect_states(tiny_model("llama"), frame.text.tolist(), index=(0, 2, 4), progress=False)["resid"].values
    dataset, labels, groups = frame.dataset.to_numpy(str), frame.label.to_numpy(), frame.group.to_numpy(str)
    splits = probe_transfer.joint_splits(labels, groups, dataset, repeats=3)
    return dataset, labels, groups, states.astype(float), splits


def cell(result, trained_on, tested_on, depth, probe, metric, labels="task"):
    rows = result.table.query("trained_on == @trained_on and tested_on == @tested_on and probe == @probe")
    rows = rows[(rows.metric == metric) & (rows.labels == labels) & ((rows.depth == depth) | rows.depth.isna())]
    return rows.sort_values("split").value.to_numpy()


# --- splits ---


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides_in_any_two_data_sets(seed):
    rng = np.random.default_rng(seed)
    labels, dataset = np.tile([0, 1], 90), np.repeat(["a", "b", "c"], 60)
    groups = np.concatenate([rng.integers(0, 12, 120), rng.integers(6, 20, 60)]).astype(str)
    splits = probe_transfer.joint_splits(labels, groups, dataset, repeats=4, seed=seed)
    assert splits.shape == (4, 180) and len({test.tobytes() for test in splits}) == 4
    for test in splits:
        assert not set(groups[test]) & set(groups[~test])
        for name in "abc":
            assert set(labels[test & (dataset == name)]) == set(labels[~test & (dataset == name)]) == {0, 1}
    alone = probe_transfer.joint_splits(labels[:60], groups[:60], dataset[:60], repeats=3, seed=seed)
    np.testing.assert_array_equal(alone, probes.group_splits(labels[:60], groups[:60], repeats=3, seed=seed))


def test_the_depth_of_a_split_is_chosen_without_the_groups_it_tests(tables):
    frame = pd.concat([frame.assign(dataset=name) for name, frame in tables.items()], ignore_index=True)
    about = {"datasets": list(tables), "seed": 0, "repeats": 3, "test_fraction": 0.4, "draws": 2}
    data = probe_transfer._Data.of(frame, about)
    scores = np.random.default_rng(0).normal(size=(3, 3, len(frame)))
    before = data.choose(scores)
    for r in range(3):
        spoilt = scores.copy()
        spoilt[:, :, data.tests[r]] = 99.0 * data.labels[data.tests[r]]
        np.testing.assert_array_equal(data.choose(spoilt)[:, r], before[:, r])
        assert (data.choose(spoilt) != before).any()  # the other splits see it


# --- the numbers ---


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_weighted_auc_is_scikit_learns(share):
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 12, 50) / 7, rng.integers(0, 2, 50)  # with ties
    weights = rng.multinomial(int(50 * share), np.full(50, 1 / 50), size=20).astype(float)
    expected = [roc_auc_score(labels[w > 0], scores[w > 0], sample_weight=w[w > 0]) for w in weights]
    np.testing.assert_allclose(probe_transfer.weighted_auc(scores, labels, weights), expected)
    none = probe_transfer.weighted_auc(scores, labels, (labels == 1)[None].astype(float))
    assert np.isnan(none).all()


@pytest.mark.parametrize(("n", "d"), [(80, 12), (24, 40)])
def test_directions_are_scikit_learns(n, d):
    rng = np.random.default_rng(0)
    labels, scale = np.arange(n) % 2, np.geomspace(0.1, 50, d)
    states = (rng.normal(size=(n, d)) + labels[:, None] * 0.5) * scale + 3
    train = rng.random((n, 2)) < 0.7
    direction, offset = probe_transfer.fit("logistic", states, np.stack([labels, labels], 1), train)
    by_hand, threshold = probe_transfer.fit("mean_difference", states, np.stack([labels, labels], 1), train)
    for k in range(2):
        x, y = states[train[:, k]], labels[train[:, k]]
        model = LogisticRegression(solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(x, y)
        np.testing.assert_allclose(direction[k], model.coef_[0], atol=1e-5 * np.abs(model.coef_).max())
        assert offset[k] == pytest.approx(model.intercept_[0], abs=1e-4)
        ones, zeros = x[y == 1].mean(0), x[y == 0].mean(0)
        np.testing.assert_allclose(by_hand[k], ones - zeros)
        assert threshold[k] == pytest.approx(-(ones - zeros) @ (ones + zeros) / 2)


def test_one_data_set_and_depth_is_what_lab_probes_says(result, parts):
    dataset, labels, groups, states, splits = parts
    rows = dataset == "letters"
    scores = probes.probe_depths(states[rows], labels[rows], groups[rows], splits=splits[:, rows], progress=False)
    for place, depth in enumerate((0, 2, 4)):
        ours = {m: cell(result, "letters", "letters", depth, "logistic", m) for m in ("auc", "accuracy")}
        np.testing.assert_allclose(ours["auc"], scores.auc()[:, place])
        if depth:  # at depth 0 all states are alike: no score is above or below
            np.testing.assert_allclose(ours["accuracy"], scores.accuracy()[:, place])
    assert cell(result, "letters", "letters", 2, "logistic", "auc").mean() > 0.8


@pytest.mark.parametrize("probe", probe_transfer.PROBES)
def test_a_cell_between_data_sets_against_plain_code(probe, result, parts):
    dataset, labels, _, states, splits = parts
    x = states[:, 1]  # depth 2
    for r, test in enumerate(splits):
        train, tested = (dataset == "letters") & ~test, (dataset == "other") & test
        if probe == "logistic":
            model = LogisticRegression(solver="newton-cholesky", max_iter=1000, tol=1e-9).fit(x[train], labels[train])
            scores = model.decision_function(x)
        else:
            means = [x[train & (labels == y)].mean(0) for y in (0, 1)]
            scores = (x - (means[0] + means[1]) / 2) @ (means[1] - means[0])
        scores, truth = scores[tested], labels[tested] == 1
        expected = {
            "auc": roc_auc_score(truth, scores),
            "accuracy": ((scores > 0) == truth).mean(),
            "accuracy_centred": ((scores > scores.mean()) == truth).mean(),
        }
        for metric, value in expected.items():
            assert cell(result, "letters", "other", 2, probe, metric)[r] == pytest.approx(value), (metric, r)


def test_depth_transfer_against_plain_code(result, parts):
    dataset, labels, _, states, splits = parts
    found = {"training_depth": [], "tested_depth": []}
    for test in splits:
        rows = dataset == "other"
        train, tested = rows & ~test, rows & test
        a, b = states[:, 1], states[:, 2]  # depths 2 and 4
        model = LogisticRegression(solver="newton-cholesky", max_iter=1000, tol=1e-9).fit(a[train], labels[train])
        moved = (b - b[train].mean(0)) / b[train].std(0) * a[train].std(0) + a[train].mean(0)
        for name, x in (("training_depth", b), ("tested_depth", moved)):
            scores = model.decision_function(x[tested])
            found[name].append((roc_auc_score(labels[tested], scores), ((scores > 0) == labels[tested]).mean()))
    table = result.tables["depth_transfer"].query("dataset == 'other' and probe == 'logistic'")
    table = table.set_index(["trained_depth", "tested_depth", "statistics", "metric"])["mean"].sort_index()
    for name, values in found.items():
        np.testing.assert_allclose([table[2, 4, name, m] for m in ("auc", "accuracy")], np.mean(values, 0), atol=1e-6)
        for metric in ("auc", "accuracy"):  # the diagonal is the probe on its own data set
            own = cell(result, "other", "other", 2, "logistic", metric).mean()
            assert table[2, 2, name, metric] == pytest.approx(own, abs=1e-6)


def test_intervals_resample_groups(result, parts):
    """The bootstrap again, by a loop that repeats the rows of the groups drawn."""
    dataset, labels, groups, states, splits = parts
    rows = np.flatnonzero(dataset == "other")
    names = pd.factorize(groups[rows])[1]
    rng = np.random.default_rng([0, 1, 2])  # the third data set
    drawn = []
    by_split = []
    for test in splits:
        train = (dataset == "letters") & ~test
        direction, _ = probe_transfer.fit("mean_difference", states[:, 1], labels[:, None], train[:, None])
        by_split.append(states[:, 1] @ direction[0])
    for counts in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=60):
        taken = np.concatenate([np.tile(rows[groups[rows] == name], k) for name, k in zip(names, counts, strict=True)])
        picked = [taken[test[taken]] for test in splits]
        drawn.append(np.nanmean([roc_auc_score(labels[some], scores[some]) if len(set(labels[some])) == 2 else np.nan
                                 for some, scores in zip(picked, by_split, strict=True)]))  # fmt: skip
    row = result.summary.query("trained_on == 'letters' and tested_on == 'other' and depth == 2 and metric == 'auc'")
    row = row.query("probe == 'mean_difference' and labels == 'task'").iloc[0]
    np.testing.assert_allclose([row.low, row.high], np.quantile(drawn, [0.025, 0.975]), atol=1e-6)


# --- what it says ---


def test_a_probe_for_the_letter_is_wrong_about_negated_statements(result, tables, tmp_path):
    negation = result.tables["negation"].set_index(["trained_on", "tested_on", "probe"])
    assert len(negation) == 4
    assert negation.reading["letters", "letters_negated", "logistic"] == "is plausible"
    assert negation.high["letters", "letters_negated", "logistic"] < 0.5
    pairs = result.tables["pairs"]
    assert len(pairs) == 18 and (pairs.p_holm >= pairs.p).all() and set(pairs.depth_low) <= {0, 2, 4}
    own = pairs.query("trained_on == 'letters' and tested_on == 'letters' and probe == 'logistic'").iloc[0]
    assert own.auc > 0.8 and own.difference <= 0  # the last word gives the label away, and the bag of words has it
    shared = result.tables["shared_groups"].set_index(["dataset_a", "dataset_b"]).n
    assert shared["letters", "letters_negated"] == 12 and shared["letters", "other"] == 0
    again = Result.load(result.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(again.summary, result.summary)
    pd.testing.assert_frame_equal(again.tables["pairs"], pairs)


def test_controls(result):
    for data in ("letters", "other"):
        assert abs(cell(result, data, data, 4, "logistic", "auc", "shuffled").mean() - 0.5) < 0.3
        assert (
            cell(result, data, data, 4, "token_count", "auc") != cell(result, data, data, 4, "logistic", "auc")
        ).any()
    # the last word decides, so the bag of words has it, but only in its own data set
    assert cell(result, "letters", "letters", 2, "bag_of_words", "auc").min() == 1
    assert cell(result, "letters", "other", 2, "bag_of_words", "auc").mean() < 0.9
    summary = result.summary.query("probe == 'logistic' and metric == 'auc' and labels == 'task'")
    for row in summary.itertuples():
        controls = [
            cell(result, row.trained_on, row.tested_on, row.depth, name, "auc").mean()
            for name in ("random_direction", "bag_of_words", "token_count")
        ]
        controls.append(cell(result, row.trained_on, row.tested_on, row.depth, "logistic", "auc", "shuffled").mean())
        assert row.difference == pytest.approx(row.mean - max(controls), abs=1e-6)


def test_cosines(result, parts):
    dataset, labels, _, states, splits = parts
    found = []
    for test in splits:
        units = []
        for name in ("letters", "letters_negated"):
            train = (dataset == name) & ~test
            difference = states[train & (labels == 1), 1].mean(0) - states[train & (labels == 0), 1].mean(0)
            units.append(difference / np.linalg.norm(difference))
        found.append(units[0] @ units[1])
    table = result.tables["cosines"].set_index(["depth", "probe", "dataset_a", "dataset_b"])
    assert table.cosine[2, "mean_difference", "letters", "letters_negated"] == pytest.approx(np.mean(found))
    assert table.cosine[2, "logistic", "other", "other"] == pytest.approx(1)
    depths = result.tables["depth_cosines"].set_index(["dataset", "probe", "depth_a", "depth_b"]).cosine
    assert depths["other", "logistic", 4, 4] == pytest.approx(1) and abs(depths["other", "logistic", 2, 4]) < 0.999


def test_a_finished_run_is_read_again(tiny_model, tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    model, options = tiny_model("llama"), {**OPTIONS, "resume": True, "depths": (2,), "depth_grid": (2,), "limit": 30}
    first = probe_transfer.run(model, tables, **{**options, "progress": True})
    assert "for the states of" in capsys.readouterr().out
    monkeypatch.setattr(probe_transfer, "collect_states", None)  # a second reading would fail
    again = probe_transfer.run(model, tables, **options)
    pd.testing.assert_frame_equal(again.summary, first.summary)
    assert not list(tmp_path.rglob("*.states")) and models.hooks_left(model) == 0
    # a limit takes the same groups where data sets share them
    assert first.parameters["n_examples"]["letters"] == first.parameters["n_examples"]["letters_negated"] == 32


@pytest.mark.usefixtures("unchecked")
def test_refusals(tiny_model, tables):
    model = tiny_model("llama")
    one_class = {"letters": tables["letters"], "bad": tables["other"].assign(label=1)}
    for data, options, message in [
        (tables, {"depths": (2, 9)}, r"depths=\[2, 9\]: give at least one, each from 0 to 4"),
        (tables, {"depths": (2, 2)}, r"depths=\[2, 2\]: give at least one, .* none twice"),
        (tables, {"depth_grid": (1,)}, r"depth_grid \[1\] has depths that are not among depths"),
        (tables, {"repeats": 1}, "repeats=1: give a whole number, at least 2"),
        (tables, {"limit": 3}, "splits 0 had both classes|group '.*' holds every|spans everything|splits"),
        ("cities", {}, r"datasets='cities': give a list of names, such as \['cities'\]"),
        ([], {}, "give at least one, and none twice"),
        (["nothing"], {}, "no data set 'nothing'"),
        (one_class, {}, "bad"),
    ]:
        with pytest.raises(ValueError, match=message):
            probe_transfer.run(model, data, **{**OPTIONS, **options})
