import jaxtyping
import numpy as np
import pytest
from benchmark_probes import exact, residual_like
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import f1_score, roc_auc_score

from lab import probes


@pytest.fixture
def unchecked():
    """Calls as a user makes them: the suite's own shape checks would speak before the messages under test."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def problems_of(labels, groups, repeats=4):
    """Labels and training rows [example problem]: every split with the real and with shuffled labels."""
    splits = probes.group_splits(labels, groups, repeats=repeats)
    rng = np.random.default_rng(1)
    problems = [labels] * repeats + [rng.permutation(labels) for _ in range(repeats)]
    return np.stack(problems, 1), np.tile(~splits, (2, 1)).T


def states_of(n, d_model, *, scale=1.0, signal=3.0, seed=0):
    labels = np.arange(n) % 2
    return labels, residual_like(labels, d_model, scale=scale, signal=signal, rng=np.random.default_rng(seed))


# --- splits ---


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_on_both_sides(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 30, 200)
    labels = (rng.random(200) < 0.3 + 0.4 * (groups % 2)).astype(int)
    splits = probes.group_splits(labels, groups, repeats=5, seed=seed)
    for test in splits:
        assert not set(groups[test]) & set(groups[~test])
        assert set(labels[test]) == set(labels[~test]) == {0, 1}
    np.testing.assert_array_equal(splits, probes.group_splits(labels, groups, repeats=5, seed=seed))
    assert (splits != probes.group_splits(labels, groups, repeats=5, seed=seed + 1)).any()
    assert len({test.tobytes() for test in splits}) == 5


def test_splits_are_stratified_and_of_the_expected_size():
    labels = np.array([0] * 140 + [1] * 60)
    single = probes.group_splits(labels, np.arange(200), repeats=20)
    assert (single.sum(1) == 80).all() and (labels[None] * single).sum(1).tolist() == [24] * 20
    uneven = np.minimum(np.arange(200) % 40, 25)  # 25 small groups, one of 75
    sizes = probes.group_splits(labels, uneven, repeats=400).mean(1)
    assert sizes.mean() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([0, 0, 0, 0], [1, 2, 3, 4], "all 4 labels are 0: a probe needs examples of both classes"),
        ([0, 1, 2, 1], [1, 2, 3, 4], "pass 0 and 1"),
        ([0, 1, 0, 1], ["x"] * 4, "group 'x' spans everything"),
        ([0, 1, 0, 1], ["x", "y", "x", "z"], "group 'x' holds every example with label 0"),
        ([0, 1, 0, 1], ["x", "y", "z"], "one group for each example"),
        ([0, 1, 0, 1], ["x", None, "y", "z"], "1 examples have no group"),
    ],
)
def test_splits_refuse(labels, groups, message, unchecked):
    with pytest.raises(ValueError, match=message):
        probes.group_splits(np.array(labels), np.array(groups, object))


def test_splits_refuse_what_cannot_have_both_classes_on_both_sides():
    with pytest.raises(ValueError, match="no split of 200 groups with test_fraction=1e-09 had both classes"):
        probes.group_splits(np.arange(200) % 2, np.arange(200), test_fraction=1e-9)
    with pytest.raises(ValueError, match="test_fraction=1.0: give a number above 0 and below 1"):
        probes.group_splits(np.arange(200) % 2, np.arange(200), test_fraction=1.0)


# --- the batched solver against scikit-learn ---


@pytest.mark.parametrize(
    ("n", "d_model", "scale", "C"), [(400, 60, 1, 1.0), (400, 60, 30, 1.0), (150, 300, 30, 1.0), (400, 60, 30, 0.01)]
)
def test_batched_is_scikit_learns_minimum(n, d_model, scale, C):
    """Low rank, three massive dimensions, n above and below d_model, training sets separable and not."""
    labels, states = states_of(n, d_model, scale=scale)
    problems, train = problems_of(labels, np.arange(n) // 2)
    batched = probes.fit_batched(states, problems, train, C=C)
    reference = np.stack([exact(states, y, rows, C=C) for y, rows in zip(problems.T, train.T, strict=True)], 1)
    np.testing.assert_allclose(batched, reference, atol=1e-4 * np.abs(reference).max())
    right = [((x > 0) == (problems == 1)) & ~train for x in (batched, reference)]
    accuracy = [x[:, :4].sum() / (~train[:, :4]).sum() for x in right]
    assert abs(accuracy[0] - accuracy[1]) <= 0.002


@pytest.mark.parametrize("d_model", [1, 2])
def test_few_dimensions_are_solved_in_one_conjugate_step(d_model):
    rng = np.random.default_rng(0)
    states = rng.choice([-1.0, 1.0], size=(64, d_model))
    labels = np.stack([states[:, 0] > 0, rng.random(64) < 0.5, rng.random(64) < 0.2], 1).astype(int)
    train = np.ones_like(labels, bool)
    batched = probes.fit_batched(states, labels, train)
    reference = np.stack([exact(states, y, rows) for y, rows in zip(labels.T, train.T, strict=True)], 1)
    np.testing.assert_allclose(batched, reference, atol=1e-5)


def test_batched_is_converged_lbfgs():
    labels, states = states_of(300, 40)
    states = states - states.mean(0)  # where lbfgs does converge
    problems, train = problems_of(labels, np.arange(300) // 2, repeats=2)
    batched = probes.fit_batched(states, problems, train)
    for p in range(4):
        reference = probes.fit_reference(states, problems[:, p], train[:, p], max_iter=5000, tol=1e-6)
        np.testing.assert_allclose(batched[:, p], reference, atol=1e-3 * np.abs(reference).max())


def test_published_iterations_stop_before_convergence_and_say_so():
    labels, states = states_of(400, 60, scale=30)
    train = probes.group_splits(labels, np.arange(400))[0] == 0
    with pytest.warns(ConvergenceWarning, match="lbfgs failed to converge"):
        published = probes.fit_reference(states, labels, train)
    batched = probes.fit_batched(states, labels[:, None], train[:, None])[:, 0]
    assert np.abs(published - batched).max() > 0.1  # not the same probe


def test_normed_states_need_fewer_than_the_published_iterations():
    """As `mlp_in`: what stops early as a stream with huge dimensions converges without a warning once it is normed."""
    labels, states = states_of(400, 60)
    states[:, :3] *= 1000
    train = probes.group_splits(labels, np.arange(400))[0] == 0
    with pytest.warns(ConvergenceWarning, match="lbfgs failed to converge"):
        probes.fit_reference(states, labels, train)
    normed = states / np.sqrt((states**2).mean(1, keepdims=True))
    probes.fit_reference(normed, labels, train)


def test_batched_says_when_it_stops_early():
    labels, states = states_of(100, 20)
    problems, train = problems_of(labels, np.arange(100))
    with pytest.warns(ConvergenceWarning, match="8 of 8 probes did not reach tol=1e-06 in 1 Newton steps"):
        probes.fit_batched(states, problems, train, max_iter=1)


def test_test_rows_teach_nothing():
    labels, states = states_of(200, 30)
    problems, train = problems_of(labels, np.arange(200))
    flipped = np.where(train, problems, 1 - problems)
    first, second = (probes.fit_batched(states, y, train) for y in (problems, flipped))
    np.testing.assert_array_equal(first, second)


def test_shift_and_rotation_of_the_states_change_nothing():
    labels, states = states_of(200, 30)
    problems, train = problems_of(labels, np.arange(200))
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 30)))[0]
    first = probes.fit_batched(states, problems, train)
    np.testing.assert_allclose(first, probes.fit_batched(states @ rotation + 7, problems, train), atol=1e-4)
    constant = np.concatenate([states, np.full((200, 2), 5.0)], 1)  # two dead dimensions
    np.testing.assert_allclose(first, probes.fit_batched(constant, problems, train), atol=1e-4)


@pytest.mark.parametrize("fit", [probes.fit_batched, probes.fit_reference])
def test_fits_refuse(fit, unchecked):
    labels, states = states_of(20, 5)
    train = np.arange(20) < 12
    if fit is probes.fit_batched:
        labels, train = labels[:, None], train[:, None]
    with pytest.raises(ValueError, match="one class only on its training rows"):
        fit(states, np.zeros_like(labels), train)
    with pytest.raises(ValueError, match="other values than 0 and 1"):
        fit(states, labels * 2, train)
    with pytest.raises(ValueError, match="boolean train mask"):
        fit(states, labels, train.astype(int))
    with pytest.raises(ValueError, match="100 missing or infinite values"):
        fit(states * np.nan, labels, train)


# --- every depth ---


def planted(n=400, d_model=40, depths=5, at=3, seed=0):
    """Massive-dimension states whose label direction is there at one depth only; groups are pairs of one subject."""
    labels, rng = np.arange(n) % 2, np.random.default_rng(seed)
    values = [residual_like(labels, d_model, scale=1, signal=8 * (d == at), rng=rng) for d in range(depths)]
    return np.stack(values, 1).astype(np.float32), labels, np.arange(n) // 2


def test_planted_direction_is_found_at_its_depth_only_and_shuffled_labels_are_chance():
    values, labels, groups = planted()
    scores = probes.probe_depths(values, labels, groups, progress=False)
    accuracy, control = scores.accuracy().mean(0), scores.control.accuracy().mean(0)
    assert accuracy[3] > 0.95 and (np.abs(np.delete(accuracy, 3) - 0.5) < 0.06).all()
    assert (np.abs(control - 0.5) < 0.06).all()
    assert (scores.control.accuracy(train=True).mean(0) > 0.55).all()  # it memorises, and yet does not generalise
    for metric in (scores.f1(), scores.auc()):
        assert metric.shape == (10, 5) and metric.mean(0).argmax() == 3
    assert scores.auc().mean(0)[3] > 0.98 and abs(scores.auc().mean(0)[0] - 0.5) < 0.06


def test_shuffled_labels_fall_to_the_majority_rate_when_classes_are_uneven():
    rng = np.random.default_rng(0)
    labels = (np.arange(400) < 100).astype(int)
    values = rng.normal(size=(400, 2, 3)) + 3 * labels[:, None, None]
    scores = probes.probe_depths(values, labels, np.arange(400), progress=False)
    majority = probes.majority(labels, scores.test)
    np.testing.assert_allclose(majority.accuracy(), 0.75)
    assert np.abs(scores.control.accuracy().mean(0) - 0.75).max() < 0.03
    assert (scores.accuracy().mean(0) > 0.95).all()


def test_solvers_agree_and_results_repeat():
    labels, groups = np.arange(200) % 2, np.arange(200) // 2
    rng = np.random.default_rng(0)  # well conditioned: lbfgs converges within its 100 iterations
    values = rng.normal(size=(200, 2, 10)) + 0.3 * labels[:, None, None]
    options = {"repeats": 3, "progress": False}
    batched = probes.probe_depths(values, labels, groups, **options)
    again = probes.probe_depths(values, labels, groups, **options)
    sklearn = probes.probe_depths(values, labels, groups, solver="sklearn", **options)
    np.testing.assert_array_equal(batched.decisions, again.decisions)
    np.testing.assert_array_equal(batched.test, sklearn.test)
    np.testing.assert_array_equal(batched.control.labels, sklearn.control.labels)
    np.testing.assert_allclose(batched.decisions, sklearn.decisions, atol=1e-2)
    assert np.abs(batched.accuracy() - sklearn.accuracy()).max() <= 0.0126  # one test row of 80


def test_equal_texts_share_a_control_label_and_classes_keep_their_size():
    values, labels, groups = planted(n=100, d_model=5, depths=1, at=0)
    texts = np.array([f"text {i}" for i in np.arange(100) // 4 * 2 + labels])  # each text twice
    scores = probes.probe_depths(values, labels, groups // 2, texts=texts, progress=False)
    for row in scores.control.labels:
        assert all(len(set(row[texts == text])) == 1 for text in set(texts))
        assert row.sum() == labels.sum()
    assert len({row.tobytes() for row in scores.control.labels}) == 10  # anew in each repeat
    assert (scores.labels == labels).all()
    with pytest.raises(ValueError, match="texts occur with both labels"):
        probes.probe_depths(values, labels, groups, texts=np.array(["same"] * 100), progress=False)


def test_correct_counts_each_example_over_the_splits_that_tested_it():
    test = np.array([[True, True, False], [True, False, False]])
    decisions = np.array([[[2.0], [1.0], [0.0]], [[-1.0], [1.0], [0.0]]], np.float32)
    scores = probes.ProbeScores(decisions, test, np.array([[1, 0, 1], [1, 0, 1]]))
    correct, tested = scores.correct()
    assert correct.ravel().tolist() == [0.5, 0.0] and tested.tolist() == [True, True, False]
    assert scores.accuracy().ravel().tolist() == [0.5, 0.0]


def test_states_may_stay_on_disk(tmp_path):
    values, labels, groups = planted(n=60, d_model=5, depths=3, at=1)
    np.save(tmp_path / "values.npy", values)
    mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
    scores = [probes.probe_depths(v, labels, groups, control=False, progress=False) for v in (values, mapped)]
    np.testing.assert_array_equal(scores[0].decisions, scores[1].decisions)
    assert scores[0].control is None


def test_progress_is_shown(capsys):
    values, labels, groups = planted(n=60, d_model=5, depths=3, at=1)
    probes.probe_depths(values, labels, groups, repeats=2)
    assert "Fitting probes" in capsys.readouterr().err


def test_probe_depths_refuses(unchecked):
    values, labels, groups = planted(n=60, d_model=5, depths=2, at=1)
    with pytest.raises(ValueError, match="solver='svm': choose one of batched, sklearn"):
        probes.probe_depths(values, labels, groups, solver="svm")
    with pytest.raises(ValueError, match="pass \\[example, depth, d_model\\] with 60 examples"):
        probes.probe_depths(values[:, 0], labels, groups)
    with pytest.raises(ValueError, match="group 'all' spans everything"):
        probes.probe_depths(values, labels, np.array(["all"] * 60))
    leaky = np.tile(np.arange(60) % 4 < 1, (1, 1))  # takes one of each pair, of one class
    with pytest.raises(ValueError, match="split 0 lacks a class on one side"):
        probes.probe_depths(values, labels, groups, splits=leaky)
    leaky = np.tile(np.arange(60) % 3 < 1, (1, 1))
    with pytest.raises(ValueError, match="split 0 has group '0' on both sides"):
        probes.probe_depths(values, labels, groups, splits=leaky)
    with pytest.raises(ValueError, match="booleans \\[repeat, example\\] for 60 examples"):
        probes.probe_depths(values, labels, groups, splits=leaky.astype(int))


# --- baselines ---


def test_bag_of_words_reads_words_and_only_words():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    splits = probes.group_splits(labels, np.arange(200))
    telling = np.array([f"{['bad', 'good'][y]} film number {i}" for i, y in enumerate(labels)])
    assert (probes.bag_of_words(telling, labels, splits).accuracy() == 1).all()
    order = np.array([["cats chase dogs", "dogs chase cats"][y] for y in labels])  # same words, other order
    assert np.abs(probes.bag_of_words(order, labels, splits).accuracy() - 0.5).max() == 0
    noise = np.array([" ".join(rng.choice(["ab", "cd", "ef", "gh"], 3)) for _ in labels])
    assert abs(probes.bag_of_words(noise, labels, splits).accuracy().mean() - 0.5) < 0.08


def test_majority_is_learnt_on_the_training_rows():
    labels, splits = np.array([0, 0, 0, 1, 1]), np.array([[True, True, False, True, False]])
    assert probes.majority(labels, splits).accuracy().tolist() == [[1 / 3]]  # a tie in training says 1
    splits = np.array([[False, False, False, True, True], [False, False, True, False, True]])
    with pytest.raises(ValueError, match="split 0 lacks a class"):
        probes.majority(labels, splits)
    assert probes.majority(labels, splits[1:]).accuracy().tolist() == [[0.5]]


def test_f1_and_auc_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, test = np.tile(np.arange(50) % 2, (3, 1)), rng.random((3, 50)) < 0.5
    decisions = rng.normal(size=(3, 50, 4)).round(1).astype(np.float32)  # rounded, so that there are ties
    decisions[:, :, 3] = -1  # label 1 is never predicted
    scores = probes.ProbeScores(decisions, test, labels)
    for repeat in range(3):
        true = labels[repeat, test[repeat]]
        for depth in range(4):
            values = decisions[repeat, test[repeat], depth]
            assert scores.auc()[repeat, depth] == pytest.approx(roc_auc_score(true, values))
            assert scores.f1()[repeat, depth] == pytest.approx(f1_score(true, values > 0, zero_division=0))
