"""Checks of lesson 02, back-patching."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from lab import back_patching, datasets, interventions
from lab.lessons import exercise, patch
from lab.models import hooked
from lab.runs import CleanRun, clean_run
from lab.texts import tokenize

TEXT = "The capital of Italy is"
LONG = "The capital of the native country of Luiz Inácio Lula da Silva is"  # longer than any showcase


def _run(model: TransformerBridge) -> tuple[torch.Tensor, CleanRun]:
    ids = tokenize(model, [TEXT]).ids
    return ids, clean_run(model, ids[0])


def _own_put(model: TransformerBridge) -> Callable[..., Any]:
    def maker(position: int, vector: torch.Tensor) -> Any:
        def write(state: torch.Tensor, hook: Any) -> torch.Tensor:
            here = torch.arange(state.shape[1], device=state.device) == position
            return torch.where(here[:, None], vector.to(state), state)

        return write

    return maker


@exercise(_own_put)
def put(answer: Any, model: TransformerBridge) -> str | None:
    state, vector = torch.arange(24.0).reshape(1, 4, 6), -torch.arange(6.0) - 1
    before, hook = state.clone(), answer(2, vector)
    if not callable(hook):
        return f"put must return the inner function; it returned {hook!r}. End it with “return hook_fn”."
    new = hook(state, SimpleNamespace(name="blocks.0.hook_out"))
    if new is None:
        return "Your hook returns nothing. It must return the state to go on with: end it with “return state”."
    if not isinstance(new, torch.Tensor) or new.shape != state.shape:
        shape = tuple(new.shape) if isinstance(new, torch.Tensor) else type(new).__name__
        return f"A hook must return the whole state, [1, position, d_model]: here (1, 4, 6). Yours returned {shape}."
    if not torch.equal(state, before):
        return (
            "Your hook writes into the state that it was given. Somebody may have kept that one, and would find your vector "
            "in it. Copy it first, with .clone()."
        )
    changed = [at for at in range(4) if not torch.equal(new[0, at], before[0, at])]
    if not changed:
        return "The state that you return is the old one. Write the vector into the copy, at this position."
    if changed != [2]:
        where = "every token" if len(changed) == 4 else f"position {', '.join(map(str, changed))}"
        return f"For position 2 your hook changes {where}. Choose the position on the second axis: state[:, position]."
    if torch.equal(new[0, 2], before[0, 2] + vector):
        return "Your hook adds the vector. A patch replaces: what was there goes."
    if not torch.equal(new[0, 2], vector):
        return "At the position stands something else than the vector."
    ids, run = _run(model)
    with torch.no_grad(), hooked(model, [("blocks.1.hook_resid_post", answer(3, run.states[-2, 3]))]):
        said = model(ids)[0, -1]
    gap = float((said - _own_patched(model)(ids, 3, 1, run.states[-2, 3])).abs().max())
    return None if gap < 1e-3 else f"In the real model the next word's logits are off by up to {gap:.2g}."


def _own_patched(model: TransformerBridge, site: str = "resid_post") -> Callable[..., torch.Tensor]:
    def logits(ids: torch.Tensor, position: int, target: int, vector: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), interventions.patch(model, site, layer=target, value=vector, position=position):
            return model(ids)[0][-1]

    return logits


@exercise(_own_patched)
def patched(answer: Any, model: TransformerBridge) -> str | None:
    ids, run = _run(model)
    at, target, vector = 3, model.cfg.n_layers // 4, run.states[-3, 3]
    found, wanted = answer(ids, at, target, vector), _own_patched(model)(ids, at, target, vector)
    if not isinstance(found, torch.Tensor):
        return f"patched must return the logits; it returned {type(found).__name__}. Is there a “return”?"
    if found.shape != wanted.shape:
        return (
            f"The result has the shape {tuple(found.shape)}. model(ids) gives [1, position, d_vocab]; the next word is read "
            "off at the last position: [0, -1]."
        )
    if torch.allclose(found, wanted, atol=1e-3):
        other = target + 1
        again = answer(ids, at, other, vector)
        if torch.allclose(again, _own_patched(model)(ids, at, other, vector), atol=1e-3):
            return None
        return f"Right for target {target}, not for {other}. The place's name must hold it: f“blocks.{{target}}. ...”."
    with torch.no_grad():
        plain = model(ids)[0]
    if torch.allclose(found, plain[0], atol=1e-3):
        return "These are the logits after the FIRST token. What comes next is read off at the last position: [0, -1]."
    if torch.allclose(found, plain[-1], atol=1e-3):
        return (
            "This is what the model says without a patch. Does it run inside the “with”, and is put(...) in the list?"
        )
    for other in range(model.cfg.n_layers):
        if torch.allclose(found, _own_patched(model, "resid_pre")(ids, at, other, vector), atol=1e-3):
            return (
                f"For target {target} your vector stands before layer {other}. After the target layer is "
                "“blocks.{target}.hook_resid_post”; hook_resid_pre is what a layer reads."
            )
    for place in range(ids.shape[1]):
        if torch.allclose(found, _own_patched(model)(ids, place, target, vector), atol=1e-3):
            return f"Asked for position {at} your vector stands at position {place}: put(position, vector)."
    if abs(float(found.sum()) - 1) < 1e-3:
        return "These are probabilities. Return the logits as they are, without softmax."
    gap = float((found - wanted).abs().max())
    return (
        f"The logits are off by up to {gap:.2g}. Is it put(position, vector), after the target layer, read at [0, -1]?"
    )


def _own_rank_map(model: TransformerBridge) -> Callable[..., torch.Tensor]:
    return lambda ids, position, vectors, word, step=3: patch.rank_map(
        model, ids[0], position, vectors, word, step=step
    )


@exercise(_own_rank_map)
def rank_map(answer: Any, model: TransformerBridge) -> str | None:
    ids, run = _run(model)
    n, word = model.cfg.n_layers, int(run.logits.topk(9).indices[-1])  # one whose rank moves
    vectors, step = run.states[:, 3].clone(), model.cfg.n_layers // 3
    found = answer(ids, 3, vectors, word, step)
    wanted = _own_rank_map(model)(ids, 3, vectors, word, step)
    if not isinstance(found, torch.Tensor) or found.shape != (n, n):
        return f"Return the table ranks, [source, target], here ({n}, {n}); you gave {_shape(found)}."
    filled, due = found.isfinite(), wanted.isfinite()
    if not filled.any():
        return "The table is still empty. For each pair: ranks[source, target] = the rank of the word."
    if torch.equal(filled, due.T):
        return (
            "Your table lies on its side, or the target comes after the source: ranks[source, target], source > target."
        )
    if filled.diagonal().any():
        return (
            "You tried source == target too: the state would be put where it was. The source begins at target + step."
        )
    if filled.triu().any():
        return "You also tried sources before the target. A back-patch goes back: source > target."
    if not torch.equal(filled, due):
        return (
            f"With step={step} there should be {int(due.sum())} pairs, of layers 0, {step}, {2 * step}, ...; you tried "
            f"{int(filled.sum())}. Sources: range(target + step, n_layers, step)."
        )
    if _alike(found, wanted):
        return None
    if _alike(found + 1, wanted):
        return "That counts from 0. Rank 1 is the word that is said: count the words with a greater logit, and add 1."
    shifted = _own_rank_map(model)(ids, 3, torch.cat([vectors[:1], vectors[:-1]]), word, step)
    if _alike(found, shifted):
        return (
            "Off by one depth. vectors[0] is the state before any layer, so the state after layer `source` is "
            "vectors[source + 1]."
        )
    source, target = next(pair for pair in due.nonzero().tolist() if not _alike(found[*pair], wanted[*pair]))
    return (
        f"Source {source}, target {target}: the word has rank {wanted[source, target]:.0f}, you have "
        f"{found[source, target]:.0f}. Is it patched(ids, position, target, vectors[source + 1])?"
    )


def _alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """The same ranks; among hundreds of words rounding may swap neighbours."""
    return torch.allclose(found, wanted, rtol=0.01, atol=0, equal_nan=True)


def _shape(found: Any) -> str:
    return (
        f"the shape {tuple(found.shape)}"
        if isinstance(found, torch.Tensor)
        else "None"
        if found is None
        else f"a {type(found).__name__}"
    )


@exercise(lambda: patch.random_vectors)
def random_like(answer: Any) -> str | None:
    draws = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 600, generator=draws) * torch.tensor([[1.0], [3.0], [9.0], [27.0]])
    before, found = vectors.clone(), answer(vectors)
    if not isinstance(found, torch.Tensor) or found.shape != vectors.shape:
        return f"For vectors of the shape [depth, d_model] give as many of the same shape; you gave {_shape(found)}."
    if not torch.equal(vectors, before):
        return "Your function writes into the vectors that it was given. Make new ones."
    if not found.isfinite().all():
        return "Some of the numbers are not finite. Do you divide by a length of 0?"
    unit = torch.nn.functional.normalize(found, dim=-1)
    if ((unit * torch.nn.functional.normalize(vectors, dim=-1)).sum(-1).abs() > 0.5).any():
        return "Your vectors still point where the old ones did. A control must not carry the direction: draw it anew."
    if torch.allclose(found.sort(-1).values, vectors.sort(-1).values):
        return (
            "You mixed the state's own numbers. Draw new ones, with torch.randn, so that nothing of the state is left."
        )
    if (unit @ torch.nn.functional.normalize(torch.ones(600), dim=0) > 0.5).all():
        return "All your numbers are positive, so all vectors point into one corner. torch.randn gives both signs."
    if (unit @ unit.T - torch.eye(4)).abs().max() > 0.5:
        return (
            "The vectors of different depths point the same way. Draw one for each depth: torch.randn(vectors.shape)."
        )
    lengths, due = found.norm(dim=-1), vectors.norm(dim=-1)
    if torch.allclose(lengths, due, rtol=1e-3):
        return None
    if torch.allclose(lengths, torch.ones(4), rtol=1e-3):
        return "All your vectors have length 1. Multiply each by the length of the state that it stands for."
    if (lengths / due).std() < 0.1 * (lengths / due).mean():
        return "The lengths are all off by one factor. Divide each row of noise by its own length, .norm(dim=-1, keepdim=True)."
    return f"A state of length {due[-1]:.0f} got a vector of length {lengths[-1]:.0f}. It must be as long as the state."


def _own_lent(model: TransformerBridge) -> Callable[..., torch.Tensor]:
    def lent(other: Any, place: str) -> torch.Tensor:
        run = clean_run(model, tokenize(model, [other.text]).ids[0])
        return run.states[:, back_patching.places(model, other.text, other.e1)[place]].clone()

    return lent


@exercise(_own_lent)
def lent(answer: Any, model: TransformerBridge) -> str | None:
    table = datasets.load("two_hop")
    other = table[table.text == LONG].iloc[0]
    ids = tokenize(model, [other.text]).ids[0]
    run, where = clean_run(model, ids), back_patching.places(model, other.text, other.e1)
    for place in ("t1", "t2"):
        found, wanted = answer(other, place), run.states[:, where[place]]
        if isinstance(found, torch.Tensor) and found.shape == run.states.shape:
            return "These are the states of all tokens. Choose one position: states[:, position]."
        if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
            return f"Give one vector for each depth, {tuple(wanted.shape)}; you gave {_shape(found)}."
        if torch.allclose(found, wanted, atol=1e-3):
            continue
        for at in range(len(ids)):
            if torch.allclose(found, run.states[:, at], atol=1e-3):
                token = [model.tokenizer.decode(ids[i]) for i in (at, where[place])]
                return (
                    f"Asked for {place} you took token {at},{token[0]!r}; in this text {place} is token {where[place]}, "
                    f"{token[1]!r}. Ask places(...) about the other text: its words stand elsewhere."
                )
        return f"At {place} these are not the states of the other query. Did you run its own text?"
    return None


@exercise(lambda: "c")
def carried(answer: Any) -> str | None:
    wrong = {
        "a": "Then a state about Kenya could not bring Rome. But it does, at t2. Where could “Rome” come from?",
        "b": "A random vector of the same length is a shock too, and it brings Rome almost never. So what is different?",
    }
    if answer not in ("a", "b", "c"):
        return f'Choose one letter: carried = "a", "b" or "c". You gave {answer!r}.'
    return wrong.get(answer)
