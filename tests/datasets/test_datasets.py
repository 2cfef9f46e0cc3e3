"""Concept data: every set is what its card says, its labels are right, and bad input is refused."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline

from lab import datasets
from lab.datasets import files, published

ROOT = Path(__file__).resolve().parents[2]
OURS = [name for name in datasets.names() if not name.startswith("published/")]
load = functools.cache(datasets.load)


# --- every set -------------------------------------------------------------------------------------------------------


def test_the_promised_sets_are_there():
    promised = {
        "cities",
        "cities_negated",
        "capitals",
        "numbers",
        "coin_flips",
        "comparisons",
        "syllogisms",
        "larger_city",
    }
    assert promised <= set(OURS)
    assert [name for name in datasets.names() if name.startswith("published/")] == [
        f"published/{name}"
        for name in "cities coinflip common_claim counterfact hateeval imdb sarcasm strategyqa stsa".split()
    ]


@pytest.mark.parametrize("name", OURS)
def test_schema_and_card(name: str):
    frame = load(name)
    card = frame.attrs["card"]
    assert tuple(frame.columns[:6]) == datasets.COLUMNS
    assert frame["label"].dtype == np.int64 and frame["difficulty"].dtype == np.int64 and frame["difficulty"].min() >= 1
    assert frame["example"].str.startswith(f"{name}-").all()
    assert not frame["text"].duplicated().any()
    assert (frame["text"].str.split().str.len() <= 60).all()
    assert (frame["text"] == frame["text"].str.strip()).all() and not frame["text"].str.contains("  |\\.\\.").any()
    assert not frame.isna().any(axis=None)
    assert card["name"] == name and card["domain"] in ("factual", "emotional", "inferential")
    assert card["instruction_place"] in ("before", "after")
    assert len(card["classes"].split(", ")) == 2
    for key in ("title", "instruction", "licence", "source", "text"):
        assert card[key]
    assert card["sha256"] == hashlib.sha256((ROOT / "data" / f"{name}.csv").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [name for name in OURS if name != "sentiment_words"])
def test_words_alone_say_nothing(name: str):
    """Balance, templates, and a bag of words (of the whole text, of its last word) near chance on held-out groups."""
    frame = load(name)
    assert frame["label"].mean() == 0.5
    assert frame["template"].nunique() >= 3
    last = frame["text"].str.split().str[-1]
    model = make_pipeline(CountVectorizer(token_pattern=r"\w+"), LogisticRegression(max_iter=1000))
    for text in (frame["text"], last):
        scores = []
        for train, test in GroupShuffleSplit(n_splits=8, train_size=0.6, random_state=7).split(
            text, groups=frame["group"]
        ):
            model.fit(text.iloc[train], frame["label"].iloc[train])
            scores.append(model.score(text.iloc[test], frame["label"].iloc[test]))
        assert np.mean(scores) <= 0.56


# --- the facts -------------------------------------------------------------------------------------------------------


def test_cities_and_the_negated_twin():
    plain, negated = load("cities"), load("cities_negated")
    assert (plain["label"] == (plain["country"] == plain["correct_country"])).all()
    assert (negated["label"] == 1 - plain["label"]).all()
    assert (negated["text"].str.replace(" not ", " ", n=1) == plain["text"]).all()
    assert (negated["text"] != plain["text"]).all()
    assert (negated["example"].str[-4:] == plain["example"].str[-4:]).all()
    assert plain.drop(columns=["example", "text", "label"]).equals(negated.drop(columns=["example", "text", "label"]))
    for _, row in plain.iterrows():
        assert row["city"] in row["text"] and row["country"].removeprefix("the ") in row["text"]
    for column in ("city", "country"):
        assert (plain.groupby(column)["label"].mean() == 0.5).all()


def test_a_few_facts_we_know():
    cities, capitals, larger = load("cities"), load("capitals"), load("larger_city")
    countries = cities.set_index("city")["correct_country"]
    assert countries.loc[["Paris", "Dubai"]].unique().tolist() == ["France", "the United Arab Emirates"]
    of = capitals.drop_duplicates("country").set_index("country")["capital"]
    assert of[["Kenya", "Australia", "Canada", "Turkey"]].tolist() == ["Nairobi", "Canberra", "Ottawa", "Ankara"]
    london = larger[larger["first_capital"] == "London"]
    more = london["text"].str.contains("more|More|larger")
    assert len(london) and (london["label"] == more).all()  # larger than whichever it is compared with


def test_capitals():
    frame = load("capitals")
    negated = frame["template"].str.endswith("-not")
    assert (frame["label"] == ((frame["city"] == frame["capital"]) != negated)).all()
    assert (frame["text"].str.contains(r"\bnot\b") == negated).all()
    for column in ("city", "country"):
        assert (frame.groupby(column)["label"].mean() == 0.5).all()
    assert (frame.groupby("country")["group"].nunique() == 1).all()


def test_larger_city():
    frame = load("larger_city")
    assert frame["ratio"].min() >= 1.5
    orders = frame.groupby(["pair", "first_capital", "second_capital"])["label"].agg(["size", "sum"])
    assert (orders["size"] == 2).all() and (orders["sum"] == 1).all()
    # Reading who is larger off each pair, no three capitals contradict each other.
    grows = frame["text"].str.contains("more|More|larger")
    larger = {
        (a, b)
        for a, b, up, true in zip(
            frame["first_capital"], frame["second_capital"], grows, frame["label"] == 1, strict=True
        )
        if up == true
    }
    assert not {(b, a) for a, b in larger} & larger
    assert not [1 for (a, b), (c, d) in product(larger, repeat=2) if b == c and (d, a) in larger]


# --- labels worked out again from the text ---------------------------------------------------------------------------

NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
VALUES = {word: i for i, word in enumerate(NUMBER_WORDS.split())}
VALUES |= {w: 10 * i for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}


def to_int(text: str) -> int:
    if text.isdigit():
        return int(text)
    total = current = 0
    for word in text.lower().replace("-", " ").replace(" and ", " ").split():
        if word == "hundred":
            current *= 100
        elif word == "thousand":
            total, current = total + 1000 * current, 0
        else:
            current += VALUES[word]
    return total + current


def solve_number(text: str) -> bool:
    if match := re.fullmatch(r"Compared with (.+), (.+) is (larger|smaller)\.", text):
        b, a, relation = match.groups()
    else:
        match = re.fullmatch(r"(?:The number )?(.+) is (larger|smaller) than (?:the number )?(.+)\.", text)
        assert match, text
        a, relation, b = match.groups()
    return to_int(a) > to_int(b) if relation == "larger" else to_int(a) < to_int(b)


def solve_coin(text: str) -> bool:
    opening, *acts, question = re.split(r"(?<=[.?])\s(?!heads|tails)", text)
    side = re.findall("heads|tails", opening)[0]
    for act in acts:
        if not re.search(r"\bnot\b|leaves", act):
            side = "tails" if side == "heads" else "heads"
    return side == re.findall("heads|tails", question)[0]


UP = {
    "taller": 1,
    "older": 1,
    "heavier": 1,
    "faster": 1,
    "richer": 1,
    "shorter": -1,
    "younger": -1,
    "lighter": -1,
    "slower": -1,
    "poorer": -1,
}


def solve_comparison(text: str) -> bool:
    *premises, conclusion = re.split(r"(?<=\.) ", text)
    above: set[tuple[str, str]] = set()

    def read(sentence: str) -> tuple[str, str] | None:
        match = re.search(r"(\w+) is (\w+) than (\w+)\.$", sentence)
        if match is None:
            return None
        a, relation, b = match.groups()
        return (a, b) if UP[relation] > 0 else (b, a)

    for premise in premises:
        pair = read(premise)
        assert pair, premise
        above.add(pair)
    while more := {(a, d) for (a, b), (c, d) in product(above, repeat=2) if b == c} - above:
        above |= more
    if pair := read(conclusion):
        assert pair in above or pair[::-1] in above, text
        return pair in above
    match = re.search(r"(\w+) is the (\w+)est\.$", conclusion)
    assert match, conclusion
    name, stem = match.groups()
    sign = {stem + "er": value for stem, value in ((word[:-2], value) for word, value in UP.items())}[stem + "er"]
    others = {person for pair in above for person in pair} - {name}
    return all(((name, other) if sign > 0 else (other, name)) in above for other in others)


def solve_syllogism(text: str) -> bool:
    """Whether it's true wherever the premises are; a world says which of the 8 combinations of terms have members."""
    found = re.findall(r"\b(all|no|some) ([\w-]+) are (not )?([\w-]+)", text, flags=re.IGNORECASE)
    assert len(found) == 3, text
    terms = sorted({term for _, a, _, b in found for term in (a, b)})
    assert len(terms) == 3, text
    kinds = list(product((False, True), repeat=3))

    def holds(sentence: tuple[str, str, str, str], world: list[tuple[bool, ...]]) -> bool:
        quantifier, a, negated, b = sentence
        members = [kind for kind in world if kind[terms.index(a)]]
        inside = [kind[terms.index(b)] != bool(negated) for kind in members]
        return {"all": all(inside), "no": not any(inside), "some": any(inside)}[quantifier.lower()]

    verdicts = set()
    for import_of_terms in (False, True):
        worlds = [
            [kind for kind, there in zip(kinds, some, strict=True) if there]
            for some in product((False, True), repeat=8)
        ]
        if import_of_terms:  # each term has members
            worlds = [world for world in worlds if all(any(kind[i] for kind in world) for i in range(3))]
        verdicts.add(all(holds(found[2], w) for w in worlds if holds(found[0], w) and holds(found[1], w)))
    assert len(verdicts) == 1, f"depends on existential import: {text}"
    return verdicts.pop()


