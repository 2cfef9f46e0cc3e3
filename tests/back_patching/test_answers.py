import random
from collections.abc import Iterator

import jaxtyping
import pytest

from lab.back_patching import answers
from lab.back_patching.answers import (
    LEAD_INS,
    OPENERS,
    Answer,
    can_still_lead,
    is_decided,
    leading_match,
    published_match,
    word_match,
)

DELHI = Answer("New Delhi", ["Delhi", "NCT", "N"])
NAMES = [
    DELHI,
    Answer("United States of America", ["US", "USA", "U.S.", "the States"]),
    Answer("The Hague", ["'s-Gravenhage", "Den Haag", "La Haya"]),
    Answer("Washington, D.C.", ["D.C.", "Washington"]),
    Answer("+91", [".in", "INR", "₹"]),
    Answer("São Tomé", ["Sao Tome\u0301", "STP"]),
    Answer("Straße", ["Łódź", "が", "がく", "दिल्ली", "ΑΣ"]),
    Answer("A Coruña", ["In", "Of the"]),
]
PIECES = [
    *("New", " Delhi", "Delhi", "new delhi", "NCT", "nct", "N", " US", "us", "U.S.", "USA", "The", " Hague", "den haag"),
    *("'s-Gravenhage", "Washington", ", D.C.", "D.C.", "+91", ".in", "INR", "inr", "São", " Tomé", "Tome\u0301", "STP"),
    *("Strasse", "STRASSE", "Straße", "Lodz", "łódź", "が", "か", "\u3099", "がく", "दिल्ली", "दिल", "ασ", "ας", "a", " Coruna"),
    *(" the", " th", "e", " of", " in", " city", " capital", " is", " not", "In", " Of the", "s", "1", "_", "-", ".", ","),
    *(" ", "\n", "\t", "\u00a0", "(", '"', "“", "’", "*", "**", ":", "\u0301", "\ufffd", "\u0130", "\ufb01", "🇮🇳", "²"),
]  # fmt: skip


@pytest.fixture
def unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def generations(number: int, seed: int) -> Iterator[str]:
    """Texts made of names, lead-ins, halves of both and what may stick to them; most begin as an answer could."""
    rng = random.Random(seed)
    names = [name for answer in NAMES for name in (answer.label, *answer.aliases)]
    for _ in range(number):
        opening = rng.choice(["", "", " ", " the ", " the city of ", "(", '"*', "\n\n", "A "])
        yield "".join([opening, rng.choice(names + PIECES), *rng.choices(PIECES, k=rng.randint(0, 3))])


# --- the three rules ---


def test_published_rule_is_that_of_its_code() -> None:
    def theirs(text: str, label: str, aliases: list[str]) -> bool:
        names = [label] + [alias for alias in aliases if len(alias) > 1]
        prediction = text.strip().replace("\n", " ")
        return any(name.lower() in prediction.lower() for name in names)

    hits = 0
    for answer in NAMES:
        for text in generations(500, seed=1):
            hits += theirs(text, answer.label, list(answer.aliases))
            assert answer.published(text) == theirs(text, answer.label, list(answer.aliases))
    assert hits > 300
    assert published_match("Australia", ["America", "US"])  # the trap


def test_the_published_rule_of_descriptions_is_that_of_its_code() -> None:
    def theirs(text: str, label: str, aliases: list[str]) -> bool:
        wanted = []
        for name in [label] + [alias for alias in aliases if len(alias) > 1]:
            wanted += [": " + name + after for after in (" ", ",", ".", ":")] + [name + ": "]
        return any(pattern.lower() in text.strip().replace("\n", " ").lower() for pattern in wanted)

    hits = apart = 0
    for answer in NAMES:
        for number, text in enumerate(generations(500, seed=2)):
            for before, after in (("", ""), (": ", ", a"), ("", ": it"), (", " * (number % 2) + "x: ", ".")):
                wanted = theirs(before + text + after, answer.label, list(answer.aliases))
                assert answer.described(before + text + after) == wanted
                hits += wanted
                apart += wanted != answer.leads(before + text + after)
    assert hits > 200 and apart > 300
    assert DELHI.described(": Delhi is") and DELHI.described("xDELHI:\nIt") and not DELHI.described(": N, a")
    assert not DELHI.described(": the Delhi of") and not DELHI.described(
        ": Delhi "
    )  # no blank after it: it is stripped
    assert published_match("New\nDelhi", ["New Delhi"])
    assert not published_match("xyz", ["America", "x"]) and published_match("xyz", ["x", "America"])  # label first


