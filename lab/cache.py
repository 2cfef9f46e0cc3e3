"""Folders: where the kit keeps what it can make or fetch again, what is said when that cannot be used; and its data."""

import errno
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a file too large
_MEND = "set the environment variable LAB_CACHE to a folder that can be written"


def cache_folder() -> Path:
    """The folder that holds converted models, fetched data and unfinished runs: `LAB_CACHE`, or the user's cache.

    Raises:
        OSError: there is no home folder to put it in (or to put in the place of a `~`).
    """
    return _absolute(os.environ.get("LAB_CACHE", ""))


@functools.cache  # a relative folder is taken from where the program stands at first; a later chdir does not move it
def _absolute(named: str) -> Path:
    try:
        return (Path(named).expanduser() if named else user_cache_path("depth-lab")).absolute()
    except RuntimeError as error:  # from pathlib and platformdirs alike: no HOME, and no such user
        what = f"LAB_CACHE={named}" if named else "the folder for models and finished parts"
        raise OSError(f"{what} needs a home folder, and this user has none: {_MEND}") from error


def data_folder() -> Path:
    """`data/` beside the package in a checkout, else `_data/` inside the installed package."""
    package = Path(__file__).resolve().parent
    folders = [folder for folder in (package.parent / "data", package / "_data") if (folder / "cities.csv").is_file()]
    if not folders:
        raise ValueError(f"no data folder beside {package} or in it: install the kit again")
    return folders[0]


def writable(folder: Path) -> Path:
    """A folder of the cache, made where it is missing and tried with a file.

    Raises:
        OSError: it cannot be made or written; the message names it and LAB_CACHE.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _no_room(folder, "trying it with an empty file", error.errno) from error
        raise OSError(
            error.errno, f"the cache folder {folder} cannot be written ({error.strerror}): {_MEND}"
        ) from error
    return folder


@contextmanager
def room(folder: Path, work: str) -> Iterator[None]:
    """Inside, a write that fails because the disk is full becomes an OSError that says so and names LAB_CACHE."""
    try:
        yield
    except Exception as error:
        # safetensors gives no errno: "Error while serializing: I/O error: No space left on device (os error 28)"
        for code in NO_ROOM:
            if getattr(error, "errno", None) == code or f"(os error {code})" in str(error):
                raise _no_room(folder, work, code) from error
        raise


def _no_room(folder: Path, work: str, code: int) -> OSError:
    return OSError(
        code,
        f"no room left in {folder} while {work}. Nothing was kept. Make room, or set LAB_CACHE to a folder on another disk",
    )


@contextmanager
def locked(lock: Path, work: str) -> Iterator[None]:
    """Inside, no other process is: whoever finds the lock taken waits for it and says so. A dead process holds none."""
    guard = FileLock(lock)
    try:
        guard.acquire(timeout=1)
    except Timeout:
        print(f"Another process is {work}; waiting for it. It holds {lock}.", flush=True)
        guard.acquire()
    try:
        yield
    finally:
        guard.release()


def made_once(folder: Path, work: str, make: Callable[[Path], None], *, needs: str = "") -> Path:
    """A folder with a `lab.json`; where it is not there, `make(empty folder)` makes it. `work` is what messages call that.

    It is made aside, under a lock, and renamed at the end: a folder is whole or absent, and two processes do the work once.
    """
    if (folder / "lab.json").exists():
        return folder
    with locked(writable(folder.parent) / f"{folder.name}.lock", work):
        if not (folder / "lab.json").exists():  # another process may have made it
            for stale in (folder, *folder.parent.glob(f"{folder.name}.partial-*")):  # left by a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
            try:
                with room(folder.parent, work + needs):
                    partial.mkdir()
                    make(partial)
                    partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


# --- what the cache holds -------------------------------------------------------------------------------------------

KINDS = {
    "models": "converted models",
    "small_models": "small models that were trained here",
    "datasets": "fetched data sets",
    "runs": "finished parts of experiments, from which they go on",
}
RECENT = 300.0  # seconds: what changed since may be in use


@dataclass(frozen=True)
class Held:
    """Something that the cache holds: a name such as "models/smollm2-135m-b179c9523d0e", bytes, seconds since its last change."""

    name: str
    size: int
    age: float


def held() -> list[Held]:
    """What the kit keeps in its cache; what else stands in that folder is not ours and not in the list."""
    found = []
    for kind in KINDS:
        for place in sorted((cache_folder() / kind).glob("*")):
            if place.suffix != ".lock":
                stats = [file.stat() for file in (place, *place.rglob("*")) if file.is_file()]
                size, last = sum(one.st_size for one in stats), max((one.st_mtime for one in stats), default=0.0)
                found.append(Held(f"{kind}/{place.name}", size, time.time() - last))
    return found


def free(names: Sequence[str]) -> tuple[list[Held], list[Held]]:
    """Delete what stands under these names (a kind, a name, or its start); returns what went and what stays as perhaps in use.

    Raises:
        ValueError: nothing has that name.
    """
    there = held()
    for name in names:
        if name not in KINDS and not (name and any(one.name.startswith(name) for one in there)):
            raise ValueError(f"the cache holds nothing named {name!r}; python -m lab clean lists it")
    chosen = [one for one in there if one.name.startswith(tuple(names))]
    gone, used = ([one for one in chosen if (one.age < RECENT) == recent] for recent in (False, True))
    for one in gone:
        place = cache_folder() / one.name
        aside = place.with_name(f"{place.name}.partial-gone")  # renamed first: a folder is whole or absent
        place.rename(aside)
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    return gone, used
