"""What all lessons have in common: predictions, checks, summary; and their size."""

import re
from collections.abc import Callable
from pathlib import Path

import jupytext
import lesson_size
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from lab import lessons


@pytest.mark.parametrize("path", lesson_size.LESSONS, ids=lambda path: path.stem)
def test_a_lesson_fits_a_class(path: Path) -> None:
    assert lesson_size.faults(path) == []


def drawn() -> Figure:
    figure, _ = plt.subplots()
    return figure


def test_a_figure_comes_at_once_without_a_front_end() -> None:
    lessons.start(class_mode=True)  # nobody is there who could answer
    calls: list[int] = []
    lessons.predict("Which?", ["one", "other"]).then(lambda: calls.append(1) or drawn())  # type: ignore[func-returns-value]
    assert calls == [1]
    plt.close("all")


def test_in_class_mode_a_figure_waits_for_its_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(lessons, "get_ipython", object)
    shown: list = []
    monkeypatch.setattr(lessons, "display", shown.append)
    monkeypatch.setenv("LAB_OUT", "out")  # a run without a browser: nobody could answer
    lessons.start(class_mode=True)
    lessons.predict("Who?", ["one", "other"]).then(drawn)
    assert shown == []
    monkeypatch.delenv("LAB_OUT")
    lessons.start(class_mode=True)
    asked = lessons.predict("Which?", ["one", "other"])
    calls: list[int] = []
    asked.then(lambda: calls.append(1) or drawn())  # type: ignore[func-returns-value]
    said, picture = shown[0].children
    assert calls == [] and lessons.WAITING in said.value and not picture.value
    asked.choice.value = "other"
    assert calls == [1] and said.value == "You said: other" and bytes(picture.value).startswith(b"\x89PNG")
    asked.choice.value = "one"
    assert calls == [1] and said.value == "You said: one"
    asked.then(lambda: calls.append(2) or drawn())  # type: ignore[func-returns-value]
    assert calls == [1, 2] and "You said: one" in capsys.readouterr().out
    plt.close("all")


@lessons.exercise(lambda factor: lambda x: factor * x)
def times(answer, factor):
    if answer(2) == 2 + factor:
        return "That adds."
    return None if answer(2) == 2 * factor else f"times of 2 is {answer(2)}."


def test_checks_say_what_is_wrong_and_go_on(capsys: pytest.CaptureFixture) -> None:
    lessons.start()

    def unwritten(x):
        """Multiply."""
        ...

    assert times(unwritten, 3)(5) == 15 and times(..., 3)(5) == 15 and times(None, 3)(5) == 15
    assert capsys.readouterr().out.count("times: no answer yet. The lesson goes on with the kit's own.") == 3
    assert times(lambda x: x + 3, 3)(5) == 15 and "not yet. That adds." in capsys.readouterr().out
    assert times(lambda x: x / 0, 3)(5) == 15 and "ZeroDivisionError" in capsys.readouterr().out

    def mine(x):
        return 3 * x

    assert times(mine, 3) is mine and capsys.readouterr().out == "times: right.\n"
    lessons.predict("Which?", ["one", "other"]).choice.value = "one"
    lessons.predict("Where?", ["here", "there"])
    table = lessons.summary()
    assert table.answer.tolist() == ["one", "no answer", "right"] and table.tries.tolist()[-1] == 3
    assert "1 of 1 exercises right" in capsys.readouterr().out


def test_the_kits_own_answer_is_nobodys(capsys: pytest.CaptureFixture) -> None:
    lessons.start()
    own = times(..., 3)
    assert times(own, 3)(5) == 15 and "right" not in capsys.readouterr().out
    assert lessons.summary().answer.tolist() == ["not answered"]


def test_right_is_for_own_answers_alone(capsys: pytest.CaptureFixture) -> None:
    lessons.start()
    with pytest.raises(ValueError, match="no check of 'times' has run since the lesson was started; these have: none"):
        lessons.right("times")
    times(times(..., 3), 3)
    assert not lessons.right("times"), "nor is the kit's own"
    times(lambda x: x + 3, 3)
    assert not lessons.right("times")
    times(lambda x: 3 * x, 3)
    times(lambda x: x + 3, 3)
    assert lessons.right("times"), "who tries on after a right answer loses nothing"
    lessons.start()
    with pytest.raises(ValueError, match="no check of 'times'"):
        lessons.right("times")
    assert capsys.readouterr().out.count("times: right.") == 1


