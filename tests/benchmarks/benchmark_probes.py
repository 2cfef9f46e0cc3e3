"""Time and accuracy of the batched probes against scikit-learn, on states shaped like a residual stream.

    python tests/benchmarks/benchmark_probes.py [--repeats 10] [--every 1] [--converged 1]

For every depth, seconds for all problems (splits x real and shuffled labels): scikit-learn as published (lbfgs, 100
iterations), lbfgs to convergence (tol 1e-6, at most 5000 iterations), newton-cholesky (exact), and `fit_batched`. The
two converged references are timed on the first `--converged` splits and scaled up. `stopped` counts fits that lbfgs
gave up. Then the difference of mean test accuracy from batched, in points, the larger of real and shuffled labels. Not
collected by pytest.
"""

import argparse
import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lab.probes import fit_batched, fit_reference, group_splits


def residual_like(
    labels: np.ndarray, d_model: int, *, scale: float, signal: float, rng: np.random.Generator, rank: int = 60
) -> np.ndarray:
    """States [example d_model] with falling spectrum, three massive dimensions and the label along one direction.

    Rows have a low-rank part (singular values as 1/k), small full-rank noise, a large common mean, and three
    coordinates near 300 * scale that vary by a tenth. `signal` is the distance of the class means in units of the noise
    there.
    """
    n = len(labels)
    factors = rng.normal(size=(n, rank)) / np.arange(1, rank + 1)
    states = factors @ rng.normal(size=(rank, d_model)) + 0.3 * rng.normal(size=(n, d_model)) + rng.normal(size=d_model)
    direction = rng.normal(size=d_model)
    states += 0.3 * signal * np.outer(labels - 0.5, direction / np.linalg.norm(direction))
    states[:, :3] += 300 * (1 + 0.1 * rng.normal(size=(n, 3)))
    return scale * states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1500)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--depths", type=int, default=31)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--every", type=int, default=1, help="scikit-learn at every n-th depth only")
    parser.add_argument("--converged", type=int, default=1, help="splits fitted by the converged reference")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    labels = np.arange(options.n) % 2
    splits = group_splits(labels, np.arange(options.n) // 2, repeats=options.repeats)
    shuffled = np.stack([rng.permutation(labels) for _ in splits])
    problems = np.concatenate([np.broadcast_to(labels, splits.shape), shuffled]).T
    train = np.tile(~splits, (2, 1)).T
    few = np.r_[: options.converged, options.repeats : options.repeats + options.converged]  # real and shuffled
    print(f"n={options.n} d_model={options.d_model} problems={problems.shape[1]} threads={torch.get_num_threads()}")
    print("             ------ seconds (stopped) ------                            -- |accuracy - batched|, points --")
    print("depth       lbfgs 100      lbfgs 5000  newton-chol  batched    lbfgs 100   lbfgs 5000   newton-chol")

    def accuracy(decisions: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Mean test accuracy in points, [label set]."""
        right = (decisions > 0) == (problems[:, which] == 1)
        score = np.where(train[:, which], 0, right).sum(0) / (~train[:, which]).sum(0)
        return 100 * score.reshape(2, -1).mean(1)

    every, total = np.arange(problems.shape[1]), problems.shape[1]
    times: list[list[float]] = []
    differences: list[list[float]] = []
    for depth in range(0, options.depths, options.every):
        signal = 6 / (1 + np.exp(-(depth - options.depths / 2)))
        states = residual_like(labels, options.d_model, scale=1 + depth, signal=signal, rng=rng)
        start = time.perf_counter()
        batched = fit_batched(states, problems, train)
        batched_s = time.perf_counter() - start

        def compare(fit, which: np.ndarray, states=states, batched=batched) -> tuple[float, str, float]:
            """Seconds for all problems, fits that stopped early, difference of accuracy."""
            start = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                decisions = np.stack([fit(states, problems[:, p], train[:, p]) for p in which], 1)
            seconds = (time.perf_counter() - start) * total / len(which)
            stopped = f"({sum(issubclass(w.category, ConvergenceWarning) for w in caught)}/{len(which)})"
            return seconds, stopped, np.abs(accuracy(decisions, which) - accuracy(batched[:, which], which)).max()

        rows = [
            compare(fit_reference, every),
            compare(lambda x, y, rows: fit_reference(x, y, rows, max_iter=5000, tol=1e-6), few),
            compare(exact, few),
        ]
        times.append([row[0] for row in rows] + [batched_s])
        differences.append([row[2] for row in rows])
        print(
            f"{depth:5d}",
            " ".join(f"{seconds:7.2f} {stopped:>7s}" for seconds, stopped, _ in rows[:2]),
            f"{rows[2][0]:12.2f} {batched_s:8.2f} ",
            " ".join(f"{difference:12.3f}" for difference in differences[-1]),
            flush=True,
        )
    seconds, worst = np.sum(times, 0), np.max(differences, 0)
    for name, s, d in zip(("lbfgs 100", "lbfgs 5000", "newton-cholesky"), seconds, worst, strict=False):
        print(f"{name}: {s:.1f} s, {s / seconds[-1]:.1f} x batched ({seconds[-1]:.1f} s); at most {d:.3f} points apart")


def exact(states: np.ndarray, labels: np.ndarray, train: np.ndarray, C: float = 1.0) -> np.ndarray:
    """Decision values at scikit-learn's minimum, by its Newton solver (the d_model x d_model Hessian, factorised)."""
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=1000)
    return model.fit(states[train], labels[train]).decision_function(states)


if __name__ == "__main__":
    main()
