"""Comparisons of small trained nets: what is compared with what, and what is chosen by what."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lab.depth_budget import macaron, nested, seeds, trained_figures, triples
from lab.results import Result

SMALL = {"d_model": 16, "steps": 4, "batch": 2, "length": 16, "held": 3, "progress": False}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path_factory.getbasetemp() / "trained"))


@pytest.fixture(scope="module")
def nets():
    return nested.run(seeds=[0, 1], n_layers=3, resume=False, **SMALL)


def test_intervals_are_those_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    runs = pd.DataFrame(rng.normal(size=(5, 3)) + [0, 0.5, 2], columns=["a", "b", "c"])
    table = seeds.compared(runs, [("a", None), ("b", "a"), ("c", "a")]).set_index("name")
    test = stats.ttest_rel(runs.c, runs.a)
    interval = test.confidence_interval(0.95)
    assert table.loc["c", ["difference_low", "difference_high", "p"]].tolist() == pytest.approx(
        [*interval, test.pvalue]
    )
    assert table.loc["c", "p_holm"] == pytest.approx(2 * test.pvalue) and np.isnan(table.loc["a", "p"])
    assert table.loc["a", "mean"] == pytest.approx(runs.a.mean()) and (table.n_seeds == 5).all()
    single = seeds.compared(runs.iloc[:1], [("b", "a")]).iloc[0]
    assert np.isfinite(single.difference) and np.isnan(single.difference_low) and np.isnan(single.p)


def test_nested_compares_each_prefix_with_the_net_of_that_depth(nets):
    report = nets.table[nets.table.text == "report"]
    two = {name: part.set_index("seed").nll for name, part in report[report.layers == "0,1"].groupby("method")}
    summary = nets.summary.set_index("name")
    wanted = (two["sorted"] - two["separate"]).mean()
    assert (
        summary.loc["sorted 2", "difference"] == pytest.approx(wanted)
        and summary.loc["sorted 2", "against"] == "separate 2"
    )
    assert "standard 3" not in summary.index, "the deepest of the separate nets is the standard one"
    deepest = report[(report["size"] == 3) & report.method.isin(["separate", "standard"])]
    assert deepest.groupby("seed").nll.nunique().tolist() == [1, 1]


def test_nested_chooses_the_best_other_subset_on_other_documents(nets):
    rows = nets.table[(nets.table.method == "sorted") & (nets.table["size"] == 2) & (nets.table.layers != "0,1")]
    assert set(rows.layers) == {"0,2", "1,2"}
    wanted = []
    for _, part in rows.groupby("seed"):
        both = part.pivot(index="layers", columns="text", values="nll")
        wanted.append(both.report[both.choose.idxmin()])
    subsets = nets.tables["subsets"].set_index("name")
    assert subsets.loc["sorted 2 best_other", "mean"] == pytest.approx(np.mean(wanted))
    assert subsets.loc["sorted 2 others", "mean"] == pytest.approx(rows[rows.text == "report"].nll.mean())


def test_nested_spends_what_it_says():
    result = nested.run(seeds=[0], n_layers=2, sampled=1, resume=False, **{**SMALL, "steps": 20})
    costs = result.tables["costs"].set_index("method")
    assert costs.relative_compute["standard"] == 1
    assert costs.relative_compute[["separate_shared", "sorted_longer"]].tolist() == pytest.approx([1, 1], abs=0.05)
    layer, head = 4 * 16**2 + 2 * 16 * 64, 16 * 59
    assert costs.multiplications["separate"] == 20 * 2 * 16 * (3 * layer + 2 * head)
    assert costs.multiplications["sorted"] == 20 * 2 * 16 * (1.5 * layer + head)


def test_a_part_is_a_method_and_a_seed_and_is_kept(nets):
    first = nested.run(seeds=[0], n_layers=2, **SMALL)
    both = nested.run(seeds=[0, 1], n_layers=2, **SMALL)
    kept = both.table[both.table.seed == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, first.table, check_exact=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_layers": 1}, "n_layers=1"),
        ({"sampled": 7}, "sampled=7"),
        ({"d_model": 18}, "multiple of 4"),
        ({"seeds": [0, 0]}, "seeds="),
    ],
)
def test_nested_says_what_it_takes(options, message):
    with pytest.raises(ValueError, match=message):
        nested.run(**options)


def test_macaron_chooses_a_rate_without_the_reported_text():
    cells = {
        "A": {0.1: (1.0, 3.0), 0.2: (2.0, 1.0), 0.3: (3.0, 0.0)},
        "B": {0.1: (2.0, 0.0), 0.2: (1.0, 5.0), 0.3: (2.0, 0.0)},
    }
    rows = [
        (layer, rate, choose, report + seed * (1 + (layer == "B")), 9, seed)
        for layer, rates in cells.items() for rate, (choose, report) in rates.items() for seed in (0, 1)
    ]  # fmt: skip
    rows = pd.DataFrame(rows, columns=["layer", "rate", "choose_nll", "report_nll", "parameters", "seed"])
    summary = macaron._summarise(rows, ["A", "B"]).set_index("layer")
    assert summary.rate.to_dict() == {"A": 0.1, "B": 0.2} and summary.at_edge.to_dict() == {"A": True, "B": False}
    assert summary.loc["B", ["mean", "difference"]].tolist() == [6.0, 2.5]


def test_macaron_trains_layers_of_one_size_only():
    layers = ["A F64", "F32/2 A F32/2"]
    result = macaron.run(layers, seeds=[0, 1], rates=[1e-3, 3e-3], n_layers=2, resume=False, **SMALL)
    assert result.table.groupby("layer").size().tolist() == [4, 4]
    assert result.summary.parameters.pct_change().abs().max() < macaron.TOLERANCE
    figure = trained_figures.macaron(result)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == layers[1:]
    with pytest.raises(ValueError, match=r"'A F32': .* of 'A F64': change widths"):
        macaron.run(["A F64", "A F32"], **SMALL)


def test_triples_against_pairs():
    result = triples.run(
        n=3, modulus=5, seeds=[0, 1], steps=6, batch=4, hidden=320, tested=50, resume=False, progress=False
    )
    last = result.table[(result.table.net == "pairs 3 longer") & (result.table.task == "match3")]
    assert last.step.max() == 18 and result.table.query("net == 'pairs 1'").step.max() == 6
    row = result.summary.query("net == 'pairs 3 longer' and task == 'match3'").iloc[0]
    assert row["mean"] == pytest.approx(last[last.step == 18].accuracy.mean()) and row.against == "triples 1"
    assert row.above_majority == pytest.approx(row["mean"] - row.majority)
    assert result.summary.parameters.max() / result.summary.parameters.min() < 1.005
    assert len(trained_figures.triples(result).axes) == 2
    with pytest.raises(ValueError, match="triples 1 is what the others are compared with"):
        triples.run(nets=["pairs 1"])


def test_nested_is_drawn_from_its_tables(nets, tmp_path):
    figure = trained_figures.nested(Result.load(nets.save(tmp_path / "nested")))
    line = next(one for one in figure.axes[0].get_lines() if one.get_label() == trained_figures.METHODS["sorted"][0])
    assert line.get_ydata().tolist() == nets.summary.query("method == 'sorted'").sort_values("size")["mean"].tolist()
    more = nets.summary.assign(mean=nets.summary["mean"] + 1)
    raised = trained_figures.nested(replace(nets, summary=more)).axes[0].get_lines()
    assert raised[0].get_ydata()[0] == pytest.approx(figure.axes[0].get_lines()[0].get_ydata()[0] + 1)
