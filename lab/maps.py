"""Linear maps between depths: can the states of one model at depth i give those of another at depth j?

If a deeper model only spreads the same computation over more layers, the best source of its depth j is at the same
fraction of depth: a diagonal. If it computes something new in its late layers, no source depth gives those well. After
Csordás, Manning, Potts (arXiv 2505.13898, section 6), with a closed form instead of stochastic descent, R2 beside their
metric, splits by document, baselines, and a test of the diagonal in place of the eye; and after Chen et al. (arXiv
2506.06609), who replace states by mapped ones.

    maps = fit_maps(small, large, documents, keep=[(3, 6)])
    maps.result.summary              # is there a diagonal?
    weight, bias = maps.map(3, 6)    # x @ weight + bias

Axis words: `source` and `target` are depths (blocks passed, 0..L) of the two models, `token`, `document` (tested).
"""

import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from scipy.stats import rankdata
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import require
from lab import statistics as metrics
from lab.cache import cache_folder, writable
from lab.models import facts
from lab.results import Result, versions
from lab.states import stream_states
from lab.texts import Tokens, checked_texts, tokenize

RIDGES = tuple(float(c) for c in 10 ** np.arange(-5, 0.01, 0.5).round(1))  # as shares of the mean squared state
_SPLITS = ("train", "validation", "test")
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
        return _something(Alignment(positions, positions, 1.0, True))
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
    return _something(Alignment(tuple(kept_a), tuple(kept_b), kept / max(words, 1), False))


def _something(found: Alignment) -> Alignment:
    if not sum(map(len, found.positions_a)):
        raise ValueError(
            f"no tokens to compare: {found.share:.0%} of the words end a token in both models, and position 0 is left "
            "out; give texts of several words"
        )
    return found


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


# --- the experiment -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearMaps:
    """Fitted maps with what they were tested on.

    result: the tables (`linear_maps`). sse: squared error of each tested document, summed over its tokens and
        dimensions; sst: the same about the mean of all tested tokens; relative: sum over tokens of |y - f(x)| / |y|;
        n_tokens: of each tested document. groups: which document belongs to which group.
    """

    result: Result
    sse: Float[np.ndarray, "document source target"]
    sst: Float[np.ndarray, "document target"]
    relative: Float[np.ndarray, "document source target"]
    n_tokens: Int[np.ndarray, " document"]
    groups: Shaped[np.ndarray, " document"]
    weights: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]

    def map(
        self, source_depth: int, target_depth: int
    ) -> tuple[Float[np.ndarray, "d_source d_target"], Float[np.ndarray, " d_target"]]:
        """Weight and bias (float64) of one fitted map: the mapped state is `x @ weight + bias`."""
        if (source_depth, target_depth) not in self.weights:
            kept = ", ".join(map(str, self.weights)) or "none"
            raise ValueError(
                f"the map ({source_depth}, {target_depth}) was not kept (kept: {kept}); pass keep=[({source_depth}, "
                f"{target_depth})] to fit_maps"
            )
        return self.weights[source_depth, target_depth]


def linear_maps(
    model_a: TransformerBridge, model_b: TransformerBridge, documents: Sequence[str], *, seed: int = 0, **options: Any
) -> Result:
    """How well each depth of `model_a` gives each depth of `model_b` by an affine map: `fit_maps(...).result`.

    Arguments and tables as in `fit_maps`.
    """
    return fit_maps(model_a, model_b, documents, seed=seed, **options).result


