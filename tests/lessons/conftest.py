"""What the tests of lessons share: the solutions as they stand in a lesson's folded cells."""

import linecache
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import pytest

LESSONS = Path(__file__).resolve().parents[2] / "notebooks" / "lessons"


@pytest.fixture(scope="session")
def solution() -> Callable[..., Any]:
    """`solution(lesson, name, **globals)`: what the folded solution of the exercise `name` defines, as the participant would."""

    def found(lesson: str, name: str, **given: Any) -> Any:
        path = next(LESSONS.glob(f"{lesson}*.py"))
        for cell in jupytext.read(path).cells:
            if "solution" not in cell.metadata.get("tags", []):
                continue
            if code := re.search(r"```python\n(.*?)```", cell.source, re.DOTALL):
                if re.search(rf"^(def {name}\b|{name} *=)", code[1], re.MULTILINE):
                    return written(code[1], **given)[name]
            elif said := re.search(rf"`{name} = (.*?)`", cell.source):
                return eval(said[1], dict(given))
        raise KeyError(f"{path.name} has no solution of {name}")

    return found


def written(code: str, **given: Any) -> dict[str, Any]:
    """Names that a cell defines; its source can be looked up, as in a notebook."""
    file = f"<ipython-cell-{abs(hash(code))}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    names: dict[str, Any] = dict(given)
    exec(compile(code, file, "exec"), names)
    return names
