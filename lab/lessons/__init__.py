"""What a lesson needs around its cells: predictions before figures, checks of exercises, a summary at its end.

Each lesson has a module here with its checks: `from lab.lessons import watching as check`. A check prints what is wrong and
returns what the lesson goes on with: the participant's answer where it is right, else the kit's own.
"""

import ast
import functools
import html
import inspect
import os
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ipywidgets as ipw
import pandas as pd
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from lab.explorers import image, png

WAITING = "The figure comes when you have chosen an answer above."


@dataclass
class _Log:
    """What one participant predicted and tried since `start`."""

    class_mode: bool = False
    begun: float = field(default_factory=time.monotonic)
    predictions: list["Prediction"] = field(default_factory=list)
    exercises: dict[str, dict[str, Any]] = field(default_factory=dict)


_log = _Log()


def start(*, class_mode: bool = False) -> None:
    """Begin a lesson: predictions and exercises are counted from here.

    class_mode: True lets a figure wait until its prediction is made; in `python -m lab run`, where nobody answers, none waits.
    """
    global _log
    pd.set_option("display.max_colwidth", 160)  # questions are read whole
    _log = _Log(class_mode=class_mode and get_ipython() is not None and "LAB_OUT" not in os.environ)


class Prediction:
    """A question with answers to choose from. `then` draws the figure that answers it."""

    def __init__(self, question: str, options: Sequence[str]) -> None:
        self.question, self.options = question, tuple(options)
        self.choice = ipw.RadioButtons(options=self.options, value=None, layout=ipw.Layout(width="max-content"))
        self.widget = ipw.VBox([ipw.HTML(f"<b>Before you run the next cell.</b> {question}"), self.choice])

    @property
    def answer(self) -> str | None:
        """What was chosen; None before that."""
        return self.choice.value

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        answers = "".join(
            f"<li>{html.escape(option)}</li>" for option in self.options
        )  # for a page, which has no widgets
        words = f"<p><b>What do you expect?</b> {html.escape(self.question)}</p><ul>{answers}</ul>"
        return {**self.widget._repr_mimebundle_(**kwargs), "text/html": words}

    def then(self, draw: Callable[[], Figure]) -> None:
        """Draw the figure: at once, or in class mode as soon as an answer is chosen."""
        if self.answer is not None:
            print(f"You said: {self.answer}")
        if not _log.class_mode or self.answer is not None:
            draw()
            return
        said, picture = ipw.HTML(f"<i>{WAITING}</i>"), image(920)
        drawn: list[bool] = []

        def answered(change: Any) -> None:
            said.value = f"You said: {self.answer}"
            if not drawn:
                drawn.append(True)
                picture.value = png(draw())

        self.choice.observe(answered, "value")
        display(ipw.VBox([said, picture]))


def predict(question: str, options: Sequence[str]) -> Prediction:
    """Ask what will be seen, with radio buttons; the answer is kept for `summary`."""
    if isinstance(options, str) or len(options) < 2:
        raise ValueError(f"options {options!r}: give at least two answers to choose from, as a list")
    asked = Prediction(question, options)
    _log.predictions = [one for one in _log.predictions if one.question != question] + [asked]
    return asked


def exercise(own: Callable[..., Any]) -> Callable[[Callable[..., str | None]], Callable[..., Any]]:
    """Make a check of an exercise out of a function `judge(answer, *context)` that says what is wrong, or None.

    own: called with the context, gives what the lesson goes on with where the answer is not right (yet).
    """

    def made(judge: Callable[..., str | None]) -> Callable[..., Any]:
        name = judge.__name__

        @functools.wraps(judge)
        def check(answer: Any, *context: Any) -> Any:
            known = _log.exercises.setdefault(name, {"state": "not answered", "tries": 0})
            if unanswered(answer):
                print(f"{name}: no answer yet. The lesson goes on with the kit's own.")
                return _as_own(own(*context))
            known["tries"] += 1
            try:
                wrong = judge(answer, *context)
            except Exception as error:  # of the participant's code: it is read as part of the message
                wrong = _stopped(error)
            if known["state"] != "right":  # who tries on after a right answer loses nothing
                known["state"] = "not yet" if wrong else "right"
            if not wrong:
                print(f"{name}: right.")
                return answer
            print(textwrap.fill(f"{name}: not yet. {wrong}", 90), "\nThe lesson goes on with the kit's own.")
            return _as_own(own(*context))

        return check

    return made


def unanswered(answer: Any) -> bool:
    """Whether an exercise is as it was handed out (`...`, None, a function with `...` left in it), or holds the kit's own.

    nbgrader's usual `raise NotImplementedError()` counts like `...`.
    """
    if answer is None or answer is ... or getattr(answer, "lab_own", False):
        return True
    if not inspect.isfunction(answer):
        return False
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(answer)))
    except (OSError, SyntaxError):  # no source to read, as of a function made by `exec`
        return False
    nodes = list(ast.walk(source))  # the dots of state[..., 0] and of Callable[..., int] are Python
    index = {id(part) for node in nodes if isinstance(node, ast.Subscript) for part in ast.walk(node.slice)}
    return any(
        (isinstance(node, ast.Constant) and node.value is ... and id(node) not in index)
        or (isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node))
        for node in nodes
    )


def _as_own(answer: Any) -> Any:
    """The kit's own answer, marked: its check, run once more, must not count it as the participant's."""
    if inspect.isfunction(answer):
        vars(answer)["lab_own"] = True
        return answer
    kind = type(answer)
    return type(kind.__name__, (kind,), {"lab_own": True})(answer)


def _stopped(error: Exception) -> str:
    """An exception of the participant's code, with the line of theirs in which it arose."""
    frames = [
        one
        for one in traceback.extract_tb(error.__traceback__)
        if "ipykernel" in one.filename or "<ipython" in one.filename
    ]
    where = f" in your line “{frames[-1].line}”" if frames and frames[-1].line else ""
    hint = ""
    if isinstance(error, KeyError) and "hook" in str(error):
        hint = " hook.name is TransformerLens's own name for a place, not the one that you asked for: use the depth instead."
    return f"Your code stopped{where}: {type(error).__name__}: {error}.{hint}"


def right(name: str) -> bool:
    """Whether the check of an exercise, such as "keep", has found the participant's own answer right since `start`.

    Raises:
        ValueError: this check has not run.
    """
    if name not in _log.exercises:
        ran = ", ".join(_log.exercises) or "none"
        raise ValueError(f"no check of {name!r} has run since the lesson was started; these have: {ran}")
    return _log.exercises[name]["state"] == "right"


def summary() -> pd.DataFrame:
    """What you predicted, and how the exercises went."""
    rows = [("prediction", one.question, one.answer or "no answer", "") for one in _log.predictions]
    rows += [("exercise", name, one["state"], one["tries"]) for name, one in _log.exercises.items()]
    done = sum(one["state"] == "right" for one in _log.exercises.values())
    print(
        f"{done} of {len(_log.exercises)} exercises right, {(time.monotonic() - _log.begun) / 60:.0f} minutes since the start."
    )
    return pd.DataFrame(rows, columns=["what", "about", "answer", "tries"])
