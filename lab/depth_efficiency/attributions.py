"""For one prompt and its answer: until which depth does each position matter, and which states carry the answer?

Residual erasure and integrated gradients of Csordas et al. (arXiv 2505.13898), sections 5b and 5c of their method. A position
that can be erased from some depth on without changing the answer has handed on what it had to give.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from transformer_lens.model_bridge import TransformerBridge

from lab import require
from lab.depth_efficiency.effects import gradients_at, replaced_outputs
from lab.require import why_no_text
from lab.runs import clean_run, why_plain
from lab.texts import checked_texts, tokenize

SITES = ("resid", "attn_out", "mlp_out")


def joint(
    model: TransformerBridge, prompt: str, answer: str
) -> tuple[Int[torch.Tensor, " position"], Int[np.ndarray, " answer"]]:
    """Ids of prompt and answer tokenized together, and the positions that predict the answer's tokens."""
    alone = tokenize(model, checked_texts([prompt], what="prompt")).ids[0]
    if why := why_no_text(answer):
        shown = f"{answer!r}, {why}" if not isinstance(answer, str) or answer.strip() else why
        raise ValueError(f"the answer is {shown}; give the text that follows the prompt, with its leading space")
    ids = tokenize(model, [prompt + answer]).ids[0]
    if len(ids) <= len(alone) or not torch.equal(ids[: len(alone)], alone):
        raise ValueError(
            f"the answer {answer!r} does not begin at a token of its own after {prompt[-20:]!r}; put the space between "
            "them at the answer's beginning"
        )
    return ids, np.arange(len(alone) - 1, len(ids) - 1)


def erasure(
    model: TransformerBridge, prompt: str, answer: str, *, mean: Float[torch.Tensor, "depth d_model"] | None = None,
    background: Sequence[str] = (),
) -> pd.DataFrame:  # fmt: skip
    """How much the answer's distribution changes when the state of one position at one depth is replaced by a mean state.

    The change goes on through the later layers. The mean is over tokens of other texts, position 0 left out (the paper has it
    in: it is often an attention sink with an enormous norm): `mean`, or that of the texts in `background`.

    Returns:
        Columns position, token, depth, change: the largest |y - y'| (L2 over the vocabulary, 0 to sqrt 2) over the
        positions that predict the answer, and `answer` (whether the position is one of the answer's own).
    """
    if mean is None:
        if not len(texts := require.listed("background", background, "texts")):
            raise ValueError("give mean= (one state per depth), or background= (texts to take the mean over)")
        mean = mean_state(model, texts)
    ids, at = joint(model, prompt, answer)
    run = clean_run(model, ids)
    if mean.shape != run.states[:, 0].shape:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)}; wanted [depth d_model] = {tuple(run.states[:, 0].shape)}"
        )
    parts, reuse = [], not why_plain(model)
    for position in range(int(at[-1]) + 1):
        change = replaced_outputs(model, run, position, mean, at.tolist(), reuse=reuse).max(1).astype(float)
        parts.append(pd.DataFrame({"position": position, "token": model.tokenizer.decode([int(ids[position])]),
                                   "depth": range(len(change)), "change": change, "answer": position > at[0]}))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def integrated_gradients(
    model: TransformerBridge, prompt: str, answer: str, *, site: str = "resid", layers: Sequence[int] | None = None,
    nodes: int = 32, position_0: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """How much of the answer's probability each position's state accounts for, layer by layer.

    F is the sum over answer tokens of their probability; the baseline is the mean of the state over the positions of the same
    prompt; all positions move together from it. The integral is by Gauss-Legendre nodes (the paper: 256 left sums). Position
    0 stays where it is and out of the mean: where it is an attention sink of enormous norm, a mean with it in is far from
    every state, most of the path is nonsense to the model, and 128 nodes still left the sum off by 0.11 (SmolLM2, one layer).

    Args:
        site: "resid" (the state after the layer), "attn_out" or "mlp_out". layers: None is all.
        position_0: True moves position 0 too, as published.

    Returns:
        Columns layer, position, token, attribution; `.attrs["gap"]`: for each layer |sum of attributions - (F(x) - F(b))|,
        which says whether the nodes were enough.
    """
    site, nodes = require.one_of("site", site, SITES), require.whole("nodes", nodes, 2, hint=" (16 to 32 are enough)")
    n_layers, (position_0,) = model.cfg.n_layers, require.flags(position_0=position_0)
    wanted = require.wholes("layers", range(n_layers) if layers is None else layers, 0, n_layers - 1)
    ids, at = joint(model, prompt, answer)
    run = clean_run(model, ids, sublayers=True)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    share, weight = (torch.as_tensor(x / 2, dtype=run.states.dtype)[:, None, None] for x in (points + 1, weights))
    tokens = [model.tokenizer.decode([int(i)]) for i in ids]
    sites: dict[str, Any] = {"resid": run.states[1:], "attn_out": run.attn_out, "mlp_out": run.mlp_out}
    parts, gaps, first = [], {}, 0 if position_0 else 1
    for layer in wanted:
        state = sites[site][layer]
        base = state[first:].mean(0, keepdim=True).expand_as(state).clone()
        base[:first] = state[:first]
        path = torch.cat([base + share * (state - base), base[None], state[None]])
        values, slopes = gradients_at(model, run, site, layer, path, ids[torch.as_tensor(at) + 1].tolist(), at.tolist())
        attribution = ((weight * slopes[:-2]).sum(0) * (state - base)).sum(-1)
        gaps[layer] = float((attribution.sum() - (values[-1] - values[-2])).abs())
        parts.append(pd.DataFrame({"layer": layer, "position": range(len(ids)), "token": tokens,
                                   "attribution": attribution.tolist()}))  # fmt: skip
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs["gap"] = {str(layer): gap for layer, gap in gaps.items()}  # texts: so that it can be saved
    return frame


def mean_state(model: TransformerBridge, texts: Sequence[str]) -> Float[torch.Tensor, "depth d_model"]:
    """Mean state at each depth over the tokens of some texts, position 0 left out."""
    tokens = tokenize(model, require.listed("texts", texts, "texts"))
    count = int((tokens.lengths - 1).sum())
    if not count:
        raise ValueError("the texts have one token each: there is nothing to take a mean over")
    runs = (clean_run(model, ids[:n]) for ids, n in zip(tokens.ids, tokens.lengths.tolist(), strict=True))
    total: Any = sum(run.states[:, 1:].double().sum(1) for run in runs)
    return (total / count).to(model.cfg.dtype)
