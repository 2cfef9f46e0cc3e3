"""Two-hop queries: the set is what its card says, keeps its rules row by row, and bad tables are refused."""

import dataclasses
import functools
import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pandas as pd
import pytest

from lab import datasets
from lab.datasets import published as published_data

ROOT = Path(__file__).resolve().parents[2]
ALIASES = ("e1_aliases", "e2_aliases", "e3_aliases")
load = functools.cache(datasets.load)


def fold(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))


@functools.cache
def whole_word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(fold(name))}(?!\w)")


# --- the set ---------------------------------------------------------------------------------------------------------


def test_names_know_both_kinds():
    assert datasets.names(kind="two_hop") == ["two_hop", "published/two_hop"]
    assert not {"two_hop", "published/two_hop"} & set(datasets.names())
    with pytest.raises(ValueError, match="kind='queries': there are 'concept' and 'two_hop'"):
        datasets.names(kind="queries")
    with pytest.raises(ValueError, match=r"no data set 'twohop'\. There are: .*cities, .*two_hop, published/two_hop\."):
        datasets.load("twohop")
    with pytest.raises(ValueError, match="source= is for published sets; 'two_hop' ships with the kit"):
        datasets.load("two_hop", source=".")


def test_card_and_size():
    frame = load("two_hop")
    card = frame.attrs["card"]
    assert card["n"] == len(frame) >= 3000
    assert card["groups"] == frame["group"].nunique()
    assert card["pairs"] == len(frame.groupby(["r1", "r2"])) >= 24
    assert card["sha256"] == hashlib.sha256((ROOT / "data" / "two_hop.csv").read_bytes()).hexdigest()
    for key in ("title", "licence", "source", "text"):
        assert card[key]
    for section in ("How made", "## Counts", "## Balance", "## Known flaws"):
        assert section in card["text"]


