"""What linear maps between the states of two models stand on: tokens that belong together, splits, states, sums.

Used by `lab.depth_efficiency.linear_maps` (how well does one depth give another?) and `lab.transfer.stitching` (what is
that worth downstream?). Axis words: `source` and `target` are depths (blocks passed, 0..L) of the two models.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import require
from lab.cache import cache_folder, writable
from lab.states import stream_states
from lab.texts import Tokens

RIDGES = tuple(float(c) for c in 10 ** np.arange(-5, 0.01, 0.5).round(1))  # as shares of the mean squared state
SPLITS = ("train", "validation", "test")
_CHUNK = 4096  # tokens turned into float64 at a time

# --- which tokens of two models belong together ---------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """Positions of the tokens that are compared, text by text, without position 0 of either model.

    share: of all words, those that end a token in both models (1 where the tokens are the same).
    same_tokens: whether both models read the same ids, so that all tokens are compared, not only those at word ends.
    """

    positions_a: tuple[np.ndarray, ...]
    positions_b: tuple[np.ndarray, ...]
    share: float
    same_tokens: bool


def align(tokens_a: Tokens, tokens_b: Tokens) -> Alignment:
    """Tokens of two models after which both have read the same text: all where the ids agree, else the ends of words.

    A word is a run of letters and digits, or a run of other signs. The token kept for it is the last one whose END
    offset is the word's end; how the word is cut before does not matter. Words that do not end a token in both models
    are left out, and counted. Position 0 is left out: it is a start token or the first word, often an attention sink
    with a norm far above all others.

    Raises:
        ValueError: the texts differ; or nothing is left to compare.

    >>> align(*(Tokens(("a b",), torch.tensor([[0, 1 + i]]), torch.ones(1, 2).bool(),
    ...     np.array([[[0, 1], [1, 3]]])) for i in range(2))).positions_a
    (array([1]),)
    """
    if tokens_a.texts != tokens_b.texts:
        raise ValueError("the two models were given different texts: tokenize the same list with both")
    lengths_a, lengths_b = tokens_a.lengths, tokens_b.lengths
    if tokens_a.ids.shape == tokens_b.ids.shape and bool(
        ((tokens_a.ids == tokens_b.ids) | ~tokens_a.mask).all() and (tokens_a.mask == tokens_b.mask).all()
    ):
        positions = tuple(np.arange(1, length) for length in lengths_a)
        return _not_empty(Alignment(positions, positions, 1.0, True))
    kept_a, kept_b, words, kept = [], [], 0, 0
    for i, text in enumerate(tokens_a.texts):
        ends = [found.end() for found in re.finditer(r"\w+|[^\w\s]+", text)]
        last_a, last_b = (
            {int(end): at for at, end in enumerate(tokens.offsets[i, :length, 1])}
            for tokens, length in ((tokens_a, lengths_a[i]), (tokens_b, lengths_b[i]))
        )
        both = [(last_a[end], last_b[end]) for end in ends if end in last_a and end in last_b]
        words, kept = words + len(ends), kept + len(both)
        pairs = np.array([pair for pair in both if min(pair) > 0], dtype=int).reshape(-1, 2)
        kept_a.append(pairs[:, 0])
        kept_b.append(pairs[:, 1])
    return _not_empty(Alignment(tuple(kept_a), tuple(kept_b), kept / max(words, 1), False))


def _not_empty(found: Alignment) -> Alignment:
    if not sum(map(len, found.positions_a)):
        raise ValueError(
            f"no tokens to compare: {found.share:.0%} of the words end a token in both models, and position 0 is left "
            "out; give texts of several words"
        )
    return found


def split_documents(
    groups: Shaped[np.ndarray, " document"], *, validation_fraction: float = 0.15, test_fraction: float = 0.25,
    seed: int,
) -> Int[np.ndarray, " document"]:  # fmt: skip
    """0 (train), 1 (validation) or 2 (test) for each document; a group is never cut.

    Raises:
        ValueError: fractions that leave nothing to train on; fewer than 2 groups to test or 1 in another part.
    """
    validation_fraction = require.fraction("validation_fraction", validation_fraction)
    test_fraction = require.fraction("test_fraction", test_fraction)
    if validation_fraction + test_fraction >= 1:
        raise ValueError(
            f"validation_fraction={validation_fraction}, test_fraction={test_fraction}: give two shares above 0 that "
            "leave something to train on"
        )
    codes, names = pd.factorize(np.asarray(groups))
    n = len(names)
    n_validation, n_test = max(1, round(validation_fraction * n)), max(2, round(test_fraction * n))
    if n - n_validation - n_test < 1:
        raise ValueError(
            f"{len(codes)} documents in {n} groups: a split needs 1 group to train on, 1 to choose the ridge, and 2 to "
            "test; give more documents or finer groups"
        )
    part = np.zeros(n, int)
    drawn = np.random.default_rng([require.seed(seed), 0]).permutation(n)
    part[drawn[:n_test]], part[drawn[n_test : n_test + n_validation]] = 2, 1
    return part[codes]


# --- states of two models -------------------------------------------------------------------------------------------


@contextmanager
def collected(
    models: tuple[TransformerBridge, TransformerBridge], tokens: tuple[Tokens, Tokens], aligned: Alignment,
    depths: tuple[Sequence[int], Sequence[int]], order: Int[np.ndarray, " document"], *, memory_mb: int = 1000,
    batch_tokens: int = 1024, progress: bool = True,
) -> Iterator[tuple[Float[np.ndarray, "source token d_a"], Float[np.ndarray, "target token d_b"]]]:  # fmt: skip
    """States of both models at the tokens that are compared, the documents in this order, in float32.

    One forward pass of each model a batch of documents; states of more than `memory_mb` are kept in temporary files.
    """
    positions = (aligned.positions_a, aligned.positions_b)
    counts = np.array([len(at) for at in aligned.positions_a])
    start = np.zeros(len(order), int)
    start[order] = np.cumsum(counts[order]) - counts[order]
    n, longest = int(counts.sum()), np.maximum(tokens[0].lengths, tokens[1].lengths)
    passes = [(0, (0, 1))] if models[0] is models[1] else [(0, (0,)), (1, (1,))]  # which runs, and for which states
    bar = tqdm(total=n * len(passes), unit="token", desc="Collecting states", disable=not progress, leave=False)
    with ExitStack() as files, bar:
        shapes = [(len(chosen), n, model.cfg.d_model) for chosen, model in zip(depths, models, strict=True)]
        values = _arrays(shapes, memory_mb, files)
        for which, sides in passes:
            batches = _batches(longest, batch_tokens)
            for batch, found in stream_states(models[which], tokens[which], positions[which], batches=batches):
                done = 0
                for text in batch.tolist():
                    own, done = found[:, done : done + counts[text]], done + counts[text]
                    for side in sides:
                        values[side][:, start[text] : start[text] + counts[text]] = own[list(depths[side])]
                    bar.update(int(counts[text]))
        yield values[0], values[1]


def _arrays(shapes: list[tuple[int, int, int]], memory_mb: int, files: ExitStack) -> list[np.ndarray]:
    """Room for the states, in memory or in files without a name, which go with this process, however that ends."""
    megabytes = sum(4 * np.prod(shape) for shape in shapes) / 1e6
    if megabytes <= memory_mb:
        return [np.empty(shape, np.float32) for shape in shapes]
    free = shutil.disk_usage(writable(cache_folder())).free / 1e6
    if megabytes > 0.9 * free:
        raise ValueError(
            f"the states take {megabytes:.0f} MB and {cache_folder()} has {free:.0f} MB free: give fewer documents or "
            "depths, or set LAB_CACHE to a folder on another disk"
        )
    opened = [files.enter_context(tempfile.TemporaryFile(dir=cache_folder())) for _ in shapes]
    return [np.memmap(file, np.float32, "w+", shape=shape) for file, shape in zip(opened, shapes, strict=True)]


def _batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    batches, pending = [], np.argsort(-lengths, kind="stable")  # longest first: too much memory shows at once
    while len(pending):
        size = max(1, batch_tokens // int(lengths[pending[0]]))
        batches.append(pending[:size])
        pending = pending[size:]
    return batches


def chunks(part: slice, *values: np.ndarray, device: str = "cpu") -> Iterator[tuple[torch.Tensor, ...]]:
    """Tokens of a split in float64, some thousand at a time."""
    for start in range(part.start, part.stop, _CHUNK):
        rows = slice(start, min(start + _CHUNK, part.stop))
        yield tuple(torch.as_tensor(array[rows], dtype=torch.float64, device=device) for array in values)


def total(
    values: np.ndarray, part: slice, device: str = "cpu", of: Callable[..., torch.Tensor] = lambda chunk: chunk
) -> Float[torch.Tensor, " d_model"]:
    """Sum over the tokens of a split, of the states or of something made of them."""
    return torch.stack([of(chunk).sum(0) for (chunk,) in chunks(part, values, device=device)]).sum(0)


# --- sums and their solution ----------------------------------------------------------------------------------------


class Moments:
    """Sums in float64 that a linear map and its errors need, fed batch by batch: n, x'x, x'y and y^2 by dimension.

    They are taken about a fixed origin (the training means), so that a large common mean costs no precision. `xx` may be
    given where it is known from another target.
    """

    def __init__(self, origin_x: torch.Tensor, origin_y: torch.Tensor, xx: torch.Tensor | None = None) -> None:
        self.origin_x, self.origin_y = origin_x, origin_y
        self.known, self.n = xx is not None, 0
        self.xx = origin_x.new_zeros(len(origin_x), len(origin_x)) if xx is None else xx
        self.xy, self.yy = origin_x.new_zeros(len(origin_x), len(origin_y)), torch.zeros_like(origin_y)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Tokens with their states, [token d_model] each."""
        x, y = x - self.origin_x, y - self.origin_y
        self.n += len(x)
        if not self.known:
            self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum(0)


