"""The three builds of a lesson: what each leaves out, where its links lead, what it never touches, what nbgrader makes of it."""

import ast
import functools
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import lesson_size
import nbformat
import pytest
from nbgrader.nbgraderformat.v3 import MetadataValidatorV3

from lab import builds, run_folders
from lab.__main__ import execute, main

ROOT = Path(__file__).resolve().parents[2]
LESSONS = lesson_size.LESSONS
each_lesson = pytest.mark.parametrize("script", LESSONS, ids=lambda path: path.stem)
tags = lesson_size.tags


def tagged(script: Path, mark: str) -> list[Any]:
    return [cell for cell in builds.read(script, instructor=True).cells if mark in tags(cell)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all three builds of all lessons, each in the folder that is its default."""
    folder = tmp_path_factory.mktemp("made")
    for audience in builds.AUDIENCES:
        assert main(["build", "--for", audience, "--out", str(folder / f"depth-lab-{audience}")]) == 0
    return folder


def built(made: Path, audience: str, script: Path) -> Any:
    [path] = (made / f"depth-lab-{audience}").rglob(f"{script.stem}.ipynb")
    return nbformat.read(path, as_version=4)


# --- participants: no solution anywhere ------------------------------------------------------------------------------


@each_lesson
def test_participants_get_all_but_solutions_and_notes(made: Path, script: Path) -> None:
    cells = built(made, "participants", script).cells
    plain = [cell.source for cell in builds.read(script).cells if "solution" not in tags(cell)]
    linked = re.compile(r"\]\([\w./-]+\.(py|ipynb)\)|\[study\]\([^)]*\)|study")
    assert [linked.sub("", cell.source) for cell in cells] == [linked.sub("", text) for text in plain]
    for mark in ("exercise", "hint", "check", "prediction", "parameters"):
        assert sum(mark in tags(cell) for cell in cells) == len(tagged(script, mark)), mark
    assert not [cell for cell in cells if cell.get("outputs")]
    assert len({cell["id"] for cell in cells}) == len(cells)


@functools.cache
def bare(text: str) -> str:
    """A text without what may differ between two ways to write a line of code."""
    return re.sub(r"[^\S\n]+|[()]", "", text.replace("'", '"'))


@functools.cache
def statements(code: str) -> set[str]:
    """The statements of some code, of compound ones the head."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    return {bare(ast.unparse(node).split("\n")[0]) for node in nodes}


@functools.cache
def secrets(script: Path) -> set[str]:
    """What solutions say and exercises and hints do not: all statements but those such as `return new`."""
    found = set()
    cells = builds.read(script).cells
    for at, cell in enumerate(cells):
        if "exercise" in tags(cell):
            after = cells[at + 1 :]
            answer = builds.solution(next(one for one in after if "solution" in tags(one)))
            known = cell.source + (after[0].source if "hint" in tags(after[0]) else "")
            found |= {one for one in statements(answer) - statements(cell.source) if one not in bare(known)}
    return {one for one in found if not re.fullmatch(r"return\w+", one)}


def leaks(text: str, script: Path) -> set[str]:
    """Statements of a lesson's solutions in a text or in code. Where `a=b` goes on (`a=b+1`) it is another statement."""
    hidden, shown = secrets(script), bare(text)
    found = {one for one in hidden if re.search(rf"{re.escape(one)}(?![\w,\[+*/<>=-])", shown)}
    try:  # written over several lines, perhaps
        return found | (hidden & statements(text))
    except SyntaxError:
        return found


def text_of(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells)


def leaks_of(notebook: Any, script: Path) -> set[str]:
    return set().union(*(leaks(cell.source, script) for cell in notebook.cells))


@each_lesson
def test_no_solution_leaks(made: Path, script: Path) -> None:
    assert not leaks_of(built(made, "participants", script), script)
    assert leaks_of(built(made, "instructors", script), script) == secrets(script), "they need them"
    for name, text in said_in_lab().items():
        assert not leaks(text, script), name


@functools.cache
def said_in_lab() -> dict[str, str]:
    """Of the checks and all that is beside them the source, of other modules what `help` shows."""
    found = {}
    for path in (ROOT / "lab").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "lessons":
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
            text = "\n".join(ast.get_docstring(node) or "" for node in nodes)
        found[str(path.relative_to(ROOT))] = text
    return found


@each_lesson
def test_a_planted_leak_is_found(script: Path) -> None:
    for answer in (builds.solution(cell) for cell in tagged(script, "solution")):
        told = [line.strip() for line in answer.splitlines() if bare(line) in secrets(script)]
        assert told and leaks(answer, script), answer
        for line in told:
            line = line.replace('"', "'").replace(", ", " ,  ")
            assert leaks(f"Your hook returns nothing. Try “{line}”.", script), line
            assert leaks(f"<details>\n`{line}`. Or else", script), line


def test_a_planted_leak_in_other_lines_is_found() -> None:
    code = "def f(groups):\n    return np.isin(\n        groups,\n        names[: int(0.4 * len(names))],\n    )"
    assert leaks(code, LESSONS[1]) and not leaks(code.replace("0.4", "0.5"), LESSONS[1])


# --- instructors -----------------------------------------------------------------------------------------------------


@each_lesson
def test_instructors_get_everything_and_a_note_for_each_exercise(made: Path, script: Path) -> None:
    cells = built(made, "instructors", script).cells
    assert len(cells) == len(builds.read(script, instructor=True).cells)
    assert tags(cells[1]) == ["instructor"] and "the plan" in cells[1].source
    at = [place for place, cell in enumerate(cells) if "solution" in tags(cell)]
    assert all("<details open>" in cells[place].source for place in at)
    asked = re.findall(r"### (Exercise \d).*?(\d+ minutes), ", text_of(builds.read(script)), re.DOTALL)
    for note, (exercise, minutes) in zip((cells[place + 1] for place in at), asked, strict=True):
        assert tags(note) == ["instructor"], note.source
        assert f"{exercise.lower()}, {minutes}.**" in note.source and len(note.source.splitlines()) <= 5
        assert "**Wrong:**" in note.source and re.search(r"\*\*Expect:\*\*.*(\d|[abc]\.)", note.source), note.source
    assert sum("exit" in tags(cell) for cell in cells) == 1 and "exit" in tags(cells[-1])


@each_lesson
def test_lessons_as_they_are_opened_and_run_have_no_notes(script: Path) -> None:
    assert tagged(script, "instructor")
    assert not [cell for cell in builds.read(script).cells if "instructor" in tags(cell)]


# --- nbgrader --------------------------------------------------------------------------------------------------------

REGION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION", re.DOTALL | re.MULTILINE)


def without_docstrings(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


@each_lesson
def test_the_source_of_an_assignment(made: Path, script: Path) -> None:
    notebook = built(made, "nbgrader", script)
    MetadataValidatorV3().validate_nb(notebook)
    about = [(cell, cell.metadata["nbgrader"]) for cell in notebook.cells if "nbgrader" in cell.metadata]
    assert len({one["grade_id"] for _, one in about}) == len(about)
    asked = [(cell, one) for cell, one in about if one["solution"] and not one["grade"]]
    answers = [builds.solution(cell) for cell in tagged(script, "solution")]
    assert [without_docstrings(cell.source) for cell, _ in asked] == [without_docstrings(answer) for answer in answers]
    tests = [(cell, one) for cell, one in about if one["grade"] and one["locked"]]
    dots = [text.count("●") for text in re.findall(r"([●○]+) difficulty", script.read_text(encoding="utf-8"))]
    assert [one["points"] for _, one in tests] == dots
    assert [f'lessons.right("{re.split("[ (]", answer.removeprefix("def "))[0]}")' for answer in answers] == [
        re.search(r"lessons\.right\(.*?\)", cell.source)[0]
        for cell, _ in tests  # type: ignore[index]
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if not cell.metadata["nbgrader"]["locked"] and "exercise" not in tags(cell)]
    handed_out = "\n".join(REGION.sub(r"\1...", cell.source) for cell in notebook.cells if "exit" not in tags(cell))
    assert not leaks(handed_out, script) and "BEGIN SOLUTION" not in handed_out
    for cell, _ in asked:
        ast.parse(REGION.sub(r"\1...", cell.source))


def test_a_solution_fills_gaps_and_changes_nothing_else() -> None:
    exercise = (
        'def f(x):\n    """Sum, then 1, 2, ..."""\n    y = ...  # the sum\n    for i in x:\n        ...\n    return y\n'
    )
    answer = "def f(x):\n    y = sum(x)\n    for i in x:\n        y += 1\n        y += 2\n    return y"
    assert builds.marked(exercise, answer).splitlines() == [
        "def f(x):",
        '    """Sum, then 1, 2, ..."""',
        "    # y = ...  # the sum",
        "    ### BEGIN SOLUTION",
        "    y = sum(x)",
        "    ### END SOLUTION",
        "    for i in x:",
        "        ### BEGIN SOLUTION",
        "        y += 1",
        "        y += 2",
        "        ### END SOLUTION",
        "    return y",
    ]
    with pytest.raises(ValueError, match="with the gaps filled"):
        builds.marked(exercise, answer.replace("return y", "return -y"))


# --- files -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    names = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names}


@pytest.mark.parametrize("audience", builds.AUDIENCES)
def test_links_lead_to_what_is_in_the_build(made: Path, audience: str) -> None:
    for path in (made / f"depth-lab-{audience}").rglob("*.ipynb"):
        text = text_of(nbformat.read(path, as_version=4))
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
        assert len(links) >= 3
        for link in links:
            page, _, anchor = link.partition("#")
            assert (path.parent / page).exists(), f"{path.name}: {link}"
            assert not anchor or anchor in anchors(path.parent / page), f"{path.name}: {link}"


def test_one_lesson_links_to_no_other(tmp_path: Path) -> None:
    assert main(["build", "01", "--for", "participants", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.rglob("*.ipynb")
    text = text_of(nbformat.read(path, as_version=4))
    assert "| lesson 0: hooks, states, depth |" in text and "](../glossary.md#probe)" in text and ".py)" not in text


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(folder: Path, *names: str, audience: str = "participants") -> int:
    return main(["build", *names, "--for", audience, "--out", str(folder)])


def test_the_default_folder_and_a_second_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build", "00", "lessons/01", "--for", "participants"]) == 0
    assert capsys.readouterr().out == "depth-lab-participants: 2 lessons for participants\n"
    before = contents(tmp_path)
    assert main(["build", "00", "--for", "participants"]) == 0 and contents(tmp_path) == before


@pytest.mark.parametrize("place", ["glossary.md", "lessons/01_concept_depth.ipynb", "lessons"])
def test_what_no_build_left_is_named_and_nothing_is_written(tmp_path: Path, place: str, capsys) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    before = contents(tmp_path)
    assert build(tmp_path) == 1 and contents(tmp_path) == before
    said = capsys.readouterr().err
    assert f"that no build left so ({place}" in said and "nothing of yours is written over: move" in said


def test_a_built_notebook_that_was_worked_in_stays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert build(tmp_path) == 0
    notebook = tmp_path / "lessons" / "02_back_patching.ipynb"
    notebook.write_text(notebook.read_text(encoding="utf-8").replace("Lesson 2", "My lesson 2"), encoding="utf-8")
    before = contents(tmp_path)
    assert build(tmp_path) == 1 and contents(tmp_path) == before
    assert "(lessons/02_back_patching.ipynb)" in capsys.readouterr().err
    assert build(tmp_path, "01") == 0, "this one is as it was built"


def test_a_build_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    run_folders.put_files(tmp_path, {"lessons/a.ipynb": "old", "glossary.md": "same"})
    run_folders.put_files(tmp_path, {"lessons/a.ipynb": "new", "glossary.md": "same"})
    assert (tmp_path / "lessons" / "a.ipynb").read_text() == "new"
    run_folders.put_files(tmp_path, {"lessons/b.ipynb": "more"})
    run_folders.put_files(tmp_path, {"lessons/a.ipynb": "newer"})
    assert (tmp_path / "lessons" / "a.ipynb").read_text() == "newer"


@pytest.mark.parametrize("place", ["lessons", "glossary.md"])
def test_links_are_not_followed(tmp_path: Path, place: str, capsys: pytest.CaptureFixture) -> None:
    out, far = tmp_path / "out", tmp_path / "far"
    out.mkdir(), far.mkdir()
    (out / place).symlink_to(far)
    assert build(out) == 1 and list(far.iterdir()) == [] and f"({place}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["07", "--for", "nbgrader"], "no notebook '07'; there are lessons/00_watch_a_model_think,"),
        (["studies", "--for", "nbgrader"], "no notebook 'studies'; there are lessons/"),
        (["--for", "nbgrader", "--notebooks", str(ROOT / "data")], "no lessons in"),
    ],
)
def test_a_mistake_is_told(tmp_path: Path, arguments: list[str], said: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build", *arguments]) == 1
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("# %% tags=[\"check\"]\nkeep", "# %%\nkeep"), "4 tagged exercise, 3 tagged check, 4 tagged solution: each"),
        (("#         states[depth] = state[0]\n#\n#     return hook_fn", "#         return 3"), "with the gaps filled"),
        (("# `why_repeated = \"b\"`.", "# The second."), "no code in this solution"),
    ],
)  # fmt: skip
def test_a_lesson_that_cannot_be_built_is_named(tmp_path: Path, change: tuple[str, str], said: str, capsys) -> None:
    text = LESSONS[0].read_text(encoding="utf-8")
    assert change[0] in text
    (tmp_path / "own.py").write_text(text.replace(*change), encoding="utf-8")
    out = tmp_path / "out"
    assert main(["build", "--for", "nbgrader", "--notebooks", str(tmp_path), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "own.py: " in error and said in error and not out.exists()


# --- run -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each_lesson
def test_an_untouched_build_runs_from_top_to_bottom(made: Path, tmp_path: Path, script: Path) -> None:
    path = made / "depth-lab-participants" / "lessons" / f"{script.stem}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    error, _ = execute(notebook, path, tmp_path, timeout=None)
    assert not error
    for cell in notebook.cells:
        if "check" in tags(cell):
            said = "".join(output.get("text", "") for output in cell.outputs)
            assert "no answer yet. The lesson goes on with the kit's own." in said, cell.source


def nbgrader(course: Path, command: str, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", command, name], cwd=course, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def scores(course: Path) -> dict[tuple[str, str], tuple[float | None, bool]]:
    """Of each student and graded cell: points that nbgrader gave, and whether a person has to look."""
    with sqlite3.connect(course / "gradebook.db") as book:
        rows = book.execute(
            "select s.student_id, b.name, g.auto_score, g.needs_manual_grade from grade g "
            "join base_cell b on b.id = g.cell_id join submitted_notebook n on n.id = g.notebook_id "
            "join submitted_assignment s on s.id = n.assignment_id"
        ).fetchall()
    return {(student, cell): (score, bool(manual)) for student, cell, score, manual in rows}


@pytest.mark.slow
@each_lesson
def test_nbgrader_gives_nothing_for_nothing_and_all_for_the_solutions(made: Path, tmp_path: Path, script: Path) -> None:
    course, name = tmp_path / "course", script.stem
    shutil.copytree(made / "depth-lab-nbgrader", course)
    nbgrader(course, "generate_assignment", name)
    handed_out = nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)
    assert not leaks_of(handed_out, script)
    assert not re.search("(BEGIN|END) (SOLUTION|HIDDEN)|lessons.right", text_of(handed_out))
    source = {cell["id"]: cell.source for cell in built(made, "nbgrader", script).cells}
    students = {"untouched": 0, "all": 99}  # how many answers are given; each student takes as long as the lesson
    if script == LESSONS[0]:
        students["one"] = 1
    for student, solved in students.items():
        notebook = json.loads(json.dumps(handed_out))
        answers = [cell for cell in notebook["cells"] if cell["metadata"].get("nbgrader", {}).get("solution")]
        for cell in answers[:solved]:
            cell["source"] = source[cell["id"]]
        folder = course / "submitted" / student / name
        shutil.copytree(course / "release" / name, folder)
        nbformat.write(nbformat.from_dict(notebook), folder / f"{name}.ipynb")
    nbgrader(course, "autograde", name)
    nbgrader(course, "generate_feedback", name)
    tests = [cell for cell in handed_out.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    points = {cell.metadata["nbgrader"]["grade_id"]: cell.metadata["nbgrader"]["points"] for cell in tests}
    found, first = scores(course), tests[0].metadata["nbgrader"]["grade_id"]
    for cell, most in points.items():
        assert found["untouched", cell] == (0, False), cell
        if "one" in students:
            assert found["one", cell] == (most if cell == first else 0, False), cell
        assert found["all", cell] == ((None, True) if cell == "exit-question" else (most, False)), cell
    for student in students:
        ran = nbformat.read(course / "autograded" / student / name / f"{name}.ipynb", as_version=4)
        failed = {cell["id"] for cell in ran.cells for one in cell.get("outputs", []) if one.output_type == "error"}
        assert all(cell.endswith("-points") for cell in failed), "what students see never stops"
        assert (course / "feedback" / student / name / f"{name}.html").stat().st_size > 10_000


def test_class_mode_is_set_where_it_is_asked_for() -> None:
    for audience in builds.AUDIENCES:
        for waits in (False, True):
            made = builds.files(LESSONS, audience, class_mode=waits)
            pages = [text for name, text in made.items() if name.endswith(".ipynb")]
            assert len(pages) == len(LESSONS) and all(f"class_mode = {waits}" in text for text in pages)
