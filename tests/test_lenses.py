"""A lens at depth L is the model itself."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES

from lab import lenses
from lab.checks import hooks_left
from lab.states import collect_states
from lab.texts import tokenize

TEXTS = ["The capital of France is", "a", "Syria: Syria is a country in the Middle East", "12 + 7 ="]


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_last_depth_ranks_and_top_tokens_are_those_of_the_logits(tiny_model, family):
    """Gemma 2 caps its logits, GPT-2 and NeoX have norms with a bias: order and place stay."""
    model = tiny_model(family)
    states = collect_states(model, TEXTS, progress=False)["resid"].values[:, -1]
    wanted = [[70], [71, 200, 5], [90, 91], list(range(100, 140))]
    logits = []
    for text in TEXTS:
        with torch.inference_mode():
            logits.append(model.original_model(input_ids=tokenize(model, [text]).ids).logits[0, -1])
    places = [int((row > row[ids].max()).sum()) for row, ids in zip(logits, wanted, strict=True)]
    assert lenses.ranks(model, states, wanted).tolist() == places
    assert len(set(places)) > 2, "all ranks alike: the test would see nothing"
    tops = [int(row.argmax()) for row in logits]
    assert lenses.top_tokens(model, states).tolist() == tops
    assert lenses.ranks(model, states, [[top] for top in tops]).tolist() == [0] * len(TEXTS)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_at_an_earlier_depth_it_is_the_norm_and_the_unembedding(tiny_model, family):
    model = tiny_model(family)
    states = collect_states(model, TEXTS, progress=False)["resid"].values[:, 2]
    with torch.inference_mode():
        logits = model.original_model.lm_head(model.original_model.model.norm(torch.tensor(states)))
    assert lenses.top_tokens(model, states).tolist() == logits.argmax(-1).tolist()
    assert lenses.ranks(model, states, [[8]] * 4).tolist() == (logits > logits[:, 8:9]).sum(-1).tolist()
    last = collect_states(model, TEXTS, progress=False)["resid"].values[:, -1]
    assert lenses.ranks(model, states, [[8]] * 4).tolist() != lenses.ranks(model, last, [[8]] * 4).tolist()


def test_many_states_go_through_in_parts(tiny_model, monkeypatch):
    model = tiny_model("llama")
    states = np.random.default_rng(0).standard_normal((11, 32)).astype(np.float32)
    wanted = [[i, i + 50] for i in range(11)]
    whole, tops = lenses.ranks(model, states, wanted), lenses.top_tokens(model, states)
    monkeypatch.setattr(lenses, "_ROWS", 4)
    assert lenses.ranks(model, states, wanted).tolist() == whole.tolist()
    assert lenses.top_tokens(model, states).tolist() == tops.tolist()
    one_by_one = [lenses.ranks(model, states[i : i + 1], wanted[i : i + 1])[0] for i in range(11)]
    assert one_by_one == whole.tolist()


def test_errors_say_what_is_missing(tiny_model):
    model, states = tiny_model("llama"), np.zeros((2, 32), np.float32)
    with pytest.raises(ValueError, match="1 lists of tokens for 2 states; give one for each"):
        lenses.ranks(model, states, [[3]])
    with pytest.raises(ValueError, match="a state has no tokens to look for: give at least one id"):
        lenses.ranks(model, states, [[3], []])
