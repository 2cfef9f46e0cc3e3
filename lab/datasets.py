"""Data: labelled statements and two-hop queries from `data/`, from the authors of published sets, or of a user's own.

    lab.datasets.names()                          # what there is
    lab.datasets.load("cities")                   # ships with the kit
    lab.datasets.load("published/cities")         # downloaded once from its authors
    lab.datasets.load("published/cities", source="~/Downloads/CD/dataset")   # or read from a folder
    lab.datasets.read("mine.csv", text="sentence", label="is_true", group="topic")

Statements (concept data) come as a DataFrame of one statement a row, with the columns of `COLUMNS` first:

- `example` (str): unique, e.g. "cities-0001".
- `text` (str): the bare statement or question, without instruction.
- `label` (int): 1 = true, positive, yes; 0 = the other class.
- `group` (str): statements that share a subject; a split never separates them.
- `template` (str): which wording.
- `difficulty` (int): 1, 2, ...; the card says what it means.

`frame.attrs["card"]` is a dict: the card's front matter (name, domain, title, n, positive, groups, classes,
instruction, instruction_place, licence, source, sha256) and its prose under "text".

    lab.datasets.names(kind="two_hop")
    lab.datasets.load("two_hop")                  # "The capital of the country that contains the city of Mumbai is"
    lab.datasets.load("published/two_hop")        # the file of Biran et al., downloaded once
    lab.datasets.as_two_hop(pd.read_csv("mine.csv"))

Two-hop queries come as a DataFrame of one query a row. `as_two_hop` says which columns there are and which of them a
table needs; the card of `two_hop` says what they hold.

    lab.datasets.names(kind="prompts")            # prompts of graded difficulty: "5 + 7 + 5 = "
    lab.datasets.load("chains")
    lab.datasets.load("published/gsm8k")          # downloaded once
    lab.datasets.as_prompts(pd.read_csv("mine.csv"))
    lab.datasets.load("prose")                    # plain text, for losses, norms and maps

Prompts come one a row, with their `level` (steps, hops, terms), prose one document a row: see `as_prompts`, `as_prose`.
"""

import ast
import errno
import hashlib
import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from pathlib import Path

import pandas as pd
import platformdirs
import pooch
import requests

COLUMNS = ("example", "text", "label", "group", "template", "difficulty")


TWO_HOP_NEEDED = ("text", "e1", "e2", "e3")
TWO_HOP_ALIASES = ("e1_aliases", "e2_aliases", "e3_aliases")
TWO_HOP_SETS = ("two_hop",)

PROMPT_NEEDED = ("prompt", "level")
PROMPT_LISTS = ("aliases", "hop_prompts", "hop_answers", "relations", "entities", "partial_sums")  # JSON in a CSV
PROMPT_SETS = ("word_problems", "sums", "chains")
PROSE_SETS = ("prose",)
KINDS = ("concept", "two_hop", "prompts", "prose")


