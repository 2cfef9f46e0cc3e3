"""Build the chains of one to four hops: "The capital of the country of birth of the author of the book Moby-Dick is".

`python data/build/build_chains.py [--out DIR]`. Facts are those of `two_hop.csv` (build it first), and the characters in
`chains.txt` beside this script. All draws come from one seeded generator.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from build_geonames import SOURCE
from build_two_hop import DEMONYMS, R2, fold, forms, markdown_table, stands_in
from common import DATA, capitalise, main, write_files

LEVELS = range(1, 5)
ASKED = ("capital", "currency", "language", "continent", "calling_code")  # of a country, last in its chain
TEMPLATES = {
    "character_book": "the book that features the character {}",
    "book_author": "the author of {}",
    "birth_country": "the country of birth of {}",
    "city_country": "the country that contains the city of {}",
    "landmark_country": "the country whose territory includes {}",
    "company_country": "the country of origin of the company {}",
    **{relation: R2[relation][0] for relation in (*ASKED, "native_language")},
    "currency_code": "the international three-letter code of {}",
}
COUNTRY_OF = {
    "person": "birth_country",
    **{kind: f"{kind}_country" for kind in ("city", "landmark", "company")},
}
LIKE_CODES = ("RMB", "NIS")  # three capitals too, but no codes
# Most of the longest chains with one last relation and one answer: from characters and books, and from the others.
LONG_CAP = {"capital": 5, "currency": 6, "language": 8, "continent": 12, "calling_code": 4, "currency_code": 4}
SHORT_CAP = {"capital": 2, "currency": 2, "language": 2, "continent": 4, "calling_code": 2, "currency_code": 2}


class Entity(NamedTuple):
    """A name, how it stands in a sentence, and its other names."""

    name: str
    in_sentence: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return forms(self.name, list(self.aliases))


class Chain(NamedTuple):
    """Entities e_0 .. e_k and the k relations between them."""

    entities: tuple[Entity, ...]
    relations: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """All relations, nested around the first entity."""
        phrase = self.entities[0].in_sentence
        for relation in self.relations:
            phrase = TEMPLATES[relation].format(phrase)
        return f"{capitalise(phrase)} is"

    def parts(self) -> list["Chain"]:
        """All its stretches of one hop or more, itself among them."""
        k = len(self.relations)
        spans = [(i, j) for i in range(k) for j in range(i + 1, k + 1)]
        return [Chain(self.entities[i : j + 1], self.relations[i:j]) for i, j in spans]

    def then(self, relation: str, entity: Entity) -> "Chain":
        """One hop longer."""
        return Chain((*self.entities, entity), (*self.relations, relation))


def is_clean(chain: Chain) -> bool:
    """No entity but the first stands in the prompt, in any of its forms, and no two share a name."""
    named = [{fold(name) for name in entity.names} for entity in chain.entities]
    twice = any(named[i] & named[j] for j in range(len(named)) for i in range(j))
    return not twice and not any(stands_in(name, chain.prompt) for e in chain.entities[1:] for name in e.names)


def read_characters(path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Book -> its other names, its characters."""
    books = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            title, others, characters = (part.strip() for part in line.split("|"))
            books[title] = ([name for name in others.split(", ") if name], characters.split(", "))
    return books


def without_article(title: str) -> list[str]:
    """ "Great Gatsby" for "The Great Gatsby"; nothing where a single word would be left."""
    first, _, rest = title.partition(" ")
    return [rest] if first in ("The", "A") and " " in rest else []


