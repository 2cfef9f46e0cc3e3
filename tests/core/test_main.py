"""`python -m lab`, as a user runs it: real processes, real kernels, a real JupyterLab."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from lab import jupyterlab, run_folders
from lab.__main__ import COMMANDS, open_notebooks
from lab.builds import build
from lab.parameters import _typed

ROOT = Path(__file__).resolve().parents[2]
SITE = ("index.html", "glossary.html")

GOOD = """\
# %% [markdown]
# # A notebook
# %% tags=["parameters"]
n = 3
quick = False
name = "a"
# %%
import os, sys
print(sys.executable, n, quick, name)
# %%
import matplotlib.pyplot as plt
plt.plot([1, 2, n]);
# %%
with open(os.path.join(os.environ["LAB_OUT"], "table.csv"), "w") as file:
    file.write("n")
"""
BAD = """\
# %%
print("before")
# %%
1 / 0
# %%
print("after")
"""
LONG = """\
# %%
import pathlib, time
pathlib.Path("started").touch()
# %%
time.sleep(120)
"""


def lab(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lab", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def left(out: Path) -> set[str]:
    """The files in a folder, without what every run leaves there: a record, a lock, the list of pages and the glossary."""
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".depth-lab-run.") and name not in SITE}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two notebooks, one of which fails."""
    made = tmp_path / "scripts"
    made.mkdir()
    (made / "00_good.py").write_text(GOOD)
    (made / "01_bad.py").write_text(BAD)
    return made


def test_help_names_the_commands_and_needs_no_torch(tmp_path: Path) -> None:
    done = lab("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(re.search(rf"^ +{command} ", done.stdout, re.MULTILINE) for command in ("open", "run", "build", "check"))
    code = "import sys, lab.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0, "help waits for torch"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["07"], "no notebook '07'; there are 00_good, 01_bad"),
        (["00", "07"], "no notebook '07'; there are 00_good, 01_bad"),
        (["00", "-p", "seed=1"], "00_good has no parameter 'seed'; it has n=3, quick=False, name='a'"),
        (["--quick"], "01_bad has no parameter 'quick'; it has none"),
        (["00", "-p", "quick=yes"], "quick='yes' is not True or False"),
        (["00", "-p", "n=many"], "n='many' is not a whole number (its default is 3)"),
        (["00", "-p", "n=4", "-p", "n=5"], "n is given twice, as '4' and as '5': give it once"),
        (["00", "--quick", "-p", "quick=False"], "quick is given twice"),
        (["00", "-p", "n"], "write KEY=VALUE"),
        (["00", "--fast"], "unknown arguments: --fast"),
        *[(["00", "--timeout", s], f"'{s}': give seconds, above 0") for s in ("nan", "-1", "0", "inf", "1e9", "long")],
    ],
)
def test_a_mistake_is_told_before_anything_runs(folder: Path, arguments: list[str], said: str) -> None:
    done = lab("run", *arguments, "--notebooks", folder, "--out", "out", cwd=folder.parent)
    assert done.returncode != 0
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (folder.parent / "out").exists()


def test_solutions_can_be_left_out(folder: Path) -> None:
    text = "# %% tags=['solution']\nprint('the answer')\n# %% [markdown] tags=['solution']\n# the words\n# %%\nprint('done')\n"
    (folder / "03_solved.py").write_text(text)
    for flags, there in (([], True), (["--without-solutions"], False)):
        assert lab("run", "03", *flags, "--notebooks", folder, "--out", "out", cwd=folder.parent).returncode == 0
        page = (folder.parent / "out" / "03_solved.html").read_text(encoding="utf-8")
        assert ("the answer" in page) == ("the words" in page) == there and "done" in page


