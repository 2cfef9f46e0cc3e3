"""Linear probes: at each depth, can a straight cut through the states tell the two classes apart?

The probe is logistic regression as published (L2, C = 1, features not scaled), on repeated splits that keep groups
whole, beside three things that a probe must beat: the majority, a bag of words, and itself on shuffled labels.
`fit_reference` is scikit-learn, one problem at a time; `fit_batched` solves the same problems together.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm

from lab import require

SOLVERS = ("batched", "sklearn")
_RETRIES = 100  # new draws of one split before giving up

# --- splits --------------------------------------------------------------------------------------------------------


def group_splits(
    labels: Shaped[np.ndarray, " example"], groups: Shaped[np.ndarray, " example"], *, repeats: int = 10,
    test_fraction: float = 0.4, seed: int = 0,
) -> Bool[np.ndarray, "repeat example"]:  # fmt: skip
    """Random train/test splits in which no group is on both sides; True is test.

    Groups are drawn separately among those with mostly label 0, mostly label 1, and as many of each, so the classes
    keep their shares as far as groups allow. Where the cut falls inside a group, that group goes to the test side with
    the probability that makes the expected test size exact. Published (arXiv 2404.07066): one 60/40 split, no strata,
    no groups.

    Raises:
        ValueError: no such split: one group holds every example of a class, say, or none was drawn in 100 tries.

    >>> splits = group_splits(np.array([0, 1, 0, 1]), np.array(["a", "a", "b", "b"]), repeats=2, test_fraction=0.5)
    >>> splits.sum(1).tolist()
    [2, 2]
    """
    labels, groups = _labels(labels), np.asarray(groups)
    if groups.shape != labels.shape:
        raise ValueError(f"groups has shape {groups.shape}, labels {labels.shape}: pass one group for each example")
    if pd.isna(groups).any():
        raise ValueError(f"{int(pd.isna(groups).sum())} examples have no group: give each its own name instead")
    repeats, test_fraction = require.whole("repeats", repeats, 1), require.fraction("test_fraction", test_fraction)
    codes, names = pd.factorize(groups)
    if len(names) == 1:
        raise ValueError(f"group '{names[0]}' spans everything: no split can keep it on one side; pass finer groups")
    for label in (0, 1):
        if len(set(codes[labels == label])) == 1:
            name = names[codes[labels == label][0]]
            raise ValueError(f"group '{name}' holds every example with label {label}: one side would lack that class")
    sizes = np.bincount(codes)
    lean = np.sign(np.bincount(codes, labels) / sizes - 0.5)  # -1, 0, 1: which label the group mostly has
    rng = np.random.default_rng(require.seed(seed))
    return np.stack([_draw_split(labels, codes, sizes, lean, test_fraction, rng) for _ in range(repeats)])


def _draw_split(
    labels: np.ndarray, codes: np.ndarray, sizes: np.ndarray, lean: np.ndarray, test_fraction: float,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    for _ in range(_RETRIES):
        tested = np.zeros(len(sizes), bool)
        for stratum in (-1, 0, 1):
            members = rng.permutation(np.flatnonzero(lean == stratum))
            ends = np.cumsum(sizes[members])
            # a uniform point inside the group on the cut decides its side
            tested[members] = ends - rng.random() * sizes[members] < test_fraction * sizes[members].sum()
        test = tested[codes]
        if _both(labels, test):
            return test
    raise ValueError(
        f"no split of {len(sizes)} groups with test_fraction={test_fraction} had both classes on both sides in "
        f"{_RETRIES} draws: pass finer groups, more examples, or a fraction nearer 0.5"
    )


# --- fits ----------------------------------------------------------------------------------------------------------


def fit_reference(
    states: Float[np.ndarray, "example d_model"], labels: Shaped[np.ndarray, " example"],
    train: Bool[np.ndarray, " example"], *, C: float = 1.0, max_iter: int = 100, tol: float = 1e-4,
) -> Float[np.ndarray, " example"]:  # fmt: skip
    """Log-odds of label 1 for every example, from scikit-learn's logistic regression fitted on the training rows.

    The defaults are the published ones: L2, C = 1, lbfgs, 100 iterations, features not scaled (arXiv 2404.07066). On the
    raw stream lbfgs often stops at 100 iterations before it has converged (on `mlp_in`, which the paper reads, seldom);
    scikit-learn then warns, and the result is not the minimum that C defines (`benchmark_probes.py` prints how far off).

    >>> x, y = np.array([[-1.0], [1.0], [2.0]]), np.array([0, 1, 1])
    >>> fit_reference(x, y, np.array([True, True, False])).round(2).tolist()
    [-0.67, 0.67, 1.35]
    """
    states, labels, train = _problem(states, labels, train)
    model = LogisticRegression(C=C, max_iter=max_iter, tol=tol).fit(states[train], labels[train])
    return model.decision_function(states)


def fit_batched(
    states: Float[np.ndarray, "example d_model"], labels: Shaped[np.ndarray, "example problem"],
    train: Bool[np.ndarray, "example problem"], *, C: float = 1.0, tol: float = 1e-6, max_iter: int = 100,
) -> Float[np.ndarray, "example problem"]:  # fmt: skip
    """Log-odds of label 1 from many logistic regressions (splits, label sets) that share one feature matrix.

    Each column minimises what scikit-learn's LogisticRegression minimises, 0.5 |w|^2 + C * sum over its training rows
    of log(1 + exp(-y (x.w + b))) with y = +-1 and b not penalised, to convergence. The method is Newton's, all problems
    together, so that a conjugate-gradient step is two matrix products:
    1. Subtract the column means of all rows (b absorbs it) and rotate to the principal axes (|w| does not change):
       exact, and the few huge dimensions of a residual stream become axes of their own.
    2. Scale each axis to unit variance and its penalty with it: exact too. The Hessian is now nearly diagonal, so its
       diagonal is a good preconditioner, and conjugate gradients may run in float32: they only propose a direction.
    3. Logits, gradient and the line search that accepts a step are float64. A problem is done when its gradient, in the
       norm of that diagonal, is `tol` times that at w = 0. One that needs more than `max_iter` steps gives a
       ConvergenceWarning.

    tests/core/test_probes.py holds them against scikit-learn's exact solver; benchmark_probes.py prints differences, times.

    >>> x, y = np.array([[-1.0], [1.0], [2.0]]), np.array([[0], [1], [1]])
    >>> fit_batched(x, y, np.array([[True], [True], [False]])).round(2).ravel().tolist()
    [-0.67, 0.67, 1.35]
    """
    states, labels, train = _problem(states, labels, train)
    C, tol = require.number("C", C, above=0), require.number("tol", tol, above=0)
    max_iter = require.whole("max_iter", max_iter, 1)
    with torch.inference_mode():
        features, penalty = _principal_axes(torch.as_tensor(states, dtype=torch.float64))
        signs = torch.as_tensor(2.0 * labels.T - 1, dtype=torch.float64)  # [problem example]
        cost = C * torch.as_tensor(train.T, dtype=torch.float64)  # 0 on test rows
        logits, left = _newton(features, penalty, signs, cost, tol, max_iter)
    if left:
        slow = (
            f"{left} of {labels.shape[1]} probes did not reach tol={tol} in {max_iter} Newton steps: raise one of them"
        )
        warnings.warn(slow, ConvergenceWarning, stacklevel=2)
    return logits.T.numpy()


def _principal_axes(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States on their principal axes, each scaled to mean square 1, then ones: [example axis]; the penalty of each."""
    centred = states - states.mean(0)
    if len(centred) < centred.shape[1]:  # the rows span at most n dimensions
        centred = centred @ torch.linalg.qr(centred.T)[0]
    # exact in any orthonormal basis: an inaccurate one would cost steps, not accuracy
    centred = centred @ torch.linalg.eigh(centred.T @ centred)[1]
    scale = centred.square().mean(0).sqrt()
    # an axis so short that it moves no logit: by C * n * scale^2 at most
    kept = scale > (1e-10 * scale.max()).clamp_min(1e-15)
    features = torch.cat([centred[:, kept] / scale[kept], torch.ones_like(centred[:, :1])], 1)
    return features, torch.cat([scale[kept] ** -2, scale.new_zeros(1)])