def names(kind: str = "concept") -> list[str]:
    """Names that `load` knows: the sets in the data folder, then the published ones.

    Args:
        kind: "concept" (labelled statements), "two_hop" (queries that take two facts), "prompts" (of graded difficulty)
            or "prose" (plain text).
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: there are 'concept' and 'two_hop', 'prompts' and 'prose'")
    ours = sorted(path.stem for path in _data_folder().glob("*.csv"))
    if kind == "two_hop":
        return [name for name in ours if name in TWO_HOP_SETS] + [PUBLISHED_TWO_HOP.name]
    if kind == "prompts":
        return [name for name in ours if name in PROMPT_SETS] + sorted(PUBLISHED_PROMPTS)
    if kind == "prose":
        return [name for name in ours if name in PROSE_SETS]
    return [name for name in ours if name not in TWO_HOP_SETS + PROMPT_SETS + PROSE_SETS] + sorted(PUBLISHED)


def load(name: str, *, source: str | Path | None = None) -> pd.DataFrame:
    """Statements of one concept, with their labels, groups and card; or two-hop queries, graded prompts, prose.

    Args:
        name: one of `names()`, or of `names(kind=...)` for the other kinds. "published/..." is downloaded from its
            authors on first use and kept in the user's cache (the environment variable LAB_CACHE moves it); nothing of
            it ships with the kit.
        source: for published sets only, instead of a download: a folder that holds the authors' file under its own
            name. Its checksum is verified in the same way.

    Returns:
        DataFrame with the columns in `COLUMNS`, then columns of its own; for two-hop queries, the columns that
        `as_two_hop` describes, for prompts and prose those of `as_prompts` and `as_prose`; lists as lists.
        `.attrs["card"]` is its card.

    Raises:
        ValueError: unknown name; a file whose checksum, columns, classes or counts are not those of its card.
        ConnectionError: a download that could not be had. OSError: no room for it.
    """
    if name in PUBLISHED:
        return load_published(PUBLISHED[name], source=source)
    if name == PUBLISHED_TWO_HOP.name:
        return load_published_two_hop(source=source)
    if name in PUBLISHED_PROMPTS:
        return load_published_prompts(PUBLISHED_PROMPTS[name], source=source)
    if name not in (known := [*names(), *names("prompts"), *names("prose"), *names("two_hop")]):
        raise ValueError(
            f"no data set {name!r}. There are: {', '.join(known)}. For a CSV of your own: lab.datasets.read(path)"
        )
    if source is not None:
        raise ValueError(f"source= is for published sets; {name!r} ships with the kit: call load({name!r}) without it")
    path = _data_folder() / f"{name}.csv"
    card = _read_card(path.with_suffix(".md"))
    found = _sha256(path)
    if found != card["sha256"]:
        raise ValueError(
            f"{path.name} has SHA-256 {found}, its card says {card['sha256']}: the file was changed. "
            f"Restore it, or build it again (data/build), or read your own version with lab.datasets.read(path)"
        )
    if name in TWO_HOP_SETS:
        frame = pd.read_csv(path, keep_default_na=False, na_values={"e2_popularity": [""]})  # people have none
        return _with_card(as_two_hop(frame, name=name), card)
    if name in PROMPT_SETS + PROSE_SETS:
        frame = pd.read_csv(path, keep_default_na=False, dtype={"answer": str})  # answers are texts, "20" among them
        return _with_card((as_prompts if name in PROMPT_SETS else as_prose)(frame, name=name), card)
    frame = pd.read_csv(path, dtype={"example": str, "text": str, "group": str, "template": str}, keep_default_na=False)
    _check_columns(frame, COLUMNS, name=name)
    return _finish(frame, card)


def published_curves() -> pd.DataFrame:
    """Accuracy by layer that Jin et al. (arXiv 2404.07066) plotted, where the values could be recovered: 18 curves.

    Columns model, dataset, layer (1..d), relative_depth (layer / d), accuracy. `.attrs["source"]` names the source.
    """
    values = _published_values()
    frames = []
    for pair, curve in values["accuracy"].items():
        model, dataset = pair.split("|")
        layers = range(1, len(curve) + 1)
        frames.append(pd.DataFrame({"model": model, "dataset": dataset, "layer": layers, "accuracy": curve}))
        frames[-1]["relative_depth"] = frames[-1].layer / len(curve)
    table = pd.concat(frames, ignore_index=True)
    table.attrs["source"] = values["source"]
    return table


def published_points() -> pd.DataFrame:
    """Converging point (a layer, and a fraction of depth) and peak accuracy of 54 published (model, data set) pairs."""
    values = _published_values()
    rows = [(*pair.split("|"), *row.values()) for pair, row in values["pairs"].items()]
    table = pd.DataFrame(rows, columns=["model", "dataset", "converge_layer", "layers", "peak"])
    table["converging_point"] = table.converge_layer / table.layers
    table.attrs["source"] = values["source"]
    return table


def _published_values() -> dict:
    return json.loads((_data_folder() / "published_concept_depth.json").read_text(encoding="utf-8"))


def read(
    path: str | Path, *, text: str = "text", label: str = "label", group: str | None = None, template: str | None = None
) -> pd.DataFrame:
    """A user's own CSV (UTF-8, with a header), checked like the kit's sets and brought to the same columns.

    Args:
        path: the CSV file.
        text, label: names of its columns with the statements and their labels (0 or 1).
        group: column of what statements share and a split must not separate; None: each text is its own group.
        template: column that names the wording; None: all "own".

    Returns:
        DataFrame as from `load`; columns not named here are kept behind the fixed ones.

    Raises:
        ValueError: no such file or column, or what `check_concept_data` refuses.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"no file {path}: pass the path of a CSV with the columns {text!r} and {label!r}")
    frame = pd.read_csv(path, keep_default_na=False)
    _check_columns(frame, [column for column in (text, label, group, template) if column is not None], name=path.name)
    fixed = pd.DataFrame(
        {
            "example": frame["example"].astype(str) if "example" in frame else _number(path.stem, len(frame)),
            "text": frame[text].astype(str),
            "label": frame[label].map(lambda value: int(value) if str(value) in ("0", "1") else value),
            "group": frame[text if group is None else group].astype(str),
            "template": "own" if template is None else frame[template].astype(str),
            "difficulty": frame.get("difficulty", 1),
        }
    )
    rest = [column for column in frame.columns if column not in {*COLUMNS, text, label, group, template}]
    frame = pd.concat([fixed, frame[rest]], axis=1)
    check_concept_data(frame, name=path.name)
    frame["label"] = frame["label"].astype(int)
    card = {
        "name": path.stem,
        "domain": "own",
        "title": path.stem,
        "n": len(frame),
        "positive": int(frame["label"].sum()),
        "groups": frame["group"].nunique(),
        "classes": "0, 1",
        "instruction": "",
        "instruction_place": "before",
        "licence": "not stated",
        "source": path.name,
        "sha256": _sha256(path),
        "text": "",
    }
    return _finish(frame, card)


def check_concept_data(frame: pd.DataFrame, *, name: str) -> None:
    """Refuse a table that no probe can be trained and tested on.

    Args:
        frame: statements, with at least the columns in `COLUMNS`.
        name: what to call it in messages.

    Raises:
        ValueError: a missing column, no rows, an empty text, a label other than 0 or 1, an example named twice, one
            class only, a row without a group, equal texts with different labels or groups, or groups that can't be split
            so that both sides have both classes.
    """
    _check_columns(frame, COLUMNS, name=name)
    if frame.empty:
        raise ValueError(f"{name} has no rows: at least two statements of each class are needed")
    empty = frame["text"].isna() | (frame["text"].astype(str).str.strip() == "")
    if empty.any():
        row = int(empty.to_numpy().argmax())
        raise ValueError(
            f"{name}: the text in row {row} (example {frame['example'].iloc[row]!r}) is empty: fill it or drop the row"
        )
    strange = ~frame["label"].isin([0, 1])
    if strange.any():
        row = int(strange.to_numpy().argmax())
        raise ValueError(
            f"{name}: label {frame['label'].iloc[row]!r} in row {row} (example {frame['example'].iloc[row]!r}): "
            f"labels are 0 or 1 (1 = true, positive, yes)"
        )
    twice = frame["example"].duplicated()
    if twice.any():
        raise ValueError(
            f"{name}: example {frame['example'][twice].iloc[0]!r} occurs twice: every row needs a name of its own"
        )
    nameless = frame["group"].isna() | (frame["group"].astype(str).str.strip() == "")
    if nameless.any():
        row = int(nameless.to_numpy().argmax())
        raise ValueError(
            f"{name}: row {row} (example {frame['example'].iloc[row]!r}) has no group: give it one, its own name if it "
            "shares its subject with no other"
        )
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
    examples = frame["example"] if "example" in frame else pd.Series(range(len(frame)), index=frame.index)

    def place(row: int) -> str:
        return f"row {row} (example {examples.iloc[row]!r})"

    for column in TWO_HOP_NEEDED:
        for row, value in enumerate(frame[column]):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name}: {column} in {place(row)} is {value!r}: give it a text or drop the row")
    if (twice := examples.duplicated()).any():
        raise ValueError(f"{name}: example {examples[twice].iloc[0]!r} occurs twice: every row needs a name of its own")
    for column in TWO_HOP_ALIASES:
        for row, aliases in enumerate(frame[column] if column in frame else []):
            if not isinstance(aliases, list):
                raise ValueError(
                    f"{name}: {column} in {place(row)} is {aliases!r}, not a list: as_two_hop(table) reads JSON"
                )
            if not aliases:
                raise ValueError(f"{name}: {column} in {place(row)} is an empty list: name at least the label itself")
            for alias in aliases:
                if not isinstance(alias, str) or not alias.strip():
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
    _check_examples(frame, name=name)
    for column in ("aliases", "hop_prompts", "hop_answers"):
        for row, cell in enumerate(frame[column] if column in frame else []):
            lists = cell if column == "hop_answers" and isinstance(cell, list) else [cell]
            if not all(isinstance(one, list) and one for one in lists):
                raise ValueError(
                    f"{name}: {column} in {place(row)} is {cell!r}, not a list{' of lists' * (lists is cell)}, or an "
                    "empty one: as_prompts(table) reads JSON lists; leave the column out if there is nothing to say"
                )
            if wrong := [text for one in lists for text in one if not isinstance(text, str) or not text.strip()]:
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
    _check_examples(frame, name=name)
    if "group" in frame:
        mixed = frame.groupby("text", sort=False)["group"].nunique() > 1
        if mixed.any():
            raise ValueError(
                f"{name}: the text {mixed.index[mixed][0][:80]!r} stands in several groups, so that a split could put it on "
                "both sides: drop one, or give both the same group"
            )


