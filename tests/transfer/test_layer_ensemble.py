"""The layer ensemble: forward passes against plain ones, sizes that are really equal, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from lab.transfer import ensemble as le

QUICK: dict[str, Any] = {"seeds": 2, "steps": 30, "rates": [3e-3], "draws": 200, "progress": False}


def statements(form: str, n: int = 30, first: int = 0) -> pd.DataFrame:
    """Groups of two texts, one of each label; the label is a word that the small model can learn."""
    rows = [
        {"example": f"{first + group}-{label}", "text": form.format(group, ["no", "yes"][label]), "label": label,
         "group": f"g{first + group}"}
        for group in range(n) for label in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(template="t", difficulty="d")


TRAIN, SHIFTED = statements("{} is {}"), statements("so it is with {}, {}", first=100)


def inputs(d_model: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(5, 4, d_model, generator=generator)
    ids = torch.randint(10, (5, 7), generator=generator)
    return states, ids, torch.tensor([6, 5, 4, 3, 6])


def test_without_the_small_models_part_it_is_the_net_without_small_model() -> None:
    both, alone = le.Ensemble(le.Design(4, True, 12, 10)), le.Ensemble(le.Design(4, False, 12, 10))
    given = inputs(12)
    with torch.no_grad():
        for adapter, plain in zip(both.adapters, alone.adapters, strict=True):
            plain.load_state_dict({**adapter.state_dict(), "0.weight": adapter[0].weight[:, :12].clone()})
        assert (both(*given) - alone(*given)).abs().max() > 1e-3, "the small model's part counts"
        for adapter in both.adapters:
            adapter[0].weight[:, 12:] = 0
        torch.testing.assert_close(both(*given), alone(*given))


def test_logits_are_the_mean_over_depths_each_read_by_its_own_adapter() -> None:
    net, (states, ids, last) = le.Ensemble(le.Design(4, True, 12, 10)), inputs(12)
    with torch.no_grad():
        g = net.small(ids, last)
        plain = [
            torch.relu(torch.cat([states[:, depth], g], -1) @ first.weight.T + first.bias) @ second.weight.T
            + second.bias
            for depth, (first, _, second) in enumerate(net.adapters)
        ]
        torch.testing.assert_close(net(states, ids, last), sum(plain) / 4)
        one = le.Ensemble(le.Design(1, True, 12, 10))
        torch.testing.assert_close(one(states, ids, last), one(states[:, 3:], ids, last))  # the last depth is read


def test_padding_behind_the_last_token_is_never_seen_and_order_is() -> None:
    small, (_, ids, last) = le.SmallModel(10, 64, 128), inputs(12)
    behind = torch.arange(7) > last[:, None]
    with torch.no_grad():
        torch.testing.assert_close(small(ids, last), small(ids.masked_fill(behind, 0), last))
        swapped = ids.clone()
        swapped[0, [0, 1]] = torch.tensor([3, 8])
        other = swapped.clone()
        other[0, [0, 1]] = torch.tensor([8, 3])
        assert (small(swapped, last) - small(other, last))[0].abs().max() > 1e-3


@pytest.mark.parametrize(("d_model", "n_tokens"), [(576, 130), (32, 400), (2048, 30)])
def test_as_many_trained_weights_within_one_percent(d_model: int, n_tokens: int) -> None:
    found = le.designs(4, d_model, n_tokens)
    wanted = le.n_weights(found["levi"])
    for name in ("random_lm", "lm_only_wide", "small_only_wide", "last_depth"):
        net = le.Ensemble(found[name])
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(wanted, rel=0.01), name
        assert all(p.requires_grad for p in net.parameters())
    assert le.n_weights(found["small_only"]) < wanted > le.n_weights(found["lm_only"])


@pytest.fixture(scope="module")
def result(tiny_model: Callable[[str], TransformerBridge]) -> Any:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    found = le.run(model, TRAIN, SHIFTED, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.original_model.state_dict().items())
    return found


def test_run(result: Any) -> None:
    summary = result.summary.set_index(["test", "treatment"])
    assert set(summary.index) == {
        (test, name) for test in ("like", "shifted") for name in (*le.TREATMENTS, "majority", "bag_of_words")
    }
    assert summary.accuracy["like", "small_only"] == 1 and summary.accuracy["like", "bag_of_words"] == 1
    assert summary.accuracy["like", "majority"] == 0.5
    assert result.tables["choice"].groupby(["seed", "treatment"]).chosen.sum().eq(1).all()
    items = result.tables["items"]
    one = items[(items.treatment == "levi") & (items.test == "shifted")]
    right = ((one.log_odds > 0) == (one.label == 1)).groupby(one.seed).mean()
    assert summary.accuracy["shifted", "levi"] == pytest.approx(right.mean())
    assert summary.seed_sd["shifted", "levi"] == pytest.approx(right.std())
    gap = result.tables["differences"].set_index(["test", "other"]).difference
    wanted = summary.accuracy["shifted", "levi"] - summary.accuracy["shifted", "lm_only"]
    assert gap["shifted", "lm_only"] == pytest.approx(wanted)
    counts = summary.trained_weights["like"]
    assert counts["lm_only_wide"] == pytest.approx(counts["levi"], rel=0.01)


def test_the_logit_average_is_one(result: Any) -> None:
    odds = result.tables["items"].pivot(index=["seed", "test", "example"], columns="treatment", values="log_odds")
    np.testing.assert_allclose(odds.logit_average, (odds.lm_only + odds.small_only) / 2)
    assert not np.allclose(odds.lm_only, odds.small_only) and not np.allclose(odds.levi, odds.random_lm)


def test_parts_share_no_group_and_rare_tokens_are_unknown(tiny_model: Callable[[str], TransformerBridge]) -> None:
    sizes = le._sizes("quick", None, None, None)
    same = pd.concat([TRAIN, statements("so it is with {}, {}").assign(example=lambda f: "s" + f.example)])
    frames, left_out, _ = le._frames(TRAIN, same, sizes, 0)
    seen = set(frames["train"].group) | set(frames["validation"].group)
    assert left_out == len(same) - 2 * 2 * (30 - len(seen)) and left_out > 0
    assert not seen & set(frames["shifted"].group) and not seen & set(frames["like"].group)
    assert not set(frames["train"].group) & set(frames["validation"].group)
    frame = pd.DataFrame(
        {"text": ["ab", "ac", "ad", "ax"], "label": [0, 1, 0, 1], "part": ["train", "train", "validation", "like"]}
    )
    texts = le._Texts(tiny_model("llama"), frame, [1, 2, 3, 4], 0, False)
    assert texts.n_tokens == 3 and texts.ids.tolist() == [[2, 1], [2, 1], [2, 1], [2, 1]]
    train = texts.states[0][:2]
    torch.testing.assert_close(train.mean(0), torch.zeros_like(train[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "preset='huge': choose one of quick, standard"),
        ({"rates": []}, r"rates=\[\]: give at least 1 of the numbers"),
        ({"seeds": 0}, "seeds=0: give a whole number, at least 1"),
        ({"test_data": TRAIN.iloc[:4]}, "your test_data: . of 4 texts are in groups that were not trained on"),
        ({"train_data": TRAIN.drop(columns="group")}, "group"),
    ],
)
def test_what_is_refused(arguments: dict, message: str, tiny_model: Callable[[str], TransformerBridge]) -> None:
    call = {"train_data": TRAIN, "test_data": SHIFTED, **QUICK, **arguments}
    with pytest.raises(ValueError, match=message):
        le.run(tiny_model("llama"), **call)


def test_a_net_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a net needs depths or the small model"):
        le.Ensemble(le.Design(0, False, 12, 10))
