"""Files of data: the folder that ships with the kit, CSVs, and downloads that are kept and verified."""

import csv
import hashlib
import io
from pathlib import Path

import pandas as pd
import pooch
import requests

from lab import cache
from lab.cache import data_folder as data_folder


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_csv(path: Path) -> pd.DataFrame:
    """The cells of a CSV (UTF-8, with a header) as the texts that they are: none is guessed to be a number or missing.

    Raises:
        ValueError: what is no such file, with the line: other encodings, NUL characters, quotes that aren't closed, line
            ends outside of quotes that are none of the file's, an empty line between others, rows of more or fewer cells
            than the header, a column named twice, columns that another sign separates.
    """
    content, name = path.read_bytes(), path.name

    def wrong(line: int, what: str) -> ValueError:
        return ValueError(f"{name}, line {line}{what}")

    try:
        text = content.decode("utf-8").removeprefix("\ufeff")  # the mark that spreadsheets put in front
    except UnicodeDecodeError as error:
        what = f": the byte 0x{content[error.start]:02x} is no UTF-8: save the file as UTF-8"
        raise wrong(content.count(b"\n", 0, error.start) + 1, what) from error
    if (at := text.find("\0")) >= 0:
        what = ": a NUL character, as in UTF-16 or a damaged file: save the file as UTF-8"
        raise wrong(text.count("\n", 0, at) + 1, what)
    quote = "Put a text that holds commas, quotes or line ends in double quotes, and double the quotes in it"
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # long texts are texts, too
    lines = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    rows, line = [], 1
    try:
        for row in lines:
            rows.append((line, row))
            line = lines.line_num + 1
    except csv.Error as error:
        reason = "a carriage return outside of quotes" if "new-line" in str(error) else str(error)
        raise wrong(line, f": {reason}. {quote}") from error
    while rows and not rows[-1][1]:
        rows.pop()
    if not rows:
        raise ValueError(f"{name} is empty: a header and rows are needed")
    header = rows[0][1]
    if twice := [column for column in header if header.count(column) > 1]:
        raise wrong(1, f": the column {twice[0]!r} is there twice: give each a name of its own")
    for line, row in rows:
        if not row:
            raise wrong(line, " is empty: delete it")
        if len(row) != len(header):
            raise wrong(line, f": {len(row)} cells, the header has {len(header)} ({', '.join(header)}). {quote}")
    if len(header) == 1 and (other := [sign for sign in ";\t|" if sign in header[0]]):
        raise wrong(1, f": columns are separated by {other[0]!r} ({header[0]!r}): save it with commas")
    return pd.DataFrame([row for _, row in rows[1:]], columns=header, dtype="str")


def cache_folder() -> Path:
    """Where downloads are kept: "datasets" in the kit's cache folder (`lab.models.cache_folder`)."""
    return cache.cache_folder() / "datasets"


def verified(url: str, checksum: str, source: str | Path | None, *, subfolder: str = "") -> Path:
    """The file of this address: from the cache (`subfolder` in it) or its authors, or from the folder `source`."""
    file_name = url.rsplit("/", 1)[1]
    if source is None:
        return _fetch(url, file_name, checksum, cache_folder() / subfolder)
    path = Path(source).expanduser() / file_name
    if not path.is_file():
        raise ValueError(f"no file {file_name} in {path.parent}: source= is the folder that holds the file of {url}")
    if (found := _checksum(path, checksum)) != checksum:
        raise ValueError(f"{path} is not the published file: its checksum is {found}, not {checksum}")
    return path


def _fetch(url: str, file_name: str, checksum: str, folder: Path) -> Path:
    """The verified file in this folder, downloaded if it isn't there. A file that fails the check is deleted."""
    by_hand = f"download it elsewhere, put it in a folder under the name {file_name} and pass source=<that folder>"
    corrupt = (
        f"{url} arrived corrupt or was changed: it doesn't have {checksum}. Nothing was kept; try again, or {by_hand}"
    )
    if not (folder / file_name).exists():  # what is there can be read where nothing can be written
        cache.writable(folder)
    # pooch writes aside and renames. It knows no git ids: those are verified below.
    known = checksum if checksum.startswith("sha256:") else None
    try:
        path = Path(pooch.retrieve(url, known, fname=file_name, path=folder, progressbar=True))
    except requests.exceptions.RequestException as error:
        answered = isinstance(error, requests.exceptions.HTTPError)
        why = f"had ({error})." if answered else f"reached ({type(error).__name__}): are you offline?"
        raise ConnectionError(f"{url} could not be {why} Try again, or {by_hand}") from error
    except ValueError as error:  # pooch: the checksum is wrong, its partial file is removed
        raise ValueError(corrupt) from error
    except OSError as error:
        if error.errno not in cache.NO_ROOM:
            raise
        mend = "free some, or set LAB_CACHE to a folder elsewhere. Nothing was kept"
        raise OSError(error.errno, f"no room in {folder} for {file_name}: {mend}") from error
    if _checksum(path, checksum) != checksum:
        path.unlink()
        raise ValueError(corrupt)
    return path


def _checksum(path: Path, like: str) -> str:
    """The file's checksum of the same kind as `like`."""
    if not like.startswith("git:"):
        return f"sha256:{sha256(path)}"
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    digest.update(path.read_bytes())
    return f"git:{digest.hexdigest()}"
