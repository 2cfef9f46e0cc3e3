"""Models that end early, and norms of one block that do not look at the token."""

import numpy as np
import pytest
import torch

import lab
from lab.depth_budget import SKIP, Evaluator, exits, texts_of
from lab.depth_budget.changes import FixedNorms
from lab.interventions import fixed_norms


@pytest.fixture
def data():
    frame = lab.datasets.load("prose").head(24)
    frame["text"] = frame.text.str[:80]
    return frame


def test_prefixes_are_read_as_the_lens_reads_them(tiny_model, data):
    model = tiny_model("llama")
    found = exits.prefix_exits(model, data, n_texts=4, n_tokens=20, n_random=2, step=2, resume=False, progress=False)
    (texts,) = texts_of(model, data, sizes=(4,), n_tokens=20)
    n_layers = model.cfg.n_layers
    for n in range(n_layers + 1):
        with torch.no_grad():
            _, cache = model.run_with_cache(texts.ids)
            name = f"blocks.{n}.hook_in" if n < n_layers else f"blocks.{n_layers - 1}.hook_out"
            log_p = lab.lenses.readout(model, cache[name], kind="log_probs")[:, 8:-1]
        wanted = -log_p.gather(-1, texts.ids[:, 9:, None]).mean((1, 2))
        part = found.table[(found.table.way == "prefix") & (found.table.n_blocks == n)]
        np.testing.assert_allclose(part.nll, wanted.numpy(), rtol=1e-4)
    ends = found.table[found.table.n_blocks == n_layers]
    assert set(ends.way) == set(exits.EXITS) - {"random"} and (ends.rise == 0).all()
    assert set(found.summary.how) == {"bootstrap over texts", "5 to 95 % of draws"}
    assert found.columns().meaning.ne("").all()


def test_a_prefix_with_the_last_block(tiny_model, data):
    model = tiny_model("llama")
    found = exits.prefix_exits(model, data, n_texts=3, n_tokens=20, n_random=2, resume=False, progress=False).table
    (texts,) = texts_of(model, data, sizes=(3,), n_tokens=20)
    wanted = Evaluator(model, texts.ids, progress=False)([{1: SKIP, 2: SKIP}]).nll[0]
    part = found[(found.way == "prefix, last") & (found.n_blocks == 2)]
    np.testing.assert_array_equal(part.nll, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_own_sizes_change_nothing_and_others_do(tiny_model, family):
    """With one token, its own mean square as the fixed size gives the norm's own output."""
    model = tiny_model(family)
    ids = torch.tensor([[7, 9, 30]])
    run = lab.runs.clean_run(model, ids[0], sublayers=True)
    own = {
        "ln1": run.states[2, 2].square().mean()[None],
        "ln2": (run.states[2] + run.attn_out[2])[2].square().mean()[None],
    }
    with torch.no_grad():
        before = model(ids, use_cache=False)
        with fixed_norms(model, 2, own, first=2):
            same = model(ids, use_cache=False)
        with fixed_norms(model, 2, {"ln1": own["ln1"] * 4, "ln2": own["ln2"] * 4}, first=2):
            other = model(ids, use_cache=False)
        with fixed_norms(model, 2, own, first=3):  # no position is left
            none = model(ids, use_cache=False)
    torch.testing.assert_close(same, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(none, before)
    assert (other - before)[:, 2].abs().max() > 0.01 and torch.equal(other[:, :2], before[:, :2])


def test_norms_by_depth(tiny_model, data):
    model = tiny_model("llama")
    settings = {"n_texts": 4, "n_calibration": 3, "n_tokens": 20, "progress": False}
    found = exits.norms(model, data, layers=[0, 3], resume=False, **settings)
    assert set(found.table.way) == set(exits.NORMS) and set(found.table.layer) == {0, 3}
    calibration, texts = texts_of(model, data, sizes=(3, 4), n_tokens=20)
    squares = exits._squares(model, calibration.ids, 1)[0][:, 3]
    change = FixedNorms("by hand", (squares[0], squares[1]))
    with torch.no_grad(), change.entered(model, 3):
        log_p = model(texts.ids, use_cache=False)[:, 8:-1].log_softmax(-1)
    wanted = -log_p.gather(-1, texts.ids[:, 9:, None]).mean((1, 2))
    part = found.table[(found.table.way == "by channel") & (found.table.layer == 3)]
    np.testing.assert_allclose(part.nll, wanted.numpy(), rtol=1e-4)


def test_what_is_refused(tiny_model, data):
    with pytest.raises(ValueError, match="RMS"):
        exits.norms(tiny_model("gpt2"), data)
    with pytest.raises(ValueError, match="first=50"):
        exits.norms(tiny_model("llama"), data, first=50)
    with pytest.raises(ValueError, match="n_random"):
        exits.prefix_exits(tiny_model("llama"), data, n_random=0)


def test_finished_parts_are_read(tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    settings = {"n_texts": 3, "n_tokens": 20, "n_random": 2, "progress": False}
    first = exits.prefix_exits(tiny_model("llama"), data, **settings)
    monkeypatch.setattr(exits, "Evaluator", None)  # a second run needs none
    second = exits.prefix_exits(tiny_model("llama"), data, **settings)
    assert first.table.equals(second.table)
