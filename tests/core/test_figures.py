"""What all figures share; and that the suite's own eye for figures (conftest) sees what it is there to see."""

import matplotlib
import pytest
from conftest import faults
from matplotlib.figure import Figure

from lab.figures import WIDTH, classroom, legend_below, logarithmic_beyond, page, panels

matplotlib.use("Agg")


def test_panels_fill_the_page() -> None:
    with classroom():
        figure, axes = panels(5, 2, 2, sharex=True)
        axes[0, 0].plot([1, 2], label="a line")
        legend_below(figure, axes[0, 0], 2)
    assert figure.get_size_inches().tolist() == page(5).get_size_inches().tolist() == [WIDTH, 5]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a line"]
    assert axes.shape == (2, 2) and not list(faults(figure))


@pytest.mark.parametrize(
    ("width", "columns", "points", "told"),
    [
        (9.0, 2, 9, []),
        (9.1, 2, 9, ["9.1 inches wide, of at most 9: see lab.figures.panels"]),
        (9.0, 3, 9, ["3 panels side by side, of at most 2"]),
        (9.0, 1, 8, ["'layer' in letters of less than 9 points"]),
    ],
)
def test_what_is_hard_to_read_is_told(width: float, columns: int, points: int, told: list[str]) -> None:
    figure = Figure((width, 4))
    ax = figure.subplots(2, columns, squeeze=False)[0, 0]
    ax.set_xlabel("layer", fontsize=points)
    ax.text(0, 0, "0.5", fontsize=7)  # as in a cell of a heat map
    assert list(faults(figure)) == told


@pytest.mark.parametrize(
    ("ends", "logarithmic", "told"),
    [
        ((-3.9e-5, 0.06), False, None),  # on a logarithmic axis both ends would be its only ticks
        ((-0.4, 0.3), False, None),
        ((-0.05, 6.0), True, ["0", "0.1", "0.2", "0.5", "1", "2", "5"]),
        ((-2.0, 900.0), True, ["-1", "-0.1", "0", "0.1", "1", "10", "100"]),
    ],
)
def test_an_axis_that_is_linear_near_0_has_plain_ticks(ends: tuple, logarithmic: bool, told: list[str] | None) -> None:
    ax = Figure().subplots()
    ax.set_xlim(*ends)
    assert logarithmic_beyond(ax, 0.1) is logarithmic and ax.get_xscale() == ("symlog" if logarithmic else "linear")
    assert ax.get_xlim() == ends
    if told:
        assert [label.get_text() for label in ax.get_xticklabels()] == told
