"""What a caller may pass: numbers of other libraries count as plain ones, anything else is refused before a model runs."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from test_concept_depth import letters

import lab
from lab import (
    back_patching,
    concept_depth,
    depth_efficiency,
    interventions,
    models,
    probes,
    require,
    runs,
    states,
    transfer,
)
from lab.back_patching import stages, two_hop
from lab.depth_efficiency import attributions, effects, integrator
from lab.nets import k_hop, language, replicas
from lab.transfer import ensemble, merging, pretrained, probe_transfer, scaling, stitching, tasks, tuned

pytestmark = pytest.mark.usefixtures("unchecked")
WORDS = ["the sum of two and three is five today", "a cat sat on the mat in the sun all day", "we went home by train"]
PROSE = pd.DataFrame({"text": WORDS, "group": ["a", "b", "c"]})


# --- the guards ---


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), pd.Series([3]).iloc[0]])
def test_a_whole_number_of_any_library_is_a_plain_one(value):
    found = require.whole("n", value, 1, 3)
    assert found == 3 and type(found) is int


NO_NUMBER = [True, np.True_, torch.tensor(True), 3.0, np.float64(3), 3.5, np.nan, None, "3", [3], np.array([3]), pd.NA]


@pytest.mark.parametrize("value", [*NO_NUMBER, 0, np.int64(4), 10**400, -1])
def test_what_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(ValueError, match=r"^n=.*: give a whole number from 1 to 3$"):
        require.whole("n", value, 1, 3)


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_a_number_is_a_plain_float(value):
    assert require.fraction("x", value) == 0.5 and type(require.fraction("x", value)) is float
    assert type(require.number("x", np.int64(2), 2)) is float


@pytest.mark.parametrize("value", [0, 1, np.nan, np.inf, True, None, "0.5", [0.5], 10**400, 1j])
def test_what_is_no_fraction_is_refused(value):
    with pytest.raises(ValueError, match="^x=.*: give a number above 0 and below 1$"):
        require.fraction("x", value)


LISTS = {
    "tuple": (0, 2, 4), "range": range(0, 5, 2), "array": np.arange(0, 5, 2), "list of numpy": list(np.arange(0, 5, 2)),
    "series": pd.Series([0, 2, 4]), "index": pd.Index([0, 2, 4]), "tensor": torch.arange(0, 5, 2),
    "dict keys": {0: "a", 2: "b", 4: "c"}.keys(), "uint8": np.array([0, 2, 4], np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*LISTS, "generator"])
def test_any_collection_is_a_list_of_plain_numbers(kind):
    found = require.wholes("depths", LISTS.get(kind, (2 * i for i in range(3))), 0, 4)
    assert found == [0, 2, 4] and all(type(one) is int for one in found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("resid", "depths='resid': give a list of whole numbers, such as ['resid']"),
        (3, "depths=3: give a list of whole numbers, such as [3]"),
        (None, "depths=None: give a list"),
        ({1, 2}, "depths={1, 2}: a set has no order"),
        (np.zeros((2, 2), int), "give a list of whole numbers"),
        ([], "depths=[]: give at least one, each from 0 to 4, none twice"),
        ([1, 1], "depths=[1, 1]: give at least one, each from 0 to 4, none twice"),
        ([1, True], "(True is not)"),
        ([1.0], "(1.0 is not)"),
        (np.array([np.nan, 1]), "(nan is not)"),
        ([0, 9], "depths=[0, 9]: give at least one, each from 0 to 4, none twice (9 is not)"),
        ([[1], [2]], "([1] is not)"),
    ],
)
def test_what_is_no_list_of_depths_is_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        require.wholes("depths", values, 0, 4)


def test_names():
    assert require.some_of("sites", np.array(["b", "a"]), "abc") == ["b", "a"]
    assert type(require.one_of("site", np.str_("a"), "abc")) is str
    for wrong in ("a", ["d"], [], ["a", "a"], [1], [["a"]], {"a"}, None):
        with pytest.raises(ValueError, match="^sites="):
            require.some_of("sites", wrong, "abc")
    for wrong in ("d", ["a"], np.array(["a", "b"]), None, 1):
        with pytest.raises(ValueError, match="choose one of a, b, c$"):
            require.one_of("site", wrong, "abc")
    assert require.flags(a=np.True_, b=False) == (True, False)
    with pytest.raises(ValueError, match="^b='no': give True or False$"):
        require.flags(a=True, b="no")


# --- every experiment: numpy's numbers give what plain ones give ---

i, f = np.int64, np.float64


def _concept(model, number, real, many):
    return concept_depth.run(
        model, letters(), seed=number(3), limit=number(30), depths=many([0, 2, 4]), sites=["resid"], repeats=number(1),
        test_fraction=real(0.5), null=False, control=np.False_ if number is i else False, progress=False,
    )  # fmt: skip


def _probes(model, number, real, many):
    options = {
        "depths": many([0, 4]),
        "repeats": number(2),
        "draws": number(20),
        "seed": number(1),
        "limit": number(40),
    }
    return probe_transfer.run(model, {"letters": letters()}, test_fraction=real(0.4), progress=False, **options)


def _integrator(model, number, real, many):
    options = {"n_texts": number(3), "n_tokens": number(8), "n_step_texts": number(1), "substeps": number(8)}
    return integrator.run(
        model, PROSE, layers=many([1, 2]), programs=["swapped"], seed=number(2), progress=False, **options
    )


def _efficiency(model, number, real, many):
    options = {"n": number(2), "n_cuts": number(1), "n_read": number(2), "push": real(0.5), "max_tokens": number(20)}
    return depth_efficiency.run(
        model, PROSE.head(2), seed=number(1), kinds=("layer",), null=False, progress=False, **options
    )


def _scores(model, number, real, many):
    data = pd.DataFrame({"prompt": WORDS, "level": [1, 2, 2], "answer": ["a", "b", "c"], "group": list("abc")})
    return depth_efficiency.depth_scores(
        model, data, seed=number(1), n_per_level=number(2), levels=many([1, 2]), progress=False
    )


def _stitching(model, number, real, many):
    documents = [f"{text} {place}" for place in range(4) for text in WORDS]
    return stitching.run(
        model, model, documents, pairs=[many([1, 2])], draws=number(10), seed=number(1), ridges=many([0.01, 0.1]),
        test_fraction=real(0.25), random_weights=False, batch_tokens=number(200), progress=False,
    )  # fmt: skip


def _transfer(model, number, real, many):
    return transfer.run(
        "D", seed=number(1), n=many([0, 1]), splits=number(1), seeds=number(1), steps=number(2), n_blocks=number(1),
        halves=(many([0, 1, 2]), many([3, 4, 5])), train_per_class=number(5), noise=real(0.5), gate=real(0.9), progress=False,
    )  # fmt: skip


RUNS = [_concept, _probes, _integrator, _efficiency, _scores, _stitching, _transfer]


@pytest.mark.parametrize("call", RUNS)
def test_parameters_and_numbers_are_those_of_plain_numbers(call, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    model = tiny_model("llama")
    plain = call(model, int, float, list)
    keys = {path.parent.name for path in (tmp_path / "cache").rglob("result.json")}
    found = call(model, i, f, np.array)
    assert json.loads(json.dumps(found.parameters)) == json.loads(json.dumps(plain.parameters))
    pd.testing.assert_frame_equal(found.table, plain.table)
    assert {
        path.parent.name for path in (tmp_path / "cache").rglob("result.json")
    } == keys  # the kept parts served again
    assert lab.Result.load(found.save(tmp_path / "saved")).parameters == plain.parameters


def test_a_run_of_one_split_has_no_interval_and_can_be_drawn(tiny_model, recwarn):
    options = {"repeats": 1, "null": False, "control": False, "progress": False, "resume": False, "sites": ("resid",)}
    result = concept_depth.run(tiny_model("llama"), letters(), **options)
    assert result.summary["mean"].notna().all() and result.summary[["low", "high"]].isna().all(axis=None)
    assert result.plot().axes and not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


# --- what is refused, before a model runs ---

TWO = {"train_data": letters(), "test_data": letters()}
REFUSED = {
    "concept seed": lambda m: concept_depth.run(m, letters(), seed=-1),
    "concept seed float": lambda m: concept_depth.run(m, letters(), seed=1.0),
    "concept repeats": lambda m: concept_depth.run(m, letters(), repeats=True),
    "concept sites": lambda m: concept_depth.run(m, letters(), sites="resid"),
    "concept limit": lambda m: concept_depth.run(m, letters(), limit=30.0),
    "concept limit nan": lambda m: concept_depth.run(m, letters(), limit=np.nan),
    "concept depths": lambda m: concept_depth.run(m, letters(), depths=2, sites=["resid"]),
    "concept null": lambda m: concept_depth.run(m, letters(), null="no"),
    "concept instruction": lambda m: concept_depth.run(m, without_instruction(), instruction=True),
    "two_hop limit": lambda m: two_hop.run(m, limit=2.5),
    "two_hop batch": lambda m: two_hop.run(m, batch_size=0),
    "two_hop seed": lambda m: two_hop.run(m, seed=None),
    "back n": lambda m: back_patching.run(m, n=True),
    "back positions": lambda m: back_patching.run(m, positions="t1"),
    "back limit": lambda m: back_patching.run(m, limit=0),
    "patch once": lambda m: back_patching.patch_once(m, "abc", position=0.0, source_layer=2, target_layer=1),
    "patch layers": lambda m: back_patching.patch_once(m, "abc", position=0, source_layer=2.0, target_layer=1),
    "sweep": lambda m: back_patching.sweep(m, "abc", "b", positions=[1]),
    "hop layers": lambda m: stages.run(m, target_layers=1),
    "hop window": lambda m: stages.run(m, window=1.5),
    "efficiency kinds": lambda m: depth_efficiency.run(m, PROSE, kinds="layer"),
    "efficiency push": lambda m: depth_efficiency.run(m, PROSE, push=np.nan),
    "efficiency seed": lambda m: depth_efficiency.run(m, PROSE, seed=2**32),
    "without": lambda m: depth_efficiency.without(m, "some text", 3),
    "without bool": lambda m: depth_efficiency.without(m, "some text", [True]),
    "gradients": lambda m: attributions.integrated_gradients(m, "some", " text", layers=[1.0]),
    "integrator": lambda m: integrator.run(m, PROSE, programs="swapped"),
    "integrator texts": lambda m: integrator.run(m, PROSE, n_texts=-1),
    "probe repeats": lambda m: probe_transfer.run(m, {"a": letters()}, repeats=2.0),
    "stitching": lambda m: stitching.run(m, m, WORDS * 4, pairs=[(1, 2.0)]),
    "stitching pair": lambda m: stitching.run(m, m, WORDS * 4, pairs=(1, 2)),
    "pretrained": lambda m: pretrained.run(m, letters(), n=4),
    "pretrained limit": lambda m: pretrained.run(m, letters(), limit=False),
    "tuned": lambda m: tuned.run(m, letters(), [letters()], steps=2.0),
    "scaling": lambda m: scaling.run(m, letters(), [letters()], grid=0.5),
    "scaling sizes": lambda m: scaling.run(m, letters(), [letters()], sizes={"documents": 4}),
    "ensemble": lambda m: ensemble.run(m, **TWO, draws=True),
    "ensemble rates": lambda m: ensemble.run(m, **TWO, rates=0.1),
    "transfer": lambda m: transfer.run("D", targets="AB"),
    "transfer gate": lambda m: transfer.run("D", gate="high"),
    "transfer halves": lambda m: transfer.run("D", halves=3),
    "merging": lambda m: merging.run(splits=2.0),
    "merging grid": lambda m: merging.run(scales="0.1"),
    "task": lambda m: tasks.make("S", train_per_class=2.5),
    "task seed": lambda m: tasks.make("S", seed=-1),
    "states": lambda m: states.collect_states(m, ["ab"], sites="resid"),
    "states index": lambda m: states.collect_states(m, ["ab"], index=[1.0]),
    "patch": lambda m: interventions.patch(m, "resid_pre", layer=True, value=torch.zeros(32)).__enter__(),
    "skip": lambda m: interventions.skip(m, 1.0).__enter__(),
    "bits": lambda m: interventions.quantized(m, 4.0).__enter__(),
    "keys": lambda m: interventions.block_attention(m, 1, query=2, keys=[1]).__enter__(),
    "skipped": lambda m: effects.skipped(m, None, ["layer"]),
    "splits": lambda m: probes.group_splits(np.arange(8) % 2, np.arange(8), repeats=1.0),
    "replicas": lambda m: replicas.Recipe(steps=2.5),
    "k_hop": lambda m: k_hop.k_hop(max_hops=2.0),
    "text_models": lambda m: language.text_models(n_layers=4),
}


def without_instruction() -> pd.DataFrame:
    """A table that was read with `lab.datasets.read`: its card has an instruction, an empty one."""
    frame = letters()
    frame.attrs["card"] = {"name": "own", "instruction": "", "instruction_place": "before"}
    return frame


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_a_model_runs(case, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    model, ran = tiny_model("llama"), []
    handle = model.original_model.base_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ValueError, match="give|choose|has no card with an instruction"):
            REFUSED[case](model)
    finally:
        handle.remove()
    assert not ran and not models.hooks_left(model) and not list(tmp_path.iterdir())


def test_engines_take_any_numbers(tiny_model):
    """The same continuations and effects from arrays, ranges and tensors as from lists."""
    model = tiny_model("llama")
    ids = model.tokenizer("the sum of two", return_tensors="pt").input_ids[0]
    run = runs.clean_run(model, ids, sublayers=True)
    value = 2 * run.states[[1, 2, 3], 3][:, None]
    wanted = runs.generate(model, run, [3], [1, 2, 3], value, max_new_tokens=3, wanted=[40])
    found = runs.generate(model, run, np.array([3]), range(1, 4), value, max_new_tokens=i(3), wanted=torch.tensor([40]))
    assert found.ids == wanted.ids and (found.ranks == wanted.ranks).all()
    depths, variants = effects.skipped(model, run, "layer")
    plain = effects.global_effects(model, run, depths, variants, cuts=[None, 5], read=[7, 9])
    other = effects.global_effects(model, run, np.array(depths), variants, cuts=(None, i(5)), read=np.array([7, 9]))
    for one, two in zip(plain, other, strict=True):
        np.testing.assert_array_equal(one.contribution, two.contribution)
        np.testing.assert_array_equal(one.output, two.output)
    collected = states.collect_states(
        model, pd.Series(["ab", "abc"]), index=np.array([1, 3]), positions=np.array([1, 0])
    )
    assert collected["resid"].index == (1, 3) and all(type(depth) is int for depth in collected["resid"].index)
