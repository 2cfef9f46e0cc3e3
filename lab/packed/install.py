"""Installs depth-lab from the folder that it lies in, without a network; `install.sh` and `install.ps1` call it.

Only Python's own library is used: nothing else is there yet.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WHEELS, NOTEBOOKS, MANIFEST = "wheels", "notebooks", "manifest.json"


def main(arguments: list[str] | None = None) -> int:
    """Check, install, say how to start; returns the exit status."""
    parser = argparse.ArgumentParser(prog="install", description="Install depth-lab from this folder alone.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("depth-lab"), help="a new folder (./depth-lab)")
    parser.add_argument("--accept-license", action="store_true", help="accept the terms of Gemma, if it is in here")
    options = parser.parse_args(arguments)
    try:
        install(options.folder.absolute(), accept_license=options.accept_license)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was half installed is gone", file=sys.stderr)
        return 130
    return 0


def install(folder: Path, *, accept_license: bool) -> None:
    """An environment in `folder/.venv`, the notebooks in `folder/notebooks`, the models in the user's cache.

    Raises:
        ValueError: this Python or system is another one, a file of ours is damaged, the folder is taken.
        OSError: no room, or a step failed. What was made in the folder is gone again.
    """
    manifest = json.loads((HERE / MANIFEST).read_text(encoding="utf-8"))
    refuse(folder, manifest)
    print(f"Checking {len(manifest['files'])} files ...", flush=True)
    if bad := damaged(manifest):
        raise ValueError(f"{', '.join(bad[:3])}: damaged or missing ({len(bad)} in all). Copy this folder again")
    python = folder / (".venv/Scripts/python.exe" if os.name == "nt" else ".venv/bin/python")
    # Settings of this machine would send pip elsewhere; a path with blanks must be written as an address.
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    ours |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (HERE / WHEELS).as_uri(), "PIP_CONFIG_FILE": os.devnull}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(f"Making {python.parents[1]} ...", flush=True)
        hint = "On Debian and Ubuntu: sudo apt install python3-venv"
        step([sys.executable, "-m", "venv", str(python.parents[1])], ours, hint)
        arguments = ["--no-index", "--find-links", str(HERE / WHEELS), f"depth-lab=={manifest['depth_lab']}"]
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        hint = "This system may be older than the one that this folder was packed on"
        packages = sysconfig.get_path("purelib", "venv", {"base": str(python.parents[1])})
        step(command, ours, hint, count=(Path(packages), manifest["packages"]))
        shutil.copytree(HERE / NOTEBOOKS, folder / NOTEBOOKS)
        for name in manifest["models"]:
            if name in manifest["terms"] and not accept_license:
                print(f"{name} is left out: read {manifest['terms'][name]}, then use it with accept_license=True.")
                continue
            code = f"from lab.catalogue import CATALOGUE, prepare; prepare(CATALOGUE[{name!r}], accept_license=True)"
            step([str(python), "-c", code], ours, "Run install again when that is mended")
    except BaseException:
        shutil.rmtree(folder)
        raise
    relative = python.relative_to(folder)
    print(f"\nInstalled. To start:\n\n    cd {folder}\n    {relative} -m lab open --notebooks {NOTEBOOKS}")


def refuse(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise a ValueError where this Python, this system or the folder will not do, and an OSError where room is short."""
    here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    needs = f"Python {manifest['python']} on {manifest['system']}"
    if not (here + " ").startswith(f"Python {manifest['python']}.") or not here.endswith(f" on {manifest['system']}"):
        raise ValueError(
            f"these packages are for {needs}, and this is {here}. Install Python {manifest['python']} from python.org "
            "if only that differs; for another system, pack a folder on such a machine"
        )
    if HERE == folder or HERE in folder.parents:
        raise ValueError(f"{folder} is in the folder to install from: give one on this machine's own disk")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is taken, and nothing is written over: give the name of a new folder")
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if (free := shutil.disk_usage(there).free // 10**6) < manifest["installed_mb"]:
        raise OSError(f"{manifest['installed_mb']} MB are needed in {there}, and {free} MB are free")


def damaged(manifest: dict[str, Any]) -> list[str]:
    """The files of the manifest that are not there, or not as they were packed."""
    paths = {HERE / name: checksum for name, checksum in manifest["files"].items()}
    return [
        str(path.relative_to(HERE)) for path, known in paths.items() if not path.is_file() or checksum_of(path) != known
    ]


def checksum_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step(command: list[str], environment: dict[str, str], hint: str, count: tuple[Path, int] | None = None) -> None:
    """Run a command; an OSError with a hint where it fails. count: a folder to count installed packages in, and how many."""
    process = subprocess.Popen(command, env=environment)
    try:
        while count and process.poll() is None:
            time.sleep(0.5)
            installed = sum(1 for _ in count[0].glob("*.dist-info"))
            print(f"\rInstalled {min(installed, count[1])} of {count[1]} packages ", end="", flush=True)
        failed = process.wait()
    finally:
        process.kill()  # no effect on a process that has ended
        process.wait()
    if count:
        print()
    if failed:
        raise OSError(f"this step failed; its own message is above. {hint}")


if __name__ == "__main__":
    raise SystemExit(main())
