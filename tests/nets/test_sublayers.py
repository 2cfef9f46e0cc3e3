"""Nets of sublayers: each layer is its published formula, a prefix is a net of its own, and only what is drawn learns."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lab import datasets
from lab.nets import sublayers
from lab.nets.replicas import Recipe
from lab.nets.sublayers import Shape

SIZES = {"n_tokens": 11, "d_model": 16, "n_heads": 2, "length": 6}
RECIPE = Recipe(steps=5, batch=3, rate=3e-3)
TEXT = torch.randint(11, (300,), generator=torch.Generator().manual_seed(0))


class Published(nn.Module):
    """The Macaron layer from torch's own modules: x += F1(norm x) / 2; x += A(norm x); x += F2(norm x) / 2."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16, bias=False) for _ in range(3))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 20, bias=False), nn.ReLU(), nn.Linear(20, 16, bias=False)) for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(16, 2, bias=False, batch_first=True)
        self.double()
        ours = [weights[f"0.{place}.{part}"] for place in range(3) for part in ("norm", "in", "out")]
        with torch.no_grad():
            theirs = [self.norms[0].weight, self.feed[0][0].weight, self.feed[0][2].weight, self.norms[1].weight,
                      self.attention.in_proj_weight, self.attention.out_proj.weight, self.norms[2].weight,
                      self.feed[1][0].weight, self.feed[1][2].weight]  # fmt: skip
            for one, other in zip(theirs, ours, strict=True):
                one.copy_(other.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.feed[0](self.norms[0](x))
        y = self.norms[1](x)
        hidden = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        x = x + self.attention(y, y, y, attn_mask=hidden, need_weights=False)[0]
        return x + 0.5 * self.feed[1](self.norms[2](x))


def moved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gains other than 1, so that a norm in the wrong place is seen."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator).to(value) for name, value in weights.items()
    }


def test_the_macaron_layer_is_the_published_one():
    shape = Shape.of("F20/2 A F20/2", n_layers=1, **SIZES)
    weights = moved(sublayers.initial(shape, 0, torch.float64))
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = Published(weights)(x)
    assert torch.allclose(sublayers.run_layer(shape, weights, 0, x), wanted, atol=1e-12)
    whole = Shape.of("F20 A F20", n_layers=1, **SIZES)
    assert not torch.allclose(sublayers.run_layer(whole, weights, 0, x), wanted, atol=0.1)


def test_variants_have_one_size_and_cost():
    shapes = [Shape.of(layer, n_layers=4, n_tokens=59) for layer in ("A F256", "F128/2 A F128/2", "F128 F128 A")]
    for shape in shapes:
        weights = sublayers.initial(shape, 0)
        assert sum(value.numel() for value in weights.values()) == shape.parameters
        assert shape.layer_cost == sum(
            value.numel() for name, value in weights.items() if name[:2] == "0." and "norm" not in name
        )
    assert [shape.parameters - shapes[0].parameters for shape in shapes] == [0, 256, 256]  # a norm more in each layer


def test_a_prefix_is_the_net_of_its_layers_alone():
    shape, short = (Shape.of("A F20", n_layers=n, **SIZES) for n in (3, 2))
    weights = moved(sublayers.initial(shape, 0))
    stretches = TEXT[:70].view(-1, 7)
    every = sublayers.score(shape, weights, stretches, range(3), every=True)
    assert every[1] == pytest.approx(sublayers.score(short, weights, stretches, range(2))[0], abs=1e-6)
    assert every[2] == pytest.approx(sublayers.score(shape, weights, stretches, range(3))[0], abs=1e-6)
    assert abs(every[2] - sublayers.score(shape, weights, stretches, [0, 2])[0]) > 1e-3