class Ridge:
    """All ridge solutions of one source: one eigendecomposition serves every target and every amount of ridge.

    W(c) = (G + k I)^-1 C with k = c tr(G) / d, G = x'x and C = x'y about the training means; in the eigenbasis of G this
    is a division. Equal to scikit-learn's Ridge(alpha=k) on the same tokens.
    """

    def __init__(self, xx: torch.Tensor) -> None:
        self.values, self.basis = torch.linalg.eigh(xx)
        self.unit = float(xx.trace()) / len(xx)

    def solve(self, xy: torch.Tensor, c: float) -> torch.Tensor:
        """W [d_x d_y] for one target."""
        return self.basis @ ((self.basis.T @ xy) / (self.values + c * self.unit)[:, None])

    def errors(self, train: Moments, held: Moments, ridges: Sequence[float]) -> Float[np.ndarray, " ridge"]:
        """Summed squared error on held-out moments for each c. |y - xW|^2 = y^2 - 2 tr(W'C) + tr(W'GW), all in sums; one
        matrix product serves every c."""
        fitted, seen = self.basis.T @ train.xy, self.basis.T @ held.xy  # [axis d_y]
        linear, square = (fitted * seen).sum(1), (self.basis.T @ held.xx @ self.basis) * (fitted @ fitted.T)
        found = []
        for c in ridges:
            scale = 1 / (self.values.clamp_min(0) + c * self.unit)
            found.append(float(held.yy.sum() - 2 * scale @ linear + scale @ square @ scale))
        return np.array(found)


