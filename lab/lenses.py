"""From states to words: what the model would say if it stopped at a depth (the logit lens of TransformerLens)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch.nn.functional import linear
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_readout

from lab.models import alone
from lab.states import require_finite

_ROWS = 256  # states whose logits are held at once


def readout(
    model: TransformerBridge,
    states: Float[torch.Tensor, "... d_model"],
    *,
    kind: str = "logits",
    tokens: Int[torch.Tensor, " row"] | None = None,
    gradients: bool = False,
) -> Float[torch.Tensor, "... d_vocab"]:
    """What the model would say of states before the final norm: its own norm, unembedding, and cap or scale of the logits.

    Args:
        kind: "logits", "log_probs" or "probs".
        tokens: for each place on the last axis before d_model one token (the result's last axis is 1); None: the vocabulary.
        gradients: True keeps the way back to the states.
    """
    require_finite(states, lambda *at: f"state {', '.join(map(str, at[:-1]))} that the lens is to read")
    with alone(model):
        found = logit_readout(model, states, return_type=kind, targets=tokens, enable_grad=gradients).values
    require_finite(found.amax(-1), lambda *at: f"what the lens reads in state {', '.join(map(str, at))}")
    return found


def unembed(
    model: TransformerBridge, normed: Float[torch.Tensor, "... d_model"], words: Any = slice(None)
) -> torch.Tensor:
    """Logits of some words of the vocabulary, of states after the final norm; capped and scaled as `readout`'s are."""
    head = model.original_model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    logits = linear(normed, head.weight[words], None if bias is None else bias[words])
    return model.adapter.apply_output_logits_transform(logits)


def ranks(
    model: TransformerBridge, states: Float[np.ndarray, "example d_model"], wanted: Sequence[Sequence[int]]
) -> Int[np.ndarray, " example"]:
    """Rank of the best of some tokens after final norm and unembedding, for each state its own tokens; 0 = top.

    Args:
        wanted: for each state the ids that count (`texts.first_tokens`); -1 is the rank where there are none.

    A lens reads with the last layer's eyes: a state may hold what it cannot show.
    """
    if len(wanted) != len(states):
        raise ValueError(f"{len(wanted)} lists of tokens for {len(states)} states; give one for each")
    found = []
    with torch.inference_mode():
        for start in range(0, len(states), _ROWS):
            logits = _logits(model, states[start : start + _ROWS])
            for row, ids in zip(logits, wanted[start : start + _ROWS], strict=True):
                found.append(int((row > row[list(ids)].max()).sum()) if len(ids) else -1)
    return np.array(found)


def top_tokens(model: TransformerBridge, states: Float[np.ndarray, "example d_model"]) -> Int[np.ndarray, " example"]:
    """The id of the likeliest token after final norm and unembedding."""
    with torch.inference_mode():
        parts = [_logits(model, states[start : start + _ROWS]).argmax(-1) for start in range(0, len(states), _ROWS)]
    return torch.cat(parts).cpu().numpy()


def as_ranks(ranks: Any) -> pd.Series:
    """Ranks for a table: missing where there was nothing to look for (-1), so that no share or median counts it."""
    return pd.Series(ranks, dtype="Int64").where(lambda rank: rank >= 0)


def _logits(model: TransformerBridge, states: np.ndarray) -> torch.Tensor:
    values = torch.as_tensor(np.array(states), device=model.cfg.device, dtype=model.cfg.dtype)
    return readout(model, values)
