import numpy as np
import pytest
import torch
from conftest import FAMILIES

import lab
from lab.checks import hooks_left
from lab.interventions import ablate, block_attention, fixed_norms, patch, quantized, rewritten, skip
from lab.models import CACHE, SITES, plain_twin
from lab.runs import clean_run, why_plain
from lab.states import collect_states
from lab.texts import tokenize

CLEAN = torch.arange(10, 21)[None]  # eleven tokens each
OTHER = torch.arange(200, 101, -9)[None]
BLOCK_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def states_of(model, ids, site):
    """States of one site at all layers; [layer example position d_model]."""
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=[SITES[site].format(layer=i) for i in range(4)])
    return torch.stack([cache[SITES[site].format(layer=i)] for i in range(4)])


@torch.no_grad()
def logits(model, ids=CLEAN):
    return model(ids)


def gap(ours, reference):
    return float((ours - reference).abs().max() / reference.abs().max())


def sites_of(family):
    return [site for site in BLOCK_SITES if not (family == "neox" and site == "resid_mid")]


# --- patch ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_patched_with_itself_changes_no_bit(tiny_model, family):
    model = tiny_model(family)
    before = logits(model)
    for site in sites_of(family):
        own = states_of(model, CLEAN, site)
        for layer in range(4):
            for position in (None, 0, 10):
                value = own[layer] if position is None else own[layer, :, position]
                with patch(model, site, layer=layer, value=value, position=position):
                    patched = logits(model)
                if site == "resid_mid":  # written as attn_out = wanted - resid_pre, which rounds
                    assert gap(patched, before) < 1e-5
                else:
                    assert torch.equal(patched, before)
        assert torch.equal(logits(model), before) and hooks_left(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_all_positions_of_a_depth_from_another_prompt_give_its_logits(tiny_model, family):
    model = tiny_model(family)
    wanted, before = logits(model, OTHER), logits(model)
    assert gap(before, wanted) > 0.1
    for site in ("resid_pre", "resid_mid", "resid_post"):
        if site not in sites_of(family):
            continue
        theirs = states_of(model, OTHER, site)
        for layer in range(4):
            with patch(model, site, layer=layer, value=theirs[layer]):
                assert gap(logits(model), wanted) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_of_another_prompt_is_not_the_whole(tiny_model, family):
    """The partner of the test above: what one part adds is not all that a block's output depends on."""
    model = tiny_model(family)
    wanted, before = logits(model, OTHER), logits(model)
    for site in ("attn_out", "mlp_out"):
        with patch(model, site, layer=1, value=states_of(model, OTHER, site)[1]):
            assert gap(logits(model), wanted) > 1e-3 and gap(logits(model), before) > 1e-3


def test_a_raw_write_to_resid_mid_reaches_only_the_mlp(tiny_model):
    """Why `patch` goes another way: in TransformerLens a write to hook_resid_mid changes what the MLP reads and no more."""
    model = tiny_model("llama")
    theirs, wanted = states_of(model, OTHER, "resid_mid")[1], logits(model, OTHER)
    pre, attn = states_of(model, CLEAN, "resid_pre")[1], states_of(model, CLEAN, "attn_out")[1]
    mlp = states_of(model, OTHER, "mlp_out")[1]
    seen = []
    hooks = [
        (SITES["resid_mid"].format(layer=1), lambda value, hook: theirs),
        (SITES["resid_post"].format(layer=1), lambda value, hook: seen.append(value)),
    ]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        raw = model(CLEAN)
    assert gap(raw, wanted) > 0.1
    assert gap(seen[0], pre + attn + mlp) < 1e-6  # the clean stream, with the other prompt's MLP


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_leaves_earlier_positions_alone(tiny_model, family):
    model = tiny_model(family)
    before = logits(model)
    for site in sites_of(family):
        theirs = states_of(model, OTHER, site)
        with patch(model, site, layer=1, value=theirs[1, :, 6], position=6):
            patched = logits(model)
        assert torch.equal(patched[:, :6], before[:, :6])
        assert ((patched - before)[0, 6:].abs().amax(-1) > 1e-4).all()  # and every later one is reached


def test_values_are_written_row_by_row(tiny_model):
    model = tiny_model("llama")
    batch, value = torch.cat([CLEAN, OTHER]), torch.arange(64.0).reshape(2, 32)
    with patch(model, "resid_post", layer=2, value=value, position=4):
        assert torch.equal(states_of(model, batch, "resid_post")[2, :, 4], value)
    with patch(model, "resid_post", layer=2, value=value[0]):
        assert (states_of(model, batch, "resid_post")[2] == value[0]).all()


# --- skip, ablate ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skipped_block_gives_back_its_input(tiny_model, family):
    model = tiny_model(family)
    before = logits(model)
    for layer in range(4):
        with skip(model, layer):
            pre, post = states_of(model, CLEAN, "resid_pre"), states_of(model, CLEAN, "resid_post")
            values = collect_states(model, ["some text"], progress=False)["resid"].values[0]
            assert gap(logits(model), before) > 1e-3
        assert torch.equal(post[layer], pre[layer]) and np.array_equal(values[layer + 1], values[layer])
        assert all(not torch.equal(post[other], pre[other]) for other in range(4) if other != layer)
    assert torch.equal(logits(model), before) and hooks_left(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_without_attention_and_mlp_a_block_gives_back_its_input(tiny_model, family):
    model = tiny_model(family)
    with skip(model, 2):
        skipped = logits(model)
    with ablate(model, "attn_out", layer=2), ablate(model, "mlp_out", layer=2):
        assert gap(logits(model), skipped) < 1e-6
    with ablate(model, "attn_out", layer=2):
        assert gap(logits(model), skipped) > 1e-3


def test_ablation_by_zero_and_by_a_mean(tiny_model):
    model = tiny_model("llama")
    mean = states_of(model, OTHER, "mlp_out")[1].mean((0, 1))
    with ablate(model, "mlp_out", layer=1):
        assert not states_of(model, CLEAN, "mlp_out")[1].any()
        assert torch.equal(states_of(model, CLEAN, "resid_post")[1], states_of(model, CLEAN, "resid_mid")[1])
    with ablate(model, "mlp_out", layer=1, mean=mean):
        assert (states_of(model, CLEAN, "mlp_out")[1] == mean).all()


# --- block_attention ---


@pytest.mark.parametrize("family", FAMILIES)
def test_blocked_keys_get_no_attention_and_the_others_share_it(tiny_model, family):
    model, names = tiny_model(family), [f"blocks.{layer}.attn.hook_pattern" for layer in range(4)]
    before = logits(model)

    def patterns(ids=CLEAN):
        with torch.no_grad():
            return [model.run_with_cache(ids, names_filter=names)[1][name] for name in names]

    clean = patterns()
    with block_attention(model, [1], query=8, keys=[2, 5]):
        cut = patterns()
        changed = logits(model)
    assert torch.equal(cut[0], clean[0])
    row = cut[1][:, :, 8]
    assert (row[..., [2, 5]] == 0).all() and (row[..., 9:] == 0).all() and (clean[1][:, :, 8, [2, 5]] > 0).all()
    kept = clean[1][:, :, 8].clone()
    kept[..., [2, 5]] = 0
    torch.testing.assert_close(row, kept / kept.sum(-1, keepdim=True))  # softmax over what is left
    others = [position for position in range(11) if position != 8]
    torch.testing.assert_close(cut[1][:, :, others], clean[1][:, :, others])
    assert torch.equal(changed[:, :8], before[:, :8])  # earlier positions never look at it
    assert ((changed - before)[0, 8:].abs().amax(-1) > 1e-6).all()
    assert torch.equal(logits(model), before) and hooks_left(model) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_blocked_attention_is_that_of_an_explicit_mask(tiny_model, family):
    """In all layers at once it is what an untouched Hugging Face model computes under a mask of its own."""
    model = tiny_model(family)
    mask = torch.full((11, 11), torch.finfo(torch.float32).min).triu(1)
    mask[10, [0, 3, 4]] = torch.finfo(torch.float32).min
    four = mask[None, None]
    given = {"full_attention": four, "sliding_attention": four} if family == "gemma2" else four
    with torch.no_grad():
        wanted = plain_twin(model)(CLEAN, attention_mask=given).logits
    with block_attention(model, range(4), query=10, keys=[0, 3, 4]):
        assert gap(logits(model), wanted) < 1e-5
    assert gap(logits(model), wanted) > 1e-3


def test_generated_positions_look_as_before(tiny_model):
    """A pass over later positions only holds no row for the query, and is left alone."""
    model = tiny_model("llama")
    with torch.no_grad(), block_attention(model, [0, 1, 2, 3], query=10, keys=[3]):
        out = model.original_model(CLEAN, use_cache=True)
        seen = []
        hook = ("blocks.2.attn.hook_pattern", lambda value, hook: seen.append(value))
        with model.hooks(fwd_hooks=[hook]):
            model.original_model(torch.tensor([[40]]), **{CACHE: out[CACHE]})
    assert seen[0].shape[-2:] == (1, 12) and (seen[0] > 0).all()


# --- nothing outlives the block ---


def test_nesting_and_exceptions_leave_nothing(tiny_model):
    model = tiny_model("gpt2")
    before, theirs = logits(model), states_of(model, OTHER, "resid_pre")
    with patch(model, "resid_pre", layer=1, value=theirs[1, :, 5], position=5):
        outer = logits(model)
        with skip(model, 2):
            assert not torch.equal(logits(model), outer)
        assert torch.equal(logits(model), outer)  # the inner block took its own hooks with it, and only those
        with pytest.raises(RuntimeError), patch(model, "mlp_out", layer=0, value=torch.zeros(7, 11, 32)):
            logits(model)
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), before) and hooks_left(model) == 0
    with pytest.raises(KeyError), ablate(model, "mlp_out", layer=0):
        raise KeyError
    assert torch.equal(logits(model), before) and hooks_left(model) == 0


