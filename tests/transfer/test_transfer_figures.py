"""Transfer figures and the explorer, from real runs: what is drawn is what the tables hold."""

import io
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from clicking import click
from matplotlib.image import imread
from test_concept_figures import controls
from test_two_hop_figures import words

from lab import transfer
from lab.results import Result
from lab.transfer import figures, statistics
from lab.transfer.explorer import transfer_explorer

matplotlib.use("Agg")
TINY = {"steps": 4, "gate": 0.0, "progress": False, "resume": False, "splits": 2, "n": [0, 2], "targets": ["A", "B"]}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def digits() -> Result:
    return transfer.run("D", train_per_class=150, **TINY)


@pytest.fixture(scope="module")
def sources() -> Result:
    return transfer.run("S", test_per_class=5, **TINY)


def explorer_of(result: Result):
    return transfer_explorer(
        result,
        compare=lambda a, b: transfer.compare(result, a, b),
        flips=lambda a, b: statistics.flips(result.tables["items"], a, b),
        task_of=lambda split, seed: transfer.task_of(result, split, seed),
    )


def heights(ax) -> list[float]:
    return sorted(float(y) for bar in ax.containers for y in bar.lines[0].get_ydata())


@pytest.mark.parametrize(("metric", "scale"), [("accuracy", 100), ("nll", 1)])
def test_four_curves_are_the_summary(digits, metric, scale):
    figure = digits.plot(metric=metric)
    for ax, curve in zip(figure.axes, figures.FOUR, strict=True):
        rows = digits.summary[(digits.summary.metric == metric) & (digits.summary.curve == curve)]
        np.testing.assert_allclose(heights(ax), sorted(scale * rows.estimate), atol=1e-9)
        low = min(ax.containers[0].lines[2][0].get_segments()[-1][:, 1])
        assert low == pytest.approx(scale * rows.sort_values("n")[rows.part != "embedding"].low.iloc[-1])
    assert "E" in [tick.get_text() for tick in figure.axes[1].get_xticklabels()]


def test_published_curves_say_where_nothing_can_be_paired():
    found = statistics.curves(statistics.published())
    figure = figures.transfer_curves(found, n_star=4.0)
    assert words(figure).count("no two runs") == 1 and "n* = 4" in words(figure)
    assert max(heights(figure.axes[1])) == pytest.approx(8.24, abs=0.01)  # n = 7
    gains = statistics.paired_and_unpaired(statistics.published())
    (ax,) = figures.paired_and_unpaired(gains).axes
    drawn = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2][:2]
    np.testing.assert_allclose(drawn, [[1.67, 0.11], [0.97, 0.94]], atol=0.005)


def test_curves_of_two_tasks_are_the_rows(digits):
    curves = ["over_random_matched", "over_random"]
    figure = figures.over_n_by_task({"one": digits.summary, "two": digits.summary.query("n == 2")}, curves)
    for ax, summary in zip(figure.axes, (digits.summary, digits.summary.query("n == 2")), strict=True):
        rows = summary.query("metric == 'accuracy' and curve in @curves")
        assert len(rows) and heights(ax) == pytest.approx(sorted(100 * rows.estimate), abs=1e-9)
    assert "random ones of matched size" in words(figure)
    with pytest.raises(ValueError, match="choose some of specificity"):
        figures.over_n_by_task({"one": digits.summary}, ["boost"])


def test_levels_are_the_means(digits):
    (ax,) = figures.transfer_levels(digits, treatments=["AnB", "random"]).axes
    rows = digits.tables["levels"].query("metric == 'accuracy' and n == 2 and part == 'blocks'").set_index("treatment")
    for name in ("AnB", "random"):
        line = next(found for found in ax.lines if found.get_label() == figures.LEVELS[name][0])
        assert line.get_ydata()[-1] == pytest.approx(rows.estimate[name])
    with pytest.raises(ValueError, match="choose some of BnB, AnB"):
        figures.transfer_levels(digits, treatments=["CnB"])


def test_without_a_base_that_passed_there_is_no_figure():
    failed = transfer.run("D", train_per_class=150, **{**TINY, "gate": 0.999, "n": [2]})
    with pytest.raises(ValueError, match="no split passed its gate"):
        failed.plot()
    with pytest.raises(ValueError, match="did every base fail"):
        explorer_of(replace(failed, tables={"items": failed.tables["items"].drop(columns="base")}))
    with pytest.raises(ValueError, match="no split passed"):
        transfer.compare(failed, "BnB", "AnB")


