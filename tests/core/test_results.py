"""Tables go to the disk and come back as they were, or are refused before anything is written."""

import datetime
import errno
import gzip
import json
import os
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lab
from lab.results import Result, run_shards

ALIASES = [["New Delhi", "Delhi"], ["São Tomé"], [], ['5" disk, "quoted"', "a\nb"]]
STABLE = settings(max_examples=60, deadline=None, derandomize=True)


def there_and_back(tmp_path: Path, **tables: pd.DataFrame) -> lab.Result:
    result = lab.Result("two_hop", tables.pop("table"), tables.pop("summary", pd.DataFrame()), {"n": 4}, tables)
    return lab.Result.load(result.save(tmp_path / "saved"))


def result_of(*cells: object, **parameters: object) -> lab.Result:
    return lab.Result("mine", pd.DataFrame({"cell": pd.Series(cells)}), pd.DataFrame(), parameters)


def same(frame: pd.DataFrame, loaded: pd.DataFrame) -> None:
    """In every type and bit: what assert_frame_equal lets pass (-0.0) or not (nan in lists) is told apart by its repr."""
    objects = [column for column in frame if str(frame[column].dtype) == "object"]
    pd.testing.assert_frame_equal(loaded.drop(columns=objects), frame.drop(columns=objects), check_exact=True)
    assert list(loaded) == list(frame) and (loaded.dtypes == frame.dtypes).all()
    assert [[repr(cell) for cell in frame[column]] for column in frame] == [
        [repr(cell) for cell in loaded[column]] for column in loaded
    ]


def test_columns_of_lists_come_back_as_lists(tmp_path):
    frame = pd.DataFrame({"example": list("abcd"), "aliases": ALIASES, "layers": [[1, 2], [3], [], [0]], "n": range(4)})
    loaded = there_and_back(tmp_path, table=frame, queries=frame[::-1].reset_index(drop=True))
    assert loaded.table.aliases.tolist() == ALIASES and loaded.tables["queries"].aliases.tolist() == ALIASES[::-1]
    assert loaded.table.layers.tolist() == [[1, 2], [3], [], [0]]
    same(frame, loaded.table)


def test_frames_without_rows_or_columns_come_back(tmp_path):
    hits = pd.DataFrame({"example": [], "layer": [], "said": []}).astype(
        {"layer": int, "example": "str", "said": "str"}
    )
    lists = pd.DataFrame({"example": list("ab"), "aliases": ALIASES[:2]})
    loaded = there_and_back(tmp_path, table=pd.DataFrame(), hits=hits, none=lists[:0], lists=lists)
    assert loaded.table.empty and loaded.summary.empty and list(loaded.table.columns) == []
    same(hits, loaded.tables["hits"])
    same(lists[:0], loaded.tables["none"])
    together = pd.concat([loaded.tables["none"], loaded.tables["lists"]], ignore_index=True)
    assert together.aliases.tolist() == ALIASES[:2]


def test_texts_come_back_as_they_were(tmp_path):
    """Namibia's code is NA, a model may say "None" or nothing, and a line may end in a carriage return alone."""
    said = ["NA", "None", "nan", " null ", "", "1.0", None, "a\rb", "a\r\nb", '"', "'a', \"b\"", "\0", "007"]
    frame = pd.DataFrame({"said": said, "share": [0.1, None, 1 / 3, 1e-300, -0.0, np.inf, -np.inf, *range(6)]})
    loaded = there_and_back(tmp_path, table=frame).table
    same(frame, loaded)
    assert loaded.said.isna().tolist() == [text is None for text in said] and loaded.said[7] == "a\rb"


