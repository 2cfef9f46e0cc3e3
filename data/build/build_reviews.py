"""Build the set of short reviews in contrast pairs from the hand-written pairs in reviews.txt.

`python data/build/build_reviews.py [reviews] [--out DIR]`. The script generates no text: it reads the
pairs, checks them, numbers them and measures what classifiers that see only some of the words make of them.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from common import main, number_rows, write_set
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline

PAIRS = Path(__file__).with_name("reviews.txt")
FACTS = {
    "name": "reviews",
    "domain": "emotional",
    "title": "Short reviews in contrast pairs",
    "classes": "negative, positive",
    "instruction": "Judge whether the emotion of the review is positive or negative.",
    "instruction_place": "after",
    "licence": "MIT (text written for this project)",
    "source": "written for this project; pairs in data/build/reviews.txt",
}
PROSE = """
# Short reviews in contrast pairs

"I expected to be bored by this film and was thrilled by it, scene after scene." Its twin swaps "bored" and
"thrilled". Each pair is one positive review (label 1) and one negative (label 0), and the pair is the group: twins
never stand on both sides of a split. All pairs were written for this project, one by one; none is copied or shortened
from a real review, and no brand or person is real. {same} of the {pairs} pairs use exactly the same words in another
order; in the others one to four words differ. The two reviews of a pair always end in the same word. The reviews are
about {domains} kinds of things (column `domain_of_review`).

Difficulty and kinds (column `template`):
- 1: the final clause that judges carries the verdict. `turn`: something changes ("a shaky first song, then two hours
  of glorious playing"). `expectation`: it was expected to be otherwise ("I assumed such a kettle would be flimsy; it
  turned out to be sturdy").
- 2: negation or concession. `negation`: what is denied and what is said ("not only pretty but strong", "only pretty
  but not strong"). `concession`: good in one thing and bad in another, and what weighs more decides; it comes first
  in some, last in others.
- 3: roles. `role`: who did it, or what the adjective belongs to ("the waiter was rude to some very polite guests",
  "large room, small bill"). `comparison`: which of two is better. `opinion`: whose view it is, and whether the writer
  shares it.
- 4: the verdict is implied by what happened, without a word of praise or blame. `quantity`: numbers change places
  ("we waited five minutes and stayed three hours"). `action`: what people did ("the cat eats the tuna and leaves this
  in the bowl").

Pairs of each kind:
{kinds}.

## What shallow classifiers make of it

Logistic regression on word counts, mean over 10 group-aware 60/40 splits (seeds 0 to 9), chance 0.50:

| sees | accuracy |
|---|---|
| words (scikit-learn's default tokens) | {unigrams:.2f} |
| words and pairs of neighbouring words | {bigrams:.2f} |
| the last word | {last:.2f} |
| the last five words | {last_five:.2f} |
| the words of the second half | {second_half:.2f} |
| the words of the second half, kind `negation` alone | {negation:.2f} |

## Known flaws

- The labels are the writer's; no second reader has judged them. They are meant to be beyond dispute, but at level 4
  some rest on common sense (it is good when a class runs over time) and under `concession` on what matters more (the
  play, not its costumes).
- Swapping words is a constructed kind of contrast: real reviews give far more away by their words, and are less
  symmetrical.
- The second half gives a little away, most within `negation` (see the table). Test kinds apart before claiming more.
- The words of praise and blame are stronger at levels 1 and 2, and levels differ in more than one thing (length,
  kind, words).
- One voice, British spelling, one culture's idea of good service.
"""


def tokens(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation."""
    return re.findall(r"[\w'-]+", text.lower())


def read_pairs(path: Path) -> list[dict[str, object]]:
    """Two rows a pair, the positive review first; ValueError with the line number where a pair breaks a rule."""
    rows: list[dict[str, object]] = []
    kind, difficulty, pair = "", 0, 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("== "):
            kind, level = line.removeprefix("== ").split(", ")
            difficulty = int(level)
            continue
        parts = line.split(" | ")
        if len(parts) != 3:
            raise ValueError(f"{path.name}, line {number}: {len(parts)} parts; write domain | positive | negative")
        domain, *texts = parts
        if len({tokens(text)[-1] for text in texts}) != 1:
            raise ValueError(f"{path.name}, line {number}: the last words differ; end both reviews in the same word")
        if not all(6 <= len(tokens(text)) <= 25 for text in texts):
            raise ValueError(f"{path.name}, line {number}: a review has fewer than 6 or more than 25 words")
        pair += 1
        for text, label in zip(texts, (1, 0), strict=True):
            rows.append(
                {
                    "text": text,
                    "label": label,
                    "group": f"pair-{pair:03d}",
                    "template": kind,
                    "difficulty": difficulty,
                    "domain_of_review": domain,
                }
            )
    return rows


def accuracy(frame: pd.DataFrame, texts: pd.Series, longest: int = 1) -> float:
    """Mean held-out accuracy on counts of up to `longest` neighbouring words, over 10 group-aware 60/40 splits."""
    model = make_pipeline(CountVectorizer(ngram_range=(1, longest)), LogisticRegression(max_iter=1000))
    scores = []
    for seed in range(10):
        splitter = GroupShuffleSplit(n_splits=1, train_size=0.6, random_state=seed)
        train, test = next(splitter.split(frame, groups=frame["group"]))
        model.fit(texts.iloc[train], frame["label"].iloc[train])
        scores.append(model.score(texts.iloc[test], frame["label"].iloc[test]))
    return float(np.mean(scores))


def build_reviews(folder: Path) -> Path:
    frame = number_rows("reviews", read_pairs(PAIRS))
    text = frame["text"]
    if text.duplicated().any():
        raise ValueError(f"reviews.txt holds a review twice: {text[text.duplicated()].iloc[0]!r}")
    bags = text.map(lambda t: tuple(sorted(Counter(tokens(t)).items())))
    second_half = text.map(lambda t: " ".join(tokens(t)[len(tokens(t)) // 2 :]))
    negation = frame["template"] == "negation"
    kinds = frame["template"].value_counts(sort=False) // 2
    prose = PROSE.format(
        pairs=frame["group"].nunique(),
        same=int((bags.groupby(frame["group"]).nunique() == 1).sum()),
        domains=frame["domain_of_review"].nunique(),
        kinds=", ".join(f"{kind} {count}" for kind, count in kinds.items()),
        unigrams=accuracy(frame, text),
        bigrams=accuracy(frame, text, longest=2),
        last=accuracy(frame, text.map(lambda t: tokens(t)[-1])),
        last_five=accuracy(frame, text.map(lambda t: " ".join(tokens(t)[-5:]))),
        second_half=accuracy(frame, second_half),
        negation=accuracy(frame[negation], second_half[negation]),
    )
    return write_set(folder, frame, FACTS, prose)


if __name__ == "__main__":
    main({"reviews": build_reviews}, "Build the short reviews in contrast pairs.")
