"""What every experiment gives on tiny models is what it gave: golden.json, made by `python tests/golden.py numbers`."""

import json
import math
import warnings
from typing import Any

import golden
import pytest
from sklearn.exceptions import ConvergenceWarning

RECORD = json.loads(golden.NUMBERS.read_text())
TRAINED = ("transfer", "transfer_pretrained", "transfer_tuned", "tuned_scaling", "layer_ensemble", "merging")


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return golden.experiments(golden.models(tmp_path_factory.mktemp("golden")))


@pytest.mark.parametrize("name", RECORD)
def test_numbers_are_those_of_the_record(calls: dict[str, Any], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default", ConvergenceWarning)  # the published probe stops before it has converged
        found = json.loads(json.dumps(golden.summary(calls[name]())))
    assert list(found) == list(RECORD[name])
    for table, columns in RECORD[name].items():
        assert list(found[table]) == list(columns), table
        for column, wanted in columns.items():
            here = found[table][column]
            # steps of training carry what another machine rounds otherwise on to a text or two that is told right
            near = isinstance(here, list) and _near(here, wanted, 5e-2 if name in TRAINED else 1e-3)
            assert here == wanted or near, (table, column, here, wanted)


def test_no_experiment_is_left_out(calls: dict[str, Any]) -> None:
    assert list(calls) == list(RECORD)


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
