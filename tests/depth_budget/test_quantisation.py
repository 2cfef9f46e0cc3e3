"""Blocks lowered in orders: what must hold whatever the model, and a block that damage must find."""

import numpy as np
import pandas as pd
import pytest
import torch

import lab
from lab.depth_budget import SKIP, Bits, Evaluator, bits_figures, lowering, quantisation, texts_of
from lab.depth_budget.quantisation import run
from lab.interventions import block_matrices, reweighted

SMALL = {"pairs": ((4, 2), (3, 2)), "step": 1, "group_size": 16, "n_random": 3, "most": 2, "sizes": (4, 6, 4), "n_tokens": 12,
         "first": 3, "draws": 200, "progress": False}  # fmt: skip


def data():
    frame = lab.datasets.load("prose")
    return frame.assign(text=frame.text.str[:80])


@pytest.fixture(scope="module")
def result(tiny_model):
    return run(tiny_model("llama"), data(), **SMALL)


def test_every_order_begins_and_ends_at_the_same_place(result):
    for _, part in result.summary[result.summary.sweep.isin(["4/2", "3/2"])].groupby("sweep"):
        wide = part.pivot(index="order", columns="k", values="rise")
        assert np.ptp(wide[0]) == 0 and np.ptp(wide[4]) == 0 and np.ptp(wide[2]) > 0
        bits = part.pivot(index="order", columns="k", values="bits")
        assert (np.ptp(bits.to_numpy(), axis=0) < 1e-12).all() and (bits.diff(axis=1).iloc[:, 1:] < 0).all().all()


def test_orders_and_their_reverses_hold_all_blocks(result):
    orders = result.tables["orders"]
    lists = {
        name: part.sort_values("place").layer.tolist() for name, part in orders[orders.sweep == "4/2"].groupby("order")
    }
    assert all(sorted(one) == [0, 1, 2, 3] for one in lists.values())
    reverses = [name for name in lists if name.startswith("reverse of ")]
    assert reverses and all(lists[name] == lists[name.removeprefix("reverse of ")][::-1] for name in reverses)
    assert sum(name.startswith("random") for name in lists) == 3 and lists["first to last"] == [0, 1, 2, 3]


def test_curves_are_those_of_plain_passes(tiny_model, result):
    model = tiny_model("llama")
    _, report, _ = texts_of(model, data(), sizes=(4, 6, 4), n_tokens=12, seed=0)

    def loss():
        with torch.no_grad():
            logits = model(report.ids, use_cache=False)[:, 3:-1].double().log_softmax(-1)
        return -logits.gather(-1, report.ids[:, 4:, None])[..., 0].mean(1).numpy()

    intact = loss()
    low, high = Bits(2, 16), Bits(4, 16)
    with reweighted(model, {layer: (low if layer < 2 else high).weights for layer in range(4)}):
        wanted = loss() - intact
    table = result.table
    part = table[(table.sweep == "4/2") & (table.order == "first to last") & (table.k == 2)]
    assert part.example.tolist() == report.table.example.tolist()
    np.testing.assert_allclose(part.rise, wanted, rtol=1e-3, atol=1e-5)
    point = result.summary.merge(part.head(1)[["sweep", "order", "k"]]).iloc[0]
    assert point.rise == pytest.approx(wanted.mean(), rel=1e-3, abs=1e-5) and point.low < point.rise < point.high


def test_what_orders_is_not_what_reports(tiny_model, result):
    sets = texts_of(tiny_model("llama"), data(), sizes=(4, 6, 4), n_tokens=12, seed=0)
    reported = set(result.table.group.astype(str))
    assert reported == set(sets[1].groups) and not reported & (set(sets[0].groups) | set(sets[2].groups))
    search = Evaluator(tiny_model("llama"), sets[0].ids, first=3, progress=False)
    rest = dict.fromkeys(range(4), Bits(4, 16))
    wanted = search([{**rest, 2: Bits(2, 16)}, rest]).nll.mean(1)
    scores = result.tables["scores"]
    found = scores[(scores.sweep == "4/2") & (scores.score == "damage") & (scores.layer == 2)].importance.item()
    assert found == pytest.approx(wanted[0] - wanted[1], abs=1e-9)


