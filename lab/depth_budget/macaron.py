"""The Macaron layer: is half a feed-forward net before attention and half behind it worth more than one behind it?

    result = macaron.run()  # or macaron.run(seeds=[0, 1], steps=200, rates=[4e-3]): a try

After Lu et al. (arXiv 1906.02762), who read a layer as a step of a splitting scheme for ordinary differential equations. The two
halves have weights of their own, so it is not that scheme for any given field. The variants tell halving the steps, the place
of the sublayers and their number apart, at equal parameters and equal text. What it does not show: long training.
"""

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

LAYERS = ("A F256", "F128/2 A F128/2", "F128 A F128", "A F128 F128", "F128 F128 A")  # the usual one first
TOLERANCE = 0.005  # of parameters, relative to the first
COLUMNS = {
    **over_seeds.COLUMNS,
    "layer": "its sublayers in order: A attention, F128 a feed-forward net of 128 units, /2: half of it is added",
    "parameters": "of the whole net",
    "rate": "learning rate; in the summary the one with the lowest choose_nll, mean over seeds",
    "choose_nll": "nats a character on the documents that choose the rate",
    "report_nll": "nats a character on other documents",
    "mean": "report_nll at that rate, mean over seeds",
    "at_edge": "the chosen rate is the lowest or highest of those tried, so a better one may lie beyond",
    "name": "the layer",
}


def run(
    layers: Sequence[str] = LAYERS, *, seeds: Sequence[int] = range(5), rates: Sequence[float] = (2e-3, 4e-3, 8e-3),
    n_layers: int = 4, d_model: int = 64, steps: int = 600, batch: int = 8, length: int = 64, held: int = 15,
    resume: bool = True, executor: Executor | None = None, progress: bool = True,
) -> Result:  # fmt: skip
    """Loss of nets whose layers have the same parts in another order, on the kit's prose; each against the first.

    Every variant has its own learning rate, chosen on documents that report nothing. Every seed splits the documents anew.

    Args:
        layers: variants in words (`lab.nets.sublayers.Shape.of`), all of one size to half a per cent (a third norm is allowed).
        rates: learning rates tried for each variant. steps, batch, length: of AdamW, on `batch` stretches of `length`.
        held: documents held out, twice so many. resume, executor: `keep` and `study` of `lab.results`; a part is one variant
            with one seed.
    """
    layers, seeds = require.listed("layers", layers, "layers", least=2), require.wholes("seeds", seeds, 0, 2**32 - 1)
    known: dict[str, Any] = {
        "rates": require.numbers("rates", rates, above=0, once=True), "n_layers": require.whole("n_layers", n_layers, 1, 24),
        "d_model": require.whole("d_model", d_model, 4), "steps": require.whole("steps", steps, 1),
        "batch": require.whole("batch", batch, 1), "length": require.whole("length", length, 2, 512),
        "held": require.whole("held", held, 1, 60),
    }  # fmt: skip
    if d_model % 4:
        raise ValueError(f"d_model={d_model}: give a multiple of 4, as there are four heads")
    documents = datasets.load("prose").text.tolist()
    n_tokens = sublayers.characters(documents, seed=0, held=known["held"], length=length).n_tokens
    sizes = {layer: _shape(layer, known, n_tokens).parameters for layer in layers}
    wrong = {layer: size for layer, size in sizes.items() if abs(size / sizes[layers[0]] - 1) > TOLERANCE}
    if wrong:
        raise ValueError(
            f"{wrong} parameters against {sizes[layers[0]]} of {layers[0]!r}: change widths until they agree"
        )
    parts = [{"seed": seed, "layer": layer} for seed in seeds for layer in layers]
    found = study(work, parts, kept=keep(work, resume=resume), known=known, shared={"known": known}, executor=executor,
                  describe="trainings", progress=progress)  # fmt: skip
    table = joined(found)[0]
    parameters = {
        **known,
        "layers": layers,
        "seeds": seeds,
        "dataset": "prose",
        "interval": over_seeds.HOW,
        "versions": versions(),
    }
    return Result("macaron", table, _summarise(table, layers), parameters).described(COLUMNS)


def work(*, seed: int, layer: str, known: dict[str, Any]) -> Result:
    """One variant with one seed, at every rate."""
    text = sublayers.characters(
        datasets.load("prose").text.tolist(), seed=seed, held=known["held"], length=known["length"]
    )
    shape, rows = _shape(layer, known, text.n_tokens), []
    for rate in known["rates"]:
        weights = sublayers.train(shape, text.train, Recipe(known["steps"], known["batch"], rate), seed=seed)
        choose, report = (
            float(sublayers.score(shape, weights, one, range(shape.n_layers))[0]) for one in (text.choose, text.report)
        )
        rows.append({"layer": layer, "rate": rate, "choose_nll": choose, "report_nll": report})
    table = pd.DataFrame(rows).assign(parameters=shape.parameters, seed=seed)
    return Result("macaron", table, pd.DataFrame(), {})


def _shape(layer: str, known: dict[str, Any], n_tokens: int) -> Shape:
    return Shape.of(layer, n_tokens=n_tokens, **{name: known[name] for name in ("n_layers", "d_model", "length")})


def _summarise(table: pd.DataFrame, layers: Sequence[str]) -> pd.DataFrame:
    chosen = table.groupby(["layer", "rate"]).choose_nll.mean().unstack().idxmin(axis=1)
    kept = table[table.rate == table.layer.map(chosen)]
    runs = kept.pivot(index="seed", columns="layer", values="report_nll")
    found = over_seeds.compared(runs, [(layers[0], None), *((layer, layers[0]) for layer in layers[1:])])
    about = table.drop_duplicates("layer").set_index("layer").parameters
    edges = {table.rate.min(), table.rate.max()} if table.rate.nunique() > 1 else set()
    rate = found["name"].map(chosen)
    return found.assign(layer=found["name"], parameters=found["name"].map(about), rate=rate, at_edge=rate.isin(edges))