# --- quantized ---


def matrices_of(plain):
    """Weights of all matrices in the blocks of a plain Hugging Face model, as [output input] views."""
    found = {}
    for name, module in plain.base_model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            found[name] = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
    return found


def rounded_by_hand(weight, bits, group_size):
    """Round to nearest, one group of neighbouring inputs after another, in float64."""
    out = weight.detach().double().numpy().copy()
    for row in out:
        for start in range(0, len(row), group_size):
            group = row[start : start + group_size]
            grid = np.linspace(group.min(), group.max(), 2**bits)
            group[:] = grid[np.abs(group[:, None] - grid).argmin(1)]
    return torch.tensor(out, dtype=weight.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_computes_what_a_plain_model_with_rounded_weights_computes(tiny_model, family):
    """Also GPT-2, whose matrices lie the other way round, and NeoX, whose queries, keys and values share one matrix."""
    model = tiny_model(family)
    plain, before = plain_twin(model), logits(model)
    matrices = matrices_of(plain)
    assert len(matrices) == 4 * {"gpt2": 4, "neox": 4}.get(family, 7)
    with torch.no_grad():
        for weight in matrices.values():
            weight.copy_(rounded_by_hand(weight, 3, 16))
        wanted = plain(CLEAN).logits
    with quantized(model, 3, group_size=16):
        assert gap(logits(model), wanted) < 1e-4
    assert gap(before, wanted) > 1e-2
    assert torch.equal(logits(model), before)


def test_quantized_restores_every_bit_also_after_an_exception(tiny_model):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.original_model.state_dict().items()}

    def unchanged():
        return [n for n, value in model.original_model.state_dict().items() if torch.equal(value, before[n])]

    with quantized(model, 2, group_size=32):
        changed = set(before) - set(unchanged())
        assert changed and all(
            before[name].ndim == 2 and "embed" not in name and "norm" not in name for name in changed
        )
    assert len(unchanged()) == len(before)
    with pytest.raises(KeyboardInterrupt), quantized(model, 2, group_size=32):
        raise KeyboardInterrupt
    assert len(unchanged()) == len(before)


