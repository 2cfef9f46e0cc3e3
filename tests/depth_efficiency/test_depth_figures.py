"""Depth-efficiency figures and the explorer, from real results on a small model: what is drawn is what the tables hold."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from clicking import click
from test_concept_figures import controls
from test_depth_efficiency import SMALL, TEXTS
from test_two_hop_figures import words

from lab import depth_efficiency
from lab.depth_efficiency import attributions, figures, integrator
from lab.depth_efficiency.explorer import depth_explorer
from lab.depth_efficiency.linear_maps import linear_maps
from lab.models import random_twin

matplotlib.use("Agg")
TEXT = "The lamp was out; he sang"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def result(tiny_model):
    return depth_efficiency.run(tiny_model("llama"), TEXTS, resume=False, kinds=["layer"], local=False, **SMALL)


def line(ax, label):
    return next(found for found in ax.get_lines() if found.get_label() == label)


def test_profile_is_the_mean_of_the_table(result):
    figure = result.plot(measure="effect", share=False)
    for ax, scope in zip(figure.axes, figures.SCOPES, strict=True):
        for weights, name in (("trained", figures.LINES["skip"][0]), ("random", figures.NULL[0])):
            rows = result.table.query(
                f"weights == '{weights}' and treatment == 'skip' and scope == '{scope}' and mode == 'global'"
            )
            np.testing.assert_allclose(line(ax, name).get_ydata(), rows.groupby("skipped_layer").effect.mean())
    shares = line(result.plot().axes[0], figures.LINES["skip"][0]).get_ydata()
    assert np.isclose(shares.sum(), 1)
    assert "later tokens only" in words(figure) and "3 prompts" in words(figure)
    with pytest.raises(ValueError, match="measure='loss': choose one of output, effect"):
        result.plot(measure="loss")


def test_matrix_contributions_lens_and_depths(result):
    figure = figures.effect_matrix(result)
    grid = np.ma.filled(figure.axes[0].get_images()[0].get_array(), np.nan)
    rows = result.tables["pairs"].query("weights == 'trained' and treatment == 'skip' and scope == 'all'")
    wanted = rows.groupby(["skipped_layer", "layer"])["mean"].mean()
    assert np.isclose(grid[0, 2], wanted[0, 2]) and np.isnan(grid[2, 1]) and np.isnan(grid[1, 1])
    assert "random weights (null),\nlater tokens only" in words(figure)
    figure = figures.contributions(result)
    here = result.tables["contributions"].query("weights == 'trained' and quantity == 'mlp_cosine' and not position_0")
    np.testing.assert_allclose(line(figure.axes[1], "MLP").get_ydata(), here.groupby("layer").value.mean())
    assert "without position 0" in words(figure)
    figure = figures.lens_by_depth(result)
    here = result.tables["lens"].query("weights == 'trained' and not position_0")
    np.testing.assert_allclose(line(figure.axes[0], "trained").get_ydata(), here.groupby("depth").kl.mean())
    figure = figures.effective_depths(result)
    drawn = {round(float(x), 6) for found in figure.axes[0].get_lines() for x in found.get_xdata()}
    rows = result.summary.query("treatment == 'skip' and statistic == 'ED_50' and scope == 'future'")
    assert {round(x, 6) for x in rows.estimate} <= drawn
    assert "ED_cos (cosine turns positive)" in words(figure)


def test_scores_positions_and_layers_off(tiny_model):
    model = tiny_model("llama")
    data = pd.DataFrame([
        {"group": f"g{i}", "level": k, "prompt": f"Word {i}" + " of it" * k + " is", "answer": " x"}
        for k in (1, 2) for i in range(4)
    ])  # fmt: skip
    result = depth_efficiency.depth_scores(model, data, n_per_level=4, progress=False)
    assert "layers per level" in words(result.plot()) and "insensitive" not in words(result.plot())
    assert words(result.plot(insensitive=["output"])).count("insensitive: no rise in the control") == 1
    table = attributions.erasure(model, "Ana saw the", " sea", background=list(TEXTS.text))
    figure = figures.positions_by_depth(table, value="change", index="depth")
    strip, image = (ax.get_images()[0] for ax in figure.axes[:2])
    assert np.isclose(image.get_array()[2, 1], table.query("position == 3 and depth == 1").change.iloc[0])
    assert np.allclose(strip.get_array()[0], table.query("position == 0").change) and "position 0" in words(figure)
    assert image.get_clim() == strip.get_clim() and image.get_clim()[1] <= table.query("position > 0").change.max()
    loud = table.assign(change=table.change.where(table.position > 0, 99.0))
    figure = figures.positions_by_depth(loud, value="change", index="depth")
    assert figure.axes[1].get_images()[0].get_clim() == image.get_clim(), "position 0 has no say in the scale"
    found = depth_efficiency.without(model, TEXT, [1, 2])
    figure = figures.layers_off(found)
    np.testing.assert_allclose(line(figure.axes[2], "layers off").get_ydata(), found["loss"]["without"])
    assert line(figure.axes[1], "off").get_xdata().tolist() == [1, 2]
    assert np.allclose(found["later"].change[:1], 0) and np.allclose(found["later"].change[1:3], 1)
    assert found["later"].change[3] > 1e-3
    nothing = depth_efficiency.without(model, TEXT, [])
    assert np.allclose(nothing["loss"].whole, nothing["loss"]["without"]) and not nothing["later"].change.any()
    with pytest.raises(ValueError, match=r"layers=\[4\]: give numbers from 0 to 3, none twice"):
        depth_efficiency.without(model, TEXT, [4])
    with pytest.raises(ValueError, match="one token"):
        depth_efficiency.without(model, "T", [1])


def test_integrator_and_maps(tiny_model):
    model = tiny_model("llama")
    result = integrator.run(model, TEXTS, n_texts=3, n_tokens=20, n_step_texts=1, substeps=16, progress=False,
                            null=random_twin(model))  # fmt: skip
    figure = result.plot()
    for weights, label in (("trained", "1 substep"), ("random", "1 substep, random weights")):
        error = result.tables["steps"].query(f"n == 1 and weights == '{weights}'").groupby("layer").error.mean()
        np.testing.assert_allclose(line(figure.axes[0], label).get_ydata(), error)
    assert "exchanged far" in words(figure)
    texts = [f"{text} And {word} came by." for text in TEXTS.text for word in ("Ana", "Bo", "Cid", "Dee", "Eve", "Flo")]
    maps = linear_maps(model, model, texts, progress=False)
    figure = maps.plot()
    grid = figure.axes[0].get_images()[0].get_array()
    row = maps.table.query("source_depth == 1 and target_depth == 3").iloc[0]
    assert np.isclose(grid[1, 3], row.r2)
    some = (
        linear_maps(model, model, texts, source_depths=[0, 2, 4], target_depths=[2, 4], progress=False).plot().axes[0]
    )
    assert [label.get_text() for label in some.get_yticklabels()] == ["0", "2", "4"]
    assert some.get_lines()[0].get_ydata().tolist() == [1, 2], "the best source of a depth is that depth itself"


def test_explorer_switches_layers(tiny_model):
    model, asked = tiny_model("llama"), []

    def compute(text, layers):
        asked.append((text, layers))
        return depth_efficiency.without(model, text, layers)

    explorer = depth_explorer(compute, n_layers=4, texts=[TEXT, "Rain fell"], off=[2])
    at, picture, message = controls(explorer), explorer.children[-1], explorer.children[3]
    assert asked == [(TEXT, [2])] and bytes(picture.value).startswith(b"\x89PNG")
    assert message.value.startswith("off: 2 (1 of 4). Mean loss ")
    drawn = bytes(picture.value)
    at["1"].value = False
    assert asked[1:] == [(TEXT, [1, 2])] and bytes(picture.value) != drawn
    at["1"].value = True
    assert len(asked) == 2 and bytes(picture.value) == drawn, "remembered"
    for layer, x in {0: 0.2, 3: 3.1}.items():
        click(picture, x, 0.1)
        assert not at[str(layer)].value and asked.pop()[1] == sorted({2, layer})
        at[str(layer)].value = True
    at["or"].value = "first half off"
    assert len(asked) == 3 and asked[2] == (TEXT, [0, 1])
    at["text"].value = "T"
    assert message.value.startswith("<b>ValueError</b>: the text has one token")
    with pytest.raises(ValueError, match="at least one text"):
        depth_explorer(compute, n_layers=4, texts=[])
    with pytest.raises(ValueError, match=r"off=\[9\]: give layers from 0 to 3"):
        depth_explorer(compute, n_layers=4, texts=["a b"], off=[9])