class Source:
    """All maps from one depth of a model: they share its training mean, its sums x'x and their eigenvectors."""

    def __init__(self, x: Float[np.ndarray, "token d_x"], train: slice, validation: slice, device: str = "cpu") -> None:
        self.x, self.parts, self.device = x, (train, validation), device
        self.mean = total(x, train, device) / (train.stop - train.start)
        self.grams: list[torch.Tensor | None] = [None, None]
        self.ridge: Ridge | None = None

    def fit(
        self, y: Float[np.ndarray, "token d_y"], mean_y: Float[torch.Tensor, " d_y"], ridges: Sequence[float]
    ) -> tuple[Float[torch.Tensor, "d_x d_y"], float, float, float]:
        """Weight of the map to one target (with its training mean), its c and k, and its squared error on the validation
        tokens, the least of all c."""
        sums = []
        for place, part in enumerate(self.parts):
            moments = Moments(self.mean, mean_y, self.grams[place])
            for x_part, y_part in chunks(part, self.x, y, device=self.device):
                moments.add(x_part, y_part)
            self.grams[place] = moments.xx
            sums.append(moments)
        self.ridge = self.ridge or Ridge(sums[0].xx)
        errors = self.ridge.errors(sums[0], sums[1], ridges)
        c = ridges[int(errors.argmin())]
        return self.ridge.solve(sums[0].xy, c), c, c * self.ridge.unit, float(errors.min())
