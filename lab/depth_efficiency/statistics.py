"""Numbers about how far down a model's layers still compute, on plain arrays and tables. No model, no torch.

Axes: `example` (a prompt), `layer` s that is changed, `later` layer l whose contribution is measured, `depth` 0..L.
Formulas of Csordas et al. (arXiv 2505.13898) and, for the three effective depths that others use, of Hu et al. (arXiv
2512.14064). Intervals resample prompts (groups of prompts where they share a story), never a maximum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from lab import require, statistics

FEW = 8  # groups of prompts below which an interval is not read: it is far too narrow, down to no width at all
CHANGES = ["weights", "treatment", "kind", "mode", "scope"]  # columns that say what was changed, and where


def verdict(
    interval: Any, inside: tuple[float, float], n: int, words: tuple[str, str] = ("holds", "does not hold")
) -> str:
    """Which side of a rule an interval is on: wholly inside the bounds, wholly outside, or neither ("undecided").

    Args:
        interval: anything with `low` and `high`. inside: the rule's bounds; infinite where it has one only.
        n: groups of prompts that the interval resamples; with fewer than 8 there is no verdict.

    >>> verdict(statistics.Interval(0.1, -0.02, 0.38), (-0.25, 0.25), 12, ("flat", "not flat"))
    'undecided'
    """
    low, high = float(interval.low), float(interval.high)
    if n < FEW:
        return f"no verdict (n < {FEW})"
    if low > inside[0] and high < inside[1]:
        return words[0]
    return words[1] if high <= inside[0] or low >= inside[1] else "undecided"


# --- of one profile, or of one a draw -------------------------------------------------------------------------------


def effect_profile(effects: Float[np.ndarray, "*draw layer later"]) -> Float[np.ndarray, "*draw layer"]:
    """e_s = sum over l of E[s, l], divided by the number of layers after s; the last layer has none and gets 0.

    >>> effect_profile(np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])).tolist()
    [1.0, 0.5, 0.0]
    """
    n = effects.shape[-1]
    later = np.triu(np.ones((n, n)), 1)  # the diagonal (1 by construction) and what lies before it say nothing
    return (effects * later).sum(-1) / np.maximum(n - 1 - np.arange(n), 1)


def depth_score(profile: Float[np.ndarray, "*draw layer"]) -> Float[np.ndarray, "*draw"] | float:
    """d = sum of s e_s / sum of e_s, layers counted from 0 as in the published code; a flat profile gives (L-1)/2."""
    with np.errstate(invalid="ignore"):
        return (profile @ np.arange(profile.shape[-1]) / profile.sum(-1))[()]


def effective_depth(profile: Float[np.ndarray, "*draw layer"], share: float) -> Float[np.ndarray, "*draw"] | float:
    """First layer s at which the summed profile reaches a share of its total, as (s + 1)/L: ED_50 for 0.5."""
    require.number("share", share, above=0, high=1)
    total = profile.sum(-1, keepdims=True)
    if not (total > 0).all():
        raise ValueError("a profile has no effect at any layer: there is no depth at which it is reached")
    return _first(profile.cumsum(-1) >= share * total * (1 - 1e-9))


def depth_by_cosine(cosine: Float[np.ndarray, "*draw layer"]) -> Float[np.ndarray, "*draw"] | float:
    """ED_cos: last layer where the mean of the three cosines goes from below 0 to 0 or above, as (l + 1)/L; nan if none."""
    n = cosine.shape[-1]
    turn = (cosine[..., :-1] < 0) & (cosine[..., 1:] >= 0)
    last = n - 1 - turn[..., ::-1].argmax(-1)  # the layer after the turn
    return np.where(turn.any(-1), (last + 1) / n, np.nan)[()]


def depth_by_divergence(kl: Float[np.ndarray, "*draw layer"]) -> Float[np.ndarray, "*draw"] | float:
    """ED_KL: first layer whose input, read by the logit lens, has KL below half the largest, as (l + 1)/L; nan if none."""
    return _first(kl < 0.5 * kl.max(-1, keepdims=True))


def depth_by_overlap(overlap: Float[np.ndarray, "*draw layer"]) -> Float[np.ndarray, "*draw"] | float:
    """ED_ov: first layer whose input shares more than 0.3 of its top tokens with the output, as (l + 1)/L; nan if none."""
    return _first(overlap > 0.3)


def _first(hit: np.ndarray) -> np.ndarray | float:
    return np.where(hit.any(-1), (hit.argmax(-1) + 1) / hit.shape[-1], np.nan)[()]


def depth_of_change(curve: Float[np.ndarray, "*draw depth"]) -> Float[np.ndarray, "*draw"] | float:
    """Mean depth, as a fraction, at which a curve over depths 0..L changes from its value at depth 1 to that at L.

    Sum over d of d (x_d - x_(d-1)) / (x_L - x_1) / L, d from 2 on: steps against the trend count negatively. Depth 0 is left
    out, where many models' embeddings read as nonsense: half of the largest KL is then often passed in the first block, and
    ED_KL says no more than that. A steady change gives about 0.5. nan where the ends are equal.

    >>> depth_of_change(np.array([99.0, 8.0, 8.0, 4.0, 0.0]))
    0.875
    """
    steps = np.diff(curve[..., 1:])
    depths = np.arange(2, curve.shape[-1]) / (curve.shape[-1] - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (steps @ depths / steps.sum(-1))[()]


def _second_half(profile: np.ndarray) -> np.ndarray:
    return profile[..., profile.shape[-1] // 2 :].sum(-1) / profile.sum(-1)


def _halves(curves: np.ndarray) -> np.ndarray:
    half = curves.shape[-1] // 2
    return curves[..., half:].mean(-1) / curves[..., :half].mean(-1)


def _rise(curves: np.ndarray) -> np.ndarray:
    quarter = curves.shape[-1] // 4
    return curves[..., 3 * quarter - 1 : 3 * quarter + 1].mean(-1) - curves[..., quarter - 1 : quarter + 1].mean(-1)


# --- intervals over prompts; `measured`: table, lens and contributions of `depth_efficiency.run` --------------------


def of_mean(
    values: Shaped[np.ndarray, "example ..."], groups: Shaped[np.ndarray, " example"],
    statistic: Callable[[np.ndarray], np.ndarray | float], *, seed: int, draws: int = 2000,
) -> tuple[statistics.Interval, np.ndarray]:  # fmt: skip
    """A statistic of the mean over prompts, with its percentile interval over prompts; and the draws, for differences.

    Args:
        statistic: of [draw, ...], vectorised over draws. Draws in which it is nan are left out of the interval.
    """
    drawn = np.asarray(statistic(statistics.cluster_means(values, groups, draws=draws, seed=seed)))
    estimate = float(np.asarray(statistic(np.asarray(values, float).mean(0)[None]))[0])
    return _interval(estimate, drawn), drawn


def summary(*measured: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Effective depths and second-half shares with intervals over prompts, for each way of changing and each measure."""
    return pd.DataFrame([row for row, _ in _statistics(*measured, seed=seed)])


