"""Parameters of a notebook: KEY=VALUE on the command line, checked against the defaults in its cell tagged `parameters`."""

import ast
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbformat import NotebookNode


def values_of(pairs: list[str]) -> dict[str, str]:
    """KEY=VALUE texts by their keys, each given once."""
    values: dict[str, str] = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"-p {text}: write KEY=VALUE, for example -p seed=1 or -p model_name=gemma3-270m")
        if key in values:
            raise ValueError(f"{key} is given twice, as {values[key]!r} and as {value!r}: give it once")
        values[key] = value
    return values


def parameters(notebook: "NotebookNode") -> dict[str, Any]:
    """Names set in the cells tagged `parameters`, with their values where those are plain constants (else `...`)."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    found: dict[str, Any] = {}
    for line in (line for cell in cells for line in ast.parse(cell.source).body):
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        for name in [target.id for target in targets if isinstance(target, ast.Name)]:
            try:
                found[name] = ast.literal_eval(line.value)
            except ValueError:
                found[name] = ...
    return found


def inject(notebook: "NotebookNode", name: str, values: dict[str, str]) -> "NotebookNode":
    """Put a cell that sets `values` after the cell tagged `parameters`; each takes the type of the parameter's default."""
    from nbformat.v4 import new_code_cell

    known = parameters(notebook)
    lines = []
    for key, text in values.items():
        if key not in known:
            has = ", ".join(f"{k}={v!r}" if v is not ... else k for k, v in known.items())
            raise ValueError(f"{name} has no parameter {key!r}; it has {has or 'none'}")
        try:
            lines.append(f"{key} = {_typed(text, known[key])!r}")
        except TypeError as error:
            raise ValueError(f"{name}: {key}={text!r} is not {error} (its default is {known[key]!r})") from error
    if lines:
        at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        cell = new_code_cell("\n".join(lines))
        cell.metadata["tags"] = ["injected-parameters"]
        notebook.cells.insert(at + 1, cell)
    return notebook


def _typed(text: str, default: Any) -> Any:
    """A text from the command line as a value like `default`; a TypeError says what it should be.

    A text stays as it is, unless it is quoted as in Python. Beside a default that is no constant, or None, what reads as
    a Python constant is one, and all else is text.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if isinstance(default, str):
        return value if isinstance(value, str) else text
    value = _like(value, default)
    try:
        ast.literal_eval(repr(value))
    except ValueError:  # inf or nan, such as 1e999: repr writes names, which mean nothing in the notebook
        raise TypeError("made of finite numbers") from None
    return value


def _like(value: Any, default: Any) -> Any:
    if default is None or default is ...:
        return value
    if isinstance(default, float):
        try:
            if type(value) in (int, float) and math.isfinite(value):
                return float(value)
        except OverflowError:  # a whole number beyond all floats
            pass
        raise TypeError("a finite number")
    if isinstance(default, list | tuple):
        if not isinstance(value, list | tuple):
            raise TypeError("a list such as [1, 2] or ['a', 'b']")
        alike = len({type(item) for item in default}) == 1  # then the items of `value` must be such ones, too
        return type(default)(_like(item, default[0] if alike else None) for item in value)
    if type(value) is not type(default):
        kinds = {bool: "True or False", int: "a whole number", str: "a text in quotes"}
        raise TypeError(kinds.get(type(default), f"a {type(default).__name__}"))
    return value