def test_some_layers_alone_are_quantized(tiny_model):
    model = tiny_model("gpt2")  # whose matrices lie the other way round
    before = [[w.detach().clone() for w, _ in lab.interventions.block_matrices(model, layer)] for layer in range(4)]
    with quantized(model, 2, group_size=16, layers=[1, 3]):
        for layer, old in enumerate(before):
            for (weight, linear), was in zip(lab.interventions.block_matrices(model, layer), old, strict=True):
                assert torch.equal(weight, was) == (layer in (0, 2))
                groups = (weight if linear else weight.T).reshape(-1, 16)
                assert layer in (0, 2) or max(len(group.unique()) for group in groups[:50]) <= 4
    after = [w for layer in range(4) for w, _ in lab.interventions.block_matrices(model, layer)]
    assert all(torch.equal(w, old) for w, old in zip(after, [w for old in before for w in old], strict=True))


def test_other_weights_of_another_shape_are_refused(tiny_model):
    model = tiny_model("llama")
    before = [w.detach().clone() for w, _ in lab.interventions.block_matrices(model, 1)]
    changes = {1: lambda matrices: [*matrices[:-1], matrices[-1].T]}
    with pytest.raises(ValueError, match="keep its shape"), lab.interventions.reweighted(model, changes):
        pass
    assert all(
        torch.equal(w, old) for (w, _), old in zip(lab.interventions.block_matrices(model, 1), before, strict=True)
    )