def test_a_planted_block_is_found_by_damage_and_by_rescue(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu")
    with torch.no_grad():
        for layer in range(4):
            for weight, _ in block_matrices(model, layer):
                on_steps = torch.where(weight > 0, 0.2, -0.1)  # of 2 bits and of 8: rounding changes nothing
                weight.copy_(on_steps if layer != 2 else 3 * weight)
    search, _, second = texts_of(model, data(), sizes=(4, 2, 4), n_tokens=12)
    both = [Evaluator(model, one.ids, first=3, progress=False) for one in (search, second)]
    for name, found in lowering.measured_importance(*both, Bits(8, 16), Bits(2, 16)).items():
        assert abs(found[2]) > 10 * np.abs(np.delete(found, 2)).max(), name
    orders = lowering.orders_of({"planted": np.array([0.0, 1e-9, 3, 0])}, 2, seed=0)
    assert orders["planted"][1] == [0, 3, 1, 2] and orders["reverse of planted"][1] == [2, 1, 3, 0]


def test_readings_of_one_order_are_measured_once(tiny_model):
    model = tiny_model("llama")
    texts = texts_of(model, data(), sizes=(4, 6, 4), n_tokens=12)
    evaluate = Evaluator(model, texts[1].ids, first=3, progress=False)
    orders = lowering.orders_of({"a": np.array([1.0, 2, 3, 4]), "b": np.array([10.0, 20, 30, 40])}, 2, seed=0)
    steps = [(name, "score", 2, lowering.lowered(orders[name][1], 2, Bits(4, 16), Bits(2, 16))) for name in "ab"]
    before = evaluate.full
    found = lowering._by_text(model, evaluate, texts[1].table, "4/2", steps)
    assert evaluate.full == before + 2 * model.cfg.n_layers  # one configuration, and the intact model
    assert found.rise[:6].tolist() == found.rise[6:].tolist()


def test_bits_of_smollm2_by_hand():
    sizes, rest = np.full(30, 3_538_944), 28_311_552  # matrices of a block, the embedding
    half = lowering.lowered(range(30), 15, Bits(4), Bits(2))
    assert lowering.mean_bits(sizes, half) == pytest.approx((4 + 20 / 64 + 2 + 18 / 64) / 2, abs=1e-12)
    assert lowering.mean_bits(sizes, half) == pytest.approx(
        lowering.mean_bits(sizes, dict.fromkeys(range(30), Bits(3)))
    )
    assert lowering.mean_bits(sizes, {0: SKIP}) == pytest.approx(16 * 29 / 30)
    table = pd.DataFrame({"sweep": "4/2", "order": "a", "kind": "score", "k": [0, 0], "bits": 4.0, "rise": [0.0, 1], "kl": 0.0,
                          "group": ["x", "y"]})  # fmt: skip
    found = quantisation._curves(table, (sizes, rest), 100, 0)
    assert found.bits_model.item() == pytest.approx(6.5263, abs=1e-4)  # "about 6.5": (21.05 % x 16 + 78.95 % x 4)


def test_sizes_count_every_parameter_once(tiny_model):
    for family in ("llama", "gemma3", "gpt2"):
        model = tiny_model(family)
        blocks, rest = lowering.sizes_of(model)
        assert len(blocks) == 4 and blocks.sum() + rest == sum(p.numel() for p in model.original_model.parameters())


def test_controls_spend_one_budget(result):
    controls, plans = result.tables["controls"], result.tables["plans"]
    uniform = controls[controls.kind == "uniform"].iloc[0]
    assert (controls.bits <= uniform.bits + 1e-9).all() and (controls.k[controls.kind != "uniform"] <= 2).all()
    assert {"programme", "two levels", "random"} < set(controls.kind) and (uniform.difference == 0)
    alone = result.tables["alone"].pivot(index="layer", columns="change", values="loss")
    for method in ("programme, by loss", "two levels, by damage", "uniform 3 bits"):
        own = plans[plans.method == method]
        wanted = sum(alone.loc[layer, f"{bits} bits"] for layer, bits in zip(own.layer, own.bits, strict=True))
        assert own.predicted.iloc[0] == pytest.approx(wanted, abs=1e-12)
    predicted = plans.drop_duplicates("method").set_index("method").predicted
    assert predicted["programme, by loss"] <= predicted.min() + 1e-12  # the best there is, by its own measure


def test_leaving_out_against_two_bits(tiny_model, result):
    prune = result.tables["prune"]
    assert prune.k.tolist() == [0, 1, 2] and (prune.loc[0, ["left_out", "two_bits", "difference"]] == 0).all()
    np.testing.assert_allclose(prune.difference, prune.left_out - prune.two_bits)
    alone = result.tables["alone"]
    first = int(alone[alone.change == "left out"].sort_values("loss").layer.iloc[0])
    _, report, _ = texts_of(tiny_model("llama"), data(), sizes=(4, 6, 4), n_tokens=12, seed=0)
    evaluate = Evaluator(tiny_model("llama"), report.ids, first=3, progress=False)
    assert prune.left_out[1] == pytest.approx((evaluate([{first: SKIP}]).nll[0] - evaluate.intact).mean())


# --- statistics on tables that are made up --------------------------------------------------------------------------


def curves(rises, n=20, noise=0.01):
    """A table of texts: order to its mean rise at k = 0, 1, 2; texts differ, and in all orders alike but for the noise."""
    rng, rows = np.random.default_rng(0), []
    level = rng.normal(0, 0.05, n)
    for order, means in rises.items():
        kind = "random" if "random" in order else "depth" if " to " in order else "score"
        for k, mean in enumerate(means):
            rows.append(pd.DataFrame({"sweep": "4/2", "order": order, "kind": kind, "k": k, "bits": 4.0 - k, "group": range(n),
                                      "rise": mean + (level + rng.normal(0, noise, n)) * (0 < k < 2), "kl": 0.0}))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def test_areas_by_hand_and_who_beats_both_depth_orders():
    table = curves({"good": [0, 0.1, 1], "one": [0, 0.45, 1], "first to last": [0, 0.5, 1], "last to first": [0, 0.4, 1],
                    "random 0": [0, 0.3, 1], "random 1": [0, 0.7, 1]})  # fmt: skip
    found, bands = quantisation._areas(table, table, 0.2, 500, 0)
    found = found.set_index("order")
    middle = table[(table.order == "good") & (table.k == 1)].rise.mean()
    assert found.area["good"] == pytest.approx(middle / 2 + 0.25)
    assert found.beats_depth["good"] and not found.beats_depth["one"]  # "one" beats only one of the two
    assert found.beats_depth[["first to last", "random 0"]].isna().all()
    assert found.depth_order["good"] == "last to first" and found.difference_high["good"] < 0
    assert found.below["good"] == 1 and found.below["one"] == 0.5
    assert found.lowerable.to_dict() | {"good": 1, "one": 0} == found.lowerable.to_dict()
    assert found.ratio[["random 0", "random 1"]].mean() == pytest.approx(1)
    band = bands[(bands.measure == "rise") & (bands.k == 1)].iloc[0]
    assert 0.3 < band.low < band["mean"] < band.high < 0.75


def test_how_many_can_be_lowered():
    ks, rise = np.array([0, 3, 6]), np.array([[0, 0.01, 0.2], [0, 0.2, 0.01], [0.1, 0, 0], [0, 0, 0.05]])
    assert quantisation._lowerable(rise, ks, 0.05).tolist() == [3, 0, 0, 6]


def test_equal_orders_are_told_apart_as_seldom_as_they_should():
    rng = np.random.default_rng(3)
    p = quantisation._less(rng.normal(size=(20, 400)), np.arange(20), 0)
    assert 0.02 < (p < 0.05).mean() < 0.09
    assert quantisation._less(rng.normal(-1, 0.1, size=(20, 1)), np.arange(20), 0)[0] < 0.001
    assert quantisation._less(rng.normal(1, 0.1, size=(20, 1)), np.arange(20), 0)[0] > 0.99


def test_agreement_with_and_without_the_ends():
    rng, n = np.random.default_rng(0), 20
    damage = rng.normal(size=n)
    other = rng.normal(size=n)
    damage[[0, -1]], other[[0, -1]] = 9, 9  # only the ends agree
    rows = [("all", "LIM", "a", other), ("all", "ZD", "b", damage**3), ("4/2", "damage", "measured", damage),
            ("4/2", "damage, KL", "measured", -damage)]  # fmt: skip
    table = pd.concat([pd.DataFrame({"sweep": sweep, "score": score, "reading": reading, "layer": range(n), "importance": values})
                       for sweep, score, reading, values in rows])  # fmt: skip
    table["end"] = table.layer.isin([0, n - 1])
    both = quantisation._agreement(table, 0)
    found, turned = (both[both.target == name].set_index(["blocks", "score"]) for name in ("damage", "damage, KL"))
    assert turned.rho["all", "damage"] == pytest.approx(-1) and turned.rho["all", "ZD"] == pytest.approx(-1)
    wanted = pd.Series(damage[1:-1]).corr(pd.Series(other[1:-1]), method="spearman")
    assert found.rho["without ends", "LIM"] == pytest.approx(wanted) and found.n["without ends", "LIM"] == n - 2
    assert found.rho["all", "LIM"] > wanted and found.rho["all", "ZD"] == pytest.approx(1)
    assert found.p["all", "ZD"] < 0.001 and (found.p_holm >= found.p).all()


# --- around it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "neox"])
def test_other_models_run_too_and_a_run_goes_on(tiny_model, monkeypatch, tmp_path, family):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    small = SMALL | {"pairs": ((4, 2),), "step": 2, "n_random": 2}
    first = run(tiny_model(family), data(), **small)
    monkeypatch.setattr(Evaluator, "__init__", lambda *args, **options: pytest.fail("measured again"))
    again = run(tiny_model(family), data(), **small)
    pd.testing.assert_frame_equal(first.summary, again.summary)
    again.save(tmp_path / "out")
    assert lab.results.Result.load(tmp_path / "out").columns().meaning.str.len().min() > 0


def test_figures_draw(result):
    result.plot()
    result.plot(pair="3/2", model=True, orders=("rescue",))
    bits_figures.bits_control(result)
    bits_figures.prune_or_quantise(result)
    with pytest.raises(ValueError, match="pair='8/4': choose one of 4/2, 3/2"):
        result.plot(pair="8/4")
    with pytest.raises(ValueError, match="choose of"):
        result.plot(orders=("nothing",))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pairs": ((2, 4),)}, "the higher bits"), ({"pairs": ((4, 1),)}, "pairs"), ({"pairs": ()}, "at least one"),
     ({"group_size": 24}, "does not divide"), ({"sizes": (4, 4)}, "sizes"), ({"n_random": 1}, "n_random"),
     ({"step": 5}, "step"), ({"first": 11}, "first"), ({"threshold": 0}, "threshold")],
)  # fmt: skip
def test_arguments_that_do_not_do(tiny_model, passes, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_model("llama"), data(), **(SMALL | options))
    assert not passes