def _check_needed(frame: pd.DataFrame, needed: tuple[str, ...], *, what: str, one: str, name: str) -> None:
    missing = [column for column in needed if column not in frame]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(map(repr, missing))}: {what} need {', '.join(needed)}; it has "
            f"{', '.join(map(str, frame.columns))}"
        )
    if frame.empty:
        raise ValueError(f"{name} has no rows: at least one {one} is needed")


def _places(frame: pd.DataFrame) -> Callable[[int], str]:
    """How messages call a row."""
    if "example" not in frame:
        return lambda row: f"row {row}"
    return lambda row: f"row {row} (example {frame['example'].iloc[row]!r})"


def _check_texts(frame: pd.DataFrame, columns: tuple[str, ...], *, name: str) -> None:
    place = _places(frame)
    for column in columns:
        for row, value in enumerate(frame[column] if column in frame else []):
            if not isinstance(value, str):
                raise ValueError(
                    f"{name}: {column} in {place(row)} is {value!r}, not a text: frame[{column!r}].astype(str) makes texts "
                    "of numbers; drop the row if there is nothing"
                )
            if not value.strip():
                raise ValueError(f"{name}: {column} in {place(row)} is {value!r}: give it a text or drop the row")


def _check_examples(frame: pd.DataFrame, *, name: str) -> None:
    if "example" in frame and (twice := frame["example"].duplicated()).any():
        example = frame["example"][twice].iloc[0]
        raise ValueError(f"{name}: example {example!r} occurs twice: every row needs a name of its own")


def cache_folder() -> Path:
    """Where downloads are kept: LAB_CACHE, or the user's cache folder for the kit; "datasets" in it."""
    root = os.environ.get("LAB_CACHE")
    return (Path(root).expanduser() if root else platformdirs.user_cache_path("depth-lab")) / "datasets"


# ---------------------------------------------------------------------------------------------------------------------
# Published sets: Jin et al., "Exploring Concept Depth" (arXiv 2404.07066), code and data at github.com/Luckfort/CD.

AUTHORS = "https://raw.githubusercontent.com/Luckfort/CD/4902d58365f7cdc603cfe71c0b627dfbcd1a1125/dataset/"
INSTRUCTION_RUN = "According to the sentence, judge the emotion is Positive or Negative."
NOTE = f"""Rows, order and wording follow `dataset.py` of the authors' repository (Luckfort/CD at 4902d58).

- `label` is 1 for true, positive, yes, as everywhere in this kit. `published_label` is the class number of the
  authors' `main.py`, which numbers classes by the order in which they are read. Their F1 counts `published_label` 1
  as positive.
- Rows stand in the authors' order (first all of `published_label` 0): their one split, `train_test_split(test_size=0.4,
  random_state=42)`, depends on it.
- `main.py` overwrites every set's instruction with "{INSTRUCTION_RUN}" (`instruction_run` in this card);
  `instruction` is the one that `dataset.py` wrote for the set, `instruction_place` holds for both.
- The file carries no licence: it is fetched from its authors or read from your copy, and is not part of the kit.
"""


@dataclass(frozen=True)
class Published:
    """One published set: where its file is, how it is verified, which rows of it were used."""

    name: str
    domain: str
    title: str
    url: str
    checksum: str  # "sha256:<hex>", or "git:<hex>": the id git gives the file (SHA-1 of its length and bytes)
    rows: Callable[[Path], pd.DataFrame]  # file -> text, label, published_label, and group or columns of its own
    n: int
    positive: int
    classes: str  # name of label 0, name of label 1
    instruction: str
    instruction_place: str
    reasoning_cue: str = ""  # follows at the very end
    note: str = ""