@pytest.mark.parametrize(
    ("name", "solve"),
    [
        ("numbers", solve_number),
        ("coin_flips", solve_coin),
        ("comparisons", solve_comparison),
        ("syllogisms", solve_syllogism),
    ],
)
def test_labels_follow_from_the_text(name: str, solve):
    frame = load(name)
    solved = [int(solve(text)) for text in frame["text"]]
    wrong = frame["text"][np.array(solved) != frame["label"].to_numpy()]
    assert wrong.empty, wrong.iloc[0]
    assert (frame.groupby("difficulty")["label"].mean() == 0.5).all()


def test_the_solvers_can_say_both():
    assert solve_number("Nine hundred and one is larger than 17.") and not solve_number(
        "Compared with 20, twelve is larger."
    )
    assert solve_coin("A coin lies heads up. Ada flips it. Is the coin tails up now?")
    assert not solve_coin("A coin shows heads. Ada leaves it alone. Does it show tails at the end?")
    assert solve_comparison("A is taller than B. C is shorter than B. Therefore A is taller than C.")
    assert not solve_comparison("A is taller than B. C is shorter than B. So among all of them, A is the shortest.")
    assert solve_syllogism("All a are b. All b are c. Therefore all a are c.")
    assert not solve_syllogism("All a are b. All c are b. Therefore all a are c.")


