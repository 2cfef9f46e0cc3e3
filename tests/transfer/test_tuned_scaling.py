"""Scaled updates: exact ends, block numbers, what is held against a plain computation, and a model left as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaModel

from lab import models
from lab.results import Result
from lab.transfer import scales as us
from lab.transfer import scaling as ts

SIZES: dict[str, Any] = {
    "train": 24,
    "validation": 8,
    "test": 12,
    "documents": (3, 4),
    "length": 8,
    "steps": 4,
    "batch": 8,
}
QUICK: dict[str, Any] = {
    "sizes": SIZES, "grid": [1.0, 0.5, 0.0], "permutations": 2, "frozen": [0.5], "rate": 3e-3, "draws": 200, "progress": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))


def statements(words: tuple[str, str], n: int = 24) -> pd.DataFrame:
    """Groups of two texts; the label is a word that stands at the end."""
    rows = [
        {"example": f"{group}-{label}", "text": f"{group} is {words[label]}", "label": label, "group": f"g{group}"}
        for group in range(n)
        for label in (0, 1)
    ]
    return pd.DataFrame(rows).assign(template="t", difficulty="d")


DOCUMENTS = pd.DataFrame({"text": [f"{'ab' * n} and {'xyz' * n} again" for n in range(3, 12)]})
TARGET, CONTROL = statements(("no", "yes")), statements(("cold", "hot"))


@pytest.fixture(scope="module")
def weights() -> tuple[us.Weights, us.Weights]:
    """A model of 12 blocks and another one as its tuned version: block 1 and block 11 must not be mixed up."""
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2
        )
        net = LlamaModel(config)
        nets.append({name: value.detach() + 0.1 * torch.randn_like(value) for name, value in net.named_parameters()})
    return nets[0], nets[1]


def test_ends_are_equal_in_every_bit(weights: tuple[us.Weights, us.Weights]) -> None:
    base, tuned = weights
    for scales, wanted in ((us.ramp(12, 1.0), tuned), (us.constant(12, 1.0), tuned), (us.constant(12, 0.0), base)):
        assert all(torch.equal(value, wanted[name]) for name, value in us.scaled(base, tuned, scales).items())
    ramp_only = us.scaled(base, tuned, us.ramp(12, 0.0))
    kept = {name for name, value in ramp_only.items() if torch.equal(value, base[name])}
    whole = {name for name, value in ramp_only.items() if torch.equal(value, tuned[name])}
    assert kept == {name for name in base if name.startswith("layers.0.") or not name.startswith("layers.")}
    assert whole == {name for name in base if name.startswith("layers.11.")}


def test_each_block_gets_its_own_scale(weights: tuple[us.Weights, us.Weights]) -> None:
    base, tuned = weights
    alpha = 0.3
    for name, value in us.scaled(base, tuned, us.ramp(12, alpha)).items():
        place = int(name.split(".")[1]) if name.startswith("layers.") else None
        scale = alpha if place is None else alpha + (1 - alpha) * place / 11
        torch.testing.assert_close(value, base[name] + scale * (tuned[name] - base[name]))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layers.1.mlp.up_proj.weight", 1),
        ("layers.11.mlp.up_proj.weight", 11),
        ("model.layers.11.mlp.experts.1.up.weight", 11),
        ("gpt_neox.layers.10.attention.dense.bias", 10),
        ("transformer.h.2.attn.c_attn.weight", 2),
        ("norm.weight", None),
        ("embed.1.weight", None),
        ("sublayers.3.weight", None),
    ],
)
def test_block_numbers_are_read_whole(name: str, block: int | None) -> None:
    assert us.block_of(name) == block


def test_same_size_and_order(weights: tuple[us.Weights, us.Weights]) -> None:
    base, tuned = weights

    def length(scales: us.Scales) -> float:
        found = us.scaled(base, tuned, scales)
        return float(torch.cat([(found[name] - base[name]).ravel() for name in base]).norm())

    scales = us.ramp(12, 0.2)
    same = us.same_size(base, tuned, scales)
    assert length(us.constant(12, same)) == pytest.approx(length(scales), rel=1e-5)
    assert same != pytest.approx(np.mean(scales.blocks), rel=1e-3), (
        "blocks count by their size, and what is outside too"
    )
    mixed = us.permuted(scales, np.random.default_rng(0))
    assert sorted(mixed.blocks) == sorted(scales.blocks) and mixed.blocks != scales.blocks and mixed.outside == 0.2


def test_what_scaled_refuses(weights: tuple[us.Weights, us.Weights]) -> None:
    base, tuned = weights
    with pytest.raises(ValueError, match=r"11 scales for blocks \[0, 1, 2\]\.\.11: pass one for each"):
        us.scaled(base, tuned, us.constant(11, 1.0))
    with pytest.raises(ValueError, match="base and tuned are not one model"):
        us.scaled(base, {**tuned, "more": torch.zeros(1)}, us.constant(12, 1.0))
    with pytest.raises(ValueError, match="alpha=1.5: pass 2 blocks or more and a number in"):
        us.ramp(12, 1.5)


def task_of(model: TransformerBridge, data: Any, **sizes: Any) -> ts._Task:
    return ts._Task(model, data, ts._sizes("quick", {**SIZES, **sizes}), 0, 1)


def test_scores_against_a_plain_computation(tiny_model: Callable[[str], TransformerBridge]) -> None:
    model = tiny_model("llama")
    net = models.plain_twin(model)
    prose = task_of(model, DOCUMENTS)
    accuracy, nll = prose.score(net, "test")
    for row, text in enumerate(prose.frames["test"].text):
        ids = torch.tensor(model.tokenizer(text, add_special_tokens=False).input_ids[: SIZES["length"]])
        log_p = net(ids[None]).logits[0, :-1].log_softmax(-1)
        assert nll[row] == pytest.approx(-log_p[range(len(ids) - 1), ids[1:]].mean().item(), rel=1e-4)
        assert accuracy[row] == (log_p.argmax(-1) == ids[1:]).float().mean().item()
    labelled = task_of(model, CONTROL)
    labelled.make_read_out(net, "fitted")
    accuracy, nll = labelled.score(net, "test")
    for row, (text, label) in enumerate(labelled.frames["test"][["text", "label"]].itertuples(index=False)):
        ids = torch.tensor(model.tokenizer(text, add_special_tokens=False).input_ids)
        logit = net.base_model(ids[None]).last_hidden_state[0, -1] @ labelled.weight + labelled.bias
        assert nll[row] == pytest.approx(float(np.logaddexp(0, -logit.item() * (2 * label - 1))), rel=1e-3)
        assert accuracy[row] == ((logit.item() > 0) == bool(label))
    labelled.make_read_out(net, "random")
    logits = labelled.states(net, "train", torch.arange(len(labelled.ids["train"]))) @ labelled.weight + labelled.bias
    assert logits.mean().item() == pytest.approx(0, abs=1e-3) and logits.std(correction=0).item() == pytest.approx(1)
    parts = [set(frame.group) for frame in labelled.frames.values()]
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]


def test_run(tiny_model: Callable[[str], TransformerBridge], tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    result = ts.run(model, TARGET, [CONTROL], seeds=2, **QUICK)
    for name, value in model.original_model.state_dict().items():
        assert torch.equal(value, before[name]), "the caller's model is not changed"
    methods = ["untouched", "tuned", "lines", "reversed", "wise_ft", "frozen", "ramp_only", "same_norm", "permuted"]
    assert list(result.summary.method.unique()) == methods
    grid = result.tables["grid"]
    assert grid.groupby(["seed", "family"]).chosen.sum().eq(1).all()
    evaluations = grid.groupby("family").size().drop("frozen")
    assert evaluations.nunique() == 1, "the same number of evaluations"
    chosen = grid[grid.chosen].merge(grid.groupby(["seed", "family"]).score.max().rename("best").reset_index())
    assert (chosen.score == chosen.best).all()
    np.testing.assert_allclose(grid.score, 2 * grid.target + grid.control)
    at_one = grid[grid.alpha == 1].groupby("seed").score
    assert (at_one.nunique() == 1).all() and (grid[grid.alpha == 1].target == 1).all(), "alpha 1 is the tuned model"
    items = result.tables["items"]
    per_text = items.pivot_table("nll", ["seed", "set", "example"], "method")
    assert not np.allclose(per_text.untouched, per_text.tuned), "tuning did something"
    update = result.tables["update"].groupby("seed")[["tau", "theta_0"]].sum()
    assert update.tau.gt(0).all() and update.tau.nunique() == 2
    assert update.theta_0.nunique() == 1, "the second seed starts from the model, not from the first one's end"
    # against plain means
    summary = result.summary.set_index(["method", "measure"]).estimate
    means = items[items.set == "your data 0"].groupby("method").accuracy.mean()
    np.testing.assert_allclose(summary.xs("target", level="measure")[means.index], means)
    gap = result.tables["differences"].set_index(["other", "measure"])
    assert gap.difference["tuned", "target"] == pytest.approx(means["lines"] - means["tuned"])
    assert summary["untouched", "control"] == 1 and (gap.p_holm >= gap.p).all()
    again = ts.run(model, TARGET, [CONTROL], seeds=2, **QUICK)  # read from the cache
    pd.testing.assert_frame_equal(again.table, result.table)
    loaded = Result.load(result.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(loaded.tables["grid"], grid)


def test_the_net_is_put_back(tiny_model: Callable[[str], TransformerBridge], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    net = models.plain_twin(model)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tasks = [task_of(model, TARGET), task_of(model, CONTROL)]
    sizes = ts._sizes("quick", {**SIZES, "grid": (1.0, 0.0), "permutations": 1})
    ts.work(net=net, tasks=tasks, sizes=sizes, rate=1e-2, head="random", seed=0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    monkeypatch.setattr(ts._Task, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ts.work(net=net, tasks=tasks, sizes=sizes, rate=1e-2, head="random", seed=0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_frozen_blocks_are_not_tuned(tiny_model: Callable[[str], TransformerBridge]) -> None:
    model = tiny_model("llama")
    net, task = models.plain_twin(model), task_of(model, TARGET)
    task.make_read_out(net, "random")
    before = {name: value.clone() for name, value in net.base_model.named_parameters()}
    sizes = ts._sizes("quick", SIZES)
    after = ts._tune(net, task, sizes, 1e-2, 0, frozen=1)
    ts._write(net.base_model, after)
    scored = task.score(net, "test")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("embed", "layers.0.")) for name in moved)
    assert {name for name in before if name.startswith(("layers.1.", "norm"))} <= moved
    ts._write(net.base_model, before)
    every = ts._tune(net, task, sizes, 1e-2, 0)
    assert any(not torch.equal(every[name], before[name]) for name in before if name.startswith("layers.0."))
    ts._write(net.base_model, before)
    sizes = ts._sizes("quick", {**SIZES, "frozen": (0.25,), "grid": (1.0,), "permutations": 0})
    shard = ts.work(net=net, tasks=[task, task_of(model, CONTROL)], sizes=sizes, rate=1e-2, head="random", seed=0)
    items = shard.tables["items"].query("method == 'frozen' and role == 'target'")
    np.testing.assert_allclose(items.nll, scored[1])


def test_published_numbers() -> None:
    table = ts.published()
    controls = table[(table.task == "EuroSAT") & (table.role == "control")]
    assert len(controls) == 7 and (controls.tuned < controls[["pretrained", "lines"]].min(axis=1)).all()
    assert table[table.source.str.contains("second-hand")].task.unique().tolist() == ["mean of 8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "preset='huge': choose one of quick, standard"),
        ({"grid": [1.0, 2.0]}, r"grid\[1\]=2.0: give a number at least 0 and at most 1"),
        ({"frozen": [0.1]}, r"frozen=\[0.1\]: of 4 blocks that is none or all"),
        ({"frozen": [1.0]}, r"frozen\[0\]=1.0: give a number above 0 and below 1"),
        ({"sizes": {"texts": 3}}, "there is no size texts; sizes are train, validation"),
        ({"seeds": 0}, "seeds=0: give a whole number, at least 1"),
        ({"head": "fresh"}, "head='fresh': choose one of random, fitted"),
        ({"rate": 0.0}, "rate=0.0: give a number above 0"),
        ({"control_data": []}, r"control_data=\[\]: give at least 1 of the data sets"),
        ({"control_data": ["numbers", "numbers"]}, "each can be there once"),
        ({"target_data": DOCUMENTS}, "the target is a labelled set"),
        ({"control_data": [DOCUMENTS.assign(text=[f"ab{n}" for n in range(9)])]}, "has 3 tokens, and length=8 are"),
    ],
)
def test_what_is_refused(arguments: dict, message: str, tiny_model: Callable[[str], TransformerBridge]) -> None:
    call = {"target_data": TARGET, "control_data": [CONTROL], **QUICK, **arguments}
    with pytest.raises(ValueError, match=message):
        ts.run(tiny_model("llama"), **call)