@pytest.mark.parametrize(
    ("generation", "names", "word"),
    [
        ("Australia", ["America", "US"], False),
        ("a woman", ["Oman"], False),
        ("Let me tell us", ["America", "US"], False),
        ("in the US.", ["America", "US"], True),
        ("EU and USA", ["America", "US"], False),
        ("the uk", ["United Kingdom", "UK"], False),
        ("the united kingdom", ["United Kingdom", "UK"], True),
        ("uae, us or opec", ["OPEC", "BRICS"], False),
        ("brics", ["OPEC", "BRICS"], True),  # five capitals: any case
        ("Sao Paulo", ["São Paulo"], True),
        ("SÃO PAULO", ["Sao Paulo"], True),
        ("Lodz", ["Łódź"], True),
        ("N’Djamena", ["N'Djamena"], True),
        ("new\ndelhi", ["New Delhi"], True),
        ("Delhi's streets", ["Delhi"], True),
        ("Guinea-Bissau", ["Guinea"], True),  # documented: a hyphen ends a word
        ("Nigeria", ["Niger"], False),
        ("Delhi2", ["Delhi"], False),
        ("it is +91", ["+91"], True),
        ("+911", ["+91"], False),
        ("00+91", ["+91"], True),
        (".in", [".in"], True),
        ("www.gov.in", [".in"], True),
        ("x.info", [".in"], False),
        ("x.info or .in", [".in"], True),
        ("Washington, D.C., the", ["Washington, D.C."], True),
        ("Washington, D.C", ["Washington, D.C."], False),
        ("か\u3099く", ["か"], False),  # the mark belongs to the letter
        ("x", ["America", "x"], False),  # one character
    ],
)
def test_word_match(generation: str, names: list[str], word: bool) -> None:
    assert word_match(generation, names) is word


@pytest.mark.parametrize(
    ("generation", "leads"),
    [
        ("New Delhi", True),
        (" New Delhi.", True),
        ("\n\n**New Delhi**", True),
        (' the city of "Delhi"', True),
        (": New Delhi", True),
        (" located in the town of (delhi)", True),
        (" not New Delhi", False),
        (" the capital of India, New Delhi", False),
        (" Mumbai. New Delhi", False),
        (" the-Delhi", False),
        (" theDelhi", False),
        (" Delhiites", False),
        (" nct", False),
        (" NCT", True),
        ("", False),
    ],
)
def test_leading_match(generation: str, leads: bool) -> None:
    assert leading_match(generation, ["New Delhi", "Delhi", "NCT"]) is leads


def test_names_that_begin_like_a_lead_in_or_an_opener() -> None:
    assert all(
        leading_match(text, ["The Hague", "'s-Gravenhage"]) for text in ("The Hague", "in 's-Gravenhage", "'the hague'")
    )
    assert leading_match("in in", ["In"]) and leading_match("the .in", ["+91", ".in"])
    assert not leading_match("Hague", ["The Hague"])


def test_leading_implies_word() -> None:
    leading = 0
    for answer in NAMES:
        for text in generations(3000, seed=2):
            if answer.leads(text):
                leading += 1
                assert answer.word(text), (answer, text)
    assert leading > 500


def test_functions_are_the_methods() -> None:
    names = [DELHI.label, *DELHI.aliases]
    for text in generations(500, seed=3):
        assert published_match(text, names) == DELHI.published(text)
        assert word_match(text, names) == DELHI.word(text)
        assert leading_match(text, names) == DELHI.leads(text)
        assert can_still_lead(text, names) == DELHI.can_still_lead(text)
        assert is_decided(text, names) == DELHI.decided(text)


# --- unfinished texts ---


def test_no_continuation_matches_where_none_can_and_all_do_where_it_is_decided(unchecked: None) -> None:
    """Every beginning of many texts: a match at the end was always possible, a decision is never taken back."""
    possible = impossible = certain = 0
    for answer in NAMES:
        for text in generations(1000, seed=4):
            beginnings = [text[:end] for end in range(len(text) + 1)]
            leads = [answer.leads(beginning) for beginning in beginnings]
            can = [answer.can_still_lead(beginning) for beginning in beginnings]
            decided = [answer.decided(beginning) for beginning in beginnings]
            for i, beginning in enumerate(beginnings):
                assert can[i] or not any(leads[i:]), (answer, beginning, text)
                assert not decided[i] or all(leads[i:] + can[i:] + decided[i:]), (answer, beginning, text)
            possible, impossible, certain = possible + any(leads), impossible + (not can[-1]), certain + decided[-1]
    assert min(possible, impossible, certain) > 200


