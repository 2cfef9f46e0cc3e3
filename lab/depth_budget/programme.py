"""The best choice for every block within a budget, if damages add: an exact integer programme. No model, no torch.

    costs, damages = [[0, 1, 2]] * 30, measured  # [block choice]
    choice = allocate(costs, damages, budget=30)  # of each block

Whether damages add is another question (`pruning.additivity`): if they do not, this is the optimum of the wrong objective.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from lab import require

MOST_STATES = 2**30  # of all blocks together: a byte or two each


def allocate(costs: ArrayLike, damages: ArrayLike, budget: int) -> Int[np.ndarray, " block"]:
    """The choice of each block with the least sum of damages among those whose costs add up to at most the budget.

    With B_l(t) the least damage of blocks l, l+1, ... at a cost of exactly t: B_l(t) = min_c [damage_lc + B_l+1(t - cost_lc)],
    then from block 0 on the choices that reach the least B_0(t), t <= budget. Exact, up to the rounding of sums. After
    arXiv 2308.10438, whose published code may exceed its budget in the first layer and loses it at a budget of zero.

    Args:
        costs: [block choice], whole numbers, also negative. A common divisor is taken out; work and memory grow with the
            units of the budget that remain.
        damages: [block choice]; inf is a choice that there is not; numbers below zero are fine.

    Of equal damages the lower cost wins; of equal costs the lower choice in block 0, then in block 1, and so on.

    Raises:
        ValueError: costs that are not whole, tables of two shapes, nan; no allocation fits, or too many states.

    >>> allocate([[0, 1, 3], [0, 1, 3]], [[9, 5, 0], [9, 2, 1]], budget=4).tolist()
    [2, 1]
    """
    costs, damages = _tables(costs, damages)
    budget = require.whole("budget", budget)
    there = np.isfinite(damages)
    if not there.any(1).all():
        raise ValueError(f"block {int(there.any(1).argmin())} has no choice: its damages are all infinite")
    least = np.where(there, costs, costs.max()).min(1)
    if least.sum() > budget:
        raise ValueError(
            f"budget={budget}: {len(costs)} blocks cost {least.sum()} at least; give that much, or cheaper choices"
        )
    spare = costs - least[:, None]  # beyond the cheapest choice of each block
    unit = math.gcd(*spare[there].tolist()) or 1
    spare = np.where(there, spare // unit, 0)
    n_states = int(min((budget - least.sum()) // unit, spare.max(1).sum())) + 1
    n_blocks, n_choices = costs.shape
    if n_blocks * n_states > MOST_STATES:
        raise ValueError(
            f"{n_blocks} blocks x {n_states} budgets are more than {MOST_STATES} states: give costs in a coarser unit"
        )
    chosen = np.zeros((n_blocks, n_states), np.int8 if n_choices <= 128 else np.int16)
    best = np.where(np.arange(n_states) == 0, 0.0, np.inf)  # by what is spent, of the blocks that are done
    for block in reversed(range(n_blocks)):
        found = np.full(n_states, np.inf)
        for choice in np.flatnonzero(there[block] & (spare[block] < n_states)):
            cost = int(spare[block, choice])
            sums = best[: n_states - cost] + damages[block, choice]
            better = sums < found[cost:]
            found[cost:][better] = sums[better]
            chosen[block, cost:][better] = choice
        best = found
    left, path = int(best.argmin()), np.zeros(n_blocks, int)
    for block in range(n_blocks):
        path[block] = chosen[block, left]
        left -= int(spare[block, path[block]])
    return path


def uniform(costs: ArrayLike, budget: int) -> Int[np.ndarray, " block"]:
    """The same choice in every block: the dearest that fits; of equals the first.

    >>> uniform([[0, 1, 3], [0, 1, 3]], budget=4).tolist()
    [1, 1]
    """
    costs, _ = _tables(costs, np.zeros(np.shape(costs)))
    budget, sums = require.whole("budget", budget), costs.sum(0)
    if not (sums <= budget).any():
        raise ValueError(f"budget={budget}: the same choice in each of {len(costs)} blocks costs {sums.min()} at least")
    return np.full(len(costs), np.where(sums <= budget, sums, sums.min() - 1).argmax())


def exchanged(
    costs: ArrayLike, start: Sequence[int] | Int[np.ndarray, " block"], budget: int,
    damage: Callable[[Int[np.ndarray, " block"]], float], *, tries: int, steps: Sequence[int] = (1,), seed: int = 0,
) -> tuple[Int[np.ndarray, " block"], list[float]]:  # fmt: skip
    """One-swap local search: a block gives up a few steps, another takes what that frees; kept where the damage falls.

    Args:
        start: a choice for each block, within the budget.
        damage: what is to be small, measured for an allocation; called once at the start and once a try.
        tries: how many swaps are tried, none of them twice from the same allocation.
        steps: how many choices cheaper a block may become at once, in the order of its costs.

    Returns:
        The last allocation, and the damage that stood after the start and after each try (at most `tries` + 1 numbers: it
        ends early where no swap is left).
    """
    costs, _ = _tables(costs, np.zeros(np.shape(costs)))
    n_blocks, n_choices = costs.shape
    now = np.array(require.wholes("start", start, 0, n_choices - 1, twice=True))
    budget, tries = require.whole("budget", budget), require.whole("tries", tries, 0)
    steps, draw = require.wholes("steps", steps, 1, None), np.random.default_rng(require.seed(seed))
    blocks = np.arange(n_blocks)
    if len(now) != n_blocks or costs[blocks, now].sum() > budget:
        raise ValueError(f"start has {len(now)} choices at a cost of {costs[blocks[: len(now)], now].sum()}: give one for each "
                         f"of {n_blocks} blocks, within budget={budget}")  # fmt: skip
    order = np.argsort(costs, 1, kind="stable")  # a block's choices from the cheapest on

    def swaps() -> list[tuple[int, int, int]]:
        """(giver, taker, steps) in a random order."""
        every = [(i, j, step) for i in range(n_blocks) for j in range(n_blocks) if i != j for step in steps]
        return [every[k] for k in draw.permutation(len(every))]

    def after(giver: int, taker: int, step: int) -> np.ndarray | None:
        place = int(np.flatnonzero(order[giver] == now[giver])[0]) - step
        if place < 0:
            return None
        new = now.copy()
        new[giver] = order[giver][place]
        spare = budget - costs[blocks, new].sum() + costs[taker, now[taker]]
        fits = [choice for choice in order[taker] if costs[taker, now[taker]] < costs[taker, choice] <= spare]
        if not fits:
            return None
        new[taker] = fits[-1]
        return new

    stood, waiting = [float(damage(now))], swaps()
    while len(stood) <= tries and waiting:
        new = after(*waiting.pop())
        if new is None:
            continue
        found = float(damage(new))
        if found < stood[-1]:
            now, waiting = new, swaps()
        stood.append(min(found, stood[-1]))
    return now, stood


def _tables(costs: Any, damages: Any) -> tuple[np.ndarray, np.ndarray]:
    costs, damages = np.asarray(costs), np.asarray(damages, float)
    if costs.ndim != 2 or not costs.size or costs.shape != damages.shape:
        raise ValueError(f"costs have shape {costs.shape}, damages {damages.shape}: give both as [block choice]")
    if costs.dtype == bool or not np.isfinite(costs).all() or (costs != np.round(costs)).any():
        raise ValueError("costs are not all whole numbers: give them in a unit in which they are")
    if np.isnan(damages).any() or (damages == -np.inf).any():
        raise ValueError("damages hold nan or -inf: a choice that there is not has inf")
    if costs.shape[1] > 2**15:
        raise ValueError(f"{costs.shape[1]} choices a block: {2**15} at most")
    return costs.astype(np.int64), damages
