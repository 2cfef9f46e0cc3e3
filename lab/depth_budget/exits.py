"""Depth without training: how much loss if the model ends early, and how much if a block's norms stop looking at the token.

`prefix_exits`: the pretrained model is no nested model (SortedNet, arXiv 2309.00255, trains every prefix); here its first n
blocks are read by the same final norm and unembedding, beside other sets of as many blocks.

`norms`: SLAB (arXiv 2405.11582) replaces norms by fixed statistics and trains on; here nothing is trained, and one block at a
time gets them: where does the size of the single token matter?
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from lab import models, require, results, statistics
from lab.depth_budget.changes import SKIP, FixedNorms
from lab.depth_budget.evaluation import Evaluator, Texts, texts_of
from lab.identity import identity
from lab.results import Result, versions
from lab.runs import clean_run

EXITS = {
    "prefix": "the first n blocks",
    "prefix, last": "the first n - 1 blocks and the last one",
    "prefix, last two": "the first n - 2 blocks and the last two",
    "suffix": "control: the last n blocks",
    "random": "control: n blocks drawn at random, in their order",
}
NORMS = {
    "one number": "every token is divided by one size, the root of the mean square over tokens",
    "one number, typical": "the same with the geometric mean, so that a few large tokens do not set it",
    "by channel": "every channel is divided by its own size, as SLAB does; its gains were not trained for that here",
    "one number, another block's": "control: the size of the block half the depth away",
    "one number, first token too": "the first token, which many models use as a sink, is divided so, too",
}
COLUMNS = {
    "way": "of `EXITS` or `NORMS`", "n_blocks": "blocks that are kept", "draw": "number of the random draw; else 0",
    "layer": "whose two norms are fixed", "example": "the text", "group": "texts that share a source", "genre": "of the text",
    "nll": "loss, nats per token", "kl": "KL(intact || changed), nats per token",
    "rise": "loss minus the intact model's on the same text, nats per token", "summary.rise": "mean over texts",
    "low": "lower end of the 95 % interval, bootstrap over groups of texts (random: 5th percentile of the draws' means)",
    "high": "upper end (random: 95th percentile)", "n": "texts", "how": "what the interval is over",
}  # fmt: skip


def prefix_exits(
    model: TransformerBridge, data: str | pd.DataFrame = "prose", *, n_texts: int = 24, n_tokens: int = 32, first: int = 8,
    n_random: int = 20, step: int = 3, seed: int = 0, resume: bool = True, progress: bool = True,
) -> Result:  # fmt: skip
    """Loss when only n blocks are kept: a prefix, a prefix with the last block or two, a suffix, random ones.

    Args:
        n_random: random sets of blocks, at every `step`-th n. first: first scored position of each text.

    `parameters["guessing"]`: the rise if all words were equally likely.
    Not shown: what a model that was trained for early exits would lose.
    """
    n_random, step = require.whole("n_random", n_random, 2), require.whole("step", step, 1)
    n_layers = model.cfg.n_layers
    rng, rows = np.random.default_rng(require.seed(seed)), []
    for n in range(n_layers + 1):
        kept = {"prefix": range(n), "suffix": range(n_layers - n, n_layers)}
        for name, last in (("prefix, last", 1), ("prefix, last two", 2)):
            if n >= last:
                kept[name] = [*range(n - last), *range(n_layers - last, n_layers)]  # type: ignore[assignment]
        rows += [(way, n, 0, list(blocks)) for way, blocks in kept.items()]
        if n % step == 0 and 0 < n < n_layers:
            rows += [("random", n, i, sorted(rng.choice(n_layers, n, replace=False).tolist())) for i in range(n_random)]
    plan = pd.DataFrame(rows, columns=["way", "n_blocks", "draw", "kept"])
    configurations = [{layer: SKIP for layer in range(n_layers) if layer not in kept} for kept in plan.kept]
    (texts,) = texts_of(model, data, sizes=(n_texts,), n_tokens=n_tokens, seed=seed)
    known = {"n_random": n_random, "step": step, "seed": seed, "first": first, "ids": texts.ids.tolist()}
    (part,) = _study(_measured, model, known, texts, progress, resume, configurations=configurations, first=first)
    table = _long(plan.drop(columns="kept"), texts, part)
    guessing = float(np.log(model.cfg.d_vocab) - part.summary.nll.mean())
    parameters = {**models.facts(model), "dataset": data if isinstance(data, str) else "own", "n": n_texts, "n_tokens": n_tokens,
                  "first": first, "n_random": n_random, "step": step, "seed": seed, "guessing": guessing,
                  "versions": versions()}  # fmt: skip
    return Result("prefix_exits", table, _summary(table, ["way", "n_blocks"], seed), parameters).described(COLUMNS)


def norms(
    model: TransformerBridge, data: str | pd.DataFrame = "prose", *, n_texts: int = 24, n_calibration: int = 12,
    n_tokens: int = 32, first: int = 8, layers: Sequence[int] | None = None, seed: int = 0, resume: bool = True,
    progress: bool = True,
) -> Result:  # fmt: skip
    """Loss when the two norms of one block divide by fixed sizes, measured on other texts.

    Args:
        n_calibration: texts on which the sizes are measured (without their first token, but for "first token too").
        layers: the blocks, one at a time; None is all.

    Not shown: what training with such norms would get back. Only the size is fixed: an RMS norm takes no mean away.
    """
    n_layers = model.cfg.n_layers
    layers = require.wholes("layers", range(n_layers) if layers is None else layers, 0, n_layers - 1)
    if model.cfg.normalization_type != "RMS":
        raise ValueError(
            f"this model's norms are {model.cfg.normalization_type}: norms(...) takes models with RMS norms"
        )
    models.require_site(model, "resid_mid")
    first = require.whole("first", first, 0, require.whole("n_tokens", n_tokens, 3) - 2)
    calibration, texts = texts_of(model, data, sizes=(n_calibration, n_texts), n_tokens=n_tokens, seed=seed)
    plan = pd.DataFrame([(way, layer) for way in NORMS for layer in layers], columns=["way", "layer"])
    known = {
        "layers": layers,
        "seed": seed,
        "first": first,
        "ids": texts.ids.tolist(),
        "others": calibration.ids.tolist(),
    }
    more = {"calibration": calibration.ids, "plan": plan.to_dict("list"), "first": first}
    (part,) = _study(_normed, model, known, texts, progress, resume, **more)
    table = _long(plan, texts, part)
    parameters = {**models.facts(model), "dataset": data if isinstance(data, str) else "own", "n": n_texts, "n_tokens": n_tokens,
                  "n_calibration": n_calibration, "first": first, "layers": layers, "seed": seed,
                  "versions": versions()}  # fmt: skip
    return Result("fixed_norms", table, _summary(table, ["way", "layer"], seed), parameters).described(COLUMNS)


# --- parts ----------------------------------------------------------------------------------------------------------


def _study(
    work: Any,
    model: TransformerBridge,
    known: Mapping[str, Any],
    texts: Texts,
    progress: bool,
    resume: bool,
    **more: Any,
) -> list[Result]:
    kept = results.keep(work, {"model": identity(model)}, resume=resume)
    shared = {"ids": texts.ids, "progress": progress, **more}
    return results.study(work, [{}], kept=kept, known=known, shared=shared, models={"model": model}, progress=progress)


def _measured(
    model: TransformerBridge, ids: torch.Tensor, configurations: Sequence[Mapping[int, Any]], first: int, progress: bool,
    scratch: Path | None,
) -> Result:  # fmt: skip
    """Loss and KL of each configuration, and the intact model's, a row each."""
    evaluate = Evaluator(model, ids, first=first, folder=scratch, progress=progress)
    found = evaluate([{}, *configurations])
    intact = pd.DataFrame({"example": range(len(ids)), "nll": found.nll[0]})
    rows = [(i, text, found.nll[i + 1, text], found.kl[i + 1, text])
            for i in range(len(configurations)) for text in range(len(ids))]  # fmt: skip
    return Result("evaluated", pd.DataFrame(rows, columns=["row", "text", "nll", "kl"]), intact, {})