def test_where_a_text_can_still_lead_some_continuation_does() -> None:
    """The other direction: True is no empty promise. One of the names, its rest, or a lead-in's rest must do it."""
    for answer in NAMES:
        names = [answer.label, *(alias for alias in answer.aliases if len(alias) > 1)]
        forms = [form for name in names for form in (name, answers._fold(name), answers._fold(name).casefold())]
        words = [*forms, *LEAD_INS]
        rests = {"", *(word[cut:] for word in words for cut in range(len(word)))}
        continuations = [*rests, *(f"{rest} {names[0]}" for rest in rests)]
        for text in generations(150, seed=5):
            if answer.can_still_lead(text):
                text = text.rstrip("\ufffd")
                assert any(answer.leads(text + more) for more in continuations), (answer, text)


@pytest.mark.parametrize(
    "text", ["", " ", " the", " th", " t", " N", " New", " New D", "New Delhi", " the city of", " o", "(", "NC"]
)
def test_can_still_lead(text: str) -> None:
    assert DELHI.can_still_lead(text) and not DELHI.decided(text)


@pytest.mark.parametrize(
    "text", [" the capital of", " Mum", "nc", " New York", "New Delhites", "x", ".", " thee", " the-"]
)
def test_can_lead_no_more(text: str) -> None:
    assert not DELHI.can_still_lead(text)


def test_decided_needs_the_end_of_the_word() -> None:
    assert not DELHI.decided("New Delhi") and DELHI.decided("New Delhi,") and DELHI.decided("New Delhi is")
    assert not DELHI.decided("Delhi\u0301") and not DELHI.decided("Delhi\u3099")
    assert Answer("Washington, D.C.").decided("Washington, D.C.")
    assert not DELHI.decided("It is not Delhi. ") and not DELHI.can_still_lead("It is not Delhi. ")


def test_an_unfinished_character_is_not_judged() -> None:
    answer = Answer("Łódź", ["がく"])
    for text in ("Łódź.", "がく。", " the city of Łódź"):
        data = text.encode()
        for end in range(len(data) + 1):
            beginning = data[:end].decode(errors="replace")  # as a decoder shows it
            assert answer.can_still_lead(beginning), beginning
    assert not Answer("Delhi").decided("Delhi\ufffd")
    assert answer.can_still_lead("\ufffd") and not answer.can_still_lead("Mum\ufffd")


def test_folding_keeps_beginnings_and_places(unchecked: None) -> None:
    """Every character: the fold of a text is that of its characters, and the case fold has the same places."""
    characters = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]  # no surrogates
    folds = [answers._fold(character) for character in characters]
    assert all(len(fold.casefold()) == len(fold) for fold in folds)
    assert answers._fold("".join(characters)) == "".join(folds)
    assert "".join(folds).casefold() == "".join(fold.casefold() for fold in folds)


def test_constants_are_lower_case_and_folded() -> None:
    assert all(word == answers._fold(word).casefold() and word.isalpha() for word in LEAD_INS)
    assert all(sign == answers._fold(sign) and not sign.isalnum() for sign in OPENERS)


# --- refusals ---


def test_refusals(unchecked: None) -> None:
    with pytest.raises(ValueError, match="the label ' ' is empty: pass the name"):
        Answer(" ", ["x"])
    with pytest.raises(ValueError, match="alias 1 of 'Delhi', '', is empty: leave it out"):
        Answer("Delhi", ["New Delhi", ""])
    with pytest.raises(ValueError, match="aliases of 'Delhi' is the text 'New Delhi': pass a list"):
        Answer("Delhi", "New Delhi")
    with pytest.raises(ValueError, match="is an accent without a letter"):
        Answer("Delhi", ["\u0301\u0301"])
    for rule in (published_match, word_match, leading_match, can_still_lead, is_decided):
        with pytest.raises(ValueError, match="answers is empty: pass the label"):
            rule("Delhi", [])
        with pytest.raises(ValueError, match="answers is the text 'Delhi': pass a list"):
            rule("Delhi", "Delhi")


def test_lead_ins_can_be_chosen() -> None:
    """Fewer lead-ins, fewer unfinished texts worth another token; all three methods follow the choice."""
    bare, article = Answer("euro", lead_ins=frozenset()), Answer("euro", lead_ins=answers.ARTICLES)
    assert not bare.leads(" the euro.") and article.leads(" the euro.") and bare.leads(" euro.")
    assert not bare.can_still_lead(" the") and article.can_still_lead(" the") and bare.can_still_lead(" eu")
    assert not bare.decided(" the euro.") and article.decided(" the euro.")
    assert not article.leads(" the city of euro.")
