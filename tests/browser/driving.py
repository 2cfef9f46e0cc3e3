"""What a hand does to an explorer on a page, and what the eye then sees. A root is the part of the page that holds it."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from lab.figures import RED


@contextmanager
def redrawn(picture: Any) -> Iterator[None]:
    """What happens inside leads to another picture."""
    before = picture.get_attribute("src")
    yield
    picture.page.wait_for_function(
        "([one, before]) => one.src !== before && one.complete && one.naturalWidth > 300",
        arg=[picture.element_handle(), before],
    )


def click_at(picture: Any, across: float, down: float) -> None:
    """Click at shares of a picture's width and height."""
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    picture.click(position={"x": across * box["width"], "y": down * box["height"]})


def pixels(picture: Any) -> np.ndarray:
    """The picture as it stands on the page: [down, across, colour]."""
    return plt.imread(io.BytesIO(picture.screenshot()), format="png")[..., :3]


def frame(picture: Any) -> tuple[float, float]:
    """Where the red frame is, in shares of width and height."""
    image = pixels(picture)
    down, across = np.nonzero(np.abs(image - to_rgb(RED)).max(-1) < 0.15)
    assert len(down) > 20, "there is no red frame"
    return float(across.mean() / image.shape[1]), float(down.mean() / image.shape[0])


def slide(root: Any, name: str, key: str) -> str:
    """Move the slider of this description by a key; what it then says."""
    slider = root.locator(".widget-hslider").filter(has=root.page.get_by_text(name, exact=True))
    slider.locator("[role=slider]").focus()
    root.page.keyboard.press(key)
    return slider.locator(".widget-readout").inner_text()


def readout(root: Any, name: str) -> int:
    """What the slider of this description says."""
    slider = root.locator(".widget-hslider").filter(has=root.page.get_by_text(name, exact=True))
    return int(slider.locator(".widget-readout").inner_text())


def choose(root: Any, name: str, option: str | int) -> None:
    """Choose an option of the list of this description, by its words or its place."""
    menu = root.locator(".widget-dropdown").filter(has=root.page.get_by_text(name, exact=True)).locator("select")
    menu.select_option(**({"index": option} if isinstance(option, int) else {"label": option}))


def write(root: Any, name: str, text: str, key: str = "Enter") -> None:
    """Type a text into the field of this description."""
    field = root.locator(".widget-text, .widget-textarea").filter(has=root.page.get_by_text(name, exact=True))
    field.locator("input, textarea").fill(text)
    root.page.keyboard.press(key)


def play_with_watch(root: Any) -> None:
    """The explorer of lesson 0: each control, and clicks in the map."""
    said = root.page.get_by_text("blocks passed, the lens reads")
    picture = root.get_by_alt_text("The likeliest next word at each depth and token")
    assert "After “He poured himself a glass of”, 30 blocks passed" in said.inner_text()
    for at in ((0.8, 0.2), (0.15, 0.9)):
        with redrawn(picture):
            click_at(picture, *at)
        across, down = frame(picture)
        assert abs(across - at[0]) < 0.08 and abs(down - at[1]) < 0.02, "the frame is where the click was"
    assert "After “He”" in said.inner_text()
    depth = readout(root, "depth")
    with redrawn(picture):
        root.page.keyboard.press("ArrowUp")  # the picture has the focus
    with redrawn(picture):
        root.page.keyboard.press("ArrowRight")
    assert readout(root, "depth") == depth + 1 and f"After “He poured”, {depth + 1} blocks passed" in said.inner_text()
    with redrawn(picture):
        assert slide(root, "depth", "ArrowLeft") == str(depth)
    with redrawn(picture):
        choose(root, "token", "3: a")
    assert f"After “He poured himself a”, {depth} blocks passed" in said.inner_text()
    with redrawn(picture):
        root.get_by_label("whole words only").uncheck()
    with redrawn(picture):
        write(root, "sentence", "The sun is")
    assert "After “The sun is”" in said.inner_text()
    write(root, "sentence", "a " * 20)
    root.page.get_by_text("the map is legible up to 16. Shorten it.").wait_for()
