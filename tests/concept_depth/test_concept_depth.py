"""The concept-depth experiment on real Bridge models: what it finds, what it must not find, and how it refuses."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformer_lens.model_bridge import TransformerBridge

import lab
from lab.concept_depth import accuracy as concept_depth

KILLED = """
import sys
import lab
from lab import concept_depth
model = lab.load(sys.argv[1])
result = concept_depth.run(model, lab.datasets.load("coin_flips"), limit=400, repeats=3, sites=("resid",), null=False)
result.table.to_csv(sys.argv[2], index=False)
"""

WORDS = ("lamp", "tree", "boat", "wolf", "ring", "salt")


def letters(n: int = 80, *, seed: int = 0) -> pd.DataFrame:
    """Texts whose label is the FIRST letter; the last token is a full stop in all of them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    middle = [" ".join(words) for words in rng.permutation(list(product(WORDS, repeat=3)))[:n]]  # no text twice
    return pd.DataFrame(
        {
            "example": [f"letters-{i:03}" for i in range(n)],
            "text": [f"{'xq'[label]} {words}." for label, words in zip(labels, middle, strict=True)],
            "label": labels,
            "group": [f"g{i // 4}" for i in range(n)],
            "template": "letters",
            "difficulty": 1,
        }
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has an empty cache, so that nothing comes from an earlier run."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mean_curve(
    result: lab.Result, *, site: str = "resid", labels: str = "task", weights: str = "trained"
) -> np.ndarray:
    rows = result.summary.query("metric == 'accuracy' and site == @site and labels == @labels and weights == @weights")
    return rows.sort_values("depth")["mean"].to_numpy()


def run(model: TransformerBridge, data: pd.DataFrame | str, **options) -> lab.Result:
    return concept_depth.run(model, data, **{"repeats": 4, "progress": False, "resume": False, **options})


# --- what it finds ---------------------------------------------------------------------------------------------------


def test_what_attention_brings_is_found_after_it_and_not_before(tiny_model):
    result = run(tiny_model("llama"), letters())
    curve, shuffled = mean_curve(result), mean_curve(result, labels="shuffled")
    assert curve[0] == pytest.approx(0.5, abs=0.13)  # depth 0: the embedding of a full stop, the same in every text
    assert curve[1] > 0.75 and curve[2:].min() > 0.9  # attention brings the first letter
    assert np.abs(shuffled - 0.5).max() < 0.2
    assert set(result.table.weights) == {"trained", "random", "none"}
    assert mean_curve(result, site="mlp_in").shape == (4,)


def test_tables_agree_with_each_other(tiny_model):
    result = run(tiny_model("llama"), letters(), null=False)
    table, examples = result.table, result.tables["examples"]
    accuracy = table.query("metric == 'accuracy' and site == 'resid' and labels == 'task'")
    pd.testing.assert_series_equal(
        accuracy.groupby("depth")["value"].mean(),
        pd.Series(mean_curve(result), range(5)),
        check_names=False,
        check_index_type=False,
    )
    assert (examples.query("site == 'resid'").groupby("example").size() == 5).all()
    certain = examples.query("share_right == 1 and times_tested > 0")
    assert ((certain.decision > 0) == (certain.label == 1)).all()
    points = result.tables["points"].set_index(["site", "point"])["estimate"]
    assert points["resid", "peak_crossfit"] <= points["resid", "peak_naive"] + 1e-9
    assert result.parameters["n_groups"] == 20
    assert result.parameters["checksum"] == lab.models.facts(tiny_model("llama"))["checksum"]


def test_same_seed_same_numbers_and_another_seed_other_numbers(tiny_model):
    first, again, other = (run(tiny_model("llama"), letters(), seed=seed, null=False) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first.table, again.table)
    assert not first.table["value"].equals(other.table["value"])


def test_solvers_agree(tiny_model):
    batched, sklearn = (run(tiny_model("llama"), letters(), null=False, solver=s) for s in ("batched", "sklearn"))
    assert np.abs(mean_curve(batched) - mean_curve(sklearn)).max() <= 0.02


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma3", "olmo2"])
def test_runs_on_other_architectures(tiny_model, family):
    result = run(tiny_model(family), letters(), null=False, control=False)
    assert mean_curve(result).max() > 0.9


