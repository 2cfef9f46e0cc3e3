import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FAMILIES

import lab
from lab.checks import hooks_left
from lab.models import SITES, plain_twin
from lab.states import collect_states
from lab.texts import tokenize

LENGTHS = (5, 23, 11, 1, 23, 40, 2, 17, 9, 30)
TEXTS = ["".join(chr(97 + (i * i + 7 * j) % 26) for i in range(n)) for j, n in enumerate(LENGTHS)]
SENTENCES = [
    "The city of Marrakesh is in Morocco.", "Water boils.", "A coin is heads up. Maya flips the coin. Ed does not.",
    "Paris", "Seven is larger than four, and four is larger than one.", "The city of Kuala Lumpur is in Malaysia.",
]  # fmt: skip


def close(ours, reference, limit=1e-5):
    return np.abs(np.asarray(ours) - np.asarray(reference)).max() <= limit * np.abs(np.asarray(reference)).max()


def mlp_of(plain, layer):
    """The MLP module of a block of a plain Hugging Face model."""
    blocks = getattr(plain.base_model, "layers", None) or plain.base_model.h
    return blocks[layer].mlp


def one_at_a_time(model, texts, names, positions=None):
    """The slow way: each text alone through `run_with_cache`; [text name d_model]."""
    rows = []
    for i, text in enumerate(texts):
        tokens = tokenize(model, [text])
        at = -1 if positions is None else positions[i]
        _, cache = model.run_with_cache(tokens.ids, names_filter=list(names))
        rows.append(torch.stack([cache[name][0, at] for name in names]).detach().numpy())
    return np.stack(rows)


def resid_names(model):
    last = model.cfg.n_layers - 1
    return [SITES["resid_pre"].format(layer=i) for i in range(last + 1)] + [SITES["resid_post"].format(layer=last)]


# --- every site against the plain Hugging Face model ---


@pytest.mark.parametrize("family", FAMILIES)
def test_every_depth_equals_plain_hugging_face(tiny_model, family):
    model = tiny_model(family)
    states = collect_states(model, TEXTS, progress=False)["resid"]
    assert states.index == (0, 1, 2, 3, 4) and states.axes == ("example", "depth", "d_model")
    plain = plain_twin(model)
    for text, ours in zip(TEXTS, states.values, strict=True):
        with torch.inference_mode():
            hidden = plain(tokenize(model, [text]).ids, output_hidden_states=True).hidden_states
            final = model.ln_final(torch.tensor(ours[None, 4:]))[0, 0]
        for depth in range(4):
            assert close(ours[depth], hidden[depth][0, -1])
        assert close(final, hidden[4][0, -1])  # the last of Hugging Face's hidden states is after the final norm
        assert not close(ours[4], hidden[4][0, -1])


