"""Ways to look for blocks to leave out, each given the same number of evaluations; and what a front is worth.

A method asks a `Ledger` for losses. The ledger notes them in the order asked for; a set that is asked for twice costs nothing
the second time, and when the evaluations are spent the method ends where it is.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import RidgeCV

from lab.depth_budget.pairs import Removed

METHODS = {
    "random": "random sets, sizes in turn",
    "one-shot LIM": "blocks in the order of LIM, the least important first",
    "one-shot removal": "blocks in the order of what their single removal costs",
    "greedy": "the block that costs least beside those that are gone, again and again",
    "greedy, swap": "after each greedy step the best exchange of one block, if any is better",
    "windows": "all ways through a window of blocks, the rest as it is; then the windows across the seams (after UDC)",
    "NSGA-II": "two-objective genetic search (pymoo), started at the full model and few removals",
    "predictor": "NSGA-II on a ridge regression's guesses; what looks best is measured, and the regression fitted again",
    "first to last": "control: the first blocks, one after the other",
    "last to first": "control: the last blocks, one after the other",
}
RANDOM = ("random", "NSGA-II", "predictor")  # these are repeated with several seeds
NEED_PYMOO = ("NSGA-II", "predictor")


@dataclass(frozen=True)
class Space:
    """What may be left out: at most `most` of `blocks`; `lim` of each block; `price`: nats that one block is worth."""

    blocks: tuple[int, ...]
    most: int
    lim: Mapping[int, float]
    price: float
    window: int = 6
    shift: int = 3
    population: int = 20

    @property
    def size(self) -> int:
        return sum(comb(len(self.blocks), r) for r in range(self.most + 1))

    def masks(self, sets: Sequence[Removed]) -> Float[np.ndarray, "set block"]:
        """1 where a block is kept."""
        return np.array([[block not in one for block in self.blocks] for one in sets], float)

    def drawn(self, sizes: Iterable[int], rng: np.random.Generator) -> list[Removed]:
        return [tuple(sorted(map(int, rng.choice(self.blocks, size, replace=False)))) for size in sizes]


class Spent(Exception):
    """No evaluation is left."""


class Ledger:
    """Losses in the order asked for; the intact model's is there from the start and costs nothing."""

    def __init__(self, loss: Callable[[Sequence[Removed]], Float[np.ndarray, " set"]], limit: int) -> None:
        self.loss, self.limit = loss, limit
        self.found: dict[Removed, float] = {(): float(loss([()])[0])}

    def __call__(self, sets: Sequence[Removed]) -> list[float]:
        new = [one for one in dict.fromkeys(sets) if one not in self.found]
        fits = new[: self.limit - self.spent]
        self.found |= dict(zip(fits, map(float, self.loss(fits)), strict=True)) if fits else {}
        if len(new) > len(fits):
            raise Spent
        return [self.found[one] for one in sets]

    @property
    def spent(self) -> int:
        return len(self.found) - 1


def require_pymoo(methods: Sequence[str]) -> None:
    """An ImportError with the line that installs pymoo, where a method needs it and it is not there."""
    wanted = [name for name in NEED_PYMOO if name in methods]
    if wanted and importlib.util.find_spec("pymoo") is None:
        raise ImportError(
            f"{' and '.join(wanted)} need pymoo: run  pip install 'depth-lab[search]'  (or  pip install 'pymoo~=0.6.1'), or "
            "leave them out of methods="
        )


def search(method: str, ledger: Ledger, space: Space, seed: int) -> None:
    """Lets a method ask until it has nothing more to ask or its evaluations are spent."""
    try:
        _SEARCHES[method](ledger, space, np.random.default_rng([seed, list(METHODS).index(method)]))
    except Spent:
        return


# --- the methods ----------------------------------------------------------------------------------------------------


def _random(ask: Ledger, space: Space, rng: np.random.Generator) -> None:
    sizes = cycle(range(1, space.most + 1))
    while len(ask.found) < space.size:
        ask(space.drawn([next(sizes) for _ in range(space.population)], rng))


