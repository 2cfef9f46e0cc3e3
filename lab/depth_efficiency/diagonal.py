"""Is there a diagonal: does the best source of a linear map follow the target's depth? On plain arrays, no model, no torch."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from scipy.stats import rankdata

from lab import require
from lab.statistics import cluster_means

STATISTICS = {
    "slope": "best source's depth on the target's (fractions); 1 on the diagonal, 0 where one source is best for all; it "
             "alone does not tell a diagonal from a rise that saturates: see the gains",
    "spearman": "rank correlation of the same (0 where all best sources are equal)",
    "distance": "mean distance of the best source from the diagonal, |i/L1 - j/L2|",
    "distance_same_depth": "the same from the rival i = j, the same number of blocks",
    "distance_saturates": "the same from the rival i = min(j, L1)",
    "gain_over_same_depth": "rival minus diagonal: above 0 where the diagonal is nearer; 0 where L1 = L2",
    "gain_over_saturates": "the same for the other rival",
    "target_slope": "from the other side: best target of each source by R2(i, j) - mean over i of R2(i, j), which takes out "
                    "that some targets are easy for every source",
    "target_distance": "mean distance of that from the diagonal",
    "error_trend": "slope on j/L2 of the smallest relative error; the paper's argument for no new computation is that it "
                   "does not rise; a common mean that grows with depth lowers it for any map",
    "r2_trend": "the same of the largest R2, which a common mean does not raise",
}  # fmt: skip


def diagonal_test(
    sse: Float[np.ndarray, "document source target"], sst: Float[np.ndarray, "document target"],
    relative: Float[np.ndarray, "document source target"], n_tokens: Int[np.ndarray, " document"],
    groups: Shaped[np.ndarray, " document"], *, source_depths: Int[np.ndarray, " source"],
    target_depths: Int[np.ndarray, " target"], n_layers: tuple[int, int], draws: int = 1000, seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Statistics of the best sources (`STATISTICS`), and the best source of each target depth.

    For each target j the best source is i(j) = argmax over i of R2(i, j). Depth 0 of both is left out, as published:
    embeddings give each other trivially. Intervals: a bootstrap over whole groups of documents, in which the best
    sources are chosen anew. The null: 1,000 shuffles of the target labels; nan where a shuffle means nothing.
    """
    _check(sse, sst, relative, n_tokens, source_depths, target_depths)
    draws, seed = require.whole("draws", draws, 1), require.seed(seed)
    rows, columns = source_depths > 0, target_depths > 0
    x, target = source_depths[rows] / n_layers[0], target_depths[columns]
    y = target / n_layers[1]
    sse, relative = (values[:, rows][:, :, columns] for values in (sse, relative))
    wide = [np.broadcast_to(part, sse.shape) for part in (sst[:, None, columns], n_tokens[:, None, None].astype(float))]
    # sums of each document side by side: a resampled ratio of sums is the ratio of their resampled means
    parts = np.stack([sse, wide[0], relative, wide[1]], 1)
    drawn = cluster_means(parts, groups, draws=draws, seed=seed)
    sums = np.concatenate([parts.mean(0)[None], drawn])  # row 0 is the measured one
    r2, error = 1 - sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]  # [draw source target]
    best, own_targets = r2.argmax(1), (r2 - r2.mean(1, keepdims=True)).argmax(2)  # [draw target], [draw source]
    found, theirs, lowest, highest = x[best], y[own_targets], error.min(1), r2.max(1)
    # in fractions of the source's depth; i = j may lie past the source's last depth
    rivals = {"same_depth": target / n_layers[0], "saturates": np.minimum(target, n_layers[0]) / n_layers[0]}
    far = {name: _distance(rival, found) for name, rival in rivals.items()}
    measured: dict[str, tuple[Callable[..., np.ndarray], np.ndarray, np.ndarray]] = {
        "slope": (_slope, y, found), "spearman": (_spearman, y, found), "distance": (_distance, y, found),
        "target_slope": (_slope, x, theirs), "target_distance": (_distance, x, theirs),
        "error_trend": (_slope, y, lowest), "r2_trend": (_slope, y, highest),
    }  # fmt: skip
    values = {name: of(*axes) for name, (of, *axes) in measured.items()}
    values |= {f"distance_{name}": distance for name, distance in far.items()}
    values |= {f"gain_over_{name}": distance - values["distance"] for name, distance in far.items()}

    source, r2s, errors = map(_interval, (found, highest, lowest))
    table = {
        "target_depth": target, "relative_target": y, "source_depth": source_depths[rows][best[0]],
        "relative_source": found[0], "source_low": source[0], "source_high": source[1], "r2": highest[0],
        "r2_low": r2s[0], "r2_high": r2s[1], "relative_error": lowest[0], "error_low": errors[0], "error_high": errors[1],
    }  # fmt: skip
    rng = np.random.default_rng([seed, 1])
    shuffles = np.stack([rng.permutation(len(target)) for _ in range(1000)])
    shuffled = {"source": found[0][shuffles], "target": y[shuffles][:, own_targets[0]]}
    n_groups, lines = len(pd.unique(np.asarray(groups))), []
    for name in STATISTICS:
        here, mean, p = values[name], np.nan, np.nan
        if name in ("slope", "spearman", "distance", "target_slope", "target_distance"):
            sign, (of, at, _) = -1 if name.endswith("distance") else 1, measured[name]
            null = sign * of(at, shuffled["target" if name.startswith("target") else "source"])
            mean, p = sign * null.mean(), (1 + (null >= sign * here[0] - 1e-12).sum()) / 1001
        lines.append((name, here[0], *_interval(here), mean, p, n_groups))
    names = ["statistic", "estimate", "low", "high", "null_mean", "null_p", "n_groups"]
    return pd.DataFrame(lines, columns=names), pd.DataFrame(table)


def _check(*arrays: np.ndarray) -> None:
    sse, sst, relative, n_tokens, sources, targets = arrays
    shape = (len(sse), len(sources), len(targets))
    if sse.shape != shape or relative.shape != shape or sst.shape != (shape[0], shape[2]) or len(n_tokens) != shape[0]:
        raise ValueError(
            f"sse {sse.shape}, relative {relative.shape}, sst {sst.shape}, n_tokens {n_tokens.shape}: pass [document, "
            f"source, target] for {shape[1]} source and {shape[2]} target depths"
        )
    if min((sources > 0).sum(), (targets > 0).sum()) < 2:
        raise ValueError(
            f"source depths {sources.tolist()}, target depths {targets.tolist()}: the test needs at least two depths above "
            "0 of each"
        )


def _interval(values: np.ndarray) -> np.ndarray:
    """Ends of the percentile interval: row 0 is the measured one, the others are draws."""
    return np.quantile(values[1:], [(1 - 0.95) / 2, (1 + 0.95) / 2], axis=0)


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean distance of each row of y [draw point] from x [point]."""
    return np.abs(y - x).mean(1)


def _slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of each row of y [draw point] on x [point]."""
    centred = x - x.mean()
    return (y - y.mean(1, keepdims=True)) @ centred / (centred @ centred)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of y with x, ties at their mean rank; 0 for a row of equal values."""
    a, b = rankdata(x), rankdata(y, axis=1)
    a, b = a - a.mean(), b - b.mean(1, keepdims=True)
    size = np.sqrt((a @ a) * np.square(b).sum(1))
    return np.divide(b @ a, size, out=np.zeros(len(b)), where=size > 0)
