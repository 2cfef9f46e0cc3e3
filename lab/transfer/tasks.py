"""Two small tasks, each in two halves A and B: what a model learned on one half is carried over to the other.

- D, digits: scikit-learn's 1,797 scans of 8 x 8 pixels as 16 patches of 2 x 2, with pixel noise; five digits a half.
- S, sources: which of 20 generators made a sequence of 32 tokens? 20 Markov chains of order 2, 20 rules (repeats, mirrors,
  brackets, copies). Near: random halves of ten of each against ten of each; far: chains against rules.

A task is made from (name, distance, split, seed) alone, the same to the last bit each time; its test set is fresh.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from sklearn.datasets import load_digits

from lab import require

DISTANCES = {"D": ("near",), "S": ("near", "far")}
SIDES = ("A", "B")


@dataclass(frozen=True)
class Gate:
    """Accuracy that the base nets must reach, and the ceiling above which nothing could be told apart."""

    least: float
    most: float = 0.98

    def verdict(self, accuracy: dict[str, float]) -> str:
        """ "passed", or "base failed: ..." with each half's reason; accuracy by half."""
        low = [f"{side} {value:.3f} is below {self.least:g}" for side, value in accuracy.items() if value < self.least]
        high = [f"{side} {value:.3f} is at the ceiling, above {self.most:g}" for side, value in accuracy.items()
                if value > self.most]  # fmt: skip
        return "base failed: " + "; ".join(low + high) if low + high else "passed"


@dataclass(frozen=True)
class Examples:
    """Tokens [example position] (or patches [example position pixel]) and labels [example], numbered within the half."""

    inputs: Shaped[np.ndarray, "example position *patch"]
    labels: Int[np.ndarray, " example"]


@dataclass(frozen=True)
class Side:
    """One half: the names of its classes, a training and a test set."""

    classes: tuple[str, ...]
    train: Examples
    test: Examples


@dataclass(frozen=True)
class Task:
    """A task in two halves. `n_inputs` counts tokens, or the pixels of a patch; both halves have `n_classes` outputs."""

    name: str
    distance: str
    split: int
    seed: int
    sides: dict[str, Side]
    n_inputs: int
    n_classes: int
    gate: Gate
    patches: bool = False
    causal: bool = True
    sizes: dict[str, Any] | None = None

    @property
    def n_positions(self) -> int:
        return int(self.sides["A"].train.inputs.shape[1])

    def own_tokens(self, side: str) -> Int[np.ndarray, " token"]:
        """Tokens of this half that never occur in the other (with few rules and no noise): a net trained on the other has
        untrained rows for them, which, frozen, would look like specificity."""
        if self.patches:
            return np.array([], int)
        seen = {name: {int(t) for part in (half.train, half.test) for t in np.unique(part.inputs)}
                for name, half in self.sides.items()}  # fmt: skip
        return np.array(sorted(seen[side] - seen[other(side)]), int)

    def checksum(self) -> str:
        """Hash of all examples."""
        found = hashlib.sha256()
        for _, side in sorted(self.sides.items()):
            for part in (side.train, side.test):
                found.update(np.ascontiguousarray(part.inputs).tobytes() + np.ascontiguousarray(part.labels).tobytes())
        return found.hexdigest()


def make(
    name: str, *, distance: str = "near", split: int = 0, seed: int = 0,
    halves: tuple[Sequence[int], Sequence[int]] | None = None, **sizes: Any,
) -> Task:  # fmt: skip
    """A task with its two halves.

    Args:
        split: decides which classes go where, and for S also the generators. seed: of the examples within a split.
        halves: D and S near only: class numbers of A and of B (D: digits; S: 0-19 are Markov chains, 20-39 rules), instead
            of the split's own.
        sizes: D: train_per_class=30, noise=0.5 (standard deviation in units of the pixels'). S: train_per_class=200,
            test_per_class=50, weight=0.8 (of a chain's own part), token_noise=0.15.

    >>> digits = make("D", halves=([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]))
    >>> digits.sides["B"].train.inputs.shape, digits.sides["B"].classes
    ((150, 16, 4), ('5', '6', '7', '8', '9'))
    """
    check(name, distance)
    split, seed = require.whole("split", split, 0), require.seed(seed)
    unknown = sorted(set(sizes) - set(sizes_of(name)))
    if unknown:
        raise ValueError(f"task {name} has no size {', '.join(unknown)}; it has {', '.join(sizes_of(name))}")
    if halves is not None:
        if distance == "far":
            raise ValueError(f"halves= is for D and for S near; task {name} {distance} has fixed ones")
        sizes["halves"] = check_halves(halves, 10 if name == "D" else 40)
    return _MAKERS[name](distance, split, seed, **sizes)


