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
from lab.transfer.statistics import of_draws, with_holm
from lab.transfer.tasks import seed_of

Weights = dict[str, torch.Tensor]  # parameter name to values
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


# --- scaling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scales:
    """How much of the update is kept: in each block, [layer] from the first, and outside the blocks."""

    blocks: tuple[float, ...]
    outside: float

    def of(self, name: str) -> float:
        """Of one parameter."""
        block = block_of(name)
        return self.outside if block is None else self.blocks[block]


def block_of(name: str) -> int | None:
    """Number of the block, 0..L-1, that a parameter belongs to, read whole behind the list of blocks; None outside.

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
    """theta_0 + lambda (theta_1 - theta_0), parameter by parameter; at 0 and at 1 equal to an end in every bit."""
    if {name: value.shape for name, value in base.items()} != {name: value.shape for name, value in tuned.items()}:
        raise ValueError("base and tuned are not one model: their parameters differ in name or shape")
    numbers = {block for name in base if (block := block_of(name)) is not None}
    if numbers != set(range(len(scales.blocks))):
        given = f"{len(scales.blocks)} scales for blocks {sorted(numbers)[:3]}..{max(numbers, default=None)}"
        raise ValueError(f"{given}: pass one for each; names of blocks are read after layers, blocks or h")
    return {name: torch.lerp(start, tuned[name], scales.of(name)) for name, start in base.items()}


def same_size(base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], scales: Scales) -> float:
    """The constant whose update has the same Euclidean norm over all weights as that of `scales`."""
    kept = whole = 0.0
    for name, start in base.items():
        size = float((tuned[name] - start).double().square().sum())
        kept += size * scales.of(name) ** 2
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
    means, drawn, sizes = {}, {}, {}
    for place, name in enumerate(names):
        part = items[items.set == name]
        groups = part.drop_duplicates("example").set_index("example").group.astype(str)
        sizes[name] = np.array([len(groups), groups.nunique()])
        for metric in ("accuracy", "nll"):
            values = part.pivot_table(metric, "example", "method")[methods].reindex(groups.index).to_numpy()
            means[name, metric], own = values.mean(0), seed_of(seed, place) % 2**32
            drawn[name, metric] = metrics.cluster_means(values, groups.to_numpy(str), draws=draws, seed=own)
    estimates, samples = (_measures(found, names, methods) for found in (means, drawn))
    target, control = sizes[names[0]], np.sum([sizes[name] for name in names[1:]], axis=0)
    counts = {"score": target + control, "target": target, "control": control}
    counts |= {f"nll: {name}": sizes[name] for name in names}
    rows, pairs, lines = [], [], methods.index("lines")
    for measure, value in estimates.items():
        values = samples[measure]
        for place, method in enumerate(methods):
            rows.append((method, measure, value[place], *of_draws(values[:, place])[:2], *map(int, counts[measure])))
            if place != lines:
                gap = of_draws(values[:, lines] - values[:, place])
                pairs.append((method, measure, value[lines] - value[place], *gap))
    summary = pd.DataFrame(rows, columns=["method", "measure", "estimate", "low", "high", "n_texts", "n_groups"])
    differences = pd.DataFrame(pairs, columns=["other", "measure", "difference", "low", "high", "p"])
    return summary, with_holm(differences, ["measure"]), _permutations(items, names)


def _measures(
    found: Mapping[tuple[str, str], np.ndarray], names: Sequence[str], methods: list[str]
) -> dict[str, np.ndarray]:
    """Score, target, control and nll of each set, [... method], from accuracy and nll of each set."""
    target, own, tuned = found[names[0], "accuracy"], methods.index("untouched"), methods.index("tuned")
    controls = [found[name, "accuracy"] / found[name, "accuracy"][..., [own]] for name in names[1:]]
    control = np.mean(controls, axis=0)
    score = 2 * target / target[..., [tuned]] + control
    return {"score": score, "target": target, "control": control} | {
        f"nll: {name}": found[name, "nll"] for name in names
    }


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
