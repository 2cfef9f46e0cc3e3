"""Does a generated text hold an answer? Three rules, from the published substring to "the first thing that is said".

An answer is a label and its aliases ("New Delhi", ["Delhi", ...]). Make an `Answer` once and ask it about many
generations: `published` (the rule of Biran et al., arXiv 2406.12775), `word` (whole words) and `leads` (said first).
While a generation still grows, `can_still_lead` and `decided` tell when no further token can change `leads`.

`word` and `leads` compare folded texts: case, accents, the form of an apostrophe and line breaks make no difference.
Folding goes character by character, so the fold of a beginning is a beginning of the fold; that makes the two answers
about unfinished texts exact. A rule says that the words are there, not that they are meant: "Delhi is not the capital"
holds "Delhi" under every rule.

Aliases of one character are used by no rule, as in the published one; the label always counts.
"""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence

# What may stand before an answer that is still the first thing said. Lower case, closed: each word added makes the
# rule laxer. Words that could name another answer ("capital", "republic", "new", "north") and "not" stay out.
LEAD_INS = frozenset(
    "a also an as at called city country currently in is it known located named now of officially the town was".split()
)
OPENERS = frozenset(" \"'*:([{<_`«‹¿¡")  # white space, quotes, brackets, marks of emphasis; others fold into these

ARTICLES = frozenset({"a", "an", "the"})  # the least that answers such as "the euro" need
_NOT_PLAIN = re.compile(r"[^ -~]")  # only these characters are folded; most texts have next to none
_UNFINISHED = "\ufffd"  # what a decoder shows for a character of which some bytes are still to come
_LETTERS = dict(zip("øØłŁđĐıŧŦħĦ", "oOlLdDitThH", strict=True))  # no accent for Unicode, but typed without one
_SIGNS = {**dict.fromkeys("’‘ʼ´", "'"), **dict.fromkeys("\u2010\u2011", "-"), **dict.fromkeys("“”„", '"')}


def published_match(generation: str, answers: Sequence[str]) -> bool:
    """The rule of Biran et al. (arXiv 2406.12775): label or alias, lower-cased, anywhere in the lower-cased generation.

    Args:
        generation: the new text only, without the prompt.
        answers: the label first, then the aliases; aliases (not the label) of one character are left out.

    It finds "US" in "Australia" and "Oman" in "woman": it shows less than it says (`word_match`).

    >>> published_match("Australia", ["United States of America", "US"])
    True
    """
    return _answer(answers).published(generation)


def word_match(generation: str, answers: Sequence[str]) -> bool:
    """Label or alias anywhere in the generation, as whole words: `Answer.word`.

    >>> word_match("Australia", ["United States of America", "US"]), word_match("in the US.", ["USA", "US"])
    (False, True)
    """
    return _answer(answers).word(generation)


def leading_match(generation: str, answers: Sequence[str]) -> bool:
    """Label or alias as the first thing said, after openers and `LEAD_INS` at most: `Answer.leads`.

    >>> leading_match(" the city of Delhi.", ["New Delhi", "Delhi"]), leading_match(" not Delhi", ["Delhi"])
    (True, False)
    """
    return _answer(answers).leads(generation)


def can_still_lead(text: str, answers: Sequence[str]) -> bool:
    """Whether some continuation of this unfinished text satisfies `leading_match`: `Answer.can_still_lead`.

    >>> can_still_lead(" the city of N", ["New Delhi"]), can_still_lead(" the capital of", ["New Delhi"])
    (True, False)
    """
    return _answer(answers).can_still_lead(text)


def is_decided(text: str, answers: Sequence[str]) -> bool:
    """Whether every continuation of this unfinished text satisfies `leading_match`: `Answer.decided`.

    >>> is_decided("New Delhi", ["New Delhi"]), is_decided("New Delhi,", ["New Delhi"])
    (False, True)
    """
    return _answer(answers).decided(text)


