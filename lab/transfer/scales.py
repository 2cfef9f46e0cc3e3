"""Scaled updates and their tables: pure functions on weights and on scored texts, for `lab.transfer.scaling`.

theta_0 is the untouched model, theta_1 the tuned one, tau = theta_1 - theta_0 the update, lambda how much of it is kept.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from lab import statistics as metrics
from lab.transfer.tasks import seed_of

Weights = dict[str, torch.Tensor]  # parameter name to values
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


# --- scaling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scales:
    """How much of the update is kept: in each block, [layer] from the first, and outside the blocks."""

    blocks: tuple[float, ...]
    outside: float


def block_of(name: str) -> int | None:
    """Number of the block, 0..L-1, that a parameter belongs to; None outside the blocks.

    The number that follows the list of blocks, read whole. (The published code looks for ".1." anywhere in the name: an
    expert's or a sub-layer's number would be taken for the block's.)

    >>> block_of("model.layers.11.mlp.experts.1.up.weight"), block_of("model.norm.weight")
    (11, None)
    """
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def ramp(n_layers: int, alpha: float) -> Scales:
    """LiNeS: from alpha in the first block to 1 in the last, alpha outside (section 4 of arXiv 2410.17146, beta = 1 - alpha).

    >>> ramp(3, 0.5)
    Scales(blocks=(0.5, 0.75, 1.0), outside=0.5)
    """
    if n_layers < 2 or not 0 <= alpha <= 1:
        raise ValueError(f"n_layers={n_layers}, alpha={alpha}: pass 2 blocks or more and a number in [0, 1]")
    return Scales(tuple(alpha + (1 - alpha) * block / (n_layers - 1) for block in range(n_layers)), alpha)


def constant(n_layers: int, value: float) -> Scales:
    """The same share everywhere: 0 is the untouched model, 1 the tuned one; WiSE-FT (arXiv 2109.01903) between."""
    return Scales((float(value),) * n_layers, float(value))


def scaled(base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], scales: Scales) -> Weights:
    """theta_0 + lambda (theta_1 - theta_0), parameter by parameter; at 0 and at 1 equal to an end in every bit.

    Raises:
        ValueError: other names or shapes in `tuned` than in `base`; a block number without a scale, or no block at all.
    """
    if {name: value.shape for name, value in base.items()} != {name: value.shape for name, value in tuned.items()}:
        raise ValueError("base and tuned are not one model: their parameters differ in name or shape")
    numbers = {block for name in base if (block := block_of(name)) is not None}
    if numbers != set(range(len(scales.blocks))):
        raise ValueError(
            f"{len(scales.blocks)} scales for blocks {sorted(numbers)[:3]}..{max(numbers, default=None)}: pass one for each; "
            "names of blocks are read after layers, blocks or h"
        )
    found = {}
    for name, start in base.items():
        block = block_of(name)
        found[name] = torch.lerp(start, tuned[name], scales.outside if block is None else scales.blocks[block])
    return found


def same_size(base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], scales: Scales) -> float:
    """The constant whose update has the same Euclidean norm over all weights as that of `scales`."""
    kept = whole = 0.0
    for name, start in base.items():
        size = float((tuned[name] - start).double().square().sum())
        block = block_of(name)
        kept += size * (scales.outside if block is None else scales.blocks[block]) ** 2
        whole += size
    return (kept / whole) ** 0.5 if whole else 0.0


def permuted(scales: Scales, generator: np.random.Generator) -> Scales:
    """The blocks' scales in random order; outside as it was."""
    return replace(scales, blocks=tuple(scales.blocks[place] for place in generator.permutation(len(scales.blocks))))


def update_sizes(base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """How far tuning went: block (-1: outside), tau and theta_0 (Euclidean norms), ratio."""
    rows = [
        (-1 if (block := block_of(name)) is None else block, float((tuned[name] - start).double().square().sum()),
         float(start.double().square().sum()))
        for name, start in base.items()
    ]  # fmt: skip
    found = pd.DataFrame(rows, columns=["block", "tau", "theta_0"]).groupby("block").sum().pow(0.5).reset_index()
    return found.assign(ratio=found.tau / found.theta_0)


# --- tables ---------------------------------------------------------------------------------------------------------


def by_run(items: pd.DataFrame) -> pd.DataFrame:
    """Means over texts, a row a seed, method, order, set and metric."""
    by = ["seed", "method", "alpha", "order", "set", "role"]
    found = items.melt([*by, "example"], ["accuracy", "nll"], "metric")
    grouped = found.groupby([*by, "metric"], sort=False, dropna=False).value
    return grouped.agg(["mean", "size"]).reset_index().rename(columns={"mean": "value", "size": "n_items"})


def statistics(
    items: pd.DataFrame, names: Sequence[str], draws: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Summary, differences and permutations: means over seeds and orders first, then groups are resampled."""
    methods = list(items.method.unique())
    estimate, drawn, sizes = {}, {}, {}
    for place, name in enumerate(names):
        part = items[items.set == name]
        about = part.drop_duplicates("example").set_index("example").group.astype(str)
        for metric in ("accuracy", "nll"):
            values = part.pivot_table(metric, "example", "method")[methods].reindex(about.index).to_numpy()
            estimate[name, metric] = values.mean(0)
            drawn[name, metric] = metrics.cluster_means(
                values, about.to_numpy(str), draws=draws, seed=seed_of(seed, place) % 2**32
            )
        sizes[name] = (len(about), about.nunique())
    counts = {"target": sizes[names[0]], "control": tuple(np.sum([sizes[name] for name in names[1:]], axis=0))}
    counts["score"] = tuple(np.add(counts["target"], counts["control"]))
    measures = {}
    for store, found in (("estimate", estimate), ("drawn", drawn)):
        target = found[names[0], "accuracy"]
        controls = [found[n, "accuracy"] / found[n, "accuracy"][..., [methods.index("untouched")]] for n in names[1:]]
        control = np.mean(controls, axis=0)
        score = 2 * target / target[..., [methods.index("tuned")]] + control
        measures[store] = {"score": score, "target": target, "control": control}
        measures[store] |= {f"nll: {name}": found[name, "nll"] for name in names}
    rows, pairs = [], []
    lines = methods.index("lines")
    for measure, value in measures["estimate"].items():
        about_n = counts[measure] if measure in counts else sizes[measure.removeprefix("nll: ")]
        samples = measures["drawn"][measure]
        for place, method in enumerate(methods):
            low, high = np.quantile(samples[:, place], [0.025, 0.975])
            rows.append((method, measure, value[place], low, high, *map(int, about_n)))
            if place != lines:
                gap = samples[:, lines] - samples[:, place]
                p = min(1.0, 2 * (1 + min((gap <= 0).sum(), (gap >= 0).sum())) / (1 + draws))
                pairs.append((method, measure, value[lines] - value[place], *np.quantile(gap, [0.025, 0.975]), p))
    summary = pd.DataFrame(rows, columns=["method", "measure", "estimate", "low", "high", "n_texts", "n_groups"])
    differences = pd.DataFrame(pairs, columns=["other", "measure", "difference", "low", "high", "p"]).assign(
        p_holm=np.nan
    )
    for _, part in differences.groupby("measure"):
        differences.loc[part.index, "p_holm"] = metrics.holm(part.p.to_numpy())
    return summary, differences, _permutations(items, names)


def _permutations(items: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Score of each random order on test texts, and of "lines" (order -1), a row a seed and order."""
    means = items.groupby(["seed", "method", "order", "set"]).accuracy.mean().unstack()
    rows = []
    for seed, part in means.groupby("seed"):
        part = part.droplevel("seed")
        for (_, order), one in part.loc[["lines", "permuted"] if "permuted" in part.index else ["lines"]].iterrows():
            target = one[names[0]] / part.loc[("tuned", -1), names[0]]
            control = np.mean([one[name] / part.loc[("untouched", -1), name] for name in names[1:]])
            rows.append((seed, order, 2 * target + control, target, control))
    return pd.DataFrame(rows, columns=["seed", "order", "score", "target", "control"])
