"""The command line: `python -m lab`. Nothing here imports torch before it is needed."""

import argparse
import asyncio
import contextlib
import datetime
import difflib
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import apps, builds, jupyterlab, pages, run_folders
from lab.builds import read
from lab.cache import cache_folder
from lab.parameters import inject, values_of

if TYPE_CHECKING:
    from nbformat import NotebookNode

PACKAGE = Path(__file__).resolve().parent
COMMANDS = ("open", "app", "run", "build", "pack", "results", "clean", "check")
EXAMPLES = """for example:
  python -m lab open                 the lessons, in JupyterLab
  python -m lab app watch            type a sentence, see a model think: an explorer on a page of its own
  python -m lab run lessons/00       a lesson without a browser: a page with its figures
  python -m lab run studies/01       a study, with the results that come with the kit

python -m lab COMMAND --help says more."""
SITE = ["index", "glossary"]  # the pages of a run beside its notebooks


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status, which is 0 only when everything ran."""
    # Waiting threads give up their core instead of spinning on it. Beside a browser or another notebook on two cores this
    # is up to four times as fast; torch reads it when it is imported, here and in the kernels.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        parser = _parser()
    except PackageNotFoundError:
        print(
            f"error: {sys.executable} has no depth-lab: use the Python of its environment, .venv/bin/python say",
            file=sys.stderr,
        )
        return 1
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        parser.print_help()
        return 0
    if given[0] not in COMMANDS and not given[0].startswith("-"):
        meant = (
            f", did you mean 'run {given[0]}'?"
            if re.match(r"\d|lessons|studies", given[0])
            else near(given[0], COMMANDS)
        )
        parser.error(f"no command {given[0]!r}{meant}; there are {', '.join(COMMANDS)}")
    options, extra = parser.parse_known_args(given)
    if extra and options.command != "open":
        parser.error(f"unknown arguments: {' '.join(extra)}")
    try:
        if os.environ.get("LAB_CACHE"):  # kernels and JupyterLab start in other folders: a relative one must not move
            os.environ["LAB_CACHE"] = str(cache_folder())
        if options.command == "open":
            return open_notebooks(options.notebooks, extra)
        if options.command == "app":
            return app(options)
        if options.command == "run":
            return run(options)
        if options.command == "build":
            return build_lessons(options)
        if options.command == "results":
            return results(options)
        if options.command == "clean":
            return clean(options.names)
        if options.command == "pack":
            from lab.pack import pack

            lessons = [script for script in scripts(None) if script.parent.name == "lessons"]
            return pack(options.folder, lessons, options.models, accept_license=options.accept_license)
        return check(options.model, accept_license=options.accept_license)
    except (ValueError, OSError) as error:  # what a user can mend; anything else is ours and keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab", description="How language models use their depth.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"depth-lab {version('depth-lab')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR", "help": "take the notebook scripts from this folder"}

    text = "build the notebooks and open JupyterLab, which gets all further arguments (--no-browser, --port=8890)"
    command = commands.add_parser("open", help=text, description=text)
    command.add_argument("--notebooks", **folder)

    text = "list the applications, or open one in the browser: an explorer on a page of its own, without code"
    command = commands.add_parser("app", help=text, description=text)
    command.add_argument("name", nargs="?", metavar="NAME", help=", ".join(apps.APPS))
    command.add_argument(
        "--port", type=int, help=f"where it is served on this machine (default {apps.PORTS[0]} or next)"
    )
    command.add_argument("--no-browser", action="store_true", help="only say where it is")

    text = "run notebooks without a browser; leaves .ipynb, .html, figures and tables in a folder"
    command = commands.add_parser("run", help=text, description=text)
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="lessons, studies, or the start of a name, such as 01; none is all"
    )
    command.add_argument("--quick", action="store_true", help="small settings, for a look or a test (-p quick=True)")
    command.add_argument("--without-solutions", action="store_true", help="leave solutions out, for participants")
    command.add_argument("-p", "--parameter", action="append", default=[], metavar="KEY=VALUE", help="set a parameter")
    command.add_argument("--out", type=Path, metavar="DIR", help="where it goes (default depth-lab-out/<today>)")
    command.add_argument(
        "--timeout", type=_seconds, metavar="S", help="seconds that a cell may take (default: no limit)"
    )
    command.add_argument("--notebooks", **folder)

    text = "build lessons for participants (no solutions), for instructors (with notes), or as a course for nbgrader"
    command = commands.add_parser("build", help=text, description=text)
    command.add_argument("names", nargs="*", metavar="LESSON", help="the start of a name, such as 01; none is all")
    command.add_argument("--for", dest="audience", required=True, choices=builds.AUDIENCES, help="who they are for")
    command.add_argument("--out", type=Path, metavar="DIR", help="where it goes (default depth-lab-<for whom>)")
    command.add_argument("--class-mode", action="store_true", help="figures wait until a prediction is made")
    command.add_argument("--notebooks", **folder)

    text = "list the full results that the studies come with, or make those of one study anew"
    command = commands.add_parser("results", help=text, description=text)
    command.add_argument("what", choices=["list", "make"])
    command.add_argument("name", nargs="?", metavar="NAME", help="a study, such as 01_concept_depth; make needs one")
    command.add_argument("--out", type=Path, metavar="DIR", help="keep them here, not in data/results")
    command.add_argument(
        "--accept-license", action="store_true", help="accept Gemma's terms: its results are made, too"
    )

    text = "list what the cache holds (models, data, finished parts of runs), with sizes and age; with names, free it"
    command = commands.add_parser("clean", help=text, description=text)
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="models, small_models, datasets, runs, or a name listed there"
    )

    text = "load a model and hold it against plain Hugging Face; prints the health table"
    command = commands.add_parser("check", help=text, description=text)
    command.add_argument("model", nargs="?", default="smollm2-135m", metavar="MODEL", help="as in lab.load")
    command.add_argument("--accept-license", action="store_true", help="accept a model's terms, if it has some (Gemma)")

    text = "make a folder, for USB sticks say, from which a class installs all of it without a network"
    command = commands.add_parser("pack", help=text, description=text)
    command.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    command.add_argument("--models", nargs="+", default=["smollm2-135m"], metavar="NAME", help="default smollm2-135m")
    command.add_argument("--accept-license", action="store_true", help="accept a model's terms, if it has some (Gemma)")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 1_000_000:  # about what the clocks below take; and not nan
        raise argparse.ArgumentTypeError(
            f"{text!r}: give seconds, above 0 and up to 1000000, or leave it out: no limit"
        )
    return seconds


def open_notebooks(folder: Path | None, arguments: list[str]) -> int:
    """Build what is missing or out of date, then open the first notebook in JupyterLab; returns the exit status."""
    if folder is None:
        folder = PACKAGE.parent / "notebooks"
        if not any(folder.rglob("*.py")):  # an installed package: leave its own files alone, work on copies
            folder = Path("depth-lab-notebooks").resolve()
            for kind in ("*.py", "*.md"):
                for ours in sorted((PACKAGE / "_notebooks").rglob(kind)):
                    mine = folder / ours.relative_to(PACKAGE / "_notebooks")
                    mine.parent.mkdir(parents=True, exist_ok=True)
                    if not mine.exists():
                        shutil.copy2(ours, mine)
    built = [] if any(folder.rglob("*.py")) else sorted(folder.glob("lessons/*.ipynb"))  # by `build`: they stay so
    built = built or [builds.build(script) for script in scripts(folder)]
    return jupyterlab.start_or_show(folder.resolve(), built[0].resolve(), arguments)


def app(options: argparse.Namespace) -> int:
    """List the applications, or serve one until it is stopped; returns the exit status."""
    if options.name is None:
        print(apps.listed())
        return 0
    return apps.serve(options.name, port=options.port, browser=not options.no_browser)


def scripts(folder: Path | None) -> list[Path]:
    """The notebook scripts of a folder and of the folders in it, or the kit's own (in a checkout, else as installed)."""
    folders = [folder] if folder is not None else [PACKAGE.parent / "notebooks", PACKAGE / "_notebooks"]
    for candidate in folders:
        if found := sorted(candidate.glob("*.py")) + sorted(candidate.glob("[a-z]*/*.py")):
            return found
    raise ValueError(f"no notebook scripts (*.py) in {' or '.join(map(str, folders))}")


