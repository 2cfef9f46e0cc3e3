"""Published sets, fetched from their authors on demand: how each is read. What each is, `data/published_sets.json` says.

Statements: Jin et al. (arXiv 2404.07066), github.com/Luckfort/CD. Two-hop
queries: Biran et al. (arXiv 2406.12775). Prompts of graded difficulty: as Csordás et al. (arXiv 2505.13898) use them.
"""

import ast
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from lab.datasets import files, tables


@dataclass(frozen=True)
class Published:
    """One published set: where its file is, how it is verified, which rows of it were used, what its card says."""

    name: str
    kind: str  # as in `lab.datasets.names`
    url: str
    checksum: str  # "sha256:<hex>", or "git:<hex>": the id git gives the file (SHA-1 of its length and bytes)
    rows: Callable[[Path], pd.DataFrame]  # of statements: text, label, published_label, and group or columns of its own
    card: dict[str, Any]
    n: int | None = None  # None: not known for certain when the loader was written
    positive: int | None = None


def load_published(published: Published, *, source: str | Path | None = None) -> pd.DataFrame:
    """Rows of a published set with its card, from a folder or from its authors; checksum and counts are verified.

    Raises:
        ValueError: a file of another checksum or of other counts, or not of the form that is expected.
        ConnectionError: a download that could not be had. OSError: no room for it.
    """
    # Several prompts come in a file called test.jsonl: each of these sets has a folder of its own in the cache.
    subfolder = published.name.partition("/")[2] if published.kind == "prompts" else ""
    path = files.verified(published.url, published.checksum, source, subfolder=subfolder)
    frame, kind, found = published.rows(path), {"kind": published.kind}, dict[str, Any]()
    if published.kind == "concept":
        frame, kind = _statements(frame.reset_index(drop=True), published.name), {}
        found |= {"positive": int(frame["label"].sum())}
    elif published.kind == "prompts":
        frame = tables.as_prompts(frame, name=published.name)
        found |= {"levels": ", ".join(map(str, sorted(frame["level"].unique())))}
    else:
        found |= {"pairs": int((~frame[["r1", "r2"]].duplicated()).sum())}
    found |= {"n": len(frame), "groups": frame["group"].nunique()}
    for key, value in {"n": published.n, "positive": published.positive}.items():
        if value is not None and found[key] != value:
            wrong = f"{key} is {found[key]}, where {value} is expected"
            report = "please report this with the versions of pandas and of this kit"
            raise ValueError(f"{published.name}: {wrong}: {report}")
    card = {"name": published.name, **kind, **published.card, **found}
    frame.attrs["card"] = {**card, "source": published.url, "sha256": files.sha256(path)}
    return frame