class Facts:
    """What `two_hop.csv` says: who leads to whom, and what is asked of countries and authors."""

    def __init__(self) -> None:
        table = pd.read_csv(DATA / "two_hop.csv", dtype=str, keep_default_na=False)
        for column in ("e1_aliases", "e2_aliases", "e3_aliases"):
            table[column] = [tuple(json.loads(cell)) for cell in table[column]]
        self.first: dict[str, list[tuple[Entity, Entity]]] = {}  # type of e1 -> e1 and its country, or its author
        self.answers: dict[str, dict[str, Entity]] = {}  # country or author -> relation -> answer
        seen = set()
        for row in table.sort_values(["e1_type", "e1", "r2"]).itertuples():
            begin = len(capitalise(row.r2_template).removesuffix("{}"))
            bridge = Entity(row.e2, row.second_hop[begin:].removesuffix(" is"), row.e2_aliases)
            if (row.e1_type, row.e1) not in seen:
                seen.add((row.e1_type, row.e1))
                e1 = Entity(row.e1, f"the book {row.e1}" if row.e1_type == "book" else row.e1, row.e1_aliases)
                self.first.setdefault(row.e1_type, []).append((e1, bridge))
            in_sentence, aliases = row.e3, row.e3_aliases
            if row.r2 == "currency":  # its code is an answer of its own
                in_sentence, aliases = f"the {row.e3}", tuple(a for a in aliases if a != code_of(row.e3_aliases))
                self.answers.setdefault(row.e3, {})["currency_code"] = Entity(code_of(row.e3_aliases), "")
            self.answers.setdefault(row.e2, {})[row.r2] = Entity(row.e3, in_sentence, aliases)
        in_sentences = {bridge.name: bridge for kind in COUNTRY_OF for _, bridge in self.first[kind]}
        for found in self.answers.values():  # as an answer a country comes without its article; in the next hop with it
            if "country_of_birth" in found:
                born = found["country_of_birth"]
                found["country_of_birth"] = Entity(born.name, in_sentences[born.name].in_sentence, born.aliases)

    def of_country(self, chain: Chain) -> list[Chain]:
        """The chain, which ends in a country, and what is asked of it: the longest ones."""
        found = self.answers[chain.entities[-1].name]
        longer = [chain.then(relation, found[relation]) for relation in ASKED if relation in found]
        money = [one for one in longer if one.relations[-1] == "currency"]
        return longer + [
            one.then("currency_code", self.answers[one.entities[-1].name]["currency_code"]) for one in money
        ]


def code_of(names: tuple[str, ...]) -> str:
    """The currency's three letters; `build_two_hop.py` has checked them against GeoNames."""
    (code,) = [
        name for name in names if len(name) == 3 and name.isalpha() and name.isupper() and name not in LIKE_CODES
    ]
    return code


def longest_chains() -> tuple[list[Chain], list[Chain]]:
    """Chains that begin at characters and books; chains that begin at persons, landmarks, cities and companies."""
    facts, characters = Facts(), read_characters(Path(__file__).with_name("chains.txt"))
    unknown = set(characters) - {title.name for title, _ in facts.first["book"]}
    assert not unknown, f"chains.txt: no such book in two_hop.csv: {unknown}"
    countries = {bridge.name for kind in COUNTRY_OF for _, bridge in facts.first[kind]}
    long: list[Chain] = []
    for plain_title, author in facts.first["book"]:
        others, heroes = characters.get(plain_title.name, ([], []))
        title = plain_title._replace(aliases=(*plain_title.aliases, *others, *without_article(plain_title.name)))
        from_book = Chain((title, author), ("book_author",))
        starts = []
        for hero in heroes:
            assert not [word for word in (*DEMONYMS, *countries) if stands_in(word, hero)], f"{hero!r} names a country"
            starts.append(Chain((Entity(hero, hero), title, author), ("character_book", "book_author")))
        known = facts.answers[author.name]
        if "native_language" in known:
            long += [start.then("native_language", known["native_language"]) for start in starts]
        if "country_of_birth" in known:
            for start in (*starts, from_book):
                longer = facts.of_country(start.then("birth_country", known["country_of_birth"]))
                long += [chain for chain in longer if len(chain.relations) == max(LEVELS)]
    short: list[Chain] = []
    for kind, relation in COUNTRY_OF.items():
        for first, country in facts.first[kind]:
            short += facts.of_country(Chain((first, country), (relation,)))
    return long, short


def capped(chains: list[Chain], caps: dict[str, int], rng: np.random.Generator) -> list[Chain]:
    """A random choice: clean in all parts, and not too many with one last relation and one answer."""
    given: Counter = Counter()
    kept = []
    for i in rng.permutation(len(chains)):
        key = (chains[i].relations[-1], chains[i].entities[-1].name, len(chains[i].relations))
        if given[key] < caps.get(key[0], 10**9) and all(is_clean(part) for part in chains[i].parts()):
            given[key] += 1
            kept.append(chains[i])
    return kept