def glossary() -> Path:
    """The kit's glossary (in a checkout, else as installed)."""
    places = [folder / "glossary.md" for folder in (PACKAGE.parent / "notebooks", PACKAGE / "_notebooks")]
    return next(place for place in places if place.exists())


def group_of(script: Path, folder: Path | None) -> str:
    """The folder that a script is in, inside the folder of notebooks: lessons, studies, or "" where it is in none."""
    roots = [folder.resolve()] if folder is not None else [PACKAGE.parent / "notebooks", PACKAGE / "_notebooks"]
    return "" if script.resolve().parent in roots else script.parent.name


# --- run ------------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Run the chosen notebooks one after the other. Names and parameters are checked before the first one starts."""
    groups = {script: group_of(script, options.notebooks) for script in scripts(options.notebooks)}
    chosen = choose(groups, options.names)
    values = values_of([*options.parameter, *(["quick=True"] if options.quick else [])])
    shown = builds.for_participants if options.without_solutions else lambda notebook: notebook
    notebooks = {script: inject(shown(read(script)), script.stem, values) for script in chosen}
    out = options.out or Path("depth-lab-out") / datetime.date.today().isoformat()
    failed = []
    with contextlib.ExitStack() as claims:
        for group in dict.fromkeys(["", *(groups[script] for script in chosen)]):
            names = [script.stem for script in chosen if groups[script] == group] + SITE * (not group)
            claims.enter_context(run_folders.claimed(out / group, names))
        stems = {path.stem for path in out.rglob("*.html")} | {script.stem for script in chosen}
        for script in chosen:
            name = f"{groups[script]}/{script.stem}".lstrip("/")
            error, interrupted = _run_one(notebooks[script], script, out / groups[script], name, options.timeout, stems)
            failed += [name] if error else []
            if interrupted:
                raise KeyboardInterrupt
        for name, page in pages.index(out, glossary()).items():
            made = run_folders.aside(out.resolve(), name)
            run_folders.write(made / f"{name}.html", page)
            run_folders.put(made, out.resolve(), name, whole=True)
        print(f"all pages: {out / 'index.html'}")
    if failed:
        print(f"{len(failed)} of {len(chosen)} notebooks failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run_one(
    notebook: "NotebookNode", script: Path, out: Path, name: str, timeout: float | None, stems: set[str]
) -> tuple[str, bool]:
    start = time.monotonic()
    made = run_folders.aside(out.resolve(), script.stem)
    error, interrupted = execute(notebook, script, made, timeout=timeout)
    pages.write(notebook, script.stem, made, home=f"{'../' * ('/' in name)}index.html", there=stems)
    there = run_folders.put(made, out.resolve(), script.stem, whole=not error and not interrupted)
    if error:
        error = error if sys.stderr.isatty() else re.sub(r"\x1b\[[0-9;]*m", "", error)  # no colours in a file
        print(f"\n{name} failed:\n{error}", file=sys.stderr)
    how = "interrupted" if interrupted else "FAILED" if error else "ran"
    place = out / there.relative_to(out.resolve()) / f"{script.stem}.html"
    print(f"{name}: {how}, {time.monotonic() - start:.0f} s, {place}", flush=True)
    return error, interrupted


