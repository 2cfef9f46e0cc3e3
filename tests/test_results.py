"""Tables go to the disk and come back as they were."""

import pandas as pd
import pytest

import lab

ALIASES = [["New Delhi", "Delhi"], ["São Tomé"], [], ['5" disk, "quoted"', "a\nb"]]


def there_and_back(tmp_path, **tables: pd.DataFrame) -> lab.Result:
    result = lab.Result("two_hop", tables.pop("table"), tables.pop("summary", pd.DataFrame()), {"n": 4}, tables)
    return lab.Result.load(result.save(tmp_path / "saved"))


def test_columns_of_lists_come_back_as_lists(tmp_path):
    frame = pd.DataFrame({"example": list("abcd"), "aliases": ALIASES, "layers": [[1, 2], [3], [], [0]], "n": range(4)})
    loaded = there_and_back(tmp_path, table=frame, queries=frame[::-1].reset_index(drop=True))
    assert loaded.table.aliases.tolist() == ALIASES and loaded.tables["queries"].aliases.tolist() == ALIASES[::-1]
    assert loaded.table.layers.tolist() == [[1, 2], [3], [], [0]]
    pd.testing.assert_frame_equal(loaded.table, frame, check_dtype=False)


def test_frames_without_rows_or_columns_come_back(tmp_path):
    hits = pd.DataFrame({"example": [], "layer": [], "said": []}).astype(
        {"layer": int, "example": "str", "said": "str"}
    )
    lists = pd.DataFrame({"example": list("ab"), "aliases": ALIASES[:2]})
    loaded = there_and_back(tmp_path, table=pd.DataFrame(), hits=hits, none=lists[:0], lists=lists)
    assert loaded.table.empty and loaded.summary.empty and list(loaded.table.columns) == []
    assert list(loaded.tables["hits"].columns) == ["example", "layer", "said"] and len(loaded.tables["hits"]) == 0
    assert loaded.tables["hits"].layer.dtype == int
    assert list(loaded.tables["none"].columns) == ["example", "aliases"] and len(loaded.tables["none"]) == 0
    together = pd.concat([loaded.tables["none"], loaded.tables["lists"]], ignore_index=True)
    assert together.aliases.tolist() == ALIASES[:2]


def test_words_that_look_like_missing_values_stay_words(tmp_path):
    """Namibia's code is NA, and a model may say "None"; only the empty text cannot be told from a missing one."""
    frame = pd.DataFrame(
        {"said": ["NA", "None", "nan", " null ", "", "1.0"], "share": [0.1, None, 1 / 3, 1e-300, 2.0, 3.0]}
    )
    loaded = there_and_back(tmp_path, table=frame).table
    assert loaded.said.tolist()[:4] == ["NA", "None", "nan", " null "] and loaded.said[5] == "1.0"
    assert loaded.said.isna().tolist() == [False] * 4 + [True, False]
    assert loaded.said.fillna("").tolist() == frame.said.tolist()
    pd.testing.assert_series_equal(loaded.share, frame.share)  # floats to the last bit


def test_a_kind_without_a_figure_says_so():
    with pytest.raises(ValueError, match="there is no figure for results of kind 'mine': draw its .table or .summary"):
        lab.Result("mine", pd.DataFrame(), pd.DataFrame(), {}).plot()