def test_the_error_shrinks_with_bits(tiny_model):
    model = tiny_model("llama")
    before, gaps = logits(model), []
    for bits in range(2, 9):
        with quantized(model, bits, group_size=32):
            gaps.append(gap(logits(model), before))
    assert all(a > b for a, b in zip(gaps, gaps[1:], strict=False))
    assert gaps[0] > 0.1 and gaps[-1] < 0.02


def test_weights_on_the_grid_stay(tiny_folder):
    """What 4 bits and groups of 32 made is not changed by 4 bits and groups of 32, and is by other groups."""
    model = lab.load(tiny_folder("llama"), device="cpu")
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for weight in matrices:
            weight.copy_(rounded_by_hand(weight, 4, 32))
    before = logits(model)
    with quantized(model, 4, group_size=32):
        assert gap(logits(model), before) < 1e-5
    with quantized(model, 4, group_size=16):
        assert gap(logits(model), before) > 1e-3


# --- errors, before the model runs ---


@pytest.mark.parametrize(
    "family, block, message",
    [
        (
            "llama",
            lambda m: patch(m, "mlp_in", layer=0, value=torch.zeros(32)),
            "site 'mlp_in' cannot be written; sites",
        ),
        ("llama", lambda m: patch(m, "middle", layer=0, value=torch.zeros(32)), "site 'middle' cannot be written"),
        (
            "llama",
            lambda m: patch(m, "resid_pre", layer=4, value=torch.zeros(32)),
            "layer=4: give a whole number from 0 to 3",
        ),
        (
            "llama",
            lambda m: patch(m, "resid_pre", layer=0, value=torch.zeros(31)),
            "ends in 31 numbers, .* d_model is 32",
        ),
        (
            "llama",
            lambda m: patch(m, "resid_pre", layer=0, value=torch.zeros(11, 32)),
            r"shape \(11, 32\); with position=N",
        ),
        (
            "llama",
            lambda m: patch(m, "resid_pre", layer=0, value=torch.zeros(1, 11, 32), position=3),
            r"shape \(1, 11, 32\); with position=3 give \[d_model\] or \[example d_model\]",
        ),
        (
            "neox",
            lambda m: patch(m, "resid_mid", layer=0, value=torch.zeros(32)),
            "no site resid_mid: .* in parallel; use",
        ),
        ("llama", lambda m: skip(m, -1), "layer=-1: give a whole number from 0 to 3"),
        ("llama", lambda m: ablate(m, "resid_pre", layer=0), "ablate takes attn_out or mlp_out, .* got 'resid_pre'"),
        ("llama", lambda m: block_attention(m, [4], query=3, keys=[1]), r"layers=\[4\]: give numbers from 0 to 3"),
        (
            "llama",
            lambda m: block_attention(m, [1], query=3, keys=[]),
            r"keys=\[\]: give at least one, each from 0 to 3, positions up to the query's own",
        ),
        (
            "llama",
            lambda m: block_attention(m, [1], query=3, keys=[1, 4]),
            r"keys=\[1, 4\]: give at least one, .* from 0 to 3.*\(4 is not\)",
        ),
        (
            "llama",
            lambda m: block_attention(m, [1], query=3, keys=[-1]),
            r"keys=\[-1\]: give at least one, each from 0 to 3",
        ),
        (
            "llama",
            lambda m: block_attention(m, [1], query=2, keys=[0, 1, 2]),
            "position 2 would have nothing left to look at: leave it at least one key",
        ),
        ("llama", lambda m: quantized(m, 1), "bits=1: give a whole number from 2 to 8"),
        (
            "llama",
            lambda m: quantized(m, 4, group_size=48),
            "group_size=48 does not divide a matrix's input width 32; try",
        ),
        ("llama", lambda m: quantized(m, 4, group_size=0), "group_size=0"),
    ],
)
def test_errors(tiny_model, family, block, message):
    model = tiny_model(family)
    before = logits(model)
    with pytest.raises(ValueError, match=message), block(model):
        pass
    assert hooks_left(model) == 0 and torch.equal(logits(model), before)


