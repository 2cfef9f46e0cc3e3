"""Guards: what a caller passed, as plain Python, or a ValueError that says what was passed and what is allowed.

    seed = require.seed(seed)                                  # np.int64(3) becomes 3; True, 3.0 and -1 are refused
    depths = require.wholes("depths", depths, 0, n_layers)     # a list, range, array, series, tensor or generator

Numbers of numpy, pandas or torch become Python's own, so that a result's parameters can be saved, and its keys and random
streams are those of the same number typed by hand.
"""

import numbers as abstract
import sys
import unicodedata
from collections.abc import Iterable, Set
from typing import Any

Bound = float | int | None
_LARGEST = sys.float_info.max
_INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf"}  # Unicode's spaces, line ends, control and format characters


def whole(name: str, value: Any, low: int | None = None, high: int | None = None, *, hint: str = "") -> int:
    """A whole number within bounds that count as inside; no bool, and no float, not even 3.0."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, abstract.Integral) or not _inside(plain, low, high):
        raise ValueError(f"{_shown(name, plain)}: give a whole number{_bounds(low, high)}{hint}")
    return int(plain)


def seed(value: Any, *, hint: str = "") -> int:
    """A seed that every generator takes."""
    return whole("seed", value, 0, 2**32 - 1, hint=hint)


def number(
    name: str,
    value: Any,
    low: Bound = None,
    high: Bound = None,
    *,
    above: Bound = None,
    below: Bound = None,
) -> float:
    """A finite number; `low` and `high` count as inside, `above` and `below` as outside."""
    plain = _plain(value)
    real = isinstance(plain, abstract.Real) and not isinstance(plain, bool) and _inside(plain, -_LARGEST, _LARGEST)
    if not real or not _inside(plain, low, high) or not _inside(plain, above, below, strict=True):
        ends = {"above": above, "at least": low, "below": below, "at most": high}
        edges = " and".join(f" {word} {bound:g}" for word, bound in ends.items() if bound is not None)
        raise ValueError(f"{_shown(name, plain)}: give a number{edges}")
    return float(plain)


def fraction(name: str, value: Any) -> float:
    """A share that leaves something on both sides."""
    return number(name, value, above=0, below=1)


def flags(**values: Any) -> tuple[bool, ...]:
    """True or False each, in the order given."""
    plain = {name: _plain(value) for name, value in values.items()}
    for name, value in plain.items():
        if not isinstance(value, bool):
            raise ValueError(f"{_shown(name, value)}: give True or False")
    return tuple(plain.values())


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of some names."""
    known = list(allowed)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{_shown(name, value)}: choose one of {', '.join(known)}")
    return str(value)


def listed(name: str, values: Any, what: str = "values", *, least: int = 0) -> list[Any]:
    """Any one-dimensional collection as a list of plain values: no single value, no text, and no set, which has no order."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        shown = f"[{values!r}]" if isinstance(values, (str, abstract.Number)) else "[...]"
        raise ValueError(f"{_shown(name, values)}: give a list of {what}, such as {shown}")
    if isinstance(values, Set) and not hasattr(values, "mapping"):  # the keys of a dict have their order
        raise ValueError(f"{_shown(name, values)}: a set has no order; give a list of {what}")
    found = [_plain(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
    if len(found) < least:
        raise ValueError(f"{_shown(name, found)}: give at least {least} of the {what}")
    return found


def some_of(name: str, values: Any, allowed: Iterable[str], *, least: int = 1) -> list[str]:
    """Some of the allowed names, none twice."""
    given, known = listed(name, values, "names"), list(allowed)
    if len(given) < least or not all(isinstance(one, str) and one in known for one in given) or _repeated(given):
        some = "choose at least one of" if least else "choose from"
        raise ValueError(f"{_shown(name, given)}: {some} {', '.join(known)}, none twice")
    return [str(one) for one in given]


def wholes(
    name: str, values: Any, low: int | None, high: int | None, *, least: int = 1, twice: bool = False, hint: str = ""
) -> list[int]:
    """Whole numbers within bounds, in their order; `least`: how many at least. `twice`: one may be there again."""
    given = listed(name, values, "whole numbers")
    wrong = [one for one in given if isinstance(one, bool) or not isinstance(one, abstract.Integral)]
    wrong += [one for one in given if one not in wrong and not _inside(one, low, high)]
    if wrong or len(given) < least or (_repeated(given) and not twice):
        some = "give at least one, each" if least == 1 else f"give at least {least}, each" if least else "give numbers"
        once = "" if twice else ", none twice"
        which = f" ({wrong[0]!r} is not)" if wrong else ""
        raise ValueError(f"{_shown(name, given)}: {some}{_bounds(low, high)}{once}{hint}{which}")
    return [int(one) for one in given]


def numbers(name: str, values: Any, *, least: int = 1, once: bool = False, **bounds: Any) -> list[float]:
    """Finite numbers within the bounds of `number`, in their order; `once`: none twice."""
    given = listed(name, values, "numbers", least=least)
    found = [number(f"{name}[{place}]", value, **bounds) for place, value in enumerate(given)]
    if once and _repeated(found):
        raise ValueError(f"{_shown(name, found)}: give each number once")
    return found


def pairs(name: str, values: Any, ends: tuple[int, int]) -> list[tuple[int, int]]:
    """Pairs of whole numbers, each from 0 to its end, none twice."""
    rows = enumerate(values) if isinstance(values, Iterable) and not isinstance(values, str) else [(0, values)]
    given = [wholes(f"{name}[{place}]", pair, 0, None, least=2, twice=True) for place, pair in rows]
    found = [(pair[0], pair[1]) for pair in given if len(pair) == 2 and pair[0] <= ends[0] and pair[1] <= ends[1]]
    if len(found) < len(given) or _repeated(found):
        raise ValueError(f"{_shown(name, given)}: give pairs of 0 to {ends[0]} and 0 to {ends[1]}, none twice")
    return found


def why_no_text(value: object) -> str:
    """What keeps a value from being a text that a model can read; "" if nothing does.

    >>> why_no_text("Paris"), why_no_text("\\u200b "), why_no_text(None), why_no_text(7)
    ('', 'empty', 'not a text', 'not a text')
    """
    if not isinstance(value, str):
        return "not a text"
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        return "no text: it holds half a surrogate pair, as a file read in the wrong encoding may"
    return "" if any(unicodedata.category(letter) not in _INVISIBLE for letter in value) else "empty"


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own; anything else as it is."""
    return value.item() if getattr(value, "ndim", 1) == 0 and hasattr(value, "item") else value


def _inside(value: Any, low: Bound, high: Bound, *, strict: bool = False) -> bool:
    if strict:
        return (low is None or value > low) and (high is None or value < high)
    return (low is None or value >= low) and (high is None or value <= high)


def _repeated(values: list[Any]) -> bool:
    return len(set(values)) < len(values)


def _bounds(low: Bound, high: Bound) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f", at least {low}" if low is not None else f", at most {high}" if high is not None else ""


def _shown(name: str, value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{name}={text if len(text) <= 200 else text[:197] + '...'}"
