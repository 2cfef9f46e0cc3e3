"""Builds of a lesson from its one script: for participants, for instructors, and as a course for nbgrader.

Tags say what a cell is. One tagged "instructor" stands in the instructors' build alone; "exit" besides marks the expected
answer to the exit question, which a course for nbgrader needs, too.
"""

import ast
import datetime
import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import run_folders

if TYPE_CHECKING:
    from nbformat import NotebookNode

KERNELSPEC = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
EXIT_POINTS = 2
CONFIG = """\
# What these lessons need. In a course that has a file of this name already, add the lines below to it.
c = get_config()
# What stands in the place of a solution. Code with ... left in it counts as unanswered, and the lesson goes on.
c.ClearSolutions.code_stub = {"python": "...  # your code here"}
c.Execute.timeout = 600  # seconds that a cell may take; nbgrader's own 30 are too few
"""


def read(script: Path, *, instructor: bool = False) -> "NotebookNode":
    """A percent script as a notebook, without the cells for instructors unless these are asked for."""
    import jupytext

    notebook = jupytext.read(script)
    notebook.metadata.pop("jupytext", None)  # not paired: what a student saves stays out of the script
    notebook.metadata.setdefault("kernelspec", KERNELSPEC)
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place}"  # else drawn at random: two builds of one script would differ
    notebook.cells = [cell for cell in notebook.cells if instructor or "instructor" not in _tags(cell)]
    return notebook


def build(script: Path) -> Path:
    """The .ipynb of a script; an .ipynb that was saved later than its script holds someone's work and stays.

    A built notebook gets the time stamp of its script, so that "saved later" means "saved by a user". One that is older
    than its script is kept under another name before the new one takes its place.
    """
    import nbformat

    notebook, written = script.with_suffix(".ipynb"), script.stat().st_mtime
    if notebook.exists():
        saved = notebook.stat().st_mtime
        if saved > written:
            print(f"{notebook.name}: saved after its script was written; it stays as it is. Delete it to start over.")
        if saved >= written:
            return notebook
        day = datetime.datetime.fromtimestamp(saved).strftime("%Y-%m-%d-%H%M%S")
        kept = notebook.with_name(f"{script.stem}.{day}.ipynb")
        notebook.rename(kept)
        print(f"{notebook.name}: the script is newer; built again. The notebook of before is {kept.name}.")
    run_folders.write(notebook, nbformat.writes(read(script)) + "\n")
    os.utime(notebook, (written, written))
    return notebook


def write(scripts: Sequence[Path], audience: str, out: Path, *, class_mode: bool = False) -> None:
    """Build lessons into a folder; a file there that differs and that no build left so is named, and nothing is written.

    audience: participants or instructors (lessons/NAME.ipynb), or nbgrader (source/NAME/NAME.ipynb and its settings); each
    with the glossary where the links lead. class_mode: figures wait until a prediction is made.

    Raises:
        ValueError: a file of somebody else's is in the way, or a lesson has an exercise without its check or solution.
    """
    run_folders.put_files(out, files(scripts, audience, class_mode=class_mode))


def files(scripts: Sequence[Path], audience: str, *, class_mode: bool = False) -> dict[str, str]:
    """The texts of a build by their places in its folder."""
    import nbformat

    course = audience == "nbgrader"
    made = {"nbgrader_config.py": CONFIG} if course else {}
    for script in scripts:
        folder = f"source/{script.stem}" if course else "lessons"
        pages = {one.name: f"../{one.stem}/{one.stem}.ipynb" if course else f"{one.stem}.ipynb" for one in scripts}
        glossary = script.parent.parent / "glossary.md"
        if glossary.exists():
            pages["../glossary.md"] = "glossary.md" if course else "../glossary.md"
            made[f"{folder}/glossary.md" if course else "glossary.md"] = glossary.read_text(encoding="utf-8")
        notebook = read(script, instructor=True)
        try:
            _require_whole(notebook)
            notebook = AUDIENCES[audience](notebook)
        except ValueError as error:
            raise ValueError(f"{script.name}: {error}") from error
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = linked(cell.source, pages)
            elif class_mode and "parameters" in _tags(cell):
                cell.source = cell.source.replace("class_mode = False", "class_mode = True")
        made[f"{folder}/{script.stem}.ipynb"] = nbformat.writes(notebook) + "\n"
    return made


def _tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def _require_whole(notebook: "NotebookNode") -> None:
    numbers = {mark: sum(mark in _tags(cell) for cell in notebook.cells) for mark in ("exercise", "check", "solution")}
    if len(set(numbers.values())) > 1:
        said = ", ".join(f"{number} tagged {mark}" for mark, number in numbers.items())
        raise ValueError(f"{said}: each exercise needs a cell of each kind, in this order")


def linked(text: str, pages: dict[str, str]) -> str:
    """A text whose links to pages of the kit lead to where these are in the build; of a page that is not there, its words."""

    def moved(found: re.Match) -> str:
        words, page, anchor = found.groups(default="")
        return f"[{words}]({pages[page]}{anchor})" if page in pages else words

    return re.sub(r"\[([^\]]+)\]\(([\w./-]+\.(?:py|md))(#[^)]*)?\)", moved, text)


