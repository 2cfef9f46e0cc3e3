"""From states to words: what the model would say if it stopped at a depth (the logit lens of TransformerLens)."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_readout

_ROWS = 256  # states whose logits are held at once


def ranks(
    model: TransformerBridge, states: Float[np.ndarray, "example d_model"], wanted: Sequence[Sequence[int]]
) -> Int[np.ndarray, " example"]:
    """Rank of the best of some tokens after final norm and unembedding, for each state its own tokens; 0 = top.

    Args:
        states: of the residual stream or of what a sublayer adds to it.
        wanted: for each state the ids that count (the first tokens of an answer's names).

    Raises:
        ValueError: no ids for a state, or not one list for each.

    A lens reads with the last layer's eyes: a state may hold what it cannot show.
    """
    if len(wanted) != len(states):
        raise ValueError(f"{len(wanted)} lists of tokens for {len(states)} states; give one for each")
    if not all(len(ids) for ids in wanted):
        raise ValueError("a state has no tokens to look for: give at least one id")
    found = []
    with torch.inference_mode():
        for start in range(0, len(states), _ROWS):
            logits = _logits(model, states[start : start + _ROWS])
            for row, ids in zip(logits, wanted[start : start + _ROWS], strict=True):
                found.append(int((row > row[list(ids)].max()).sum()))
    return np.array(found)


def top_tokens(model: TransformerBridge, states: Float[np.ndarray, "example d_model"]) -> Int[np.ndarray, " example"]:
    """The id of the likeliest token after final norm and unembedding."""
    with torch.inference_mode():
        parts = [_logits(model, states[start : start + _ROWS]).argmax(-1) for start in range(0, len(states), _ROWS)]
    return torch.cat(parts).cpu().numpy()


def _logits(model: TransformerBridge, states: np.ndarray) -> torch.Tensor:
    values = torch.as_tensor(np.array(states), device=model.cfg.device, dtype=model.cfg.dtype)
    return logit_readout(model, values).values
