"""Build the set of plain prose from the documents in prose.txt.

`python data/build/build_prose.py [--out DIR]`. The script writes no text: it reads the documents, checks and numbers them,
and counts words.
"""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from common import main, write_files

DOCUMENTS = Path(__file__).with_name("prose.txt")
GENRES = ("narrative", "expository")
SHORTEST, LONGEST = 90, 140
PROSE = """
# Plain prose of two genres

{documents} short documents, written for this project one by one: {narrative} very short stories (narrative) and {expository}
explanations of how something works or came about (expository). Each is complete in itself. They are held-out text: for
losses, norms of states, and maps between models, with documents split into training and test.

Columns: `example`; `group`: the document, since each is its own; `genre`: narrative or expository; `text`: one paragraph,
without its title.

Order: drawn once, the genres in turn, so that the first 2 N rows are N of each.

How made: all texts are original; none is copied, shortened or translated from anywhere. People and places in the stories
are invented, and the explanations name no person. Plain ASCII, straight quotation marks, British spelling; {shortest}
to {longest} words are allowed.
"""
FLAWS = """
## Known flaws

- Small: {words} words in all. It measures; it trains nothing larger than a linear map, and that with care.
- One voice: whoever reads on notices the same rhythm, dry endings and favourite words in all documents of a genre. A split by
  document keeps documents apart, not the voice; a map or a loss measured here holds for such prose.
- Genre goes with tense (past in the stories, present in the explanations), with direct speech, and with names.
- The documents are all of about the same length, and short: nothing here tells of long contexts.
- The explanations simplify. They state general knowledge and cite nothing.
- Models published later may have read this file.
"""


def read_documents(path: Path) -> list[dict[str, str]]:
    """Genre, title and text of every document; ValueError with the line number where one breaks a rule."""
    documents: list[dict[str, str]] = []
    genre = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("== "):
            genre = line.removeprefix("== ")
            if genre not in GENRES:
                raise ValueError(f"{path.name}, line {number}: genre {genre!r}; there are {', '.join(GENRES)}")
            continue
        title, bar, text = line.partition(" | ")
        if not bar or not SHORTEST <= len(text.split()) <= LONGEST:
            raise ValueError(
                f"{path.name}, line {number}: write title | text, of {SHORTEST} to {LONGEST} words; it has "
                f"{len(text.split())}"
            )
        if not text.isascii() or "  " in text:
            raise ValueError(f"{path.name}, line {number}: a character outside ASCII, or two spaces")
        documents.append({"genre": genre, "title": title, "text": text})
    twice = [title for title, n in Counter(document["title"] for document in documents).items() if n > 1]
    if twice:
        raise ValueError(f"{path.name}: {', '.join(twice)} stands twice")
    return documents


def card(frame: pd.DataFrame, table: bytes) -> list[str]:
    """The card's lines."""
    facts = {
        "name": "prose",
        "kind": "prose",
        "title": "Plain prose of two genres",
        "n": len(frame),
        "groups": frame["group"].nunique(),
        "genres": ", ".join(GENRES),
        "licence": "MIT (text written for this project)",
        "source": "written for this project; documents in data/build/prose.txt",
        "sha256": hashlib.sha256(table).hexdigest(),
    }
    size = frame["text"].str.split().str.len()
    bare = frame["text"].str.lower().str.findall(r"[a-z]+(?:['-][a-z]+)*")
    rows = []
    for genre in GENRES:
        here = frame["genre"] == genre
        vocabulary = {word for words in bare[here] for word in words}
        quoted = frame.loc[here, "text"].str.contains('"').mean()
        rows.append(
            f"| {genre} | {here.sum()} | {size[here].sum()} | {size[here].min()} to {size[here].max()} | "
            f"{size[here].mean():.0f} | {len(vocabulary)} | {quoted:.2f} |"
        )
    counts = frame["genre"].value_counts()
    return [
        *("---", *(f"{key}: {value}" for key, value in facts.items()), "---", ""),
        PROSE.strip().format(documents=len(frame), shortest=SHORTEST, longest=LONGEST, **counts),
        *("", "## Counts", ""),
        "| genre | documents | words | words a document | mean | different words | share with direct speech |",
        "|---|---|---|---|---|---|---|",
        *rows,
        *("", FLAWS.strip().format(words=f"{size.sum():,}")),
    ]


def build_prose(folder: Path) -> Path:
    rng = np.random.default_rng(64)
    documents = read_documents(DOCUMENTS)
    placed = []
    for genre in GENRES:
        ours = [document for document in documents if document["genre"] == genre]
        placed += [
            ((i + 0.5) / len(ours), GENRES.index(genre), ours[j]) for i, j in enumerate(rng.permutation(len(ours)))
        ]
    rows = [
        {
            "example": f"prose-{i:04d}",
            "group": f"{document['genre']}: {document['title']}",
            "genre": document["genre"],
            "text": document["text"],
        }
        for i, (_, _, document) in enumerate(sorted(placed, key=lambda entry: entry[:2]), start=1)
    ]
    frame = pd.DataFrame(rows)
    table = frame.to_csv(index=False, lineterminator="\n").encode("utf-8")
    return write_files(folder, "prose", table, card(frame, table))


if __name__ == "__main__":
    main({"prose": build_prose}, __doc__.splitlines()[0])
