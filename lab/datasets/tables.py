"""Tables of data: which columns statements, two-hop queries, prompts and prose have, and the checks that they pass.

`lab.datasets` offers `as_...` and `check_...` under its own name. `as_...` fill in what a table lacks and give a new one;
`check_...` refuse what no experiment can use: a ValueError names the row, what is wrong with it and what would mend it.
"""

import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral
from typing import Any

import pandas as pd

from lab import require

COLUMNS = (  # of statements
    "example",  # unique, e.g. "cities-0001"
    "text",  # the bare statement or question, without instruction
    "label",  # 1 = true, positive, yes; 0 = the other class
    "group",  # statements that share a subject; a split never separates them
    "template",  # which wording
    "difficulty",  # 1, 2, ...; the card says what it means
)
TWO_HOP_NEEDED = ("text", "e1", "e2", "e3")
TWO_HOP_ALIASES = ("e1_aliases", "e2_aliases", "e3_aliases")
PROMPT_NEEDED = ("prompt", "level")
PROMPT_LISTS = ("aliases", "hop_prompts", "hop_answers", "relations", "entities", "partial_sums")  # JSON in a CSV


# --- statements -----------------------------------------------------------------------------------------------------


def check_concept_data(frame: pd.DataFrame, *, name: str) -> None:
    """Refuse statements (with the columns of `COLUMNS`) that no probe can be trained and tested on.

    Raises:
        ValueError: a missing column, no rows, an empty text, a label other than 0 or 1, an example named twice, one
            class only, a row without a group, names that are neither texts nor whole numbers, equal texts with different
            labels or groups, or groups that can't be split so that both sides have both classes.
    """
    check_columns(frame, COLUMNS, name=name, least="two statements of each class")
    _check_texts(frame, ("text",), name=name)
    strange = ~frame["label"].isin([0, 1])
    if strange.any():
        row = int(strange.to_numpy().argmax())
        one = f"label {frame['label'].iloc[row]!r} in {_place(frame, row)}"
        raise ValueError(f"{name}: {one}: labels are 0 or 1 (1 = true, positive, yes)")
    _check_examples(frame, name=name)
    nameless = frame["group"].isna() | (frame["group"].astype(str).str.strip() == "")
    if nameless.any():
        place = _place(frame, int(nameless.to_numpy().argmax()))
        mend = "give it one, its own name if it shares its subject with no other"
        raise ValueError(f"{name}: {place} has no group: {mend}")
    _check_names(frame, ("group",), name=name)
    for column, trouble in (("label", "both labels"), ("group", "several groups, so that a split could separate them")):
        mixed = frame.groupby("text", sort=False)[column].nunique() > 1
        if mixed.any():
            raise ValueError(f"{name}: the text {mixed.index[mixed][0]!r} stands more than once, with {trouble}")
    (label, *labels), (group, *groups) = frame["label"].unique(), frame["group"].unique()
    if not labels:
        raise ValueError(f"{name} has one class only: all {len(frame)} labels are {int(label)}; a probe needs both")
    if not groups:
        alone = f"the group {group!r} spans all {len(frame)} rows, so nothing is left to test on"
        raise ValueError(f"{name}: {alone}: give statements about different subjects different groups")
    # Two groups with each class are enough, and needed: then some split has both classes on both sides.
    for label, holders in frame.groupby("label")["group"].nunique().items():
        if holders < 2:
            alone = (
                f"all statements of label {label} are in one group, so no split by group has both classes on both sides"
            )
            raise ValueError(f"{name}: {alone}: at least two groups with each class are needed")


# --- two-hop queries ------------------------------------------------------------------------------------------------