def test_alone_it_says_what_one_can_do(tmp_path: Path) -> None:
    done = lab(cwd=tmp_path)
    assert done.returncode == 0 and "python -m lab run lessons/00" in done.stdout
    listed = re.search(r"commands:\n(.*)for example", done.stdout, re.S)[1]
    assert [command for command in COMMANDS if not re.search(rf"^    {command} ", listed, re.M)] == []
    assert len(re.findall(r"^    [a-z]+ ", listed, re.M)) == len(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["opne"], "no command 'opne', did you mean 'open'?"),
        (["lessons/07"], "no command 'lessons/07', did you mean 'run lessons/07'?"),
        (["run", "lesson"], "no notebook 'lesson', did you mean 'lessons'?"),
        (["run", "04a_tranfer"], "did you mean 'studies/04a_transfer'?"),
        (["run", "transfr"], "no notebook 'transfr', did you mean"),
        (["run", "lesson/00"], "did you mean 'lessons/00_watch_a_model_think'?"),
        (["run", "zebra"], "no notebook 'zebra'; there are lessons/00"),
        (["clean", "modls"], "the cache holds nothing named 'modls'"),
    ],
)
def test_names_that_are_nearly_right(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = lab(*arguments, cwd=tmp_path)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr


def test_run_leaves_notebook_page_figures_and_tables(folder: Path) -> None:
    out = folder.parent / "out"
    # A kernel of the same name that another program registered, and a backend that draws nothing in a notebook.
    other = folder.parent / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["no-such-python", "{connection_file}"], "display_name": "other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    done = lab(
        *("run", "00_good.py", "--quick", "-p", "n=5", "-p", "name=it's", "--notebooks", folder, "--out", "out"),
        cwd=folder.parent,
        JUPYTER_PATH=str(other.parent.parent),
        MPLBACKEND="agg",
    )
    assert done.returncode == 0, done.stderr
    found = left(out)
    assert found == {"00_good.ipynb", "00_good.html", "00_good-04-1.png", "00_good/table.csv"}
    assert (out / "00_good-04-1.png").read_bytes().startswith(b"\x89PNG")
    notebook = nbformat.read(out / "00_good.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[3].outputs[0].text.strip() == f"{sys.executable} 5 True it's"
    page = (out / "00_good.html").read_text(encoding="utf-8")
    assert "A notebook" in page
    assert re.findall(r"<(?:script|link|iframe)", page) == [], "a page needs nothing beside itself and its figures"
    assert re.findall(r"""src=["']([^"']+)""", page) == ["00_good-04-1.png"]
    site = (out / "index.html").read_text(encoding="utf-8")
    assert '<a href="00_good.html">A notebook</a>' in site
    assert '<h2 id="bag-of-words">' in (out / "glossary.html").read_text(encoding="utf-8")
    assert [path.name for path in folder.iterdir() if path.suffix != ".py"] == []


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("2024", "smollm2-135m", "2024"),
        ("1e999", "a", "1e999"),
        ("None", "a", "None"),
        ("[1]", "a", "[1]"),
        ("", "a", ""),
        ("'two words'", "a", "two words"),
        ("-3", 0, -3),
        ("1_000", 0, 1000),
        ("2", 0.5, 2.0),
        ("-1e-3", 0.5, -0.001),
        ("False", True, False),
        ("[1, 2]", (0,), (1, 2)),
        ("('a', 'b')", ["c"], ["a", "b"]),
        ("[1, 2]", [0.5], [1.0, 2.0]),
        ("[]", [0], []),
        ("[1, 'a']", [], [1, "a"]),
        ("gemma3-270m", None, "gemma3-270m"),
        ("3", None, 3),
        ("3", ..., 3),
        ("nan", None, "nan"),
        ("{'a': 1}", {}, {"a": 1}),
    ],
)
def test_a_value_takes_the_type_of_the_default(text: str, default: object, value: object) -> None:
    found = _typed(text, default)
    assert found == value and type(found) is type(value)
    if isinstance(value, list | tuple):
        assert [type(item) for item in found] == [type(item) for item in value]


@pytest.mark.parametrize(
    ("text", "default", "wanted"),
    [
        *[
            (text, 0, "a whole number")
            for text in ("True", "1.5", "1e3", "1e999", "nan", "None", "", "'1'", "[1]", "007")
        ],
        *[
            (text, 0.5, "a finite number")
            for text in ("1e999", "-1e999", "nan", "inf", "True", "1" + 400 * "0", "a", "1j")
        ],
        *[(text, False, "True or False") for text in ("1", "0", "true", "yes", "")],
        *[(text, [0], "a whole number") for text in ("[1.5]", "[1, True]", "['a']")],
        *[(text, (0,), "a list such as") for text in ("1", "a", "{1}")],
        *[(text, None, "made of finite numbers") for text in ("1e999", "[1e999]", "{'a': (-1e999,)}")],
        ("[1]", {}, "a dict"),
        ("[a]", ["b"], "a list such as"),
        ("[1]", ["b"], "a text in quotes"),
    ],
)
def test_a_value_that_the_parameter_cannot_take(text: str, default: object, wanted: str) -> None:
    with pytest.raises(TypeError, match=wanted):
        _typed(text, default)