def test_built_again_byte_for_byte(tmp_path: Path):
    subprocess.run([sys.executable, ROOT / "data" / "build" / "build_two_hop.py", "--out", tmp_path], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two_hop.csv", "two_hop.md"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ROOT / "data" / path.name).read_bytes(), f"{path.name} differs: build it again"


def test_columns_are_filled():
    frame = load("two_hop")
    assert frame.columns.tolist() == [
        *("example", "text", "e1", "e2", "e3", *ALIASES, "e1_type", "e2_type", "e3_type", "r1", "r2"),
        *("r1_template", "r2_template", "first_hop", "second_hop", "entity_shortcut", "relation_shortcut", "group"),
        *("e1_popularity", "e2_popularity", "answer_share"),
    ]
    people = frame["e2_type"] == "person"
    assert frame["e2_popularity"].isna().equals(people)
    assert not frame.drop(columns="e2_popularity").isna().any(axis=None)
    texts = frame.select_dtypes("str")
    assert (texts == texts.apply(lambda column: column.str.strip())).all(axis=None) and not (texts == "").any(axis=None)
    assert frame["example"].tolist() == [f"two_hop-{i:04d}" for i in range(1, len(frame) + 1)]
    assert not frame["text"].duplicated().any()
    assert (frame["group"] == frame["e2"]).all()
    for column in ALIASES:
        for label, aliases in zip(frame[column.removesuffix("_aliases")], frame[column], strict=True):
            assert aliases[0] == label and len(set(aliases)) == len(aliases) and min(map(len, aliases)) >= 2
    assert frame.loc[frame["e1_type"] == "city", "e1_popularity"].min() >= 300_000
    assert set(frame.loc[frame["e1_type"] != "city", "e1_popularity"]) == {1, 2, 3}


def test_prompts_follow_from_their_parts():
    frame = load("two_hop")
    for row in frame.itertuples():
        for template in (row.r1_template, row.r2_template):
            assert template.endswith(" {}") and template.count("{}") == 1
        nested = row.r2_template.format(row.r1_template.format(row.e1))
        assert row.text == nested[0].upper() + nested[1:] + " is"
        assert row.first_hop[1:] == row.r1_template.format(row.e1)[1:] + " is"
        assert row.entity_shortcut[1:] == row.r2_template.format(row.e1)[1:] + " is"
        bridges = {row.r2_template.format(article + row.e2)[1:] + " is" for article in ("", "the ")}
        assert row.second_hop[1:] in bridges
        assert row.relation_shortcut.endswith(" is") and row.e1 not in row.relation_shortcut
        assert row.text.startswith(row.relation_shortcut.removesuffix(" is"))
    articles = (
        frame.drop_duplicates("e2").set_index("e2")["second_hop"].str.contains(" the (?:United|Phil|Neth|Gambia)")
    )
    assert articles[["United States", "United Kingdom", "Philippines", "Netherlands", "Gambia"]].all()


def test_no_query_gives_itself_away():
    for row in load("two_hop").itertuples():
        text = fold(row.text)
        assert not [name for name in (*row.e2_aliases, *row.e3_aliases) if whole_word(name).search(text)], row.text
        assert not {*map(fold, row.e2_aliases)} & {*map(fold, row.e3_aliases)}, row.text


def test_a_fact_has_one_answer():
    frame = load("two_hop")
    assert (frame.groupby(["e1_type", "e1"])["e2"].nunique() == 1).all()
    assert (frame.groupby(["r2", "e2"])["e3"].nunique() == 1).all()
    assert (frame.groupby(["r2", "e3"])["e3_aliases"].agg(lambda lists: len(set(map(tuple, lists)))) == 1).all()


def test_a_few_facts_we_know():
    frame = load("two_hop").drop_duplicates("e1").set_index("e1")["e2"]
    known = {
        **{"the Eiffel Tower": "France", "Machu Picchu": "Peru", "Nelson Mandela": "South Africa", "Toyota": "Japan"},
        **{"War and Peace": "Leo Tolstoy", "Istanbul": "Turkey"},
    }
    assert {e1: frame[e1] for e1 in known} == known
    answers = load("two_hop").drop_duplicates(["r2", "e2"]).set_index(["r2", "e2"])["e3"]
    for key, answer in {
        ("capital", "Australia"): "Canberra",
        ("currency", "Japan"): "yen",
        ("language", "Brazil"): "Portuguese",
        ("continent", "Peru"): "South America",
        ("calling_code", "India"): "+91",
        ("domain", "Germany"): ".de",
        ("neighbour", "Portugal"): "Spain",
        ("native_language", "Franz Kafka"): "German",
    }.items():
        assert answers[key] == answer


def test_balance():
    frame = load("two_hop")
    share = frame["e2"].value_counts(normalize=True)
    countries = frame.loc[frame["e2_type"] == "country", "e2"].nunique()
    assert countries >= 90 and share.max() <= 0.05
    assert frame["r2"].value_counts(normalize=True).max() <= 0.3
    for relation, rows in frame.groupby("r2"):
        top = rows["e3"].value_counts(normalize=True).max()
        assert top <= (0.31 if relation in ("continent", "neighbour", "native_language") else 0.15), relation
        measured = rows.groupby("e3")["e3"].transform("size") / len(rows)
        assert (rows["answer_share"] - measured).abs().max() < 1e-4


@pytest.mark.parametrize("n", [200, 600])
def test_the_head_is_a_sample(n: int):
    frame = load("two_hop")
    whole, head = (part.groupby(["r1", "r2"]).size() / len(part) for part in (frame, frame.head(n)))
    assert (head.reindex(whole.index, fill_value=0) - whole).abs().max() < 2.5 / n
    assert set(head.index) == set(whole.index)
    assert frame.head(n)["e2"].nunique() >= 80


# --- a table of one's own --------------------------------------------------------------------------------------------


def mine(**changes: object) -> pd.DataFrame:
    """Two queries, with columns replaced."""
    columns = {
        "text": ["The capital of the country of Mumbai is", "The capital of the country of Lyon is"],
        "e1": ["Mumbai", "Lyon"],
        "e2": ["India", "France"],
        "e3": ["New Delhi", "Paris"],
    }
    return pd.DataFrame(columns | changes)


def test_as_two_hop_fills_in_what_it_can():
    frame = datasets.as_two_hop(mine())
    assert frame["example"].tolist() == ["query-0001", "query-0002"]
    assert frame["group"].tolist() == ["India", "France"] and frame["answer_share"].tolist() == [0.5, 0.5]
    assert frame["e3_aliases"].tolist() == [["New Delhi"], ["Paris"]] and frame["e1_aliases"].tolist()[1] == ["Lyon"]
    assert "first_hop" not in frame and "r2" not in frame
    given = mine(e3_aliases=['["New Delhi", "Delhi"]', '["Paris"]'], group="g", r2=["capital", "seat"], year=[1, 2])
    frame = datasets.as_two_hop(given)
    assert frame["e3_aliases"].tolist() == [["New Delhi", "Delhi"], ["Paris"]]
    assert frame["group"].tolist() == ["g", "g"] and frame["year"].tolist() == [1, 2]
    assert frame["answer_share"].tolist() == [1.0, 1.0]  # of the queries of the same relation
    assert given["e3_aliases"].tolist()[0] == '["New Delhi", "Delhi"]'  # the table that came in is as it was
    assert datasets.as_two_hop(frame).equals(frame)


def test_a_csv_goes_there_and_back(tmp_path: Path):
    frame = datasets.as_two_hop(mine())
    written = frame.assign(**{column: frame[column].map(json.dumps) for column in ALIASES})
    written.to_csv(tmp_path / "mine.csv", index=False)
    again = datasets.as_two_hop(pd.read_csv(tmp_path / "mine.csv"))
    assert again.equals(frame)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            mine().drop(columns=["e2", "e3"]),
            "mine has no column 'e2', 'e3': two-hop queries need text, e1, e2, e3; it has text, e1",
        ),
        (mine().iloc[:0], "mine has no rows: at least one query is needed"),
        (
            mine(text=["The capital of the country of Mumbai is", " "]),
            r"mine: text in row 1 \(example 'query-0002'\) is ' ': give it a text or drop the row",
        ),
        (mine(e3=[None, "Paris"], e3_aliases=[["x"], ["y"]]), r"mine: e3 in row 0 \(example 'query-0001'\) is "),
        (mine(example=["a", "a"]), "mine: example 'a' occurs twice: every row needs a name of its own"),
        (
            mine(e3_aliases=[["New Delhi", " "], ["Paris"]]),
            r"mine: e3_aliases in row 0 \(example 'query-0001'\) contains ' ': every alias is a text",
        ),
        (
            mine(e2_aliases=[["India"], []]),
            r"mine: e2_aliases in row 1 \(example 'query-0002'\) is an empty list: name at least the label itself",
        ),
        (mine(e2_aliases=[["India"], 3]), r"mine: e2_aliases in row 1 \(example 'query-0002'\) is 3, not a list"),
        (
            mine(e2_aliases=['["India"]', "France, FR"]),
            r"mine: e2_aliases in row 1 \(example 'query-0002'\) is 'France, FR', neither a list nor a JSON list such as",
        ),
        (
            mine(e1=["Mumbai", "lyon"]),
            r"mine: e1 'lyon' of row 1 \(example 'query-0002'\) was looked for in 'The capital of the country of Lyon is' "
            "and isn't there",
        ),
        (
            mine(e3=["Bombay", "Paris"], e3_aliases=[["Bombay", "MÚMBAI"], ["Paris"]]),
            r"mine: the answer 'MÚMBAI' of row 0 \(example 'query-0001'\) stands in its own text 'The capital of .*Mumbai",
        ),
        (
            mine(e3=["New Delhi", "France"]),
            r"mine: bridge 'France' and answer 'France' of row 1 \(example 'query-0002'\) share the name 'france'",
        ),
    ],
)
def test_bad_tables(frame: pd.DataFrame, message: str):
    with pytest.raises(ValueError, match=message):
        datasets.as_two_hop(frame, name="mine")


