"""Prompts of graded difficulty and prose: the sets are what their cards say, row by row; bad tables are refused."""

import dataclasses
import functools
import hashlib
import json
import operator
import re
import subprocess
import sys
import unicodedata
from itertools import accumulate
from pathlib import Path

import pandas as pd
import pytest

from lab import datasets
from lab.datasets import published as published_data

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("chains", "sums", "word_problems")
load = functools.cache(datasets.load)


# --- every set -------------------------------------------------------------------------------------------------------


def test_names_know_the_kinds():
    published = ["published/gsm8k", "published/math_intermediate_algebra", "published/mquake"]
    assert datasets.names(kind="prompts") == [*PROMPTS, *published]
    assert datasets.names(kind="prose") == ["prose"]
    assert not {*PROMPTS, *published, "prose"} & {*datasets.names(), *datasets.names("two_hop")}
    with pytest.raises(ValueError, match="kind='text': there are 'concept' and 'two_hop', 'prompts' and 'prose'"):
        datasets.names(kind="text")
    with pytest.raises(ValueError, match=r"no data set 'sum'\. There are: .*sums, word_problems, .*prose, "):
        datasets.load("sum")
    with pytest.raises(ValueError, match="source= is for published sets; 'sums' ships with the kit"):
        datasets.load("sums", source=".")


@pytest.mark.parametrize("name", [*PROMPTS, "prose"])
def test_card_and_columns(name: str):
    frame, kind = load(name), "prose" if name == "prose" else "prompts"
    card = frame.attrs["card"]
    assert card["name"] == name and card["kind"] == kind
    assert card["n"] == len(frame) and card["groups"] == frame["group"].nunique()
    assert card["sha256"] == hashlib.sha256((ROOT / "data" / f"{name}.csv").read_bytes()).hexdigest()
    for section in (
        "Columns:",
        "How made",
        "Order:" if name != "sums" else "stand together",
        "## Counts",
        "## Known flaws",
    ):
        assert section in card["text"]
    for key in ("title", "licence", "source"):
        assert card[key]
    assert frame["example"].tolist() == [f"{name}-{i:04d}" for i in range(1, len(frame) + 1)]
    assert not frame.isna().any(axis=None)
    text = "text" if name == "prose" else "prompt"
    assert tuple(frame.columns[:4]) == ("example", "group", "genre" if name == "prose" else "level", text)
    assert not frame[text].duplicated().any() and not frame[text].str.contains("  ").any()
    if name != "prose":
        assert card["levels"] == ", ".join(map(str, sorted(frame["level"].unique())))
        assert (frame["answer"].str.strip() == frame["aliases"].str[0]).all()


BUILD = """
import build_chains, build_prose, build_sums, build_word_problems, pathlib, sys
folder = pathlib.Path(sys.argv[1])
build_chains.build_chains(folder), build_prose.build_prose(folder)
build_sums.build_sums(folder), build_word_problems.build_word_problems(folder)
"""


def test_built_again_byte_for_byte(tmp_path: Path):
    """All four in one process: importing takes most of the time."""
    subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=ROOT / "data" / "build", check=True)
    names = [f"{name}.{kind}" for name in sorted([*PROMPTS, "prose"]) for kind in ("csv", "md")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ROOT / "data" / path.name).read_bytes(), f"{path.name} differs: build it again"


# --- word problems: worked out again ---------------------------------------------------------------------------------

TIMES = {"twice": 2, "three times": 3, "four times": 4}
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def numbers_in(prompt: str) -> list[int]:
    """All numbers of a problem, those in words among them."""
    story = prompt.removeprefix("Problem: ").removesuffix("\nAnswer:")
    found = re.findall(r"\d+|twice|three times|four times", story)
    return [TIMES[text] if text in TIMES else int(text) for text in found]


def equations(solution: str) -> list[tuple[int, str, int, int]]:
    found = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", solution)
    assert len(re.findall("=", solution)) == len(found)
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in found]