def load_published(published: Published, *, source: str | Path | None = None) -> pd.DataFrame:
    """Rows of a published set, from a folder or from its authors; checksum, rows and class counts are verified."""
    path = _verified_file(published.url, published.checksum, source)
    rows = published.rows(path).reset_index(drop=True)
    counted = (len(rows), int(rows["label"].sum()))
    if counted != (published.n, published.positive):
        raise ValueError(
            f"{published.name}: {counted[0]} rows, {counted[1]} of label 1, where {published.n} and "
            f"{published.positive} are expected: please report this with the versions of pandas and of this kit"
        )
    fixed = pd.DataFrame(
        {
            "example": _number(published.name.removeprefix("published/"), len(rows)),
            "text": rows["text"],
            "label": rows["label"].astype(int),
            "group": rows["group"] if "group" in rows else rows["text"],
            "template": "published",
            "difficulty": 1,
        }
    )
    frame = pd.concat([fixed, rows[[column for column in rows.columns if column not in COLUMNS]]], axis=1)
    card = {
        "name": published.name,
        "domain": published.domain,
        "title": published.title,
        "n": published.n,
        "positive": published.positive,
        "groups": frame["group"].nunique(),
        "classes": published.classes,
        "instruction": published.instruction,
        "instruction_place": published.instruction_place,
        "instruction_run": INSTRUCTION_RUN,
        "reasoning_cue": published.reasoning_cue,
        "licence": "none stated; fetched from its authors, not part of this kit",
        "source": published.url,
        "sha256": _sha256(path),
        "text": NOTE + (f"- {published.note}\n" if published.note else ""),
    }
    return _finish(frame, card)


def _verified_file(url: str, checksum: str, source: str | Path | None, *, subfolder: str = "") -> Path:
    """The file of this address: from the cache (`subfolder` in it) or its authors, or from the folder `source`."""
    file_name = url.rsplit("/", 1)[1]
    if source is None:
        return _fetch(url, file_name, checksum, cache_folder() / subfolder)
    path = Path(source).expanduser() / file_name
    if not path.is_file():
        raise ValueError(f"no file {file_name} in {path.parent}: source= is the folder that holds the file of {url}")
    if (found := _checksum(path, checksum)) != checksum:
        raise ValueError(f"{path} is not the published file: its checksum is {found}, not {checksum}")
    return path


def _fetch(url: str, file_name: str, checksum: str, folder: Path) -> Path:
    """The verified file in this folder, downloaded if it isn't there. A file that fails the check is deleted."""
    by_hand = f"download it elsewhere, put it in a folder under the name {file_name} and pass source=<that folder>"
    corrupt = (
        f"{url} arrived corrupt or was changed: it doesn't have {checksum}. Nothing was kept; try again, or {by_hand}"
    )
    # pooch writes aside and renames. It knows no git ids: those are verified below.
    known = checksum if checksum.startswith("sha256:") else None
    try:
        path = Path(pooch.retrieve(url, known, fname=file_name, path=folder, progressbar=True))
    except requests.exceptions.HTTPError as error:
        raise ConnectionError(f"{url} could not be had ({error}). Try again, or {by_hand}") from error
    except requests.exceptions.RequestException as error:
        raise ConnectionError(
            f"{url} could not be reached ({type(error).__name__}): are you offline? Try again, or {by_hand}"
        ) from error
    except ValueError as error:  # pooch: the checksum is wrong, its partial file is removed
        raise ValueError(corrupt) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"no room in {folder} for {file_name}: free some, or set LAB_CACHE to a folder elsewhere. Nothing was kept",
        ) from error
    if _checksum(path, checksum) != checksum:
        path.unlink()
        raise ValueError(corrupt)
    return path


def _two_lists(zero: pd.DataFrame, one: pd.DataFrame, *, label_of_zero: int) -> pd.DataFrame:
    """The authors' two lists, one after the other: `published_label` 0 and 1."""
    return pd.concat(
        [zero.assign(label=label_of_zero, published_label=0), one.assign(label=1 - label_of_zero, published_label=1)],
        ignore_index=True,
    )