class Answer:
    """A label with its aliases, prepared for many generations.

    Args:
        label: the name itself; always counts.
        aliases: further names; one-character ones are left out by every rule.
        lead_ins: lower-case words that may stand before the answer and leave it the first thing said.

    Raises:
        ValueError: an empty label or alias, or one text where a list of aliases belongs.

    A name written in at most four letters, all capitals ("US", "UK", "INR"), must be written so in the generation:
    otherwise "tell us" would hold "US". All other names match in any case.

    >>> answer = Answer("New Delhi", ["Delhi"])
    >>> answer.published("Delhiites"), answer.word("Delhiites"), answer.word("I think of Delhi"), answer.leads("Delhi.")
    (True, False, True, True)
    """

    def __init__(self, label: str, aliases: Sequence[str] = (), *, lead_ins: frozenset[str] = LEAD_INS) -> None:
        if isinstance(aliases, str):
            raise ValueError(f"aliases of {label!r} is the text {aliases!r}: pass a list of texts")
        if not label.strip():
            raise ValueError(f"the label {label!r} is empty: pass the name of the answer")
        for place, alias in enumerate(aliases):
            if not alias.strip():
                raise ValueError(f"alias {place} of {label!r}, {alias!r}, is empty: leave it out")
        self.label, self.aliases, self.lead_ins = label, tuple(aliases), lead_ins
        self._lead_in_beginnings = {word[:length] for word in lead_ins for length in range(len(word) + 1)} | {""}
        used = [label, *(alias for alias in aliases if len(alias) > 1)]
        self._lowered = tuple(dict.fromkeys(name.lower() for name in used))
        folded = {name: _fold(name.strip()) for name in used}
        for name, form in folded.items():
            if not form:
                raise ValueError(f"{name!r} among the names of {label!r} is an accent without a letter: leave it out")
        capitals = {name for name in used if _is_short_capitals(name.strip())}
        self._any_case = _Forms({form.casefold() for name, form in folded.items() if name not in capitals})
        self._as_written = _Forms({form for name, form in folded.items() if name in capitals})

    def __repr__(self) -> str:
        return f"Answer({self.label!r}, {list(self.aliases)!r})"

    def published(self, generation: str) -> bool:
        """Whether a name is a substring of the generation, both lower-cased (arXiv 2406.12775, as in its code)."""
        text = generation.strip().replace("\n", " ").lower()
        return any(name in text for name in self._lowered)

    def described(self, generation: str) -> bool:
        """Whether a description names it by the published rule: ": name" and then a blank, comma, stop or colon, or "name: ".

        Anywhere in the text and in any case (arXiv 2406.12775, as in its code). The name of "name: " may be the end of a
        longer word, and ": the name" is no hit. The rule is for the text of all ten tokens.

        >>> [Answer("Greece").described(text) for text in (": Greece is a", ": the Greece", "x, Greece: a", ": Greece")]
        [True, False, True, False]
        """
        text = generation.strip().replace("\n", " ").lower()
        return any(f"{name}: " in text or any(f": {name}{mark}" in text for mark in " ,.:") for name in self._lowered)

    def word(self, generation: str) -> bool:
        """Whether a name stands in the generation as whole words.

        A name's edge that is a word character (letter, digit, vowel sign) must not touch another one. An
        edge that is none sets no condition: "+91" is not in "+911" but in "0+91", ".in" not in "x.info" but in
        "www.gov.in". A hyphen and an apostrophe end a word: "Guinea" is in "Guinea-Bissau", "Delhi" in "Delhi's".
        """
        written = _fold(generation)
        return self._any_case.inside(written.casefold()) or self._as_written.inside(written)

    def leads(self, generation: str) -> bool:
        """Whether a name is the first thing said, as whole words: only `OPENERS` and lead-ins stand before it.

        Implies `word`. A name that begins with a lead-in ("The Hague") or an opener ("'s-Hertogenbosch") is found too.
        Longer introductions ("the capital of India is New Delhi") do not lead.
        """
        return self._leads(_fold(generation), at_end=True)

    def decided(self, text: str) -> bool:
        """Whether `leads` holds for every continuation of `text`: the name is there and so is the end of its word.

        False for "New Delhi" ("New Delhites" may follow), True for "New Delhi,". A name that ends in no word
        character ("Washington, D.C.") is decided as soon as it is there.
        """
        return self._leads(_fold(text.rstrip(_UNFINISHED)), at_end=False)

    def can_still_lead(self, text: str) -> bool:
        """Whether `leads` holds for at least one continuation of `text` (or for `text` itself).

        Where it is False no further token can help. `text` is the decoded beginning of a generation, so a final
        U+FFFD stands for a character that is still incomplete and is not looked at. Decode without cleaning up spaces:
        the text of fewer tokens has to be the beginning of the text of more.
        """
        written = _fold(text.rstrip(_UNFINISHED))
        lowered = written.casefold()
        for start in _starts(lowered, self.lead_ins):
            rest = lowered[start:]
            if (
                rest in self._lead_in_beginnings
                or self._any_case.begins(rest)
                or self._as_written.begins(written[start:])
            ):
                return True
            if self._at(written, lowered, start, at_end=True):
                return True
        return False

    def _leads(self, written: str, at_end: bool) -> bool:
        lowered = written.casefold()
        return any(self._at(written, lowered, start, at_end) for start in _starts(lowered, self.lead_ins))

    def _at(self, written: str, lowered: str, start: int, at_end: bool) -> bool:
        return self._any_case.at(lowered, start, at_end) or self._as_written.at(written, start, at_end)