@pytest.mark.parametrize(("prompt", "solution"), [("prompt", "solution"), ("prompt_padded", "solution_padded")])
def test_word_problems_come_out(prompt: str, solution: str):
    for row in load("word_problems").to_dict("records"):
        given, steps = numbers_in(row[prompt]), equations(row[solution])
        assert len(steps) == row["level"]
        assert all(APPLY[sign](a, b) == c and c >= 2 for a, sign, b, c in steps)
        # Every number of the problem is used once; the others are results, each of them used once, but the last.
        operands = sorted(n for a, _, b, _ in steps for n in (a, b))
        results = [c for *_, c in steps]
        assert operands == sorted(given + results[:-1])
        assert row["answer"] == f" {results[-1]}" and row[solution].endswith(f"The final answer is {results[-1]}.")
        assert 10 <= results[-1] <= 99 and results[-1] not in given + results[:-1]
        assert len(set(given)) == len(given)


def test_word_problems_are_balanced():
    frame = load("word_problems")
    assert (frame.groupby(["group", "level"]).size() == 5).all() and frame["group"].nunique() == 20
    assert (frame.groupby("level").size() == 100).all()
    assert (frame["prompt"].str.startswith("Problem: ") & frame["prompt"].str.endswith("?\nAnswer:")).all()
    assert frame["solution"].str.startswith(" ").all() and not frame["solution"].str.startswith("  ").any()
    assert (
        not frame["prompt"].str.contains("[{}]|\\.\\.").any()
        and not frame["solution"].str.contains("[{}]|\\.\\.").any()
    )
    sentences = frame["solution"].str.count(r"\.(?: |$)")
    assert (sentences == frame["level"] + 1).all()  # one a step, and the answer


def test_padding_adds_neutral_sentences_only():
    frame = load("word_problems")
    for row in frame.itertuples():
        for bare, padded in ((row.prompt, row.prompt_padded), (row.solution, row.solution_padded)):
            kept, added = re.split(r"(?<=[.?])\s", bare.strip()), []
            for sentence in re.split(r"(?<=[.?])\s", padded.strip()):
                if kept and sentence == kept[0]:
                    kept.pop(0)
                else:
                    added.append(sentence)
            assert not kept and not numbers_in(" ".join(added)), padded
    # Each digit is a token for the kit's models: words, digits and marks together come out level.
    size = frame["solution_padded"].str.count(r"[A-Za-z]+|\d|[^\w\s]") + frame["solution_padded"].str.count(r" (?=\d)")
    means = size.groupby(frame["level"]).mean()
    assert means.max() - means.min() < 1 and size.std() < 3


# --- sums ------------------------------------------------------------------------------------------------------------


def test_sums_come_out():
    frame = load("sums")
    assert (frame.groupby("level").size() == 45).all() and sorted(frame["level"].unique()) == [2, 3, 4, 5, 6, 7]
    for row in frame.itertuples():
        terms = [int(term) for term in row.prompt.removesuffix(" = ").split(" + ")]
        assert row.prompt == " + ".join(map(str, terms)) + " = " and row.group.startswith(
            row.prompt.removesuffix(" = ")
        )
        assert len(terms) == row.level and 1 <= min(terms) <= max(terms) <= 9
        assert (
            row.partial_sums == list(accumulate(terms))[1:] and row.answer == str(sum(terms)) and len(row.answer) == 2
        )
    assert (frame.groupby("group").size() == 6).all()


# --- chains ----------------------------------------------------------------------------------------------------------

ASKED = ["capital", "currency", "language", "continent", "calling_code", "currency_code"]


@functools.cache
def fold(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))


@functools.cache
def whole_word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(fold(name))}(?!\w)")


def hops_of(row) -> list[tuple[str, str, str]]:
    """Relation, entity before, entity after."""
    return list(zip(row.relations, row.entities[:-1], row.entities[1:], strict=True))


