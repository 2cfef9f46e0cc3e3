"""What are a language model's first n blocks worth, frozen, under what is trained on a small task of short texts?

    result = transfer_pretrained.run(lab.load(), "sentiment_words")  # a minute or two on two cores
    result.summary                                                   # accuracy by n, with intervals and baselines

The counterpart of `lab.experiments.transfer` where there are no halves: what the model was trained on is not known, so
treatments differ in what is put above the frozen blocks, and the null is the same model with random weights.
"""

import copy
import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModel

from lab import datasets, metrics, models, probes, replicas
from lab.experiments.transfer_tasks import seed_of
from lab.models import cache_folder
from lab.replicas import Recipe
from lab.results import Result, fingerprint, run_shards, versions
from lab.texts import last_positions, tokenize

TREATMENTS = {
    "K": "the other blocks kept and trained",
    "R": "the other blocks re-initialised and trained",
    "S": "two fresh blocks instead of the others: the same number of trained weights at every n",
    "P": "no block behind: final norm and classifier alone",
}
_SHORT = 2  # fresh blocks of S
_CLOSE = 1e-3  # of the states' standard deviation: how far rounding may take a run that starts in the middle


@dataclass(frozen=True)
class _Tuning:
    """How every treatment is trained: AdamW, constant rates, the same batches. `rate` is that of blocks."""

    steps: int
    batch: int
    rate: float
    head_rate: float  # of the final norm and the classifier
    decay: float = 0.01


@dataclass(frozen=True)
class _Texts:
    """Token ids and mask [example position], right-padded; position of each text's last token, labels."""

    ids: torch.Tensor
    mask: torch.Tensor
    last: torch.Tensor
    labels: torch.Tensor