def _newton(
    features: torch.Tensor, penalty: torch.Tensor, signs: torch.Tensor, cost: torch.Tensor, tol: float, max_iter: int
) -> tuple[torch.Tensor, int]:
    """Logits [problem example] at the minimum, and how many were not solved. Problems are rows: faster products."""
    across = features.T.contiguous()  # [axis example]
    rough, rough_across, squares = features.float(), across.float(), features.float() ** 2
    solved = torch.zeros_like(signs)
    active = torch.arange(len(signs), device=signs.device)  # the problems still being solved
    w, logits, start = features.new_zeros(len(signs), len(penalty)), torch.zeros_like(signs), None
    for _ in range(max_iter + 1):
        wrong = torch.sigmoid(-signs * logits)  # probability given to the other class
        gradient = penalty * w - (cost * signs * wrong) @ features
        curvature = (cost * wrong * (1 - wrong)).float()
        diagonal = curvature @ squares + penalty.float() + 1e-30
        size = (gradient**2 / diagonal).sum(1).sqrt()
        start = size if start is None else start
        going = size > tol * start
        solved[active[~going]] = logits[~going]
        if not going.any():
            return solved, 0
        active, w, logits, signs, cost, start, size, gradient, curvature, diagonal = (
            x[going] for x in (active, w, logits, signs, cost, start, size, gradient, curvature, diagonal)
        )

        def hessian(v: torch.Tensor, curvature: torch.Tensor = curvature) -> torch.Tensor:
            return (curvature * (v @ rough_across)) @ rough + penalty.float() * v

        # far from the minimum a rough step will do; near it the gradient must fall ever faster
        accuracy = (size / start).sqrt().clamp(1e-3, 0.3).float()
        unit = gradient.abs().amax(1, keepdim=True)  # keeps float32 in range
        step = -unit * _conjugate_gradient(hessian, diagonal, (gradient / unit).float(), accuracy)
        change, slope = step @ across, (gradient * step).sum(1)
        w, logits = _line_search(penalty, signs, cost, w, logits, step, change, slope)
    solved[active] = logits
    return solved, len(active)