def test_chains_are_consistent():
    frame = load("chains")
    hops = {row.prompt: row for row in frame.itertuples() if row.level == 1}
    for row in frame.itertuples():
        assert len(row.hop_prompts) == len(row.hop_answers) == len(row.relations) == len(row.entities) - 1 == row.level
        assert row.group == row.entities[0] and row.entities[0] in row.prompt and row.prompt.endswith(" is")
        assert row.answer == f" {row.entities[-1]}" and row.hop_answers[-1] == row.aliases
        for prompt, answers, relation, before, after in zip(
            row.hop_prompts, row.hop_answers, row.relations, row.entities[:-1], row.entities[1:], strict=True
        ):
            assert answers[0] == after and whole_word(before).search(fold(prompt))
            hop = hops[prompt]  # each hop is a row, with the same answers
            assert hop.aliases == answers and hop.relations == [relation]
    # One fact, one answer; whatever the level.
    facts = {(relation, a): b for row in frame.itertuples() for relation, a, b in hops_of(row)}
    assert all(facts[relation, a] == b for row in frame.itertuples() for relation, a, b in hops_of(row))


def test_chains_do_not_give_themselves_away():
    for row in load("chains").itertuples():
        text = fold(row.prompt)
        for names in row.hop_answers:
            assert not [name for name in names if whole_word(name).search(text)], row.prompt
        named = [{fold(row.entities[0])}, *({fold(name) for name in names} for names in row.hop_answers)]
        assert sum(map(len, named)) == len(set().union(*named)), row.entities


def test_every_stretch_of_a_chain_is_a_row():
    frame = load("chains")
    rows = {(tuple(row.relations), tuple(row.entities)) for row in frame.itertuples()}
    assert len(rows) == len(frame)
    for relations, entities in rows:
        k = len(relations)
        stretches = [(i, j) for i in range(k) for j in range(i + 1, k + 1)]
        assert all((relations[i:j], entities[i : j + 1]) in rows for i, j in stretches)
    size = frame.groupby("level").size()
    assert size.index.tolist() == [1, 2, 3, 4] and size.min() >= 300
    last = frame["relations"].str[-1]
    assert pd.crosstab(last, frame["level"]).loc[ASKED].min(axis=None) >= 15


def test_chains_agree_with_the_two_hop_set():
    """Countries, authors and what is asked of them are as there; and some facts that we know."""
    two_hop = load("two_hop")
    first = dict(zip(zip(two_hop["e1_type"], two_hop["e1"], strict=True), two_hop["e2"], strict=True))
    second = dict(zip(zip(two_hop["r2"], two_hop["e2"], strict=True), two_hop["e3"], strict=True))
    hops = {row.relations[0]: {} for row in load("chains").itertuples() if row.level == 1}
    for row in load("chains").itertuples():
        for relation, a, b in hops_of(row):
            hops[relation][a] = b
    for relation, facts in hops.items():
        for a, b in facts.items():
            kind, _, what = relation.rpartition("_")
            if relation in ("book_author", "city_country", "landmark_country", "company_country"):
                assert first[kind, a] == b
            elif relation == "birth_country":
                assert b in (first.get(("person", a)), second.get(("country_of_birth", a)))
            elif relation in two_hop["r2"].values:
                assert second[relation, a] == b
            else:
                assert relation in ("character_book", "currency_code"), what
    known = {
        ("character_book", "Captain Ahab"): "Moby-Dick",
        ("birth_country", "Victor Hugo"): "France",
        ("currency_code", "yen"): "JPY",
        ("currency_code", "euro"): "EUR",
        ("calling_code", "Japan"): "+81",
    }
    assert {key: hops[key[0]][key[1]] for key in known} == known


# --- prose -----------------------------------------------------------------------------------------------------------


def test_prose():
    frame = load("prose")
    assert (frame["genre"].value_counts() >= 60).all() and set(frame["genre"]) == {"narrative", "expository"}
    assert frame["group"].is_unique
    assert frame["text"].str.split().str.len().between(90, 140).all()
    assert frame["text"].map(str.isascii).all() and frame["text"].str.contains(r'[.!?]"?$').all()
    assert (frame["text"].str.count('"') % 2 == 0).all()
    assert set(frame["genre"].iloc[:2]) == {"narrative", "expository"}  # in turn
    # No document repeats a long stretch of another.
    seen: dict[str, str] = {}
    for row in frame.itertuples():
        words = row.text.lower().split()
        for i in range(len(words) - 7):
            stretch = " ".join(words[i : i + 8])
            assert seen.setdefault(stretch, row.example) == row.example, stretch


# --- a table of one's own --------------------------------------------------------------------------------------------


