"""What a model is: one hash of all that can change its output, and what no hash can tell.

Every cache of the kit asks `identity`. It reads the model in memory, not the file that it came from: a weight that was
changed, another start rule, a scale set by hand all give another hash. What runs code that is not known here (a hook, a
replaced `forward`, a layer of somebody else's) is named in `doubt`; then nothing is read from a cache or kept in one.
"""

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as torch_module
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Code of these packages is told apart by their versions, which are in every key.
KNOWN_CODE = ("torch", "transformers", "transformer_lens", "accelerate")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
_OF_TORCH = frozenset(vars(torch.nn.Module())) - {"training"}  # parameters, buffers and hooks are read by themselves
# Where a model came from, and what a forward pass leaves behind.
_NO_MATTER = frozenset(
    {
        "name_or_path",
        "max_seq_len_cached",
        "gradient_checkpointing",
        "ctx",
        "lab_source",
        "lab_name",
        "model_name",
        "tokenizer_name",
        "context_level",
    }
)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Identity:
    """`digest`: of weights, settings and tokenizer. `doubt`: what it cannot vouch for, in words; empty where it can."""

    digest: str
    doubt: str

    def __str__(self) -> str:
        return self.digest + (f" and {self.doubt}" if self.doubt else "")


def identity(model: TransformerBridge) -> Identity:
    """What a model is, from weights and buffers, config, generation config, settings of each module, attention, tokenizer
    with its normaliser, special tokens and start rule; about a second for half a gigabyte of weights."""
    digest = hashlib.sha256()

    def note(*what: Any) -> None:
        digest.update(repr(what).encode())

    hf = model.original_model
    numbered: dict[int, int] = {}
    for name, tensor in _tensors(model):
        if id(tensor) not in numbered:  # a tied tensor is read once
            numbered[id(tensor)] = len(numbered)
            if _is_odd(tensor):  # `doubts` names it
                continue
            value = tensor.detach().cpu().contiguous()
            note(name, value.dtype, tuple(value.shape), str(tensor.device))
            digest.update(value.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy().data)
        note(name, numbered[id(tensor)])
    for name, module in _modules(model):
        note(name, type(module).__qualname__, *settings(module))
        note(*((key, _name(value)) for key, value in vars(module).items() if _is_function(value)))
    note(*(_name(value) for _, _, value in _code_of(_kinds(model))))
    for config in (hf.config, getattr(hf, "generation_config", None), *_own_configs(model)):
        note(_config(config))
    note(*_settings_of(vars(model.cfg)))
    note(hf.config._attn_implementation, model.cfg.dtype, model.cfg.default_prepend_bos, _precision(hf))
    note(*_tokenizer(model.tokenizer))
    return Identity(digest.hexdigest()[:32], "; ".join(doubts(model)))


def doubts(model: TransformerBridge) -> list[str]:
    """What runs in this model and is no code of `KNOWN_CODE`: hooks, replaced functions, layers; also dropout."""
    found = [f"{len(hooks)} hooks are set on it ({hooks[0]})"] if (hooks := foreign_hooks(model)) else []
    if odd := [name for name, tensor in _tensors(model) if _is_odd(tensor)]:
        found.append(f"{odd[0].lstrip('.')} is no plain tensor ({len(odd)} such)")
    layers = {type(module) for _, module in _modules(model)}
    own = [
        f"{name}.{key}"
        for name, module in _modules(model)
        for key, value in vars(module).items()
        if _is_function(value) and not _known(value, *(("transformer_lens", "accelerate") if key == "forward" else ()))
    ]
    if own:
        found.append(f"{own[0].lstrip('.')} is no function of its library ({len(own)} such)")
    if foreign := sorted(kind.__name__ for kind in layers if not _known(kind)):
        found.append(f"it has layers of {', '.join(foreign)}")
    replaced = sorted(f"{where}.{key}" for where, key, value in _code_of(_kinds(model)) if not _known(value))
    if replaced:
        found.append(f"{replaced[0]} was replaced")
    attention = model.original_model.config._attn_implementation
    if attention in ALL_ATTENTION_FUNCTIONS and not _known(ALL_ATTENTION_FUNCTIONS[attention]):
        found.append(f"its attention {attention!r} is no function of its library")
    tokenizer = [type(model.tokenizer), *filter(_is_function, vars(model.tokenizer).values())]
    if not all(map(_known, tokenizer)) or getattr(model.tokenizer, "backend_tokenizer", None) is None:
        found.append(f"its tokenizer {type(model.tokenizer).__name__} cannot be read")
    if any(module.training and getattr(module, "p", 0) for _, module in _modules(model)):
        found.append("its dropout is on (call .eval())")
    return found


def foreign_hooks(model: TransformerBridge) -> list[str]:
    """Hooks of any origin on any module, but those that TransformerLens or torch set to run the architecture itself."""
    found = [
        f"on every module, {function!r}" for kind in _GLOBAL_HOOKS for function in getattr(torch_module, kind).values()
    ]
    for name, module in _modules(model):
        for kind in _HOOKS:
            found += [f"{name}: {_name(function)}" for function in map(_unwrapped, getattr(module, kind).values())
                      if not _known(function)]  # fmt: skip
    return found


