"""Task vectors: what tuning added to a base, and the ways to merge and scale it. Plain functions on weight dicts.

    models = [tuned(base, weights) for weights in ...]  # each remembers the base that it was tuned from
    taus = task_vectors(base, models)
    add(base, ties(taus), 0.5)                          # merged by TIES, with lambda = 0.5
    add(base, lines(taus[0], 4, alpha=0.2, beta=0.8))   # one model, its shallow blocks moved back to the base

A weight dict maps names to tensors; names of blocks hold the block's number, as in "3.qkv" or, with
prefix="model.layers.", "model.layers.3.mlp.up_proj.weight". Heads of tasks are left out by the caller: they are not merged.

Task vectors are 64-bit floats: for 32-bit weights of like size the difference is then exact, and base + tau is the tuned
model to the last bit. After: task arithmetic (arXiv 2212.04089), TIES (2306.01708), TALL masks and Consensus (2405.07813),
LiNeS (2410.17146).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from lab.nets.replicas import Weights, digest


@dataclass(frozen=True)
class Tuned:
    """A tuned model's weights, and the digest (`lab.nets.replicas.digest`) of the base that they were tuned from."""

    weights: Weights
    base: str


def tuned(base: Weights, weights: Weights) -> Tuned:
    """Weights marked with the base that they were tuned from: call it where the tuning is done, while base is at hand."""
    _same_shapes([base, weights], ["the base", "the tuned weights"])
    return Tuned(weights, digest(base))


def task_vectors(base: Weights, models: Sequence[Tuned]) -> list[Weights]:
    """tau = tuned - base of each model, in 64 bits.

    Raises:
        ValueError: no model; a model of another base or of other shapes. Differences from different bases do not add up
            to anything: the merge would run, and give a net that is worth nothing.
    """
    if not models:
        raise ValueError("no models were given: pass at least one")
    ours = digest(base)
    for number, model in enumerate(models):
        _same_shapes([base, model.weights], ["the base", f"model {number}"])
        if model.base != ours:
            raise ValueError(
                f"model {number} was tuned from another base ({model.base[:12]}, this one is {ours[:12]}): only models tuned "
                "from one base can be merged; pass their own base, or tune it again from this one"
            )
    return [{name: model.weights[name].double() - base[name].double() for name in base} for model in models]


def add(base: Weights, tau: Weights, scale: float = 1.0) -> Weights:
    """base + scale * tau, summed in 64 bits and rounded to the base's precision."""
    _same_shapes([base, tau], ["the base", "the task vector"])
    return {name: (value.double() + scale * tau[name].double()).to(value.dtype) for name, value in base.items()}


# --- mergers --------------------------------------------------------------------------------------------------------


def task_arithmetic(taus: Sequence[Weights]) -> Weights:
    """The sum of all task vectors; with scale 1 / N it is the average of the N models."""
    _same_shapes(taus)
    return {name: torch.stack([tau[name] for tau in taus]).sum(0) for name in taus[0]}


def ties(taus: Sequence[Weights], keep: float = 0.2) -> Weights:
    """TIES: of each task vector its largest entries, and of these the mean of those that agree with the elected sign.

    Args:
        taus: task vectors.
        keep: share of the entries of a whole vector that stay, in (0, 1]; entries as large as the last one stay too.

    The sign of an entry is elected by the sum of what stayed. Where nothing stayed, or all cancels, the result is 0. That is
    the usual statement. The authors' code (prateeky2806/ties-merging at 44e7891) keeps k + 1 entries of each vector where k
    are asked for, and where all cancels takes the sign that most entries have, so the mean of those with it.
    """
    _same_shapes(taus)
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: pass a share above 0 and up to 1")
    flat = torch.stack([torch.cat([value.flatten() for value in tau.values()]) for tau in taus])  # [model entry]
    least = flat.abs().topk(max(1, round(keep * flat.shape[1])), dim=1).values[:, -1:]
    kept = torch.where(flat.abs() >= least, flat, 0.0)
    sign = kept.sum(0).sign()
    agree = (kept.sign() == sign) & (sign != 0)
    mean = torch.where(agree, kept, 0.0).sum(0) / agree.sum(0).clamp(min=1)
    sizes = [value.numel() for value in taus[0].values()]
    return {name: part.view(taus[0][name].shape) for name, part in zip(taus[0], mean.split(sizes), strict=True)}


def tall_mask(tau: Weights, merged: Weights, threshold: float) -> Weights:
    """Which entries matter to one task: |tau_t| > threshold * |tau_merged - tau_t|, as booleans."""
    _same_shapes([tau, merged])
    return {name: tau[name].abs() > threshold * (merged[name] - tau[name]).abs() for name in tau}