def mine(**changes: object) -> pd.DataFrame:
    """Two prompts, with columns replaced."""
    columns = {"prompt": ["2 + 2 = ", "2 + 2 + 3 = "], "level": [2, 3], "answer": ["4", "7"]}
    return pd.DataFrame(columns | changes)


def test_as_prompts_fills_in_what_it_can():
    given = mine(year=[1, 2], answer=[" 4", " 7"])
    frame = datasets.as_prompts(given)
    assert frame.columns.tolist() == ["example", "group", "level", "prompt", "answer", "year", "aliases"]
    assert frame["group"].tolist() == frame["example"].tolist() == ["prompt-0001", "prompt-0002"]
    assert frame["aliases"].tolist() == [["4"], ["7"]] and "example" not in given
    assert datasets.as_prompts(frame).equals(frame)
    hops = {
        "hop_prompts": ['["a", "b"]', '["c", "d", "e"]'],
        "hop_answers": ['[["x"], ["y"]]', '[["x"], ["y"], ["z"]]'],
    }
    frame = datasets.as_prompts(mine(**hops, aliases=['["4", "four"]', '["7"]'], group="g"))
    assert frame["hop_prompts"].tolist() == [["a", "b"], ["c", "d", "e"]] and frame["hop_answers"][0] == [["x"], ["y"]]
    assert frame["aliases"][0] == ["4", "four"] and frame["group"].tolist() == ["g", "g"]
    assert "aliases" not in datasets.as_prompts(mine().drop(columns="answer"))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            mine().drop(columns=["prompt", "level"]),
            "mine has no column 'prompt', 'level': prompts need prompt, level; it has answer",
        ),
        (mine().iloc[:0], "mine has no rows: at least one prompt is needed"),
        (
            mine(prompt=["2 + 2 = ", " "]),
            r"mine: prompt in row 1 \(example 'prompt-0002'\) is ' ': give it a text or drop the row",
        ),
        (mine(prompt=["2 + 2 = ", None]), r"mine: prompt in row 1 \(example 'prompt-0002'\) is .*, not a text"),
        (
            mine(answer=[4, 7]),
            r"mine: answer in row 0 \(example 'prompt-0001'\) is 4, not a text: frame\['answer'\]\.astype\(str\) makes",
        ),
        (
            mine(level=[2, 0]),
            r"mine: level 0 in row 1 \(example 'prompt-0002'\): levels are whole numbers from 1 on \(steps, hops, terms\)",
        ),
        (
            mine(level=[2.0, 3.0]),
            r"mine: level 2\.0 in row 0 .*: .*; frame\['level'\]\.astype\(int\) turns 2\.0 into 2",
        ),
        (mine(level=["2", "3"]), r"mine: level '2' in row 0 .*: levels are whole numbers from 1 on"),
        (mine(level=[True, True]), r"mine: level True in row 0 .*: levels are whole numbers from 1 on"),
        (mine(example=["a", "a"]), "mine: example 'a' occurs twice: every row needs a name of its own"),
        (mine(aliases=["4, four", '["7"]']), r"mine: aliases in row 0 .* is '4, four', neither a list nor a JSON list"),
        (mine(aliases=[["4"], []]), r"mine: aliases in row 1 .* is \[\], not a list, or an empty one"),
        (mine(aliases=[["4"], [""]]), r"mine: aliases in row 1 .* contains '': each is a text, not empty"),
        (
            mine(hop_answers=[["x", "y"], [["x"]]]),
            r"mine: hop_answers in row 0 .* is \['x', 'y'\], not a list of lists",
        ),
        (
            mine(hop_prompts=[["a", "b"], ["a", "b"]]),
            r"mine: hop_prompts in row 1 .* has 2 hops, its level is 3: one entry a hop is needed",
        ),
    ],
)
def test_bad_prompts(frame: pd.DataFrame, message: str):
    with pytest.raises(ValueError, match=message):
        datasets.as_prompts(frame, name="mine")