def sizes_of(name: str) -> list[str]:
    """What can be set about a task, besides its distance, split, seed and halves."""
    return sorted(set(inspect.signature(_MAKERS[name]).parameters) - {"distance", "split", "seed", "halves"})


def check(name: str, distance: str) -> None:
    """Raise a ValueError for an unknown task, or a distance that it does not have."""
    if not isinstance(name, str):  # a model, as other experiments take it
        known = ", ".join(DISTANCES)
        raise ValueError(
            f"the first argument is a task, {known}, and not a {type(name).__name__}: own nets are trained here"
        )
    require.one_of("task", name, DISTANCES)
    if not isinstance(distance, str) or distance not in DISTANCES[name]:
        raise ValueError(f"task {name} has no distance {distance!r}; it has {', '.join(DISTANCES[name])}")


def check_halves(halves: tuple[Sequence[int], Sequence[int]], n: int) -> tuple[list[int], list[int]]:
    """Two disjoint, equally large lists of class numbers below n, or a ValueError that says what is wrong."""
    given = list(halves) if isinstance(halves, Iterable) else []
    if isinstance(halves, str) or len(given) != 2:
        raise ValueError(f"halves={halves!r}: give two lists of class numbers, those of A and of B")
    a, b = (sorted(require.wholes("halves", half, 0, None, least=0, twice=True)) for half in given)
    if both := sorted(set(a) & set(b)):
        raise ValueError(f"classes {both} are in both halves: A and B must not share one, or nothing is transferred")
    if len(a) != len(b) or len(a) < 2 or len({*a, *b}) < len(a) + len(b):
        raise ValueError(
            f"A has {len(a)} classes and B {len(b)}: pass two halves of one size, 2 or more, no class twice"
        )
    if outside := [number for number in (*a, *b) if number >= n]:
        raise ValueError(f"classes {outside} do not exist: pass numbers from 0 to {n - 1}")
    return a, b