class _Forms:
    """Folded names, compared with a folded text."""

    def __init__(self, names: set[str]) -> None:
        self.names = tuple(sorted(names))
        self.edges = tuple((name, _is_word(name[0]), _is_word(name[-1])) for name in self.names)

    def inside(self, text: str) -> bool:
        """Whether a name stands somewhere as whole words."""
        for name, first, last in self.edges:
            start = text.find(name)
            while start >= 0:
                end = start + len(name)
                touches = (first and start > 0 and _is_word(text[start - 1])) or (
                    last and end < len(text) and _is_word(text[end])
                )
                if not touches:
                    return True
                start = text.find(name, start + 1)
        return False

    def at(self, text: str, start: int, at_end: bool) -> bool:
        """Whether a name stands at `start`, its end seen in the text; `at_end`: the end of the text is one, too."""
        if not text.startswith(self.names, start):
            return False
        for name, _, last in self.edges:
            if text.startswith(name, start):
                end = start + len(name)
                if not last or (at_end if end == len(text) else not _is_word(text[end])):
                    return True
        return False

    def begins(self, rest: str) -> bool:
        """Whether a name begins with `rest`: sorted, the first name not before `rest` does, or none does."""
        place = bisect_left(self.names, rest)
        return place < len(self.names) and self.names[place].startswith(rest)


def _starts(lowered: str, lead_ins: frozenset[str]) -> Iterator[int]:
    """Places where an answer may begin: 0, after each further opener, after each lead-in that has ended."""
    start, length = 0, len(lowered)
    while True:
        yield start
        if start == length:
            return
        if lowered[start] in OPENERS:
            start += 1
            continue
        end = start
        while end < length and _is_word(lowered[end]):
            end += 1
        if end == length or lowered[start:end] not in lead_ins:
            return
        start = end


def _is_word(character: str) -> bool:
    """Letters, digits, and the vowel signs that belong to the letter before; no underscore, which marks emphasis."""
    return character.isalnum() or (character > "\u02ff" and unicodedata.category(character)[0] == "M")


def _is_short_capitals(name: str) -> bool:
    return len(name) <= 4 and name.isalpha() and name.isupper()


def _fold(text: str) -> str:
    """The text without accents, with one kind of apostrophe, hyphen and space; case is kept.

    Each character of the result has one that is its case fold, so `_fold(x).casefold()` has the places of `_fold(x)`.
    """
    return _NOT_PLAIN.sub(_fold_character, text)


def _fold_character(found: re.Match[str]) -> str:
    character = found[0]
    if character.isspace():
        return " "
    letters = unicodedata.normalize("NFD", _SIGNS.get(character, character))
    kept = (_LETTERS.get(letter, letter) for letter in letters if not "\u0300" <= letter <= "\u036f")
    return "".join(letter if len(letter.casefold()) == 1 else letter.casefold() for letter in kept)


def _answer(answers: Sequence[str]) -> Answer:
    if isinstance(answers, str):
        raise ValueError(f"answers is the text {answers!r}: pass a list, the label first")
    if not len(answers):
        raise ValueError("answers is empty: pass the label and, if there are any, its aliases")
    return Answer(answers[0], answers[1:])
