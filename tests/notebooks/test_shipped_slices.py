"""A slice of each shipped result, computed again and held against the file. Slow: minutes, and the offline model."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lab
from lab import datasets, shipped
from lab.back_patching import patching, stages, two_hop
from lab.concept_depth import accuracy
from lab.results import Result
from lab.transfer import ensemble, merging, pretrained, probe_transfer, scaling, stitching

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


@pytest.mark.parametrize("name", named("hop_stages"))
def test_the_lens_on_a_query(name: str) -> None:
    found = shipped.shipped(name)
    for query in found.tables["queries"].iloc[:2].itertuples():
        at = patching.places(model(found.parameters["model"]), query.text, query.e1)
        names = {"e2": [query.e2, *query.e2_aliases], "e3": [query.e3, *query.e3_aliases]}
        again = stages.lens(model(found.parameters["model"]), query.text, at, names)
        both = found.tables["lens"].query("example == @query.example").merge(again, on=["position", "depth", "what"])
        assert len(both) == len(again) > 100
        assert (np.abs(both.rank_x - both.rank_y) <= 0.01 * both.rank_x).mean() > 0.98  # near ties change places


def test_other_ways_to_the_answer() -> None:
    asked, kept = (shipped.shipped(f"02_back_patching/{name}") for name in ("asked", "all_ways"))
    again = two_hop.decomposition(model(asked.parameters["model"]), asked, examples=kept.table.example.unique()[:6].tolist(),
                                  rule="leading", seed=0, progress=False)  # fmt: skip
    keys = ["example", "method", "prompt"]  # another draw of *other*: its prompts differ
    both = kept.table.query("method != 'other'").merge(again, on=keys, suffixes=("", "_again"))
    assert len(both) >= 15 and (both.said == both.said_again).mean() > 0.9


def compared(found: Result, again: Result, keys: list[str], metric: str, within: float) -> None:
    """Values of the rows that both have; `within`: what rounding, carried on by steps of training, may change."""
    both = found.table.merge(again.table, on=keys, suffixes=("", "_again")).query("metric == @metric")
    assert len(both) >= 4
    assert np.abs(both.value - both.value_again).max() <= within + 1e-9


@pytest.mark.parametrize("name", named("transfer"))
def test_one_split_of_the_nets(name: str) -> None:
    about = shipped.shipped(name).parameters
    same = {key: about[key] for key in ("seed", "n_blocks", "skip", "gate")}
    again = lab.transfer.run(
        "D", about["preset"], splits=2, n=[2], embedding_only=False, resume=False, progress=False, **same
    )
    keys = ["split", "seed", "target", "treatment", "part", "n", "metric"]
    compared(shipped.shipped(name), again, keys, "accuracy", 0.05)


def test_two_splits_of_merging() -> None:
    found = shipped.shipped("04b_merging/merged")
    again = merging.run(splits=2, seed=found.parameters["seed"], resume=False, progress=False)
    some = found.table.query("method in ['base', 'own', 'average', 'task_arithmetic']")
    compared(Result("table", some, some, {}), again, ["split", "seed", "task", "method", "metric"], "accuracy", 0.05)


def test_one_depth_of_the_probes_elsewhere() -> None:
    found = shipped.shipped("04b_merging/carried")
    about = found.parameters
    again = probe_transfer.run(model(about["model"]), about["datasets"], depths=[12], limit=about["limit"], seed=about["seed"],
                               draws=50, resume=False, progress=False)  # fmt: skip
    keys = ["trained_on", "tested_on", "depth", "probe", "labels", "metric", "split"]
    compared(found, again, keys, "auc", 0.01)


def test_one_pair_of_stitching() -> None:
    found = shipped.shipped("04b_merging/stitched")
    prose = datasets.load("prose").sample(n=found.parameters["n_documents"], random_state=found.parameters["seed"])
    one = model(found.parameters["model_x"]["model"])
    again = stitching.run(one, one, prose.text.tolist(), pairs=[(8, 15)], groups=prose.group.to_numpy(), draws=50,
                          random_weights=False, seed=found.parameters["seed"], progress=False)  # fmt: skip
    keys = ["source_depth", "target_depth", "condition"]
    both = found.table.merge(again.table, on=keys, suffixes=("", "_again"))
    assert len(both) >= 3
    assert np.abs(both.loss - both.loss_again).max() < 0.01 and np.abs(both.r2 - both.r2_again).max() < 0.01


def test_one_seed_of_the_ensemble() -> None:
    found = shipped.shipped("04b_merging/ensemble")
    about = found.parameters
    again = ensemble.run(model(about["model"]), about["dataset"], "reviews", seeds=1, seed=about["seed"], draws=50,
                         progress=False)  # fmt: skip
    compared(found, again, ["seed", "treatment", "test", "metric"], "accuracy", 0.05)


def test_two_methods_of_scaling() -> None:
    found = shipped.shipped("04b_merging/scaled")
    about = found.parameters
    again = scaling.run(model(about["model"]), about["dataset"], permutations=1, seed=about["seed"], draws=50,
                        resume=False, progress=False)  # fmt: skip
    compared(found, again, ["seed", "method", "order", "set", "role", "metric"], "accuracy", 0.07)  # of 32 texts


def test_one_n_of_the_first_blocks() -> None:
    found = shipped.shipped("04a_transfer/first_blocks")
    about = found.parameters
    again = pretrained.run(model(about["model"]), about["dataset"], n=[30], treatments=["P", "K"], seed=about["seed"], null=False,
                           resume=False, progress=False)  # fmt: skip
    compared(found, again, ["weights", "treatment", "n", "split", "metric"], "accuracy", 0.05)