def fit_maps(
    model_a: TransformerBridge,
    model_b: TransformerBridge,
    documents: Sequence[str],
    *,
    groups: Shaped[np.ndarray, " text"] | None = None,
    source_depths: Sequence[int] | None = None,
    target_depths: Sequence[int] | None = None,
    ridges: Sequence[float] = RIDGES,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.25,
    keep: Sequence[tuple[int, int]] = (),
    position_0: bool = False,
    draws: int = 1000,
    batch_tokens: int = 1024,
    memory_mb: int = 1000,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> LinearMaps:
    """Affine ridge maps from the stream of one model at each depth to that of another, fitted in closed form.

    For each pair (i, j): f(x) = x W + b, least squares with ridge k = c tr(G)/d on the training documents, c chosen on
    the validation documents, everything reported on the test documents. The same model twice is a model against its own
    depths (where i = j is trivially perfect, and with it the diagonal); with `lab.models.random_twin` it is the null.

    Departures from the published maps (arXiv 2505.13898): closed form and not 10,000 steps of AdamW on raw states;
    position 0 is left out; R2 with centred states beside the published mean of |y - f(x)| / |y|, which a large common
    mean makes small for any map (see `mean_only_relative_error`). What a good map does not show: that model B uses what
    the map carries over; small directions can matter.

    Memory: all states once in float32, (depths_a d_a + depths_b d_b) * 4 bytes a token, in a temporary file under the
    cache folder when that is above `memory_mb`; besides, one batch, a few matrices d_a x d_b in float64, and 4096
    tokens of one pair of depths in float64. Kept maps take d_a d_b * 8 bytes each. Time: n d_a d_b multiplications a
    pair in float64, printed as seconds before it starts. With fewer than 20 d_a training tokens R2 falls because the fit
    is noisy, not because the map is poor; compare pairs of one run only.

    Args:
        model_a, model_b: source and target, from `lab.load`. With two tokenizers only the ends of words are compared
            (`align`).
        documents: texts; a document is on one side of the split as a whole.
        groups: which documents stay together (a template, a topic) in the split and in the bootstrap; None: each alone.
        source_depths, target_depths: None is all, 0..L.
        ridges: values of c to choose from.
        validation_fraction, test_fraction: shares of the groups; the others are trained on.
        keep: pairs (source, target) whose weights stay in the result.
        position_0: also report how the maps, fitted without it, do at position 0 of the test documents.
        draws: bootstrap draws of test documents (whole groups).
        batch_tokens: tokens of one forward pass. device: where torch solves, which must know float64.
        seed: of the split, the bootstrap and the shuffled labels.
        progress: print an estimate and show bars.

    Returns:
        LinearMaps; its `.result` (kind "linear_maps") has
        `.table`, one row a pair: source_depth, target_depth, relative_source, relative_target (fractions of depth), c,
            ridge (k), r2_validation, r2 (1 - SSE/SST over tokens and dimensions), r2_mean_dimension (mean over
            dimensions of each one's R2), r2_without_top3 (without the 3 target dimensions of the highest training
            variance, which else dominate), relative_error (as published), mean_only_r2 and mean_only_relative_error (the
            training mean for every token), embedding_r2 (from source depth 0: what token identity gives; nan when it
            is not among the sources), n_tokens (tested).
        `.summary`: the diagonal test (`diagonal_test`).
        `.tables["best"]`, one row a target depth: its best source with interval, its R2 and the smallest relative error
            with intervals: the paper's argument is how this error goes with target depth.
        `.tables["documents"]`: document, group, split, n_tokens.
        `.tables["position_0"]`, when asked: source_depth, target_depth, relative_error, norm_ratio (mean norm of the
            target there over that elsewhere).

    Raises:
        ValueError: too few documents or groups, an empty or too long text, a depth out of range, ridges not above 0, a
            pair to keep that is not fitted; before a model runs.
    """
    texts = checked_texts(require.listed("documents", documents, "texts"), what="document")
    sources = _depths(model_a, source_depths, "source_depths")
    targets = _depths(model_b, target_depths, "target_depths")
    ridges, seed, draws = (
        require.numbers("ridges", ridges, above=0),
        require.seed(seed),
        require.whole("draws", draws, 1),
    )
    batch_tokens, memory_mb = require.whole("batch_tokens", batch_tokens, 1), require.whole("memory_mb", memory_mb, 0)
    (position_0,), test_fraction = (
        require.flags(position_0=position_0),
        require.fraction("test_fraction", test_fraction),
    )
    validation_fraction = require.fraction("validation_fraction", validation_fraction)
    keep = require.pairs("keep", keep, (model_a.cfg.n_layers, model_b.cfg.n_layers))
    for i, j in keep:
        if i not in sources or j not in targets:
            raise ValueError(f"keep has the pair ({i}, {j}), which is not fitted: sources {sources}, targets {targets}")
    names = np.arange(len(texts)) if groups is None else np.asarray(groups)
    split = split_documents(names, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed)
    tokens_a = tokenize(model_a, texts)
    tokens_b = tokens_a if model_b is model_a else tokenize(model_b, texts)
    aligned = align(tokens_a, tokens_b)
    counts = np.array([len(at) for at in aligned.positions_a])
    for part, name in enumerate(_SPLITS):
        n_tokens = counts[split == part].sum()
        if n_tokens < 2:
            raise ValueError(f"the {name} documents have {n_tokens} tokens to compare: give more or longer documents")

    order = np.argsort(split, kind="stable")  # the tokens of a split stand together
    if progress:
        _print_estimate(model_a, model_b, tokens_a, tokens_b, aligned, (sources, targets), counts, split, device)
    with _collected(
        (model_a, model_b), (tokens_a, tokens_b), aligned, (sources, targets), order, memory_mb, batch_tokens,
        split if position_0 else None, progress,
    ) as states:  # fmt: skip
        ends = np.cumsum([counts[split == part].sum() for part in range(len(_SPLITS))])
        ranges = [slice(int(start), int(end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        tested = order[split[order] == _SPLITS.index("test")]
        fitted = _fit_all(
            states, ranges, counts[tested], tuple(ridges), {(sources.index(i), targets.index(j)) for i, j in keep},
            device, progress,
        )  # fmt: skip

    def fraction(depths: tuple[int, ...], model: TransformerBridge) -> np.ndarray:
        return np.array(depths) / model.cfg.n_layers

    summary, best = diagonal_test(
        fitted.sse, fitted.sst, fitted.relative, counts[tested], names[tested], source_depths=np.array(sources),
        target_depths=np.array(targets), n_layers=(model_a.cfg.n_layers, model_b.cfg.n_layers), draws=draws, seed=seed,
    )  # fmt: skip
    pairs = pd.MultiIndex.from_product([sources, targets], names=["source_depth", "target_depth"]).to_frame(index=False)
    grid = np.ix_(range(len(sources)), range(len(targets)))
    table = pairs.assign(
        relative_source=np.repeat(fraction(sources, model_a), len(targets)),
        relative_target=np.tile(fraction(targets, model_b), len(sources)),
        **{name: np.broadcast_to(values, (len(sources), len(targets)))[grid].ravel() for name, values in fitted.columns.items()},
        n_tokens=int(counts[tested].sum()),
    )  # fmt: skip
    at_zero = table[table.source_depth == 0].set_index("target_depth").r2
    table.insert(len(table.columns) - 1, "embedding_r2", table.target_depth.map(at_zero).astype(float))
    tables = {
        "best": best,
        "documents": pd.DataFrame(
            {"document": np.arange(len(texts)), "group": names.astype(str), "split": np.array(_SPLITS)[split],
             "n_tokens": counts}
        ),
    }  # fmt: skip
    if position_0:
        tables["position_0"] = pairs.assign(relative_error=fitted.first_error.ravel(),
                                            norm_ratio=np.tile(fitted.first_norm, len(sources)))  # fmt: skip
    parameters = {
        "model_a": facts(model_a), "model_b": facts(model_b), "seed": seed, "ridges": ridges,
        "validation_fraction": validation_fraction, "test_fraction": test_fraction, "draws": draws,
        "n_documents": len(texts), "n_tokens": {n: int(counts[split == p].sum()) for p, n in enumerate(_SPLITS)},
        "same_tokens": aligned.same_tokens, "share_of_words": aligned.share,
        "documents_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(), "versions": versions(),
    }  # fmt: skip
    weights = {(sources[i], targets[j]): found for (i, j), found in fitted.weights.items()}
    result = Result("linear_maps", table, summary, parameters, tables)
    return LinearMaps(result, fitted.sse, fitted.sst, fitted.relative, counts[tested], names[tested], weights)


def split_documents(
    groups: Shaped[np.ndarray, " document"],
    *,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.25,
    seed: int,
) -> Int[np.ndarray, " document"]:
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


@dataclass
class _Fitted:
    sse: np.ndarray
    sst: np.ndarray
    relative: np.ndarray
    columns: dict[str, np.ndarray]
    weights: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]
    first_error: np.ndarray
    first_norm: np.ndarray


@dataclass(frozen=True)
class _Collected:
    """States [depth token d_model] of both models, tokens in the order train, validation, test; those at position 0."""

    a: np.ndarray
    b: np.ndarray
    first_a: np.ndarray
    first_b: np.ndarray


def _fit_all(
    states: _Collected,
    ranges: list[slice],
    tested: np.ndarray,
    ridges: tuple[float, ...],
    keep: set[tuple[int, int]],
    device: str,
    progress: bool,
) -> _Fitted:
    """Fits and tests every pair; `tested` is the number of tokens of each tested document, in order."""
    train, validation, test = ranges
    n_a, n_b, n_documents = len(states.a), len(states.b), len(tested)
    document = torch.repeat_interleave(torch.arange(n_documents), torch.as_tensor(tested)).to(device)
    sse, relative = (np.zeros((n_documents, n_a, n_b)) for _ in range(2))
    names = ("c", "ridge", "r2_validation", "r2", "r2_mean_dimension", "r2_without_top3", "relative_error")
    columns = {name: np.zeros((n_a, n_b)) for name in names}
    first_error = np.zeros((n_a, n_b))
    weights = {}

    def mean(values: np.ndarray, part: slice) -> torch.Tensor:
        chunks = _chunks(part, values, device=device)
        return torch.stack([chunk.sum(0) for (chunk,) in chunks]).sum(0) / (part.stop - part.start)

    means_b = [mean(values, train) for values in states.b]
    facts_b = [_target_facts(states.b[j], ranges, means_b[j], document, n_documents, device) for j in range(n_b)]
    bar = tqdm(total=n_a * n_b, desc="Fitting maps", unit="map", disable=not progress, leave=False)
    with bar, torch.inference_mode():
        for i in range(n_a):
            x = states.a[i]
            mean_a, ridge = mean(x, train), None
            grams: list[torch.Tensor | None] = [None, None]
            for j in range(n_b):
                y, target = states.b[j], facts_b[j]
                sums = []
                for place, part in enumerate((train, validation)):
                    moments = Moments(mean_a, means_b[j], grams[place])
                    for x_part, y_part in _chunks(part, x, y, device=device):
                        moments.add(x_part, y_part)
                    grams[place] = moments.xx
                    sums.append(moments)
                ridge = ridge or Ridge(sums[0].xx)
                errors = ridge.errors(sums[0], sums[1], ridges)
                c = ridges[int(errors.argmin())]
                weight = ridge.solve(sums[0].xy, c)
                by_document, ratios = (torch.zeros(n_documents, dtype=torch.float64, device=device) for _ in range(2))
                by_dimension, done = torch.zeros_like(means_b[j]), 0
                for x_part, y_part in _chunks(test, x, y, device=device):
                    square = ((y_part - means_b[j]) - (x_part - mean_a) @ weight).square_()
                    where = document[done : done + len(square)]
                    by_document.index_add_(0, where, square.sum(1))
                    ratios.index_add_(0, where, square.sum(1).sqrt() / _norm(y_part))
                    by_dimension += square.sum(0)
                    done += len(square)
                sse[:, i, j], relative[:, i, j] = by_document.cpu(), ratios.cpu()
                moving = target.sst_dimension > 0
                small = moving & ~target.top3
                scores = {
                    "c": c,
                    "ridge": c * ridge.unit,
                    "r2_validation": 1 - errors.min() / target.sst_validation,
                    "r2": 1 - float(by_dimension.sum() / target.sst_dimension.sum()),
                    "r2_mean_dimension": 1 - float((by_dimension / target.sst_dimension)[moving].mean()),
                    "r2_without_top3": 1 - float(by_dimension[small].sum() / target.sst_dimension[small].sum()),
                    "relative_error": float(ratios.sum()) / done,
                }
                for name, value in scores.items():
                    columns[name][i, j] = value
                if states.first_a.size:
                    (x_part,), (y_part,) = (
                        next(iter(_chunks(slice(0, n_documents), values, device=device)))
                        for values in (states.first_a[i], states.first_b[j])
                    )
                    square = ((y_part - means_b[j]) - (x_part - mean_a) @ weight).square().sum(1)
                    first_error[i, j] = float((square.sqrt() / _norm(y_part)).mean())
                if (i, j) in keep:
                    weights[i, j] = (weight.cpu().numpy(), (means_b[j] - mean_a @ weight).cpu().numpy())
                bar.update()
    columns["mean_only_r2"] = np.array([target.mean_only_r2 for target in facts_b])
    columns["mean_only_relative_error"] = np.array([target.mean_only_relative_error for target in facts_b])
    sst = np.stack([target.sst for target in facts_b], 1)
    norms = np.array([target.norm for target in facts_b])
    first = np.linalg.norm(states.first_b.astype(float), axis=-1).mean(-1) / norms if states.first_b.size else norms
    return _Fitted(sse, sst, relative, columns, weights, first_error, first)


@dataclass(frozen=True)
class _TargetFacts:
    """What one target depth has of its own, whatever the source: variation, and the error of the mean alone."""

    sst: np.ndarray  # [document], about the mean of all tested tokens
    sst_dimension: torch.Tensor
    sst_validation: float
    top3: torch.Tensor  # bool, the 3 dimensions of highest training variance
    mean_only_r2: float
    mean_only_relative_error: float
    norm: float


def _target_facts(
    y: np.ndarray, ranges: list[slice], mean: torch.Tensor, document: torch.Tensor, n_documents: int, device: str
) -> _TargetFacts:
    train, validation, test = ranges

    def about(origin: torch.Tensor, part: slice) -> torch.Tensor:
        return torch.stack([(chunk - origin).square().sum(0) for (chunk,) in _chunks(part, y, device=device)]).sum(0)

    def own_mean(part: slice) -> torch.Tensor:
        total = torch.stack([chunk.sum(0) for (chunk,) in _chunks(part, y, device=device)]).sum(0)
        return total / (part.stop - part.start)

    own = own_mean(test)
    sst = torch.zeros(n_documents, dtype=torch.float64, device=device)
    ratio, norm, done = 0.0, 0.0, 0
    for (chunk,) in _chunks(test, y, device=device):
        sst.index_add_(0, document[done : done + len(chunk)], (chunk - own).square().sum(1))
        ratio += float(((chunk - mean).norm(dim=1) / _norm(chunk)).sum())
        norm += float(chunk.norm(dim=1).sum())
        done += len(chunk)
    variance = about(mean, train)
    top3 = torch.zeros_like(variance, dtype=torch.bool)
    top3[variance.topk(min(3, len(variance) - 1)).indices] = True
    by_dimension = about(own, test)
    return _TargetFacts(
        sst.cpu().numpy(),
        by_dimension,
        float(about(own_mean(validation), validation).sum()),
        top3,
        1 - float(about(mean, test).sum() / by_dimension.sum()),
        ratio / done,
        norm / done,
    )


def _norm(y: torch.Tensor) -> torch.Tensor:
    return y.norm(dim=1).clamp_min(1e-12)


def _chunks(part: slice, *values: np.ndarray, device: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tokens of a split in float64, some thousand at a time."""
    for start in range(part.start, part.stop, _CHUNK):
        rows = slice(start, min(start + _CHUNK, part.stop))
        yield tuple(torch.as_tensor(array[rows], dtype=torch.float64, device=device) for array in values)


@contextmanager
def _collected(
    models: tuple[TransformerBridge, TransformerBridge],
    tokens: tuple[Tokens, Tokens],
    aligned: Alignment,
    depths: tuple[tuple[int, ...], tuple[int, ...]],
    order: np.ndarray,
    memory_mb: int,
    batch_tokens: int,
    split: np.ndarray | None,
    progress: bool,
) -> Iterator[_Collected]:
    """The states of both models, in memory or in a temporary file; one forward pass of each a batch of documents."""
    positions = (aligned.positions_a, aligned.positions_b)
    counts = np.array([len(at) for at in aligned.positions_a])
    start = np.zeros(len(order), int)
    start[order] = np.cumsum(counts[order]) - counts[order]
    n, same = int(counts.sum()), models[0] is models[1]
    widths = [model.cfg.d_model for model in models]
    megabytes = sum(n * len(d) * w * 4 for d, w in zip(depths, widths, strict=True)) / 1e6
    with ExitStack() as files:
        if on_disk := megabytes > memory_mb:
            free = shutil.disk_usage(writable(cache_folder())).free / 1e6
            if megabytes > 0.9 * free:
                raise ValueError(
                    f"the states take {megabytes:.0f} MB and {cache_folder()} has {free:.0f} MB free: give fewer documents "
                    "or depths, or set LAB_CACHE to a folder on another disk"
                )
        values: list[np.ndarray] = []
        for chosen, width in zip(depths, widths, strict=True):
            shape = (len(chosen), n, width)
            if on_disk:  # a file without a name: it goes with this process, however that ends
                file = files.enter_context(tempfile.TemporaryFile(dir=cache_folder()))
                values.append(np.memmap(file, np.float32, "w+", shape=shape))
            else:
                values.append(np.empty(shape, np.float32))
        tested = order[split[order] == 2] if split is not None else order[:0]
        first = [np.zeros((len(d), len(tested), w), np.float32) for d, w in zip(depths, widths, strict=True)]
        longest = np.maximum(tokens[0].lengths, tokens[1].lengths)
        batches, pending = [], np.argsort(-longest, kind="stable")  # longest first: too much memory shows at once
        while len(pending):
            size = max(1, batch_tokens // int(longest[pending[0]]))
            batches.append(pending[:size])
            pending = pending[size:]
        with tqdm(
            total=n * (1 if same else 2), unit="token", desc="Collecting states", disable=not progress, leave=False
        ) as bar:
            for which in range(1 if same else 2):
                read = [
                    np.concatenate([[0], at]) if text in tested else np.asarray(at)
                    for text, at in enumerate(positions[which])
                ]
                for batch, found in stream_states(models[which], tokens[which], read, batches=batches):
                    done = 0
                    for text in batch:
                        own = found[:, done : done + len(read[text])]
                        done += len(read[text])
                        for model in (0, 1) if same else (which,):
                            mine = own[list(depths[model])]
                            if text in tested:
                                first[model][:, int(np.flatnonzero(tested == text)[0])] = mine[:, 0]
                                mine = mine[:, 1:]
                            values[model][:, start[text] : start[text] + counts[text]] = mine
                        bar.update(int(counts[text]))
        yield _Collected(values[0], values[1], *first)


# --- is there a diagonal? -------------------------------------------------------------------------------------------


def diagonal_test(
    sse: Float[np.ndarray, "document source target"],
    sst: Float[np.ndarray, "document target"],
    relative: Float[np.ndarray, "document source target"],
    n_tokens: Int[np.ndarray, " document"],
    groups: Shaped[np.ndarray, " document"],
    *,
    source_depths: Int[np.ndarray, " source"],
    target_depths: Int[np.ndarray, " target"],
    n_layers: tuple[int, int],
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Does the best source depth follow the target depth, as a fraction? From statistics of each tested document.

    For each target j the best source is i(j) = argmax over i of R2(i, j). Depth 0 of both is left out, as published:
    embeddings give each other trivially. All intervals are percentiles of a bootstrap over whole groups of documents, in
    which the best sources are chosen anew.

    Args:
        sse, sst, relative, n_tokens: as in `LinearMaps`.
        groups: [document], at least two different ones.
        source_depths, target_depths: which depths the axes hold; at least two above 0 each.
        n_layers: blocks of the two models, L1 and L2.
        draws, seed, confidence: of the bootstrap and of the shuffled labels.

    Returns:
        The summary, one row a statistic, with columns statistic, estimate, low, high, null_mean, null_p, n_groups:
            slope: of i(j)/L1 on j/L2; 1 on the diagonal, 0 where one source is the best for all. It alone does not tell
                a diagonal from a rise that saturates: see the gains.
            spearman: of the same (0 where all i(j) are equal).
            distance: mean over j of |i(j)/L1 - j/L2|.
            distance_same_depth, distance_saturates: the same distance from the rivals i = j (the same number of blocks)
                and i = min(j, L1); gain_over_same_depth and gain_over_saturates: rival minus diagonal, above 0 where
                the diagonal is nearer. With L1 = L2 all three are one, and nothing can tell them apart.
            target_slope, target_distance: from the other side, j(i) = argmax over j of R2(i, j) - mean over i of R2(i, j),
                which takes out that some targets are easy for every source; j(i)/L2 on i/L1.
            error_trend, r2_trend: slope on j/L2 of the smallest relative error, and of the largest R2, over sources. The
                paper's argument for "no new computation" is that the error does not rise with depth. The two can
                disagree: a common mean that grows with depth lowers the relative error of any map, and not R2.
            null_mean and null_p: mean under 1,000 shuffles of the target labels, and the share of shuffles that are at
            least as near (slope, spearman: as high). nan where a shuffle means nothing.
        The best sources, one row a target depth (above 0): target_depth, relative_target, source_depth, relative_source,
            source_low, source_high (fractions), r2, r2_low, r2_high, relative_error, error_low, error_high.

    Raises:
        ValueError: fewer than two depths above 0 on an axis, a single group, shapes that differ.
    """
    shape = (len(sse), len(source_depths), len(target_depths))
    if sse.shape != shape or relative.shape != shape or sst.shape != (shape[0], shape[2]) or len(n_tokens) != shape[0]:
        raise ValueError(
            f"sse {sse.shape}, relative {relative.shape}, sst {sst.shape}, n_tokens {n_tokens.shape}: pass [document, "
            f"source, target] for {shape[1]} source and {shape[2]} target depths"
        )
    rows, columns = source_depths > 0, target_depths > 0
    if min(rows.sum(), columns.sum()) < 2:
        raise ValueError(
            f"source depths {source_depths.tolist()}, target depths {target_depths.tolist()}: the test needs at least two "
            "depths above 0 of each"
        )
    draws, seed, confidence = (
        require.whole("draws", draws, 1),
        require.seed(seed),
        require.fraction("confidence", confidence),
    )
    x, y = source_depths[rows] / n_layers[0], target_depths[columns] / n_layers[1]
    source, target = source_depths[rows], target_depths[columns]
    sse, relative = (values[:, rows][:, :, columns] for values in (sse, relative))
    n_source, n_target = sse.shape[1:]
    sizes = np.broadcast_to(n_tokens[:, None, None], sse.shape).astype(float)
    # sums of each document side by side: a resampled ratio of sums is the ratio of their resampled means
    parts = np.stack([sse, np.broadcast_to(sst[:, None, columns], sse.shape), relative, sizes], 1)
    drawn = metrics.cluster_means(parts, groups, draws=draws, seed=seed)
    sums = np.concatenate([parts.mean(0)[None], drawn])  # row 0 is the measured one
    r2, error = 1 - sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]  # [draw source target]
    best = r2.argmax(1)  # [draw target]
    found = x[best]
    own_targets = (r2 - r2.mean(1, keepdims=True)).argmax(2)  # [draw source]
    lowest, highest = error.min(1), r2.max(1)
    # both in fractions of the source's depth; i = j may lie past the source's last depth
    rivals = {"same_depth": target / n_layers[0], "saturates": np.minimum(target, n_layers[0]) / n_layers[0]}
    distance = np.abs(found - y).mean(1)
    statistics = {"slope": _slope(y, found), "spearman": _spearman(y, found), "distance": distance}
    for name, rival in rivals.items():
        statistics[f"distance_{name}"] = np.abs(found - rival).mean(1)
    for name in rivals:
        statistics[f"gain_over_{name}"] = statistics[f"distance_{name}"] - distance
    statistics["target_slope"] = _slope(x, y[own_targets])
    statistics["target_distance"] = np.abs(y[own_targets] - x).mean(1)
    statistics["error_trend"], statistics["r2_trend"] = _slope(y, lowest), _slope(y, highest)

    rng = np.random.default_rng([seed, 1])
    shuffles = np.stack([rng.permutation(n_target) for _ in range(1000)])
    shuffled, theirs = found[0][shuffles], y[shuffles][:, own_targets[0]]
    nulls = {
        "slope": _slope(y, shuffled),
        "spearman": _spearman(y, shuffled),
        "distance": -np.abs(shuffled - y).mean(1),
        "target_slope": _slope(x, theirs),
        "target_distance": -np.abs(theirs - x).mean(1),
    }
    n_groups = len(pd.unique(np.asarray(groups)))
    levels = [(1 - confidence) / 2, (1 + confidence) / 2]

    def interval(values: np.ndarray) -> np.ndarray:
        return np.quantile(values[1:], levels, axis=0)

    lines = []
    for name, values in statistics.items():
        mean, p = np.nan, np.nan
        if name in nulls:
            sign = -1 if name.endswith("distance") else 1
            mean, p = sign * nulls[name].mean(), (1 + (nulls[name] >= sign * values[0] - 1e-12).sum()) / 1001
        lines.append((name, values[0], *interval(values), mean, p, n_groups))
    summary = pd.DataFrame(lines, columns=["statistic", "estimate", "low", "high", "null_mean", "null_p", "n_groups"])
    ends = {"source": found, "r2": highest, "error": lowest}
    low_high = {name: interval(values) for name, values in ends.items()}
    columns_of_best = {
        "target_depth": target, "relative_target": y, "source_depth": source[best[0]], "relative_source": found[0],
        "source_low": low_high["source"][0], "source_high": low_high["source"][1], "r2": highest[0],
        "r2_low": low_high["r2"][0], "r2_high": low_high["r2"][1], "relative_error": lowest[0],
        "error_low": low_high["error"][0], "error_high": low_high["error"][1],
    }  # fmt: skip
    return summary, pd.DataFrame(columns_of_best)


def _slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of each row of y [draw point] on x [point]."""
    centred = x - x.mean()
    return (y - y.mean(1, keepdims=True)) @ centred / (centred @ centred)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of y with x, ties at their mean rank; 0 for a row of equal values."""
    a, b = rankdata(x), rankdata(y, axis=1)
    a, b = a - a.mean(), b - b.mean(1, keepdims=True)
    size = np.sqrt((a @ a) * np.square(b).sum(1))
    return np.divide(b @ a, size, out=np.zeros(len(b)), where=size > 0)


# --- checks and estimates -------------------------------------------------------------------------------------------


def _depths(model: TransformerBridge, chosen: Sequence[int] | None, name: str) -> tuple[int, ...]:
    last = model.cfg.n_layers
    found = sorted(require.wholes(name, range(last + 1) if chosen is None else chosen, 0, last))
    if sum(depth > 0 for depth in found) < 2:
        raise ValueError(f"{name}={found}: give at least two depths above 0 (None is all)")
    return tuple(found)


def _print_estimate(
    model_a: TransformerBridge,
    model_b: TransformerBridge,
    tokens_a: Tokens,
    tokens_b: Tokens,
    aligned: Alignment,
    depths: tuple[tuple[int, ...], tuple[int, ...]],
    counts: np.ndarray,
    split: np.ndarray,
    device: str,
) -> None:
    """Time one batch of each model and one matrix product here, and scale up. Right to a factor of two."""
    few = np.argsort(-tokens_a.lengths)[:: max(1, len(counts) // 8)][:8]
    forward = 0.0
    for model, tokens, positions in (
        (model_a, tokens_a, aligned.positions_a),
        (model_b, tokens_b, aligned.positions_b),
    ):
        if model is not model_a or model is model_b or forward == 0:
            start = time.perf_counter()
            for _ in stream_states(model, tokens, positions, batches=[few]):
                pass
            forward += (time.perf_counter() - start) * tokens.lengths.sum() / tokens.lengths[few].sum()
        if model_a is model_b:
            break
    d_a, d_b, n = model_a.cfg.d_model, model_b.cfg.d_model, int(counts.sum())
    x = torch.ones(512, d_a, dtype=torch.float64, device=device)
    y = torch.ones(512, d_b, dtype=torch.float64, device=device)
    x.T @ y
    start = time.perf_counter()
    float((x.T @ y)[0, 0])
    rate = (time.perf_counter() - start) / (512 * d_a * d_b)
    pairs = len(depths[0]) * len(depths[1])
    solve = rate * (pairs * (n + 4 * d_a) * d_a * d_b + len(depths[0]) * (n + 15 * d_a) * d_a**2)
    n_train = int(counts[split == 0].sum())
    words = "" if aligned.same_tokens else f" ({aligned.share:.0%} of the words end a token in both models)"
    size = n * (len(depths[0]) * d_a + len(depths[1]) * d_b) * 4 / 1e6
    print(
        f"About {forward:.0f} s for the states of {len(counts)} documents, {n} tokens{words}, and {solve:.0f} s for {pairs} "
        f"maps; {size:.0f} MB of states."
    )
    if n_train < 20 * d_a:
        print(
            f"{n_train} tokens to fit maps of {d_a} dimensions: fewer than 20 for each, so R2 is lower than it could be."
        )
