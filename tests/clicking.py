"""Clicks in pictures, for the tests of explorers."""

from lab.explorers import ClickablePicture


def click(picture: ClickablePicture, x: float, y: float) -> None:
    """What the front end tells of a click at a place of the picture's axes."""
    figure = picture.figure
    pixel = figure.axes[picture.axes].transData.transform((x, y))
    across, up = figure.transFigure.inverted().transform(pixel)
    assert 0 < across < 1 and 0 < up < 1
    picture._handle_custom_msg({"click": [float(across), float(1 - up)]}, [])


def press(picture: ClickablePicture, right: int, up: int) -> None:
    """What the front end tells of an arrow key."""
    picture._handle_custom_msg({"step": [right, up]}, [])
