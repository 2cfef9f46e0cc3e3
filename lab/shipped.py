"""Full results of the studies, kept in data/results: read in a moment, made anew by the very cells that show them.

`python -m lab results make NAME` runs a study with `recompute = True` and keeps what it asks for under data/results/NAME.
"""

import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lab.cache import data_folder
from lab.results import Result, versions

MADE = "made.json"  # beside each result: how it was made, with the checksums of its files
MAKING = "LAB_RESULTS"  # the environment variable in which `results make` names the folder to keep results in
OPTIONS = "LAB_RESULTS_OPTIONS"  # and the one that names the options it was given, for the record


def names() -> list[str]:
    """The results that come with the kit, as "study/result"."""
    root = data_folder() / "results"
    return sorted(path.parent.relative_to(root).as_posix() for path in root.rglob(MADE))


def shipped(name: str) -> Result:
    """A result that comes with the kit, by its name "study/result"; `made(name)` says how it was made.

    Raises:
        ValueError: there is none of that name, or its files are not those that were made.
    """
    if name not in names():
        raise ValueError(f"no shipped result {name!r}; there are {', '.join(names()) or 'none'}")
    folder = data_folder() / "results" / name
    if checksums(folder) != made(name)["files"]:
        raise ValueError(
            f"the files of the shipped result {name!r} are not those that were made: install the kit again"
        )
    return Result.load(folder)


def made(name: str) -> dict[str, Any]:
    """How a shipped result was made: parameters of the study, versions, date, command, seconds, checksums."""
    return json.loads((data_folder() / "results" / name / MADE).read_text(encoding="utf-8"))


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of a result's files."""
    files = sorted(path for path in folder.iterdir() if path.name != MADE)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Results:
    """The results of one study: those that come with the kit, or measured anew.

        results = Results("01_concept_depth", recompute=recompute, quick=quick, model_name=model_name, seed=seed)
        cities = results("cities", lambda: accuracy.run(model, "cities", seed=seed))

    With `recompute`, with `quick` and with other parameters than those of the shipped result, the call is made.
    """

    def __init__(self, study: str, *, recompute: bool = False, quick: bool = False, **parameters: Any) -> None:
        self.study, self.recompute, self.quick, self.parameters = study, recompute, quick, parameters
        hooks = [hook for hook in plt.rcParams["figure.hooks"] if hook != f"{__name__}:mark"]
        plt.rcParams["figure.hooks"] = [*hooks, f"{__name__}:mark"] if quick else hooks

    def __call__(self, name: str, make: Callable[[], Result | pd.DataFrame]) -> Result:
        """A result; a table that `make` gives is a result of the kind "table"."""
        place = f"{self.study}/{name}"
        if not (self.quick or self.recompute) and place in names():
            about = made(place)
            if about["parameters"] == self.parameters:
                took = "" if about["seconds"] is None else f" in {about['seconds']:.0f} s"  # None: parts had been kept
                print(f"{name}: made {about['date']}{took}; recompute = True measures it anew.")
                return shipped(place)
            print(f"{name}: the shipped result is for {about['parameters']}; measured anew.")
        begun = time.monotonic()
        found = make()
        if isinstance(found, pd.DataFrame):
            found = Result("table", found, found.iloc[:0], {})
        if os.environ.get(MAKING) and not self.quick:
            self._keep(found, Path(os.environ[MAKING]) / place, time.monotonic() - begun)
        return found

    def judged(self, table: pd.DataFrame, *columns: str) -> pd.DataFrame:
        """A table without its `columns` of verdicts (else "verdict") after a smoke test, which judges nothing."""
        return table.drop(columns=list(columns or ("verdict",))) if self.quick else table

    def _keep(self, found: Result, folder: Path, seconds: float) -> None:
        found.save(folder)
        about = {
            "parameters": self.parameters,
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
            "command": f"python -m lab results make {self.study}{os.environ.get(OPTIONS, '')}",
            "seconds": round(seconds, 1),
            "platform": sys.platform,
            "files": checksums(folder),
        }
        aside = folder / f"{MADE}.partial"
        aside.write_text(json.dumps(about, indent=1), encoding="utf-8")
        aside.replace(folder / MADE)


def mark(figure: Figure) -> None:
    """Write over a figure that its numbers come from a smoke test."""
    figure.text(0.5, 0.5, "quick = True: a smoke test,\nno result", ha="center", va="center", rotation=20,
                fontsize=26, color="#7F7F7F", alpha=0.35, zorder=100)  # fmt: skip
