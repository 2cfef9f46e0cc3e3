"""Every shortcut of `lab.runs` against a plain forward pass with one patch, cell by cell, without keys and values."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from test_two_hop import talking_model
from transformers import GenerationConfig

import lab
from lab import lenses, runs
from lab.back_patching import two_hop
from lab.interventions import block_attention, patch
from lab.runs import clean_run, generate, greedy_ids, why_plain

TEXT = "The capital of the land of Mumbai is"


def ids_of(model, text=TEXT):
    return torch.as_tensor(model.tokenizer(text, add_special_tokens=False).input_ids)


def plain_logits(model, ids, *, depth, position, value):
    """Logits of the last position after one patch: the whole prompt, all layers, one hook."""
    n = model.cfg.n_layers
    site, layer = ("resid_pre", depth) if depth < n else ("resid_post", n - 1)
    with torch.inference_mode(), patch(model, site, layer=layer, value=value, position=position):
        return model.original_model(input_ids=ids[None], use_cache=False).logits[0, -1]


def plain_greedy(model, ids, *, steps, **cell):
    said = []
    for _ in range(steps):
        logits = plain_logits(model, torch.cat([ids, torch.tensor(said, dtype=torch.long)]), **cell)
        said.append(int(logits.argmax()))
        if said[-1] in runs._end_tokens(model):
            break
    return said


def all_cells(n_layers):
    return [(source, target) for target in range(1, n_layers + 1) for source in range(n_layers + 1) if source != target]


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("back", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_says_what_the_plain_path_says(tiny_model, family, back, reuse):
    model = tiny_model(family)
    ids = ids_of(model)
    position = len(ids) - back
    run = clean_run(model, ids)
    cells = all_cells(model.cfg.n_layers)
    depths = np.array([target for _, target in cells])
    values = torch.stack([run.states[source, position] for source, _ in cells])[:, None]
    found = generate(model, run, [position], depths, values, max_new_tokens=4, wanted=[70], reuse=reuse,
                     batch_rows=7)  # fmt: skip
    for row, (source, target) in enumerate(cells):
        cell = {"depth": target, "position": position, "value": run.states[source, position]}
        assert found.ids[row] == plain_greedy(model, ids, steps=4, **cell), (source, target)
    assert len(set(found.ranks)) > 1, "all patches alike: the test would see nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_ranks_are_those_of_the_plain_path(tiny_model, family):
    model = tiny_model(family)
    ids = ids_of(model)
    run = clean_run(model, ids)
    position, wanted = len(ids) - 2, [70, 80]
    cells = all_cells(model.cfg.n_layers)
    values = torch.stack([run.states[source, position] for source, _ in cells])[:, None]
    depths = np.array([target for _, target in cells])
    found = generate(model, run, [position], depths, values, max_new_tokens=1, wanted=wanted)
    for row, (source, target) in enumerate(cells):
        logits = plain_logits(model, ids, depth=target, position=position, value=run.states[source, position])
        assert found.ranks[row] == int((logits > logits[wanted].max()).sum())


def test_several_positions_at_once(tiny_model):
    """All positions of one depth taken from another prompt of the same length give that prompt's continuation."""
    model = tiny_model("llama")
    ids, other = ids_of(model), ids_of(model, "A river in the north of Sweden, is i")
    assert len(ids) == len(other)
    run, donor = clean_run(model, ids), clean_run(model, other)
    positions = list(range(len(ids)))
    word = int(donor.logits.argsort()[100])
    found = generate(model, run, positions, [2], donor.states[2][None], max_new_tokens=1, wanted=[word])
    assert found.ids[0] == [int(donor.logits.argmax())]
    assert found.ranks[0] == int((donor.logits > donor.logits[word]).sum())
    assert found.ranks[0] != int((run.logits > run.logits[word]).sum())


