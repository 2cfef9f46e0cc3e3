"""Blocks lowered to fewer bits one after the other: the orders, and what each costs. What `quantisation.run` measures.

An order lists the blocks from the least important one. The offline weights come from 4-bit groups of 32: "full precision"
has 16 levels a group there, 4 bits with a free offset in such groups change nothing, and ZD sees that grid.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lab.depth_budget.changes import SKIP, Bits, bits_a_weight
from lab.depth_budget.evaluation import Configuration, Evaluator, Texts
from lab.depth_budget.programme import allocate
from lab.interventions import block_matrices
from lab.results import Result

TWO_LEVELS, BETWEEN, CHOICES = (4, 2), 3, (2, 3, 4, 8)  # of the essential control: two levels, one level, any
CONTROL, PRUNE = "at 3 bits", "prune or quantise"  # the sweeps that are no pair
ENDS = ("first to last", "last to first")


def sizes_of(model: TransformerBridge) -> tuple[np.ndarray, int]:
    """Weights of each block's matrices, and all other parameters, which keep 16 bits (a tied embedding counts once)."""
    blocks = [sum(w.numel() for w, _ in block_matrices(model, layer)) for layer in range(model.cfg.n_layers)]
    whole = sum(p.numel() for p in {id(p): p for p in model.original_model.parameters()}.values())
    return np.array(blocks), whole - sum(blocks)


def mean_bits(sizes: np.ndarray, configuration: Configuration) -> float:
    """Bits a weight of the blocks' matrices, steps and zero points counted; a block that is left out has none."""
    bits = [bits_a_weight(0 if change is SKIP else change.bits, getattr(change, "group_size", 1)) if change else 16
            for change in map(configuration.get, range(len(sizes)))]  # fmt: skip
    return float(np.average(bits, weights=sizes))


def lowered(order: Sequence[int], k: int, high: Bits, low: Bits) -> dict[int, Bits]:
    """The first k blocks of an order at the lower bits, the others at the higher ones."""
    return {layer: low if layer in order[:k] else high for layer in order}


def single_damages(
    evaluate: Evaluator, changes: Sequence[Any], rest: Configuration | None = None
) -> dict[str, np.ndarray]:
    """Rise of the loss and KL, [block change], when one block alone is changed, the others as in `rest` (or intact)."""
    base, n = dict(rest or {}), evaluate.n
    found = evaluate([base, *({**base, layer: change} for layer in range(n) for change in changes)])
    nll, kl = found.nll.mean(1), found.kl.mean(1)
    return {"loss": (nll[1:] - nll[0]).reshape(n, -1), "KL": kl[1:].reshape(n, -1)}


def measured_importance(search: Evaluator, second: Evaluator, high: Bits, low: Bits) -> dict[str, np.ndarray]:
    """Importance [block]: damage (only this block is lowered, all others at the higher bits) by loss, by KL to the intact
    model, and by loss on other text; and rescue (all are lowered but this one), by loss."""
    n = search.n
    rest, all_low = dict.fromkeys(range(n), high), dict.fromkeys(range(n), low)
    damage = single_damages(search, [low], rest)
    return {
        "damage": damage["loss"][:, 0],
        "damage, KL": damage["KL"][:, 0],
        "damage, second text": single_damages(second, [low], rest)["loss"][:, 0],
        "rescue": -single_damages(search, [high], all_low)["loss"][:, 0],
    }


def orders_of(importance: Mapping[str, np.ndarray], n_random: int, seed: int) -> dict[str, tuple[str, list[int]]]:
    """Kind (score, reverse, depth, random) and blocks from the least important one, by name; equal scores by depth.

    Readings that give one order are measured once, as configurations are remembered, and listed each.
    """
    n = len(next(iter(importance.values())))
    found = {name: ("score", np.argsort(values, kind="stable").tolist()) for name, values in importance.items()}
    found |= {f"reverse of {name}": ("reverse", order[::-1]) for name, (_, order) in list(found.items())}
    found |= dict(zip(ENDS, (("depth", list(range(n))), ("depth", list(range(n))[::-1])), strict=True))
    draw = np.random.default_rng([seed, 17])
    return found | {f"random {i}": ("random", draw.permutation(n).tolist()) for i in range(n_random)}


def importance_of(scores: pd.DataFrame) -> dict[str, np.ndarray]:
    """Importance [block] of each reading, by "score, reading"."""
    parts = scores.sort_values("layer", kind="stable").groupby(["score", "reading"], sort=False)
    return {f"{score}, {reading}": part.importance.to_numpy() for (score, reading), part in parts}


def work(
    model: TransformerBridge, *, sweep: str, texts: Sequence[Texts], scores: pd.DataFrame, parameters: dict[str, Any],
    progress: bool = False, scratch: Path | None = None,
) -> Result:  # fmt: skip
    """One pair of bits ("4/2"), or the controls; text by text.

    Args:
        texts: to search and order by, to report on, and a second set to order by.
    """
    began, size = time.monotonic(), parameters["group_size"]
    options = {"first": parameters["first"], "folder": scratch, "progress": progress}
    search = Evaluator(model, texts[0].ids, **options)
    report, second = (Evaluator(model, one.ids, **options, beside=search) for one in texts[1:])
    if sweep == CONTROL:
        found = _controls(model, search, report, second, texts[1].table, scores, parameters)
    else:
        high, low = (Bits(int(bits), size) for bits in sweep.split("/"))
        found = _pair(model, search, report, second, texts[1].table, scores, parameters, high, low)
    runs = {"sweep": sweep, "seconds": time.monotonic() - began}
    for name in ("passes", "full"):
        runs[name] = sum(getattr(one, name) for one in (search, report, second)) / search.n
    found["runs"] = pd.DataFrame([runs])
    return Result("layer_bits", found.pop("texts"), pd.DataFrame(), {}, found)


