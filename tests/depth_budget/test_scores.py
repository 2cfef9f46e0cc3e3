"""Scores of blocks against what a Gaussian matrix and known angles must give."""

import numpy as np
import pytest
import torch

from lab.depth_budget import scores
from lab.interventions import block_matrices


def test_zd_of_gaussian_matrices():
    torch.manual_seed(0)
    found = scores.zd([torch.randn(576, 576), torch.randn(1536, 576) + 0.1, torch.randn(576, 4096)])
    for name, value in found.items():
        assert value == pytest.approx(0.1587 if name.startswith("above") else 0.3173, abs=0.0008)  # 4 standard errors


def test_zd_of_a_block_mixes_scales_and_zd_of_matrices_does_not():
    torch.manual_seed(0)
    small, large = torch.randn(300, 300), 30 * torch.randn(300, 300)
    found = scores.zd([small, large])
    assert found["either, matrix"] == pytest.approx(0.3173, abs=0.006)
    assert found["either, block"] < 0.3  # nearly all of the small matrix lies within a deviation of the mixture
    skewed = torch.randn(300, 300).exp()
    turned, plain = scores.zd([-skewed]), scores.zd([skewed])
    assert turned["above, matrix"] < plain["above, matrix"] / 5  # the sign counts in one reading, and not in the other
    assert turned["either, matrix"] == pytest.approx(plain["either, matrix"], abs=1e-6)


def test_lim_by_hand():
    states = torch.zeros(3, 2, 2)
    states[0] = torch.tensor([[100.0, 0], [1, 0]])
    states[1] = torch.tensor([[100.0, 0], [0, 1]])  # the first token stays, the second turns
    states[2] = -states[1]
    found = scores.lim(states)
    np.testing.assert_allclose(found["flattened"], [-1e4 / (1e4 + 1), 1], rtol=1e-9)
    np.testing.assert_allclose(found["tokens"], [-0.5, 1])
    np.testing.assert_allclose(found["flattened, no first"], [0, 1], atol=1e-12)
    np.testing.assert_allclose(found["tokens, no first"], [0, 1], atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_every_block_has_every_reading(tiny_model, family):
    model = tiny_model(family)
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (3, 12))
    table = scores.block_scores(model, ids)
    assert len(table) == 8 * model.cfg.n_layers and table.notna().all().all()
    weights = torch.cat([w.detach().flatten() for w, _ in block_matrices(model, 2)])
    wanted = ((weights - weights.mean()).abs() > weights.std()).float().mean().item()
    row = table[(table.reading == "either, block") & (table.layer == 2)].iloc[0]
    assert row.value == pytest.approx(wanted, abs=1e-3) and row.importance == -row.value
    with torch.no_grad():
        states = model.original_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    cosine = torch.cosine_similarity(states[1].flatten(1), states[2].flatten(1), dim=-1).mean().item()
    row = table[(table.reading == "flattened") & (table.layer == 1)].iloc[0]
    assert row.value == row.importance == pytest.approx(-cosine, abs=1e-5)
