"""Published sets, fetched from their authors on demand: where each file is, how it is verified, which rows are read.

`lab.datasets.load("published/...")` calls what is here: `load_published` for the statements of `PUBLISHED`,
`load_published_two_hop` for the two-hop queries, `load_published_prompts` for the prompts of `PUBLISHED_PROMPTS`. Nothing
of these files ships with the kit: a file is downloaded once into `cache_folder()` or read from a folder, and its checksum
is verified either way.
"""

import ast
import hashlib
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pooch
import requests

from lab import cache
from lab.datasets.tables import (
    COLUMNS,
    TWO_HOP_ALIASES,
    _check_columns,
    _finish,
    _number,
    _sha256,
    as_prompts,
    as_two_hop,
    read_csv,
)


def cache_folder() -> Path:
    """Where downloads are kept: "datasets" in the kit's cache folder (`lab.models.cache_folder`)."""
    return cache.cache_folder() / "datasets"


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
    if not (folder / file_name).exists():  # what is there can be read where nothing can be written
        cache.writable(folder)
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
        if error.errno not in cache.NO_ROOM:
            raise
        raise OSError(
            error.errno,
            f"no room in {folder} for {file_name}: free some, or set LAB_CACHE to a folder elsewhere. Nothing was kept",
        ) from error
    if _checksum(path, checksum) != checksum:
        path.unlink()
        raise ValueError(corrupt)
    return path


def _checksum(path: Path, like: str) -> str:
    """The file's checksum of the same kind as `like`."""
    if like.startswith("git:"):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        digest.update(path.read_bytes())
        return f"git:{digest.hexdigest()}"
    return f"sha256:{_sha256(path)}"


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


def _two_lists(zero: pd.DataFrame, one: pd.DataFrame, *, label_of_zero: int) -> pd.DataFrame:
    """The authors' two lists, one after the other: `published_label` 0 and 1."""
    return pd.concat(
        [zero.assign(label=label_of_zero, published_label=0), one.assign(label=1 - label_of_zero, published_label=1)],
        ignore_index=True,
    )


def _cities(path: Path) -> pd.DataFrame:
    table = read_csv(path)
    rows = table.rename(columns={"statement": "text"}).assign(group=table["city"])
    return _two_lists(rows[rows["label"] == "1"], rows[rows["label"] == "0"], label_of_zero=1)


def _common_claim(path: Path) -> pd.DataFrame:
    table = read_csv(path)
    rows = pd.DataFrame({"text": table["examples"], "agreement": table["agreement"].map(float)})
    return _two_lists(rows[table["label"] == "True"][:3000], rows[table["label"] == "False"][:3000], label_of_zero=1)


def _counterfact(path: Path) -> pd.DataFrame:
    table = read_csv(path)
    rows = table.rename(columns={"statement": "text"}).assign(group=table["subject"])
    return _two_lists(rows[rows["label"] == "1"][:2000], rows[rows["label"] == "0"][:2000], label_of_zero=1)


def _stsa(path: Path) -> pd.DataFrame:
    with path.open(encoding="utf-8") as file:
        lines = [line.strip().split(" ", 1) for line in file]
    rows = pd.DataFrame({"text": [text for _, text in lines]})
    positive = pd.Series([digit != "0" for digit, _ in lines])
    return _two_lists(rows[~positive], rows[positive], label_of_zero=0)


def _hateeval(path: Path) -> pd.DataFrame:
    # As the authors read it: quotes in tweets join lines here and there, and which rows come first depends on that.
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, index_col=False)
    rows = table[["text"]]
    return _two_lists(rows[table["HS"] == "1"][:3000], rows[table["HS"] != "1"][:3000], label_of_zero=1)


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
    table = read_csv(path)  # "None" and "NA" may be names
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
    rest = [column for column in frame.columns if column and column not in fixed]
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
