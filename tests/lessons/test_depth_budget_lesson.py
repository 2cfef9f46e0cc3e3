"""Lesson 5: its checks say what is wrong, its explorer keeps the budget."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from clicking import click

import lab
from lab import lessons
from lab.interventions import quantized
from lab.lessons import depth_budget as check
from lab.lessons import spend, spend_figures
from lab.models import hooks_left


@pytest.fixture(scope="module")
def llama(tiny_folder):
    return lab.load(tiny_folder("llama"), device="cpu")  # its own: its weights are changed


@pytest.fixture
def heard(capsys) -> Callable[[], str]:
    """What a check printed, on one line."""
    return lambda: " ".join(capsys.readouterr().out.split())


def rounder(
    step=lambda whole, bits: whole / (2**bits - 1), near=torch.round, low=1.0, plus=1.0, mul=True
) -> Callable[..., Any]:
    """An answer to exercise 1 that does something else in one place."""

    def answer(weight, bits, group_size=64):
        groups = weight.reshape(len(weight), -1, group_size)
        least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        size = step(most - least, bits)
        steps = near((groups - low * least) / size)
        return ((steps * size if mul else steps) + plus * least).reshape(weight.shape)

    return answer


def clipped(weight, bits, group_size=64):
    groups = weight.reshape(len(weight), -1, group_size)
    size = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((groups / size).round().clamp(-3, 3) * size).reshape(weight.shape)


def in_place(weight, bits, group_size=64):
    weight.copy_(rounder()(weight, bits, group_size))
    return weight


ROUNDED = {
    "must return a tensor": lambda weight, bits, group_size=64: None,
    "The weights that you were given are changed": in_place,
    "came back as (8, 2, 4)": lambda weight, bits, group_size=64: rounder()(weight, bits, group_size).reshape(8, 2, 4),
    "Your groups lie along the outputs": lambda weight, bits, group_size=64: rounder()(weight.T, bits, group_size).T,
    "the whole matrix as one group": lambda weight, bits, group_size=64: rounder()(weight.reshape(1, -1), bits,
                                                                                   weight.numel()).view_as(weight),
    "You make 8 steps from low to high": rounder(step=lambda whole, bits: whole / 2**bits),
    "2**3 levels, not 3": rounder(step=lambda whole, bits: whole / (bits - 1)),
    "You round down": rounder(near=torch.floor),
    "Something is cut off": clipped,
    "Add low again": rounder(plus=0.0),
    "so low and high need not be levels": rounder(low=0.0, plus=0.0),
    "are not the nearest levels": rounder(mul=False),
    "Use bits and group_size": lambda weight, bits, group_size=64: rounder()(weight, 3, 4),
    "RuntimeError": lambda weight, bits, group_size=64: weight.reshape(3, -1),
}  # fmt: skip


@pytest.mark.parametrize("said", ROUNDED)
def test_rounded(heard, said) -> None:
    own = check.rounded(ROUNDED[said])
    assert said in heard()
    weight = torch.randn(4, 128)
    assert torch.equal(own(weight, 3), rounder()(weight, 3))


def test_price(heard) -> None:
    wrong = {
        3: "the steps alone",
        3.25: "one of the two",
        35: "shared by the 64",
        4: "Count the bits of one group",
        "3": "Give one number",
    }
    for answer, said in wrong.items():
        assert check.price(answer) == 3.5 and said in heard()


def swapper(
    *, put: str = "data", n: int | None = None, back: bool = True, hooked: bool = True, says: bool = True
) -> Callable[..., Any]:
    """An answer to exercise 3 that lacks something."""

    def answer(model, ids, new, hooks=()):
        before = [weight.data for weight, _ in new]
        with torch.no_grad():
            for weight, values in new[:n]:
                if put == "data":
                    weight.data = values
                elif put == "copy":
                    weight.copy_(values)
        found = loss(model, ids, hooks if hooked else ()) if says else None
        for (weight, _), old in zip(new, before, strict=True):
            if back:
                weight.data = old
        return found

    return answer


def loss(model, ids, hooks=()):
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        log_p = model(ids, use_cache=False).log_softmax(-1)
    return -log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1)


LOSS_WITH = {
    "must return what loss returns": swapper(says=False),
    "Afterwards 9 of 9 matrices of this test are not what they were": swapper(back=False),
    "take clones": swapper(put="copy"),
    "only renames": swapper(put="nothing"),
    "Only the first pair was used": swapper(n=1),
    "The hooks were not used": swapper(hooked=False),
    "and with the new values in place they are": swapper(n=4),
    "KeyError": lambda model, ids, new, hooks=(): {}["weight"],
}


@pytest.mark.parametrize("said", LOSS_WITH)
def test_loss_with(llama, heard, said) -> None:
    before = [weight.clone() for weight in llama.parameters()]
    own = check.loss_with(LOSS_WITH[said], llama)
    assert said in heard()
    new = [(weight, weight.detach() * 2) for weight in spend.matrices(llama, 3)]
    ids = check._ids(llama)
    assert torch.allclose(own(llama, ids, new), swapper()(llama, ids, new), atol=1e-5)
    assert all(map(torch.equal, llama.parameters(), before)) and hooks_left(llama) == 0


def writer(write: Callable[..., Any]) -> Callable[..., Any]:
    return lambda intact, positions: lambda state, hook: write(state, intact, positions)


def whole_texts(state, intact, positions):
    new = state.clone()
    new[positions] = intact[positions]
    return new


def no_positions(state, intact, positions):
    new = state.clone()
    new[:, positions] = intact
    return new


PUT_BACK = {
    "must return the inner function": lambda intact, positions: None,
    "writes into the state that it was given": writer(lambda state, intact, at: state.copy_(intact)),
    "returns nothing": writer(lambda state, intact, at: None),
    "You put back every token": writer(lambda state, intact, at: intact),
    "take the positions of `intact`, too": writer(no_positions),
    "Nothing was put back": writer(lambda state, intact, at: state.clone()),
    "You put back whole texts": writer(whole_texts),
    "and elsewhere the one that came": writer(lambda state, intact, at: (state + intact) / 2),
    "IndexError": writer(lambda state, intact, at: intact[:, 9]),
}


@pytest.mark.parametrize("said", PUT_BACK)
def test_put_back(heard, said) -> None:
    own = check.put_back(PUT_BACK[said])
    assert said in heard()
    state, intact = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert own(intact, [1])(state, None).sum(-1).tolist() == [[0, 4, 0]] * 2
    assert own(intact, slice(1, None))(state, None).sum(-1).tolist() == [[0, 4, 4]] * 2 and not state.any()


def z(weight):
    return (weight - weight.mean()) / weight.std()


def share(test: Callable[..., Any]) -> Callable[..., float]:
    """An answer to exercise 5 from a test of each matrix."""
    return lambda weights: float(torch.cat([test(one).flatten() for one in weights]).double().mean())


ZD = {
    "must return one number": lambda weights: None,
    "not their share": lambda weights: sum(int((z(one) > 1).sum()) for one in weights),
    "You count both ends": share(lambda one: z(one).abs() > 1),
    "Each matrix has its own": lambda weights: share(lambda one: z(one) > 1)(
        [torch.cat([w.flatten() for w in weights])]
    ),
    "the mean of the shares": lambda weights: sum(share(lambda one: z(one) > 1)([w]) for w in weights) / len(weights),
    "divided by the variance": share(lambda one: (one - one.mean()) / one.var() > 1),
    "of each row": share(lambda one: (one - one.mean(-1, keepdim=True)) / one.std(-1, keepdim=True) > 1),
    "w.numel() is": lambda weights: sum(int((z(one) > 1).sum()) for one in weights) / sum(map(len, weights)),
    "did not divide by the standard deviation": share(lambda one: one - one.mean() > 1),
    "The share is": share(lambda one: z(one) > 2),
}


@pytest.mark.parametrize("said", ZD)
def test_zd(heard, said) -> None:
    own = check.zd(ZD[said])
    assert said in heard()
    normal = torch.randn(400, 500, generator=torch.Generator().manual_seed(1))
    assert own([normal, 3 * normal + 5]) == pytest.approx(0.1587, abs=0.003)


def test_empty_answers_and_solutions(llama, capsys, solution) -> None:
    lessons.start()
    context = {"rounded": [], "price": [], "loss_with": [llama], "put_back": [], "zd": []}
    for name, given in context.items():
        getattr(check, name)(..., *given)
        assert capsys.readouterr().out == f"{name}: no answer yet. The lesson goes on with the kit's own.\n"
        answer = solution("05", name, torch=torch, loss=loss)
        assert getattr(check, name)(answer, *given) is answer
        assert capsys.readouterr().out == f"{name}: right.\n"


def test_the_solution_is_what_the_engine_does(smollm2, solution) -> None:
    """To the bit: the participants' rounding of two blocks, and `quantized`."""
    rounded, layers = solution("05", "rounded"), [3, 11]
    wanted = [rounded(weight.data, 3) for layer in layers for weight in spend.matrices(smollm2, layer)]
    own = [check._own_rounded()(weight.data, 3) for layer in layers for weight in spend.matrices(smollm2, layer)]
    with quantized(smollm2, 3, group_size=64, layers=layers):
        found = [weight.clone() for layer in layers for weight in spend.matrices(smollm2, layer)]
    assert all(map(torch.equal, found, wanted)) and all(map(torch.equal, own, wanted))
    assert spend.names(smollm2, 11) == ["q", "k", "v", "o", "gate", "up", "down"]


