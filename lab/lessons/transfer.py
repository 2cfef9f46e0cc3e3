"""Checks of lesson 04, transfer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformer_lens.model_bridge import TransformerBridge

from lab.interventions import patch
from lab.lessons import exercise, nets
from lab.runs import clean_run
from lab.texts import tokenize

TEXT = "The sun is a star, and the moon"


@exercise(lambda: nets.train)
def train(answer: Any) -> str | None:
    weights, still = nets.fresh(0, 2), nets.fresh(0, 2)
    made = nets.tasks_of(2)
    _, b = nets.halves(made)
    try:
        found = answer(weights, b.x, b.y, frozen=2, steps=3)
    except RuntimeError as error:
        if "grad" not in str(error):
            raise
        return (
            f"PyTorch says: {error}. The loss must depend on `free`: give forward the frozen layers and then the free "
            "ones, and let each free layer ask for its gradient with .requires_grad_()."
        )
    if not all(torch.equal(one, other) for one, other in zip(weights, still, strict=True)):
        return (
            "The weights that you were given have changed. Other nets start from the same ones: make each free layer a "
            "copy of its own, with .clone()."
        )
    if not isinstance(found, list | tuple):
        return f"train must return a list of layers; it returned {type(found).__name__}. Is there a “return”?"
    if len(found) != nets.LAYERS:
        return f"You returned {len(found)} layers, and the net has {nets.LAYERS}: the frozen ones first, then the trained ones."
    if any(one.requires_grad for one in found):
        return "The trained layers still ask for gradients, and a net made of them would, too. Return layer.detach()."
    moved = [not torch.equal(one, other) for one, other in zip(found, still, strict=True)]
    if not any(moved):
        return "No layer has changed. Does the optimizer get the layers that forward uses?"
    if all(moved):
        return "frozen=2, and all six layers have changed. Only weights[frozen:] may be free."
    if moved == [True] * 4 + [False] * 2:
        return "You froze the LAST two layers. The first two, weights[:frozen], shall stay."
    if moved != [False] * 2 + [True] * 4:
        which = ", ".join(str(place) for place, one in enumerate(moved) if not one)
        return f"With frozen=2 layers 0 and 1 shall stay, and no others; here these stayed: {which}. Off by one?"
    own = nets.train(weights, b.x, b.y, frozen=2, steps=3)
    if not all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, own, strict=True)):
        return (
            "The right layers train, but not to the same values. Leave the loss, the rate and the steps as they were."
        )
    return None


def _own_paired() -> Callable[..., tuple[float, float]]:
    def interval(first: Any, second: Any) -> tuple[float, float]:
        both = stats.ttest_rel(100 * np.asarray(first), 100 * np.asarray(second))
        ends = both.confidence_interval(0.95)
        return float(ends.low + ends.high) / 2, float(ends.high - ends.low) / 2

    return interval


@exercise(_own_paired)
def paired(answer: Any) -> str | None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.5, 0.8, nets.SPLITS)
    first, second = hard + rng.uniform(0.08, 0.14, nets.SPLITS), hard
    found = answer(first, second)
    if not isinstance(found, tuple) or len(found) != 2:
        return f"Return two numbers, (mean, reach); you returned {found!r}."
    if np.ndim(found[0]) or np.ndim(found[1]):
        return "Give one number for all splits: the mean of the differences, and how far the interval reaches."
    (mean, reach), (wanted_mean, wanted) = map(float, found), _own_paired()(first, second)
    if np.isclose(mean, -wanted_mean):
        return "The sign is turned: first minus second, so that above 0 means that the first is better."
    if np.isclose(mean, wanted_mean / 100):
        return "That is a share. In points it is 100 times as much, mean and reach alike."
    if not np.isclose(mean, wanted_mean):
        return f"The mean difference should be {wanted_mean:.2f} points here; yours is {mean:.2f}."
    n = len(first)
    names = {
        "You left out the square root of the number of splits: the MEAN of twelve is known better than one.": n**0.5,
        "That is the standard error. Times T, it becomes half of a 95 % interval.": 1 / stats.t.ppf(0.975, n - 1),
        "Divide by n - 1, not by n, in the standard deviation: .std(ddof=1).": ((n - 1) / n) ** 0.5,
        "1.96 is for many splits. With twelve it is T, about 2.2.": 1.96 / stats.t.ppf(0.975, n - 1),
        "That is the whole width. The reach is half of it, to one side of the mean.": 2.0,
    }
    for words, factor in names.items():
        if np.isclose(reach, wanted * factor, rtol=2e-3):
            return words
    spread = 100 * np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / n) * stats.t.ppf(0.975, n - 1)
    if reach > 0.8 * spread:
        return (
            f"Your reach is {reach:.1f} points and should be {wanted:.1f}. You let in how much the splits differ from each "
            "other. Subtract split by split FIRST; then take the standard deviation of the differences."
        )
    if not np.isclose(reach, wanted, rtol=2e-3):
        return (
            f"The reach should be {wanted:.2f} points here; yours is {reach:.2f}. T * standard deviation / root of n."
        )
    return None


def _own_n_star() -> Callable[..., int | None]:
    def first(lows: Sequence[float]) -> int | None:
        onward = np.logical_and.accumulate(np.asarray(lows)[::-1] > 0)
        return len(lows) - int(onward.sum()) + 1 if onward.any() else None

    return first


@exercise(_own_n_star)
def n_star(answer: Any) -> str | None:
    falls_back = answer([-1.0, 2.0, -0.5, 1.0, 3.0])
    if falls_back == 2:
        return "Lows -1, 2, -0.5, 1, 3: you stopped at n = 2, but n = 3 is not above 0. ALL larger n must be, too."
    if falls_back == 3 and answer([1.0, 1.0]) == 0:
        return "That counts from 0. The first entry belongs to n = 1."
    if falls_back == 5:
        return "That is the last n above 0. Wanted is the first n from which on all are."
    for lows, wanted in (
        ([-1.0, 2.0, -0.5, 1.0, 3.0], 4), ([1.0, 1.0], 1), ([1.0, -1.0], None), ([-1.0, 0.0], None), ([-1.0, 5.0], 2),
    ):  # fmt: skip
        found = answer(list(lows))
        if found != wanted:
            return f"For the lows {lows} the answer is {wanted}; you gave {found!r}."
    return None


def _own_graft(model: TransformerBridge) -> Callable[..., Any]:
    return lambda donor: lambda state, hook: donor[None].to(state).expand_as(state).clone()


@exercise(_own_graft)
def graft(answer: Any, model: TransformerBridge) -> str | None:
    ids = tokenize(model, [TEXT]).ids
    states = clean_run(model, ids[0]).states
    donor, old = states[4], states[8][None].clone()
    before, hook = old.clone(), answer(donor)
    if not callable(hook):
        return f"graft must return the inner function; it returned {hook!r}. End it with “return hook_fn”."
    new = hook(old, None)
    if new is None:
        return "Your hook returns nothing, so the model keeps its own stream. A hook that changes something returns it."
    if not torch.equal(old, before):
        return (
            "Your hook wrote into the state that it was given. Others may hold the same one: make a copy first, "
            "state.clone()."
        )
    if tuple(new.shape) != tuple(old.shape):
        return f"Your hook returns the shape {tuple(new.shape)}; the model needs [1, position, d_model], {tuple(old.shape)}."
    if torch.equal(new[0, -1], donor[-1]) and not torch.equal(new[0, 0], donor[0]):
        return "Only the last token's state comes from the donor. Put in those of all tokens."
    if torch.equal(new, before):
        return "Your hook returns the model's own state. Write the donor into row 0 of the copy."
    if not torch.equal(new[0], donor):
        return "What your hook returns is not the donor's stream. Nothing is added or scaled: it takes the place."
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.8.hook_resid_pre", hook)]):
        found = model(ids)
    with torch.no_grad(), patch(model, "resid_pre", layer=8, value=donor[None]):
        wanted = model(ids)
    if not torch.allclose(found, wanted, atol=1e-3):
        return "With your hook in place, the model does not say what it says on the donor's stream."
    return None


def _own_between() -> Callable[..., list[torch.Tensor]]:
    return lambda old, new, steps: [torch.lerp(a, b, float(s)) for a, b, s in zip(old, new, steps, strict=True)]


@exercise(_own_between)
def between(answer: Any) -> str | None:
    old, new = [torch.zeros(1, 3, 2), torch.ones(1, 3, 2)], [torch.full((1, 3, 2), 4.0), torch.full((1, 3, 2), 3.0)]
    found = answer(old, new, [0.25, 1.0])
    if not isinstance(found, list | tuple) or len(found) != 2:
        return (
            f"Return a list with one layer for each of old; you returned {type(found).__name__}. Is there a “return”?"
        )
    values = [float(one.mean()) for one in found]
    if values == [1.0, 3.0]:
        return None
    if values == [3.0, 1.0]:
        return "That is the wrong way round: step 0 stays at the old layer, step 1 arrives at the new one."
    if values in ([1.0, 1.5], [4.0, 3.0]):
        return "Each layer has a step of its own: walk along old, new and steps together, with zip."
    if values == [1.0, 2.0]:
        return "That is the step alone. Start at the old layer: old + step * (new - old)."
    if values == [1.0, 4.0]:
        return "You add a part of the NEW layer. Add a part of the difference, new - old."
    return f"From 0 to 4 a quarter of the way is 1, from 1 to 3 all the way is 3; you gave {values[0]:g} and {values[1]:g}."
