"""The programme against brute force, ties and budgets that nothing fits included; local search."""

import time
from itertools import product

import numpy as np
import pytest

from lab.depth_budget.programme import allocate, exchanged, uniform


def brute_force(costs, damages, budget):
    """Least damage, then least cost, then the lowest choices; None where nothing fits."""
    rows = range(len(costs))
    every = [
        (sum(damages[i][c] for i, c in enumerate(path)), sum(costs[i][c] for i, c in enumerate(path)), path)
        for path in product(range(len(costs[0])), repeat=len(costs))
    ]
    fitting = [one for one in every if one[1] <= budget and np.isfinite(one[0])]
    assert len(every) == len(costs[0]) ** len(rows)
    return list(min(fitting)[2]) if fitting else None


def test_equals_brute_force_on_1000_tables():
    draw, infeasible, above, absent = np.random.default_rng(0), 0, 0, 0
    for _ in range(1000):
        costs = draw.integers(0, 12, (5, 5)) * draw.integers(1, 4)  # a common divisor, equal costs, no order
        damages = draw.integers(0, 6, (5, 5)).astype(float)  # many ties, and sums without rounding
        if draw.random() < 0.3:
            damages[draw.random((5, 5)) < 0.3] = np.inf
        budget = int(draw.integers(0, 40))
        above += bool((costs > budget).any())
        wanted = brute_force(costs.tolist(), damages.tolist(), budget)
        if wanted is None:
            infeasible += 1
            absent += bool(np.isinf(damages).all(1).any())
            with pytest.raises(ValueError, match="at least|no choice"):
                allocate(costs, damages, budget)
        else:
            assert allocate(costs, damages, budget).tolist() == wanted
    assert infeasible > 30 and above > 300  # the cases are there


def test_equals_brute_force_on_tables_of_reals():
    draw = np.random.default_rng(1)
    for _ in range(100):
        costs, damages = draw.integers(-5, 9, (4, 5)), draw.normal(size=(4, 5))
        budget = int(costs.min(1).sum() + draw.integers(0, 20))
        assert allocate(costs, damages, budget).tolist() == brute_force(costs.tolist(), damages.tolist(), budget)


def test_keeps_the_budget_and_is_never_worse_than_uniform():
    draw = np.random.default_rng(2)
    costs = np.tile(np.arange(101), (30, 1))
    for budget in (0, 1, 299, 1500, 2999, 3000, 9999):
        damages = np.sort(draw.exponential(size=(30, 101)), 1)[:, ::-1]
        path = allocate(costs, damages, budget)
        same = uniform(costs, budget)
        assert costs[range(30), path].sum() <= budget and costs[range(30), same].sum() <= budget
        assert damages[range(30), path].sum() <= damages[range(30), same].sum()


def test_a_big_case_takes_about_a_second():
    draw, began = np.random.default_rng(3), time.perf_counter()
    costs = np.tile(np.arange(101), (30, 1))
    path = allocate(costs, draw.random((30, 101)), 3000)
    assert len(path) == 30
    assert time.perf_counter() - began < 5  # a fifth of a second alone, and machines are shared


def test_many_units_with_a_common_divisor_are_few_states():
    weights = 3_538_944 // 4
    costs = np.tile(np.arange(5) * weights, (30, 1))
    damages = np.random.default_rng(4).random((30, 5))
    wanted = allocate(np.tile(np.arange(5), (30, 1)), damages, 61)
    assert allocate(costs, damages, 61 * weights + 17).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("costs", "damages", "budget", "message"),
    [
        ([[2, 3], [4, 9]], [[0, 0], [0, 0]], 5, "budget=5: 2 blocks cost 6 at least"),
        ([[2, 3]], [[np.inf, np.inf]], 5, "block 0 has no choice"),
        ([[0.5, 1]], [[0, 0]], 5, "whole numbers"),
        ([[1, 2]], [[0, np.nan]], 5, "nan"),
        ([[1, 2]], [[0, 1, 2]], 5, "shape"),
        ([[0, 10**9 + 7, 10**9 + 8]] * 2, [[0, 1, 2]] * 2, 10**12, "coarser unit"),
    ],
)
def test_tables_that_do_not_do(costs, damages, budget, message):
    with pytest.raises(ValueError, match=message):
        allocate(costs, damages, budget)


def test_uniform_that_does_not_fit():
    with pytest.raises(ValueError, match="budget=3: the same choice in each of 2 blocks costs 4 at least"):
        uniform([[2, 3], [2, 3]], 3)


def test_swaps_find_the_optimum_of_a_convex_case_and_count_what_they_measure():
    costs, asked = np.tile(np.arange(11), (4, 1)), []
    slopes = np.array([1.0, 2.0, 4.0, 8.0])

    def damage(path):
        asked.append(tuple(path))
        assert costs[range(4), path].sum() <= 20
        return float((slopes * (10 - path) ** 2).sum())

    start = uniform(costs, 20)
    path, stood = exchanged(costs, start, 20, damage, tries=500, steps=(1, 3), seed=0)
    assert len(asked) == len(stood) <= 501 and stood[0] == damage(start) and stood[-1] == damage(path)
    assert (np.diff(stood) <= 0).all()
    table = slopes[:, None] * (10 - np.arange(11)) ** 2
    assert stood[-1] == table[range(4), allocate(costs, table, 20)].sum()
    assert exchanged(costs, start, 20, damage, tries=0)[0].tolist() == start.tolist()
    with pytest.raises(ValueError, match="within budget=3"):
        exchanged(costs, start, 3, damage, tries=1)