def test_as_prose():
    frame = datasets.as_prose(pd.DataFrame({"text": ["One.", "Two."], "year": [1, 2]}))
    assert frame.columns.tolist() == ["example", "group", "genre", "text", "year"]
    assert frame["group"].tolist() == ["document-0001", "document-0002"] and frame["genre"].tolist() == ["own", "own"]
    for text, message in (
        ({"words": ["One."]}, "mine has no column 'text': documents need text; it has words"),
        ({"text": []}, "mine has no rows: at least one document is needed"),
        (
            {"text": ["One.", ""]},
            r"mine: text in row 1 \(example 'document-0002'\) is '': give it a text or drop the row",
        ),
        (
            {"text": ["One.", "One."]},
            r"mine: the text 'One\.' stands in several groups, so that a split could put it on",
        ),
        ({"text": ["One.", "Two."], "example": "a"}, "mine: example 'a' occurs twice"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets.as_prose(pd.DataFrame(text), name="mine")
    datasets.as_prose(pd.DataFrame({"text": ["One.", "One."], "group": "g"}))


# --- published sets: readers, on rows of our own in the authors' form -------------------------------------------------


def lines(path: Path, *entries: dict) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


RIVER = {
    "question": "A boat makes 12 trips and then half as many. How many trips is that?",
    "answer": "Half of 12 is 12/2=<<12/2=6>>6 trips.\nTogether that is 12+6=<<12+6=18>>18 trips.\n#### 18",
}
TOWN = {
    "question": "A town of 900 grows by 225. How many live there?",
    "answer": "900+225=<<900+225=1125>>1125\n#### 1,125",
}


def test_gsm8k_rows(tmp_path: Path):
    frame = datasets.as_prompts(
        published_data.gsm8k_rows(lines(tmp_path / "test.jsonl", RIVER, TOWN)), name="published/gsm8k"
    )
    assert frame["example"].tolist() == frame["group"].tolist() == ["gsm8k-0001", "gsm8k-0002"]
    assert frame["level"].tolist() == [2, 1] and frame["answer"].tolist() == [" 18", " 1,125"]
    assert frame["prompt"][0] == f"Problem: {RIVER['question']}\nAnswer:"
    assert frame["solution"][0] == (
        " Half of 12 is 12/2=<<12/2=6>>6 trips.\nTogether that is 12+6=<<12+6=18>>18 trips.\nThe final answer is 18."
    )
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: the answer '18' doesn't end in a line '#### number'"):
        published_data.gsm8k_rows(lines(tmp_path / "test.jsonl", RIVER | {"answer": "18"}))
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: no answer; it has question"):
        published_data.gsm8k_rows(lines(tmp_path / "test.jsonl", RIVER, {"question": "?"}))
    (tmp_path / "test.jsonl").write_text("[", encoding="utf-8")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1 is no JSON: '\['"):
        published_data.gsm8k_rows(tmp_path / "test.jsonl")


def test_math_rows(tmp_path: Path):
    root = {
        "problem": "Find the positive root of $4x^2 = 9$.",
        "level": "Level 3",
        "solution": "We get $x = \\boxed{4}$, no: $x^2 = \\frac{9}{4}$, so $x = \\boxed{\\frac{3}{2}}$.",
        "type": "Intermediate Algebra",
    }
    line = {**root, "subject": "Algebra", "level": "Level 1"}
    power = {
        **root,
        "level": "Level 5",
        "subject": "Intermediate Algebra",
        "unique_id": "test/x/7.json",
        "answer": "1.5",
    }
    frame = published_data.math_rows(lines(tmp_path / "test.jsonl", root, line, power))
    assert frame["example"].tolist() == ["math-0001", "math-test/x/7.json"] and frame["level"].tolist() == [3, 5]
    assert frame["answer"].tolist() == [" \\frac{3}{2}", " 1.5"] and frame["solution"][1] == f" {root['solution']}"
    assert frame["prompt"][0] == "Problem: Find the positive root of $4x^2 = 9$.\nAnswer:"
    with pytest.raises(ValueError, match=r"line 1: level 'Level \?'; 'Level 1' to 'Level 5' are expected"):
        published_data.math_rows(lines(tmp_path / "test.jsonl", root | {"level": "Level ?"}))
    for solution in ("It is 4.", "It is \\boxed{4"):
        with pytest.raises(ValueError, match=r"line 1: no \\boxed\{\.\.\.\} in the solution, and no answer"):
            published_data.math_rows(lines(tmp_path / "test.jsonl", root | {"solution": solution}))
    with pytest.raises(ValueError, match=r"no problems of 'Intermediate Algebra'; its subjects are Algebra"):
        published_data.math_rows(lines(tmp_path / "test.jsonl", line))


CASE = {
    "case_id": 12,
    "requested_rewrite": [],
    "questions": ["What is the capital of the country where Sumo began?", "Which city ...?", "Name the ..."],
    "answer": "Tokyo",
    "answer_alias": ["Tokyo", "Tokio"],
    "new_answer": "Oslo",
    "new_answer_alias": [],
    "single_hops": [
        {"question": "Where did Sumo begin?", "cloze": "Sumo began in", "answer": "Japan", "answer_alias": ["Nippon"]},
        {"question": "Which?", "cloze": "The capital of Japan is", "answer": "Tokyo", "answer_alias": []},
    ],
    "orig": {"triples": [["Q1", "P495", "Q17"], ["Q17", "P36", "Q1490"]]},
}


def test_mquake_rows(tmp_path: Path):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([CASE]), encoding="utf-8")
    row = datasets.as_prompts(published_data.mquake_rows(path)).iloc[0]
    assert row[["example", "group", "level", "answer"]].tolist() == ["mquake-12", "Q1", 2, " Tokyo"]
    assert row["prompt"] == "Question: What is the capital of the country where Sumo began?\nAnswer:"
    assert row["aliases"] == ["Tokyo", "Tokio"] and row["hop_prompts"] == ["Sumo began in", "The capital of Japan is"]
    assert row["hop_answers"] == [["Japan", "Nippon"], ["Tokyo"]]
    flat = {key: value for key, value in CASE.items() if key not in ("orig", "single_hops")}
    flat |= {"orig_triples": CASE["orig"]["triples"]}  # as on the Hugging Face hub
    path.write_text(json.dumps([CASE, flat]), encoding="utf-8")
    frame = published_data.mquake_rows(path)
    assert frame["level"].tolist() == [2, 2] and "hop_prompts" not in frame
    path.write_text(json.dumps([CASE, {"case_id": 1}]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"cases\.json, case 1: no questions, answer, answer_alias; it has case_id"):
        published_data.mquake_rows(path)


def test_published_prompts_are_verified(tmp_path: Path):
    path = lines(tmp_path / "test.jsonl", RIVER, TOWN)
    with pytest.raises(
        ValueError, match=r"test\.jsonl is not the published file: its checksum is sha256:\w+, not sha256:3730"
    ):
        datasets.load("published/gsm8k", source=tmp_path)
    pinned = dataclasses.replace(
        published_data.PUBLISHED["published/gsm8k"],
        checksum=f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}",
        n=2,
    )
    frame = published_data.load_published(pinned, source=tmp_path)
    card = frame.attrs["card"]
    assert (card["kind"], card["n"], card["groups"], card["levels"]) == ("prompts", 2, 2, "1, 2")
    assert card["source"] == pinned.url and "MIT" in card["licence"] and "the gold solution" in card["text"]
    with pytest.raises(ValueError, match="published/gsm8k: n is 2, where 3 is expected: please report this"):
        published_data.load_published(dataclasses.replace(pinned, n=3), source=tmp_path)


def test_files_of_one_name_do_not_meet_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two published sets come in a file called test.jsonl."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    sets = published_data.PUBLISHED
    names = [sets[name].url.rsplit("/", 1)[1] for name in ("published/gsm8k", "published/math_intermediate_algebra")]
    assert names == ["test.jsonl", "test.jsonl"]
    folder = tmp_path / "datasets" / "gsm8k"
    folder.mkdir(parents=True)
    path = lines(folder / "test.jsonl", RIVER)  # as if it had been downloaded
    pinned = dataclasses.replace(
        sets["published/gsm8k"], checksum=f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}", n=1
    )
    assert len(published_data.load_published(pinned)) == 1
    other = dataclasses.replace(sets["published/math_intermediate_algebra"], url="http://127.0.0.1:9/test.jsonl")
    with pytest.raises(ConnectionError, match="could not be reached"):
        published_data.load_published(other)
    assert path.is_file()
