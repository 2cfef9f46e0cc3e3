"""Real pages in headless Chromium: JupyterLab and applications, each page with what it asked for and what went wrong on it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-default-apps"]  # fmt: skip
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
PATIENCE = 300  # seconds, of which some 30 are needed where nothing else runs


def lacking(what: str) -> None:
    """Skip for want of something; where LAB_BROWSER is "required" that is a failure."""
    (pytest.fail if os.environ.get("LAB_BROWSER") == "required" else pytest.skip)(f"no {what}: browser tests need it")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        lacking("Chromium (the system's package chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("playwright (python -m pip install playwright)")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, served: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """An empty page of a fresh profile. At the end of a test nothing may have been asked of another machine, and no script
    may have failed; when a test fails, the page's picture is kept."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page, asked, wrong = context.new_page(), [], []
    page.set_default_timeout(1000 * PATIENCE)
    page.on("request", lambda one: asked.append(one.url))
    page.on("websocket", lambda one: asked.append(one.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda one: wrong.append(f"{one.text} {one.location}") if one.type == "error" else None)
    yield page
    failed = getattr(request.node, "failed", True)
    if failed:
        kept = Path(request.config.cache.mkdir("browser")) / f"{request.node.name}.png"
        page.screenshot(path=kept, full_page=True)
        print(f"The page as it was: {kept}", *wrong, sep="\n")
    context.close()
    elsewhere = {
        url for url in asked if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname not in LOOPBACK
    }
    assert asked and not elsewhere
    assert failed or not wrong


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.when == "call":
        item.failed = report.failed  # type: ignore[attr-defined]
    return report


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`served(address, *command, **environment)`: start a server of this Python, wait for its address, give the address."""
    started: list[subprocess.Popen] = []

    def start(address: str, *command: str, **environment: str) -> str:
        around = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | {"TMPDIR": str(tmp_path)}
        with open(tmp_path / "server.log", "w") as log:
            started.append(subprocess.Popen(
                [sys.executable, "-m", *command], cwd=tmp_path, env=around | environment, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True))  # fmt: skip
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and started[-1].poll() is None:
            with socket.socket() as test:
                if not test.connect_ex(("127.0.0.1", urlsplit(address).port)):
                    return address
            time.sleep(0.2)
        raise AssertionError((tmp_path / "server.log").read_text()[-2000:])

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGTERM)  # `lab open` and the JupyterLab that it started
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


@pytest.fixture
def port() -> int:
    with socket.socket() as test:
        test.bind(("127.0.0.1", 0))
        return test.getsockname()[1]