def test_every_depth_equals_plain_hugging_face_smollm2(smollm2):
    alone = collect_states(smollm2, SENTENCES, batch_tokens=1, progress=False)["resid"].values
    batched = collect_states(smollm2, SENTENCES, progress=False)["resid"].values
    assert alone.shape == (len(SENTENCES), 31, 576) and alone.dtype == np.float32
    plain = plain_twin(smollm2)
    for i, text in enumerate(SENTENCES):
        with torch.inference_mode():
            hidden = plain(tokenize(smollm2, [text]).ids, output_hidden_states=True).hidden_states
            assert close(smollm2.ln_final(torch.tensor(alone[i : i + 1, 30:]))[0, 0], hidden[30][0, -1])
        for depth in range(30):
            assert close(alone[i, depth], hidden[depth][0, -1], 1e-5)
            # The first token of a text (here all of "Paris") has states thousands of times larger than the others in a
            # few dimensions; the order of additions, which a batch changes, is seen there. In float64 it is not.
            assert close(batched[i, depth], hidden[depth][0, -1], 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_block_add_up(tiny_model, family):
    model = tiny_model(family)
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_post"] + ["resid_mid"] * (family != "neox")
    states = collect_states(model, TEXTS, sites=sites, progress=False)
    values = {site: states[site].values for site in sites}
    assert all(states[site].axes == ("example", "layer", "d_model") and len(states[site].index) == 4 for site in sites)
    assert close(values["resid_pre"] + values["attn_out"] + values["mlp_out"], values["resid_post"])
    if family != "neox":
        assert close(values["resid_pre"] + values["attn_out"], values["resid_mid"])
    for part in ("attn_out", "mlp_out"):  # both parts matter, or the sums above would say little
        assert np.abs(values[part]).max() > 1e-2 * np.abs(values["resid_pre"]).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_in_is_what_the_plain_mlp_receives(tiny_model, family):
    model = tiny_model(family)
    ours = collect_states(model, TEXTS, sites=["mlp_in"], progress=False)["mlp_in"].values
    plain, received = plain_twin(model), {}
    for layer in range(4):
        mlp_of(plain, layer).register_forward_pre_hook(
            lambda module, args, layer=layer: received.update({layer: args[0]})
        )
    for i, text in enumerate(TEXTS):
        with torch.inference_mode():
            plain(tokenize(model, [text]).ids)
        assert all(close(ours[i, layer], received[layer][0, -1]) for layer in range(4))


def test_mlp_in_of_llama_is_the_normed_resid_mid(tiny_model):
    model = tiny_model("llama")
    states = collect_states(model, TEXTS, sites=["mlp_in", "resid_mid"], progress=False)
    plain = plain_twin(model)
    for layer, block in enumerate(plain.model.layers):
        x = states["resid_mid"].values[:, layer]
        gain = block.post_attention_layernorm.weight.detach().numpy()
        by_hand = x / np.sqrt((x**2).mean(-1, keepdims=True) + plain.config.rms_norm_eps) * gain
        assert close(states["mlp_in"].values[:, layer], by_hand)


def test_parallel_blocks_have_no_resid_mid(tiny_model):
    with pytest.raises(
        ValueError, match="no site resid_mid: this model's blocks run attention and MLP in parallel; use"
    ):
        collect_states(tiny_model("neox"), TEXTS, sites=["resid_mid"], progress=False)


# --- batches, order, positions, depths ---


@pytest.mark.parametrize("batch_tokens", [1, 30, 64, 1024])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_batching_changes_nothing(tiny_model, family, batch_tokens):
    model = tiny_model(family)
    names = resid_names(model)
    ours = collect_states(model, TEXTS, batch_tokens=batch_tokens, progress=False)["resid"].values
    assert close(ours, one_at_a_time(model, TEXTS, names))


def test_batching_changes_nothing_smollm2():
    """In float64, where all that is left of rounding is that of the states that are kept and of the positions' angles, which
    are in float32: batches and padding change nothing in any single depth."""
    model = lab.load("smollm2-135m", device="cpu", dtype=torch.float64)
    reference = one_at_a_time(model, SENTENCES, resid_names(model))
    for batch_tokens in (40, 1024):
        ours = collect_states(model, SENTENCES, batch_tokens=batch_tokens, progress=False)["resid"].values
        assert all(
            close(ours[i, depth], reference[i, depth], 1e-6) for i in range(len(SENTENCES)) for depth in range(31)
        )


def test_rows_keep_the_order_of_the_texts(tiny_model):
    model = tiny_model("llama")
    order = np.random.default_rng(0).permutation(len(TEXTS))
    straight = collect_states(model, TEXTS, progress=False)["resid"].values
    shuffled = collect_states(model, [TEXTS[i] for i in order], progress=False)["resid"].values
    assert close(shuffled, straight[order]) and not close(shuffled, straight)


def test_positions_in_the_middle(tiny_model):
    model = tiny_model("qwen3")
    positions = np.array([n // 2 for n in LENGTHS])
    ours = collect_states(model, TEXTS, positions=positions, progress=False)["resid"].values
    assert close(ours, one_at_a_time(model, TEXTS, resid_names(model), positions))


def test_depth_subsets_keep_their_order(tiny_model):
    model = tiny_model("llama")
    whole = collect_states(model, TEXTS, sites=["resid", "mlp_out"], progress=False)
    some = collect_states(model, TEXTS, index=[4, 0, 2], progress=False)["resid"]
    assert some.index == (4, 0, 2) and np.array_equal(some.values, whole["resid"].values[:, [4, 0, 2]])
    some = collect_states(model, TEXTS, sites=["resid", "mlp_out"], index=[3, 1], progress=False)
    assert np.array_equal(some["resid"].values, whole["resid"].values[:, [3, 1]])
    assert np.array_equal(some["mlp_out"].values, whole["mlp_out"].values[:, [3, 1]])


def test_bfloat16_states_come_as_float32(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu", dtype=torch.bfloat16)
    exact = collect_states(lab.load(tiny_folder("llama"), device="cpu"), TEXTS, progress=False)["resid"].values
    values = collect_states(model, TEXTS, progress=False)["resid"].values
    assert values.dtype == np.float32
    assert 1e-4 < np.abs(values - exact).max() / np.abs(exact).max() < 5e-2


# --- a folder: memory-mapped, resumed ---


def test_folder_gives_the_same_memory_mapped_and_is_not_computed_twice(tiny_model, tmp_path, passes):
    model = tiny_model("llama")
    sites = ["resid", "mlp_in"]
    inside = collect_states(model, TEXTS, sites=sites, progress=False)
    first = collect_states(model, TEXTS, sites=sites, folder=tmp_path / "states", progress=False)
    assert all(isinstance(first[site].values, np.memmap) for site in sites)
    assert all(np.array_equal(first[site].values, inside[site].values) for site in sites)
    passes.clear()
    again = collect_states(model, TEXTS, sites=sites, folder=tmp_path / "states", progress=False)
    assert passes == [] and all(np.array_equal(again[site].values, inside[site].values) for site in sites)


CHILD = """
import sys, lab
from pathlib import Path
from lab.states import collect_states
texts = [chr(97 + i % 26) * (100 - i % 60) for i in range(6000)]
collect_states(lab.load(sys.argv[1], device="cpu"), texts, folder=Path(sys.argv[2]), batch_tokens=100)
"""


def test_a_killed_collection_goes_on_where_it_stopped(tiny_folder, tiny_model, tmp_path, passes):
    """SIGKILL in the middle of 6,000 texts, one batch each; then the same call with the same texts."""
    texts = [chr(97 + i % 26) * (100 - i % 60) for i in range(6000)]
    folder = tmp_path / "states"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tiny_folder("llama")), str(folder)], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not ((folder / "done.npy").exists() and np.load(folder / "done.npy").any()):
            assert child.poll() is None and time.monotonic() < deadline, "the child ended before it could be killed"
            time.sleep(0.05)
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL
    done = np.load(folder / "done.npy")
    assert 0 < done.sum() < len(texts)
    model = tiny_model("llama")
    passes.clear()
    resumed = collect_states(model, texts, folder=folder, batch_tokens=2000, progress=False)["resid"].values
    assert sum(rows for rows, _ in passes) == len(texts) - done.sum()  # it did not start from zero
    some = np.r_[np.flatnonzero(done)[-5:], np.flatnonzero(~done)[:5], 0, 5999]
    assert close(resumed[some], collect_states(model, [texts[i] for i in some], progress=False)["resid"].values)


def test_an_interrupt_leaves_the_list_of_what_is_done(tiny_model, tmp_path, passes, monkeypatch):
    """Ctrl-C: a real SIGINT while the model runs its sixth batch."""
    model, embedding = tiny_model("llama"), torch.embedding

    def interrupt(*args):
        if len(passes) == 5:
            signal.raise_signal(signal.SIGINT)
        return embedding(*args)

    monkeypatch.setattr(torch, "embedding", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background begins with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            collect_states(model, TEXTS, folder=tmp_path / "states", batch_tokens=1, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
        monkeypatch.setattr(torch, "embedding", embedding)
    assert hooks_left(model) == 0
    done = np.flatnonzero(np.load(tmp_path / "states" / "done.npy"))
    assert sorted(done) == sorted(np.argsort(LENGTHS)[::-1][:5])  # the longest first, and not the sixth
    values = np.load(tmp_path / "states" / "resid.npy", mmap_mode="r")
    assert close(values[done], collect_states(model, [TEXTS[i] for i in done], progress=False)["resid"].values)
    passes.clear()
    collect_states(model, TEXTS, folder=tmp_path / "states", batch_tokens=1, progress=False)
    assert len(passes) == 5


def test_a_folder_of_another_run_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "states"
    collect_states(tiny_model("llama"), TEXTS, folder=folder, progress=False)
    before = (folder / "resid.npy").read_bytes()
    other = [*TEXTS[:-1], "another text of the same number"]
    for model, texts, more in (
        (tiny_model("llama"), other, {}),
        (tiny_model("llama"), TEXTS, {"positions": np.zeros(len(TEXTS), int)}),
        (tiny_model("llama"), TEXTS, {"index": [0, 1]}),
    ):
        with pytest.raises(ValueError, match="holds the states of another run .* give another folder or delete it"):
            collect_states(model, texts, folder=folder, progress=False, **more)
    assert (folder / "resid.npy").read_bytes() == before


# --- errors, and what is left behind ---


@pytest.mark.parametrize(
    "texts, more, message",
    [
        (TEXTS, {"sites": ["resid_middle"]}, r"sites=\['resid_middle'\]: choose at least one of resid, resid_pre"),
        (TEXTS, {"sites": []}, r"sites=\[\]: choose at least one of resid"),
        (
            TEXTS,
            {"index": [0, 5]},
            r"index=\[0, 5\]: give at least one, each from 0 to 4 .depths of resid. \(5 is not\)",
        ),
        (TEXTS, {"index": [-1]}, r"index=\[-1\]: give at least one, each from 0 to 4"),
        (
            TEXTS,
            {"index": [4], "sites": ["mlp_in"]},
            r"index=\[4\]: give at least one, each from 0 to 3 .layers of mlp_in.",
        ),
        (TEXTS, {"index": []}, r"index=\[\]: give at least one"),
        ([], {}, "no texts: the list is empty"),
        (["a", " "], {}, "text 1 is empty"),
        (["a", "b" * 129], {}, "text 1 has 129 tokens, and this model's context holds 128; shorten it"),
        (
            ["ab", "abc"],
            {"positions": np.array([1, 3])},
            "position 3 of text 1 is out of range: it has positions 0 to 2",
        ),
        (["ab", "abc"], {"positions": np.array([-1, 0])}, "position -1 of text 0 is out of range"),
        (["ab", "abc"], {"positions": np.array([1])}, r"2 texts need one position each; got shape \(1,\)"),
    ],
)
def test_errors_come_before_the_model_runs(tiny_model, tmp_path, passes, texts, more, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        collect_states(model, texts, folder=tmp_path / "states", progress=False, **more)
    assert passes == [] and not (tmp_path / "states").exists()


def test_states_that_are_not_finite_are_named(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu")
    with torch.no_grad():
        model.original_model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"resid at depth 3 of text \d is not finite; try dtype=torch.float32"):
        collect_states(model, ["abc", "de"], progress=False)
    assert hooks_left(model) == 0
    assert np.isfinite(collect_states(model, ["abc", "de"], index=[0, 1, 2], progress=False)["resid"].values).all()


def test_no_hook_is_left_and_those_of_others_stay(tiny_model):
    model = tiny_model("llama")
    ids = tokenize(model, ["some text"]).ids
    before = model(ids)
    collect_states(model, TEXTS, progress=False)
    assert hooks_left(model) == 0 and torch.equal(model(ids), before)
    seen = []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: seen.append(value.shape))]):
        collect_states(model, TEXTS[:1], progress=False)
        assert len(seen) == 1
        model(ids)
        assert len(seen) == 2  # collecting inside another block of hooks leaves that block's hooks alone
    assert hooks_left(model) == 0 and torch.equal(model(ids), before)


def test_states_are_of_the_model_under_an_outer_hook(tiny_model):
    model = tiny_model("llama")
    plain = collect_states(model, TEXTS, progress=False)["resid"].values
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", lambda value, hook: torch.zeros_like(value))]):
        changed = collect_states(model, TEXTS, progress=False)["resid"].values
    assert np.array_equal(changed[:, :2], plain[:, :2]) and not changed[:, 2].any()
    assert not close(changed[:, 3:], plain[:, 3:])


def test_collecting_leaves_gradients_and_random_numbers_alone(tiny_model):
    model = tiny_model("llama")
    random_state = torch.get_rng_state()
    collect_states(model, TEXTS, progress=False)
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), random_state)
    assert model(tokenize(model, ["abc"]).ids).requires_grad
