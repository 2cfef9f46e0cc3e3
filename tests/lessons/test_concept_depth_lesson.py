"""Lesson 1: its checks say what is wrong, its probes are those of the kit, its explorer answers."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from clicking import click, press
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lab
from lab import lessons
from lab.lessons import concept_depth as check
from lab.lessons import read

NAMES = np.repeat([f"city {i}|town {i}" for i in range(50)], 4)
LABELS = np.tile([0, 1, 1, 0], 50)


def said(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().out.split())


def scaled_probe() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))


def keeping(pick: Callable[..., Any], *, post: bool = False, axis: int = 1, grad: bool = False) -> Callable[..., Any]:
    """An answer to exercise 1 whose hook keeps `pick(state, rows, last)`."""

    def last_states(model, ids, last):
        states = {}
        n, rows = model.cfg.n_layers, torch.arange(len(ids))

        def keep(depth):
            return lambda state, hook: states.update({depth: pick(state, rows, last)})

        if post:
            hooks = [(f"blocks.{d}.hook_resid_post", keep(d)) for d in range(n)]
        else:
            hooks = [(f"blocks.{d}.hook_resid_pre", keep(d)) for d in range(n)]
        with torch.set_grad_enabled(grad), model.hooks(fwd_hooks=hooks):
            model(ids)
        with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{n - 1}.hook_resid_post", keep(n))]):
            model(ids)
        return torch.stack([states[d] for d in range(n + 1)], axis)

    return last_states


def without_context(model: Any, ids: Any, last: Any) -> Any:
    model.add_hook("blocks.0.hook_resid_pre", lambda state, hook: None)
    return torch.zeros(3)


STATES = {
    "keeps the state of the first token": keeping(lambda state, rows, last: state[:, 0]),
    "before the last one": keeping(lambda state, rows, last: state[rows, last - 1]),
    "Right for the longest text only": keeping(lambda state, rows, last: state[:, -1]),
    "Off by one depth": keeping(lambda state, rows, last: state[rows, last], post=True),
    "keeps the states of all positions": keeping(lambda state, rows, last: state),
    "Stack along axis 1": keeping(lambda state, rows, last: state[rows, last], axis=0),
    "in “with torch.no_grad():”": keeping(lambda state, rows, last: state[rows, last], grad=True),
    "left 1 hooks on the model": without_context,
    "Is there a “return”?": lambda model, ids, last: None,
    "other states than those": keeping(lambda state, rows, last: 2 * state[rows, last]),
    "KeyError": lambda model, ids, last: {}["blocks.0.hook_out"],
}


@pytest.mark.parametrize("message", STATES)
def test_last_states(smollm2, capsys, message) -> None:
    own = check.last_states(STATES[message], smollm2)
    assert (out := said(capsys)).startswith("last_states: not yet.") and message in out
    tokens = lab.texts.tokenize(smollm2, check.TEXTS)
    states = own(smollm2, tokens.ids, torch.as_tensor(tokens.lengths - 1))
    kit = lab.states.collect_states(smollm2, check.TEXTS, progress=False)["resid"].values
    assert torch.allclose(states, torch.as_tensor(kit), atol=1e-2)


def fitted(states: Any, labels: Any, train: Any) -> Any:
    return scaled_probe().fit(states[train], labels[train])


PROBE = {
    "Is there a “return”?": lambda states, labels, train: None,
    "fitted on all texts": lambda states, labels, train: scaled_probe().fit(states, labels).decision_function(states),
    "on the texts of the test": lambda states, labels, train: fitted(states, labels, ~train).decision_function(states),
    "These are labels, 0 or 1": lambda states, labels, train: fitted(states, labels, train).predict(states),
    "probabilities of both": lambda states, labels, train: fitted(states, labels, train).predict_proba(states),
    "You gave 40 numbers": lambda states, labels, train: fitted(states, labels, train).decision_function(states[train]),
    "The sign is turned": lambda states, labels, train: -fitted(states, labels, train).decision_function(states),
    "are not scaled": lambda states, labels, train: (
        LogisticRegression(C=0.01, max_iter=1000).fit(states[train], labels[train]).decision_function(states)
    ),
    "Did you change C": lambda states, labels, train: 3 * fitted(states, labels, train).decision_function(states),
}


@pytest.mark.parametrize("message", PROBE)
def test_probe(capsys, message) -> None:
    assert check.probe(PROBE[message]) is check._fit
    assert message in said(capsys)


def at_random(groups: Any, seed: int) -> Any:
    return np.random.default_rng(seed).random(len(groups)) < 0.4


def drawn(groups: Any, seed: int | None, share: float = 0.4) -> Any:
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    return np.isin(groups, names[: int(share * len(names))])


SPLIT = {
    "Is there a “return”?": lambda groups, seed: None,
    "groups stand on both sides": at_random,
    "one True or False for each": lambda groups, seed: np.flatnonzero(drawn(groups, seed)),
    "No text is in the test": lambda groups, seed: np.zeros(len(groups), bool),
    "Seeds 0 and 1 gave the same split": lambda groups, seed: drawn(groups, 0),
    "gave two different splits": lambda groups, seed: drawn(groups, None),
    "the wrong way round": lambda groups, seed: drawn(groups, seed, 0.6),
    "take 40 % of the names": lambda groups, seed: drawn(groups, seed, 0.2),
}


@pytest.mark.parametrize("message", SPLIT)
def test_by_group(capsys, message) -> None:
    own = check.by_group(SPLIT[message], NAMES, LABELS)
    assert message in said(capsys)
    test = own(NAMES, 3)
    assert not set(NAMES[test]) & set(NAMES[~test]) and 0.3 < test.mean() < 0.5


def in_place(labels: Any, seed: int) -> Any:
    np.random.default_rng(seed).shuffle(labels)
    return labels


SHUFFLED = {
    "rng.shuffle works in place": lambda labels, seed: np.random.default_rng(seed).shuffle(labels.copy()),
    "changed the labels that it was given": in_place,
    "turned every label round": lambda labels, seed: 1 - labels,
    "Put the SAME labels": lambda labels, seed: np.random.default_rng(4).integers(0, 2, len(labels)),
    "stand where they stood": lambda labels, seed: labels,
    "gave two different orders": lambda labels, seed: np.random.default_rng().permutation(labels),
    "gave the same order": lambda labels, seed: np.random.default_rng(0).permutation(labels),
    "The shape is": lambda labels, seed: labels[:3],
}


@pytest.mark.parametrize("message", SHUFFLED)
def test_shuffled(capsys, message) -> None:
    own = check.shuffled(SHUFFLED[message])
    assert message in said(capsys)
    assert own(LABELS, 0).sum() == LABELS.sum() and (own(LABELS, 0) != LABELS).any()


def test_questions(capsys) -> None:
    for answer, message in {"a": "not shown to the model", "c": "Noise goes up", "d": "Choose one letter"}.items():
        assert check.why_below(answer) == "b" and message in said(capsys)
    for answer, message in {"a": "never changed the model", "b": "one straight cut", 3: "Choose one letter"}.items():
        assert check.what_follows(answer) == "c" and message in said(capsys)


def test_empty_answers_and_solutions(smollm2, capsys, solution) -> None:
    lessons.start()
    given = {"torch": torch, "np": np, "n_blocks": smollm2.cfg.n_layers, "new_probe": scaled_probe}
    context: dict[str, list] = {name: [] for name in ("probe", "why_below", "shuffled", "what_follows")}
    context |= {"last_states": [smollm2], "by_group": [NAMES, LABELS]}
    for name, more in context.items():
        getattr(check, name)(..., *more)
        assert capsys.readouterr().out == f"{name}: no answer yet. The lesson goes on with the kit's own.\n"
        answer = solution("01", name, **given)
        assert getattr(check, name)(answer, *more) is answer
        assert capsys.readouterr().out == f"{name}: right.\n"


# --- curves and explorer --------------------------------------------------------------------------------------------


def test_easy_statements_are_whole_balanced_groups() -> None:
    for name in read.KINDS:
        table = read.easy(name)
        assert 200 < len(table) <= 240 and table.label.mean() == 0.5
        whole = lab.datasets.load(name)
        kept = whole[whole.group.isin(table.group) & (whole.difficulty <= read.KINDS[name][1])]
        assert len(kept) == len(table)
    assert "Fukuoka" in read.examples().data


def test_small_features_are_the_probe_of_small_C() -> None:
    rng = np.random.default_rng(0)
    states, labels = rng.normal(size=(60, 2, 5)).astype(np.float32), np.arange(60) % 2
    states[:, :, 0] = 7  # a number that never changes
    train = np.arange(60) < 40
    features = read.scaled(states, train)
    kit = lab.probes.probe_depths(features, labels, labels + np.arange(60) * 2, splits=~train[None], control=False,
                                  progress=False).decisions[0]  # fmt: skip
    for depth in range(2):
        own = scaled_probe().fit(states[train, depth], labels[train]).decision_function(states[:, depth])
        assert np.allclose(kit[:, depth], own, atol=1e-2)


@pytest.fixture(scope="module")
def small(smollm2) -> read.Reading:
    """The cities with fewer statements, probed as in the lesson."""
    table = read.easy("cities", n=80)
    states = lab.states.collect_states(smollm2, table.text.tolist(), progress=False)["resid"].values
    labels, groups = table.label.to_numpy(), table.group.to_numpy(str)
    tests = lab.probes.group_splits(labels, groups, repeats=3, test_fraction=read.TEST)
    scores = lab.probes.probe_depths(read.scaled(states), labels, groups, splits=tests, control=False, progress=False)
    return read.Reading("cities", table, states, scores)


def test_readings_rise_in_the_middle(small) -> None:
    mean = small.scores.accuracy().mean(0)
    assert mean[15] > 0.6 and 5 < small.half_way < 20
    figure = read.three({"cities": small})
    assert len(figure.axes[0].lines) == 2 and figure.axes[0].get_ylabel() == "share of statements right"
    plt.close("all")


def test_what_is_asked_is_not_learnt(smollm2, small) -> None:
    text, group = small.table.text[0], small.table.group[0]
    assert read._met(small.table, [text]) == {group}
    assert read._met(small.table, [f"People in {group.split('|')[1]} are happy."]) == {group}
    assert read._met(small.table, ["The city of Lyon is in Peru."]) == set()
    other = pd.Series(small.table.text[small.table.group == group])
    odds = read.believed(smollm2, small, [text, "The city of Lyon is in Peru."])
    assert odds.shape == (2, 31) and np.allclose(odds[:, 0], 0, atol=1e-3)  # every text ends in the same full stop
    assert np.allclose(read.believed(smollm2, small, [text, other.iloc[1]])[0], odds[0], atol=0.05)


def test_the_surest(small) -> None:
    for right in (False, True):
        rows = read.surest(small, 15, right=right)
        assert (((rows.odds > 0) == (rows.label == 1)) == right).all() and len(rows) > 1
        assert rows.odds.abs().is_monotonic_decreasing


def test_the_explorer(smollm2, small) -> None:
    explorer = read.read(smollm2, {"cities": small})
    first = bytes(explorer.picture.value)
    assert first.startswith(b"\x89PNG") and explorer.asked == read.STARTS["cities"]
    true, false = explorer.odds[:, 15]
    assert true > 0 > false
    explorer.measure.value = "probability"
    assert bytes(explorer.picture.value) != first
    listed = explorer.table.value
    explorer.depth.value = 12
    assert explorer.table.value != listed
    explorer.side.value = "sure and right"
    explorer.pick.value = explorer.pick.options[1][1]
    assert explorer.asked[0] == explorer.pick.value and len(explorer.asked) == 4 and explorer.said.value == ""
    explorer.texts.value = "One is here.\n" * 5
    explorer.go.click()
    assert "the picture holds 1 to 4" in explorer.said.value
    explorer.texts.value = ""
    explorer.go.click()
    assert "you gave 0 statements" in explorer.said.value


def test_a_click_in_the_picture_chooses_a_depth(smollm2, small) -> None:
    explorer = read.read(smollm2, {"cities": small})
    for depth, x in {7: 7.3, 0: -0.4, 30: 30.4, 12: 11.6}.items():
        before = explorer.table.value, bytes(explorer.picture.value)
        click(explorer.picture, x, 0)
        assert explorer.depth.value == depth
        assert (explorer.table.value, bytes(explorer.picture.value)) != before
        assert explorer.picture.figure.axes[0].lines[-1].get_xdata() == [depth, depth]
    click(explorer.picture, 0, 0)
    press(explorer.picture, -1, 0)
    assert explorer.depth.value == 0
    press(explorer.picture, 1, 0)
    assert explorer.depth.value == 1
