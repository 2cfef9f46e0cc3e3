"""What an experiment returns: tidy tables with their parameters, saved and loaded without a model; and finished shards."""

import ast
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import platform
import shutil
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
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import ROOMS, saved
from lab.cache import cache_folder, locked, room, writable
from lab.identity import Identity
from lab.models import in_use, received, to_send

_SPAWNED = 'ProcessPoolExecutor(2, mp_context=get_context("spawn"))'


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
        """The result itself, when each of its columns has a meaning.

        columns: meaning by "column", or by "table.column" where one table differs; "table.*" stands for all others of a table,
            such as those that a user's data brought.
        """
        found = _meanings(self, columns)
        missing = (found.table + "." + found.column)[found.meaning == ""].tolist()
        assert not missing, f"say in COLUMNS what these mean: {missing}"
        return self

    def save(self, folder: str | os.PathLike) -> Path:
        """Write all tables (parquet, gzipped) and the parameters (result.json) into a folder, whole or not at all.

        What is loaded again equals what was saved, with types, index and `.attrs`; numpy's numbers in parameters and in
        columns of mixed objects become Python's. A folder that holds an earlier result gets this one in its place; other
        files there stay as they are.

        Raises:
            ValueError: the folder exists and holds something else than a saved result; a parameter or a cell that would
                not be read back as it is (named by table, column and row). Nothing has been written then.
        """
        return saved.write(folder, self.kind, self.parameters, self.table, self.summary, self.tables)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Result":
        """Read what `save` wrote.

        Raises:
            ValueError: no result there, one of an earlier version of the kit, or a table whose file is gone or was changed.
        """
        kind, parameters, frames = saved.read(folder)
        return cls(kind, frames.pop("table"), frames.pop("summary"), parameters, frames)


def shipped(name: str) -> Result:
    """A result that comes with the kit, by its name "study/result": see `lab.shipped`."""
    found: Result = import_module("lab.shipped").shipped(name)
    return found


def _meanings(result: Result, columns: Mapping[str, str]) -> pd.DataFrame:
    frames = {"table": result.table, "summary": result.summary, **result.tables}
    rows = [(name, column, columns.get(f"{name}.{column}", columns.get(f"{name}.*", columns.get(column, ""))))
            for name, frame in frames.items() for column in frame]  # fmt: skip
    return pd.DataFrame(rows, columns=["table", "column", "meaning"])


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
            f"executor is a {type(executor).__name__}: give a concurrent.futures.Executor ({_SPAWNED}, or "
            "client.get_executor() of a Dask client), or None to run here"
        )
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ValueError(
            "executor would copy this process with the locks that torch's threads hold, and wait for ever: give "
            f"{_SPAWNED}, with get_context from multiprocessing"
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
