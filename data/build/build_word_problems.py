"""Build the word problems: a short story of one to six arithmetic steps, with its solution written out.

`python data/build/build_word_problems.py [--out DIR]`. Stories, steps and neutral sentences come from
`word_problems.txt` beside this script; names, numbers and the order of the steps are drawn by one seeded generator.
Drawn again is what breaks a rule: values stay whole and positive, and the answer has two digits and is seen nowhere
before the last step.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from common import capitalise, main, words, write_files

STORIES = Path(__file__).with_name("word_problems.txt")
LEVELS = range(1, 7)
A_STORY = 5  # problems of each level in each story
SIZE_OF_PROBLEM, SIZE_OF_SOLUTION = 132, 140  # the padded columns are filled up to about so many pieces
TIMES = {2: "twice", 3: "three times", 4: "four times"}
SHE = words(
    """Ada Amina Anna Beatriz Carmen Chloe Dina Elif Esther Fatima Greta Hana Ines Ivy Jana Keiko Lena Leyla Mara Mei
    Nadia Nora Olga Priya Rosa Sara Tess Uma Vera Yuki Zoe"""
)
HE = words(
    """Adam Amir Ben Boris Carlos Dario David Emil Farid Felix Hugo Ivan Jonas Kofi Leo Luca Marek Milo Nils Omar Otto
    Pavel Rafael Sami Tariq Theo Tomas Viktor Yusuf"""
)
THEN = ("Then", "Later", "After that,", "Next,", "Soon after,", "A while later")
NEUTRAL = """
The story is read once more from the beginning.
It helps to go slowly and in the order of the story.
What happened earlier has already been counted.
The setting plays no part in the calculation.
Only the numbers in the story matter here.
The same way would lead to the end with other numbers too.
Nothing has to be guessed along the way.
It is useful to write down what is known so far.
The unit stays the same throughout.
A sketch on paper would show the same thing.
Names and places can be left aside.
The question is about the end of the story, not about its beginning.
Each result is carried over to what comes next.
So far everything is plain.
There is no need for anything but simple arithmetic.
The order of events is the order of the sentences.
Let us keep in mind what is being asked.
No fractions come up on the way.
Nothing is hidden between the lines.
The weather, the furniture and the rest may be ignored.
"""


@dataclass
class Story:
    """One story of `word_problems.txt`."""

    name: str
    things: list[str]
    start: str = ""
    ask: str = ""
    steps: list[tuple[str, str, list[str]]] = field(default_factory=list)  # kind, part of the problem, solution
    neutral: list[str] = field(default_factory=list)


def read_stories(path: Path) -> list[Story]:
    """All stories; ValueError with the line number where one breaks the form."""
    stories: list[Story] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        head, _, rest = line.partition(" ")
        if head.startswith("["):
            stories.append(Story(head.strip("[]"), rest.split(", ")))
        elif head in ("start:", "ask:"):
            setattr(stories[-1], head.rstrip(":"), rest)
        elif head == "~":
            stories[-1].neutral.append(rest)
        elif head in ("+", "-", "*", "/", "p+", "p-"):
            problem, *solution = rest.split(" | ")
            if len(solution) != len(head) or not all("{eq}" in sentence for sentence in solution):
                raise ValueError(f"{path.name}, line {number}: {head} needs {len(head)} sentences with {{eq}}")
            stories[-1].steps.append((head, problem, solution))
        else:
            raise ValueError(f"{path.name}, line {number}: {head!r} begins no line")
    return stories


def choose_steps(story: Story, level: int, rng: np.random.Generator) -> list[tuple[str, str, list[str]]]:
    """Steps in a random order, none twice, that make `level` equations; packs make two."""
    while True:
        chosen: list[tuple[str, str, list[str]]] = []
        for i in rng.permutation(len(story.steps)):
            if sum(len(solution) for _, _, solution in chosen) == level:
                return chosen
            chosen.append(story.steps[i])
        if sum(len(solution) for _, _, solution in chosen) == level:
            return chosen


def draw_step(kind: str, value: int, rng: np.random.Generator) -> tuple[dict[str, object], list[str], int]:
    """What stands in the problem, the equations, and the value after the step."""
    if kind in ("p+", "p-"):
        b, c = int(rng.integers(2, 7)), int(rng.integers(3, 13))
        after = value + b * c if kind == "p+" else value - b * c
        return {"b": b, "c": c}, [f"{b} * {c} = {b * c}", f"{value} {kind[1]} {b * c} = {after}"], after
    a = int(rng.integers(2, 5)) if kind == "*" else int(rng.integers(2, 7)) if kind == "/" else int(rng.integers(3, 41))
    after = {"+": value + a, "-": value - a, "*": value * a, "/": value // a if value % a == 0 else -1}[kind]
    return {"a": a, "times": TIMES.get(a, "")}, [f"{value} {kind} {a} = {after}"], after


def pieces(text: str) -> int:
    """Words, marks, digits, and one for the space before a number: about the tokens where every digit is one."""
    return len(re.findall(r"(?<= )(?=\d)|\d|[A-Za-z]+|[^\w\s]", text))


def pad(sentences: list[str], neutral: list[str], size: int, rng: np.random.Generator) -> list[str]:
    """The sentences in their order, with neutral ones between them or before the last, up to about `size` pieces."""
    padded = list(sentences)
    for i in rng.permutation(len(neutral)):
        if 2 * (size - pieces(" ".join(padded))) > pieces(neutral[i]):  # it brings the length nearer
            padded.insert(int(rng.integers(1, len(padded))), neutral[i])
    return padded


def draw_problem(story: Story, level: int, rng: np.random.Generator) -> dict[str, object] | None:
    """One problem, or None where the numbers that were drawn break a rule."""
    people = [(name, "she", "her") for name in SHE] + [(name, "he", "his") for name in HE]
    name, she, her = people[int(rng.integers(len(people)))]
    things = story.things[int(rng.integers(len(story.things)))]
    fixed = {"name": name, "she": she, "her": her, "things": things}
    value = start = int(rng.integers(11, 90))
    problem = [capitalise(story.start.format(n=start, **fixed)) + "."]
    solution, seen, results = [], [start], [start]
    connectives = ["", *(THEN[i] for i in rng.permutation(len(THEN)))]
    for (kind, part, sentences), then in zip(choose_steps(story, level, rng), connectives, strict=False):
        drawn, equations, value = draw_step(kind, value, rng)
        if not 2 <= value <= 240:
            return None
        seen += [int(drawn[key]) for key in ("a", "b", "c") if key in drawn]
        results += [int(equation.rsplit(" ", 1)[1]) for equation in equations]
        text = part.format(**drawn, **fixed)
        problem.append((f"{then} {text}" if then else capitalise(text)) + ".")
        for sentence, equation in zip(sentences, equations, strict=True):
            solution.append(capitalise(sentence.format(eq=equation, **fixed)))
    if not 10 <= value <= 99 or value in seen + results[:-1] or len(set(seen)) < len(seen):
        return None
    problem.append(story.ask.format(**fixed))
    solution.append(f"The final answer is {value}.")
    neutral = [sentence.format(**fixed) for sentence in story.neutral]
    long_problem = pad(problem, neutral + GENERAL, SIZE_OF_PROBLEM, rng)
    # A solution may begin with a neutral sentence too; the empty one holds the place before its first step.
    long_solution = pad(["", *solution], NEUTRAL.strip().splitlines(), SIZE_OF_SOLUTION, rng)[1:]
    return {
        "group": story.name,
        "level": level,
        "prompt": f"Problem: {' '.join(problem)}\nAnswer:",
        "solution": f" {' '.join(solution)}",
        "answer": f" {value}",
        "prompt_padded": f"Problem: {' '.join(long_problem)}\nAnswer:",
        "solution_padded": f" {' '.join(long_solution)}",
    }


GENERAL = [
    "It is an ordinary day, and nobody is in a hurry.",
    "A light wind moves the leaves of the trees.",
    "Somewhere in the distance a church bell rings.",
    "The sky is grey at first and clears later.",
    "Children are playing not far away.",
    "A newspaper lies open on a bench.",
]

PROSE = """
# Word problems of one to six steps