def _cities(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    rows = table.rename(columns={"statement": "text"}).assign(group=table["city"])
    return _two_lists(rows[rows["label"] == 1], rows[rows["label"] == 0], label_of_zero=1)


def _common_claim(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    rows = table[["examples", "agreement"]].rename(columns={"examples": "text"})
    return _two_lists(rows[table["label"] == "True"][:3000], rows[table["label"] == "False"][:3000], label_of_zero=1)


def _counterfact(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    rows = table.rename(columns={"statement": "text"}).assign(group=table["subject"])
    return _two_lists(rows[rows["label"] == 1][:2000], rows[rows["label"] == 0][:2000], label_of_zero=1)


def _stsa(path: Path) -> pd.DataFrame:
    with path.open(encoding="utf-8") as file:
        lines = [line.strip().split(" ", 1) for line in file]
    rows = pd.DataFrame({"text": [text for _, text in lines]})
    positive = pd.Series([digit != "0" for digit, _ in lines])
    return _two_lists(rows[~positive], rows[positive], label_of_zero=0)


def _hateeval(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, sep="\t")
    rows = table[["text"]]
    return _two_lists(rows[table["HS"] == 1][:3000], rows[table["HS"] != 1][:3000], label_of_zero=1)


def _sarcasm(path: Path) -> pd.DataFrame:
    with path.open(encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    rows = pd.DataFrame({"text": [entry["headline"] for entry in entries]})
    sarcastic = pd.Series([entry["is_sarcastic"] == 1 for entry in entries])
    return _two_lists(rows[sarcastic][:3000], rows[~sarcastic][:3000], label_of_zero=1)


def _strategyqa(path: Path) -> pd.DataFrame:
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    targets = [example["target"] for example in examples]
    rationales = [
        t[4:].strip() if t.startswith("Yes.") else t[3:].strip() if t.startswith("No.") else t for t in targets
    ]
    rows = pd.DataFrame({"text": [example["input"] for example in examples], "rationale": rationales})
    yes = pd.Series([example["target_scores"]["Yes"] == 1 for example in examples])
    return _two_lists(rows[yes], rows[~yes], label_of_zero=1)


def _coinflip(path: Path) -> pd.DataFrame:
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    rows = pd.DataFrame({"text": [example["question"] for example in examples]})
    yes = pd.Series([example["answer"] == "yes" for example in examples])
    return _two_lists(rows[yes], rows[~yes], label_of_zero=1)


def _imdb(path: Path) -> pd.DataFrame:
    """First 1,000 negative and positive reviews of the test half, in the order of the archive."""
    reviews: dict[str, list[str]] = {"neg": [], "pos": []}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            parts = member.name.split("/")
            if parts[:2] != ["aclImdb", "test"] or len(parts) != 4 or len(reviews.get(parts[2], range(1000))) >= 1000:
                continue
            file = archive.extractfile(member)
            assert file is not None, f"{member.name} is a regular file in this archive"
            reviews[parts[2]].append(file.read().decode("utf-8"))
            if all(len(texts) == 1000 for texts in reviews.values()):
                break
    return _two_lists(pd.DataFrame({"text": reviews["neg"]}), pd.DataFrame({"text": reviews["pos"]}), label_of_zero=0)


_TRUE_FALSE = {"domain": "factual", "classes": "false, true", "instruction_place": "before"}
_SENTIMENT = {"domain": "emotional", "classes": "negative, positive", "instruction_place": "after"}
PUBLISHED = {
    published.name: published
    for published in (
        Published(
            name="published/cities",
            title="Cities (Marks & Tegmark, as used by Jin et al.)",
            url=AUTHORS + "cities.csv",
            checksum="sha256:f2560a0c1758c69935b50125111b574b71896bb75930dd87b1d8c973c1fa086e",
            rows=_cities,
            n=1496,
            positive=748,
            instruction="Judge the statement is True or False.",
            **_TRUE_FALSE,
        ),
        Published(
            name="published/common_claim",
            title="CommonClaim",
            url=AUTHORS + "common_claim.csv",
            checksum="sha256:acc78556774ed0b5c3501bb4c254adebc692bab52cb5c6f39d91aad09cdf554f",
            rows=_common_claim,
            n=6000,
            positive=3000,
            instruction="Judge the statement is True or False.",
            note="The code takes the first 3,000 true and 3,000 false claims. Eight of the nine published curves are "
            "on all 16,384 claims instead (12,063 true), so 74 % is the majority rate there. Claims labelled Neither "
            "are left out by both.",
            **_TRUE_FALSE,
        ),
        Published(
            name="published/counterfact",
            title="CounterFact",
            url=AUTHORS + "counterfact.csv",
            checksum="sha256:5af51456d6dbd3a53d8e2ee6e4aadaca7eb02ff9136ad825866458e7283b5273",
            rows=_counterfact,
            n=4000,
            positive=2000,
            instruction="Judge the statement is true or false.",
            note="The true and the false statement about a subject differ in their last words only; a random split "
            "puts them on different sides. The group here is the subject.",
            **_TRUE_FALSE,
        ),
        Published(
            name="published/stsa",
            title="STSA movie reviews (SST-2 style)",
            url=AUTHORS + "stsa.binary.train",
            checksum="sha256:71c04bcc41291fa47454dd670df701b14ee9249156babeaac404cfe2c8d74338",
            rows=_stsa,
            n=6920,
            positive=3610,
            instruction="The sentence above is a movie review and reflects the writer's overall intention for this "
            "review. According to the sentence, judge whether the emotion is Positive or Negative.",
            **_SENTIMENT,
        ),
        Published(
            name="published/imdb",
            title="IMDb movie reviews (Maas et al.)",
            url="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
            checksum="sha256:c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
            rows=_imdb,
            n=2000,
            positive=1000,
            instruction="According to the movie review, judge whether it is Positive or Negative.",
            note="NOT VERIFIED: the code loads `imdb` from the Hugging Face hub, which lists the archive in its own "
            "order; this loader reads the archive of the set's authors in that order, without having been compared "
            "with the hub's rows.",
            **_SENTIMENT,
        ),
        Published(
            name="published/sarcasm",
            domain="emotional",
            title="Sarcasm headlines (Misra)",
            url=AUTHORS + "sarcasm.json",
            checksum="git:319c60f2f9349262bdd10b9fece92dffad1abe83",
            rows=_sarcasm,
            n=6000,
            positive=3000,
            classes="not sarcastic, sarcastic",
            instruction="Task: Detect sarcasm, help me identify whether this sentence is sarcastic.",
            instruction_place="before",
            reasoning_cue="Think carefully according to the sentence. Is there any sarcasm in this sentence? Please "
            "answer Yes or No.",
            note="The instruction goes on to explain what sarcasm is (left out here; `main.py` overwrites it "
            "anyway). It stands before the headline, without a space between them, and the reasoning cue after it. "
            "SHA-256 NOT PINNED: the file is pinned by its git id in the authors' repository, and its content had "
            "not been seen when this loader was written.",
        ),
        Published(
            name="published/hateeval",
            domain="emotional",
            title="HateEval tweets",
            url=AUTHORS + "hateeval.tsv",
            checksum="sha256:fdd34bf56f0afa744ee7484774d259d83a756033cd8049ded81bd55d2fcb1272",
            rows=_hateeval,
            n=6000,
            positive=3000,
            classes="not hate, hate",
            instruction="According to the comment, tell whether they present hate speech or not.",
            instruction_place="after",
            note="The texts are abusive tweets.",
        ),
        Published(
            name="published/strategyqa",
            domain="inferential",
            title="StrategyQA",
            url=AUTHORS + "StrategyQA_task.json",
            checksum="sha256:60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803",
            rows=_strategyqa,
            n=2290,
            positive=1071,
            classes="no, yes",
            instruction="Judge the question is true or false?",
            instruction_place="before",
            reasoning_cue="Let us think step by step...",
            note="The authors feed question, space, `rationale`: the gold reasoning that leads to the answer. `text` "
            "is the bare question. Their instruction goes on with a worked example (left out here; `main.py` "
            "overwrites it anyway); it stands before the question, without a space between them, and the reasoning "
            "cue after the rationale.",
        ),
        Published(
            name="published/coinflip",
            domain="inferential",
            title="Coin flips of four people",
            url=AUTHORS + "coin_flip.json",
            checksum="sha256:68cf201737a1463ef6bed5419622805a8934d92bff6a28a9dfbf83be3135ba5a",
            rows=_coinflip,
            n=500,
            positive=253,
            classes="no, yes",
            instruction="According to the flipping process above, determine if a coin remains heads up after it is "
            "either flipped or left unflipped by individuals. Therefore, the answer (Yes or No) is?",
            instruction_place="after",
            note="200 test items: one item is half a percent, so a published converging point moves with chance.",
        ),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Published two-hop queries: Biran et al., "Hopping Too Late" (arXiv 2406.12775), github.com/edenbiran/HoppingTooLate.


@dataclass(frozen=True)
class PublishedTwoHop:
    """The published two-hop file: where it is and how it is verified."""

    name: str
    url: str
    checksum: str  # as in `Published`


PUBLISHED_TWO_HOP = PublishedTwoHop(
    name="published/two_hop",
    url="https://raw.githubusercontent.com/edenbiran/HoppingTooLate/6c4b43e084a71a83df0bf2cb3a0c0f1b5d4be420/"
    "datasets/two_hop.csv",
    checksum="git:9d03129e0f9bcbd998ea7cf4ffdb25156caea1dd",
)
TWO_HOP_NOTE = """Rows, order and wording are the authors' (edenbiran/HoppingTooLate at 6c4b43e): 82,020 queries from Wikidata.

- `text` is their `source_prompt`, `e1`, `e2`, `e3` their labels, `r1`, `r2` their `r1_type`, `r2_type`; Wikidata's
  identifiers are in `e1_id`, `r1_id` and so on. Aliases begin with the label, which theirs don't hold.
- `first_hop`, `second_hop`, `entity_shortcut` and `relation_shortcut` are made as their `evaluate_dataset.py` makes
  them: small letters, and no " is" behind the relation shortcut, which is cut by four characters, inside a word where a
  template doesn't end in " of {}".
- Nothing was dropped or repaired: in some queries the answer stands in the prompt or is the bridge, some aliases are of
  one character, and some facts have several right answers of which one is listed.
- SHA-256 NOT PINNED: the file is pinned by its git id in the authors' repository, and its content had not been seen as
  a whole when this loader was written; 499 of its rows had.
- It is under the MIT licence, fetched from its authors, and not part of the kit.
"""


def load_published_two_hop(
    published: PublishedTwoHop = PUBLISHED_TWO_HOP, *, source: str | Path | None = None
) -> pd.DataFrame:
    """The published two-hop queries in the columns of `as_two_hop`, from a folder or from their authors.

    The checksum is the git id of the file (SHA-1 of its length and bytes); its SHA-256 isn't pinned. Every row is kept.

    Raises:
        ValueError: a file of another checksum, without the columns that are needed, or with aliases that aren't lists.
        ConnectionError: a download that could not be had. OSError: no room for it.
    """
    path = _verified_file(published.url, published.checksum, source)
    frame = published_two_hop_rows(path)
    frame.attrs["card"] = {
        "name": published.name,
        "kind": "two_hop",
        "title": "Hopping Too Late (Biran et al.)",
        "n": len(frame),
        "groups": frame["group"].nunique(),
        "pairs": int((~frame[["r1", "r2"]].duplicated()).sum()),
        "licence": "MIT; fetched from its authors, not part of this kit",
        "source": published.url,
        "sha256": _sha256(path),
        "text": TWO_HOP_NOTE,
    }
    return frame


def published_two_hop_rows(path: Path) -> pd.DataFrame:
    """A file in the published form, row by row, with this kit's columns first and columns that it adds behind them."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)  # "None" and "NA" may be names
    name = path.name
    entities = ("e1", "e2", "e3")
    theirs = {
        **{f"{entity}_label": entity for entity in entities},
        **{f"{relation}_type": relation for relation in ("r1", "r2")},
        **{part: f"{part}_id" for part in ("e1", "r1", "e2", "r2", "e3")},
        "source_prompt": "text",
        "id": "example",
    }
    alike = [
        "r1_template",
        "r2_template",
        *(f"{e}_{what}" for e in entities for what in ("type", "popularity", "aliases")),
    ]
    _check_columns(table, [*theirs, *alike], name=name)
    frame = table.rename(columns=theirs)
    lists: dict[str, list[str]] = {}
    for column in TWO_HOP_ALIASES:
        for row, written in enumerate(frame[column]):
            if written not in lists:
                lists[written] = _python_list(
                    written, f"{name}: {column} in row {row} (id {frame['example'].iloc[row]})"
                )
        labels = frame[column.removesuffix("_aliases")]
        forms = [list(dict.fromkeys([e, *lists[written]])) for e, written in zip(labels, frame[column], strict=True)]
        frame[column] = pd.Series(forms, index=frame.index, dtype=object)
    for entity in entities:
        frame[f"{entity}_popularity"] = pd.to_numeric(frame[f"{entity}_popularity"])
    first, second = frame["r1_template"], frame["r2_template"]
    columns = {column: list(frame[column]) for column in entities}
    frame["first_hop"] = [f"{r1.format(e1)} is" for r1, e1 in zip(first, columns["e1"], strict=True)]
    frame["second_hop"] = [f"{r2.format(e2)} is" for r2, e2 in zip(second, columns["e2"], strict=True)]
    frame["entity_shortcut"] = [f"{r2.format(e1)} is" for r2, e1 in zip(second, columns["e1"], strict=True)]
    frame["relation_shortcut"] = [r2.format(r1.format(""))[:-4] for r1, r2 in zip(first, second, strict=True)]
    frame["example"] = "published_two_hop-" + frame["example"]
    frame["group"] = frame["e2"]
    fixed = [
        *("example", "text", *entities, *TWO_HOP_ALIASES, "e1_type", "e2_type", "e3_type"),
        *("r1", "r2", "r1_template", "r2_template"),
        *("first_hop", "second_hop", "entity_shortcut", "relation_shortcut", "group"),
        *(f"{entity}_popularity" for entity in entities),
    ]
    rest = [column for column in frame.columns if column not in fixed and not column.startswith("Unnamed")]
    return as_two_hop(frame[fixed + rest], name=PUBLISHED_TWO_HOP.name)


def _python_list(written: str, where: str) -> list[str]:
    """A list of texts as Python writes it; nothing in it is run."""
    try:
        parsed = ast.literal_eval(written)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{where} is {written[:80]!r}, not a list as Python writes it") from error
    if not isinstance(parsed, list) or not all(isinstance(alias, str) for alias in parsed):
        raise ValueError(f"{where} is {written[:80]!r}, not a list of texts")
    return parsed


# ---------------------------------------------------------------------------------------------------------------------
# Published prompts of graded difficulty, as Csordás et al. (arXiv 2505.13898) use them.


@dataclass(frozen=True)
class PublishedPrompts:
    """One published set of prompts: where its file is, how it is verified, how it is read."""

    name: str
    title: str
    url: str
    checksum: str  # as in `Published`
    rows: Callable[[Path], pd.DataFrame]  # file -> columns of `as_prompts`
    n: int | None  # None: not known for certain when the loader was written
    licence: str
    note: str


def load_published_prompts(published: PublishedPrompts, *, source: str | Path | None = None) -> pd.DataFrame:
    """A published set in the columns of `as_prompts`, from a folder or from its authors; every row is kept.

    Raises:
        ValueError: a file of another checksum or number of rows, or not of the form that is expected.
        ConnectionError: a download that could not be had. OSError: no room for it.
    """
    # Several of these files are called test.jsonl: each set has a folder of its own in the cache.
    path = _verified_file(published.url, published.checksum, source, subfolder=published.name.partition("/")[2])
    frame = as_prompts(published.rows(path), name=published.name)
    if published.n is not None and len(frame) != published.n:
        raise ValueError(
            f"{published.name}: {len(frame)} rows where {published.n} are expected: please report this with the version "
            "of this kit"
        )
    frame.attrs["card"] = {
        "name": published.name,
        "kind": "prompts",
        "title": published.title,
        "n": len(frame),
        "groups": frame["group"].nunique(),
        "levels": ", ".join(map(str, sorted(frame["level"].unique()))),
        "licence": published.licence,
        "source": published.url,
        "sha256": _sha256(path),
        "text": published.note,
    }
    return frame


def gsm8k_rows(path: Path) -> pd.DataFrame:
    """GSM8K in its authors' form: JSON lines of question and answer, the answer ending in a line "#### number".

    `level` is the number of lines of the solution. Calculator marks (<<48/2=24>>) are left in.
    """
    rows = []
    for place, entry in _json_lines(path, ("question", "answer")):
        reasoning, mark, number = entry["answer"].rpartition("\n#### ")
        if not mark:
            raise ValueError(f"{place}: the answer {entry['answer'][-60:]!r} doesn't end in a line '#### number'")
        rows.append(
            {
                "level": sum(bool(line.strip()) for line in reasoning.splitlines()),
                "prompt": f"Problem: {entry['question']}\nAnswer:",
                "solution": f" {reasoning}\nThe final answer is {number}.",
                "answer": f" {number}",
            }
        )
    frame = pd.DataFrame(rows)
    frame.insert(0, "example", _number("gsm8k", len(frame)))
    return frame


def math_rows(path: Path, *, subject: str = "Intermediate Algebra") -> pd.DataFrame:
    """One subject of MATH from JSON lines of problem, level ("Level 3"), solution and subject (or type).

    The answer is the entry's, or, without one, what stands in the solution's last box.
    """
    rows: list[dict[str, object]] = []
    subjects = set()
    for place, entry in _json_lines(path, ("problem", "level", "solution")):
        here = str(entry.get("subject") or entry.get("type"))
        subjects.add(here)
        if here.lower().replace("_", " ") != subject.lower():
            continue
        level = re.fullmatch(r"Level (\d)", str(entry["level"]))
        if level is None:
            raise ValueError(f"{place}: level {entry['level']!r}; 'Level 1' to 'Level 5' are expected")
        answer = entry["answer"] if "answer" in entry else _last_box(entry["solution"], place)
        rows.append(
            {
                "example": f"math-{entry['unique_id']}" if "unique_id" in entry else f"math-{len(rows) + 1:04d}",
                "level": int(level.group(1)),
                "prompt": f"Problem: {entry['problem']}\nAnswer:",
                "solution": f" {entry['solution']}",
                "answer": f" {answer}",
            }
        )
    if not rows:
        raise ValueError(f"{path.name} has no problems of {subject!r}; its subjects are {', '.join(sorted(subjects))}")
    return pd.DataFrame(rows)


def _last_box(solution: str, place: str) -> str:
    r"""What stands between the braces of the last \boxed{...}; braces in it are counted."""
    start = solution.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0 and "\\boxed{" in solution:
            return solution[start:end]
    raise ValueError(f"{place}: no \\boxed{{...}} in the solution, and no answer: {solution[-60:]!r}")


def mquake_rows(path: Path) -> pd.DataFrame:
    """MQuAKE in its authors' form: a JSON list of cases. The first of the three paraphrases, the answer before any edit.

    `level` is the number of triples, `group` the first triple's subject (Wikidata's identifier). `hop_prompts` are the
    clozes ("Dudley Town F.C. is associated with the sport of") with their answers, where all cases have as many as triples.
    """
    cases = json.loads(path.read_text(encoding="utf-8"))
    rows, hops = [], []
    for i, case in enumerate(cases):
        missing = [key for key in ("questions", "answer", "answer_alias") if key not in case]
        triples = case.get("orig", {}).get("triples") or case.get("orig_triples")  # on GitHub; on the Hugging Face hub
        if missing or not triples:
            raise ValueError(f"{path.name}, case {i}: no {', '.join(missing) or 'triples'}; it has {', '.join(case)}")
        rows.append(
            {
                "example": f"mquake-{case.get('case_id', i + 1)}",
                "group": str(triples[0][0]),
                "level": len(triples),
                "prompt": f"Question: {case['questions'][0]}\nAnswer:",
                "answer": f" {case['answer']}",
                "aliases": list(dict.fromkeys([case["answer"], *case["answer_alias"]])),
            }
        )
        single = case.get("single_hops", [])
        hops.append(single if len(single) == len(triples) and all("cloze" in hop for hop in single) else [])
    frame = pd.DataFrame(rows)
    if all(hops):
        frame["hop_prompts"] = [[hop["cloze"] for hop in single] for single in hops]
        frame["hop_answers"] = [
            [list(dict.fromkeys([hop["answer"], *hop["answer_alias"]])) for hop in single] for single in hops
        ]
    return frame


def _json_lines(path: Path, needed: tuple[str, ...]) -> list[tuple[str, dict]]:
    """Where each entry stands, for messages, and the entry."""
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is no JSON: {line[:60]!r}") from error
        if missing := [key for key in needed if key not in entry]:
            raise ValueError(f"{place}: no {', '.join(missing)}; it has {', '.join(entry)}")
        entries.append((place, entry))
    return entries


_SAMPLE = """The paper takes 20 a level: `order = list(frame.index[frame.level == k]); random.Random(42).shuffle(order);
  order[:20]` are its rows if they stand in the same order on the Hugging Face hub, which was not compared."""
PUBLISHED_PROMPTS = {
    published.name: published
    for published in (
        PublishedPrompts(
            name="published/gsm8k",
            title="GSM8K, test (Cobbe et al.)",
            url="https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
            "grade_school_math/data/test.jsonl",
            checksum="sha256:3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            rows=gsm8k_rows,
            n=1319,
            licence="MIT; fetched from its authors, not part of this kit",
            note="""Rows and order are the authors' (openai/grade-school-math at 3101c7d).

- `level` counts the lines of the solution (2 to 11), which are about its steps.
- `prompt` is "Problem: ...", a new line, "Answer:"; `solution` a space, the gold solution, and "The final answer is N."
  in the place of the authors' "#### N". Calculator marks such as <<48/2=24>> are left in, as the paper does;
  `frame["solution"].str.replace("<<.*?>>", "", regex=True)` takes them away.
- The paper (arXiv 2505.13898) takes the first N rows, with an instruction around the problem that is not reproduced here.
""",
        ),
        PublishedPrompts(
            name="published/math_intermediate_algebra",
            title="MATH, intermediate algebra, test (Hendrycks et al.)",
            url="https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/"
            "evaluation/data/math/test.jsonl",
            checksum="git:9ef3334841057f53caac5522332e38391d3fb33b",
            rows=math_rows,
            n=903,
            licence="MIT (its authors'); the problems come from competitions. Fetched, not part of this kit",
            note=f"""The 903 test problems of one subject, from a copy of the 5,000 in a public repository
(QwenLM/Qwen2.5-Math at a45202b), in plain JSON lines; the authors themselves link to a copy on the Hugging Face hub.

- `level` is the authors' (1 to 5). `prompt` and `solution` are joined as in the paper: "Problem: ...", a new line, "Answer:",
  a space, the gold solution. `answer` is what the solution boxes.
- {_SAMPLE}
- SHA-256 NOT PINNED: the file is pinned by its git id in that repository, and its content had not been seen when this loader
  was written; its form had, in another copy.
""",
        ),
        PublishedPrompts(
            name="published/mquake",
            title="MQuAKE-Remastered, CF-3k (Zhong et al.)",
            url="https://raw.githubusercontent.com/henryzhongsc/MQuAKE-Remastered/"
            "59eb58c35deb267bb796fc9883d37f8070f6faf2/datasets/MQuAKE-Remastered-CF-3k.json",
            checksum="git:6413d4b494cd476a9f2c096f6f18dbe87151a19d",
            rows=mquake_rows,
            n=None,
            licence="CC BY 4.0; fetched from its authors, not part of this kit",
            note=f"""Rows and order are the authors' (henryzhongsc/MQuAKE-Remastered at 59eb58c, after princeton-nlp/MQuAKE).

- `prompt` is "Question: ...", a new line, "Answer:", with the first of three paraphrases; `answer` is the true one, before
  the edits that the set was made for. `level` is the number of facts in the chain (2 to 4).
- Nothing was dropped or repaired: answers may stand in the question, facts may be out of date.
- {_SAMPLE}
- SHA-256 NOT PINNED: the file is pinned by its git id in the authors' repository, and its content had not been seen when this
  loader was written; its form was taken from the authors' documentation and code.
""",
        ),
    )
}


# ---------------------------------------------------------------------------------------------------------------------


def _data_folder() -> Path:
    """`data/` beside the package in a checkout, else `_data/` inside the installed package."""
    package = Path(__file__).resolve().parent
    folders = [folder for folder in (package.parent / "data", package / "_data") if (folder / "cities.csv").is_file()]
    if not folders:
        raise ValueError(f"no data folder beside {package} or in it: install the kit again")
    return folders[0]


def _read_card(path: Path) -> dict[str, str | int]:
    """Front matter of `key: value` lines between two lines of ---, then prose, which goes under "text"."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing: every data set has a card beside it")
    _, front, prose = path.read_text(encoding="utf-8").split("---\n", 2)
    card: dict[str, str | int] = {}
    for line in front.splitlines():
        key, _, value = line.partition(":")
        card[key.strip()] = value.strip().strip('"')
    for key in ("n", "positive", "groups", "pairs"):  # two-hop sets have no classes, the others no pairs
        if key in card:
            card[key] = int(card[key])
    return {**card, "text": prose.strip()}


def _with_card(frame: pd.DataFrame, card: dict[str, str | int]) -> pd.DataFrame:
    """Check the numbers of rows and groups against the card, and attach it."""
    if (counted := (len(frame), frame["group"].nunique())) != (card["n"], card["groups"]):
        raise ValueError(
            f"{card['name']}: the card says n = {card['n']}, groups = {card['groups']}, the file has {counted[0]}, "
            f"{counted[1]}: build the set again"
        )
    frame.attrs["card"] = card
    return frame


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


def _checksum(path: Path, like: str) -> str:
    """The file's checksum of the same kind as `like`."""
    if like.startswith("git:"):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        digest.update(path.read_bytes())
        return f"git:{digest.hexdigest()}"
    return f"sha256:{_sha256(path)}"
