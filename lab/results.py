"""What an experiment returns: tidy tables with their parameters, saved and loaded without a model; and finished shards."""

import ast
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab.identity import Identity
from lab.models import cache_folder, in_use, to_send


@dataclass(frozen=True)
class Result:
    """Tables of one experiment.

    table: tidy, one observation a row. summary: aggregates with n and interval. parameters: model, checksum, precision,
    versions, seed, data checksum. tables: what else the experiment made (named in its docstring). kind: the experiment,
    which is also the name of its plot in `lab.plots`, `lab.depth_plots`, `lab.transfer_plots` or
    `lab.merging_plots`.
    """

    kind: str
    table: pd.DataFrame
    summary: pd.DataFrame
    parameters: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def plot(self, **options: Any) -> Figure:
        """The experiment's figure, drawn from the tables alone: the function `<kind>` of a module of figures."""
        for name in ("plots", "depth_plots", "transfer_plots", "merging_plots"):
            module = import_module(f"lab.{name}")  # only here: how a figure looks is no part of what a run measures
            if hasattr(module, self.kind):
                return getattr(module, self.kind)(self, **options)
        raise ValueError(f"there is no figure for results of kind {self.kind!r}: draw its .table or .summary yourself")

    def save(self, folder: str | os.PathLike) -> Path:
        """Write all tables (csv.gz) and the parameters (json) into a folder, whole or not at all.

        Raises:
            ValueError: the folder exists and holds something else than a saved result.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "result.json").exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files; give a new folder, or that of an earlier result")
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        try:
            frames = {"table": self.table, "summary": self.summary, **self.tables}
            for name, frame in frames.items():
                listed = {column: frame[column].map(json.dumps) for column in _list_columns(frame)}
                frame.assign(**listed).to_csv(
                    aside / f"{name}.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
                )
            types = {
                name: {
                    column: "list" if column in _list_columns(frame) else str(kind)
                    for column, kind in frame.dtypes.items()
                }
                for name, frame in frames.items()
            }
            about = {"kind": self.kind, "parameters": self.parameters, "columns": types}
            (aside / "result.json").write_text(json.dumps(about, indent=1))
            if folder.exists():
                old = aside.with_name(aside.name + "-old")
                folder.rename(old)
                aside.rename(folder)
                shutil.rmtree(old)
            else:
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Result":
        """Read what `save` wrote."""
        folder = Path(folder)
        if not (folder / "result.json").exists():
            raise ValueError(f"{folder} holds no saved result (no result.json)")
        about = json.loads((folder / "result.json").read_text())
        frames = {}
        for name, types in about["columns"].items():
            plain = {column: "str" if kind == "list" else kind for column, kind in types.items()}
            path = folder / f"{name}.csv.gz"
            frame = pd.read_csv(path, dtype=plain, keep_default_na=False, na_values=[""]) if types else pd.DataFrame()
            lists = {column: frame[column].map(json.loads) for column, kind in types.items() if kind == "list"}
            frames[name] = frame.assign(**lists)
        return cls(about["kind"], frames.pop("table"), frames.pop("summary"), about["parameters"], frames)


def _list_columns(frame: pd.DataFrame) -> list[str]:
    """Columns that hold lists (aliases, say): a text file keeps them as JSON."""
    return [column for column in frame if len(frame) and isinstance(frame[column].iloc[0], list)]


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
    folder = cache_folder() / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print(f"Nothing is kept: {folder} cannot be written ({error.strerror}). LAB_CACHE names another folder.")
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
    if executor is not None and not isinstance(executor, Executor):
        raise ValueError(
            f"executor is a {type(executor).__name__}: give a concurrent.futures.Executor (ProcessPoolExecutor(2), or "
            "client.get_executor() of a Dask client), or None to run here"
        )


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
    with tqdm(total=len(shards), desc=describe, disable=hidden, leave=False) as bar:
        if executor is None:
            for i, shard in enumerate(shards):
                results[i] = _finished(work, shard, folder)
                bar.update()
        else:
            if isinstance(executor, ThreadPoolExecutor):
                running = {executor.submit(in_turn, shard): i for i, shard in enumerate(shards)}
            else:
                running = {executor.submit(_finished, work, shard, folder): i for i, shard in enumerate(shards)}
            for future in as_completed(running):
                results[running[future]] = future.result()
                bar.update()
    return [results[i] for i in range(len(shards))]


def _finished(work: Callable[..., Result], shard: Mapping[str, Any], folder: Path | None) -> Result:
    """One shard's result: read when it is there, else computed and kept, by one process at a time."""
    if folder is None:
        return work(**shard)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{shard['key']}.lock"):
        if (folder / shard["key"] / "result.json").exists():
            return Result.load(folder / shard["key"])
        result = work(**shard)
        result.save(folder / shard["key"])
        return result