COUNTING = """\
# %% tags=["parameters"]
n = 1
fail = False
# %%
import os, pathlib
import matplotlib.pyplot as plt
out = pathlib.Path(os.environ["LAB_OUT"])
(out / "deep").mkdir()
(out / "deep" / f"table-{n}.csv").write_text(f"{n}")
for i in range(n):
    plt.plot([1, i])
    plt.show()
# %%
assert not fail
"""


@pytest.fixture
def counting(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a notebook that leaves n figures and a table named after n, in the folder `out`."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "02_count.py").write_text(COUNTING)
    (tmp_path / "scripts" / "00_good.py").write_text(GOOD)

    def run(*arguments: str, name: str = "02") -> subprocess.CompletedProcess:
        return lab("run", name, "--notebooks", "scripts", "--out", "out", *arguments, cwd=tmp_path)

    return run


def count(n: int) -> set[str]:
    """What the notebook above leaves."""
    return {"02_count.ipynb", "02_count.html", f"02_count/deep/table-{n}.csv"} | {
        f"02_count-03-{i}.png" for i in range(1, n + 1)
    }


def test_a_run_takes_the_place_of_the_earlier_one_whole(counting: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mine = {"02_count-notes.png": "a", "02_count.txt": "b", "other/02_count.ipynb": "c"}
    (out / "other").mkdir()
    for name, text in mine.items():
        (out / name).write_text(text)
    assert counting("-p", "n=3").returncode == 0
    assert left(out) == {*mine, *count(3)}
    assert counting(name="00").returncode == 0  # another notebook in the same folder
    good = {"00_good.ipynb", "00_good.html", "00_good-03-1.png", "00_good/table.csv"}
    assert left(out) == {*mine, *count(3), *good}
    assert counting("-p", "n=2").returncode == 0
    assert left(out) == {*mine, *count(2), *good}
    assert "n = 2" in (out / "02_count.ipynb").read_text()
    assert {name: (out / name).read_text() for name in mine} == mine
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == [
        ".depth-lab-run.json",
        ".depth-lab-run.lock",
    ]


PLACES = ["n.ipynb", "n.html", "n-02-1.png", "n-99-7.png", "n/mine.csv", "n/deep/table.csv"]


def leave(out: Path) -> Path:
    """What a run of the notebook n leaves: its files, each holding its name."""
    with run_folders.claimed(out, ["n"]):
        made = run_folders.aside(out, "n")
        (made / "n" / "deep").mkdir(parents=True)
        for name in ("n.ipynb", "n.html", "n-02-1.png", "n/deep/table.csv"):
            (made / name).write_text(name)
        return run_folders.put(made, out, "n", whole=True)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_what_a_run_did_not_leave_is_not_touched(tmp_path: Path, place: str, earlier: bool) -> None:
    out = tmp_path / "out"
    if earlier:
        leave(out)
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=rf"out holds 1 file that no run .* left so \({place}\), .*: move them, or give"
    ):
        leave(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with run_folders.claimed(out, ["another"]):  # whose places are free
        pass
    (out / place).unlink()
    assert leave(out) == out and (out / "n.html").read_text() == "n.html"


@pytest.mark.parametrize("place", ["n", "n.ipynb", "n/deep"])
def test_links_and_files_in_the_place_of_folders_are_not_touched(tmp_path: Path, place: str) -> None:
    out, far = tmp_path / "out", tmp_path / "far"
    far.mkdir()
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).symlink_to(far)
    with pytest.raises(ValueError, match=rf"out holds 1 file that no run .* left so \({place}\)"):
        leave(out)
    (out / place).unlink()
    (out / place).write_text("mine")
    with pytest.raises(ValueError, match=rf"out holds 1 file that no run .* left so \({place}\)"):
        leave(out)
    assert (out / place).read_text() == "mine" and list(far.iterdir()) == []


def test_a_link_to_nothing_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="out is a link to nothing: give a folder with --out"):
        leave(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"notebooks": {}}', '{"notebooks": []}', '{"notebooks": {"n": 1}}'])