@pytest.mark.parametrize(
    ("script", "name"), [("build_generated.py", "coin_flips"), ("build_geonames.py", "larger_city")]
)
def test_built_again_byte_for_byte(script: str, name: str, tmp_path: Path):
    subprocess.run([sys.executable, ROOT / "data" / "build" / script, name, "--out", tmp_path], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.csv", f"{name}.md"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ROOT / "data" / path.name).read_bytes(), (
            f"{path.name} differs: run {script} {name}"
        )


# --- what is refused, and how ----------------------------------------------------------------------------------------


def table(**changes: object) -> pd.DataFrame:
    """Four statements in two groups, with columns replaced."""
    columns = {
        "example": ["a", "b", "c", "d"],
        "text": ["one", "two", "three", "four"],
        "label": [0, 1, 0, 1],
        "group": ["g", "g", "h", "h"],
        "template": "t",
        "difficulty": 1,
    }
    return pd.DataFrame(columns | changes)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            table().drop(columns="group"),
            "mine has no column 'group'; it has example, text, label, template, difficulty",
        ),
        (table().iloc[:0], "mine has no rows: at least two statements of each class are needed"),
        (table(label=[1, 1, 1, 1]), "mine has one class only: all 4 labels are 1; a probe needs both"),
        (table(label=[0, 1, 2, 1]), r"mine: label .*2.* in row 2 \(example 'c'\): labels are 0 or 1"),
        (table(label=["yes", "no", "yes", "no"]), r"mine: label 'yes' in row 0 \(example 'a'\): labels are 0 or 1"),
        (
            table(text=["one", " ", "three", "four"]),
            r"mine: text in row 1 \(example 'b'\) is ' ': give it a text or drop the row",
        ),
        (
            table(text=["one", None, "three", "four"]),
            r"mine: text in row 1 \(example 'b'\) is (None|nan), not a text: .*drop the row if",
        ),
        (table(text=[1, 2, 3, 4]), r"mine: text in row 0 \(example 'a'\) is 1, not a text"),
        (
            table(text=["one", "\u200b", "three", "four"]),
            r"mine: text in row 1 \(example 'b'\) is '.*': give it a text",
        ),
        (table(group=[1.0, 1.0, 2.0, 2.0]), "mine: group in row 0 is 1.0, neither a text nor a whole number"),
        (table(group=["g", "g", "h", None]), r"mine: row 3 \(example 'd'\) has no group"),
        (table(example=[1, "1", "c", "d"]), "mine: example '1' occurs twice"),
        (table(example=["a", "b", "a", "d"]), "mine: example 'a' occurs twice: every row needs a name of its own"),
        (table(group="g"), "mine: the group 'g' spans all 4 rows, so nothing is left to test on"),
        (
            table(group=["g", "h", "i", "h"]),
            "mine: all statements of label 1 are in one group, so no split by group has both classes on both sides",
        ),
    ],
)
def test_bad_tables(frame: pd.DataFrame, message: str):
    with pytest.raises(ValueError, match=message):
        datasets.check_concept_data(frame, name="mine")


