"""Closed-form maps against the published recipe, on the same states, in one run.

    python tests/benchmarks/benchmark_maps.py [--model smollm2-135m] [--documents 122] [--source 10] [--targets 5 15 25]

The recipe (arXiv 2505.13898, section 6): for one source depth one affine map to the target depths, plain mean squared
error on raw states, AdamW with learning rate 2.5e-4 (200 steps of warm-up, cosine to a tenth), weight decay 0.01,
gradient clip 0.25, 10,000 steps. Theirs had batches of 64 x 512 tokens of C4, new ones at each step; here a batch is
`--batch` tokens drawn from the training documents. Ours is `linear_maps.fit_all` on the same training documents, the ridge chosen
on the validation documents. Both are tested on the same test documents; collecting the states is in neither time.
Prints, at some numbers of steps, error and time of the recipe, and then ours with the ratio. Not collected by pytest.
"""

import argparse
import time

import numpy as np
import torch

import lab
from lab import maps
from lab.depth_efficiency.linear_maps import fit_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=122)
    parser.add_argument("--source", type=int, default=10)
    parser.add_argument("--targets", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    prose = lab.datasets.load("prose").head(options.documents)
    texts = prose.text.tolist()
    model = lab.load(options.model, device="cpu")
    tokens = lab.texts.tokenize(model, texts)
    aligned = maps.align(tokens, tokens)
    split = maps.split_documents(prose.group.to_numpy(), seed=options.seed)
    order = np.argsort(split, kind="stable")
    counts = np.array([len(at) for at in aligned.positions_a])
    depths = ((options.source,), tuple(options.targets))
    ends = np.cumsum([counts[split == part].sum() for part in range(3)])
    train, validation, test = (slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True))
    with maps.collected((model, model), (tokens, tokens), aligned, depths, order, memory_mb=4000) as states:
        print(f"{options.model}: {ends[0]} tokens to train on, {ends[2] - ends[1]} to test, depth {options.source} to "
              f"{options.targets}, threads={torch.get_num_threads()}")  # fmt: skip
        start = time.perf_counter()
        tested = counts[order[split[order] == 2]]
        fitted = fit_all(states, [train, validation, test], tested, maps.RIDGES)
        ours_s = time.perf_counter() - start
        ours = fitted.columns["r2"][0], fitted.columns["relative_error"][0]
        x = torch.from_numpy(states[0][0])
        y = torch.from_numpy(np.concatenate(list(states[1]), axis=1))
    print(" steps  seconds    R2 by target depth        |y - f(x)| / |y|")
    theirs_s, theirs = recipe(x, y, train, test, len(options.targets), options)
    print(f"  ours {ours_s:8.2f}    {numbers(ours[0])}    {numbers(ours[1])}")
    print(f"  mean                                       {numbers(fitted.columns['mean_only_relative_error'][0])}")
    print(f"Ours takes 1/{theirs_s / ours_s:.0f} of the time.")
    print(f"Ours minus theirs, worst target: error {max(ours[1] - theirs[1]):+.4f}, R2 {min(ours[0] - theirs[0]):+.4f}")


def recipe(
    x: torch.Tensor, y: torch.Tensor, train: slice, test: slice, n_targets: int, options: argparse.Namespace
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """Seconds of training, and R2 and relative error of each target at the end."""
    torch.manual_seed(options.seed)
    net = torch.nn.Linear(x.shape[1], y.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2.5e-4, weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, min(200, options.steps // 2))
    rest = max(1, options.steps - min(200, options.steps // 2))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rest, eta_min=2.5e-5)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [min(200, options.steps // 2)])
    draw, seconds = torch.Generator().manual_seed(options.seed), 0.0
    shown = {round(options.steps * share) for share in (0.01, 0.1, 0.3, 1)}
    for step in range(1, options.steps + 1):
        start = time.perf_counter()
        rows = torch.randint(train.start, train.stop, (options.batch,), generator=draw)
        loss = torch.nn.functional.mse_loss(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.25)
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if step in shown:
            with torch.inference_mode():
                found = scores(net(x[test]).double(), y[test].double(), n_targets)
            print(f"{step:6d} {seconds:8.2f}    {numbers(found[0])}    {numbers(found[1])}", flush=True)
    return seconds, found


def scores(said: torch.Tensor, true: torch.Tensor, n_targets: int) -> tuple[np.ndarray, np.ndarray]:
    """R2 over tokens and dimensions, and mean |y - f(x)| / |y|, of each target."""
    r2, error = [], []
    for f, y in zip(said.chunk(n_targets, 1), true.chunk(n_targets, 1), strict=True):
        r2.append(1 - float((y - f).square().sum() / (y - y.mean(0)).square().sum()))
        error.append(float(((y - f).norm(dim=1) / y.norm(dim=1)).mean()))
    return np.array(r2), np.array(error)


def numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:7.4f}" for value in values)


if __name__ == "__main__":
    main()