"{example}"

A problem is a short story with one number that changes; `level` counts the equations that lead to its end. The
solution gives one sentence, with one equation, for each of them.

Columns:

- `example`; `group`: the story ({stories} of them, each with {each} problems at every level), so that a split can keep
  stories apart; `level`: number of steps, 1 to 6.
- `prompt`: "Problem: ...", the question, a new line and "Answer:". `answer`: a space and the number. `solution`: a
  space, the sentences and "The final answer is N." Prompt and answer, or prompt and solution, are joined as they are.
- `prompt_padded`, `solution_padded`: the same problem and the same steps, in the same order, with neutral sentences
  (no numbers, nothing to compute) between them, so that length says little about the level. Length is counted in pieces:
  words, marks, digits, and one for the space before a number, which is close to the tokens of models that take digits
  one by one. Any of the two prompts may be used with any of the two solutions. The question stays last in the prompt, the
  answer in the solution.

How made: for every story and level names, things, numbers and the order of the steps are drawn. Steps add, take away,
multiply by two to four, divide into equal parts, or add or take away some packs of equal size (two steps: a product,
then a sum or difference). Every value on the way is a whole number from 2 to 240. Every answer has two digits, differs
from all numbers in its prompt and from every earlier result. All numbers in a prompt are different. No step is used twice in
a problem.

