"""A language model's blocks from the n-th on, started from stored states and trained on a small task of short texts.

    texts = as_texts(model, frame)                                 # columns text, label
    body = Body(model, texts, "trained", seed=0, chosen=[20])      # states after block 20, of all texts and positions
    tail = body.tail(20, 10, keep=True, seed=0)                    # the model's own last 10 blocks, a copy
    tuned = tune(tail, texts, body.states[20], test, Tuning(25, 16, 1e-4, 3e-3), seed=0)

What is in front stays frozen, so its states are computed once. The label is read at each text's last token, by a fresh
classifier behind a fresh final norm. The parts that `transfer_pretrained` and `transfer_tuned` share.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModel

from lab import models, require, statistics
from lab.nets import replicas
from lab.nets.replicas import Recipe
from lab.texts import last_positions, tokenize

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
    tokens = tokenize(model, frame.text.tolist())
    return Texts(
        tokens.ids, tokens.mask.long(), torch.as_tensor(last_positions(tokens)), torch.tensor(frame.label.tolist())
    )


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
        body = self.whole.base_model
        if not hasattr(body, "layers") or not _norm_name(body):
            raise ValueError(
                f"{type(body).__name__} is not laid out like Llama (layers, then a norm): its blocks cannot be started in "
                "the middle here; use a Llama, Qwen, Gemma, OLMo or NeoX model"
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


def zero_step_gap(model: TransformerBridge, texts: Sequence[str], n: int) -> float:
    """Largest difference of logits between a model and its K-n before the first step: rounding, if all is right.

    K-n starts from stored states after block n, so positions and the causal mask are made anew behind them.
    """
    n_layers = model.cfg.n_layers
    if not 0 <= n <= n_layers:
        raise ValueError(f"n={n}: pass a number of frozen blocks from 0 to {n_layers}")
    body = Body(model, as_texts(model, pd.DataFrame({"text": list(texts), "label": 0})), "trained", 0, [n])
    whole, ours = body.before_training(n, torch.arange(len(texts)))
    with torch.inference_mode():
        head = body.whole.get_output_embeddings()
        return float((head(whole) - head(ours)).abs().max())


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

    losses = []
    for rows in order[: tuning.steps]:
        loss = torch.nn.functional.cross_entropy(logits(rows), texts.labels[rows])
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(loss.item())
    with torch.inference_mode():
        parts = [logits(rows).log_softmax(-1) for rows in torch.as_tensor(np.flatnonzero(test)).split(32)]
    late = losses[-max(1, tuning.steps // 5) :]
    return Tuned(
        torch.cat(parts).numpy(),
        sum(parameter.numel() for parameter in trained),
        float(np.mean(late)) if late else np.nan,
    )


def interval(values: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float, float, float]:
    """Mean over texts with low, high and two-sided p (against 0) of a bootstrap over groups; nan below five groups."""
    if len(set(groups)) < _FEWEST:
        return float(values.mean()), np.nan, np.nan, np.nan
    drawn = statistics.cluster_means(values[:, None], groups, draws=_DRAWS, seed=seed)[:, 0]
    p = 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + _DRAWS)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(values.mean()), float(low), float(high), float(min(1.0, p))


def with_holm(differences: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """A column p_holm: p corrected over the n of one comparison, which the columns `by` name."""
    found = differences.assign(p_holm=np.nan)
    for _, part in found.groupby(list(by)):
        found.loc[part.index, "p_holm"] = statistics.holm(part.p.to_numpy())
    return found
