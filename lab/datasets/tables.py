"""Tables of data: which columns statements, two-hop queries, prompts and prose have, and the checks that they pass.

`lab.datasets` offers the public functions here under its own name, and says what the columns hold. `as_two_hop`,
`as_prompts` and `as_prose` fill in what a table lacks, `check_...` refuse what no experiment can use.
"""

import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path

import pandas as pd

from lab import require

COLUMNS = ("example", "text", "label", "group", "template", "difficulty")

TWO_HOP_NEEDED = ("text", "e1", "e2", "e3")
TWO_HOP_ALIASES = ("e1_aliases", "e2_aliases", "e3_aliases")

PROMPT_NEEDED = ("prompt", "level")
PROMPT_LISTS = ("aliases", "hop_prompts", "hop_answers", "relations", "entities", "partial_sums")  # JSON in a CSV


def read_csv(path: Path) -> pd.DataFrame:
    """The cells of a CSV (UTF-8, with a header) as the texts that they are: none is guessed to be a number or missing.

    Raises:
        ValueError: what is no such file, with the line: other encodings, NUL characters, quotes that aren't closed, line
            ends outside of quotes that are none of the file's, an empty line between others, rows of more or fewer cells
            than the header, a column named twice, columns that another sign separates.
    """
    content, name = path.read_bytes(), path.name
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")  # the mark that spreadsheets put in front
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}, line {line}: the byte 0x{content[error.start]:02x} is no UTF-8: save the file as UTF-8"
        ) from error
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise ValueError(
            f"{name}, line {line}: a NUL character, as in UTF-16 or a damaged file: save the file as UTF-8"
        )
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # long texts are texts, too
    lines = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    rows, line = [], 1
    try:
        for row in lines:
            rows.append((line, row))
            line = lines.line_num + 1
    except csv.Error as error:
        reason = "a carriage return outside of quotes" if "new-line" in str(error) else str(error)
        raise ValueError(
            f"{name}, line {line}: {reason}. Put a text that holds commas, quotes or line ends in double quotes, and double "
            "the quotes in it"
        ) from error
    while rows and not rows[-1][1]:
        rows.pop()
    if not rows:
        raise ValueError(f"{name} is empty: a header and rows are needed")
    header = rows[0][1]
    if twice := [column for column in header if header.count(column) > 1]:
        raise ValueError(f"{name}, line 1: the column {twice[0]!r} is there twice: give each a name of its own")
    for line, row in rows:
        if not row:
            raise ValueError(f"{name}, line {line} is empty: delete it")
        if len(row) != len(header):
            raise ValueError(
                f"{name}, line {line}: {len(row)} cells, the header has {len(header)} ({', '.join(header)}): put a text that "
                "holds commas or quotes in double quotes"
            )
    if len(header) == 1 and (other := [sign for sign in ";\t|" if sign in header[0]]):
        raise ValueError(f"{name}, line 1: columns are separated by {other[0]!r} ({header[0]!r}): save it with commas")
    return pd.DataFrame([row for _, row in rows[1:]], columns=header, dtype="str")


