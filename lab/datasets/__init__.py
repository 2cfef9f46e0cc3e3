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
    lab.datasets.as_two_hop(pd.read_csv("mine.csv", keep_default_na=False))    # else an answer "NA" is missing

Two-hop queries come as a DataFrame of one query a row. `as_two_hop` says which columns there are and which of them a
table needs; the card of `two_hop` says what they hold.

    lab.datasets.names(kind="prompts")            # prompts of graded difficulty: "5 + 7 + 5 = "
    lab.datasets.load("chains")
    lab.datasets.load("published/gsm8k")          # downloaded once
    lab.datasets.as_prompts(pd.read_csv("mine.csv", dtype={"answer": str}, keep_default_na=False))
    lab.datasets.load("prose")                    # plain text, for losses, norms and maps

Prompts come one a row, with their `level` (steps, hops, terms), prose one document a row: see `as_prompts`, `as_prose`.
"""

import json
from pathlib import Path

import pandas as pd

from lab.datasets.published import (
    PUBLISHED,
    PUBLISHED_PROMPTS,
    PUBLISHED_TWO_HOP,
    cache_folder,
    load_published,
    load_published_prompts,
    load_published_two_hop,
)
from lab.datasets.tables import (
    COLUMNS,
    _check_columns,
    _finish,
    _number,
    _sha256,
    as_prompts,
    as_prose,
    as_two_hop,
    check_concept_data,
    check_prompts,
    check_prose,
    check_texts,
    check_two_hop_data,
    read_csv,
)

__all__ = [
    "COLUMNS",
    "as_prompts",
    "as_prose",
    "as_two_hop",
    "cache_folder",
    "check_concept_data",
    "check_prompts",
    "check_prose",
    "check_texts",
    "check_two_hop_data",
    "load",
    "names",
    "published_curves",
    "published_points",
    "read",
]

TWO_HOP_SETS = ("two_hop",)
PROMPT_SETS = ("word_problems", "sums", "chains")
PROSE_SETS = ("prose",)
NUMBERS = {  # columns of the kit's own sets that are numbers; all others are texts, also where they hold digits only
    **dict.fromkeys(("label", "difficulty", "level", "population", "flips", "distance", "first", "second"), int),
    **{"e1_popularity": int, "e2_popularity": float, "answer_share": float, "ratio": float},
}
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
    frame = read_csv(path)
    for column in frame.columns.intersection(list(NUMBERS)):
        frame[column] = [
            NUMBERS[column](cell) if cell else float("nan") for cell in frame[column]
        ]  # people: no popularity
    if name in TWO_HOP_SETS:
        return _with_card(as_two_hop(frame, name=name), card)
    if name in PROMPT_SETS + PROSE_SETS:
        return _with_card((as_prompts if name in PROMPT_SETS else as_prose)(frame, name=name), card)
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
        DataFrame as from `load`; columns not named here are kept behind the fixed ones, as texts.

    Raises:
        ValueError: no such file or column, a file that is no CSV in UTF-8 with as many cells in each row as in its header
            (with the line), or what `check_concept_data` refuses.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"no file {path}: pass the path of a CSV with the columns {text!r} and {label!r}")
    frame = read_csv(path)
    _check_columns(frame, [column for column in (text, label, group, template) if column is not None], name=path.name)
    fixed = pd.DataFrame(
        {
            "example": frame["example"] if "example" in frame else _number(path.stem, len(frame)),
            "text": frame[text],
            "label": frame[label].astype(object).replace({"0": 0, "1": 1}),
            "group": frame[text if group is None else group],
            "template": "own" if template is None else frame[template],
            "difficulty": _whole(frame["difficulty"], path.name) if "difficulty" in frame else 1,
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


def _whole(cells: pd.Series, name: str) -> list[int]:
    for row, cell in enumerate(cells):
        if not (cell.isascii() and cell.isdigit()):
            raise ValueError(f"{name}: difficulty {cell!r} in row {row}: whole numbers are needed, or no such column")
    return [int(cell) for cell in cells]


def _data_folder() -> Path:
    """`data/` beside the package in a checkout, else `_data/` inside the installed package."""
    package = Path(__file__).resolve().parents[1]
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