def test_answers_are_looked_for_as_whole_words():
    good = datasets.as_two_hop(mine(e3=["Mumba", "Lyons"]))  # no whole words of the text
    datasets.check_two_hop_data(good, name="mine")
    datasets.as_two_hop(mine(e3_aliases=[["New Delhi", "IS"], ["Paris"]]))  # Iceland's code, not the verb
    with pytest.raises(ValueError, match="the answer 'Is' of row 0"):
        datasets.as_two_hop(mine(e3_aliases=[["New Delhi", "Is"], ["Paris"]]))


# --- the published file ----------------------------------------------------------------------------------------------


def published_rows(**changes: object) -> pd.DataFrame:
    """Two rows in the published form; the second breaks our rules, as some of theirs do."""
    columns = {
        "id": ["80", "7"],
        **{"e1": ["Q1", "Q2"], "r1": ["P27", "P112"], "e2": ["Q3", "Q4"], "r2": ["P36", "P108"], "e3": ["Q5", "Q2"]},
        "e1_label": ["Ann None", "Acme"],
        "e2_label": ["Freedonia", "Bo Acme"],
        "e3_label": ["Glen, D.F.", "Acme"],
        "e1_aliases": ['[\'Ann "A" None\', "Ann\'s"]', "['Acme Inc.']"],
        "e2_aliases": ["['F']", "['Bo']"],
        "e3_aliases": ["['Glen', 'Glen, D.F.']", "['ACME']"],
        **{"e1_type": ["human", "public company"], "r1_type": ["country of citizenship", "founded by"]},
        **{"e2_type": ["country", "human"], "r2_type": ["capital", "employer"], "e3_type": ["city", "public company"]},
        **{f"{entity}_popularity": ["10.0", "3.0"] for entity in ("e1", "e2", "e3")},
        "r1_template": ["the country of citizenship of {}", "the person behind {}"],
        "r2_template": ["the capital of {}", "the employer of {}"],
        "source_prompt": [
            "the capital of the country of citizenship of Ann None is",
            "the employer of the person behind Acme is",
        ],
    }
    return pd.DataFrame(columns | changes)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "two_hop.csv"
    published_rows().to_csv(path)
    return path


