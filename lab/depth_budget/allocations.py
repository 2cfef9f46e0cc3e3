"""How much of each block, or of each matrix, may go within one budget: rules that need no text, and random ones.

A budget is a share of all the blocks' weights. Rules for blocks return whole hundredths of each block, which add up to the
budget exactly; rules for matrices return shares of each matrix, exact to `_UNIT` weights of the whole model.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from transformer_lens.model_bridge import TransformerBridge

from lab.interventions import block_matrices

_UNIT = 64  # weights that go together where matrices are large: all ranks of 100 million would be much to hold
MATRIX_RULES = ("global magnitude", "LAMP", "ERK")
Shares = list[tuple[float, ...]]  # of each block, of each of its matrices


def filled(weights: Shaped[np.ndarray, " block"], total: int, most: int = 100) -> Int[np.ndarray, " block"]:
    """Whole numbers that add up to the total, in proportion to the weights but for those that would be above `most`.

    >>> filled(np.array([1.0, 1.0, 8.0]), 150).tolist()
    [25, 25, 100]
    """
    if not 0 <= total <= most * len(weights):
        raise ValueError(f"total={total}: {len(weights)} blocks hold 0 to {most * len(weights)}")
    weights = np.asarray(weights, float) + 1e-12
    full = np.zeros(len(weights), bool)
    while True:
        exact = np.where(full, most, weights * (total - most * full.sum()) / max(weights[~full].sum(), 1e-12))
        if not (exact > most).any():
            break
        full |= exact > most
    found = np.floor(exact + 1e-9).astype(int)
    rest = np.where(found < most, exact - found, -1)
    found[np.argsort(-rest, kind="stable")[: total - found.sum()]] += 1
    return found


def by_depth(n_blocks: int, total: int) -> dict[str, np.ndarray]:
    """Hundredths of each block that rise, or fall, evenly with depth."""
    return {
        "more of late blocks": filled(np.arange(n_blocks) + 0.5, total),
        "more of early blocks": filled(np.arange(n_blocks)[::-1] + 0.5, total),
    }


def reversed_shares(shares: Shaped[np.ndarray, " block"]) -> Shaped[np.ndarray, " block"]:
    """The same shares, the greatest where the least was."""
    found, order = np.empty_like(shares), np.argsort(shares, kind="stable")
    found[order] = shares[order][::-1]
    return found


def by_matrix(model: TransformerBridge, budgets: list[float]) -> dict[str, list[Shares]]:
    """For each of `MATRIX_RULES` and each budget the share of every matrix that goes.

    global magnitude: the least |w| of all matrices. LAMP (arXiv 2010.07611): the least w^2 / sum of the w'^2 of the same
    matrix that are not smaller. ERK: a matrix keeps in proportion to (inputs + outputs) / (inputs x outputs), at most all.
    """
    matrices = [
        [w.data if linear else w.data.T for w, linear in block_matrices(model, layer)]
        for layer in range(model.cfg.n_layers)
    ]
    flat = [w for block in matrices for w in block]
    counts = [len(block) for block in matrices]
    sizes = np.array([w.numel() for w in flat])
    unit = math.gcd(_UNIT, *sizes.tolist()) if sizes.min() >= 1000 * _UNIT else 1
    magnitudes = [_sorted(w) for w in flat]
    found = {
        "global magnitude": _least([m[unit - 1 :: unit] for m in magnitudes], budgets, unit),
        "LAMP": _least([lamp(m)[unit - 1 :: unit] for m in magnitudes], budgets, unit),
        "ERK": [sizes - kept for kept in (erk([w.shape for w in flat], 1 - budget) for budget in budgets)],
    }
    return {rule: [_by_block(gone / sizes, counts) for gone in all_gone] for rule, all_gone in found.items()}


def lamp(magnitudes: Float[np.ndarray, " weight"]) -> Float[np.ndarray, " weight"]:
    """Scores of weights in rising order of their magnitude; those of a matrix rise, too, to 1.

    >>> lamp(np.array([1.0, 2.0, 2.0])).round(3).tolist()
    [0.111, 0.5, 1.0]
    """
    squares = magnitudes.astype(float) ** 2
    return squares / np.maximum(squares[::-1].cumsum()[::-1], 1e-300)


def erk(shapes: list[tuple[int, ...]], kept: float) -> Float[np.ndarray, " matrix"]:
    """Weights that each matrix keeps, so that all keep this share together (arXiv 1911.11134, without kernels)."""
    sizes = np.array([math.prod(shape) for shape in shapes], float)
    raw = np.array([sum(shape) / math.prod(shape) for shape in shapes])
    dense = np.zeros(len(sizes), bool)
    while True:
        left = kept * sizes.sum() - sizes[dense].sum()
        density = np.where(dense, 1.0, raw * left / max((raw * sizes)[~dense].sum(), 1e-12))
        if not (density > 1 + 1e-12).any():
            return density * sizes
        dense |= density > 1


def _sorted(weight: torch.Tensor) -> np.ndarray:
    return np.sort(weight.reshape(-1).abs().float().cpu().numpy())


def _least(scores: list[np.ndarray], budgets: list[float], unit: int) -> list[np.ndarray]:
    """Weights of each matrix among the least of all, for each budget; scores of a matrix rise."""
    owner = np.repeat(np.arange(len(scores)), [len(one) for one in scores])
    order = owner[np.argsort(np.concatenate(scores), kind="stable")]
    return [np.bincount(order[: round(budget * len(order))], minlength=len(scores)) * unit for budget in budgets]


def _by_block(shares: np.ndarray, counts: list[int]) -> Shares:
    return [tuple(float(one) for one in part) for part in np.split(shares, np.cumsum(counts)[:-1])]