def test_explorer_of_digits_shows_the_items_that_flip(digits):
    explorer = explorer_of(digits)
    at, (message, picture, images, table) = controls(explorer), explorer.children[2:]
    assert at["n"].options == ("E", "2") and at["n"].value == "2"
    items = digits.tables["items"].query("split == 0 and target == 'A'")
    lost = int(((items["BnB@2"] == items.label) & (items["AnB@2"] != items.label)).sum())
    assert f"{lost} right in the first only" in message.value
    assert imread(io.BytesIO(images.value), format="png").shape[1] > 900 and table.layout.display == "none"
    before = picture.value, images.value
    at["nets"].value = at["nets"].options[-1][1]
    assert picture.value == before[0] and images.value != before[1], "the curve stays, the items are another net's"
    at["n"].value = "E"
    assert picture.value != before[0] and "BnB@E" in message.value
    y = np.mean(picture.figure.axes[0].get_ylim())
    click(picture, 1.8, y)
    assert at["n"].value == "2"
    click(picture, 0.6, y)
    assert at["n"].value == "E"
    at["minus"].value = "BnB"
    assert "two different treatments" in message.value and picture.layout.display == "none"
    at["minus"].value = "base"
    assert at["n"].options == ("0", "E", "2") and "against <b>base</b>" in message.value
    assert picture.layout.display == ""


def test_explorer_of_sequences_shows_them_as_text(sources):
    explorer = explorer_of(sources)
    *_, images, table = explorer.children
    assert images.layout.display == "none"
    items = sources.tables["items"].query("split == 0 and target == 'A'")
    flips = (items["BnB@2"] == items.label) != (items["AnB@2"] == items.label)
    shown = min(12, int(flips.sum()))
    assert shown > 1 and table.value.count("</tr><tr>") == shown
    task = transfer.task_of(sources, 0, 0)
    said = [" ".join(map(str, task.sides["A"].test.inputs[item])) for item in items[flips].item]
    assert sum(one in table.value for one in said) >= shown


def test_tuned_bodies_stand_left_and_their_specificity_right():
    places = [("BnB", "words", 0.9), ("AnB", "cities", 0.7), ("AnB", "numbers", 0.6), ("untouched", "untouched", 0.8)]
    summary = [{"treatment": treatment, "source": source, "n": n, "accuracy": value + n / 100, "low": value - 0.1,
                "high": value + 0.1} for treatment, source, value in places for n in (2, 4)]  # fmt: skip
    gaps = [{"curve": curve, "source": "cities", "n": n, "difference": value + n / 100, "low": value - 0.1, "high": value + 0.2}
            for curve, value in (("specificity", 0.2), ("over_untouched", -0.1)) for n in (2, 4)]  # fmt: skip
    gate = [{"source": name, "learnt": name != "numbers"} for name in ("words", "cities", "numbers")]
    tables = {"differences": pd.DataFrame(gaps), "sources": pd.DataFrame(gate)}
    about = {"dataset": "words", "sources": ["cities", "numbers"], "n_layers": 4, "model": "m"}
    figure = Result("transfer_tuned", pd.DataFrame(), pd.DataFrame(summary), about, tables).plot()
    left, right = figure.axes
    assert heights(left) == pytest.approx(sorted(row["accuracy"] for row in summary))
    assert heights(right) == pytest.approx([22, 24]), "specificity alone, in points, of the source that was learnt"
    assert "tuned on numbers (AnB), not learnt" in words(figure) and "tuned on cities (AnB), not" not in words(figure)


def test_compare_is_first_minus_second(digits):
    pairs, curve = transfer.compare(digits, "base", "AnB")
    same = digits.summary.query("curve == 'transfer_loss'").reset_index(drop=True)
    np.testing.assert_allclose(curve.estimate, same.estimate)
    assert set(pairs.n) == {0, 2}
    with pytest.raises(ValueError, match="pass two of AnB"):
        transfer.compare(digits, "base", "CnB")


def test_flipped_digits_are_the_test_images(digits):
    task = transfer.task_of(digits, 1, 0)
    items = digits.tables["items"].query("split == 1 and target == 'B'").head(2)
    figure = figures.flipped_digits(task.sides["B"], items, ["BnB@2", "AnB@2"])
    image = figure.axes[1].images[0].get_array()
    patches = task.sides["B"].test.inputs[items.item.iloc[1]]
    np.testing.assert_array_equal(image[2:4, 4:6].ravel(), patches[6])  # patch 6 stands in row 1, column 2
    assert figure.axes[0].get_title().startswith(f"is {task.sides['B'].classes[items.label.iloc[0]]}")
