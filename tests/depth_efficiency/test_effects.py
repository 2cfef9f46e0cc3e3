"""Every shortcut of `lab.depth_efficiency.effects` against a plain loop of hooked forward passes, one variant at a time."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES

from lab.depth_efficiency.effects import (
    KINDS,
    global_effects,
    gradients_at,
    local_effects,
    probabilities,
    replaced_outputs,
    skipped,
)
from lab.interventions import patch
from lab.models import SITES
from lab.runs import clean_run
from lab.texts import tokenize

TEXT = "Ana had 3 pears, and Bo had 4."
CUTS = [None, 8, 16]


def prompt(model):
    return tokenize(model, [TEXT]).ids[0]


def watched(model, ids, hooks):
    """States before and after every layer, under hooks, one plain pass."""
    seen, n = {}, model.cfg.n_layers

    def keep(key):
        return lambda state, hook: seen.__setitem__(key, state[0].clone())

    reads = [(SITES[f"resid_{side}"].format(layer=i), keep((side, i))) for i in range(n) for side in ("pre", "post")]
    with torch.inference_mode(), model.hooks(fwd_hooks=hooks + reads):
        logits = model.original_model(input_ids=ids[None], use_cache=False).logits[0]
    return [seen["post", i] - seen["pre", i] for i in range(n)], logits.softmax(-1)


def plain_skip(model, ids, kind, layer, cut):
    """What a reader would write: one hook that leaves a part out before the cut, but at position 0."""
    end = len(ids) if cut is None else cut
    memory = {}

    def remember(state, hook):
        memory["pre"] = state

    def leave_out(state, hook):
        new = state.clone()
        new[:, 1:end] = memory["pre"][:, 1:end] if kind == "layer" else 0
        return new

    site = {"layer": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}[kind]
    hooks = [(SITES["resid_pre"].format(layer=layer), remember), (SITES[site].format(layer=layer), leave_out)]
    return watched(model, ids, hooks)


def ratio(clean, changed, first):
    parts = [
        ((a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-6))[first:] for a, b in zip(clean, changed, strict=True)
    ]
    return torch.stack(parts).numpy()


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_global_effects_are_those_of_the_plain_loop(tiny_model, family, kind, reuse):
    model = tiny_model(family)
    ids = prompt(model)
    run = clean_run(model, ids, sublayers=True)
    clean, before = watched(model, ids, [])
    read = [4, 20, len(ids) - 1]
    found = global_effects(model, run, *skipped(model, run, kind), cuts=CUTS, read=read, reuse=reuse, batch_tokens=70)
    for cut, effects in zip(CUTS, found, strict=True):
        first = cut or 0
        assert effects.read == tuple(p for p in read if p >= first)
        for layer in range(run.n_layers):
            changed, after = plain_skip(model, ids, kind, layer, cut)
            wanted = ratio(clean, changed, first)
            assert (wanted[:layer] == 0).all(), "a skip cannot reach back"
            if cut is not None:
                assert (wanted[layer] == 0).all(), "from the cut on the skipped layer works as usual"
            elif kind == "layer":
                np.testing.assert_allclose(wanted[layer, 1:], 1, atol=1e-5)  # it adds nothing, but at position 0
                assert wanted[layer, 0] == 0
            else:
                assert wanted[layer, 1:].min() > 1e-3
            assert (effects.contribution[layer, : layer + 1] == 0).all(), "the skipped layer itself is not measured"
            np.testing.assert_allclose(effects.contribution[layer, layer + 1 :], wanted[layer + 1 :], atol=2e-4)
            wanted = (before - after).norm(dim=-1)[list(effects.read)].numpy()
            np.testing.assert_allclose(effects.output[layer], wanted, atol=1e-4)
            if layer == 0:
                assert effects.output[layer].max() > 1e-3, "nothing changed: the test would see nothing"


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_local_effects_are_those_of_the_plain_loop(tiny_model, family, reuse):
    model = tiny_model(family)
    ids = prompt(model)
    run = clean_run(model, ids, sublayers=True)
    added = run.states[1:] - run.states[:-1]
    added[:, 0] = 0
    clean, _ = watched(model, ids, [])
    for cut, effects in zip(
        CUTS, local_effects(model, run, range(run.n_layers), added, cuts=CUTS, reuse=reuse), strict=True
    ):
        for source in range(run.n_layers):
            for layer in range(source + 1, run.n_layers):
                value = run.states[layer].clone()
                value[:cut] -= added[source, :cut]
                with patch(model, "resid_pre", layer=layer, value=value[None]):
                    changed, _ = watched(model, ids, [])
                wanted = ratio(clean[layer : layer + 1], changed[layer : layer + 1], cut or 0)[0]
                np.testing.assert_allclose(effects.contribution[source, layer], wanted, atol=2e-4)
        assert (effects.contribution[-1] == 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_structure(tiny_model, family):
    """What must hold by construction (protocol of Csordas et al.): the trivial parts of the matrices are trivial."""
    model = tiny_model(family)
    run = clean_run(model, prompt(model), sublayers=True)
    n, length = run.n_layers, len(run.ids)
    np.testing.assert_allclose(run.states[:-1] + run.attn_out + run.mlp_out, run.states[1:], atol=1e-4)
    depths, states = skipped(model, run, "layer")
    read = list(range(1, length))
    everywhere, future, local_all = (
        *global_effects(model, run, depths, states, cuts=[None, 8], read=read),
        local_effects(model, run, range(n), states_out(run), cuts=[None])[0],
    )
    for s in range(n):
        if s + 1 < n:
            assert everywhere.contribution[s, s + 1].max() > 1e-3
            np.testing.assert_allclose(everywhere.contribution[s, s + 1], local_all.contribution[s, s + 1], atol=1e-4)
    assert (future.output[n - 1] < 1e-5).all(), "skipping the last layer before a cut cannot change later tokens"
    assert everywhere.output[n - 1].max() > 1e-3
    assert max(everywhere.floor.max(), future.floor.max()) < 1e-4


def states_out(run):
    added = run.states[1:] - run.states[:-1]
    added[:, 0] = 0
    return added


@pytest.mark.parametrize("kind", KINDS)
def test_before_a_cut_the_states_are_those_of_no_cut(tiny_model, kind):
    """By causality: what is behind the cut cannot be seen before it. A whole prompt's cut would be no cut at all."""
    model = tiny_model("llama")
    run = clean_run(model, prompt(model), sublayers=True)
    clean, _ = watched(model, run.ids, [])
    everywhere = global_effects(model, run, *skipped(model, run, kind))[0]
    for layer in range(run.n_layers):
        whole, _ = plain_skip(model, run.ids, kind, layer, None)
        for cut in (8, len(run.ids) - 1):
            changed, _ = plain_skip(model, run.ids, kind, layer, cut)
            for one, other in zip(whole, changed, strict=True):
                torch.testing.assert_close(one[:cut], other[:cut], atol=1e-6, rtol=1e-5)
            wanted = ratio(clean, changed, 0)[layer + 1 :, :cut]
            np.testing.assert_allclose(everywhere.contribution[layer, layer + 1 :, :cut], wanted, atol=2e-4)
        apart = (whole[layer][cut:] - changed[layer][cut:]).abs().max()
        assert apart > 1e-3, "behind the cut they must differ: there the layer works as usual"


