"""Weights from a folder or from the hub: safetensors only, all of them, and those of the config; else a sentence says why."""

import difflib
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lab.catalogue import CATALOGUE


def read_model(source: dict[str, Any], *, dtype: torch.dtype) -> PreTrainedModel:
    """The Hugging Face model of a `lab_source`, with eager attention."""
    where = {"revision": source.get("revision"), "trust_remote_code": False}
    recorded = Path(source["path"]) / "lab.json"
    if recorded.exists():
        expected, found = json.loads(recorded.read_text())["bytes"], (recorded.parent / "model.safetensors")
        if not found.exists() or found.stat().st_size != expected:
            raise OSError(f"the cached model in {recorded.parent} is damaged; delete that folder and load it again")
    with readable(source, "config.json"):
        config = AutoConfig.from_pretrained(source["path"], **where)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{source['path']} holds quantised weights (quantization_config in its config.json), and these are not read: "
            "load the model that it was made from, or save it with float weights first"
        )
    wrong = ""
    with readable(source, "config.json or a weight file"):
        if Path(source["path"]).is_dir():
            wrong = _wrong_files(Path(source["path"]))
    if wrong:
        raise ValueError(wrong)
    if (Path(source["path"]) / "generation_config.json").exists():
        with readable(source, "generation_config.json"):  # the model's loader would take defaults for a damaged one
            GenerationConfig.from_pretrained(source["path"])
    with readable(source, "config.json or a weight file"):
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
def readable(source: dict[str, Any], what: str) -> Iterator[None]:
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


def checksum_of(folder: Path) -> str:
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


def on_hub(name: str, revision: str | None) -> dict[str, Any]:
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
