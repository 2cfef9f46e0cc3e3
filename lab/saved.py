"""The folder of a saved result: tables as parquet, parameters as JSON, and nothing that would not be read back as it is.

A table's file is named after what it holds, so result.json, written last, never names a file of another result.
"""

import gzip
import hashlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa


def write(
    folder: str | os.PathLike, kind: Any, parameters: Any, table: Any, summary: Any, tables: dict[str, Any]
) -> Path:
    """See `Result.save`."""
    folder = Path(folder).expanduser()  # else a ~ makes a folder of that name
    earlier = _own_files(folder)
    about: dict[str, Any] = {"kind": kind, "parameters": _checked_parameters(kind, parameters), "tables": {}}
    contents = {}
    for name, frame in _checked_names(table, summary, tables).items():
        content, packed, attrs, categories = _encoded(frame, name)
        file = f"{name}-{_digest(content)}.parquet.gz"
        contents[file], about["tables"][name] = content, {"file": file, "json": packed, "attrs": attrs}
        about["tables"][name] |= {"categories": categories} if categories else {}
    contents["result.json"] = json.dumps(about, indent=1).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=folder.parent) as scratch:
        aside = Path(scratch, "result")
        aside.mkdir()
        for file, content in contents.items():
            (aside / file).write_bytes(content)
        if not folder.exists():
            aside.rename(folder)
            return folder
        for file in contents:  # result.json is the last: until it is replaced, the earlier result is there whole
            os.replace(aside / file, folder / file)
    for file in earlier - contents.keys():
        (folder / file).unlink(missing_ok=True)
    return folder


def read(folder: str | os.PathLike) -> tuple[str, dict[str, Any], dict[str, pd.DataFrame]]:
    """Kind, parameters and all tables; see `Result.load`."""
    folder = Path(folder).expanduser()
    if not (folder / "result.json").exists():
        raise ValueError(f"{folder} holds no saved result (no result.json)")
    about = _about(folder)
    if "tables" not in about:
        raise ValueError(
            f"{folder} was saved by an earlier version of this kit, as csv.gz, which lost the types of its cells: run it "
            "again, or read its tables with pandas.read_csv"
        )
    frames = {}
    for name, entry in about["tables"].items():
        path = folder / entry["file"]
        if not path.exists():
            raise ValueError(f"{path} is missing: the result in {folder} is not whole; save it again")
        content = path.read_bytes()
        if _digest(content) not in entry["file"]:
            raise ValueError(f"{path} is not as it was saved (its name holds its checksum): save the result again")
        frames[name] = _decoded(content, entry["json"], entry["attrs"], entry.get("categories", {}))
    return about["kind"], about["parameters"], frames


# --- what is in the folder of a result ------------------------------------------------------------------------------


def _about(folder: Path) -> dict[str, Any]:
    """What result.json says."""
    path = folder / "result.json"
    try:
        about = _unpacked(path.read_text(encoding="utf-8"))
    except ValueError:
        about = None
    if not isinstance(about, dict) or not {"kind", "parameters"} < about.keys():
        raise ValueError(f"{path} was not written by this kit: give the folder of a saved result, or a new one")
    return about


def _own_files(folder: Path) -> set[str]:
    """Names of an earlier result's files, all of which may be replaced."""
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if not (folder / "result.json").exists():
        if others := sorted(path.name for path in folder.iterdir() if not _TABLE_FILE.fullmatch(path.name)):
            raise ValueError(
                f"{folder} holds other files ({others[0]!r}); give a new folder, or that of an earlier result"
            )
        return set()  # tables alone are left where a save was killed
    about = _about(folder)
    files = [entry["file"] for entry in about.get("tables", {}).values()]
    files += [f"{name}.csv.gz" for name in about.get("columns", ())]  # as earlier versions saved it
    return {file for file in files if Path(file).name == file}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# --- values to bytes and back: what would not come back as it was is refused ----------------------------------------


_LOSSES = (AssertionError, ValueError, TypeError, NotImplementedError, OverflowError, pa.ArrowException)
_TUPLE = "a tuple of"
_TABLE_FILE = re.compile(r"[\w.-]+-[0-9a-f]{16}\.parquet\.gz")


def _checked_parameters(kind: Any, parameters: Any) -> Any:
    if not isinstance(kind, str) or not isinstance(parameters, dict):
        raise ValueError(f"kind={kind!r} and parameters={parameters!r}: give a text and a dict")
    for key, value in parameters.items():
        if not isinstance(key, str):
            raise ValueError(f"parameters has the key {key!r}, which would be read back as a text: give it as one")
        _packed(value, f"parameters[{key!r}]")
    return json.loads(_packed(parameters, "parameters"))


def _checked_names(table: Any, summary: Any, tables: dict[str, Any]) -> dict[str, pd.DataFrame]:
    for name in tables:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name in ("table", "summary"):
            raise ValueError(
                f"a table is called {name!r}: names are file names of letters, digits, '_', '-' and '.', and 'table' and "
                "'summary' are taken"
            )
    frames = {"table": table, "summary": summary, **tables}
    for name, frame in frames.items():
        if not isinstance(frame, pd.DataFrame):
            raise ValueError(f"{name} is a {type(frame).__name__}, not a table: give a pandas DataFrame")
        labels = list(frame.columns)
        wrong = [label for label in labels if not isinstance(label, str) or labels.count(label) > 1]
        if wrong or isinstance(frame.columns, pd.MultiIndex):
            raise ValueError(
                f"table {name!r}: columns {labels} (first {(wrong or labels)[0]!r}): each needs a text of its own as a name"
            )
    return frames


