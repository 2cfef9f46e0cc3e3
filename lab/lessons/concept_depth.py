"""Checks of lesson 01, at which depth a concept can be read."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

from lab import probes
from lab.identity import foreign_hooks
from lab.lessons import exercise
from lab.lessons.read import TEST, scaled
from lab.states import collect_states, stream_states
from lab.texts import Tokens, last_positions, tokenize

TEXTS = ["The city of Lyon is in France.", "Rome is in Italy.", "Everybody said that it was a fine day at last."]


def _close(a: Any, b: Any, tolerance: float = 1e-3) -> bool:
    """Whether two arrays are equal up to rounding, on the scale of the second."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max()))


# --- states ---------------------------------------------------------------------------------------------------------


def _own_states(model: TransformerBridge) -> Callable[..., torch.Tensor]:
    def kit_states(model: TransformerBridge, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(ids.shape[1]) <= last[:, None]
        tokens = Tokens(("",) * len(ids), ids, mask, np.zeros((*ids.shape, 2), np.int64))
        [(_, states)] = stream_states(model, tokens, list(last.numpy()[:, None]), batches=[np.arange(len(ids))])
        return torch.as_tensor(states).transpose(0, 1)

    return kit_states


@exercise(_own_states)
def last_states(answer: Any, model: TransformerBridge) -> str | None:
    """The state of each text's last token at every depth."""
    tokens = tokenize(model, TEXTS)
    ends, depths = last_positions(tokens), model.cfg.n_layers + 1
    try:
        found = answer(model, tokens.ids, torch.as_tensor(ends))
    finally:
        left = foreign_hooks(model)
        model.reset_hooks()
    if left:
        return f"Your function left {len(left)} hooks on the model. Inside “with model.hooks” they go by themselves."
    if not isinstance(found, torch.Tensor):
        return f"last_states must return a tensor; it returned {type(found).__name__}. Is there a “return”?"
    wanted = torch.as_tensor(collect_states(model, TEXTS, progress=False)["resid"].values)
    if found.ndim == 4:
        return "Your hook keeps the states of all positions. Keep one for each text: state[rows, last]."
    if found.shape == (depths, len(TEXTS), model.cfg.d_model):
        return "The axes are [depth, text, d_model]. Stack along axis 1 to get [text, depth, d_model]."
    if found.shape != wanted.shape:
        return f"The shape is {tuple(found.shape)}; [text, depth, d_model] is {tuple(wanted.shape)} here."
    if found.requires_grad:
        return "These states remember how they were made, which costs memory. Run the model in “with torch.no_grad():”."
    return None if _close(found, wanted) else _which_states(found, wanted, model)


def _which_states(found: torch.Tensor, wanted: torch.Tensor, model: TransformerBridge) -> str:
    """What was kept instead."""
    ends = last_positions(tokenize(model, TEXTS))
    longest = int(ends.argmax())
    first, before = (
        collect_states(model, TEXTS, positions=at, progress=False)["resid"].values for at in (0 * ends, ends - 1)
    )
    if _close(found, first):
        return "Your hook keeps the state of the first token. It has seen nothing of the statement: take position last."
    if _close(found, before):
        return "Your hook keeps the state of the token before the last one. “last” is already the position: no - 1."
    if _close(found[longest], wanted[longest]):
        return (
            "Right for the longest text only. Shorter texts are filled up on the right, so position -1 is filling: take each "
            "text's own position, state[rows, last]."
        )
    if _close(found[:, :-1], wanted[:, 1:]):
        return "Off by one depth: depth 3 is what block 3 READS, blocks.3.hook_resid_pre. You kept what it writes."
    same = [_close(found[:, d], wanted[:, d]) for d in range(wanted.shape[1])]
    if any(same):
        return f"Right at {sum(same)} of {len(same)} depths; the first wrong one is {same.index(False)}. Has each hook its depth?"
    return "These are other states than those of the last tokens. A hook that only looks returns nothing; has yours a return?"


# --- the probe ------------------------------------------------------------------------------------------------------


def _fit(states: np.ndarray, labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """The lesson's probe, by the kit: log-odds for every text."""
    return probes.fit_reference(scaled(states[:, None], train)[:, 0], labels, train, max_iter=1000, tol=1e-5)


@exercise(lambda: _fit)
def probe(answer: Any) -> str | None:
    """Log-odds of label 1 for every text, by a probe that is fitted on the training texts."""
    rng = np.random.default_rng(0)
    states, labels = rng.normal(size=(60, 8)) * np.geomspace(0.1, 100, 8), np.arange(60) % 2
    states[:, :2] += 0.2 * labels[:, None]
    train = np.arange(60) < 40
    found = answer(states.copy(), labels.copy(), train.copy())
    if found is None:
        return "probe returned nothing. Is there a “return”?"
    found, wanted = np.asarray(found), _fit(states, labels, train)
    if found.shape == (60, 2):
        return "These are probabilities of both labels. Give the log-odds: .decision_function(states)."
    if found.shape in ((40,), (20,)):
        return f"You gave {len(found)} numbers. Fit on the training texts, then give the log-odds of ALL {len(labels)}."
    if found.shape != wanted.shape:
        return f"The shape is {found.shape}; one number for each text is {wanted.shape}."
    if _close(found, wanted, 0.02):
        return None
    if set(np.unique(found).tolist()) <= {0, 1}:
        return "These are labels, 0 or 1. Log-odds also say how sure the probe is: .decision_function(states)."
    if _close(found, 1 / (1 + np.exp(-wanted)), 0.02):
        return "These are probabilities. Give the log-odds: .decision_function(states)."
    everything = np.ones_like(train)
    if _close(found, _fit(states, labels, everything), 0.02):
        return "Your probe was fitted on all texts, those of the test too. It must not see them: states[train], labels[train]."
    if _close(found, _fit(states, labels, ~train), 0.02):
        return "Your probe was fitted on the texts of the test. train is True where it may learn."
    if _close(found, probes.fit_reference(states, labels, train, C=0.01, max_iter=1000), 0.05):
        return "The states are not scaled. Some of their numbers are a hundred times larger: put StandardScaler() in front."
    if _close(found, -wanted, 0.02):
        return "The sign is turned round: above 0 must mean label 1."
    return "These are not the log-odds of new_probe(), fitted on the training texts. Did you change C, or the scaling?"


# --- splits ---------------------------------------------------------------------------------------------------------


def _own_split(groups: np.ndarray, labels: np.ndarray) -> Callable[..., np.ndarray]:
    del groups
    return lambda groups, seed: probes.group_splits(labels, groups, repeats=1, test_fraction=TEST, seed=seed)[0]


@exercise(_own_split)
def by_group(answer: Any, groups: np.ndarray, labels: np.ndarray) -> str | None:
    """True for the texts of the test: whole groups, about 40 % of them."""
    found = [answer(groups.copy(), seed) for seed in (0, 0, 1)]
    if found[0] is None:
        return "by_group returned nothing. Is there a “return”?"
    first, again, other = (np.asarray(one) for one in found)
    if first.dtype != bool or first.shape != groups.shape:
        return (
            f"Give one True or False for each of the {len(groups)} texts; you gave {first.dtype} of the shape {first.shape}. "
            "np.isin(groups, chosen) makes it from the chosen names."
        )
    if both := sorted(set(groups[first]) & set(groups[~first])):
        return f"{len(both)} groups stand on both sides, for example {both[0]}. Draw group NAMES, not texts: np.unique(groups)."
    if not first.any():
        return "No text is in the test. True means: kept for the test."
    if not (first == again).all():
        return "The same seed gave two different splits. Use np.random.default_rng(seed)."
    if (first == other).all():
        return "Seeds 0 and 1 gave the same split. Does the drawing use the seed?"
    names = np.unique(groups)
    share = len(np.unique(groups[first])) / len(names)
    if abs(1 - share - TEST) < 0.05:
        return f"{share:.0%} of the groups are True. True means test, 40 %: is it the wrong way round?"
    if abs(share - TEST) * len(names) > 1.5:
        return (
            f"{share:.0%} of the groups are in the test; take 40 % of the names, each once: rng.permutation(np.unique(groups)), "
            "and the first of them. (rng.choice may draw a name twice, unless replace=False.)"
        )
    return None


@exercise(lambda: lambda labels, seed: np.asarray(labels)[np.random.default_rng(seed).permutation(len(labels))])
def shuffled(answer: Any) -> str | None:
    """The same labels in another order."""
    labels = np.arange(40) % 2
    given = labels.copy()
    found = answer(given, 0)
    if found is None:
        return "shuffled returned nothing. rng.shuffle works in place and returns None; rng.permutation returns a new array."
    if not (given == labels).all():
        return (
            "Your function changed the labels that it was given. The true ones are gone! rng.permutation makes a copy."
        )
    found = np.asarray(found)
    if found.shape != labels.shape:
        return f"The shape is {found.shape}; it should be that of the labels, {labels.shape}."
    if (found == 1 - labels).all():
        return "You turned every label round. That is no shuffle: a probe learns it as well as the true ones."
    if found.sum() != labels.sum():
        return f"Of 40 labels {labels.sum()} were 1, now {found.sum()} are. Put the SAME labels in another order."
    if (found == labels).all():
        return "The labels stand where they stood."
    if (found != np.asarray(answer(labels.copy(), 0))).any():
        return "The same seed gave two different orders. Use np.random.default_rng(seed)."
    if (found == np.asarray(answer(labels.copy(), 1))).all():
        return "Seeds 0 and 1 gave the same order. Does the drawing use the seed?"
    return None


# --- questions ------------------------------------------------------------------------------------------------------


def _letter(name: str, answer: Any, wrong: dict[str, str], right: str) -> str | None:
    if answer == right:
        return None
    return wrong.get(answer, f'Choose one letter: {name} = "a", "b" or "c". You gave {answer!r}.')


@exercise(lambda: "b")
def why_below(answer: Any) -> str | None:
    """Why a random split falls below one half."""
    wrong = {
        "a": "The labels were not shown to the model, only to the probe. What did the probe learn about “Fukuoka” and “Japan”?",
        "c": "Noise goes up as often as down. This is far below one half at ten depths in a row.",
    }
    return _letter("why_below", answer, wrong, "b")


@exercise(lambda: "c")
def what_follows(answer: Any) -> str | None:
    """What a high probe accuracy says."""
    wrong = {
        "a": "We never changed the model. Whether it uses what we read is another experiment: lesson 2 puts states in.",
        "b": "The probe had labels to learn from. Its share says how well one straight cut works, not what the model knows.",
    }
    return _letter("what_follows", answer, wrong, "c")
