"""Nested training: is one net whose every prefix of layers is a model worth one net for each depth?

    result = nested.run()  # or nested.run(seeds=[0, 1], steps=300): a try

After SortedNet (arXiv 2309.00255): prefixes share weights, one final norm and one head; each step draws some, adds up their
gradients and updates once. What it does not show: anything about large models, or about widths.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import pandas as pd

from lab import datasets, require
from lab.depth_budget import seeds as over_seeds
from lab.nets import sublayers
from lab.nets.replicas import Recipe
from lab.nets.sublayers import Shape
from lab.results import Result, joined, keep, study, versions

METHODS = ("separate", "sorted", "separate_shared", "sorted_longer")
COLUMNS = {
    **over_seeds.COLUMNS,
    "method": "separate: a net for each depth; sorted: one net, prefixes drawn at each step; both with as many characters a "
    "net. standard: the deepest of the separate nets, cut. separate_shared, sorted_longer: at the standard net's compute in all",
    "size": "number of layers that run",
    "layers": "which layers run, from the first",
    "text": "report, or choose (other documents, by which the best subset is chosen)",
    "nll": "nats a character on held-out documents",
    "which": "prefix: the first layers; others: mean of all other subsets of that size; best_other: the best of them, chosen "
    "on other documents",
    "name": "method, size and which, in a word",
    "steps": "of training, of each net",
    "characters": "seen in training, by all nets of the method",
    "multiplications": "by weights in the forward passes of training, all nets of the method; the backward ones take twice that",
    "relative_compute": "multiplications, relative to training the standard net",
}


def run(
    *, seeds: Sequence[int] = range(5), n_layers: int = 6, d_model: int = 64, steps: int = 1000, batch: int = 8,
    length: int = 64, rate: float = 3e-3, sampled: int = 2, held: int = 15, resume: bool = True,
    executor: Executor | None = None, progress: bool = True,
) -> Result:  # fmt: skip
    """Loss of every prefix of one sorted net, of a net for each depth, and of a standard net that is cut; on the kit's prose.

    `.summary` compares prefixes with the net of that depth (the deepest is the price of nesting), `.tables["subsets"]` with
    other layers of the same net, `.tables["costs"]` says what was spent. Every seed splits the documents anew.

    Args:
        n_layers: of the deepest net; a layer is attention and a feed-forward net four times as wide as `d_model`.
        steps, batch, length, rate: `steps` of AdamW on `batch` stretches of `length` characters; one rate for all methods.
        sampled: how many different prefixes a sorted net learns at a step. held: documents held out, twice so many.
        resume, executor: `keep` and `study` of `lab.results`; a part is one method with one seed.
    """
    seeds, n_layers = require.wholes("seeds", seeds, 0, 2**32 - 1), require.whole("n_layers", n_layers, 2, 10)
    sampled = require.whole("sampled", sampled, 1, n_layers)
    known: dict[str, Any] = {
        "n_layers": n_layers, "d_model": require.whole("d_model", d_model, 4), "steps": require.whole("steps", steps, 1),
        "batch": require.whole("batch", batch, 1), "length": require.whole("length", length, 2, 512),
        "rate": require.number("rate", rate, above=0), "sampled": sampled, "held": require.whole("held", held, 1, 60),
    }  # fmt: skip
    if d_model % 4:
        raise ValueError(f"d_model={d_model}: give a multiple of 4, as there are four heads")
    parts = [{"seed": seed, "method": method} for seed in seeds for method in METHODS]
    found = study(work, parts, kept=keep(work, resume=resume), known=known, shared={"known": known}, executor=executor,
                  describe="trainings", progress=progress)  # fmt: skip
    table, tables = joined(found)
    parameters = {**known, "seeds": seeds, "dataset": "prose", "interval": over_seeds.HOW, "versions": versions()}
    costs = tables["costs"].query("seed == @seeds[0]").drop(columns="seed").reset_index(drop=True)
    costs["relative_compute"] = costs.multiplications / costs.multiplications[costs.method == "standard"].iloc[0]
    found_tables = {"subsets": _subsets(table, n_layers), "costs": costs}
    return Result("nested", table, _prefixes(table, n_layers), parameters, found_tables).described(COLUMNS)


def work(*, seed: int, method: str, known: dict[str, Any]) -> Result:
    """One method with one seed."""
    text = sublayers.characters(
        datasets.load("prose").text.tolist(), seed=seed, held=known["held"], length=known["length"]
    )
    sizes = {"n_tokens": text.n_tokens, "d_model": known["d_model"], "length": known["length"]}
    depth, drawn = known["n_layers"], known["sampled"]
    shapes = [Shape.of(f"A F{4 * known['d_model']}", n_layers=n, **sizes) for n in range(1, depth + 1)]
    forward = [one.n_layers * one.layer_cost + one.head_cost for one in shapes]  # for a character
    longest = drawn * (depth + 1) / (drawn + 1)  # mean of the longest of the prefixes drawn
    cost = longest * shapes[0].layer_cost + drawn * shapes[0].head_cost
    share = {"separate_shared": forward[-1] / sum(forward), "sorted_longer": forward[-1] / cost}.get(method, 1.0)
    recipe = Recipe(max(1, round(share * known["steps"])), known["batch"], known["rate"])
    seen = recipe.steps * recipe.batch * known["length"]
    subsets = [kept for n in range(1, depth + 1) for kept in itertools.combinations(range(depth), n)]

    def rows(shape: Shape, weights: Any, kept: Sequence[tuple[int, ...]], name: str) -> list[dict[str, Any]]:
        return [
            {"method": name, "size": len(one), "layers": ",".join(map(str, one)), "text": which,
             "nll": float(sublayers.score(shape, weights, stretches, one)[0])}
            for one in kept for which, stretches in (("choose", text.choose), ("report", text.report))
        ]  # fmt: skip

    if method.startswith("sorted"):
        weights = sublayers.train(shapes[-1], text.train, recipe, seed=seed,
                                  prefixes=lambda rng: (1 + rng.permutation(depth)[:drawn]).tolist())  # fmt: skip
        found = rows(shapes[-1], weights, subsets, method)
        costs = [(method, recipe.steps, seen, seen * cost)]
    else:
        found, costs = [], [(method, recipe.steps, depth * seen, seen * sum(forward))]
        for shape in shapes:
            weights = sublayers.train(shape, text.train, recipe, seed=seed)
            found += rows(shape, weights, [tuple(range(shape.n_layers))], method)
        if method == "separate":
            found += rows(shapes[-1], weights, subsets, "standard")
            costs.append(("standard", recipe.steps, seen, seen * forward[-1]))
    table = pd.DataFrame(found).assign(seed=seed)
    names = ["method", "steps", "characters", "multiplications"]
    return Result("nested", table, pd.DataFrame(), {}, {"costs": pd.DataFrame(costs, columns=names).assign(seed=seed)})


def _prefixes(table: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """Each prefix against the net of that depth with as many characters."""
    first = {",".join(map(str, range(n))): n for n in range(1, n_layers + 1)}
    rows = table[(table.text == "report") & table.layers.isin(first)]
    runs = rows.assign(name=rows.method + " " + rows["size"].astype(str)).pivot(
        index="seed", columns="name", values="nll"
    )
    pairs: list[tuple[str, str | None]] = [(f"separate {n}", None) for n in first.values()]
    pairs += [(f"{name} {n}", f"separate {n}") for name in (*METHODS[1:], "standard") for n in first.values()
              if (name, n) != ("standard", n_layers)]  # fmt: skip
    return _named(over_seeds.compared(runs, pairs))


def _subsets(table: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """Prefixes against all other subsets of that size, of the sorted net and of the standard one."""
    runs = {}
    for (name, seed, n), rows in table[table.method.isin(["sorted", "standard"])].groupby(["method", "seed", "size"]):
        both = rows.pivot(index="layers", columns="text", values="nll")
        others = both.drop(",".join(map(str, range(n))))
        runs[f"{name} {n} prefix", seed] = both.report.drop(others.index).iloc[0]
        if len(others):
            runs[f"{name} {n} others", seed] = others.report.mean()
            runs[f"{name} {n} best_other", seed] = others.report[others.choose.idxmin()]
    frame = pd.Series(runs).unstack(0)
    whiches = ("prefix", "others", "best_other")
    pairs = [
        (f"{name} {n} {which}", None if which == "prefix" else f"{name} {n} prefix")
        for name, n, which in itertools.product(("sorted", "standard"), range(1, n_layers), whiches)
    ]
    return _named(over_seeds.compared(frame, pairs))


def _named(table: pd.DataFrame) -> pd.DataFrame:
    words = [name.split(" ") for name in table["name"]]
    which = [word[2] if len(word) > 2 else "prefix" for word in words]
    return table.assign(method=[word[0] for word in words], size=[int(word[1]) for word in words], which=which)
