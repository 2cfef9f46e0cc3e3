"""Numbers about transfer, on plain tables: what freezing a net's first n blocks costs, and what of it is specific. No torch.

A table of runs, ours or published, has one row a (task, distance, split, seed, target, treatment, part, n, metric): `target` is
the half trained and tested on; `part` what was copied: "none", "embedding", or "blocks" (the first n, and the embedding with
them). Treatments are in `TREATMENTS`. Accuracy alone says little: every number below is a difference of two treatments for the
same split, seed and target. Splits with their seeds are resampled; where seeds share a split's classes, `cluster=("split",)` is
the cautious choice.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from scipy import stats

from lab import statistics

TREATMENTS = {  # after Yosinski et al. (arXiv 1411.1792)
    "base": "a fresh net, trained",
    "base2": "the base trained for as many steps again: what the plus nets had",
    "BnB": "first n blocks from the base of the same half, frozen; the rest fresh, trained",
    "AnB": "the same from the base of the other half",
    "BnB_plus": "as BnB, but the copied blocks are trained, too",
    "AnB_plus": "as AnB, but the copied blocks are trained, too",
    "random": "first n blocks random and frozen",
    "random_matched": "the same with sizes as in the other half's base",
}
# Each curve is treatment 1 minus treatment 2. A base has no n: it is paired with the other at every n.
CURVES = {
    "co_adaptation": ("base", "BnB"),
    "specificity": ("BnB", "AnB"),
    "recovery": ("BnB_plus", "BnB"),
    "boost": ("AnB_plus", "BnB_plus"),
    "transfer_loss": ("base", "AnB"),
    "random_loss": ("base", "random"),
    "random_matched_loss": ("base", "random_matched"),
    "over_random": ("AnB", "random"),
    "over_random_matched": ("AnB", "random_matched"),
    "self_gain": ("BnB_plus", "base"),
    "transfer_gain": ("AnB_plus", "base"),
    "transfer_gain_over_base2": ("AnB_plus", "base2"),
    "more_training": ("base2", "base"),
}
BASES = ("base", "base2")
CLUSTER = ("split", "seed")
_GROUP = ["task", "distance"]
_PAIR = [*_GROUP, "split", "seed", "target", "metric"]
_AT = ["part", "n"]
_LOWER_IS_BETTER = ("nll", "train_loss")
CURVE_COLUMNS = [
    *(*_GROUP, "metric", "curve", *_AT, "estimate", "low", "high", "boot_low", "boot_high", "p", "n_pairs"),
    *("n_clusters", "p_holm"),
]


def differences(table: pd.DataFrame, curves: Mapping[str, tuple[str, str]] = CURVES) -> pd.DataFrame:
    """Paired differences of runs whose bases `passed`: curve, task, distance, split, seed, target, metric, part, n, difference.

    Accuracy: treatment 1 minus treatment 2, as a fraction. nll (nats): with the sign turned, so that positive is better in
    both. A run without its partner gives no row: in the published logs, boost has none.
    """
    _check(table)
    parts = []
    for name, (first, second) in curves.items():
        ones, twos = (table[table.treatment == treatment] for treatment in (first, second))
        at = [] if first in BASES or second in BASES else _AT
        if not at and first in BASES and second not in BASES:  # the one that has an n gives it
            ones = ones.drop(columns=_AT)
        elif not at:
            twos = twos.drop(columns=_AT)
        both = ones.merge(twos, on=[*_PAIR, *at], suffixes=("_1", "_2"))
        sign = np.where(both.metric.isin(_LOWER_IS_BETTER), -1.0, 1.0)
        both = both.assign(curve=name, difference=sign * (both.value_1 - both.value_2))
        parts.append(both[["curve", *_PAIR, *_AT, "difference"]])
    return pd.concat(parts, ignore_index=True)


def curves(
    table: pd.DataFrame,
    names: Mapping[str, tuple[str, str]] = CURVES,
    *,
    cluster: Sequence[str] = CLUSTER,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Every curve with its interval at each n, from paired differences averaged within a cluster (columns of `cluster`).

    `low`, `high`: Student's t on the cluster means; use these. `boot_low`, `boot_high`: percentiles of a bootstrap over
    clusters. With 4 to 8 clusters the second is too narrow (normal data: the 95 % interval covers 80 % with 4 clusters and
    89 % with 8; t covers 95 %), because a resampled variance is (C - 1) / C of the right one and the percentiles take the
    normal's tails for Student's. Both count the spread over splits and seeds, in which the noise of finite test sets is
    contained. p: two-sided t test against 0; p_holm: over the n of a curve, for part "blocks" only. One cluster: nan.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: pass a fraction between 0 and 1, ends excluded")
    pairs = differences(table, names)
    if pairs.empty:
        raise ValueError(
            "no two runs could be paired: if every base failed its gate there is nothing to compare (look at "
            '.tables["gate"]); else give runs of the same split, seed and target'
        )
    key = [*_GROUP, "metric", "curve", *_AT]
    found = _by(pairs, key, "difference", cluster, confidence, draws, seed).rename(columns={"n_runs": "n_pairs"})
    blocks = with_holm(found[found.part == "blocks"], [*_GROUP, "metric", "curve"])
    found = found.assign(p_holm=blocks.p_holm.reindex(found.index))
    order = {"curve": [*names], "part": ["none", "embedding", "blocks"]}
    return found.sort_values(
        key, key=lambda c: c.map(order[c.name].index) if c.name in order else c, kind="stable", ignore_index=True
    )


def levels(
    table: pd.DataFrame, *, cluster: Sequence[str] = CLUSTER, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Mean of every treatment at each n, with the intervals of `curves`: for drawing, not for comparing.

    Splits differ in difficulty, so these intervals are much wider than those of paired differences.
    """
    _check(table)
    key = [*_GROUP, "metric", "treatment", *_AT]
    return _by(table, key, "value", cluster, confidence, draws, seed).drop(columns="p")


