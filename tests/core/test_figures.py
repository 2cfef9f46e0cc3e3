"""What all figures share; and that the suite's own eye for figures (conftest) sees what it is there to see."""

import matplotlib
import pytest
from conftest import faults
from matplotlib.figure import Figure

from lab.figures import WIDTH, classroom, legend_below, page, panels

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