def check_concept_data(frame: pd.DataFrame, *, name: str) -> None:
    """Refuse a table that no probe can be trained and tested on.

    Args:
        frame: statements, with at least the columns in `COLUMNS`.
        name: what to call it in messages.

    Raises:
        ValueError: a missing column, no rows, an empty text, a label other than 0 or 1, an example named twice, one
            class only, a row without a group, names that are neither texts nor whole numbers, equal texts with different
            labels or groups, or groups that can't be split so that both sides have both classes.
    """
    _check_columns(frame, COLUMNS, name=name)
    if frame.empty:
        raise ValueError(f"{name} has no rows: at least two statements of each class are needed")
    _check_index(frame, name=name)
    for row, value in enumerate(frame["text"]):
        if why := require.why_no_text(value):
            shown = "" if why == "empty" else f"{value!r}, "
            raise ValueError(
                f"{name}: the text in row {row} (example {frame['example'].iloc[row]!r}) is {shown}{why}: fill it or drop the "
                "row"
            )
    strange = ~frame["label"].isin([0, 1])
    if strange.any():
        row = int(strange.to_numpy().argmax())
        raise ValueError(
            f"{name}: label {frame['label'].iloc[row]!r} in row {row} (example {frame['example'].iloc[row]!r}): "
            f"labels are 0 or 1 (1 = true, positive, yes)"
        )
    _check_names(frame, ("example",), name=name)
    _check_examples(frame, name=name)
    nameless = frame["group"].isna() | (frame["group"].astype(str).str.strip() == "")
    if nameless.any():
        row = int(nameless.to_numpy().argmax())
        raise ValueError(
            f"{name}: row {row} (example {frame['example'].iloc[row]!r}) has no group: give it one, its own name if it "
            "shares its subject with no other"
        )
    _check_names(frame, ("group",), name=name)
    for column, trouble in (("label", "both labels"), ("group", "several groups, so that a split could separate them")):
        mixed = frame.groupby("text", sort=False)[column].nunique() > 1
        if mixed.any():
            raise ValueError(f"{name}: the text {mixed.index[mixed][0]!r} stands more than once, with {trouble}")
    if frame["label"].nunique() == 1:
        raise ValueError(
            f"{name} has one class only: all {len(frame)} labels are {int(frame['label'].iloc[0])}; a probe needs both"
        )
    if frame["group"].nunique() == 1:
        raise ValueError(
            f"{name}: the group {frame['group'].iloc[0]!r} spans all {len(frame)} rows, so nothing is left to test on: "
            f"give statements about different subjects different groups"
        )
    # Two groups with each class are enough, and needed: then some split has both classes on both sides.
    for label, holders in frame.groupby("label")["group"].nunique().items():
        if holders < 2:
            raise ValueError(
                f"{name}: all statements of label {label} are in one group, so no split by group has both classes on "
                "both sides: at least two groups with each class are needed"
            )