def _conjugate_gradient(
    hessian: Callable[[torch.Tensor], torch.Tensor], diagonal: torch.Tensor, target: torch.Tensor,
    accuracy: torch.Tensor, max_iter: int = 200,
) -> torch.Tensor:  # fmt: skip
    """Solves hessian(x) = target for each row [problem axis], preconditioned by `diagonal`, to a relative residual."""
    solution, residual = torch.zeros_like(target), target.clone()
    direction = residual / diagonal
    size = (residual * direction).sum(1, keepdim=True)
    goal = accuracy[:, None] ** 2 * size
    tiny = torch.finfo(size.dtype).tiny  # a row that is solved exactly must not divide 0 by 0
    for _ in range(max_iter):
        image = hessian(direction)
        bend = (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        length = torch.where(size > goal, size / bend, 0.0)  # 0: done, stands still
        solution += length * direction
        residual -= length * image
        scaled = residual / diagonal
        new_size = (residual * scaled).sum(1, keepdim=True)
        if not (new_size > goal).any():
            break
        direction = scaled + new_size / size.clamp_min(tiny) * direction
        size = new_size
    return solution


def _line_search(
    penalty: torch.Tensor, signs: torch.Tensor, cost: torch.Tensor, w: torch.Tensor, logits: torch.Tensor,
    step: torch.Tensor, change: torch.Tensor, slope: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Halves each problem's step until its objective falls by 1e-4 of what the slope promises (Armijo)."""

    def objective(w: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return 0.5 * (penalty * w**2).sum(1) + (cost * torch.nn.functional.softplus(-signs * logits)).sum(1)

    before = objective(w, logits)
    length = torch.ones_like(before)
    for _ in range(40):
        after = objective(w + length[:, None] * step, logits + length[:, None] * change)
        high = after > before * (1 + 1e-12) + 1e-4 * length * slope  # 1e-12: rounding of the sum
        if not high.any():
            break
        length = torch.where(high, length / 2, length)
    return w + length[:, None] * step, logits + length[:, None] * change


# --- every depth ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeScores:
    """Probes of every depth on every split, as decision values (log-odds of label 1; above 0 means label 1).

    test: True where tested. labels: those that each repeat was fitted and is scored on: the real ones, or in `control`
    the shuffled ones.
    """

    decisions: Float[np.ndarray, "repeat example depth"]
    test: Bool[np.ndarray, "repeat example"]
    labels: Int[np.ndarray, "repeat example"]
    control: "ProbeScores | None" = None

    @property
    def right(self) -> Bool[np.ndarray, "repeat example depth"]:
        """Whether the predicted label is the one the probe was fitted for, on training rows too."""
        return (self.decisions > 0) == (self.labels[:, :, None] == 1)

    def accuracy(self, *, train: bool = False) -> Float[np.ndarray, "repeat depth"]:
        """Share of test (or training) rows predicted rightly. A control high on training rows memorises."""
        side = ~self.test if train else self.test
        return np.stack([right[rows].mean(0) for right, rows in zip(self.right, side, strict=True)])

    def _tested(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each repeat's test rows, whether the label is 1, and the decisions."""
        for labels, decisions, test in zip(self.labels, self.decisions, self.test, strict=True):
            yield labels[test] == 1, decisions[test]

    def f1(self) -> Float[np.ndarray, "repeat depth"]:
        """F1 of label 1 on the test rows, 2 TP / (2 TP + FP + FN); 0 where label 1 is never predicted."""
        pairs = [(true[:, None], decisions > 0) for true, decisions in self._tested()]
        return np.array([2 * (true & said).sum(0) / np.maximum(true.sum() + said.sum(0), 1) for true, said in pairs])

    def auc(self) -> Float[np.ndarray, "repeat depth"]:
        """Area under the ROC curve on the test rows, from the rank sum of the 1s (Mann and Whitney); ties count a half."""
        scores = []
        for true, decisions in self._tested():
            ones, zeros = true.sum(), (~true).sum()
            ranks = rankdata(decisions, axis=0)
            scores.append((ranks[true].sum(0) - ones * (ones + 1) / 2) / (ones * zeros))
        return np.array(scores)

    def correct(self) -> tuple[Float[np.ndarray, "tested depth"], Bool[np.ndarray, " example"]]:
        """For each example tested at least once the share of its tests in which it was predicted rightly, and their mask."""
        times = self.test.sum(0)
        tested = times > 0
        right = (self.right & self.test[:, :, None]).sum(0)
        return right[tested] / times[tested, None], tested


def probe_depths(
    values: Float[np.ndarray, "example depth d_model"], labels: Shaped[np.ndarray, " example"],
    groups: Shaped[np.ndarray, " example"], *, texts: Shaped[np.ndarray, " example"] | None = None,
    splits: Bool[np.ndarray, "repeat example"] | None = None, repeats: int = 10, solver: str = "batched", control: bool = True,
    seed: int = 0, progress: bool = True,
) -> ProbeScores:  # fmt: skip
    """Fits a probe for each depth and split, and one on shuffled labels beside it (`.control`).

    Control task (Hewitt and Liang, arXiv 1909.03368): labels are permuted over the different texts, anew in each
    repeat, and the probe is fitted and tested on them. It should fall to the majority rate; its training accuracy says
    how much the probe can memorise.

    Args:
        values: may be memory-mapped: one depth at a time is read and turned into float64.
        texts: equal texts share one control label. None: every example is its own text.
        splits: True is test; None draws them with `group_splits(repeats, seed)`.
        solver: "batched" (`fit_batched`, all problems of a depth at once, converged) or "sklearn" (`fit_reference`).

    Raises:
        ValueError: equal texts with different labels, a given split that has a group on both sides or lacks a class on
            one, ...; before anything is fitted.

    >>> labels = np.arange(60) % 2
    >>> values = np.random.default_rng(0).normal(size=(60, 2, 5)) + np.array([0, 9])[:, None] * labels[:, None, None]
    >>> probe_depths(values, labels, np.arange(60), progress=False).accuracy().mean(0)[1].item()
    1.0
    """
    solver, (control,) = require.one_of("solver", solver, SOLVERS), require.flags(control=control)
    seed, labels = require.seed(seed), _labels(labels)
    if values.ndim != 3 or len(values) != len(labels):
        raise ValueError(f"values has shape {values.shape}: pass [example, depth, d_model] with {len(labels)} examples")
    if splits is None:
        splits = group_splits(labels, groups, repeats=repeats, seed=seed)
    splits = _checked_splits(splits, labels, groups)
    problems = np.broadcast_to(labels, splits.shape)
    if control:
        problems = np.concatenate([problems, _shuffled(labels, splits, texts, seed)])
    train = np.tile(~splits, (len(problems) // len(splits), 1))
    decisions = np.empty((len(problems), len(labels), values.shape[1]), np.float32)
    for depth in tqdm(range(values.shape[1]), desc="Fitting probes", unit="depth", disable=not progress, leave=False):
        states = np.asarray(values[:, depth], np.float64)
        if solver == "batched":
            decisions[:, :, depth] = fit_batched(states, problems.T, train.T).T
        else:
            for row, (y, rows) in enumerate(zip(problems, train, strict=True)):
                decisions[row, :, depth] = fit_reference(states, y, rows)
    repeats = len(splits)
    null = ProbeScores(decisions[repeats:], splits, problems[repeats:]) if control else None
    return ProbeScores(decisions[:repeats], splits, problems[:repeats], null)


def _shuffled(labels: np.ndarray, splits: np.ndarray, texts: np.ndarray | None, seed: int) -> np.ndarray:
    """Labels permuted over different texts, one permutation a repeat, both classes on both sides of its split."""
    codes, names = (np.arange(len(labels)),) * 2 if texts is None else pd.factorize(np.asarray(texts))
    if codes.shape != labels.shape:
        raise ValueError(f"texts has shape {codes.shape}, labels {labels.shape}: pass one text for each example")
    own = np.zeros(len(names), int)
    own[codes] = labels
    if both := int((own[codes] != labels).sum()):
        raise ValueError(f"{both} texts occur with both labels: give equal texts one label")
    rng = np.random.default_rng([seed, 1])  # not the stream of the splits
    rows = []
    for test in splits:
        for _ in range(_RETRIES):
            shuffled = rng.permutation(own)[codes]
            if _both(shuffled, test):
                rows.append(shuffled)
                break
        else:
            raise ValueError(f"no shuffle of {len(names)} texts had both classes on both sides: pass more examples")
    return np.stack(rows)


# --- what a probe must beat ----------------------------------------------------------------------------------------


def bag_of_words(
    texts: Shaped[np.ndarray, " example"], labels: Shaped[np.ndarray, " example"],
    splits: Bool[np.ndarray, "repeat example"],
) -> ProbeScores:  # fmt: skip
    """Logistic regression on word counts, for each split: what the words give away without a model; one depth.

    Words of the training texts only (CountVectorizer: lower case, one letter or digit or more).

    >>> texts = np.array(["good one", "bad one", "good two", "bad two"])
    >>> bag_of_words(texts, np.array([1, 0, 1, 0]), np.array([[False, False, True, True]])).accuracy().tolist()
    [[1.0]]
    """
    texts, labels = np.asarray(texts, object), _labels(labels)
    splits = _checked_splits(splits, labels)
    decisions = np.empty((*splits.shape, 1), np.float32)
    for test, decision in zip(splits, decisions, strict=True):
        model = make_pipeline(CountVectorizer(token_pattern=r"(?u)\b\w+\b"), LogisticRegression(max_iter=1000))
        decision[:, 0] = model.fit(texts[~test], labels[~test]).decision_function(texts)
    return ProbeScores(decisions, splits, np.broadcast_to(labels, splits.shape).copy())


def majority(labels: Shaped[np.ndarray, " example"], splits: Bool[np.ndarray, "repeat example"]) -> ProbeScores:
    """Always saying the training rows' more frequent label (1 where both are as frequent); scores with one depth.

    >>> splits = np.array([[False, False, False, True, True]])
    >>> majority(np.array([1, 1, 0, 1, 0]), splits).accuracy().tolist()
    [[0.5]]
    """
    labels = _labels(labels)
    splits = _checked_splits(splits, labels)
    says = np.array([1.0 if labels[~test].mean() >= 0.5 else -1.0 for test in splits], np.float32)
    decisions = np.repeat(says[:, None, None], len(labels), axis=1)
    return ProbeScores(decisions, splits, np.broadcast_to(labels, splits.shape).copy())


# --- checks --------------------------------------------------------------------------------------------------------


def _both(labels: np.ndarray, test: np.ndarray) -> bool:
    """Whether both classes are on both sides."""
    return all(len(set(labels[side])) == 2 for side in (test, ~test))


def _labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels has shape {labels.shape}: pass one label for each example")
    found = set(pd.unique(labels).tolist())
    if not found <= {0, 1}:
        raise ValueError(f"labels has the values {sorted(found, key=str)[:5]}: pass 0 and 1")
    if len(found) == 1:
        raise ValueError(f"all {len(labels)} labels are {found.pop()}: a probe needs examples of both classes")
    return labels.astype(int)


def _checked_splits(splits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    splits = np.asarray(splits)
    if splits.dtype != bool or splits.ndim != 2 or splits.shape[1] != len(labels) or not len(splits):
        what = f"booleans [repeat, example] for {len(labels)} examples"
        raise ValueError(f"splits is {splits.dtype} {splits.shape}: pass {what}")
    for repeat, test in enumerate(splits):
        if not _both(labels, test):
            raise ValueError(f"split {repeat} lacks a class on one side: draw splits with group_splits")
        shared = set() if groups is None else set(np.asarray(groups)[test]) & set(np.asarray(groups)[~test])
        if shared:
            raise ValueError(f"split {repeat} has group '{min(shared, key=str)}' on both sides: use group_splits")
    return splits


def _problem(states: np.ndarray, labels: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks one matrix of states with its labels and training rows, [example] or [example problem]."""
    states, labels, train = np.asarray(states), np.asarray(labels), np.asarray(train)
    if states.ndim != 2 or labels.shape != train.shape or len(labels) != len(states) or train.dtype != bool:
        raise ValueError(
            f"states {states.shape}, labels {labels.shape}, train {train.dtype} {train.shape}: pass [example, d_model] "
            "states, and labels and a boolean train mask of one shape with as many examples"
        )
    if bad := int((~np.isfinite(states)).sum()):
        raise ValueError(f"states has {bad} missing or infinite values: check the model first")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels has other values than 0 and 1: {np.setdiff1d(labels, (0, 1))[:5].tolist()}")
    ones, rows = (labels * train).sum(0), train.sum(0)
    if not np.all((ones > 0) & (ones < rows)):
        raise ValueError("a problem has one class only on its training rows: draw splits with group_splits")
    return states, labels, train
