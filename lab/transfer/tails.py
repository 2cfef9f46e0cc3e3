"""A language model's blocks from the n-th on, started from stored states and trained on a small task of short texts.

    body = Body(model, as_texts(model, frame), "trained", seed=0, chosen=[20])   # states after block 20, of all positions
    tail = body.tail(20, 10, keep=True, seed=0)                                  # the model's own last 10 blocks, a copy
    tuned = tune(tail, body.texts, body.states[20], test, Tuning(25, 16, 1e-4, 3e-3), seed=0)

What is in front stays frozen. The label is read at the last token, by a fresh classifier behind a fresh final norm.
"""

import copy
import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModel

from lab import datasets, models, require, statistics
from lab.nets import replicas
from lab.nets.replicas import Recipe
from lab.texts import last_positions, tokenize
from lab.transfer.statistics import of_draws

COLUMNS = {
    "model": "the model", "dataset": "the data set, of `tuned` the target", "split": "number of the split of groups",
    "metric": "accuracy; nll and train_loss in nats", "value": "of the metric, on the tested texts",
    "n": "number of first blocks that are frozen", "accuracy": "share of tested texts, each by its mean over splits",
    "low": "of a 95 % bootstrap over groups of texts, nets as they are: another seed may differ by more", "high": "see low",
    "nll": "mean negative log-probability of the right label, nats", "n_texts": "number of tested texts",
    "n_groups": "number of their groups", "difference": "of accuracies, paired by text", "p": "bootstrap, two-sided",
    "p_holm": "p, Holm-corrected over n", "example": "name of the text", "group": "its group", "label": "its right label, 0 or 1",
    "predicted": "the label that the net gives it", "log_p": "log-probability of the right label, nats",
}  # fmt: skip
_FEWEST, _DRAWS = 5, 2000  # groups for an interval; bootstrap
_CLOSE = 1e-3  # of the states' standard deviation: how far rounding may take a run that starts in the middle


@dataclass(frozen=True)
class Tuning:
    """How every treatment is trained: AdamW, constant rates, the same batches. `rate` is that of blocks."""

    steps: int
    batch: int
    rate: float
    head_rate: float  # of the final norm and the classifier
    decay: float = 0.01


def tuning_of(steps: Any, batch: Any, rate: Any, head_rate: Any, *, least: int = 1) -> Tuning:
    """Checked settings; `least`: how many steps at least."""
    rates = (require.number(name, value, above=0) for name, value in (("rate", rate), ("head_rate", head_rate)))
    return Tuning(require.whole("steps", steps, least), require.whole("batch", batch, 1), *rates)


@dataclass(frozen=True)
class Tuned:
    """Log-probabilities [text label] of the test texts, number of trained weights, mean loss of the last fifth of steps."""

    log_p: np.ndarray
    n_weights: int
    train_loss: float


@dataclass(frozen=True)
class Texts:
    """Token ids and mask [example position], right-padded; position of each text's last token, labels."""

    ids: torch.Tensor
    mask: torch.Tensor
    last: torch.Tensor
    labels: torch.Tensor


def labelled(data: str | pd.DataFrame, own: str = "your data") -> tuple[pd.DataFrame, str]:
    """Texts with labels, and the data set's name; a table that was passed is called `own`."""
    frame, name = (datasets.load(data), data) if isinstance(data, str) else (data, own)
    datasets.check_concept_data(frame, name=name)
    return frame, name


def checksum(frames: Iterable[pd.DataFrame]) -> str:
    """Hash of all that is used of some tables."""
    used = [frame.reindex(columns=["example", "text", "label", "group"]).to_csv(index=False) for frame in frames]
    return hashlib.sha256("".join(used).encode()).hexdigest()