def as_two_hop(frame: pd.DataFrame, *, name: str = "your table") -> pd.DataFrame:
    """Two-hop queries with what can be filled in filled in, checked by `check_two_hop_data`.

    Args:
        frame: one query a row. Needed: `text` (the query), `e1` (the entity that it names, as it stands in the text),
            `e2` (the bridge), `e3` (the answer).
        name: what to call it in messages.

    Returns:
        A new table with all columns of `frame` and, where they were missing:

        - `example`: numbered.
        - `e1_aliases`, `e2_aliases`, `e3_aliases`: accepted forms, the label among them: the label alone. Where they
          are there they may be lists or, as in a CSV, JSON lists such as '["New Delhi", "Delhi"]'.
        - `group`: the bridge, so that a split keeps queries about one bridge together.
        - `answer_share`: the answer's share of all queries with the same `r2`, or of all where there is no `r2`.

        Nothing else is made up: without `first_hop`, `second_hop`, `entity_shortcut`, `relation_shortcut` (prompts), or
        `r1`, `r2`, `r1_template`, `r2_template` and types, what needs them cannot be run.

    Raises:
        ValueError: what `check_two_hop_data` refuses, and aliases that are neither lists nor JSON lists.

    >>> mine = pd.DataFrame({"text": ["The capital of the home of Sumo is"], "e1": "Sumo", "e2": "Japan", "e3": "Tokyo"})
    >>> as_two_hop(mine).loc[0, ["example", "e3_aliases", "group"]].tolist()
    ['query-0001', ['Tokyo'], 'Japan']
    """
    _check_two_hop_columns(frame, name=name)
    frame = frame.copy()
    if "example" not in frame:
        frame.insert(0, "example", _number("query", len(frame)))
    for column in TWO_HOP_ALIASES:
        if column in frame:
            cells = zip(frame["example"], frame[column], strict=True)
            parsed = [
                _json_list(cell, f"{name}: {column} in row {i} (example {e!r})") for i, (e, cell) in enumerate(cells)
            ]
        else:
            parsed = [[label] for label in frame[column.removesuffix("_aliases")]]
        frame[column] = pd.Series(parsed, index=frame.index, dtype=object)
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

    Args:
        frame: one query a row, with the columns text, e1, e2, e3 at least; example and aliases are checked if there.
        name: what to call it in messages. For "published/..." the last two checks are left out: such a set stays as its
            authors made it, and some of its queries do give their answer away.

    Raises:
        ValueError: a missing column, no rows, an empty text or label, an example named twice, aliases that are no list,
            an empty one, or contain an empty text; an e1 that doesn't stand in its text; an answer, in any of its
            forms, that stands in the text as whole words or is the bridge. Case and accents make no difference there,
            but forms of up to four capitals (US) are looked for as they are.
    """
    _check_two_hop_columns(frame, name=name)
    place = _places(frame)
    _check_texts(frame, TWO_HOP_NEEDED, name=name)
    _check_names(frame, ("example", "group"), name=name)
    _check_examples(frame, name=name)
    for column in TWO_HOP_ALIASES:
        for row, aliases in enumerate(frame[column] if column in frame else []):
            if not isinstance(aliases, list):
                raise ValueError(
                    f"{name}: {column} in {place(row)} is {aliases!r}, not a list: as_two_hop(table) reads JSON"
                )
            if not aliases:
                raise ValueError(f"{name}: {column} in {place(row)} is an empty list: name at least the label itself")
            for alias in aliases:
                if require.why_no_text(alias):
                    raise ValueError(f"{name}: {column} in {place(row)} contains {alias!r}: every alias is a text")
    for row, (e1, text) in enumerate(zip(frame["e1"], frame["text"], strict=True)):
        if e1 not in text:
            raise ValueError(
                f"{name}: e1 {e1!r} of {place(row)} was looked for in {text!r} and isn't there: e1 must stand in the text "
                "letter by letter"
            )
    if name.startswith("published/"):
        return
    for row, text in enumerate(frame["text"]):
        bridges, answers = _forms_of(frame, "e2", row), _forms_of(frame, "e3", row)
        for answer in answers:
            if _stands_in(answer, text):
                raise ValueError(
                    f"{name}: the answer {answer!r} of {place(row)} stands in its own text {text!r}: drop the row, or the "
                    "alias"
                )
        if same := {_fold(bridge) for bridge in bridges} & {_fold(answer) for answer in answers}:
            raise ValueError(
                f"{name}: bridge {bridges[0]!r} and answer {answers[0]!r} of {place(row)} share the name "
                f"{sorted(same)[0]!r}: then one hop is enough; drop the row, or the alias"
            )


def _check_two_hop_columns(frame: pd.DataFrame, *, name: str) -> None:
    _check_needed(frame, TWO_HOP_NEEDED, what="two-hop queries", one="query", name=name)


def _json_list(cell: object, where: str) -> object:
    """A JSON list in a text; anything that is no text comes back as it is, to be checked."""
    if not isinstance(cell, str):
        return cell
    try:
        parsed = json.loads(cell)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{where} is {cell!r}, neither a list nor a JSON list such as ["New Delhi", "Delhi"]'
        ) from error
    return parsed


def _forms_of(frame: pd.DataFrame, entity: str, row: int) -> list[str]:
    """Label and aliases."""
    aliases: Sequence[str] = frame[f"{entity}_aliases"].iloc[row] if f"{entity}_aliases" in frame else []
    return [frame[entity].iloc[row], *aliases]


def _is_short_capitals(name: str) -> bool:
    return len(name) <= 4 and name.isalpha() and name.isupper()


@cache
def _fold(text: str) -> str:
    """Without accents and capitals."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return text.casefold()


