"""Lesson 3: its checks say what is wrong, its explorer answers."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from clicking import click

from lab import lessons
from lab.lessons import depth_efficiency as check
from lab.lessons import layer_figures, layers
from lab.models import hooks_left


@pytest.fixture(scope="module")
def llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def heard(capsys) -> Callable[[], str]:
    """What a check printed, on one line."""
    return lambda: " ".join(capsys.readouterr().out.split())


def pair(put_back: Callable[..., Any], *, read: int = 0) -> Callable[..., Any]:
    """An answer to exercise 1 whose second hook is `put_back(state, before, positions)`."""

    def answer(layer, positions=slice(None)):
        before = {}
        hooks = [(f"blocks.{layer + read}.hook_resid_pre", lambda state, hook: before.update(state=state))]
        hooks += [(f"blocks.{layer}.hook_resid_post", lambda state, hook: put_back(state, before["state"], positions))]
        return hooks

    return answer


def copied(state, before, positions):
    new = state.clone()
    new[:, positions] = before[:, positions]
    return new


def in_place(state, before, positions):
    state[:, positions] = before[:, positions]
    return state


def of_a_text(state, before, positions):
    new = state.clone()
    new[positions] = before[positions]
    return new


WITHOUT = {
    "must return a list of pairs": lambda layer, positions=None: None,
    "Take a copy first": pair(in_place),
    "nothing was put back. Does put_back return": pair(lambda *given: copied(*given) is None or None),
    "comes the state of depth 1. It should be": pair(copied, read=-1),
    "What comes out of the block is not what went in": pair(lambda state, before, positions: before * 2),
    "skips the block at every token": pair(lambda state, before, positions: before),
    "skips the whole second text": pair(of_a_text),
    "leave all other tokens": pair(lambda state, before, positions: torch.cat([before[:, :2], state[:, 2:]], 1)
                                   if positions == [1] else before),
    "a state below the block changes": lambda layer, positions=None: [
        (f"blocks.{layer}.hook_resid_pre", lambda state, hook: state * 2)],
    "KeyError": pair(lambda state, before, positions: {}["state"]),
}  # fmt: skip


@pytest.mark.parametrize("said", WITHOUT)
def test_without(llama, heard, said) -> None:
    own = check.without(WITHOUT[said], llama)
    out = heard()
    assert said in out and "The lesson goes on with the kit's own." in out
    assert [name for name, _ in own(1)] == ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    assert hooks_left(llama) == 0


def log_p(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).log_softmax(-1)


def of_next(model, ids):
    return log_p(model, ids)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


LOSS = {
    "must return a tensor": lambda model, ids, hooks=(): None,
    "one number for every token": lambda model, ids, hooks=(): -log_p(model, ids).gather(-1, ids[..., None])[..., 0],
    "The last axis has one entry only": lambda model, ids, hooks=(): -of_next(model, ids)[..., None],
    "Give one number for each text and predicted token": lambda model, ids, hooks=(): -of_next(model, ids).mean(),
    "The sign is wrong": lambda model, ids, hooks=(): of_next(model, ids),
    "These are probabilities": lambda model, ids, hooks=(): of_next(model, ids).exp(),
    "is about token i + 1": lambda model, ids, hooks=(): -log_p(model, ids)[:, 1:].gather(-1, ids[:, 1:, None])[..., 0],
}


@pytest.mark.parametrize("said", LOSS)
def test_loss(llama, heard, said) -> None:
    check.loss(LOSS[said], llama)
    assert said in heard()


def watcher(read: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    """An answer to exercise 3 that keeps `read(pattern)`."""
    return lambda layer, shares: lambda pattern, hook: shares.update({layer: read(pattern)})


WATCH = {
    "must return the inner function": lambda layer, shares: None,
    "Token 0 is counted too": watcher(lambda pattern: pattern[..., 0].mean()),
    "You read where the FIRST token looks": watcher(lambda pattern: pattern[:, :, 0, 1:].mean()),
    "You read the row of the first token": watcher(lambda pattern: pattern[:, :, 0].mean()),
    "That is the last token only": watcher(lambda pattern: pattern[:, :, -1, 0].mean()),
    "Store one number": watcher(lambda pattern: pattern[:, :, 1:, 0]),
    "the mean is 0.4, and you have 0.80": watcher(lambda pattern: pattern[:, :, 1:, 0].sum()),
    "it should have the key 2": lambda layer, shares: lambda pattern, hook: shares.update({0: pattern.mean()}),
    "KeyError": lambda layer, shares: lambda pattern, hook: shares["hook_pattern"],
}


@pytest.mark.parametrize("said", WATCH)
def test_watch_first(llama, heard, said) -> None:
    check.watch_first(WATCH[said], llama)
    assert said in heard()


def norms(of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An answer to exercise 5 from what is added before and now."""
    return lambda clean, other: of(clean.diff(dim=0), other.diff(dim=0))


def length(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=-1)


