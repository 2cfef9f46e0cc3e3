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
from lab.depth_budget import (
    SKIP,
    Bits,
    Evaluator,
    Pruned,
    depth_policy,
    exits,
    lowering,
    macaron,
    nested,
    texts_of,
    triples,
)
from lab.depth_efficiency import attributions, depth_scores, integrator
from lab.depth_efficiency.linear_maps import linear_maps
from lab.results import Result
from lab.transfer import ensemble, merging, pretrained, probe_transfer, scaling, stitching

pytestmark = pytest.mark.slow
OPTIONS = ("repeats", "test_fraction", "noise", "bits", "instruction", "solver", "limit", "seed")


@cache
def model(name: str) -> Any:
    return lab.load(name, device="cpu", accept_license=True)  # Gemma has terms: see the README


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
    assert len(both) >= 3
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


def test_a_prompt_of_the_skipped_layers() -> None:
    found = shipped.shipped("03_depth_efficiency/found")
    about = found.parameters
    again = lab.depth_efficiency.run(model(about["model"]), about["dataset"], seed=about["seed"], n=2, kinds=["layer"],
                                     null=False, treatments=["skip"], local=False, n_cuts=1, n_read=about["n_read"],
                                     max_tokens=about["max_tokens"], resume=False, progress=False)  # fmt: skip
    keys = ["example", "weights", "treatment", "kind", "mode", "scope", "skipped_layer"]
    both = found.table.merge(again.table, on=keys, suffixes=("", "_again")).query("scope == 'all'")
    assert len(both) in (about["n_layers"], 2 * about["n_layers"])
    np.testing.assert_allclose(both.effect, both.effect_again, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(both.output, both.output_again, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", [name for name in named("depth_scores") if "k_hop" not in name and "random" not in name]
)
def test_the_scores_of_a_level(name: str) -> None:
    found = shipped.shipped(name)
    about = found.parameters
    level = about["levels"][:2]
    again = depth_scores(model(about["model"]), about["dataset"], levels=level, n_per_level=about["n_per_level"], known=False,
                         seed=about["seed"], prompt_column=about["prompt_column"], progress=False)  # fmt: skip
    both = found.table.merge(again.table, on=["example", "measure"], suffixes=("", "_again"))
    assert len(both) >= about["n_per_level"]
    np.testing.assert_allclose(both.score, both.score_again, rtol=1e-3)


def test_a_map_of_the_model_to_itself() -> None:
    found = shipped.shipped("03_depth_efficiency/maps/self")
    prose = datasets.load("prose").sample(n=80, random_state=0)
    one = model("smollm2-135m")
    again = linear_maps(one, one, prose.text.tolist(), groups=prose.group.to_numpy(), seed=0, source_depths=[8, 16],
                        target_depths=[8, 16], progress=False)  # fmt: skip
    both = found.table.merge(again.table, on=["source_depth", "target_depth"], suffixes=("", "_again"))
    assert len(both) == 4
    np.testing.assert_allclose(both.r2, both.r2_again, atol=1e-3)


def test_an_integrators_step() -> None:
    found = shipped.shipped("03_depth_efficiency/steps")
    about = found.parameters
    again = integrator.run(model(about["model"]), about["dataset"], seed=about["seed"], n_texts=about["n"],
                           layers=[5, 20], n_tokens=about["n_tokens"], n_step_texts=1, substeps=8,
                           programs=["swapped"], progress=False)  # fmt: skip
    keys = ["example", "program", "layer"]
    both = found.table.merge(again.table, on=keys, suffixes=("", "_again"))
    assert len(both) >= 2 * about["n"]
    np.testing.assert_allclose(both.rise, both.rise_again, atol=1e-3)


def test_an_erased_state_and_shares_of_the_answer() -> None:
    question, answer = "The capital of the country where Mumbai is located is", " New Delhi"
    background = datasets.load("prose").text.head(10).str.split(". ", regex=False).str[0].tolist()
    again = attributions.erasure(model("smollm2-135m"), question, answer, background=background)
    kept = shipped.shipped("03_depth_efficiency/erased").table
    np.testing.assert_allclose(kept.change, again.change, atol=1e-3)
    shared = attributions.integrated_gradients(model("smollm2-135m"), question, answer, layers=[4], nodes=32)
    kept = shipped.shipped("03_depth_efficiency/shared").table.query("layer == 4")
    np.testing.assert_allclose(kept.attribution, shared.attribution, atol=1e-3)


# --- the depth budget -----------------------------------------------------------------------------------------------


def evaluated(found: Result, sizes: Any, part: int, configurations: list[Any]) -> Any:
    """Some configurations on the texts of a result, measured again."""
    about = found.parameters
    texts = texts_of(
        model(about["model"]), about["dataset"], sizes=sizes, n_tokens=about["n_tokens"], seed=about["seed"]
    )[part]
    return texts, Evaluator(model(about["model"]), texts.ids, first=about["first"], progress=False)(configurations)


@pytest.mark.parametrize("name", named("layer_bits"))
def test_two_points_of_lowered_blocks(name: str) -> None:
    found = shipped.shipped(name)
    orders = found.tables["orders"]
    sweep = orders.sweep.iloc[0]
    k = int(sorted(found.table[found.table.sweep == sweep].k.unique())[2])
    high, low = (Bits(int(bits), found.parameters["group_size"]) for bits in sweep.split("/"))
    names = ["damage", "random 3"]
    plans = [
        orders[(orders.sweep == sweep) & (orders.order == order)].sort_values("place").layer.tolist() for order in names
    ]
    configurations = [lowering.lowered(order, k, high, low) for order in plans]
    texts, again = evaluated(found, found.parameters["sizes"], 1, configurations)
    for order, nll in zip(names, again.nll, strict=True):
        rows = found.table[(found.table.sweep == sweep) & (found.table.order == order) & (found.table.k == k)]
        assert rows.example.tolist() == texts.table.example.tolist()
        np.testing.assert_allclose(rows.nll, nll, atol=2e-3)


def test_a_point_of_two_curves_of_pruned_blocks() -> None:
    found = shipped.shipped("05a_bits/pruning")
    about = found.parameters
    points = found.tables["curves"].query("is_measured and rate in [0.3, 0.7] and layer in [5, 20]")
    configurations = [{int(row.layer): Pruned(float(row.rate))} for row in points.itertuples()]
    _, again = evaluated(found, (about["n_search"], about["n_report"]), 0, configurations)
    assert len(points) == 4
    np.testing.assert_allclose(points.raw, again.distortion.mean(1), rtol=1e-2)
    names = about["matrices"]
    points = found.tables["matrix_curves"].query("rate == 0.5 and layer == 20 and matrix.str.startswith('mlp')")
    shares = [tuple(0.5 if name == row.matrix else 0.0 for name in names) for row in points.itertuples()]
    _, again = evaluated(found, (about["n_search"],), 0, [{20: Pruned(one)} for one in shares])
    assert len(points) == 3
    np.testing.assert_allclose(points.raw, again.distortion.mean(1), rtol=1e-2)


def test_a_set_of_left_out_blocks() -> None:
    found = shipped.shipped("05a_bits/additivity")
    rows = found.table.query("kind == 'left out' and size == 4")
    rows = rows[rows.set == rows.set.iloc[0]]
    configuration = {int(layer): SKIP for layer in rows.blocks.iloc[0].split()}
    _, again = evaluated(found, (found.parameters["n_texts"],), 0, [configuration])
    np.testing.assert_allclose(rows.distortion, again.distortion[0], rtol=1e-2)


@pytest.mark.parametrize("name", named("pair_table"))
def test_some_pairs_of_blocks(name: str) -> None:
    found = shipped.shipped(name)
    rows = found.table[(found.table.text_set == "report") & found.table.removed.isin(["3 11", "15 16"])]
    configurations = [dict.fromkeys(map(int, removed.split()), SKIP) for removed in rows.removed.unique()]
    _, again = evaluated(found, found.parameters["sizes"], 1, configurations)
    np.testing.assert_allclose(rows.nll, again.nll.flatten(), atol=2e-3)


@pytest.mark.parametrize("name", named("block_search"))
def test_what_a_search_found(name: str) -> None:
    found = shipped.shipped(name)
    rows = found.table[(found.table.method == "greedy") & (found.table.n_removed.between(1, 4))]
    configurations = [dict.fromkeys(map(int, removed.split()), SKIP) for removed in rows.removed]
    for part, column in enumerate(("search_nll", "report_nll")):
        _, again = evaluated(found, found.parameters["sizes"], part, configurations)
        np.testing.assert_allclose(rows[column], again.nll.mean(1), atol=2e-3)


def test_some_gains_of_sets_of_blocks() -> None:
    found = shipped.shipped("05b_blocks/submodularity")
    pairs = shipped.shipped("05b_blocks/pairs")
    rows = found.tables["ratios"].query("weights == 'trained'").iloc[[0, 20]]
    n = found.parameters["n_layers"]
    for row in rows.itertuples():
        kept, added = (set(map(int, names.split())) for names in (row.kept, row.added))
        sets = [kept, kept | added, *(kept | {one} for one in sorted(added))]
        configurations = [dict.fromkeys(set(range(n)) - one, SKIP) for one in sets]
        _, again = evaluated(pairs, pairs.parameters["sizes"], 0, configurations)
        none, both, *single = -again.nll.mean(1)
        np.testing.assert_allclose([row.joint, row.gains], [both - none, np.sum(np.array(single) - none)], atol=1e-2)


@pytest.mark.parametrize("name", named("prefix_exits"))
def test_some_exits(name: str) -> None:
    found = shipped.shipped(name)
    last = found.parameters["n_layers"]
    rows = found.table.query("way in ['prefix', 'suffix'] and n_blocks in [15, 27]")
    configurations = [{"prefix": dict.fromkeys(range(n, last), SKIP), "suffix": dict.fromkeys(range(last - n), SKIP)}[way]
                      for way, n in rows[["way", "n_blocks"]].drop_duplicates().itertuples(index=False)]  # fmt: skip
    _, again = evaluated(found, (found.parameters["n"],), 0, configurations)
    np.testing.assert_allclose(rows.nll, again.nll.flatten(), atol=2e-3)


def test_the_norms_of_a_block() -> None:
    found = shipped.shipped("05b_blocks/norms")
    about = found.parameters
    again = exits.norms(model(about["model"]), about["dataset"], n_texts=about["n"], n_calibration=about["n_calibration"],
                        n_tokens=about["n_tokens"], layers=[11], seed=about["seed"], resume=False, progress=False)  # fmt: skip
    both = found.table.merge(again.table, on=["way", "layer", "example"], suffixes=("", "_again"))
    assert len(both) == len(again.table)
    np.testing.assert_allclose(both.nll, both.nll_again, atol=2e-3)


def test_one_training_of_each_comparison() -> None:
    """Steps of training carry on what another machine rounds otherwise: near, not equal."""
    wanted = {
        "nested": (nested, {"method": "separate_shared"}, ["size", "layers", "text"]),
        "macaron": (macaron, {"layer": "F128 A F128"}, ["rate"]),
        "triples": (triples, {"net": "pairs 1"}, ["task", "step"]),
    }
    for name, (module, part, keys) in wanted.items():
        found = shipped.shipped(f"05b_blocks/{name}")
        again = module.work(seed=0, **part, known=found.parameters).table
        (column, value), *_ = part.items()
        both = found.table[(found.table.seed == 0) & (found.table[column] == value)].merge(
            again, on=keys, suffixes=("", "_again")
        )
        numbers = [column for column in ("nll", "report_nll", "accuracy") if column in again]
        assert len(both) == len(again) > 0
        for column in numbers:
            np.testing.assert_allclose(both[column], both[f"{column}_again"], atol=0.05)


def test_a_split_of_the_depth_policy() -> None:
    found = shipped.shipped("05b_blocks/policy")
    about = found.parameters
    options = {name: about[name] for name in ("seed", "test_fraction", "folds", "components")}
    again = depth_policy.read(*depth_policy.planted(about["seed"]), repeats=2, **options)
    rows = found.table.query("dataset == 'planted'").merge(again, on=["split", "reader"], suffixes=("", "_again"))
    assert len(rows) == len(again)
    fixed = rows[rows.reader.isin(["fixed", "oracle", "last"])]
    np.testing.assert_allclose(fixed.accuracy, fixed.accuracy_again, atol=0.02)