def _in_order(ask: Ledger, space: Space, importance: Mapping[int, float | int]) -> None:
    order = sorted(space.blocks, key=importance.__getitem__)
    ask([tuple(sorted(order[:r])) for r in range(1, space.most + 1)])


def _one_shot_lim(ask: Ledger, space: Space, rng: np.random.Generator) -> None:
    _in_order(ask, space, space.lim)


def _one_shot_removal(ask: Ledger, space: Space, rng: np.random.Generator) -> None:
    _in_order(ask, space, dict(zip(space.blocks, ask([(block,) for block in space.blocks]), strict=True)))


def _first_to_last(ask: Ledger, space: Space, rng: np.random.Generator) -> None:
    _in_order(ask, space, {block: block for block in space.blocks})


def _last_to_first(ask: Ledger, space: Space, rng: np.random.Generator) -> None:
    _in_order(ask, space, {block: -block for block in space.blocks})


def _greedy(ask: Ledger, space: Space, rng: np.random.Generator, *, swap: bool = False) -> None:
    now: Removed = ()
    for _ in range(space.most):
        now, loss = _best(ask, [_with(now, block) for block in space.blocks if block not in now])
        if swap:
            exchanged = [_with(tuple(b for b in now if b != out), new) for out in now for new in space.blocks
                         if new not in now]  # fmt: skip
            other, its = _best(ask, exchanged) if exchanged else (now, loss)
            now = other if its < loss else now


def _greedy_swap(ask: Ledger, space: Space, rng: np.random.Generator) -> None:
    _greedy(ask, space, rng, swap=True)


def _windows(ask: Ledger, space: Space, rng: np.random.Generator) -> None:
    """The state that goes on has the least loss plus price of the blocks kept; that never rises, so it ends."""
    n = len(space.blocks)
    starts = dict.fromkeys([*range(0, n, space.window), *range(space.shift, n, space.window)])
    now: Removed = ()
    before, cost = None, ask([()])[0]
    while now != before:
        before = now
        for start in starts:
            inside = space.blocks[start : start + space.window]
            outside = tuple(block for block in now if block not in inside)
            sets = [tuple(sorted((*outside, *part))) for size in range(len(inside) + 1)
                    for part in combinations(inside, size) if len(outside) + size <= space.most]  # fmt: skip
            costs = [loss - space.price * len(one) for one, loss in zip(sets, ask(sets), strict=True)]
            best = int(np.argmin(costs))
            if costs[best] < cost:
                now, cost = sets[best], costs[best]