def test_the_loss_is_that_of_the_next_character_and_sees_none_of_it():
    shape = Shape.of("A F20", n_layers=1, **SIZES)
    weights = moved(sublayers.initial(shape, 0))
    ids = TEXT[:7][None]
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 11
    stream = sublayers.run_layer(
        shape, weights, 0, functional.embedding(ids[:, :-1], weights["embedding"]) + weights["positions"]
    )
    logits = (sublayers.normed(stream, weights["norm"]) @ weights["head"])[0]
    for one in (ids, changed):
        wanted = -logits.log_softmax(-1)[torch.arange(6), one[0, 1:]].mean().item()
        assert sublayers.score(shape, weights, one, [0])[0] == pytest.approx(wanted, abs=1e-6)


def test_only_prefixes_that_are_drawn_learn_and_their_gradients_add_up():
    shape, start = Shape.of("A F20", n_layers=3, **SIZES), sublayers.initial(Shape.of("A F20", n_layers=3, **SIZES), 4)
    after = sublayers.train(shape, TEXT, RECIPE, seed=4, prefixes=lambda rng: [1, 2])
    for name, value in after.items():
        assert torch.equal(value, start[name]) == name.startswith("2."), name
    rng = np.random.default_rng([4, 1])
    ids = TEXT[torch.as_tensor(rng.integers(len(TEXT) - 6, size=3))[:, None] + torch.arange(7)]
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    for prefix in (1, 2):  # one backward pass each, as the published loop does
        *_, read = sublayers.exits(shape, weights, ids, range(prefix))
        read().backward()
    large = [value for name, value in weights.items() if not name.endswith("norm") and value.grad is not None]
    torch.optim.AdamW(large, lr=RECIPE.rate_at(0), betas=(0.9, 0.98), weight_decay=RECIPE.decay).step()
    one = sublayers.train(shape, TEXT, Recipe(1, 3, RECIPE.rate_at(0), warmup=0.0), seed=4, prefixes=lambda rng: [1, 2])
    for name in ("embedding", "0.0.in", "1.1.out", "head"):
        sure = (
            weights[name].grad.abs() > 1e-6
        )  # of a smaller gradient rounding decides the sign, and so Adam's first step
        assert sure.double().mean() > 0.2 and torch.allclose(one[name][sure], weights[name][sure], atol=1e-5), name
        assert not torch.equal(one[name], start[name])


def test_training_repeats_and_learns():
    shape, pattern = Shape.of("A F20", n_layers=1, **SIZES), torch.arange(400) % 5
    recipe = Recipe(steps=80, batch=8, rate=1e-2)
    first, second = (sublayers.train(shape, pattern, recipe, seed=0) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sublayers.score(shape, first, pattern[:70].view(-1, 7), [0])[0] < 0.3 < np.log(5)
    with pytest.raises(ValueError, match="6 characters to train on are too few for stretches of 6"):
        sublayers.train(shape, pattern[:6], recipe, seed=0)


def test_documents_are_never_in_two_parts():
    documents = datasets.load("prose").text.tolist()
    text = sublayers.characters(documents, seed=3)
    codes = {code: character for code, character in enumerate(sorted({"\n"}.union(*documents)))}
    parts = ["".join(codes[int(code)] for code in part.flatten()) for part in (text.train, text.choose, text.report)]
    where = [{document for document in documents if document[:200] in part} for part in parts]
    assert [len(one) for one in where] == [92, pytest.approx(15, abs=1), pytest.approx(15, abs=1)]
    assert not where[0] & where[1] and not where[0] & where[2] and not where[1] & where[2]
    assert text.n_tokens == len(codes) and text.report.shape[1] == 65
    assert not torch.equal(text.report[:5], sublayers.characters(documents, seed=4).report[:5])
    with pytest.raises(ValueError, match="held=61: give a whole number from 1 to 60"):
        sublayers.characters(documents, seed=0, held=61)


@pytest.mark.parametrize("layer", ["", "B", "F0", "A/3", "A  F"])
def test_layers_in_words(layer: str):
    with pytest.raises(ValueError, match="give sublayers such as 'A F256'"):
        Shape.of(layer, n_layers=1, n_tokens=5)
