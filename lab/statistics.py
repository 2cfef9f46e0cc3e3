"""Numbers about depth, on plain arrays: where a concept becomes readable, and how sure we are. No model, no torch.

Axes: `layer` counts a published curve, `depth` the columns of our own measurements, `example` the statements, `draw` the
bootstrap draws. Examples of a group (one subject) are not independent, so every interval resamples whole groups.
Column 0 of `[example depth]` is depth `first_depth`: 0 with the embedding (depths 0..L), 1 without; a fraction is depth / L.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from scipy import stats

from lab import require

_TIE = 1e-9  # a rate that misses its threshold by rounding alone reaches it: 0.11 / 0.10 is a rise by 10 %


class Interval(NamedTuple):
    """An estimate with the two ends of its interval; each a float or an array of one shape."""

    estimate: np.ndarray | float
    low: np.ndarray | float
    high: np.ndarray | float


class Peak(NamedTuple):
    """Peak accuracy over depths: `crossfit` (depth chosen on other groups), `naive` (same data), `depths` chosen."""

    crossfit: float
    naive: float
    depths: np.ndarray


# --- the two published numbers -------------------------------------------------------------------------------------


def jump_point(accuracy: Shaped[np.ndarray, " layer"], ratio: float = 1.1) -> float:
    """First layer, as a fraction of depth, whose accuracy is at least `ratio` times that of the layer before.

    min{ i/d : a_i / a_(i-1) >= ratio } with layers 1..d (after Jin et al., arXiv 2404.07066; no published value fixes the
    numbering: it is our reading). nan where no layer qualifies; after an accuracy of 0 any rise does. It does not show that the
    concept is readable there: 0.40 to 0.45 counts, 0.90 to 0.98 does not.

    >>> jump_point(np.array([0.5, 0.5, 0.6, 0.9])), jump_point(np.array([0.8, 0.8, 0.81]))
    (0.75, nan)
    """
    return float(_jump(_curve(accuracy), require.number("ratio", ratio, above=1)))


def converging_point(accuracy: Shaped[np.ndarray, " layer"], tolerance: float = 0.03) -> float:
    """First layer, as a fraction of depth, after the last change of accuracy by `tolerance` or more.

    min(d, 2 + max{ k : |a_k / a_(k-1) - 1| >= tolerance }) / d for entries k = 0..d-1, and min(d, 3) / d where no entry changes
    that much. Recovered from the plotted values of Jin et al. (arXiv 2404.07066): it reproduces all curves that could be read.
    It does not show where accuracy is high: one late wiggle moves it to 1.0, and a flat curve at chance converges at once.

    >>> converging_point(np.array([0.5, 0.6, 0.9, 0.91, 0.91, 0.9, 0.91, 0.91]))
    0.5
    """
    return float(_converging(_curve(accuracy), require.number("tolerance", tolerance, above=0)))


def _jump(curves: np.ndarray, ratio: float) -> np.ndarray | float:
    """`jump_point` over the last axis."""
    hit = _rates(curves) >= ratio - _TIE
    return np.where(hit.any(-1), (hit.argmax(-1) + 2) / curves.shape[-1], np.nan)


def _converging(curves: np.ndarray, tolerance: float) -> np.ndarray | float:
    """`converging_point` over the last axis."""
    layers = curves.shape[-1]
    moved = np.abs(_rates(curves) - 1) >= tolerance - _TIE
    last = np.where(moved.any(-1), layers - 1 - moved[..., ::-1].argmax(-1), 1)  # entry k of the last change
    return np.minimum(layers, last + 2) / layers


def _rates(curves: np.ndarray) -> np.ndarray:
    """a_k / a_(k-1) for k >= 1; from 0 the rate is 1 if nothing changed, else infinite."""
    before, after = curves[..., :-1], curves[..., 1:]
    from_zero = np.where(after > 0, np.inf, 1.0)
    return np.divide(after, before, out=from_zero, where=before > 0)


# --- intervals -----------------------------------------------------------------------------------------------------


def corrected_interval(
    values: Shaped[np.ndarray, "repeat ..."], test_fraction: float, confidence: float = 0.95
) -> Interval:
    """Mean score over repeated random splits of one data set, with the interval for overlapping training sets.

    Corrected resampled t: mean +- t(R-1) * sqrt(variance * (1/R + n_test/n_train)) (Nadeau and Bengio, Machine Learning 52,
    2003); further axes of `values` one by one; of one repeat the ends are nan. It does not cover another choice of statements.

    >>> [round(float(x), 3) for x in corrected_interval(np.array([0.7, 0.8, 0.9]), test_fraction=0.4)]
    [0.8, 0.37, 1.23]
    """
    values = _finite(values, "values")
    require.fraction("test_fraction", test_fraction)
    require.fraction("confidence", confidence)
    repeats = len(values)
    mean = values.mean(0)
    if repeats == 1:  # one split says nothing about the spread over splits
        return Interval(mean, np.full_like(mean, np.nan)[()], np.full_like(mean, np.nan)[()])
    error = values.std(0, ddof=1) * np.sqrt(1 / repeats + test_fraction / (1 - test_fraction))
    half = stats.t.ppf((1 + confidence) / 2, repeats - 1) * error
    return Interval(mean, mean - half, mean + half)


def cluster_means(
    values: Shaped[np.ndarray, "example ..."], groups: Shaped[np.ndarray, " example"], *, draws: int = 1000, seed: int
) -> Float[np.ndarray, "draw ..."]:
    """Bootstrap draws of the mean over examples, whole groups resampled with replacement; by one matrix product.

    The same seed, groups and draws give the same resampled groups, so draws of two arrays of the same examples are paired.
    """
    return _Clusters(values, groups).resample(draws, seed)[0]


def holm(p: Shaped[np.ndarray, " test"]) -> Shaped[np.ndarray, " test"]:
    """Holm's step-down correction: the k-th smallest of m p-values times m - k + 1, never below the one before, at most 1.

    Tests without a p (nan) are not counted and stay nan.

    >>> holm(np.array([0.01, 0.04, np.nan, 0.03])).tolist()
    [0.03, 0.06, nan, 0.06]
    """
    corrected, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def rounded(frame: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """A table to be read: numbers rounded, and a p that would read 0 written as what it is below.

    >>> rounded(pd.DataFrame({"p_holm": [0.00004, 0.12345]})).p_holm.tolist()
    ['< 0.001', 0.123]
    """
    shown = frame.round(digits)
    for column in {"p", "p_holm"} & set(frame):
        small = frame[column] < 10**-digits
        shown[column] = shown[column].astype(object).where(~small, f"< {10**-digits:.{digits}f}")
    return shown


def cluster_bootstrap(
    values: Shaped[np.ndarray, "example ..."],
    groups: Shaped[np.ndarray, " example"],
    statistic: Callable[[np.ndarray], np.ndarray | float] | None = None,
    *,
    draws: int = 1000,
    seed: int,
    confidence: float = 0.95,
) -> Interval:
    """A statistic of the examples with its percentile interval, whole groups resampled with replacement.

    Args:
        groups: at least two different ones; with fewer than about 20 the interval is too narrow.
        statistic: function of an array [example, ...] of any length; None is the mean, which needs no loop over draws.

    >>> correct, city = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]), np.array(["a", "a", "b", "b", "c", "c"])
    >>> [round(float(x), 2) for x in cluster_bootstrap(correct, city, seed=0)]
    [0.67, 0.0, 1.0]
    """
    clusters = _Clusters(values, groups)
    if statistic is None:
        return _percentiles(clusters.mean, clusters.resample(draws, seed)[0], confidence)
    values = np.asarray(values, float)
    members = np.split(np.argsort(clusters.codes, kind="stable"), np.cumsum(clusters.sizes)[:-1].astype(int))
    drawn = [
        statistic(values[np.concatenate([m for m, times in zip(members, row, strict=True) for _ in range(times)])])
        for row in _counts(len(members), draws, seed)
    ]
    return _percentiles(statistic(values), np.asarray(drawn), confidence)


def cluster_standard_error(
    values: Shaped[np.ndarray, "example ..."], groups: Shaped[np.ndarray, " example"]
) -> Float[np.ndarray, "..."]:
    """Standard error of the mean over examples that come in groups.

    sqrt( G/(G-1) * sum over groups of (sum of residuals in the group)^2 ) / n, the linearised ("sandwich") form.

    >>> float(cluster_standard_error(np.array([1.0, 1.0, 0.0, 0.0]), np.array(["a", "a", "b", "b"])))
    0.5
    """
    return _Clusters(values, groups).standard_error()


class _Clusters:
    """Sums per group, [group, ...]: all that a resampled mean and its standard error need."""

    def __init__(self, values: np.ndarray, groups: np.ndarray) -> None:
        values, groups = _finite(values, "values"), np.asarray(groups)
        if groups.shape != values.shape[:1]:
            raise ValueError(f"groups has shape {groups.shape}, values {values.shape}: pass one group for each example")
        if pd.isna(groups).any():
            raise ValueError(f"{int(pd.isna(groups).sum())} examples have no group: give each its own name instead")
        self.codes, names = pd.factorize(groups)
        if len(names) < 2:
            raise ValueError(f"all {len(groups)} examples are in one group: resampling needs at least 2 groups")
        self.shape = values.shape[1:]
        self.sizes = np.bincount(self.codes).astype(float)  # [group]
        self.sums = np.zeros((len(names), int(np.prod(self.shape))))  # [group value]
        np.add.at(self.sums, self.codes, values.reshape(len(values), -1))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def mean(self) -> np.ndarray:
        return (self.sums.sum(0) / self.sizes.sum()).reshape(self.shape)

    def standard_error(self) -> np.ndarray:
        return self._weighted(np.ones((1, len(self))))[1].reshape(self.shape)

    def resample(self, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Means and their standard errors, both [draw, ...]."""
        means, errors = self._weighted(_counts(len(self), draws, seed).astype(float))
        return means.reshape(draws, *self.shape), errors.reshape(draws, *self.shape)

    def _weighted(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard error where group g counts weights[draw, g] times."""
        n = (weights @ self.sizes)[:, None]
        mean = weights @ self.sums / n
        squares = weights @ self.sums**2 - 2 * mean * (weights @ (self.sums * self.sizes[:, None]))
        squares += mean**2 * (weights @ self.sizes**2)[:, None]
        groups = len(self)
        return mean, np.sqrt(groups / (groups - 1) * np.maximum(squares, 0)) / n


def _counts(groups: int, draws: int, seed: int) -> np.ndarray:
    """How often each group is drawn, [draw group]."""
    draws = require.whole("draws", draws, 1, hint=" (1000 for an interval)")
    return np.random.default_rng(require.seed(seed)).multinomial(groups, np.full(groups, 1 / groups), size=draws)


def _percentiles(estimate: np.ndarray | float, drawn: np.ndarray, confidence: float) -> Interval:
    require.fraction("confidence", confidence)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return Interval(np.asarray(estimate)[()], low, high)  # a number, not an array without axes


# --- points on the depth axis, with intervals ----------------------------------------------------------------------


def depth_points(
    correct: Shaped[np.ndarray, "example depth"],
    groups: Shaped[np.ndarray, " example"],
    *,
    first_depth: int = 0,
    ratio: float = 1.1,
    tolerance: float = 0.03,
    above: float | None = None,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Jump, converging and readable point of one probe, and its onset, with intervals from one bootstrap over groups.

    `onset` is the first depth from which on mean accuracy stays above `above`, what a control reaches by chance (none without
    it): where reading begins. `readable_depth`, where its plateau begins, is the first depth whose mean accuracy is within one
    standard error (`cluster_standard_error`) of the peak: ours, robust against a late wiggle. On a curve at chance it says where
    chance is reached, so look at the control first. The two published points are computed on depths 1..L, so that all are
    depth / L.

    Returns:
        One row a point: estimate, low, high (fractions of depth, over the draws where the point exists), n_groups, undefined
        (share of draws without it).

    >>> correct = np.tile([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]], (10, 1))
    >>> depth_points(correct, np.arange(40))["estimate"].round(2).to_dict()
    {'jump_point': 0.67, 'converging_point': 1.0, 'readable_depth': 0.67}
    """
    correct, depths = _correct(correct, first_depth)
    require.number("ratio", ratio, above=1)
    require.number("tolerance", tolerance, above=0)
    require.fraction("confidence", confidence)
    clusters = _Clusters(correct, groups)

    def points(mean: np.ndarray, error: np.ndarray) -> np.ndarray:
        """[draw depth] twice in, [point draw] out."""
        peak = mean.argmax(-1, keepdims=True)
        floor = np.take_along_axis(mean - error, peak, -1)
        readable = depths[(mean >= floor - _TIE).argmax(-1)] / depths[-1]
        published = mean[:, depths >= 1]
        found = [_jump(published, ratio), _converging(published, tolerance), readable]
        return np.stack(found if above is None else [*found, _onset(mean, depths, above)])

    estimate = points(clusters.mean[None], clusters.standard_error()[None])[:, 0]
    rows = []
    for value, drawn in zip(estimate, points(*clusters.resample(draws, seed)), strict=True):
        found = drawn[np.isfinite(drawn)]
        low, high = _percentiles(value, found, confidence)[1:] if len(found) else (np.nan, np.nan)
        rows.append((value, low, high, len(clusters), 1 - len(found) / draws))
    names = ["jump_point", "converging_point", "readable_depth", "onset"][: len(rows)]
    return pd.DataFrame(rows, pd.Index(names, name="point"), ["estimate", "low", "high", "n_groups", "undefined"])


def _onset(mean: np.ndarray, depths: np.ndarray, above: float) -> np.ndarray:
    """[draw depth] to [draw]: fraction of depth after the last depth that is not above; nan where that is the last one."""
    below = mean <= above
    last = mean.shape[-1] - 1 - below[..., ::-1].argmax(-1)  # the last depth that is not above, where there is one
    first = np.where(below.any(-1), last + 1, 0)
    return np.where(first < len(depths), depths[np.minimum(first, len(depths) - 1)] / depths[-1], np.nan)


def crossfit_peak(
    correct: Shaped[np.ndarray, "example depth"],
    groups: Shaped[np.ndarray, " example"],
    *,
    halves: int = 20,
    seed: int = 0,
) -> Peak:
    """Peak accuracy over depths, the depth chosen on half of the groups and its accuracy read on the other half.

    The maximum of a noisy curve is too high, because the noise helps to choose it. Both directions of `halves` random halvings
    are averaged; `depths` [2 * halves] are the chosen columns: if they scatter, the peak's place is not known.

    >>> peak = crossfit_peak(np.random.default_rng(0).integers(0, 2, size=(40, 30)), np.arange(40))
    >>> round(peak.naive, 3), round(peak.crossfit, 2)
    (0.7, 0.56)
    """
    clusters = _Clusters(_correct(correct, 0)[0], groups)
    halves, rng = require.whole("halves", halves, 1), np.random.default_rng(require.seed(seed))
    first = np.argsort(rng.random((halves, len(clusters))), axis=1) < len(clusters) // 2
    choose = np.concatenate([first, ~first]).astype(float)  # [direction group]
    curves = [w @ clusters.sums / (w @ clusters.sizes)[:, None] for w in (choose, 1 - choose)]
    chosen = curves[0].argmax(1)
    return Peak(float(curves[1][np.arange(len(chosen)), chosen].mean()), float(clusters.mean.max()), chosen)


def selectivity(real: Shaped[np.ndarray, "..."], control: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Accuracy on the real labels minus accuracy on the shuffled ones (Hewitt and Liang, arXiv 1909.03368).

    >>> selectivity(np.array([0.9, 0.5]), np.array([0.5, 0.5])).tolist()
    [0.4, 0.0]
    """
    real, control = _finite(real, "real"), _finite(control, "control")
    if real.shape != control.shape:
        raise ValueError(f"real has shape {real.shape}, control {control.shape}: pass the same repeats and depths")
    for name, scores in (("real", real), ("control", control)):
        _unit(scores, name)
    return real - control


def paired_difference(
    a: Shaped[np.ndarray, "example depth_a"],
    b: Shaped[np.ndarray, "example depth_b"],
    groups: Shaped[np.ndarray, " example"],
    *,
    first_depth: int = 0,
    points: int = 21,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Accuracy of model a minus that of model b on the same examples, at equal fractions of depth.

    Both curves are interpolated linearly to `points` fractions; each draw takes the same groups for both models. The interval
    holds for each point by itself, not for all at once. `a`, `b`: the same examples in the same order, any number of depths.

    >>> a, b = np.array([[0, 1, 1], [0, 0, 1]]), np.array([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
    >>> paired_difference(a, b, np.array(["x", "y"]), points=3, draws=50)["difference"].tolist()
    [0.0, 0.0, 0.0]
    """
    (a, depths_a), (b, depths_b) = _correct(a, first_depth, "a"), _correct(b, first_depth, "b")
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} examples, b has {len(b)}: a paired difference needs the same items")
    points = require.whole("points", points, 2)
    fractions_a, fractions_b = depths_a / depths_a[-1], depths_b / depths_b[-1]
    grid = np.linspace(max(fractions_a[0], fractions_b[0]), 1, points)
    # linear, so interpolating each example's row is interpolating the mean
    both = np.stack(
        [values @ _interpolation(old, grid) for values, old in ((a, fractions_a), (b, fractions_b))], axis=1
    )  # [example model point]
    clusters = _Clusters(both, groups)
    drawn = clusters.resample(draws, seed)[0]
    mean = clusters.mean
    difference, low, high = _percentiles(mean[0] - mean[1], drawn[:, 0] - drawn[:, 1], confidence)
    columns = {"fraction": grid, "a": mean[0], "b": mean[1], "difference": difference, "low": low, "high": high}
    return pd.DataFrame(columns)


def _interpolation(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Matrix [old new] of linear interpolation."""
    return np.stack([np.interp(new, old, unit) for unit in np.eye(len(old))])


# --- checks --------------------------------------------------------------------------------------------------------


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim == 0 or values.size == 0:
        raise ValueError(f"{name} has shape {values.shape}: pass a non-empty array")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name} has {bad} missing or infinite value(s): leave out what was not measured first")
    return values


def _unit(values: np.ndarray, name: str) -> np.ndarray:
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"{name} runs from {values.min():g} to {values.max():g}: pass fractions in [0, 1], not percent"
        )
    return values


def _curve(accuracy: np.ndarray) -> np.ndarray:
    accuracy = np.asarray(accuracy, float)
    if accuracy.ndim != 1 or len(accuracy) < 2:
        raise ValueError(f"accuracy has shape {accuracy.shape}: pass one value per layer, for at least 2 layers")
    return _unit(_finite(accuracy, "accuracy"), "accuracy")


def _correct(correct: np.ndarray, first_depth: int, name: str = "correct") -> tuple[np.ndarray, np.ndarray]:
    """Checked [example depth] and the depth of each column."""
    if first_depth not in (0, 1):
        raise ValueError(f"first_depth={first_depth}: pass 0 (column 0 is the embedding) or 1 (it is the first layer)")
    correct = np.asarray(correct, float)
    least = 3 - first_depth  # two layers make a curve
    if correct.ndim != 2 or correct.shape[1] < least:
        raise ValueError(f"{name} has shape {correct.shape}: pass [example, depth] with at least {least} depths")
    return _unit(_finite(correct, name), name), first_depth + np.arange(correct.shape[1])
