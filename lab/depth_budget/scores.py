"""Scores of blocks that need no damage: LIM and ZD of layer-wise quantisation (arXiv 2406.17415), in each of their readings.

The sources disagree about both, so every reading has a name. Neither sees a label; ZD sees no text either.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from transformer_lens.model_bridge import TransformerBridge

from lab.interventions import block_matrices
from lab.runs import clean_run

LIM = {
    "flattened": "cosine of a whole text's states, all positions as one vector",
    "tokens": "mean of the cosines of single positions",
    "flattened, no first": "flattened, without position 0, often an attention sink",
    "tokens, no first": "tokens, without position 0",
}
ZD = {
    "above, matrix": "share of weights with z > 1, z by each matrix's own mean and deviation; matrices count by their size",
    "either, matrix": "the same with |z| > 1",
    "above, block": "z > 1, z by the mean and deviation of all the block's weights: mixes matrices of unequal scale",
    "either, block": "the same with |z| > 1",
}


def lim(states: Float[torch.Tensor, "depth position d_model"]) -> dict[str, Float[np.ndarray, " layer"]]:
    """-cos(input, output) of each block in one text, in the readings of `LIM`; larger: more important.

    >>> turned = torch.tensor([[[1.0, 0], [2, 0]], [[1, 0], [0, 2]]])
    >>> {name: round(float(value[0]), 3) for name, value in lim(turned).items()}
    {'flattened': -0.2, 'tokens': -0.5, 'flattened, no first': -0.0, 'tokens, no first': -0.0}
    """
    found = {}
    for suffix, part in (("", states.double()), (", no first", states[:, 1:].double())):
        flat = part.flatten(1)
        found["flattened" + suffix] = -torch.cosine_similarity(flat[:-1], flat[1:], dim=-1)
        found["tokens" + suffix] = -torch.cosine_similarity(part[:-1], part[1:], dim=-1).mean(-1)
    return {name: found[name].cpu().numpy() for name in LIM}


def zd(matrices: Iterable[torch.Tensor]) -> dict[str, float]:
    """Share of a block's weights that lie more than a deviation out, in the readings of `ZD`; smaller: more important."""
    flat = [matrix.detach().flatten().double() for matrix in matrices]
    whole, found = torch.cat(flat), {}
    for name, parts in (("matrix", flat), ("block", [whole])):
        z = torch.cat([(part - part.mean()) / part.std(correction=0) for part in parts])
        found[f"above, {name}"] = float((z > 1).double().mean())
        found[f"either, {name}"] = float((z.abs() > 1).double().mean())
    return {name: found[name] for name in ZD}


def block_scores(model: TransformerBridge, ids: Int[torch.Tensor, "text position"]) -> pd.DataFrame:
    """Every reading of both scores for every block of the intact model, LIM as the mean over texts.

    Returns:
        score (LIM, ZD), reading, layer, value; importance: the value, its sign turned where smaller is more important.
    """
    texts = [lim(clean_run(model, row).states) for row in ids]
    rows = [("LIM", name, layer, value, value)
            for name in LIM for layer, value in enumerate(np.mean([text[name] for text in texts], 0))]  # fmt: skip
    blocks = [zd(matrix for matrix, _ in block_matrices(model, layer)) for layer in range(model.cfg.n_layers)]
    rows += [("ZD", name, layer, block[name], -block[name]) for name in ZD for layer, block in enumerate(blocks)]
    return pd.DataFrame(rows, columns=["score", "reading", "layer", "value", "importance"])
