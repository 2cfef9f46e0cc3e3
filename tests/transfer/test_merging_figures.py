"""Figures of merging, probes elsewhere and stitching, on small tables with known numbers: each stands where it belongs."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from clicking import click
from test_concept_figures import controls
from test_two_hop_figures import words

from lab.results import Result
from lab.transfer import merging_figures, scaling
from lab.transfer.explorer import probe_transfer_explorer

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def result(kind, summary, tables=None, **parameters) -> Result:
    about = {"model": "m", "dataset": "d", "n_layers": 4, **parameters}
    return Result(
        kind, pd.DataFrame(), pd.DataFrame(summary), about, {k: pd.DataFrame(v) for k, v in (tables or {}).items()}
    )


def placed(ax) -> dict[str, float]:
    """Name of each line of a dot plot, and where its dot is."""
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    dots = next(line for line in ax.lines if line.get_marker() not in ("None", "", None))
    return dict(zip([names[int(y)] for y in dots.get_ydata()], dots.get_xdata(), strict=True))


def interval(**row) -> dict:
    return {"low": row["estimate"] - 0.1, "high": row["estimate"] + 0.1, **row}


def test_merging_names_each_method_and_both_sides_of_a_difference():
    levels = [interval(part="merge", metric="normalised", method=name, estimate=value)
              for name, value in (("ties_lines", 0.7), ("own", 1.0), ("ties", 0.8))]  # fmt: skip
    pairs = [interval(part="merge", metric="normalised", family="lines", first="ties_lines", second=second, n_clusters=4,
                      estimate=value) for second, value in (("ties", -0.1), ("ties_reversed", 0.2))]  # fmt: skip
    figure = result("merging", pairs, {"levels": levels}).plot()
    left, right = figure.axes
    assert placed(left) == {"own models (no merge)": 1.0, "TIES": 0.8, "... with LiNeS": 0.7}
    assert placed(right) == {"TIES: LiNeS - unscaled": -0.1, "TIES: LiNeS - ramp reversed": 0.2}
    assert "4 bases" in words(figure)
    with pytest.raises(ValueError, match="no run passed its gate"):
        result("merging", pairs, {"levels": [{**levels[0], "part": "single"}]}).plot()


def test_mask_profile_goes_from_the_embedding_down():
    rows = [{"split": split, "seed": 0, "mask": mask, "block": block, "mean_mask": value + split, "update_ratio": 1.0}
            for split in (0, 1) for mask in ("concrete", "concrete_shuffled")
            for block, value in (("embedding", 0.1), ("0", 0.2), ("1", 0.3))]  # fmt: skip
    left, _ = merging_figures.mask_profile(result("merging", [], {"mask_profile": rows})).axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["embedding", "0", "1"]
    mean = next(line for line in left.lines if line.get_label() == "Concrete")
    np.testing.assert_allclose(mean.get_ydata(), [0.6, 0.7, 0.8])


def test_scalings_and_ensemble_are_dots_with_their_names():
    rows = [interval(method=method, measure=measure, estimate=value) for measure in ("target", "control", "score")
            for method, value in (("reversed", 0.4), ("lines", 0.6))]  # fmt: skip
    figure = result("tuned_scaling", rows).plot()
    assert placed(figure.axes[0]) == {"LiNeS": 0.6, "ramp reversed (control)": 0.4}
    rows = [interval(test=test, treatment=name, estimate=value) for test, shift in (("like", 0.0), ("shifted", 0.3))
            for name, value in (("levi", 0.9 - shift), ("majority", 0.5))]  # fmt: skip
    frame = pd.DataFrame(rows).rename(columns={"estimate": "accuracy"})
    like, shifted = result("layer_ensemble", frame).plot().axes
    assert placed(like) == {"ensemble over layers": 0.9, "majority": 0.5}
    np.testing.assert_allclose(shifted.lines[0].get_xdata(), [0.6, 0.5])  # its lines are named on the left


NAMES = ("cities", "cities_negated")


@pytest.fixture
def carried() -> Result:
    auc = {("cities", "cities"): 0.9, ("cities", "cities_negated"): 0.1, ("cities_negated", "cities"): 0.2,
           ("cities_negated", "cities_negated"): 0.8}  # fmt: skip
    pairs = [{"trained_on": a, "tested_on": b, "probe": "logistic", "auc": value, "difference": value - 0.5,
              "p_holm": 0.01 if value == 0.9 else 0.2 if value == 0.8 else 0.001}
             for (a, b), value in auc.items()]  # fmt: skip
    summary = [{"trained_on": a, "tested_on": b, "probe": probe, "labels": labels, "metric": metric, "depth": depth,
                "relative_depth": depth / 4, "mean": value if labels == "task" else 0.5, "low": 0.0, "high": 1.0,
                "difference": 0.3, "difference_low": 0.2, "difference_high": 0.4}
               for (a, b), value in auc.items() for probe, labels in (("logistic", "task"), ("logistic", "shuffled"))
               for metric in ("auc", "accuracy") for depth in (0, 2, 4)]  # fmt: skip
    summary += [{**row, "probe": "bag_of_words", "mean": 0.55} for row in summary[:1]]
    depths = [{"dataset": "cities", "probe": "logistic", "trained_depth": a, "tested_depth": b, "statistics": "tested_depth",
               "metric": "auc", "mean": a / 4 + b / 40} for a in (0, 2) for b in (0, 2)]  # fmt: skip
    cosines = [{"dataset": "cities", "probe": "logistic", "depth_a": a, "depth_b": b, "cosine": float(a == b)}
               for a in (0, 2) for b in (0, 2)]  # fmt: skip
    return result("probe_transfer", summary, {"pairs": pairs, "depth_transfer": depths, "depth_cosines": cosines})


def test_probe_transfer_has_trained_down_and_tested_across(carried):
    ax = carried.plot(probe="logistic").axes[0]
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.9, 0.1], [0.2, 0.8]])
    assert [text.get_text() for text in ax.texts] == ["0.90 *", "0.10", "0.20", "0.80"], "sure, and above its control"
    with pytest.raises(ValueError, match="choose one of logistic"):
        carried.plot(probe="mlp")


def test_curves_by_depth_leave_the_shuffled_labels_out(carried):
    (ax,) = merging_figures.probe_transfer_by_depth(carried, pairs=[NAMES, NAMES[::-1]], probe="logistic").axes
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(lines["cities to cities negated"].get_ydata(), [0.1] * 3)
    np.testing.assert_allclose(lines["cities negated to cities"].get_xdata(), [0, 0.5, 1])


def test_depth_transfer_has_the_trained_depth_upward(carried):
    left, right, *_ = merging_figures.depth_transfer(carried, dataset="cities", probe="logistic").axes
    np.testing.assert_allclose(left.images[0].get_array(), [[0, 0.05], [0.5, 0.55]])
    assert left.images[0].origin == "lower" and np.trace(right.images[0].get_array()) == 2
    with pytest.raises(ValueError, match="nothing for dataset='numbers'"):
        merging_figures.depth_transfer(carried, dataset="numbers")


def test_probe_explorer_shows_the_chosen_pair_and_depth(carried):
    explorer = probe_transfer_explorer(carried)
    at, (picture, table) = controls(explorer), explorer.children[2:]
    assert "cities to cities_negated" in table.value and "<td" in table.value and "0.10" in table.value
    before = picture.value
    at["tested on"].value = "cities"
    assert "0.90" in table.value and picture.value != before
    before = picture.value
    at["depth"].value = 4
    assert picture.value != before and table.value.count("+0.30") == 2  # auc and accuracy
    for depth, x in {at["depth"].options[0]: -0.01, at["depth"].options[-1]: 1.01}.items():
        click(picture, x, 0.5)
        assert at["depth"].value == depth


def test_stitching_draws_kl_with_r2_beside():
    kinds = (("mapped", 0.5, 0.9), ("token_identity", 2.0, 0.4), ("own_states", 0.0, 1.0))
    rows = [{"source_depth": 1, "target_depth": j, "condition": name, "metric": "kl", "mean": kl, "low": kl, "high": kl,
             "r2": r2, "n_documents": 6} for j in (2, 3) for name, kl, r2 in kinds]  # fmt: skip
    figure = result("stitching", rows, model_x={"model": "a"}, model_y={"model": "b"}).plot()
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["1 to 2", "1 to 3"]
    assert sorted({float(line.get_xdata()[0]) for line in left.lines}) == [0.0, 0.5, 2.0]
    assert sorted({float(line.get_xdata()[0]) for line in right.lines}) == [0.4, 0.9]
    assert "X = a, Y = b; intervals over 6 test documents" in words(figure)


def test_published_forgetting_are_the_published_numbers():
    (ax,) = merging_figures.published_forgetting(scaling.published()).axes
    lines = {line.get_label(): line.get_xdata() for line in ax.lines}
    assert lines["before tuning"][0] == 44.0 and lines["tuned on EuroSAT"][0] == 37.5
    assert len(lines["tuned, scaled by LiNeS"]) == 7