def consensus(taus: Sequence[Weights], threshold: float = 0.4, at_least: int = 2) -> Weights:
    """Consensus: the sum of all task vectors, where at least so many TALL masks are active; 0 elsewhere.

    Departure: one threshold for all tasks, the middle of the published grid (0.2 to 0.6, chosen by task on validation), so
    that Consensus is tuned with as many evaluations as the others.
    """
    if not 1 <= at_least <= len(taus):
        raise ValueError(f"at_least={at_least}: pass 1 to {len(taus)}, the number of models")
    merged = task_arithmetic(taus)
    masks = [tall_mask(tau, merged, threshold) for tau in taus]
    return {name: value * (sum(mask[name].int() for mask in masks) >= at_least) for name, value in merged.items()}


# --- scaling by block (LiNeS) ---------------------------------------------------------------------------------------


def block_of(name: str, prefix: str = "") -> int | None:
    """Number of the block that a weight belongs to, counted from 0; None outside of the blocks.

    The whole number behind the prefix is read. The published code looks for ".1." anywhere in a name, and takes the first
    hit (wang-kee/LiNeS at 43a7bdd): names with a second number in them then land in a wrong block.

    >>> block_of("12.qkv"), block_of("embedding"), block_of("encoder.block.3.layer.1.wi", "encoder.block.")
    (12, None, 3)
    """
    found = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
    return int(found[1]) if found else None


def line(n_blocks: int, alpha: float, beta: float) -> Float[np.ndarray, " layer"]:
    """lambda_l = alpha + beta (l - 1) / (L - 1) for l = 1..L; alpha with a single block.

    >>> line(4, 0.25, 0.75).tolist()
    [0.25, 0.5, 0.75, 1.0]
    """
    return alpha + beta * np.arange(n_blocks) / max(n_blocks - 1, 1)


def scale_blocks(tau: Weights, by_block: Sequence[float], outside: float, prefix: str = "") -> Weights:
    """Each block's part of a task vector times its own factor; what lies outside of the blocks times `outside`.

    Raises:
        ValueError: a name with a block's number that has no factor, or a factor without a block.
    """
    blocks = {name: block_of(name, prefix) for name in tau}
    there = {block for block in blocks.values() if block is not None}
    if there != set(range(len(by_block))):
        raise ValueError(
            f"{len(by_block)} factors, and blocks {sorted(there)}: pass one factor for each block, from block 0 on, and the "
            "prefix that stands before a block's number in the names"
        )
    factor = {name: outside if block is None else float(by_block[block]) for name, block in blocks.items()}
    return {name: value * factor[name] for name, value in tau.items()}


def lines(tau: Weights, n_blocks: int, alpha: float, beta: float, prefix: str = "") -> Weights:
    """LiNeS: block l times alpha + beta (l - 1) / (L - 1), everything outside of the blocks times alpha."""
    return scale_blocks(tau, line(n_blocks, alpha, beta).tolist(), alpha, prefix)


def lines_alpha(taus: Sequence[Weights], merged: Weights) -> float:
    """alpha of LiNeS for a merge: (1 / N) |sum of taus|_1 / |merged|_1; 1 / N for task arithmetic."""
    ours = sum(float(value.abs().sum()) for value in merged.values())
    whole = sum(float(value.abs().sum()) for value in task_arithmetic(taus).values())
    if not ours:
        raise ValueError("the merged task vector is all zeros: there is nothing to scale")
    return whole / ours / len(taus)


def norm(tau: Weights) -> float:
    """Euclidean norm of all entries."""
    return float(torch.cat([value.flatten() for value in tau.values()]).norm())


def _same_shapes(dicts: Sequence[Weights], names: Sequence[str] | None = None) -> None:
    if not dicts:
        raise ValueError("no task vectors were given: pass at least one")
    names = names or [f"task vector {number}" for number in range(len(dicts))]
    first = {name: tuple(value.shape) for name, value in dicts[0].items()}
    for other, label in zip(dicts[1:], names[1:], strict=True):
        shapes = {name: tuple(value.shape) for name, value in other.items()}
        apart = sorted(name for name in first.keys() | shapes.keys() if first.get(name) != shapes.get(name))
        if apart:
            one = apart[0]
            raise ValueError(
                f"{names[0]} and {label} differ in {len(apart)} weights, the first is {one!r}: {first.get(one)} and "
                f"{shapes.get(one)}; only models of one shape can be merged"
            )