def test_a_good_table_passes_and_can_be_split():
    for groups in (["g", "g", "h", "h"], ["a", "b", "c", "d"], ["a", "b", "b", "c"]):
        datasets.check_concept_data(table(group=groups), name="mine")


def test_load_names_what_exists():
    with pytest.raises(
        ValueError, match=r"no data set 'citys'\. There are: .*cities, .*published/stsa.*lab\.datasets\.read"
    ):
        datasets.load("citys")
    with pytest.raises(ValueError, match="source= is for published sets; 'cities' ships with the kit"):
        datasets.load("cities", source=".")


def test_read_your_own(tmp_path: Path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "sentence,truth,topic,year\nNA is good,1,a,1\nTwo,0,a,2\nThree,1,b,3\nFour,0,b,4\n", encoding="utf-8"
    )
    frame = datasets.read(path, text="sentence", label="truth", group="topic")
    assert tuple(frame.columns) == (*datasets.COLUMNS, "year")
    assert frame["group"].tolist() == ["a", "a", "b", "b"] and frame["text"][0] == "NA is good"
    assert frame.attrs["card"]["n"] == 4 and frame.attrs["card"]["positive"] == 2
    assert datasets.read(path, text="sentence", label="truth")["group"].nunique() == 4
    with pytest.raises(
        ValueError, match=r"mine\.csv has no column 'text', 'label'; it has sentence, truth, topic, year"
    ):
        datasets.read(path)
    with pytest.raises(
        ValueError, match=r"no file .*none\.csv: pass the path of a CSV with the columns 'text' and 'label'"
    ):
        datasets.read(tmp_path / "none.csv")
    path.write_text("text,label\nOne,1\nTwo,\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.csv: label '' in row 1 \(example 'mine-0002'\): labels are 0 or 1"):
        datasets.read(path)
    path.write_text("text,label\nOne,1\n,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.csv: text in row 1 \(example 'mine-0002'\) is '': give it a text"):
        datasets.read(path)