def build_lessons(options: argparse.Namespace) -> int:
    """Build the chosen lessons for an audience, into a folder."""
    groups = {script: group_of(script, options.notebooks) for script in scripts(options.notebooks)}
    lessons = {script: group for script, group in groups.items() if group in ("lessons", "")}
    if not lessons:
        raise ValueError(
            f"no lessons in {options.notebooks}: they are scripts in a folder of the name lessons, or in none"
        )
    chosen = choose(lessons, options.names)
    out = options.out or Path(f"depth-lab-{options.audience}")
    builds.write(chosen, options.audience, out, class_mode=options.class_mode)
    print(f"{out}: {len(chosen)} lesson{'s' if len(chosen) > 1 else ''} for {options.audience}")
    return 0


def results(options: argparse.Namespace) -> int:
    """List shipped results, or make those of a study anew: its notebook is run with `recompute = True`."""
    from lab import shipped

    if options.what == "list":
        for name in shipped.names():
            about = shipped.made(name)
            seconds = "not timed" if about["seconds"] is None else f"{about['seconds']:7.0f} s"
            print(f"{name:44} {about['date']}  {seconds:>9}  {about['command']}")
        return 0
    if not options.name:
        raise ValueError("which study? For example: python -m lab results make 01_concept_depth")
    groups = {script: "studies" for script in scripts(None) if script.parent.name == "studies"}
    chosen = choose(groups, [options.name])
    if len(chosen) > 1:
        raise ValueError(f"{options.name!r} may be {' or '.join(script.stem for script in chosen)}: give one of them")
    folder = options.out or shipped.data_folder() / "results"
    with tempfile.TemporaryDirectory(prefix="depth-lab-") as scratch:
        os.environ[shipped.MAKING] = str(folder.resolve())
        os.environ[shipped.OPTIONS] = " --accept-license" if options.accept_license else ""
        arguments = ["run", f"studies/{chosen[0].stem}", "-p", "recompute=True", "--out", scratch]
        arguments += ["-p", "accept_license=True"] if options.accept_license else []
        return run(_parser().parse_args(arguments))


