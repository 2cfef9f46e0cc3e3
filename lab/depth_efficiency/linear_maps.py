"""Linear maps between depths: can the states of one model at depth i give those of another at depth j?

If a deeper model only spreads the same computation over more layers, the best source of its depth j is at the same
fraction of depth: a diagonal. If it computes something new in its late layers, no source depth gives those well.

    maps = fit_maps(small, large, documents, keep=[(3, 6)])
    maps.result.summary              # is there a diagonal?
    weight, bias = maps.map(3, 6)    # x @ weight + bias
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import require
from lab.depth_efficiency.diagonal import STATISTICS, diagonal_test
from lab.maps import RIDGES, SPLITS, Alignment, Source, align, chunks, collected, split_documents, total
from lab.models import facts
from lab.results import Result, versions
from lab.texts import checked_texts, tokenize

COLUMNS = {
    "source_depth": "depth i of the source (blocks passed, 0..L)",
    "target_depth": "depth j of the target",
    "relative_source": "source depth as a fraction of the source's blocks",
    "relative_target": "target depth as a fraction of the target's blocks",
    "c": "ridge chosen on the validation documents, as a share of the mean squared state",
    "ridge": "the same as k = c tr(G)/d, scikit-learn's alpha",
    "r2": "1 - SSE/SST over tokens and dimensions of the test documents",
    "r2_validation": "the same on the validation documents",
    "r2_mean_dimension": "mean over dimensions of each one's R2",
    "r2_without_top3": "R2 without the 3 target dimensions of highest training variance, which else dominate",
    "relative_error": "mean of |y - f(x)| / |y| over tokens (as published)",
    "mean_only_r2": "R2 of the training mean for every token",
    "mean_only_relative_error": "relative error of the training mean for every token",
    "embedding_r2": "R2 from source depth 0: what token identity gives (nan where it is no source)",
    "n_tokens": "tokens that are compared: of the test documents, of one document",
    "documents.document": "its place in the list that was given",
    "documents.group": "what stays together in the split and in the bootstrap",
    "documents.split": "train, validation or test",
    "best.source_depth": "the source with the highest R2", "best.relative_source": "the same as a fraction of its blocks",
    "best.r2": "its R2", "best.relative_error": "smallest relative error of any source",
    **{f"{what}_{end}": f"{word} end of the interval over groups of documents (source: a fraction)"
       for what in ("source", "r2", "error") for end, word in (("low", "lower"), ("high", "upper"))},
    "statistic": "; ".join(f"{name}: {meaning}" for name, meaning in STATISTICS.items()),
    "estimate": "its value on the test documents",
    "low": "lower end of the interval over groups of documents", "high": "upper end",
    "null_mean": "mean under 1,000 shuffles of the target labels",
    "null_p": "share of shuffles at least as near (slope, spearman: as high); nan where a shuffle means nothing",
    "n_groups": "groups of test documents",
}  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """Every map [source target], tested.

    sse: squared error of each tested document, summed over its tokens and dimensions; sst: the same about the mean of all
    tested tokens; relative: sum over tokens of |y - f(x)| / |y|; columns: of the table; weights: by places of the pair.
    """

    sse: Float[np.ndarray, "document source target"]
    sst: Float[np.ndarray, "document target"]
    relative: Float[np.ndarray, "document source target"]
    columns: dict[str, np.ndarray]
    weights: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class LinearMaps:
    """The tables, what stands behind them, and the weights that were kept, by depths."""

    result: Result
    fitted: Fitted
    weights: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]

    def map(
        self, source_depth: int, target_depth: int
    ) -> tuple[Float[np.ndarray, "d_source d_target"], Float[np.ndarray, " d_target"]]:
        """Weight and bias (float64) of one fitted map: the mapped state is `x @ weight + bias`."""
        pair = (source_depth, target_depth)
        if pair not in self.weights:
            kept = ", ".join(map(str, self.weights)) or "none"
            raise ValueError(f"the map {pair} was not kept (kept: {kept}); pass keep=[{pair}] to fit_maps")
        return self.weights[pair]


def linear_maps(
    model_a: TransformerBridge, model_b: TransformerBridge, documents: Sequence[str], *, seed: int = 0, **options: Any
) -> Result:
    """How well each depth of `model_a` gives each depth of `model_b` by an affine map: `fit_maps(...).result`."""
    return fit_maps(model_a, model_b, documents, seed=seed, **options).result


def fit_maps(
    model_a: TransformerBridge, model_b: TransformerBridge, documents: Sequence[str], *,
    groups: Shaped[np.ndarray, " text"] | None = None, source_depths: Sequence[int] | None = None,
    target_depths: Sequence[int] | None = None, ridges: Sequence[float] = RIDGES, validation_fraction: float = 0.15,
    test_fraction: float = 0.25, keep: Sequence[tuple[int, int]] = (), draws: int = 1000, batch_tokens: int = 1024,
    memory_mb: int = 1000, device: str = "cpu", seed: int = 0, progress: bool = True,
) -> LinearMaps:  # fmt: skip
    """Affine ridge maps from one model's stream at each depth to another's, chosen and tested on documents of their own.

    The same model twice: against its own depths (i = j is trivially perfect); `lab.models.random_twin` is the null.

    Args:
        groups: which documents stay together (a template, a topic) in the split and in the bootstrap; None: each alone.
        keep: pairs (source, target) whose weights stay in the result.
        memory_mb: above it, states (float32) go to a file in the cache folder. device: where float64 is solved.

    After Csordás, Manning, Potts (arXiv 2505.13898), section 6, but in closed form and not by 10,000 steps of AdamW, without
    position 0 (`align`), and with R2 beside their error, which a large common mean makes small for any map. Mapped
    states in place of others: Chen et al. (arXiv 2506.06609). Not shown: that model B uses what the map carries over
    (small directions can matter). With fewer than 20 training tokens a dimension R2 falls because the fit is noisy.
    """
    texts = checked_texts(require.listed("documents", documents, "texts"), what="document")
    sources, targets = (
        _depths(model_a, source_depths, "source_depths"),
        _depths(model_b, target_depths, "target_depths"),
    )
    ridges, seed = require.numbers("ridges", ridges, above=0), require.seed(seed)
    draws, batch_tokens = require.whole("draws", draws, 1), require.whole("batch_tokens", batch_tokens, 1)
    memory_mb, n_layers = require.whole("memory_mb", memory_mb, 0), (model_a.cfg.n_layers, model_b.cfg.n_layers)
    keep = require.pairs("keep", keep, n_layers)
    if outside := [pair for pair in keep if pair[0] not in sources or pair[1] not in targets]:
        raise ValueError(f"keep has the pair {outside[0]}, which is not fitted: sources {sources}, targets {targets}")
    names = np.arange(len(texts)) if groups is None else np.asarray(groups)
    shares = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    shares = {name: require.fraction(name, share) for name, share in shares.items()}
    split = split_documents(names, **shares, seed=seed)
    tokens_a = tokenize(model_a, texts)
    tokens_b = tokens_a if model_b is model_a else tokenize(model_b, texts)
    aligned = align(tokens_a, tokens_b)
    counts = np.array([len(at) for at in aligned.positions_a])
    n_tokens = _sizes(aligned, counts, split, model_a.cfg.d_model, progress)
    order = np.argsort(split, kind="stable")  # the tokens of a split stand together
    tested = order[split[order] == SPLITS.index("test")]
    ends = np.cumsum([0, *n_tokens.values()]).tolist()
    with collected(
        (model_a, model_b), (tokens_a, tokens_b), aligned, (sources, targets), order, memory_mb=memory_mb,
        batch_tokens=batch_tokens, progress=progress,
    ) as states:  # fmt: skip
        parts = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
        wanted = {(sources.index(i), targets.index(j)) for i, j in keep}
        fitted = fit_all(states, parts, counts[tested], ridges, keep=wanted, device=device, progress=progress)
    summary, best = diagonal_test(
        fitted.sse, fitted.sst, fitted.relative, counts[tested], names[tested], source_depths=np.array(sources),
        target_depths=np.array(targets), n_layers=n_layers, draws=draws, seed=seed,
    )  # fmt: skip
    listed = pd.DataFrame({"document": range(len(texts)), "group": names.astype(str), "split": np.array(SPLITS)[split],
                           "n_tokens": counts})  # fmt: skip
    parameters = {
        "model_a": facts(model_a), "model_b": facts(model_b), "seed": seed, "ridges": ridges, **shares, "draws": draws,
        "n_documents": len(texts), "n_tokens": n_tokens, "same_tokens": aligned.same_tokens,
        "share_of_words": aligned.share, "documents_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "versions": versions(),
    }  # fmt: skip
    table = _table(fitted, sources, targets, n_layers).assign(n_tokens=n_tokens["test"])
    result = Result("linear_maps", table, summary, parameters, {"best": best, "documents": listed}).described(COLUMNS)
    return LinearMaps(result, fitted, {(sources[i], targets[j]): both for (i, j), both in fitted.weights.items()})


def _depths(model: TransformerBridge, chosen: Sequence[int] | None, name: str) -> tuple[int, ...]:
    last = model.cfg.n_layers
    found = sorted(require.wholes(name, range(last + 1) if chosen is None else chosen, 0, last))
    if sum(depth > 0 for depth in found) < 2:
        raise ValueError(f"{name}={found}: give at least two depths above 0 (None is all)")
    return tuple(found)


def _sizes(aligned: Alignment, counts: np.ndarray, split: np.ndarray, width: int, progress: bool) -> dict[str, int]:
    """Tokens of each split, and a word where they are few or not all of them."""
    n_tokens = {name: int(counts[split == part].sum()) for part, name in enumerate(SPLITS)}
    for name, n in n_tokens.items():
        if n < 2:
            raise ValueError(f"the {name} documents have {n} tokens to compare: give more or longer documents")
    if progress and not aligned.same_tokens:
        print(f"{counts.sum()} tokens are compared ({aligned.share:.0%} of the words end a token in both models).")
    if progress and n_tokens["train"] < 20 * width:
        print(f"{n_tokens['train']} tokens to fit maps of {width} dimensions: fewer than 20 for each, so R2 is lower than "
              "it could be.")  # fmt: skip
    return n_tokens


def _table(fitted: Fitted, sources: Sequence[int], targets: Sequence[int], n_layers: tuple[int, int]) -> pd.DataFrame:
    pairs = pd.MultiIndex.from_product([sources, targets], names=["source_depth", "target_depth"]).to_frame(index=False)
    scores = {name: np.broadcast_to(values, fitted.sse.shape[1:]).ravel() for name, values in fitted.columns.items()}
    table = pairs.assign(relative_source=pairs.source_depth / n_layers[0],
                         relative_target=pairs.target_depth / n_layers[1], **scores)  # fmt: skip
    at_zero = table[table.source_depth == 0].set_index("target_depth").r2
    return table.assign(embedding_r2=table.target_depth.map(at_zero).astype(float))


# --- every map, fitted and tested -----------------------------------------------------------------------------------


def fit_all(
    states: tuple[Float[np.ndarray, "source token d_a"], Float[np.ndarray, "target token d_b"]],
    parts: Sequence[slice], tested: Int[np.ndarray, " document"], ridges: Sequence[float], *,
    keep: Collection[tuple[int, int]] = (), device: str = "cpu", progress: bool = False,
) -> Fitted:  # fmt: skip
    """Fits and tests every pair; `parts`: tokens of each split; `tested`: tokens of each tested document, in order."""
    document = torch.repeat_interleave(torch.arange(len(tested)), torch.as_tensor(tested)).to(device)
    targets = [_Target(y, parts, document, len(tested)) for y in states[1]]
    shape = (len(states[0]), len(targets))
    sse, relative = (np.zeros((len(tested), *shape)) for _ in range(2))
    columns: dict[str, np.ndarray] = {}
    weights: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    bar = tqdm(total=shape[0] * shape[1], desc="Fitting maps", unit="map", disable=not progress, leave=False)
    with bar, torch.inference_mode():
        for i, x in enumerate(states[0]):
            source = Source(x, parts[0], parts[1], device)
            for j, target in enumerate(targets):
                weight, c, ridge, error = source.fit(target.y, target.mean, ridges)
                sse[:, i, j], relative[:, i, j], scores = target.test(source, weight)
                scores = {"c": c, "ridge": ridge, "r2_validation": 1 - error / target.sst_validation, **scores}
                for name, value in {**scores, **target.mean_only}.items():
                    columns.setdefault(name, np.zeros(shape))[i, j] = value
                if (i, j) in keep:
                    weights[i, j] = (weight.cpu().numpy(), (target.mean - source.mean @ weight).cpu().numpy())
                bar.update()
    return Fitted(sse, np.stack([target.sst for target in targets], 1), relative, columns, weights)


class _Target:
    """One target depth: what it has of its own, whatever the source (variation, the error of the mean alone), and a test.

    `sst` [document] and `sst_dimension` are about the mean of all tested tokens.
    """

    def __init__(self, y: np.ndarray, parts: Sequence[slice], document: torch.Tensor, n_documents: int) -> None:
        self.y, self.document, self.device = y, document, str(document.device)
        train, validation, self.part = parts

        def mean(part: slice) -> torch.Tensor:
            return total(y, part, self.device) / (part.stop - part.start)

        def about(origin: torch.Tensor, part: slice) -> torch.Tensor:
            return total(y, part, self.device, lambda chunk: (chunk - origin).square())

        self.mean, held, own = (mean(part) for part in parts)
        self.sst_validation, self.sst_dimension = float(about(held, validation).sum()), about(own, self.part)
        variance = about(self.mean, train)
        self.top3 = torch.zeros_like(variance, dtype=torch.bool)  # the 3 dimensions of highest training variance
        self.top3[variance.topk(min(3, len(variance) - 1)).indices] = True
        sst, error, done = variance.new_zeros(n_documents), 0.0, 0
        for (chunk,) in chunks(self.part, y, device=self.device):
            sst.index_add_(0, document[done : done + len(chunk)], (chunk - own).square().sum(1))
            error += float(((chunk - self.mean).norm(dim=1) / _norm(chunk)).sum())
            done += len(chunk)
        self.sst = sst.cpu().numpy()
        r2 = 1 - float(about(self.mean, self.part).sum() / self.sst_dimension.sum())
        self.mean_only = {"mean_only_r2": r2, "mean_only_relative_error": error / done}

    def test(self, source: Source, weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Squared and relative errors of each tested document, and scores of one map."""
        by_document, ratios = (self.mean.new_zeros(len(self.sst)) for _ in range(2))
        by_dimension, done = torch.zeros_like(self.mean), 0
        for x, y in chunks(self.part, source.x, self.y, device=self.device):
            square = ((y - self.mean) - (x - source.mean) @ weight).square_()
            where = self.document[done : done + len(square)]
            by_document.index_add_(0, where, square.sum(1))
            ratios.index_add_(0, where, square.sum(1).sqrt() / _norm(y))
            by_dimension += square.sum(0)
            done += len(square)
        of_all, moving = self.sst_dimension, self.sst_dimension > 0
        small = moving & ~self.top3
        return by_document.cpu().numpy(), ratios.cpu().numpy(), {
            "r2": 1 - float(by_dimension.sum() / of_all.sum()),
            "r2_mean_dimension": 1 - float((by_dimension / of_all)[moving].mean()),
            "r2_without_top3": 1 - float(by_dimension[small].sum() / of_all[small].sum()),
            "relative_error": float(ratios.sum()) / done,
        }  # fmt: skip


def _norm(y: torch.Tensor) -> torch.Tensor:
    return y.norm(dim=1).clamp_min(1e-12)