def run(
    model: TransformerBridge,
    data: str | pd.DataFrame,
    preset: str = "quick",
    *,
    seed: int = 0,
    n: Sequence[int] | None = None,
    treatments: Sequence[str] = tuple(TREATMENTS),
    repeats: int = 1,
    test_fraction: float = 0.4,
    limit: int | None = None,
    steps: int | None = None,
    batch: int = 16,
    rate: float = 1e-4,
    head_rate: float = 3e-3,
    null: bool = True,
    resume: bool = True,
    progress: bool = True,
) -> Result:
    """A language model's first n blocks, frozen, under what is trained on a small task of short texts.

    The label is read at the last token, by a fresh classifier behind a fresh final norm, as everywhere in this module.
    K-n keeps the other blocks and trains them, R-n re-initialises them, S-n puts two fresh blocks in their place, P-n
    none. States after block n are computed once, for all positions; each run starts from them. There is no baseB: what
    the model was trained on is not known, so a difference between treatments is not a specificity.

    Args:
        model: from `lab.load`; rotary positions (Llama, Qwen, Gemma, OLMo, NeoX families).
        data: a data set's name, or a table with columns example, text, label (0/1) and group.
        preset: quick (four n near the end, 120 texts, 25 steps), standard (eight n, 512 texts, 100 steps) or full (every
            second n, 200 steps).
        seed: of the choice of texts, splits, fresh weights, batches and the random model.
        n: numbers of frozen blocks, 0..L, instead of the preset's. At L, K and R are P, and are left out.
        treatments: of K, R, S, P.
        repeats, test_fraction: number of splits (whole groups), and the share of texts tested in each.
        limit, steps: texts and steps, instead of the preset's.
        batch, rate, head_rate: texts a step; learning rates of the blocks, and of the norm and classifier, which start
            from nothing in every treatment.
        null: the same on the model with random weights.
        resume: keep finished (weights, n, split) under the cache folder.
        progress: print an estimate and show a bar.

    Returns:
        Result with
        `.table`: model, dataset, weights (trained, random, none), treatment (K, R, S, P; majority, bag_of_words), n, split,
            metric (accuracy, nll in nats), value, trained_weights (their number), seed.
        `.summary`: weights, treatment, n, accuracy with low, high (bootstrap over groups of texts, nets as they are), nll,
            n_texts, n_groups, trained_weights.
        `.tables`: "differences": first, second, weights, n, difference, low, high, paired by text: K - R and K - P of the
            trained model, and trained - random of each treatment; "items": weights, treatment, n, split, example, group,
            label, predicted, log_p (of the right label).

    Raises:
        ValueError: unknown preset or treatment, n out of range, unusable data, a model whose blocks cannot be started in
            the middle (checked: K-n before training must give the whole model's states).

    Only the test texts' noise is in the intervals: another seed of the fresh weights may differ by more.
    """
    n_layers = model.cfg.n_layers
    chosen, tuning, limit = _pretrained_sizes(preset, n_layers, n, limit, steps, batch, (rate, head_rate))
    wrong = [name for name in treatments if name not in TREATMENTS]
    if wrong or not treatments or len(set(treatments)) < len(treatments):
        raise ValueError(f"treatments={list(treatments)}: pass some of {', '.join(TREATMENTS)}, each once")
    models.require_source(model)
    frame, name = (datasets.load(data), data) if isinstance(data, str) else (data, "your data")
    datasets.check_concept_data(frame, name=name)
    frame = _some_groups(frame, limit, seed)
    labels, groups = frame.label.to_numpy(), frame.group.to_numpy(str)
    tests = probes.group_splits(labels, groups, repeats=repeats, test_fraction=test_fraction, seed=seed)
    texts = _as_texts(model, frame)
    parameters = {
        **models.facts(model), "dataset": name, "preset": preset, "n": chosen, "treatments": list(treatments), "seed": seed,
        "repeats": repeats, "test_fraction": test_fraction, "n_examples": len(frame), **asdict(tuning), "null": null,
        "texts": hashlib.sha256("\n".join(frame.text.astype(str)).encode()).hexdigest(), "versions": versions(),
    }  # fmt: skip
    bodies = {
        kind: _Body(model, texts, kind, seed, chosen) for kind in (("trained", "random") if null else ("trained",))
    }
    known = {name: value for name, value in parameters.items() if name not in ("n", "repeats", "null", "preset")}
    known["digest"] = models.weights_digest(model) if resume else ""
    shards = []
    for kind, body in bodies.items():
        for count in chosen:
            for split, test in enumerate(tests):
                shard = {"weights": kind, "n": count, "split": split}
                work = {"body": body, "frame": frame, "test": test, "tuning": tuning, "parameters": parameters}
                shards.append({**shard, **work, "key": fingerprint({**known, **shard, "tests": test.tolist()})})
    folder = cache_folder() / "runs" if resume else None
    missing = [one for one in shards if folder is None or not (folder / one["key"] / "result.json").exists()]
    if progress and missing:
        _print_pretrained_estimate(bodies["trained"], missing, treatments, tuning, n_layers)
    parts = run_shards(_pretrained_shard, shards, folder=folder, describe="runs", progress=progress)
    items = pd.concat([part.tables["items"] for part in parts], ignore_index=True)
    table = pd.concat([*(part.table for part in parts), _text_baselines(frame, tests)], ignore_index=True)
    table = table.assign(model=parameters["model"], dataset=name, seed=seed)
    summary, pairs = _pretrained_summary(items, table, seed)
    return Result("transfer_pretrained", table, summary, parameters, {"differences": pairs, "items": items})


def _pretrained_sizes(
    preset: str,
    n_layers: int,
    n: Sequence[int] | None,
    limit: int | None,
    steps: int | None,
    batch: int,
    rates: tuple[float, float],
) -> tuple[list[int], _Tuning, int]:
    sizes = {"quick": (120, 25), "standard": (512, 100), "full": (512, 200)}
    if preset not in sizes:
        raise ValueError(f"unknown preset {preset!r}; presets are {', '.join(sizes)}")
    own = {
        "quick": [round(n_layers * share) for share in (0.8, 0.9, 0.97, 1)],
        "standard": [round(n_layers * share) for share in (0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 14 / 15, 1)],
        "full": [*range(0, n_layers, 2), n_layers],
    }
    chosen = sorted(set(own[preset])) if n is None else sorted(int(count) for count in n)
    outside = [count for count in chosen if not 0 <= count <= n_layers]
    if outside or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"n={chosen}: pass numbers of frozen blocks from 0 to {n_layers}, each once")
    tuning = _Tuning(sizes[preset][1] if steps is None else steps, batch, *rates)
    if tuning.steps < 0 or batch < 1 or min(rates) <= 0:
        raise ValueError(f"steps={tuning.steps}, batch={batch}, rates={rates}: pass 0 or more, 1 or more, and above 0")
    return chosen, tuning, sizes[preset][0] if limit is None else limit


