"""Lesson 0: its checks say what is wrong, its explorer answers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clicking import click, press

from lab import lessons
from lab.lessons import watch
from lab.lessons import watching as check


def kept(store: Callable[..., Any]) -> Callable[..., Any]:
    """An answer to exercise 1 whose hook is `store(states, depth, state, hook)`."""
    return lambda depth, states: lambda state, hook: store(states, depth, state, hook)


KEEP = {
    "No state was kept": lambda states, depth, state, hook: None,
    "one token's state only": lambda states, depth, state, hook: states.update({depth: state[0, -1]}),
    "keeps the whole batch": lambda states, depth, state, hook: states.update({depth: state}),
    "there should be one for each depth": lambda states, depth, state, hook: states.update({hook.name: state[0]}),
    "is not the stream at depth 3": lambda states, depth, state, hook: states.update({depth: state[0] + 1}),
    "KeyError": lambda states, depth, state, hook: states[hook.name],
}


@pytest.mark.parametrize("said", KEEP)
def test_keep(smollm2, capsys, said) -> None:
    own = check.keep(kept(KEEP[said]), smollm2)
    out = " ".join(capsys.readouterr().out.split())
    assert said in out and "The lesson goes on with the kit's own." in out
    states: dict[int, torch.Tensor] = {}
    own(3, states)(torch.ones(1, 2, 4), None)
    assert states[3].shape == (2, 4)


def test_keep_that_changes_the_model(smollm2, capsys) -> None:
    def changed(states, depth, state, hook):
        states[depth] = state[0].clone()
        return state * 1.5

    check.keep(kept(changed), smollm2)
    assert "not yet" in capsys.readouterr().out
    check.keep(lambda depth, states: None, smollm2)
    assert "must return the inner function" in capsys.readouterr().out


LENS = {
    "These are logits": lambda model, x: model.unembed(model.ln_final(x)),
    "The final norm is missing": lambda model, x: model.unembed(x).softmax(-1),
    "do not add up to 1": lambda model, x: model.unembed(model.ln_final(x)).softmax(0),
    "must return a tensor": lambda model, x: None,
    "has the shape": lambda model, x: model.unembed(model.ln_final(x[:, -1])).softmax(-1),
}


@pytest.mark.parametrize("said", LENS)
def test_lens(smollm2, capsys, said) -> None:
    check.lens(lambda states: LENS[said](smollm2, states), smollm2)
    assert said in " ".join(capsys.readouterr().out.split())


RANK = {
    "counts from 0": lambda p, word: (p > p[:, [word]]).sum(-1),
    "wrong end": lambda p, word: (p < p[:, [word]]).sum(-1) + 1,
    "give one rank for each depth": lambda p, word: 1,
}


@pytest.mark.parametrize("said", RANK)
def test_rank(capsys, said) -> None:
    check.rank(RANK[said])
    assert said in " ".join(capsys.readouterr().out.split())


def test_why_repeated(capsys) -> None:
    for answer, said in {"a": "no block has run", "c": "random map", "d": "Choose one letter"}.items():
        assert check.why_repeated(answer) == "b" and said in " ".join(capsys.readouterr().out.split())


def test_empty_answers_and_solutions(smollm2, capsys, solution) -> None:
    lessons.start()
    context = {"keep": [smollm2], "lens": [smollm2], "rank": [], "why_repeated": []}
    for name, given in context.items():
        getattr(check, name)(..., *given)
        assert capsys.readouterr().out == f"{name}: no answer yet. The lesson goes on with the kit's own.\n"
        answer = solution("00", name, model=smollm2, torch=torch)
        assert getattr(check, name)(answer, *given) is answer
        assert capsys.readouterr().out == f"{name}: right.\n"


def test_the_map_ends_in_what_the_model_says(smollm2) -> None:
    found = watch.lens_map(smollm2, "He poured himself a glass of")
    with torch.no_grad():
        said = smollm2(torch.tensor([[found.vocabulary.index(one) for one in found.tokens]]))[0].softmax(-1)
    assert found.tokens[-1] == " of" and found.probabilities.shape == (31, 6, 49152)
    assert torch.allclose(found.probabilities[-1], said, atol=1e-5)
    words, ids = found.best(words=True, k=2)
    assert all(found.vocabulary[i].strip().isalpha() for i in ids.flatten())
    assert (words[..., 0] >= words[..., 1]).all()


def test_the_explorer_reads_other_sentences(smollm2) -> None:
    explorer = watch.watch(smollm2)
    first = bytes(explorer.picture.value)
    assert first.startswith(b"\x89PNG") and "wine" in explorer.five.value
    explorer.depth.value = 24
    assert "water" in explorer.five.value and bytes(explorer.picture.value) != first
    explorer.text.value = "Neil Armstrong was the first man to walk on the"
    assert explorer.token.value == 9 and "24 blocks passed" in explorer.five.value
    explorer.depth.value = 30
    assert "moon" in explorer.five.value
    explorer.text.value = "a " * 20
    assert "the map is legible up to 16" in explorer.said.value
    explorer.text.value = " "
    assert "ValueError" in explorer.said.value
    explorer.text.value = "The sun is"
    assert explorer.said.value == "" and explorer.token.value == 2


def test_a_click_in_the_map_chooses_a_cell(smollm2) -> None:
    explorer = watch.watch(smollm2)
    picture = explorer.picture
    for (at, depth), (x, y) in {
        (5, 24): (5.5, 24.5), (0, 0): (0.01, 0.01), (5, 30): (5.99, 30.99), (0, 30): (0.01, 30.99), (5, 0): (5.99, 0.01),
    }.items():  # fmt: skip
        click(picture, x, y)
        assert (explorer.token.value, explorer.depth.value) == (at, depth)
        assert f"”, {depth} blocks passed" in explorer.five.value
    click(picture, 5.5, 24.5)
    drawn = bytes(picture.value)
    assert "water" in explorer.five.value
    press(picture, 0, 1)
    press(picture, 1, 0)  # there is no further token
    assert (explorer.token.value, explorer.depth.value) == (5, 25) and bytes(picture.value) != drawn
    click(picture, 5.5, 24.5)
    assert bytes(picture.value) == drawn
    explorer.text.value = "The sun is"
    click(picture, 1.5, 3.5)
    assert (explorer.token.value, explorer.depth.value) == (1, 3) and "After “The sun”" in explorer.five.value