@pytest.mark.parametrize("cut", [8, 29])
def test_a_cut_with_and_without_kept_keys(tiny_model, cut):
    model = tiny_model("llama")
    run = clean_run(model, prompt(model), sublayers=True)
    depths, states = skipped(model, run, "layer")
    reused, whole = (global_effects(model, run, depths, states, cuts=[cut], reuse=reuse)[0] for reuse in (True, False))
    assert reused.contribution.shape[2] == len(run.ids) - cut and reused.contribution.max() > 1e-3
    np.testing.assert_allclose(reused.contribution, whole.contribution, atol=1e-4)


def test_rows_in_any_order_and_of_any_depth(tiny_model):
    model = tiny_model("llama")
    run = clean_run(model, prompt(model), sublayers=True)
    depths, states = skipped(model, run, "layer")
    order = [3, 0, 2, 1]
    found = global_effects(model, run, depths, states)[0]
    turned = global_effects(model, run, [depths[i] for i in order], states[order], batch_tokens=1)[0]
    np.testing.assert_allclose(turned.contribution, found.contribution[order], atol=1e-5)
    np.testing.assert_allclose(turned.output, found.output[order], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_outputs_are_those_of_plain_patches(tiny_model, family):
    model = tiny_model(family)
    run = clean_run(model, prompt(model))
    n, last = run.n_layers, len(run.ids) - 1
    mean = run.states[:, 1:].mean(1)
    read = [last - 3, last]
    for position in (5, last - 1, last):
        found = replaced_outputs(model, run, position, mean, read)
        np.testing.assert_allclose(found, replaced_outputs(model, run, position, mean, read, reuse=False), atol=1e-4)
        for depth in range(n + 1):
            site, layer = ("resid_pre", depth) if depth < n else ("resid_post", n - 1)
            with patch(model, site, layer=layer, value=mean[depth], position=position):
                _, after = watched(model, run.ids, [])
            wanted = (after - watched(model, run.ids, [])[1]).norm(dim=-1)[read].numpy()
            np.testing.assert_allclose(found[depth], wanted, atol=1e-4)
        assert (found[n, [j for j, where in enumerate(read) if where != position]] < 1e-5).all()


@pytest.mark.parametrize("site", ["resid", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_gradients_are_those_of_finite_differences(tiny_model, family, site):
    model = tiny_model(family)
    run = clean_run(model, prompt(model)[:12], sublayers=True)
    layer, at, tokens = 1, [8, 10], [70, 90]
    value = {"resid": run.states[layer + 1], "attn_out": run.attn_out[layer], "mlp_out": run.mlp_out[layer]}[site]
    total, slope = gradients_at(model, run, site, layer, value[None], tokens, at)
    wanted = sum(probabilities(model, run.states[-1, p])[t] for p, t in zip(at, tokens, strict=True))
    np.testing.assert_allclose(total[0], wanted, rtol=1e-3)
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    both = torch.stack([value + 1e-2 * direction, value - 1e-2 * direction])
    ends, _ = gradients_at(model, run, site, layer, both, tokens, at)
    np.testing.assert_allclose((slope[0] * direction).sum(), (ends[0] - ends[1]) / 2e-2, rtol=0.05, atol=1e-6)


def test_no_hook_is_left_and_nothing_has_changed(tiny_model):
    from lab.models import hooks_left

    model = tiny_model("llama")
    run = clean_run(model, prompt(model), sublayers=True)
    global_effects(model, run, *skipped(model, run, "attn"), cuts=[None, 8])
    assert hooks_left(model) == 0
    assert torch.equal(clean_run(model, prompt(model)).states, run.states)


def test_states_that_are_not_finite_are_named(tiny_model):
    model = tiny_model("llama")
    run = clean_run(model, prompt(model), sublayers=True)
    depths, states = skipped(model, run, "layer")
    states[1, 3] = torch.inf
    with pytest.raises(FloatingPointError, match="what layer 2 adds is not finite"):
        global_effects(model, run, depths, states)


def test_errors_say_what_to_do(tiny_model):
    model = tiny_model("llama")
    run = clean_run(model, prompt(model), sublayers=True)
    depths, states = skipped(model, run, "layer")
    with pytest.raises(ValueError, match="kind='heads': choose one of layer, attn, mlp"):
        skipped(model, run, "heads")
    with pytest.raises(ValueError, match="sublayers=True"):
        skipped(model, clean_run(model, prompt(model)), "layer")
    with pytest.raises(ValueError, match=r"depths=\[\]: give at least one, each from 0 to 4"):
        global_effects(model, run, [], states[:0])
    with pytest.raises(ValueError, match=r"depths=\[9\]"):
        global_effects(model, run, [9], states[:1])
    with pytest.raises(ValueError, match="wanted .row position d_model. = "):
        global_effects(model, run, depths, states[:2])
    with pytest.raises(ValueError, match="a cut=99: give a whole number from 1 to 29"):
        global_effects(model, run, depths, states, cuts=[99])
    with pytest.raises(ValueError, match=r"cuts=\[\]: give at least 1 of the positions"):
        global_effects(model, run, depths, states, cuts=[])
    with pytest.raises(ValueError, match=r"read=\[40\]: give at least one, each from 0 to 29"):
        global_effects(model, run, depths, states, read=[40])
    with pytest.raises(ValueError, match=r"layers=\[4\]: give at least one, each from 0 to 3"):
        local_effects(model, run, [4], states[:1])