def _pair(
    model: TransformerBridge, search: Evaluator, report: Evaluator, second: Evaluator, table: pd.DataFrame,
    scores: pd.DataFrame, parameters: dict[str, Any], high: Bits, low: Bits,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    n, sweep = search.n, f"{high.bits}/{low.bits}"
    measured = measured_importance(search, second, high, low)
    orders = orders_of({**measured, **importance_of(scores)}, parameters["n_random"], parameters["seed"])
    steps = [(name, kind, k, lowered(order, k, high, low)) for name, (kind, order) in orders.items()
             for k in sorted({*range(0, n, parameters["step"]), n})]  # fmt: skip
    return {
        "texts": _by_text(model, report, table, sweep, steps),
        "orders": pd.DataFrame([(sweep, name, kind, place, layer) for name, (kind, order) in orders.items()
                                for place, layer in enumerate(order)],
                               columns=["sweep", "order", "kind", "place", "layer"]),
        "measured": pd.DataFrame([(sweep, name, layer, value) for name, values in measured.items()
                                  for layer, value in enumerate(values)],
                                 columns=["sweep", "score", "layer", "importance"]),
    }  # fmt: skip


def _controls(
    model: TransformerBridge, search: Evaluator, report: Evaluator, second: Evaluator, table: pd.DataFrame,
    scores: pd.DataFrame, parameters: dict[str, Any],
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Half of the blocks at 4 and half at 2 bits, all at 3, and the best for single-block damages; then 2 bits or no block."""
    n, size = search.n, parameters["group_size"]
    high, low = (Bits(bits, size) for bits in TWO_LEVELS)
    choices = [Bits(bits, size) for bits in CHOICES]
    half = math.ceil(n / 2)
    measured = measured_importance(search, second, high, low)
    orders = orders_of({**measured, **importance_of(scores)}, parameters["n_random"], parameters["seed"])
    halves = {name: lowered(order, half, high, low) for name, (kind, order) in orders.items()}
    tried = [name for name, (kind, _) in orders.items() if kind != "random"]
    best = tried[int(search([halves[name] for name in tried]).nll.mean(1).argmin())]
    changes: list[Any] = [*choices, SKIP]
    alone = single_damages(search, changes)
    # whole numbers: bits of a group, its step and zero point among them, times the groups of a block
    costs = np.outer(sizes_of(model)[0] // size, [bits * size + 16 + bits for bits in CHOICES])
    budget = int(costs[:, CHOICES.index(BETWEEN)].sum())
    plans: dict[str, tuple[str, dict[int, Bits]]] = {
        f"uniform {BETWEEN} bits": ("uniform", dict.fromkeys(range(n), Bits(BETWEEN, size)))
    }
    plans["two levels, best of the search"] = ("two levels", halves[best])
    plans |= {f"two levels, by {name}": ("two levels", halves[name]) for name in ("damage", "damage, KL")}
    for by, damages in alone.items():
        found = allocate(costs // math.gcd(*costs.flat), damages[:, :-1], budget // math.gcd(*costs.flat))
        plans[f"programme, by {by}"] = ("programme", {layer: choices[choice] for layer, choice in enumerate(found)})
    plans |= {f"two levels, {name}": ("random", halves[name]) for name, (kind, _) in orders.items() if kind == "random"}
    single = {(layer, change): alone["loss"][layer, i] for layer in range(n) for i, change in enumerate(changes)}
    steps = [(name, kind, half if "two levels" in name else 0, plan) for name, (kind, plan) in plans.items()]
    texts = [_by_text(model, report, table, CONTROL, steps)]
    steps, first = [], {"2 bits": np.argsort(alone["loss"][:, 0], kind="stable").tolist(),
                        "left out": np.argsort(alone["loss"][:, -1], kind="stable").tolist()}  # fmt: skip
    for (name, order), change in zip(first.items(), (changes[0], SKIP), strict=True):
        steps += [
            (name, "damage", m, dict.fromkeys(order[:m], change)) for m in range(min(parameters["most"], n - 1) + 1)
        ]
    texts.append(_by_text(model, report, table, PRUNE, steps))
    on_search = search([plan for _, plan in plans.values()]).nll.mean(1) - search.intact.mean()
    return {
        "texts": pd.concat(texts, ignore_index=True),
        "plans": pd.DataFrame([
            {"method": name, "kind": kind, "chosen": best if "best" in name else "", "on_search": on_search[i],
             "predicted": sum(single[one] for one in plan.items()), "layer": layer, "bits": plan[layer].bits}
            for i, (name, (kind, plan)) in enumerate(plans.items()) for layer in range(n)]),
        "alone": pd.DataFrame([
            {"layer": layer, "change": "left out" if change is SKIP else f"{change.bits} bits",
             **{by: damages[layer, i] for by, damages in alone.items()}}
            for layer in range(n) for i, change in enumerate(changes)]),
    }  # fmt: skip


def _by_text(
    model: TransformerBridge, evaluate: Evaluator, table: pd.DataFrame, sweep: str, steps: Sequence[tuple]
) -> pd.DataFrame:
    """A row for each configuration and text."""
    sizes = sizes_of(model)[0]
    found, intact = evaluate([configuration for *_, configuration in steps]), evaluate.intact
    return pd.concat([
        table.assign(sweep=sweep, order=name, kind=kind, k=k, bits=mean_bits(sizes, configuration),
                     nll=found.nll[i], rise=found.nll[i] - intact, kl=found.kl[i])
        for i, (name, kind, k, configuration) in enumerate(steps)
    ], ignore_index=True)  # fmt: skip
