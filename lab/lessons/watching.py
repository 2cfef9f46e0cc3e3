"""Checks of lesson 00, watch a model think."""

from collections.abc import Callable
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from lab import lenses
from lab.lessons import exercise
from lab.models import depth_hook
from lab.runs import clean_run
from lab.texts import tokenize

TEXT = "The sun is"


def _states(model: TransformerBridge) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokenize(model, [TEXT]).ids
    return ids, clean_run(model, ids[0]).states


def _own_keep(model: TransformerBridge) -> Callable[..., Any]:
    def keeper(depth: int, states: dict[int, torch.Tensor]) -> Callable[..., None]:
        return lambda state, hook: states.update({depth: state[0].clone()})

    return keeper


@exercise(_own_keep)
def keep(answer: Any, model: TransformerBridge) -> str | None:
    hook = answer(3, {})
    states: dict[int, torch.Tensor] = {}
    if not callable(hook):
        return f"keep must return the inner function; it returned {hook!r}. End it with “return hook_fn”."
    ids, wanted = _states(model)
    depths = range(model.cfg.n_layers + 1)
    before = model(ids)
    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=[(depth_hook(d, model.cfg.n_layers), answer(d, states)) for d in depths]),
    ):
        after = model(ids)
    if not states:
        return "No state was kept. Write into the dictionary: states[depth] = ..."
    if sorted(states) != list(depths):
        return (
            f"The dictionary has {len(states)} entries, with keys such as {next(iter(states))!r}; there should be one for each "
            f"depth, 0 to {model.cfg.n_layers}. Use the depth that keep was called with as the key."
        )
    shape = tuple(states[3].shape)
    if shape == tuple(wanted[3][-1].shape):
        return "Your hook keeps one token's state only. Keep those of all tokens: state[0] has the shape [position, d_model]."
    if shape == (1, *wanted[3].shape):
        return "Your hook keeps the whole batch, [1, position, d_model]. There is one text: take state[0]."
    if shape != tuple(wanted[3].shape):
        return f"An entry has the shape {shape}; it should be [position, d_model], here {tuple(wanted[3].shape)}."
    if not torch.allclose(states[3], wanted[3], atol=1e-4):
        return "What is kept at depth 3 is not the stream at depth 3. Does each hook use its own depth?"
    if not torch.equal(before, after):
        return "With your hooks the model says something else. A hook that only looks returns nothing."
    return None


def _own_lens(model: TransformerBridge) -> Callable[..., torch.Tensor]:
    return lambda states: lenses.readout(model, states, kind="probs")


@exercise(_own_lens)
def lens(answer: Any, model: TransformerBridge) -> str | None:
    ids, states = _states(model)
    with torch.no_grad():
        found, said = answer(states), model(ids)[0]
    if not isinstance(found, torch.Tensor):
        return f"lens must return a tensor; it returned {type(found).__name__}. Is there a “return”?"
    wanted = lenses.readout(model, states, kind="probs")
    if found.shape != wanted.shape:
        return f"The result has the shape {tuple(found.shape)}; a number for each word is {tuple(wanted.shape)}."
    if torch.allclose(found, wanted, atol=1e-5):
        return None
    if torch.allclose(found, model.unembed(model.ln_final(states)), atol=1e-3):
        return "These are logits: numbers without a scale. Make probabilities of them with .softmax(-1)."
    if torch.allclose(found, model.unembed(states).softmax(-1), atol=1e-5):
        return "The final norm is missing: model.ln_final(states) comes before model.unembed(...)."
    if not torch.allclose(found.sum(-1), torch.ones(found.shape[:-1]), atol=1e-3):
        return "The probabilities of one place do not add up to 1. The softmax goes over the last axis: .softmax(-1)."
    gap = float((found[-1] - said.softmax(-1)).abs().max())
    return f"At the last depth the lens must say what the model says; it is off by up to {gap:.2f}. Norm, unembed, softmax."


def _own_rank() -> Callable[..., torch.Tensor]:
    return lambda p, word: 1 + torch.count_nonzero(p.T > p[:, word], dim=0)


@exercise(_own_rank)
def rank(answer: Any) -> str | None:
    p = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    found = answer(p, 2)
    if not isinstance(found, torch.Tensor) or found.shape != (2,):
        return f"For p of the shape [depth, d_vocab] give one rank for each depth. For 2 depths you gave {found!r}."
    if found.tolist() == [2, 2] and answer(p, 1).tolist() == [1, 3]:
        return None
    if found.tolist() == [1, 1]:
        return "That counts from 0. The likeliest word has rank 1: count the words that are likelier, and add 1."
    if answer(p, 1).tolist() == [3, 1]:
        return (
            "That counts from the wrong end: rank 1 is the likeliest word. Count the words with a GREATER probability."
        )
    return (
        f"With probabilities .1, .6, .3 the last word has rank 2; you gave {found.tolist()[0]}. How many are likelier?"
    )


@exercise(lambda: "b")
def why_repeated(answer: Any) -> str | None:
    wrong = {
        "a": "At depth 0 no block has run, so nothing was computed yet. What does the state hold before the first block?",
        "c": "The random map has such words at depth 0 too, so it can't be something that training put there on purpose.",
    }
    if answer not in ("a", "b", "c"):
        return f'Choose one letter: why_repeated = "a", "b" or "c". You gave {answer!r}.'
    return wrong.get(answer)