def test_block_11_is_lost_at_the_first_token(smollm2, solution) -> None:
    """What the story rests on: one block stands out, and one token's state brings nearly all of it back."""
    rounded, put_back = solution("05", "rounded"), solution("05", "put_back")
    loss_with = solution("05", "loss_with", loss=loss)
    texts = lab.datasets.load("prose").text.str.slice(0, 200).tolist()[:4]
    ids, kept = lab.texts.tokenize(smollm2, texts).ids[:, :24], []
    place = "blocks.11.hook_resid_post"
    whole = loss_with(smollm2, ids, [], [(place, lambda state, hook: kept.append(state))])

    def rise(block, hooks=()):
        new = [(weight, rounded(weight.data, 3)) for weight in spend.matrices(smollm2, block)]
        return float((loss_with(smollm2, ids, new, hooks) - whole).mean())

    assert rise(11) > 0.3 > 3 * abs(rise(10))
    assert abs(rise(11, [(place, put_back(kept[0], [0]))])) < 0.1 < 0.3 < rise(11, [(place, put_back(kept[0], [1]))])


def test_rules_keep_the_budget() -> None:
    for budget in np.arange(1, 8.75, 0.25):
        for order in (list(range(30)), list(range(30))[::-1]):
            bits = spend.in_order(order, budget)
            assert spend.mean_price(bits) <= budget + 1e-9 and len(set(bits)) <= 2
            ranked = [bits[block] for block in order]
            assert ranked == sorted(ranked), "lowered in order"
            raised = list(ranked)
            raised[max(i for i in range(30) if ranked[i] < 8) if min(ranked) < 8 else 0] = 8
            assert spend.mean_price(raised) > budget or min(ranked) == 8, "no block is lowered without need"