def as_two_hop(frame: pd.DataFrame, *, name: str = "your table") -> pd.DataFrame:
    """Two-hop queries with what can be filled in filled in, checked by `check_two_hop_data`.

    Args:
        frame: one query a row. Needed: `text` (the query), `e1` (the entity that it names, as it stands in the text),
            `e2` (the bridge), `e3` (the answer).
        name: what to call it in messages.

    Returns:
        A new table with all columns of `frame` and, where they were missing: `example`, numbered; `e1_aliases` and so on
        (accepted forms, as lists; a CSV may hold JSON lists such as '["New Delhi", "Delhi"]'), the label alone; `group`,
        the bridge; `answer_share`, the answer's share of all queries with the same `r2`, or of all where there is no `r2`.
        Nothing else is made up: without `first_hop`, `second_hop`, `entity_shortcut`, `relation_shortcut` (prompts), or
        `r1`, `r2`, `r1_template`, `r2_template` and types, what needs them cannot be run.

    >>> mine = pd.DataFrame({"text": ["The capital of the home of Sumo is"], "e1": "Sumo", "e2": "Japan", "e3": "Tokyo"})
    >>> as_two_hop(mine).loc[0, ["example", "e3_aliases", "group"]].tolist()
    ['query-0001', ['Tokyo'], 'Japan']
    """
    _check_two_hop_columns(frame, name=name)
    frame = _filled(frame, "query", TWO_HOP_ALIASES, name=name)
    for column in TWO_HOP_ALIASES:
        if column not in frame:
            frame[column] = _lists([[label] for label in frame[column.removesuffix("_aliases")]], frame)
    if "group" not in frame:
        frame["group"] = frame["e2"]
    if "answer_share" not in frame:
        asked = frame["r2"] if "r2" in frame else pd.Series("", index=frame.index)
        same = frame.groupby([asked, frame["e3"]])["e3"].transform("size")
        frame["answer_share"] = (same / asked.groupby(asked).transform("size")).round(4)
    check_two_hop_data(frame, name=name)
    return frame


def check_two_hop_data(frame: pd.DataFrame, *, name: str) -> None:
    """Refuse two-hop queries that no experiment can use, or whose answer is given away.

    Raises:
        ValueError: a missing column, no rows, an empty text or label, an example named twice, aliases that are no list,
            an empty one, or contain an empty text; an e1 that doesn't stand in its text; an answer, in any of its
            forms, that stands in the text as whole words or is the bridge. Case and accents make no difference there,
            but forms of up to four capitals (US) are looked for as they are. Where `name` is "published/..." answers may
            be given away: such a set stays as its authors made it.
    """
    _check_two_hop_columns(frame, name=name)
    check_texts(frame, TWO_HOP_NEEDED, name=name)
    _check_cells(frame, TWO_HOP_ALIASES, _why_no_aliases, name=name)
    for row, (e1, text) in enumerate(zip(frame["e1"], frame["text"], strict=True)):
        if e1 not in text:
            looked = f"e1 {e1!r} of {_place(frame, row)} was looked for in {text!r} and isn't there"
            raise ValueError(f"{name}: {looked}: e1 must stand in the text letter by letter")
    for row, text in enumerate([] if name.startswith("published/") else frame["text"]):
        bridges, answers = _forms_of(frame, "e2", row), _forms_of(frame, "e3", row)
        if given := [answer for answer in answers if _stands_in(answer, text)]:
            answer = f"the answer {given[0]!r} of {_place(frame, row)} stands in its own text {text!r}"
            raise ValueError(f"{name}: {answer}: drop the row, or the alias")
        if same := {_fold(bridge) for bridge in bridges} & {_fold(answer) for answer in answers}:
            both = f"bridge {bridges[0]!r} and answer {answers[0]!r} of {_place(frame, row)} share the name"
            raise ValueError(f"{name}: {both} {sorted(same)[0]!r}: then one hop is enough; drop the row, or the alias")


def _check_two_hop_columns(frame: pd.DataFrame, *, name: str) -> None:
    check_columns(frame, TWO_HOP_NEEDED, name=name, what="two-hop queries", least="one query")