def spread_over_groups(frame: pd.DataFrame, count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Up to `count` rows, as many of each label (if there are labels), over as many groups as there are.

    One row of each group first, then a second one, in random order.
    """
    frame = frame.iloc[rng.permutation(len(frame))]
    by = ["label"] if "label" in frame else []
    turn = frame.groupby([frame.group.astype(str), *(frame[name] for name in by)]).cumcount()
    frame = frame.iloc[np.argsort(turn.to_numpy(), kind="stable")]
    if by:
        frame = pd.concat([rows.head(count // 2) for _, rows in frame.groupby("label")])
    return frame.head(count).reset_index(drop=True)


def as_texts(model: TransformerBridge, frame: pd.DataFrame) -> Texts:
    """Columns text and label as tokens."""
    tokens, labels = tokenize(model, frame.text.tolist()), torch.tensor(frame.label.tolist())
    return Texts(tokens.ids, tokens.mask.long(), torch.as_tensor(last_positions(tokens)), labels)


class Body:
    """A model's blocks, and its states after the chosen numbers of them, for all texts and positions; made when used."""

    def __init__(self, model: TransformerBridge, texts: Texts, weights: str, seed: int, chosen: Sequence[int]) -> None:
        self.model, self.texts, self.weights, self.seed, self.chosen = model, texts, weights, seed, chosen

    @functools.cached_property
    def whole(self) -> Any:
        """The plain Hugging Face model."""
        model = self.model if self.weights == "trained" else models.random_twin(self.model, seed=self.seed)
        return models.plain_twin(model)

    @property
    def plain(self) -> Any:
        """Its blocks, with the embedding below and the norm above."""
        body, use = self.whole.base_model, "use a Llama, Qwen, Gemma, OLMo or NeoX model"
        if not hasattr(body, "layers") or not _norm_name(body):
            raise ValueError(
                f"{type(body).__name__} is not laid out like Llama (layers, then a norm), so its blocks cannot be started "
                f"in the middle here; {use}"
            )
        return body

    @functools.cached_property
    def states(self) -> dict[int, torch.Tensor]:
        """Depth to states [example position d_model] of its own texts."""
        return states_after(self.plain, self.texts.mask, self.chosen, input_ids=self.texts.ids)

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
        own = dict(self.plain.named_buffers())
        for name, buffer in tail.named_buffers():  # the rotations, as they are in memory
            if not name.startswith("layers.") and name in own:
                buffer.data = own[name].clone()
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


def states_after(
    net: Any, mask: torch.Tensor, depths: Sequence[int], **inputs: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Depth to states [example position d_model]; the final norm is left out, so that the last depth is before it.

    inputs: `input_ids`, or `inputs_embeds` for a tail, which has no embedding of its own.
    """
    name = _norm_name(net)
    kept = getattr(net, name)
    found: dict[int, list[torch.Tensor]] = {depth: [] for depth in depths}
    setattr(net, name, torch.nn.Identity())
    try:
        with torch.inference_mode():
            for rows in torch.arange(len(mask)).split(32):
                some = {key: value[rows] for key, value in inputs.items()}
                out = net(**some, attention_mask=mask[rows], use_cache=False, output_hidden_states=True)
                for depth in depths:
                    found[depth].append(out.hidden_states[depth])
    finally:
        setattr(net, name, kept)
    return {depth: torch.cat(values).clone() for depth, values in found.items()}


def _norm_name(body: Any) -> str:
    """Name of the final norm; empty for a model that is laid out in another way."""
    return next((name for name in ("norm", "final_layer_norm") if hasattr(body, name)), "")


def _run_tail(tail: Any, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States after the tail's blocks and norm. Positions and the causal mask are made anew by the model's own code."""
    return tail(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state


def tune(tail: Any, texts: Texts, states: torch.Tensor, test: np.ndarray, tuning: Tuning, seed: int) -> Tuned:
    """Train a tail with a classifier, in place, on the texts that are not tested."""
    width, train = states.shape[-1], np.flatnonzero(~test)
    generator = torch.Generator().manual_seed(seed % 2**63)
    head = torch.nn.Linear(width, 2)
    with torch.no_grad():
        head.weight.copy_(torch.randn(2, width, generator=generator) * width**-0.5)
        head.bias.zero_()
    blocks = list(tail.layers.parameters())
    top = [*getattr(tail, _norm_name(tail)).parameters(), *head.parameters()]
    groups = [{"params": part, "lr": rate} for part, rate in ((blocks, tuning.rate), (top, tuning.head_rate)) if part]
    optimizer = torch.optim.AdamW(groups, weight_decay=tuning.decay, fused=True)
    recipe = Recipe(steps=max(tuning.steps, 1), batch=min(tuning.batch, len(train)))

    def logits(rows: torch.Tensor) -> torch.Tensor:
        longest = int(texts.last[rows].max()) + 1  # right padding: what lies behind is never seen
        out = _run_tail(tail, states[rows, :longest], texts.mask[rows, :longest])
        return head(out[torch.arange(len(rows)), texts.last[rows]].float())

    losses = []
    for rows in replicas.orders([train], [seed], recipe)[0][: tuning.steps]:
        loss = torch.nn.functional.cross_entropy(logits(rows), texts.labels[rows])
        replicas.descend(optimizer, [*blocks, *top], loss)
        losses.append(loss.item())
    with torch.inference_mode():
        parts = [logits(rows).log_softmax(-1) for rows in torch.as_tensor(np.flatnonzero(test)).split(32)]
    late = float(np.mean(losses[-max(1, tuning.steps // 5) :])) if losses else np.nan
    return Tuned(torch.cat(parts).numpy(), sum(one.numel() for one in (*blocks, *top)), late)


# --- tables ---------------------------------------------------------------------------------------------------------


def measured(
    frame: pd.DataFrame, test: np.ndarray, log_p: np.ndarray, where: dict[str, Any], **more: float
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Rows of accuracy, nll and `more`, and the tested texts, of one run; `where` says of which."""
    labels, predicted = frame.label.to_numpy()[test], log_p.argmax(1)
    of_right = log_p[np.arange(len(labels)), labels]
    values = {"accuracy": float((predicted == labels).mean()), "nll": float(-of_right.mean()), **more}
    items = frame.loc[test, ["example", "group", "label"]].assign(
        **where, predicted=predicted, log_p=of_right.astype(float)
    )
    return [{**where, "metric": name, "value": value} for name, value in values.items()], items


def summarised(items: pd.DataFrame, by: list[str], seed: int) -> tuple[pd.DataFrame, dict[Any, pd.DataFrame]]:
    """Accuracy and nll of each run, which the columns `by` name, and the runs by text; a text counts by its mean over splits."""
    items = items.assign(right=(items.predicted == items.label).astype(float))
    mean = items.groupby([*by, "example", "group"], sort=False)[["right", "log_p"]].mean().reset_index()
    runs = {at: part.set_index("example") for at, part in mean.groupby(by, sort=False)}
    rows = [(*at, *interval(part.right, part.group, seed)[:3], float(-part.log_p.mean()), len(part), part.group.nunique())
            for at, part in runs.items()]  # fmt: skip
    return pd.DataFrame(rows, columns=[*by, "accuracy", "low", "high", "nll", "n_texts", "n_groups"]), runs


def paired(one: pd.DataFrame, two: pd.DataFrame, seed: int) -> tuple[float, float, float, float]:
    """Accuracy of a run minus that of another, on the same texts: mean, low, high, p."""
    return interval(one.right - two.right.reindex(one.index), one.group, seed)


def interval(values: pd.Series, groups: pd.Series, seed: int) -> tuple[float, float, float, float]:
    """Mean over texts with low, high and two-sided p (against 0) of a bootstrap over groups; nan below five groups."""
    mean, names = float(values.to_numpy().mean()), groups.to_numpy(str)
    if len(set(names)) < _FEWEST:
        return mean, np.nan, np.nan, np.nan
    drawn = statistics.cluster_means(values.to_numpy()[:, None], names, draws=_DRAWS, seed=seed)[:, 0]
    return mean, *of_draws(drawn)
