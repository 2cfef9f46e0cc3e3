"""Data: labelled statements, two-hop queries, graded prompts and prose, the kit's own, published ones or a user's.

lab.datasets.names()                          # labelled statements; names("two_hop"), names("prompts"), names("prose")
lab.datasets.load("cities")                   # ships with the kit
lab.datasets.load("published/cities")         # downloaded once from its authors; or source="~/Downloads/CD/dataset"
lab.datasets.read("mine.csv", text="sentence", label="is_true", group="topic")
lab.datasets.as_two_hop(pd.read_csv("mine.csv", keep_default_na=False))    # else an answer "NA" is missing
"""

import json
from pathlib import Path

import pandas as pd

from lab.datasets import files, tables
from lab.datasets.files import cache_folder
from lab.datasets.published import PUBLISHED, load_published
from lab.datasets.tables import (
    COLUMNS,
    as_prompts,
    as_prose,
    as_two_hop,
    check_concept_data,
    check_prompts,
    check_prose,
    check_texts,
    check_two_hop_data,
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

OURS = {
    "two_hop": ["two_hop"],
    "prompts": ["chains", "sums", "word_problems"],
    "prose": ["prose"],
}  # all others: concept
NUMBERS = {  # columns of the kit's own sets that are numbers; all others are texts, also where they hold digits only
    **dict.fromkeys(("label", "difficulty", "level", "population", "flips", "distance", "first", "second"), int),
    **{"e1_popularity": int, "e2_popularity": float, "answer_share": float, "ratio": float},
}


def names(kind: str = "concept") -> list[str]:
    """Names that `load` knows: the sets in the data folder, then the published ones.

    Args:
        kind: "concept" (labelled statements), "two_hop" (queries that take two facts), "prompts" (of graded difficulty)
            or "prose" (plain text).
    """
    if kind not in ("concept", *OURS):
        raise ValueError(f"kind={kind!r}: there are 'concept' and 'two_hop', 'prompts' and 'prose'")
    here = sorted(path.stem for path in files.data_folder().glob("*.csv"))
    others = [name for known in OURS.values() for name in known]
    ours = [name for name in here if (name in OURS[kind] if kind in OURS else name not in others)]
    return ours + sorted(name for name, published in PUBLISHED.items() if published.kind == kind)


def load(name: str, *, source: str | Path | None = None) -> pd.DataFrame:
    """Statements of one concept, with their labels, groups and card; or two-hop queries, graded prompts, prose.

    Args:
        name: one of `names()`, or of `names(kind)` for the other kinds. "published/..." is downloaded from its authors on
            first use and kept in the user's cache (the environment variable LAB_CACHE moves it).
        source: for published sets only, instead of a download: a folder that holds the authors' file under its own
            name. Its checksum is verified in the same way.

    Returns:
        DataFrame with the columns in `COLUMNS`, then columns of its own; for two-hop queries, the columns that
        `as_two_hop` describes, for prompts and prose those of `as_prompts` and `as_prose`; lists as lists.
        `.attrs["card"]` is its card, a dict: what there is to know about it by key, and its prose under "text".

    Raises:
        ValueError: unknown name; a file whose checksum, columns, classes or counts are not those of its card.
        ConnectionError: a download that could not be had. OSError: no room for it.
    """
    if name in PUBLISHED:
        return load_published(PUBLISHED[name], source=source)
    if name not in (known := [*names(), *names("prompts"), *names("prose"), *names("two_hop")]):
        every = f"There are: {', '.join(known)}. For a CSV of your own: lab.datasets.read(path)"
        raise ValueError(f"no data set {name!r}. {every}")
    if source is not None:
        raise ValueError(f"source= is for published sets; {name!r} ships with the kit: call load({name!r}) without it")
    path = files.data_folder() / f"{name}.csv"
    card = _read_card(path.with_suffix(".md"))
    if (found := files.sha256(path)) != card["sha256"]:
        mend = "Restore it, or build it again (data/build), or read your own version with lab.datasets.read(path)"
        raise ValueError(
            f"{path.name} has SHA-256 {found}, its card says {card['sha256']}: the file was changed. {mend}"
        )
    frame = files.read_csv(path)
    for column in frame.columns.intersection(list(NUMBERS)):  # people have no popularity
        frame[column] = [NUMBERS[column](cell) if cell else float("nan") for cell in frame[column]]
    as_kind = {"two_hop": as_two_hop, "prompts": as_prompts, "prose": as_prose}
    for kind, ours in OURS.items():
        if name in ours:
            frame = as_kind[kind](frame, name=name)
            break
    else:
        check_concept_data(frame, name=name)
    counts = {"n": len(frame), "groups": frame["group"].nunique()}
    if "label" in frame:
        counts["positive"] = int(frame["label"].sum())
    for key in card.keys() & counts.keys():
        if card[key] != counts[key]:
            said = f"the card says {key} = {card[key]}, the file has {counts[key]}"
            raise ValueError(f"{name}: {said}: build the set again")
    frame.attrs["card"] = card
    return frame


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
    return json.loads((files.data_folder() / "published_concept_depth.json").read_text(encoding="utf-8"))


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
    frame = files.read_csv(path)
    tables.check_columns(frame, [one for one in (text, label, group, template) if one is not None], name=path.name)
    fixed = pd.DataFrame(
        {
            "example": frame["example"] if "example" in frame else tables.number_rows(path.stem, len(frame)),
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
    counts = {"n": len(frame), "positive": int(frame["label"].sum()), "groups": frame["group"].nunique()}
    said = {"classes": "0, 1", "instruction": "", "instruction_place": "before", "licence": "not stated", "text": ""}
    card = {"name": path.stem, "domain": "own", "title": path.stem, **counts, **said, "source": path.name}
    frame.attrs["card"] = {**card, "sha256": files.sha256(path)}
    return frame


def _whole(cells: pd.Series, name: str) -> list[int]:
    for row, cell in enumerate(cells):
        if not (cell.isascii() and cell.isdigit()):
            raise ValueError(f"{name}: difficulty {cell!r} in row {row}: whole numbers are needed, or no such column")
    return [int(cell) for cell in cells]


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
