"""What are the features of a net's first n blocks worth on another task, and in another net?

    result = transfer.run("D")                             # digits: a minute or three on two cores
    result = transfer.run("S", "standard", distance="far") # Markov chains against rules
    result.summary                                         # four curves over n, paired, with intervals

After Yosinski et al. (arXiv 1411.1792), carried over to small transformers, with what that work lacks: every difference paired
by split, seed and target; equal steps; accuracy after the last step; random features with matched sizes; a gate.
"""

import difflib
import inspect
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from lab import require
from lab.nets import replicas
from lab.nets.replicas import Recipe, Shape, Weights
from lab.results import Result, check_executor, joined, keep, study, versions
from lab.transfer import statistics, tasks
from lab.transfer.tasks import SIDES, Task, seed_of

METRICS = ("accuracy", "nll")
_FROZEN = ("BnB", "AnB", "random", "random_matched")
_MATCHED_ON = 256  # training examples on which sizes are matched


class _Columns(dict[str, str]):
    """What columns mean; a further column of "items" is called after the net whose predictions it holds."""

    def get(self, key: str, default: Any = "") -> Any:
        return super().get(key) or default or ("class predicted by that net" if key.startswith("items.") else "")


COLUMNS = _Columns({
    "task": "D or S", "distance": "near or far", "split": "number of the split, which makes the halves",
    "seed": "of examples, weights and batches", "target": "half trained and tested on", "treatment": "see statistics.TREATMENTS",
    "part": "what was copied: none, embedding, or blocks (and the embedding)", "n": "number of blocks copied",
    "metric": "accuracy; nll and train_loss in nats", "value": "of the metric, after the last step",
    "gate": "passed, or base failed and why; then the bases are all there is", "side": "half of a base",
    "accuracy": "of that base", "least": "accuracy wanted", "most": "accuracy at the ceiling",
    "item": "number of the test item", "label": "its class", "curve": "see statistics.CURVES",
    "estimate": "mean over clusters of paired differences (nll: sign turned)", "levels.estimate": "mean over clusters",
    "difference": "of two treatments (nll: sign turned)", "low": "of the 95 % t interval over clusters", "high": "see low",
    "boot_low": "of a bootstrap over clusters, which is too narrow", "boot_high": "see boot_low", "p": "t test against 0",
    "p_holm": "p, Holm-corrected over n of blocks", "n_pairs": "number of pairs", "n_runs": "number of nets",
    "n_clusters": "number of (split, seed)", "n_star": "first n from which on specificity is above 0",
    "n_star_holm": "the same by p_holm", "n_max": "largest n measured",
})  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Sizes of one task at one scale. n: blocks copied; seeds: how many a split; targets: halves trained on."""

    n_blocks: int
    recipe: Recipe
    n: tuple[int, ...]
    splits: int
    targets: tuple[str, ...] = ("B",)
    seeds: int = 1
    d_model: int = 64
    n_heads: int = 2
    skip: bool = True
    sizes: dict[str, Any] = field(default_factory=dict)


# Steps and data were cut until the bases just passed their gates on two CPU cores, well below the ceiling: D 0.84 to 0.95
# (chance 0.2), S 0.65 to 0.81 (chance 0.05). On D, steps of 4 learn as much as steps of 8. Nothing of "full" has been run.
_D = Recipe(steps=400, batch=4, rate=1e-3, decay=0.01)
_S = Recipe(steps=600, batch=16, rate=3e-3, decay=0.1)
_LONG_S = replace(_S, steps=2000, rate=1e-3)
_WIDE: dict[str, Any] = {"d_model": 128, "n_heads": 4, "sizes": {"train_per_class": 500}}
PRESETS: dict[str, dict[str, Preset]] = {
    "quick": {"D": Preset(6, _D, (0, 1, 2, 4, 6), splits=5), "S": Preset(4, _S, (0, 2, 4), splits=2)},
    "standard": {
        "D": Preset(6, _D, tuple(range(7)), splits=10, targets=SIDES),
        "S": Preset(4, _S, tuple(range(5)), splits=4, targets=SIDES),
    },
    "full": {
        "D": Preset(6, _D, tuple(range(7)), splits=20, targets=SIDES, seeds=3),
        "S": Preset(8, _LONG_S, tuple(range(9)), splits=4, targets=SIDES, seeds=3, **_WIDE),
    },
}


@dataclass(frozen=True)
class _Planned:
    """One net to train for a target: which treatment, how much is copied, from where, and whether it stays frozen."""

    target: str
    treatment: str
    part: str = "none"
    n: int = 0

    @property
    def name(self) -> str:
        return statistics.run_name(self.treatment, self.part, self.n)

    @property
    def frozen(self) -> bool:
        return self.treatment in _FROZEN and self.part != "none"


def run(
    task: str = "S", preset: str = "quick", *, seed: int = 0, distance: str = "near", n: Sequence[int] | None = None,
    splits: int | None = None, seeds: int | None = None, targets: Sequence[str] | None = None, steps: int | None = None,
    n_blocks: int | None = None, skip: bool = True, embedding_only: bool = True, random: bool = True,
    halves: tuple[Sequence[int], Sequence[int]] | None = None, gate: float | None = None, at_once: int = 12,
    resume: bool = True, executor: Executor | None = None, progress: bool = True, **sizes: Any,
) -> Result:  # fmt: skip
    """Train all treatments (`statistics.TREATMENTS`) of one task for each split and seed, and compare them pairwise.

    Final norm and classifier are always fresh; what is not copied comes from one fresh net a target, and so does the order
    of batches. n = 0 ("BnB" with nothing copied) is a new seed of the base. Departures from the paper: blocks for layers; the
    embedding travels with n >= 1; tokens that the other half lacks get fresh rows that train. Compare treatments at one n, not
    points along a curve. Other numbers of threads round otherwise, and training turns that into other nets.

    Args:
        n, splits, seeds, targets, steps, n_blocks: instead of those of `PRESETS`; with other `n_blocks` pass n as well.
        distance, halves, sizes: of the task, see `tasks.make`. gate: least accuracy of the bases, instead of its own.
        skip: False: blocks replace the stream, as layers do in the paper's nets; then without random_matched, as the norm
            that reads an update undoes its scale. embedding_only: also the embedding alone copied. random: also random nets.
        at_once: replicas trained in one batch (memory against time).
    """
    tasks.check(task, distance)
    _check_options(task, sizes)
    check_executor(executor)
    seed, at_once = require.seed(seed, hint="; seeds= says how many"), require.whole("at_once", at_once, 1)
    skip, embedding_only, random = require.flags(skip=skip, embedding_only=embedding_only, random=random)
    given = {"n": n, "splits": splits, "seeds": seeds, "targets": targets, "steps": steps, "n_blocks": n_blocks}
    chosen = _sizes(task, preset, given, skip=skip)
    if halves is not None:
        halves = tasks.check_halves(halves, 10 if task == "D" else 40)
    example = tasks.make(task, distance=distance, split=0, seed=seed, halves=halves, **chosen.sizes | sizes)
    chosen = replace(chosen, sizes=chosen.sizes | {name: (example.sizes or {})[name] for name in sizes})
    settings = {
        "task": task, "distance": distance, **asdict(chosen), "embedding_only": embedding_only, "random": random,
        "halves": halves and [list(half) for half in halves], "ceiling": example.gate.most,
        "gate": example.gate.least if gate is None else require.number("gate", gate, 0, 1),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    known = {name: value for name, value in settings.items() if name not in ("splits", "seeds")}
    every = range(seed, seed + chosen.seeds)
    places = [{"split": split, "seed": one} for split in range(chosen.splits) for one in every]
    parts = study(
        work, places, kept=keep(work, resume=resume), known={"settings": known}, executor=executor, describe="splits",
        shared={"settings": known, "at_once": at_once, "progress": progress and executor is None}, progress=progress,
    )  # fmt: skip
    table, tables = joined(parts)
    _say_failures(tables["gate"], len(places))
    scored, summary = _scored(table), pd.DataFrame(columns=statistics.CURVE_COLUMNS)
    if len(scored):
        summary = statistics.curves(scored)
        tables |= {"levels": statistics.levels(scored), "differences": statistics.differences(scored)}
        tables["n_star"] = statistics.n_star(summary)
    skips = "" if skip else ", no skip connections"
    parameters = {
        **settings, "preset": preset, "seed": seed, "dataset": task, "n_classes": example.n_classes,
        "model": f"transformer, {chosen.n_blocks} blocks, d_model {chosen.d_model}{skips}",
        "data_checksum": example.checksum(), "versions": versions(),
    }  # fmt: skip
    return Result("transfer", table, summary, parameters, tables).described(COLUMNS)


def _scored(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and nll of the runs whose bases passed."""
    return statistics.passed(table)[lambda rows: rows.metric.isin(METRICS)]