KINDS = {
    "booleans with missing": pd.Series([True, None, False, float("nan")], dtype=object),
    "lists with missing": pd.Series([[1], None, [], [None, [True, "1", 1.0, float("nan")]]], dtype=object),
    "tuples": pd.Series([(1, (2,)), (), [(None,)]], dtype=object),
    "dicts": pd.Series([{"a": [1, {"b": None}]}, {}], dtype=object),
    "texts and numbers": pd.Series([1, "1", True, 1.0, None], dtype=object),
    "half a surrogate pair": pd.Series(["\ud800"], dtype=object),
    "beyond 2^53": pd.Series([2**53 + 1, -(2**62)]),
    "beyond int64": pd.Series([2**70, 1], dtype=object),
    "unsigned": pd.Series(np.array([2**64 - 1], np.uint64)),
    "small numbers": pd.Series(np.array([0.1], np.float32)),
    "nullable": pd.Series([1, None], dtype="Int64"),
    "ordered numbers": pd.Series(pd.Categorical([3, 1, None], [3, 2, 1], ordered=True)),
    "categories of numbers": pd.Series(pd.Categorical([0.5, np.inf])),
    "categories of booleans": pd.Series(pd.Categorical([True, None])),
    "categories of no row": pd.Series(pd.Categorical([], ["b", "a"], ordered=True)),
    "ordered categories": pd.Series(pd.Categorical(["b", None], ["c", "b", "a"], ordered=True)),
    "dates": pd.Series([pd.Timestamp("1969-07-20 20:17:40.123456789"), pd.NaT]),
    "time zones": pd.Series(pd.to_datetime(["2020-03-29 00:30"])).dt.tz_localize("Europe/Berlin"),
    "durations": pd.Series([pd.Timedelta(1, "ns"), pd.NaT]),
}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    frame = pd.DataFrame({"a": [1]})
    assert lab.Result("x", frame, frame, {}).save("~/mine") == tmp_path / "mine"
    same(lab.Result.load("~/mine").table, frame)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_column_comes_back(tmp_path, kind):
    frame = pd.DataFrame({"kind": KINDS[kind], "n": range(len(KINDS[kind]))})
    loaded = there_and_back(tmp_path, table=frame, some=frame[1:])
    same(frame, loaded.table)
    same(frame[1:], loaded.tables["some"])


def test_index_and_attrs_come_back(tmp_path):
    frame = pd.DataFrame({"a": [[1], [2]]}, index=pd.MultiIndex.from_tuples([("x", 1), ("y", 2)], names=["b", None]))
    frame.attrs = {"card": {"name": "mine", "n": 2, "gap": [float("inf"), None]}}
    loaded = there_and_back(tmp_path, table=frame, some=frame.reset_index(drop=True)[1:])
    same(frame, loaded.table)
    assert loaded.table.attrs == frame.attrs and loaded.tables["some"].index.tolist() == [1]


WORDS = st.text(max_size=6)
CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
COLUMNS = st.sampled_from(
    [(CELLS, object), (WORDS | st.none(), "str"), (st.floats(), float), (INTEGERS, np.int64), (st.booleans(), bool)]
)


@st.composite
def frames(draw: Callable) -> pd.DataFrame:
    n = draw(st.integers(0, 4))
    columns = draw(st.dictionaries(WORDS, COLUMNS, max_size=4))
    data = {
        name: pd.Series(draw(st.lists(cells, min_size=n, max_size=n)), dtype=kind)
        for name, (cells, kind) in columns.items()
    }
    return pd.DataFrame(data)


@given(frame=frames(), parameters=st.dictionaries(WORDS, CELLS, max_size=4))
@STABLE
def test_whatever_a_result_holds_comes_back(tmp_path_factory, frame, parameters):
    folder = tmp_path_factory.mktemp("any") / "saved"
    result = lab.Result("mine", frame, pd.DataFrame(), parameters, {"more": frame[::-1].reset_index(drop=True)})
    loaded = lab.Result.load(result.save(folder))
    same(frame, loaded.table)
    same(result.tables["more"], loaded.tables["more"])
    assert repr(loaded.parameters) == repr(parameters)  # nan is not equal to itself, 1 is equal to True