def n_star(found: pd.DataFrame, *, curve: str = "specificity", level: float = 0.05) -> pd.DataFrame:
    """From which n on features are specific: the first n whose interval lies above 0, there and at all larger n.

    One row a (task, distance, metric): n_star; n_star_holm (a positive estimate with p_holm below `level`, instead of the
    interval; nan where there is none); n_max (largest n measured); n_clusters. Nothing can be said about n that were not
    measured, and "none" may only mean too few splits.
    """
    rows = []
    chosen = found[(found.curve == curve) & (found.part == "blocks")]
    for at, part in chosen.groupby([*_GROUP, "metric"]):
        part = part.sort_values("n")
        first = []
        for above in (part.low > 0, (part.p_holm < level) & (part.estimate > 0)):
            onward = above[::-1].cumprod()[::-1].to_numpy(bool)  # there and at all larger n
            first.append(float(part.n.to_numpy()[onward.argmax()]) if onward.any() else np.nan)
        rows.append((*at, *first, int(part.n.max()), int(part.n_clusters.max())))
    return pd.DataFrame(rows, columns=[*_GROUP, "metric", "n_star", "n_star_holm", "n_max", "n_clusters"])


def paired_and_unpaired(table: pd.DataFrame, treatments: Sequence[str] = ("BnB_plus", "AnB_plus")) -> pd.DataFrame:
    """Gain of treatments over the base, mean over n: `unpaired` against the mean of all bases, `paired` each against its own.

    The first is how the published curves are drawn. Where a treatment's runs cover hard or easy targets more often than
    the bases do, it says how hard those targets are, not what the treatment is worth.

    >>> gains = paired_and_unpaired(published())
    >>> (100 * gains.set_index("treatment")[["unpaired", "paired"]]).round(2).to_dict("index")
    {'BnB_plus': {'unpaired': 0.11, 'paired': 0.94}, 'AnB_plus': {'unpaired': 1.67, 'paired': 0.97}}
    """
    _check(table)
    rows = []
    for at, part in table[table.part.isin(("none", "blocks"))].groupby([*_GROUP, "metric"], sort=False):
        base = part[part.treatment == "base"]
        for treatment in treatments:
            runs = part[(part.treatment == treatment) & (part.part == "blocks")]
            if runs.empty:
                continue
            own = runs.merge(base, on=_PAIR, suffixes=("", "_base"))
            sign = -1.0 if at[-1] in _LOWER_IS_BETTER else 1.0
            unpaired = runs.groupby("n").value.mean().mean() - base.value.mean()
            paired = (own.value - own.value_base).groupby(own.n).mean().mean()
            rows.append((*at, treatment, sign * unpaired, sign * paired, len(runs)))
    return pd.DataFrame(rows, columns=[*_GROUP, "metric", "treatment", "unpaired", "paired", "n_runs"])