def _encoded(frame: pd.DataFrame, name: str) -> tuple[bytes, list[str], dict[str, Any], dict[str, Any]]:
    """A table's file, the columns that stand in it as JSON (those of Python objects, such as lists), its .attrs, and the
    categories that are numbers, or of no row, which parquet would not give back: of these columns the file holds codes."""
    packed = [column for column in frame if frame[column].dtype == object]
    where = f"table {name!r}"
    attrs = json.loads(_packed(frame.attrs, f"{where}: .attrs"))
    texts = {}
    for column in packed:
        cells = [_packed(cell, f"{where}, column {column!r}, row {row}") for row, cell in enumerate(frame[column])]
        texts[column] = pd.Series(cells, index=frame.index, dtype="str")
    categories = {
        column: {"values": kind.categories.tolist(), "dtype": str(kind.categories.dtype), "ordered": bool(kind.ordered)}
        for column, kind in frame.dtypes.items()
        if isinstance(kind, pd.CategoricalDtype) and (
            isinstance(kind.categories.dtype, np.dtype) and kind.categories.dtype.kind in "biuf"
            or frame.empty and all(isinstance(one, str) for one in kind.categories)
        )
    }  # fmt: skip
    plain = frame.assign(**texts, **{column: frame[column].cat.codes for column in categories})
    plain.attrs = {}
    try:
        content = _parquet(plain)
        pd.testing.assert_frame_equal(_decoded(content, [], {}, categories)[[*categories]], frame[[*categories]])
        return content, packed, attrs, categories
    except _LOSSES as error:
        for column in plain:  # which one?
            try:
                _parquet(plain[[column]].reset_index(drop=True))
            except _LOSSES as reason:
                raise ValueError(
                    f"{where}, column {column!r} ({plain[column].dtype}) would not be read back as it is: .astype makes "
                    f"numbers, texts, dates or categories of it. {_line(reason)}"
                ) from reason
        raise ValueError(
            f"{where}: its index or the columns' name would not be read back as it is: .reset_index() makes a column of an "
            f"index. {_line(error)}"
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _shown(value: Any) -> str:
    try:
        return " ".join(repr(value).split())[:120]
    except ValueError:  # an integer of more digits than Python writes
        return f"of type {type(value).__name__} and too long to be written"


def _parquet(frame: pd.DataFrame) -> bytes:
    """The table's file, read again and compared: raises one of `_LOSSES` when it is not the table."""
    for store_schema in (False, True):  # the schema is most of a small file; durations, categories and an index need it
        buffer = io.BytesIO()
        frame.to_parquet(buffer, engine="pyarrow", compression=None, write_statistics=False, store_schema=store_schema)
        content = gzip.compress(buffer.getvalue(), mtime=0)  # from outside, as the description is repetitive, too
        try:
            pd.testing.assert_frame_equal(_decoded(content, [], {}), frame, check_exact=True)
        except _LOSSES:
            if store_schema:
                raise
        else:
            break
    return content


def _decoded(
    content: bytes, packed: list[str], attrs: dict[str, Any], categories: dict[str, Any] | None = None
) -> pd.DataFrame:
    frame = pd.read_parquet(io.BytesIO(gzip.decompress(content)), engine="pyarrow")
    for column in packed:
        frame[column] = pd.Series([_unpacked(cell) for cell in frame[column]], index=frame.index, dtype=object)
    for column, kind in (categories or {}).items():
        dtype = pd.CategoricalDtype(pd.Index(kind["values"], dtype=kind["dtype"]), ordered=kind["ordered"])
        frame[column] = pd.Categorical.from_codes(frame[column], dtype=dtype)
    frame.attrs = attrs
    return frame


def _packed(value: Any, where: str) -> str:
    """JSON that gives the value back; numpy's numbers as Python's, which are equal to them."""
    try:
        text = json.dumps(_marked(value))
        same = _same(value, _unpacked(text))
    except (ValueError, TypeError, RecursionError):
        same = False
    if not same:
        raise ValueError(
            f"{where} is {_shown(value)}, which would not be read back as it is: use texts, numbers, booleans, None, lists, "
            "tuples, and dicts with texts for keys (.tolist() of an array, str(...) of a path or a date)"
        )
    return text


def _marked(value: Any) -> Any:
    """For JSON, which has no tuples and none of numpy's numbers."""
    if isinstance(value, dict):
        return {key: _marked(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        parts = [_marked(one) for one in value]
        return parts if isinstance(value, list) else {_TUPLE: parts}
    return value.item() if isinstance(value, np.generic) else value


def _unpacked(text: str) -> Any:
    return json.loads(text, object_hook=lambda one: tuple(one[_TUPLE]) if one.keys() == {_TUPLE} else one)


def _same(value: Any, back: Any) -> bool:
    """Equal in type, too; nan is itself."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is not type(back):
        return False
    if isinstance(value, dict):
        return list(value) == list(back) and all(map(_same, value.values(), back.values()))
    if isinstance(value, list | tuple):
        return len(value) == len(back) and all(map(_same, value, back))
    return value == back or (value != value and back != back)