def _genetic(ask: Ledger, space: Space, rng: np.random.Generator) -> None:
    rounds = 20 * (1 + ask.limit // space.population)  # late ones may ask nothing new
    evolve(ask, space, seed=int(rng.integers(2**31)), rounds=rounds)


def _predicted(ask: Ledger, space: Space, rng: np.random.Generator) -> None:
    sizes = cycle(range(1, space.most + 1))
    ask(space.drawn([next(sizes) for _ in range(max(space.population, ask.limit * 2 // 5))], rng))
    while len(ask.found) < space.size:
        model = Predictor(ask.found, space)
        last = evolve(model, space, seed=int(rng.integers(2**31)), rounds=25)
        by_size: dict[int, list[Removed]] = {}
        for one in sorted(
            (one for one in dict.fromkeys(last) if one not in ask.found), key=lambda one: model([one])[0]
        ):
            by_size.setdefault(len(one), []).append(one)
        new = [one for some in by_size.values() for one in some[:2]]  # of each size the two that look best
        ask(new or space.drawn([next(sizes) for _ in range(space.population)], rng))


_SEARCHES: dict[str, Callable[[Ledger, Space, np.random.Generator], None]] = dict(
    zip(METHODS, (_random, _one_shot_lim, _one_shot_removal, _greedy, _greedy_swap, _windows, _genetic, _predicted,
                  _first_to_last, _last_to_first), strict=True)
)  # fmt: skip


def _with(removed: Removed, block: int) -> Removed:
    return tuple(sorted((*removed, block)))


def _best(ask: Ledger, sets: list[Removed]) -> tuple[Removed, float]:
    found = ask(sets)
    return sets[int(np.argmin(found))], min(found)


class Predictor:
    """Loss guessed from which blocks are kept, and which neighbours both are: ridge regression, its penalty by leave-one-out."""

    def __init__(self, found: Mapping[Removed, float], space: Space) -> None:
        self.space = space
        self.ridge = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(self._features(list(found)), list(found.values()))

    def __call__(self, sets: Sequence[Removed]) -> Float[np.ndarray, " set"]:
        return np.asarray(self.ridge.predict(self._features(sets)), float)

    def _features(self, sets: Sequence[Removed]) -> np.ndarray:
        kept = self.space.masks(sets)
        return np.hstack([kept, kept[:, 1:] * kept[:, :-1]])


def evolve(score: Callable[[list[Removed]], Any], space: Space, *, seed: int, rounds: int) -> list[Removed]:
    """NSGA-II on (score, blocks kept); the last population. What removes too much is never scored."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.bitflip import BitflipMutation
    from pymoo.problems.static import StaticProblem

    n, rng = len(space.blocks), np.random.default_rng(seed)
    sizes = [0, *(1 + place % space.most for place in range(space.population - 1))]  # the full model, then few removals
    start = space.masks(space.drawn(sizes, rng)).astype(bool)
    problem = Problem(n_var=n, n_obj=2, n_ieq_constr=1, vtype=bool)
    algorithm: Any = NSGA2(pop_size=space.population, sampling=start, crossover=UniformCrossover(),
                           mutation=BitflipMutation(prob_var=1 / n), eliminate_duplicates=True)  # fmt: skip
    algorithm.setup(problem, termination=("n_gen", rounds), seed=seed, verbose=False)
    while algorithm.has_next():
        asked = algorithm.ask()
        if asked is None or not len(asked):
            break  # no child is new
        kept = np.asarray(asked.get("X"), bool)
        sets = [tuple(block for block, stays in zip(space.blocks, row, strict=True) if not stays) for row in kept]
        values = np.full((len(sets), 2), 1e3)  # stands where too much is removed; such a one ranks last anyhow
        few = [place for place, one in enumerate(sets) if len(one) <= space.most]
        if few:
            values[few] = np.column_stack([score([sets[place] for place in few]), kept[few].sum(1)])
        over = np.array([[len(one) - space.most] for one in sets], float)
        algorithm.evaluator.eval(StaticProblem(problem, F=values, G=over), asked)
        algorithm.tell(infills=asked)
    last = np.asarray(algorithm.pop.get("X"), bool)
    sets = [tuple(block for block, stays in zip(space.blocks, row, strict=True) if not stays) for row in last]
    return [one for one in sets if len(one) <= space.most]


# --- fronts ---------------------------------------------------------------------------------------------------------


def front(best: Mapping[int, float]) -> list[int]:
    """Numbers of blocks kept that no smaller number does as well as; of the least loss by blocks kept."""
    found: list[int] = []
    for kept in sorted(best):
        if all(best[kept] < best[fewer] for fewer in found):
            found.append(kept)
    return found


def hypervolume(best: Mapping[int, float], reference: tuple[int | float, float]) -> float:
    """Area between the least losses by blocks kept and a reference (blocks, loss); what lies beyond it counts nothing.

    >>> hypervolume({3: 1.0, 2: 2.0}, (4, 5.0))
    7.0
    """
    area, lowest = 0.0, reference[1]
    for kept in sorted(best):
        if kept < reference[0] and best[kept] < lowest:
            area += (reference[0] - kept) * (lowest - best[kept])
            lowest = best[kept]
    return area


def growth(
    found: Mapping[Removed, float], n_layers: int, reference: tuple[int | float, float]
) -> Float[np.ndarray, " evaluation"]:
    """Hypervolume after each evaluation, the intact model's alone first."""
    best: dict[int, float] = {}
    areas = []
    for removed, loss in found.items():
        kept = n_layers - len(removed)
        if loss < best.get(kept, np.inf):
            best[kept] = loss
        areas.append(hypervolume(best, reference))
    return np.array(areas)
