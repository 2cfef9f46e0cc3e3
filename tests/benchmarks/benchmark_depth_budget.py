"""How much faster are single changes and pairs when only the blocks from the change on run? No test: it takes minutes.

    python tests/benchmarks/benchmark_depth_budget.py [--model smollm2-135m] [--texts 24] [--pairs 40] [--rounds 3]

In one run, on the same texts, in turn, medians of the rounds:

(a) usual: the kit's interventions around `model(ids)`, logits of all positions;
(b) plain: around whole passes of the blocks, scored at the chosen positions as (c) scores them;
(c) suffix: `Evaluator`, on states that are kept. (a) / (c) is what a user gains, (b) / (c) what is due to the kept states alone.

For every block left out, every block rounded to 3 bits, and a random sample of pairs left out (as neighbours in the order in
which all pairs are taken). Then: mean square of the centred logits' difference from the logits against from the states.
Losses of both ways must agree.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import numpy as np
import torch

import lab
from lab.depth_budget import SKIP, Bits, Evaluator, texts_of
from lab.interventions import reweighted, skip
from lab.lenses import unembed


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def changed(
    score: Callable[..., torch.Tensor],
    model: Any,
    ids: torch.Tensor,
    first: int,
    configurations: list[Mapping[int, Any]],
) -> np.ndarray:
    rows = []
    for one in configurations:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(reweighted(model, {i: change.weights for i, change in one.items() if change != SKIP}))
            for layer in (i for i, change in one.items() if change == SKIP):
                stack.enter_context(skip(model, layer))
            rows.append(score(model, ids, first).numpy())
    return np.array(rows)


def usual(model: Any, ids: torch.Tensor, first: int) -> torch.Tensor:
    log_p = model(ids, use_cache=False)[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[:, first:, 0].double().mean(1)


def chosen(model: Any, ids: torch.Tensor, first: int) -> torch.Tensor:
    states = model.original_model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, first:-1]
    loss = []
    for rows, targets in zip(states.flatten(0, 1).split(512), ids[:, first + 1 :].flatten().split(512), strict=True):
        logits = unembed(model, rows)
        top = torch.cat([some.logsumexp(-1) for some in logits.split(64)])
        loss.append(top - logits.gather(-1, targets[:, None])[:, 0])
    return torch.cat(loss).double().reshape(states.shape[:2]).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = lab.load(options.model)
    n, first = model.cfg.n_layers, 8
    (texts,) = texts_of(model, "prose", sizes=(options.texts,))
    start = int(np.random.default_rng(0).integers(n * (n - 1) // 2 - options.pairs))
    everything: dict[str, list[Mapping[int, Any]]] = {
        "each block left out": [{i: SKIP} for i in range(n)],
        "each block at 3 bits": [{i: Bits(3)} for i in range(n)],
        f"{options.pairs} pairs left out": [dict.fromkeys(pair, SKIP) for pair in combinations(range(n), 2)][
            start : start + options.pairs
        ],
    }
    for name, configurations in everything.items():
        times: dict[str, list[float]] = {"usual": [], "plain": [], "suffix": []}
        for _ in range(options.rounds):
            evaluate = Evaluator(model, texts.ids, first=first, progress=False)
            before = evaluate.passes, evaluate.full
            spent, ours = seconds(lambda: evaluate(configurations).nll)  # noqa: B023
            times["suffix"].append(spent)
            for way, score in (("usual", usual), ("plain", chosen)):
                spent, theirs = seconds(lambda: changed(score, model, texts.ids, first, configurations))  # noqa: B023
                times[way].append(spent)
                apart = np.abs(ours - theirs).max()
                assert apart < 1e-4, apart
        runs = [evaluate.passes - before[0], evaluate.full - before[1]]
        words = []
        for way in ("usual", "plain"):
            ratios = np.array(times[way]) / times["suffix"]
            words.append(f"{way} {np.median(times[way]):.1f} s, {np.median(ratios):.2f} x "
                         f"({ratios.min():.2f} to {ratios.max():.2f})")  # fmt: skip
        print(f"{name}: suffix {np.median(times['suffix']):.1f} s; {'; '.join(words)}; block runs {runs[1]} / {runs[0]} = "
              f"{runs[1] / runs[0]:.2f}; losses apart by {apart:.1e}", flush=True)  # fmt: skip
    hidden = evaluate._hidden
    other = evaluate._run(evaluate._key({n // 2: SKIP}))

    def from_logits() -> torch.Tensor:
        found = []
        for old, new in zip(hidden, other, strict=True):
            change = (unembed(model, new) - unembed(model, old)).double()
            found.append((change - change.mean(-1, keepdim=True)).square().mean())
        return torch.stack(found).mean()

    def from_states() -> torch.Tensor:
        apart = (other - hidden).double()
        return ((apart @ evaluate._metric) * apart).sum(-1).mean()

    with torch.inference_mode():
        rounds = [(seconds(from_logits), seconds(from_states)) for _ in range(options.rounds)]
    ratio = np.median([a[0] / b[0] for a, b in rounds])
    (_, a), (_, b) = rounds[-1]
    print(f"distortion: from logits / from states, ratio {ratio:.0f}; {a:.6f} and {b:.6f}")


if __name__ == "__main__":
    main()
