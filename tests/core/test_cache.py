"""The cache folder: where it is, and what is said where it cannot be used."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import lab
from lab import cache

# A user id without a name and a home, as containers have it: the password database knows nobody.
NO_HOME = """
import os, pwd, sys
os.environ.pop("HOME", None)
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
from lab.__main__ import main
raise SystemExit(main(["check"]))
"""


@pytest.mark.parametrize(
    ("named", "at"), [("~/models here", "home/models here"), ("kept", "kept"), ("/far/off", "/far/off")]
)
def test_one_folder_for_models_and_data(named: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", named)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cache._absolute.cache_clear()  # what earlier tests found from where they stood
    assert lab.models.cache_folder() == lab.datasets.cache_folder().parent == tmp_path / at


def test_a_relative_folder_stays_where_it_was_first_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", "relative folder")
    monkeypatch.chdir(tmp_path)
    first = cache.cache_folder()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cache.cache_folder() == first == tmp_path / "relative folder"


def test_the_users_own_cache_without_lab_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache._absolute.cache_clear()
    found = cache.cache_folder()
    cache._absolute.cache_clear()
    assert found.name == "depth-lab" and (sys.platform != "linux" or found == tmp_path / "depth-lab")


@pytest.mark.skipif(os.name == "nt", reason="has no password database")
@pytest.mark.parametrize("named", ["", "~/kept"])
def test_a_user_without_a_home(named: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "LAB_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", NO_HOME], env={**kept, "LAB_CACHE": named}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match(r"error: .* needs a home folder, and this user has none: set .* LAB_CACHE to a folder", done.stderr)


@pytest.mark.parametrize("place", ["", "models", "datasets/deep", "runs"])
def test_a_file_in_the_place_of_the_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"the cache folder .*file.* cannot be written \(.*\): set .* LAB_CACHE"):
        cache.writable(tmp_path / "file" / place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="/sys is a Linux folder in which nobody can make files")
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", "/sys/depth-lab")
    with pytest.raises(OSError, match=r"the cache folder /sys/depth-lab/models cannot be written .*LAB_CACHE"):
        lab.load("smollm2-135m")
    with pytest.raises(OSError, match=r"the cache folder /sys/depth-lab/small_models cannot be written .*LAB_CACHE"):
        lab.nets.k_hop.k_hop()
    with pytest.raises(OSError, match=r"the cache folder /sys/depth-lab/datasets/? cannot be written .*LAB_CACHE"):
        lab.datasets.load("published/cities")


def test_writable_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    assert list(cache.writable(tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="sets a POSIX limit")
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A real failed write: no file of this process may grow beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            OSError, match="no room left in .* while making it. Nothing was kept. Make room, or set LAB_C"
        ):
            with cache.room(tmp_path, "making it"):
                (tmp_path / "large").write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(ValueError, match="^another fault$"), cache.room(tmp_path, "making it"):
        raise ValueError("another fault")


def test_a_process_that_waits_says_for_what(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    code = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); time.sleep(2)"
    )
    lock = tmp_path / "it.lock"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with cache.locked(lock, "making it"):
            assert capfd.readouterr().out == f"Another process is making it; waiting for it. It holds {lock}.\n"
    with cache.locked(lock, "making it"):
        assert capfd.readouterr().out == ""


def test_a_relative_folder_means_the_same_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "00_where.py").write_text(
        "# %%\nfrom lab.cache import cache_folder\nprint(cache_folder())\n"
    )
    command = [sys.executable, "-m", "lab", "run", "--notebooks", "scripts", "--out", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "LAB_CACHE": "kept"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "kept") in (tmp_path / "out" / "00_where.ipynb").read_text()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache with a model of 1,000 bytes, two runs, one of them of just now, and a file that is not ours."""
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
    for name in ("models/tiny-0123", "runs/aa", "runs/bb"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "data.bin").write_bytes(bytes(1000))
        if name != "runs/bb":
            os.utime(tmp_path / name / "deep" / "data.bin", (1e9, 1e9))
    (tmp_path / "models" / "tiny-0123.lock").touch()
    (tmp_path / "mine.txt").write_text("mine")
    return tmp_path


def test_the_cache_is_listed(kept):
    there = {one.name: one for one in cache.held()}
    assert list(there) == ["models/tiny-0123", "runs/aa", "runs/bb"]
    assert {one.size for one in there.values()} == {1000}
    assert there["runs/bb"].age < 60 and there["runs/aa"].age > 1e8


def test_what_is_named_is_freed_and_what_may_be_in_use_stays(kept):
    gone, used = cache.free(["runs"])
    assert [one.name for one in gone] == ["runs/aa"] and [one.name for one in used] == ["runs/bb"]
    assert not (kept / "runs" / "aa").exists() and (kept / "runs" / "bb" / "deep" / "data.bin").exists()
    assert (kept / "models" / "tiny-0123").exists() and (kept / "mine.txt").read_text() == "mine"
    assert [path.name for path in (kept / "runs").iterdir()] == ["bb"]


def test_a_kind_of_which_there_is_none(kept):
    assert cache.free(["datasets"]) == ([], [])


@pytest.mark.parametrize("name", ["mine.txt", "..", "models/other", ""])
def test_only_what_is_listed_can_be_freed(kept, name):
    before = sorted(kept.rglob("*"))
    with pytest.raises(ValueError, match="the cache holds nothing named"):
        cache.free([name])
    assert sorted(kept.rglob("*")) == before