def against(
    *measured: pd.DataFrame, seed: int, column: str = "weights", base: str = "trained", other: str = "random"
) -> pd.DataFrame:
    """Statistic of the base minus that of the other, the same prompts resampled for both; does the interval exclude zero?"""
    keys = [*CHANGES, "measure", "statistic"]
    rows = _statistics(*measured, seed=seed)
    found = {tuple(row[key] for key in keys): (row, drawn) for row, drawn in rows}
    out = []
    for key, (row, drawn) in found.items():
        partner = tuple(other if name == column else value for name, value in zip(keys, key, strict=True))
        if row[column] == base and partner in found:
            its, theirs = found[partner]
            there = _interval(row["estimate"] - its["estimate"], drawn - theirs)
            out.append({**{name: row[name] for name in keys if name != column}, base: row["estimate"],
                         other: its["estimate"], "difference": there.estimate, "low": there.low, "high": there.high,
                         "excludes_zero": bool(there.low > 0 or there.high < 0), "n_groups": row["n_groups"],
                         "few": row["n_groups"] < FEW})  # fmt: skip
    return pd.DataFrame(out)


def against_treatments(*measured: pd.DataFrame, treatments: Sequence[str], seed: int) -> pd.DataFrame:
    """Skipping minus each other treatment."""
    others = [other for other in treatments if other != "skip" and "skip" in treatments]
    tables = [against(*measured, seed=seed, column="treatment", base="skip", other=other)
              .rename(columns={other: "other"}).assign(treatment=other) for other in others]  # fmt: skip
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def claims(*measured: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A reading aid: which published claims hold for this model, by stated rules, and whether random weights do as well.

    The verdict says of a claim that holds what random weights do: a claim that holds for both is not evidence of what was
    learnt. The columns of the null are nan where none was run.
    """
    trained, null = (_claims(*measured, seed=seed, weights=weights) for weights in ("trained", "random"))
    random = {row["claim"]: (row, drawn) for row, drawn, _ in null}
    nothing, rows = statistics.Interval(np.nan, np.nan, np.nan), []
    for row, drawn, inside in trained:
        said, its, apart = verdict(pd.Series(row), inside, row["n"]), nothing, nothing
        if row["claim"] in random:
            other, theirs = random[row["claim"]]
            its = statistics.Interval(other["estimate"], other["low"], other["high"])
            apart = _interval(row["estimate"] - its.estimate, drawn - theirs)
            beside = {"holds": ", and so does the null", "undecided": ", the null is undecided"}
            said += beside.get(verdict(its, inside, other["n"]), "") if said == "holds" else ""
        rows.append({**row, "null": its.estimate, "null_low": its.low, "null_high": its.high, "difference": apart.estimate,
                     "difference_low": apart.low, "difference_high": apart.high, "verdict": said})  # fmt: skip
    return pd.DataFrame(rows)


def slope_against(trained: pd.DataFrame, random: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Slope of the depth score on the level, trained minus random weights: the slope of the prompts' own differences.

    Args:
        trained, random: `.table` of two `depth_efficiency.depth_scores` of the same prompts.
    """
    both = trained.merge(random[["example", "measure", "score"]], on=["example", "measure"], suffixes=("", "_random"))
    if (n := len(both)) < len(trained):
        raise ValueError(f"{n} of {len(trained)} scores have a partner: run both on the same prompts, same seed")
    rows = []
    for measure, part in both.groupby("measure"):
        apart = slope(part.assign(score=part.score - part.score_random), seed=seed)
        own = [float(np.polyfit(part.level, part[column], 1)[0]) for column in ("score", "score_random")]
        rows.append((measure, part.group.nunique(), *own, *apart))
    return pd.DataFrame(rows, columns=["measure", "n", "trained", "random", "difference", "low", "high"])


def slope(scores: pd.DataFrame, *, seed: int, draws: int = 2000, covariate: str | None = None) -> statistics.Interval:
    """Layers by which the depth score rises for each level (a hop, a step), least squares, interval over groups.

    Args:
        scores: columns group, level, score, and the covariate (length in tokens, say) that is held constant.
    """
    if scores.level.nunique() < 2:
        raise ValueError(f"all scores are of level {scores.level.iloc[0]}: a slope needs two levels")
    columns = ["level", *([covariate] if covariate else []), "score"]

    def fit(rows: np.ndarray) -> float:
        design = np.column_stack([np.ones(len(rows)), rows[:, :-1]])
        return float(np.linalg.lstsq(design, rows[:, -1], rcond=None)[0][1])

    values, groups = scores[columns].to_numpy(float), scores.group.astype(str).to_numpy()
    return statistics.cluster_bootstrap(values, groups, fit, draws=draws, seed=seed)


# --- parts ----------------------------------------------------------------------------------------------------------

_LESS, _MORE = (-np.inf, 0.5), (0.5, np.inf)
# claim, rule, curves (a quantity of "added", a measure of skipping "all" or "future" tokens, or of "read"), statistic, bounds
_CLAIMS: list[tuple[str, str, tuple[str, str], Callable[..., Any], tuple[float, float]]] = [
    ("attention adds less, relative to the stream, in the second half", "ratio of halves < 0.5",
     ("added", "attn_norm"), _halves, _LESS),
    ("the MLP adds less, relative to the stream, in the second half", "ratio of halves < 0.5",
     ("added", "mlp_norm"), _halves, _LESS),
    ("cosine of contribution and stream turns from negative to positive",
     "three quarters down minus one quarter down > 0", ("added", "block_cosine"), _rise, (0.0, np.inf)),
    ("consecutive states are nearly parallel throughout", "least cosine of h_l and h_l+1 > 0.9",
     ("added", "state_cosine"), lambda c: c[..., 1:].min(-1), (0.9, np.inf)),
    ("skipping a second-half layer barely changes later layers (all tokens)", "ratio of halves < 0.5",
     ("all", "effect"), _halves, _LESS),
    ("but it does change the output (all tokens)", "ratio of halves > 0.5", ("all", "output"), _halves, _MORE),
    ("the second half matters little for later tokens (layers)", "its share of the effects < 0.25",
     ("future", "effect"), _second_half, (-np.inf, 0.25)),
    ("the second half matters little for later tokens (output)", "its share of the effects < 0.25",
     ("future", "output"), _second_half, (-np.inf, 0.25)),
    ("the lens's distance from the output falls in the second half", "mean depth of its fall > 0.5",
     ("read", "kl"), depth_of_change, _MORE),
    ("the words shared with the output come in the second half", "mean depth of their rise > 0.5",
     ("read", "overlap"), depth_of_change, _MORE),
]  # fmt: skip


def _claims(
    table: pd.DataFrame, lens: pd.DataFrame, contributions: pd.DataFrame, *, seed: int, weights: str
) -> list[tuple[dict[str, Any], np.ndarray, tuple[float, float]]]:
    """For each claim its row, its draws, and the bounds between which it holds."""
    here = contributions[(contributions.weights == weights) & ~contributions.position_0]
    read = lens[(lens.weights == weights) & ~lens.position_0]
    effects = table[(table.weights == weights) & (table.treatment == "skip") & (table.kind == "layer")
                    & (table["mode"] == "global")]  # fmt: skip
    out = []
    for claim, rule, (source, name), statistic, inside in _CLAIMS:
        if source == "added":
            values, groups = _curves(here[here.quantity == name])
        elif source == "read":
            values, groups = _curves(read, name, "depth")
        else:
            values, groups = _curves(effects[effects.scope == source], name, "skipped_layer")
        if values is not None:
            interval, drawn = of_mean(values, groups, statistic, seed=seed)
            out.append(({"claim": claim, "rule": rule, "n": len(set(groups)), **interval._asdict()}, drawn, inside))
    return out


def _statistics(
    table: pd.DataFrame, lens: pd.DataFrame, contributions: pd.DataFrame, *, seed: int
) -> list[tuple[dict[str, Any], np.ndarray]]:
    rows = []

    def add(where: dict[str, Any], values: Any, groups: Any, which: dict[str, Callable]) -> None:
        for name, statistic in which.items() if values is not None else ():
            interval, drawn = of_mean(values, groups, statistic, seed=seed)
            counts = {"n": len(values), "n_groups": len(set(groups))}
            rows.append(({**where, "statistic": name, **counts, **interval._asdict()}, drawn))

    profile = {"ED_50": lambda p: effective_depth(p, 0.5), "ED_90": lambda p: effective_depth(p, 0.9),
               "second_half": _second_half}  # fmt: skip
    for key, part in table.groupby(CHANGES):
        for measure in ("effect", "output"):
            values, groups = _curves(part, measure, "skipped_layer")
            if values is not None and (values.sum(-1) > 0).all():
                add({**dict(zip(CHANGES, key, strict=True)), "measure": measure}, values, groups, profile)
    blank = {"treatment": "none", "kind": "layer", "mode": "none", "scope": "all"}
    for weights, part in lens[~lens.position_0].groupby("weights"):
        last, at = part.depth.max(), {"weights": weights, **blank}
        inputs = part[part.depth < last]
        add({**at, "measure": "kl"}, *_curves(inputs, "kl", "depth"), {"ED_KL": depth_by_divergence})
        add({**at, "measure": "overlap"}, *_curves(inputs, "overlap", "depth"), {"ED_ov": depth_by_overlap})
    cosines = contributions[contributions.quantity.isin(["attn_cosine", "mlp_cosine", "block_cosine"])]
    for weights, part in cosines[~cosines.position_0].groupby("weights"):
        mean = part.groupby(["example", "group", "layer"], as_index=False)["value"].mean()
        add({"weights": weights, **blank, "measure": "cosine"}, *_curves(mean), {"ED_cos": depth_by_cosine})
    return rows


def _curves(part: pd.DataFrame, value: str = "value", index: str = "layer") -> tuple[Any, Any]:
    """[example layer] and the group of each example; None where there are fewer than two groups."""
    if part.empty or part.group.nunique() < 2:
        return None, None
    wide = part.pivot(index="example", columns=index, values=value)
    groups = part.drop_duplicates("example").set_index("example").group.loc[wide.index]
    return wide.to_numpy(float), groups.astype(str).to_numpy()


def _interval(estimate: float, drawn: np.ndarray) -> statistics.Interval:
    there = drawn[np.isfinite(drawn)]
    low, high = np.quantile(there, [0.025, 0.975]) if len(there) else (np.nan, np.nan)
    return statistics.Interval(estimate, float(low), float(high))
