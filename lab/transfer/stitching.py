"""What is a linear map between depths worth downstream? Put the mapped states into a model and let it go on.

`lab.maps` says how much of the variance of model Y's states at depth j an affine map from model X's states at depth i
gives (R2). Here Y's states at depth j are replaced by the mapped ones, and the rest of Y runs on them: how far is its
next-token distribution from the clean one (KL, nats), and what do its loss and accuracy become? R2 stands beside it: a
high R2 does not imply a low KL, because directions of small variance can matter. After Bansal, Nakkiran, Barak (arXiv
2106.07682: stitching; theirs is trained on the task's loss, ours by least squares) and Chen et al. (arXiv 2506.06609).

Not shown: that X and Y compute in the same way. Y may repair what a map gets wrong, and a map of X may do no more than
say which token stands there: the control `token_identity` measures that.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from scipy import stats
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import lenses, models, require, statistics
from lab.interventions import patch, rewritten
from lab.maps import RIDGES, Alignment, Moments, Ridge, align, split_documents
from lab.results import Result, versions
from lab.states import stream_states
from lab.texts import Tokens, checked_texts, tokenize

Pair = tuple[int, int]
METRICS = ("kl", "loss", "accuracy")
PAIR_CONDITIONS = ("mapped", "mapped_with_position_0", "random_weights", "shuffled_pairs")  # one run a pair
TARGET_CONDITIONS = ("token_identity", "mean_state", "own_states")  # one run a target depth
OUTPUT_CONDITIONS = ("clean", "unigram")  # no run
COLUMNS = {
    "source_depth": "depth of X whose states are mapped: blocks passed, 0 to L",
    "target_depth": "depth of Y where states are replaced: blocks passed, 0 to L",
    "relative_source": "source_depth / blocks of X",
    "relative_target": "target_depth / blocks of Y",
    "condition": "what stands at that depth of Y, see `run`",
    "metric": "kl, loss or accuracy",
    "kl": "KL(clean Y || this condition) of the next token, nats, mean over tokens",
    "loss": "of the next token, nats, mean over tokens",
    "accuracy": "share of tokens whose next token is the likeliest one, 0 to 1",
    "r2": "1 - SSE / SST of the states put in, test tokens; nan where none are",
    "c": "ridge chosen, as a share of the mean squared state; nan without a map",
    "n_tokens": "number of tokens measured, in the test documents",
    "n_documents": "number of test documents",
    "mean": "of the metric, over tokens",
    "low": "lower end of the 95 % interval, bootstrap over test documents (whole groups); too narrow with fewer than 20",
    "high": "upper end of that interval",
    "difference": "this condition minus token_identity, paired by token",
    "difference_low": "lower end of its 95 % interval",
    "difference_high": "upper end of that interval",
    "p": "of the difference over its bootstrap error: t, one degree of freedom less than groups, two-sided",
    "p_holm": "p, Holm-corrected over the pairs; of mapped only",
    "document": "number of the document, from 0",
    "group": "documents that stay together",
    "documents.n_tokens": "number of tokens measured in the document",
    "relative_error": "mean |y - f(x)| / |y| at position 0 of the test documents",
    "norm_ratio": "mean |y| at position 0 by mean |y| elsewhere, in the test documents",
}
_ROWS = 128  # predictions whose distributions are compared at a time


def run(
    model_x: TransformerBridge,
    model_y: TransformerBridge,
    documents: Sequence[str],
    *,
    pairs: Sequence[Pair] | None = None,
    groups: Shaped[np.ndarray, " text"] | None = None,
    ridges: Sequence[float] = RIDGES,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.25,
    random_weights: bool = True,
    position_0: bool = False,
    draws: int = 1000,
    batch_tokens: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """KL, loss and accuracy of model Y that goes on from the mapped states of model X, with controls.

    For each pair (i, j): an affine ridge map from X's stream at depth i to Y's at depth j, fitted on the training
    documents, ridge chosen on the validation documents (as in `lab.maps.fit_maps`, whose weights these are). In the test
    documents Y's states at depth j are replaced, all positions but 0: position 0 is often an attention sink with a huge
    norm; it stays clean, and `.tables["position_0"]` says how the map does there. With two tokenizers only the positions
    at word ends (`lab.maps.align`) are replaced and measured. Y's other states at depth j are then clean and carry part
    of the text past the map, so KL is comparable within one run only.

    Conditions: what stands at depth j of Y.
        mapped: X's states at depth i, mapped. mapped_with_position_0: there too (only with position_0=True).
        token_identity: Y's own embedding (depth 0), mapped: how much is knowing which token stands there.
        random_weights: the states of X with random weights, mapped. shuffled_pairs: a map fitted on training tokens of X
            and Y in shuffled pairs. mean_state: Y's mean over training tokens. own_states: Y's own states, written
            back: KL is 0, exactly. clean: Y alone.
        unigram: no state, but token frequencies in the training documents, each count plus a constant.
    Each map has its ridge, and the unigram its constant, chosen among `ridges` on the same validation documents.

    Args:
        model_x, model_y: from `lab.load`; the same one twice stitches a model to its own depths.
        documents: texts; a document is on one side of the split as a whole.
        pairs: (i, j), depths of X and of Y, 0..L each. None takes three or four at quarters of the depths.
        groups: which documents stay together in the split and in the bootstrap; None: each alone.
        ridges: shares of the mean squared state to choose the ridge from.
        validation_fraction, test_fraction: shares of the groups; the others are trained on.
        random_weights: also run X with random weights (read a second time: one more pass over all documents).
        position_0: also replace position 0, in one more run for each pair.
        draws: bootstrap draws of test documents (whole groups).
        batch_tokens: tokens of one forward pass. Memory: two distributions over the vocabulary for each, and the states
            of all documents at the depths in `pairs`, in float32.
        seed: of the split, the shuffle, the random weights and the bootstrap.
        progress: print an estimate and show bars.

    Returns:
        Result of kind "stitching" with a row a pair and condition in `.table`, a row for each of their metrics in `.summary`.
        `.tables`: "documents", and "position_0": how the map does there.

    Raises:
        ValueError: a depth out of range, no pairs or one twice, too few documents or groups, an empty or too long text,
            ridges not above 0: before a model runs.
    """
    texts = checked_texts(require.listed("documents", documents, "texts"), what="document")
    chosen = _check_pairs(model_x, model_y, pairs)
    ridges, seed = require.numbers("ridges", ridges, above=0), require.seed(seed)
    draws, batch_tokens = require.whole("draws", draws, 1), require.whole("batch_tokens", batch_tokens, 1)
    random_weights, position_0 = require.flags(random_weights=random_weights, position_0=position_0)
    validation_fraction = require.fraction("validation_fraction", validation_fraction)
    test_fraction = require.fraction("test_fraction", test_fraction)
    names = np.arange(len(texts)).astype(str) if groups is None else np.asarray(groups).astype(str)
    if len(names) != len(texts):
        raise ValueError(f"{len(names)} groups for {len(texts)} documents: give one for each")
    split = split_documents(names, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed)
    tokens_x = tokenize(model_x, texts)
    tokens_y = tokens_x if model_y is model_x else tokenize(model_y, texts)
    aligned = align(tokens_x, tokens_y)
    data = _Data(tokens_x, tokens_y, aligned, split, _batches(tokens_y.lengths, split, batch_tokens))
    _check_sizes(data, names)
    sources, targets = (tuple(sorted({pair[side] for pair in chosen})) for side in (0, 1))
    if progress:
        _print_estimate(model_x, model_y, data, chosen, random_weights, position_0)

    same = model_x is model_y
    y = _States(model_y, tokens_y, data, (0, *targets, *(sources if same else ())), aligned.positions_b, progress)
    x = y if same else _States(model_x, tokens_x, data, sources, aligned.positions_a, progress)
    fitted = _fit_maps(x, y, chosen, ridges, seed, position_0)
    if random_weights:
        twin = models.random_twin(model_x, seed=seed)
        # an untrained X with Y's weights unchanged: only the source of the map differs
        random = _States(twin, tokens_x, data, sources, aligned.positions_a, progress)
        fitted |= {("random_weights", *pair): _put_in(random, y, pair, ridges) for pair in chosen}
        del random, twin
    unigram = _unigram(data, ridges, model_y.cfg.d_vocab)
    documents_of, scores = _run_conditions(model_y, data, y, fitted, unigram[0], progress)
    table, summary, by_document = _tables(scores, documents_of, fitted, chosen, names, draws, seed)
    for name, depth, model in (("source", "source_depth", model_x), ("target", "target_depth", model_y)):
        table.insert(2, f"relative_{name}", table[depth] / model.cfg.n_layers)
    parameters = {
        "model_x": models.facts(model_x), "model_y": models.facts(model_y), "pairs": [list(pair) for pair in chosen],
        "seed": seed, "ridges": ridges, "validation_fraction": validation_fraction, "test_fraction": test_fraction,
        "random_weights": random_weights, "draws": draws, "n_documents": len(texts),
        "n_tokens": {part: data.n_tokens(part) for part in ("train", "validation", "test")},
        "position_0": "clean, and replaced in mapped_with_position_0" if position_0 else "clean",
        "same_tokens": aligned.same_tokens, "share_of_words": aligned.share, "unigram_constant": unigram[1],
        "documents_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(), "versions": versions(),
    }  # fmt: skip
    tables = {"documents": by_document, "position_0": _at_position_0(x, y, fitted, chosen)}
    return Result("stitching", table, summary, parameters, tables).described(COLUMNS)


# --- states and maps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """Tokens of both models, which belong together, and the batches of test documents that Y runs on."""

    tokens_x: Tokens
    tokens_y: Tokens
    aligned: Alignment
    split: np.ndarray
    batches: list[np.ndarray]

    @property
    def tested(self) -> list[int]:
        return [int(document) for batch in self.batches for document in batch]

    def predicted(self, document: int | np.integer) -> np.ndarray:
        """Positions of Y that are replaced and have a next token: what is measured."""
        at = self.aligned.positions_b[document]
        return at[at < self.tokens_y.lengths[document] - 1]

    def n_tokens(self, part: str) -> int:
        documents = np.flatnonzero(self.split == ("train", "validation", "test").index(part))
        return sum(len(self.aligned.positions_b[document]) for document in documents)


class _States:
    """The stream of one model at some depths: aligned positions for fitting; all positions of the test documents."""

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Tokens,
        data: _Data,
        depths: Sequence[int],
        positions: Sequence[np.ndarray],
        progress: bool,
    ) -> None:
        self.depths, self.positions, self.data = sorted(set(depths)), positions, data
        self.whole: dict[int, np.ndarray] = {}  # document to [depth position d_model]
        self.fitted: dict[int, np.ndarray] = {}
        fitting = np.flatnonzero(data.split < 2)
        batches = [fitting[start : start + 4] for start in range(0, len(fitting), 4)] + data.batches
        read = [np.arange(n) if document in set(data.tested) else positions[document]
                for document, n in enumerate(tokens.lengths)]  # fmt: skip
        with (
            tqdm(total=int(tokens.lengths.sum()), unit="token", desc="Collecting states", disable=not progress,
                 leave=False) as bar,
            _left_out(model, range(max(self.depths), model.cfg.n_layers)),
        ):  # fmt: skip
            for batch, found in stream_states(model, tokens, read, batches=batches):
                done = 0
                for document in batch.tolist():
                    own = found[self.depths, done : done + len(read[document])]
                    (self.whole if data.split[document] == 2 else self.fitted)[document] = own
                    done += len(read[document])
                bar.update(int(tokens.lengths[batch].sum()))

    def part(self, depth: int, part: int) -> torch.Tensor:
        """[token d_model] at the aligned positions of the training (0), validation (1) or test (2) documents."""
        row = self.depths.index(depth)
        if part == 2:
            chosen = [self.whole[document][row, self.positions[document]] for document in self.data.tested]
        else:
            chosen = [self.fitted[document][row] for document in np.flatnonzero(self.data.split == part).tolist()]
        return torch.as_tensor(np.concatenate(chosen), dtype=torch.float64)

    def first(self, depth: int) -> torch.Tensor:
        """[document d_model] at position 0 of the test documents."""
        row = self.depths.index(depth)
        return torch.as_tensor(np.stack([self.whole[d][row, 0] for d in self.data.tested]), dtype=torch.float64)


@dataclass(frozen=True)
class _PutIn:
    """States for the aligned positions of the test documents, in the order of `_Data.tested`, and their quality."""

    states: torch.Tensor
    r2: float
    c: float = float("nan")
    first: torch.Tensor | None = None  # what position 0 gets; None leaves it clean


def fit(
    x: Float[torch.Tensor, "token d_x"],
    y: Float[torch.Tensor, "token d_y"],
    held_x: Float[torch.Tensor, "held d_x"],
    held_y: Float[torch.Tensor, "held d_y"],
    ridges: Sequence[float] = RIDGES,
) -> tuple[Float[torch.Tensor, "d_x d_y"], Float[torch.Tensor, " d_y"], float]:
    """Weight, bias and chosen ridge of one map, from states in float64: the maps of `lab.maps.fit_maps`, one at a time.

    Least squares with ridge c tr(G)/d on (x, y), c with the least error on the held-out tokens. It is here because the
    controls fit other pairs of the same states, and each model should run once.
    """
    train, held = (Moments(x.mean(0), y.mean(0)) for _ in range(2))
    train.add(x, y)
    held.add(held_x, held_y)
    ridge = Ridge(train.xx)
    c = ridges[int(ridge.errors(train, held, ridges).argmin())]
    weight = ridge.solve(train.xy, c)
    return weight, y.mean(0) - x.mean(0) @ weight, c


def _put_in(
    x: _States, y: _States, pair: Pair, ridges: Sequence[float], *, shuffle: np.random.Generator | None = None
) -> _PutIn:
    i, j = pair
    target = y.part(j, 0)
    if shuffle is not None:
        target = target[torch.as_tensor(shuffle.permutation(len(target)))]
    weight, bias, c = fit(x.part(i, 0), target, x.part(i, 1), y.part(j, 1), ridges)
    states = x.part(i, 2) @ weight + bias
    return _PutIn(states, _r2(states, y.part(j, 2)), c, x.first(i) @ weight + bias)


def _fit_maps(
    x: _States, y: _States, pairs: Sequence[Pair], ridges: Sequence[float], seed: int, position_0: bool
) -> dict[tuple[Any, ...], _PutIn]:
    """What each run puts in: (condition, source, target) to states; (condition, target) where no source plays a role."""
    fitted: dict[tuple[Any, ...], _PutIn] = {}
    for pair in pairs:
        found = _put_in(x, y, pair, ridges)
        fitted["mapped", *pair] = found
        if position_0:
            fitted["mapped_with_position_0", *pair] = found
        rng = np.random.default_rng([seed, 1, *pair])
        fitted["shuffled_pairs", *pair] = _put_in(x, y, pair, ridges, shuffle=rng)
    for j in sorted({pair[1] for pair in pairs}):
        own = y.part(j, 2)
        mean = y.part(j, 0).mean(0).expand_as(own)
        fitted["token_identity", j] = _put_in(y, y, (0, j), ridges)
        fitted["mean_state", j] = _PutIn(mean, _r2(mean, own))
        fitted["own_states", j] = _PutIn(own, 1.0)
    return fitted


def _r2(said: torch.Tensor, true: torch.Tensor) -> float:
    return 1 - float((true - said).square().sum() / (true - true.mean(0)).square().sum())


def _at_position_0(x: _States, y: _States, fitted: Mapping[tuple, _PutIn], pairs: Sequence[Pair]) -> pd.DataFrame:
    rows = []
    for i, j in pairs:
        true, mapped = y.first(j), fitted["mapped", i, j].first
        assert mapped is not None
        error = float(((true - mapped).norm(dim=1) / true.norm(dim=1)).mean())
        rows.append((i, j, error, float(true.norm(dim=1).mean() / y.part(j, 2).norm(dim=1).mean())))
    return pd.DataFrame(rows, columns=["source_depth", "target_depth", "relative_error", "norm_ratio"])


# --- going on through Y ---------------------------------------------------------------------------------------------


def _run_conditions(
    model: TransformerBridge,
    data: _Data,
    y: _States,
    fitted: Mapping[tuple, _PutIn],
    unigram: torch.Tensor,
    progress: bool,
) -> tuple[np.ndarray, dict[tuple, np.ndarray]]:
    """The document of each measured token; for each run, and for clean and unigram, [token metric]."""
    documents, scores = [], {key: [] for key in (("clean",), ("unigram",), *fitted)}  # type: ignore[var-annotated]
    ends = np.cumsum([len(data.aligned.positions_b[document]) for document in data.tested])
    order = {document: place for place, document in enumerate(data.tested)}
    bar = tqdm(total=len(data.batches) * len(fitted), unit="run", desc="Stitching", disable=not progress, leave=False)
    with bar:
        for batch in data.batches:
            at = [data.predicted(document) for document in batch]
            documents.append(np.repeat(batch, [len(where) for where in at]))
            following = torch.cat([data.tokens_y.ids[d, where + 1] for d, where in zip(batch, at, strict=True)])
            clean = torch.cat(list(_log_probabilities(model, _final(model, data, batch))))
            scores[("clean",)].append(_scores(clean, iter(clean.split(_ROWS)), following))
            same = (unigram.expand(len(part), -1) for part in clean.split(_ROWS))
            scores[("unigram",)].append(_scores(clean, same, following))
            width = int(data.tokens_y.lengths[batch].max())
            for key, put in fitted.items():
                value = torch.zeros(len(batch), width, model.cfg.d_model)
                for row, document in enumerate(batch.tolist()):
                    own, where = y.whole[document][y.depths.index(key[-1])], data.aligned.positions_b[document]
                    end = ends[order[document]]
                    value[row, : len(own)] = torch.as_tensor(own)
                    value[row, where] = put.states[end - len(where) : end].float()
                    if key[0] == "mapped_with_position_0" and put.first is not None:
                        value[row, 0] = put.first[order[document]].float()
                with _started_at(model, key[-1], value):
                    final = _final(model, data, batch)
                scores[key].append(_scores(clean, _log_probabilities(model, final), following))
                bar.update()
    return np.concatenate(documents), {key: np.concatenate(parts) for key, parts in scores.items()}


def _final(model: TransformerBridge, data: _Data, batch: np.ndarray) -> torch.Tensor:
    """Last states before the final norm, [token d_model], at the measured positions of some documents."""
    read = [np.zeros(0, int)] * len(data.split)
    for document in batch:
        read[document] = data.predicted(document)
    ((_, found),) = stream_states(model, data.tokens_y, read, batches=[batch])
    return torch.as_tensor(found[-1])


def _log_probabilities(model: TransformerBridge, final: torch.Tensor) -> Iterator[torch.Tensor]:
    for part in final.to(model.cfg.device, model.cfg.dtype).split(_ROWS):
        yield lenses.readout(model, part, kind="log_probs").float().cpu()


def _scores(clean: torch.Tensor, parts: Iterator[torch.Tensor], following: torch.Tensor) -> np.ndarray:
    """[token metric]: KL(clean || changed), loss and accuracy, from log-probabilities."""
    found = []
    for true, said, token in zip(clean.split(_ROWS), parts, following.split(_ROWS), strict=True):
        kl, loss = (true.exp() * (true - said)).sum(-1), -said.gather(1, token[:, None])[:, 0]
        found.append(torch.stack([kl, loss, (said.argmax(-1) == token).float()], 1))
    return torch.cat(found).double().numpy()


@contextmanager
def _started_at(model: TransformerBridge, depth: int, value: torch.Tensor) -> Iterator[None]:
    """Y from given states at a depth on; the blocks before it are left out, since nothing of theirs is used."""
    last = model.cfg.n_layers
    site, layer = ("resid_pre", depth) if depth < last else ("resid_post", last - 1)
    with _left_out(model, range(min(depth, last - 1))), patch(model, site, layer=layer, value=value):
        yield


def _left_out(model: TransformerBridge, layers: Sequence[int]) -> AbstractContextManager:
    """Do not compute some blocks, to save time; models with parallel blocks compute them in vain."""
    if models.facts(model)["parallel_blocks"] or not len(layers):
        return nullcontext()
    return rewritten(model, {layer: lambda x, step: x for layer in layers})


def _unigram(data: _Data, ridges: Sequence[float], size: int) -> tuple[torch.Tensor, float]:
    """Log frequencies of next tokens in the training documents; the constant is the best on the validation documents."""

    def following(part: int) -> torch.Tensor:
        chosen = [data.tokens_y.ids[d, data.predicted(d) + 1] for d in np.flatnonzero(data.split == part)]
        return torch.cat(chosen)

    counts = torch.bincount(following(0), minlength=size).double()
    fits = {a: ((counts + a) / (counts.sum() + a * size)).log() for a in ridges}
    best = min(fits, key=lambda a: -float(fits[a][following(1)].mean()))
    return fits[best].float(), best


# --- tables ---------------------------------------------------------------------------------------------------------


def _tables(
    scores: Mapping[tuple, np.ndarray],
    documents: np.ndarray,
    fitted: Mapping[tuple, _PutIn],
    pairs: Sequence[Pair],
    names: np.ndarray,
    draws: int,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """`.table`, `.summary` and the table of documents."""
    rows, long, by_document = [], [], []
    tested, sizes = np.unique(documents, return_counts=True)
    counted = {"n_tokens": len(documents), "n_documents": len(tested)}
    for i, j in pairs:
        keys: dict[str, tuple] = {name: (name, i, j) for name in PAIR_CONDITIONS if (name, i, j) in fitted}
        keys |= {name: (name, j) for name in TARGET_CONDITIONS} | {name: (name,) for name in OUTPUT_CONDITIONS}
        for condition, key in keys.items():
            place = {"source_depth": i, "target_depth": j, "condition": condition}
            both = np.stack(
                [scores[key], scores[key] - scores["token_identity", j]], 1
            )  # [token, itself or difference, metric]
            interval = statistics.cluster_bootstrap(both, names[documents], draws=draws, seed=seed)
            mean, low, high = (np.asarray(end) for end in interval)
            drawn = statistics.cluster_means(both[:, 1], names[documents], draws=draws, seed=seed)
            error = drawn.std(0)  # 0 where two conditions are the same on every token
            z = np.divide(np.abs(mean[1]), error, out=np.zeros(len(METRICS)), where=error > 0)
            p = 2 * stats.t.sf(z, len(set(names[documents])) - 1)
            put = fitted.get(key)
            quality = {"r2": put.r2 if put else np.nan, "c": put.c if put else np.nan}
            rows.append({**place, **dict(zip(METRICS, mean[0], strict=True)), **quality, **counted})
            for m, metric in enumerate(METRICS):
                long.append({
                    **place, "metric": metric, "mean": mean[0, m], "low": low[0, m], "high": high[0, m],
                    "difference": mean[1, m], "difference_low": low[1, m], "difference_high": high[1, m],
                    "p": p[m], "p_holm": np.nan, "r2": quality["r2"], **counted,
                })  # fmt: skip
            means = pd.DataFrame(scores[key], columns=METRICS).groupby(documents).mean()
            by_document.append(means.assign(document=tested, group=names[tested], n_tokens=sizes, **place))
    summary = pd.DataFrame(long)
    for metric in METRICS:
        mine = summary.index[(summary.condition == "mapped") & (summary.metric == metric)]
        summary.loc[mine, "p_holm"] = statistics.holm(summary.p[mine].to_numpy())
    columns = ["document", "group", "source_depth", "target_depth", "condition", *METRICS, "n_tokens"]
    return pd.DataFrame(rows), summary, pd.concat(by_document, ignore_index=True)[columns]


# --- input ----------------------------------------------------------------------------------------------------------


def _check_pairs(
    model_x: TransformerBridge, model_y: TransformerBridge, pairs: Sequence[Pair] | None
) -> tuple[Pair, ...]:
    ends = model_x.cfg.n_layers, model_y.cfg.n_layers
    if pairs is None:  # against itself the same depth would be trivial
        (q, h, t), (_, h_y, t_y) = ([round(f * end) for f in (0.25, 0.5, 0.75)] for end in ends)
        same = model_x is model_y
        pairs = [(q, h_y), (t, h_y), (h, t_y)] if same else [(h, h_y), (q, h_y), (t, h_y), (t, t_y)]
        pairs = list(dict.fromkeys(pairs))
    found = require.pairs("pairs", pairs, ends)
    if not found:
        raise ValueError("pairs is empty: give at least one (depth of model_x, depth of model_y), or None")
    return tuple(found)


def _check_sizes(data: _Data, names: np.ndarray) -> None:
    for part in ("train", "validation", "test"):
        if data.n_tokens(part) < 2:
            raise ValueError(
                f"the {part} documents have {data.n_tokens(part)} tokens to compare: give more or longer documents"
            )
    measured = {names[document] for document in data.tested if len(data.predicted(document))}
    if len(measured) < 2:
        raise ValueError("fewer than 2 tested documents have a token to predict: give more or longer documents")


def _batches(lengths: np.ndarray, split: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Test documents of similar length together: the same batches for reading Y's states and for running on them, so
    that own states, written back, change no bit."""
    tested = np.flatnonzero(split == 2)
    tested = tested[np.argsort(-lengths[tested], kind="stable")]
    size = max(1, batch_tokens // int(lengths[tested[0]]))
    return [tested[start : start + size] for start in range(0, len(tested), size)]


def _print_estimate(
    model_x: TransformerBridge,
    model_y: TransformerBridge,
    data: _Data,
    pairs: Sequence[Pair],
    random_weights: bool,
    position_0: bool,
) -> None:
    """Time one document in each model, and scale up. Right to a factor of two."""
    seconds = []
    for model, tokens in ((model_x, data.tokens_x), (model_y, data.tokens_y)):
        some = data.tested[0]
        read = [np.arange(n) if document == some else np.zeros(0, int) for document, n in enumerate(tokens.lengths)]
        start = time.perf_counter()
        ((_, found),) = stream_states(model, tokens, read, batches=[np.array([some])])
        if model is model_y:
            list(_log_probabilities(model, torch.as_tensor(found[-1])))
        seconds.append((time.perf_counter() - start) / tokens.lengths[some])
    all_x, all_y = int(data.tokens_x.lengths.sum()), int(data.tokens_y.lengths.sum())
    states = all_y * seconds[1] + (random_weights + (model_x is not model_y)) * all_x * seconds[0]
    runs = len(pairs) * (2 + random_weights + position_0) + 3 * len({j for _, j in pairs})
    tested = int(data.tokens_y.lengths[data.tested].sum())
    print(
        f"At most about {states:.0f} s for the states of {len(data.split)} documents ({all_y} tokens), "
        f"{runs * tested * seconds[1]:.0f} s for {runs} runs on {len(data.tested)} of them."
    )
    few, width = data.n_tokens("train"), model_x.cfg.d_model
    if few < 20 * width:
        print(f"{few} tokens to fit maps of {width} dimensions: fewer than 20 for each, so the maps are worse than "
              "they could be.")  # fmt: skip