def test_the_identity_patch_changes_nothing(tiny_model):
    model = tiny_model("llama")
    run = clean_run(model, ids_of(model))
    depths = np.arange(model.cfg.n_layers + 1)
    for position in (2, len(run.ids) - 1):
        found = generate(model, run, [position], depths, run.states[:, position][:, None], max_new_tokens=6)
        assert len({tuple(said) for said in found.ids}) == 1


def test_decoding_stops_where_it_may_and_changes_nothing_else(tiny_model):
    model = tiny_model("gpt2")
    run = clean_run(model, ids_of(model))
    depths = np.array([1, 1, 2, 3])
    values = torch.stack([run.states[source, 4] for source in (2, 3, 4, 4)])[:, None]
    whole = generate(model, run, [4], depths, values, max_new_tokens=6)
    seen = []
    short = generate(
        model, run, [4], depths, values, max_new_tokens=6, go_on=lambda text: bool(seen.append(text)) or len(text) < 3
    )
    for said, full in zip(short.ids, whole.ids, strict=True):
        assert said == full[: len(said)]
    assert sum(map(len, short.ids)) < sum(map(len, whole.ids))


def test_rows_keep_their_order(tiny_model):
    model = tiny_model("llama")
    run = clean_run(model, ids_of(model))
    depths = np.array([3, 1, 2, 1])
    values = torch.stack([run.states[4, 5], run.states[2, 5], run.states[3, 5], run.states[3, 5]])[:, None]
    together = generate(model, run, [5], depths, values, max_new_tokens=3)
    for row in range(4):
        alone = generate(model, run, [5], depths[row : row + 1], values[row : row + 1], max_new_tokens=3)
        assert alone.ids[0] == together.ids[row]


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_blocked_attention_is_that_of_the_context_manager_and_has_an_effect(tiny_model, family, reuse):
    model = tiny_model(family)
    ids = ids_of(model)
    last = len(ids) - 1
    run = clean_run(model, ids)
    windows = [([0, 1], [3, 4]), ([2], [last - 1]), ([1, 2, 3], list(range(last)))]
    depths = np.array([layers[0] for layers, _ in windows])
    values = run.states[depths, last][:, None]
    found = generate(model, run, [last], depths, values, max_new_tokens=1, blocked=windows, wanted=[70], reuse=reuse)
    plain = model.original_model(input_ids=ids[None]).logits[0, -1]
    changed = []
    for row, (layers, keys) in enumerate(windows):
        with torch.inference_mode(), block_attention(model, layers, query=last, keys=keys):
            logits = model.original_model(input_ids=ids[None]).logits[0, -1]
        changed.append((logits - plain).abs().max().item())
        assert found.ranks[row] == int((logits > logits[70]).sum())
        assert found.ids[row] == [int(logits.argmax())]
    assert min(changed) > 1e-4, "blocking changed nothing"


def test_why_plain_says_nothing_where_reuse_works_and_why_where_it_does_not(tiny_model, monkeypatch):
    for family in FAMILIES:
        assert why_plain(tiny_model(family)) == ""
    model = tiny_model("llama")
    monkeypatch.setattr(runs, "DynamicLayer", torch.nn.Module)  # as if no layer held plain keys and values
    assert "not keys and values" in why_plain(model)


# --- one decoding -----------------------------------------------------------------------------------------------------


@pytest.fixture
def repeating(tiny_folder):
    """A model that says one word again and again, so that penalties and forbidden repetitions bite."""
    return lab.load(tiny_folder("llama"), device="cpu")


@pytest.fixture
def own_model(tmp_path):
    """A model that says different words."""
    return lab.load(talking_model(tmp_path / "own"), device="cpu")


def unpatched(model, text, n):
    run = clean_run(model, ids_of(model, text))
    return generate(model, run, [0], [0], run.states[0, 0][None, None], max_new_tokens=n)