def test_a_record_that_cannot_be_read_proves_nothing(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    leave(out)
    (out / run_folders.RECORD).write_text(text)
    with pytest.raises(ValueError, match="out holds 4 files that no run"):
        leave(out)


def test_files_that_change_while_a_run_lasts_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    leave(out)
    with run_folders.claimed(out, ["n"]):
        made = run_folders.aside(out, "n")
        (made / "n.html").write_text("new")
        (out / "n.html").write_text("edited meanwhile")
        beside = run_folders.put(made, out, "n", whole=True)
    assert beside.parent == out and re.fullmatch(r"n\.\d{4}-\d\d-\d\d-\d{6}", beside.name)
    assert (beside / "n.html").read_text() == "new" and (out / "n.html").read_text() == "edited meanwhile"


def test_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run_folders.claimed(out, ["n"]):
        (run_folders.aside(out, "n") / "half").write_text("made")
    leave(out)
    assert left(out) == {"n.ipynb", "n.html", "n-02-1.png", "n/deep/table.csv"}


def test_a_saved_notebook_in_the_folder_of_the_scripts_stays(folder: Path) -> None:
    notebook = build(folder / "00_good.py")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = lab("run", "00", "--notebooks", folder, "--out", folder, cwd=folder.parent)
    assert done.returncode == 1 and f"({notebook.name})" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failed_run_does_not_take_the_place_of_a_whole_one(counting: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert counting("-p", "n=3", "-p", "fail=True").returncode == 1
    assert left(out) == count(3)  # the first one: what it made is there
    assert counting("-p", "n=1", "-p", "fail=True").returncode == 1
    assert left(out) == count(1)
    assert counting("-p", "n=2").returncode == 0
    assert left(out) == count(2)
    done = counting("-p", "n=1", "-p", "fail=True")
    assert done.returncode == 1
    beside = Path(re.search(r"02_count: FAILED, \d+ s, (.*)", done.stdout)[1])
    assert re.fullmatch(r"out/02_count\.\d{4}-\d\d-\d\d-\d{6}/02_count\.html", beside.as_posix())
    assert left(tmp_path / beside.parent) == count(1)
    assert left(out) == count(2) | {f"{beside.parent.name}/{name}" for name in count(1)}


def test_two_runs_at_once(folder: Path) -> None:
    (folder / "02_long.py").write_text(LONG)
    out = folder.parent / "out"
    command = [sys.executable, "-m", "lab", "run", "02", "--notebooks", str(folder), "--out", "out"]
    process = subprocess.Popen(command, cwd=folder.parent, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for((folder / "started").exists)
        done = lab("run", "00", "--notebooks", folder, "--out", "out", cwd=folder.parent)
        assert done.returncode == 1 and "another run is writing into out: wait for it, or give another" in done.stderr
        assert left(out) == set()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = lab("run", "00", "--notebooks", folder, "--out", "out", cwd=folder.parent)  # a killed one holds no lock
    assert done.returncode == 0 and "00_good.html" in left(out)


def test_a_file_in_the_place_of_the_folder(folder: Path) -> None:
    (folder.parent / "out").write_text("mine")
    done = lab("run", "00", "--notebooks", folder, "--out", "out", cwd=folder.parent)
    assert done.returncode == 1 and "error: out is a file: give a folder with --out" in done.stderr
    assert (folder.parent / "out").read_text() == "mine"


def test_a_failing_cell_is_shown_and_what_ran_is_kept(folder: Path) -> None:
    done = lab("run", "--notebooks", folder, "--out", "out", cwd=folder.parent)
    assert done.returncode == 1
    assert "code cell 2" in done.stderr and "1 / 0" in done.stderr and "ZeroDivisionError" in done.stderr
    assert "1 of 2 notebooks failed: 01_bad" in done.stderr
    cells = nbformat.read(folder.parent / "out" / "01_bad.ipynb", as_version=4).cells
    assert cells[0].outputs[0].text == "before\n"
    assert cells[1].outputs[0].ename == "ZeroDivisionError"
    assert cells[2].execution_count is None
    assert (folder.parent / "out" / "00_good.html").exists()


def test_a_cell_that_takes_too_long_fails(folder: Path) -> None:
    (folder / "02_long.py").write_text(LONG)
    done = lab("run", "02", "--timeout", "1", "--notebooks", folder, "--out", "out", cwd=folder.parent)
    assert done.returncode == 1 and "timed out" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_an_interrupted_run_keeps_what_ran(folder: Path) -> None:
    (folder / "02_long.py").write_text(LONG)
    command = [sys.executable, "-m", "lab", "run", "02", "--notebooks", str(folder), "--out", "out"]
    process = subprocess.Popen(command, cwd=folder.parent, stderr=subprocess.PIPE, start_new_session=True)
    wait_for((folder / "started").exists)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.endswith(b"interrupted\n")
    assert nbformat.read(folder.parent / "out" / "02_long.ipynb", as_version=4).cells[0].execution_count == 1
    assert left(folder.parent / "out") == {"02_long.ipynb", "02_long.html"}


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_an_interrupt_while_the_kernel_starts(folder: Path) -> None:
    (folder / "02_long.py").write_text(LONG)
    command = [sys.executable, "-m", "lab", "run", "02", "--notebooks", str(folder), "--out", "out"]
    process = subprocess.Popen(command, cwd=folder.parent, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: any((folder.parent / "out").glob(".02_long.partial-*/02_long")))
    time.sleep(0.6)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the kernel also
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.endswith(b"interrupted\n"), stderr.decode()
    assert not list((folder.parent / "out").glob(".02_long.partial-*"))


def test_building_keeps_what_a_user_saved(folder: Path, capsys: pytest.CaptureFixture) -> None:
    script = folder / "00_good.py"
    notebook = build(script)
    assert nbformat.read(notebook, as_version=4).cells[0].source == "# A notebook"
    built = notebook.read_text()
    assert build(script).read_text() == built and capsys.readouterr().out == ""

    notebook.write_text(built.replace("# A notebook", "# Mine"))
    build(script)
    assert "# Mine" in notebook.read_text() and "it stays as it is" in capsys.readouterr().out

    later = notebook.stat().st_mtime + 10
    os.utime(script, (later, later))
    build(script)
    assert "# A notebook" in notebook.read_text()
    kept = [path for path in folder.glob("*.ipynb") if path != notebook]
    assert len(kept) == 1 and "# Mine" in kept[0].read_text() and kept[0].name in capsys.readouterr().out


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Takes the place of the browser; gives the addresses that were opened in it so far."""
    script, opened = tmp_path / "browser.py", tmp_path / "opened"
    script.write_text(f"import sys\nopen({str(opened)!r}, 'a').write(sys.argv[1] + '\\n')")
    monkeypatch.setenv("BROWSER", f"{sys.executable} {script} %s")
    return lambda: opened.read_text().splitlines() if opened.exists() else []


@pytest.fixture
def jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of Jupyter's own: no settings of whoever runs this, none of their servers."""
    for name in ("config", "runtime", "data"):
        monkeypatch.setenv(f"JUPYTER_{name.upper()}_DIR", str(tmp_path / "jupyter" / name))
    monkeypatch.setenv("JUPYTERLAB_SETTINGS_DIR", str(tmp_path / "jupyter" / "settings"))
    monkeypatch.setenv("JUPYTERLAB_WORKSPACES_DIR", str(tmp_path / "jupyter" / "workspaces"))
    return tmp_path / "jupyter"


@pytest.mark.skipif(os.name == "nt", reason="ends a group of processes")
def test_open_starts_jupyterlab_once_without_questions(folder: Path, browser: Callable, jupyter: Path) -> None:
    (folder / "00_good.py").rename(folder / "00_a good.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = f"http://localhost:{port}"
    arguments = [f"--port={port}", "--IdentityProvider.token=secret", "--allow-root"]
    command = [sys.executable, "-m", "lab", "open", "--notebooks", str(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, *arguments], **quiet, start_new_session=True)

    def ask(path: str, **more: str) -> dict:
        with urllib.request.urlopen(
            urllib.request.Request(f"{root}/{path}?token=secret", **more), timeout=30
        ) as answer:
            return json.loads(answer.read() or b"{}")

    try:
        wait_for(lambda: process.poll() is not None or bool(browser()))
        redirect = Path(urllib.request.url2pathname(browser()[0].removeprefix("file://"))).read_text()
        assert f"{root}/lab/tree/00_a%20good.ipynb?token=secret" in redirect
        listing = [entry["name"] for entry in ask("api/contents")["content"]]
        assert {"00_a good.ipynb", "01_bad.ipynb"} <= set(listing)
        notification = ask("lab/api/settings/@jupyterlab/apputils-extension:notification")
        assert notification["schema"]["properties"]["fetchNews"]["default"] == "false"  # else it asks
        assert notification["raw"] == "{}" and not list(
            jupyter.glob("settings/**/*")
        )  # the user's own stay as they were

        page = f"{root}/lab/tree/00_a%20good.ipynb?token=secret"
        again = subprocess.run([*command, "--port=1"], capture_output=True, text=True, timeout=60)
        assert again.returncode == 0 and f"JupyterLab already runs on {folder}: {page}" in again.stdout
        assert "Not used: --port=1. To start another, stop that one first" in again.stdout
        again = subprocess.run([*command, "--no-browser"], capture_output=True, text=True, timeout=60)
        assert again.returncode == 0 and page in again.stdout and "Not used" not in again.stdout
        assert browser()[1:] == [page]  # by the first of these two
        assert jupyterlab.running(folder) and jupyterlab.running(folder.parent) is None

        ask("api/shutdown", method="POST")
        assert process.wait(60) == 0 and jupyterlab.running(folder) is None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_open_shows_lessons_that_were_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lessons").mkdir()
    for name in ("01_b", "00_a"):
        (tmp_path / "lessons" / f"{name}.ipynb").write_text("as it was built")
    shown: list = []
    monkeypatch.setattr(jupyterlab, "start_or_show", lambda *arguments: shown.append(arguments) or 0)
    assert open_notebooks(tmp_path, ["--no-browser"]) == 0
    assert shown == [(tmp_path.resolve(), (tmp_path / "lessons" / "00_a.ipynb").resolve(), ["--no-browser"])]
    assert {path.read_text() for path in tmp_path.rglob("*.ipynb")} == {"as it was built"}
    (tmp_path / "lessons" / "00_a.py").write_text(GOOD)
    assert open_notebooks(tmp_path, []) == 0 and shown[-1][1].name == "00_a.ipynb"


def test_a_server_that_lab_open_did_not_start_is_left_alone(folder: Path, jupyter: Path) -> None:
    """Its kernels may be another Python's. This one is any process that Jupyter notes as a server in the folder."""
    (jupyter / "runtime").mkdir(parents=True)
    note = jupyter / "runtime" / f"jpserver-{os.getpid()}.json"
    note.write_text(
        json.dumps({"pid": os.getpid(), "root_dir": str(folder), "url": "http://localhost:1/", "token": ""})
    )
    assert jupyterlab.running(folder) is None and note.exists()


def wait_for(ready: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.3)


def test_check_prints_facts_and_table(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    done = lab("check", tiny_folder("llama"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^n_layers +4$", done.stdout, re.MULTILINE)
    assert "hooks left behind" in done.stdout and done.stdout.endswith("All ok.\n")


def test_check_of_a_folder_without_safe_weights_says_so(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((tiny_folder("llama") / "config.json").read_text())
    done = lab("check", "pickled", cwd=tmp_path)
    assert done.returncode == 1
    assert "pickled holds no *.safetensors" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_wheel_carries_data_and_notebooks(tmp_path: Path) -> None:
    """Slow: needs the build backend from the package index."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("depth_lab-*.whl"))) as wheel:
        names = set(wheel.namelist())
    data = {f"lab/_data/{path.name}" for path in (ROOT / "data").iterdir() if path.suffix in (".csv", ".md", ".json")}
    notebooks = {f"lab/_notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.py")}
    installers = {f"lab/packed/{path.name}" for path in (ROOT / "lab" / "packed").iterdir() if path.is_file()}
    assert data and installers and data | notebooks | installers <= names
    assert {name.split("/")[0] for name in names} == {"lab", "depth_lab-0.1.0.dist-info"}
