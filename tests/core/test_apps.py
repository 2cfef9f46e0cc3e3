"""`python -m lab app`: what is listed, what is refused, and what a page is made of. The pages themselves: tests/browser."""

import ast
import importlib
import re
import socket
import sys

import pytest

from lab import apps
from lab.__main__ import main


def test_without_a_name_each_application_has_a_line(capsys) -> None:
    assert main(["app"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["watch", "read", "patch", "layers", "spend", "transfer"]
    assert all(30 < len(line) <= 130 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["wach"],
            "no application 'wach'; did you mean 'watch'? There are watch, read, patch, layers, spend, transfer",
        ),
        (["zzz"], "no application 'zzz'; there are watch, read"),
        (["watch", "--port", "70000"], "port 70000: give a number from 1 to 65535"),
    ],
)
def test_a_mistake_is_told_at_once(arguments: list[str], said: str, capsys) -> None:
    assert main(["app", *arguments, "--no-browser"]) == 1
    assert said in capsys.readouterr().err


def test_without_voila_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "voila", None)
    with pytest.raises(ValueError, match="needs Voila, which is not installed: run `python -m pip install -e"):
        apps.serve("watch")


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is in use"):
            apps.serve("watch", port=port)
        assert apps._free([port, port + 1]) == port + 1


@pytest.mark.parametrize("name", apps.APPS)
def test_a_page_is_a_title_a_sentence_and_one_cell(name: str) -> None:
    text, code = apps.notebook_of(apps.APPS[name]).cells
    assert re.fullmatch(r"# .+\n\n.+", text.source) and code.cell_type == "code"
    module, function = re.search(r"explorer = (\w+)\.(\w+)\(", code.source).groups()  # type: ignore[union-attr]
    assert callable(getattr(importlib.import_module(f"lab.lessons.{module}"), function))
    ast.parse(code.source)
    assert ("lab.load('smollm2-135m')" in code.source) == (name != "transfer")