# --- contexts in contexts ---

CONTEXTS = {
    "patch": lambda m, k: patch(m, "resid_pre", layer=2, value=torch.full((32,), 0.1 * k)),
    "patch mid": lambda m, k: patch(m, "resid_mid", layer=2, value=torch.full((32,), 0.1 * k), position=k),
    "skip": lambda m, k: skip(m, 2, first=k),
    "ablate": lambda m, k: ablate(m, "mlp_out", layer=k),
    "block_attention": lambda m, k: block_attention(m, [1, 2], query=9, keys=[k]),
    "quantized": lambda m, k: quantized(m, 2 + k, group_size=16),
    "quantized, one layer": lambda m, k: quantized(m, 2 + k, group_size=16, layers=[k]),
    "fixed_norms": lambda m, k: fixed_norms(m, k, {"ln1": torch.ones(1) * (k + 1), "ln2": torch.ones(32)}),
    "rewritten": lambda m, k: rewritten(m, {1: lambda x, step: step(x) * (1 + k), 2: lambda x, step: x + k}),
}


def uncached(model):
    """Logits without keys and values kept: a block may then be run several times in one pass."""
    with torch.no_grad():
        return model.original_model(CLEAN, use_cache=False).logits


def forwards(model):
    return [vars(block.original_component).get("forward") for block in model.blocks]


@pytest.mark.parametrize("inner", CONTEXTS)
@pytest.mark.parametrize("outer", CONTEXTS)
def test_leaving_in_any_order_takes_back_one_context_alone(tiny_model, outer, inner):
    """After both, and between the two, all is as if the context that was left had never been there."""
    model = tiny_model("llama")
    before = logits(model)
    with CONTEXTS[outer](model, 1):
        alone = logits(model)
    with CONTEXTS[inner](model, 2):
        other = logits(model)
    assert not torch.equal(alone, before) and not torch.equal(other, before)
    one, two = CONTEXTS[outer](model, 1), CONTEXTS[inner](model, 2)
    one.__enter__()
    two.__enter__()
    two.__exit__(None, None, None)
    assert torch.equal(logits(model), alone)
    two = CONTEXTS[inner](model, 2)
    two.__enter__()
    one.__exit__(None, None, None)  # the outer one first
    assert torch.equal(logits(model), other)
    two.__exit__(None, None, None)
    assert torch.equal(logits(model), before) and hooks_left(model) == 0 and forwards(model) == [None] * 4
    with pytest.raises(KeyError), CONTEXTS[outer](model, 1), CONTEXTS[inner](model, 2):
        raise KeyError
    assert torch.equal(logits(model), before) and hooks_left(model) == 0 and forwards(model) == [None] * 4


def test_an_unfinished_generator_takes_back_its_own_context_only(tiny_model):
    model = tiny_model("llama")
    before = uncached(model)

    def unfinished():
        with rewritten(model, {1: lambda x, step: x}), quantized(model, 3, group_size=16):
            yield

    waiting = unfinished()
    next(waiting)
    with rewritten(model, {1: lambda x, step: step(step(x))}), quantized(model, 2, group_size=16):
        waiting.close()
        inside = uncached(model)
    assert torch.equal(uncached(model), before) and forwards(model) == [None] * 4
    with rewritten(model, {1: lambda x, step: step(step(x))}), quantized(model, 2, group_size=16):
        assert torch.equal(uncached(model), inside)


