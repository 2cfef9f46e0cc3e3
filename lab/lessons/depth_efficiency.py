"""Checks of lesson 03, depth efficiency."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from lab.interventions import rewritten
from lab.lessons import exercise
from lab.lessons.layers import losses
from lab.models import SITES, depth_hook
from lab.texts import tokenize

TEXTS = ("The sun is very hot today", "My dog ate all of the")


def _ids(model: TransformerBridge) -> torch.Tensor:
    return tokenize(model, TEXTS).ids[:, :5].to(model.cfg.device)


def _stream(model: TransformerBridge, hooks: Sequence[tuple[str, Any]] = ()) -> torch.Tensor:
    """The states [depth, text, position, d_model] of two short texts, after some hooks."""
    n = model.cfg.n_layers
    kept: dict[int, torch.Tensor] = {}

    def keep(depth: int) -> Any:
        return lambda state, hook: kept.update({depth: state.clone()})

    keepers = [(depth_hook(depth, n), keep(depth)) for depth in range(n + 1)]
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *keepers]):
        model(_ids(model), use_cache=False, logits_to_keep=1)
    return torch.stack([kept[depth] for depth in range(n + 1)])


# --- 1: a block that does nothing -----------------------------------------------------------------------------------


def _own_without(model: TransformerBridge) -> Callable[..., list[tuple[str, Any]]]:
    def hooks(layer: int, positions: Any = slice(None)) -> list[tuple[str, Any]]:
        stream: list[torch.Tensor] = []

        def out(state: torch.Tensor, hook: Any) -> torch.Tensor:
            chosen = torch.zeros(state.shape[1], dtype=torch.bool, device=state.device)
            chosen[positions] = True
            return torch.where(chosen[:, None], stream.pop(), state)

        enter = (SITES["resid_pre"].format(layer=layer), lambda state, hook: stream.append(state))
        return [enter, (SITES["resid_post"].format(layer=layer), out)]

    return hooks


@exercise(_own_without)
def without(answer: Any, model: TransformerBridge) -> str | None:
    layer, n = model.cfg.n_layers // 2, model.cfg.n_layers
    hooks = answer(layer)
    if not isinstance(hooks, list | tuple) or not all(isinstance(one, tuple) and len(one) == 2 for one in hooks):
        return f"without must return a list of pairs (name, function), one for each hook; it returned {hooks!r:.60}."
    clean, seen = _stream(model), []

    def watch(state: torch.Tensor, hook: Any) -> None:
        seen.append((state, state.clone()))

    found = _stream(model, [(SITES["resid_post"].format(layer=layer), watch), *hooks])
    if not torch.equal(*seen[0]):
        return (
            "Your hook writes into the very state that it was given, and somebody else may still read that one. "
            "Take a copy first, with .clone()."
        )
    if not torch.equal(found[: layer + 1], clean[: layer + 1]):
        return f"With without({layer}) a state below the block changes. Put back at hook_resid_post, not at hook_resid_pre."
    same = [depth for depth in range(n + 1) if torch.allclose(found[layer + 1], clean[depth], atol=1e-4)]
    if layer + 1 in same:
        return "The model is as before: nothing was put back. Does put_back return the new state?"
    if layer not in same:
        if same:
            return (
                f"After without({layer}) comes the state of depth {same[0]}. It should be the one that went into block "
                f"{layer}, so depth {layer}: remember it at blocks.{layer}.hook_resid_pre."
            )
        return "What comes out of the block is not what went in. Put back exactly what was remembered."
    some = _stream(model, answer(layer, [1]))[layer + 1]
    if torch.equal(some, clean[layer]):
        return "without(layer, [1]) skips the block at every token. Use positions: new[:, positions] = ..."
    if torch.equal(some[1], clean[layer][1]) and not torch.equal(some[0, 1], clean[layer][0, 1]):
        return "without(layer, [1]) skips the whole second text. The first axis is the text: write new[:, positions]."
    wanted = clean[layer + 1].clone()
    wanted[:, 1] = clean[layer][:, 1]
    if not torch.allclose(some, wanted, atol=1e-4):
        return (
            "without(layer, [1]) must put back the state of token 1, and leave all other tokens as the block made them."
        )
    return None


# --- 2: the loss ----------------------------------------------------------------------------------------------------


def _own_loss(_: TransformerBridge) -> Callable[..., torch.Tensor]:
    def found(model: TransformerBridge, ids: torch.Tensor, hooks: Sequence[tuple[str, Any]] = ()) -> torch.Tensor:
        with model.hooks(fwd_hooks=list(hooks)):
            return losses(model, ids)

    return found


@exercise(_own_loss)
def loss(answer: Any, model: TransformerBridge) -> str | None:
    ids = _ids(model)
    found, wanted = answer(model, ids), losses(model, ids)
    if not isinstance(found, torch.Tensor):
        return f"loss must return a tensor; it returned {type(found).__name__}. Is there a “return”?"
    if found.shape == ids.shape:
        return (
            "You have one number for every token. But nothing is predicted before the first token, and what is said "
            "after the last one can't be judged: compare log_p[:, :-1] with ids[:, 1:]."
        )
    if found.shape == (*wanted.shape, 1):
        return "The last axis has one entry only: take it away with [..., 0]."
    if found.shape != wanted.shape:
        return (
            f"Give one number for each text and predicted token, {tuple(wanted.shape)}; yours is {tuple(found.shape)}."
        )
    if torch.allclose(found, wanted, atol=1e-3):
        return None
    if torch.allclose(found, -wanted, atol=1e-3):
        return (
            "The sign is wrong. The logarithm of a probability is below 0, and a loss is above: put a minus in front."
        )
    if torch.allclose(found, (-wanted).exp(), atol=1e-3):
        return "These are probabilities. The loss is minus the LOGARITHM of the probability."
    return (
        "The numbers are not the loss. The prediction made AT token i is about token i + 1: log_p[:, :-1] stands "
        "beside ids[:, 1:]."
    )


# --- 3: who looks at the first token? -------------------------------------------------------------------------------


def _own_watch_first(_: TransformerBridge) -> Callable[..., Any]:
    def made(layer: int, shares: dict[int, float]) -> Callable[..., None]:
        return lambda pattern, hook: shares.__setitem__(layer, pattern[..., 0].flatten(0, 1).T[1:].mean().item())

    return made


@exercise(_own_watch_first)
def watch_first(answer: Any, model: TransformerBridge) -> str | None:
    shares: dict[int, Any] = {}
    hook = answer(2, shares)
    if not callable(hook):
        return f"watch_first must return the inner function; it returned {hook!r}. End it with “return hook_fn”."
    hook(torch.tensor([[[[1.0, 0, 0], [0.6, 0.4, 0], [0.2, 0.3, 0.5]]]]), None)
    if list(shares) != [2]:
        return f"After one call of the hook of layer 2 the dictionary is {shares!r}; it should have the key 2 and no other."
    try:
        found = float(shares[2])
    except (TypeError, ValueError, RuntimeError):
        return "Store one number: .mean() over texts, heads and tokens."
    wrong = {
        0.6: "Token 0 is counted too. It can look at nothing but itself, so its share is always 1: begin at token 1.",
        0.0: "You read where the FIRST token looks. The axes are [text, head, who looks, at whom]: fix the last one to 0.",
        1 / 3: "You read the row of the first token. Axes are [text, head, who looks, at whom]: fix the LAST one to 0.",
        0.2: "That is the last token only. Take the mean over all tokens that look, from token 1 on.",
    }
    for value, words in wrong.items():
        if abs(found - value) < 1e-4:
            return words
    if abs(found - 0.4) > 1e-4:
        return f"Two tokens give 0.6 and 0.2 of their attention to the first one; the mean is 0.4, and you have {found:.2f}."
    hooks = [(f"blocks.{i}.attn.hook_pattern", answer(i, shares)) for i in range(model.cfg.n_layers)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(_ids(model), use_cache=False, logits_to_keep=1)
    if sorted(shares) != list(range(model.cfg.n_layers)):
        return (
            "On the model not every layer has its own entry. Use the layer that watch_first was called with as the key."
        )
    return None


# --- 4: a control that can't fail -----------------------------------------------------------------------------------


@exercise(lambda: "b")
def good_control(answer: Any) -> str | None:
    wrong = {
        "a": "Its blocks do change the states. But what could its loss have done? Compare it with the loss of pure guessing.",
        "c": "Another draw of weights guesses as well. Would its loss be able to rise?",
    }
    if answer not in ("a", "b", "c"):
        return f'Choose one letter: good_control = "a", "b" or "c". You gave {answer!r}.'
    return wrong.get(answer)


# --- 5: change of what layers add -----------------------------------------------------------------------------------


def _own_change() -> Callable[..., torch.Tensor]:
    def found(clean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        added = [states[1:] - states[:-1] for states in (clean, other)]
        size = torch.linalg.vector_norm(added[0], dim=-1)
        return (torch.linalg.vector_norm(added[1] - added[0], dim=-1) / size).flatten(1).mean(1)

    return found


@exercise(_own_change)
def change(answer: Any) -> str | None:
    generator = torch.Generator().manual_seed(0)
    clean, other = torch.randn(2, 4, 2, 3, 5, generator=generator)  # [depth, text, position, d_model] each
    found, wanted = answer(clean, other), _own_change()(clean, other)
    if not isinstance(found, torch.Tensor):
        return f"change must return a tensor; it returned {type(found).__name__}. Is there a “return”?"
    if found.shape == clean.shape[:1]:
        return (
            "You have one number for each depth: that compares states. Compare what the layers ADD: the state after a "
            "layer minus the state before it, .diff(dim=0)."
        )
    if found.shape == wanted.shape + clean.shape[1:3]:
        return "You have a number for each text and token. Take their mean: .mean((1, 2))."
    if found.shape != wanted.shape:
        return f"Four depths make three layers, so give three numbers; yours have the shape {tuple(found.shape)}."
    if torch.allclose(found, wanted, atol=1e-5):
        return None
    added, now = clean.diff(dim=0), other.diff(dim=0)
    gap, size = (now - added).norm(dim=-1), added.norm(dim=-1)
    if torch.allclose(found, gap.mean((1, 2)), atol=1e-5):
        return "That is the size of the change. Divide it by the size of what the layer added before."
    if torch.allclose(found, (gap / now.norm(dim=-1)).mean((1, 2)), atol=1e-5):
        return "You divide by what is added NOW. Divide by what the layer added in the clean run."
    if torch.allclose(found, gap.mean((1, 2)) / size.mean((1, 2)), atol=1e-5):
        return "You divide a mean by a mean. Divide for each token first, then take the mean."
    if torch.allclose(found, ((now.norm(dim=-1) - size).abs() / size).mean((1, 2)), atol=1e-5):
        return "You compare lengths. Two vectors of one length can differ: subtract first, then take the norm."
    return "The numbers are off. For each token: norm of (now - before), divided by norm of before; then the mean."


# --- 6: another order -----------------------------------------------------------------------------------------------


def _own_order(_: TransformerBridge) -> Callable[..., torch.Tensor]:
    def found(model: TransformerBridge, ids: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        def all_in_order(x: torch.Tensor, step: Any) -> torch.Tensor:
            for layer in order:
                x = step(x, layer=layer)
            return x

        rest: dict[int, Any] = {layer: lambda x, step: x for layer in range(1, model.cfg.n_layers)}
        with rewritten(model, {0: all_in_order, **rest}):
            return losses(model, ids)

    return found


@exercise(_own_order)
def loss_in_order(answer: Any, model: TransformerBridge) -> str | None:
    body, ids, n = model.original_model.model, _ids(model), model.cfg.n_layers
    plain, own = body.layers, _own_order(model)
    for order in (list(range(n)), list(range(1, n)), [*range(n // 2), *range(n // 2 - 1, n)]):
        try:
            found = answer(model, ids, order)
            left = body.layers is not plain or body.config.num_hidden_layers != n
        finally:
            body.layers, body.config.num_hidden_layers = plain, n
        if not isinstance(found, torch.Tensor):
            return "loss_in_order must return the loss, inside the try. Is there a “return”?"
        if left:
            return "Afterwards the model's layers are not as before. The lines under “finally” put them back."
        if found.shape == (len(ids), ids.shape[1] - 1) and torch.allclose(found, own(model, ids, order), atol=1e-3):
            continue
        if len(order) > n:
            return (
                f"A list of {n + 1} layers, one of them twice, gives a wrong loss. The model runs only as many layers as "
                "body.config.num_hidden_layers says, without a warning: set that, too."
            )
        if len(order) < n:
            return "Without layer 0 the loss is not right. Does body.layers hold the new list, in the order that was given?"
        return "In the usual order the loss must be as usual, [text, position - 1], and it is not."
    return None