def nbgraders(x):
    """Where nbgrader's own stub stands."""
    # YOUR CODE HERE
    raise NotImplementedError()


def dotted(x: Callable[..., int]) -> int:
    return x[..., 0]  # type: ignore[index]


def half_done(x):
    y = ...
    return y


def test_dots_that_are_python_are_an_answer() -> None:
    assert not lessons.unanswered(dotted) and lessons.unanswered(half_done) and lessons.unanswered(nbgraders)


@pytest.mark.parametrize("options", ["yes", ["yes"], []])
def test_a_prediction_needs_two_answers(options) -> None:
    with pytest.raises(ValueError, match="give at least two answers"):
        lessons.predict("Well?", options)


def anchors() -> set[str]:
    """Headings of the glossary as a page's anchors."""
    text = (lesson_size.LESSONS[0].parents[1] / "glossary.md").read_text(encoding="utf-8")
    return {
        re.sub(r"[^\w -]", "", line[3:]).strip().lower().replace(" ", "-")
        for line in text.splitlines()
        if line[:3] == "## "
    }


@pytest.mark.parametrize("path", lesson_size.LESSONS, ids=lambda path: path.stem)
def test_links_lead_to_the_glossary(path: Path) -> None:
    links = re.findall(r"\]\(\.\./glossary\.md#([^)]+)\)", path.read_text(encoding="utf-8"))
    assert len(links) >= 3 and not set(links) - anchors()
    assert len(links) == len(set(links)), "linked at first use only"
    pages = re.findall(r"\]\((?!https?:|\.\./glossary)([^)#]+)", path.read_text(encoding="utf-8"))
    assert not [page for page in pages if not (path.parent / page).exists()]


# How terms stand in a sentence, where that is not the heading with an s.
FORMS = {
    "AnB and BnB": "AnB|BnB",
    "Back-patching": r"back-patch\w*",
    "Batch": "batch(es)?",
    "Co-adaptation": "co[-_]adaptation",
    "Final norm": "(final )?norm",
    "Freeze": "freeze|frozen",
    "Group split": "group split",  # a split by itself is any split
    "Logit": r"logits?(?!\slens)",
    "n*": r"n\\\*",
    "Quantise": r"quanti[sz]\w*",
    "Random twin": "random twin|random weights",
    "Residual stream": "(residual )?stream",
    "Shuffled labels": "shuffled labels|labels, shuffled",
    "Two-hop query": "two-hop quer(y|ies)",
    "Unembedding": r"unembed\w*",
    "Weights": "(?<!random )weights",
}


@pytest.mark.parametrize("path", lesson_size.LESSONS, ids=lambda path: path.stem)
def test_a_term_is_linked_where_a_lesson_first_uses_it(path: Path) -> None:
    text = "\n".join(
        cell.source
        for cell in jupytext.read(path).cells
        if cell.cell_type == "markdown" and "instructor" not in cell.metadata.get("tags", [])
    )
    for left_out in (r"<details>.*?</details>", r"```.*?```", r"`[^`\n]*`", r"^#.*?$"):
        text = re.sub(left_out, " ", text, flags=re.DOTALL | re.MULTILINE)
    glossary = (path.parents[1] / "glossary.md").read_text(encoding="utf-8")
    missing = []
    for term in re.findall(r"^## (.*)", glossary, re.MULTILINE):
        form = FORMS.get(term, re.escape(term).replace(r"\ ", r"\s") + "s?")
        uses = re.finditer(rf"(?<![\w\\-])({form})(?!\w)", text, re.IGNORECASE)
        uses = [
            use for use in uses if text.rfind("](", 0, use.start()) <= text.rfind(")", 0, use.start())
        ]  # no address
        if uses:
            used = uses[0]
            anchor = re.sub(r"[^\w -]", "", term).strip().lower().replace(" ", "-")
            if not text[used.end() :].lstrip("*").startswith(f"](../glossary.md#{anchor})"):
                missing.append((term, text[used.start() - 30 : used.end() + 30]))
    assert not missing


def test_the_glossary_is_sorted_and_short() -> None:
    text = (lesson_size.LESSONS[0].parents[1] / "glossary.md").read_text(encoding="utf-8")
    terms = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    names = [term.splitlines()[0] for term in terms]
    assert names == sorted(names, key=str.lower) and len(set(names)) == len(names)
    for term in terms:
        assert 1 <= len(re.findall(r"[.!?](?=\s|$)", term.split("\n", 1)[1])) <= 3, term
