"""What an experiment returns: tidy tables with their parameters, saved and loaded without a model; and finished shards."""

import ast
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import ROOMS
from lab.cache import cache_folder, locked, room, writable
from lab.identity import Identity
from lab.models import in_use, received, to_send


@dataclass(frozen=True)
class Result:
    """Tables of one experiment.

    table: tidy, one observation a row. summary: aggregates with n and interval. parameters: model, checksum, precision,
    versions, seed, data checksum. tables: what else the experiment made (named in its docstring). kind: the experiment, which is
    also the name of its figure (`FIGURES` of each room).
    """

    kind: str
    table: pd.DataFrame
    summary: pd.DataFrame
    parameters: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def plot(self, **options: Any) -> Figure:
        """The experiment's figure, drawn from the tables alone: the function `<kind>` of a module of figures."""
        for place in ROOMS:  # imported only here: how a figure looks is no part of what a run measures
            if found := import_module(f"lab.{place}").FIGURES.get(self.kind):
                return getattr(import_module(found), self.kind)(self, **options)
        raise ValueError(f"there is no figure for results of kind {self.kind!r}: draw its .table or .summary yourself")

    def columns(self) -> pd.DataFrame:
        """What each column of each table means, with its unit (`COLUMNS` of the module that made the result)."""
        for place in ROOMS:
            if found := import_module(f"lab.{place}").RUNS.get(self.kind):
                return _meanings(self, import_module(found).COLUMNS)
        raise ValueError(f"no columns are described for results of kind {self.kind!r}")

    def described(self, columns: Mapping[str, str]) -> "Result":
        """The result itself, when each of its columns has a meaning: "column", or "table.column" where one table differs."""
        found = _meanings(self, columns)
        missing = (found.table + "." + found.column)[found.meaning == ""].tolist()
        assert not missing, f"say in COLUMNS what these mean: {missing}"
        return self

    def save(self, folder: str | os.PathLike) -> Path:
        """Write all tables (parquet, gzipped) and the parameters (result.json) into a folder, whole or not at all.

        What is loaded again equals what was saved, with types, index and `.attrs`; numpy's numbers in parameters and in
        columns of mixed objects become Python's.

        A folder that holds an earlier result gets this one in its place; other files there stay as they are. A table's
        file is named after what it holds, so result.json, written last, never names a file of another result.

        Raises:
            ValueError: the folder exists and holds something else than a saved result; a parameter or a cell that would
                not be read back as it is (named by table, column and row). Nothing has been written then.
        """
        folder = Path(folder).expanduser()  # else a ~ makes a folder of that name
        earlier = _own_files(folder)
        about: dict[str, Any] = {"kind": self.kind, "parameters": _checked_parameters(self), "tables": {}}
        contents = {}
        for name, frame in _checked_names(self).items():
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

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Result":
        """Read what `save` wrote.

        Raises:
            ValueError: no result there, one of an earlier version of the kit, or a table whose file is gone or was changed.
        """
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
        return cls(about["kind"], frames.pop("table"), frames.pop("summary"), about["parameters"], frames)


def _meanings(result: Result, columns: Mapping[str, str]) -> pd.DataFrame:
    frames = {"table": result.table, "summary": result.summary, **result.tables}
    rows = [(name, column, columns.get(f"{name}.{column}", columns.get(column, "")))
            for name, frame in frames.items() for column in frame]  # fmt: skip
    return pd.DataFrame(rows, columns=["table", "column", "meaning"])


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


def _checked_parameters(result: Result) -> Any:
    if not isinstance(result.kind, str) or not isinstance(result.parameters, dict):
        raise ValueError(f"kind={result.kind!r} and parameters={result.parameters!r}: give a text and a dict")
    for key, value in result.parameters.items():
        if not isinstance(key, str):
            raise ValueError(f"parameters has the key {key!r}, which would be read back as a text: give it as one")
        _packed(value, f"parameters[{key!r}]")
    return json.loads(_packed(result.parameters, "parameters"))


def _checked_names(result: Result) -> dict[str, pd.DataFrame]:
    for name in result.tables:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name in ("table", "summary"):
            raise ValueError(
                f"a table is called {name!r}: names are file names of letters, digits, '_', '-' and '.', and 'table' and "
                "'summary' are taken"
            )
    frames = {"table": result.table, "summary": result.summary, **result.tables}
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