def seed_of(*parts: Any) -> int:
    """A seed from names and numbers, so that no two purposes share a random stream."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


def _rng(*parts: Any) -> np.random.Generator:
    return np.random.default_rng(seed_of(*parts))


def other(side: str) -> str:
    """The half that is not this one."""
    return SIDES[1 - SIDES.index(side)]


def _random_halves(n: int, *parts: Any) -> tuple[list[int], list[int]]:
    order = _rng("halves", *parts).permutation(n)
    return sorted(order[: n // 2].tolist()), sorted(order[n // 2 :].tolist())


# --- D: digits ------------------------------------------------------------------------------------------------------


def _digits(
    distance: str, split: int, seed: int, *, halves: tuple[list[int], list[int]] | None = None,
    train_per_class: int = 30, noise: float = 0.5,
) -> Task:  # fmt: skip
    images, digits = load_digits(return_X_y=True)
    hint = "; a digit has at least 174 images"
    train_per_class = require.whole("train_per_class", train_per_class, 1, 150, hint=hint)
    noise = require.number("noise", noise, 0)
    images = (images - images.mean()) / images.std()
    rng = _rng("D", split, seed)
    images = images + noise * rng.standard_normal(images.shape)  # once and for all: the same noisy image in each pass
    patches = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4).astype(np.float32)
    chosen = {digit: rng.permutation(np.flatnonzero(digits == digit)) for digit in range(10)}
    sides = {}
    for name, half in zip(SIDES, halves or _random_halves(10, "D", split), strict=True):
        parts = []
        for cut in (slice(None, train_per_class), slice(train_per_class, None)):
            rows = np.concatenate([chosen[digit][cut] for digit in half])
            parts.append(Examples(patches[rows], np.searchsorted(half, digits[rows])))
        sides[name] = Side(tuple(map(str, half)), *parts)
    sizes = {"train_per_class": train_per_class, "noise": noise}
    return Task("D", distance, split, seed, sides, 4, 5, Gate(0.8), patches=True, causal=False, sizes=sizes)


# --- S: sources -----------------------------------------------------------------------------------------------------

_TOKENS, _LENGTH, _GROUPS = 32, 32, 4
_PER_GROUP = _TOKENS // _GROUPS  # tokens 0-7 are group 0, and so on
# Rules act on groups: (repeat, period, shift), (mirror, 0, shift), (brackets, deepest, 0), (copy, offset, 0).
RULES = (
    *(("repeat", period, shift) for period in (3, 4, 5, 6, 7, 8, 10) for shift in (0, 1)),
    *(("mirror", 0, shift) for shift in (0, 1)),
    *(("brackets", deepest, 0) for deepest in (1, 3)),
    *(("copy", offset, 0) for offset in (4, 8)),
)


def _sources(
    distance: str, split: int, seed: int, *, halves: tuple[list[int], list[int]] | None = None,
    train_per_class: int = 200, test_per_class: int = 50, weight: float = 0.8, token_noise: float = 0.15,
) -> Task:  # fmt: skip
    train_per_class = require.whole("train_per_class", train_per_class, 1)
    test_per_class = require.whole("test_per_class", test_per_class, 1)
    weight = require.number("weight", weight, high=1, above=0)
    token_noise = require.number("token_noise", token_noise, 0, below=1)
    if distance == "far":
        halves = (list(range(20)), list(range(20, 40)))
    elif halves is None:
        (m_a, m_b), (r_a, r_b) = _random_halves(20, "M", split), _random_halves(20, "R", split)
        halves = ([*m_a, *(20 + r for r in r_a)], [*m_b, *(20 + r for r in r_b)])
    chains = _chains(_rng("chains", split), weight)
    motifs = _rng("motifs", split).integers(_GROUPS, size=(len(RULES), _LENGTH))
    rng = _rng("S", split, seed)
    sides = {}
    for name, half in zip(SIDES, halves, strict=True):
        parts = []
        for count in (train_per_class, test_per_class):
            drawn = [
                _markov(chains[one], count, rng) if one < 20
                else _rule(RULES[one - 20], motifs[one - 20], count, token_noise, rng) for one in half
            ]  # fmt: skip
            parts.append(Examples(np.concatenate(drawn), np.repeat(np.arange(len(half)), count)))
        sides[name] = Side(tuple(_source_name(source) for source in half), *parts)
    sizes = {"train_per_class": train_per_class, "test_per_class": test_per_class, "weight": weight,
             "token_noise": token_noise}  # fmt: skip
    return Task("S", distance, split, seed, sides, _TOKENS, len(halves[0]), Gate(0.6), sizes=sizes)


def _source_name(source: int) -> str:
    return f"markov {source}" if source < 20 else " ".join(map(str, RULES[source - 20]))


def _chains(rng: np.random.Generator, weight: float) -> np.ndarray:
    """Cumulated next-token probabilities [chain, group of the token before last, group of the last, next token].

    Each context has a common distribution, mixed with the chain's own (`weight`). Both are peaked (Dirichlet 0.1). The
    two tokens before count by their groups: of 1,024 contexts, a sequence of 32 would hardly meet one twice.
    """
    size = (_GROUPS, _GROUPS)
    common = rng.dirichlet(np.full(_TOKENS, 0.1), size)
    own = rng.dirichlet(np.full(_TOKENS, 0.1), (20, *size))
    return np.cumsum((1 - weight) * common + weight * own, axis=-1)


def _markov(chain: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    tokens = rng.integers(_TOKENS, size=(count, _LENGTH))
    draws = rng.random((count, _LENGTH))
    for t in range(2, _LENGTH):
        cumulated = chain[tokens[:, t - 2] // _PER_GROUP, tokens[:, t - 1] // _PER_GROUP]
        tokens[:, t] = np.minimum((cumulated < draws[:, t, None]).sum(1), _TOKENS - 1)
    return tokens


def _rule(
    rule: tuple[str, int, int], motif: np.ndarray, count: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Repeats say their motif from the first token on, each time shifted; halves to mirror or copy are drawn anew."""
    kind, number, shift = rule
    groups = rng.integers(_GROUPS, size=(count, _LENGTH))
    half = _LENGTH // 2
    if kind == "repeat":
        t = np.arange(_LENGTH)
        groups[:] = (motif[t % number] + shift * (t // number)) % _GROUPS
    elif kind == "mirror":
        groups[:, half:] = (groups[:, :half][:, ::-1] + shift) % _GROUPS
    elif kind == "copy":
        groups[:, half:] = np.roll(groups[:, :half], -number, axis=1)
    else:
        groups = np.stack([_brackets(number, rng) for _ in range(count)])
    tokens = _PER_GROUP * groups + rng.integers(_PER_GROUP, size=groups.shape)
    wrong = rng.random(tokens.shape) < noise
    return np.where(wrong, rng.integers(_TOKENS, size=tokens.shape), tokens)


def _brackets(deepest: int, rng: np.random.Generator) -> np.ndarray:
    """Groups 0 and 1 open, 2 and 3 close the like of them; never deeper than `deepest`, all closed at the end."""
    groups = np.empty(_LENGTH, int)
    opened: list[int] = []
    for t in range(_LENGTH):
        must_close = len(opened) in (deepest, _LENGTH - t)
        if opened and (must_close or rng.random() < 0.5):
            groups[t] = opened.pop() + 2
        else:
            opened.append(int(rng.integers(2)))
            groups[t] = opened[-1]
    return groups


_MAKERS: dict[str, Callable[..., Task]] = {"D": _digits, "S": _sources}
