"""Applications as an audience sees them: Voila's page in a browser, each control moved, each picture clicked."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from driving import choose, click_at, pixels, play_with_watch, readout, redrawn, slide, write

slow = pytest.mark.slow


@pytest.fixture
def opened(page: Any, served: Callable[..., str], port: int) -> Callable[[str], Any]:
    """Serve an application, open its page, and wait until it shows its picture."""

    def open_page(name: str) -> Any:
        address = served(f"http://127.0.0.1:{port}/", "lab", "app", name, "--no-browser", "--port", str(port))
        page.goto(address, wait_until="commit")
        page.locator(".jupyter-widgets img").first.wait_for()
        assert page.locator("h1").inner_text() and "import lab" not in page.inner_text("body")
        assert not page.locator("[data-mime-type*=error], [data-mime-type*=stderr]").count()
        for size, of in ((16, ".widget-label"), (18, "p"), (30, "h1")):
            assert page.locator(of).first.evaluate("e => parseFloat(getComputedStyle(e).fontSize)") >= size, of
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 1280, "wider than the window"
        return page

    return open_page


def test_watch(opened: Callable[[str], Any]) -> None:
    play_with_watch(opened("watch").locator("body"))


@slow
def test_transfer(opened: Callable[[str], Any]) -> None:
    page = opened("transfer")
    root = page.locator("body")
    picture = page.locator("img")
    assert readout(root, "n") == 3
    with redrawn(picture):
        click_at(picture, 0.82, 0.12)
    assert readout(root, "n") == 5
    with redrawn(picture):
        assert slide(root, "n", "ArrowLeft") == "4"
    with redrawn(picture):
        picture.focus()
        page.keyboard.press("ArrowLeft")
    assert readout(root, "n") == 3
    page.get_by_role("button", name="5", exact=True).click()
    page.get_by_role("button", name="Train").click()
    page.get_by_text("choose five digits for B").wait_for()
    page.get_by_role("button", name="0", exact=True).click()
    with redrawn(picture):
        page.get_by_role("button", name="Train").click()
    assert page.get_by_text("BnB - AnB").count() == 1


@slow
def test_layers(opened: Callable[[str], Any]) -> None:
    page = opened("layers")
    root = page.locator("body")
    picture, said = page.locator("img"), page.locator(".widget-html-content").filter(has_text="layers off")
    assert "0 of 30" in said.inner_text()
    with redrawn(picture):
        click_at(picture, 0.64, 0.1)
    assert "1 of 30" in said.inner_text()
    image = pixels(picture)
    y = int(0.1 * image.shape[0])
    pale = np.abs(image[y, int(0.62 * image.shape[1]) : int(0.66 * image.shape[1])] - 0.933).max(-1) < 0.02
    assert pale.any(), "the layer that was clicked is pale"
    with redrawn(picture):
        click_at(picture, 0.64, 0.1)
    assert "0 of 30" in said.inner_text()
    with redrawn(picture):
        page.get_by_role("button", name="25", exact=True).click()
    assert "1 of 30 layers off. “Madrid” has" in said.inner_text()
    with redrawn(picture):
        choose(root, "run twice", "12")
    choose(root, "swap", "3")
    with redrawn(picture):
        choose(root, "with", "20")
    with redrawn(picture):
        page.get_by_role("button", name="All layers on").click()
    assert "0 of 30" in said.inner_text()
    with redrawn(picture):
        page.get_by_role("button", name="11", exact=True).click()
    assert "not on top" in said.inner_text()
    with redrawn(picture):
        page.get_by_label("spare the first token").check()
    assert "is on top" in said.inner_text()
    with redrawn(picture):
        write(root, "prompt", "The capital of the country of France is")
    with redrawn(picture):
        write(root, "keep", "Paris")
    assert "“Paris” has" in said.inner_text()


@slow
def test_spend(opened: Callable[[str], Any]) -> None:
    page = opened("spend")
    root = page.locator("body")
    picture, said = page.locator("img"), page.locator(".widget-html-content").filter(has_text="bits for each weight")
    assert "3.50 bits" in said.inner_text() and "not known yet" in said.inner_text()
    with redrawn(picture):
        choose(root, "rule", "lower the last blocks")
    with redrawn(picture):
        assert slide(root, "budget", "ArrowLeft") == "3.90"
    assert "3.90 bits" in said.inner_text()
    with redrawn(picture):
        click_at(picture, 0.3, 0.1)
    assert page.locator("select").first.evaluate("e => e.selectedOptions[0].text.trim()").split() == ["by", "hand"]
    with redrawn(picture):
        choose(root, "block", "11")
        choose(root, "gets", "left out")
    with redrawn(picture):
        choose(root, "rule", "programme")
    assert "not known yet" not in said.inner_text()
    write(root, "prompt", "The capital of France is")  # other words, the same picture
    said.filter(has_text="The capital of France is").wait_for()


@slow
def test_read(opened: Callable[[str], Any]) -> None:
    page = opened("read")
    root = page.locator("body")
    picture, table = page.locator("img"), page.locator("table")
    chosen = []
    for across in (0.9, 0.25):
        listed = table.inner_text()
        with redrawn(picture):
            click_at(picture, across, 0.5)
        chosen.append(readout(root, "depth"))
        assert table.inner_text() != listed
    assert chosen[0] > 23 and chosen[1] < 8
    with redrawn(picture):
        page.keyboard.press("ArrowRight")
    with redrawn(picture):
        assert slide(root, "depth", "ArrowRight") == str(chosen[1] + 2)
    with redrawn(picture):
        choose(root, "show", "probability")
    page.locator("select").nth(2).select_option(label="sure and right")
    page.wait_for_function("before => document.querySelector('table').innerText !== before", arg=listed)
    with redrawn(picture):
        choose(root, "look at", 1)
    write(root, "statements", "The city of Rome is in Italy.\nThe city of Rome is in Japan.", key="Tab")
    with redrawn(picture):
        page.get_by_role("button", name="Read").click()
    write(root, "statements", "One is here.\n" * 5, key="Tab")
    page.get_by_role("button", name="Read").click()
    page.get_by_text("you gave 5 statements; the picture holds 1 to 4").wait_for()
    with redrawn(picture):
        choose(root, "probe for", "a word's feeling")


@slow
def test_patch(opened: Callable[[str], Any]) -> None:
    page = opened("patch")
    root = page.locator("body")
    picture, said = page.locator("img"), page.get_by_text("as the next word (1 = it is said)")
    assert "“Rome” has rank 1 " in said.inner_text()
    with redrawn(picture):
        click_at(picture, 0.3, 0.3)
    pair = readout(root, "taken after layer"), readout(root, "put after layer")
    assert pair[0] > pair[1]
    with redrawn(picture):
        picture.focus()
        page.keyboard.press("ArrowUp")
    assert readout(root, "taken after layer") == pair[0] + 1
    with redrawn(picture):
        click_at(picture, 0.65, 0.75)  # grey
    page.get_by_text("a back-patch goes back. Choose another pair").wait_for()
    with redrawn(picture):
        assert int(slide(root, "put after layer", "Home")) == 0
    with redrawn(picture):
        slide(root, "taken after layer", "End")
    with redrawn(picture):
        page.get_by_label("t2: the last word").check()
    with redrawn(picture):
        choose(root, "state of", "Wangari Maathai")
    page.get_by_role("button", name="Try a random vector").click()
    page.locator("table tr").last.get_by_text("not tried").wait_for(state="detached")
    choose(root, "query", "a query of your own")
    page.get_by_text("Type a text, the words in it where t1 ends, and the answer").wait_for()
    for name, text in {"text": "The capital of Italy is", "t1 ends": "Italy", "answer": "Rome"}.items():
        write(root, name, text, key="Tab")
    choose(root, "state of", "this query itself")
    page.get_by_role("button", name="Show").click()
    page.locator("table").get_by_text("Italy").wait_for()