def compare(result: Result, first: str, second: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """First minus second, paired, at every n: tables of `statistics.differences` and of `statistics.curves`."""
    scored = _scored(result.table)
    there = sorted(scored.treatment.unique())
    if first == second or not {first, second} <= {*there}:
        raise ValueError(f"compare({first!r}, {second!r}): pass two of {', '.join(there) or 'none (no split passed)'}")
    chosen = {f"{first} - {second}": (first, second)}
    return statistics.differences(scored, chosen), statistics.curves(scored, chosen)


def task_of(result: Result, split: int = 0, seed: int | None = None) -> Task:
    """The task of one split and seed (None: the run's first), made again from a result's parameters: to see its examples."""
    about = result.parameters
    seed = about["seed"] if seed is None else seed
    return tasks.make(
        about["task"], distance=about["distance"], split=split, seed=seed, halves=about["halves"], **about["sizes"]
    )


# --- one part: one split and seed -----------------------------------------------------------------------------------


def work(*, split: int, seed: int, settings: dict[str, Any], at_once: int, progress: bool) -> Result:
    """Bases, gate, and all treatments of one split and seed."""
    task = tasks.make(
        settings["task"], distance=settings["distance"], split=split, seed=seed, halves=settings["halves"],
        **settings["sizes"],
    )  # fmt: skip
    about = {"task": task.name, "distance": task.distance, "split": split, "seed": seed}
    shape = _shape(task, *(settings[name] for name in ("n_blocks", "d_model", "n_heads", "skip")))
    pool = _Pool(task, shape, Recipe(**settings["recipe"]), {"at_once": at_once, "progress": progress})
    start = replicas.initial(shape, [seed_of("base", *_where(task), side) for side in SIDES])
    trained, scores = pool.train(
        [_Planned(side, "base") for side in SIDES], start, f"split {split}, seed {seed}: bases"
    )
    bases = {side: replicas.pick(trained, [place]) for place, side in enumerate(SIDES)}
    accuracy = {net.target: score["accuracy"] for net, score in scores.items()}
    verdict = tasks.Gate(settings["gate"], settings["ceiling"]).verdict(accuracy)
    gate = [{**about, "side": side, "accuracy": accuracy[side], "least": settings["gate"], "most": settings["ceiling"],
             "gate": verdict} for side in SIDES]  # fmt: skip
    plan = _plan(settings) if verdict == "passed" else []
    if plan:
        start = replicas.join([_start(shape, task, bases, net) for net in plan])
        scores |= pool.train(plan, start, f"split {split}, seed {seed}: treatments")[1]
    rows, items = [], []
    for target in settings["targets"] if plan else SIDES:
        mine = {net: score for net, score in scores.items() if net.target == target}
        for net, score in mine.items():
            where = {**about, "target": target, "treatment": net.treatment, "part": net.part, "n": net.n}
            rows += [{**where, "metric": name, "value": score[name]} for name in (*METRICS, "train_loss")]
        labels, predicted = pool.test[target][1].numpy(), {net.name: score["predicted"] for net, score in mine.items()}
        places = {"target": target, "item": np.arange(len(labels)), "label": labels}
        items.append(pd.DataFrame({**about, **places, **predicted}))
    tables = {"gate": pd.DataFrame(gate), "items": pd.concat(items, ignore_index=True)}
    return Result("transfer", pd.DataFrame(rows).assign(gate=verdict), pd.DataFrame(), {**settings, **about}, tables)


def _where(task: Task) -> tuple[str, str, int, int]:
    return task.name, task.distance, task.split, task.seed


def _plan(settings: dict[str, Any]) -> list[_Planned]:
    """All nets of a shard but the bases, in a fixed order."""
    copies = ["BnB", "AnB", "BnB_plus", "AnB_plus"]
    nets = []
    for target in settings["targets"]:
        nets.append(_Planned(target, "base2"))
        if 0 in settings["n"]:
            nets.append(_Planned(target, "BnB"))
        if settings["embedding_only"]:
            extra = ["random"] if settings["random"] else []
            nets += [_Planned(target, treatment, "embedding") for treatment in copies + extra]
        # without a stream, the norm that reads an update undoes any scale of it: matching sizes would change nothing
        extra = (["random", "random_matched"] if settings["skip"] else ["random"]) if settings["random"] else []
        for n in settings["n"]:
            if n:
                nets += [_Planned(target, treatment, "blocks", n) for treatment in copies + extra]
    return nets


def _start(shape: Shape, task: Task, bases: dict[str, Weights], net: _Planned) -> Weights:
    """Weights of a net before training: [1, ...]."""
    if net.treatment == "base2":
        return replicas.pick(bases[net.target], [0])
    where, other = (*_where(task), net.target), tasks.other(net.target)
    start = replicas.initial(shape, [seed_of("fresh", *where)])
    if net.part == "none":
        return start
    if net.treatment.startswith("random"):
        source = replicas.initial(shape, [seed_of("random", *where)])
        if net.treatment == "random_matched":
            seen = torch.as_tensor(task.sides[net.target].train.inputs)
            chosen = np.random.default_rng(seed_of("matched", *where)).permutation(len(seen))[:_MATCHED_ON]
            source = replicas.match_sizes(shape, source, bases[other], seen[torch.as_tensor(chosen)])
    else:
        source = bases[net.target if net.treatment.startswith("BnB") else other]
    fresh, own = start["embedding"].clone(), torch.as_tensor(task.own_tokens(net.target))
    start |= {name: source[name].clone() for name in replicas.below(shape, net.n)}
    start["embedding"][:, own] = fresh[:, own]  # in all treatments alike: specificity is about the blocks
    return start


def _trained_rows(task: Task, net: _Planned) -> torch.Tensor:
    """Which rows of the embedding train: all, or in a frozen net those of tokens that the other half lacks."""
    rows = torch.full((task.n_inputs,), not net.frozen)
    rows[torch.as_tensor(task.own_tokens(net.target))] = True
    return rows


class _Pool:
    """Training examples of both halves as one array, each half's order of batches, and its test examples."""

    def __init__(self, task: Task, shape: Shape, recipe: Recipe, options: dict[str, Any]) -> None:
        self.task, self.shape, self.recipe, self.options = task, shape, recipe, options
        train = [task.sides[side].train for side in SIDES]
        self.inputs = torch.as_tensor(np.concatenate([part.inputs for part in train]))
        self.labels = torch.as_tensor(np.concatenate([part.labels for part in train]))
        ends = np.cumsum([0, *(len(part.labels) for part in train)])
        self.rows = {side: np.arange(ends[place], ends[place + 1]) for place, side in enumerate(SIDES)}
        self.seeds = {side: seed_of("order", *_where(task), side) for side in SIDES}
        self.test = {side: (torch.as_tensor(half.test.inputs), torch.as_tensor(half.test.labels))
                     for side, half in task.sides.items()}  # fmt: skip

    def train(self, nets: Sequence[_Planned], start: Weights, words: str) -> tuple[Weights, dict[_Planned, Any]]:
        """Weights after training, the same batches for all nets of a target, and what each net scores on its test examples."""
        targets = [net.target for net in nets]
        order = replicas.orders([self.rows[one] for one in targets], [self.seeds[one] for one in targets], self.recipe)
        trained = replicas.train(
            self.shape, start, self.inputs, self.labels, order, self.recipe, describe=words, **self.options,
            frozen_blocks=[net.n if net.frozen else 0 for net in nets],
            trained_rows=torch.stack([_trained_rows(self.task, net) for net in nets]),
        )  # fmt: skip
        scores = {}
        for target in dict.fromkeys(targets):
            mine, (inputs, labels) = [place for place, one in enumerate(targets) if one == target], self.test[target]
            found = replicas.log_probabilities(self.shape, replicas.pick(trained.weights, mine), inputs)
            for place, log_p in zip(mine, found, strict=True):
                predicted, right = log_p.argmax(-1), labels.numpy()
                scores[nets[place]] = {
                    "accuracy": float((predicted == right).mean()), "nll": float(-log_p[np.arange(len(right)), right].mean()),
                    "train_loss": float(trained.loss[place]), "predicted": predicted,
                }  # fmt: skip
        return trained.weights, scores


# --- checks and messages --------------------------------------------------------------------------------------------


def _check_options(task: str, sizes: dict[str, Any]) -> None:
    """Misspelt options arrive among the sizes of the task."""
    options = [name for name in inspect.signature(run).parameters if name not in ("task", "preset", "sizes")]
    known = tasks.sizes_of(task)
    for name in [name for name in sizes if name not in known]:
        near = difflib.get_close_matches(name, options + known, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        there = f"options are {', '.join(options)}; sizes of task {task} are {', '.join(known)}"
        raise ValueError(f"there is no option {name}{meant}; {there}")


def _sizes(task: str, preset: str, given: dict[str, Any], *, skip: bool) -> Preset:
    """The preset's sizes, with those that were given instead."""
    usual = PRESETS[require.one_of("preset", preset, PRESETS)][task]
    chosen = {
        **vars(usual),
        "steps": usual.recipe.steps,
        **{name: one for name, one in given.items() if one is not None},
    }
    blocks = require.whole("n_blocks", chosen["n_blocks"], 1)
    return replace(
        usual, n_blocks=blocks, skip=skip, n=tuple(sorted(require.wholes("n", chosen["n"], 0, blocks))),
        splits=require.whole("splits", chosen["splits"], 1), seeds=require.whole("seeds", chosen["seeds"], 1),
        targets=tuple(require.some_of("targets", chosen["targets"], SIDES)),
        recipe=replace(usual.recipe, steps=require.whole("steps", chosen["steps"], 1)),
    )  # fmt: skip


def _shape(task: Task, n_blocks: int, d_model: int, n_heads: int, skip: bool = True) -> Shape:
    return Shape(
        n_blocks=n_blocks, d_model=d_model, n_heads=n_heads, n_positions=task.n_positions, n_classes=task.n_classes,
        n_inputs=task.n_inputs, patches=task.patches, causal=task.causal, skip=skip,
    )  # fmt: skip


def _say_failures(gate: pd.DataFrame, shards: int) -> None:
    failed = gate[gate.gate != "passed"].drop_duplicates(["split", "seed"])
    for row in failed.itertuples():
        print(f"task {row.task} {row.distance}, split {row.split}, seed {row.seed}: {row.gate}.")
    if len(failed):
        remedy = "Below the gate: more steps or examples; at the ceiling: fewer, or more noise."
        print(f"{len(failed)} of {shards} left out of every curve. {remedy}")
