"""What identifies a model, what no hash can vouch for, and that every cache asks."""

import copy
import functools
import json
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig
from transformers.models.llama import modeling_llama

import lab
from lab import back_patching, concept_depth, depth_efficiency, lenses, models, results
from lab.identity import identity
from lab.interventions import patch, quantized, rewritten, skip
from lab.states import collect_states
from lab.transfer import tails
from tests.conftest import FAMILIES, byte_tokenizer

QUICK = {"null": False, "control": False, "repeats": 3, "progress": False, "sites": ("resid",)}
TEXTS = ["The city of Paris", "abc def"]


def statements(n=40):
    rows = [(f"e{i}", f"thing {i} is {'hot' if i % 2 else 'cold'} {i * 7 % 11}", i % 2, f"g{i // 2}") for i in range(n)]
    frame = pd.DataFrame(rows, columns=["example", "text", "label", "group"])
    return frame.assign(template="own", difficulty=1)


@pytest.fixture
def own_copy(tiny_folder, tmp_path):
    """A folder of one's own to change."""

    def copy(family="llama"):
        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        for path in tiny_folder(family).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return copy


# --- what is told apart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_running_a_model_and_loading_it_again_change_nothing(tiny_folder, family):
    model = lab.load(tiny_folder(family), device="cpu")
    before = identity(model)
    collect_states(model, TEXTS, progress=False)
    model(torch.tensor([[3, 4, 5]]))
    model.tokenizer(TEXTS, padding=True, truncation=True, max_length=3)
    lab.check(model)
    assert identity(model) == before == identity(lab.load(tiny_folder(family), device="cpu"))
    assert before.doubt == ""


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "name, change",
    [
        ("config.json", lambda c: c.update(rms_norm_eps=0.5)),
        ("config.json", lambda c: c["rope_parameters"].update(rope_theta=7.0)),
        ("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        ("generation_config.json", lambda g: g.update(eos_token_id=7)),
        ("tokenizer_config.json", lambda t: t.update(chat_template="{{ messages[0].content }}")),
    ],
)
def test_files_beside_the_weights_count(own_copy, name, change):
    folder = own_copy()
    if name == "generation_config.json":
        (folder / name).write_text(json.dumps({"eos_token_id": 2}))
    before = identity(lab.load(folder, device="cpu"))
    edit(folder / name, change)
    after = identity(lab.load(folder, device="cpu"))
    assert after.digest != before.digest and after.doubt == ""


IN_MEMORY = {
    "weight": lambda m: m.original_model.model.layers[0].mlp.down_proj.weight.data.mul_(3),
    "buffer that no file holds": lambda m: m.original_model.model.rotary_emb.inv_freq.mul_(2),
    "attention's scale": lambda m: setattr(m.original_model.model.layers[1].self_attn.original_component, "scaling", 0.1),
    "epsilon": lambda m: setattr(m.original_model.model.norm.original_component, "variance_epsilon", 0.5),
    "start rule": lambda m: setattr(m.cfg, "default_prepend_bos", True),
    "config": lambda m: setattr(m.original_model.config, "rms_norm_eps", 0.5),
    "end token": lambda m: setattr(m.original_model.generation_config, "eos_token_id", 5),
    "added token": lambda m: m.tokenizer.add_tokens(["Paris"]),
    "vector hung on a block": lambda m: setattr(m.original_model.model.layers[1], "steering", torch.ones(32)),
    "type": lambda m: m.original_model.to(torch.float64),
    "config that one layer holds": lambda m: setattr(
        m.original_model.model.layers[1].self_attn.original_component, "config", changed(m.original_model.config)
    ),
    "untied head": lambda m: setattr(
        m.original_model.lm_head.original_component, "weight",
        torch.nn.Parameter(m.original_model.lm_head.original_component.weight.detach().clone() + 1),
    ),
}  # fmt: skip


def changed(config):
    other = copy.deepcopy(config)
    other.rms_norm_eps = 0.5
    return other


@pytest.mark.parametrize("what", IN_MEMORY)
def test_a_change_in_memory_counts(tiny_folder, what):
    model = lab.load(tiny_folder("llama"), device="cpu")
    before = identity(model)
    with torch.no_grad():
        IN_MEMORY[what](model)
    after = identity(model)
    assert after.digest != before.digest and after.doubt == ""


