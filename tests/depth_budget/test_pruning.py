"""Rate-distortion curves, allocations within a budget, and whether damages add; on tiny models."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

import lab
from lab.depth_budget import (
    SKIP,
    Bits,
    Evaluator,
    additivity,
    allocations,
    programme,
    pruning,
    pruning_figures,
    rate_curves,
)
from lab.interventions import block_matrices

SMALL = {"sizes": (4, 4, 3), "n_tokens": 16, "first": 3, "rates": (0.3, 0.6, 0.9, 1.0), "budgets": (0.2, 0.5), "n_random": 3,
         "matrix_rates": (0.5, 1.0), "n_swaps": 4, "progress": False}  # fmt: skip
PAIRS = {"n_texts": 4, "n_tokens": 16, "first": 3, "n_pairs": 4, "sizes": (3,), "n_sets": 2, "group_size": 16,
         "progress": False}  # fmt: skip


@pytest.fixture(scope="module")
def prose():
    frame = lab.datasets.load("prose").head(60)
    frame["text"] = frame.text.str[:100]
    return frame


@pytest.fixture(scope="module")
def pruned(tiny_model, prose):
    return pruning.run(tiny_model("llama"), prose, resume=False, **SMALL)


@pytest.fixture(scope="module")
def added(tiny_model, prose):
    return additivity.run(tiny_model("llama"), prose, resume=False, **PAIRS)


# --- curves and allocations -----------------------------------------------------------------------------------------


def test_pruning_nothing_costs_exactly_nothing_and_curves_rise(pruned):
    curves = pruned.tables["curves"]
    assert len(curves) == 4 * 101
    none = curves[curves.rate == 0]
    assert (none[["raw", "monotone", "rise", "kl", "low", "high"]] == 0).all(axis=None)
    for _, mine in curves.groupby("layer"):
        assert (np.diff(mine.monotone) >= 0).all() and (mine.monotone <= mine.raw).all()
        assert mine.rate[mine.is_measured].tolist() == [0, 0.3, 0.6, 0.9, 1]
        between = mine.set_index("rate").raw
        power = np.log(between[0.6] / between[0.3]) / np.log(2)
        assert between[0.45] == pytest.approx(between[0.3] * 1.5**power)


def test_between_a_zero_and_a_value_there_is_a_straight_line():
    grid = np.array([0, 0.05, 0.1, 0.15, 0.2, 0.3])
    found = rate_curves.interpolated(grid, [0.0, 0.1, 0.2, 0.3], np.array([0, 0, 2.0, 0]))
    assert found.tolist() == pytest.approx([0, 0, 0, 1, 2, 0])
    found = rate_curves.interpolated(grid, [0.0, 0.1, 0.2], np.array([0, 4, 2.0]))
    assert found[1] == pytest.approx(2)  # at least linear


def test_curves_are_those_of_the_evaluator(pruned, tiny_model, prose):
    model = tiny_model("llama")
    search, *_ = lab.depth_budget.texts_of(model, prose, sizes=(4, 4, 3), n_tokens=16)
    found = Evaluator(model, search.ids, first=3, progress=False)([{2: lab.depth_budget.Pruned(0.6)}])
    curves = pruned.tables["curves"].set_index(["layer", "rate"])
    assert curves.raw[2, 0.6] == found.distortion.mean()


def test_every_method_keeps_the_budget(pruned, tiny_model):
    model = tiny_model("llama")
    summary = pruned.summary
    assert set(summary.method) == set(pruning.METHODS)
    sizes = [w.numel() for w, _ in block_matrices(model, 0)]
    total = 4 * sum(sizes)
    rounding = 4 * len(sizes) / 2 / total  # half a weight a matrix
    for row in summary.itertuples():
        if row.method.startswith("programme"):
            assert row.gone >= row.budget - rounding  # may prune more where a curve falls
        else:
            assert row.gone == pytest.approx(row.budget, abs=rounding + 1 / total)
    shares = pruned.tables["allocations"]
    assert ((shares.share >= 0) & (shares.share <= 1)).all()
    assert (shares.groupby(["budget", "method"]).size() == 4).all()
    by = summary.set_index(["budget", "method"])
    for budget in (0.2, 0.5):
        assert by.predicted[budget, "programme"] <= by.predicted[budget, "uniform"]  # its own objective
        assert by.predicted[budget, "programme"] <= by.predicted[budget, "programme, other texts"]
        assert by.than_programme[budget, "programme"] == by.than_programme_high[budget, "programme"] == 0
        difference = by.rise[budget, "uniform"] - by.rise[budget, "programme"]
        assert by.than_programme[budget, "uniform"] == pytest.approx(difference)
        assert by.measured[budget, "programme + swaps"] <= by.measured[budget, "programme"]
        drawn = pruned.tables["random"].query("budget == @budget").predicted
        assert (by.predicted[budget, "programme"] <= drawn + 1e-12).all()
        assert by.than_uniform[budget, "uniform"] == by.than_uniform_low[budget, "uniform"] == 0
    assert pruned.summary.predicted.isna().sum() == 2 * len(allocations.MATRIX_RULES)


def test_the_report_is_measured_where_it_says(pruned, tiny_model, prose):
    model = tiny_model("llama")
    _, report, _ = lab.depth_budget.texts_of(model, prose, sizes=(4, 4, 3), n_tokens=16)
    evaluate = Evaluator(model, report.ids, first=3, progress=False)
    shares = pruned.tables["allocations"].query("budget == 0.5 and method == 'programme'").share
    rounded = (100 * shares).round() / 100
    found = evaluate([{i: lab.depth_budget.Pruned(float(share)) for i, share in enumerate(rounded)}])
    rows = pruned.table.query("budget == 0.5 and method == 'programme'")
    assert rows.rise.tolist() == (found.nll[0] - evaluate.intact).tolist()
    assert not set(report.groups) & set(lab.depth_budget.texts_of(model, prose, sizes=(4, 4, 3), n_tokens=16)[0].groups)


def test_shares_of_single_matrices(pruned, tiny_model, prose):
    model = tiny_model("llama")
    names, units = rate_curves.matrix_units(model)
    numbers = [w.numel() for w, _ in block_matrices(model, 0)]
    assert [unit * numbers[0] / units[0] for unit in units] == numbers
    assert names[0] == "self_attn.q_proj" and names[-1] == "mlp.down_proj" and len(names) == 7
    search, report, _ = lab.depth_budget.texts_of(model, prose, sizes=(4, 4, 3), n_tokens=16)
    on_search, on_report = (Evaluator(model, one.ids, first=3, progress=False) for one in (search, report))
    points = pruned.tables["matrix_curves"]
    assert len(points) == 4 * 7 * 2 and set(points.rate) == {0.5, 1.0}
    one = tuple(0.5 if name == "mlp.up_proj" else 0.0 for name in names)
    mine = points.query("layer == 2 and matrix == 'mlp.up_proj' and rate == 0.5")
    assert mine.raw.item() == on_search([{2: lab.depth_budget.Pruned(one)}]).distortion.mean()
    curve = {key: rate_curves.interpolated(rate_curves.GRID, [0.0, 0.5, 1.0], np.array([0.0, *some.raw]))
             for key, some in points.groupby(["layer", "matrix"])}  # fmt: skip
    for budget in (0.2, 0.5):
        shares = pruned.tables["matrix_shares"].query("budget == @budget")
        plan = {layer: lab.depth_budget.Pruned(tuple(some.set_index("matrix").share[names]))
                for layer, some in shares.groupby("layer")}  # fmt: skip
        rows = pruned.table.query("budget == @budget and method == 'programme by matrix'")
        assert rows.rise.tolist() == (on_report([plan]).nll[0] - on_report.intact).tolist()
        row = pruned.summary.query("budget == @budget and method == 'programme by matrix'").iloc[0]
        gone = sum(dict(zip(names, numbers, strict=True))[one.matrix] * one.share for one in shares.itertuples())
        assert row.gone == pytest.approx(gone / (4 * sum(numbers)), abs=1e-3) and row.gone >= budget - 1e-3
        summed = sum(curve[one.layer, one.matrix][round(100 * one.share)] for one in shares.itertuples())
        assert row.predicted == pytest.approx(summed)
        same = sum(rate_curves.monotone_curve(one)[round(100 * budget)] for one in curve.values())
        assert row.predicted <= same + 1e-12  # the same share of every matrix is one of its choices
        assert row.measured == on_search([plan]).distortion.mean()
    fewer = pruning.run(model, prose, resume=False, **{**SMALL, "matrix_rates": ()})
    assert "matrix_curves" not in fewer.tables
    both = pruned.summary[pruned.summary.method != "programme by matrix"].reset_index(drop=True)
    pd.testing.assert_frame_equal(fewer.summary, both)


def test_the_programme_of_other_texts_is_theirs(pruned, tiny_model, prose):
    model = tiny_model("llama")
    *_, second = lab.depth_budget.texts_of(model, prose, sizes=(4, 4, 3), n_tokens=16)
    found = rate_curves.curves(Evaluator(model, second.ids, first=3, progress=False), [0.3, 0.6, 0.9, 1.0], second, 0)
    chosen = rate_curves.best_shares(found.raw.to_numpy().reshape(4, 101), [1] * 4, 20 * 4)
    shares = pruned.tables["allocations"].query("budget == 0.2 and method == 'programme, other texts'").share
    assert (100 * shares).round().tolist() == chosen.tolist()


def test_lamp_and_global_magnitude_by_hand(tiny_folder):
    model = lab.load(tiny_folder("gpt2"), device="cpu")
    generator = torch.Generator().manual_seed(0)
    flat = []
    for layer in range(4):
        for w, _ in block_matrices(model, layer):
            w.data = torch.randn(w.shape, generator=generator) * (1 + layer)
            flat.append(w.data.reshape(-1).abs().double().numpy())
    found = allocations.by_matrix(model, [0.3])
    gone = round(0.3 * sum(map(len, flat)))
    edge = np.sort(np.concatenate(flat))[gone - 1]
    wanted = [float((w <= edge).mean()) for w in flat]
    assert np.allclose(np.concatenate([list(one) for one in found["global magnitude"][0]]), wanted)
    scores = [np.array([size**2 / (w[w >= size] ** 2).sum() for size in w]) for w in flat]
    edge = np.sort(np.concatenate(scores))[gone - 1]
    wanted = [float((one <= edge).mean()) for one in scores]
    assert np.allclose(np.concatenate([list(one) for one in found["LAMP"][0]]), wanted)


def test_lamp_and_erk_of_two_matrices():
    scores = [allocations.lamp(np.array(w)) for w in ([1.0, 2.0], [3.0, 4.0])]
    np.testing.assert_allclose(scores, [[1 / 5, 1], [9 / 25, 1]])
    kept = allocations.erk([(10, 10), (10, 40)], 0.5)  # (20/100) and (50/400) a weight: 20 e + 50 e = 250
    np.testing.assert_allclose(kept, [250 * 20 / 70, 250 * 50 / 70])
    np.testing.assert_allclose(allocations.erk([(2, 2), (20, 20)], 0.5), [4, 198])  # the small one cannot hold 18.4


def test_filled_adds_up_and_holds_its_bounds():
    draw = np.random.default_rng(0)
    for _ in range(200):
        total = int(draw.integers(0, 701))
        found = allocations.filled(draw.random(7) ** 4, total)
        assert found.sum() == total and found.min() >= 0 and found.max() <= 100
    assert allocations.reversed_shares(np.array([3, 1, 9])).tolist() == [3, 9, 1]


def test_the_programme_on_the_monotone_curve_is_that_on_the_raw_one():
    draw, costs = np.random.default_rng(1), np.tile(10 - np.arange(11), (4, 1))
    for _ in range(50):
        raw = draw.random((4, 11)).cumsum(1) + 2 * draw.random((4, 11))
        raw[:, 0] = 0
        monotone = np.array([rate_curves.monotone_curve(row) for row in raw])
        realised = np.array([rate_curves.realised_rates(row) for row in raw])
        chosen = programme.allocate(costs, monotone, 20)
        direct = programme.allocate(costs, raw, 20)
        assert monotone[range(4), chosen].sum() == pytest.approx(raw[range(4), direct].sum())
        assert raw[range(4), realised[range(4), chosen]].sum() == pytest.approx(raw[range(4), direct].sum())


def test_an_interrupted_run_reads_what_it_has_measured(tiny_model, prose, pruned, passes):
    again = pruning.run(tiny_model("llama"), prose, **SMALL)
    before = len(passes)
    third = pruning.run(tiny_model("llama"), prose, **SMALL)
    assert len(passes) == before
    pd.testing.assert_frame_equal(again.summary, third.summary)
    pd.testing.assert_frame_equal(again.summary, pruned.summary)


# --- additivity -----------------------------------------------------------------------------------------------------


def test_joint_and_sum_are_what_the_evaluator_says(added, tiny_model, prose):
    model = tiny_model("llama")
    (texts,) = lab.depth_budget.texts_of(model, prose, sizes=(4,), n_tokens=16)
    evaluate = Evaluator(model, texts.ids, first=3, progress=False)
    rows = added.table.query("kind == 'left out' and blocks == '1 2'")
    found = evaluate([{1: SKIP, 2: SKIP}, {1: SKIP}, {2: SKIP}])
    assert rows.distortion[:4].tolist() == found.distortion[0].tolist()
    assert rows.distortion_sum[:4].tolist() == found.distortion[1:].sum(0).tolist()
    assert rows.nll_sum[:4].tolist() == (found.nll[1:] - evaluate.intact).sum(0).tolist()
    pair = added.tables["pairs"].query("kind == 'left out' and blocks == '1 2'").iloc[0]
    gram = evaluate.products([{1: SKIP}, {2: SKIP}]).mean(0)
    assert pair.cosine == pytest.approx(gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1]))
    assert pair.ratio == pytest.approx(found.distortion[0].mean() / found.distortion[1:].sum(0).mean())


def test_every_kind_and_level_is_there(added):
    levels = added.tables["levels"]
    assert set(levels.kind) == set(additivity.KINDS) and (levels[levels.kind == "left out"].level == "whole").all()
    assert not levels.duplicated(["kind", "value"]).any()
    assert {"random pairs", "adjacent pairs", "sets of 3", "all blocks"} == set(added.summary["where"])
    assert set(added.summary.measure) == set(additivity.MEASURES)
    ok = added.summary[added.summary.measure == "distortion"]
    assert ((ok.low <= ok.median_ratio + 1e-9) & (ok.median_ratio <= ok.high + 1e-9)).mean() > 0.8
    noise, rounded = (levels[levels.kind == kind].value.tolist() for kind in ("noise", "rounded"))
    assert noise == rounded


def test_noise_differs_from_block_to_block():
    seeds = {additivity._change("noise", 3.0, layer, 16, 0).seed for layer in range(30)}
    assert len(seeds) == 30
    assert additivity._change("rounded", 3.0, 5, 16, 0) == Bits(3, 16)


def test_small_changes_follow_the_first_order(tiny_model):
    """The difference of the logits of two tiny changes is the sum of both; so rho has its first-order value."""
    model = tiny_model("llama")
    torch.manual_seed(0)
    ids = torch.randint(5, 200, (4, 16))
    evaluate = Evaluator(model, ids, first=2, progress=False)
    one, two = {1: Bits(8, 16)}, {2: Bits(8, 16)}
    gram = evaluate.products([one, two]).mean(0)
    joint = evaluate([{**one, **two}]).distortion.mean()
    cosine = gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1])
    expected = additivity.first_order(gram[0, 0], gram[1, 1], cosine)
    assert joint / np.trace(gram) == pytest.approx(expected, abs=0.03)
    assert additivity.first_order(2.0, 2.0, 1.0) == 2.0  # a change with itself: the difference doubles, D is fourfold


def test_a_line_through_powers():
    total = np.array([1.0, 2.0, 4.0, 8.0])
    slope, r2 = additivity.fitted(np.stack([3 * total**1.5, total], 1))
    assert slope == pytest.approx(1.5) and r2 == pytest.approx(1)
    assert np.isnan(additivity.fitted(np.ones((5, 2)))[0])


def test_levels_take_the_nearest_value_once():
    tried = pd.DataFrame({"kind": "pruned", "value": [0.1, 0.5, 0.9], "layer": 0, "nll": [-0.01, 0.004, 0.03]})
    found = additivity._chosen(tried, ["pruned", "left out"], ["small", "medium", "large"])
    assert found.level.tolist() == ["small", "medium", "whole"] and found.value.tolist() == [0.5, 0.9, 0]


# --- both -----------------------------------------------------------------------------------------------------------


def test_gemma3_and_a_model_whose_logits_are_capped(tiny_model, prose):
    found = pruning.run(tiny_model("gemma3"), prose, resume=False, **{**SMALL, "n_swaps": 0, "budgets": (0.3,)})
    assert np.isfinite(found.summary.rise).all()
    for family, known in (("gemma3", True), ("gemma2", False)):
        kinds = {"kinds": ("left out",)}
        found = additivity.run(tiny_model(family), prose, resume=False, **PAIRS, **kinds)
        assert np.isfinite(found.tables["pairs"].cosine).all() == known
        assert np.isfinite(found.tables["pairs"].ratio).all()


def test_figures(pruned, added):
    for figure in (pruned.plot(), pruning_figures.verdict(pruned), pruning_figures.verdict(pruned, budget=0.2),
                   pruning_figures.shares_by_matrix(pruned, budget=0.5),
                   added.plot(), pruning_figures.additivity_by_size(added)):  # fmt: skip
        assert figure.axes
        plt.close(figure)
    with pytest.raises(ValueError, match=r"choose one of 0.2, 0.5"):
        pruning_figures.verdict(pruned, budget=0.7)
    none = pruning.Result("rate_distortion", pruned.table, pruned.summary, pruned.parameters, {})
    with pytest.raises(ValueError, match="matrix_rates"):
        pruning_figures.shares_by_matrix(none)


def test_a_programme_by_matrix_that_would_be_too_large(tiny_model, prose, passes, monkeypatch):
    monkeypatch.setattr(rate_curves, "MOST_STATES", 1000)
    with pytest.raises(ValueError, match=r"no divisor that is large enough.*give \(\)"):
        pruning.run(tiny_model("llama"), prose, **SMALL)
    assert not passes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rates": (0.5,)}, "the last of them 1"), ({"rates": (0.333, 1.0)}, "whole hundredths"),
     ({"budgets": (0.255,)}, "whole hundredths"), ({"n_random": 1}, "n_random"),
     ({"sizes": (4, 4)}, "sizes"), ({"matrix_rates": (0.5,)}, "matrix_rates=.*the last of them 1")],
)  # fmt: skip
def test_arguments_of_pruning(tiny_model, prose, passes, arguments, message):
    with pytest.raises(ValueError, match=message):
        pruning.run(tiny_model("llama"), prose, **arguments)
    assert not passes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kinds": ("noise",)}, "noise takes its norm"), ({"levels": ("huge",)}, "levels"), ({"group_size": 0}, "group_size"),
     ({"group_size": 24}, "group_size=24 does not divide")],
)  # fmt: skip
def test_arguments_of_additivity(tiny_model, prose, passes, arguments, message):
    with pytest.raises(ValueError, match=message):
        additivity.run(tiny_model("llama"), prose, **{**PAIRS, **arguments})
    assert not passes
