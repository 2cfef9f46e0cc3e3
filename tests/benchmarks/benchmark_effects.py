"""Skipping every layer, with cuts: the plain loop of hooked forward passes, and the exact short cut, in one run.

    python tests/benchmarks/benchmark_effects.py [--tokens 64] [--cuts 4] [--rounds 3]

Both measure the same: the relative change of every layer's contribution at every measured position, and the change of the
next-token distribution at the read positions. Prints both times, the ratio, and the largest difference between the results.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

import lab
from lab.depth_efficiency.effects import global_effects, skipped
from lab.models import SITES
from lab.runs import CleanRun, clean_run
from lab.texts import tokenize

TEXT = (
    "Problem: Mara has 12 apples and buys 7 more at the market. She then gives 5 apples to her brother and shares the rest "
    "equally with her friend. How many apples does each of the two get? Answer: Mara has 12 + 7 = 19 apples. After giving 5 "
    "away she has 19 - 5 = 14. Shared by two, that makes 14 / 2 = 7. The final answer is 7."
)


def plain_loop(
    model: TransformerBridge, run: CleanRun, cuts: list[int | None], read: list[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """One forward pass for each layer and cut, as one would write it: a hook that skips, hooks that read."""
    n, length = run.n_layers, len(run.ids)
    clean = run.states[1:] - run.states[:-1]
    y = lab.depth_efficiency.effects.probabilities(model, run.states[-1])
    found = []
    for cut in cuts:
        first, end = cut or 0, length if cut is None else cut
        at = [position for position in read if position >= first]
        ratios = np.zeros((n, n, length - first), np.float32)
        output = np.zeros((n, len(at)), np.float32)
        for skip in range(n):
            seen: dict[Any, torch.Tensor] = {}

            def keep(key: Any, seen: dict[Any, torch.Tensor] = seen) -> Any:
                return lambda state, hook: seen.__setitem__(key, state)

            def leave_out(state: torch.Tensor, hook: Any, seen: Any = seen, skip: int = skip, end: int = end) -> Any:
                new = state.clone()
                new[:, 1:end] = seen["pre", skip][:, 1:end]
                return new

            hooks = [(SITES["resid_pre"].format(layer=i), keep(("pre", i))) for i in range(n)]
            hooks.append((SITES["resid_post"].format(layer=skip), leave_out))
            hooks += [(SITES["resid_post"].format(layer=i), keep(("post", i))) for i in range(n)]
            with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
                logits = model.original_model(input_ids=run.ids[None], use_cache=False).logits[0]
            for layer in range(skip + 1, n):
                change = seen["post", layer][0] - seen["pre", layer][0] - clean[layer]
                ratios[skip, layer] = (change.norm(dim=-1) / clean[layer].norm(dim=-1).clamp_min(1e-6))[first:].numpy()
            output[skip] = (logits[at].softmax(-1) - y[at]).norm(dim=-1).numpy()
        found.append((ratios, output))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cuts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = lab.load(arguments.model, device="cpu")
    ids = tokenize(model, [TEXT]).ids[0][: arguments.tokens]
    run = clean_run(model, ids, sublayers=True)
    drawn = np.random.default_rng(0).permutation(np.arange(8, len(ids) - 4, 8))[: arguments.cuts]
    cuts: list[int | None] = [None, *sorted(drawn.tolist())]
    read = sorted({*np.linspace(1, len(ids) - 1, 12).astype(int).tolist()})
    print(
        f"{arguments.model}: {run.n_layers} layers, {len(ids)} tokens, cuts {cuts}, {torch.get_num_threads()} threads"
    )
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    ratios = []
    for round_ in range(arguments.rounds):
        started = time.perf_counter()
        ours = global_effects(model, run, *skipped(model, run, "layer"), cuts=cuts, read=read)
        times["ours"].append(time.perf_counter() - started)
        started = time.perf_counter()
        plain = plain_loop(model, run, cuts, read)
        times["plain"].append(time.perf_counter() - started)
        ratios.append(times["plain"][-1] / times["ours"][-1])
        print(
            f"round {round_ + 1}: plain {times['plain'][-1]:.1f} s, ours {times['ours'][-1]:.1f} s, ratio {ratios[-1]:.2f}"
        )
    apart = max(np.abs(np.triu(np.ones((run.n_layers,) * 2), 1)[..., None] * (a - b.contribution)).max()
                for (a, _), b in zip(plain, ours, strict=True))  # fmt: skip
    heard = max(np.abs(a - b.output).max() for (_, a), b in zip(plain, ours, strict=True))
    print(f"largest difference: contributions {apart:.1e} (relative), output {heard:.1e}")
    print(f"ratio plain / ours {statistics.median(ratios):.2f} (median of {arguments.rounds} rounds, each in one go)")


if __name__ == "__main__":
    main()