def test_noise_and_bits_change_the_states_and_leave_the_model(tiny_model):
    model = tiny_model("llama")
    clean = run(model, letters(), null=False)
    noisy, coarse = (
        run(model, letters(), null=False, noise=True),
        run(model, letters(), null=False, bits=2, group_size=16),
    )
    again = run(model, letters(), null=False)
    for changed in (noisy, coarse):
        assert not np.allclose(changed.tables["examples"].decision, clean.tables["examples"].decision)
    pd.testing.assert_frame_equal(again.tables["examples"], clean.tables["examples"])
    assert lab.checks.hooks_left(model) == 0
    assert noisy.parameters["data_checksum"] != clean.parameters["data_checksum"]


def test_noise_is_glued_in_front_and_instructions_stand_where_the_card_says():
    frame = lab.datasets.load("cities").head(40)
    noisy = concept_depth._texts(frame, noise=True, instruction=False, seed=0)
    assert {text[:3] for text in noisy} == {"aaa", "bbb"}
    assert [text[3:] for text in noisy] == list(frame.text)
    frame.attrs["card"] = lab.datasets.load("cities").attrs["card"]
    told = concept_depth._texts(frame, noise=False, instruction=True, seed=0)
    assert told[0] == f"{frame.attrs['card']['instruction']} {frame.text.iloc[0]}"


def test_limit_takes_whole_groups():
    frame = concept_depth._limited(lab.datasets.load("cities"), 100, seed=0)
    whole = lab.datasets.load("cities").groupby("group").size()
    assert 100 <= len(frame) <= 104
    sizes = frame.groupby("group").size()
    assert (sizes == whole.reindex(sizes.index)).all()


def test_compare_is_paired_and_zero_for_the_same_run(tiny_model):
    model = tiny_model("llama")
    clean, noisy = run(model, letters(), null=False), run(model, letters(), null=False, noise=True)
    same = concept_depth.compare(clean, clean)
    assert (same[["difference", "low", "high"]] == 0).all().all()
    assert (concept_depth.compare(clean, noisy).difference != 0).any()
    some = run(model, letters(), null=False, sites=("resid",), depths=(0, 2, 4))
    with pytest.raises(ValueError, match="chosen depths= has no curve"):
        concept_depth.compare(clean, some)
    with pytest.raises(ValueError, match="the runs tested different statements"):
        concept_depth.compare(clean, run(model, letters().iloc[:60], null=False))


# --- saved, resumed, elsewhere ---------------------------------------------------------------------------------------


def test_result_is_saved_whole_and_drawn_without_a_model(tiny_model, tmp_path):
    result = run(tiny_model("llama"), letters())
    result.save(tmp_path / "saved")
    result.save(tmp_path / "saved")  # again, over itself
    loaded = lab.Result.load(tmp_path / "saved")
    assert loaded.parameters == result.parameters
    pd.testing.assert_frame_equal(loaded.table, result.table, check_dtype=False)
    pd.testing.assert_frame_equal(loaded.summary, result.summary, check_dtype=False)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table, check_dtype=False)
    labels = loaded.plot().axes[0].get_legend_handles_labels()[1]
    assert "shuffled labels (control)" in labels and "random weights (null)" in labels
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".saved")] == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        result.save(tmp_path / "other")


def test_finished_parts_are_read_and_not_computed_again(tiny_model, passes, own_cache):
    first = run(tiny_model("llama"), letters(), null=False, resume=True)
    there = len(passes)
    again = run(tiny_model("llama"), letters(), null=False, resume=True)
    assert there > 0 and len(passes) == there
    pd.testing.assert_frame_equal(first.table, again.table, check_dtype=False)
    assert not list((own_cache / "runs").glob("*.scratch"))
    run(tiny_model("llama"), letters(), null=False, resume=True, seed=1)
    assert len(passes) > there


def test_an_edited_model_is_not_taken_for_the_one_on_the_disk(tiny_model):
    model = tiny_model("llama")
    clean = run(model, letters(), null=False, resume=True)
    with lab.interventions.quantized(model, 2, group_size=16):
        coarse = run(model, letters(), null=False, resume=True)
    assert not np.allclose(clean.tables["examples"].decision, coarse.tables["examples"].decision)
    with lab.interventions.skip(model, 0):
        hooked = run(model, letters(), null=False, resume=True)
    assert not np.allclose(clean.tables["examples"].decision, hooked.tables["examples"].decision)


def test_two_processes_share_one_shard(tiny_folder, own_cache):
    """Both want the same states at the same time: the work is done once, and both get it."""
    command = [sys.executable, "-c", KILLED.replace("coin_flips", "sentiment_words"), str(tiny_folder("llama"))]
    outputs = [own_cache.parent / f"{i}.csv" for i in (1, 2)]
    both = [
        subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for out in outputs
    ]
    for process in both:
        said = process.communicate()[1]
        assert process.returncode == 0, said[-2000:]
    assert outputs[0].read_text() == outputs[1].read_text()
    assert len(list((own_cache / "runs").glob("*/result.json"))) == 1


