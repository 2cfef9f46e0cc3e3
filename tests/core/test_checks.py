import numpy as np
import pytest
import torch
from conftest import FAMILIES

import lab
from lab.checks import hooks_left


def failed(table):
    return list(table.check[~table.ok])


@pytest.mark.parametrize("family", FAMILIES)
def test_check_passes_on_every_family(tiny_model, family):
    model = tiny_model(family)
    table = lab.check(model)
    assert list(table.columns) == ["check", "value", "limit", "ok"] and len(table) == 12
    assert failed(table) == [] and hooks_left(model) == 0
    absent = table[table.check == "resid_mid: no such site (attention and MLP run in parallel)"]
    assert len(absent) == (family == "neox") and absent.value.isna().all()
    assert table.value.notna().sum() == 12 - len(absent)


def test_check_passes_on_smollm2(smollm2):
    table = lab.check(smollm2)
    assert failed(table) == [] and "states at depths 0 to 30 = plain Hugging Face" in set(table.check)


@pytest.mark.slow
def test_check_passes_on_gemma3_270m():
    table = lab.check(lab.load("gemma3-270m", device="cpu", accept_license=True))
    assert failed(table) == [] and "states at depths 0 to 18 = plain Hugging Face" in set(table.check)


def test_check_passes_in_bfloat16_with_a_wider_limit(tiny_folder):
    table = lab.check(lab.load(tiny_folder("llama"), device="cpu", dtype=torch.bfloat16))
    assert failed(table) == [] and table.limit[0] == 2e-2


def test_check_does_not_change_the_model(tiny_model):
    model = tiny_model("llama")
    ids, random_state = torch.arange(3, 12)[None], torch.get_rng_state()
    before = model(ids)
    lab.check(model)
    assert torch.equal(model(ids), before) and torch.equal(torch.get_rng_state(), random_state)


# --- what it is for: each kind of damage is seen ---


def test_a_cache_that_attention_does_not_see_is_noticed(tiny_model, monkeypatch):
    """As with a transformers that names the cache otherwise: attention goes on without the prompt, and says nothing."""
    model = tiny_model("llama")
    attention = type(model.blocks[0].attn)
    monkeypatch.setattr(attention, "_update_kv_cache", lambda self, keys, values, **kwargs: (keys, values))
    assert failed(lab.check(model)) == ["continuation with kept keys and values = without (tokens that differ)"]


def test_a_changed_weight_is_taken_as_it_is(tiny_folder):
    """A model that was tuned in memory is that model; what is held against it has the same weights."""
    model = lab.load(tiny_folder("llama"), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids)
    with torch.no_grad():
        model.original_model.model.layers[1].self_attn.v_proj.weight.view(-1)[3] += 0.5
    assert failed(lab.check(model)) == [] and not torch.equal(model(ids), before)


def test_a_bridge_that_goes_its_own_way_is_seen(tiny_folder):
    """GPT-2's norms take their epsilon from the Bridge's config; the plain model has its own."""
    model = lab.load(tiny_folder("gpt2"), device="cpu")
    model.cfg.eps = 1.0
    assert failed(lab.check(model))[0] == "logits = plain Hugging Face"


def test_a_hook_left_behind_is_seen_and_not_removed(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu")
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: None)
    assert failed(lab.check(model)) == ["hooks left behind"]
    assert hooks_left(model) > 0
    model.reset_hooks()
    assert failed(lab.check(model)) == [] and hooks_left(model) == 0


def test_a_hook_that_changes_the_stream_is_seen(tiny_folder):
    model = lab.load(tiny_folder("gpt2"), device="cpu")
    model.add_hook("blocks.2.hook_resid_pre", lambda value, hook: 1.01 * value)
    assert "hooks left behind" in failed(lab.check(model))


def test_a_write_that_reaches_nothing_is_seen(tiny_folder):
    """Where a later hook undoes the patch, taking a depth from another prompt no longer gives its logits."""
    model = lab.load(tiny_folder("llama"), device="cpu")
    model.add_hook("blocks.3.hook_resid_post", lambda value, hook: torch.ones_like(value))
    table = lab.check(model).set_index("check")
    line = table.loc["... and those differ from the clean ones (1 / difference)"]
    assert np.isinf(line.value) and not line.ok


def test_a_batch_that_is_not_one_at_a_time_is_seen(tiny_folder):
    """A hook through which the texts of a batch reach each other."""
    model = lab.load(tiny_folder("llama"), device="cpu")
    model.add_hook("blocks.1.hook_mlp_out", lambda value, hook: value + value.mean(0, keepdim=True))
    assert {f"batch = one at a time, padding {side}" for side in ("left", "right")} <= set(failed(lab.check(model)))


def test_weights_that_are_not_numbers_are_named(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu")
    with torch.no_grad():
        next(model.blocks[1].parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="resid at depth 2 of text 0 is not finite"):
        lab.check(model)
