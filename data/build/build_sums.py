"""Build the sums of growing length: "5 + 7 + 5 + 3 = " with two to seven terms.

`python data/build/build_sums.py [--out DIR]`. A sum grows term by term, so that the six of a group share their first
terms. All draws come from one seeded generator.
"""

import hashlib
import json
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import pandas as pd
from common import main, write_files

TERMS = range(2, 8)
PROSE = """
# Sums of two to seven digits

"{example}" -> {answer}. Terms are the digits 1 to 9; `level` is their number.

Columns:

- `example`; `group`: the sum of seven terms that this one is the beginning of; `level`: number of terms, 2 to 7.
- `prompt`: ends in "= ", space included; `answer`: the number alone. They are joined as they are. The tokenizers of SmolLM2
  and Gemma 3 make one token of every digit, and of the last space one of its own: a prompt has 3 times `level` tokens
  in both (not counting a start token), and the answer two. Others may differ: GPT-2 has
  tokens of several digits, and takes " 7" as one.
- `partial_sums`: the running sums after two, three, ... terms, the answer last; JSON in the file, a list once loaded.

How made: {groups} groups begin with the {groups} ordered pairs of digits whose sum has two digits, one each; five more
digits are drawn for each. So the answer has two digits at every level, and no prompt occurs twice. The six sums of a
group stand together, shortest first, so that the first 6 N rows are N groups.
"""
FLAWS = """
## Known flaws

- Since every first pair adds up to ten or more, the first two digits lean to the large ({first:.1f} on average; the others
  {others:.1f}). At level 2 all such pairs are there, so no other rows could be added to it.
- Longer sums have larger answers: level and size of the answer go together, and the first digit of the answer can be
  guessed from the length. `answer` is there to be used as a covariate.
- A sum of digits doesn't need to be worked out from left to right: more terms needn't mean more steps in sequence.
- The sums of one group share terms: for intervals, draw groups, not rows.
"""


def card(frame: pd.DataFrame, table: bytes) -> list[str]:
    """The card's lines."""
    facts = {
        "name": "sums",
        "kind": "prompts",
        "title": "Sums of two to seven digits",
        "n": len(frame),
        "groups": frame["group"].nunique(),
        "levels": ", ".join(map(str, TERMS)),
        "licence": "MIT (this project)",
        "source": "generated (data/build/build_sums.py)",
        "sha256": hashlib.sha256(table).hexdigest(),
    }
    longest = frame.loc[frame["level"] == max(TERMS), "group"].str.split(" + ", regex=False)
    digits = np.array([[int(term) for term in terms] for terms in longest])
    rows = []
    for level, part in frame.groupby("level"):
        answers = part["answer"].astype(int)
        share = answers.value_counts(normalize=True).iloc[0]
        rows.append(
            f"| {level} | {len(part)} | {answers.min()} to {answers.max()} | {answers.mean():.1f} | {share:.2f} |"
        )
    return [
        *("---", *(f"{key}: {value}" for key, value in facts.items()), "---", ""),
        PROSE.strip().format(
            example=frame["prompt"].iloc[2], answer=frame["answer"].iloc[2], groups=frame["group"].nunique()
        ),
        *("", "## Counts", ""),
        "| terms | sums | answers | mean answer | share of the most frequent answer |",
        "|---|---|---|---|---|",
        *rows,
        *("", FLAWS.strip().format(first=digits[:, :2].mean(), others=digits[:, 2:].mean())),
    ]


def build_sums(folder: Path) -> Path:
    rng = np.random.default_rng(62)
    pairs = [pair for pair in product(range(1, 10), repeat=2) if sum(pair) >= 10]
    rows = []
    for i in rng.permutation(len(pairs)):
        terms = [*pairs[i], *(int(digit) for digit in rng.integers(1, 10, size=max(TERMS) - 2))]
        running = list(accumulate(terms))
        for n in TERMS:
            rows.append(
                {
                    "example": f"sums-{len(rows) + 1:04d}",
                    "group": " + ".join(map(str, terms)),
                    "level": n,
                    "prompt": f"{' + '.join(map(str, terms[:n]))} = ",
                    "answer": str(running[n - 1]),
                    "partial_sums": json.dumps(running[1:n]),
                }
            )
    frame = pd.DataFrame(rows)
    table = frame.to_csv(index=False, lineterminator="\n").encode("utf-8")
    return write_files(folder, "sums", table, card(frame, table))


if __name__ == "__main__":
    main({"sums": build_sums}, __doc__.splitlines()[0])