def versions() -> dict[str, str]:
    """Versions of what computes: they go into every result's parameters."""
    packages = ("depth-lab", "torch", "transformers", "transformer-lens", "scikit-learn", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


@dataclass(frozen=True)
class Kept:
    """Where finished parts of a run are kept, and read from when they are wanted again; `folder` None: nowhere.

    `known` is in the key of every part: versions, the code of the experiment, the identity of its models.
    """

    folder: Path | None
    known: dict[str, Any]

    def key(self, part: Mapping[str, Any]) -> str:
        """The name of a part: a hash of what it is made from, numbers, texts and lists of them."""
        text = json.dumps([self.known, part], sort_keys=True, default=_in_json)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def has(self, key: str) -> bool:
        """Whether this part is finished."""
        return self.folder is not None and (self.folder / key / "result.json").exists()


def keep(work: Callable[..., Result], models: Mapping[str, Identity] | None = None, *, resume: bool) -> Kept:
    """Whether and under what names the parts that `work` makes are kept; a line says why not.

    Args:
        work: what makes a part. Of the code, its module counts, and what that imports from this package.
        models: `lab.identity.identity` of each model that it runs.
        resume: False keeps nothing.
    """
    models = models or {}
    code = work if hasattr(work, "__qualname__") else type(work)
    known = {"work": code.__qualname__, "code": code_digest(code.__module__), "versions": versions(),
             "models": {name: one.digest for name, one in models.items()}}  # fmt: skip
    doubts = [one.doubt for one in models.values() if one.doubt]
    if not resume or doubts:
        if resume:
            print(
                f"Nothing is read from the cache or kept there, as no hash tells what this model computes: {doubts[0]}."
            )
        return Kept(None, known)
    try:
        folder = writable(cache_folder() / "runs")
    except OSError as error:
        print(f"Nothing is kept: {error.strerror or error}.")
        return Kept(None, known)
    return Kept(folder, known)


def code_digest(module: str) -> str:
    """Hash of a module and of what it imports from this package, in turn, without comments and docstrings."""
    digest, waiting, seen = hashlib.sha256(), [module], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            dumped, imported = _code(name)
            digest.update(dumped.encode())
            waiting += sorted(imported - seen, reverse=True)
    return digest.hexdigest()[:24]


@functools.cache
def _code(module: str) -> tuple[str, frozenset[str]]:
    """The syntax tree of a module, and the modules of this package that it imports anywhere."""
    spec = importlib.util.find_spec(module) if module != "__main__" else None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return module, frozenset()  # written in a notebook or not in Python: `work`'s name has to do
    tree, imported, package = ast.parse(Path(spec.origin).read_text(encoding="utf-8")), set(), __package__
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            del node.body[0]
        names = [name.name for name in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):  # a name of the package is one of its modules, or stands in its __init__
            whole = [f"{node.module}.{name}" for name in names]
            names = [name if _is_module(name) else str(node.module) for name in whole]
        imported |= {name for name in names if name.split(".")[0] == package}
    return ast.dump(tree), frozenset(imported)


def _is_module(name: str) -> bool:
    folder = Path(__file__).parent.parent.joinpath(*name.split("."))
    return folder.with_suffix(".py").exists() or (folder / "__init__.py").exists()


def _in_json(value: Any) -> Any:
    """numpy's numbers and arrays as plain ones; what is left out of a key would be mistaken for what differs in it."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, pd.DataFrame):
        return value.to_csv()
    raise TypeError(f"a {type(value).__name__} in the key of a part: give numbers, texts, or lists of them")


def for_executor(model: TransformerBridge, executor: Executor | None) -> Any:
    """What a part gets for a model: the model itself in this process, else what another process loads it from.

    Raises:
        ValueError: an executor that `run_shards` does not take, or a model that cannot be sent.
    """
    check_executor(executor)
    if executor is None:
        return model
    if in_use(model):
        raise ValueError(
            "executor= inside an intervention (with skip(...), say) would not have it: leave executor= out"
        )
    return model if isinstance(executor, ThreadPoolExecutor) else to_send(model)


def check_executor(executor: Any) -> None:
    """A ValueError for what `run_shards` does not take."""
    if executor is not None and not isinstance(executor, Executor):
        raise ValueError(
            f"executor is a {type(executor).__name__}: give a concurrent.futures.Executor (ProcessPoolExecutor(2), or "
            "client.get_executor() of a Dask client), or None to run here"
        )


def study(
    work: Callable[..., Result],
    parts: Sequence[Mapping[str, Any]],
    *,
    kept: Kept,
    known: Mapping[str, Any],
    shared: Mapping[str, Any] | None = None,
    models: Mapping[str, TransformerBridge] | None = None,
    executor: Executor | None = None,
    describe: str = "parts",
    progress: bool = True,
) -> list[Result]:
    """Results of independent parts, in their order; those that were finished earlier are read, not computed.

    Args:
        work: called as `work(**models, **shared, **part)`; where it has an argument `scratch`, it gets a folder of its own
            that outlives an interruption (None where nothing is kept).
        parts: what differs from part to part; with `known`, the name under which a part is kept.
        kept: of `keep`.
        known: parameters that the numbers of a part depend on.
        shared: further arguments, which `known` or the parts tell, too.
        models: arguments that are models; in another process they are loaded there.
        executor: a `concurrent.futures.Executor`: a pool of processes, `client.get_executor()` of a Dask client; None runs
            here. In a pool of threads the parts take turns, since all threads would run the same model.

    Raises:
        ValueError: another kind of executor, a model that cannot be sent; before anything runs.
    """
    sent = {name: for_executor(model, executor) for name, model in (models or {}).items()}
    scratch = "scratch" in inspect.signature(work).parameters
    shards = [{"key": kept.key({**known, **part}), "arguments": {**(shared or {}), **part}} for part in parts]
    whole = functools.partial(_work, work, sent, kept.folder if scratch else None, scratch)
    return run_shards(whole, shards, folder=kept.folder, executor=executor, describe=describe, progress=progress)


def joined(parts: Sequence[Result]) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """The parts' tables one below the other: `.table`, and each of `.tables`."""
    names = dict.fromkeys(name for part in parts for name in part.tables)
    tables = {
        name: pd.concat([part.tables[name] for part in parts if name in part.tables], ignore_index=True)
        for name in names
    }
    return pd.concat([part.table for part in parts], ignore_index=True), tables


def _work(
    work: Callable[..., Result],
    sent: Mapping[str, Any],
    folder: Path | None,
    scratch: bool,
    *,
    key: str,
    arguments: Any,
) -> Result:
    """One part, here or in another process; its scratch folder goes when it is finished."""
    own = {name: _loaded(json.dumps(model)) if isinstance(model, dict) else model for name, model in sent.items()}
    place = folder / f"{key}.scratch" if folder else None
    found = work(**own, **arguments, **({"scratch": place} if scratch else {}))
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)
    return found


