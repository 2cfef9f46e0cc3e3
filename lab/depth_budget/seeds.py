"""Small nets trained again with other seeds: means over seeds, and differences paired by seed, with t intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from lab.statistics import Interval, holm

HOW = "t over seeds, paired; p Holm-corrected over the rows of the table"
COLUMNS = {
    "seed": "of the split of the documents, the weights and the stretches or examples; runs of one seed are paired",
    "mean": "mean over seeds",
    "low": "lower end of the 95 % t interval over seeds",
    "high": "upper end of that interval",
    "against": "what a difference is against; runs of one seed are paired",
    "difference": "mean over seeds of the paired difference, row minus what it is against",
    "difference_low": "lower end of the 95 % paired t interval over seeds",
    "difference_high": "upper end of that interval",
    "p": "paired t test over seeds of no difference",
    "p_holm": "p, Holm-corrected over the rows of this table that have one",
    "n_seeds": "number of seeds",
}


def t_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of independent runs with its 95 % interval; of one run the ends are nan.

    >>> [round(float(x), 3) for x in t_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    found = np.asarray(values, float)
    if len(found) < 2:
        return Interval(found.mean(), np.nan, np.nan)
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5
    return Interval(found.mean(), found.mean() - half, found.mean() + half)


def compared(runs: pd.DataFrame, pairs: Sequence[tuple[str, str | None]]) -> pd.DataFrame:
    """A row for each (name, against): of runs [seed, name] the mean, and its paired difference from the other; None: none."""
    rows = []
    for name, against in pairs:
        row = [name, *map(float, t_interval(runs[name].to_numpy(float)))]
        if against is None:
            rows.append([*row, "", *[np.nan] * 4])
            continue
        difference = (runs[name] - runs[against]).to_numpy()
        same = len(difference) < 2 or difference.std() == 0
        p = np.nan if same else float(stats.ttest_1samp(difference, 0).pvalue)
        rows.append([*row, against, *map(float, t_interval(difference)), p])
    names = ["name", "mean", "low", "high", "against", "difference", "difference_low", "difference_high", "p"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(p_holm=holm(table.p.to_numpy(float)), n_seeds=len(runs))
