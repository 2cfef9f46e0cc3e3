"""Pictures that are clicked: what is seen at a pixel is what a click there chooses."""

import io
import subprocess
import sys

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
import pytest
from clicking import click, press
from matplotlib.figure import Figure

from lab.explorers import ClickablePicture, nearest
from lab.figures import classroom

ROWS, COLUMNS = 5, 7


def board(*, equal: bool) -> Figure:
    """Cells of colours of their own, beside a colour bar, under a title, with a legend."""
    with classroom():
        figure, ax = plt.subplots(figsize=(6, 4.4), layout="constrained")
        mesh = ax.pcolormesh(np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS), cmap="viridis")
        ax.set(title="a title", xlabel="across", ylabel="up", aspect="equal" if equal else "auto")
        figure.colorbar(mesh, label="number")
        figure.legend([plt.Line2D([], [])], ["a legend"], loc="outside lower center")
    return figure


@pytest.mark.parametrize("equal", [False, True])
def test_a_click_chooses_what_is_seen_there(equal: bool) -> None:
    chosen: list[tuple[float, float]] = []
    picture = ClickablePicture(700, "cells", "click one", lambda x, y: chosen.append((x, y)))
    figure = board(equal=equal)
    colors = figure.axes[0].collections[0].cmap(np.arange(ROWS * COLUMNS) / (ROWS * COLUMNS - 1))
    picture.show(figure)
    image = plt.imread(io.BytesIO(picture.value), format="png")
    bar = int(0.8 * image.shape[1])  # what is right of this is the colour bar, with the same colours
    for place, color in enumerate(colors):
        rows, columns = np.nonzero(np.abs(image[:, :bar] - color).max(-1) < 0.004)
        assert len(rows) > 200
        for at in (len(rows) // 2, 0, -1):  # its middle, and its first and last pixel
            picture.click((columns[at] + 0.5) / image.shape[1], (rows[at] + 0.5) / image.shape[0])
            x, y = chosen.pop()
            assert (int(y), int(x)) == divmod(place, COLUMNS)
    assert not plt.get_fignums()


def test_a_click_beside_the_axes_chooses_nothing() -> None:
    chosen: list[tuple[float, float]] = []
    picture = ClickablePicture(700, "cells", "click one", lambda x, y: chosen.append((x, y)), lambda: (2, 3))
    picture.click(0.5, 0.5)
    press(picture, 1, 0)  # nothing is shown yet
    picture.show(board(equal=False))
    for x, y in ((0.01, 0.5), (0.5, 0.01), (0.97, 0.5), (0.5, 0.99)):
        picture.click(x, y)
    assert chosen == []
    for x, y in ((0.001, 0.001), (COLUMNS - 0.001, ROWS - 0.001)):
        click(picture, x, y)
        assert chosen.pop() == pytest.approx((x, y), abs=1e-9)
    press(picture, -1, 0)
    press(picture, 0, 1)
    assert chosen == [(1, 3), (2, 4)]
    picture.show(None)
    press(picture, 1, 0)
    picture.click(0.5, 0.5)
    assert picture.value == b"" and len(chosen) == 2


def test_the_nearest_option() -> None:
    control = ipw.SelectionSlider(options=[0, 4, 8])
    nearest(control, 5.9)
    assert control.value == 4
    nearest(control, 99.0)
    assert control.value == 8
    named = ipw.Dropdown(options=["0", "E", "1"])
    nearest(named, 0.6, lambda one: 0.5 if one == "E" else int(one))
    assert named.value == "E"


def test_without_anywidget_the_picture_is_a_still_one() -> None:
    code = """
import sys
sys.modules["anywidget"] = None
import matplotlib.pyplot as plt
from lab.explorers import ClickablePicture
picture = ClickablePicture(700, "a line", "click it", print)
figure, ax = plt.subplots()
picture.show(figure)
assert picture.value.startswith(b"\\x89PNG"), picture.value[:9]
print(picture._model_name, picture.format, picture.layout.max_width)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["ImageModel", "png", "700px"], done.stderr
