"""Third-order attention is its sum over pairs; labels are what they say; nets that are compared have one size."""

import itertools

import pytest
import torch

from lab.nets import triples
from lab.nets.replicas import Recipe
from lab.nets.triples import Shape


def test_third_order_attention_is_the_softmax_over_pairs():
    generator = torch.Generator().manual_seed(0)
    q, k1, k2, v1, v2 = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(5))
    found = triples.attention([q, k1, k2, v1, v2])
    for example, head, i in itertools.product(range(2), range(3), range(4)):
        at = [one[example, head] for one in (q, k1, k2, v1, v2)]
        pairs = list(itertools.product(range(4), repeat=2))
        scores = torch.stack([(at[0][i] * at[1][j] * at[2][k]).sum() / 5**0.5 for j, k in pairs])
        values = torch.stack([at[3][j] * at[4][k] for j, k in pairs])
        assert torch.allclose(found[example, head, i], scores.softmax(0) @ values, atol=1e-12)


@pytest.mark.parametrize("n, modulus, two, three", [(12, 101, 0.12, 0.55), (16, 163, 0.10, 0.57)])
def test_shares_of_matches(n: int, modulus: int, two: float, three: float):
    _, match = triples.examples(3000, n, modulus, torch.Generator().manual_seed(0))
    assert match.double().mean((0, 1)).tolist() == pytest.approx([two, three], abs=0.015)


def test_matches_by_hand():
    x, match = triples.examples(50, 5, 13, torch.Generator().manual_seed(1))
    for row, found in zip(x.tolist(), match.tolist(), strict=True):
        for one, said in zip(row, found, strict=True):
            pair = any((one + other) % 13 == 0 for other in row)
            triple = any((one + other + third) % 13 == 0 for other in row for third in row)
            assert said == [pair, triple]
    assert 0 < match[..., 0].sum() < match[..., 1].sum() < match[..., 1].numel()


def test_nets_of_one_size():
    wanted = Shape(3, 1, 320, 53).parameters
    for order, n_layers in ((3, 1), (2, 1), (2, 2), (2, 3)):
        shape = triples.of_size(order, n_layers, wanted, 53)
        weights = triples.initial(shape, 0)
        assert sum(value.numel() for value in weights.values()) == shape.parameters
        assert shape.parameters == pytest.approx(wanted, rel=0.005)
    with pytest.raises(ValueError, match="3 layers have .* parameters or more, not 1000"):
        triples.of_size(2, 3, 1000, 53)
    with pytest.raises(ValueError, match="order=4: give a whole number from 2 to 3"):
        Shape(4, 1, 8, 53)


@pytest.mark.parametrize("order", [2, 3])
def test_numbers_have_no_order(order: int):
    shape = Shape(order, 2, 8, 11, d_model=16, n_heads=2)
    weights = triples.initial(shape, 0)
    x = torch.tensor([[1, 5, 9, 2], [3, 3, 0, 10]])
    said, turned = triples.forward(shape, weights, x), triples.forward(shape, weights, x.flip(1))
    assert torch.allclose(said.flip(1), turned, atol=1e-5)
    assert (said[0, 0] - said[0, 1]).abs().max() > 1e-3  # but each has its own answer


def test_training_beats_the_majority_on_what_is_easy():
    shape = Shape(3, 1, 32, 5, d_model=16, n_heads=2)
    rows = triples.train(shape, 4, Recipe(120, 32, 1e-2), seed=0, looks=2, tested=200)
    assert [(row["step"], row["task"]) for row in rows] == [(s, t) for s in (60, 120) for t in ("match2", "match3")]
    assert rows[2]["accuracy"] > 0.95 > rows[2]["majority"] + 0.1
    short = [triples.train(shape, 4, Recipe(4, 8, 1e-2), seed=0, looks=looks, tested=50) for looks in (2, 1)]
    assert short[0][2:] == short[1]
