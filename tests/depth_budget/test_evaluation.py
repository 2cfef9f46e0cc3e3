"""Configurations measured on kept states against plain passes; rounding against known errors."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

import lab
from lab.depth_budget import SKIP, Bits, Evaluator, Noise, Pruned, bits_a_weight, evaluation, round_to_nearest, texts_of
from lab.interventions import _round_to_grid, block_matrices, quantized, reweighted, skip

CHANGES = [
    {}, {0: SKIP}, {3: SKIP}, {1: Bits(3, 16)}, {1: Bits(3, 16), 2: SKIP}, {0: Pruned(0.5), 3: Bits(2, 32)},
    {2: Noise(Bits(3, 16), seed=1)}, {layer: Bits(4, 16) for layer in range(4)},
]  # fmt: skip


def ids_of(model, n=3, length=12):
    torch.manual_seed(1)
    return torch.randint(5, min(200, model.cfg.d_vocab), (n, length))


def plain(model, ids, first, configuration):
    """Loss, KL and distortion of whole passes under the kit's interventions."""

    def logits():
        return model(ids, use_cache=False)[:, first:-1].double()

    with torch.no_grad():
        before = logits()
        stack = [skip(model, layer) for layer, change in configuration.items() if change is SKIP]
        weights = {layer: change.weights for layer, change in configuration.items() if change is not SKIP}
        stack.append(reweighted(model, weights))
        for one in stack:
            one.__enter__()
        after = logits()
        for one in reversed(stack):
            one.__exit__(None, None, None)
    nll = -after.log_softmax(-1).gather(-1, ids[:, first + 1 :, None])[..., 0].mean(1)
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean(1)
    change = after - before
    distortion = (change - change.mean(-1, keepdim=True)).square().mean((1, 2))
    return nll.numpy(), kl.numpy(), distortion.numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "gemma3", "qwen3"])
def test_measures_equal_plain_passes(tiny_model, family):
    are_those_of_plain_passes(tiny_model(family))


def test_capped_and_scaled_logits_are_measured_as_they_are(formed):
    are_those_of_plain_passes(formed)


def are_those_of_plain_passes(model):
    ids = ids_of(model)
    found = Evaluator(model, ids, first=3, progress=False)(CHANGES)
    for i, configuration in enumerate(CHANGES):
        wanted = plain(model, ids, 3, configuration)
        for value, other in zip((found.nll[i], found.kl[i], found.distortion[i]), wanted, strict=True):
            np.testing.assert_allclose(value, other, rtol=2e-4, atol=2e-5)


def test_half_precision_adds_no_error_of_its_own(tiny_folder):
    """The model's own logits are rounded; what is made of them is not."""
    model = lab.load(tiny_folder("llama"), device="cpu", dtype=torch.bfloat16)
    ids = ids_of(model)
    found = Evaluator(model, ids, first=3, progress=False)(CHANGES)
    for i, configuration in enumerate(CHANGES):
        wanted = plain(model, ids, 3, configuration)
        for value, other in zip((found.nll[i], found.kl[i], found.distortion[i]), wanted, strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)


def test_no_change_costs_exactly_nothing(tiny_model):
    evaluate = Evaluator(tiny_model("llama"), ids_of(tiny_model("llama")), first=2, progress=False)
    found = evaluate([{}, {2: Pruned(0.0)}, {0: Pruned(0.0), 3: Pruned(0.0)}])
    assert (found.distortion == 0).all() and (found.kl == 0).all()
    assert (found.nll == evaluate.intact).all()


def test_the_order_of_configurations_changes_nothing(tiny_model):
    model = tiny_model("llama")
    one = Evaluator(model, ids_of(model), progress=False)(CHANGES)
    other = Evaluator(model, ids_of(model), progress=False)(CHANGES[::-1])
    alone = [Evaluator(model, ids_of(model), progress=False)([change]).nll[0] for change in CHANGES]
    assert (one.nll == other.nll[::-1]).all() and (one.nll == np.array(alone)).all()


@pytest.mark.parametrize("change", [SKIP, Bits(3, 16), Pruned(0.5)])
def test_single_changes_run_from_the_change_on(tiny_model, change):
    model = tiny_model("llama")
    evaluate = Evaluator(model, ids_of(model), progress=False)
    before, n = evaluate.passes, model.cfg.n_layers
    evaluate([{i: change} for i in range(n)])
    assert evaluate.passes - before == n * (n + 1) // 2


def test_pairs_walk_each_shared_beginning_once(tiny_model):
    model = tiny_model("llama")
    evaluate = Evaluator(model, ids_of(model), progress=False)
    start, n = evaluate.passes, model.cfg.n_layers
    pairs = [{i: SKIP, j: SKIP} for i, j in combinations(range(n), 2)]
    evaluate([*({i: SKIP} for i in range(n)), *pairs])
    keys = [tuple(i in one for i in range(n)) for one in [{}, *({i: 1} for i in range(n)), *pairs]]
    nodes = {key[: i + 1] for key in keys for i in range(n)}  # of the tree of beginnings; the intact path was there
    assert evaluate.passes - start == len(nodes) - n < evaluate.full - n
    before = evaluate.passes
    evaluate(pairs)
    assert evaluate.passes == before  # remembered