def for_participants(notebook: "NotebookNode") -> "NotebookNode":
    """Without solutions and without what is said to instructors."""
    notebook.cells = [cell for cell in notebook.cells if not {"solution", "instructor"} & {*_tags(cell)}]
    return notebook


def for_instructors(notebook: "NotebookNode") -> "NotebookNode":
    """With everything, and the solutions unfolded."""
    for cell in notebook.cells:
        if "solution" in _tags(cell):
            cell.source = cell.source.replace("<details>", "<details open>")
    return notebook


def for_nbgrader(notebook: "NotebookNode") -> "NotebookNode":
    """The source of an assignment, as `nbgrader generate_assignment` takes it.

    Solutions stand in their exercises, between nbgrader's marks. Behind each check is a cell with as many points as the
    exercise has dots of difficulty, and in it a hidden test: what students run never stops. All other code is read-only.
    """
    from nbformat.v4 import new_code_cell

    answers = iter([solution(cell) for cell in notebook.cells if "solution" in _tags(cell)])
    cells, points = [], 1
    for cell in notebook.cells:
        marks = _tags(cell)
        if stated := re.search(r"^(●+)○* difficulty", cell.source, re.MULTILINE):
            points = len(stated[1])
        if "solution" in marks or ("instructor" in marks and "exit" not in marks):
            continue
        cells.append(cell)
        if "exit" in marks:
            _about(cell, "exit-question", solution=True, grade=True, points=EXIT_POINTS)
        elif "exercise" in marks:
            answer = next(answers)
            cell.source = marked(cell.source, answer)
            _about(cell, f"{_name(answer)}-answer", solution=True)
        elif cell.cell_type == "code":
            _about(cell, cell["id"], locked=True)
        if "check" in marks:
            name = _name(cell.source)
            hidden = f'assert lessons.right("{name}"), "{name} is not right; its check, above, says why"'
            said = f"# {name}: {points} point{'s' if points > 1 else ''}"
            test = f"{said}\n### BEGIN HIDDEN TESTS\n{hidden}\n### END HIDDEN TESTS"
            cells.append(new_code_cell(test, id=f"{cell['id']}-points"))
            # Not the check itself: nbgrader gives no points where anything was written to stderr, a warning for example.
            _about(cells[-1], f"{name}-points", grade=True, locked=True, points=points)
    notebook.cells = cells
    return notebook


AUDIENCES: dict[str, Callable[["NotebookNode"], "NotebookNode"]] = {
    "participants": for_participants,
    "instructors": for_instructors,
    "nbgrader": for_nbgrader,
}


def _about(cell: Any, grade_id: str, **roles: Any) -> None:
    kinds = {"grade": False, "locked": False, "solution": False, "task": False}
    cell.metadata["nbgrader"] = {"schema_version": 3, "grade_id": grade_id, **kinds, **roles}


def _name(source: str) -> str:
    """What a cell defines: a function, or a value."""
    found = re.search(r"^(?:def )?(\w+)(?=\(| = )", source, re.MULTILINE)
    if not found:
        raise ValueError(f"no “def name(...)” and no “name = ...” in this cell:\n{source}")
    return found[1]


def solution(cell: Any) -> str:
    """The code of a folded solution: a function in a fence, or the answer to a question, such as `why = "b"`."""
    found = re.search(r"^```python\n(.*?)\n```|^`(\w+ = [^`]+)`", cell.source, re.DOTALL | re.MULTILINE)
    if not found:
        raise ValueError(f"no code in this solution (a ```python fence, or `name = ...`):\n{cell.source}")
    return found[1] or found[2]


def marked(exercise: str, answer: str) -> str:
    """An exercise with the lines of its solution in its gaps, between marks. A gap is a line of code with "..." in it.

    Raises:
        ValueError: the solution is another than the exercise with its gaps filled; a docstring may be missing.
    """
    if question := re.fullmatch(r"(\w+ = )\.\.\.(.*)", exercise):
        value = answer.partition(" = ")[2]
        return f"{question[1]}({question[2]}\n    {BEGIN}\n    {value}\n    {END}\n)"
    dots = [node for node in ast.walk(ast.parse(exercise)) if isinstance(node, ast.Constant) and node.value is ...]
    gaps = {node.lineno - 1 for node in dots}
    given, full = exercise.splitlines(), answer.splitlines()
    code, wanted = ([line.split("  #")[0].rstrip() for line in lines] for lines in (given, full))
    made: list[str] = []
    for _, i, j, k, m in difflib.SequenceMatcher(None, code, wanted, autojunk=False).get_opcodes():
        for place in range(i, j):
            if place not in gaps:
                made.append(given[place])
            elif given[place].strip() != "...":  # what it is for stays to be read
                made.append(re.sub(r"^( *)(\.\.\.  # )?", r"\1# ", given[place]))
        if here := gaps & {*range(i, j)}:
            line = given[min(here)]
            indent = line[: len(line) - len(line.lstrip())]
            made += [f"{indent}{BEGIN}", *full[k:m], f"{indent}{END}"]
    if _tree("\n".join(made)) != _tree(answer) or _tree(answer) is None:
        raise ValueError(f"a solution must be its exercise with the gaps filled, and this is another:\n{answer}")
    return "\n".join(made)


def _tree(code: str) -> str | None:
    """What some code does: without comments, docstrings and form; None for what is no Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)