SETTINGS = {
    "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0,
    "encoder_no_repeat_ngram_size": 1, "num_beams": 4, "num_beam_groups": 2, "penalty_alpha": 0.6, "top_k": 2,
    "min_length": 60, "min_new_tokens": 10, "forced_bos_token_id": 90, "forced_eos_token_id": 91, "do_sample": True,
    "temperature": 5.0, "use_cache": False, "guidance_scale": 3.0, "max_length": 3, "exponential_decay_length_penalty": (1, 9.0),
    "sequence_bias": [[[90], 50.0]], "prompt_lookup_num_tokens": 3, "cache_implementation": "static",
}  # fmt: skip
ABOUT_WORDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


@pytest.mark.parametrize("setting", [*SETTINGS, *ABOUT_WORDS])
def test_the_two_decodings_take_the_argmax_whatever_the_generation_config_asks_for(repeating, setting):
    """Passing do_sample=False leaves the rest of a model's generation_config in force: each of these is one such line."""
    model, text = repeating, "The city of Paris is in"
    plain = plain_greedy(model, ids_of(model, text), steps=8, depth=0, position=0,
                         value=clean_run(model, ids_of(model, text)).states[0, 0])  # fmt: skip
    said = [plain[0]] if setting != "bad_words_ids" else [[plain[0]]]
    before = GenerationConfig.from_dict({**model.original_model.generation_config.to_dict(),
                                         setting: SETTINGS.get(setting, said)})  # fmt: skip
    model.original_model.generation_config = before
    found = unpatched(model, text, 8)
    assert found.ids[0] == plain
    assert two_hop.greedy(model, [text], max_new_tokens=8, progress=False) == found.texts
    both = ["A coin", text]  # in a padded batch, too
    assert two_hop.greedy(model, both, max_new_tokens=8, progress=False) == [
        unpatched(model, t, 8).texts[0] for t in both
    ]
    assert model.original_model.generation_config is before, "the model's own config is not where it was"


@pytest.mark.parametrize(
    "setting", ["repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "forced_eos_token_id"]
)
def test_these_settings_would_have_changed_the_answer(repeating, setting):
    """The partner of the test above: as Hugging Face merges them, `do_sample=False` is not the argmax."""
    model, ids = repeating, ids_of(repeating, "The city of Paris is in")
    options = {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "max_new_tokens": 8,
        "do_sample": False,
    }
    plain = model.original_model.generate(**options)
    setattr(model.original_model.generation_config, setting, SETTINGS.get(setting, [int(plain[0, len(ids)])]))
    assert not torch.equal(model.original_model.generate(**options), plain)


@pytest.mark.parametrize("where", ["one", "several", "config", "tokenizer", "nowhere"])
def test_both_decodings_stop_at_the_same_end_tokens(own_model, where):
    model, text = own_model, "The city of Paris is in"
    net = model.original_model
    net.generation_config.eos_token_id = net.config.eos_token_id = model.tokenizer.eos_token = None
    whole = unpatched(model, text, 8).ids[0]
    assert len(whole) == 8 and runs._end_tokens(model) == set()
    end = next(token for token in whole if token != whole[0])  # not the first one
    if where == "one":
        net.generation_config.eos_token_id = end
    elif where == "several":
        net.generation_config.eos_token_id = [5, end]
    elif where == "config":
        net.config.eos_token_id = end
    elif where == "tokenizer":
        model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(end)
    wanted = whole if where == "nowhere" else whole[: whole.index(end) + 1]
    found = unpatched(model, text, 8)
    assert found.ids[0] == wanted
    ids, everywhere = ids_of(model, text)[None], torch.ones(1, len(ids_of(model, text)), dtype=torch.bool)
    assert greedy_ids(model, ids, everywhere, max_new_tokens=8)[0].tolist() == wanted
    assert two_hop.greedy(model, [text], max_new_tokens=8, progress=False) == found.texts


# --- not finite -------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_refused_with_prompt_and_depth(tiny_folder):
    """A row of nan is below no word: without a check its rank is 0, as if it said what is wanted."""
    model = lab.load(tiny_folder("llama"), device="cpu")
    run = clean_run(model, ids_of(model))
    with pytest.raises(FloatingPointError, match="the state that is put at depth 3 of 'The capital.*' is not finite; try "
                                                 "dtype=torch.float32 or torch.bfloat16"):  # fmt: skip
        generate(model, run, [2], [1, 3], torch.stack([run.states[1, 2], run.states[1, 2] / 0])[:, None])
    with torch.no_grad():
        model.original_model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        FloatingPointError, match="the state at depth 3 of 'The capital of the land of Mumbai is' is not fin"
    ):
        clean_run(model, ids_of(model))
    with pytest.raises(FloatingPointError, match="the state at depth 3 of '(The capital|A coin)[^<]*' is not finite"):
        two_hop.greedy(model, [TEXT, "A coin"], progress=False)
    assert why_plain(model) == "its states are not finite"
    for reuse in (True, False):
        with pytest.raises(
            FloatingPointError, match="depth 4, with a state put at depth 1 of 'The capital.*', is not finite"
        ):
            generate(model, run, [2], [3, 1], run.states[[1, 1], 2][:, None], wanted=[70], reuse=reuse)