def test_a_process_pool_gives_the_same_numbers(tiny_model):
    here = run(tiny_model("llama"), letters())
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        there = run(tiny_model("llama"), letters(), executor=pool)
    # another number of threads may round otherwise
    np.testing.assert_allclose(mean_curve(there), mean_curve(here), atol=0.02)


@pytest.mark.slow
def test_killed_while_collecting_goes_on_and_ends_with_the_same_table(smollm2, own_cache, tmp_path):
    command = [sys.executable, "-c", KILLED, smollm2.lab_source["path"]]
    whole = {**os.environ, "LAB_CACHE": str(tmp_path / "whole")}
    subprocess.run([*command, str(tmp_path / "whole.csv")], check=True, env=whole, capture_output=True)
    process = subprocess.Popen(
        [*command, str(tmp_path / "killed.csv")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    done: list[Path] = []
    while not done or not np.load(done[0]).any():  # until some states are on the disk
        time.sleep(0.2)
        assert process.poll() is None, "it ended before it could be killed"
        done = list((own_cache / "runs").glob("*.scratch/done.npy"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = np.load(done[0]).sum()
    subprocess.run([*command, str(tmp_path / "killed.csv")], check=True, capture_output=True)
    assert 0 < before < 400
    assert (tmp_path / "killed.csv").read_text() == (tmp_path / "whole.csv").read_text()


# --- refusals: before the model runs, with nothing written -------------------------------------------------------------


def changed(**columns) -> pd.DataFrame:
    return letters().assign(**columns)


BAD = {
    "unknown data set": ("citys", {}, "no data set 'citys'. There are: "),
    "missing column": (letters().drop(columns="label"), {}, "label"),
    "one class": (changed(label=1), {}, "class"),
    "label 2": (changed(label=[0, 2] * 40), {}, "2"),
    "empty text": (changed(text=["a."] + [" "] * 79), {}, "give it a text"),
    "too long": (changed(text=[f"{i}." + "b" * 200 for i in range(80)]), {}, "context holds 128"),
    "group spans all": (changed(group="one"), {}, "group"),
    "depth": (
        letters(),
        {"depths": [2, 9], "sites": ("resid",)},
        "depths=[2, 9]: give at least one, each from 0 to 4, none twice; None probes all of them (9 is not)",
    ),
    "no depths": (letters(), {"depths": [], "sites": ("resid",)}, "depths=[]: give at least one"),
    "depth twice": (letters(), {"depths": [2, 2], "sites": ("resid",)}, "depths=[2, 2]: .* none twice"),
    "depths of two sites": (letters(), {"depths": [2]}, "chooses depths of the residual stream"),
    "no group": (changed(group=[None, *"abc"] * 20), {}, "has no group"),
    "text in two groups": (changed(text="the same."), {}, "stands more than once"),
    "site": (letters(), {"sites": ("resid_top",)}, "sites=['resid_top']: choose at least one of resid, "),
    "bits": (letters(), {"bits": 1}, "bits=1: give a whole number from 2 to 8"),
    "group size": (letters(), {"bits": 4, "group_size": 48}, "group_size=48 does not divide"),
    "solver": (letters(), {"solver": "svm"}, "solver='svm'"),
    "instruction": (letters(), {"instruction": True}, "no card with an instruction"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_the_model_runs(tiny_model, passes, own_cache, case):
    data, options, message = BAD[case]
    with pytest.raises(ValueError, match=re.sub(r"[()\[]", r"\\\g<0>", message)):
        concept_depth.run(tiny_model("llama"), data, progress=False, **options)
    assert passes == []
    assert not (own_cache / "runs").exists()


def test_absent_site_is_named(tiny_model):
    with pytest.raises(ValueError, match="no site resid_mid: this model's blocks run attention and MLP in parallel"):
        run(tiny_model("neox"), letters(), sites=("resid_mid",))


# --- the real model ----------------------------------------------------------------------------------------------------


def test_truth_of_a_city_becomes_readable_between_depth_8_and_14(smollm2):
    """The notebooks' headline: at chance in the first blocks, a rise about a third of the way, random weights at chance."""
    result = run(smollm2, "cities", limit=320, sites=("resid",), depths=(0, 2, 8, 14, 18), repeats=10)
    early, late = mean_curve(result)[:2], mean_curve(result)[3:]
    assert np.abs(early - 0.5).max() < 0.06
    assert late.min() > 0.6
    assert np.abs(mean_curve(result, weights="random") - 0.5).max() < 0.08
