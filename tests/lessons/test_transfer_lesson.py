"""Lesson 4: its checks say what is wrong, its nets are right, its explorer answers."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from clicking import click, press
from scipy import stats

from lab import lessons
from lab.lessons import carry, nets
from lab.lessons import transfer as check
from lab.transfer import statistics

T = stats.t.ppf(0.975, nets.SPLITS - 1)


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """`forward` and `loss_of`, which the lesson gives to its participants."""
    path = Path(__file__).resolve().parents[2] / "notebooks" / "lessons" / "04_transfer.py"
    source = next(cell.source for cell in jupytext.read(path).cells if "def forward(" in cell.source)
    names: dict[str, Any] = {"torch": torch}
    exec(source, names)
    return names


@pytest.fixture
def said(capsys) -> Callable[[], str]:
    """What was printed, on one line."""
    return lambda: " ".join(capsys.readouterr().out.split())


def trained(given: dict[str, Any], free: Callable, net: Callable, back: Callable) -> Callable[..., Any]:
    """An answer to exercise 1: which layers train, what runs, and what is returned."""

    def train(weights, x, y, frozen=0, steps=150):
        moving = free(weights, frozen)
        optimizer = torch.optim.AdamW(moving, lr=3e-3, weight_decay=0.01)
        for _ in range(steps):
            loss = given["loss_of"](given["forward"](net(weights, frozen, moving), x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return back(weights, frozen, moving)

    return train


def copies(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    return [layer.clone().requires_grad_() for layer in layers]


def still(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    return [layer.detach() for layer in layers]


def first_stay(weights, n, moving):
    return [*weights[:n], *still(moving)]


def joined(weights, n, moving):
    return [*weights[:n], *moving]


TRAIN = {
    "The loss must depend on `free`": (lambda w, n: copies(w[n:]), lambda w, n, moving: w, first_stay),
    "let each free layer ask for its gradient": (lambda w, n: [x.clone() for x in w[n:]], joined, first_stay),
    "The weights that you were given have changed": (lambda w, n: [x.requires_grad_() for x in w[n:]], joined, first_stay),
    "Is there a “return”?": (lambda w, n: copies(w[n:]), joined, lambda w, n, moving: None),
    "You returned 4 layers": (lambda w, n: copies(w[n:]), joined, lambda w, n, moving: still(moving)),
    "still ask for gradients": (lambda w, n: copies(w[n:]), joined, joined),
    "No layer has changed": (lambda w, n: copies(w[n:]), joined, lambda w, n, moving: list(w)),
    "all six layers have changed": (lambda w, n: copies(w), lambda w, n, moving: moving, lambda w, n, moving: still(moving)),
    "You froze the LAST two layers": (
        lambda w, n: copies(w[:-n]),
        lambda w, n, moving: [*moving, *w[-n:]],
        lambda w, n, moving: [*still(moving), *w[-n:]],
    ),
    "these stayed: 0, 1, 2. Off by one?": (
        lambda w, n: copies(w[n + 1 :]),
        lambda w, n, moving: [*w[: n + 1], *moving],
        lambda w, n, moving: [*w[: n + 1], *still(moving)],
    ),
    "not to the same values": (
        lambda w, n: copies(w[n:]),
        joined,
        lambda w, n, moving: [*w[:n], *(layer + 0.1 for layer in still(moving))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", TRAIN)
def test_train(given, said, message) -> None:
    own = check.train(trained(given, *TRAIN[message]))
    assert message in (out := said()) and "The lesson goes on with the kit's own." in out
    assert own is nets.train


def test_other_errors_of_a_participant_are_shown(said) -> None:
    def broken(weights, x, y, frozen=0, steps=150):
        return x @ y

    check.train(broken)
    assert "Your code stopped" in said()


PAIRED = {
    "Return two numbers": lambda d, first, second: d.mean(),
    "Give one number for all splits": lambda d, first, second: (d, d.std(ddof=1)),
    "The sign is turned": lambda d, first, second: (-d.mean(), T * d.std(ddof=1) / 12**0.5),
    "In points it is 100 times as much": lambda d, first, second: (d.mean() / 100, T * d.std(ddof=1) / 1200**0.5),
    "The mean difference should be": lambda d, first, second: (d.mean() + 1, T * d.std(ddof=1) / 12**0.5),
    "left out the square root": lambda d, first, second: (d.mean(), T * d.std(ddof=1)),
    "That is the standard error": lambda d, first, second: (d.mean(), d.std(ddof=1) / 12**0.5),
    "Divide by n - 1": lambda d, first, second: (d.mean(), T * d.std() / 12**0.5),
    "1.96 is for many splits": lambda d, first, second: (d.mean(), 1.96 * d.std(ddof=1) / 12**0.5),
    "the whole width": lambda d, first, second: (d.mean(), 2 * T * d.std(ddof=1) / 12**0.5),
    "Subtract split by split FIRST": lambda d, first, second: (
        d.mean(),
        100 * T * ((first.var(ddof=1) + second.var(ddof=1)) / 12) ** 0.5,
    ),
    "The reach should be": lambda d, first, second: (d.mean(), 0.0),
}


@pytest.mark.parametrize("message", PAIRED)
def test_paired(said, message) -> None:
    own = check.paired(lambda first, second: PAIRED[message](100 * (first - second), first, second))
    assert message in said()
    d = np.array([0.01, 0.03, 0.02])
    mean, reach = own(d, np.zeros(3))
    assert mean == pytest.approx(2) and reach == pytest.approx(stats.t.ppf(0.975, 2) / 3**0.5)


def test_two_point_two_is_near_enough(said) -> None:
    def rounded(first, second):
        d = 100 * (first - second)
        return d.mean(), 2.2 * d.std(ddof=1) / len(d) ** 0.5

    assert check.paired(rounded) is rounded and said() == "paired: right."


N_STAR = {
    "you stopped at n = 2": lambda lows: next(n for n, low in enumerate(lows, start=1) if low > 0),
    "That counts from 0": lambda lows: next((i for i in range(len(lows)) if min(lows[i:]) > 0), None),
    "That is the last n": lambda lows: max(n for n, low in enumerate(lows, start=1) if low > 0),
    "the answer is None": lambda lows: next((i + 1 for i in range(len(lows)) if min(lows[i:]) > 0), 0),
    "For the lows [-1.0, 0.0]": lambda lows: next((i + 1 for i in range(len(lows)) if min(lows[i:]) >= 0), None),
}


@pytest.mark.parametrize("message", N_STAR)
def test_n_star(said, message) -> None:
    own = check.n_star(N_STAR[message])
    assert message in said()
    assert [own(lows) for lows in ([1.0, 2.0], [-1.0, 2.0, 0.0, 3.0, 4.0], [1.0, 0.0], [-1.0, 1.0])] == [1, 4, None, 2]


def changed(state: torch.Tensor, at: Any, value: torch.Tensor) -> torch.Tensor:
    new = state.clone()
    new[at] = value
    return new


def in_place(donor: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state[0] = donor
    return state


GRAFT = {
    "Your hook returns nothing": lambda donor, state: None,
    "wrote into the state that it was given": in_place,
    "returns the shape": lambda donor, state: donor,
    "Only the last token's state": lambda donor, state: changed(state, (0, -1), donor[-1]),
    "returns the model's own state": lambda donor, state: state,
    "is not the donor's stream": lambda donor, state: state + donor,
}


@pytest.mark.parametrize("message", GRAFT)
def test_graft(smollm2, said, message) -> None:
    own = check.graft(lambda donor: lambda state, hook: GRAFT[message](donor, state), smollm2)
    assert message in said()
    donor, state = torch.ones(3, 4), torch.zeros(1, 3, 4)
    assert own(donor)(state, None).equal(donor[None]) and not state.any()


def test_graft_without_its_inner_function(smollm2, said) -> None:
    check.graft(lambda donor: None, smollm2)
    assert "must return the inner function" in said()


BETWEEN = {
    "Is there a “return”?": lambda old, new, steps: None,
    "the wrong way round": lambda old, new, steps: [b + s * (a - b) for a, b, s in zip(old, new, steps, strict=True)],
    "a step of its own": lambda old, new, steps: [a + steps[0] * (b - a) for a, b in zip(old, new, strict=True)],
    "That is the step alone": lambda old, new, steps: [s * (b - a) for a, b, s in zip(old, new, steps, strict=True)],
    "a part of the NEW layer": lambda old, new, steps: [a + s * b for a, b, s in zip(old, new, steps, strict=True)],
    "you gave 0 and 1": lambda old, new, steps: old,
}


@pytest.mark.parametrize("message", BETWEEN)
def test_between(said, message) -> None:
    own = check.between(BETWEEN[message])
    assert message in said()
    old, new = [torch.zeros(2), torch.ones(2)], [torch.ones(2), torch.zeros(2)]
    assert torch.stack(own(old, new, torch.tensor([0.5, 1.0]))).tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_empty_answers_and_solutions(given, smollm2, capsys, solution) -> None:
    lessons.start()
    for name, context in {"train": [], "paired": [], "n_star": [], "graft": [smollm2], "between": []}.items():
        getattr(check, name)(..., *context)
        assert capsys.readouterr().out == f"{name}: no answer yet. The lesson goes on with the kit's own.\n"
        answer = solution("04", name, T=T, **given)
        assert getattr(check, name)(answer, *context) is answer
        assert capsys.readouterr().out == f"{name}: right.\n"


def test_nets_of_the_lesson(given, solution) -> None:
    a, b = nets.halves(nets.tasks_of(2))
    start = nets.fresh(1, 2)
    assert torch.allclose(nets.forward(start, b.x), given["forward"](start, b.x), atol=1e-5)
    both = nets.train(start, b.x, b.y, 1, steps=30)
    alone = nets.train([layer[1:] for layer in start], b.x[1:], b.y[1:], 1, steps=30)
    theirs = solution("04", "train", **given)(start, b.x, b.y, frozen=1, steps=30)
    for place in range(nets.LAYERS):
        assert torch.allclose(both[place][1:], alone[place], atol=1e-3), "nets side by side do not touch each other"
        assert torch.allclose(both[place], theirs[place], atol=1e-3)
    assert (nets.right(both, b) > 0.4).all() and nets.right(both, b).shape == (2,)
    assert a.x_test.shape == (2, 700, 64) and (a.y_test[0].bincount() == 140).all()


def test_new_tasks() -> None:
    _, b = nets.halves(nets.tasks_of(1))
    pixels, names = nets.changed(b, "pixels"), nets.changed(b, "names")
    assert torch.equal(pixels.x.sort(-1).values, b.x.sort(-1).values) and not torch.equal(pixels.x, b.x)
    assert torch.equal(pixels.y, b.y) and torch.equal(names.x, b.x) and ((names.y - b.y) % 5 == 1).all()
    with pytest.raises(ValueError, match="choose pixels or names"):
        nets.changed(b, "colours")


def test_table_for_the_engine() -> None:
    rng = np.random.default_rng(0)
    found = {("base", 0): rng.random(12)}
    found |= {(name, n): rng.random(12) for name in ("BnB", "AnB", "random") for n in (1, 2)}
    curves = statistics.curves(nets.table(found)).set_index(["curve", "n"])
    d = found["BnB", 2] - found["AnB", 2]
    row = curves.loc[("specificity", 2)]
    assert row.estimate == pytest.approx(d.mean()) and row.high - row.estimate == pytest.approx(
        T * d.std(ddof=1) / 12**0.5
    )
    assert set(curves.index.get_level_values("curve")) >= {"co_adaptation", "over_random"}


def test_figures_show_what_they_are_given() -> None:
    rng = np.random.default_rng(0)
    found = {("base", 0): rng.random(12)} | {(name, n): rng.random(12) for name in carry.LOOKS for n in range(1, 6)}
    ax = carry.lines(found, ["BnB", "AnB", "random"]).axes[0]
    assert [line.get_ydata()[2] for line in ax.lines if len(line.get_ydata()) == 5] == pytest.approx(
        [found[name, 3].mean() for name in carry.LOOKS]
    )
    assert len(carry.digits(nets.tasks_of(1)[0]).axes) == 2
    ax = carry.published([(float(n), 1.0) for n in range(1, 6)]).axes[0]
    ours, theirs = ax.containers
    assert ours[0].get_xdata().tolist() == pytest.approx([n / 6 for n in range(1, 6)])
    assert theirs[0].get_ydata()[-1] == pytest.approx(8.2, abs=0.1)
    ax = carry.grafts({"itself": {4: 2.0, 8: 3.0}, "random": {4: 9.0, 8: 10.0}}, clean=1.5, guess=10.8).axes[0]
    assert [line.get_ydata()[0] for line in ax.lines] == [2.0, 9.0, 10.8, 1.5]
    ax = carry.early_late({"one": np.array([0.1, 0.2]), "other": np.array([0.0, -0.1])}).axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["one", "other"]
    plt.close("all")


def test_the_explorer_trains_on_other_halves() -> None:
    explorer = carry.Carry(nets_each=2)
    first, words = bytes(explorer.picture.value), explorer.said.value
    assert first.startswith(b"\x89PNG") and re.search(r"BnB - AnB: <b>\+\d", words)
    explorer.n.value = 5
    assert bytes(explorer.picture.value) != first and explorer.said.value != words and len(explorer.bases) == 1
    for n, x in {1: 0.01, 5: 5.99}.items():  # the last layer is never copied
        click(explorer.picture, x, 0.5)
        assert explorer.n.value == n and [one.get_text() for one in explorer.picture.figure.axes[0].texts] == [
            *"012345"
        ]
    press(explorer.picture, -1, 0)
    assert explorer.n.value == 4
    explorer.digits[0].value = True
    explorer.go.click()
    assert "choose five digits for B" in explorer.said.value
    explorer.digits[5].value = False
    before = bytes(explorer.picture.value)
    explorer.go.click()
    assert "points, 95 % interval" in explorer.said.value and bytes(explorer.picture.value) != before
    assert set(explorer.bases) == {(5, 6, 7, 8, 9), (0, 6, 7, 8, 9)}