def test_products_are_those_of_the_logits(tiny_model):
    model = tiny_model("llama")
    ids, changes = ids_of(model), [{0: Bits(2, 16)}, {2: SKIP}, {0: Bits(2, 16), 2: SKIP}]
    evaluate = Evaluator(model, ids, first=3, progress=False)
    products = evaluate.products(changes)
    np.testing.assert_allclose(np.einsum("tii->it", products), evaluate(changes).distortion, rtol=1e-6)
    with torch.no_grad():
        before = model(ids, use_cache=False)[:, 3:-1].double()
        with quantized(model, 2, group_size=16, layers=[]), skip(model, 2):
            one = model(ids, use_cache=False)[:, 3:-1].double() - before
        with reweighted(model, {0: Bits(2, 16).weights}):
            two = model(ids, use_cache=False)[:, 3:-1].double() - before
    one, two = (x - x.mean(-1, keepdim=True) for x in (one, two))
    np.testing.assert_allclose(products[:, 0, 1], (one * two).mean((1, 2)).numpy(), rtol=1e-3, atol=1e-6)


def test_capped_logits_have_no_products(tiny_model):
    evaluate = Evaluator(tiny_model("gemma2"), ids_of(tiny_model("gemma2")), progress=False)
    with pytest.raises(ValueError, match="caps or shifts"):
        evaluate.products([{0: SKIP}])


def test_an_interrupted_run_goes_on(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama")
    wanted = Evaluator(model, ids_of(model), progress=False)(CHANGES)
    monkeypatch.setattr(evaluation, "_EVERY", 0)
    first = Evaluator(model, ids_of(model), folder=tmp_path, progress=False)
    run, left = first._run, [4]

    def stopping(key):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return run(key)

    monkeypatch.setattr(first, "_run", stopping)
    with pytest.raises(KeyboardInterrupt):
        first(CHANGES)
    monkeypatch.setattr(first, "_run", run)
    assert (first(CHANGES).nll == wanted.nll).all()  # also in the same process
    second = Evaluator(model, ids_of(model), folder=tmp_path, progress=False)
    before = second.passes
    assert (second(CHANGES).nll == wanted.nll).all() and second.passes == before
    other = Evaluator(model, ids_of(model, n=2), folder=tmp_path, progress=False)
    assert other(CHANGES[:2]).nll.shape == (2, 2)  # other texts, other measurements
    with quantized(model, 2, group_size=16):  # another model, other measurements
        third = Evaluator(model, ids_of(model), folder=tmp_path, progress=False)
        assert (third(CHANGES).nll != wanted.nll).any()


def test_changed_weights_are_held_while_there_is_room(tiny_model, monkeypatch):
    model, made = tiny_model("llama"), []
    weights = Bits.weights
    monkeypatch.setattr(Bits, "weights", lambda self, matrices: made.append(self) or weights(self, matrices))
    configurations = [{1: Bits(3, 16)}, {1: Bits(3, 16), 2: Bits(2, 16)}, {2: Bits(2, 16)}, {0: SKIP, 1: Bits(3, 16)}]
    one = Evaluator(model, ids_of(model), progress=False)
    wanted = one(configurations)
    assert len(made) == 2
    found = Evaluator(model, ids_of(model), progress=False, beside=one)(configurations)
    assert len(made) == 2 and (found.nll == wanted.nll).all()
    monkeypatch.setattr(evaluation, "_HELD", 1)  # room for one alone
    assert (Evaluator(model, ids_of(model), progress=False)(configurations).nll == wanted.nll).all()
    assert len(made) > 4


def test_weights_come_back(tiny_model):
    model = tiny_model("gpt2")
    before = [w.detach().clone() for layer in range(4) for w, _ in block_matrices(model, layer)]
    Evaluator(model, ids_of(model), progress=False)(CHANGES)
    assert all(torch.equal(a, w) for a, (w, _) in zip(before, (m for i in range(4) for m in block_matrices(model, i)),
                                                       strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("configuration", "message"),
    [({9: SKIP}, "layers"), ({0: Bits(3, 24)}, "group_size=24 does not divide"), ({0: 3}, "layer 0 gets 3")],
)
def test_configurations_that_do_not_fit(tiny_model, configuration, message):
    evaluate = Evaluator(tiny_model("llama"), ids_of(tiny_model("llama")), progress=False)
    before = evaluate.passes
    with pytest.raises(ValueError, match=message):
        evaluate([{}, configuration])
    assert evaluate.passes == before


# --- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group_size", "bits", "error"),
    [(32, 8, 2.3e-5), (32, 4, 0.0065), (32, 3, 0.030), (32, 2, 0.166),
     (64, 8, 2.9e-5), (64, 4, 0.0083), (64, 3, 0.038), (64, 2, 0.209)],
)  # fmt: skip  # measured once, by code that is not this one
def test_known_errors_of_a_gaussian_matrix(group_size, bits, error):
    torch.manual_seed(0)
    w = torch.randn(576, 576)
    found = round_to_nearest(w, bits, group_size)
    assert ((found - w).square().mean() / w.square().mean()).item() == pytest.approx(error, rel=0.03)
    levels = [len(group.unique()) for group in found[:20].reshape(-1, group_size)]
    assert max(levels) <= 2**bits


def test_half_precision_is_rounded_as_well_as_single():
    torch.manual_seed(0)
    w = torch.randn(576, 576).bfloat16()
    for one in (round_to_nearest, _round_to_grid):
        half, single = one(w, 8, 64), one(w.float(), 8, 64)
        assert half.dtype == torch.bfloat16 and torch.equal(half, single.bfloat16())


def test_rounding_by_hand():
    w = torch.tensor([[-1.0, 0.1, 0.4, 2.0], [3.0, 3.0, 3.0, 3.0]])  # step 1, zero on a step; a constant group
    assert round_to_nearest(w, 2, 4).tolist() == [[-1, 0, 0, 2], [3, 3, 3, 3]]
    assert round_to_nearest(torch.tensor([[0.0, 0.2, 0.9, 3.0]]), 2, 4, offset="least").tolist() == [[0, 0, 1, 3]]
    w = torch.randn(8, 64)
    assert torch.equal(round_to_nearest(w, 4, 32, offset="least"), lab.interventions._round_to_grid(w, 4, 32))
    assert [bits_a_weight(b, g) for b, g in ((4, 64), (2, 32), (16, 32), (0, 64))] == [4.3125, 2.5625, 16, 0]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999, 1.0])
