"""Third-order attention: a position looks at pairs of positions at once (arXiv 2310.04064); and the task that asks for it.

Row i: softmax over all pairs (j, k) of sum_c q_ic k1_jc k2_kc / sqrt(width), values v1_j * v2_k; n^3 of them, written out.
Match3 is the task of arXiv 2306.02896: is there a pair (j, k) with x_i + x_j + x_k = 0 modulo M? Match2 asks for one j with
x_i + x_j = 0.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch.nn import functional
from tqdm.auto import tqdm

from lab import require
from lab.nets.replicas import Recipe, Weights
from lab.nets.training import one_thread

TASKS = ("match2", "match3")


@dataclass(frozen=True)
class Shape:
    """order 3: third-order attention, 2: the usual one; every layer has it, and a feed-forward net of `hidden` units."""

    order: int
    n_layers: int
    hidden: int
    modulus: int
    d_model: int = 64
    n_heads: int = 4

    def __post_init__(self) -> None:
        require.whole("order", self.order, 2, 3)
        require.whole("modulus", self.modulus, 3)
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight."""
        d = self.d_model
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(self.n_layers):
            found |= {f"{layer}.norm": (d,), f"{layer}.read": (d, (2 * self.order - 1) * d), f"{layer}.write": (d, d)}
            found |= {f"{layer}.mlp_norm": (d,), f"{layer}.in": (d, self.hidden), f"{layer}.bias": (self.hidden,)}
            found |= {f"{layer}.out": (self.hidden, d)}
        ends = {"embedding": (2 * len(frequencies(self.modulus)), d), "empty": (d,), "norm": (d,)}
        return {**ends, **found, "head": (d, len(TASKS)), "head_bias": (len(TASKS),)}

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(int(np.prod(size)) for size in self.sizes().values())


def of_size(order: int, n_layers: int, parameters: int, modulus: int, **sizes: int) -> Shape:
    """The shape whose feed-forward nets bring it nearest to a number of parameters."""
    least = Shape(order, n_layers, 1, modulus, **sizes).parameters
    step = Shape(order, n_layers, 2, modulus, **sizes).parameters - least
    if parameters < least:
        raise ValueError(f"{n_layers} layers have {least} parameters or more, not {parameters}")
    return Shape(order, n_layers, 1 + round((parameters - least) / step), modulus, **sizes)


def frequencies(modulus: int) -> list[int]:
    """1, 2, 4 ... below half of the modulus: how often an input's angle goes round."""
    return list(itertools.takewhile(lambda f: f < modulus / 2, (2**power for power in itertools.count())))


def examples(
    count: int, n: int, modulus: int, generator: torch.Generator
) -> tuple[Int[torch.Tensor, "example position"], Bool[torch.Tensor, "example position task"]]:
    """Uniform numbers below the modulus, and whether each has a match: for Match2 and for Match3; j, k may be i, or one."""
    x = torch.randint(modulus, (count, n), generator=generator)
    pairs = x[:, :, None] + x[:, None, :]
    third = pairs[..., None] + x[:, None, None, :]
    return x, torch.stack([(pairs % modulus == 0).any(-1), (third % modulus == 0).flatten(2).any(-1)], -1)


def initial(shape: Shape, seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Fresh weights of size 1 / sqrt(inputs), smaller where they write to the stream; gains 1, biases 0."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, size in shape.sizes().items():
        if name.endswith("norm") or name.endswith("bias"):
            found[name] = torch.full(size, float(name.endswith("norm")), dtype=dtype)
        else:
            write = (2 * shape.n_layers) ** -0.5 if name.endswith(("write", "out")) else 1.0
            drawn = torch.randn(*size, generator=generator, dtype=torch.float64)
            found[name] = (drawn * write * (size[0] if len(size) > 1 else 1) ** -0.5).to(dtype)
    return found


def attention(
    parts: Sequence[Float[torch.Tensor, "example head position width"]],
) -> Float[torch.Tensor, "example head position width"]:
    """Of q, k, v the usual attention; of q, k1, k2, v1, v2 third-order attention, as the usual one over n^2 pairs."""
    if len(parts) == 3:
        q, k, v = parts
        return functional.scaled_dot_product_attention(q, k, v)
    q, k1, k2, v1, v2 = parts
    pairs, values = ((a[..., :, None, :] * b[..., None, :, :]).flatten(-3, -2) for a, b in ((k1, k2), (v1, v2)))
    return functional.scaled_dot_product_attention(q, pairs, values)


def forward(
    shape: Shape, weights: Weights, x: Int[torch.Tensor, "example position"]
) -> Float[torch.Tensor, "example position task"]:
    """Log-odds that a position has a match. Numbers enter as cosines and sines of their angles; one empty position is added."""
    angles = 2 * np.pi / shape.modulus * x[..., None] * torch.tensor(frequencies(shape.modulus))
    waves = torch.cat([angles.cos(), angles.sin()], -1).to(weights["embedding"].dtype)
    stream = torch.cat([waves @ weights["embedding"], weights["empty"].expand(len(x), 1, -1)], 1)

    def normed(name: str) -> torch.Tensor:
        return functional.layer_norm(stream, (shape.d_model,), weights[name])

    for layer in range(shape.n_layers):
        read = (normed(f"{layer}.norm") @ weights[f"{layer}.read"]).chunk(2 * shape.order - 1, -1)
        found = attention([part.unflatten(-1, (shape.n_heads, -1)).transpose(1, 2) for part in read])
        stream = stream + found.transpose(1, 2).flatten(2) @ weights[f"{layer}.write"]
        hidden = functional.relu(normed(f"{layer}.mlp_norm") @ weights[f"{layer}.in"] + weights[f"{layer}.bias"])
        stream = stream + hidden @ weights[f"{layer}.out"]
    return (normed("norm") @ weights["head"] + weights["head_bias"])[:, :-1]


def train(
    shape: Shape, n: int, recipe: Recipe, *, seed: int, looks: int = 8, tested: int = 2000, progress: bool = False
) -> list[dict[str, Any]]:
    """Train one net on both tasks with fresh examples at each step; its accuracy on others, `looks` times on the way.

    Returns:
        For each look and task: step, task, accuracy, majority (the share of the more frequent answer).
    """
    weights = {name: value.requires_grad_() for name, value in initial(shape, seed).items()}
    optimizer = torch.optim.AdamW(
        list(weights.values()), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.decay, fused=True
    )
    fresh, held = (torch.Generator().manual_seed(2 * seed + place) for place in (0, 1))
    x_test, match_test = examples(tested, n, shape.modulus, held)
    ends = set(np.linspace(0, recipe.steps, looks + 1).round().astype(int)[1:].tolist())
    rows: list[dict[str, Any]] = []
    with one_thread():
        for step in tqdm(range(recipe.steps), desc="training", disable=not progress, leave=False):
            x, match = examples(recipe.batch, n, shape.modulus, fresh)
            loss = functional.binary_cross_entropy_with_logits(forward(shape, weights, x), match.float())
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step + 1 in ends:
                with torch.inference_mode():
                    said = torch.cat([forward(shape, weights, part) > 0 for part in x_test.split(250)])
                right = (said == match_test).double().mean((0, 1))
                share = match_test.double().mean((0, 1))
                for task, accuracy, yes in zip(TASKS, right.tolist(), share.tolist(), strict=True):
                    rows.append({"step": step + 1, "task": task, "accuracy": accuracy, "majority": max(yes, 1 - yes)})
    return rows