CHANGE = {
    "must return a tensor": lambda clean, other: None,
    "that compares states": lambda clean, other: (length(other - clean) / length(clean)).mean((1, 2)),
    "a number for each text and token": norms(lambda was, now: length(now - was) / length(was)),
    "Four depths make three layers": norms(lambda was, now: (length(now - was) / length(was)).mean()),
    "Divide it by the size": norms(lambda was, now: length(now - was).mean((1, 2))),
    "You divide by what is added NOW": norms(lambda was, now: (length(now - was) / length(now)).mean((1, 2))),
    "a mean by a mean": norms(lambda was, now: length(now - was).mean((1, 2)) / length(was).mean((1, 2))),
    "You compare lengths": norms(lambda was, now: ((length(now) - length(was)).abs() / length(was)).mean((1, 2))),
    "The numbers are off": norms(lambda was, now: ((now - was).abs() / was.abs()).mean((1, 2, 3))),
}


@pytest.mark.parametrize("said", CHANGE)
def test_change(heard, said) -> None:
    check.change(CHANGE[said])
    assert said in heard()


def ordered(*, layers: bool = True, number: bool = True, back: bool = True, says: bool = True) -> Callable[..., Any]:
    """An answer to exercise 6 that lacks something."""

    def answer(model, ids, order):
        body = model.original_model.model
        plain = body.layers
        if layers:
            body.layers = torch.nn.ModuleList([plain[i] for i in order])
        if number:
            body.config.num_hidden_layers = len(order)
        try:
            return -of_next(model, ids) if says else None
        finally:
            if back:
                body.layers, body.config.num_hidden_layers = plain, len(plain)

    return answer


ORDER = {
    "must return the loss": ordered(says=False),
    "not as before": ordered(back=False),
    "num_hidden_layers says, without a warning": ordered(number=False),
    "Does body.layers hold the new list": ordered(layers=False),
    "In the usual order the loss must be as usual": lambda model, ids, order: of_next(model, ids),
    "cannot assign 'list'": lambda model, ids, order: setattr(model.original_model.model, "layers", order),
}


@pytest.mark.parametrize("said", ORDER)
def test_loss_in_order(llama, heard, said) -> None:
    plain = llama.original_model.model.layers
    check.loss_in_order(ORDER[said], llama)
    assert said in heard()
    assert llama.original_model.model.layers is plain and llama.original_model.config.num_hidden_layers == 4


def test_good_control(heard) -> None:
    for answer, said in {"a": "loss of pure guessing", "c": "able to rise", 3: "Choose one letter"}.items():
        assert check.good_control(answer) == "b" and said in heard()


def test_empty_answers_and_solutions(smollm2, capsys, solution) -> None:
    lessons.start()
    context = {"without": [smollm2], "loss": [smollm2], "watch_first": [smollm2], "good_control": [], "change": [],
               "loss_in_order": [smollm2]}  # fmt: skip
    known: dict[str, Any] = {"torch": torch, "model": smollm2}
    for name, given in context.items():
        getattr(check, name)(..., *given)
        assert capsys.readouterr().out == f"{name}: no answer yet. The lesson goes on with the kit's own.\n"
        answer = solution("03", name, **known)
        assert getattr(check, name)(answer, *given) is answer
        assert capsys.readouterr().out == f"{name}: right.\n"
        known[name] = answer


def test_an_index_with_dots_is_an_answer() -> None:
    def last(x):
        return x[..., 0]

    def open_still(x):
        return x[..., 0] + ...

    assert not lessons.unanswered(last) and lessons.unanswered(open_still)


def test_own_answers_agree_with_the_solutions(smollm2, solution) -> None:
    known = {"torch": torch}
    ids = check._ids(smollm2)
    mine = {name: solution("03", name, **known) for name in ("without", "loss", "watch_first", "change")}
    own = {"without": check._own_without(smollm2), "loss": check._own_loss(smollm2)}
    for positions in (slice(None), [0], slice(1, None)):
        losses = [one["loss"](smollm2, ids, one["without"](11, positions)) for one in (mine, own)]
        assert torch.allclose(*losses, atol=1e-4)
    pattern, shares = torch.rand(2, 3, 4, 4), ({}, {})
    mine["watch_first"](5, shares[0])(pattern, None)
    check._own_watch_first(smollm2)(5, shares[1])(pattern, None)
    assert float(shares[0][5]) == pytest.approx(shares[1][5])
    order = [*range(10), *range(12, 30), 11, 11]
    ordered_loss = solution("03", "loss_in_order", torch=torch, loss=mine["loss"])(smollm2, ids, order)
    assert torch.allclose(ordered_loss, check._own_order(smollm2)(smollm2, ids, order), atol=1e-3)


