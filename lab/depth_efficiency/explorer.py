"""Explorer for notebooks: tables in, controls and pictures out."""

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw

from lab.depth_efficiency import figures
from lab.explorers import ClickablePicture, ask


def depth_explorer(
    compute: Callable[[str, list[int]], Any], *, n_layers: int, texts: Sequence[str], off: Sequence[int] = ()
) -> ipw.VBox:
    """Click layers off, several at once, and watch the next token, the loss of each token and the layers after them.

    Args:
        compute: `compute(text, layers) -> tables` (`lab.depth_efficiency.without`), asked at each change.
        texts: to offer; the reader may type another.
        off: layers that are off at the beginning.
    """
    if not texts:
        raise ValueError("depth_explorer needs at least one text to offer")
    if any(not 0 <= layer < n_layers for layer in off):
        raise ValueError(f"off={list(off)}: give layers from 0 to {n_layers - 1}")
    wide = {"style": {"description_width": "60px"}, "layout": ipw.Layout(width="900px")}
    text = ipw.Combobox(value=texts[0], options=list(texts), description="text", continuous_update=False, **wide)
    buttons = [
        ipw.ToggleButton(value=layer not in off, description=str(layer), tooltip=f"layer {layer}: on or off",
                         layout=ipw.Layout(width="52px"))
        for layer in range(n_layers)
    ]  # fmt: skip
    half = n_layers // 2
    presets: dict[str, Callable[[int], bool]] = {
        "all on": lambda layer: True,
        "first half off": lambda layer: layer >= half,
        "second half off": lambda layer: layer < half,
        "every second layer off": lambda layer: layer % 2 == 0,
        "last quarter off": lambda layer: layer < n_layers - n_layers // 4,
    }
    preset = ipw.Dropdown(options=["choose ...", *presets], description="or", style={"description_width": "30px"},
                          layout=ipw.Layout(width="260px"))  # fmt: skip
    message, log = ipw.HTML(), ipw.Output()

    def switch(x: float, _: float) -> None:
        button = buttons[min(max(round(x), 0), n_layers - 1)]
        button.value = not button.value

    alt, hint = "The next token, the loss of each token, and later layers", "click a layer at the right to switch it"
    picture = ClickablePicture(1250, alt, hint, switch, axes=2)
    known: dict[tuple[str, tuple[int, ...]], Any] = {}
    moving = False  # the explorer itself is switching layers

    def draw(_: Any = None) -> None:
        if moving:
            return
        layers = tuple(layer for layer, button in enumerate(buttons) if not button.value)
        for button in buttons:
            button.button_style = "info" if button.value else ""
        key = (text.value, layers)
        if key not in known:
            found, wrong = ask(log, compute, text.value, list(layers))
            if wrong:
                message.value = wrong
                return
            known[key] = found
        loss = known[key]["loss"]
        message.value = (
            f"off: {', '.join(map(str, layers)) or 'none'} ({len(layers)} of {n_layers}). Mean loss "
            f"{loss.whole.mean():.2f} nats with all layers, {loss['without'].mean():.2f} without these."
        )
        picture.show(figures.layers_off(known[key]))

    def choose(_: Any) -> None:
        nonlocal moving
        if preset.value in presets:
            moving = True
            for layer, button in enumerate(buttons):
                button.value = presets[preset.value](layer)
            moving = False
            draw()

    for control in (text, *buttons):
        control.observe(draw, "value")
    preset.observe(choose, "value")
    draw()
    row = ipw.Layout(flex_flow="row wrap", width="940px")
    return ipw.VBox([text, ipw.Box(buttons, layout=row), preset, message, log, picture])
