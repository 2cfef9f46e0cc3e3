"""Is a block one small step of a flow? Three tests of the integrator view, with controls that must fail.

After "Understanding and improving Transformer from a multi-particle dynamic system point of view" (Macaron, arXiv
1906.02762), which reads a block as one Lie-Trotter step, x += A(x), then x += M(x), of size 1.

A. One step: n substeps of size 1/n converge for any smooth block, so convergence is no evidence; the question is whether n = 1 is
   already close to n = 64.
B. Splitting: does it matter that attention comes before the MLP? Swapped, both from the same state, and Strang's half steps
   (second order only where the sub-flows are solved to second order, which Euler steps are not).
C. Neighbours: do layers l and l + 1 do the same thing at the same state, and may one stand for the other?
"""

from collections.abc import Callable, Sequence
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
# Position 0 takes every block as usual, in all programs: it is often an attention sink, and its loss alone breaks a model.
_ALONE = (
    "two substeps",
    "swapped",
    "parallel",
    "strang",
    "size 0.5",
    "size 0.9",
    "size 1.1",
    "size 2",
    "dropped",
    "random",
)


def run(
    model: TransformerBridge,
    data: str | pd.DataFrame = "prose",
    *,
    seed: int = 0,
    n_texts: int = 6,
    n_tokens: int = 40,
    n_step_texts: int = 2,
    substeps: int = 64,
    programs: Sequence[str] = tuple(PROGRAMS),
    layers: Sequence[int] | None = None,
    null: TransformerBridge | None = None,
    progress: bool = True,
) -> Result:
    """Errors of one step at every block's real input, and what other steps do to the loss.

    In the programs position 0, often an attention sink, takes each block as usual; its loss would break the model by itself.

    Args:
        data: a name of prose or prompts, or a table with a column `text`; each text is cut to `n_tokens`.
        n_texts: texts for the loss, drawn with the seed.
        n_step_texts: of those, for the substeps (127 evaluations of each block at 64).
        substeps: the finest division, a power of two, at least 8.
        programs: of `PROGRAMS`; empty measures the steps alone.
        layers: where the programs are put, one at a time; None is everywhere.
        null: a model with random weights (`lab.models.random_twin`), whose steps are measured, too (not the programs: such a
            model predicts nothing that could get worse).

    Returns:
        Result with
        `.table`: example, group, program, where (a layer, "first third", ..., "all"), layer (-1 for several), nll, rise (nats
            a token, minus the unchanged model's on the same text).
        `.summary`: program, where, layer, n, rise, low, high (interval over texts).
        `.tables["steps"]`: weights, example, layer, n, error (|x_n - x_finest| / |x_1 - x_0|), order (log2 of successive
            differences; 1 for Euler).
        `.tables["splitting"]`: weights, example, layer, commutator (|x_AM - x_MA| / |x_AM - x_0|), and the same distance from
            x_AM for `parallel` and `strang`.
        `.tables["neighbours"]`: weights, example, layer, other, neighbours (l + 1, else a random pair), cosine, distance (of
            the two updates at the input of l, relative to l's own).

    Raises:
        ValueError: a model with parallel blocks, an unknown program, texts shorter than n_tokens, an empty list of layers.
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
    found = {"trained": _steps(model, ids[:n_step_texts], chosen, substeps, np.random.default_rng([seed, 1]))}
    if null is not None:
        found["random"] = _steps(null, ids[:n_step_texts], chosen, substeps, np.random.default_rng([seed, 1]))
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
    return Result("integrator", table, _summary(table, seed), parameters, tables)


def order_of(step: Callable[[float, float], float], exact: float, *, counts: Sequence[int] = (8, 16, 32, 64)) -> float:
    """Observed order of a one-step method on a scalar flow over unit time: slope of log error on log step size.

    Args:
        step: (x, size) -> x after one step.
        exact: the flow's value at time 1 from x = 1.
    """
    errors = []
    for n in counts:
        x = 1.0
        for _ in range(n):
            x = step(x, 1 / n)
        errors.append(abs(x - exact))
    return float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])


# --- parts ----------------------------------------------------------------------------------------------------------


def _steps(
    model: TransformerBridge, ids: torch.Tensor, chosen: pd.DataFrame, finest: int, rng: np.random.Generator
) -> dict[str, pd.DataFrame]:
    """One pass; at every block its other steps are taken from its real input, measured and thrown away."""
    n_layers, counts = model.cfg.n_layers, [2**k for k in range(finest.bit_length())]
    steps: list[dict[str, Any]] = []
    splitting: list[dict[str, Any]] = []
    neighbours: list[dict[str, Any]] = []

    def size(x: torch.Tensor) -> np.ndarray:  # per text, mean over tokens; position 0 left out
        return x[:, 1:].norm(dim=-1).double().mean(1).cpu().numpy()

    def watch(layer: int) -> Program:
        def program(x: torch.Tensor, step: Any) -> torch.Tensor:
            found = []
            for n in counts:
                y = x
                for _ in range(n):
                    y = step(y, attn=1 / n, mlp=1 / n)
                found.append(y)
            one, best = found[0], found[-1]
            moved = size(one - x)
            gaps = [size(a - b) for a, b in zip(found, found[1:], strict=False)]
            swapped = step(step(x, attn=0), mlp=0)
            together = step(x, mlp=0) + step(x, attn=0) - x
            strang = step(step(step(x, attn=0.5, mlp=0), attn=0), attn=0.5, mlp=0)
            names = chosen.example
            for k, n in enumerate(counts[:-1]):
                error = size(found[k] - best) / moved
                for i in range(len(x)):
                    order = np.log2(gaps[k][i] / gaps[k + 1][i]) if k + 1 < len(gaps) else np.nan
                    steps.append({"example": names[i], "layer": layer, "n": n, "error": error[i], "order": order})
            parts = [size(other - one) / moved for other in (swapped, together, strang)]
            for i in range(len(x)):
                splitting.append({"example": names[i], "layer": layer, "commutator": parts[0][i],
                                  "parallel": parts[1][i], "strang": parts[2][i]})  # fmt: skip
            far = [o for o in range(n_layers) if abs(o - layer) > 1]
            others = [layer + 1] if layer + 1 < n_layers else []
            others += [int(rng.choice(far))] if far else []
            for other in others:
                update, its = one - x, step(x, layer=other) - x
                cosine = torch.cosine_similarity(update, its, dim=-1)[:, 1:].double().mean(1).cpu().numpy()
                apart = size(its - update) / moved
                for i in range(len(x)):
                    neighbours.append({"example": names[i], "layer": layer, "other": other,
                                       "neighbours": other == layer + 1, "cosine": cosine[i], "distance": apart[i]})  # fmt: skip
            return one

        return program

    with torch.inference_mode(), rewritten(model, {layer: watch(layer) for layer in range(n_layers)}):
        model.original_model.base_model(input_ids=ids, use_cache=False)
    return {"steps": pd.DataFrame(steps), "splitting": pd.DataFrame(splitting), "neighbours": pd.DataFrame(neighbours)}


def _plans(
    names: list[str], where: list[int], n_layers: int, rng: np.random.Generator, seed: int
) -> list[tuple[str, str, int, dict[int, Program]]]:
    """(program, place, layer, what to run where), one layer at a time and for some programs in thirds and everywhere."""
    single: dict[str, Program] = {
        "two substeps": lambda x, step: step(step(x, attn=0.5, mlp=0.5), attn=0.5, mlp=0.5),
        "swapped": lambda x, step: step(step(x, attn=0), mlp=0),
        "parallel": lambda x, step: step(x, mlp=0) + step(x, attn=0) - x,
        "strang": lambda x, step: step(step(step(x, attn=0.5, mlp=0), attn=0), attn=0.5, mlp=0),
        "dropped": lambda x, step: x,
        "random": _random_step(seed),
    }
    for name in names:
        if name.startswith("size "):
            single[name] = _sized(float(name.removeprefix("size ")))
    plans: list[tuple[str, str, int, dict[int, Program]]] = []
    for name in names:
        for layer in where:
            plan: dict[int, Program] | None = None
            if name in _ALONE:
                plan = {layer: single[name]}
            elif name == "exchanged far":
                far = [o for o in range(n_layers) if abs(o - layer) > 1]
                if far:
                    other = int(rng.choice(far))
                    plan = {layer: _of(other), other: _of(layer)}
            elif layer + 1 < n_layers:
                after = layer + 1
                plan = {
                    "twice": {after: _of(layer)},
                    "both at once": {layer: _both(layer), after: lambda x, step: x},
                    "exchanged": {layer: _of(after), after: _of(layer)},
                }[name]
            if plan:
                plans.append((name, f"layer {layer}", layer, _all_but_0(plan)))
        if name in ("two substeps", "swapped", "parallel", "strang") and len(where) == n_layers:
            thirds = [part.tolist() for part in np.array_split(np.arange(n_layers), 3)]
            spans = dict(zip(("first third", "middle third", "last third"), thirds, strict=True))
            spans["all"] = list(range(n_layers))
            plans += [
                (name, place, -1, _all_but_0(dict.fromkeys(span, single[name])))
                for place, span in spans.items()
                if span  # fewer than three layers leave a third empty
            ]
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
    """Mean loss of each text, nats a token."""
    with torch.inference_mode(), rewritten(model, plan):
        logits = model.original_model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    chosen = torch.gather(logits, 2, ids[:, 1:, None])[..., 0]
    loss = (logits.logsumexp(-1) - chosen).double().mean(1)
    require_finite(loss, lambda text: f"the loss of text {text} of the batch")
    return loss.cpu().numpy()


def _summary(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for (program, where, layer), part in table.groupby(["program", "where", "layer"], sort=False):
        row = {"program": program, "where": where, "layer": layer, "n": len(part), "rise": float(part.rise.mean())}
        if part.group.nunique() > 1:
            interval = statistics.cluster_bootstrap(
                part.rise.to_numpy(float), part.group.astype(str).to_numpy(), seed=seed
            )
            row |= {"low": float(interval.low), "high": float(interval.high)}
        rows.append(row)
    for program, part in table[table.layer >= 0].groupby("program", sort=False):
        each = part.groupby(["example", "group"], as_index=False).rise.mean()
        row = {
            "program": program,
            "where": "one layer, mean",
            "layer": -1,
            "n": len(each),
            "rise": float(each.rise.mean()),
        }
        if each.group.nunique() > 1:
            interval = statistics.cluster_bootstrap(
                each.rise.to_numpy(float), each.group.astype(str).to_numpy(), seed=seed
            )
            row |= {"low": float(interval.low), "high": float(interval.high)}
        rows.append(row)
    return pd.DataFrame(rows)
