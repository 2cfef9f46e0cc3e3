"""What an experiment returns: tidy tables with their parameters, saved and loaded without a model; and finished shards."""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from lab import depth_plots, merging_plots, plots, transfer_plots
from lab.cache import locked, writable


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
        for module in (plots, depth_plots, transfer_plots, merging_plots):
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


def fingerprint(parameters: Mapping[str, Any]) -> str:
    """Hash of parameters, package versions and this package's own source: the name under which a finished shard is kept."""
    digest = hashlib.sha256(json.dumps([versions(), parameters], sort_keys=True, default=str).encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


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
        work: called as `work(**shard)`; with an executor it and the shard must be picklable.
        shards: keyword arguments; each holds `key`, the shard's fingerprint.
        folder: where finished shards are kept, one folder each; None keeps nothing.
        executor: anything with the interface of `concurrent.futures` (a process pool, a Dask client); None runs here.
    """
    there = 0 if folder is None else sum((folder / shard["key"] / "result.json").exists() for shard in shards)
    if there and progress:
        print(f"{there} of {len(shards)} {describe} read from {folder}; resume=False computes them again.")
    hidden = not progress or len(shards) - there < 2
    results: dict[int, Result] = {}
    with tqdm(total=len(shards), desc=describe, disable=hidden, leave=False) as bar:
        if executor is None:
            for i, shard in enumerate(shards):
                results[i] = _finished(work, shard, folder)
                bar.update()
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
    with locked(writable(folder) / f"{shard['key']}.lock", "computing the same part"):
        if (folder / shard["key"] / "result.json").exists():
            return Result.load(folder / shard["key"])
        result = work(**shard)
        result.save(folder / shard["key"])
        return result