def flips(items: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Test items on which two runs (columns of `items`, see `run_name`) of one split, seed and target disagree about being right.

    n, right_to_wrong (right in the first, wrong in the second), wrong_to_right, p (exact sign test over the items that
    flip). A small p says that these two nets differ; another initialisation would, too.
    """
    about = [*_PAIR[:-1], "item", "label"]
    for name in (first, second):
        if name not in items or name in about:
            runs = [column for column in items if column not in about]
            raise ValueError(f"no run {name!r} among the items; runs are {', '.join(runs)}")
    rows = []
    for at, part in items.groupby(_PAIR[:-1], sort=False):
        part = part[part[first].notna() & part[second].notna()]
        one, two = (part[name].to_numpy() == part.label.to_numpy() for name in (first, second))
        lost, won = int((one & ~two).sum()), int((~one & two).sum())
        p = float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
        rows.append((*at, len(part), lost, won, p))
    return pd.DataFrame(rows, columns=[*_PAIR[:-1], "n", "right_to_wrong", "wrong_to_right", "p"])


def verdict(side: int, low: float, high: float, margin: float = 0.02) -> str:
    """Our interval beside a published sign (+1, -1, or 0 for "no difference"): "agrees", "differs" or "open".

    With a sign, "open" is an interval that holds 0. "No difference" agrees only where the whole interval lies within
    `margin` of 0 (in the interval's units); an interval that holds 0 and reaches further is "open".

    >>> verdict(1, 0.2, 0.4), verdict(1, -0.1, 0.4), verdict(-1, 0.2, 0.4), verdict(0, -0.1, 0.4), verdict(0, -0.01, 0.01)
    ('agrees', 'open', 'differs', 'open', 'agrees')
    """
    if side == 0:
        if low > 0 or high < 0:
            return "differs"
        return "agrees" if -margin <= low and high <= margin else "open"
    low, high = sorted((side * low, side * high))
    return "agrees" if low > 0 else "differs" if high < 0 else "open"


def run_name(treatment: str, part: str = "none", n: int = 0) -> str:
    """Name of a run within its split, seed and target.

    >>> run_name("base"), run_name("AnB", "blocks", 4), run_name("BnB", "embedding"), run_name("BnB")
    ('base', 'AnB@4', 'BnB@E', 'BnB@0')
    """
    return treatment if treatment in BASES else f"{treatment}@{'E' if part == 'embedding' else n}"


def passed(table: pd.DataFrame) -> pd.DataFrame:
    """Runs whose bases passed the gate (column `gate`)."""
    return table[table.gate == "passed"]


# --- the published runs ---------------------------------------------------------------------------------------------


def published() -> pd.DataFrame:
    """Accuracy of the 112 runs on random halves of ImageNet that left a log (Yosinski et al., arXiv 1411.1792); n of 8 layers."""
    values = read("published_yosinski.json")
    rows = [(int(name[0]), name[1], "base", "none", 0, value) for name, value in values["base"].items()]
    for treatment, by_n in values["runs"].items():
        for n, runs in by_n.items():
            for run, value in runs.items():
                split, target = run.split("->")[1]
                rows.append((int(split), target, treatment, "blocks", int(n), value))
    table = pd.DataFrame(rows, columns=["split", "target", "treatment", "part", "n", "value"])
    table = table.assign(task="imagenet", distance="near", seed=0, metric="accuracy")
    return table[[*_PAIR, "treatment", *_AT, "value"]]


def measured() -> pd.DataFrame:
    """Our own runs of task S, near and far, `transfer.run("S", "standard", distance=...).table`: they take an hour."""
    return pd.DataFrame(read("transfer_sources.json")["runs"])


def read(name: str) -> dict:
    """A file of published numbers that comes with the kit."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "_data" if (package / "_data").is_dir() else package.parent / "data"
    return json.loads((folder / name).read_text(encoding="utf-8"))


# --- shared ---------------------------------------------------------------------------------------------------------


def with_holm(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """A column p_holm: p corrected over the rows of one comparison, which the columns `by` name."""
    found = frame.assign(p_holm=np.nan)
    for _, part in found.groupby(list(by)):
        found.loc[part.index, "p_holm"] = statistics.holm(part.p.to_numpy())
    return found


def of_draws(drawn: Float[np.ndarray, " draw"]) -> tuple[float, float, float]:
    """Ends of the 95 % interval of bootstrap draws, and their two-sided p against 0."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + len(drawn))
    return float(low), float(high), float(min(1.0, p))


def _by(
    table: pd.DataFrame, key: list[str], column: str, cluster: Sequence[str], confidence: float, draws: int, seed: int
) -> pd.DataFrame:
    """Mean of a column for each key with its intervals, over means of clusters."""
    rows = []
    for at, part in table.groupby(key, sort=False):
        means = part.groupby(list(cluster))[column].mean().to_numpy()
        rows.append((*at, *_intervals(means, confidence, draws, seed), len(part), len(means)))
    ends = ["estimate", "low", "high", "boot_low", "boot_high", "p", "n_runs", "n_clusters"]
    return pd.DataFrame(rows, columns=[*key, *ends])


def _intervals(means: Shaped[np.ndarray, " cluster"], confidence: float, draws: int, seed: int) -> tuple[float, ...]:
    """Mean, the ends of the t interval, those of the bootstrap, and the p of the t test; nan with one cluster."""
    n, mean = len(means), float(means.mean())
    if n < 2:
        return (mean, *[np.nan] * 5)
    error = float(means.std(ddof=1)) / n**0.5
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    drawn = np.random.default_rng(seed).integers(n, size=(draws, n))
    low, high = np.quantile(means[drawn].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    # error 0: all clusters agree to the last bit
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return mean, mean - reach, mean + reach, float(low), float(high), p


def _check(table: pd.DataFrame) -> None:
    wanted = [*_PAIR, "treatment", *_AT, "value"]
    if missing := [name for name in wanted if name not in table.columns]:
        raise ValueError(f"table has no column {', '.join(missing)}: a table of runs has {', '.join(wanted)}")
    if gaps := int(table[wanted].isna().any(axis=1).sum()):
        raise ValueError(f"{gaps} runs have missing values: pass measured ones only")
    doubled = table.duplicated([*_PAIR, "treatment", *_AT])
    if doubled.any():
        first = table.loc[doubled, [*_PAIR, "treatment", *_AT]].iloc[0].to_dict()
        raise ValueError(f"{int(doubled.sum())} runs are there twice, the first is {first}: pass each once")