def all_rows(rng: np.random.Generator) -> list[dict[str, object]]:
    """Every part of every chosen chain, once; each pair of level and last relation spread evenly over the table."""
    long, short = longest_chains()
    chosen = capped(long, LONG_CAP, rng)
    parts = {part.prompt: part for chain in chosen for part in chain.parts()}
    # The others end where a chain from a book ends too, so that the same is asked at all levels.
    ends = {(part.relations[-1], *part.entities[-2:]) for part in parts.values() if len(part.relations) > 1}
    others = [chain for chain in short if (chain.relations[-1], *chain.entities[-2:]) in ends]
    for chain in capped(others, SHORT_CAP, rng):
        parts |= {part.prompt: part for part in chain.parts() if part.prompt not in parts}
    kinds: dict[tuple[int, str], list[dict[str, object]]] = {}
    for part in parts.values():
        kinds.setdefault((len(part.relations), part.relations[-1]), []).append(row_of(part))
    placed = []
    for rows in kinds.values():
        placed += [((i + rng.random()) / len(rows), rows[j]) for i, j in enumerate(rng.permutation(len(rows)))]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def row_of(chain: Chain) -> dict[str, object]:
    hops = [part for part in chain.parts() if len(part.relations) == 1]
    return {
        "group": chain.entities[0].name,
        "level": len(chain.relations),
        "prompt": chain.prompt,
        "answer": f" {chain.entities[-1].name}",
        "aliases": chain.entities[-1].names,
        "hop_prompts": [hop.prompt for hop in hops],
        "hop_answers": [hop.entities[-1].names for hop in hops],
        "relations": list(chain.relations),
        "entities": [entity.name for entity in chain.entities],
    }


PROSE = """
# Chains of one to four hops

"{example}"
-> {answer}. A chain goes from a first entity, which the prompt names, through one to four relations to the answer; the
entities between are not named. `level` is the number of hops.

Relations:

{relations}

Columns:

- `example`; `group`: the first entity; `level`: hops, 1 to 4; `prompt`: ends in " is"; `answer`: a space and the name, without
  an article for countries. Prompt and answer are joined as they are.
- `aliases`: accepted forms of the answer, its name first. `hop_prompts`, `hop_answers`: for each hop, in order, the prompt that
  asks for it alone (it names the entity before) and the accepted forms of its answer; the last hop's are `aliases`.
  All hops answered right means that all facts of the chain are known.
- `relations`, `entities`: what the chain consists of, k relations and k + 1 names. Lists are JSON in the file.

Pairs: every stretch of a chain is a row too. So each of the {four} chains of four hops comes with

- the three shorter ones that share its first entity (the answers are its intermediate entities),
- the three shorter ones that share its last relation and its answer (they begin at its intermediate entities): the same
  question about the same country or currency, with one, two, three or four hops before the answer,
- its hops, which are rows of level 1.

How made: characters -> book -> author -> country of birth -> what is asked of a country; book -> author -> country ->
currency -> code; persons, landmarks, cities and companies -> country -> the same, where such a chain from a book ends in
the same way. Books, authors, persons, landmarks, companies, cities and facts are those of `two_hop.csv`, with its exclusions;
characters are in `data/build/chains.txt`, those that occur in several books left out. Then chains are drawn at
random, with a cap on those with one last relation and one answer:
{long}; for the chains that don't begin at books or characters
{short}.

In no prompt stands any later entity of its chain, in any accepted form, and no two entities of a chain share a form. No
prompt occurs twice. Order: drawn once, each level and last relation spread evenly over the file.
"""
FLAWS = """
## Known flaws

- More hops are longer prompts: {length} words by level. The prompt's length belongs to every comparison of levels.
- The wording nests, as in `two_hop`: "the X of the Y of the Z of E". Long ones are hard to read for people too.
- A split by `group` keeps a first entity together, but groups share facts and answers (Captain Ahab, Moby-Dick and Herman
  Melville all lead to one country). Where that matters, split by an entity that they share, such as the author or the
  country: `entities` has them.
- Small models don't know most characters and many authors. Look at the hops before a chain is called failed: chains of
  which all hops are known are few, and not a random sample.
- Levels differ in what they ask: books only at level 1, authors up to 2, countries up to 3. Compare levels within one
  last relation of the six that all levels have ({asked}).
- At level 1 every fact stands once, at level 4 an answer several times: see the shares, and weigh or pair.
- A country can often be guessed from the sound of a name, and skipping hops is possible (a character's name sounds
  Japanese). Single hops that are known don't prove that they are used.
- English, French and American literature leads. Who counts as a character, and which of a novel's many, is our choice;
  "book" is meant widely (plays, tales, one series of comics).
- Books are named by their English titles; a title may have other forms than those accepted.
- Answers without articles: "is United States" is not how one would go on. Titles keep theirs.
- The facts change as those of `two_hop` do; its known flaws hold here too.
"""