ROWS = b"text,label,group\nOne,1,01\nTwo,0,1\nThree,1,02\nFour,0,2\n"


def own(tmp_path: Path, content: bytes) -> pd.DataFrame:
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    return datasets.read(path, group="group")


def test_read_takes_each_cell_as_it_is_written(tmp_path: Path):
    frame = own(tmp_path, ROWS)
    assert frame["group"].tolist() == ["01", "1", "02", "2"] and frame["label"].tolist() == [1, 0, 1, 0]
    cells = [b"NA", b"null", b"nan", b"None", b"007", b"1.0", b"1e5", b"True", b'"a, b"', b'"a\rb"', b'"a\r\n""b"""']
    rows = [b"%s,%d,g%d,%s" % (cell, i % 2, i, cell) for i, cell in enumerate(cells)]
    wanted = ["NA", "null", "nan", "None", "007", "1.0", "1e5", "True", "a, b", "a\rb", 'a\r\n"b"']
    for end in (b"\n", b"\r\n"):
        for mark in (b"", b"\xef\xbb\xbf"):
            frame = own(tmp_path, mark + end.join([b"text,label,group,year", *rows, b"", b""]))
            assert frame["text"].tolist() == frame["year"].tolist() == wanted
    assert frame.columns.tolist() == [*datasets.COLUMNS, "year"]
    frame = own(
        tmp_path, ROWS.replace(b"label", b"label,difficulty").replace(b",1,", b",1,03,").replace(b",0,", b",0,2,")
    )
    assert frame["difficulty"].tolist() == [3, 2, 3, 2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"Two", b"Two\rhalves", r"mine\.csv, line 3: a carriage return outside of quotes\. Put a text"),
        (b"\n", b"\r", r"mine\.csv, line 1: a carriage return outside of quotes"),
        (
            b"Two,",
            b"Two, halves,",
            r"line 3: 4 cells, the header has 3 \(text, label, group\)\. Put a text that holds commas",
        ),
        (b"e,", b"e, so,", "line 2: 4 cells, the header has 3"),  # more in every row
        (b"Two,0,1", b"Two,0", "line 3: 2 cells, the header has 3"),
        (b"Two", b"\nTwo", "line 3 is empty: delete it"),
        (
            b"Two",
            b'"Two',
            r"line 3: unexpected end of data\. Put a text that holds commas, quotes or line ends in double",
        ),
        (b"Two", b'"Two" halves', "line 3: ',' expected after"),
        (b"Two", b"T\0wo", "line 3: a NUL character, as in UTF-16 or a damaged file"),
        (b"Two", "Zürich".encode("latin-1"), "line 3: the byte 0xfc is no UTF-8: save the file as UTF-8"),
        (ROWS, ROWS.decode().encode("utf-16"), "line 1: the byte 0xff is no UTF-8"),
        (b",", b";", r"line 1: columns are separated by ';' \('text;label;group'\): save it with commas"),
        (b",", b"\t", r"line 1: columns are separated by '\\t'"),
        (b"text,label,group", b"text,label,group,text", "line 1: the column 'text' is there twice"),
        (ROWS, b"", r"mine\.csv is empty: a header and rows are needed"),
        (b"Two,0", b"Two,0.0", r"label '0\.0' in row 1 \(example 'mine-0002'\): labels are 0 or 1"),
        (b"Two,0", b"Two,False", "label 'False' in row 1"),
        (b"Two,0", b"Two, 0", "label ' 0' in row 1"),
        (b"Two", "\u200b".encode(), r"text in row 1 \(example 'mine-0002'\) is '.*': give it a text"),
        (b"0,1\n", b"0,\n", r"row 1 \(example 'mine-0002'\) has no group"),
        (b"label", b"difficulty,label", "line 2: 3 cells, the header has 4"),
    ],
)
def test_read_refuses_what_it_cannot_read(tmp_path: Path, old: bytes, new: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        own(tmp_path, ROWS.replace(old, new))


@given(
    cells=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=5)
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_texts_in_quotes_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, cells: list[str]):
    path = tmp_path_factory.mktemp("csv") / "mine.csv"
    quoted = "\n".join('"' + cell.replace('"', '""') + '",x' for cell in ["text", *cells])
    path.write_bytes(quoted.replace(",x", ",other", 1).encode())
    assert files.read_csv(path)["text"].tolist() == cells


