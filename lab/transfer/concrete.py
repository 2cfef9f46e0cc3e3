"""Concrete subspace (arXiv 2312.06173, minimal version): which weights of a merged task vector serve all tasks?

One logit x for each weight, shared by all tasks. In training a soft mask is drawn anew at each step,
m = sigmoid((x + log u - log(1 - u)) / T) with u uniform and T = 0.5; the merged model is
base + lambda * tau * m / mean(m), the mean for each tensor by itself. Only x is trained, on the sum over tasks of the mean
entropy of the predictions (nats): no label is used. Low entropy is confidence, not accuracy: look at both.

`by_block` and `by_task` are its controls, trained in the same way with fewer numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped

from lab import require
from lab.nets import replicas
from lab.nets.replicas import Shape, Weights
from lab.transfer.task_vectors import block_of, norm, scale_blocks, task_arithmetic

TEMPERATURE = 0.5
_QUANTILES = 64  # of u, over which the expected mask is averaged


@dataclass(frozen=True)
class Steps:
    """How masks (or lambdas) are trained: Adam with a constant rate; `batch` examples of each task a step.

    The published run takes 2,000 steps of rate 1e-3. A tenth of the steps with ten times the rate can move x as far.
    """

    steps: int = 200
    rate: float = 1e-2
    batch: int = 8

    def __post_init__(self) -> None:
        vars(self).update(steps=require.whole("steps", self.steps, 0), batch=require.whole("batch", self.batch, 1))
        vars(self).update(rate=require.number("rate", self.rate, above=0))


def masks(
    shape: Shape,
    base: Weights,
    tau: Weights,
    heads: Sequence[Weights],
    inputs: Sequence[Shaped[torch.Tensor, "example position *patch"]],
    *,
    scale: float,
    steps: Steps,
    seed: int,
) -> tuple[Weights, Float[np.ndarray, " step"]]:
    """Train one logit for each weight.

    Args:
        shape: of the model.
        base: body (no head) as a batch of one replica.
        tau: merged task vector, with the base's names.
        heads: final norm and classifier of each task, [1, ...]; they stay as they are.
        inputs: for each task its unlabelled examples: not those that are scored later.
        scale: lambda of the whole update; stays as it is.
        steps: of the training.
        seed: of the batches and of the masks drawn.

    Returns:
        Logits, and the entropy summed over tasks (nats) at each step.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = {name: torch.zeros(value.shape, requires_grad=True) for name, value in tau.items()}
    update = {name: scale * value.float() for name, value in tau.items()}

    def merged() -> Weights:
        drawn = {name: draw(x, generator) for name, x in logits.items()}
        return {name: base[name] + update[name] * m / m.mean() for name, m in drawn.items()}

    entropy = _descend(shape, merged, list(logits.values()), heads, inputs, steps, generator)
    return {name: x.detach() for name, x in logits.items()}, entropy


def by_block(
    shape: Shape,
    base: Weights,
    tau: Weights,
    heads: Sequence[Weights],
    inputs: Sequence[torch.Tensor],
    *,
    scale: float,
    steps: Steps,
    seed: int,
) -> tuple[Weights, Float[np.ndarray, " step"]]:
    """One logit a block, and one for what lies outside of the blocks: the update, so scaled (lambda not in it).

    A factor that is equal in a whole tensor would be divided out by that tensor's mean. So the mean here is over the
    L + 1 factors, and none is drawn at random. Arguments as in `masks`; also returns the entropy at each step.
    """
    x = torch.zeros(shape.n_blocks + 1, requires_grad=True)
    update = {name: scale * value.float() for name, value in tau.items()}
    place = {name: shape.n_blocks if (block := block_of(name)) is None else block for name in tau}

    def factors() -> torch.Tensor:
        soft = torch.sigmoid(x / TEMPERATURE)
        return soft / soft.mean()

    def merged() -> Weights:
        found = factors()
        return {name: base[name] + update[name] * found[place[name]] for name in update}

    entropy = _descend(shape, merged, [x], heads, inputs, steps, torch.Generator().manual_seed(seed))
    found = factors().detach().double().tolist()
    return scale_blocks(tau, found[:-1], found[-1]), entropy