def test_logits_that_are_not_finite_are_refused_where_the_states_are(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu")
    with torch.no_grad():
        model.original_model.lm_head.weight[40] = torch.inf
    with pytest.raises(FloatingPointError, match="what is said at depth 4 of 'The capital.*' is not finite"):
        clean_run(model, ids_of(model))
    with pytest.raises(FloatingPointError, match="what is said at depth 4 of 'The capital.*' is not finite"):
        two_hop.greedy(model, [TEXT], progress=False)
    states = torch.randn(3, 32).numpy()
    for read in (lambda: lenses.top_tokens(model, states), lambda: lenses.ranks(model, states, [[4]] * 3)):
        with pytest.raises(FloatingPointError, match="what the lens reads in state 0 is not finite"):
            read()


def test_the_dtype_that_is_named_is_the_models(tiny_folder):
    """float64 with padding on the left is nan in Hugging Face's eager attention; and `generate` casts logits to 32 bits."""
    model = lab.load(tiny_folder("llama"), device="cpu", dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"try dtype=torch.float32 .* \(this is torch.float64\)"):
        two_hop.greedy(model, [TEXT, "A coin"], progress=False)


def test_no_hook_is_left(tiny_model):
    from lab.models import hooks_left

    model = tiny_model("llama")
    run = clean_run(model, ids_of(model))
    generate(model, run, [3], [1], run.states[2, 3][None, None], max_new_tokens=2)
    with pytest.raises(ValueError):
        generate(model, run, [3], [99], run.states[2, 3][None, None], max_new_tokens=2)
    assert hooks_left(model) == 0


def test_errors_say_what_is_allowed(tiny_model):
    model = tiny_model("llama")
    run = clean_run(model, ids_of(model))
    value = run.states[2, 3][None, None]
    n, last = model.cfg.n_layers, len(run.ids) - 1
    for kwargs, text in [
        ({"positions": [99]}, rf"positions=\[99\]: give at least one, each from 0 to {last}"),
        ({"positions": []}, "give at least one"),
        ({"depths": [n + 1]}, rf"depths=\[{n + 1}\]: give numbers from 0 to {n}"),
        ({"values": value[..., :5].clone()}, r"wanted \[row patched d_model\]"),
        ({"blocked": [([0], [1])]}, "joins at depth 1 cannot be blocked in layer 0"),
        ({"blocked": [([n], [1])]}, rf"blocked layers=\[{n}\]: give numbers from 0 to {n - 1}"),
        ({"blocked": []}, "give one for each"),
    ]:
        with pytest.raises(ValueError, match=text):
            generate(model, run, **{"positions": [3], "depths": [1], "values": value, **kwargs})
