"""A slice of each shipped result, computed again and held against the file. Slow: minutes, and the offline model."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lab
from lab import datasets, shipped
from lab.back_patching import patching, two_hop
from lab.concept_depth import accuracy
from lab.results import Result

pytestmark = pytest.mark.slow
OPTIONS = ("repeats", "test_fraction", "noise", "bits", "instruction", "solver", "limit", "seed")


@cache
def model(name: str) -> Any:
    return lab.load(name, device="cpu")


def named(kind: str) -> list[str]:
    return [name for name in shipped.names() if shipped.shipped(name).kind == kind]


def data_of(found: Result) -> str | pd.DataFrame:
    name = found.parameters["dataset"]
    if name != "cities, twins split":
        return name
    frame = datasets.load("cities")
    card = {**frame.attrs["card"], "name": name}
    frame = frame[frame.example.isin(set(found.tables["statements"].example))].reset_index(drop=True)
    frame = frame.assign(group=frame.example)
    frame.attrs["card"] = card
    return frame


@pytest.mark.parametrize("name", named("concept_depth"))
def test_two_depths_of_a_curve(name: str) -> None:
    found = shipped.shipped(name)
    options = {key: found.parameters[key] for key in OPTIONS}
    depths = [5, 16]
    again = accuracy.run(model(found.parameters["model"]), data_of(found), depths=depths, sites=("resid",), null=False,
                         resume=False, progress=False, **options)  # fmt: skip
    keys = ["depth", "labels", "metric", "split"]
    rows = [table[table.depth.isin(depths)].query("weights == 'trained' and site == 'resid' and probe == 'linear'")
            .set_index(keys)["value"].sort_index() for table in (found.table, again.table)]  # fmt: skip
    assert len(rows[0]) == len(rows[1]) > 0
    scores = rows[0].index.get_level_values("metric") != "f1"
    apart = (rows[0] - rows[1]).abs()[scores]
    tested = found.parameters["test_fraction"] * found.parameters["n_examples"]
    assert apart.max() <= 2.5 / tested, "more than two answers differ"  # rounding turns one that is on the cut


@pytest.mark.parametrize("name", named("two_hop"))
def test_what_is_said_to_some_queries(name: str) -> None:
    found = shipped.shipped(name)
    some = found.tables["queries"].sample(6, random_state=0)
    queries = datasets.load("two_hop")
    queries = queries[queries.example.isin(set(some.example))]
    again = two_hop.run(model(found.parameters["model"]), queries, resume=False, progress=False)
    keys = ["example", "prompt"]
    both = found.table.merge(again.table, on=keys, suffixes=("", "_again"))
    assert len(both) == len(again.table) >= 18
    assert (both.said == both.said_again).mean() > 0.9
    for rule in ("word", "published", "leading"):
        assert (both[rule] == both[f"{rule}_again"]).mean() > 0.9


@pytest.mark.parametrize("name", named("back_patching"))
def test_all_pairs_of_a_query(name: str) -> None:
    found = shipped.shipped(name)
    hits = found.tables["hits"].query("condition == 'own' and position == 't1'")
    query = found.tables["queries"].set_index("example").loc[hits.example.iloc[0]]
    at = patching.places(model(found.parameters["model"]), query.text, query.e1)["t1"]
    swept = patching.sweep(model(found.parameters["model"]), query.text, [query.e3, *query.e3_aliases], positions=[at])
    pairs = [set(zip(rows.source_layer, rows.target_layer, strict=True))
             for rows in (hits[hits.example == query.name], swept[swept.right])]  # fmt: skip
    assert len(pairs[0] ^ pairs[1]) <= max(1, 0.05 * len(pairs[0] | pairs[1]))


@pytest.mark.parametrize("name", [name for name in named("transfer") if not name.startswith("04a_transfer/stream")])
def test_one_split_of_the_nets(name: str) -> None:
    found = shipped.shipped(name)
    again = lab.transfer.run("D", found.parameters["preset"], splits=2, n=[2], seed=found.parameters["seed"],
                             embedding_only=False, resume=False, progress=False)  # fmt: skip
    keys = ["split", "seed", "target", "treatment", "part", "n", "metric"]
    both = found.table.merge(again.table, on=keys, suffixes=("", "_again")).query("metric == 'accuracy'")
    assert len(both) >= 8
    assert np.abs(both.value - both.value_again).max() < 0.05  # steps of training carry rounding on