def test_published_texts_that_look_like_missing_values_stay_texts(tmp_path: Path):
    rows = published.PUBLISHED
    (tmp_path / "cities.csv").write_text("statement,label,city\nNA,1,nan\nnull,0,007\n", encoding="utf-8")
    frame = rows["published/cities"].rows(tmp_path / "cities.csv")
    assert frame["text"].tolist() == ["NA", "null"] and frame["group"].tolist() == ["nan", "007"]
    assert frame["label"].tolist() == [1, 0]
    (tmp_path / "common_claim.csv").write_text(
        "examples,label,agreement\nNone,True,0.5\nNA,False,1\n", encoding="utf-8"
    )
    frame = rows["published/common_claim"].rows(tmp_path / "common_claim.csv")
    assert frame["text"].tolist() == ["None", "NA"] and frame["agreement"].tolist() == [0.5, 1.0]
    (tmp_path / "hateeval.tsv").write_text("id\ttext\tHS\n1\tnull\t1\n2\t1.0\t0\n", encoding="utf-8")
    frame = rows["published/hateeval"].rows(tmp_path / "hateeval.tsv")
    assert frame["text"].tolist() == ["null", "1.0"] and frame["label"].tolist() == [1, 0]


def test_tables_that_pandas_guessed_are_refused():
    cut = pd.read_csv(io.StringIO("text,e1,e2,e3\nIn Lyon, France, is,Lyon,F,P\n"))
    with pytest.raises(ValueError, match=r"your table: its index holds .*'In Lyon', .*index_col=False"):
        datasets.as_two_hop(cut)
    with pytest.raises(ValueError, match="your table: its index holds"):
        datasets.as_prose(pd.DataFrame({"text": ["half"]}, index=["other half"]))
    with pytest.raises(ValueError, match="mine: its index holds"):
        datasets.check_concept_data(table().set_index(pd.Index(list("abcd"))), name="mine")
    guessed = pd.read_csv(io.StringIO("prompt,level,answer\n2 + 5 = ,2,007\n"))
    with pytest.raises(ValueError, match=r"answer in row 0 .* is 7, not a text: .*dtype=\{'answer': str\}"):
        datasets.as_prompts(guessed)
    guessed = pd.read_csv(io.StringIO("text,e1,e2,e3,group\nThe home of Sumo is,Sumo,NA,Tokyo,1\n"))
    with pytest.raises(ValueError, match=r"e2 in row 0 .* is nan, not a text: .*keep_default_na=False"):
        datasets.as_two_hop(guessed)
    with pytest.raises(ValueError, match="group in row 0 is 7.0, neither a text nor a whole number"):
        datasets.as_two_hop(guessed.assign(e2="Japan", group=7.0))