def _why_no_aliases(column: str, row: int, aliases: object) -> str:
    if not isinstance(aliases, list):
        return f"is {aliases!r}, not a list: as_two_hop(table) reads JSON"
    wrong = [alias for alias in aliases if require.why_no_text(alias)]
    empty = "" if aliases else "is an empty list: name at least the label itself"
    return f"contains {wrong[0]!r}: every alias is a text" if wrong else empty


def _forms_of(frame: pd.DataFrame, entity: str, row: int) -> list[str]:
    """Label and aliases."""
    aliases: Sequence[str] = frame[f"{entity}_aliases"].iloc[row] if f"{entity}_aliases" in frame else []
    return [frame[entity].iloc[row], *aliases]


@cache
def _fold(text: str) -> str:
    """Without accents and capitals."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return text.casefold()


def _stands_in(name: str, text: str) -> bool:
    """Whether the name stands in the text and no letter or digit continues it on either side."""
    if not (len(name) <= 4 and name.isalpha() and name.isupper()):  # US is not us
        name, text = _fold(name), _fold(text)
    start = text.find(name)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(name) : start + len(name) + 1]
        if not (before.isalnum() and name[0].isalnum()) and not (after.isalnum() and name[-1].isalnum()):
            return True
        start = text.find(name, start + 1)
    return False


# --- prompts and prose ----------------------------------------------------------------------------------------------


def as_prompts(frame: pd.DataFrame, *, name: str = "your table") -> pd.DataFrame:
    """Prompts of graded difficulty with what can be filled in filled in, checked by `check_prompts`.

    Args:
        frame: one prompt a row. Needed: `prompt` (text), `level` (int from 1 on: number of steps, hops, terms). Known:
            `answer` and `solution` (texts that follow the prompt as they stand, with the space between, if any),
            `aliases` (accepted forms of the answer), `hop_prompts` and `hop_answers` (for each of `level` hops the prompt
            that asks for it alone, and the accepted forms of its answer). Lists may be JSON lists, as in a CSV.
        name: what to call it in messages.

    Returns:
        A new table with `example`, `group`, `level`, `prompt` first and all other columns of `frame` behind them, JSON
        lists as lists. Where they were missing: `example` is numbered; `group` is the example, so that a split takes each
        row for itself; `aliases` is the answer alone, without the space, where there are answers.

    >>> mine = pd.DataFrame({"prompt": ["2 + 2 = ", "2 + 2 + 3 = "], "level": [2, 3], "answer": ["4", "7"]})
    >>> as_prompts(mine).loc[1, ["example", "group", "aliases"]].tolist()
    ['prompt-0002', 'prompt-0002', ['7']]
    """
    check_columns(frame, PROMPT_NEEDED, name=name, what="prompts", least="one prompt")
    frame = _filled(frame, "prompt", PROMPT_LISTS, name=name)
    if "group" not in frame:
        frame["group"] = frame["example"]
    check_prompts(frame, name=name)
    if "answer" in frame and "aliases" not in frame:
        frame["aliases"] = _lists([[answer.strip()] for answer in frame["answer"]], frame)
    return first_columns(frame, ("example", "group", "level", "prompt"))


def check_prompts(frame: pd.DataFrame, *, name: str) -> None:
    """Refuse prompts that no experiment can use: `prompt` and `level`, and what else `as_prompts` names where it is there.

    Raises:
        ValueError: a missing column, no rows, an empty prompt, answer, solution or group, a level that is no whole number
            from 1 on, an example named twice, lists that are none or contain anything but texts, hops that are not as
            many as the level.
    """
    check_columns(frame, PROMPT_NEEDED, name=name, what="prompts", least="one prompt")
    _check_texts(frame, ("prompt", "answer", "solution", "group"), name=name)
    levels = frame["level"].tolist()
    for row, level in enumerate(levels):
        if not isinstance(level, Integral) or isinstance(level, bool) or level < 1:
            one = f"level {level!r} in {_place(frame, row)}"
            raise ValueError(
                f"{name}: {one}: levels are whole numbers from 1 on (steps, hops, terms), of an integer type; "
                "frame['level'].astype(int) turns 2.0 into 2, and 1 for all rows will do where there are none"
            )
    _check_examples(frame, name=name)

    def why(column: str, row: int, cell: Any) -> str:
        lists = cell if column == "hop_answers" and isinstance(cell, list) else [cell]
        if not all(isinstance(one, list) and one for one in lists):
            mend = "as_prompts(table) reads JSON lists; leave the column out if there is nothing to say"
            return f"is {cell!r}, not a list{' of lists' * (lists is cell)}, or an empty one: {mend}"
        if wrong := [text for one in lists for text in one if require.why_no_text(text)]:
            return f"contains {wrong[0]!r}: each is a text, not empty"
        as_many = column == "aliases" or len(cell) == levels[row]
        return "" if as_many else f"has {len(cell)} hops, its level is {levels[row]}: one entry a hop is needed"

    _check_cells(frame, ("aliases", "hop_prompts", "hop_answers"), why, name=name)


def as_prose(frame: pd.DataFrame, *, name: str = "your table") -> pd.DataFrame:
    """Plain text, one document (`text`) a row, with what can be filled in filled in, checked by `check_prose`.

    Returns:
        A new table with `example`, `group`, `genre`, `text` first and all other columns of `frame` behind them. Where they
        were missing: `example` is numbered, `group` is the example (a split takes each document for itself), `genre` is
        "own".
    """
    check_columns(frame, ("text",), name=name, what="documents", least="one document")
    frame = _filled(frame, "document", (), name=name)
    for column, value in (("group", frame["example"]), ("genre", "own")):
        if column not in frame:
            frame[column] = value
    check_prose(frame, name=name)
    return first_columns(frame, ("example", "group", "genre", "text"))


def check_prose(frame: pd.DataFrame, *, name: str) -> None:
    """Refuse documents that can't be split and read.

    Raises:
        ValueError: no column text, no rows, an empty text, group or genre, an example named twice, a text that stands in
            two groups, so that a split could put it on both sides.
    """
    check_columns(frame, ("text",), name=name, what="documents", least="one document")
    _check_texts(frame, ("text", "group", "genre"), name=name)
    _check_examples(frame, name=name)
    mixed = frame.groupby("text", sort=False)["group"].nunique() > 1 if "group" in frame else pd.Series(dtype=bool)
    if mixed.any():
        text = f"the text {mixed.index[mixed][0][:80]!r} stands in several groups, so that a split could put it on both sides"
        raise ValueError(f"{name}: {text}: drop one, or give both the same group")


# --- what all of them share -----------------------------------------------------------------------------------------


def check_texts(frame: pd.DataFrame, columns: tuple[str, ...], *, name: str) -> None:
    """Refuse rows whose texts in these columns are none, or whose example or group (if there) has no name of its own.

    Raises:
        ValueError: an empty text or something else, an example named twice, an example or a group that is missing or no
            name, an index of texts.
    """
    _check_index(frame, name=name)
    _check_texts(frame, columns, name=name)
    _check_names(frame, ("group",), name=name)
    _check_examples(frame, name=name)


def check_columns(frame: pd.DataFrame, needed: Sequence[str], *, name: str, what: str = "", least: str = "") -> None:
    """Refuse a table (of `what`) without these columns; with `least`, one without rows, or cut by a comma, too."""
    if missing := [column for column in needed if column not in frame]:
        needs = f": {what} need {', '.join(needed)}" if what else ""
        has = f"it has {', '.join(map(str, frame.columns))}"
        raise ValueError(f"{name} has no column {', '.join(map(repr, missing))}{needs}; {has}")
    if least and frame.empty:
        raise ValueError(f"{name} has no rows: at least {least} {'are' if least.startswith('two') else 'is'} needed")
    if least:
        _check_index(frame, name=name)


def first_columns(frame: pd.DataFrame, first: tuple[str, ...]) -> pd.DataFrame:
    """These columns first, all others behind them."""
    return frame[[*first, *(column for column in frame.columns if column not in first)]]


def number_rows(name: str, n: int) -> list[str]:
    """Names of n examples."""
    return [f"{name}-{i:04d}" for i in range(1, n + 1)]


def _filled(frame: pd.DataFrame, what: str, lists: Sequence[str], *, name: str) -> pd.DataFrame:
    """A copy with named examples, and the JSON lists of these columns as lists; what is no text stays, to be checked."""
    frame = frame.copy()
    if "example" not in frame:
        frame.insert(0, "example", number_rows(what, len(frame)))
    for column in frame.columns.intersection(list(lists)):
        parsed = []
        for row, cell in enumerate(frame[column]):
            try:
                parsed.append(json.loads(cell) if isinstance(cell, str) else cell)
            except json.JSONDecodeError as error:
                what = f'is {cell!r}, neither a list nor a JSON list such as ["New Delhi", "Delhi"]'
                raise ValueError(f"{name}: {column} in {_place(frame, row)} {what}") from error
        frame[column] = _lists(parsed, frame)
    return frame


def _lists(cells: list, frame: pd.DataFrame) -> pd.Series:
    return pd.Series(cells, index=frame.index, dtype=object)


def _place(frame: pd.DataFrame, row: int) -> str:
    """How messages call a row."""
    return f"row {row} (example {frame['example'].iloc[row]!r})" if "example" in frame else f"row {row}"


def _check_cells(
    frame: pd.DataFrame, columns: Sequence[str], why: Callable[[str, int, Any], str], *, name: str
) -> None:
    """Refuse a cell of these columns, where they are there, of which `why(column, row, cell)` says what is wrong."""
    for column in columns:
        for row, cell in enumerate(frame[column] if column in frame else []):
            if wrong := why(column, row, cell):
                raise ValueError(f"{name}: {column} in {_place(frame, row)} {wrong}")


def _check_texts(frame: pd.DataFrame, columns: tuple[str, ...], *, name: str) -> None:
    _check_cells(frame, columns, _why_no_text, name=name)


def _why_no_text(column: str, row: int, value: object) -> str:
    why = require.why_no_text(value)
    if why == "not a text":
        return (
            f"is {value!r}, not a text: frame[{column!r}].astype(str) makes texts of numbers, pd.read_csv(path, dtype="
            f"{{{column!r}: str}}, keep_default_na=False) reads them as they are written; drop the row if there is nothing"
        )
    return why and f"is {value!r}{'' if why == 'empty' else f', {why}'}: give it a text or drop the row"


def _check_names(frame: pd.DataFrame, columns: tuple[str, ...], *, name: str) -> None:
    """Examples and groups: texts or whole numbers. A 7.0 was made of 007 or of 7, a nan of nothing or of "NA"."""
    for column in columns:
        for row, value in enumerate(frame[column] if column in frame else []):
            if require.why_no_text(value) and (not isinstance(value, Integral) or isinstance(value, bool)):
                mend = f"pd.read_csv(path, dtype={{{column!r}: str}}, keep_default_na=False) reads what is written"
                what = f"{column} in row {row} is {value!r}, neither a text nor a whole number"
                raise ValueError(f"{name}: {what}: {mend}")


def _check_examples(frame: pd.DataFrame, *, name: str) -> None:
    _check_names(frame, ("example",), name=name)
    if "example" in frame and (twice := frame["example"].astype(str).duplicated()).any():
        example = frame["example"][twice].iloc[0]
        raise ValueError(f"{name}: example {example!r} occurs twice: every row needs a name of its own")


def _check_index(frame: pd.DataFrame, *, name: str) -> None:
    """pandas takes the first cells for an index where rows have a comma more than the header: the text is cut there."""
    if not pd.api.types.is_integer_dtype(frame.index.dtype):
        cut = f"its index holds {frame.index[0]!r}, as if a comma in a CSV's texts had cut them: quote such texts"
        mend = "read the file with pd.read_csv(path, index_col=False), or .reset_index() if the index is yours"
        raise ValueError(f"{name}: {cut} and {mend}")