def _stands_in(name: str, text: str) -> bool:
    """Whether the name stands in the text and no letter or digit continues it on either side."""
    if not _is_short_capitals(name):  # US is not us
        name, text = _fold(name), _fold(text)
    start = text.find(name)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(name) : start + len(name) + 1]
        if not (before.isalnum() and name[0].isalnum()) and not (after.isalnum() and name[-1].isalnum()):
            return True
        start = text.find(name, start + 1)
    return False


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
        lists as lists. Where they were missing:

        - `example`: numbered.
        - `group`: the example, so that a split takes each row for itself.
        - `aliases`: the answer alone, without the space; only where there are answers.

    Raises:
        ValueError: what `check_prompts` refuses, and lists that are neither lists nor JSON lists.

    >>> mine = pd.DataFrame({"prompt": ["2 + 2 = ", "2 + 2 + 3 = "], "level": [2, 3], "answer": ["4", "7"]})
    >>> as_prompts(mine).loc[1, ["example", "group", "aliases"]].tolist()
    ['prompt-0002', 'prompt-0002', ['7']]
    """
    _check_needed(frame, PROMPT_NEEDED, what="prompts", one="prompt", name=name)
    frame = frame.copy()
    if "example" not in frame:
        frame["example"] = _number("prompt", len(frame))
    if "group" not in frame:
        frame["group"] = frame["example"]
    for column in PROMPT_LISTS:
        if column in frame:
            cells = zip(frame["example"], frame[column], strict=True)
            parsed = [
                _json_list(cell, f"{name}: {column} in row {i} (example {e!r})") for i, (e, cell) in enumerate(cells)
            ]
            frame[column] = pd.Series(parsed, index=frame.index, dtype=object)
    check_prompts(frame, name=name)
    if "answer" in frame and "aliases" not in frame:
        frame["aliases"] = pd.Series([[answer.strip()] for answer in frame["answer"]], index=frame.index, dtype=object)
    first = ["example", "group", "level", "prompt"]
    return frame[first + [column for column in frame.columns if column not in first]]


def check_prompts(frame: pd.DataFrame, *, name: str) -> None:
    """Refuse prompts that no experiment can use.

    Args:
        frame: one prompt a row, with the columns prompt and level at least; the others that `as_prompts` names are checked
            where they are there.
        name: what to call it in messages.

    Raises:
        ValueError: a missing column, no rows, an empty prompt, answer, solution or group, a level that is no whole number
            from 1 on, an example named twice, lists that are none or contain anything but texts, hops that are not as
            many as the level.
    """
    _check_needed(frame, PROMPT_NEEDED, what="prompts", one="prompt", name=name)
    place = _places(frame)
    _check_texts(frame, ("prompt", "answer", "solution", "group"), name=name)
    for row, level in enumerate(frame["level"].tolist()):
        if not isinstance(level, Integral) or isinstance(level, bool) or level < 1:
            raise ValueError(
                f"{name}: level {level!r} in {place(row)}: levels are whole numbers from 1 on (steps, hops, terms), of an "
                "integer type; frame['level'].astype(int) turns 2.0 into 2, and 1 for all rows will do where there are none"
            )
    _check_names(frame, ("example",), name=name)
    _check_examples(frame, name=name)
    for column in ("aliases", "hop_prompts", "hop_answers"):
        for row, cell in enumerate(frame[column] if column in frame else []):
            lists = cell if column == "hop_answers" and isinstance(cell, list) else [cell]
            if not all(isinstance(one, list) and one for one in lists):
                raise ValueError(
                    f"{name}: {column} in {place(row)} is {cell!r}, not a list{' of lists' * (lists is cell)}, or an "
                    "empty one: as_prompts(table) reads JSON lists; leave the column out if there is nothing to say"
                )
            if wrong := [text for one in lists for text in one if require.why_no_text(text)]:
                raise ValueError(f"{name}: {column} in {place(row)} contains {wrong[0]!r}: each is a text, not empty")
            if column != "aliases" and len(cell) != frame["level"].iloc[row]:
                raise ValueError(
                    f"{name}: {column} in {place(row)} has {len(cell)} hops, its level is {frame['level'].iloc[row]}: one "
                    "entry a hop is needed"
                )


def as_prose(frame: pd.DataFrame, *, name: str = "your table") -> pd.DataFrame:
    """Plain text with what can be filled in filled in, checked by `check_prose`.

    Args:
        frame: one document a row. Needed: `text`.
        name: what to call it in messages.

    Returns:
        A new table with `example`, `group`, `genre`, `text` first and all other columns of `frame` behind them. Where they
        were missing: `example` is numbered, `group` is the example (a split takes each document for itself), `genre` is
        "own".

    Raises:
        ValueError: what `check_prose` refuses.
    """
    _check_needed(frame, ("text",), what="documents", one="document", name=name)
    frame = frame.copy()
    if "example" not in frame:
        frame["example"] = _number("document", len(frame))
    if "group" not in frame:
        frame["group"] = frame["example"]
    if "genre" not in frame:
        frame["genre"] = "own"
    check_prose(frame, name=name)
    first = ["example", "group", "genre", "text"]
    return frame[first + [column for column in frame.columns if column not in first]]


def check_prose(frame: pd.DataFrame, *, name: str) -> None:
    """Refuse documents that can't be split and read.

    Raises:
        ValueError: no column text, no rows, an empty text, group or genre, an example named twice, a text that stands in
            two groups, so that a split could put it on both sides.
    """
    _check_needed(frame, ("text",), what="documents", one="document", name=name)
    _check_texts(frame, ("text", "group", "genre"), name=name)
    _check_names(frame, ("example",), name=name)
    _check_examples(frame, name=name)
    if "group" in frame:
        mixed = frame.groupby("text", sort=False)["group"].nunique() > 1
        if mixed.any():
            raise ValueError(
                f"{name}: the text {mixed.index[mixed][0][:80]!r} stands in several groups, so that a split could put it on "
                "both sides: drop one, or give both the same group"
            )


def check_texts(frame: pd.DataFrame, columns: tuple[str, ...], *, name: str) -> None:
    """Refuse rows whose texts in these columns are none, or whose example or group (if there) has no name of its own.

    Raises:
        ValueError: an empty text or something else, an example named twice, an example or a group that is missing or no
            name, an index of texts.
    """
    _check_index(frame, name=name)
    _check_texts(frame, columns, name=name)
    _check_names(frame, ("example", "group"), name=name)
    _check_examples(frame, name=name)


def _check_needed(frame: pd.DataFrame, needed: tuple[str, ...], *, what: str, one: str, name: str) -> None:
    missing = [column for column in needed if column not in frame]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(map(repr, missing))}: {what} need {', '.join(needed)}; it has "
            f"{', '.join(map(str, frame.columns))}"
        )
    if frame.empty:
        raise ValueError(f"{name} has no rows: at least one {one} is needed")
    _check_index(frame, name=name)


def _places(frame: pd.DataFrame) -> Callable[[int], str]:
    """How messages call a row."""
    if "example" not in frame:
        return lambda row: f"row {row}"
    return lambda row: f"row {row} (example {frame['example'].iloc[row]!r})"


def _check_texts(frame: pd.DataFrame, columns: tuple[str, ...], *, name: str) -> None:
    place = _places(frame)
    for column in columns:
        for row, value in enumerate(frame[column] if column in frame else []):
            why = require.why_no_text(value)
            if why == "not a text":
                raise ValueError(
                    f"{name}: {column} in {place(row)} is {value!r}, not a text: frame[{column!r}].astype(str) makes texts "
                    f"of numbers, pd.read_csv(path, dtype={{{column!r}: str}}, keep_default_na=False) reads them as they "
                    "are written; drop the row if there is nothing"
                )
            if why:
                shown = "" if why == "empty" else f", {why}"
                raise ValueError(
                    f"{name}: {column} in {place(row)} is {value!r}{shown}: give it a text or drop the row"
                )


def _check_names(frame: pd.DataFrame, columns: tuple[str, ...], *, name: str) -> None:
    """Examples and groups: texts or whole numbers. A 7.0 was made of 007 or of 7, a nan of nothing or of "NA"."""
    for column in columns:
        for row, value in enumerate(frame[column] if column in frame else []):
            if require.why_no_text(value) and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise ValueError(
                    f"{name}: {column} in row {row} is {value!r}, neither a text nor a whole number: "
                    f"pd.read_csv(path, dtype={{{column!r}: str}}, keep_default_na=False) reads what is written"
                )


def _check_index(frame: pd.DataFrame, *, name: str) -> None:
    """pandas takes the first cells for an index where rows have a comma more than the header: the text is cut there."""
    if not pd.api.types.is_integer_dtype(frame.index.dtype):
        raise ValueError(
            f"{name}: its index holds {frame.index[0]!r}, as if a comma in a CSV's texts had cut them: quote such texts and "
            "read the file with pd.read_csv(path, index_col=False), or .reset_index() if the index is yours"
        )


def _check_examples(frame: pd.DataFrame, *, name: str) -> None:
    if "example" in frame and (twice := frame["example"].astype(str).duplicated()).any():
        example = frame["example"][twice].iloc[0]
        raise ValueError(f"{name}: example {example!r} occurs twice: every row needs a name of its own")


def _finish(frame: pd.DataFrame, card: dict[str, str | int]) -> pd.DataFrame:
    """Check the table, by itself and against its card, and attach the card."""
    check_concept_data(frame, name=str(card["name"]))
    for key, found in (
        ("n", len(frame)),
        ("positive", int(frame["label"].sum())),
        ("groups", frame["group"].nunique()),
    ):
        if card[key] != found:
            raise ValueError(
                f"{card['name']}: the card says {key} = {card[key]}, the file has {found}: build the set again"
            )
    frame.attrs["card"] = card
    return frame


def _check_columns(frame: pd.DataFrame, needed: tuple[str, ...] | list[str], *, name: str) -> None:
    missing = [column for column in needed if column not in frame]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, frame.columns))}"
        )


def _number(name: str, n: int) -> list[str]:
    return [f"{name}-{i:04d}" for i in range(1, n + 1)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