def by_task(
    shape: Shape,
    base: Weights,
    taus: Sequence[Weights],
    heads: Sequence[Weights],
    inputs: Sequence[torch.Tensor],
    *,
    scale: float,
    steps: Steps,
    seed: int,
) -> tuple[Weights, Float[np.ndarray, " step"]]:
    """One lambda for each task and no mask, from `scale` on: the update with the lambdas in it (task-wise AdaMerging).

    Not clamped to [0, 1], unlike the published one. Arguments as in `masks`; also returns the entropy at each step.
    """
    lambdas = torch.full((len(taus),), float(scale), requires_grad=True)
    stacked = {name: torch.stack([tau[name] for tau in taus]).float() for name in taus[0]}

    def merged() -> Weights:
        return {name: base[name] + torch.tensordot(lambdas, value, dims=1) for name, value in stacked.items()}

    entropy = _descend(shape, merged, [lambdas], heads, inputs, steps, torch.Generator().manual_seed(seed))
    found = lambdas.detach().double().tolist()
    scaled = [{n: v * factor for n, v in tau.items()} for factor, tau in zip(found, taus, strict=True)]
    return task_arithmetic(scaled), entropy


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One soft mask: sigmoid((x + log u - log(1 - u)) / T)."""
    u = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((logits + u.logit()) / TEMPERATURE)


def expected(logits: Weights) -> Weights:
    """The mean of all masks that could be drawn: the average over 64 evenly spaced quantiles of u.

    The mask used in the end. The published runs end with one random draw, whose luck is then part of the result; the
    expected mask is what the training saw on average, and it is the same each time.
    """
    noise = ((torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES).logit()
    found = {}
    for name, x in logits.items():
        total = torch.zeros(x.shape, dtype=torch.float64)
        for one in noise:
            total += torch.sigmoid((x.double() + one) / TEMPERATURE)
        found[name] = total / _QUANTILES
    return found


def masked(tau: Weights, mask: Weights) -> Weights:
    """tau * m / mean(m), the mean for each tensor by itself: a constant mask changes nothing."""
    return {name: value * (mask[name].double() / mask[name].double().mean()) for name, value in tau.items()}


def shuffled(mask: Weights, seed: int) -> Weights:
    """The same mask values at other places of the same tensor: equal mean, equal rescale, nothing learned."""
    generator = torch.Generator().manual_seed(seed)
    return {name: m.flatten()[torch.randperm(m.numel(), generator=generator)].view(m.shape) for name, m in mask.items()}


def profile(tau: Weights, mask: Weights, n_blocks: int) -> pd.DataFrame:
    """The mask by block.

    Returns:
        One row a block, and one for what lies outside ("embedding"), with mean_mask and sd_mask over its weights, and
        update_ratio: the norm of the masked update by that of the plain one. The mean itself is divided out of each
        tensor, so mean_mask alone does not say how much of a block is used; update_ratio says how the update's size moved.
    """
    rows, after = [], masked(tau, mask)
    for block in (None, *range(n_blocks)):
        names = [name for name in tau if block_of(name) == block]
        values = torch.cat([mask[name].flatten() for name in names])
        ratio = norm({n: after[n] for n in names}) / norm({n: tau[n] for n in names})
        label = "embedding" if block is None else str(block)
        rows.append((label, float(values.mean()), float(values.std()), ratio))
    return pd.DataFrame(rows, columns=["block", "mean_mask", "sd_mask", "update_ratio"])


def mean_entropy(
    shape: Shape, body: Weights, heads: Weights, inputs: Shaped[torch.Tensor, "task example position *patch"]
) -> Float[torch.Tensor, " task"]:
    """Mean entropy (nats) of the predictions of one body [1, ...] with each task's head [task, ...]."""
    tasks, count = inputs.shape[:2]
    stream = replicas.embed(shape, body, inputs.reshape(1, tasks * count, *inputs.shape[2:]))
    for block in range(shape.n_blocks):
        matrices = [body[f"{block}.{part}"] for part in replicas.IN_BLOCK]
        stream = replicas.run_block(shape, stream, matrices, block == shape.n_blocks - 1)[0]
    log_p = replicas.classify(heads, stream.view(tasks, count, -1)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean(1)


def _descend(
    shape: Shape,
    merged: Callable[[], Weights],
    parameters: list[torch.Tensor],
    heads: Sequence[Weights],
    inputs: Sequence[torch.Tensor],
    steps: Steps,
    generator: torch.Generator,
) -> np.ndarray:
    """Adam on the summed entropy, through the merged model; the entropy at each step."""
    top = replicas.join(heads)
    optimizer = torch.optim.Adam(parameters, lr=steps.rate)
    trace = []
    for _ in range(steps.steps):
        batch = [own[torch.randint(len(own), (steps.batch,), generator=generator)] for own in inputs]
        loss = mean_entropy(shape, merged(), top, torch.stack(batch)).sum()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        trace.append(float(loss.detach()))
    return np.array(trace)
