"""A lens at depth L is the model itself."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES

from lab import lenses
from lab.checks import hooks_left
from lab.depth_efficiency import attributions, effects
from lab.interventions import patch
from lab.runs import clean_run, generate
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


def test_caps_and_scales_are_the_models_own_wherever_states_become_words(formed):
    """Lens, probabilities, gradients and decoding, against the logits that the model gives itself."""
    model, text = formed, "The city of Paris is in"
    ids = tokenize(model, [text]).ids[0]
    with torch.inference_mode():
        logits = model.original_model(input_ids=ids[None], use_cache=False).logits[0]
    run, said = clean_run(model, ids, sublayers=True), int(logits[-1].argmax())
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(lenses.readout(model, run.states[-1]), logits, **close)
    torch.testing.assert_close(run.logits, logits[-1], **close)
    torch.testing.assert_close(effects.probabilities(model, run.states[-1]), logits.softmax(-1), **close)
    torch.testing.assert_close(lenses.readout(model, run.states[-1], kind="log_probs"), logits.log_softmax(-1), **close)
    assert lenses.top_tokens(model, run.states[-1, -1:].numpy()).tolist() == [said]
    value, slope = effects.gradients_at(model, run, "resid", 1, run.states[2][None], [said, 70], [len(ids) - 1, 3])
    torch.testing.assert_close(value[0], logits[-1].softmax(-1)[said] + logits[3].softmax(-1)[70], **close)
    direction = torch.randn(run.states[2].shape, generator=torch.Generator().manual_seed(0))
    shifted = torch.stack([run.states[2] + 1e-2 * direction, run.states[2] - 1e-2 * direction])
    ends, _ = effects.gradients_at(model, run, "resid", 1, shifted, [said, 70], [len(ids) - 1, 3])
    np.testing.assert_allclose((slope[0] * direction).sum(), (ends[0] - ends[1]) / 2e-2, rtol=0.05, atol=1e-6)

    steps, plain = ids.tolist(), []
    for _ in range(4):
        with torch.inference_mode():
            plain.append(int(model.original_model(input_ids=torch.tensor([steps])).logits[0, -1].argmax()))
        steps.append(plain[-1])
    for reuse in (True, False):
        found = generate(
            model, run, [0], [0], run.states[0, 0][None, None], max_new_tokens=4, wanted=[70, 90], reuse=reuse
        )
        assert found.ids[0] == plain and found.ranks[0] == int((logits[-1] > logits[-1, [70, 90]].max()).sum())


def test_integrated_gradients_end_at_the_models_own_probability(formed):
    model = formed
    frame = attributions.integrated_gradients(model, "The city of Paris is in", " Fr", layers=[1], nodes=16)
    ids, at = attributions.joint(model, "The city of Paris is in", " Fr")
    run = clean_run(model, ids)
    base = run.states[2].clone()
    base[1:] = run.states[2, 1:].mean(0)
    chances = []
    for value in (run.states[2], base):
        with torch.inference_mode(), patch(model, "resid_pre", layer=2, value=value[None]):
            logits = model.original_model(input_ids=ids[None], use_cache=False).logits[0].softmax(-1)
        chances.append(sum(float(logits[p, ids[p + 1]]) for p in at))
    assert frame.attribution.sum() == pytest.approx(chances[0] - chances[1], abs=max(1e-5, 2 * frame.attrs["gap"]["1"]))
    assert frame.attrs["gap"]["1"] < 0.02 * abs(chances[0] - chances[1]) + 1e-5


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


def test_where_nothing_is_looked_for_the_rank_is_missing(tiny_model):
    """-1, and missing in a table: it is in no share and no median."""
    states = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    model = tiny_model("llama")
    top = int(lenses.top_tokens(model, states)[2])
    ranks = lenses.ranks(model, states, [[3], [], [top]])
    assert ranks[1:].tolist() == [-1, 0]
    table = lenses.as_ranks(ranks)
    assert table.isna().tolist() == [False, True, False] and (table == 0).mean() == (0.5 if ranks[0] else 1)