def test_published_rows_are_mapped_and_kept(published: Path):
    frame = published_data.published_two_hop_rows(published)
    first, second = frame.iloc[0], frame.iloc[1]
    assert first["text"] == "the capital of the country of citizenship of Ann None is"
    assert first[["example", "e1", "e2", "e3"]].tolist() == [
        "published_two_hop-80",
        "Ann None",
        "Freedonia",
        "Glen, D.F.",
    ]
    assert first["e1_aliases"] == ["Ann None", 'Ann "A" None', "Ann's"] and first["e2_aliases"] == ["Freedonia", "F"]
    assert first["e3_aliases"] == ["Glen, D.F.", "Glen"]
    assert first[["r1", "r2", "r1_id", "e3_id"]].tolist() == ["country of citizenship", "capital", "P27", "Q5"]
    assert first["first_hop"] == "the country of citizenship of Ann None is"
    assert (
        first["second_hop"] == "the capital of Freedonia is"
        and first["entity_shortcut"] == "the capital of Ann None is"
    )
    assert first["relation_shortcut"] == "the capital of the country of citizenship"
    assert first["e1_popularity"] == 10.0 and first["group"] == "Freedonia"
    assert second["relation_shortcut"] == "the employer of the person beh"  # cut as the authors cut it
    assert second["e3"] == "Acme"  # stands in its own prompt, and is kept
    ours = [column for column in load("two_hop").columns if column != "answer_share"]
    assert frame.columns[: len(ours)].tolist() == ours and "answer_share" in frame
    with pytest.raises(ValueError, match="the answer 'Acme' of row 1 .* stands in its own text"):
        datasets.check_two_hop_data(frame, name="mine")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("Bo", r"two_hop\.csv: e2_aliases in row 1 \(id 7\) is 'Bo', not a list as Python writes it"),
        ("['Bo'", r"is \"\['Bo'\", not a list as Python writes it"),
        ("__import__('os').getcwd()", "not a list as Python writes it"),
        ("['Bo', 3]", "not a list of texts"),
        ("'Bo'", "not a list of texts"),
    ],
)
def test_published_aliases_that_are_no_lists(written: str, message: str, tmp_path: Path):
    path = tmp_path / "two_hop.csv"
    published_rows(e2_aliases=["['F']", written]).to_csv(path)
    with pytest.raises(ValueError, match=message):
        published_data.published_two_hop_rows(path)


def test_published_file_is_verified(published: Path):
    with pytest.raises(
        ValueError, match=r"two_hop\.csv is not the published file: its checksum is git:\w+, not git:9d03129e"
    ):
        datasets.load("published/two_hop", source=published.parent)
    with pytest.raises(
        ValueError, match=r"no file two_hop\.csv in .*: source= is the folder that holds the file of http"
    ):
        datasets.load("published/two_hop", source=published.parent / "none")
    published_rows().drop(columns=["source_prompt"]).to_csv(published)
    with pytest.raises(ValueError, match=r"two_hop\.csv has no column 'source_prompt'; it has "):
        published_data.published_two_hop_rows(published)


def test_published_card(published: Path):
    content = published.read_bytes()
    pinned = dataclasses.replace(
        published_data.PUBLISHED["published/two_hop"],
        url="https://example.org/two_hop.csv",
        checksum=f"git:{hashlib.sha1(b'blob %d' % len(content) + bytes(1) + content).hexdigest()}",
    )
    frame = published_data.load_published(pinned, source=published.parent)
    card = frame.attrs["card"]
    assert len(frame) == 2 and card["n"] == 2 and card["pairs"] == 2 and card["source"] == pinned.url
    assert "MIT" in card["licence"] and "SHA-256 NOT PINNED" in card["text"]
    datasets.check_two_hop_data(frame, name="published/two_hop")