@pytest.mark.parametrize(
    "settings, order",
    [
        ({"off": (1, 3)}, [0, 2]),
        ({"swapped": (0, 2)}, [2, 1, 0, 3]),
        ({"twice": 2}, [0, 1, 2, 2, 3]),
        ({"off": (0,), "swapped": (0, 3), "twice": 1}, [3, 1, 1, 2]),
        ({"off": (2,), "twice": 2}, [0, 1, 3]),
    ],
)
def test_changed_runs_the_layers_that_are_left(llama, settings, order) -> None:
    ids = check._ids(llama)
    with layers.changed(llama, **settings):
        found = layers.losses(llama, ids)
    assert torch.allclose(found, ordered()(llama, ids, order), atol=1e-4)
    assert not torch.allclose(found, layers.losses(llama, ids), atol=1e-4)


def test_changed_spares_the_first_token(llama) -> None:
    ids = check._ids(llama)
    mine = pair(copied)(1, slice(1, None))
    with torch.no_grad(), llama.hooks(fwd_hooks=mine):
        wanted = -of_next(llama, ids)
    with layers.changed(llama, off=(1,), first=1):
        assert torch.allclose(layers.losses(llama, ids), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="off"), layers.changed(llama, off=(4,)):
        pass
    with pytest.raises(ValueError, match="swapped"), layers.changed(llama, swapped=(1, 1)):
        pass


def test_the_first_figure(smollm2) -> None:
    found = layers.one_out(smollm2)
    assert found.says[24] == "Cast" and found.says[25] == "Madrid" and found.without[25] > found.whole + 0.05
    assert sum(word == "Madrid" for word in found.says) >= 12
    figure = layer_figures.without_each(found)
    assert "Cast" in [text.get_text() for text in figure.axes[0].texts]
    with pytest.raises(ValueError, match="no token of its own"):
        layers.one_out(smollm2, answer=" ")
    plt.close("all")


def test_figures() -> None:
    rises = torch.full((6, 3), 0.5)
    rises[0] = 9.0
    ax = layer_figures.rise(rises).axes[0]
    assert ax.lines[0].get_ydata().max() == pytest.approx(3.2) and ax.texts[0].get_text() == "layer 0: 9.0"
    bars = {"every token": rises[0], "the 1st": -rises[1]}
    figure = layer_figures.who_needs_it(bars, {"all": {0: 0.1, 1: 0.5}, "without": {0: 0.1, 1: 0.2}}, 1)
    assert [one.get_text().strip() for one in figure.axes[0].texts] == ["+9.00", "-0.50"]
    assert [one.get_text() for one in figure.axes[1].get_legend().texts] == ["all", "without"]
    assert len(layer_figures.later({"trained": [1.0, 0.0], "random weights": [0.5, 0.0]}).axes[0].lines) == 2
    assert len(layer_figures.orders(bars).axes[0].patches) == 2
    plt.close("all")


def test_the_explorer_answers(smollm2) -> None:
    explorer = layers.layers(smollm2, check._ids(smollm2))
    first = bytes(explorer.picture.value)
    assert first.startswith(b"\x89PNG") and "0 of 30 layers off" in explorer.said.value
    explorer.on[25].value = explorer.on[17].value = False
    assert explorer.off == (17, 25) and "2 of 30 layers off" in explorer.said.value
    assert "is on top" in explorer.said.value and "so far: 2" in explorer.said.value
    assert bytes(explorer.picture.value) != first
    explorer.on[24].value = False
    assert "not on top" in explorer.said.value and "so far: 2" in explorer.said.value
    explorer.all_on()
    assert explorer.off == () and bytes(explorer.picture.value) == first
    explorer.swap.value = 0
    assert bytes(explorer.picture.value) == first  # with which one?
    explorer.other.value = 1
    assert "not on top" in explorer.said.value
    explorer.swap.value = None
    explorer.on[11].value = False
    assert "not on top" in explorer.said.value
    explorer.spare.value = True
    assert "is on top" in explorer.said.value
    explorer.all_on()
    explorer.twice.value = 0
    assert bytes(explorer.picture.value) != first
    explorer.prompt.value, explorer.answer.value = "The capital of France is", "Paris"
    assert "“Paris”" in explorer.said.value
    explorer.answer.value = " "
    assert "no token of its own" in explorer.said.value


def test_a_click_in_the_picture_switches_a_layer(smollm2) -> None:
    explorer = layers.layers(smollm2, check._ids(smollm2))
    drawn = bytes(explorer.picture.value)
    for layer, x in {0: 0.01, 29: 29.99, 17: 17.5}.items():
        click(explorer.picture, x, 0.5)
        assert not explorer.on[layer].value
    assert explorer.off == (0, 17, 29) and "3 of 30 layers off" in explorer.said.value
    for x in (0.5, 17.5, 29.5):
        click(explorer.picture, x, 0.5)
    assert explorer.off == () and bytes(explorer.picture.value) == drawn
    explorer.swap.value, explorer.other.value = 3, 8
    click(explorer.picture, 3.5, 0.5)  # where layer 8 stands now
    assert explorer.off == (8,)
    words = [text.get_text() for text in explorer.picture.figure.axes[0].texts]
    assert words == [*"0128456739", *map(str, range(10, 30))]
    explorer.twice.value = 12
    assert explorer.picture.figure.axes[0].texts[12].get_text() == "12\n×2"
    assert hooks_left(smollm2) == 0