@functools.lru_cache(maxsize=2)  # a process works on many parts
def _loaded(sent: str) -> TransformerBridge:
    return received(json.loads(sent))


def run_shards(
    work: Callable[..., Result],
    shards: Sequence[Mapping[str, Any]],
    *,
    folder: Path | None,
    executor: Executor | None = None,
    describe: str = "shards",
    progress: bool = True,
) -> list[Result]:
    """Results of independent shards, in their order; those that were finished earlier are read, not computed.

    Each shard is worked on under a lock, so that two processes that want the same one do the work once.

    Args:
        work: called as `work(**shard)`; with an executor of processes it and the shard must be picklable.
        shards: keyword arguments; each holds `key`, the shard's name (`Kept.key`).
        folder: where finished shards are kept, one folder each; None keeps nothing.
        executor: a `concurrent.futures.Executor`: a pool of processes, `client.get_executor()` of a Dask client; None runs
            here. In a pool of threads the shards take turns, since all threads would run the same model.

    Raises:
        ValueError: another kind of executor; before anything runs.
    """
    check_executor(executor)
    there = 0 if folder is None else sum((folder / shard["key"] / "result.json").exists() for shard in shards)
    if there and progress:
        print(f"{there} of {len(shards)} {describe} read from {folder}; resume=False computes them again.")
    hidden = not progress or len(shards) - there < 2
    turn = threading.Lock()

    def in_turn(shard: Mapping[str, Any]) -> Result:
        with turn:
            return _finished(work, shard, folder)

    results: dict[int, Result] = {}
    begun, told = time.monotonic(), hidden

    def done() -> None:
        """The one estimate: from the parts that are done."""
        nonlocal told
        bar.update()
        left, spent = len(shards) - len(results), time.monotonic() - begun
        if not told and len(results) > there and left and spent > 5:
            told = True
            tqdm.write(f"About {_time(spent / (len(results) - there) * left)} for the other {left} {describe}.")

    with tqdm(total=len(shards), desc=describe, disable=hidden, leave=False) as bar:
        if executor is None:
            for i, shard in enumerate(shards):
                results[i] = _finished(work, shard, folder)
                done()
        else:
            if isinstance(executor, ThreadPoolExecutor):
                running = {executor.submit(in_turn, shard): i for i, shard in enumerate(shards)}
            else:
                running = {executor.submit(_finished, work, shard, folder): i for i, shard in enumerate(shards)}
            for future in as_completed(running):
                results[running[future]] = future.result()
                done()
    return [results[i] for i in range(len(shards))]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _finished(work: Callable[..., Result], shard: Mapping[str, Any], folder: Path | None) -> Result:
    """One shard's result: read when it is there, else computed and kept, by one process at a time."""
    if folder is None:
        return work(**shard)
    place = folder / shard["key"]
    with locked(writable(folder) / f"{shard['key']}.lock", "computing the same part"):
        if (place / "result.json").exists():
            try:
                return Result.load(place)
            except (OSError, ValueError) as error:
                print(f"A finished part cannot be read and is computed again: {error}")
        result = work(**shard)
        try:
            with room(folder, "a finished part"):
                result.save(place)
        except OSError as error:  # what was computed is not lost for that
            print(f"A finished part is not kept: {error.strerror or error}")
        return result
