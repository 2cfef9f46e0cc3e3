"""Is a block one small step of a flow? Three tests of the integrator view, with controls that must fail.

After "Understanding and improving Transformer from a multi-particle dynamic system point of view" (Macaron, arXiv
1906.02762), which reads a block as one Lie-Trotter step, x += A(x), then x += M(x), of size 1.

A. One step: n substeps of size 1/n converge for any smooth block, so convergence is no evidence; the question is whether n = 1 is
   already close to n = 64.
B. Splitting: does it matter that attention comes before the MLP? Swapped, both from the same state, and Strang's half steps
   (second order only where the sub-flows are solved to second order, which Euler steps are not).
C. Neighbours: do layers l and l + 1 do the same thing at the same state, and may one stand for the other?
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import models, require, statistics
from lab.depth_efficiency.layers import prompts
from lab.interventions import Program, rewritten
from lab.results import Result, versions
from lab.states import require_finite
from lab.texts import tokenize

PROGRAMS = {
    "two substeps": "two steps of half size",
    "swapped": "MLP first, then attention",
    "parallel": "attention and MLP both from the block's input",
    "strang": "half attention, MLP, half attention",
    "size 0.5": "a step of half size",
    "size 0.9": "a step of nine tenths",
    "size 1.1": "a step larger by a tenth",
    "size 2": "a step of double size",
    "dropped": "control: no step",
    "random": "control: a random step of the same size, token by token",
    "twice": "layer l twice, in place of l and l + 1",
    "both at once": "l and l + 1 from the same state",
    "exchanged": "l + 1 before l",
    "exchanged far": "control: l exchanged with a layer that is not its neighbour",
}
COLUMNS = {
    "example": "the text", "group": "texts that share a source", "program": "of `PROGRAMS`",
    "where": "a layer, a third of the layers, all; in the summary also the mean over single layers",
    "layer": "the layer; -1 for several", "nll": "loss, nats per token",
    "rise": "loss minus the unchanged model's on the same text, nats per token", "summary.rise": "mean over texts",
    "n": "texts", "low": "lower end of the interval over groups of texts", "high": "upper end",
    "weights": "trained, or random (the null)", "steps.n": "substeps, each of size 1/n",
    "error": "|x_n - x_finest| / |x_1 - x_0|, mean over tokens",
    "order": "log2 of successive differences; 1 for Euler",
    "commutator": "MLP first: |x_AM - x_MA| / |x_AM - x_0|",
    "parallel": "the same distance for both from the same state", "strang": "the same for Strang's half steps",
    "other": "the layer that is compared", "neighbours": "whether it is l + 1, else a random one",
    "cosine": "of the two updates at the input of l", "distance": "of the two updates, relative to l's own",
}  # fmt: skip
_SPLIT: dict[str, Program] = {  # one block's step, taken otherwise
    "two substeps": lambda x, step: step(step(x, attn=0.5, mlp=0.5), attn=0.5, mlp=0.5),
    "swapped": lambda x, step: step(step(x, attn=0), mlp=0),
    "parallel": lambda x, step: step(x, mlp=0) + step(x, attn=0) - x,
    "strang": lambda x, step: step(step(step(x, attn=0.5, mlp=0), attn=0), attn=0.5, mlp=0),
}


def run(
    model: TransformerBridge, data: str | pd.DataFrame = "prose", *, seed: int = 0, n_texts: int = 6,
    n_tokens: int = 40, n_step_texts: int = 2, substeps: int = 64, programs: Sequence[str] = tuple(PROGRAMS),
    layers: Sequence[int] | None = None, null: TransformerBridge | None = None, progress: bool = True,
) -> Result:  # fmt: skip
    """Errors of one step at every block's real input, and what other steps do to the loss.

    In the programs position 0, often an attention sink, takes each block as usual; its loss would break the model by itself.

    Args:
        data: a name of prose or prompts, or a table with a column `text`; each text is cut to `n_tokens`.
        n_texts: texts for the loss. n_step_texts: of those, for the substeps (127 evaluations of each block at 64).
        substeps: the finest division, a power of two, at least 8.
        programs: of `PROGRAMS`; empty measures the steps alone. layers: where they are put, one at a time; None is everywhere.
        null: `lab.models.random_twin`, whose steps are measured, too (not the programs: such a model predicts nothing).

    Source: Macaron (arXiv 1906.02762); the tests are ours. Not shown: that a small step was learnt (see the null).
    """
    models.require_site(model, "resid_mid")
    if null is not None and null.cfg.n_layers != model.cfg.n_layers:
        raise ValueError(
            f"null has {null.cfg.n_layers} blocks, the model {model.cfg.n_layers}: give lab.models.random_twin(model)"
        )
    seed, programs = require.seed(seed), require.some_of("programs", programs, PROGRAMS, least=0)
    n_texts, n_tokens = require.whole("n_texts", n_texts, 1), require.whole("n_tokens", n_tokens, 2)
    n_step_texts, substeps = require.whole("n_step_texts", n_step_texts, 1), require.whole("substeps", substeps)
    if substeps < 8 or substeps & (substeps - 1):
        raise ValueError(f"substeps={substeps}: give a power of two, at least 8")
    n_layers = model.cfg.n_layers
    where = require.wholes("layers", range(n_layers) if layers is None else layers, 0, n_layers - 1)
    frame, name = prompts(data)
    chosen = frame.sample(n=min(n_texts, len(frame)), random_state=seed).reset_index(drop=True)
    tokens = tokenize(model, list(chosen.text))
    if (tokens.lengths < n_tokens).any():
        short = int(np.flatnonzero(tokens.lengths < n_tokens)[0])
        raise ValueError(
            f"text {chosen.example[short]!r} has {tokens.lengths[short]} tokens; n_tokens={n_tokens} needs longer ones"
        )
    ids = tokens.ids[:, :n_tokens].to(model.cfg.device)
    rng = np.random.default_rng(seed)
    found = {weights: _steps(one, ids[:n_step_texts], chosen, substeps, np.random.default_rng([seed, 1]))
             for weights, one in (("trained", model), ("random", null)) if one is not None}  # fmt: skip
    tables = {name: pd.concat([some[name].assign(weights=weights) for weights, some in found.items()], ignore_index=True)
              for name in found["trained"]}  # fmt: skip
    rows: list[dict[str, Any]] = []
    base = _nll(model, ids, {})
    plans = _plans(programs, where, n_layers, rng, seed)
    for program, place, layer, plan in tqdm(plans, desc="programs", disable=not progress, leave=False):
        after = _nll(model, ids, plan)
        rows += [{"example": chosen.example[i], "group": chosen.group[i], "program": program, "where": place, "layer": layer,
                  "nll": after[i], "rise": after[i] - base[i]} for i in range(len(chosen))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["example", "group", "program", "where", "layer", "nll", "rise"])
    parameters = {**models.facts(model), "dataset": name, "n": len(chosen), "n_tokens": n_tokens, "seed": seed,
                  "n_step_texts": min(n_step_texts, len(chosen)), "substeps": substeps, "programs": programs,
                  "nll": float(base.mean()), "versions": versions()}  # fmt: skip
    return Result("integrator", table, _summary(table, seed), parameters, tables).described(COLUMNS)


# --- parts ----------------------------------------------------------------------------------------------------------


def _steps(
    model: TransformerBridge, ids: torch.Tensor, chosen: pd.DataFrame, finest: int, rng: np.random.Generator
) -> dict[str, pd.DataFrame]:
    """One pass; at every block its other steps are taken from its real input, measured and thrown away."""
    n_layers, counts = model.cfg.n_layers, [2**k for k in range(finest.bit_length())]
    tables: dict[str, list[pd.DataFrame]] = {"steps": [], "splitting": [], "neighbours": []}
    examples = chosen.example[: len(ids)]

    def size(x: torch.Tensor) -> np.ndarray:  # per text, mean over tokens; position 0 left out
        return x[:, 1:].norm(dim=-1).double().mean(1).cpu().numpy()

    def note(name: str, layer: int, **values: Any) -> None:
        tables[name].append(pd.DataFrame({"example": examples, "layer": layer, **values}))

    def watch(x: torch.Tensor, step: Any, layer: int) -> torch.Tensor:
        found = []
        for n in counts:
            y = x
            for _ in range(n):
                y = step(y, attn=1 / n, mlp=1 / n)
            found.append(y)
        one, moved = found[0], size(found[0] - x)
        gaps = [size(a - b) for a, b in zip(found, found[1:], strict=False)]
        for k, n in enumerate(counts[:-1]):
            order = np.log2(gaps[k] / gaps[k + 1]) if k + 1 < len(gaps) else np.nan
            note("steps", layer, n=n, error=size(found[k] - found[-1]) / moved, order=order)
        ways = {"commutator": "swapped", "parallel": "parallel", "strang": "strang"}
        note("splitting", layer, **{name: size(_SPLIT[way](x, step) - one) / moved for name, way in ways.items()})
        far = _far(n_layers, layer)
        others = ([layer + 1] if layer + 1 < n_layers else []) + ([int(rng.choice(far))] if far else [])
        for other in others:
            update, its = one - x, step(x, layer=other) - x
            cosine = torch.cosine_similarity(update, its, dim=-1)[:, 1:].double().mean(1).cpu().numpy()
            note("neighbours", layer, other=other, neighbours=other == layer + 1, cosine=cosine,
                 distance=size(its - update) / moved)  # fmt: skip
        return one

    programs = {layer: partial(watch, layer=layer) for layer in range(n_layers)}
    with torch.inference_mode(), rewritten(model, programs):
        model.original_model.base_model(input_ids=ids, use_cache=False)
    return {name: pd.concat(some, ignore_index=True) if some else pd.DataFrame() for name, some in tables.items()}


def _far(n_layers: int, layer: int) -> list[int]:
    return [other for other in range(n_layers) if abs(other - layer) > 1]


def _plans(
    names: list[str], where: list[int], n_layers: int, rng: np.random.Generator, seed: int
) -> list[tuple[str, str, int, dict[int, Program]]]:
    """(program, place, layer, what to run where), one layer at a time and for some programs in thirds and everywhere."""
    single: dict[str, Program] = {**_SPLIT, "dropped": lambda x, step: x, "random": _random_step(seed)}
    single |= {name: _sized(float(name.removeprefix("size "))) for name in names if name.startswith("size ")}
    plans: list[tuple[str, str, int, dict[int, Program]]] = []
    for name in names:
        for layer in where:
            plan: dict[int, Program] = {}
            after, far = layer + 1, _far(n_layers, layer)
            if name in single:
                plan = {layer: single[name]}
            elif name == "exchanged far" and far:
                other = int(rng.choice(far))
                plan = {layer: _of(other), other: _of(layer)}
            elif name != "exchanged far" and after < n_layers:
                plan = {
                    "twice": {after: _of(layer)},
                    "both at once": {layer: _both(layer), after: lambda x, step: x},
                    "exchanged": {layer: _of(after), after: _of(layer)},
                }[name]
            if plan:
                plans.append((name, f"layer {layer}", layer, _all_but_0(plan)))
        if name in _SPLIT and len(where) == n_layers:
            thirds = [part.tolist() for part in np.array_split(np.arange(n_layers), 3)]
            spans = dict(zip(("first third", "middle third", "last third"), thirds, strict=True))
            plans += [(name, place, -1, _all_but_0(dict.fromkeys(span, single[name])))
                      for place, span in {**spans, "all": list(range(n_layers))}.items()
                      if span]  # fmt: skip  # fewer than three layers leave a third empty
    return plans


def _all_but_0(plan: dict[int, Program]) -> dict[int, Program]:
    def keeping(program: Program) -> Program:
        return lambda x, step: torch.cat([step(x)[:, :1], program(x, step)[:, 1:]], 1)

    return {layer: keeping(program) for layer, program in plan.items()}


def _of(layer: int) -> Program:
    return lambda x, step: step(x, layer=layer)


def _both(layer: int) -> Program:
    return lambda x, step: step(x) + step(x, layer=layer + 1) - x


def _sized(size: float) -> Program:
    return lambda x, step: x + size * (step(x) - x)


def _random_step(seed: int) -> Program:
    def program(x: torch.Tensor, step: Any) -> torch.Tensor:
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
        length = (step(x) - x).norm(dim=-1, keepdim=True)
        return x + direction / direction.norm(dim=-1, keepdim=True) * length

    return program


def _nll(model: TransformerBridge, ids: torch.Tensor, plan: dict[int, Program]) -> np.ndarray:
    """Mean loss of each text, nats per token."""
    with torch.inference_mode(), rewritten(model, plan):
        logits = model.original_model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    chosen = torch.gather(logits, 2, ids[:, 1:, None])[..., 0]
    loss = (logits.logsumexp(-1) - chosen).double().mean(1)
    require_finite(loss, lambda text: f"the loss of text {text} of the batch")
    return loss.cpu().numpy()


def _summary(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    parts = list(table.groupby(["program", "where", "layer"], sort=False))
    for program, part in table[table.layer >= 0].groupby("program", sort=False):
        each = part.groupby(["example", "group"], as_index=False).rise.mean()
        parts.append(((program, "one layer, mean", -1), each))
    rows = []
    for key, part in parts:
        ends: Any = (np.nan, np.nan)
        if part.group.nunique() > 1:
            rises, groups = part.rise.to_numpy(float), part.group.astype(str).to_numpy()
            ends = statistics.cluster_bootstrap(rises, groups, seed=seed)[1:]
        rows.append((*key, len(part), float(part.rise.mean()), *map(float, ends)))
    return pd.DataFrame(rows, columns=["program", "where", "layer", "n", "rise", "low", "high"])