def _some_groups(frame: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """Whole groups in random order until there are `limit` texts."""
    order = np.random.default_rng(seed_of("texts", seed)).permutation(frame.group.astype(str).unique())
    sizes = frame.group.astype(str).value_counts().reindex(order).cumsum()
    kept = set(order[: int((sizes < limit).sum()) + 1])
    return frame[frame.group.astype(str).isin(kept)].reset_index(drop=True)


def _as_texts(model: TransformerBridge, frame: pd.DataFrame) -> _Texts:
    tokens = tokenize(model, frame.text.tolist())
    return _Texts(
        tokens.ids, tokens.mask.long(), torch.as_tensor(last_positions(tokens)), torch.tensor(frame.label.tolist())
    )


class _Body:
    """A model's blocks, and its states after the chosen numbers of them, for all texts and positions; made when used."""

    def __init__(self, model: TransformerBridge, texts: _Texts, weights: str, seed: int, chosen: Sequence[int]) -> None:
        self.model, self.texts, self.weights, self.seed, self.chosen = model, texts, weights, seed, chosen

    @functools.cached_property
    def whole(self) -> Any:
        """The plain Hugging Face model."""
        model = self.model if self.weights == "trained" else models.random_twin(self.model, seed=self.seed)
        return models.plain_twin(model)

    @property
    def plain(self) -> Any:
        """Its blocks, with the embedding below and the norm above."""
        body = self.whole.base_model
        if not hasattr(body, "layers") or not _norm_name(body):
            raise ValueError(
                f"{type(body).__name__} is not laid out like Llama (layers, then a norm): its blocks cannot be started in "
                "the middle here; use a Llama, Qwen, Gemma, OLMo or NeoX model"
            )
        return body

    @functools.cached_property
    def states(self) -> dict[int, torch.Tensor]:
        """Depth to states [example position d_model]; the norm is left out, so that depth L is before it."""
        body, norm = self.plain, _norm_name(self.plain)
        kept = getattr(body, norm)
        found: dict[int, list[torch.Tensor]] = {depth: [] for depth in self.chosen}
        setattr(body, norm, torch.nn.Identity())
        try:
            with torch.inference_mode():
                for start in range(0, len(self.texts.ids), 32):
                    rows = slice(start, start + 32)
                    out = body(
                        input_ids=self.texts.ids[rows], attention_mask=self.texts.mask[rows], use_cache=False,
                        output_hidden_states=True,
                    )  # fmt: skip
                    for depth in self.chosen:
                        found[depth].append(out.hidden_states[depth])
        finally:
            setattr(body, norm, kept)
        return {depth: torch.cat(values).clone() for depth, values in found.items()}

    def tail(self, n: int, blocks: int, *, keep: bool, seed: int) -> Any:
        """A model of so many blocks that starts from states: those from n on, copied, or fresh ones.

        Fresh weights are drawn by the architecture's own initialisation. The final norm is fresh.
        """
        config = copy.deepcopy(self.plain.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = blocks, 8, None  # embeddings are not used
        if getattr(config, "layer_types", None) is not None:
            types = config.layer_types
            config.layer_types = types[n : n + blocks] if n + blocks <= len(types) else types[len(types) - blocks :]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dtype = next(self.plain.parameters()).dtype
            tail = AutoModel.from_config(config, attn_implementation="eager", dtype=dtype).eval()
        if keep:
            for new, old in zip(tail.layers, list(self.plain.layers)[n:], strict=True):
                new.load_state_dict(old.state_dict())
        return tail

    def before_training(self, n: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States after the final norm at the texts' tokens: of the whole model, and of K-n before its first step."""
        body, norm = self.plain, _norm_name(self.plain)
        tail = self.tail(n, len(body.layers) - n, keep=True, seed=0)
        getattr(tail, norm).load_state_dict(getattr(body, norm).state_dict())
        ids, mask = self.texts.ids[rows], self.texts.mask[rows]
        with torch.inference_mode():
            whole = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            ours = _run_tail(tail, self.states[n][rows], mask)
        return whole[mask.bool()], ours[mask.bool()]

    def check(self, n: int) -> None:
        """Raise a ValueError unless the kept blocks, started from the states after block n, give the model's own."""
        whole, ours = self.before_training(n, torch.arange(min(4, len(self.texts.ids))))
        apart, scale = (whole - ours).abs().max().item(), whole.std().item()
        if not apart <= _CLOSE * scale:
            raise ValueError(
                f"blocks from {n} on, started from their input, are off by {apart:.2g} (states: {scale:.2g}): "
                f"{type(self.plain).__name__} does something else between its blocks; use another model"
            )


def zero_step_gap(model: TransformerBridge, texts: Sequence[str], n: int) -> float:
    """Largest difference of logits between a model and its K-n before the first step: rounding, if all is right.

    K-n starts from stored states after block n, so positions and the causal mask are made anew behind them.
    """
    n_layers = model.cfg.n_layers
    if not 0 <= n <= n_layers:
        raise ValueError(f"n={n}: pass a number of frozen blocks from 0 to {n_layers}")
    body = _Body(model, _as_texts(model, pd.DataFrame({"text": list(texts), "label": 0})), "trained", 0, [n])
    whole, ours = body.before_training(n, torch.arange(len(texts)))
    with torch.inference_mode():
        head = body.whole.get_output_embeddings()
        return float((head(whole) - head(ours)).abs().max())


def _norm_name(body: Any) -> str:
    """Name of the final norm; empty for a model that is laid out in another way."""
    return next((name for name in ("norm", "final_layer_norm") if hasattr(body, name)), "")


def _run_tail(tail: Any, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States after the tail's blocks and norm. Positions and the causal mask are made anew by the model's own code."""
    return tail(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state


def _pretrained_shard(
    *,
    weights: str,
    n: int,
    split: int,
    body: _Body,
    frame: pd.DataFrame,
    test: np.ndarray,
    tuning: _Tuning,
    parameters: dict[str, Any],
    key: str = "",
) -> Result:
    """All treatments at one n, of one model on one split."""
    n_layers, seed = len(body.plain.layers), parameters["seed"]
    body.check(n)
    rows, items = [], []
    for treatment in parameters["treatments"]:
        if treatment in ("K", "R") and n == n_layers:
            continue  # nothing lies behind: it is P
        blocks = {"K": n_layers - n, "R": n_layers - n, "S": _SHORT, "P": 0}[treatment]
        tail = body.tail(n, blocks, keep=treatment == "K", seed=seed_of("tail", seed, split, n, treatment) % 2**63)
        log_p, trained = _tune(tail, body.texts, body.states[n], test, tuning, seed_of("tune", seed, split))
        right = frame.label.to_numpy()[test]
        where = {"weights": weights, "treatment": treatment, "n": n, "split": split}
        of_right = log_p[np.arange(len(right)), right]
        values = {"accuracy": float((log_p.argmax(1) == right).mean()), "nll": float(-of_right.mean())}
        rows += [
            {**where, "metric": name, "value": value, "trained_weights": trained} for name, value in values.items()
        ]
        items.append(
            frame.loc[test, ["example", "group", "label"]].assign(
                **where, predicted=log_p.argmax(1), log_p=of_right.astype(float)
            )
        )
    tables = {"items": pd.concat(items, ignore_index=True)}
    return Result("transfer_pretrained", pd.DataFrame(rows), pd.DataFrame(), {"key": key}, tables)


def _tune(
    tail: Any, texts: _Texts, states: torch.Tensor, test: np.ndarray, tuning: _Tuning, seed: int
) -> tuple[np.ndarray, int]:
    """Train a tail with a classifier; log-probabilities [test label] of the test texts, and how many weights trained."""
    width = states.shape[-1]
    generator = torch.Generator().manual_seed(seed % 2**63)
    head = torch.nn.Linear(width, 2)
    with torch.no_grad():
        head.weight.copy_(torch.randn(2, width, generator=generator) * width**-0.5)
        head.bias.zero_()
    norm = getattr(tail, _norm_name(tail))
    rates = {"blocks": (list(tail.layers.parameters()), tuning.rate),
             "top": ([*norm.parameters(), *head.parameters()], tuning.head_rate)}  # fmt: skip
    trained = [parameter for part, _ in rates.values() for parameter in part]
    groups = [{"params": part, "lr": rate} for part, rate in rates.values() if part]
    optimizer = torch.optim.AdamW(groups, weight_decay=tuning.decay, fused=True)
    order = replicas.orders(
        [np.flatnonzero(~test)], [seed], Recipe(steps=max(tuning.steps, 1), batch=min(tuning.batch, int((~test).sum())))
    )[0]

    def logits(rows: torch.Tensor) -> torch.Tensor:
        longest = int(texts.last[rows].max()) + 1  # right padding: what lies behind is never seen
        out = _run_tail(tail, states[rows, :longest], texts.mask[rows, :longest])
        return head(out[torch.arange(len(rows)), texts.last[rows]].float())

    for rows in order[: tuning.steps]:
        loss = torch.nn.functional.cross_entropy(logits(rows), texts.labels[rows])
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.grad = gradient
        optimizer.step()
    with torch.inference_mode():
        parts = [logits(rows).log_softmax(-1) for rows in torch.as_tensor(np.flatnonzero(test)).split(32)]
    return torch.cat(parts).numpy(), sum(parameter.numel() for parameter in trained)


def _text_baselines(frame: pd.DataFrame, tests: np.ndarray) -> pd.DataFrame:
    labels, texts = frame.label.to_numpy(), frame.text.to_numpy(object)
    found = {"majority": probes.majority(labels, tests), "bag_of_words": probes.bag_of_words(texts, labels, tests)}
    return pd.DataFrame(
        [
            {"weights": "none", "treatment": name, "n": 0, "split": split, "metric": "accuracy", "value": float(value),
             "trained_weights": 0}
            for name, scores in found.items() for split, value in enumerate(scores.accuracy()[:, 0])
        ]
    )  # fmt: skip


def _pretrained_summary(items: pd.DataFrame, table: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy of each treatment, and paired differences, with bootstrap intervals over groups of texts."""
    items = items.assign(right=(items.predicted == items.label).astype(float))
    by = ["weights", "treatment", "n"]
    mean = items.groupby([*by, "example", "group"], sort=False)[["right", "log_p"]].mean().reset_index()
    rows, runs = [], {}
    for at, part in mean.groupby(by, sort=False):
        runs[at] = part.set_index("example")
        estimate, low, high = _interval(part.right.to_numpy(), part.group.to_numpy(str), seed)
        rows.append((*at, estimate, low, high, float(-part.log_p.mean()), len(part), part.group.nunique()))
    columns = [*by, "accuracy", "low", "high", "nll", "n_texts", "n_groups"]
    counts = table[table.metric == "accuracy"].groupby(by)["trained_weights"].first().reset_index()
    summary = pd.DataFrame(rows, columns=columns).merge(counts, on=by)
    baselines = table[table.weights == "none"].groupby(by)["value"].mean().reset_index(name="accuracy")
    summary = pd.concat([summary, baselines], ignore_index=True)
    pairs = []
    for (weights, treatment, n), one in runs.items():
        others = [(weights, name, n) for name in ("R", "P") if treatment == "K"] if weights == "trained" else []
        others += [("random", treatment, n)] if weights == "trained" else []
        for other in others:
            if other in runs:
                two = runs[other].right.reindex(one.index)
                first, second = (f"{name} ({kind})" for kind, name, _ in ((weights, treatment, n), other))
                found = _interval((one.right - two).to_numpy(), one.group.to_numpy(str), seed)
                pairs.append((first, second, n, *found))
    return summary, pd.DataFrame(pairs, columns=["first", "second", "n", "difference", "low", "high"])


def _interval(values: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float, float]:
    if len(set(groups)) < 2:
        return float(values.mean()), np.nan, np.nan
    found = metrics.cluster_bootstrap(values, groups, seed=seed)
    return float(found.estimate), float(found.low), float(found.high)


def _print_pretrained_estimate(
    body: _Body, missing: Sequence[dict[str, Any]], treatments: Sequence[str], tuning: _Tuning, n_layers: int
) -> None:
    """Time two steps of two fresh blocks here, and scale up by blocks. Right to a factor of two."""
    depth = body.chosen[-1]
    states = body.states[depth]
    last = np.arange(len(states)) == len(states) - 1
    few = replace(tuning, steps=2)
    start = time.perf_counter()
    _tune(body.tail(depth, _SHORT, keep=False, seed=0), body.texts, states, last, few, 0)
    passes = 2 * 3 * min(tuning.batch, len(states)) + 1
    per_text = (time.perf_counter() - start) / passes / _SHORT  # a forward pass of one text through one block
    blocks = sum(
        {"K": n_layers - one["n"], "R": n_layers - one["n"], "S": _SHORT, "P": 0}[name]
        for one in missing for name in treatments
    )  # fmt: skip
    seconds = per_text * blocks * (tuning.steps * 3 * tuning.batch + int(missing[0]["test"].sum()))
    print(
        f"About {seconds:.0f} s: {len(missing)} (weights, n, split), {len(states)} texts of up to {states.shape[1]} tokens, "
        f"{tuning.steps} steps of {tuning.batch} texts for each of {', '.join(treatments)}."
    )