def _normed(
    model: TransformerBridge, ids: torch.Tensor, calibration: torch.Tensor, plan: Mapping[str, list[Any]], first: int,
    progress: bool, scratch: Path | None,
) -> Result:  # fmt: skip
    squares, typical = zip(*(_squares(model, calibration, start) for start in (0, 1)), strict=True)
    half, changes = model.cfg.n_layers // 2, []
    for way, layer in zip(plan["way"], plan["layer"], strict=True):
        sink = way == "one number, first token too"
        other = (layer + half) % model.cfg.n_layers if "another" in way else layer
        sizes = squares[0 if sink else 1][:, other]  # [norm d_model]
        chosen = sizes if way == "by channel" else sizes.mean(-1, keepdim=True)
        chosen = typical[1][:, other, None] if "typical" in way else chosen
        changes.append({layer: FixedNorms(way, (chosen[0], chosen[1]), first=0 if sink else 1)})
    return _measured(model, ids, changes, first, progress, scratch)


def _squares(model: TransformerBridge, ids: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what goes into each block's two norms: mean square [norm layer d_model] over tokens from `start` on and texts, and
    the geometric mean [norm layer] of single tokens' mean squares."""
    total, logs = torch.zeros(()), torch.zeros(())
    for row in ids:
        run = clean_run(model, row, sublayers=True)
        assert run.attn_out is not None
        both = torch.stack([run.states[:-1], run.states[:-1] + run.attn_out])  # before attention, before the MLP
        squares = both[:, :, start:].float().square()
        total, logs = total + squares.mean(2), logs + squares.mean(-1).log().mean(-1)
    return total / len(ids), (logs / len(ids)).exp()


def _long(plan: pd.DataFrame, texts: Texts, part: Result) -> pd.DataFrame:
    found, intact = part.table, part.summary.nll.to_numpy()
    table = pd.concat([plan.iloc[found.row].reset_index(drop=True), texts.table.iloc[found.text].reset_index(drop=True),
                       found[["nll", "kl"]]], axis=1)  # fmt: skip
    return table.assign(rise=table.nll - intact[found.text])


def _summary(table: pd.DataFrame, by: list[str], seed: int) -> pd.DataFrame:
    rows = []
    for key, part in table.groupby(by, sort=False):
        if "draw" in part and part.draw.nunique() > 1:
            means = part.groupby("draw").rise.mean()
            rows.append(
                (*key, part.example.nunique(), means.mean(), *means.quantile([0.05, 0.95]), "5 to 95 % of draws")
            )
        else:
            found = statistics.cluster_bootstrap(part.rise.to_numpy(), part.group.astype(str).to_numpy(), seed=seed)
            rows.append((*key, len(part), *map(float, found), "bootstrap over texts"))
    return pd.DataFrame(rows, columns=[*by, "n", "rise", "low", "high", "how"])