def test_numbers_of_numpy_in_parameters_are_numbers(tmp_path):
    given = {"seed": np.int64(3), "share": np.float32(0.1), "null": np.True_, "list": [np.int8(1)]}
    back = lab.Result.load(result_of(1, **given).save(tmp_path / "saved")).parameters
    assert back == given and [type(value) for value in back.values()] == [int, float, bool, list]


@pytest.mark.parametrize(
    "result, message",
    [
        (result_of({1}), r"table 'table', column 'cell', row 0 is \{1\}, which would not be read back as it is: use texts"),
        (result_of("a", np.arange(2)), r"column 'cell', row 1 is array\(\[0, 1\]\)"),
        (result_of(None, {1: 2}), r"column 'cell', row 1 is \{1: 2\}"),
        (result_of(datetime.date(2020, 1, 1)), r"column 'cell', row 0 is datetime.date\(2020, 1, 1\)"),
        (result_of(b"a"), "column 'cell', row 0 is b'a'"),
        (result_of(1j), r"table 'table', column 'cell' \(complex128\) would not be read back as it is"),
        (result_of(1, depths=np.arange(2)), r"parameters\['depths'\] is array\(\[0, 1\]\), .*\.tolist\(\) of an array"),
        (result_of(1, about={"levels": {1: "a"}}), r"parameters\['about'\] is \{'levels': \{1: 'a'\}\}"),
        (result_of(1, path=Path("x")), r"parameters\['path'\] is PosixPath\('x'\), .*str\(...\) of a path"),
        (result_of(1, huge=10**5000), r"parameters\['huge'\] is of type int and too long to be written"),
        (lab.Result("mine", pd.DataFrame([[1, 2]]), pd.DataFrame(), {}), r"table 'table': columns \[0, 1\] \(first 0\)"),
        (lab.Result("mine", pd.DataFrame([[1, 2]], columns=["a", "a"]), pd.DataFrame(), {}), r"columns \['a', 'a'\]"),
        (lab.Result("mine", pd.DataFrame({"a": [1, 2]}, index=[1, "x"]), pd.DataFrame(), {}), "its index .* not be read"),
        (lab.Result("mine", pd.DataFrame(), pd.DataFrame(), {}, {"../x": pd.DataFrame()}), r"a table is called '../x'"),
        (lab.Result("mine", pd.DataFrame(), pd.DataFrame(), {}, {"table": pd.DataFrame()}), "'summary' are taken"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_would_not_come_back_is_refused_before_anything_is_written(tmp_path, result, message):
    kept = result_of(0).save(tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    for folder in (tmp_path / "new", kept):
        with pytest.raises(ValueError, match=message):
            result.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


# --- the folder ---


def test_other_files_stay_and_tables_of_the_earlier_result_go(tmp_path):
    more = pd.DataFrame({"b": list(string.ascii_lowercase)})
    folder = lab.Result("mine", more[:3], pd.DataFrame(), {}, {"hits": more}).save(tmp_path / "saved")
    (folder / "figures").mkdir()
    mine = [folder / "notes.txt", folder / "figures" / "hits.png", folder / "hits.csv", folder / "hits.parquet.gz"]
    for path in mine:
        path.write_text("mine")
    lab.Result("mine", more[3:], pd.DataFrame(), {}).save(folder)
    assert all(path.read_text() == "mine" for path in mine)
    loaded = lab.Result.load(folder)
    assert loaded.tables == {} and len(loaded.table) == 23
    left = {path.name for path in folder.iterdir()} - {path.name for path in mine} - {"figures"}
    named = {entry["file"] for entry in json.loads((folder / "result.json").read_text())["tables"].values()}
    assert left == named | {"result.json"} and len(named) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_equal_results_are_equal_files(tmp_path):
    one, two = (result_of(*ALIASES, seed=1).save(tmp_path / name) for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


@pytest.mark.parametrize("at", range(4))
def test_a_crash_leaves_the_earlier_result_or_the_new_one(tmp_path, monkeypatch, at):
    """Files are put in place one by one: whichever is the last, what is loaded is one of the two, whole."""
    old = lab.Result("old", pd.DataFrame({"a": [1]}), pd.DataFrame({"n": [1]}), {}, {"hits": pd.DataFrame({"h": [1]})})
    new = lab.Result("new", pd.DataFrame({"a": [2]}), pd.DataFrame({"n": [1]}), {}, {"hits": pd.DataFrame({"h": [2]})})
    folder = old.save(tmp_path / "saved")
    place, done = os.replace, []

    def crashing(source: object, target: object) -> None:
        if len(done) == at:
            raise KeyboardInterrupt
        done.append(place(source, target))

    monkeypatch.setattr(os, "replace", crashing)
    with pytest.raises(KeyboardInterrupt):
        new.save(folder)
    loaded = lab.Result.load(folder)
    assert (loaded.kind, loaded.table.a.tolist(), loaded.tables["hits"].h.tolist()) == ("old", [1], [1])
    monkeypatch.undo()
    loaded = lab.Result.load(new.save(folder))
    assert (loaded.kind, loaded.table.a.tolist(), loaded.tables["hits"].h.tolist()) == ("new", [2], [2])


def test_what_is_no_saved_result(tmp_path):
    result = result_of(1)
    with pytest.raises(ValueError, match="holds no saved result"):
        lab.Result.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \('thesis.txt'\); give a new folder"):
        result.save(tmp_path / "other")
    with pytest.raises(ValueError, match="thesis.txt is a file; give a folder"):
        result.save(tmp_path / "other" / "thesis.txt")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "result.json").write_text('{"accuracy": 1}')
    for call in (result.save, lab.Result.load):
        with pytest.raises(ValueError, match="result.json was not written by this kit"):
            call(tmp_path / "theirs")


def test_a_table_that_was_changed_or_is_gone_is_not_read(tmp_path):
    folder = result_of(1).save(tmp_path / "saved")
    (path,) = folder.glob("table-*.parquet.gz")
    path.write_bytes(gzip.compress(b"other"))
    with pytest.raises(ValueError, match="is not as it was saved .*save the result again"):
        lab.Result.load(folder)
    path.unlink()
    with pytest.raises(ValueError, match="is missing: the result in .* is not whole"):
        lab.Result.load(folder)


def test_a_result_of_an_earlier_version_is_named_and_may_be_replaced(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "result.json").write_text('{"kind": "mine", "parameters": {}, "columns": {"table": {"a": "int64"}}}')
    (folder / "table.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    with pytest.raises(ValueError, match="saved by an earlier version of this kit, as csv.gz"):
        lab.Result.load(folder)
    lab.Result.load(result_of(1).save(folder))
    assert not (folder / "table.csv.gz").exists()


def test_a_kind_without_a_figure_says_so():
    with pytest.raises(ValueError, match="there is no figure for results of kind 'mine': draw its .table or .summary"):
        lab.Result("mine", pd.DataFrame(), pd.DataFrame(), {}).plot()


# --- parts that are kept --------------------------------------------------------------------------------------------


def test_a_part_that_was_damaged_is_computed_again(tmp_path, capsys):
    made = []

    def work(key):
        made.append(key)
        return Result("x", pd.DataFrame({"a": [len(made)]}), pd.DataFrame(), {})

    def run():
        return run_shards(work, [{"key": "one"}], folder=tmp_path, progress=False)[0].table.a[0]

    assert run() == run() == 1
    (table,) = (tmp_path / "one").glob("table-*")
    table.write_bytes(table.read_bytes()[:20])
    assert run() == 2 and "cannot be read and is computed again" in capsys.readouterr().out
    assert run() == 2


def test_work_is_not_lost_where_the_disk_is_full(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work(key):
        return Result("x", pd.DataFrame({"a": [7]}), pd.DataFrame(), {})

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "rename", full)
    found = run_shards(work, [{"key": "one"}], folder=tmp_path, progress=False)
    assert found[0].table.a[0] == 7
    assert "not kept" in (said := capsys.readouterr().out) and "LAB_CACHE" in said
    assert not (tmp_path / "one" / "result.json").exists()