# --- small parts ----------------------------------------------------------------------------------------------------


def _modules(model: TransformerBridge) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules of the Bridge and of what it wraps, each once, by name."""
    seen: set[int] = set()
    for root, prefix in ((model, ""), (model.original_model, "original_model.")):
        for name, module in root.named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield prefix + name, module


def _tensors(model: TransformerBridge) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in _modules(model):
        own = {
            key: value for key, value in vars(module).items() if not key.startswith("_")
        }  # private: of the last pass
        for kind in (module._parameters, module._buffers, own):
            yield from ((f"{name}.{key}", value) for key, value in kind.items() if isinstance(value, torch.Tensor))


def _is_odd(tensor: torch.Tensor) -> bool:
    """Whether a tensor computes by rules of its own, or has no bytes to read."""
    return not _known(type(tensor)) or tensor.layout is not torch.strided or tensor.is_meta


def _own_configs(model: TransformerBridge) -> list[Any]:
    """Configs that modules hold and that are not the model's: the layers read them."""
    held = {
        id(one): one
        for _, module in _modules(model)
        for one in vars(module).values()
        if isinstance(one, PretrainedConfig)
    }
    return [one for one in held.values() if one is not model.original_model.config]


def _kinds(model: TransformerBridge) -> set[type]:
    return {type(module) for _, module in _modules(model)} | {type(model.tokenizer)}


def settings(module: torch.nn.Module) -> list[tuple[str, str]]:
    """A module's own numbers, texts and switches (a scale, an epsilon), private ones left out."""
    return [] if isinstance(module, HookPoint) else _settings_of(vars(module))


def _settings_of(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, _plain(value)) for key, value in sorted(values.items())
            if key not in _OF_TORCH | _NO_MATTER and not key.startswith("_") and _is_plain(value)]  # fmt: skip


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (*_PLAIN, np.ndarray, np.generic))


def _plain(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return repr(value.tolist())  # whole: its own repr leaves the middle out
    return repr(sorted(map(repr, value))) if isinstance(value, (set, frozenset)) else repr(value)


def _config(config: Any) -> str:
    """A config without what says where it was read."""
    if config is None:
        return ""
    known = {
        key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")
    }
    return json.dumps([known, getattr(config, "_attn_implementation", None)], sort_keys=True, default=repr)


def _precision(hf: torch.nn.Module) -> tuple[Any, ...]:
    """What a forward pass computes in, where it is not what the weights are stored in."""
    device = next(hf.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, torch.get_float32_matmul_precision()


def _tokenizer(tokenizer: Any) -> tuple[Any, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(tokenizer)
    start = text.find('"added_tokens"')  # before it stand padding and truncation, which each call sets for itself
    special = sorted(tokenizer.special_tokens_map.items(), key=str)
    return text[max(0, start) :], special, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template


def _is_function(value: Any) -> bool:
    return isinstance(value, (FunctionType, MethodType, BuiltinFunctionType, functools.partial))


def _known(code: Any, *packages: str) -> bool:
    """Whether a function, a callable object or a class comes from `KNOWN_CODE`, or from some of it, with what it holds."""
    if isinstance(code, functools.partial):
        return _known(code.func, *packages) and _is_plain([*code.args, code.keywords])
    if isinstance(code, MethodType):
        return _known(code.__func__, *packages)
    if not isinstance(code, type) and not _is_function(code):
        return _known(type(code), *packages)
    module = getattr(code, "__module__", None) or ""
    return module.split(".")[0] in (packages or KNOWN_CODE) or isinstance(code, BuiltinFunctionType) and not packages


def _unwrapped(hook: Any) -> Any:
    """The function that somebody set, out of the wrapping that TransformerLens puts around it."""
    if isinstance(hook, FunctionType) and hook.__module__.split(".")[0] == "transformer_lens":
        inner = inspect.getclosurevars(hook).nonlocals
        return inner["hook"] if "hook" in inner else _unwrapped(inner["full_hook"]) if "full_hook" in inner else hook
    return hook


def _name(code: Any) -> str:
    if isinstance(code, functools.partial):
        held = [one if _is_plain(one) else "" for one in (code.args, code.keywords)]
        return f"{_name(code.func)} with {_plain(held)}"
    return f"{getattr(code, '__module__', '')}.{getattr(code, '__qualname__', type(code).__name__)}"


def _code_of(layers: set[type]) -> Iterator[tuple[str, str, Any]]:
    """Functions of the layers' classes, of the files that define them and of torch.nn.functional: a library's own, unless
    somebody changed them."""
    classes = {kind for layer in layers for kind in layer.__mro__ if kind is not object and _known(kind)}
    files = {sys.modules[kind.__module__] for kind in classes if kind.__module__.startswith("transformers.models.")}
    places: list[Any] = [*classes, *files, torch.nn.functional]
    for place in sorted(places, key=lambda place: f"{getattr(place, '__module__', '')}.{place.__name__}"):
        for key, value in sorted(vars(place).items()):
            if _is_function(value) and (value.__module__ or "").split(".")[0] not in sys.stdlib_module_names:
                yield place.__name__, key, value