def test_figures() -> None:
    row = torch.linspace(-1, 1, 64)
    figure = spend_figures.fewer(row, row.round(), "Say", {"as it comes": " a $b$", "3 bits": "c\n\nd"})
    assert [one.get_text() for one in figure.axes[1].texts] == ["as it comes", "… a $b$", "3 bits", "… c ↵ ↵ d"]
    rises = {"nowhere": torch.tensor([0.4, 0.6]), "at the 1st": torch.tensor([0.0, 0.1])}
    assert "+0.50" in spend_figures.where(rises, rises, 11).axes[0].texts[0].get_text()
    ax = spend_figures.against_chance({"damage": 0.5}, {"random": [1.0, 2.0], "spared": [0.7, 0.8]}).axes[0]
    assert [one.get_text() for one in ax.get_yticklabels()] == ["damage", "random", "spared"]
    assert ax.collections[0].get_offsets()[:, 0].tolist() == [1.0, 2.0] and ax.texts[0].get_text().strip() == "0.50"
    plt.close("all")


@pytest.fixture
def explorer(llama, monkeypatch):
    """The explorer of a small model with four blocks, whose matrices take groups of 16."""
    monkeypatch.setattr(spend, "GROUP", 16)
    return spend.spend(llama, check._ids(llama).repeat(2, 1).roll(1, 1))