def shift(module, inputs, output):
    return output


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(model):
    model.original_model.model.layers[1].mlp.original_component.down_proj = Doubled(64, 32)


DOUBTFUL = {
    "torch forward hook": (lambda m: m.original_model.model.layers[1].register_forward_hook(shift), "test_identity.shift"),
    "torch forward pre-hook": (
        lambda m: m.original_model.model.norm.register_forward_pre_hook(lambda module, inputs: inputs), "hooks are set"),
    "hook on the whole model": (lambda m: m.original_model.register_forward_hook(shift), "hooks are set"),
    "hook by TransformerLens": (lambda m: m.add_hook("blocks.0.hook_out", lambda value, hook: value), "hooks are set"),
    "permanent hook": (lambda m: m.add_perma_hook("blocks.0.hook_out", lambda value, hook: value), "hooks are set"),
    "hook past TransformerLens": (
        lambda m: m.hook_dict["blocks.0.hook_out"].register_forward_hook(shift), "hooks are set"),
    "replaced forward": (
        lambda m: setattr(m.original_model.model.layers[1].mlp, "forward", lambda x: x), "forward is no function"),
    "forward of another library": (
        lambda m: setattr(m.original_model.model.layers[1].mlp, "forward", torch.relu), "forward is no function"),
    "layer of one's own": (doubled, "layers of Doubled"),
    "tokenizer of one's own": (
        lambda m: setattr(m.tokenizer, "encode", lambda text: [1]), "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("what", DOUBTFUL)
def test_code_that_is_not_known_is_named(tiny_folder, what):
    model = lab.load(tiny_folder("llama"), device="cpu")
    change, says = DOUBTFUL[what]
    change(model)
    assert says in identity(model).doubt


def test_a_hook_on_every_module_and_functions_replaced_for_all_are_named(tiny_model, monkeypatch):
    model = tiny_model("llama")
    handle = torch.nn.modules.module.register_module_forward_hook(shift)
    try:
        assert "on every module" in identity(model).doubt
    finally:
        handle.remove()
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
    assert "LlamaMLP.forward was replaced" in identity(model).doubt
    monkeypatch.undo()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    assert "apply_rotary_pos_emb was replaced" in identity(model).doubt
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, inplace=False: x)
    assert "torch.nn.functional.silu was replaced" in identity(model).doubt
    monkeypatch.undo()
    assert identity(model).doubt == ""


def test_settings_of_a_partial_function_count(tiny_folder):
    """Gemma's activation is one: which gelu it is stands in its keywords."""
    model = lab.load(tiny_folder("gemma2"), device="cpu")
    before, mlp = identity(model), model.blocks[0].mlp.original_component
    holders = [module for module in mlp.modules() if isinstance(vars(module).get("act"), functools.partial)]
    for module in holders:
        module.act = functools.partial(module.act.func, approximate="none")
    after = identity(model)
    assert holders and after.digest != before.digest and after.doubt == ""


def test_our_own_interventions_count(tiny_model):
    model = tiny_model("llama")
    before = identity(model)
    for change in (
        skip(model, 1),
        rewritten(model, {1: lambda x, step: step(x)}),
        patch(model, "resid_pre", layer=1, value=torch.zeros(32), position=0),
    ):
        with change:
            assert identity(model).doubt
    with quantized(model, 4, group_size=16):
        assert identity(model).digest != before.digest and identity(model).doubt == ""
    assert identity(model) == before


# --- every cache asks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [*IN_MEMORY, *DOUBTFUL])
def test_kept_states_and_finished_runs_are_those_of_this_model(tiny_folder, tmp_path, monkeypatch, capsys, what):
    if what in ("added token", "tokenizer of one's own", "start rule", "type"):
        pytest.skip("the texts' tokens differ, or the other type of numbers does not run")
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    model = lab.load(tiny_folder("llama"), device="cpu")
    clean = collect_states(model, TEXTS, folder=tmp_path / "states", progress=False)["resid"].values.copy()
    concept_depth.run(model, statements(), **QUICK)
    with torch.no_grad():
        (IN_MEMORY[what] if what in IN_MEMORY else DOUBTFUL[what][0])(model)
    capsys.readouterr()
    kept = collect_states(model, TEXTS, folder=tmp_path / "states", progress=False)["resid"].values
    assert "not kept" in (said := capsys.readouterr().out) or "no hash tells" in said
    np.testing.assert_array_equal(kept, collect_states(model, TEXTS, progress=False)["resid"].values)
    cached = concept_depth.run(model, statements(), **QUICK).table
    pd.testing.assert_frame_equal(cached, concept_depth.run(model, statements(), resume=False, **QUICK).table)
    again = lab.load(tiny_folder("llama"), device="cpu")
    kept = collect_states(again, TEXTS, folder=tmp_path / "states", progress=False)["resid"].values
    np.testing.assert_array_equal(kept, clean)  # what was there is there still


def test_a_folder_with_files_of_somebody_else_is_not_written(tiny_model, tmp_path):
    np.save(tmp_path / "resid.npy", np.arange(3))
    with pytest.raises(ValueError, match="holds resid.npy, which is not ours"):
        collect_states(tiny_model("llama"), TEXTS, folder=tmp_path, progress=False)
    assert np.load(tmp_path / "resid.npy").tolist() == [0, 1, 2]


def test_answers_of_a_model_that_was_changed_since_are_refused(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu")
    answers = results.Result(
        "two_hop", pd.DataFrame(), pd.DataFrame(), {"identity": str(identity(model)), "model": "m"}
    )
    back_patching.require_answers_of(model, answers)
    with skip(model, 1), pytest.raises(ValueError, match="run two_hop.run on this one"):
        back_patching.require_answers_of(model, answers)
    with torch.no_grad():
        model.original_model.model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="run two_hop.run on this one"):
        back_patching.require_answers_of(model, answers)


def test_code_counts_without_comments_and_docstrings_and_only_what_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def digest(text: str) -> str:
        (tmp_path / "some_work.py").write_text(text)
        results._code.cache_clear()
        return results.code_digest("some_work")

    plain = digest("from lab import metrics\ndef work():\n    return 1\n")
    assert (
        digest('"""What."""\nfrom lab import metrics\n\n# why\ndef work():\n    "How."\n    return 1  # one\n') == plain
    )
    assert digest("from lab import metrics\ndef work():\n    return 2\n") != plain
    assert digest("from lab import probes\ndef work():\n    return 1\n") != plain
    results._code.cache_clear()


def test_figures_are_no_part_of_what_a_run_measures():
    waiting, seen = (
        ["lab.back_patching", "lab.concept_depth", "lab.transfer"],
        set(),
    )
    while waiting:
        seen.add(name := waiting.pop())
        waiting += results._code(name)[1] - seen
    assert {"lab.runs", "lab.states", "lab.probes", "lab.results"} <= seen
    assert not {name for name in seen if "figures" in name or "explorer" in name or name == "lab.__main__"}


def test_what_a_key_cannot_hold_is_refused():
    kept = results.keep(test_what_a_key_cannot_hold_is_refused, resume=False)
    assert kept.key({"a": np.int64(3), "b": np.arange(2)}) == kept.key({"a": 3, "b": [0, 1]})
    assert kept.key({"a": np.arange(2000)}) != kept.key({"a": np.arange(2000) % 1999})
    assert kept.key({"a": pd.DataFrame({"b": [1]})}) != kept.key({"a": pd.DataFrame({"b": [2]})})
    with pytest.raises(TypeError, match="a Series in the key"):
        kept.key({"a": pd.Series()})


# --- a Bridge of the user's own -------------------------------------------------------------------------------------


@pytest.fixture
def booted(tiny_folder):
    """As a user boots one, without `lab.load`."""

    def boot(family="llama", dtype=torch.float32):
        folder = str(tiny_folder(family))
        hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").to(dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=tokenizer, device="cpu", dtype=dtype)

    return boot


@pytest.mark.parametrize("family", FAMILIES)
def test_a_booted_model_is_checked_and_has_twins(booted, family):
    model = booted(family)
    table = lab.check(model)
    assert table.ok.all(), table
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert torch.allclose(models.plain_twin(model)(ids).logits, model(ids), atol=1e-5)
        assert not torch.allclose(models.random_twin(model)(ids), model(ids), atol=1e-2)


def test_the_random_twin_is_that_of_the_loaded_model(booted, tiny_model):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        one, other = (models.random_twin(model, seed=3)(ids) for model in (booted(), tiny_model("llama")))
    assert torch.equal(one, other)


def test_a_booted_and_tuned_model_runs_everything(booted, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    model = booted()
    with torch.no_grad():
        model.original_model.model.layers[0].mlp.down_proj.weight.mul_(3)
    assert lab.check(model).ok.all()
    found = concept_depth.run(model, statements(), **{**QUICK, "null": True})
    assert set(found.table.weights) == {"trained", "random", "none"}
    texts = pd.DataFrame({"text": [f"The number {i} comes after {i - 1}, says Ann." for i in range(6)]})
    depth_efficiency.run(model, texts, n=6, local=False, kinds=("layer",), treatments=("skip",), progress=False)


def test_a_model_with_a_hook_is_held_against_its_own_forward_pass(booted, capsys):
    model = booted()
    doubled(model)
    table = lab.check(model)
    assert "layers of Doubled" in capsys.readouterr().out
    assert table.ok.all() and table.check[0] == "logits = the model's own forward"
    with pytest.raises(ValueError, match="no plain copy"):
        models.plain_twin(model)


def test_a_booted_model_of_another_type_has_a_plain_copy_of_that_type(booted):
    model = booted()
    model.original_model.to(torch.bfloat16)
    twin, ids = models.plain_twin(model), torch.tensor([[5, 6, 7]])
    assert {tensor.dtype for _, tensor in models._tensors(twin)} == {torch.bfloat16}
    with torch.inference_mode():
        assert torch.equal(twin(ids).logits, model.original_model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_booted_model_of_another_type_is_checked_and_tuned(booted, dtype):
    model = booted(dtype=dtype)
    table = lab.check(model)
    assert table.ok.all() and table.check[0] == "logits = plain Hugging Face", table
    body = tails.Body(model, tails.as_texts(model, statements(12)), "trained", 0, [0, 2])
    for n in (0, 2):
        whole, tail = body.before_training(n, torch.arange(4))
        assert torch.equal(whole, tail)


def test_a_bias_that_was_added_is_not_left_out_of_a_plain_copy(booted):
    model = booted()
    model.original_model.model.layers[0].mlp.down_proj.original_component.bias = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj is not what the config makes of it"):
        models.plain_twin(model)


def test_a_random_twin_needs_no_files(own_copy, tmp_path):
    """The tokenizer is that in memory: its file may be gone by now, or hold another one."""
    folder = own_copy("gemma2")
    model = lab.load(folder, device="cpu")
    for path in folder.iterdir():
        path.unlink()
    twin = models.random_twin(model)
    assert twin.cfg.default_prepend_bos and twin.tokenizer("abc").input_ids == model.tokenizer("abc").input_ids


def test_a_setting_that_a_plain_copy_would_lack_is_refused(booted):
    model = booted()
    model.original_model.model.layers[1].self_attn.original_component.scaling = 0.1
    with pytest.raises(ValueError, match=r"layers.1.self_attn is not what the config makes of it"):
        models.plain_twin(model)


def test_a_relative_path_is_found_again_from_another_folder(own_copy, tmp_path, monkeypatch):
    own_copy()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = lab.load("llama", device="cpu")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert models.received(models.to_send(model)).lab_source == model.lab_source
    assert lab.check(model).ok.all() and models.random_twin(model)


def opt(folder, width):
    size = {
        "hidden_size": 32,
        "word_embed_proj_dim": width,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = OPTConfig(vocab_size=259, max_position_embeddings=64, pad_token_id=0, **size)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(start_token=False).save_pretrained(folder)
    return lab.load(folder, device="cpu")


def test_a_model_without_a_final_norm_is_told_so(tmp_path):
    model = opt(tmp_path, 16)  # as OPT-350m
    with pytest.raises(
        ValueError, match="cannot be checked: its head does not read the last state through a final norm"
    ):
        lab.check(model)
    with pytest.raises(ValueError, match="project_out"):
        lenses.readout(model, torch.ones(1, 32))


def test_hooks_of_the_architecture_itself_are_no_hooks_of_the_users(tmp_path):
    """OPT's blocks: TransformerLens sets permanent hooks there to run them at all."""
    model = opt(tmp_path, 32)
    assert sum(len(point.fwd_hooks) for point in model.hook_dict.values()) > 0
    assert models.hooks_left(model) == 0 and identity(model).doubt == ""
    assert lab.check(model).ok.all()


# --- threads and executors ------------------------------------------------------------------------------------------


def test_two_threads_on_one_model_do_not_mix(tiny_model):
    model, texts = tiny_model("llama"), ["aaaa", "bbbb", "cccc", "dddd"] * 10
    reference, found = collect_states(model, texts, progress=False)["resid"].values, {}

    def read(name, some):
        found[name] = [collect_states(model, some, progress=False)["resid"].values for _ in range(10)]

    threads = [threading.Thread(target=read, args=(0, texts)), threading.Thread(target=read, args=(1, texts[::-1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, wanted in ((0, reference), (1, reference[::-1])):
        for values in found[name]:
            np.testing.assert_allclose(values, wanted, atol=1e-5)


def test_an_intervention_in_one_thread_is_not_seen_in_another(tiny_model):
    model, inside, done = tiny_model("llama"), threading.Event(), threading.Event()
    clean, found = collect_states(model, TEXTS, progress=False)["resid"].values, []

    def change():
        with skip(model, 1):
            inside.set()
            done.wait(1)

    thread = threading.Thread(target=change)
    thread.start()
    inside.wait()
    other = threading.Thread(target=lambda: found.append(collect_states(model, TEXTS, progress=False)["resid"].values))
    other.start()
    done.set()
    thread.join()
    other.join()
    np.testing.assert_array_equal(found[0], clean)


def test_executors(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    model = lab.load(tiny_folder("llama"), device="cpu")
    wanted = concept_depth.run(model, statements(), **{**QUICK, "null": True}, resume=False).table
    for pool in (ThreadPoolExecutor(3), ProcessPoolExecutor(1, mp_context=get_context("spawn"))):
        with pool as executor:
            found = concept_depth.run(
                model, statements(), **{**QUICK, "null": True}, resume=False, executor=executor
            ).table
        pd.testing.assert_frame_equal(found, wanted)


def test_forked_processes_are_refused(tiny_folder):
    """They hang: torch's threads hold locks that nobody in the copy gives back."""
    model = lab.load(tiny_folder("llama"), device="cpu")
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool, pytest.raises(ValueError, match="spawn"):
        concept_depth.run(model, statements(), **QUICK, resume=False, executor=pool)


@pytest.mark.parametrize("run", [concept_depth.run, lab.transfer.run])
def test_what_is_no_executor_is_refused(unchecked, tiny_model, run):
    first = () if run is not concept_depth.run else (tiny_model("llama"), statements())
    with pytest.raises(ValueError, match="executor is a str: give a concurrent.futures.Executor"):
        run(*first, executor="processes")


def test_an_executor_gets_the_model_that_is_in_memory_or_none(tiny_folder, booted):
    model = lab.load(tiny_folder("llama"), device="cpu")
    threads, processes = (
        ThreadPoolExecutor(1),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")),
    )  # neither starts anything before it gets work
    assert results.for_executor(model, None) is model and results.for_executor(model, threads) is model
    sent = results.for_executor(model, processes)
    assert identity(models.received(sent)) == identity(model)
    with skip(model, 1), pytest.raises(ValueError, match="inside an intervention"):
        results.for_executor(model, threads)
    with pytest.raises(ValueError, match="nothing says from where"):
        results.for_executor(booted(), processes)
    with torch.no_grad():
        model.original_model.model.layers[0].mlp.down_proj.weight.mul_(3)
    with pytest.raises(ValueError, match="was changed there"):
        models.received(results.for_executor(model, processes))
    twin = models.random_twin(model, seed=5)
    with pytest.raises(ValueError, match="hooks are set"), skip(model, 1):
        models.to_send(model)
    assert twin.lab_source["random_seed"] == 5
