"""Replicas: one batch equals each net alone and a plainly written net; what is frozen stays, to the last bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lab.nets import replicas
from lab.nets.replicas import Recipe, Shape

SHAPE = Shape(n_blocks=3, d_model=16, n_heads=2, n_positions=6, n_classes=4, n_inputs=10)
PATCHES = Shape(3, 16, 2, n_positions=6, n_classes=4, n_inputs=5, patches=True, causal=False)
NO_SKIP = replace(SHAPE, skip=False)
RECIPE = Recipe(steps=12, batch=5, rate=3e-3, decay=0.1)


def data(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if shape.patches:
        inputs = torch.randn(40, shape.n_positions, shape.n_inputs, generator=generator, dtype=dtype)
    else:
        inputs = torch.randint(shape.n_inputs, (40, shape.n_positions), generator=generator)
    return inputs, torch.randint(shape.n_classes, (40,), generator=generator)


def order(seeds: list[int], recipe: Recipe = RECIPE) -> torch.Tensor:
    return replicas.orders([np.arange(40)] * len(seeds), seeds, recipe)


class Plain(nn.Module):
    """The same net, written for one replica and nothing else."""

    def __init__(self, shape: Shape, weights: replicas.Weights, replica: int) -> None:
        super().__init__()
        self.shape = shape
        self.values = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(value[replica].clone())
                                        for name, value in weights.items()})  # fmt: skip

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        shape, w = self.shape, self.values
        d, length, heads = shape.d_model, shape.n_positions, shape.n_heads
        x = (inputs @ w["embedding"] if shape.patches else w["embedding"][inputs]) + w["positions"]
        for block in range(shape.n_blocks):
            q, k, v = (functional.layer_norm(x, (d,)) @ w[f"{block}_qkv"]).chunk(3, dim=-1)
            q, k, v = (part.view(-1, length, heads, d // heads).transpose(1, 2) for part in (q, k, v))
            scores = q @ k.transpose(-1, -2) / (d // heads) ** 0.5
            if shape.causal:
                scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, length, d) @ w[f"{block}_out"]
            x = x + mixed if shape.skip else mixed
            hidden = (functional.layer_norm(x, (d,)) @ w[f"{block}_mlp_in"]).relu()
            x = x + hidden @ w[f"{block}_mlp_out"] if shape.skip else hidden @ w[f"{block}_mlp_out"]
        x = functional.layer_norm(x[:, -1], (d,)) * w["norm_gain"] + w["norm_bias"]
        return x @ w["head"] + w["head_bias"]


@pytest.mark.parametrize("shape", [SHAPE, PATCHES, NO_SKIP], ids=["tokens", "patches", "no skip"])
def test_as_a_plain_net_trained_alone(shape: Shape) -> None:
    weights = replicas.initial(shape, [3, 4], dtype=torch.float64)
    inputs, labels = data(shape, torch.float64)
    batches = order([0, 1])
    trained = replicas.train(shape, weights, inputs, labels, batches, RECIPE).weights
    plain = Plain(shape, weights, 1)
    small = [plain.values[name] for name in ("norm_gain", "norm_bias", "head_bias")]
    large = [value for value in plain.parameters() if not any(value is other for other in small)]
    groups = [{"params": large, "weight_decay": RECIPE.decay}, {"params": small, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RECIPE.rate, betas=(0.9, 0.98))
    for step in range(RECIPE.steps):
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.rate_at(step)
        optimizer.zero_grad()
        functional.cross_entropy(plain(inputs[batches[1, step]]), labels[batches[1, step]]).backward()
        optimizer.step()
    for name, value in trained.items():
        assert torch.allclose(value[1], plain.values[name.replace(".", "_")], atol=1e-9), name
    log_p = replicas.log_probabilities(shape, trained, inputs)
    assert log_p[1] == pytest.approx(plain(inputs).log_softmax(-1).detach().numpy(), abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_batch_is_each_alone(dtype: torch.dtype) -> None:
    weights = replicas.initial(SHAPE, range(5), dtype=dtype)
    inputs, labels = data(SHAPE)
    frozen, rows = [0, 3, 1, 0, 2], torch.ones(5, 10, dtype=torch.bool)
    rows[1], rows[2], rows[4, :7] = False, False, False
    batches = order([0, 1, 2, 3, 4])
    options = {"frozen_blocks": frozen, "trained_rows": rows}
    together = replicas.train(SHAPE, weights, inputs, labels, batches, RECIPE, **options)
    in_groups = replicas.train(SHAPE, weights, inputs, labels, batches, RECIPE, at_once=2, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for replica in range(5):
        alone = replicas.train(
            SHAPE, replicas.pick(weights, [replica]), inputs, labels, batches[[replica]], RECIPE,
            frozen_blocks=[frozen[replica]], trained_rows=rows[[replica]],
        )  # fmt: skip
        assert together.loss[replica] == pytest.approx(alone.loss[0], abs=tolerance)
        for name in weights:
            assert torch.allclose(together.weights[name][replica], alone.weights[name][0], atol=tolerance), name
            assert torch.allclose(together.weights[name], in_groups.weights[name], atol=tolerance), name


def test_frozen_weights_are_equal_to_the_bit_and_the_others_move() -> None:
    weights = replicas.initial(SHAPE, range(4))
    before = {name: value.clone() for name, value in weights.items()}
    inputs, labels = data(SHAPE)
    rows = torch.ones(4, 10, dtype=torch.bool)
    rows[1], rows[2], rows[3, :7] = False, False, False
    frozen = [0, 0, 2, 3]
    after = replicas.train(
        SHAPE, weights, inputs, labels, order([0] * 4), RECIPE, frozen_blocks=frozen, trained_rows=rows
    ).weights
    for name in weights:
        assert torch.equal(weights[name], before[name]), "the start is not changed"
    for replica, count in enumerate(frozen):
        for block in range(SHAPE.n_blocks):
            for part in replicas.IN_BLOCK:
                name = f"{block}.{part}"
                assert torch.equal(after[name][replica], before[name][replica]) == (block < count), (replica, name)
        moved = (after["embedding"][replica] != before["embedding"][replica]).any(1)
        assert torch.equal(moved, rows[replica]), replica
        assert torch.equal(after["positions"][replica], before["positions"][replica]) == (replica > 0)
        for name in replicas.TOP:
            assert not torch.equal(after[name][replica], before[name][replica])


def test_a_top_that_is_not_trained_stays_to_the_bit() -> None:
    weights, (inputs, labels) = replicas.initial(SHAPE, [0, 1]), data(SHAPE)
    still = torch.zeros(2, 10, dtype=torch.bool)
    after = replicas.train(SHAPE, weights, inputs, labels, order([0, 1]), RECIPE, trained_top=False).weights
    for name in weights:
        assert torch.equal(after[name], weights[name]) == (name in replicas.TOP), name
    with pytest.raises(ValueError, match="nothing is left to train"):
        replicas.train(
            SHAPE,
            weights,
            inputs,
            labels,
            order([0, 1]),
            RECIPE,
            trained_top=False,
            frozen_blocks=[3, 3],
            trained_rows=still,
        )


def test_a_seed_gives_its_weights_wherever_it_stands() -> None:
    both, alone = replicas.initial(SHAPE, [7, 8]), replicas.initial(SHAPE, [8])
    assert replicas.digest(replicas.pick(both, [1])) == replicas.digest(alone)
    assert not torch.equal(both["0.qkv"][0], both["0.qkv"][1])
    assert both["0.mlp_out"].std().item() == pytest.approx((2 * SHAPE.d_model) ** -0.5 / 6**0.5, rel=0.1)


def test_matched_sizes() -> None:
    inputs, labels = data(SHAPE)
    random, like = replicas.initial(SHAPE, [0]), replicas.initial(SHAPE, [1])
    like["1.out"] *= 5
    like = replicas.train(SHAPE, like, inputs, labels, order([0]), RECIPE).weights
    matched = replicas.match_sizes(SHAPE, random, like, inputs)

    def sizes(weights: replicas.Weights) -> list[float]:
        stream, found = replicas.embed(SHAPE, weights, inputs[None]), []
        for block in range(3):
            stream, *updates = replicas.run_block(
                SHAPE, stream, [weights[f"{block}.{part}"] for part in replicas.IN_BLOCK], block == 2
            )
            found += [update.square().mean().sqrt().item() for update in updates]
        return found

    assert sizes(matched) == pytest.approx(sizes(like), rel=1e-4)
    assert sizes(random) != pytest.approx(sizes(like), rel=0.1)
    assert torch.equal(matched["1.qkv"], random["1.qkv"])


def test_orders_pass_through_all_examples() -> None:
    seen = replicas.orders([np.arange(10, 20)], [0], Recipe(steps=6, batch=5))[0]
    for passed in seen.reshape(3, 10):
        assert sorted(passed.tolist()) == list(range(10, 20))
    assert not torch.equal(seen[:2], seen[2:4])


def test_rate_rises_and_falls() -> None:
    rates = [Recipe(steps=20, rate=1.0).rate_at(step) for step in range(20)]
    assert rates[:2] == [0.5, 1.0] and rates[-1] == pytest.approx(1 / 18) and max(rates) == 1.0


def test_what_is_refused() -> None:
    weights, (inputs, labels) = replicas.initial(SHAPE, [0, 1]), data(SHAPE)
    with pytest.raises(ValueError, match="d_model=16 is not a multiple of n_heads=3"):
        Shape(3, 16, 3, 6, 4, 10)
    with pytest.raises(ValueError, match=r"frozen_blocks=\[0, 4\]: give at least 2, each from 0 to 3"):
        replicas.train(SHAPE, weights, inputs, labels, order([0, 1]), RECIPE, frozen_blocks=[0, 4])
    with pytest.raises(ValueError, match=r"wanted \[replica step batch\] = \(2, 12, 5\)"):
        replicas.train(SHAPE, weights, inputs, labels, order([0]), RECIPE)
    with pytest.raises(ValueError, match="order holds indices"):
        replicas.train(SHAPE, weights, inputs[:20], labels[:20], order([0, 1]), RECIPE)
    with pytest.raises(ValueError, match="tokens run from"):
        replicas.log_probabilities(SHAPE, weights, inputs + 5)
    with pytest.raises(FloatingPointError, match="the loss of replica 1 is not finite"):
        weights["head"][1] = torch.inf
        replicas.train(SHAPE, weights, inputs, labels, order([0, 1]), RECIPE)
