"""What every build script shares: write a set and its card, and measure what a bag of words makes of it."""

import argparse
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline

DATA = Path(__file__).resolve().parents[1]
COLUMNS = ["example", "text", "label", "group", "template", "difficulty"]


def bag_of_words_accuracy(frame: pd.DataFrame, *, splits: int = 20, seed: int = 0) -> float:
    """Mean held-out accuracy of logistic regression on unigram counts, over group-aware 60/40 splits."""
    model = make_pipeline(CountVectorizer(token_pattern=r"\w+"), LogisticRegression(max_iter=1000))
    accuracies = []
    splitter = GroupShuffleSplit(n_splits=splits, train_size=0.6, random_state=seed)
    for train, test in splitter.split(frame, groups=frame["group"]):
        model.fit(frame["text"].iloc[train], frame["label"].iloc[train])
        accuracies.append(model.score(frame["text"].iloc[test], frame["label"].iloc[test]))
    return float(np.mean(accuracies))


def words(text: str) -> list[str]:
    """The words of a text: long word lists are easier to read and to change as running text."""
    return text.split()


def capitalise(text: str) -> str:
    """The text with its first letter a capital, the rest as it is."""
    return text[:1].upper() + text[1:]


def number_rows(name: str, rows: list[dict[str, object]]) -> pd.DataFrame:
    """Give each row its `example` and put the fixed columns first."""
    numbered = [{"example": f"{name}-{i:04d}", **row} for i, row in enumerate(rows, start=1)]
    frame = pd.DataFrame(numbered)
    return frame[COLUMNS + [column for column in frame.columns if column not in COLUMNS]]


def write_set(folder: Path, frame: pd.DataFrame, facts: dict[str, str], prose: str) -> Path:
    """Write `<name>.csv` and its card `<name>.md`, each aside first and then renamed.

    `facts` holds the card's name, domain, title, classes, instruction, instruction_place, licence and source; the
    counts and the checksum are added here, and so are the measured sections below the prose.
    """
    table = frame.to_csv(index=False, lineterminator="\n").encode("utf-8")
    levels = frame.groupby("difficulty")["label"].agg(["size", "sum"])
    words = frame["text"].str.split().str.len()
    card = {
        **{key: facts[key] for key in ("name", "domain", "title")},
        "n": len(frame),
        "positive": int(frame["label"].sum()),
        "groups": frame["group"].nunique(),
        **{key: facts[key] for key in ("classes", "instruction", "instruction_place", "licence", "source")},
        "sha256": hashlib.sha256(table).hexdigest(),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in card.items()), "---", "", prose.strip(), "", "## Counts", ""]
    lines += ["| difficulty | statements | of which label 1 |", "|---|---|---|"]
    lines += [f"| {level} | {size} | {positive} |" for level, (size, positive) in levels.iterrows()]
    lines += [
        "",
        f"Templates: {', '.join(sorted(frame['template'].unique()))}. Length: {words.min()} to {words.max()} words.",
    ]
    lines += ["", "## Bag of words", ""]
    measured, majority = bag_of_words_accuracy(frame), max(frame["label"].mean(), 1 - frame["label"].mean())
    lines.append(
        "Logistic regression on unigram counts, mean over 20 group-aware 60/40 splits: "
        f"accuracy {measured:.2f} (majority class {majority:.2f})."
    )
    return write_files(folder, facts["name"], table, lines)


def write_files(folder: Path, name: str, table: bytes, card: list[str]) -> Path:
    """Write `<name>.csv` and, from its lines, `<name>.md`: each aside first and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in ((folder / f"{name}.csv", table), (folder / f"{name}.md", ("\n".join(card) + "\n").encode())):
        aside = path.with_name(path.name + ".part")
        aside.write_bytes(content)
        os.replace(aside, path)
    return folder / f"{name}.csv"


def main(builders: dict[str, Callable[[Path], object]], description: str) -> None:
    """Command line: `build_x.py [NAME ...] [--out DIR]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"sets to build; all by default: {', '.join(builders)}"
    )
    parser.add_argument("--out", type=Path, default=DATA, metavar="DIR", help="where the files go (default: data/)")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(builders))
    if unknown:
        parser.error(f"no set {', '.join(unknown)} here; there are {', '.join(builders)}")
    for name in arguments.names or builders:
        print(builders[name](arguments.out))