INSTALLED = """
import pathlib, sys
import lab
from lab import datasets
package = pathlib.Path(lab.__file__).parent
assert package.parent == pathlib.Path(sys.argv[1]), package
print([name for name in datasets.names() if "/" not in name], datasets.load("numbers").shape)
folder = package / "_data"
(folder / "numbers.csv").write_bytes((folder / "numbers.csv").read_bytes().replace(b",1,", b",0,", 1))
def refused(name):
    try:
        datasets.load(name)
    except ValueError as error:
        print(error)
refused("numbers")
(folder / "cities.md").unlink()
refused("cities")
(folder / "cities.csv").unlink()
refused("numbers")
"""


def test_installed_package_finds_its_data_and_notices_changes(tmp_path: Path):
    """The package as a wheel carries it: the data folder inside of it."""
    shutil.copytree(ROOT / "lab", tmp_path / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "lab" / "_data").mkdir()
    for name in ("cities.csv", "cities.md", "numbers.csv", "numbers.md", "published_sets.json"):
        shutil.copy(ROOT / "data" / name, tmp_path / "lab" / "_data")
    command, environment = [sys.executable, "-c", INSTALLED, tmp_path], {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    there, changed, no_card, no_data = done.stdout.splitlines()
    assert there == f"['cities', 'numbers'] {load('numbers').shape}"
    assert re.fullmatch(
        r"numbers\.csv has SHA-256 .*, its card says .*: the file was changed\. Restore it, .*", changed
    )
    assert no_card == "cities.md is missing: every data set has a card beside it"
    assert re.fullmatch("no data folder beside .* or in it: install the kit again", no_data)


# --- published sets, through a real download from a server of our own ------------------------------------------------

SMALL = {
    "examples": [
        {"question": f"A coin is heads up. {n} flips it. Heads?", "answer": a}
        for n, a in zip("ABCD", ["no", "yes"] * 2, strict=True)
    ]
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield folder, f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def small(server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> published.Published:
    """The coin-flip loader, pointed at a small file of the same form on the server; the cache is empty."""
    folder, address = server
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    content = json.dumps(SMALL).encode()
    (folder / "coin_flip.json").write_bytes(content)
    return dataclasses.replace(
        published.PUBLISHED["published/coinflip"],
        url=f"{address}/coin_flip.json",
        checksum=f"sha256:{hashlib.sha256(content).hexdigest()}",
        n=4,
        positive=2,
    )


def cached(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "datasets"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_download_once_then_offline(small: published.Published, server: tuple[Path, str], tmp_path: Path):
    frame = published.load_published(small)
    assert frame["label"].tolist() == [1, 1, 0, 0] and frame["published_label"].tolist() == [0, 0, 1, 1]
    assert frame["text"][0].startswith("A coin is heads up. B")
    assert frame.attrs["card"]["instruction_place"] == "after" and "overwrites" in frame.attrs["card"]["text"]
    assert cached(tmp_path) == ["coin_flip.json"]
    (server[0] / "coin_flip.json").unlink()
    assert published.load_published(small).equals(frame)  # from the cache
    assert published.load_published(small, source=tmp_path / "cache" / "datasets").equals(frame)


def test_a_damaged_cache_is_fetched_again(small: published.Published, tmp_path: Path):
    published.load_published(small)
    (tmp_path / "cache" / "datasets" / "coin_flip.json").write_text("{}")
    assert len(published.load_published(small)) == 4


@pytest.mark.parametrize("kind", ["sha256", "git"])
def test_corrupt_download_leaves_nothing(
    small: published.Published, server: tuple[Path, str], tmp_path: Path, kind: str
):
    content = (server[0] / "coin_flip.json").read_bytes()
    git = f"git:{hashlib.sha1(b'blob %d' % len(content) + bytes(1) + content).hexdigest()}"
    pinned = small if kind == "sha256" else dataclasses.replace(small, checksum=git)
    (server[0] / "coin_flip.json").write_bytes(content[:-5])
    with pytest.raises(
        ValueError, match=r"arrived corrupt or was changed: .*Nothing was kept; try again, or download it elsewhere"
    ):
        published.load_published(pinned)
    assert cached(tmp_path) == []
    (server[0] / "coin_flip.json").write_bytes(content)
    assert len(published.load_published(pinned)) == 4


def test_missing_file_and_no_network(small: published.Published, server: tuple[Path, str], tmp_path: Path):
    (server[0] / "coin_flip.json").unlink()
    with pytest.raises(
        ConnectionError,
        match=r"could not be had \(404 .*Try again, or .*under the name coin_flip\.json and pass source=",
    ):
        published.load_published(small)
    nobody = dataclasses.replace(small, url="http://127.0.0.1:9/coin_flip.json")
    with pytest.raises(
        ConnectionError, match=r"could not be reached .*: are you offline\? Try again, or download it elsewhere"
    ):
        published.load_published(nobody)
    assert cached(tmp_path) == []


def test_no_room(small: published.Published, server: tuple[Path, str], tmp_path: Path):
    """The system refuses to write past 64 KiB, as a full disk would."""
    resource = pytest.importorskip("resource", reason="file size limits are a thing of Unix")
    (server[0] / "coin_flip.json").write_bytes(bytes(1_000_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(
            OSError, match=r"no room in .*datasets for coin_flip\.json: free some, or set LAB_CACHE .*Nothing was kept"
        ):
            published.load_published(small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cached(tmp_path) == []


def test_source_folder_is_verified(small: published.Published, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no file coin_flip\.json in .*: source= is the folder that holds the file"):
        published.load_published(small, source=tmp_path)
    (tmp_path / "coin_flip.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"coin_flip\.json is not the published file: its checksum is sha256:\w+, not sha256:\w+"
    ):
        published.load_published(small, source=tmp_path)


def test_counts_are_verified(small: published.Published):
    with pytest.raises(ValueError, match="published/coinflip: n is 4, where 500 is expected: please report this"):
        published.load_published(dataclasses.replace(small, n=500))
    with pytest.raises(ValueError, match="published/coinflip: positive is 2, where 253 is expected"):
        published.load_published(dataclasses.replace(small, positive=253))


def test_readers_whose_files_were_not_at_hand(tmp_path: Path):
    """The forms documented for sarcasm (JSON lines) and IMDb (archive of one file a review), with files of our own."""
    lines = [{"headline": f"Headline {i}", "is_sarcastic": i % 2} for i in range(4)]
    (tmp_path / "sarcasm.json").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    sarcasm = published.PUBLISHED["published/sarcasm"].rows(tmp_path / "sarcasm.json")
    assert sarcasm["text"].tolist() == ["Headline 1", "Headline 3", "Headline 0", "Headline 2"]
    assert sarcasm["label"].tolist() == [1, 1, 0, 0] and sarcasm["published_label"].tolist() == [0, 0, 1, 1]

    with tarfile.open(tmp_path / "aclImdb_v1.tar.gz", "w:gz") as archive:
        for name in (
            "test/pos/1_9.txt",
            "train/neg/0_1.txt",
            "test/neg/7_2.txt",
            "test/urls_neg.txt",
            "test/neg/0_3.txt",
        ):
            content = name.encode()
            entry = tarfile.TarInfo(f"aclImdb/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    imdb = published.PUBLISHED["published/imdb"].rows(tmp_path / "aclImdb_v1.tar.gz")
    assert imdb["text"].tolist() == ["test/neg/7_2.txt", "test/neg/0_3.txt", "test/pos/1_9.txt"]  # the archive's order
    assert imdb["label"].tolist() == [0, 0, 1]


def test_a_long_text_is_read(tmp_path):
    """The csv module stops at 131,072 letters by itself."""
    (tmp_path / "long.csv").write_text(f"text\n{'word ' * 40_000}\n")
    assert len(files.read_csv(tmp_path / "long.csv").text[0]) == 200_000
