"""Checks of lesson 05, depth budget."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from lab.depth_budget import round_to_nearest
from lab.lessons import exercise
from lab.lessons.layers import losses
from lab.lessons.spend import matrices
from lab.texts import tokenize

TEXTS = ("The sun is very hot today", "My dog ate all of the")


def _ids(model: TransformerBridge) -> torch.Tensor:
    return tokenize(model, TEXTS).ids[:, :5].to(model.cfg.device)


# --- 1: round to nearest --------------------------------------------------------------------------------------------


def _own_rounded() -> Callable[..., torch.Tensor]:
    return lambda matrix, bits, group_size=64: round_to_nearest(matrix, bits, group_size, offset="least")


def _misread(weight: torch.Tensor, bits: int, size: int) -> dict[str, torch.Tensor]:
    """Wrong ways to round a matrix, each under what to say about it."""
    own, parts = _own_rounded(), weight.unflatten(1, (-1, size))
    low, high = parts.aminmax(dim=-1, keepdim=True)
    whole, gap = high - low, (high - low) / (2**bits - 1)
    most = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)

    def on(step: torch.Tensor) -> torch.Tensor:
        return ((parts - low) / step).round() * step + low

    return {
        "Your groups lie along the outputs. A group is a run of neighbouring INPUTS of one row: [output, group, input of "
        "the group].": own(weight.T, bits, size).T,
        "You take the whole matrix as one group. Each group has a least and a greatest value of its own.": own(
            weight.reshape(1, -1), bits, weight.numel()
        ),
        f"You make {2**bits} steps from low to high. {2**bits} levels have one step fewer between them.": on(
            whole / 2**bits
        ),
        f"With {bits} bits there are 2**{bits} levels, not {bits}.": on(whole / (bits - 1)),
        "You round down, to the level below. Round to the NEAREST one: .round().": ((parts - low) / gap).floor() * gap
        + low,
        "Something is cut off, or the levels lie symmetrically around 0. Let them reach from the least to the greatest "
        "value of the group.": (parts / most).round().clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) * most,
        "The values start at 0 in each group. Add low again at the end.": ((parts - low) / gap).round() * gap,
        "You round multiples of step, so low and high need not be levels. Take low away before, and add it "
        "afterwards.": (parts / gap).round() * gap,
    }


@exercise(_own_rounded)
def rounded(answer: Any) -> str | None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    given = weight.clone()
    found, wanted = answer(given, 3, 4), _own_rounded()(weight, 3, 4)
    if not isinstance(found, torch.Tensor):
        return f"rounded must return a tensor; it returned {type(found).__name__}. Is there a “return”?"
    if not torch.equal(given, weight):
        return "The weights that you were given are changed, and the model needs them again. Make a new matrix."
    if found.shape != weight.shape:
        return (
            f"A matrix of shape {tuple(weight.shape)} came back as {tuple(found.shape)}. At the end, give the groups the "
            "shape of the weight again."
        )
    if not torch.allclose(found, wanted, atol=1e-5):
        for words, wrong in _misread(weight, 3, 4).items():
            if torch.allclose(found, wrong.reshape(weight.shape), atol=1e-5):
                return words
        return (
            "The values are not the nearest levels. In each group: how many steps of size step lies a weight above low? "
            "Round that number, and go back."
        )
    same = torch.allclose(answer(given, 2, 2), _own_rounded()(weight, 2, 2), atol=1e-5)
    return None if same else "With 2 bits and groups of 2 it is not right. Use bits and group_size."


# --- 2: the price ---------------------------------------------------------------------------------------------------


@exercise(lambda: 3.5)
def price(answer: Any) -> str | None:
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        return f"Give one number, the bits for each weight; you gave {answer!r}."
    known = {
        3: "Those are the steps alone. Each group of 64 also keeps low and step.",
        3.25: "You counted one of the two numbers that a group keeps. There are low and step.",
        35: "You added the bits of low and step to each weight. They are shared by the 64 weights of a group.",
    }
    if abs(answer - 3.5) < 1e-6:
        return None
    return known.get(answer, "Count the bits of one group: 64 weights, and two more numbers. Divide by 64.")


# --- 3: other weights for one run -----------------------------------------------------------------------------------


def _own_loss_with(_: TransformerBridge) -> Callable[..., torch.Tensor]:
    def swapped(model: TransformerBridge, ids: torch.Tensor, new: Any, hooks: Sequence[Any] = ()) -> torch.Tensor:
        kept = [one.detach().clone() for one, _ in new]
        with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
            try:
                for one, other in new:
                    one.copy_(other)
                return losses(model, ids).mean(1).cpu()
            finally:
                for (one, _), other in zip(new, kept, strict=True):
                    one.copy_(other)

    return swapped


@exercise(_own_loss_with)
def loss_with(answer: Any, model: TransformerBridge) -> str | None:
    ids, own, seen = _ids(model), _own_loss_with(model), []
    weights = matrices(model, 1) + matrices(model, 2)[:2]
    before, new = [one.detach().clone() for one in weights], [(one, one.detach() * 0.5) for one in weights]
    wanted, first, intact = own(model, ids, new), own(model, ids, new[:1]), own(model, ids, [])
    try:
        found = answer(model, ids, new, [("blocks.1.hook_resid_post", lambda state, hook: seen.append(hook))])
        changed = sum(not torch.equal(one, old) for one, old in zip(weights, before, strict=True))
    finally:
        for one, old in zip(weights, before, strict=True):
            one.data = old
    if changed:
        return (
            f"Afterwards {changed} of {len(weights)} matrices of this test are not what they were. `before` must hold the old "
            "values themselves (with copy_, take clones), and the lines under “finally” put all of them back."
        )
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return "loss_with must return what loss returns, one number for each text. Is there a “return” inside the try?"
    if torch.allclose(found, wanted, atol=1e-3):
        return None if seen else "The hooks were not used. Give them to loss, too."
    if torch.allclose(found, intact, atol=1e-3):
        return (
            "The loss is that of the intact model: the new values were not in place while it ran. “weight = values” only "
            "renames; weight.data = values changes the model."
        )
    if torch.allclose(found, first, atol=1e-3):
        return "Only the first pair was used. Go through all of them before the model runs."
    return f"The losses are {found.tolist()}, and with the new values in place they are {wanted.tolist()}."


# --- 4: a state put back --------------------------------------------------------------------------------------------


def _own_put_back() -> Callable[..., Any]:
    def made(intact: torch.Tensor, positions: Any) -> Callable[..., torch.Tensor]:
        chosen = torch.zeros(intact.shape[1], 1, dtype=torch.bool, device=intact.device)
        chosen[positions] = True
        return lambda state, hook: torch.where(chosen, intact, state)

    return made


@exercise(_own_put_back)
def put_back(answer: Any) -> str | None:
    state, intact = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    hook, given = answer(intact, [0, 2]), state.clone()
    if not callable(hook):
        return f"put_back must return the inner function; it returned {hook!r:.40}. End it with “return hook_fn”."
    try:
        found = hook(given, None)
    except RuntimeError as error:
        return f"{error}. Both sides have the shape [text, position, d_model]: take the positions of `intact`, too."
    wanted = _own_put_back()(intact, [0, 2])(state, None)
    if not torch.equal(given, state):
        return "Your hook writes into the state that it was given, and somebody else may read that one. Copy it first."
    if found is None:
        return "Your hook returns nothing, so nothing is replaced. Return the new state."
    wrong = {
        "You put back every token. Use positions.": intact,
        "Nothing was put back.": state,
        "You put back whole texts. The first axis is the text: write new[:, positions].": torch.cat(
            [intact[:1], state[1:2], intact[2:]]
        ),
    }
    for words, one in wrong.items():
        if found.shape == one.shape and torch.equal(found, one):
            return words
    if found.shape != wanted.shape or not torch.equal(found, wanted):
        return "At `positions` of every text the state must be the intact one, and elsewhere the one that came."
    return None


# --- 5: a score without data ----------------------------------------------------------------------------------------


def _own_zd() -> Callable[..., float]:
    def share(matrices: Sequence[torch.Tensor]) -> float:
        flat = [one.detach().flatten() for one in matrices]
        beyond = [one > one.mean() + one.std() for one in flat]
        return float(torch.cat(beyond).double().mean())

    return share


@exercise(_own_zd)
def zd(answer: Any) -> str | None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(40, 10, generator=generator) + 2, 3 * torch.randn(20, 30, generator=generator).exp()]
    found, wanted = answer([one.clone() for one in weights]), _own_zd()(weights)
    try:
        found = float(found)
    except (TypeError, ValueError, RuntimeError):
        return f"zd must return one number, a share; it returned {found!r:.60}."
    if abs(found - wanted) < 1e-6:
        return None
    scaled = [((one - one.mean()) / one.std()).flatten() for one in weights]
    flat = torch.cat([one.flatten() for one in weights])
    wrong: dict[str, Any] = {
        "That is the number of weights, not their share. Divide by how many there are.": wanted * len(flat),
        "You count both ends. Only z above 1 counts, not z below -1.": (torch.cat(scaled).abs() > 1).double().mean(),
        "You took the mean and the standard deviation of all matrices together. Each matrix has its own.": (
            (flat - flat.mean()) / flat.std() > 1
        ).double().mean(),
        "You took the mean of the shares. Count in all matrices, and divide by all weights: larger matrices count more.":
            sum((one > 1).double().mean() for one in scaled) / len(scaled),
        "You divided by the variance, std * std. Divide by .std().": torch.cat(
            [((one - one.mean()) / one.var() > 1).flatten() for one in weights]
        ).double().mean(),
        "You took the mean and the standard deviation of each row. Take those of the whole matrix.": torch.cat(
            [((one - one.mean(-1, keepdim=True)) / one.std(-1, keepdim=True) > 1).flatten() for one in weights]
        ).double().mean(),
        "You divided by the number of rows: len(w). w.numel() is the number of weights.":
            wanted * len(flat) / sum(map(len, weights)),
        "You did not divide by the standard deviation.": torch.cat(
            [(one - one.mean() > 1).flatten() for one in weights]
        ).double().mean(),
    }  # fmt: skip
    for words, value in wrong.items():
        if abs(found - float(value)) < 1e-6:
            return words
    return f"The share is {wanted:.3f} here, and you have {found:.3f}. z = (weight - mean) / standard deviation; count z > 1."
