"""Results that come with the kit: kept by the cells that make them, read with their checksums, marked where they are small."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lab import shipped
from lab.__main__ import main, scripts
from lab.cache import data_folder
from lab.results import Result

MB = 1_000_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder in the place of the kit's."""
    monkeypatch.setattr(shipped, "data_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def making(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shipped.MAKING, str(folder / "results"))


def measured() -> Result:
    table = pd.DataFrame({"depth": [0, 1, 2], "mean": np.array([0.5, 0.7, 0.9])})
    return Result("concept_depth", table, table.tail(1), {"model": "tiny", "seed": 0})


def never() -> Result:
    raise AssertionError("computed, although it comes with the kit")


def test_what_is_made_is_read_without_computing(
    folder: Path, making: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shipped.Results("01", recompute=True, seed=0)("cities", measured)
    monkeypatch.delenv(shipped.MAKING)
    again = shipped.Results("01", seed=0)("cities", never)
    pd.testing.assert_frame_equal(again.table, measured().table)
    assert again.kind == "concept_depth" and shipped.names() == ["01/cities"]
    assert "recompute = True measures it anew" in capsys.readouterr().out
    about = shipped.made("01/cities")
    assert about["command"] == "python -m lab results make 01" and about["parameters"] == {"seed": 0}
    assert about["versions"]["torch"] and about["seconds"] >= 0 and about["date"][:2] == "20"


def test_a_smoke_test_judges_nothing() -> None:
    table = pd.DataFrame({"claim": ["late"], "verdict": ["agrees"], "n_star": [3]})
    assert list(shipped.Results("01").judged(table)) == ["claim", "verdict", "n_star"]
    assert list(shipped.Results("01", quick=True).judged(table)) == ["claim", "n_star"]
    assert list(shipped.Results("01", quick=True).judged(table, "n_star", "verdict")) == ["claim"]


def test_other_parameters_recompute_and_quick_compute(folder: Path, making: None) -> None:
    shipped.Results("01", recompute=True, seed=0)("cities", measured)
    for results in (
        shipped.Results("01", seed=1),
        shipped.Results("01", seed=0, recompute=True),
        shipped.Results("01", seed=0, quick=True),
    ):
        with pytest.raises(AssertionError, match="computed"):
            results("cities", never)
    shipped.Results("01")


def test_a_quick_run_keeps_nothing_and_says_so_over_every_figure(folder: Path, making: None) -> None:
    results = shipped.Results("01", quick=True)
    results("cities", measured)
    assert shipped.names() == []
    figure, _ = plt.subplots()
    assert [text.get_text() for text in figure.texts] == ["quick = True: a smoke test,\nno result"]
    shipped.Results("01")
    unmarked, _ = plt.subplots()
    assert unmarked.texts == []
    plt.close("all")


def test_a_table_is_kept_too(folder: Path, making: None) -> None:
    shipped.Results("01", recompute=True)("words", lambda: pd.DataFrame({"word": ["a", "b"]}))
    assert shipped.shipped("01/words").table.word.tolist() == ["a", "b"]


def test_changed_files_and_unknown_names_are_refused(folder: Path, making: None) -> None:
    shipped.Results("01", recompute=True)("cities", measured)
    with pytest.raises(ValueError, match="no shipped result '01/towns'; there are 01/cities"):
        shipped.shipped("01/towns")
    path = folder / "results" / "01" / "cities" / "result.json"
    path.write_text(path.read_text().replace("tiny", "tidy"))
    with pytest.raises(ValueError, match="are not those that were made"):
        shipped.shipped("01/cities")


def test_make_wants_a_study(capsys: pytest.CaptureFixture) -> None:
    assert main(["results", "make"]) == 1 and "which study?" in capsys.readouterr().err
    assert main(["results", "make", "05"]) == 1 and "'05' may be 05a_bits or 05b_blocks" in capsys.readouterr().err
    assert main(["results", "make", "15"]) == 1 and "no notebook '15'" in capsys.readouterr().err
    assert main(["results", "list"]) == 0


@pytest.mark.parametrize("name", shipped.names())
def test_each_shipped_result_is_whole_and_says_how_it_was_made(name: str) -> None:
    about = shipped.made(name)
    study = name.split("/")[0]
    assert study in {script.stem for script in scripts(None) if script.parent.name == "studies"}
    terms = " --accept-license" if about["parameters"].get("model_name") == "gemma3-270m" else ""
    assert about["command"] == f"python -m lab results make {study}{terms}"
    assert {"torch", "transformers", "transformer-lens", "scikit-learn", "depth-lab"} <= set(about["versions"])
    assert json.dumps(about["parameters"]) and (about["seconds"] is None or about["seconds"] > 0)
    found = shipped.shipped(name)
    assert len(found.table) or len(found.summary)


def test_all_of_them_are_small() -> None:
    files = [path for path in (data_folder() / "results").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12 * MB