def _statements(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The columns of `tables.COLUMNS`, checked, and those of the set's own behind them."""
    given = {"group": rows["text"], "template": "published", "difficulty": 1} | dict(rows.items())
    given |= {"example": tables.number_rows(name.removeprefix("published/"), len(rows))}
    frame = tables.first_columns(pd.DataFrame(given), tables.COLUMNS)
    tables.check_concept_data(frame, name=name)
    return frame


# --- statements -----------------------------------------------------------------------------------------------------


def _two_lists(
    rows: pd.DataFrame, zero: pd.Series, one: pd.Series | None = None, *, n: int | None = None, label_of_zero: int = 1
) -> pd.DataFrame:
    """The authors' two lists, one after the other (`published_label` 0 and 1): the first n rows of each mask."""
    lists = (zero, label_of_zero), (~zero if one is None else one, 1 - label_of_zero)
    parts = [rows[mask][:n].assign(label=label, published_label=i) for i, (mask, label) in enumerate(lists)]
    return pd.concat(parts, ignore_index=True)


def _true_false(path: Path, *, group: str, n: int | None = None) -> pd.DataFrame:
    table = files.read_csv(path)
    rows = table.rename(columns={"statement": "text"}).assign(group=table[group])
    return _two_lists(rows, rows["label"] == "1", rows["label"] == "0", n=n)


def _common_claim(path: Path) -> pd.DataFrame:
    table = files.read_csv(path)
    rows = pd.DataFrame({"text": table["examples"], "agreement": table["agreement"].map(float)})
    return _two_lists(rows, table["label"] == "True", table["label"] == "False", n=3000)


def _stsa(path: Path) -> pd.DataFrame:
    lines = [line.strip().split(" ", 1) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    rows = pd.DataFrame({"text": [text for _, text in lines]})
    return _two_lists(rows, pd.Series([digit == "0" for digit, _ in lines]), label_of_zero=0)


def _hateeval(path: Path) -> pd.DataFrame:
    # As the authors read it: quotes in tweets join lines here and there, and which rows come first depends on that.
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, index_col=False)
    return _two_lists(table[["text"]], table["HS"] == "1", n=3000)


def _sarcasm(path: Path) -> pd.DataFrame:
    rows = pd.DataFrame([entry for _, entry in _json_lines(path, ("headline", "is_sarcastic"))])
    return _two_lists(rows[["headline"]].set_axis(["text"], axis=1), rows["is_sarcastic"] == 1, n=3000)


def _strategyqa(path: Path) -> pd.DataFrame:
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    rationales = [re.sub(r"^(Yes|No)\.(.*)", lambda found: found[2].strip(), one["target"], flags=re.DOTALL)
                  for one in examples]  # fmt: skip
    rows = pd.DataFrame({"text": [one["input"] for one in examples], "rationale": rationales})
    return _two_lists(rows, pd.Series([one["target_scores"]["Yes"] == 1 for one in examples]))


def _coinflip(path: Path) -> pd.DataFrame:
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    rows = pd.DataFrame({"text": [one["question"] for one in examples]})
    return _two_lists(rows, pd.Series([one["answer"] == "yes" for one in examples]))


def _imdb(path: Path) -> pd.DataFrame:
    """First 1,000 negative and positive reviews of the test half, in the order of the archive."""
    reviews: dict[str, list[str]] = {"neg": [], "pos": []}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            half, _, rest = member.name.removeprefix("aclImdb/").partition("/")
            texts = reviews.get(rest.partition("/")[0])
            if half != "test" or texts is None or len(texts) == 1000 or not member.isfile():
                continue
            file = archive.extractfile(member)
            assert file is not None, f"{member.name} is a regular file in this archive"
            texts.append(file.read().decode("utf-8"))
            if all(len(texts) == 1000 for texts in reviews.values()):
                break
    rows = pd.DataFrame({"text": reviews["neg"] + reviews["pos"]})
    return _two_lists(rows, pd.Series(rows.index < len(reviews["neg"])), label_of_zero=0)


# --- two-hop queries ------------------------------------------------------------------------------------------------


def published_two_hop_rows(path: Path) -> pd.DataFrame:
    """A file in the published form, row by row, with this kit's columns first and columns that it adds behind them."""
    table = files.read_csv(path)  # "None" and "NA" may be names
    entities, relations, kept = ("e1", "e2", "e3"), ("r1", "r2"), ("r1_template", "r2_template")
    theirs = {"source_prompt": "text", "id": "example"} | {part: f"{part}_id" for part in entities + relations}
    theirs |= {f"{e}_label": e for e in entities} | {f"{r}_type": r for r in relations}
    alike = [f"{e}_{what}" for e in entities for what in ("type", "popularity", "aliases")]
    tables.check_columns(table, [*theirs, *kept, *alike], name=path.name)
    frame = table.rename(columns=theirs)
    lists: dict[str, list[str]] = {}
    for column in tables.TWO_HOP_ALIASES:
        for row, written in enumerate(frame[column]):
            if written not in lists:
                where = f"{path.name}: {column} in row {row} (id {frame['example'].iloc[row]})"
                lists[written] = _python_list(written, where)
        labels = frame[column.removesuffix("_aliases")]
        forms = [list(dict.fromkeys([e, *lists[written]])) for e, written in zip(labels, frame[column], strict=True)]
        frame[column] = pd.Series(forms, index=frame.index, dtype=object)
    for entity in entities:
        frame[f"{entity}_popularity"] = pd.to_numeric(frame[f"{entity}_popularity"])
    rows = list(zip(frame["r1_template"], frame["r2_template"], frame["e1"], frame["e2"], strict=True))
    frame["first_hop"] = [f"{r1.format(e1)} is" for r1, _, e1, _ in rows]
    frame["second_hop"] = [f"{r2.format(e2)} is" for _, r2, _, e2 in rows]
    frame["entity_shortcut"] = [f"{r2.format(e1)} is" for _, r2, e1, _ in rows]
    frame["relation_shortcut"] = [r2.format(r1.format(""))[:-4] for r1, r2, *_ in rows]
    frame["example"] = "published_two_hop-" + frame["example"]
    frame["group"] = frame["e2"]
    first = (
        *("example", "text", *entities, *tables.TWO_HOP_ALIASES, "e1_type", "e2_type", "e3_type", *relations, *kept),
        *("first_hop", "second_hop", "entity_shortcut", "relation_shortcut", "group"),
        *("e1_popularity", "e2_popularity", "e3_popularity"),
    )
    return tables.as_two_hop(
        tables.first_columns(frame.drop(columns="", errors="ignore"), first), name="published/two_hop"
    )


def _python_list(written: str, where: str) -> list[str]:
    """A list of texts as Python writes it; nothing in it is run."""
    try:
        parsed = ast.literal_eval(written)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{where} is {written[:80]!r}, not a list as Python writes it") from error
    if not isinstance(parsed, list) or not all(isinstance(alias, str) for alias in parsed):
        raise ValueError(f"{where} is {written[:80]!r}, not a list of texts")
    return parsed


# --- prompts of graded difficulty -----------------------------------------------------------------------------------


def gsm8k_rows(path: Path) -> pd.DataFrame:
    """GSM8K in its authors' form: JSON lines of question and answer, the answer ending in a line "#### number".

    `level` is the number of lines of the solution. Calculator marks (<<48/2=24>>) are left in.
    """
    rows = []
    for place, entry in _json_lines(path, ("question", "answer")):
        reasoning, mark, number = entry["answer"].rpartition("\n#### ")
        if not mark:
            raise ValueError(f"{place}: the answer {entry['answer'][-60:]!r} doesn't end in a line '#### number'")
        level = sum(bool(line.strip()) for line in reasoning.splitlines())
        solution = f" {reasoning}\nThe final answer is {number}."
        rows.append((level, f"Problem: {entry['question']}\nAnswer:", solution, f" {number}"))
    frame = pd.DataFrame(rows, columns=["level", "prompt", "solution", "answer"])
    frame.insert(0, "example", tables.number_rows("gsm8k", len(frame)))
    return frame


def math_rows(path: Path, *, subject: str = "Intermediate Algebra") -> pd.DataFrame:
    """One subject of MATH from JSON lines of problem, level ("Level 3"), solution and subject (or type).

    The answer is the entry's, or, without one, what stands in the solution's last box.
    """
    rows: list[tuple] = []
    subjects = set()
    for place, entry in _json_lines(path, ("problem", "level", "solution")):
        here = str(entry.get("subject") or entry.get("type"))
        subjects.add(here)
        if here.lower().replace("_", " ") != subject.lower():
            continue
        level = re.fullmatch(r"Level (\d)", str(entry["level"]))
        if level is None:
            raise ValueError(f"{place}: level {entry['level']!r}; 'Level 1' to 'Level 5' are expected")
        example = entry.get("unique_id", f"{len(rows) + 1:04d}")
        answer = entry["answer"] if "answer" in entry else _last_box(entry["solution"], place)
        prompt, solution = f"Problem: {entry['problem']}\nAnswer:", f" {entry['solution']}"
        rows.append((f"math-{example}", int(level.group(1)), prompt, solution, f" {answer}"))
    if not rows:
        raise ValueError(f"{path.name} has no problems of {subject!r}; its subjects are {', '.join(sorted(subjects))}")
    return pd.DataFrame(rows, columns=["example", "level", "prompt", "solution", "answer"])


def _last_box(solution: str, place: str) -> str:
    r"""What stands between the braces of the last \boxed{...}; braces in it are counted."""
    _, box, rest = solution.rpartition("\\boxed{")
    depth = 1
    for end, letter in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[:end]
    raise ValueError(f"{place}: no \\boxed{{...}} in the solution, and no answer: {solution[-60:]!r}")


def mquake_rows(path: Path) -> pd.DataFrame:
    """MQuAKE in its authors' form: a JSON list of cases. The first of the three paraphrases, the answer before any edit.

    `level` is the number of triples, `group` the first triple's subject (Wikidata's identifier). `hop_prompts` are the
    clozes ("Dudley Town F.C. is associated with the sport of") with their answers, where all cases have as many as triples.
    """
    rows, hops = [], []
    for i, case in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        missing = [key for key in ("questions", "answer", "answer_alias") if key not in case]
        triples = case.get("orig", {}).get("triples") or case.get("orig_triples")  # on GitHub; on the Hugging Face hub
        if missing or not triples:
            raise ValueError(f"{path.name}, case {i}: no {', '.join(missing) or 'triples'}; it has {', '.join(case)}")
        example, prompt = f"mquake-{case.get('case_id', i + 1)}", f"Question: {case['questions'][0]}\nAnswer:"
        rows.append((example, str(triples[0][0]), len(triples), prompt, f" {case['answer']}", _forms(case)))
        single = case.get("single_hops", [])
        hops.append(single if len(single) == len(triples) and all("cloze" in hop for hop in single) else [])
    frame = pd.DataFrame(rows, columns=["example", "group", "level", "prompt", "answer", "aliases"])
    if all(hops):
        frame["hop_prompts"] = [[hop["cloze"] for hop in single] for single in hops]
        frame["hop_answers"] = [[_forms(hop) for hop in single] for single in hops]
    return frame


def _forms(entry: dict) -> list[str]:
    return list(dict.fromkeys([entry["answer"], *entry["answer_alias"]]))


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


_ROWS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "cities": partial(_true_false, group="city"),
    "counterfact": partial(_true_false, group="subject", n=2000),
    **{"common_claim": _common_claim, "stsa": _stsa, "imdb": _imdb, "sarcasm": _sarcasm, "hateeval": _hateeval},
    **{"strategyqa": _strategyqa, "coinflip": _coinflip, "two_hop": published_two_hop_rows},
    **{"gsm8k": gsm8k_rows, "math_intermediate_algebra": math_rows, "mquake": mquake_rows},
}


def _published() -> dict[str, Published]:
    told = json.loads((files.data_folder() / "published_sets.json").read_text(encoding="utf-8"))
    found = {}
    for name, about in told["sets"].items():
        card = {**told.get(about["kind"], {}), **about}
        note = [f"- {card.pop('note')}"] if "note" in card else []
        card["text"] = "\n".join([*card["text"], *note]) + "\n"
        own = {key: card.pop(key, None) for key in ("kind", "url", "checksum", "n", "positive")}
        found[name] = Published(name, rows=_ROWS[name.partition("/")[2]], card=card, **own)
    return found


PUBLISHED = _published()
