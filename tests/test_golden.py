"""What every experiment gives on tiny models is what it gave: golden.json, made by `python tests/golden.py numbers`."""

import functools
import json
import math
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import golden
import pytest
from sklearn.exceptions import ConvergenceWarning

from lab import ROOMS, Result

RECORD = json.loads(golden.NUMBERS.read_text())
TRAINED = ("transfer", "transfer_pretrained", "transfer_tuned", "tuned_scaling", "layer_ensemble", "merging")
KINDS = {kind for room in ROOMS for kind in import_module(f"lab.{room}").RUNS}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Any]]:
    """Each experiment, computed when it is first called."""
    made = golden.experiments(golden.models(tmp_path_factory.mktemp("golden")))
    return {name: functools.cache(_quietly(call)) for name, call in made.items()}


@pytest.mark.parametrize("name", RECORD)
def test_numbers_are_those_of_the_record(calls: dict[str, Any], name: str) -> None:
    found = json.loads(json.dumps(golden.summary(calls[name]())))
    assert list(found) == list(RECORD[name])
    for table, columns in RECORD[name].items():
        assert list(found[table]) == list(columns), table
        for column, wanted in columns.items():
            here = found[table][column]
            # steps of training carry what another machine rounds otherwise on to a text or two that is told right
            near = isinstance(here, list) and _near(here, wanted, 5e-2 if name in TRAINED else 1e-3)
            assert here == wanted or near, (table, column, here, wanted)


@pytest.mark.parametrize("name", RECORD)
def test_every_column_has_a_meaning(calls: dict[str, Any], name: str) -> None:
    result = calls[name]()
    if isinstance(result, Result) and result.kind in KINDS:
        told = result.columns()
        assert (told.meaning != "").all(), told[told.meaning == ""]


def test_no_experiment_is_left_out(calls: dict[str, Any]) -> None:
    assert list(calls) == list(RECORD)
    results = [result for call in calls.values() if isinstance(result := call(), Result)]
    assert KINDS - {result.kind for result in results} == {"linear_maps"}  # its maps alone; see test_linear_maps


def _quietly(call: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("default", ConvergenceWarning)  # the published probe stops before it has converged
            return call()

    return made


def _near(here: list[Any], wanted: list[Any], share: float) -> bool:
    """Equal but for what another machine rounds otherwise; texts and numbers of missing values are equal."""
    if (
        len(here) != len(wanted)
        or not all(isinstance(x, int | float) for x in (*here, *wanted))
        or here[0] != wanted[0]
    ):
        return False
    size = max((abs(x) for x in wanted[1:]), default=0)
    return all(
        math.isclose(a, b, rel_tol=share, abs_tol=share * size + 1e-6) for a, b in zip(here, wanted, strict=True)
    )