def test_the_explorer_answers(explorer, llama) -> None:
    first = bytes(explorer.picture.value)
    assert first.startswith(b"\x89PNG") and explorer.bits == [3] * 4 and "not known yet" in explorer.said.value
    assert "<b>3.50 bits for each weight</b> of 4.00 allowed" in explorer.said.value and explorer.table is None
    explorer.rule.value = "lower the last blocks"
    assert explorer.bits == [4, 4, 3, 3] and "<b>4.00 bits" in explorer.said.value
    assert bytes(explorer.picture.value) != first
    explorer.rule.value = "lower by measured damage"
    order = np.argsort(explorer.table[:, 2])  # at 3 bits
    assert [explorer.bits[block] for block in order] == [3, 3, 4, 4]
    explorer.budget.value = 3.7
    explorer.rule.value = "programme"
    assert spend.mean_price(explorer.bits) <= 3.7

    def added(bits: list[int]) -> float:
        return sum(explorer.table[i, spend.CHOICES.index(b)] for i, b in enumerate(bits))

    total = added(explorer.bits)
    assert all(total <= added(explorer._chosen(rule, 3.7)) + 1e-9 for rule in spend.RULES[:4])
    assert f"texts that chose): {total:+.2f}" in explorer.said.value
    explorer.prompt.value = "The capital of France is"
    assert "“The capital of France is<b>" in explorer.said.value
    explorer.prompt.value = ""
    assert "Error" in explorer.said.value or "“<b>" in explorer.said.value
    assert hooks_left(llama) == 0


def test_damages_and_measured_are_the_losses_of_changed_models(explorer, llama) -> None:
    whole = loss(llama, explorer.search).mean()
    for block, bits in ((1, 0), (2, 2), (3, 4)):
        with spend.spent(llama, [bits if i == block else 8 for i in range(4)]):
            rise = loss(llama, explorer.search).mean() - whole
        found = explorer.damages()[block, spend.CHOICES.index(bits)]
        assert found == pytest.approx(float(rise), abs=0.02)  # the others have 8 bits here, and are intact in the table
    explorer.block.value, explorer.gets.value = 1, 0
    with spend.spent(llama, explorer.bits):
        after = loss(llama, explorer.report).mean()
    with spend.spent(llama, [8] * 4):
        assert f"measured (other texts): {after - loss(llama, explorer.report).mean():+.2f} nats" in explorer.said.value


def test_a_click_gives_a_block_other_bits(explorer) -> None:
    click(explorer.picture, 2.5, 0.5)
    assert explorer.rule.value == "by hand" and explorer.bits == [3, 3, 2, 3] and explorer.budget.disabled
    for wanted in (0, 8, 4, 3):
        click(explorer.picture, 2.5, 0.5)
        assert explorer.bits[2] == wanted
    words = [text.get_text() for text in explorer.picture.figure.axes[0].texts]
    assert words == ["3"] * 4
    explorer.block.value, explorer.gets.value = 3, 0
    assert explorer.bits[3] == 0 and explorer.picture.figure.axes[0].texts[3].get_text() == "out"
    explorer.rule.value = "all blocks alike"
    assert explorer.bits == [3] * 4 and not explorer.budget.disabled
    explorer.budget.value = 8.5
    assert explorer.bits == [8] * 4


def test_spent_is_what_the_names_say(llama) -> None:
    ids = check._ids(llama)
    spend_group, spend.GROUP = spend.GROUP, 16
    try:
        with spend.spent(llama, [8, 0, 3, 8]):
            found = loss(llama, ids)
    finally:
        spend.GROUP = spend_group
    with (
        quantized(llama, 3, group_size=16, layers=[2]),
        quantized(llama, 8, group_size=16, layers=[0, 3]),
        lab.interventions.skip(llama, 1),
    ):
        assert torch.allclose(loss(llama, ids), found, atol=1e-5)