Order: problem by problem through all stories and levels, so that the first N rows are a sample of both.
"""
FLAWS = """
## Known flaws

- Generated: {stories} frames, one running number, no fact that must be found or left out (but for the neutral
  sentences). Far more regular than school problems: a model may follow the frame.
- Later steps change the number again, so a level is a number of sequential steps, and also of sentences, of numbers in the
  prompt and of operations. The padded columns hold the length alone about constant, not these.
- The neutral sentences of a padded solution read oddly, and there are more of them at low levels: what is evened out
  is length, not kind.
- Some stories are a little strange ("the bus carries three times as many people"), because steps come in any order.
- Answers have two digits at every level; their mean isn't held constant.
- At level 1 every equation is a first step; packs begin at level 2.
- The unit of a solution's sentence is repeated for every step, which helps to copy it.
"""


def card(frame: pd.DataFrame, table: bytes) -> list[str]:
    """The card's lines."""
    facts = {
        "name": "word_problems",
        "kind": "prompts",
        "title": "Word problems of one to six steps",
        "n": len(frame),
        "groups": frame["group"].nunique(),
        "levels": ", ".join(map(str, LEVELS)),
        "licence": "MIT (text written for this project)",
        "source": "generated; stories in data/build/word_problems.txt",
        "sha256": hashlib.sha256(table).hexdigest(),
    }
    counts = {
        column: (frame[column].str.split().str.len().groupby(frame["level"]), frame[column].map(pieces))
        for column in COUNTED
    }
    rows = []
    for level, part in frame.groupby("level"):
        row = [str(level), str(len(part))]
        for by_level, size in counts.values():
            here = size[part.index]
            row.append(f"{by_level.mean()[level]:.0f}; {here.mean():.0f} ({here.std():.1f})")
        rows.append([*row, f"{part['answer'].astype(int).mean():.0f}"])
    kinds = {kind: len(re.findall(rf" {re.escape(kind)} \d+ =", " ".join(frame["solution"]))) for kind in "+-*/"}
    example = frame.loc[frame["level"] == 2, "prompt"].iloc[0].removeprefix("Problem: ").removesuffix("\nAnswer:")
    columns = ["level", "problems", *(f"`{column}`" for column in COUNTED), "mean answer"]
    return [
        *("---", *(f"{key}: {value}" for key, value in facts.items()), "---", ""),
        PROSE.strip().format(example=example, stories=frame["group"].nunique(), each=A_STORY),
        *("", "## Counts", "", "Mean words; then mean pieces (standard deviation):", ""),
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "In tokens of SmolLM2-135M (means by level): bare solutions 27 to 121, padded ones 141 at every level; bare prompts "
        "40 to 106, padded ones 140 to 143.",
        "",
        f"Equations: {', '.join(f'{n} with {kind}' for kind, n in kinds.items())}.",
        *("", FLAWS.strip().format(stories=frame["group"].nunique())),
    ]


COUNTED = ("prompt", "prompt_padded", "solution", "solution_padded")


def build_word_problems(folder: Path) -> Path:
    rng = np.random.default_rng(61)
    stories = read_stories(STORIES)
    rows: list[dict[str, object]] = []
    told: set[object] = set()
    for _ in range(A_STORY):
        for level in LEVELS:
            for story in stories:
                row = None
                while row is None or row["prompt"] in told:
                    row = draw_problem(story, level, rng)
                told.add(row["prompt"])
                rows.append(row)
    frame = pd.DataFrame([{"example": f"word_problems-{i:04d}", **row} for i, row in enumerate(rows, start=1)])
    table = frame.to_csv(index=False, lineterminator="\n").encode("utf-8")
    return write_files(folder, "word_problems", table, card(frame, table))


if __name__ == "__main__":
    main({"word_problems": build_word_problems}, __doc__.splitlines()[0])
