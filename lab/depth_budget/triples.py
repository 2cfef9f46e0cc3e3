"""Third-order attention against depth: does one layer that sees pairs do what several layers of the usual attention don't?

    result = triples.run()  # or triples.run(seeds=[0, 1], steps=600): a try

After arXiv 2310.04064, which is theory. The impossibility that it rests on is about ONE usual layer and long inputs; for several
layers it is a conjecture. Nets of this size could learn short inputs by heart, so this shows a gap in training, never an
impossibility.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import pandas as pd

from lab import require
from lab.depth_budget import seeds as over_seeds
from lab.nets import triples
from lab.nets.replicas import Recipe
from lab.results import Result, joined, keep, study, versions

NETS = {
    "triples 1": (3, 1, 1),
    "pairs 1": (2, 1, 1),
    "pairs 2": (2, 2, 1),
    "pairs 3": (2, 3, 1),
    "pairs 3 longer": (2, 3, 3),
}
COLUMNS = {
    **over_seeds.COLUMNS,
    "net": "attention over triples or pairs and the number of layers; longer: three times as many steps",
    "task": "match2, the control that every net should solve, or match3",
    "step": "steps of training so far",
    "accuracy": "share of positions answered rightly on examples that are not trained on",
    "majority": "what always saying the more frequent answer reaches on them",
    "parameters": "of the net",
    "mean": "accuracy after the last step, mean over seeds",
    "above_majority": "mean accuracy minus majority",
    "name": "the net",
    "p_holm": "p, Holm-corrected over the nets of one task",
}


def run(
    *, n: int = 8, modulus: int = 53, seeds: Sequence[int] = range(5), steps: int = 2000, batch: int = 64, rate: float = 2e-3,
    hidden: int = 320, tested: int = 2000, nets: Sequence[str] = tuple(NETS), resume: bool = True,
    executor: Executor | None = None, progress: bool = True,
) -> Result:  # fmt: skip
    """Accuracy on Match3 and Match2 of one third-order layer and of 1, 2, 3 usual ones, all with as many parameters.

    Numbers are drawn anew at each step and enter as cosines and sines. With n = 8 and modulus 53 about half of all positions
    have a Match3, a seventh a Match2. Compare with the majority: a net may count what is likely and find nothing.

    Args:
        n, modulus: how many numbers in an example, below what. hidden: units of the third-order net's feed-forward net;
            those of the others make up for the smaller attention.
        rate: of all nets. tested: examples that accuracy is measured on. nets: some of `NETS`, triples 1 among them.
        resume, executor: `keep` and `study` of `lab.results`; a part is one net with one seed.
    """
    nets, seeds = require.some_of("nets", nets, NETS), require.wholes("seeds", seeds, 0, 2**32 - 1)
    known: dict[str, Any] = {
        "n": require.whole("n", n, 2, 24), "modulus": require.whole("modulus", modulus, 3),
        "steps": require.whole("steps", steps, 1), "batch": require.whole("batch", batch, 1),
        "rate": require.number("rate", rate, above=0), "hidden": require.whole("hidden", hidden, 1),
        "tested": require.whole("tested", tested, 1),
    }  # fmt: skip
    if "triples 1" not in nets:
        raise ValueError(f"nets={nets}: triples 1 is what the others are compared with")
    parts = [{"seed": seed, "net": net} for seed in seeds for net in nets]
    found = study(work, parts, kept=keep(work, resume=resume), known=known, shared={"known": known}, executor=executor,
                  describe="trainings", progress=progress)  # fmt: skip
    table = joined(found)[0]
    last = table[table.step == table.groupby("net").step.transform("max")]
    rows = []
    for task, part in last.groupby("task", sort=False):
        pairs = [("triples 1", None), *((net, "triples 1") for net in nets if net != "triples 1")]
        compared = over_seeds.compared(part.pivot(index="seed", columns="net", values="accuracy"), pairs)
        majority, size = (
            part.groupby("net")[name].mean().reindex(compared["name"]).to_numpy() for name in ("majority", "parameters")
        )
        rows.append(
            compared.assign(task=task, majority=majority, parameters=size, above_majority=compared["mean"] - majority)
        )
    summary = pd.concat(rows, ignore_index=True).assign(net=lambda frame: frame["name"])
    parameters = {**known, "seeds": seeds, "nets": nets, "interval": over_seeds.HOW, "versions": versions()}
    return Result("triples", table, summary, parameters).described(COLUMNS)


def work(*, seed: int, net: str, known: dict[str, Any]) -> Result:
    """One net with one seed."""
    order, n_layers, longer = NETS[net]
    wanted = triples.Shape(3, 1, known["hidden"], known["modulus"]).parameters
    shape = triples.of_size(order, n_layers, wanted, known["modulus"])
    recipe = Recipe(longer * known["steps"], known["batch"], known["rate"])
    rows = triples.train(shape, known["n"], recipe, seed=seed, tested=known["tested"])
    return Result(
        "triples", pd.DataFrame(rows).assign(net=net, parameters=shape.parameters, seed=seed), pd.DataFrame(), {}
    )
