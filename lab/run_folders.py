"""What `python -m lab` leaves in a folder: made aside, put in its place whole, and nothing touched that isn't ours.

A notebook NAME leaves NAME.ipynb, NAME.html, its figures NAME-<code cell>-<n>.png and its tables in NAME/. The record
(`RECORD`) lists these files with their checksums. What it lists, unchanged, is ours, and the next run of this notebook
takes its place; all else in the folder is someone's work, a listed file that was edited included. So it is with builds.
"""

import datetime
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

RECORD, LOCK = ".depth-lab-run.json", ".depth-lab-run.lock"
BUILD = "python -m lab build"  # under this the record lists the files of builds


@contextmanager
def claimed(out: Path, names: list[str]) -> Iterator[None]:
    """Inside, `out` is there, no other run writes into it, and runs of these notebooks have their places free.

    Raises:
        ValueError: another run is writing there, or a place is taken by a file that no run left so.
    """
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise ValueError(f"{out} is {'a file' if out.exists() else 'a link to nothing'}: give a folder with --out")
    if out.exists() and not (out / LOCK).exists():  # no run was here: nothing is added to a folder that is refused
        _refuse_taken(out, _all_not_ours(out, names))
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another run is writing into {out}: wait for it, or give another folder with --out") from None
    try:
        _refuse_taken(out, _all_not_ours(out, names))
        yield
    finally:
        lock.release()


def _all_not_ours(out: Path, names: list[str]) -> list[str]:
    return [place for name in names for place in not_ours(out, name)]


def _refuse_taken(out: Path, taken: list[str], who: str = "run of this notebook") -> None:
    if taken:
        first = ", ".join(taken[:5]) + (", ..." if len(taken) > 5 else "")
        raise ValueError(
            f"{out} holds {len(taken)} file{'s' if len(taken) > 1 else ''} that no {who} left so ({first}), "
            "and nothing of yours is written over: move them, or give another folder with --out"
        )


def not_ours(out: Path, name: str) -> list[str]:
    """Files in the places of a notebook that its last run did not leave there as they are."""
    known = _record(out).get(name, {"files": {}})["files"]
    figure = re.compile(rf"{re.escape(name)}-\d+-\d+\.png")
    places = [path for path in out.iterdir() if path.name in (name, f"{name}.ipynb", f"{name}.html")]
    places += [path for path in out.iterdir() if figure.fullmatch(path.name)]
    found = _files(out, *places)
    return sorted(place for place, checksum in found.items() if checksum not in known.get(place, []))


def aside(out: Path, name: str) -> Path:
    """An empty folder for a run to write into; what a killed run left in such a one goes. Only where `out` is claimed."""
    for stale in out.glob(f".{name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = out / f".{name}.partial-{os.getpid()}"
    folder.mkdir()
    return folder


def put(made: Path, out: Path, name: str, *, whole: bool) -> Path:
    """Move what a run made into its places, in place of an earlier run; returns the folder that it is in now.

    That is a new folder in `out`, with the time in its name, for a run that did not come to its end where one that did
    stands, and where someone changed the earlier files in the meantime.
    """
    record = _record(out)
    earlier = record.get(name, {"whole": False, "files": {}})
    better = earlier["whole"] and not whole and (out / f"{name}.ipynb").exists()
    if better or not_ours(out, name):
        kept = out / f"{name}.{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
        made.rename(kept)
        return kept
    new = {place: [checksum] for place, checksum in _files(made, *made.iterdir()).items()}
    # While files change places, the old and the new ones are ours: a run that is killed here leaves nothing that blocks.
    both = {place: earlier["files"].get(place, []) + new.get(place, []) for place in {*earlier["files"], *new}}
    _write_record(out, {**record, name: {"whole": False, "files": both}})
    for place in sorted({*earlier["files"]} - {*new}):
        (out / place).unlink(missing_ok=True)
        for folder in list((out / place).parents)[: place.count("/")]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    for place in new:
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (made / place).replace(out / place)
    _write_record(out, {**record, name: {"whole": whole, "files": new}})
    shutil.rmtree(made)
    return out


def put_files(out: Path, files: Mapping[str, str]) -> None:
    """Write the files of a build, by their places in `out`, in place of those of an earlier one.

    Raises:
        ValueError: a place is taken by a file with another content that no build left so; then nothing is written.
    """
    new = {place: hashlib.sha256(text.encode()).hexdigest() for place, text in files.items()}

    def free() -> dict[str, list[str]]:
        known = _record(out).get(BUILD, {"files": {}})["files"]
        ours = {place: [checksum, *known.get(place, [])] for place, checksum in new.items()}
        _refuse_taken(out, [place for place in sorted(ours) if _taken(out, place, ours[place])], "build")
        return {**known, **ours}

    if out.is_dir():
        free()  # before a lock is made there
    with claimed(out, []):
        both = free()
        _write_record(out, {**_record(out), BUILD: {"whole": False, "files": both}})
        for place, text in files.items():
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            write(out / place, text)
        left = {**both, **{place: [checksum] for place, checksum in new.items()}}
        _write_record(out, {**_record(out), BUILD: {"whole": True, "files": left}})


def _taken(out: Path, place: str, ours: list[str]) -> bool:
    """Whether a file cannot be written without touching what isn't ours: it, or what stands where its folders should be."""
    path = out / place
    if any(one.is_symlink() or (one.exists() and not one.is_dir()) for one in list(path.parents)[: place.count("/")]):
        return True
    return path.is_symlink() or (path.exists() and (path.is_dir() or _checksum(path) not in ours))


def write(path: Path, content: str | bytes) -> None:
    """Write aside and rename, so that a file is whole or absent."""
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _files(root: Path, *paths: Path) -> dict[str, str]:
    """Checksums of these files, and of those in these folders, by their place in `root`."""
    every = [inner for path in paths for inner in (path, *(path.rglob("*") if not path.is_symlink() else ()))]
    return {path.relative_to(root).as_posix(): _checksum(path) for path in every if path.is_symlink() or path.is_file()}


def _checksum(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(out: Path) -> dict[str, dict]:
    """What the runs in this folder left; nothing, when the record isn't there or can't be read (then nothing is ours)."""
    try:
        notebooks = json.loads((out / RECORD).read_text(encoding="utf-8"))["notebooks"]
        return {name: {"whole": about["whole"], "files": dict(about["files"])} for name, about in notebooks.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_record(out: Path, notebooks: dict[str, dict]) -> None:
    about = "files that `python -m lab` left here, with their checksums: a later run replaces these and no others"
    new = out / f"{RECORD}.partial"
    new.write_text(json.dumps({"about": about, "notebooks": notebooks}, indent=1), encoding="utf-8")
    new.replace(out / RECORD)