def clean(names: list[str]) -> int:
    """List what the cache holds, or free what is named."""
    from lab import cache

    gone, used = cache.free(names) if names else (cache.held(), [])
    for kind, words in cache.KINDS.items():
        if part := [one for one in gone if one.name.split("/")[0] == kind]:
            print(
                f"{kind}: {words}, {len(part)}, {sum(one.size for one in part) / 1e6:,.1f} MB{', freed' if names else ''}"
            )
            for one in part if kind != "runs" else []:
                print(f"    {one.name:52} {one.size / 1e6:9,.1f} MB, {_ago(one.age)}")
    for one in used:
        print(f"{one.name}: changed {_ago(one.age)}, perhaps in use; it stays. Try again later.")
    if not gone and not used:
        print("nothing")
    if not names:
        print(
            f"in {cache_folder()}; all of it can be made or fetched again. Free it with its name: python -m lab clean runs"
        )
    return 0


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def near(name: str, there: Iterable[str]) -> str:
    """ ", did you mean ...?" for a name that is nearly one of these, or nothing; the last part of a name counts, too."""
    whole: dict[str, str] = {}
    for full in there:
        group, _, last = full.rpartition("/")
        number, _, words = last.partition("_")
        parts = (full, f"{group}/{number}") if "/" in name else (full, last, words or last)
        whole |= {part: full for part in parts if ("/" in part) == ("/" in name)} or {full: full}
    found = difflib.get_close_matches(name.lower(), whole, n=1, cutoff=0.6)
    return f", did you mean {whole[found[0]]!r}?" if found else ""


def choose(groups: dict[Path, str], names: list[str]) -> list[Path]:
    """Scripts by the start of a name (01, 01_concept_depth.py), a folder (lessons) or both (lessons/01); all for no names.

    groups: the scripts, each with its folder.
    """

    def fits(script: Path, name: str) -> bool:
        *folders, start = Path(re.sub(r"\.(py|ipynb)$", "", name)).parts or ("",)
        if not start or (folders and groups[script] and folders[-1] not in (groups[script], "notebooks")):
            return False
        return start == groups[script] or script.stem.startswith(start)

    for name in names:
        if not any(fits(script, name) for script in groups):
            there = [f"{group}/{script.stem}".lstrip("/") for script, group in groups.items()]
            raise ValueError(
                f"no notebook {name!r}{near(name, [*there, *set(groups.values())])}; there are {', '.join(there)}"
            )
    return [script for script in groups if not names or any(fits(script, name) for name in names)]


def execute(notebook: "NotebookNode", script: Path, out: Path, *, timeout: float | None) -> tuple[str, bool]:
    """Run a notebook in a fresh kernel of this Python.

    The kernel finds a folder for its tables, `out/<name>`, in the environment variable LAB_OUT. Returned: number, source
    and traceback of the cell that failed, empty when all ran; and whether it was interrupted.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, DeadKernelError
    from tqdm import tqdm

    tables, error, interrupted = out / script.stem, "", False
    tables.mkdir(exist_ok=True)
    environment = {**os.environ, "LAB_OUT": str(tables)}
    environment.pop("MPLBACKEND", None)  # a backend chosen for scripts would keep figures out of the notebook
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    at = {"cell": 0}
    with tqdm(total=len(cells), desc=script.stem, unit="cell") as bar:
        client = NotebookClient(
            notebook,
            timeout=None if timeout is None else max(1, round(timeout)),
            resources={"metadata": {"path": str(script.parent)}},
            on_cell_execute=lambda cell, cell_index: at.update(cell=cell_index),
            on_cell_executed=lambda cell, cell_index, execute_reply: bar.update(),
        )
        _use_this_python(client.create_kernel_manager())
        try:
            client.execute(env=environment)
        except (CellControlSignal, DeadKernelError) as stopped:
            number = sum(cell.cell_type == "code" for cell in notebook.cells[: at["cell"] + 1])
            error = f"code cell {number}: {stopped}"
        # Ctrl-C: while a kernel starts it is the second, and where it took away the kernel nbclient 0.11 ends in the third.
        except (KeyboardInterrupt, asyncio.CancelledError, AssertionError):
            interrupted = True
    if not any(tables.iterdir()):
        tables.rmdir()
    return error, interrupted


def _use_this_python(manager: Any) -> None:
    """Let a kernel manager know one kernel only, this very Python, whatever else is registered on the machine."""
    import zmq
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    class ThisPython(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(**get_kernel_dict())

    manager.kernel_spec_manager = ThisPython()
    if manager.has_trait("transport_encryption") and zmq.has("curve"):  # else the kernel warns that others can listen
        manager.transport_encryption = "auto"


def check(name: str, *, accept_license: bool) -> int:
    """Print a model's facts and its health table; 0 when all of it is ok."""
    from lab.checks import check as health
    from lab.models import facts, load

    model = load(name, accept_license=accept_license)
    for key, value in facts(model).items():
        print(f"{key:16} {', '.join(value) if isinstance(value, list) else value}")
    table = health(model)
    print(f"\n{table.to_string(index=False, float_format='{:.2g}'.format, na_rep='-')}")
    print("\nAll ok." if table.ok.all() else f"\n{(~table.ok).sum()} of {len(table)} checks are not ok.")
    return 0 if table.ok.all() else 1


if __name__ == "__main__":
    raise SystemExit(main())