def test_a_step_inside_another_rewriting_is_the_rewritten_block(tiny_model):
    model = tiny_model("llama")
    with rewritten(model, {1: lambda x, step: step(step(x)), 2: lambda x, step: x}):
        with rewritten(model, {1: lambda x, step: step(x) + 1}):
            nested = uncached(model)
        with rewritten(model, {3: lambda x, step: step(x, layer=2)}):
            borrowed = uncached(model)  # block 2 as the outer one left it: nothing
    with rewritten(model, {1: lambda x, step: step(step(x)) + 1, 2: lambda x, step: x}):
        assert torch.equal(uncached(model), nested)
    with rewritten(model, {1: lambda x, step: step(step(x)), 2: lambda x, step: x, 3: lambda x, step: x}):
        assert torch.equal(uncached(model), borrowed)
    halved = {1: lambda x, step: step(x, attn=0.5)}
    with rewritten(model, halved), rewritten(model, halved):  # sizes multiply
        quarter = uncached(model)
    with rewritten(model, {1: lambda x, step: step(x, attn=0.25)}):
        assert gap(uncached(model), quarter) < 1e-6


def test_a_forward_that_another_library_put_there_comes_back(tiny_model):
    model = tiny_model("llama")
    block, before = model.blocks[1].original_component, uncached(model)
    calls, plain = [], model.blocks[1].original_component.forward

    def theirs(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    block.forward = theirs
    try:
        with rewritten(model, {1: lambda x, step: step(x), 2: lambda x, step: step(x, layer=1)}):
            uncached(model)
            assert len(calls) == 2  # a step of the block is theirs, in its own place and in another
        assert vars(block)["forward"] is theirs and torch.equal(uncached(model), before) and len(calls) == 3
    finally:
        del block.forward


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_an_inner_patch_of_the_input_is_what_the_outer_context_goes_on_from(tiny_model, family):
    """Skipping gives back the input that the block got; the stream in the middle is what was asked for, whatever came in."""
    model = tiny_model(family)
    value = torch.linspace(-1, 1, 32)
    with skip(model, 2), patch(model, "resid_pre", layer=2, value=value):
        assert (states_of(model, CLEAN, "resid_post")[2] == value).all()
    if "resid_mid" in sites_of(family):
        with patch(model, "resid_mid", layer=2, value=-value), patch(model, "resid_pre", layer=2, value=value):
            assert gap(states_of(model, CLEAN, "resid_mid")[2], (-value).expand(1, 11, 32)) < 1e-6
    assert hooks_left(model) == 0 and not model.blocks[2].original_component._forward_pre_hooks


def test_nested_cuts_that_leave_nothing_to_look_at_are_refused(tiny_model):
    model = tiny_model("llama")
    with block_attention(model, [1, 2], query=2, keys=[0, 1]):
        with (
            pytest.raises(ValueError, match="position 2 would have nothing left"),
            block_attention(model, [2], query=2, keys=[2]),
        ):
            pass
        with block_attention(model, [3], query=2, keys=[2]), block_attention(model, [1], query=3, keys=[2]):
            logits(model)
    with block_attention(model, [2], query=2, keys=[2]):
        logits(model)


def test_a_clean_run_where_a_block_is_left_out(tiny_model):
    """Such a block keeps no keys."""
    model = tiny_model("llama")
    ids = tokenize(model, ["The city of Paris"]).ids[0]
    with rewritten(model, {1: lambda x, step: x}), torch.inference_mode():
        run = clean_run(model, ids)
        assert torch.allclose(run.logits, model.original_model(input_ids=ids[None], use_cache=False).logits[0, -1])
        assert torch.equal(run.states[2], run.states[1]) and "memory" in why_plain(model)


@pytest.mark.parametrize(
    "program",
    [
        lambda x, step: step(step(x)),
        lambda x, step: step(x, layer=2),
        lambda x, step: step(step(x, attn=0), mlp=0),
    ],
)
@pytest.mark.parametrize("n_tokens", [1, 3])  # of one token the result had the right shape, and was wrong
def test_steps_whose_keys_cannot_be_kept_are_refused(tiny_model, program, n_tokens):
    model, ids = tiny_model("llama"), torch.arange(5, 5 + n_tokens)[None]
    with rewritten(model, {1: program}), torch.inference_mode():
        with pytest.raises(ValueError, match=r"program of layer 1 ran .* call the model with use_cache=False"):
            model.original_model(input_ids=ids)
        model.original_model(input_ids=ids, use_cache=False)
    with rewritten(model, {1: lambda x, step: step(x)}), torch.inference_mode():
        kept = model.original_model(input_ids=ids).logits
        assert torch.equal(kept, model.original_model(input_ids=ids, use_cache=False).logits)
