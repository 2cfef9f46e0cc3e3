"""What the output loses when a share of a block's weights goes, or of one matrix: measured curves, for the programme.

Magnitude by magnitude inside each matrix, after layer-adaptive pruning (arXiv 2308.10438). Its code takes rates 0, .01 .. 1;
here some are measured, and the hundredths between them lie on powers of the rate.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from transformer_lens.model_bridge import TransformerBridge

from lab import statistics
from lab.depth_budget.changes import Pruned
from lab.depth_budget.evaluation import Evaluator, Measured, Texts
from lab.depth_budget.programme import MOST_STATES, allocate
from lab.interventions import block_matrices

GRID = np.round(np.arange(101) / 100, 2)


def curves(evaluate: Evaluator, rates: Sequence[float], texts: Texts, seed: int, *, matrices: int = 0) -> pd.DataFrame:
    """One row a block and hundredth; or, of so many `matrices` a block, one row a block, matrix and hundredth."""
    parts = [(layer, matrix) for layer in range(evaluate.n) for matrix in (range(matrices) if matrices else [None])]
    measured = [0.0, *rates]
    asked = [{layer: _pruned(rate, matrix, matrices)} for layer, matrix in parts for rate in measured]
    found: Measured = evaluate(asked)
    drawn = statistics.cluster_bootstrap(found.distortion.T, texts.groups, seed=seed)
    rise, frames = (found.nll - evaluate.intact).mean(1), []
    at = np.round(100 * np.array(measured)).astype(int)
    for part, (layer, matrix) in enumerate(parts):
        mine = slice(part * len(measured), (part + 1) * len(measured))
        frame = pd.DataFrame({"layer": layer, "rate": GRID, "is_measured": False,
                              "raw": interpolated(GRID, measured, found.distortion[mine].mean(1))})  # fmt: skip
        if matrix is not None:
            frame.insert(1, "matrix", matrix)
        frame["monotone"] = monotone_curve(frame.raw.to_numpy())
        frame.loc[at, "is_measured"] = True
        for name, values in {"low": drawn.low, "high": drawn.high, "rise": rise, "kl": found.kl.mean(1)}.items():
            frame.loc[at, name] = np.asarray(values)[mine]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _pruned(rate: float, matrix: int | None, n: int) -> Pruned:
    return Pruned(rate) if matrix is None else Pruned(tuple(rate if i == matrix else 0.0 for i in range(n)))


def best_shares(raw: Float[np.ndarray, "part rate"], sizes: Sequence[int], gone: int) -> Int[np.ndarray, " part"]:
    """Hundredths of each part that go: of all choices that spare at most the rest, that whose curves add up to least.

    Args:
        raw: curves on the hundredths. sizes: weights of each part, in any unit. gone: hundredths of a unit that have to go.
    """
    costs = np.outer(sizes, 100 - np.arange(101))  # what is kept
    monotone = np.array([monotone_curve(row) for row in raw])
    realised = np.array([realised_rates(row) for row in raw])
    chosen = allocate(costs, monotone, 100 * sum(sizes) - gone)
    return realised[range(len(raw)), chosen]


def matrix_units(model: TransformerBridge) -> tuple[list[str], list[int]]:
    """Names of a block's matrices, and their sizes in the largest unit that divides them.

    Raises:
        ValueError: blocks are not alike, or the programme would have too many states.
    """
    wrapped = "._original_component"  # TransformerLens's own
    names = {id(w): name.replace(wrapped, "") for name, w in model.original_model.named_parameters()}
    blocks = [[w for w, _ in block_matrices(model, layer)] for layer in range(model.cfg.n_layers)]
    sizes = [[w.numel() for w in block] for block in blocks]
    if any(one != sizes[0] for one in sizes):
        raise ValueError(
            "matrix_rates: blocks differ in the sizes of their matrices; give (), for shares of whole blocks"
        )
    unit = math.gcd(*sizes[0])
    units = [size // unit for size in sizes[0]]
    if 100 * sum(units) * len(blocks) ** 2 * len(units) > MOST_STATES:
        raise ValueError(f"matrix_rates: sizes of matrices {sizes[0]} share no divisor that is large enough for an exact "
                         "programme; give (), for shares of whole blocks")  # fmt: skip
    return [".".join(names[id(w)].split(".")[-3:-1]) for w in blocks[0]], units


def interpolated(
    grid: Shaped[np.ndarray, " place"], rates: Sequence[float], values: Shaped[np.ndarray, " rate"]
) -> Shaped[np.ndarray, " place"]:
    """Powers of the rate between measured ones (log D is a line in log r), the first power going on down to D(0) = 0.

    Curves are convex at small rates; straight lines would lie far above them and draw the programme to measured rates.
    Next to a zero there is no power: there it is a straight line. `rates` begin with 0.

    >>> interpolated(np.array([0.0, 0.1, 0.2, 0.3, 0.4]), [0.0, 0.2, 0.4], np.array([0.0, 4.0, 16.0])).round(3).tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    found = np.interp(grid, rates, values)
    for left in range(1, len(rates) - 1):
        (a, b), (low, high) = rates[left : left + 2], values[left : left + 2]
        if low > 0 and high > 0 and values[0] == 0:
            power = np.log(high / low) / np.log(b / a)
            inside = (grid > a) & (grid < b)
            found[inside] = low * (grid[inside] / a) ** power
            if left == 1:
                below = (grid > 0) & (grid < a)
                found[below] = low * (grid[below] / a) ** max(power, 1)
    return found


def monotone_curve(raw: Shaped[np.ndarray, " rate"]) -> Shaped[np.ndarray, " rate"]:
    """The least value at each rate or a higher one: pruning more and losing less is open to whoever may prune less.

    >>> monotone_curve(np.array([0.0, 3.0, 2.0, 5.0])).tolist()
    [0.0, 2.0, 2.0, 5.0]
    """
    return np.minimum.accumulate(raw[::-1])[::-1]


def realised_rates(raw: Float[np.ndarray, " rate"]) -> Int[np.ndarray, " rate"]:
    """For each place of the curve the first place from there on with the monotone value: what is pruned when it is chosen.

    >>> realised_rates(np.array([0.0, 3.0, 2.0, 2.0, 5.0])).tolist()
    [0, 2, 2, 3, 4]
    """
    return np.array([place + int(raw[place:].argmin()) for place in range(len(raw))])