def test_pruning_takes_the_least_and_as_many_as_asked_for(share):
    w = torch.randint(-5, 6, (20, 10)).float() + 0.5  # many ties
    (found,) = Pruned(share).weights([w])
    n_zero = round(share * 200)
    assert (found == 0).sum() == n_zero
    if 0 < n_zero < 200:
        assert w[found == 0].abs().max() <= w[found != 0].abs().min()


def test_a_share_for_each_matrix():
    one, two = torch.randn(20, 10), torch.randn(4, 25)
    found = Pruned((0.25, 0.5)).weights([one, two])
    assert [(w == 0).sum().item() for w in found] == [50, 50]
    assert torch.equal(found[0], Pruned(0.25).weights([one])[0])
    with pytest.raises(ValueError, match="2 numbers: a block has 1"):
        Pruned((0.25, 0.5)).weights([one])
    with pytest.raises(ValueError, match="share"):
        Pruned((0.25, 1.5))


def test_noise_has_the_norm_of_what_it_stands_for():
    w = torch.randn(16, 64)
    (found,), (rounded,) = Noise(Bits(3), seed=2).weights([w]), Bits(3).weights([w])
    assert (found - w).norm().item() == pytest.approx((rounded - w).norm().item(), rel=1e-5)
    assert torch.equal(found, Noise(Bits(3), seed=2).weights([w])[0])
    assert not torch.equal(found, Noise(Bits(3), seed=3).weights([w])[0])


@pytest.mark.parametrize(
    "make", [lambda: Bits(1), lambda: Bits(3, 0), lambda: Bits(3, 64, "none"), lambda: Pruned(1.5)]
)
def test_changes_that_there_are_not(make):
    with pytest.raises(ValueError):
        make()


# --- texts ----------------------------------------------------------------------------------------------------------


def test_sets_of_texts_share_nothing_and_hold_both_genres(tiny_model):
    model = tiny_model("llama")
    frame = lab.datasets.load("prose")
    frame["text"] = frame.text.str[:100]  # the tiny model's context
    sets = texts_of(model, frame, sizes=(4, 6, 4), n_tokens=20)
    groups = [set(one.groups) for one in sets]
    assert [one.ids.shape for one in sets] == [(4, 20), (6, 20), (4, 20)]
    assert not groups[0] & groups[1] and not groups[1] & groups[2]
    assert all((one.table.genre.value_counts() == len(one.table) / 2).all() for one in sets)


def test_texts_that_do_not_do(tiny_model):
    model = tiny_model("llama")
    frame = lab.datasets.load("prose").drop(columns="example")
    with pytest.raises(ValueError, match="need 200 texts"):
        texts_of(model, "prose", sizes=(100, 100))
    frame = pd.DataFrame({"text": ["long enough for this", "short", "also long enough", "and one more of it"]})
    with pytest.raises(ValueError, match="has 5 tokens"):
        texts_of(model, frame, sizes=(2, 2), n_tokens=10)
