"""The transfer experiment: treatments start and end as they should, a grid resumes, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from lab.nets import replicas
from lab.results import Result
from lab.transfer import curves, pretrained, statistics, tails, tasks, tuned

TINY: dict[str, Any] = {"steps": 4, "gate": 0.0, "progress": False, "train_per_class": 150}  # few are left to test


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digits() -> Result:
    return curves.run("D", n=[0, 2], splits=2, targets=["A", "B"], resume=False, **TINY)


def test_tables(digits: Result, tmp_path: Path) -> None:
    table = digits.table
    assert list(table) == [
        "task",
        "distance",
        "split",
        "seed",
        "target",
        "treatment",
        "part",
        "n",
        "metric",
        "value",
        "gate",
    ]
    runs = table[table.metric == "accuracy"].groupby(["treatment", "part", "n"]).size()
    assert (runs == 4).all(), "two splits, two targets"
    names = [statistics.run_name(*at) for at in runs.index]
    copies = ["BnB", "AnB", "BnB_plus", "AnB_plus"]
    wanted = ["base", "base2", "BnB@0", *(f"{name}@{n}" for name in [*copies, "random"] for n in ("E", 2))]
    assert sorted(names) == sorted([*wanted, "random_matched@2"])
    items = digits.tables["items"]
    assert set(names) <= set(items) and not items.isna().any(axis=None)
    one = items[(items.split == 1) & (items.target == "A")]
    right = (one["AnB@2"] == one.label).mean()
    found = table.query("split == 1 and target == 'A' and treatment == 'AnB' and n == 2 and metric == 'accuracy'").value
    assert found.tolist() == [right]
    assert len(one) == len(tasks.make("D", split=1, train_per_class=150).sides["A"].test.labels)
    loaded = Result.load(digits.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(loaded.table, table)
    meanings = loaded.columns().set_index(["table", "column"]).meaning
    assert (meanings != "").all() and meanings["items", "AnB@2"] == "class predicted by that net"
    pd.testing.assert_frame_equal(loaded.summary, digits.summary)


def test_summary_is_the_statistics_of_the_table(digits: Result) -> None:
    runs = digits.table[digits.table.metric.isin(curves.METRICS)]
    pd.testing.assert_frame_equal(digits.summary, statistics.curves(runs))
    assert set(digits.summary.curve) == set(statistics.CURVES)
    assert digits.summary.n_pairs.eq(4).all() and digits.summary.n_clusters.eq(2).all()
    assert set(digits.tables) == {"gate", "items", "levels", "differences", "n_star"}


def starts(task: tasks.Task, plan: list[curves._Planned]) -> tuple[dict, list[replicas.Weights]]:
    shape = curves._shape(task, 4, 16, 2)
    bases = {side: replicas.initial(shape, [place + 100]) for place, side in enumerate("AB")}
    return bases, [curves._start(shape, task, bases, net) for net in plan]


def test_without_skips_it_is_another_net_and_sizes_are_not_matched(digits: Result) -> None:
    options = {**TINY, "n": [0, 2], "splits": 1, "targets": ["B"], "embedding_only": False, "resume": False}
    plain = curves.run("D", skip=False, n_blocks=3, **options)
    assert plain.parameters["model"] == "transformer, 3 blocks, d_model 64, no skip connections"
    names = set(plain.table.treatment)
    assert "random" in names and "random_matched" not in names, "a norm undoes the scale of what it reads"
    with_skip = curves.run("D", n_blocks=3, **options)

    def loss(result: Result, treatment: str) -> float:
        rows = result.table.query("treatment == @treatment and target == 'B' and metric == 'train_loss'")
        return float(rows.value.iloc[0])

    for treatment in ("base", "BnB", "random"):
        assert loss(plain, treatment) != pytest.approx(loss(with_skip, treatment), abs=1e-3)


def test_task_of_is_the_one_that_was_trained() -> None:
    other = curves.run("D", seed=1, n=[0], splits=1, embedding_only=False, random=False, resume=False, **TINY)
    one, two = (tasks.make("D", seed=seed, train_per_class=150).sides["B"].test.inputs for seed in (0, 1))
    shown = curves.task_of(other).sides["B"].test.inputs
    assert np.array_equal(shown, two) and not np.array_equal(shown, one)


def test_what_is_copied_and_what_is_fresh() -> None:
    wanted = [
        ("BnB",),
        *((name, "blocks", 2) for name in ("AnB", "BnB", "random")),
        ("AnB", "embedding", 0),
        ("base2",),
    ]
    plan = [curves._Planned("B", *one) for one in wanted]
    bases, (fresh, ab, bb, random, only, again) = starts(tasks.make("D"), plan)
    copied = ["embedding", "positions", "0.qkv", "1.mlp_out"]
    for name in fresh:
        below = name in copied or name[:2] in ("0.", "1.")
        assert torch.equal(ab[name], bases["A"][name] if below else fresh[name]), name
        assert torch.equal(bb[name], bases["B"][name] if below else fresh[name]), name
        assert torch.equal(again[name], bases["B"][name])
        if below:
            assert not torch.equal(random[name], fresh[name]) and not torch.equal(random[name], bases["A"][name])
    assert torch.equal(only["embedding"], bases["A"]["embedding"]) and torch.equal(only["0.qkv"], fresh["0.qkv"])


def test_tokens_that_the_source_never_saw_are_fresh_and_train_in_all_treatments_alike() -> None:
    sizes = {"token_noise": 0.0, "train_per_class": 20, "test_per_class": 3}  # 16 tokens are in B's sequences only
    task = tasks.make("S", halves=([20, 22], [24, 26]), **sizes)
    own, every = task.own_tokens("B").tolist(), list(range(32))
    shared = [token for token in every if token not in own]
    wanted = [("BnB",), *((name, "blocks", 2) for name in ("AnB", "BnB", "random", "BnB_plus"))]
    plan = [curves._Planned("B", *one) for one in wanted]
    bases, (fresh, ab, bb, random, plus) = starts(task, plan)
    for weights in (ab, bb, random, plus):
        assert len(own) == 16 and torch.equal(weights["embedding"][:, own], fresh["embedding"][:, own])
    assert torch.equal(bb["embedding"][:, shared], bases["B"]["embedding"][:, shared])
    assert torch.equal(ab["embedding"][:, shared], bases["A"]["embedding"][:, shared])
    trained = [curves._trained_rows(task, net).nonzero().ravel().tolist() for net in plan]
    assert trained == [every, own, own, own, every]


def test_an_interrupted_grid_resumes_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**TINY, "n": [2], "splits": 2, "embedding_only": False, "random": False}
    whole = curves.run("D", resume=False, **options)
    real, calls = replicas.train, []

    def breaks(*args: Any, **kwargs: Any) -> replicas.Trained:
        calls.append(1)
        if len(calls) == 4:  # bases and treatments of the first split, bases of the second
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(replicas, "train", breaks)
    with pytest.raises(KeyboardInterrupt):
        curves.run("D", **options)
    resumed = curves.run("D", **options)
    assert len(calls) == 6, "the first split was read, the second trained again"
    pd.testing.assert_frame_equal(resumed.table, whole.table)
    pd.testing.assert_frame_equal(resumed.tables["items"], whole.tables["items"])
    pd.testing.assert_frame_equal(resumed.summary, whole.summary)
    curves.run("D", **options)
    assert len(calls) == 6, "all was read"


def test_a_task_below_its_gate_is_reported_and_not_used(capsys: pytest.CaptureFixture) -> None:
    result = curves.run("D", n=[2], splits=2, steps=2, progress=False, resume=False)
    assert set(result.table.treatment) == {"base"} and len(result.summary) == 0
    assert result.table.gate.str.fullmatch(r"base failed: A 0\.\d+ is below 0\.8; B 0\.\d+ is below 0\.8").all()
    said = capsys.readouterr().out
    assert "task D near, split 0, seed 0: base failed: A 0." in said and "2 of 2 left out of every curve" in said
    with pytest.raises(ValueError, match="no two runs could be paired: if every base failed its gate"):
        statistics.curves(statistics.passed(result.table))
    assert set(result.tables["items"]) >= {"base", "label"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "X"}, "task='X': choose one of D, S"),
        ({"preset": "huge"}, "preset='huge': choose one of quick, standard, full"),
        ({"task": "D", "distance": "far"}, "task D has no distance 'far'"),
        ({"task": "D", "n": [0, 7]}, r"n=\[0, 7\]: give at least one, each from 0 to 6"),
        ({"task": "D", "halves": ([0, 1, 2, 3, 4], [4, 5, 6, 7, 8])}, r"classes \[4\] are in both halves"),
        ({"task": "D", "targets": ["C"]}, "targets=.*: choose at least one of A, B, none twice"),
        ({"task": "D", "splits": 0}, "splits=0: give a whole number, at least 1"),
        ({"task": "D", "form": "one_hop"}, r"there is no option form; options are .* sizes of task D are noise"),
        ({"task": "D", "split": 2}, r"there is no option split \(did you mean splits\?\)"),
        ({"task": "D", "step": 10}, r"there is no option step \(did you mean steps\?\)"),
    ],
)
def test_what_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curves.run(**arguments, progress=False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2}, r"n=2: give a list of whole numbers, such as \[2\]"),
        ({"seed": [1, 2]}, r"seed=\[1, 2\]: give a whole number .*; seeds= says how many"),
        ({"task": object()}, "the first argument is a task, D, S, and not a object"),
    ],
)
def test_a_wrong_type_is_refused_before_anything_runs(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curves.run(**{"task": "D", **arguments}, progress=False)


# --- a pretrained model ---------------------------------------------------------------------------------------------


def statements() -> pd.DataFrame:
    """Twelve groups; the label is a word that stands in every text, so that a short training finds it."""
    rows = [
        {"example": f"{group}-{label}", "text": f"{group} {['no', 'yes'][label]}", "label": label, "group": f"g{group}"}
        for group in range(12) for label in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(template="t", difficulty="d")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "olmo2", "neox"])
def test_kept_blocks_before_the_first_step_are_the_model(
    family: str, tiny_model: Callable[[str], TransformerBridge]
) -> None:
    frame = pd.DataFrame({"text": ["one", "a longer text than that", "two"], "label": 0})
    body = tails.Body(tiny_model(family), tails.as_texts(tiny_model(family), frame), "trained", 0, [0, 1, 3, 4])
    for n in (0, 1, 3, 4):
        whole, ours = body.before_training(n, torch.arange(3))
        assert (whole - ours).abs().max() < 1e-5
        head = body.whole.get_output_embeddings()
        assert (head(whole) - head(ours)).abs().max() < 1e-5


def test_other_layouts_are_refused(tiny_model: Callable[[str], TransformerBridge]) -> None:
    with pytest.raises(ValueError, match="GPT2Model is not laid out like Llama"):
        pretrained.run(tiny_model("gpt2"), statements(), progress=False, resume=False)


def test_pretrained(tiny_model: Callable[[str], TransformerBridge]) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    options: dict[str, Any] = {"n": [2, 4], "steps": 20, "rate": 1e-3, "head_rate": 1e-2, "progress": False}
    result = pretrained.run(model, statements(), **options)
    for name, value in model.original_model.state_dict().items():
        assert torch.equal(value, before[name]), "the model itself is not trained"
    summary = result.summary.set_index(["weights", "treatment", "n"])
    treatments = {(w, t, n) for w in ("trained", "random") for t in "KRSP" for n in (2, 4)}
    treatments -= {(w, t, 4) for w in ("trained", "random") for t in "KR"}
    assert set(summary.index) == treatments | {("none", "majority", 0), ("none", "bag_of_words", 0)}
    assert summary.accuracy["none", "bag_of_words", 0] == 1 and summary.accuracy["none", "majority", 0] == 0.5
    assert summary.accuracy["trained", "K", 2] > 0.8
    assert result.table.groupby(["treatment"]).trained_weights.nunique()["S"] == 1, "the same capacity at every n"
    again = pretrained.run(model, statements(), **options)  # read from the cache
    pd.testing.assert_frame_equal(again.table, result.table)
    pairs = result.tables["differences"].set_index(["first", "second", "n"])
    assert pairs.loc[("K (trained)", "R (trained)", 2), "difference"] == pytest.approx(
        summary.accuracy["trained", "K", 2] - summary.accuracy["trained", "R", 2]
    )


def test_the_same_texts_with_other_labels_are_other_data(tiny_model: Callable[[str], TransformerBridge]) -> None:
    options: dict[str, Any] = {"n": [4], "treatments": ["P"], "null": False, "steps": 2, "progress": False}
    model, frame = tiny_model("llama"), statements()
    pretrained.run(model, frame, **options)
    turned = frame.assign(label=1 - frame.label)
    found = pretrained.run(model, turned, **options).tables["items"]
    wanted = pretrained.run(model, turned, resume=False, **options).tables["items"]
    pd.testing.assert_frame_equal(found, wanted)  # nothing of the first run was read


def test_no_step_leaves_the_tail_as_it_was(tiny_model: Callable[[str], TransformerBridge]) -> None:
    frame = statements()
    texts = tails.as_texts(tiny_model("llama"), frame)
    body = tails.Body(tiny_model("llama"), texts, "trained", 0, [2])
    keep, fresh = (body.tail(2, 2, keep=kept, seed=0) for kept in (True, False))
    for number, (kept, new) in enumerate(zip(keep.layers, fresh.layers, strict=True)):
        old = body.plain.layers[2 + number].state_dict()
        assert all(torch.equal(value, old[name]) for name, value in kept.state_dict().items())
        assert not any(torch.equal(value, old[name]) for name, value in new.state_dict().items())
    start = {name: value.clone() for name, value in keep.state_dict().items()}
    test = np.arange(len(frame)) < 4
    tails.tune(keep, texts, body.states[2], test, tails.Tuning(0, 4, 1e-3, 1e-3), 0)
    assert all(torch.equal(value, start[name]) for name, value in keep.state_dict().items())
    tails.tune(keep, texts, body.states[2], test, tails.Tuning(1, 4, 1e-3, 1e-3), 0)
    assert not any(torch.equal(value, start[name]) for name, value in keep.layers.state_dict(prefix="layers.").items())


def test_tuned(tiny_model: Callable[[str], TransformerBridge], tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    target, near, far = statements(), statements(), statements()
    far = far.assign(label=1 - far.label)  # the same words, the other way round
    options: dict[str, Any] = {"n": [0, 2, 4], "steps": 20, "rate": 3e-3, "head_rate": 1e-2, "progress": False}
    result = tuned.run(model, target, [near, far], repeats=2, **options)
    for name, value in model.original_model.state_dict().items():
        assert torch.equal(value, before[name]), "the model itself is not trained"
    summary = result.summary.set_index(["treatment", "source", "n"])
    sources = [("BnB", "your data 0"), ("AnB", "your data 1"), ("AnB", "your data 2"), ("untouched", "untouched")]
    assert set(summary.index) == {(*one, n) for one in sources for n in (0, 2, 4)}
    items = result.tables["items"]
    at_0 = items[items.n == 0].groupby(["split", "example"]).log_p
    assert (at_0.nunique() == 1).all(), "with nothing carried over all are one net"
    assert items[items.n == 2].groupby(["split", "example"]).log_p.nunique().eq(4).all(), "four different bodies"
    gaps = result.tables["differences"].set_index(["curve", "source", "n"]).difference
    for curve, first, second in (("specificity", sources[0], sources[1]), ("over_untouched", sources[1], sources[3])):
        wanted = summary.accuracy[(*first, 4)] - summary.accuracy[(*second, 4)]
        assert gaps[curve, "your data 1", 4] == pytest.approx(wanted)
    assert gaps["own_tuning", "your data 0", 0] == 0
    assert summary.accuracy["BnB", "your data 0", 4] > 0.8, "tuned on these very words, a read-out is enough"
    learnt = result.tables["sources"]
    assert learnt.learnt.all() and learnt.accuracy.min() > 0.8 and (learnt.majority == 0.5).all()
    random = near.assign(label=np.random.default_rng(0).permutation(near.label))
    failed = tuned.run(model, target, [random], **options, resume=False)
    assert failed.tables["sources"].learnt.tolist() == [True, False]
    assert set(failed.tables["differences"].curve) == {"own_tuning"}, "an unlearnt source says nothing"
    again = tuned.run(model, target, [near, far], repeats=2, **options)  # read from the cache
    pd.testing.assert_frame_equal(again.table, result.table)
    pd.testing.assert_frame_equal(Result.load(result.save(tmp_path / "saved")).summary, result.summary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": [5]}, r"n=\[5\]: give at least one, each from 0 to 4, none twice .carried blocks."),
        ({"preset": "tiny"}, "preset='tiny': choose one of quick, standard"),
        ({"sources": []}, r"sources=\[\]: give at least 1 of the data sets"),
        ({"sources": "numbers"}, "sources='numbers': give a list of data sets"),
        ({"sources": ["numbers", "numbers"]}, "numbers is there twice"),
        ({"repeats": 0}, "repeats=0: give a whole number, at least 1"),
    ],
)
def test_what_tuned_refuses(arguments: dict, message: str, tiny_model: Callable[[str], TransformerBridge]) -> None:
    with pytest.raises(ValueError, match=message):
        tuned.run(tiny_model("llama"), statements(), **{"sources": ["numbers"], **arguments}, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": [5]}, r"n=\[5\]: give at least one, each from 0 to 4, none twice .frozen blocks."),
        ({"preset": "tiny"}, "preset='tiny': choose one of quick, standard"),
        ({"treatments": ["K", "Q"]}, "treatments=.*: choose at least one of K, R, S, P"),
    ],
)
def test_what_pretrained_refuses(arguments: dict, message: str, tiny_model: Callable[[str], TransformerBridge]) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained.run(tiny_model("llama"), statements(), **arguments, progress=False)
