"""Figures and the explorer, drawn from a real result: what stands on them is what stands in the tables."""

from collections.abc import Callable

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from clicking import click
from test_concept_depth import letters, run
from transformer_lens.model_bridge import TransformerBridge

import lab
from lab import concept_depth
from lab.concept_depth.explorer import concept_explorer

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def result(tiny_model: Callable[[str], TransformerBridge]) -> lab.Result:
    return run(tiny_model("llama"), letters())


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_curve_on_the_figure_is_the_curve_in_the_summary(result):
    lines = {line.get_label(): line for line in result.plot().axes[0].get_lines()}
    rows = result.summary.query(
        "weights == 'trained' and site == 'resid' and labels == 'task' and metric == 'accuracy'"
    ).sort_values("depth")
    assert np.allclose(lines["residual stream"].get_ydata(), rows["mean"])
    assert np.allclose(lines["residual stream"].get_xdata(), rows.relative_depth)
    assert "majority (0.50)" in lines
    with pytest.raises(ValueError, match="metric='acuracy': choose one of accuracy, f1, auc"):
        result.plot(metric="acuracy")


def test_curves_of_several_results_and_their_difference(result, tiny_model):
    noisy = run(tiny_model("llama"), letters(), null=False, noise=True)
    figure = lab.concept_depth.figures.concept_curves([result, noisy], by="noise")
    assert {"as it stands", "letters glued in front"} <= set(figure.axes[0].get_legend_handles_labels()[1])
    figure = lab.concept_depth.figures.difference(concept_depth.compare(noisy, result), a="noisy", b="clean")
    assert figure.axes[0].get_legend_handles_labels()[1][-1] == "noisy minus clean"
    panels = lab.concept_depth.figures.published_curves(lab.datasets.published_curves()).axes
    assert sum(len(ax.get_lines()) > 1 for ax in panels) == lab.datasets.published_curves().dataset.nunique()


def test_drawing_leaves_no_setting_behind(result):
    before = dict(plt.rcParams)
    result.plot()
    assert dict(plt.rcParams) == before


def controls(explorer) -> dict:
    """Every control of an explorer by its description."""
    found, todo = {}, [explorer]
    while todo:
        widget = todo.pop()
        todo.extend(getattr(widget, "children", ()))
        if getattr(widget, "description", ""):
            found[widget.description] = widget
    return found


def test_explorer_shows_statements_of_the_chosen_depth_and_computes_on_demand(result, tiny_model):
    asked = []

    def compute(data_set, model, noise, bits):
        asked.append((data_set, model, noise, bits))
        return run(tiny_model("llama"), letters(), null=False, noise=noise, bits=bits, group_size=16)

    explorer = concept_explorer([result], data_sets=["cities"], compute=compute)
    picture, table = explorer.children[-2:]
    at = controls(explorer)
    first, drawn = table.value, bytes(picture.value)
    assert drawn.startswith(b"\x89PNG")
    assert any(text in first for text in letters().text)
    at["depth"].value = 0
    assert table.value != first and bytes(picture.value) != drawn and "Depth 0" in table.value
    for depth, x in {4: 1.01, 3: 0.7, 0: -0.01}.items():
        click(picture, x, 0.5)
        assert at["depth"].value == depth and f"Depth {depth}" in table.value
    drawn = bytes(picture.value)
    at["metric"].value = "auc"
    assert bytes(picture.value) != drawn and asked == []
    at["letters glued in front (noise)"].value = True
    assert "Not computed yet" in explorer.children[1].value and asked == []
    at["Compute this one"].click()
    assert asked == [("your data", result.parameters["model"], True, None)]
    assert explorer.children[1].value == ""
    with pytest.raises(ValueError, match="needs at least one result"):
        concept_explorer([])


def test_explorer_tells_two_tables_of_one_name_apart(result, tiny_model):
    """Two own tables are both "your data", and so is one table under another seed: each must be there to choose."""
    turned = letters().assign(text=lambda frame: frame.text.str[::-1])
    options = {"null": False, "control": False, "repeats": 2, "sites": ("resid",)}
    other = run(tiny_model("llama"), turned, noise=True, **options)
    seeded = run(tiny_model("llama"), letters(), **{**options, "seed": 5})
    explorer = concept_explorer([result, other, seeded, result])
    at, table = controls(explorer), explorer.children[-1]
    assert at["data set"].options == ("your data", "your data, 2", "your data, 3")
    assert any(text in table.value for text in letters().text)
    at["letters glued in front (noise)"].value = True
    assert "Not computed yet" in explorer.children[1].value  # the noise of the other table is not this one's
    at["data set"].value = "your data, 2"
    assert any(text in table.value for text in turned.text) and explorer.children[1].value == ""
    at["letters glued in front (noise)"].value = False
    at["data set"].value = "your data, 3"
    assert explorer.children[1].value == "" and at["depth"].options == tuple(range(5))


@pytest.mark.parametrize("sites", [("mlp_in",), ("attn_out", "mlp_out")])
def test_explorer_and_figure_of_a_result_without_the_residual_stream(tiny_model, sites):
    found = run(tiny_model("llama"), letters(), null=False, sites=sites)
    lines = {line.get_label(): line for line in found.plot().axes[0].get_lines()}
    for site in sites:
        rows = found.summary.query("site == @site and labels == 'task' and metric == 'accuracy'").sort_values("depth")
        assert np.allclose(lines[lab.concept_depth.figures.SITES.get(site, site)].get_ydata(), rows["mean"])
    explorer = concept_explorer([found])
    picture, table = explorer.children[-2:]
    depth = controls(explorer)["depth"]
    assert list(depth.options) == [1, 2, 3, 4] and bytes(picture.value).startswith(b"\x89PNG")
    depth.value = 4
    assert f"Depth 4, {sites[0]}: " in table.value
    rows = found.tables["examples"].query("site == @sites[0] and depth == 4")
    assert f"{((rows.decision > 0) == (rows.label == 1)).mean():.0%} of {len(rows)} statements" in table.value
