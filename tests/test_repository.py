"""What holds for the repository as a whole: form, types, the direction of imports, and documents that agree."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "lab").rglob("*.py"))
LESSONS, STUDIES = (sorted((ROOT / "notebooks" / group).glob("*.py")) for group in ("lessons", "studies"))
NOTEBOOKS = LESSONS + STUDIES
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

ROOMS = {"concept_depth", "back_patching", "depth_efficiency", "transfer", "depth_budget"}
SHARED = {"datasets", "nets", "maps"}
# Which modules of ours a module may import besides the guards. Notebooks stand on top and may import all of them.
MAY_IMPORT = {
    "require": set(),
    "statistics": set(),
    "figures": set(),
    "explorers": set(),
    "cache": set(),
    "run_folders": set(),
    "jupyterlab": set(),
    "apps": {"cache", "catalogue"},
    "identity": set(),
    "catalogue": {"cache"},
    "packed": set(),
    "pack": {"builds", "catalogue", "packed"},
    "datasets": {"datasets", "cache"},
    "weights": {"catalogue"},
    "models": {"cache", "catalogue", "identity", "weights"},
    "texts": {"models"},
    "states": {"identity", "models", "texts"},
    "interventions": {"models", "texts", "states"},
    "lenses": {"models", "texts", "states"},
    "probes": {"models", "texts", "states", "statistics"},
    "runs": {"lenses", "models", "texts", "states"},
    "saved": set(),
    "shipped": {"cache", "results"},
    "results": {"cache", "identity", "models", "saved", "ROOMS"},
    "checks": {"models", "texts", "states", "interventions", "runs"},
    "maps": {"cache", "identity", "models", "texts", "states", "statistics", "results"},
    "nets": {"nets", "cache", "models", "datasets", "texts"},
    "builds": {"run_folders"},
    "pages": {"run_folders"},
    "parameters": set(),
    "__main__": {
        "apps",
        "builds",
        "cache",
        "jupyterlab",
        "pages",
        "parameters",
        "run_folders",
        "models",
        "checks",
        "shipped",
        "pack",
    },
}
CORE = {"checks", "identity", "interventions", "lenses", "models", "probes", "results", "runs", "states", "statistics"}
MAY_IMPORT["lessons"] = {"lessons", "shipped", "explorers", "figures", "texts", *CORE, *SHARED, *ROOMS}
MAY_IMPORT |= {room: {room, "texts", *CORE, *SHARED} for room in ROOMS}
# Of a room: these take tables, and import furniture alone.
DRAWN = {"figures", "merging_figures", "explorer"} | {
    f"{part}_figures" for part in ("bits", "pruning", "search", "exits", "trained")
}
TOP_LEVEL = {
    *("notebooks", "lab", "data", "tests", "environment.yml", "README.md"),
    *("pyproject.toml", "LICENSE", "CITATION.cff", "CHANGELOG.md"),
}


@pytest.mark.parametrize("command", ["ruff format --check", "ruff check", "mypy"])
def test_form_and_types(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def our_imports(path: Path) -> Iterator[str]:
    """Modules of `lab` that a file imports; "lab" for the whole package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write lab. in front"
            parts = (node.module or "").split(".")
            if parts == ["lab"]:
                yield from (alias.name for alias in node.names)
            elif parts[0] == "lab":
                yield parts[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lab":
                    yield (alias.name.split(".") + ["lab"])[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    name = path.relative_to(ROOT / "lab").parts[0].removesuffix(".py")
    if name == "__init__":
        return
    assert name in MAY_IMPORT, f"say in MAY_IMPORT what lab/{name} may import"
    may = (
        {name, "figures", "explorers"}
        if name in ROOMS and path.stem in DRAWN
        else MAY_IMPORT[name] | {"require", "at_first_use"}
    )
    wrong = set(our_imports(path)) - may
    assert not wrong, f"{path.name} imports {wrong}, and may import {may or 'nothing of ours'}"


def test_only_six_modules_touch_hooks() -> None:
    touch = re.compile(r"\.(run_with_cache|run_with_hooks|add_hook|hooks)\(|\bhooked\(")
    modules = [path for path in MODULES if path.parent.name != "lessons"]  # whose checks try a participant's own hooks
    found = {path.stem for path in modules if touch.search(path.read_text(encoding="utf-8"))}
    assert found == {"models", "states", "interventions", "runs", "effects", "checks"}


def definitions(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)}


def test_nothing_is_defined_in_two_studies() -> None:
    where = defaultdict(list)
    for path in STUDIES:
        for name in definitions(path):
            where[name].append(path.name)
    twice = {name: files for name, files in where.items() if len(files) > 1}
    assert not twice, f"move to lab/, with a test: {twice}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    judges = [node for node in public if any("exercise(" in ast.unparse(one) for one in node.decorator_list)]
    public = [node for node in public if node not in judges]  # named like what the participant writes
    assert not [node.name for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", MODULES + NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_warning_is_silenced(path: Path) -> None:
    silenced = r"""(simplefilter|filterwarnings)\(\s*(action=)?["']ignore|catch_warnings\([^)]*ignore"""
    assert not re.search(silenced, path.read_text(encoding="utf-8"))


# --- documents ------------------------------------------------------------------------------------------------------


def test_environment_names_python_and_this_package_only() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    assert environment["dependencies"] == [f"python{PROJECT['requires-python']}", "pip", {"pip": ["-e ."]}]


def test_version_is_the_same_everywhere() -> None:
    import lab

    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = [name for name in changes if name != "Unreleased"]
    assert PROJECT["version"] == changes[0] == str(citation["version"]) == lab.__version__


def test_top_level_holds_what_belongs_there() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {name.split("/")[0].strip('"') for name in files if name}
    if not names:
        pytest.skip("nothing is tracked yet")
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize("page", ["README.md", "notebooks/instructors.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    relative = [link.partition("#") for link in links if "://" not in link]
    assert relative
    for place, _, anchor in relative:
        target = (ROOT / page).parent / (place or page)
        assert target.exists(), place
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert anchor in {"", *(re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings)}, anchor


def test_minutes_agree() -> None:
    """The head of a lesson, its exercises, README's table and the schedules for instructors."""
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "notebooks/instructors.md"))
    assert len(page.split()) <= 2000 and all(f"(lessons/{path.name})" in page for path in LESSONS)
    for number, path in enumerate(LESSONS):
        text = path.read_text(encoding="utf-8")
        [(teaching, exercises)] = re.findall(r"(\d+) minutes of class, (\d+) minutes of exercises", text)
        assert sum(map(int, re.findall(r"importance, (\d+) minutes", text))) <= int(exercises), path.stem
        assert re.search(rf"lessons/{path.name}\).*\| {int(teaching) + int(exercises)} min \|", readme), path.stem
        day = re.findall(rf"esson {number}[^,;]*, {int(teaching) + int(exercises)}\b", page)
        assert day, path.stem


def test_readme_table_lists_the_notebooks() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[[\w ,-]+\]\(notebooks/(\w+/\w+\.py)\)", text, re.MULTILINE) == [
        f"{path.parent.name}/{path.name}" for path in NOTEBOOKS
    ]
    assert "@@" not in text, "a run time was not filled in"


# --- notebooks, without running them --------------------------------------------------------------------------------


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]


names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")


@names
def test_notebook_has_one_parameters_cell(path: Path) -> None:
    cells = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    assert len(cells) == 1
    for name in ("class_mode",) if path in LESSONS else ("quick", "recompute"):
        assert re.search(rf"^{name}\b.*= False", cells[0].source, re.MULTILINE)
    if path in LESSONS:  # what is seen there changes by nothing
        assert "quick" not in path.read_text(encoding="utf-8")


@names
def test_notebook_plots_within_three_code_cells(path: Path) -> None:
    lines = [line for cell in code_cells(path)[:3] for line in cell.source.splitlines()]
    assert any(re.search(r"plot|figure", line) for line in lines if not re.match(r"\s*(import|from) ", line))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_exercises_have_a_check_and_a_folded_solution(path: Path) -> None:
    cells = code_cells(path)
    exercises = [i for i, cell in enumerate(cells) if "exercise" in tags(cell)]
    solutions = [i for i, cell in enumerate(cells) if "solution" in tags(cell)]
    assert exercises, "a notebook has at least one exercise"
    for i in exercises:
        following = [tags(cell) for cell in cells[i + 1 : i + 3]]
        assert len(following) == 2 and "check" in following[0] and "solution" in following[1], cells[i].source
    assert solutions == [i + 2 for i in exercises]
    for i in solutions:
        assert cells[i].metadata.get("jupyter", {}).get("source_hidden") is True, cells[i].source


def test_nothing_outgrows_its_budget() -> None:
    done = subprocess.run([sys.executable, "tests/lab_size.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