def card(frame: pd.DataFrame, table: bytes) -> list[str]:
    """The card's lines."""
    last = frame["relations"].str[-1]
    facts = {
        "name": "chains",
        "kind": "prompts",
        "title": "Chains of one to four hops",
        "n": len(frame),
        "groups": frame["group"].nunique(),
        "levels": ", ".join(map(str, LEVELS)),
        "licence": "MIT (selection, wording and hand-written lists, this project); facts CC BY 4.0 (GeoNames)",
        "source": f"{SOURCE['source']}; books, people, landmarks, companies, characters: our own lists "
        "(data/build/two_hop.txt, data/build/chains.txt)",
        "sha256": hashlib.sha256(table).hexdigest(),
    }
    counts = pd.crosstab(last, frame["level"])
    rows = [[relation, *(n or "" for n in counts.loc[relation])] for relation in TEMPLATES]
    rows.append(["all", *counts.sum()])
    shares = []
    for relation in (*ASKED, "currency_code"):
        cells: list[object] = []
        for level in LEVELS:
            answers = frame.loc[(last == relation) & (frame["level"] == level), "answer"].value_counts()
            top = min(answers.index[answers == answers.iloc[0]])
            cells.append(f"{len(answers)}; {top.strip()} {answers.iloc[0] / answers.sum():.2f}")
        shares.append([relation, *cells])
    length = frame["prompt"].str.split().str.len().groupby(frame["level"]).mean()
    example = frame[(frame["level"] == 4) & (last == "capital")].iloc[0]
    prose = PROSE.strip().format(
        example=example["prompt"],
        answer=example["answer"].strip(),
        relations="\n".join(f"- `{relation}`: {text.format('...')}" for relation, text in TEMPLATES.items()),
        four=(frame["level"] == 4).sum(),
        long=", ".join(f"{relation} {n}" for relation, n in LONG_CAP.items()),
        short=", ".join(f"{relation} {n}" for relation, n in SHORT_CAP.items()),
    )
    flaws = FLAWS.strip().format(
        length=", ".join(f"{n:.0f}" for n in length), asked=", ".join((*ASKED, "currency_code"))
    )
    levels = [f"{k} hop{'s' * (k > 1)}" for k in LEVELS]
    return [
        *("---", *(f"{key}: {value}" for key, value in facts.items()), "---", "", prose, ""),
        *("## Counts", "", "Rows by last relation:", "", *markdown_table(["last relation", *levels], rows)),
        *("", "Different answers, and the most frequent with its share:", ""),
        *markdown_table(["last relation", *levels], shares),
        *("", flaws),
    ]


def build_chains(folder: Path) -> Path:
    rows = all_rows(np.random.default_rng(63))
    frame = pd.DataFrame([{"example": f"chains-{i:04d}", **row} for i, row in enumerate(rows, start=1)])
    written = frame.copy()
    for column in ("aliases", "hop_prompts", "hop_answers", "relations", "entities"):
        written[column] = [json.dumps(cell, ensure_ascii=False) for cell in frame[column]]
    table = written.to_csv(index=False, lineterminator="\n").encode("utf-8")
    return write_files(folder, "chains", table, card(frame, table))


if __name__ == "__main__":
    main({"chains": build_chains}, __doc__.splitlines()[0])
